"""The CPU kernels under AddressSanitizer, UndefinedBehaviorSanitizer and, on std::threads, ThreadSanitizer.

Slow, because each builds csrc once more; CMake's folders in build/ stay, and later runs compile what has changed.
"""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fastssl import _extension

ROOT = Path(__file__).parents[2]
PACKAGE = "tests.csrc.sanitizers"
TOOLS = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])  # pip's cmake too
CXX, CMAKE = shutil.which(os.environ.get("CXX", "c++")), shutil.which("cmake", path=TOOLS)
RUN_SECONDS, BUILD_SECONDS = 240, 900
BUILDS = {"address,undefined": "libasan.so", "thread": "libtsan.so"}  # and what the compiler needs for it

Result = subprocess.CompletedProcess[str]
Builds = dict[str, Future[Path]]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CXX is None or CMAKE is None, reason="there is no C++ compiler or no CMake"),
    pytest.mark.skipif(_extension.missing() is not None, reason="the extension is missing"),
]


def library(name: str) -> Path:
    """The compiler's shared library, or a skip where it has none."""
    path = subprocess.run([str(CXX), f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip(f"{CXX} has no {name}")
    return Path(path)


def build(sanitizers: str) -> Path:
    """The folder with what CMakeLists.txt makes of csrc for these sanitizers."""
    library(BUILDS[sanitizers])
    pybind11 = pytest.importorskip("pybind11")
    folder = ROOT / "build" / f"sanitize-{sanitizers.split(',')[0]}"
    options = {
        "FASTSSL_SANITIZE": sanitizers,
        "FASTSSL_TORCH": Path(torch.__file__).parent,
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    configure = [
        str(CMAKE),
        "-S",
        str(ROOT),
        "-B",
        str(folder),
        *(f"-D{key}={value}" for key, value in options.items()),
    ]
    jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    for command in (configure, [str(CMAKE), "--build", str(folder), "--parallel", jobs]):
        result = run(command, seconds=BUILD_SECONDS)
        assert result.returncode == 0, result.stdout[-4000:]
    return folder


def run(command: list[str], environment: Mapping[str, str] | None = None, seconds: int = RUN_SECONDS) -> Result:
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | (environment or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
    )


@pytest.fixture(scope="module")
def builds() -> Iterator[Builds]:
    """The folders of both, made at the same time: for a third of its time each has work for one core alone."""
    with ThreadPoolExecutor() as pool:
        yield {sanitizers: pool.submit(build, sanitizers) for sanitizers in BUILDS}


@pytest.fixture(scope="module")
def instrumented(builds: Builds) -> dict[str, str]:
    """The environment in which Python has the instrumented extension."""
    # Python is not instrumented, so the runtime is loaded ahead of it; and the C++ library with it, for its exceptions.
    preload = f"{library('libasan.so')} {library('libstdc++.so')}"
    (extension,) = builds["address,undefined"].result().glob("_C.*.so")
    return {
        "FASTSSL_INSTRUMENTED": str(extension),
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": "detect_leaks=0",  # Python frees little at its end
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "FASTSSL_BACKEND": "",
    }


# The kernels exist once for each instruction set.
CAPABILITIES = ("default", "avx2", "avx512", "") if platform.machine() == "x86_64" else ("",)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_kernel_leaves_its_memory(instrumented: dict[str, str], capability: str) -> None:
    environment = dict(instrumented)
    if capability:
        environment |= {"ATEN_CPU_CAPABILITY": capability, "FASTSSL_AVX512_BF16": "0"}
    result = run([sys.executable, "-m", f"{PACKAGE}.instrumented", f"{PACKAGE}.exercise"], environment)
    assert result.returncode == 0, result.stdout[-8000:]


def test_the_ops_tests_pass_instrumented(instrumented: dict[str, str]) -> None:
    # Left out are those that mostly wait for torch's own compiler, and the long sequences. A new op's tests are added
    # here.
    command = [sys.executable, "-m", "pytest", "-qx", "-p", f"{PACKAGE}.instrumented", "-p", "no:cacheprovider"]
    command += [f"tests/ops/test_{name}.py" for name in ("library", "ema", "queue", "shuffle", "augment_native")]
    command += ["-k", "native and not compile and not opcheck and not deque"]
    result = run(command, instrumented)
    assert result.returncode == 0, result.stdout[-8000:]


def test_no_two_threads_write_to_one_place(builds: Builds) -> None:
    program = builds["thread"].result() / "races"
    # The runtime of older compilers wants memory where it was before addresses became more random.
    fixed = [setarch, "--addr-no-randomize"] if (setarch := shutil.which("setarch")) else []
    if fixed and run([*fixed, "true"]).returncode != 0:
        fixed = []
    result = run([*fixed, str(program)], {"LD_LIBRARY_PATH": str(Path(torch.__file__).parent / "lib")})
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stdout[:8000]
