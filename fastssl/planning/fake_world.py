"""A process group of any size that nobody else is in, and tensors without memory: the real step runs on them."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import _create_work_from_future
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_leaves

from fastssl.errors import FastsslError
from fastssl.ops import backend

C10D = torch.ops.c10d
# Where DistributedDataParallel's C++ reads the values of its own small tensors: those must be real.
HOST_FILES = ("torch/nn/parallel/distributed.py", "torch/distributed/utils.py")


@contextmanager
def world_of(size: int) -> Iterator[None]:
    """A process group in which this process is rank 0 of `size` and every collective ends at once.

    Raises:
        FastsslError: this process is in a process group already.
    """
    if size == 1:
        yield
        return
    if dist.is_initialized():
        raise FastsslError("a plan needs a process without a process group; call destroy_process_group() first")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def kernels_of_a_gpu() -> Iterator[None]:
    """The choice of kernels as on a GPU: the fused ones, also where the extension that has the CPU's is missing."""
    kept = {op: dict(found) for op, found in backend._implementations.items()}
    for op, found in kept.items():
        if "native" in found:
            backend.register(op, "native", dataclasses.replace(found["native"], missing=None))
    try:
        yield
    finally:
        for op, found in kept.items():
            for name, implementation in found.items():
                backend.register(op, name, implementation)


def make_fake(module: nn.Module, mode: FakeTensorMode) -> None:
    """Replace the parameters and buffers of `module`, in place, by fake ones of the same shapes and strides."""
    seen: dict[int, Tensor] = {}  # parameters may be shared
    for part in module.modules():
        tables: tuple[dict[str, Any], ...] = (part._parameters, part._buffers)
        for tensors in tables:
            for name, x in tensors.items():
                if x is not None:
                    tensors[name] = seen.setdefault(id(x), _fake(x, mode))


def _fake(x: Tensor, mode: FakeTensorMode) -> Tensor:
    fake: Tensor = mode.from_tensor(x.detach(), static_shapes=True)
    if isinstance(x, nn.Parameter):
        fake = nn.Parameter(fake, requires_grad=x.requires_grad)
    if hasattr(x, "_ddp_ignored"):
        fake._ddp_ignored = x._ddp_ignored  # type: ignore[attr-defined]
    return fake


def is_fake(x: Any) -> bool:
    """Whether `x` is a tensor without memory."""
    return isinstance(x, FakeTensor)


def value_read(func: Any, args: Any) -> bool | int | float | None:
    """What a host that reads a fake tensor is told, or None if `func` does not read one.

    True for a bool (gradients are finite), 1 for an integer (all ranks have the same header), 0 for a number (nothing
    overflowed).
    """
    if func is not torch.ops.aten._local_scalar_dense.default or not is_fake(args[0]):
        return None
    dtype = args[0].dtype
    return True if dtype is torch.bool else 0.0 if dtype.is_floating_point else 1


def belongs_to_the_host(func: Any, file: str, args: Any, kwargs: Any) -> bool:
    """Whether this call makes or fills a tensor whose values DistributedDataParallel's C++ will read."""
    if not file.endswith(HOST_FILES):
        return False
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if tensors:
        return not any(map(is_fake, tensors))
    return kwargs.get("dtype") in (torch.int32, torch.int64)


def on_the_host(func: Any, args: Any, kwargs: Any) -> Any:
    """Call `func` with real tensors; the others in the fake group say what this rank says."""
    with unset_fake_temporarily():
        result = func(*args, **kwargs)
        if func is C10D.allgather_.default:
            for outputs, own in zip(args[0], args[1], strict=True):
                for output in outputs:
                    output.copy_(own)
    return result


def call(func: Any, args: Any, kwargs: Any) -> Any:
    """Call `func`; an all-reduce is over at once, with a result as DistributedDataParallel's hook wants it.

    A fused optimizer, which only writes in place, would be run with real zeros for want of a fake kernel.
    """
    if func._schema.name.startswith("aten::_fused_sgd"):
        return None
    if func is not C10D.allreduce_.default:
        return func(*args, **kwargs)
    future: torch.futures.Future[list[Tensor]] = torch.futures.Future()
    future.set_result(list(args[0]))
    return args[0], _create_work_from_future(future).boxed()
