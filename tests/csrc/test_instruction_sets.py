"""The CPU kernels exist once for each instruction set; torch's ATEN_CPU_CAPABILITY chooses among them at start-up."""

import os
import platform
import shutil
import subprocess
import sys

import pytest
import torch

from fastssl import _extension

needs_extension = pytest.mark.skipif(_extension.missing() is not None, reason="the extension is missing")
COMPILER = shutil.which(os.environ.get("CXX", "c++"))


@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
def test_the_extension_is_there_where_it_can_be_built() -> None:
    """Else the ops fall back to `reference`, and every test of the native kernels passes without them."""
    assert _extension.missing() is None


CHECK = """
import torch
from fastssl.ops import (
    ColorJitter, GaussianBlur, Grayscale, RandomErasing, Solarize, augment_, info_nce, normalized_mse, use_backend
)
from fastssl.ops.photometric import draw_augmentation

from fastssl import _extension

assert torch.backends.cpu.get_cpu_capability() == "{capability}"
assert _extension.build_info()["cpu_kernels"] == "{kernels}"
torch.manual_seed(0)
for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
    for n, m, d in ((1, 1, 1), (7, 5, 3), (33, 70, 31), (40, 700, 129)):
        inputs = [torch.randn(rows, d).to(dtype).requires_grad_() for rows in (n, n, m)]
        exact = [x.detach().double().requires_grad_() for x in inputs]
        for negatives in (slice(3), slice(2)):
            q, k, *rest = inputs[negatives]
            loss = info_nce(q, k, *rest, temperature=0.2) + normalized_mse(q, k).mean()
            results = [loss, *torch.autograd.grad(loss, inputs[negatives])]
            q, k, *rest = exact[negatives]
            with use_backend("reference"):
                loss = info_nce(q, k, *rest, temperature=0.2) + normalized_mse(q, k).mean()
            expected = [loss, *torch.autograd.grad(loss, exact[negatives])]
            for a, b, x in zip(results, expected, [torch.ones(1), *inputs]):
                scale = b.abs() + 5 / x.detach().double().norm(dim=-1, keepdim=True)
                assert ((a - b).abs() <= tolerance * scale).all(), (dtype, n, m, d, (a - b).abs().max())
steps = [ColorJitter(1, 1, 1, 0.5), Grayscale(0.3), GaussianBlur(p=0.5), Solarize(p=0.3), RandomErasing()]
for size in ((1, 1), (7, 5), (40, 33), (16, 128)):
    images, parameters = torch.randint(256, (20, *size, 3), dtype=torch.uint8), draw_augmentation(steps, 20, size)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)):
        native = augment_(images.clone(), steps, parameters, dtype=dtype)
        with use_backend("reference"):
            off = (native - augment_(images.clone(), steps, parameters)).abs() > tolerance * (1 + native.abs())
        assert off.float().mean() < 0.01, (size, dtype, off.float().mean())
"""


@needs_extension
@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors have one instruction set")
@pytest.mark.parametrize(  # with the best one all other tests run
    ("capability", "kernels"), [("DEFAULT", "baseline"), ("AVX2", "avx2"), ("AVX512", "avx512")]
)
def test_older_processors_compute_the_same(capability: str, kernels: str) -> None:
    if capability == "AVX512" and torch.backends.cpu.get_cpu_capability() != capability:
        pytest.skip("this processor has no AVX-512")
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability.lower(), "FASTSSL_BACKEND": ""}
    environment["FASTSSL_AVX512_BF16"] = "0"
    code = CHECK.format(capability=capability, kernels=kernels)
    result = subprocess.run([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 0, result.stderr


@needs_extension
def test_all_threads_take_part() -> None:
    """Without OpenMP at compile time, ATen's loops run on one thread and nobody notices."""
    info = _extension.build_info()
    assert info is not None
    assert info["openmp"] == ("ATen parallel backend: OpenMP" in torch.__config__.parallel_info())
