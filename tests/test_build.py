"""setup.py, the extension it builds, and life without it."""

import importlib
import importlib.util
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from setuptools.errors import CompileError

from fastssl import _extension, kernels

ROOT = Path(__file__).parents[1]
NVCC_CODES = frozenset({"sm_80", "sm_90", "sm_100", "sm_120"})

needs_extension = pytest.mark.skipif(_extension.missing() is not None, reason=f"extension: {_extension.missing()}")


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fastssl_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def reloaded() -> Iterator[None]:
    """Lets a test look for the extension afresh."""
    _extension._load.cache_clear()
    yield
    _extension._load.cache_clear()


@pytest.mark.parametrize(
    ("force", "nvcc", "torch_cuda", "why"),
    [
        (None, "13.0", "13.0", None),
        (None, "13.2", "13.0", None),
        ("", "12.8", "12.6", None),
        ("1", "13.0", "13.0", None),
        (None, None, "13.0", "there is no nvcc on PATH or in CUDA_HOME"),
        (None, "13.0", None, "this torch was built without CUDA"),
        (None, "12.8", "13.0", "nvcc is of CUDA 12.8 and torch of CUDA 13.0"),
        ("0", "13.0", "13.0", "FORCE_CUDA=0"),
        ("0", None, None, "FORCE_CUDA=0"),
    ],
)
def test_cuda_is_compiled_when_it_can_work(
    setup: ModuleType, force: str | None, nvcc: str | None, torch_cuda: str | None, why: str | None
) -> None:
    assert setup.why_without_cuda(force, nvcc, torch_cuda) == why


@pytest.mark.parametrize(
    ("force", "nvcc", "torch_cuda", "message"),
    [
        ("1", None, "13.0", "FORCE_CUDA=1, but there is no nvcc"),
        ("1", "13.0", None, "FORCE_CUDA=1, but this torch was built without CUDA"),
        ("1", "12.8", "13.0", "FORCE_CUDA=1, but nvcc is of CUDA 12.8 and torch of CUDA 13.0"),
        ("yes", "13.0", "13.0", "FORCE_CUDA is 'yes'; it can be 0 or 1"),
    ],
)
def test_forced_cuda_that_cannot_work_is_an_error(
    setup: ModuleType, force: str, nvcc: str | None, torch_cuda: str | None, message: str
) -> None:
    with pytest.raises(CompileError, match=message):
        setup.why_without_cuda(force, nvcc, torch_cuda)


@pytest.mark.parametrize(
    ("arch_list", "expected"),
    [
        (None, "80-real;90-real;100-real;120"),
        (" ", "80-real;90-real;100-real;120"),
        ("8.0", "80-real"),
        ("8.0;9.0a", "80-real;90a-real"),
        ("8.6 9.0+PTX", "86-real;90"),
        ("8.0, 12.0;", "80-real;120-real"),
    ],
)
def test_architectures(setup: ModuleType, arch_list: str | None, expected: str) -> None:
    assert setup.cuda_architectures(arch_list, NVCC_CODES) == expected


def test_default_architectures_are_those_that_nvcc_supports(setup: ModuleType) -> None:
    assert setup.cuda_architectures(None, frozenset({"sm_80", "sm_90"})) == "80-real;90"


@pytest.mark.parametrize("entry", ["Hopper", "90", "sm_90", "8.0+ptx"])
def test_unknown_architecture_is_named(setup: ModuleType, entry: str) -> None:
    with pytest.raises(CompileError, match=f"TORCH_CUDA_ARCH_LIST has '{entry}'".replace("+", r"\+")):
        setup.cuda_architectures(f"8.0;{entry}", NVCC_CODES)


def test_nvcc_of_cuda_home_comes_before_path(setup: ModuleType, tmp_path: Path) -> None:
    for folder in (tmp_path / "home" / "bin", tmp_path / "path"):
        folder.mkdir(parents=True)
        (folder / "nvcc").touch(mode=0o755)
    home, path = str(tmp_path / "home"), str(tmp_path / "path")
    assert setup.find_nvcc({"CUDA_HOME": home, "PATH": path}) == f"{home}/bin/nvcc"
    assert setup.find_nvcc({"PATH": path}) == f"{path}/nvcc"
    assert setup.find_nvcc({"PATH": home}) is None


@pytest.mark.slow
@pytest.mark.parametrize("required", ["0", "1"])
def test_build_without_compiler(tmp_path: Path, required: str) -> None:
    build = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path / "temp")],
        cwd=ROOT,
        env={**os.environ, "CXX": "/nonexistent", "FORCE_CUDA": "0", "FASTSSL_REQUIRE_EXTENSION": required},
        capture_output=True,
        text=True,
    )
    assert build.returncode == int(required)
    assert "cmake" in build.stderr  # it failed, or is missing too


@needs_extension
def test_extension_agrees_with_torch() -> None:
    info = _extension.build_info()
    assert info is not None
    assert torch.__version__.startswith(info["torch"])
    assert info["cpp_standard"] == 20
    assert info["ops"] == sorted(path.stem for path in ROOT.glob("csrc/ops/*.cpp"))
    assert bool(info["cuda_archs"]) == (info["cuda"] is not None)
    if info["cuda"] is not None:
        assert torch.version.cuda is not None
        assert info["cuda"].split(".")[0] == torch.version.cuda.split(".")[0]


@needs_extension
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_extension_sees_the_driver() -> None:
    info = _extension.build_info()
    assert info is not None and info["cuda_driver"] is not None


@needs_extension
def test_extension_of_another_torch_is_not_used(reloaded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.0+cpu")
    assert _extension.build_info() is None
    assert "but this is torch 2.9.0" in (_extension.missing() or "")


def test_extension_that_cannot_be_loaded_says_why(reloaded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> ModuleType:
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(importlib, "import_module", fail)
    assert _extension.missing() == "it cannot be loaded: undefined symbol: _ZN3c10"


@pytest.mark.parametrize(("version", "expected"), [("3.5.1", "Triton 3.5.1 is too old"), ("3.10.0+git", None)])
def test_triton_must_be_recent(version: str, expected: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))
    why = kernels.unavailable.__wrapped__()
    assert why is None if expected is None else why.startswith(expected)


def test_bare_installation_works_with_one_warning() -> None:
    """No extension, no Triton, no DALI: one warning, and ops that run."""
    script = """
        import sys
        import warnings

        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name in ("fastssl._C", "triton", "nvidia.dali"):
                    raise ModuleNotFoundError(f"No module named '{name}'", name=name)

        sys.meta_path.insert(0, Blocker())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import fastssl
            assert not caught
            import fastssl.ops
            import fastssl._extension
            fastssl._extension.warn_once()
        for warning in caught:
            if issubclass(warning.category, UserWarning):
                print(warning.filename, warning.message)

        import torch
        loss = fastssl.ops.info_nce(torch.eye(4), torch.eye(4))
        assert loss.isfinite()
        queue = fastssl.ops.KeyQueue(8, 4)
        queue.enqueue_(torch.eye(4))
        queue.dequeue_(1)
        fastssl.ops.ema_update_([torch.zeros(3)], [torch.ones(3)], 0.9)
        shuffled, handle = fastssl.ops.shuffle_batch(torch.eye(4), generator=torch.Generator())
        assert fastssl.ops.unshuffle_batch(shuffled, handle).equal(torch.eye(4))
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    (line,) = run.stdout.splitlines()
    assert line.startswith("<string> every op of fastssl works")
    assert "the compiled extension is missing (it was not built" in line
    assert ("Triton cannot be imported" in line) == (torch.version.cuda is not None)
