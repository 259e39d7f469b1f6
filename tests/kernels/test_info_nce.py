"""The InfoNCE kernels against the reference in float64: loss and every gradient, within the dtype's rounding."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from fastssl.kernels import info_nce
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastssl.ops import reference
from tests.kernels import fences

# The interpreter computes with numpy, which tells of every square that overflows in huge rows.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Half the distance of neighbouring numbers around 1: what p loses before it is multiplied with keys.
ROUNDING = {BF16: 2.0**-8, FP16: 2.0**-11, FP32: 2.0**-24}
# On a GPU float32 products are tf32 if torch allows it; these tests leave its default, which does not.
FLOAT = 4e-6
ORACLE = 1e-15  # float64 subtracts probabilities from 1
TINY = 1e-37  # below, numbers may be flushed to 0, before they are divided by T
SCALES = {FP32: (0.0, 1e30, 1e-30, 1e-13, 1e6), BF16: (0.0, 1e30, 1e-30, 1e-13, 1e6), FP16: (0.0, 1e4, 1e-4)}


@dataclass(frozen=True)
class Case:
    """One call of forward, and of negatives if there are gradients."""

    mode: str  # unpaired, paired, in-batch
    n: int
    m: int
    dim: int
    dtype: torch.dtype = FP32
    key_dtype: torch.dtype = FP32
    normalized: bool = False
    temperature: float = 0.1
    tensor_dtype: torch.dtype | None = None  # of the temperature, None for a number
    valid: tuple[int, int] | None = None
    index_dtype: torch.dtype = torch.int64
    gradients: bool = True
    layout: str = "dense"
    odd_rows: bool = False  # zero, huge and tiny ones among the rest
    seed: int = 0


@st.composite
def cases(draw: st.DrawFn, mode: str, most_rows: int, most_columns: int, most_dims: int) -> Case:
    n = draw(st.integers(1, most_rows))
    m = n if mode == "in-batch" else draw(st.integers(0, most_columns))
    dtype = draw(st.sampled_from((FP32, BF16, FP16)))
    key_dtype = draw(st.sampled_from((FP32, BF16, FP16))) if dtype == FP32 and mode != "in-batch" else dtype
    valid = None
    if mode == "unpaired" and draw(st.booleans()):
        valid = (draw(st.integers(-2 * m - 3, 2 * m + 3)), draw(st.integers(0, m)))
    return Case(
        mode,
        n,
        m,
        draw(st.integers(1, most_dims)),
        dtype,
        key_dtype,
        mode != "in-batch" and draw(st.booleans()),
        draw(st.sampled_from((0.01, 0.07, 0.2, 1.0, 10.0))),
        draw(st.sampled_from((None, FP32, torch.float64, FP16, BF16))),
        valid,
        draw(st.sampled_from((torch.int64, torch.int32))),
        draw(st.integers(0, 4)) > 0,
        draw(st.sampled_from(tuple(fences.LAYOUTS))),
        draw(st.booleans()),
        draw(st.integers(0, 2**31)),
    )


def rows(case: Case, generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    """Random rows, half of them pointing the same way so that similarities are not all near 0."""
    x = torch.randn(*shape, generator=generator)
    x += (torch.rand(*shape[:-1], 1, generator=generator) < 0.5) * 2
    if case.odd_rows:
        scales = torch.tensor(SCALES[dtype])
        pick = torch.randint(3 * len(scales), (*shape[:-1], 1), generator=generator)
        x = F.normalize(x, dim=-1) * torch.where(pick < len(scales), scales[pick % len(scales)], 1.0)
    return x.to(dtype)


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Query, positive key, negatives and the incoming gradient."""
    generator = torch.Generator().manual_seed(case.seed)
    query = rows(case, generator, case.dtype, case.n, case.dim)
    positive = rows(case, generator, case.dtype, case.n, case.dim)
    negatives = None
    if case.mode != "in-batch":
        shape = (case.m, case.dim) if case.mode == "unpaired" else (case.n, case.m, case.dim)
        negatives = rows(case, generator, case.key_dtype, *shape)
        if case.normalized:
            negatives = F.normalize(negatives.double(), dim=-1).to(case.key_dtype)
    return query, positive, negatives, torch.randn(case.n, generator=generator)


def on_device(case: Case) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """`inputs`, where the kernels run."""
    query, positive, negatives, grad = (x if x is None else x.to(fences.DEVICE) for x in inputs(case))
    assert query is not None and positive is not None and grad is not None
    return query, positive, negatives, grad


@dataclass
class Result:
    """Losses, and the gradients of Σ grad·loss (the temperature's per row)."""

    loss: Tensor
    query: Tensor | None = None
    positive: Tensor | None = None
    negatives: Tensor | None = None
    temperature: Tensor | None = None


def temperature_of(case: Case) -> Tensor:
    """As the kernel gets to see it."""
    return torch.tensor(case.temperature, dtype=case.tensor_dtype or FP32)


def kernels(case: Case) -> Result:
    layout = fences.LAYOUTS[case.layout]
    query, positive, negatives, grad = inputs(case)
    query, positive = layout(query), layout(positive)
    negatives = None if negatives is None else layout(negatives)
    number, tensor = case.temperature, None
    if case.tensor_dtype is not None:
        number, tensor = 123.0, fences.dense(temperature_of(case).view(1)).view(())
    ring: tuple[Tensor | None, Tensor | None] = (None, None)
    if case.valid is not None:
        first, count = (fences.dense(torch.tensor([v], dtype=case.index_dtype)).view(()) for v in case.valid)
        ring = (first, count)
    loss, lse, dq, dk, dt = info_nce.forward(
        query, positive, negatives, number, tensor, *ring, case.normalized, case.gradients
    )
    assert loss.shape == lse.shape == (case.n,)
    assert loss.dtype == lse.dtype == dq.dtype == dk.dtype == dt.dtype == FP32
    if not case.gradients:
        assert dq.shape == dk.shape == dt.shape == (0,)
        return Result(loss.cpu())
    in_batch = negatives is None
    dn = info_nce.negatives(
        fences.dense(grad),
        lse,
        query,
        positive if negatives is None else negatives,
        number,
        tensor,
        *ring,
        case.normalized,
        in_batch,
    )
    assert dn.dtype == (FP32 if in_batch else case.key_dtype)
    dq, dk, dt, dn = (x.cpu().double() for x in (dq, dk, dt, dn))
    dk = dk * grad[:, None] + (dn if in_batch else 0)
    return Result(loss.cpu(), dq * grad[:, None], dk, None if in_batch else dn, dt * grad)


def oracle(case: Case) -> Result:
    query, positive, negatives, grad = inputs(case)
    leaves = [x if x is None else x.double().requires_grad_() for x in (query, positive, negatives)]
    t = temperature_of(case).double().expand(case.n, 1).clone().requires_grad_()  # one a row, for gradients per row
    mode = "paired" if case.mode == "paired" else "unpaired"
    q, k, keys = leaves
    assert q is not None and k is not None
    loss = reference.info_nce(q, k, keys, t, "none", mode, case.normalized, case.valid)
    (loss * grad).sum().backward()
    return Result(loss.detach(), q.grad, k.grad, None if keys is None else keys.grad, t.grad[:, 0])  # type: ignore[index]


def allowances(case: Case, loss: Tensor) -> Result:
    """How far each result may be off: rounding of float32 times 1/T in exponents, of half in p; the rest is scale."""
    query, positive, negatives, grad = (x if x is None else x.double() for x in inputs(case))
    assert query is not None and positive is not None and grad is not None
    t = float(temperature_of(case))
    error = FLOAT * (1 + 1 / t)
    steps = error + 2 * max(ROUNDING[case.dtype], ROUNDING[case.key_dtype])
    p_negative = -torch.expm1(-loss)
    size = steps * grad.abs() * p_negative / t + ORACLE * grad.abs() / t + TINY / t  # for every row, up to the norms
    norms = [x.norm(dim=-1).clamp(min=1e-12) for x in (query, positive)]
    allowed = Result(
        error * p_negative + 3e-7 * loss + ORACLE,
        (size / norms[0])[:, None] + TINY,
        (size / norms[1])[:, None] + TINY,
        None,
        size / t,
    )
    # Each query adds its p to the gradient of each key.
    q = F.normalize(query, dim=-1)
    keys = positive if negatives is None else negatives
    key_norms = torch.ones(keys.shape[:-1]) if case.normalized else keys.norm(dim=-1).clamp(min=1e-12)
    unit = keys / key_norms[..., None]
    similarity = torch.einsum("nd,nmd->nm", q, unit) if case.mode == "paired" else q @ unit.T
    lse = loss + (q * F.normalize(positive, dim=-1)).sum(1) / t
    weights = torch.exp(similarity / t - lse[:, None]).clamp(max=1) * grad.abs()[:, None] / t  # N×M
    if case.mode != "paired":
        weights = weights.sum(0)
    bound = ((steps * weights + TINY / t) / key_norms)[..., None] + TINY
    if case.mode == "in-batch":
        assert allowed.positive is not None
        allowed.positive = allowed.positive + bound
    else:
        allowed.negatives = bound
    return allowed


def compare(case: Case) -> Result:
    actual, expected = kernels(case), oracle(case)
    allowed = allowances(case, expected.loss)
    for name in ("loss", "query", "positive", "negatives", "temperature"):
        got, right, within = (getattr(x, name) for x in (actual, expected, allowed))
        if got is None:
            continue
        assert got.shape == right.shape, name
        if name == "negatives" and case.key_dtype != FP32:  # rounded to half in the end, and may leave its range
            largest = torch.finfo(case.key_dtype).max
            within = within + 2 * ROUNDING[case.key_dtype] * right.abs() + torch.finfo(case.key_dtype).smallest_normal
            got, right = got.clamp(-largest, largest), right.clamp(-largest, largest)
        off = ((got.double() - right).abs() - within).nan_to_num(nan=float("inf"))
        assert (off <= 0).all(), f"{name}: {off.max():.3g} beyond what is allowed, at {case}"
    fences.check()
    return actual


def examples(count: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],  # a failing case is small already, and shrinking takes minutes here
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


@examples(130)
@given(cases("unpaired", 20, 70, 20))
def test_unpaired(case: Case) -> None:
    compare(case)


@examples(40)
@given(cases("unpaired", 18, 40, 100))
def test_unpaired_wide_rows(case: Case) -> None:
    compare(case)


@examples(60)
@given(cases("in-batch", 36, 0, 33))
def test_in_batch(case: Case) -> None:
    compare(case)


@examples(80)
@given(cases("paired", 6, 60, 30))
def test_paired(case: Case) -> None:
    compare(case)


@pytest.mark.parametrize("mode", ["unpaired", "paired", "in-batch"])
def test_same_bits_twice(mode: str) -> None:
    n, m = {"unpaired": (20, 70), "paired": (3, 40), "in-batch": (20, 20)}[mode]
    case = Case(mode, n, m, 20, BF16, BF16)
    first, second = kernels(case), kernels(case)
    for name in ("loss", "query", "positive", "negatives", "temperature"):
        one, other = getattr(first, name), getattr(second, name)
        assert one is other is None or torch.equal(one, other), name


@pytest.mark.parametrize("mode", ["unpaired", "paired", "in-batch"])
@pytest.mark.parametrize("dim", [29, 128])
def test_rows_whose_norms_are_one_but_for_rounding(mode: str, dim: int) -> None:
    """As users pass them. A compiler that sums such a row twice, in two orders, gets norms on both sides of 1."""
    n, m = {"unpaired": (40, 70), "paired": (6, 40), "in-batch": (60, 60)}[mode]
    for seed in range(3 if fences.DEVICE == "cuda" else 1):
        compare(Case(mode, n, m, dim, seed=seed, normalized=mode != "in-batch", odd_rows=True))


def test_every_valid_range() -> None:
    case = Case("unpaired", 2, 21, 3)
    for first in (0, 1, 16, 20, 21, -1, 1000):
        for count in (0, 1, 15, 16, 17, 20, 21):
            compare(replace(case, valid=(first, count)))


def test_invalid_rows_may_hold_anything_and_get_no_gradient() -> None:
    query, positive, negatives, grad = inputs(Case("unpaired", 3, 40, 5))
    assert negatives is not None
    negatives[:10] = torch.nan
    negatives[30:] = torch.inf
    query, positive, negatives, grad = (fences.dense(x) for x in (query, positive, negatives, grad))
    first, count = (torch.tensor(v, device=fences.DEVICE) for v in (10, 20))
    loss, lse, *_ = info_nce.forward(query, positive, negatives, 0.1, None, first, count, False, True)
    gradient = info_nce.negatives(grad, lse, query, negatives, 0.1, None, first, count, False, False)
    whole = info_nce.forward(query, positive, negatives[10:30], 0.1, None, None, None, False, True)
    torch.testing.assert_close(loss, whole[0])
    assert (gradient[:10] == 0).all() and (gradient[30:] == 0).all() and (gradient[10:30] != 0).any()


@pytest.mark.parametrize("negatives_shape", [None, (7, 4), (0, 7, 4)])
def test_no_queries(negatives_shape: tuple[int, ...] | None) -> None:
    query = torch.empty(0, 4, device=fences.DEVICE)
    keys = None if negatives_shape is None else torch.ones(negatives_shape, device=fences.DEVICE)
    loss, lse, dq, dk, dt = info_nce.forward(query, query, keys, 0.1, None, None, None, False, True)
    assert (loss.shape, dq.shape, dk.shape, dt.shape) == ((0,), (0, 4), (0, 4), (0,))
    keys = query if keys is None else keys
    gradient = info_nce.negatives(loss, lse, query, keys, 0.1, None, None, None, False, negatives_shape is None)
    assert gradient.shape == keys.shape and (gradient == 0).all()


@pytest.mark.parametrize("mode", ["unpaired", "paired", "in-batch"])
def test_no_negatives(mode: str) -> None:
    case = Case(mode, 1, 1 if mode == "in-batch" else 0, 5)
    result = compare(case)
    assert result.loss.item() == 0
    for gradient in (result.query, result.positive, result.temperature):
        assert gradient is not None and (gradient == 0).all()


def test_a_tiny_loss_keeps_its_digits() -> None:
    query = fences.dense(torch.tensor([[1.0, 0.0]]))
    negatives = fences.dense(torch.tensor([[0.0, 1.0], [0.0, -2.0]]))
    for t in (0.2, 0.1, 0.05, 0.03):
        loss, *_ = info_nce.forward(query, query, negatives, t, None, None, None, False, True)
        right = torch.log1p(2 * torch.exp(-torch.tensor(1 / t, dtype=torch.float64)))
        assert abs(loss.item() / right.item() - 1) < 1e-5


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("mode", ["unpaired", "paired", "in-batch"])
def test_nan_and_infinity_are_not_hidden(mode: str, gradients: bool, bad: float) -> None:
    query, positive, negatives, _ = on_device(Case(mode, 4, 4 if mode == "in-batch" else 40, 6))
    keys = positive if negatives is None else negatives
    keys[..., 2, 3] = bad
    loss, *_ = info_nce.forward(query, positive, negatives, 0.1, None, None, None, False, gradients)
    assert loss.isnan().all()


@pytest.mark.parametrize("mode", ["unpaired", "paired", "in-batch"])
def test_infinite_temperature_counts_the_keys(mode: str) -> None:
    query, positive, negatives, _ = on_device(Case(mode, 4, 4 if mode == "in-batch" else 40, 6))
    keys = 4 if mode == "in-batch" else 41
    for t in (torch.inf, -torch.inf):
        loss, *_ = info_nce.forward(query, positive, negatives, t, None, None, None, False, False)
        torch.testing.assert_close(loss, torch.full((4,), keys, device=loss.device).log())


def test_huge_paired_keys_at_a_low_temperature() -> None:
    query, positive, negatives, _ = on_device(Case("paired", 4, 10, 6))
    assert negatives is not None
    usual, huge = (
        info_nce.forward(query, positive, negatives * s, 0.01, None, None, None, False, False)[0] for s in (1, 1e37)
    )
    torch.testing.assert_close(usual, huge)


def test_expanded_negatives() -> None:
    query, positive, negatives, _ = inputs(Case("unpaired", 4, 9, 6))
    assert negatives is not None
    query, positive, negatives = (fences.dense(x) for x in (query, positive, negatives))
    unpaired = info_nce.forward(query, positive, negatives, 0.1, None, None, None, False, True)
    shared = negatives.expand(4, 9, 6)
    paired = info_nce.forward(query, positive, shared, 0.1, None, None, None, False, True)
    for one, other in zip(unpaired, paired, strict=True):
        torch.testing.assert_close(one, other)


def test_autotuning_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("unpaired", 20, 70, 20)
    usual = kernels(case)
    monkeypatch.setenv("FASTSSL_AUTOTUNE", "1")  # one candidate under the interpreter, for nothing can be timed there
    torch.testing.assert_close(compare(case).loss, usual.loss)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize(
    ("n", "m", "dim", "normalized"),
    [
        (256, 0, 128, False), (1024, 0, 128, False), (1024, 0, 64, False), (1024, 0, 256, False), (4096, 0, 128, False),
        (256, 65536, 128, True), (256, 65536, 128, False), (1024, 16384, 256, False), (32, 4096, 64, True),
    ],
)  # fmt: skip
def test_every_row_of_a_training(n: int, m: int, dim: int, normalized: bool, dtype: torch.dtype) -> None:
    """Loops of many tiles, as small tests do not have: each row by itself, for a race spoils some of them only."""
    draw = torch.Generator().manual_seed(0)
    query, key = (torch.randn(n, dim, generator=draw).cuda().to(dtype) for _ in "qk")
    negatives = None
    if m:
        negatives = torch.randn(m, dim, generator=draw)
        negatives = (F.normalize(negatives) if normalized else negatives).cuda().to(dtype)
    q, k = query.double().requires_grad_(), key.double().requires_grad_()
    keys = None if negatives is None else negatives.double().requires_grad_()
    expected = reference.info_nce(q, k, keys, 0.07, "none", "unpaired", normalized, None)
    expected.sum().backward()
    for _ in range(3):
        loss, lse, dquery, dpositive, _ = info_nce.forward(
            query, key, negatives, 0.07, None, None, None, normalized, True
        )
        others = info_nce.negatives(
            torch.ones_like(loss), lse, query, key if negatives is None else negatives, 0.07, None, None, None,
            normalized, negatives is None,
        )  # fmt: skip
        if negatives is None:
            others += dpositive
        assert (loss - expected).abs().max() < 1e-5
        for name, got, right in (("query", dquery, q.grad), ("keys", others, k.grad if keys is None else keys.grad)):
            assert right is not None
            off = (got.double() - right).norm(dim=1) / right.norm(dim=1)
            assert off.max() < 4 * ROUNDING[dtype] + 1e-5, (name, off.max())
