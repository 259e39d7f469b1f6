"""One training step on fake tensors: every operation, collective and block of memory of a rank, without its values."""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastssl.data import augmentation as aug
from fastssl.engine.build import build_method
from fastssl.engine.config import Config
from fastssl.engine.optimizers import make_optimizer
from fastssl.engine.step import TrainingStep
from fastssl.planning import collectives, fake_world, memory, parts, sync_batch_norm
from fastssl.planning.collectives import Collective
from fastssl.planning.work import Work, work

# After as many steps DistributedDataParallel has put its buckets in the order in which gradients arrive.
SETTLED = 3
HOST_ONLY = "fastssl/ops/deal.py"  # permutations, which a GPU never sees


@dataclass(frozen=True)
class Operation:
    """One call of an operation: its name, the part it belongs to, whether in the backward pass, and its work."""

    name: str
    part: str
    backward: bool
    work: Work


@dataclass(frozen=True)
class Wait:
    """The GPU waits for a collective called before (`label`), or the host for the GPU (None)."""

    label: str | None


Event = Operation | Collective | Wait


@dataclass(frozen=True)
class Trace:
    """What a rank does in a step.

    Attributes:
        events: in order.
        memory: bytes by kind where they are most; see fastssl.planning.memory.
        parameters: trained ones and those of the momentum encoder.
        world: ranks.
        batch: images of this rank.
        views: bytes of one batch of views.
    """

    events: list[Event]
    memory: dict[str, int]
    parameters: tuple[int, int]
    world: int
    batch: int
    views: int

    @property
    def peak(self) -> int:
        """Bytes of tensors where they are most."""
        return sum(self.memory.values())

    @property
    def collectives(self) -> list[Collective]:
        """Those of the step, in order."""
        return [event for event in self.events if isinstance(event, Collective)]


def trace_step(
    config: Config,
    world: int,
    batch: int,
    dtype: torch.dtype | None,
    *,
    size: int | None = None,
    gpu: bool = True,
    settled: bool = True,
) -> Trace:
    """Make some steps of a training in a world of `world` ranks, on fake tensors, and record the last.

    Args:
        config: of the training; its batch_size is not looked at.
        world: ranks.
        batch: images of each.
        dtype: to autocast to, or None.
        size: pixels of the views' sides; None: the augmentation's.
        gpu: as on a GPU; False: as the same step runs on a CPU, which the tests compare with.
        settled: wait until DistributedDataParallel's buckets are in their final order; the memory is the same before.

    Raises:
        FastsslError: the method cannot be built as configured.
    """
    with fake_world.world_of(world):
        method = build_method(config, total_steps=1000, world=world)
        sizes = [size or view.size for view in aug.load(config.augmentation).views]
        warm_up = SETTLED if settled and world > 1 else 1
        return trace_method(config, method, world, batch, dtype, sizes, gpu, warm_up)


def trace_method(
    config: Config,
    method: Any,
    world: int,
    batch: int,
    dtype: torch.dtype | None,
    sizes: list[int],
    gpu: bool = True,
    warm_up: int = SETTLED,
) -> Trace:
    """`trace_step` of a method that exists already, with real parameters, which are replaced by fake ones.

    Args:
        config: as there.
        method: takes a list of views and gives a loss, as those of fastssl.methods.
        world: ranks; the process group exists already.
        batch: as there.
        dtype: as there.
        sizes: pixels of the sides of each view.
        gpu: as there.
        warm_up: steps before the one that is recorded; after the first, the optimizer has its state.
    """
    method = method.train()
    if config.channels_last:
        method = method.to(memory_format=torch.channels_last)
    if gpu:
        sync_batch_norm.as_on_a_gpu(method)
    with ExitStack() as stack:
        stack.enter_context(fake_world.kernels_of_a_gpu())
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        fake_world.make_fake(method, mode)
        followed = parts.Parts(method)
        stack.callback(followed.close)
        recorder = Recorder(followed)
        _introduce(method, recorder.blocks)
        stack.enter_context(mode)
        stack.enter_context(recorder)
        views = _views(config, batch, dtype, sizes)
        recorder.blocks.tell(views, memory.INPUTS)
        _steps(config, method, views, dtype, recorder, gpu, warm_up)
    numbers = [sum(p.numel() for p in _parameters(method, trained)) for trained in (True, False)]
    inputs = sum(view.numel() * view.element_size() for view in views)
    return Trace(recorder.events, recorder.blocks.peak(), (numbers[0], numbers[1]), world, batch, inputs)


def _introduce(method: Any, blocks: memory.Blocks) -> None:
    blocks.add(_parameters(method, True), memory.WEIGHTS)
    blocks.add(_parameters(method, False), memory.MOMENTUM_WEIGHTS)
    if hasattr(method, "queue"):
        blocks.add(method.queue.buffers(), memory.QUEUE)
    blocks.add(method.buffers(), memory.BUFFERS)


def _parameters(method: nn.Module, trained: bool) -> list[nn.Parameter]:
    return [p for p in method.parameters() if p.requires_grad is trained]


def _steps(
    config: Config,
    method: Any,
    views: list[Tensor],
    dtype: torch.dtype | None,
    recorder: "Recorder",
    gpu: bool,
    warm_up: int,
) -> None:
    optimizer = make_optimizer(method, config)
    if gpu:
        for group in optimizer.param_groups:  # what torch chooses on a GPU
            if "foreach" in group and group["foreach"] is None and not group.get("fused"):
                group["foreach"] = True
    step = TrainingStep(config, method, optimizer, torch.device("cpu"), dtype)
    hooks = [p.register_post_accumulate_grad_hook(recorder.gradient_is_there) for p in _parameters(method, True)]
    for number in range(warm_up + 1):
        if number == warm_up:
            recorder.blocks.tell(_tensors(optimizer.state), memory.OPTIMIZER)
            recorder.start()
        step(views, 0.1)
    for hook in hooks:
        hook.remove()


def _tensors(state: Any) -> list[Tensor]:
    return [x for values in state.values() for x in values.values() if isinstance(x, Tensor)]


def _views(config: Config, batch: int, dtype: torch.dtype | None, sizes: list[int]) -> list[Tensor]:
    """The views as the loader gives them: in the dtype of autocast."""
    order = torch.channels_last if config.channels_last else torch.contiguous_format
    return [torch.empty((batch, 3, side, side), dtype=dtype, memory_format=order) for side in sizes]


class Recorder(TorchDispatchMode):
    """Sees every operation on fake tensors, lets it run, and takes notes.

    Args:
        followed: tells which part runs.
    """

    def __init__(self, followed: parts.Parts) -> None:
        super().__init__()
        self.blocks = memory.Blocks()
        self.events: list[Event] = []
        self._followed, self._recording = followed, False

    def start(self) -> None:
        """Record from here on."""
        self._recording = True
        self.blocks.start()

    def gradient_is_there(self, parameter: Tensor) -> None:
        """A hook: what lies in this memory is a gradient."""
        assert parameter.grad is not None
        self.blocks.tell([parameter.grad], memory.GRADIENTS)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace in ("prim", "profiler"):
            return func(*args, **kwargs)
        value = fake_world.value_read(func, args)
        if value is not None:
            if self._followed.current() == (parts.CHECK, False):  # others are on the host, or there in time
                self._note(Wait(None))
            return value
        file = parts.calling_file()
        if fake_world.belongs_to_the_host(func, file, args, kwargs):
            return fake_world.on_the_host(func, args, kwargs)
        part, backward = self._followed.current()
        out = sync_batch_norm.kernel(func, args)
        if sync_batch_norm.is_choice_of_ranks(func, args, file):
            self._note(Wait(None))
            out = args[0].clone()
        if out is None:
            out = fake_world.call(func, args, kwargs)
        self.blocks.add((x for x in tree_leaves(out) if fake_world.is_fake(x)), _kind(part, backward))
        if self._recording:
            on_the_host = file.endswith(HOST_ONLY)
            self._record(func, args, kwargs, out, part, backward, on_the_host)
        return out

    def _record(self, func: Any, args: Any, kwargs: Any, out: Any, part: str, backward: bool, host: bool) -> None:
        name = func._schema.name.partition("::")[2]
        kind = collectives.kind_of(func, args)
        if name.startswith("wait_rows"):
            self._note(Wait(parts.SHUFFLE))
        elif kind is None or name.startswith("exchange_rows"):
            cost = Work() if host else work(func, args, kwargs, out)
            self._note(Operation(name, part, backward, cost))
        if kind is not None:
            later = name.startswith("exchange_rows")
            label = part if later else parts.collective_label(part)
            later = later or (label == parts.GRADIENTS and backward)
            self._note(Collective(kind, label, collectives.own_bytes(func, args), collectives.ranks(args), later))

    def _note(self, event: Event) -> None:
        if self._recording:
            self.events.append(event)


_KINDS = {
    parts.LOSS: memory.LOSS,
    parts.SHUFFLE: memory.SHUFFLE,
    parts.QUEUE: memory.QUEUE,
    parts.OPTIMIZER: memory.OPTIMIZER,
    parts.INPUTS: memory.INPUTS,
}


def _kind(part: str, backward: bool) -> str:
    """What is in memory that a part makes; gradients are told later from what is temporary."""
    if part == parts.GRADIENTS and not backward:
        return memory.GRADIENTS  # the buckets
    if backward:
        return memory.TEMPORARY
    return memory.ACTIVATIONS if part in parts.NETWORK else _KINDS.get(part, memory.TEMPORARY)
