"""The other ops against hand-written formulas, and the choice of the backend."""

from collections import deque

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl.errors import FastsslError
from fastssl.ops import KeyQueue, backend, ema_update_, normalized_mse, shuffle_batch, unshuffle_batch, use_backend
from fastssl.ops.shuffle import global_permutation


def test_normalized_mse_is_the_squared_distance_of_unit_vectors() -> None:
    p, z = torch.randn(5, 8, dtype=torch.float64, requires_grad=True), torch.randn(5, 8, dtype=torch.float64)
    expected = (p / p.norm(dim=1, keepdim=True) - z / z.norm(dim=1, keepdim=True)).square().sum(1)
    assert torch.allclose(normalized_mse(p, z), expected, atol=1e-12)
    assert torch.autograd.gradcheck(normalized_mse, (p, z))


def test_normalized_mse_detaches_the_target() -> None:
    p, z = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    normalized_mse(p, z).sum().backward()
    assert p.grad is not None
    assert z.grad is None


def test_normalized_mse_names_wrong_shapes() -> None:
    with pytest.raises(FastsslError, match=r"\(2, 3\) and \(2, 4\)"):
        normalized_mse(torch.zeros(2, 3), torch.zeros(2, 4))


@pytest.mark.parametrize("momentum", [0.9, torch.tensor(0.9, dtype=torch.float64)])
def test_ema_update(momentum: float | torch.Tensor) -> None:
    target, source = torch.randn(3, 2, dtype=torch.float64), torch.randn(3, 2)
    steps, seen = torch.tensor(1), torch.tensor(7)
    shadow = torch.zeros(3, 2, dtype=torch.bfloat16)
    expected = 0.9 * target + 0.1 * source.double()
    ema_update_([target, steps], [source, seen], momentum, shadows=[shadow, torch.zeros_like(steps)])
    assert torch.allclose(target, expected, atol=1e-12)
    assert steps == 7
    assert torch.equal(shadow, target.bfloat16())


def test_ema_update_takes_generators_of_parameters() -> None:
    key, query = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    ema_update_(key.parameters(), query.parameters(), 0.0)
    assert torch.equal(key.weight, query.weight)


@pytest.mark.parametrize(
    ("targets", "sources", "momentum", "named"),
    [
        ([torch.zeros(2)], [], 0.9, "1 targets and 0 sources"),
        ([torch.zeros(2)], [torch.zeros(3)], 0.9, r"\(3,\)"),
        ([torch.zeros(2).half()], [torch.zeros(2)], 0.9, "float16"),
        ([torch.zeros(2)], [torch.zeros(2)], 1.5, "1.5"),
    ],
)
def test_ema_update_names_what_is_wrong(targets: list, sources: list, momentum: float, named: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(FastsslError, match=named):
        ema_update_(targets, sources, momentum)


Operation = st.tuples(st.sampled_from(["enqueue", "dequeue"]), st.integers(0, 12))


@settings(deadline=None, max_examples=150)
@given(
    capacity=st.integers(1, 7), fill=st.sampled_from(["random", "empty"]), operations=st.lists(Operation, max_size=12)
)
def test_queue_is_a_deque(capacity: int, fill: str, operations: list[tuple[str, int]]) -> None:
    queue = KeyQueue(capacity, 3, fill=fill, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model = deque(queue.keys.clone() if fill == "random" else [], maxlen=capacity)
    for name, count in operations:
        if name == "enqueue":
            keys = torch.randn(count, 3, dtype=torch.float64)
            queue.enqueue_(keys)
            model.extend(F.normalize(keys))
        else:
            queue.dequeue_(count)
            for _ in range(min(count, len(model))):
                model.popleft()
        first, filled = (int(v) for v in queue.valid)
        assert filled == len(model)
        rows = queue.keys[[(first + i) % capacity for i in range(filled)]]
        assert all(torch.equal(row, other) for row, other in zip(rows, model, strict=True))


def test_queue_starts_as_the_papers() -> None:
    queue = KeyQueue(10, 4, generator=torch.Generator().manual_seed(3))
    assert (int(queue.tail), int(queue.filled)) == (0, 10)
    assert torch.allclose(queue.keys.norm(dim=1), torch.ones(10))
    assert not queue.keys.requires_grad


def test_queue_writes_in_place() -> None:
    queue = KeyQueue(5, 2)
    place = queue.keys.data_ptr()
    queue.enqueue_(torch.randn(3, 2))
    assert queue.keys.data_ptr() == place


def test_queue_round_trip_and_another_capacity() -> None:
    queue, same = KeyQueue(5, 2), KeyQueue(5, 2, fill="empty")
    queue.enqueue_(torch.randn(3, 2))
    same.load_state_dict(queue.state_dict())
    assert torch.equal(same.keys, queue.keys)
    assert same.tail == 3
    with pytest.raises(FastsslError, match=r"\(5, 2\).*\(6, 2\)"):
        KeyQueue(6, 2).load_state_dict(queue.state_dict())


def test_shuffle_in_one_process_is_a_permutation(generator: torch.Generator) -> None:
    x = torch.arange(16).view(16, 1)
    shuffled, handle = shuffle_batch(x, generator=generator)
    handle.wait()
    assert sorted(shuffled.flatten().tolist()) == list(range(16))
    assert not torch.equal(shuffled, x)
    assert torch.equal(unshuffle_batch(shuffled, handle), x)


@given(batch=st.integers(1, 9), world=st.integers(1, 5), seed=st.integers(0, 99))
def test_every_rank_gets_an_equal_share_of_every_rank(batch: int, world: int, seed: int) -> None:
    order = global_permutation(batch, world, torch.Generator().manual_seed(seed))
    assert sorted(order.tolist()) == list(range(world * batch))
    for rows in order.view(world, batch):
        shares = (rows // batch).bincount(minlength=world)
        assert shares.min() >= batch // world
        assert shares.max() <= -(-batch // world)


CPU = torch.device("cpu")


def test_a_backend_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with use_backend("reference"):
        assert backend.choose("info_nce", CPU, torch.float32) == "reference"
    monkeypatch.setenv("FASTSSL_BACKEND", "reference")
    assert backend.choose("info_nce", CPU, torch.float32) == "reference"
    with pytest.raises(FastsslError, match="'tpu'"), use_backend("tpu"):
        raise AssertionError


def test_a_backend_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    only_half = backend.Implementation(lambda: None, dtypes=frozenset({torch.float16}))
    monkeypatch.setitem(backend._implementations, "probe", {})
    backend.register("probe", "native", only_half)
    backend.register("probe", "reference", backend.Implementation(lambda: None))
    backend.register("probe", "cuda", backend.Implementation(lambda: None, missing="no nvcc"))
    assert backend.choose("probe", CPU, torch.float16) == "native"
    assert backend.choose("probe", CPU, torch.float32) == "reference"
    for name, why in (("native", "not torch.float32"), ("cuda", "no nvcc"), ("triton", "it has: cuda, native")):
        with use_backend(name), pytest.raises(FastsslError, match=why):
            backend.choose("probe", CPU, torch.float32)
