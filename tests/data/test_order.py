"""The order of the images: complete, dealt to ranks without overlap, new every epoch, the same after a resume."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastssl.data.order import LAST_BATCHES, OPEN_SHARDS, Order, mixed_seed


def images(order: Order, epoch: int = 0, start: int = 0) -> list[list[int]]:
    return [batch.tolist() for _, batch in order.batches(epoch, start)]


@given(
    st.integers(1, 60), st.integers(1, 9), st.integers(1, 4), st.sampled_from(LAST_BATCHES), st.booleans(),
    st.integers(0, 5),
)  # fmt: skip
def test_every_image_once(count: int, batch: int, world: int, last: str, shuffle: bool, start: int) -> None:
    orders = [Order(count, batch, 3, rank, world, last, shuffle) for rank in range(world)]
    seen = [images(order, 2) for order in orders]
    assert {len(batches) for batches in seen} == {len(orders[0])}
    everything = sorted(image for batches in seen for b in batches for image in b)
    if last == "drop":
        assert len(everything) == count // (batch * world) * batch * world
        assert len(set(everything)) == len(everything)
    elif last == "partial":
        assert everything == list(range(count))
    else:
        assert set(everything) == set(range(count))
        assert len(everything) == len(orders[0]) * batch * world
    if last != "partial":
        assert all(len(b) == batch for batches in seen for b in batches)
    assert images(orders[-1], 2, start) == seen[-1][start:]


def test_a_new_order_every_epoch_and_seed() -> None:
    assert images(Order(50, 50), 0) != images(Order(50, 50), 1)
    assert images(Order(50, 50), 0) != images(Order(50, 50, seed=1), 0)
    assert images(Order(50, 50, shuffle=False), 3) == [list(range(50))]


@pytest.mark.parametrize("shards", [1, OPEN_SHARDS, 5 * OPEN_SHARDS])
def test_few_shards_are_open_at_a_time(shards: int) -> None:
    of = torch.arange(shards).repeat_interleave(20)
    order = Order(len(of), 32, shards=of)
    one, other = order.images(0), order.images(1)
    assert sorted(one.tolist()) == list(range(len(of)))
    runs = [set(of[part].tolist()) for part in one.split(20 * OPEN_SHARDS)]
    assert all(len(run) == min(shards, OPEN_SHARDS) for run in runs)
    assert one.tolist() != other.tolist()
    if shards > OPEN_SHARDS:
        assert runs[0] != set(of[other[: 20 * OPEN_SHARDS]].tolist())
    switches = (of[one[1:]] != of[one[:-1]]).float().mean()
    assert shards == 1 or switches > 0.8  # mixed, and not shard after shard


def test_seeds_are_unrelated() -> None:
    seeds = {mixed_seed(a, b, word) for a in range(9) for b in range(9) for word in ("order", "color")}
    assert len(seeds) == 162
    assert mixed_seed(1, 23) != mixed_seed(12, 3)
