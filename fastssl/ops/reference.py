"""Every op once in plain PyTorch, on any device and in float64: the specification that all backends are tested against.

Inputs have been checked by the public op of the same name; what is written here is the formula.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastssl.ops import blur
from fastssl.ops.deal import Deal, share
from fastssl.ops.photometric import COLUMNS, JITTER_ORDERS, NEUTRAL, PHOTOMETRIC, GaussianBlur, Step

HALF = (torch.float16, torch.bfloat16)
Valid = tuple[int | Tensor, int | Tensor]


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None,
    temperature: float | Tensor,
    reduction: str,
    negative_mode: str,
    negatives_normalized: bool,
    valid: Valid | None,
) -> Tensor:
    """Normalise, multiply, and take the cross-entropy of the positive among all keys; half inputs in float32."""
    dtype = loss_dtype(query, temperature)
    device = "cpu" if query.is_meta else query.device.type  # which has no autocast
    with torch.autocast(device, enabled=False):  # it would round the product's factors to half
        query = F.normalize(in_float(query), dim=-1)  # N×D
        positive_key = F.normalize(in_float(positive_key), dim=-1)  # N×D
        if negative_keys is None:
            logits = query @ positive_key.T / temperature  # N×N, positives on the diagonal
            labels = torch.arange(query.shape[0], device=query.device)
            return F.cross_entropy(logits, labels, reduction=reduction).to(dtype)
        negative_keys = negative_keys.to(query.dtype)
        if not negatives_normalized:
            negative_keys = F.normalize(negative_keys, dim=-1)  # M×D, or N×M×D when paired
        positive = (query * positive_key).sum(1, keepdim=True)  # N×1
        if negative_mode == "paired":
            negative = (query.unsqueeze(1) @ negative_keys.mT).squeeze(1)  # N×M
        else:
            negative = query @ negative_keys.T  # N×M
        logits = torch.cat([positive, negative], 1) / temperature  # N×(1+M)
        if valid is not None:  # after the division: -inf in it would make a tensor temperature's gradient NaN
            invalid = ~valid_rows(valid, negative_keys.shape[0], query.device)
            logits = logits.masked_fill(F.pad(invalid, (1, 0)), -torch.inf)
        labels = torch.zeros(query.shape[0], dtype=torch.long, device=query.device)
        return F.cross_entropy(logits, labels, reduction=reduction).to(dtype)


def loss_dtype(query: Tensor, temperature: float | Tensor = 1.0) -> torch.dtype:
    """The query's dtype; float32 for a half one under autocast, like torch's losses; a wide temperature widens it."""
    dtype = query.dtype
    if isinstance(temperature, Tensor) and temperature.dim() > 0:
        dtype = torch.promote_types(dtype, temperature.dtype)
    return torch.promote_types(dtype, torch.float32) if autocast(query) else dtype


def autocast(x: Tensor) -> bool:
    """Whether autocast is on for the device of `x`."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def in_float(x: Tensor) -> Tensor:
    """Half tensors as float32: normalising loses no digits there, and eps 1e-12 is not 0."""
    return x.float() if x.dtype in HALF else x


def valid_rows(valid: Valid, rows: int, device: torch.device) -> Tensor:
    """A mask of the `count` rows that begin at `first`, wrapping at the end; nothing is read back to the host."""
    first, count = valid
    rows = max(rows, 1)
    return (torch.arange(rows, device=device) - first % rows) % rows < count


def normalized_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """‖p/‖p‖ − z/‖z‖‖² = 2 − 2·cos(p, z) per row, as a sum of squares: never negative, and exact near 0."""
    p, z = F.normalize(in_float(prediction), dim=-1), F.normalize(in_float(target.detach()), dim=-1)
    return (p - z).square().sum(-1).to(loss_dtype(prediction))


@torch.no_grad()
def ema_update_(targets: list[Tensor], sources: list[Tensor], shadows: list[Tensor], momentum: float | Tensor) -> None:
    """θ_k ← m·θ_k + (1−m)·θ_q, tensor by tensor."""
    for target, source in zip(targets, sources, strict=True):
        if target.is_floating_point():
            target.mul_(momentum).add_(source.to(target.dtype) * (1 - momentum))
        else:
            target.copy_(source)
    for target, shadow in zip(targets, shadows, strict=bool(shadows)):
        shadow.copy_(target)


@torch.no_grad()
def enqueue_(queue: Tensor, tail: Tensor, filled: Tensor, arrived: Tensor, keys: Tensor) -> None:
    """Write normalised `keys` behind the newest row, wrapping; what does not fit pushes the oldest rows out.

    `arrived` is the GPU kernel's.
    """
    capacity, count = len(queue), len(keys)
    kept = keys[max(0, count - capacity) :]  # of more keys than rows, the newest stay
    first = tail + filled + (count - len(kept))
    rows = (first + torch.arange(len(kept), device=queue.device)) % capacity
    queue.index_copy_(0, rows, F.normalize(in_float(kept), dim=-1).to(queue.dtype))
    overflow = (filled + count - capacity).clamp(min=0)
    tail.copy_((tail + overflow) % capacity)
    filled.copy_(filled + count - overflow)


@torch.no_grad()
def dequeue_(tail: Tensor, filled: Tensor, capacity: int, count: int) -> None:
    """Drop the `count` oldest rows, or all if there are fewer."""
    dropped = filled.clamp(max=count)
    tail.copy_((tail + dropped) % capacity)
    filled.sub_(dropped)


def shuffle_batch(x: Tensor, deal: Deal, group: dist.ProcessGroup | None) -> Tensor:
    """Of the batches of all ranks, gathered whole and each in its own order, the rows that this one is dealt."""
    batches = gather(x[deal.order.to(x.device)], group).view(deal.world, *x.shape)
    rows = []
    for source, batch in enumerate(batches):
        begin = sum(share(source, target, len(x), deal.world) for target in range(deal.rank))
        rows.append(batch[begin : begin + deal.received[source]])
    return torch.cat(rows)


def unshuffle_batch(keys: Tensor, deal: Deal, group: dist.ProcessGroup | None) -> Tensor:
    """Of the shuffled batches of all ranks, gathered whole, the rows that were this rank's."""
    return gather(keys, group)[deal.places.to(keys.device)]


def gather(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """All ranks' rows in the order of ranks; without a process group, `x` itself. No gradient flows."""
    if world_size(group) == 1:
        return x
    rows = x.new_empty((world_size(group) * x.shape[0], *x.shape[1:]))
    # torch 2.14 renamed it. Bytes, because gloo does not know all dtypes.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    all_gather(rows.view(-1).view(torch.uint8), x.contiguous().view(-1).view(torch.uint8), group=group)
    return rows


def world_size(group: dist.ProcessGroup | None) -> int:
    """Ranks in `group` (None: the default group); 1 when torch.distributed is not running."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank(group: dist.ProcessGroup | None) -> int:
    """This process's rank in `group`; 0 when torch.distributed is not running."""
    return dist.get_rank(group) if dist.is_available() and dist.is_initialized() else 0


@torch.no_grad()
def augment_(
    images: Tensor,
    out: Tensor,
    parameters: Tensor,
    steps: tuple[Step, ...],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> None:
    """Write (augmented images / 255 - mean) / std to `out`; in float64 if that is its dtype, else in float32.

    Between the steps the values are whole numbers from 0 to 255, cut off where torchvision cuts them off.
    """
    x = images.permute(0, 3, 1, 2).to(torch.promote_types(out.dtype, torch.float32))  # N×3×H×W
    columns = {name: column.to(x) for name, column in zip(COLUMNS, parameters.T, strict=True)}
    for step in steps:
        _STEPS[type(step)](step, x, columns)
    centre, scale = (torch.tensor(values, dtype=x.dtype, device=x.device).view(3, 1, 1) for values in (mean, std))
    out.copy_((x / 255 - centre) / scale)


def _change(x: Tensor, chosen: Tensor, function: Callable[..., Tensor], *parameters: Tensor) -> None:
    """Replace the chosen images by `function` of them and of their parameters."""
    rows = chosen.nonzero().flatten()
    x[rows] = function(x[rows], *(values[rows].view(-1, 1, 1, 1) for values in parameters))


def _color_jitter(step: Step, x: Tensor, columns: dict[str, Tensor]) -> None:
    order = torch.tensor(JITTER_ORDERS, device=x.device)[columns["order"].long()]  # N×4
    for position in range(4):
        for part, (name, adjust) in enumerate(_JITTER.items()):
            _change(x, (order[:, position] == part) & (columns[name] != _NEUTRAL[name]), adjust, columns[name])


def _blend(x: Tensor, other: Tensor | float, factor: Tensor) -> Tensor:
    return (x * factor + other * (1 - factor)).clamp(0, 255).floor()


def _luma(x: Tensor) -> Tensor:
    r, g, b = x.split(1, dim=1)
    return (0.2989 * r + 0.587 * g + 0.114 * b).floor()


def _hue(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue in HSV by `turn` of a circle; value and chroma stay."""
    r, g, b = x.split(1, dim=1)
    value = x.amax(1, keepdim=True)
    chroma = value - x.amin(1, keepdim=True)
    safe = torch.where(chroma > 0, chroma, 1.0)
    sector = torch.where(value == r, (g - b) / safe, torch.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4))
    # HSV to RGB in one formula: channel(n) = V - C·max(0, min(k, 4-k, 1)), k = (n + H) mod 6, n = 5, 3, 1.
    n = torch.tensor([5.0, 3.0, 1.0], dtype=x.dtype, device=x.device).view(3, 1, 1)
    k = (n + sector + 6 * turn).remainder(6)
    turned = value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)
    return (turned * (255.999 / 255)).floor()  # torchvision's way from 0…1 to 0…255


_JITTER: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "brightness": lambda x, factor: _blend(x, 0.0, factor),
    "contrast": lambda x, factor: _blend(x, _luma(x).mean((1, 2, 3), keepdim=True), factor),
    "saturation": lambda x, factor: _blend(x, _luma(x), factor),
    "hue": _hue,
}
_NEUTRAL = dict(zip(COLUMNS, NEUTRAL, strict=True))


def _grayscale(step: Step, x: Tensor, columns: dict[str, Tensor]) -> None:
    _change(x, columns["grayscale"] > 0, lambda x: _luma(x).expand_as(x))


def _gaussian_blur(step: Step, x: Tensor, columns: dict[str, Tensor]) -> None:
    assert isinstance(step, GaussianBlur)

    def blurred(x: Tensor, sigma: Tensor) -> Tensor:
        rows, lines = (blur.matrix(step, sigma.flatten(), side, blur.reach(step)).to(x) for side in x.shape[2:])
        return (rows.unsqueeze(1) @ x @ lines.mT.unsqueeze(1) + 0.5).floor()

    _change(x, columns["sigma"] > 0, blurred, columns["sigma"])


def _solarize(step: Step, x: Tensor, columns: dict[str, Tensor]) -> None:
    threshold = columns["threshold"]
    _change(x, threshold <= 1, lambda x, threshold: torch.where(x >= 255 * threshold, 255 - x, x), threshold)


def _random_erasing(step: Step, x: Tensor, columns: dict[str, Tensor]) -> None:
    row = torch.arange(x.shape[2], device=x.device).view(-1, 1)
    column = torch.arange(x.shape[3], device=x.device)

    def erased(x: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> Tensor:
        inside = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)
        return x.masked_fill(inside, 0.0)

    box = [columns[name] for name in ("top", "left", "height", "width")]
    _change(x, columns["height"] > 0, erased, *box)


_STEPS: dict[type[Step], Callable[[Step, Tensor, dict[str, Tensor]], None]] = dict(
    zip(PHOTOMETRIC, (_color_jitter, _grayscale, _gaussian_blur, _solarize, _random_erasing), strict=True)
)
