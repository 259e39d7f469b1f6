"""KeyQueue against a deque: any batch, any capacity; what is offered as negatives; saving and loading."""

from collections import deque
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastssl import _extension
from fastssl.errors import FastsslError
from fastssl.ops import KeyQueue, info_nce, use_backend

CUDA = torch.cuda.is_available()
DEVICE = {"native": "cpu", "triton": "cuda" if CUDA else "cpu", "reference": "cuda" if CUDA else "cpu"}
# Triton's interpreter needs a tenth of a second a call; its kernels have thousands of cases in tests/kernels.
SEQUENCES = {"native": 1000, "triton": 1000 if CUDA else 8, "reference": 200}
EPS = {torch.float32: 3e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float64: 1e-15}


@pytest.fixture(params=DEVICE)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "native" and (why := _extension.missing()):
        pytest.skip(why)
    with use_backend(request.param), torch.device(DEVICE[request.param]):
        yield request.param


class Model:
    """The same queue as a deque of float64 unit rows."""

    def __init__(self, queue: KeyQueue) -> None:
        self.queue = queue
        rows = queue.keys[: int(queue.filled)].double().cpu()
        self.rows: deque[Tensor] = deque(rows, maxlen=queue.capacity)

    def enqueue(self, keys: Tensor) -> None:
        self.queue.enqueue_(keys)
        self.rows.extend(F.normalize(keys.double().cpu()))

    def dequeue(self, count: int) -> None:
        self.queue.dequeue_(count)
        for _ in range(min(count, len(self.rows))):
            self.rows.popleft()

    def check(self, dtype: torch.dtype | None = None) -> None:
        """`dtype` is that of the keys, if it is a coarser one than the queue's."""
        first, filled = (int(v) for v in self.queue.valid)
        assert filled == len(self.rows)
        assert 0 <= first < self.queue.capacity
        if filled:
            off = self.queue.oldest_first().double().cpu() - torch.stack(list(self.rows))
            assert off.abs().max() <= max(EPS[self.queue.keys.dtype], EPS[dtype or torch.float64])


Operation = st.tuples(st.sampled_from(["enqueue", "enqueue", "dequeue"]), st.integers(0, 20))


def run_sequences(examples: int, dtype: torch.dtype) -> None:
    @settings(deadline=None, max_examples=examples, database=None)
    @given(
        capacity=st.integers(1, 13),
        dim=st.integers(1, 40),
        fill=st.sampled_from(["random", "empty"]),
        operations=st.lists(Operation, max_size=12),
        seed=st.integers(0, 2**32),
    )
    def sequences(capacity: int, dim: int, fill: str, operations: list[tuple[str, int]], seed: int) -> None:
        draw = torch.Generator(torch.get_default_device()).manual_seed(seed)
        model = Model(KeyQueue(capacity, dim, fill=fill, dtype=dtype, generator=draw))
        for name, count in operations:
            if name == "enqueue":
                model.enqueue(torch.randn(count, dim, generator=draw).to(dtype))
            else:
                model.dequeue(count)
            model.check()

    sequences()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_queue_is_a_deque(dtype: torch.dtype, backend: str) -> None:
    run_sequences(SEQUENCES[backend], dtype)


def test_float64_is_a_deque_too() -> None:
    run_sequences(50, torch.float64)


@pytest.mark.parametrize("queue_dtype", EPS)
@pytest.mark.parametrize("dtype", EPS)
def test_dtypes_of_queue_and_keys(dtype: torch.dtype, queue_dtype: torch.dtype) -> None:
    """On whatever backend takes them; float64 on either side is `reference`."""
    model = Model(KeyQueue(7, 33, dtype=queue_dtype, fill="empty"))
    model.enqueue(torch.randn(5, 33).to(dtype))
    model.enqueue(torch.randn(4, 33).to(dtype))
    model.check(torch.float32 if dtype != torch.float64 else dtype)  # half keys are computed in float32


@pytest.mark.skipif(_extension.missing() is not None, reason=str(_extension.missing()))
def test_keys_for_several_threads() -> None:
    model = Model(KeyQueue(17, 10_000, fill="empty"))
    with use_backend("native"):
        for count in (7, 9, 20):  # two work items of 4 and 3 rows, two of 5 and 4, five of which the last has one
            model.enqueue(torch.randn(count, 10_000))
            model.check()


def test_layouts_of_keys(backend: str) -> None:
    keys = torch.randn(6, 8)
    for layout in (keys.T.contiguous().T, keys[::2], keys[:, ::2], keys[1:, 1:], keys[:1].expand(6, 8)):
        model = Model(KeyQueue(5, layout.shape[1], fill="empty"))
        model.enqueue(layout)
        model.check()


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-13, 1e-6, 1e30])
def test_odd_lengths(scale: float, backend: str) -> None:
    """Zero rows stay zero; squares may leave float32, where the reference is to be called in float64."""
    if backend == "reference" and scale > 1e19:
        pytest.skip("F.normalize in float32 gives 0")
    model = Model(KeyQueue(5, 20, fill="empty"))
    model.enqueue(torch.randn(3, 20) * scale)
    model.check()


def test_nan_stays_in_its_row_and_fills_it(backend: str) -> None:
    keys = torch.randn(3, 20)
    keys[1, 7] = float("nan")
    queue = KeyQueue(5, 20, fill="empty")
    queue.enqueue_(keys)
    assert queue.keys[1].isnan().all()
    assert queue.keys[[0, 2]].isfinite().all()


def test_the_oldest_rows_stay_where_they_are(backend: str) -> None:
    queue = KeyQueue(8, 4)
    before, place = queue.keys.clone(), queue.keys.data_ptr()
    queue.enqueue_(torch.randn(3, 4))
    assert queue.keys.data_ptr() == place
    assert torch.equal(queue.keys[3:], before[3:])
    assert not torch.equal(queue.keys[:3], before[:3])


def test_a_queue_starts_as_the_papers() -> None:
    queue = KeyQueue(10, 4, generator=torch.Generator().manual_seed(3))
    assert (int(queue.tail), int(queue.filled)) == (0, 10)
    assert torch.allclose(queue.keys.norm(dim=1), torch.ones(10))
    assert not queue.keys.requires_grad


def test_unwritten_rows_are_never_negatives(backend: str) -> None:
    queue = KeyQueue(16, 8, fill="empty")
    q, k = torch.randn(2, 3, 8).unbind()

    def loss() -> Tensor:
        return info_nce(q, k, queue.keys, negatives_normalized=True, valid=queue.valid)

    assert loss() == 0
    keys = torch.randn(5, 8)
    queue.enqueue_(keys)
    expected = info_nce(q, k, F.normalize(keys), negatives_normalized=True)
    queue.keys[5:] = float("nan")  # whatever lies there
    assert torch.allclose(loss(), expected, atol=1e-6)


def test_nothing_is_allocated() -> None:
    """After the first call, on the CPU; the reference allocates, and shows that this test can fail."""
    if why := _extension.missing():
        pytest.skip(why)
    queue, keys = KeyQueue(1000, 32), torch.randn(64, 32)

    def allocations() -> int:
        queue.enqueue_(keys)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            for _ in range(20):
                queue.enqueue_(keys)
                queue.dequeue_(3)
        return sum(event.name() == "[memory]" for event in profile.profiler.kineto_results.events())

    assert allocations() == 0
    with use_backend("reference"):
        assert allocations() > 0


def test_a_queue_saved_for_backward_is_known_to_have_changed(backend: str) -> None:
    queue = KeyQueue(4, 3)
    for buffer in (queue.keys, queue.tail, queue.filled):
        x = torch.ones(3, requires_grad=True)
        y = (buffer * x).sum()
        queue.enqueue_(torch.randn(2, 3))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


def test_no_graph_is_kept(backend: str) -> None:
    queue = KeyQueue(4, 3)
    queue.enqueue_(torch.randn(2, 3, requires_grad=True))
    assert not queue.keys.requires_grad


def test_round_trip(backend: str) -> None:
    queue, same = KeyQueue(5, 2), KeyQueue(5, 2, fill="empty")
    queue.enqueue_(torch.randn(3, 2))
    queue.dequeue_(1)
    assert set(queue.state_dict()) == {"keys", "tail", "filled"}
    same.load_state_dict(queue.state_dict())
    for name, value in queue.state_dict().items():
        assert torch.equal(same.state_dict()[name], value)
    more = torch.randn(4, 2)
    queue.enqueue_(more)
    same.enqueue_(more)
    assert torch.equal(queue.keys, same.keys)


@pytest.mark.parametrize("way", ["assign", "to_empty"])
def test_a_detour_over_the_meta_device(way: str, backend: str) -> None:
    """Large models are made there, and get memory or values later."""
    saved = KeyQueue(4, 2, fill="empty").state_dict()
    with torch.device("meta"):
        queue = KeyQueue(4, 2, fill="empty")
    if way == "to_empty":
        queue = queue.to_empty(device=torch.get_default_device())
        queue.arrived.fill_(12345)  # what memory holds
    queue.load_state_dict(saved, assign=way == "assign")
    keys = torch.randn(3, 2)
    queue.enqueue_(keys)
    assert (int(queue.tail), int(queue.filled)) == (0, 3)
    assert torch.allclose(queue.keys[:3], F.normalize(keys), atol=1e-6)


def test_buffers_on_several_devices_are_refused() -> None:
    queue = KeyQueue(4, 2)
    queue.arrived = queue.arrived.to("meta")
    with pytest.raises(FastsslError, match="its arrived on meta"):
        queue.enqueue_(torch.randn(3, 2))


@pytest.mark.parametrize(("name", "value"), [("tail", -1), ("tail", 5), ("filled", 6), ("filled", -2), ("tail", 2.7)])
def test_a_state_out_of_range_is_refused(name: str, value: float) -> None:
    queue = KeyQueue(5, 2)
    with pytest.raises(FastsslError, match=f"the saved {name} must be an int64 in 0…"):
        queue.load_state_dict({**queue.state_dict(), name: torch.tensor(value)})


@pytest.mark.parametrize("tail", [-7, 5, 12, -(2**40)])
def test_any_tail_is_taken_modulo_the_capacity(tail: int, backend: str) -> None:
    """So that a wrong one, written by hand, cannot lead out of the buffer."""
    queue, keys = KeyQueue(5, 2, fill="empty"), torch.randn(3, 2)
    queue.tail.fill_(tail)
    queue.enqueue_(keys)
    queue.dequeue_(1)
    assert int(queue.tail) == (tail + 1) % 5
    assert torch.allclose(queue.oldest_first(), F.normalize(keys[1:]), atol=1e-6)


@pytest.mark.parametrize("capacity", [3, 6])
def test_another_capacity_says_how_to_convert(capacity: int) -> None:
    queue = KeyQueue(5, 2)
    queue.enqueue_(torch.randn(3, 2))
    other = KeyQueue(capacity, 2)
    with pytest.raises(FastsslError, match=rf"\(5, 2\).*\({capacity}, 2\).*oldest_first"):
        other.load_state_dict(queue.state_dict())
    # what the message says
    converted = KeyQueue(capacity, 2, fill="empty")
    converted.enqueue_(queue.oldest_first())
    kept = queue.oldest_first()[-capacity:]
    assert torch.allclose(converted.oldest_first(), kept, atol=1e-6)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        (torch.zeros(3), r"\(3,\)"),
        (torch.zeros(3, 5), r"N×4 .* \(3, 5\)"),
        (torch.zeros(3, 4, dtype=torch.int64), "torch.int64"),
        (torch.zeros(3, 4, device="meta"), "the queue is on cpu; keys on meta"),
    ],
)
def test_wrong_keys_are_named(keys: Tensor, named: str) -> None:
    with pytest.raises(FastsslError, match=named):
        KeyQueue(8, 4).enqueue_(keys)


def test_rows_of_the_queue_itself_are_refused() -> None:
    queue = KeyQueue(8, 4)
    with pytest.raises(FastsslError, match=r"keys\.clone\(\)"):
        queue.enqueue_(queue.keys[2:4])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"capacity": 0}, "got 0 and 4"),
        ({"dim": -1}, "got 8 and -1"),
        ({"fill": "zeros"}, "'zeros'"),
        ({"dtype": torch.int8}, "torch.int8"),
        ({"dtype": torch.float8_e5m2}, "torch.float8_e5m2"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], named: str) -> None:
    with pytest.raises(FastsslError, match=named):
        KeyQueue(**{"capacity": 8, "dim": 4, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [-1, 2.5, None])
def test_a_count_must_be_whole(count: int) -> None:
    with pytest.raises(FastsslError, match=f"got {count}"):
        KeyQueue(8, 4).dequeue_(count)


def test_another_dim_is_refused() -> None:
    with pytest.raises(FastsslError, match=r"\(5, 3\) and this one \(5, 2\)$"):
        KeyQueue(5, 2).load_state_dict(KeyQueue(5, 3).state_dict())
