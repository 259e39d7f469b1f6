"""ema_update_ against float64, tensor by tensor: ragged lists, dtypes, layouts, and what is refused."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from fastssl import _extension
from fastssl.errors import FastsslError
from fastssl.ops import ema_inputs, ema_update_
from fastssl.ops.backend import requested

FLOATS = (torch.float32, torch.float64)
SOURCES = (*FLOATS, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)
# One rounding of each of three operations; in float32 for a float32 target whatever its source.
TOLERANCE = {torch.float32: 4 * 2.0**-24, torch.float64: 8 * 2.0**-53}  # the formula in float64 is rounded itself


def check(
    targets: list[Tensor], sources: list[Tensor], momentum: float | Tensor, shadows: list[Tensor] | None = None
) -> None:
    """Update, and compare with the formula in float64."""
    m = float(momentum)
    before = [t.double() for t in targets]
    expected = [m * t + (1 - m) * s.double() for t, s in zip(before, sources, strict=True)]
    ema_update_(targets, sources, momentum, shadows=shadows)
    for target, source, old, new in zip(targets, sources, before, expected, strict=True):
        if target.is_floating_point():
            scale = old.abs().maximum(source.double().abs())
            off = (target.double() - new).abs()
            assert (off <= TOLERANCE[target.dtype] * scale + 1e-40).all(), (target.dtype, source.dtype, off.max())
        else:
            assert torch.equal(target, source)
    for target, shadow in zip(targets, shadows or (), strict=shadows is not None):
        assert torch.equal(shadow, target.to(shadow.dtype))


def noise(draw: np.random.Generator, *shape: int, dtype: torch.dtype) -> Tensor:
    """Numbers of many sizes, float16's subnormals among them."""
    values = np.asarray(draw.standard_normal(shape) * 10.0 ** draw.integers(-6, 4, shape))
    return torch.from_numpy(values).to(dtype)


Shape = st.lists(st.integers(0, 9), max_size=4).map(tuple)
Entry = st.tuples(
    st.one_of(Shape, st.integers(0, 3000).map(lambda n: (n,))),
    st.sampled_from([*FLOATS, torch.int64, torch.bool]),
    st.sampled_from(SOURCES),
    st.sampled_from([None, *HALF, torch.float32]),
    st.integers(0, 3),  # elements by which a view is off its storage's beginning
)
MOMENTA = st.one_of(st.sampled_from([0.0, 1.0, 0.5, 0.999, 0.99999]), st.floats(0, 1))


def ragged(
    entries: list[Any], seed: int, shadowed: bool, device: str
) -> tuple[list[Tensor], list[Tensor], list[Tensor] | None]:
    draw = np.random.default_rng(seed)

    def place(x: Tensor, offset: int) -> Tensor:
        return torch.empty(x.numel() + offset, dtype=x.dtype, device=device)[offset:].view(x.shape).copy_(x)

    targets, sources, shadows = [], [], []
    for shape, dtype, source_dtype, shadow_dtype, offset in entries:
        floating = dtype.is_floating_point
        targets.append(place(noise(draw, *shape, dtype=dtype), offset))
        sources.append(place(noise(draw, *shape, dtype=source_dtype if floating else dtype), offset % 2))
        kind = (shadow_dtype or torch.bfloat16) if floating else dtype
        shadows.append(place(torch.zeros(shape, dtype=kind), offset % 3))
    return targets, sources, shadows if shadowed else None


# One device serves all examples.
SHARED = [HealthCheck.function_scoped_fixture]


@settings(deadline=None, max_examples=300, suppress_health_check=SHARED)
@given(entries=st.lists(Entry, max_size=12), momentum=MOMENTA, seed=st.integers(0, 2**32), shadowed=st.booleans())
@example(entries=[], momentum=0.9, seed=0, shadowed=False)
def test_ragged_lists(entries: list[Any], momentum: float, seed: int, shadowed: bool, device: str) -> None:
    targets, sources, shadows = ragged(entries, seed, shadowed, device)
    check(targets, sources, momentum, shadows)


@settings(deadline=None, max_examples=12, suppress_health_check=SHARED)
@given(count=st.integers(100, 400), seed=st.integers(0, 2**32), shadowed=st.booleans())
def test_hundreds_of_tensors(count: int, seed: int, shadowed: bool, device: str) -> None:
    draw = np.random.default_rng(seed)
    kinds = [*FLOATS, torch.int64]
    entries = [
        ((int(draw.integers(0, 400)),), kinds[draw.integers(3)], SOURCES[draw.integers(4)], HALF[draw.integers(2)], 0)
        for _ in range(count)
    ]
    targets, sources, shadows = ragged(entries, seed, shadowed, device)
    check(targets, sources, 0.99, shadows)


@pytest.mark.parametrize("size", [65535, 65536, 65537, 5_000_000])
def test_large_tensors(size: int, device: str) -> None:
    """Of several of the chunks that threads share."""
    targets = [torch.randn(n, device=device) for n in (size, 3, size)]
    shadows = [torch.empty_like(t, dtype=torch.bfloat16) for t in targets]
    check(targets, [torch.randn_like(t).bfloat16() for t in targets], 0.9, shadows)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("target", FLOATS)
@pytest.mark.parametrize("shadow", [None, *HALF, *FLOATS])
def test_dtypes(target: torch.dtype, source: torch.dtype, shadow: torch.dtype | None, device: str) -> None:
    draw = np.random.default_rng(0)
    targets = [noise(draw, 37, dtype=target).to(device)]
    shadows = None if shadow is None else [torch.empty(37, dtype=shadow, device=device)]
    check(targets, [noise(draw, 37, dtype=source).to(device)], 0.7, shadows)


def test_every_half_is_read_right(device: str) -> None:
    """All 65,536 of each kind: NaN, infinities, subnormals."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16, device=device)
    for dtype in HALF:
        source = bits.view(dtype)
        target = torch.zeros(len(bits), device=device)
        ema_update_([target], [source], 0.0)
        torch.testing.assert_close(target, source.float(), rtol=0, atol=0, equal_nan=True)


def test_shadows_are_rounded_as_torch_does(device: str) -> None:
    draw = np.random.default_rng(0)
    bits = torch.from_numpy(draw.integers(-(2**31), 2**31, 300_000, dtype=np.int32))
    ties = torch.arange(2**16, dtype=torch.int32) * 2**12  # halfway between two float16, for normal numbers
    values = torch.cat([bits, ties + 0x38000000, ties - 0x47FFFFFF, bits % 2**28]).view(torch.float32).to(device)
    for dtype in HALF:
        target, shadow = values.clone(), torch.empty(len(values), dtype=dtype, device=device)
        ema_update_([target], [torch.zeros_like(target)], 1.0, shadows=[shadow])
        torch.testing.assert_close(shadow, target.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", SOURCES)
def test_momentum_0_copies_and_1_keeps(dtype: torch.dtype, device: str) -> None:
    source = torch.randn(1000, device=device).to(dtype)
    target = torch.randn(1000, device=device)
    before = target.clone()
    ema_update_([target], [source], 1.0)
    assert torch.equal(target, before)
    ema_update_([target], [source], 0.0)
    assert torch.equal(target, source.float())


def test_what_has_no_weight_has_no_say(device: str) -> None:
    """Also NaN, of memory that was never written, and infinity."""
    odd = torch.tensor([math.nan, math.inf, -math.inf], device=device)
    if requested() == "reference":
        pytest.skip("the formula as it stands")
    for target, source, momentum in ((odd.clone(), torch.ones_like(odd), 0.0), (torch.ones_like(odd), odd, 1.0)):
        ema_update_([target], [source], momentum)
        assert (target == 1).all()


def test_equal_tensors_do_not_drift() -> None:
    target, source = torch.randn(2, 1000).unbind()
    target.copy_(source)
    for _ in range(100):
        ema_update_([target], [source], 0.996)
    assert torch.equal(target, source)


@pytest.mark.parametrize(
    "momentum", [torch.tensor(0.9), torch.tensor([0.9], dtype=torch.float64), torch.tensor(0.9, dtype=torch.bfloat16)]
)
def test_momentum_as_a_tensor(momentum: Tensor, device: str) -> None:
    check([torch.randn(33, device=device)], [torch.randn(33, device=device)], momentum.to(device))
    check([torch.randn(33, device=device)], [torch.randn(33, device=device)], momentum)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.clone(),
    "channels_last": lambda x: x.clone(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
    "gapped": lambda x: torch.stack([x, x], -1)[..., 1],
    "rows of a wider matrix": lambda x: torch.cat([x, x], 0)[:3],
}


@pytest.mark.parametrize("shadow", LAYOUTS)
@pytest.mark.parametrize("source", LAYOUTS)
@pytest.mark.parametrize("target", LAYOUTS)
def test_layouts(target: str, source: str, shadow: str, device: str) -> None:
    x, y = torch.randn(2, 3, 4, 5, 2, device=device).unbind()
    shadows = [LAYOUTS[shadow](torch.zeros_like(x).bfloat16())]
    check([LAYOUTS[target](x)], [LAYOUTS[source](y)], 0.8, shadows)


def test_what_lies_between_the_elements_stays(device: str) -> None:
    matrix = torch.arange(12.0, device=device).view(3, 4)
    ema_update_([matrix[:, 1]], [torch.zeros(3, device=device)], 0.0)
    assert matrix.tolist() == [[0, 0, 2, 3], [4, 0, 6, 7], [8, 0, 10, 11]]


def test_integers_and_scalars(device: str) -> None:
    targets = [torch.tensor(1), torch.tensor([True, False]), torch.tensor(0.5), torch.empty(0), torch.empty(0, 3)]
    sources = [torch.tensor(7), torch.tensor([False, True]), torch.tensor(1.5), torch.empty(0), torch.empty(0, 3)]
    targets, sources = [t.to(device) for t in targets], [s.to(device) for s in sources]
    check(targets, sources, 0.9, [torch.zeros_like(t) for t in targets])


def test_a_model_with_its_buffers(device: str) -> None:
    """As users call it: generators, parameters that ask for gradients, buffers among them."""
    key, query = (torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).to(device) for _ in "kq")
    query(torch.randn(2, 3, 8, 8, device=device))
    expected = [0.9 * k + 0.1 * q for k, q in zip(key.parameters(), query.parameters(), strict=True)]
    ema_update_(key.parameters(), query.parameters(), 0.9)
    assert all(torch.allclose(a, b) for a, b in zip(key.parameters(), expected, strict=True))
    ema_update_(key.buffers(), query.buffers(), 0.0)
    assert all(torch.equal(a, b) for a, b in zip(key.buffers(), query.buffers(), strict=True))


def test_data_that_moved_is_found(device: str) -> None:
    """`p.data = …` keeps the parameter and moves its memory."""
    target, source = torch.nn.Parameter(torch.zeros(4, device=device)), torch.ones(4, device=device)
    ema_update_([target], [source], 0.5)
    old = target.data
    target.data = torch.full((4,), 8.0, device=device)
    ema_update_([target], [source], 0.5)
    assert target.tolist() == [4.5] * 4
    assert old.tolist() == [0.5] * 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_graph_follows_the_momentum_on_the_device() -> None:
    target, source = torch.zeros(5000, device="cuda"), torch.ones(5000, device="cuda")
    momentum = torch.tensor(1.0, dtype=torch.float64, device="cuda")
    ema_update_([target], [source], momentum)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ema_update_([target], [source], momentum)
    for m, expected in ((0.5, 0.5), (0.5, 0.75), (0.0, 1.0)):
        momentum.fill_(m)
        graph.replay()
        assert (target == expected).all()


def test_a_tensor_saved_for_backward_is_known_to_have_changed(device: str) -> None:
    target, shadow = torch.ones(2, 3, device=device).unbind()
    for written in (target, shadow):
        x = torch.ones(3, requires_grad=True, device=device)
        y = (x * written).sum()
        ema_update_([target], [torch.zeros(3, device=device)], 0.5, shadows=[shadow])
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


def test_tensors_without_memory() -> None:
    meta = [torch.zeros(3, device="meta") for _ in range(4)]
    ema_update_(meta[:2], meta[2:], 0.5)
    with FakeTensorMode():
        fake = [torch.zeros(3) for _ in range(4)]
        ema_update_(fake[:2], fake[2:], 0.5)


def test_wrappers_and_transforms_are_left_to_the_reference() -> None:
    def updated(target: Tensor) -> Tensor:
        target = target.clone()
        ema_update_([target], [torch.zeros(3)], 0.5)
        return target

    assert torch.equal(torch.vmap(updated)(torch.ones(4, 3)), torch.full((4, 3), 0.5))
    two = TwoTensor(torch.ones(3), torch.ones(3) * 2)
    ema_update_([two], [TwoTensor(torch.zeros(3), torch.zeros(3))], 0.5)
    assert (two.a.tolist(), two.b.tolist()) == ([0.5] * 3, [1.0] * 3)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


matrix, line = torch.zeros(4, 6), torch.zeros(10)
tied = torch.zeros(5)


@pytest.mark.parametrize(
    ("targets", "sources", "momentum", "named"),
    [
        ([zeros(2)], [], 0.9, "1 targets and 0 sources"),
        ([zeros(2), zeros(2)], [zeros(2), zeros(3)], 0.9, r"tensor 1: target is \(2,\) on cpu, sources \(3,\) on cpu"),
        ([zeros(2)], [torch.zeros(2, device="meta")], 0.9, "on meta"),
        ([zeros(2), torch.zeros(2, device="meta")], [zeros(2), torch.zeros(2, device="meta")], 0.9, "target 1 on meta"),
        ([zeros(2, dtype=torch.float16)], [zeros(2)], 0.9, "target 0 is torch.float16"),
        ([zeros(2, dtype=torch.bfloat16)], [zeros(2)], 0.9, "target 0 is torch.bfloat16"),
        ([zeros(2, dtype=torch.complex64)], [zeros(2, dtype=torch.complex64)], 0.9, "target 0 is torch.complex64"),
        ([zeros(2, dtype=torch.float8_e5m2)], [zeros(2)], 0.9, "target 0 is torch.float8_e5m2"),
        ([zeros(2)], [zeros(2)], torch.tensor(1.5), r"1\.5"),
        ([zeros(2)], [zeros(2)], torch.tensor(0.5, device="meta"), "targets are on cpu and momentum on meta"),
        ([zeros(2)], [zeros(2, dtype=torch.int64)], 0.9, "source 0 is torch.int64"),
        ([zeros(2, dtype=torch.int64)], [zeros(2, dtype=torch.int32)], 0.9, "source 0 torch.int32"),
        ([zeros(2)], [zeros(2)], 1.5, r"1\.5"),
        ([zeros(2)], [zeros(2)], -0.1, r"-0\.1"),
        ([zeros(2)], [zeros(2)], float("nan"), "nan"),
        ([zeros(2)], [zeros(2)], "0.9", "'0.9'"),
        ([zeros(2)], [zeros(2)], torch.ones(2), r"shape \(2,\)"),
        ([zeros(2)], [zeros(2)], torch.tensor(1), "torch.int64"),
        ([tied], [tied], 0.9, "target 0 and source 0 share memory"),
        ([tied, tied], [zeros(5), zeros(5)], 0.9, "target 0 and target 1 share memory"),
        ([line[:6]], [line[4:]], 0.9, "target 0 and source 0 share memory"),
        ([zeros(3), line[2:5], line[4:6]], [zeros(3), zeros(3), zeros(2)], 0.9, "target 1 and target 2"),
        ([matrix[:, :3]], [matrix[:, 2:5]], 0.9, "source 0 and target 0 share memory"),
        ([zeros(1).expand(3)], [zeros(3)], 0.9, r"target 0, of strides \(0,\), has several elements"),
        ([line.as_strided((3, 3), (2, 1))], [zeros(3, 3)], 0.9, "target 0, of strides"),
    ],
)
def test_what_is_refused_is_named(
    targets: list[Tensor], sources: list[Tensor], momentum: Any, named: str, device: str
) -> None:
    before = [t.clone() for t in targets if not t.is_meta]
    with pytest.raises(FastsslError, match=named):
        ema_update_(targets, sources, momentum)
    assert all(torch.equal(a, b) for a, b in zip(before, [t for t in targets if not t.is_meta], strict=True))


def test_sparse_tensors_are_refused() -> None:
    with pytest.raises(FastsslError, match=r"source 0 is torch\.sparse_coo"):
        ema_update_([zeros(2, 2)], [zeros(2, 2).to_sparse()], 0.9)


@pytest.mark.parametrize(
    ("shadows", "named"),
    [
        ([], "2 targets and 0 shadows"),
        ([zeros(2, dtype=torch.bfloat16), zeros(3)], "tensor 1"),
        ([zeros(2), torch.zeros(2, device="meta")], "tensor 1: target is .* on cpu, shadows .* on meta"),
        ([zeros(2, dtype=torch.int32), zeros(2)], "its shadow torch.int32"),
        ([tied[:2], tied[1:3]], "shadow 0 and shadow 1 share memory"),
    ],
)
def test_shadows_that_are_refused(shadows: list[Tensor], named: str) -> None:
    with pytest.raises(FastsslError, match=named):
        ema_update_([zeros(2), zeros(2)], [zeros(2), zeros(2)], 0.9, shadows=shadows)


def test_what_only_looks_like_overlap_is_taken(device: str) -> None:
    """Columns of one matrix, and sources that are one tensor (tied weights)."""
    columns = torch.arange(24.0, device=device).view(4, 6)
    check(list(columns[:, ::2].unbind(1)), [columns[:, i] for i in (1, 3, 5)], 0.5)
    source = torch.ones(3, device=device)
    check([torch.zeros(3, device=device) for _ in range(2)], [source, source], 0.9)


@pytest.mark.parametrize("momentum", [[0.5], [[0.5]]])
def test_one_element_of_any_shape(momentum: Any, device: str) -> None:
    check([torch.tensor(1.0, device=device)], [torch.tensor(0.0, device=device)], torch.tensor(momentum, device=device))


def test_a_momentum_that_is_a_target_itself(device: str) -> None:
    """On the CPU it is read beforehand, on a GPU the order would be anybody's."""
    m, x = torch.tensor(0.5, device=device, dtype=torch.float64), torch.ones(1, device=device)
    if device == "cuda":
        with pytest.raises(FastsslError, match="momentum 0"):
            ema_update_([m, x], [torch.zeros_like(m), torch.zeros_like(x)], m)
    else:
        ema_update_([m, x], [torch.zeros_like(m), torch.zeros_like(x)], m)
        assert (float(m), float(x)) == (0.25, 0.5)


def test_ordinary_lists_pass_at_a_glance_and_nothing_wrong_does() -> None:
    """The extension's quick look may send lists on to the rules, but must not let through what they refuse."""
    if why := _extension.missing():
        pytest.skip(why)
    network, other = (torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)) for _ in "qk")
    mine, theirs = (list(net.state_dict().values()) for net in (network, other))
    assert ema_inputs._fits(mine, theirs, None, 0.9)
    shadows = [x.bfloat16() if x.is_floating_point() else x.clone() for x in mine]
    assert ema_inputs._fits(mine, theirs, shadows, 0.9)
    shared, long = torch.zeros(6), torch.zeros(3, dtype=torch.int64)
    wrong: list[tuple[list[Tensor], list[Tensor], list[Tensor] | None]] = [
        ([shared[:4]], [shared[2:]], None),
        ([shared[:3], shared[2:5]], [torch.ones(3)] * 2, None),
        ([torch.zeros(3)], [long], None),
        ([long], [torch.zeros(3)], None),
        ([torch.zeros(3).half()], [torch.zeros(3)], None),
        ([torch.zeros(3)], [torch.zeros(2)], None),
        ([torch.zeros(3)], [torch.zeros(3)], [long]),
        ([torch.zeros(1).expand(3)], [torch.zeros(3)], None),
        ([torch.zeros(3)], [torch.zeros(3, device="meta")], None),
    ]
    for targets, sources, copies in wrong:
        assert not ema_inputs._fits(targets, sources, copies, 0.9)
        with pytest.raises(ValueError):
            ema_update_(targets, sources, 0.9, shadows=copies)
