"""Enqueue and dequeue against the reference: rows in float64, state to the bit, nothing written but what is meant."""

from collections import deque
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from fastssl.kernels import interpreted, key_queue
from fastssl.kernels.launch import recording
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastssl.ops import reference
from tests.kernels import fences

# The interpreter computes with numpy, which tells of every square that overflows in huge rows.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = (FP32, BF16, FP16)
# Half the distance of neighbouring numbers around 1, and float32's own errors. The interpreter cuts bfloat16 off.
ROUNDING = {BF16: 2.0**-7 if interpreted() else 2.0**-8, FP16: 2.0**-11, FP32: 2.0**-24}
FLOAT = 1e-6
SCALES = {FP32: (0.0, 1e30, 1e-30, 1e-13, 1e6), BF16: (0.0, 1e30, 1e-30, 1e-13, 1e6), FP16: (0.0, 1e4, 1e-4)}
SENTINEL = 2**30
# Launches are compiled or interpreted, which takes long; the fences' fixture serves all examples.
SLOW = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@dataclass(frozen=True)
class Case:
    """A batch for a queue in some state; `tail` may be any integer."""

    capacity: int
    count: int
    dim: int
    tail: int = 0
    filled: int = 0
    dtype: torch.dtype = FP32  # of the queue
    key_dtype: torch.dtype = FP32
    layout: str = "dense"
    odd_rows: bool = False  # zero, huge and tiny ones among the rest
    seed: int = 0


@st.composite
def cases(draw: st.DrawFn) -> Case:
    capacity = draw(st.integers(1, 12))
    return Case(
        capacity,
        draw(st.integers(0, 3 * capacity)),
        draw(st.one_of(st.integers(1, 40), st.integers(1, 300))),
        draw(st.one_of(st.integers(0, capacity - 1), st.integers(-3 * capacity, 3 * capacity))),
        draw(st.integers(0, capacity)),
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from(tuple(fences.LAYOUTS))),
        draw(st.booleans()),
        draw(st.integers(0, 2**31)),
    )


class Queue:
    """A queue between fences: NaN around the rows, other integers around the state."""

    def __init__(self, rows: Tensor, tail: int = 0, filled: int = 0) -> None:
        self.keys = fences.new_empty(rows.to(fences.DEVICE), *rows.shape).copy_(rows)
        self.state = torch.full((5,), SENTINEL, device=fences.DEVICE)
        self.counter = torch.full((3,), SENTINEL, dtype=torch.int32, device=fences.DEVICE)
        self.tail, self.filled, self.arrived = self.state[1], self.state[3], self.counter[1]
        self.tail.fill_(tail)
        self.filled.fill_(filled)
        self.arrived.zero_()

    def enqueue(self, keys: Tensor) -> None:
        key_queue.enqueue(self.keys, self.tail, self.filled, self.arrived, keys)

    def dequeue(self, count: int) -> None:
        key_queue.dequeue(self.tail, self.filled, len(self.keys), count)

    def expect(self, rows: Tensor, tail: Tensor | int, filled: Tensor | int) -> None:
        """Rows within rounding of `rows` (float64), tail and filled exactly so, and the rest untouched."""
        assert self.state.tolist() == [SENTINEL, int(tail), SENTINEL, int(filled), SENTINEL]
        assert self.counter.tolist() == [SENTINEL, 0, SENTINEL]
        torch.testing.assert_close(self.keys.cpu().double(), rows, atol=FLOAT, rtol=ROUNDING[self.keys.dtype])
        for buffer, count in fences.allocated:
            assert buffer[: fences.FENCE].isnan().all() and buffer[fences.FENCE + count :].isnan().all()


def batch(case: Case) -> Tensor:
    """Random keys."""
    generator = torch.Generator().manual_seed(case.seed)
    x = torch.randn(case.count, case.dim, generator=generator)
    if case.odd_rows:
        scales = torch.tensor(SCALES[case.key_dtype])
        pick = torch.randint(2 * len(scales), (case.count, 1), generator=generator)
        x = F.normalize(x, dim=-1) * torch.where(pick < len(scales), scales[pick % len(scales)], 1.0)
    return x.to(case.key_dtype)


def check_enqueue(case: Case) -> None:
    """One batch."""
    fences.allocated.clear()
    before = torch.randn(case.capacity, case.dim, generator=torch.Generator().manual_seed(case.seed + 1))
    before = before.to(case.dtype)
    keys = batch(case)
    expected, tail, filled = before.double(), torch.tensor(case.tail), torch.tensor(case.filled)
    if case.count:  # the reference brings `tail` into range even then
        reference.enqueue_(expected, tail, filled, torch.tensor(0), keys.double())
    queue = Queue(before, case.tail, case.filled)
    placed = fences.LAYOUTS[case.layout](keys)
    queue.enqueue(placed)
    queue.expect(expected, tail, filled)
    untouched = (expected == before.double()).all(1)
    assert int(untouched.sum()) >= case.capacity - case.count
    assert torch.equal(queue.keys.cpu()[untouched], before[untouched])
    assert torch.equal(placed.cpu(), keys)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("key_dtype", DTYPES)
@pytest.mark.parametrize("layout", list(fences.LAYOUTS))
def test_enqueue_in_every_dtype_and_layout(dtype: torch.dtype, key_dtype: torch.dtype, layout: str) -> None:
    for count, dim in ((5, 20), (13, 3)):  # the second is more than there are rows
        check_enqueue(Case(9, count, dim, 7, 6, dtype, key_dtype, layout))


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 15])
@pytest.mark.parametrize(("tail", "filled"), [(0, 0), (0, 5), (3, 0), (3, 1), (4, 3), (2, 5)])
def test_enqueue_from_every_kind_of_state(count: int, tail: int, filled: int) -> None:
    check_enqueue(Case(5, count, 2, tail, filled))


@pytest.mark.parametrize(("count", "dim"), [(1, 1), (3, 16), (40, 16), (7, 17), (3, 128), (3, 300), (2, 5000)])
def test_enqueue_widths_of_rows(count: int, dim: int) -> None:
    check_enqueue(Case(11, count, dim, 9, 4, odd_rows=dim > 1))


@pytest.mark.parametrize("key_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_enqueue_of_odd_norms(dtype: torch.dtype, key_dtype: torch.dtype) -> None:
    check_enqueue(Case(16, 16, 20, 3, 16, dtype, key_dtype, odd_rows=True))


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=SLOW)
@given(cases())
def test_enqueue_matches_reference(case: Case) -> None:
    check_enqueue(case)


def test_nan_spoils_its_own_row_only() -> None:
    keys = torch.ones(3, 4)
    keys[1, 2] = torch.nan
    queue = Queue(torch.zeros(5, 4))
    queue.enqueue(keys.to(fences.DEVICE))
    assert queue.keys[:3].isnan().any(1).tolist() == [False, True, False]
    assert (queue.keys[[0, 2]] == 0.5).all()


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 2**40])
@pytest.mark.parametrize(("tail", "filled"), [(0, 0), (0, 4), (3, 3), (4, 5), (-7, 4), (12, 4)])
def test_dequeue_matches_reference(count: int, tail: int, filled: int) -> None:
    queue = Queue(torch.ones(5, 2), tail, filled)
    expected = torch.tensor(tail), torch.tensor(filled)
    reference.dequeue_(*expected, 5, count)
    queue.dequeue(count)
    queue.expect(torch.ones(5, 2).double(), *expected)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=SLOW)
@given(
    st.integers(1, 9),
    st.sampled_from(DTYPES),
    st.lists(st.tuples(st.booleans(), st.integers(0, 11)), min_size=30, max_size=60),
    st.integers(0, 2**31),
)
def test_is_a_queue(capacity: int, dtype: torch.dtype, steps: list[tuple[bool, int]], seed: int) -> None:
    """Thousands of steps in all, against collections.deque."""
    fences.allocated.clear()
    generator = torch.Generator().manual_seed(seed)
    queue = Queue(torch.zeros(capacity, 3, dtype=dtype))
    model: deque[Tensor] = deque(maxlen=capacity)
    for enqueue, count in steps:
        if enqueue:
            keys = torch.randn(count, 3, generator=generator)
            queue.enqueue(keys.to(fences.DEVICE))
            model.extend(F.normalize(keys.double(), dim=1))
        else:
            queue.dequeue(count)
            for _ in range(min(count, len(model))):
                model.popleft()
        assert int(queue.filled) == len(model)
        assert 0 <= int(queue.tail) < capacity
        assert int(queue.arrived) == 0
    held = queue.keys.cpu().double().roll(-int(queue.tail), 0)[: len(model)]
    expected = torch.stack([*model]) if model else torch.zeros(0, 3).double()
    torch.testing.assert_close(held, expected, atol=FLOAT, rtol=ROUNDING[dtype])


def test_one_launch_reads_keys_where_they_are() -> None:
    tensors = [torch.zeros(8, 6), torch.tensor(0), torch.tensor(0), torch.tensor(0, dtype=torch.int32)]
    spaced = torch.randn(5, 9)[:, 1:7]
    with recording(90, "tf32") as found:
        key_queue.enqueue(*tensors, spaced)
        key_queue.enqueue(*tensors, torch.empty(0, 6))
    (only,) = found
    assert only.arguments["keys"] is spaced


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("count", "capacity"), [(256, 65536), (4096, 5000), (3000, 1000)])
def test_graph_replays(count: int, capacity: int) -> None:
    """Many programs at once, and every replay finds the state that the one before left."""
    queue = Queue(torch.zeros(capacity, 128))
    keys = torch.randn(count, 128, device="cuda")
    expected, tail, filled = torch.zeros(capacity, 128).double(), torch.tensor(0), torch.tensor(0)
    queue.enqueue(keys)  # compiles
    queue.dequeue(100)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        queue.enqueue(keys)
        queue.dequeue(100)
    for step in range(200):
        if step:
            keys.normal_()
            graph.replay()
        reference.enqueue_(expected, tail, filled, torch.tensor(0), keys.cpu().double())
        reference.dequeue_(tail, filled, capacity, 100)
    queue.expect(expected, tail, filled)
