"""The fused ops as torch sees them: schemas, fake tensors, autograd, compilation, and what they refuse."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from fastssl import _extension
from fastssl.ops import backend as backends
from fastssl.ops import info_nce, normalized_mse, use_backend
from fastssl.ops.library import call

Inputs = dict[str, Any]  # tensors, or None for in-batch negatives
CUDA = torch.cuda.is_available()
# The native kernels are for CPUs; Triton's run where there is CUDA, or on the CPU through its interpreter.
DEVICE = {"native": "cpu", "triton": "cuda" if CUDA else "cpu"}


@pytest.fixture(params=DEVICE, autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test runs on each fused backend, its inputs on that backend's device."""
    if request.param == "native" and (why := _extension.missing()):
        pytest.skip(why)
    torch.compiler.reset()
    with use_backend(request.param), torch.device(DEVICE[request.param]):
        yield request.param


@contextmanager
def free_choice() -> Iterator[None]:
    """Inside, no backend is asked for."""
    with mock.patch.object(backends, "_forced", None):
        yield


def op(name: str, backend: str) -> Any:
    return getattr(torch.ops.fastssl, f"{name}_{backend}").default


def inputs(mode: str | None, *, n: int = 6, m: int = 9, d: int = 5, requires_grad: bool = True) -> Inputs:
    draw = torch.Generator(torch.get_default_device()).manual_seed(0)
    shapes: dict[str, tuple[int, ...] | None] = {
        "query": (n, d),
        "positive_key": (n, d),
        "negative_keys": {"unpaired": (m, d), "paired": (n, m, d), None: None}[mode],
    }
    return {
        name: None if shape is None else torch.randn(shape, generator=draw).requires_grad_(requires_grad)
        for name, shape in shapes.items()
    }


MODES = ("unpaired", "paired", None)


def loss_of(tensors: Inputs, mode: str | None, temperature: float = 0.1) -> Tensor:
    return info_nce(**tensors, temperature=temperature, negative_mode=mode or "unpaired")


def gradients(loss: Tensor, tensors: Inputs) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [t for t in tensors.values() if t is not None], retain_graph=True))


@pytest.mark.parametrize("mode", MODES)
def test_opcheck(mode: str | None, backend: str) -> None:
    tensors = inputs(mode)
    ring = (torch.tensor(7), torch.tensor(4)) if mode == "unpaired" else (None, None)
    temperature = torch.tensor(0.3, requires_grad=True)
    arguments = (*tensors.values(), 0.0, temperature, *ring, False, True)
    torch.library.opcheck(op("info_nce", backend), arguments)
    frozen = {name: t if t is None else t.detach() for name, t in tensors.items()}
    torch.library.opcheck(op("info_nce", backend), (*frozen.values(), 0.3, None, *ring, True, False))
    lse = call("info_nce", backend, *frozen.values(), 0.3, None, *ring, False, False)[1]
    negatives = frozen["positive_key" if mode is None else "negative_keys"]
    torch.library.opcheck(
        op("info_nce_negatives", backend),
        (torch.ones(6), lse, frozen["query"], negatives, 0.3, None, *ring, False, mode is None),
    )


def test_opcheck_normalized_mse(backend: str) -> None:
    prediction, target = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5)
    for gradients_wanted in (True, False):
        p = prediction if gradients_wanted else prediction.detach()
        torch.library.opcheck(op("normalized_mse", backend), (p, target, gradients_wanted))


def test_without_gradients_nothing_is_computed_for_them(backend: str) -> None:
    tensors = inputs("unpaired", requires_grad=False)
    outputs = call("info_nce", backend, *tensors.values(), 0.3, None, None, None, False, False)
    assert [tuple(x.shape) for x in outputs] == [(6,), (6,), (0,), (0,), (0,)]
    loss, gradient = call("normalized_mse", backend, tensors["query"], tensors["positive_key"], False)
    assert (tuple(loss.shape), tuple(gradient.shape)) == ((6,), (0,))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("mode", MODES)
def test_no_grad_and_inference_mode(mode: str | None, context: Callable[[], Any]) -> None:
    expected = loss_of(inputs(mode), mode)
    with context():
        tensors = inputs(mode, n=6, m=9)
        loss = loss_of(tensors, mode)
        assert not loss.requires_grad
    assert torch.equal(loss, expected.detach())


@pytest.mark.parametrize("mode", MODES)
def test_backward_twice_and_checkpointing(mode: str | None) -> None:
    tensors = inputs(mode)
    loss = loss_of(tensors, mode, temperature=0.2)
    first = gradients(loss, tensors)
    for again, expected in zip(gradients(loss, tensors), first, strict=True):
        assert torch.equal(again, expected)
    for reentrant in (True, False):
        leaves = [t for t in tensors.values() if t is not None]
        for leaf in leaves:
            leaf.grad = None
        names = [name for name, t in tensors.items() if t is not None]

        def loss_of_leaves(*values: Tensor, names: list[str] = names) -> Tensor:
            return loss_of(dict(zip(names, values, strict=True)), mode, temperature=0.2)

        checkpointed = checkpoint(loss_of_leaves, *leaves, use_reentrant=reentrant)
        checkpointed.backward()
        for leaf, expected in zip(leaves, first, strict=True):
            assert leaf.grad is not None
            assert torch.equal(leaf.grad, expected)


def test_a_queue_may_move_on_before_backward() -> None:
    """Frozen negatives are done with when forward returns."""
    tensors = inputs("unpaired")
    queue, first = tensors["negative_keys"].detach(), torch.tensor(2)
    loss = info_nce(tensors["query"], tensors["positive_key"], queue, valid=(first, torch.tensor(5)))
    expected = torch.autograd.grad(loss, tensors["query"], retain_graph=True)[0]
    queue.zero_()
    first.add_(1)
    assert torch.equal(torch.autograd.grad(loss, tensors["query"])[0], expected)


@pytest.mark.parametrize("mode", MODES)
def test_second_derivative_is_refused(mode: str | None) -> None:
    tensors = inputs(mode)
    leaves = [t for t in tensors.values() if t is not None]
    for leaf in leaves:
        grads = torch.autograd.grad(loss_of(tensors, mode), leaf, create_graph=True)
        with pytest.raises(ValueError, match=re.escape('use_backend("reference")')):
            torch.autograd.grad(grads[0].square().sum(), leaf)
    with use_backend("reference"):
        grads = torch.autograd.grad(loss_of(tensors, mode), leaves, create_graph=True)
        torch.autograd.grad([g.square().sum() for g in grads], leaves)


def test_second_derivative_and_forward_mode_of_normalized_mse() -> None:
    prediction, target = torch.randn(6, 5, requires_grad=True), torch.randn(6, 5)
    [gradient] = torch.autograd.grad(normalized_mse(prediction, target).sum(), prediction, create_graph=True)
    with pytest.raises(ValueError, match=re.escape('use_backend("reference")')):
        torch.autograd.grad(gradient.square().sum(), prediction)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(prediction.detach(), torch.ones(6, 5))
        with pytest.raises(ValueError, match=re.escape('use_backend("reference")')):
            normalized_mse(dual, target)


@pytest.mark.parametrize("which", ["query", "positive_key", "negative_keys", "temperature"])
def test_forward_mode_is_refused(which: str) -> None:
    tensors: Any = inputs("unpaired", requires_grad=False) | {"temperature": torch.tensor(0.2)}
    with forward_ad.dual_level():
        tensors[which] = forward_ad.make_dual(tensors[which], torch.ones_like(tensors[which]))
        with pytest.raises(ValueError, match=re.escape('use_backend("reference")')):
            info_nce(**tensors)
        with use_backend("reference"):
            assert forward_ad.unpack_dual(info_nce(**tensors)).tangent is not None
    with pytest.raises(ValueError, match=re.escape('use_backend("reference")')):
        torch.func.jvp(
            lambda q: info_nce(q, tensors["positive_key"].detach()), (torch.randn(6, 5),), (torch.ones(6, 5),)
        )


def test_autocast_only_widens_the_loss() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        tensors: Inputs = {k: None if t is None else t.detach().to(dtype) for k, t in inputs("unpaired").items()}
        with torch.autocast(torch.get_default_device().type, torch.bfloat16):
            inside = loss_of(tensors, "unpaired"), normalized_mse(tensors["query"], tensors["positive_key"])
        assert inside[0].dtype == inside[1].dtype == torch.float32
        assert torch.equal(inside[0].to(dtype), loss_of(tensors, "unpaired"))


def test_autocast_takes_what_it_makes_of_a_training_loop() -> None:
    """Half queries from the networks, a float32 queue: as the package, whose products autocast casts."""
    q, k, n = inputs("unpaired", n=8, m=30, d=16).values()
    device = torch.get_default_device().type
    for dtypes in ((torch.bfloat16, torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16, torch.bfloat16)):
        query, positive, negatives = (t.detach().to(dtype) for t, dtype in zip((q, k, n), dtypes, strict=True))
        query.requires_grad_()
        with torch.autocast(device, torch.bfloat16):
            loss = info_nce(query, positive, negatives)
        exact = [t.detach().double().requires_grad_() for t in (query, positive, negatives)]
        with use_backend("reference"):
            expected = info_nce(*exact)
        assert loss.dtype == torch.float32
        assert torch.allclose(loss.double(), expected, rtol=1e-4)
        [gradient] = torch.autograd.grad(loss, query)
        assert gradient.dtype == query.dtype
        assert torch.allclose(gradient.double(), torch.autograd.grad(expected, exact[0])[0], atol=2e-2)
        with pytest.raises(ValueError, match="dtype"):
            info_nce(query, positive, negatives)


def step(mode: str | None, valid: Any) -> Callable[..., Tensor]:
    def function(query: Tensor, positive: Tensor, negatives: Tensor | None, temperature: Tensor) -> Tensor:
        loss = info_nce(query * 2, positive, negatives, temperature, negative_mode=mode or "unpaired", valid=valid)
        return loss + normalized_mse(query, positive).mean()

    return function


@pytest.mark.parametrize("mode", MODES)
def test_compiles_without_a_graph_break(mode: str | None) -> None:
    valid = (torch.tensor(3), torch.tensor(8)) if mode == "unpaired" else None
    eager = step(mode, valid)
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    for n in (6, 7, 8):  # the second size makes it dynamic
        tensors = [*inputs(mode, n=n).values(), torch.tensor(0.2, requires_grad=True)]
        leaves = [t for t in tensors if t is not None]
        results = [[loss, *torch.autograd.grad(loss, leaves)] for loss in (eager(*tensors), compiled(*tensors))]
        for a, b in zip(*results, strict=True):
            assert torch.allclose(a, b, atol=1e-6)


def test_compiled_code_obeys_use_backend() -> None:
    compiled = torch.compile(lambda q, k: info_nce(q, k), fullgraph=True, backend="aot_eager")
    query, key = torch.randn(6, 5), torch.randn(6, 5)
    graphs = torch._dynamo.utils.counters["stats"]
    compiled(query, key)
    before = graphs["unique_graphs"]
    with use_backend("reference"):
        assert torch.equal(compiled(query, key), info_nce(query, key))
    assert graphs["unique_graphs"] == before + 1


@pytest.mark.slow  # inductor compiles C++
def test_compiles_with_inductor() -> None:
    eager = step("unpaired", None)
    compiled = torch.compile(eager, fullgraph=True)
    tensors = [*inputs("unpaired").values(), torch.tensor(0.2, requires_grad=True)]
    results = [[loss, *torch.autograd.grad(loss, tensors)] for loss in (eager(*tensors), compiled(*tensors))]
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_functorch_transforms_go_to_the_reference(backend: str) -> None:
    q, k, n = (t.detach() for t in inputs("unpaired").values())
    expected = torch.autograd.grad(info_nce(q.requires_grad_(), k, n), q)[0]
    with use_backend("native"), pytest.raises(ValueError, match="functorch"):
        torch.func.grad(lambda x: info_nce(x, k, n))(q.detach())
    with free_choice():
        assert torch.allclose(torch.func.grad(lambda x: info_nce(x, k, n))(q.detach()), expected, atol=1e-6)
        jacobian = torch.func.jacrev(lambda x: normalized_mse(x, k))(q.detach())
        assert jacobian.shape == (6, 6, 5)
        temperatures = torch.tensor([0.1, 0.2], requires_grad=True)
        losses = torch.vmap(lambda t: info_nce(q.detach(), k, n, t))(temperatures)
        assert (torch.autograd.grad(losses.sum(), temperatures)[0] != 0).all()


@pytest.mark.parametrize("mode", MODES)
def test_batched_incoming_gradients(mode: str | None) -> None:
    tensors = inputs(mode)
    leaves = [t for t in tensors.values() if t is not None]
    losses = info_nce(**tensors, reduction="none", negative_mode=mode or "unpaired")
    batched = torch.autograd.grad(losses, leaves, torch.eye(6), is_grads_batched=True, retain_graph=True)
    mapped = torch.vmap(lambda weight: torch.autograd.grad(losses, leaves, weight, retain_graph=True))(torch.eye(6))
    for a, b in zip(batched, mapped, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    for row, weight in enumerate(torch.eye(6)):
        for all_rows, one in zip(batched, torch.autograd.grad(losses, leaves, weight, retain_graph=True), strict=True):
            assert torch.allclose(all_rows[row], one, atol=1e-6)


class Loss(torch.nn.Module):
    def forward(self, query: Tensor, positive: Tensor, negatives: Tensor, first: Tensor, count: Tensor) -> Tensor:
        return info_nce(query, positive, negatives, valid=(first, count)) + normalized_mse(query, positive).mean()


@pytest.mark.parametrize("strict", [False, True])
def test_exports_with_any_batch_and_queue(strict: bool) -> None:
    n, m = torch.export.Dim("N", min=2), torch.export.Dim("M", min=4)
    shapes = {"query": {0: n}, "positive": {0: n}, "negatives": {0: m}, "first": None, "count": None}
    ring = (torch.tensor(2), torch.tensor(5))
    example = tuple(inputs("unpaired", requires_grad=False).values()) + ring
    exported = torch.export.export(Loss(), example, dynamic_shapes=shapes, strict=strict).module()
    other = tuple(inputs("unpaired", n=11, m=30, requires_grad=False).values()) + ring
    assert torch.allclose(exported(*other), Loss()(*other))


def test_a_graph_captured_without_gradients_says_so() -> None:
    """Instead of gradients of zero, or of the wrong shape."""
    example = (*inputs("unpaired", requires_grad=False).values(), torch.tensor(0), torch.tensor(9))
    exported = torch.export.export(Loss(), example).module()
    with pytest.raises(ValueError, match="captured"):
        exported(example[0].clone().requires_grad_(), *example[1:]).backward()


def test_one_device_for_all() -> None:
    q, k, n = inputs("unpaired", requires_grad=False).values()
    meta = {name: t.to("meta") for name, t in (("q", q), ("k", k), ("n", n))}
    for arguments in ((q, meta["k"], n), (q, k, meta["n"]), (q, k, n, torch.tensor(0.1, device="meta"))):
        with pytest.raises(ValueError, match="meta"):
            info_nce(*arguments)
    with pytest.raises(ValueError, match="meta"):
        normalized_mse(q, meta["k"])
    with free_choice():
        assert info_nce(meta["q"], meta["k"], meta["n"]).is_meta


def test_the_native_ops_check_what_they_are_given() -> None:
    """Exported graphs reach them without the checks of the public functions."""
    if (why := _extension.missing()) is not None:
        pytest.skip(why)
    with torch.device("cpu"):
        q, k, n, row = torch.randn(6, 5), torch.randn(6, 5), torch.randn(9, 5), torch.randn(6)
    rest = (0.1, None, None, None, False)
    for query, positive, negatives, named in (
        (q[:, :0], k[:, :0], n[:, :0], "D > 0"),
        (q, k, n[:, :4], "5 components"),
        (q, k[:1], n, "positive_key"),
        (q, k.double(), n, "dtype"),
        (q.double(), k.double(), n.double(), "float32"),
        (q.bfloat16(), k.bfloat16(), n, "dtype"),
        (q, k, n[None], "M×D or N×M×D"),
    ):
        with pytest.raises(RuntimeError, match=named):
            call("info_nce", "native", query, positive, negatives, *rest, True)
    with pytest.raises(RuntimeError, match="6 elements"):
        call("info_nce_negatives", "native", row[:2], row, q, n, *rest, False)
    with pytest.raises(RuntimeError, match="N×D"):
        call("normalized_mse", "native", q, k[:2], True)


def test_normalized_mse_is_exact_near_zero() -> None:
    draw = torch.Generator(torch.get_default_device()).manual_seed(0)
    p = torch.randn(200, 64, generator=draw)
    assert (normalized_mse(p, 3 * p) >= 0).all()
    z = p + 1e-4 * torch.randn(200, 64, generator=draw)
    exact = (torch.nn.functional.normalize(p.double()) - torch.nn.functional.normalize(z.double())).square().sum(1)
    assert ((normalized_mse(p, z) - exact).abs() < 2e-3 * exact).all()


def test_chips_older_than_the_kernels_take_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5) if device.index == 6 else (9, 0))
    with free_choice():
        assert backends.choose("info_nce", torch.device("cuda", 6), torch.float32) == "reference"
        assert backends.choose("info_nce", torch.device("cuda", 7), torch.float32) == "triton"
    with use_backend("triton"), pytest.raises(ValueError, match="sm_75"):
        backends.choose("info_nce", torch.device("cuda", 6), torch.float32)
