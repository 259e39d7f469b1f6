"""The alarms: what goes wrong in a training without stopping it, said in one line each."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median, median_low
from typing import Any

import torch
from torch import Tensor, nn

NAMES = ("collapse", "alike", "stuck", "nonfinite", "drift", "throughput", "lag")

# Thresholds lie between what healthy trainings and those broken on purpose were seen to do: docs/alarms.md.
LEAST_SPREAD = 0.2
LEAST_RANK = 5.0
LEAST_ROWS = 32  # embeddings, and components of them, below which an effective rank tells nothing; embeddings for d′
MOST_ROWS = 1024  # embeddings that are compared with each other for d′
ROUNDING = 1e-6  # of cosines: what differs by less is the same
LEAST_D_PRIME = 0.3
NEAR_CHANCE = 0.95  # of the loss at chance
MOST_DRIFT = 0.7
COPY_DRIFT = 1e-8  # below the rounding of float32, so no momentum explains it
SLOW, LAGGING, LAGGING_PART = 0.5, 1.5, 0.2
HISTORY, LEAST_HISTORY = 60, 10  # windows whose median is the usual speed

WINDOWS = {"collapse": 5, "alike": 5, "stuck": 5, "nonfinite": 1, "drift": 5, "throughput": 10, "lag": 5}  # in a row
EARLY_STEPS = 100  # before them a network may look like anything
# A contrastive loss stays near chance at first, and pulls apart again what has collapsed: both may last for epochs.
EARLY_CONTRASTIVE_STEPS, EARLY_CONTRASTIVE_EPOCHS, EARLY_AT_MOST_STEPS = 500, 5.0, 10_000


@dataclass(frozen=True)
class Alarm:
    """Something to look at.

    Attributes:
        name: one of `NAMES`.
        text: one line without the step: what was seen, what it means, what to look at.
    """

    name: str
    text: str


@torch.no_grad()
def health(method: Any) -> dict[str, float]:
    """How far a method's embeddings spread and how far its momentum network lags, after a training step.

    Needs one transfer to the host, so it is meant for the steps that are logged.

    Args:
        method: with `embeddings`, those of both views in the last training forward on this rank, each N×D, or None; and
            `momentum_pair`, the momentum network and the network that it follows.

    Returns:
        What is known and finite of: spread, √D times the mean over dimensions of the standard deviation over the batch
        of the l2-normalised embeddings, from 0 (collapsed) to 1 (isotropic) (SimSiam, arXiv:2011.10566, section 4.1);
        effective_rank, see `effective_rank`, 1…min(N, D), of 32 or more embeddings of 32 or more components;
        d_prime, see `d_prime`, of 32 or more images;
        drift, ‖θ_k − θ_q‖/‖θ_q‖ over all parameters.
    """
    parts: dict[str, Tensor] = {}
    if method.embeddings is not None and len(method.embeddings[0]) > 1:
        unit, other = (nn.functional.normalize(view.double(), dim=1) for view in method.embeddings)
        parts["spread"] = unit.std(0, correction=0).mean() * math.sqrt(unit.shape[1])
        if len(unit) >= LEAST_ROWS:
            parts["d_prime"] = d_prime(unit[:MOST_ROWS] @ other[:MOST_ROWS].T)
        if min(unit.shape) >= LEAST_ROWS:
            parts["gram"] = unit @ unit.T if len(unit) < unit.shape[1] else unit.T @ unit
    target, source = method.momentum_pair
    parts["drift"] = distance(list(target.parameters()), list(source.parameters()))
    # In one transfer; the eigenvalues are computed on the host, as CUDA's solver would wait for the device once more.
    flat = torch.cat([part.double().flatten() for part in parts.values()]).cpu()
    on_host = dict(zip(parts, flat.split([part.numel() for part in parts.values()]), strict=True))
    values = {name: part.item() for name, part in on_host.items() if name != "gram"}
    if "gram" in on_host and on_host["gram"].isfinite().all():
        values["effective_rank"] = effective_rank(on_host["gram"].view(parts["gram"].shape))
    return {name: value for name, value in values.items() if math.isfinite(value)}


def effective_rank(gram: Tensor) -> float:
    """exp of the entropy of the singular values over their sum (Roy & Vetterli 2007; RankMe, arXiv:2210.02885).

    The embeddings are not centred: where all are alike, one singular value is left and the rank is 1.
    After centring only noise would be left there, whose rank is full.

    Args:
        gram: ZᵀZ or ZZᵀ of the embeddings Z, float64 on the CPU; its eigenvalues are the squared singular values.
    """
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    return math.exp(torch.special.entr(singular / singular.sum()).sum().item())


def d_prime(similarities: Tensor) -> Tensor:
    """How far two views of one image are more alike than views of two, in standard deviations of the latter.

    d′ of signal detection (Green & Swets 1966): 0 where nothing tells an image from another, with a standard deviation
    of 1/√N; also where all are the same.

    Args:
        similarities: N×N, entry ij of view 1 of image i and view 2 of image j.
    """
    count = len(similarities)
    same = similarities.diagonal()
    others = similarities.flatten()[:-1].view(count - 1, count + 1)[:, 1:]  # all but the diagonal
    return (same.mean() - others.mean()) / others.std().clamp(min=ROUNDING)


def distance(targets: list[Tensor], sources: list[Tensor]) -> Tensor:
    """‖θ_k − θ_q‖/‖θ_q‖, a 0-d tensor, of two lists of parameters."""
    apart = torch.stack(torch._foreach_norm(torch._foreach_sub(targets, sources)))
    size = torch.stack(torch._foreach_norm(sources))
    return torch.linalg.vector_norm(apart) / torch.linalg.vector_norm(size)


class Alarms:
    """Watches the numbers of the windows between two logged steps; says each thing once, and again when it comes back.

    A thing must be seen in `WINDOWS` windows in a row to be said, and must be gone for as many to be over.

    Args:
        negatives: K, keys in the queue of an InfoNCE loss, which is ln(K+1) where nothing is learnt; None without.
        directions: losses that are added up, 2 for a symmetric MoCo.
        momentum_used: whether the method has a momentum network that should differ from the trained one.
        nonfinite_limit: steps in a row without a finite loss and gradients at which the training stops; 0: never.
        loss_scaled: whether a loss scaler (float16) skips steps to find its scale, which is no alarm until half of
            `nonfinite_limit` were skipped in a row or in a window: at ten it has halved its scale to 64.

    Example:
        >>> alarms = Alarms(negatives=65536)
        >>> [alarm.name for alarm in alarms.check(10, 0.1, {"loss": 9.3, "lr": 0.03, "skipped": 2})]
        ['nonfinite']
    """

    def __init__(
        self,
        *,
        negatives: int | None,
        directions: int = 1,
        momentum_used: bool = True,
        nonfinite_limit: int = 20,
        loss_scaled: bool = False,
    ) -> None:
        self.chance = None if negatives is None else directions * math.log(negatives + 1)
        self.momentum_used, self.nonfinite_limit, self.loss_scaled = momentum_used, nonfinite_limit, loss_scaled
        self._counts: dict[str, int] = {}  # windows in a row in which a thing was seen, or, below 0, was not any more
        self._ringing: list[str] = []  # what has been said and still goes on
        self._speeds: list[float] = []  # images/s of the last windows
        self._skipped = 0  # up to the last window

    def check(
        self, step: int, epoch: float, metrics: Mapping[str, float], ranks: Sequence[float] | None = None
    ) -> list[Alarm]:
        """Look at one window.

        Args:
            step: steps made so far.
            epoch: passes over the images so far.
            metrics: of the window; what is missing or not finite is not looked at: loss (mean), lr, momentum,
                images_per_second, skipped (steps so far without finite loss and gradients), skipped_in_a_row,
                step_seconds, spread, effective_rank, d_prime and drift as of `health`.
            ranks: seconds of its own work a step of each rank, waiting for others left out.

        Returns:
            What is new in this window.
        """
        known = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        skipped, stops = self._nonfinite(known)
        seen = [
            ("collapse", "collapse", self._collapse(step, epoch, known)),
            ("alike", "alike", self._alike(step, epoch, known)),
            ("stuck", "stuck", self._stuck(step, epoch, known)),
            ("nonfinite", "nonfinite", skipped),
            ("nonfinite", "stop", stops),
            ("drift", "drift", self._drift(step, known, bool(skipped or stops))),
            ("throughput", "throughput", self._throughput(known)),
            *(
                ("lag", f"lag {rank}", text)
                for rank, text in enumerate(_lag(ranks or (), known.get("step_seconds", 0)))
            ),
        ]
        return [Alarm(name, text) for name, key, text in seen if text is not None and self._rings(name, key, text)]

    def state_dict(self) -> dict[str, Any]:
        """What the next window's answer depends on, in plain values."""
        return {
            "counts": dict(self._counts), "ringing": list(self._ringing), "speeds": list(self._speeds),
            "skipped": self._skipped,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self._counts, self._ringing = dict(state["counts"]), list(state["ringing"])
        self._speeds, self._skipped = list(state["speeds"]), int(state["skipped"])

    def _rings(self, name: str, key: str, text: str) -> bool:
        """Whether to say a thing now that was seen in this window, or was not (an empty text)."""
        count = self._counts.pop(key, 0)
        count = max(count, 0) + 1 if text else min(count, 0) - 1
        ringing = key in self._ringing
        if ringing and -count >= WINDOWS[name]:
            self._ringing.remove(key)
        elif text or ringing:
            self._counts[key] = count
        if ringing or count < WINDOWS[name]:
            return False
        self._ringing.append(key)
        return True

    # Each of these gives a text where it sees its thing, "" where it does not, None where it cannot know.

    def _early(self, step: int, epoch: float) -> bool:
        return step < EARLY_STEPS if self.chance is None else self._first_epochs(step, epoch)

    @staticmethod
    def _first_epochs(step: int, epoch: float) -> bool:
        return step < EARLY_AT_MOST_STEPS and (step < EARLY_CONTRASTIVE_STEPS or epoch < EARLY_CONTRASTIVE_EPOCHS)

    def _collapse(self, step: int, epoch: float, known: Mapping[str, float]) -> str | None:
        if "spread" not in known and "effective_rank" not in known:
            return None
        spread, rank = known.get("spread", 1.0), known.get("effective_rank", math.inf)
        if self._early(step, epoch) or (spread >= LEAST_SPREAD and rank >= LEAST_RANK):
            return ""
        if self.chance is None:
            look = "a predictor that trains, batch norm in the heads, a base_momentum of 0.9 or more, the images"
        else:
            look = "temperature (0.07 to 0.2), images that differ"
        seen = f"their spread is {spread:.3f} (healthy: 0.4 to 1, alarm below {LEAST_SPREAD:g})"
        if rank < math.inf:
            seen += f" and their effective rank {rank:.1f} (alarm below {LEAST_RANK:g})"
        return (
            f"the embeddings have collapsed: {seen}, so different images look alike to the network. "
            f"Look at lr ({_value(known, 'lr')}; try a tenth, or a longer warmup_epochs), {look}"
        )

    def _alike(self, step: int, epoch: float, known: Mapping[str, float]) -> str | None:
        if "d_prime" not in known:
            return None
        # A deep network may see little of what its views have in common at first, whatever its loss.
        if self._first_epochs(step, epoch) or known["d_prime"] >= LEAST_D_PRIME:
            return ""
        return (
            f"two views of one image are hardly more alike to the network than views of two: d′ is "
            f"{known['d_prime']:.2f} standard deviations (healthy: above 1, alarm below {LEAST_D_PRIME:g}). Look at "
            f"the images (are they all the same, black or empty), the augmentation (what does it leave of them) and lr "
            f"({_value(known, 'lr')})"
        )

    def _stuck(self, step: int, epoch: float, known: Mapping[str, float]) -> str | None:
        if self.chance is None or "loss" not in known:
            return None
        if self._early(step, epoch) or known["loss"] < NEAR_CHANCE * self.chance:
            return ""
        return (
            f"the loss is {known['loss']:.3f} in epoch {epoch:.1f}, and chance is {self.chance:.3f} "
            "(ln(K+1)): the queries do not find their keys. That is normal in the first epochs only. Look at lr "
            f"({_value(known, 'lr')}), momentum ({_value(known, 'momentum')}; small data sets want 0.99), temperature "
            "(0.07 to 0.2), queue_size (fewer keys than images), and the images: do they and their views differ"
        )

    def _nonfinite(self, known: Mapping[str, float]) -> tuple[str | None, str | None]:
        """That steps were skipped, and that so many were that the training stops."""
        if "skipped" not in known:
            return None, None
        total, row = int(known["skipped"]), int(known.get("skipped_in_a_row", 0))
        new = total - self._skipped if total >= self._skipped else total  # counted anew after a resume
        self._skipped = total
        limit = self.nonfinite_limit
        if not new or (self.loss_scaled and max(new, row) < limit / 2):
            return "", ""
        seen = f"{new} steps since the last line, {total} in all, {row} in a row, were skipped: their loss or gradients"
        look = (
            f"Look at lr ({_value(known, 'lr')}; try a tenth), warmup_epochs, precision (float32 tells overflow from "
            "divergence), images that are damaged or of one colour"
        )
        if 0 < limit <= row:
            return "", f"{seen} were not finite, and at {limit} in a row the training stops. {look}"
        goes_on = f"; at {limit} in a row the training stops" if limit else ""
        return f"{seen} were not finite{goes_on}. {look}", ""

    def _drift(self, step: int, known: Mapping[str, float], skipping: bool) -> str | None:
        # Without an update, because its rate is 0 or it was skipped, the two networks do come to be alike.
        if not self.momentum_used or "drift" not in known or skipping or known.get("lr") == 0:
            return None
        drift, momentum = known["drift"], _value(known, "momentum")
        if step < EARLY_STEPS or COPY_DRIFT < drift < MOST_DRIFT:
            return ""
        if drift <= COPY_DRIFT:
            return (
                f"the momentum network equals the trained one (distance {drift:.1e} of its size): it is a mere copy, "
                f"and its targets move with every step. Look at momentum or base_momentum ({momentum}; MoCo 0.99 to "
                f"0.9999, BYOL 0.97 to 0.996), and whether anything trains: lr ({_value(known, 'lr')}), frozen weights"
            )
        return (
            f"the momentum network is {drift:.2f} of the trained one's size away from it (healthy: below 0.5, alarm "
            f"from {MOST_DRIFT:g}): it no longer follows. Look at lr ({_value(known, 'lr')}; try a tenth), momentum or "
            f"base_momentum ({momentum}; 1 never moves), and that after_step() follows every step"
        )

    def _throughput(self, known: Mapping[str, float]) -> str | None:
        speed = known.get("images_per_second")
        if speed is None:
            return None
        before = list(self._speeds)
        self._speeds = [*before, speed][-HISTORY:]
        if len(before) < LEAST_HISTORY or speed >= SLOW * median(before):
            return ""
        return (
            f"{speed:,.0f} images/s, less than half the usual {median(before):,.0f} (median of {len(before)} windows), "
            f"in {WINDOWS['throughput']} windows in a row. Look at other jobs on this machine, at the disk or network "
            "the images come from, workers and prefetch, and at the GPU's clock (nvidia-smi -q -d PERFORMANCE)"
        )


def _lag(ranks: Sequence[float], step: float) -> list[str]:
    """A text for every rank that keeps the others waiting, for a good part of a step; "" for the others."""
    if len(ranks) < 2:
        return ["" for _ in ranks]
    usual = median_low(ranks)  # of two ranks the faster: the mean of both would hide the slower
    return [
        f"rank {rank} of {len(ranks)} needs {seconds:.3g} s of its own work a step, {seconds / usual:.1f} times the "
        f"ranks' median of {usual:.3g} s, in {WINDOWS['lag']} windows in a row, and all wait for it. Look at that "
        "rank's disk, network, workers, other jobs on its machine, and its GPU's clock (nvidia-smi -q -d PERFORMANCE)"
        if usual > 0 and seconds > LAGGING * usual and seconds - usual > LAGGING_PART * step
        else ""
        for rank, seconds in enumerate(ranks)
    ]


def _value(known: Mapping[str, float], name: str) -> str:
    return f"now {known[name]:g}" if name in known else "unknown"
