"""Shuffle-BN in one process: how rows are dealt, and the public functions. For several, see test_distributed.py."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastssl import _extension
from fastssl.errors import FastsslError
from fastssl.ops import deal, shuffle_batch, unshuffle_and_gather, unshuffle_batch


def deals_of(batch: int, world: int, seed: int) -> list[deal.Deal]:
    """Of all ranks, each with a permutation of its own."""
    return [deal.draw(batch, world, rank, torch.Generator().manual_seed(seed + rank)) for rank in range(world)]


def arriving(deals: list[deal.Deal]) -> list[Tensor]:
    """The rows that each rank gets, counted through the batches of all ranks, if they are sent as the deals say."""
    packets = [d.order.split(d.sent) for d in deals]  # by source, then target
    batch, ranks = len(deals[0].permutation), range(len(deals))
    return [torch.cat([source * batch + packets[source][target] for source in ranks]) for target in ranks]


@settings(deadline=None)
@given(batch=st.integers(0, 40), world=st.integers(1, 9), seed=st.integers(0, 2**32))
def test_a_deal_is_a_balanced_permutation(batch: int, world: int, seed: int) -> None:
    """Every rank gets as many rows as it gives, of every rank an equal share or one more; nothing is lost."""
    deals = deals_of(batch, world, seed)
    everything = torch.cat(arriving(deals))
    assert everything.sort().values.tolist() == list(range(world * batch))
    for rank, (d, rows) in enumerate(zip(deals, arriving(deals), strict=True)):
        shares = (rows // max(batch, 1)).bincount(minlength=world).tolist()
        assert shares == d.received
        assert sum(d.received) == sum(d.sent) == batch
        assert max(shares) - min(shares) <= 1
        assert d.sent == [other.received[rank] for other in deals]
        assert d.sent[rank] == min(d.sent)  # of uneven shares, the larger ones go to others


@settings(deadline=None)
@given(batch=st.integers(0, 40), world=st.integers(1, 9), seed=st.integers(0, 2**32))
def test_what_a_deal_says_agrees(batch: int, world: int, seed: int) -> None:
    """Sending `order` in pieces of `sent` puts every row where `places` says."""
    deals = deals_of(batch, world, seed)
    everything = torch.cat(arriving(deals))
    for rank, d in enumerate(deals):
        assert torch.equal(d.order[d.inverse], torch.arange(batch))
        assert torch.equal(everything[d.places], rank * batch + torch.arange(batch))


def test_another_default_device_changes_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        drawn = deal.draw(12, 5, 3, generator)
        places = drawn.places
    again = deal.draw(12, 5, 3, torch.Generator().manual_seed(0))
    assert torch.equal(places, again.places)
    assert torch.equal(drawn.order, again.order)


def test_permutations_are_uniform() -> None:
    """Each row goes to each place equally often."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(4, 4)
    for _ in range(6000):
        order = deal.draw(4, 1, 0, generator).order
        counts[torch.arange(4), order] += 1
    expected = 6000 / 4
    assert ((counts - expected).square() / expected).sum() < 28  # χ² with 9 degrees of freedom, p = 0.001


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8, torch.bool]
)
@pytest.mark.parametrize("shape", [(16,), (16, 1), (16, 3, 4), (1, 5), (0, 5), (16, 0)])
def test_one_process_permutes(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    x = torch.randint(2 if dtype == torch.bool else 100, shape, device=device).to(dtype)
    shuffled, handle = shuffle_batch(x, generator=torch.Generator().manual_seed(0))
    handle.wait()
    assert torch.equal(shuffled, x[handle.deal.order.to(device)])
    assert torch.equal(unshuffle_batch(shuffled, handle), x)
    keys, everyone = unshuffle_and_gather(shuffled, handle)
    assert torch.equal(keys, x)
    assert torch.equal(everyone, x)


def test_rows_move(device: str) -> None:
    x = torch.arange(16, device=device)
    shuffled, _ = shuffle_batch(x, generator=torch.Generator().manual_seed(0))
    assert sorted(shuffled.tolist()) == list(range(16))
    assert not torch.equal(shuffled, x)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_memory_format_is_kept(memory_format: torch.memory_format) -> None:
    if why := _extension.missing():
        pytest.skip(why)
    x = torch.randn(6, 3, 4, 5).contiguous(memory_format=memory_format)
    shuffled, handle = shuffle_batch(x, generator=torch.Generator().manual_seed(0))
    assert shuffled.is_contiguous(memory_format=memory_format)
    assert torch.equal(unshuffle_batch(shuffled, handle), x)


@pytest.mark.parametrize("x", [torch.randn(6, 8)[:, ::2], torch.randn(8, 6).T, torch.randn(1, 4).expand(6, 4)])
def test_any_strides(x: Tensor, device: str) -> None:
    x = x.to(device)
    shuffled, handle = shuffle_batch(x, generator=torch.Generator().manual_seed(0))
    handle.wait()
    assert torch.equal(unshuffle_batch(shuffled, handle), x)


def test_memory_is_used_again_once_it_is_free() -> None:
    """And not before: what a caller still holds stays as it is."""
    if why := _extension.missing():
        pytest.skip(why)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, 64, 64)
    kept, _ = shuffle_batch(x, generator=generator)
    part = kept[3]  # a view holds it as well
    expected = part.clone()
    places = set()
    for _ in range(10):
        shuffled, handle = shuffle_batch(x, generator=generator)
        places.add(shuffled.data_ptr())
        del shuffled, handle
    assert len(places) == 1
    assert kept.data_ptr() not in places
    del kept
    for _ in range(3):
        held, _ = shuffle_batch(x, generator=generator)
        places.add(held.data_ptr())
    assert torch.equal(part, expected)


def test_gradients_stop(device: str) -> None:
    x = torch.randn(4, 3, requires_grad=True, device=device)
    shuffled, handle = shuffle_batch(x, generator=torch.Generator())
    assert not shuffled.requires_grad
    assert not unshuffle_batch(x, handle).requires_grad


def test_another_number_of_rows_is_named(device: str) -> None:
    _, handle = shuffle_batch(torch.zeros(4, 3, device=device), generator=torch.Generator())
    for function in (unshuffle_batch, unshuffle_and_gather):
        with pytest.raises(FastsslError, match=rf"{function.__name__}: 4 rows were shuffled, .* \(5, 3\)"):
            function(torch.zeros(5, 3, device=device), handle)
    with pytest.raises(FastsslError, match="without dimensions"):
        shuffle_batch(torch.tensor(1.0, device=device), generator=torch.Generator())
