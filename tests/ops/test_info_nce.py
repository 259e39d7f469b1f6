"""`info_nce` against a hand-written formula and against the package it stands in for."""

import math
from fractions import Fraction

import info_nce as package
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastssl.ops import InfoNCE, info_nce, normalized_mse


def formula(query: Tensor, positive: Tensor, negatives: Tensor, temperature: float) -> list[float]:
    """The loss of every row in plain Python."""

    def cosine(a: Tensor, b: Tensor) -> float:
        dot = sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))
        return dot / (math.hypot(*a.tolist()) * math.hypot(*b.tolist()))

    losses = []
    for i, (q, p) in enumerate(zip(query, positive, strict=True)):
        rows = negatives[i] if negatives.dim() == 3 else negatives
        terms = [math.exp(cosine(q, k) / temperature) for k in (p, *rows)]
        losses.append(-math.log(terms[0] / sum(terms)))
    return losses


@pytest.mark.parametrize("mode", ["unpaired", "paired"])
def test_matches_formula(mode: str, generator: torch.Generator) -> None:
    query, positive = (torch.randn(4, 5, generator=generator, dtype=torch.float64) for _ in "qp")
    shape = (7, 5) if mode == "unpaired" else (4, 7, 5)
    negatives = torch.randn(shape, generator=generator, dtype=torch.float64)
    loss = info_nce(query, positive, negatives, 0.3, "none", mode)
    assert torch.allclose(loss, torch.tensor(formula(query, positive, negatives, 0.3), dtype=torch.float64), atol=1e-12)


@settings(deadline=None, max_examples=100)
@given(
    n=st.integers(1, 6), m=st.integers(1, 9), d=st.integers(1, 8), seed=st.integers(0, 999),
    negatives=st.sampled_from(["unpaired", "paired", None]), reduction=st.sampled_from(["mean", "sum", "none"]),
    temperature=st.floats(0.01, 10), as_tensor=st.booleans(),
)  # fmt: skip
def test_is_a_drop_in_for_the_package(
    n: int, m: int, d: int, seed: int, negatives: str | None, reduction: str, temperature: float, as_tensor: bool
) -> None:
    draw = torch.Generator().manual_seed(seed)
    shapes = [(n, d), (n, d), {"unpaired": (m, d), "paired": (n, m, d), None: ()}[negatives]]
    inputs = [torch.randn(s, generator=draw, dtype=torch.float64).requires_grad_() for s in shapes if s]
    if as_tensor:
        inputs.append(torch.tensor(temperature, dtype=torch.float64, requires_grad=True))

    def run(function: object) -> tuple[Tensor, ...]:
        tensors = list(inputs)
        t = tensors.pop() if as_tensor else temperature
        mode = {"negative_mode": negatives} if negatives else {}
        loss = function(*tensors, temperature=t, reduction=reduction, **mode)  # type: ignore[operator]
        return (loss, *torch.autograd.grad(loss.sum(), inputs, allow_unused=True, materialize_grads=True))

    for ours, theirs in zip(run(info_nce), run(package.info_nce), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("first", range(-2, 8))
@pytest.mark.parametrize("count", range(7))
def test_valid_rows_are_the_only_negatives(first: int, count: int, generator: torch.Generator) -> None:
    query, positive, queue = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (3, 3, 6))
    rows = [(first + i) % 6 for i in range(count)]
    expected = info_nce(query, positive, queue[rows])
    assert torch.allclose(info_nce(query, positive, queue, valid=(first, count)), expected)
    tensors = (torch.tensor(first), torch.tensor(count))
    assert torch.allclose(info_nce(query, positive, queue, valid=tensors), expected)


def test_no_valid_negative_is_no_loss_and_no_gradient() -> None:
    query, positive = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    for negatives, valid in ((torch.randn(6, 4), (2, 0)), (torch.randn(0, 4), None)):
        loss = info_nce(query, positive, negatives, valid=valid)
        gradients = torch.autograd.grad(loss, (query, positive))
        assert loss == 0
        assert all((g == 0).all() for g in gradients)


def test_gradcheck() -> None:
    query, positive, queue = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (2, 2, 4))
    temperature = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def loss(q: Tensor, k: Tensor, negatives: Tensor, t: Tensor) -> Tensor:
        return info_nce(q, k, negatives, t, "none", valid=(3, 2))

    assert torch.autograd.gradcheck(loss, (query, positive, queue, temperature))


def test_a_float32_query_takes_a_half_queue() -> None:
    query, positive, queue = torch.randn(3, 4), torch.randn(3, 4), torch.nn.functional.normalize(torch.randn(6, 4))
    for dtype in (torch.bfloat16, torch.float16):
        loss = info_nce(query, positive, queue.to(dtype), negatives_normalized=True)
        assert loss.dtype == torch.float32
        assert torch.allclose(loss, info_nce(query, positive, queue), atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_and_half_inputs_lose_nothing_inside(dtype: torch.dtype, generator: torch.Generator) -> None:
    """At T = .01 a query rounded to half after normalising would be off by .1."""
    query, positive, queue = (torch.randn(n, 64, generator=generator).to(dtype) for n in (8, 8, 500))
    for negatives in (queue, None):
        with torch.autocast("cpu", torch.bfloat16):
            loss = info_nce(query, positive, negatives, 0.01, "none")
        exact = None if negatives is None else negatives.double()
        expected = info_nce(query.double(), positive.double(), exact, 0.01, "none")
        assert loss.dtype == torch.float32
        assert torch.allclose(loss.double(), expected, rtol=1e-5, atol=1e-4)


def test_zero_rows_are_finite_in_half(generator: torch.Generator) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        query = torch.zeros(2, 4, dtype=dtype, requires_grad=True)
        rows = torch.randn(3, 4, generator=generator).to(dtype)
        for loss in (info_nce(query, rows[:2], rows), normalized_mse(query, rows[:2]).sum()):
            assert loss.isfinite()
            [gradient] = torch.autograd.grad(loss, query)  # of the size of 1 / eps, too large for float16
            assert dtype == torch.float16 or gradient.isfinite().all()
            assert not gradient.isnan().any()


def test_normalized_negatives_are_taken_as_they_are() -> None:
    query, positive, queue = torch.randn(3, 4), torch.randn(3, 4), torch.randn(6, 4)
    unit = torch.nn.functional.normalize(queue)
    assert torch.allclose(info_nce(query, positive, unit, negatives_normalized=True), info_nce(query, positive, queue))
    assert not torch.allclose(
        info_nce(query, positive, queue, negatives_normalized=True), info_nce(query, positive, queue)
    )


X = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("arguments", "keywords", "named"),
    [
        ((X[0], X), {}, "<query>"),
        ((X, X[0]), {}, "<positive_key>"),
        ((X, X[:2]), {}, "2"),
        ((X, X[:, :3]), {}, "3 components|components"),
        ((X, X, X[None]), {}, "<negative_keys>"),
        ((X, X, X), {"negative_mode": "paired"}, "3 dimensions"),
        ((X, X, X[None]), {"negative_mode": "paired"}, "1 rows"),
        ((X, X, X[:, :2]), {}, "2"),
        ((X, X), {"reduction": "avg"}, "'avg'"),
        ((X, X), {"negative_mode": "both"}, "'both'"),
        ((X, X), {"temperature": 0}, "0"),
        ((X, X.double()), {}, "float64"),
        ((X, X, X.double()), {}, "float64"),
        ((X, X), {"valid": (0, 1)}, "unpaired"),
        ((X, X, X), {"valid": (0, 4)}, "0…3"),
        ((X, X, X), {"valid": (0, -1)}, "-1"),
        ((X, X, X), {"valid": (0, 2.5)}, "2.5"),
        ((X, X, X), {"valid": 5}, "5"),
        ((X, X, X), {"valid": (True, 2)}, "True"),
        ((X, X, X), {"valid": (torch.tensor(0.5), 2)}, "integer tensors"),
        ((X, X, X), {"valid": (torch.tensor([0, 1]), 2)}, "1 element"),
        ((X, X), {"temperature": 1e-46}, "1e-46"),
        ((X, X), {"temperature": torch.tensor(1j)}, "complex"),
        ((X, X), {"temperature": torch.ones(2, 2, 2)}, "broadcast"),
        ((X, X), {"temperature": "warm"}, "'warm'"),
        ((X.long(), X.long()), {}, "floating"),
    ],
)
def test_wrong_inputs_are_named(arguments: tuple[Tensor, ...], keywords: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        info_nce(*arguments, **keywords)  # type: ignore[arg-type]


def test_module_is_the_function() -> None:
    query, key, queue = torch.randn(3, 4), torch.randn(3, 4), torch.randn(5, 4)
    module = InfoNCE(temperature=0.2, reduction="sum")
    assert torch.equal(module(query, key, queue), info_nce(query, key, queue, 0.2, "sum"))


def test_any_kind_of_number_will_do(generator: torch.Generator) -> None:
    query, queue = torch.randn(3, 4, generator=generator), torch.randn(6, 4, generator=generator)
    expected = info_nce(query, query, queue, 0.5, valid=(2**70 % 6, 5))
    for temperature, first, count in ((np.float32(0.5), 2**70, np.int64(5)), (Fraction(1, 2), 2**70 - 6, 5)):
        loss = info_nce(query, query, queue, temperature, valid=(first, count))  # type: ignore[arg-type]
        assert torch.equal(loss, expected)


def test_keys_may_be_as_large_as_bfloat16_goes(generator: torch.Generator) -> None:
    query, queue = (torch.randn(n, 64, generator=generator).clamp(-3, 3) for n in (8, 50))
    loss = info_nce(query.bfloat16(), query.bfloat16(), (queue * 1e37).bfloat16())
    assert torch.allclose(loss.float(), info_nce(query, query, queue), rtol=0.02)
