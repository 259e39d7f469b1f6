"""The ops that write to their arguments, and the exchange of rows, as torch sees them: schemas and compilation."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastssl import _extension
from fastssl.ops import (
    KeyQueue,
    ema_update_,
    info_nce,
    shuffle_batch,
    unshuffle_and_gather,
    unshuffle_batch,
    use_backend,
)

CUDA = torch.cuda.is_available()
COMPILED = ["native", *(["cuda"] if CUDA else [])]
FUSED = ["native", "triton"]
COMPILERS = ["aot_eager", "inductor"]


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on a backend, its tensors on that backend's device."""
    if request.param != "triton" and (why := _extension.missing()):
        pytest.skip(why)
    device = "cpu" if request.param == "native" or not CUDA else "cuda"
    torch.compiler.reset()
    with use_backend(request.param), torch.device(device):
        yield request.param


def op(name: str, backend: str) -> Any:
    return getattr(torch.ops.fastssl, f"{name}_{backend}").default


def models() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    targets = [torch.randn(5, 3), torch.randn(7, dtype=torch.float64), torch.arange(3)]
    sources = [torch.randn(5, 3).bfloat16(), torch.randn(7), torch.arange(3) + 1]
    shadows = [torch.zeros(5, 3).half(), torch.zeros(7).bfloat16(), torch.zeros(3, dtype=torch.int64)]
    return targets, sources, shadows


def ring() -> list[Tensor]:
    queue, tail, filled = torch.zeros(8, 5), torch.tensor(3), torch.tensor(4)
    return [queue, tail, filled, torch.zeros((), dtype=torch.int32)]


@pytest.mark.parametrize("backend", COMPILED, indirect=True)
def test_opcheck_ema_update(backend: str) -> None:
    targets, sources, shadows = models()
    torch.library.opcheck(op("ema_update", backend), (targets, sources, shadows, 0.9, None))
    torch.library.opcheck(op("ema_update", backend), (targets, sources, [], 0.0, torch.tensor(0.9)))


@pytest.mark.parametrize("backend", FUSED, indirect=True)
def test_opcheck_queue(backend: str) -> None:
    torch.library.opcheck(op("enqueue", backend), (*ring(), torch.randn(6, 5)))
    torch.library.opcheck(op("dequeue", backend), (*ring()[1:3], 8, 2))


@pytest.mark.parametrize("backend", COMPILED, indirect=True)
def test_opcheck_exchange_rows(backend: str) -> None:
    """Of one process; the exchange of several is in test_distributed.py."""
    for x in (torch.randn(4, 3), torch.randn(4, 3, 2, 5).contiguous(memory_format=torch.channels_last)):
        torch.library.opcheck(op("exchange_rows", backend), (x, torch.tensor([2, 0, 3, 1]), [4], [4], ""))
        torch.library.opcheck(op("exchange_rows", backend), (x, None, [4], [4], ""))


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("backend", COMPILED, indirect=True)
def test_compiled_ema_update(backend: str, compiler: str) -> None:
    @torch.compile(fullgraph=True, backend=compiler)
    def step(targets: list[Tensor], sources: list[Tensor], shadows: list[Tensor], momentum: float | Tensor) -> Tensor:
        ema_update_(targets, sources, momentum, shadows=shadows)
        return targets[0] + 1  # of the new value

    targets, sources, shadows = models()
    expected = [t.clone() for t in targets]
    for momentum in (0.9, 0.99, torch.tensor(0.5)):
        result = step(targets, sources, shadows, momentum)
        ema_update_(expected, sources, momentum)
        assert all(torch.equal(a, b) for a, b in zip(targets, expected, strict=True))
        assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(shadows, expected, strict=True))
        assert torch.equal(result, targets[0] + 1)


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("backend", FUSED, indirect=True)
def test_compiled_queue(backend: str, compiler: str) -> None:
    """A loss on the queue before and after it moved on, for batches of several sizes."""
    compiled, eager = KeyQueue(10, 4, fill="empty"), KeyQueue(10, 4, fill="empty")

    def step(queue: KeyQueue, q: Tensor, k: Tensor) -> Tensor:
        first = info_nce(q, k, queue.keys, negatives_normalized=True, valid=queue.valid)
        queue.enqueue_(k)
        queue.dequeue_(1)
        return first + info_nce(q, k, queue.keys, negatives_normalized=True, valid=queue.valid)

    fast: Callable[..., Tensor] = torch.compile(step, fullgraph=True, backend=compiler)
    for n in (3, 4, 5, 12):
        q, k = torch.randn(2, n, 4).unbind()
        assert torch.allclose(fast(compiled, q, k), step(eager, q, k))
        for name, buffer in eager.named_buffers():
            assert torch.equal(compiled.get_buffer(name), buffer)


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("backend", COMPILED, indirect=True)
def test_compiled_shuffle(backend: str, compiler: str) -> None:
    """The op in a whole graph; the functions, which draw and compare on the host, as breaks of one."""
    generator, x = torch.Generator().manual_seed(0), torch.randn(6, 3)

    @torch.compile(fullgraph=True, backend=compiler)
    def exchange(x: Tensor, order: Tensor) -> Tensor:
        return op("exchange_rows", backend)(x + 1, order, [len(x)], [len(x)], "") * 2

    order = torch.tensor([2, 0, 5, 1, 4, 3])
    assert torch.equal(exchange(x, order), (x + 1)[order] * 2)

    @torch.compile(backend=compiler)
    def there_and_back(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        shuffled, handle = shuffle_batch(x + 1, generator=generator)
        handle.wait()
        keys = shuffled * 2
        return unshuffle_batch(keys, handle), *unshuffle_and_gather(keys, handle)

    for result in there_and_back(x):
        assert torch.equal(result, (x + 1) * 2)


@pytest.mark.parametrize("backend", COMPILED, indirect=True)
def test_inference_mode(backend: str) -> None:
    """Inference tensors have no versions to count."""
    with torch.inference_mode():
        targets, sources, _ = models()
        expected = [t.clone() for t in targets]
        ema_update_(targets, sources, 0.5)
        with use_backend("reference"):
            ema_update_(expected, sources, 0.5)
        for a, b in zip(targets, expected, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", FUSED, indirect=True)
def test_queue_in_inference_mode(backend: str) -> None:
    with torch.inference_mode():
        queue = KeyQueue(4, 3)
        queue.enqueue_(torch.randn(2, 3))
        assert int(queue.tail) == 2
