"""The fused `info_nce` against the package it stands in for, in float64, over every kind of input."""

from dataclasses import dataclass
from typing import Any

import info_nce as package
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastssl.ops import info_nce, use_backend

EPS32 = torch.finfo(torch.float32).eps
LAYOUTS = ("contiguous", "transposed", "every second", "offset", "expanded")
CONTENTS = ("normal", "zero row", "huge row", "huge", "tiny")
HUGE = {torch.float32: 1e30, torch.bfloat16: 1e30, torch.float16: 3e3}


@dataclass(frozen=True)
class Case:
    """One call, and how its inputs come to be."""

    n: int
    m: int
    d: int
    mode: str | None  # "unpaired", "paired", None: in-batch
    dtype: torch.dtype
    negatives_dtype: torch.dtype
    reduction: str
    temperature: float
    temperature_shape: tuple[int, ...] | None  # None: a float
    layouts: tuple[str, str, str]
    contents: tuple[str, str, str]
    same: bool  # query and positive are one tensor
    needs: tuple[bool, bool, bool, bool]  # gradients of query, positive, negatives, temperature
    seed: int


def cases(dtype: torch.dtype) -> st.SearchStrategy[Case]:
    half_queue = st.sampled_from([dtype, torch.bfloat16, torch.float16] if dtype == torch.float32 else [dtype])
    triple = st.tuples
    return st.builds(
        Case,
        n=st.integers(1, 40) | st.sampled_from([64, 65, 290]),
        m=st.integers(0, 40) | st.sampled_from([130, 600]),
        d=st.integers(1, 40) | st.sampled_from([64, 129]),
        mode=st.sampled_from(["unpaired", "paired", None]),
        dtype=st.just(dtype),
        negatives_dtype=half_queue,
        reduction=st.sampled_from(["mean", "sum", "none"]),
        temperature=st.floats(0.01, 10),
        temperature_shape=st.sampled_from([None, (), (1,), (1, 1)]),
        layouts=triple(*[st.sampled_from(LAYOUTS)] * 3),
        contents=triple(*[st.sampled_from(CONTENTS)] * 3),
        same=st.booleans(),
        needs=st.tuples(*[st.booleans()] * 4),
        seed=st.integers(0, 2**16),
    ).filter(lambda case: case.mode != "paired" or case.n * case.m * case.d < 2**18)


def values(shape: tuple[int, ...], content: str, dtype: torch.dtype, draw: torch.Generator) -> Tensor:
    x = torch.randn(shape, generator=draw, dtype=torch.float64)
    if content == "zero row":
        x[..., :1, :] = 0
    elif content == "huge row":
        x[..., :1, :] *= HUGE[dtype]
    elif content == "huge":
        x *= HUGE[dtype]
    elif content == "tiny":
        x *= 1e-3
    return x.to(dtype)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in other strides, in a buffer that holds NaN wherever they are not."""
    *batch, rows, columns = x.shape
    if layout == "expanded" and rows > 0:
        return x[..., :1, :].expand(x.shape)
    if layout == "transposed":
        buffer = x.new_full((*batch, columns + 2, rows + 1), torch.nan)
        view = buffer[..., 1 : columns + 1, :rows].mT
    elif layout == "every second":
        buffer = x.new_full((*batch, 2 * rows + 1, 2 * columns + 1), torch.nan)
        view = buffer[..., : 2 * rows : 2, : 2 * columns : 2]
    else:
        buffer = x.new_full((*batch, rows + 2, columns + (layout == "offset")), torch.nan)
        view = buffer[..., 1 : rows + 1, columns * 0 + (layout == "offset") :]
    view.copy_(x)
    return view


def make(case: Case) -> tuple[list[Any], float | Tensor]:
    """Query, positive, negatives and temperature, with the gradients that the case asks for."""
    draw = torch.Generator().manual_seed(case.seed)
    shapes: list[tuple[int, ...]] = [(case.n, case.d), (case.n, case.d)]
    if case.mode is not None:
        shapes.append((case.m, case.d) if case.mode == "unpaired" else (case.n, case.m, case.d))
    tensors: list[Tensor | None] = [None, None, None]
    for i, shape in enumerate(shapes):
        dtype = case.negatives_dtype if i == 2 else case.dtype
        x = laid_out(values(shape, case.contents[i], dtype, draw), case.layouts[i])
        tensors[i] = x.detach().requires_grad_(case.needs[i])
    if case.same:
        tensors[1] = tensors[0]
    if case.temperature_shape is None:
        return tensors, case.temperature
    dtype = torch.float64 if case.temperature_shape == () else case.dtype
    temperature = torch.full(case.temperature_shape, case.temperature, dtype=dtype)
    return tensors, temperature.requires_grad_(case.needs[3])


def exact(inputs: list[Any], temperature: float | Tensor) -> tuple[list[Any], float | Tensor]:
    """The same values in float64."""
    double = [None if x is None else x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    if inputs[0] is inputs[1]:
        double[1] = double[0]
    if isinstance(temperature, Tensor):
        temperature = temperature.detach().double().requires_grad_(temperature.requires_grad)
    return double, temperature


def inverse_norms(x: Tensor) -> Tensor:
    return 1 / x.detach().double().norm(dim=-1, keepdim=True).clamp(min=1e-12)


def assert_close(ours: Tensor, theirs: Tensor, tolerance: Tensor | float, what: str) -> None:
    limit = torch.finfo(ours.dtype).max  # a gradient through a zero row has the size of 1/ε, too large for float16
    tolerance = torch.as_tensor(tolerance, dtype=torch.float64)
    comparable = theirs.abs() + tolerance < limit
    error = (ours.double() - theirs).abs()
    assert (error <= tolerance)[comparable].all(), (
        f"{what}: off by {error[comparable].max()}, allowed {tolerance.max()}"
    )
    assert not ours[comparable].isnan().any(), what


def check(case: Case) -> None:
    inputs, temperature = make(case)
    keywords: Any = {"reduction": case.reduction, "negative_mode": case.mode or "unpaired"}
    query, positive, negatives = inputs
    loss = info_nce(query, positive, negatives, temperature, **keywords)
    double, exact_temperature = exact(inputs, temperature)
    expected = package.info_nce(*double, temperature=exact_temperature, **keywords)
    assert loss.dtype == case.dtype
    assert loss.shape == expected.shape

    eps, t = torch.finfo(case.dtype).eps, case.temperature
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(case.seed), dtype=torch.float64)
    terms = case.n if case.reduction == "sum" else 1
    # A logit has the size 1/T, and so many units in its last place are lost.
    assert_close(loss.detach(), expected.detach(), eps * expected.abs() + terms * 8 * EPS32 * (2 + 1 / t), "loss")

    leaves = {i: x for i, x in enumerate([*inputs, temperature]) if isinstance(x, Tensor) and x.requires_grad}
    if case.same:
        leaves.pop(1, None)
    assert loss.requires_grad == bool(leaves)
    if not leaves:
        return
    weight = weight.to(case.dtype).double()
    ours = torch.autograd.grad((loss * weight.to(loss.dtype)).sum(), list(leaves.values()))
    doubles: list[Any] = [*double, exact_temperature]
    theirs = torch.autograd.grad((expected * weight).sum(), [doubles[i] for i in leaves])
    # Each row's weight in the sum; a bfloat16 product rounds the probabilities as well.
    w = weight.abs().expand(case.n) / (case.n if case.reduction == "mean" else 1)
    relative = 4 * eps + 64 * EPS32 * (1 + 1 / t)
    for i, x, g in zip(leaves, ours, theirs, strict=True):
        tensor = leaves[i]
        assert x.dtype == tensor.dtype
        assert x.shape == tensor.shape
        floor = torch.finfo(x.dtype).smallest_normal * torch.finfo(x.dtype).eps
        if i == 3:
            scale = (relative * w.sum() / t**2).reshape(())
        elif i == 2:
            row_weights = w[:, None, None] if case.mode == "paired" else w.sum()
            scale = relative * row_weights / t * inverse_norms(tensor)
        else:
            in_batch = w.sum() if case.mode is None or case.same else w[:, None]
            scale = relative * in_batch / t * inverse_norms(tensor)
        assert_close(x, g, 4 * torch.finfo(x.dtype).eps * g.abs() + 2 * scale + floor, f"gradient {i} of {case}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_is_the_package_in_float64(dtype: torch.dtype) -> None:
    """Over 2,000 cases in all; the smallest failing one is reported."""
    settings_ = settings(deadline=None, max_examples=700, suppress_health_check=list(HealthCheck))
    settings_(given(case=cases(dtype))(check))()


SHAPES = st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple)


@settings(deadline=None, max_examples=300)
@given(
    query=SHAPES, positive=SHAPES, negatives=st.none() | SHAPES, mode=st.sampled_from(["unpaired", "paired"]),
    temperature=st.sampled_from([(), (1,), (2,), (1, 1), (2, 1), (1, 2), (1, 3), (1, 1, 1)]),
)  # fmt: skip
def test_refuses_what_the_package_refuses(
    query: tuple[int, ...], positive: tuple[int, ...], negatives: tuple[int, ...] | None, mode: str,
    temperature: tuple[int, ...],
) -> None:  # fmt: skip
    tensors = [torch.ones(s) if s is not None else None for s in (query, positive, negatives)]
    arguments = {"temperature": torch.full(temperature, 0.5), "negative_mode": mode}
    try:
        expected = package.info_nce(*tensors, **arguments)
    except (ValueError, RuntimeError, IndexError):
        with pytest.raises(ValueError, match=r"<|temperature"):
            info_nce(*tensors, **arguments)  # type: ignore[arg-type]
        return
    columns = query[0] if negatives is None else 1 + negatives[-2]
    if torch.broadcast_shapes(temperature, (query[0], columns)) != (query[0], columns):
        # The package goes on with more logits than there are keys.
        with pytest.raises(ValueError, match="cannot be broadcast"):
            info_nce(*tensors, **arguments)  # type: ignore[arg-type]
    else:
        assert torch.allclose(info_nce(*tensors, **arguments), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("rows", [1, 6, 300])
def test_valid_rows(dtype: torch.dtype, normalized: bool, rows: int, generator: torch.Generator) -> None:
    query, positive = (torch.randn(5, 8, generator=generator).to(dtype).requires_grad_() for _ in "qk")
    queue = torch.nn.functional.normalize(torch.randn(rows, 8, generator=generator)).to(dtype)
    step = max(1, rows // 6)
    for first in range(-rows - 1, 2 * rows, step):
        for count in [*range(0, rows, step), rows]:
            kept = queue[[(first + i) % rows for i in range(count)]]
            results = []
            for negatives, valid in (
                (queue, (first, count)),
                (queue, (torch.tensor(first), torch.tensor(count))),
                (queue, (torch.tensor([first], dtype=torch.int32), count)),
                (kept, None),
            ):
                loss = info_nce(query, positive, negatives, 0.2, negatives_normalized=normalized, valid=valid)
                results.append(torch.stack([loss.expand(5, 8), *torch.autograd.grad(loss, (query, positive))]))
            for other in results[1:]:
                # Not bit for bit: where the ring wraps, a tile ends.
                assert torch.allclose(results[0], other, atol=2 * torch.finfo(dtype).eps)


def test_rows_that_are_not_valid_get_no_gradient(generator: torch.Generator) -> None:
    query, queue = torch.randn(3, 8, generator=generator), torch.randn(6, 8, generator=generator).requires_grad_()
    [gradient] = torch.autograd.grad(info_nce(query, query, queue, valid=(4, 3)), queue)
    assert (gradient[[1, 2, 3]] == 0).all()
    assert (gradient[[4, 5, 0]] != 0).any(dim=1).all()


@pytest.mark.parametrize("mode", ["unpaired", "paired", None])
def test_same_bits_twice_and_on_one_thread(mode: str | None, generator: torch.Generator) -> None:
    query, positive = (torch.randn(300, 48, generator=generator, requires_grad=True) for _ in "qk")
    negatives = None
    if mode:
        shape = (5000, 48) if mode == "unpaired" else (300, 40, 48)
        negatives = torch.randn(shape, generator=generator, requires_grad=True)
    leaves = [x for x in (query, positive, negatives) if x is not None]

    def run() -> list[Tensor]:
        loss = info_nce(query, positive, negatives, 0.07, negative_mode=mode or "unpaired")
        return [loss, *torch.autograd.grad(loss, leaves)]

    first, second = run(), run()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        third = run()
    finally:
        torch.set_num_threads(threads)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_a_tiny_loss_keeps_its_digits() -> None:
    """At T = .03 and a positive that is the query, the loss is e⁻³³ and its gradient as small."""
    query = torch.eye(4, requires_grad=True)
    queue = torch.eye(4)[[1, 2, 3, 0]]
    loss = info_nce(query[:1], torch.eye(4)[:1], queue[:3], 0.03)
    with use_backend("reference"):
        double = torch.eye(4, dtype=torch.float64, requires_grad=True)
        expected = info_nce(double[:1], torch.eye(4).double()[:1], queue[:3].double(), 0.03)
    assert 0 < float(expected) < 1e-13
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)
    [gradient] = torch.autograd.grad(loss, query)
    [theirs] = torch.autograd.grad(expected, double)
    assert torch.allclose(gradient.double(), theirs, rtol=1e-4, atol=0)


def test_nan_and_infinity_are_not_hidden() -> None:
    good = torch.randn(3, 8)
    for bad in (torch.nan, torch.inf):
        broken = good.clone()
        broken[1, 2] = bad
        for query, positive, queue in ((broken, good, good), (good, broken, good), (good, good, broken)):
            assert info_nce(query, positive, queue, reduction="none")[1].isnan()


def test_a_long_queue_matches(generator: torch.Generator) -> None:
    """The MoCo shape, split over many tiles and work items, against eager float64."""
    query, positive = (torch.randn(96, 128, generator=generator, requires_grad=True) for _ in "qk")
    queue = torch.nn.functional.normalize(torch.randn(20000, 128, generator=generator))
    exact_q, exact_k = (x.detach().double().requires_grad_() for x in (query, positive))
    expected = info_nce(exact_q, exact_k, queue.double(), 0.07)
    theirs = torch.autograd.grad(expected, (exact_q, exact_k))
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        q, k = (x.detach().to(dtype).requires_grad_() for x in (query, positive))
        loss = info_nce(q, k, queue.to(dtype), 0.07, negatives_normalized=True)
        assert float(loss) == pytest.approx(float(expected), rel=tolerance)
        for g, t in zip(torch.autograd.grad(loss, (q, k)), theirs, strict=True):
            assert (g.double() - t).abs().max() <= tolerance * t.abs().max()
