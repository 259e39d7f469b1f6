"""normalized_mse against its formula, and the choice of the backend."""

import pytest
import torch

from fastssl.errors import FastsslError
from fastssl.ops import backend, normalized_mse, use_backend


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
