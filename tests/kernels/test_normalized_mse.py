"""BYOL's loss and its gradient against the reference in float64."""

import pytest
import torch
import torch.nn.functional as F
from fastssl.kernels import normalized_mse

from fastssl.ops import reference
from tests.kernels import fences

# The interpreter computes with numpy, which tells of every square that overflows in huge rows.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

EPS = 4e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", list(fences.LAYOUTS))
@pytest.mark.parametrize(("n", "dim"), [(1, 1), (5, 7), (3, 256), (4, 300), (0, 8)])
def test_matches_reference(dtype: torch.dtype, layout: str, n: int, dim: int) -> None:
    generator = torch.Generator().manual_seed(dim)
    prediction = torch.randn(n, dim, generator=generator).to(dtype)
    target = torch.randn(n, dim, generator=generator).to(dtype)
    place = fences.LAYOUTS[layout]
    loss, gradient = normalized_mse.forward(place(prediction), place(target), True)
    fences.check()
    leaf = prediction.double().requires_grad_()
    expected = reference.normalized_mse(leaf, target.double())
    expected.sum().backward()
    torch.testing.assert_close(loss.cpu().double(), expected.detach(), atol=EPS, rtol=0)
    assert leaf.grad is not None
    off = (gradient.cpu().double() - leaf.grad).abs() * prediction.double().norm(dim=1, keepdim=True)
    assert (off <= EPS).all()


@pytest.mark.parametrize("scale", [0.0, 1e30, 1e-30, 1e-13, 1e-6])
def test_odd_norms(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, target = F.normalize(torch.randn(2, 4, 20, generator=generator), dim=-1)
    prediction, target = prediction * scale, target * 1e30
    loss, gradient = normalized_mse.forward(fences.dense(prediction), fences.dense(target), True)
    leaf = prediction.double().requires_grad_()
    expected = reference.normalized_mse(leaf, target.double())
    expected.sum().backward()
    torch.testing.assert_close(loss.cpu().double(), expected.detach(), atol=EPS, rtol=0)
    assert leaf.grad is not None
    size = 2 / max(scale, 1e-12)
    torch.testing.assert_close(gradient.cpu().double() / size, leaf.grad / size, atol=EPS, rtol=0)


def test_without_gradients() -> None:
    x = fences.dense(torch.ones(3, 4))
    loss, gradient = normalized_mse.forward(x, x, False)
    assert gradient.shape == (0,)
    torch.testing.assert_close(loss, torch.zeros_like(loss), atol=EPS, rtol=0)
