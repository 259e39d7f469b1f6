"""What one operation costs at the least: operations, bytes from and to memory, kernels, calls by the host."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ATEN = torch.ops.aten
HALF, TF32, FLOAT32, FUSED, HALF_FUSED = "half", "tf32", "float32", "fused loss", "half fused loss"
# Passes over the first argument beyond those of reading every input once: batch norm reads x for its statistics first.
AGAIN = {"native_batch_norm": 1, "native_batch_norm_backward": 2}
KERNELS = {"native_batch_norm": 2, "native_batch_norm_backward": 2, "convolution_backward": 2}
A_LAUNCH = 48  # tensors that a kernel of _foreach takes; between 30 and 110 by the number of lists
# Make or rename memory and start no kernel.
FREE = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "lift_fresh", "wait_tensor",
        "_unsafe_view", "wait_rows_native", "forget_rows_native", "record_stream", "as_strided_", "set_", "resize_",
        "result_type", "promote_types", "device", "is_pinned")  # fmt: skip
POINTWISE = ("relu_", "relu", "add_", "add", "mul", "mul_", "threshold_backward", "_to_copy", "gelu", "gelu_backward",
             "silu_", "silu_backward", "hardtanh_", "hardtanh_backward")  # fmt: skip


@dataclass(frozen=True)
class Work:
    """Of one operation.

    Attributes:
        flops: of matrix products and convolutions, a multiply-add being two.
        precision: of them: "half", "tf32", "float32", "fused loss" (tf32, three products for one) or "half fused loss".
        bytes: read and written, each tensor once or as often as the algorithm has to.
        kernels: started.
        calls: by the host, also of what starts no kernel.
    """

    flops: float = 0.0
    precision: str = FLOAT32
    bytes: float = 0.0
    kernels: int = 0
    calls: int = 1


def work(func: Any, args: Any, kwargs: Any, out: Any) -> Work:
    """The work of an operation, from its arguments and results."""
    name = func._schema.name.partition("::")[2]
    inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
    if name in FREE or _is_view(func) or not inputs + outputs:
        return Work()
    moved = _special_bytes(name, args, outputs)
    if moved is None:
        moved = sum(map(touched, _distinct(inputs))) + sum(map(touched, _written(func, args, kwargs, outputs)))
        moved += AGAIN[name] * touched(inputs[0]) if name in AGAIN else 0
    flops, precision = _flops(func, name, args, kwargs, out, inputs)
    kernels = KERNELS.get(name, 1)
    if name.startswith(("_foreach", "_fused")):
        kernels = -(-len(args[0]) // A_LAUNCH)
    return Work(flops, precision, moved, kernels)


def touched(x: Tensor) -> int:
    """Bytes of the elements that `x` has in memory: expanded ones count once."""
    size = x.element_size()
    for length, stride in zip(x.shape, x.stride(), strict=True):
        size *= length if stride else 1
    return size


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _distinct(tensors: list[Tensor]) -> list[Tensor]:
    return list({id(x): x for x in tensors}.values())


def _written(func: Any, args: Any, kwargs: Any, outputs: list[Tensor]) -> list[Tensor]:
    """The tensors that are written: new ones, and arguments changed in place."""
    written = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            written += [x for x in tree_leaves(value) if isinstance(x, Tensor)]
    return _distinct([*written, *outputs])


def _special_bytes(name: str, args: Any, outputs: list[Tensor]) -> float | None:
    if name.startswith("enqueue"):  # only the rows that are written
        queue, keys = args[0], args[4]
        return float(touched(keys) + keys.numel() * queue.element_size())
    if name.startswith("_fused_sgd"):  # weights and momentum are read and written, gradients read
        weights, gradients, momentum = (sum(map(touched, tensors)) for tensors in args[:3])
        return 2.0 * weights + gradients + 2.0 * momentum
    if name.startswith("exchange_rows"):  # read, packed, and received
        return 3.0 * touched(args[0])
    if name.startswith("embedding") or name.startswith("index_select"):
        return 2.0 * sum(map(touched, outputs))
    return None


def _flops(func: Any, name: str, args: Any, kwargs: Any, out: Any, inputs: list[Tensor]) -> tuple[float, str]:
    if name.startswith("info_nce"):
        query = args[2] if name.startswith("info_nce_negatives") else args[0]
        return _info_nce_flops(name, args), FUSED if query.element_size() == 4 else HALF_FUSED
    if name.startswith("_scaled_dot_product_flash_attention_for_cpu"):  # the registry has the GPU's only
        return _attention_flops(name, args), HALF if inputs[0].element_size() == 2 else TF32
    formula = flop_registry.get(func._overloadpacket)
    if formula is None:
        return 0.0, FLOAT32
    half = inputs[0].element_size() == 2
    precision = HALF if half else TF32 if "conv" in name else FLOAT32  # torch's defaults for float32
    return float(formula(*args, **kwargs, out_val=out)), precision


def _info_nce_flops(name: str, args: Any) -> float:
    if name.startswith("info_nce_negatives"):
        query, negatives = args[2], args[3]
        return 4.0 * query.shape[0] * query.shape[1] * negatives.shape[-2]
    query, negatives, gradients = args[0], args[2], args[8]
    count = query.shape[0] if negatives is None else negatives.shape[-2]
    return (4.0 if gradients else 2.0) * query.shape[0] * query.shape[1] * count


def _attention_flops(name: str, args: Any) -> float:
    backward = name.endswith("_backward")
    query, key = args[1:3] if backward else args[:2]
    product = 2.0 * query.numel() * key.shape[-2]
    return product * (5 if backward else 2)
