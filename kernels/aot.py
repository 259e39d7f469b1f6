"""Every kernel and configuration we ship, in the form triton.compile takes, which needs no GPU.

Not under TRITON_INTERPRET, which replaces the compiler.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from fastssl.kernels import augment, info_nce, key_queue, normalized_mse
from fastssl.kernels.launch import Launch, recording
from torch import Tensor

CHIPS = (80, 90, 100, 120)
N, M = 256, 65536
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TYPES = {BF16: "bf16", FP16: "fp16", FP32: "fp32", torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8"}


class Variant(NamedTuple):
    """One compilation; `source()` goes to triton.compile with `options` and the target of `chip`."""

    name: str
    chip: int
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    attrs: dict[tuple[int, ...], list[list[Any]]]
    options: dict[str, int]

    def source(self) -> Any:
        """The argument of triton.compile."""
        from triton.compiler import ASTSource

        return ASTSource(self.kernel, self.signature, self.constexprs, self.attrs)


def variants(chip: int) -> Iterator[Variant]:
    """What `chip` (80, 90, 100 or 120) runs, by names such as "split bf16 queue 128"."""
    for dim in (16, 64, 128, 256, 512):
        yield from _loss(chip, "bf16 queue", dim, BF16, normalized=True)
        yield from _loss(chip, "tf32x3", dim, FP32, precision="tf32x3")
        if dim > 16:
            yield from _loss(chip, "bf16", dim, BF16)
            yield from _loss(chip, "fp16", dim, FP16)
            yield from _loss(chip, "tf32", dim, FP32)
            yield from _gradient(chip, "bf16", dim, BF16)
            yield from _gradient(chip, "tf32x3", dim, FP32, precision="tf32x3")
        if dim > 64:
            yield from _gradient(chip, "fp16", dim, FP16)
            yield from _gradient(chip, "tf32", dim, FP32)
    yield from _loss(chip, "fp16 queue", 128, FP16, normalized=True)
    yield from _loss(chip, "fp32 bf16 queue", 128, FP32, BF16, normalized=True)
    yield from _loss(chip, "bf16 in-batch", 128, BF16, None)
    yield from _gradient(chip, "bf16 in-batch", 128, BF16, in_batch=True)
    yield from _gradient(chip, "fp16 in-batch", 128, FP16, in_batch=True)
    yield from _loss(chip, "bf16 queue, no gradients", 128, BF16, normalized=True, gradients=False)
    yield from _paired(chip, 128)
    rows = torch.empty(N, 256, dtype=BF16, device="meta")
    yield from _recorded("bf16 256", chip, "tf32", lambda: normalized_mse.forward(rows, rows, True))
    for keys, queue, dim in ((BF16, BF16, 128), (FP32, FP32, 128), (FP32, BF16, 128), (FP32, FP32, 2048)):
        yield from _enqueue(chip, keys, queue, dim)
    _, _, integer = _tensors(1, FP32, None)
    yield from _recorded("", chip, "tf32", lambda: key_queue.dequeue(integer, integer, M, N))
    yield from _augment(chip, "bf16 moco_v2", BF16, (0, 1, 2), 13)
    yield from _augment(chip, "fp32 byol", FP32, (0, 1, 2, 3), 23, ("color", "blur"))
    yield from _augment(chip, "fp16 byol", FP16, (0, 1, 2, 3), 23, ("blur",))
    yield from _augment(chip, "bf16 61 taps", BF16, (2, 3, 4), 61, ("blur",), width=225)
    yield from _augment(chip, "bf16 no blur", BF16, (0, 3, 4), 0, ("color",))


def _loss(
    chip: int,
    name: str,
    dim: int,
    dtype: torch.dtype,
    keys: torch.dtype | None = FP32,
    normalized: bool = False,
    gradients: bool = True,
    precision: str = "tf32",
) -> Iterator[Variant]:
    """The pass over the keys; with dtype `keys` of float32 meaning the query's own, None in-batch."""
    query, negatives, integer = _tensors(dim, dtype, dtype if keys == FP32 else keys)
    ring = integer if normalized else None
    found = _recorded(
        f"{name} {dim}",
        chip,
        precision,
        lambda: info_nce.forward(query, query, negatives, 0.1, None, ring, ring, normalized, gradients),
    )
    for variant in found:
        # combining depends on the dtype and the width alone; `_gradient` has the norms
        if "split" in variant.name or ("combine" in variant.name and name == "bf16 queue" and dim in (128, 512)):
            yield variant


def _gradient(
    chip: int, name: str, dim: int, dtype: torch.dtype, in_batch: bool = False, precision: str = "tf32"
) -> Iterator[Variant]:
    query, keys, _ = _tensors(dim, dtype, dtype)
    row = torch.empty(N, device="meta")
    keys = query if in_batch else keys
    found = _recorded(
        f"{name} {dim}",
        chip,
        precision,
        lambda: info_nce.negatives(row, row, query, keys, 0.1, None, None, None, False, in_batch),
    )
    for variant in found:
        if "norms" not in variant.name or (name == "bf16" and dim in (128, 512)):
            yield variant


def _paired(chip: int, dim: int) -> Iterator[Variant]:
    query, _, _ = _tensors(dim, BF16, None)
    keys = torch.empty(N, 1024, dim, dtype=BF16, device="meta")
    row = torch.empty(N, device="meta")

    def both() -> None:
        info_nce.forward(query, query, keys, 0.1, None, None, None, False, True)
        info_nce.negatives(row, row, query, keys, 0.1, None, None, None, False, False)

    for variant in _recorded(f"bf16 {dim}", chip, "tf32", both):
        if "paired" in variant.name:
            yield variant


def _enqueue(chip: int, keys: torch.dtype, queue: torch.dtype, dim: int) -> Iterator[Variant]:
    batch, rows, integer = _tensors(dim, keys, queue)
    arrived = torch.empty((), dtype=torch.int32, device="meta")
    name = f"{TYPES[keys]} into {TYPES[queue]} {dim}"
    yield from _recorded(name, chip, "tf32", lambda: key_queue.enqueue(rows, integer, integer, arrived, batch))


def _augment(
    chip: int,
    name: str,
    dtype: torch.dtype,
    steps: tuple[int, ...],
    taps: int,
    kernels: tuple[str, ...] = ("luma", "color", "blur"),
    width: int = 224,
) -> Iterator[Variant]:
    """Numbers of steps as in fastssl.ops.photometric.PHOTOMETRIC."""
    with torch.device("meta"):
        images = torch.empty(N, 224, width, 3, dtype=torch.uint8)
        out, parameters = torch.empty(N, 3, 224, width, dtype=dtype), torch.empty(N, 12)
        table = torch.empty(N, taps, taps)
    mean, std = (0.5,) * 3, (0.2,) * 3
    found = _recorded(
        name, chip, "tf32", lambda: augment.augment(images, out, parameters, table, table, steps, mean, std)
    )
    for variant in found:
        if variant.name.split()[0].removeprefix("augment_") in kernels:
            yield variant


def _tensors(dim: int, dtype: torch.dtype, keys: torch.dtype | None) -> tuple[Tensor, Tensor | None, Tensor]:
    integer = torch.empty((), dtype=torch.int64, device="meta")
    negatives = None if keys is None else torch.empty(M, dim, dtype=keys, device="meta")
    return torch.empty(N, dim, dtype=dtype, device="meta"), negatives, integer


def _recorded(name: str, chip: int, precision: str, run: Callable[[], Any]) -> Iterator[Variant]:
    with recording(chip, precision) as launches:
        run()
    for found in launches:
        yield variant(name, chip, found)


def _is_one(value: Any, parameter: Any) -> bool:
    """Whether Triton's launcher puts the number 1 into the code."""
    return isinstance(value, int) and value == 1 and not parameter.do_not_specialize


def variant(name: str, chip: int, launch: Launch) -> Variant:
    """A launch as a compilation: types and specialisation as Triton's own launcher derives them from the arguments."""
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}
    for at, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        divisible = False
        if isinstance(value, Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            divisible = True  # addresses from torch's allocator
        elif parameter.is_constexpr or value is None or _is_one(value, parameter):
            signature[parameter.name] = "constexpr"
            constexprs[parameter.name] = value
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
            divisible = value % 16 == 0 and not parameter.do_not_specialize
        if divisible:
            attrs[(at,)] = [["tt.divisibility", 16]]
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": launch.fuse}
    kernel = launch.kernel.fn.__name__.removeprefix("info_nce_")
    return Variant(f"{kernel} {name}".strip(), chip, launch.kernel, signature, constexprs, attrs, options)
