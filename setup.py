"""Builds the extension module fastssl._C with CMake; see `CMakeBuild` for the environment variables it obeys."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
DEFAULT_ARCHS = ("8.0", "9.0", "10.0", "12.0")


def find_nvcc(environ: Mapping[str, str]) -> str | None:
    """The CUDA compiler of CUDA_HOME, else the one on PATH."""
    path = environ.get("PATH", os.defpath)
    if home := environ.get("CUDA_HOME"):
        path = os.pathsep.join([str(Path(home, "bin")), path])
    return shutil.which("nvcc", path=path)


def nvcc_output(nvcc: str, option: str) -> str:
    """What nvcc prints."""
    return subprocess.run([nvcc, option], check=True, stdout=subprocess.PIPE, text=True).stdout


def why_without_cuda(force: str | None, nvcc_cuda: str | None, torch_cuda: str | None) -> str | None:
    """Why the CUDA sources are not compiled, or None when they are.

    Args:
        force: the value of FORCE_CUDA: "1", "0", or None to compile them when that can work.
        nvcc_cuda: the CUDA version of nvcc, None without nvcc.
        torch_cuda: ``torch.version.cuda``.

    Raises:
        CompileError: CUDA is forced and cannot work.
    """
    if force not in (None, "", "0", "1"):
        raise CompileError(f"FORCE_CUDA is '{force}'; it can be 0 or 1")
    if force == "0":
        return "FORCE_CUDA=0"
    if nvcc_cuda is None:
        why = "there is no nvcc on PATH or in CUDA_HOME"
    elif torch_cuda is None:
        why = "this torch was built without CUDA"
    elif nvcc_cuda.split(".")[0] != torch_cuda.split(".")[0]:
        # The extension shares libcudart with torch, and that library is named after the major version.
        why = f"nvcc is of CUDA {nvcc_cuda} and torch of CUDA {torch_cuda}"
    else:
        return None
    if force == "1":
        raise CompileError(f"FORCE_CUDA=1, but {why}")
    return why


def cuda_architectures(arch_list: str | None, supported: frozenset[str]) -> str:
    """TORCH_CUDA_ARCH_LIST, such as "8.0;9.0a;12.0+PTX", in CMake's words: "80-real;90a-real;120".

    Args:
        arch_list: the variable's value; without one, the default list as far as nvcc supports it, PTX for the last.
        supported: what nvcc can compile for, such as "sm_90".

    Raises:
        CompileError: an entry is not an architecture.
    """
    if arch_list and arch_list.strip():
        entries = re.split(r"[;,\s]+", arch_list.strip(" ;,"))
    else:
        entries = [arch for arch in DEFAULT_ARCHS if f"sm_{arch.replace('.', '')}" in supported]
        entries[-1] += "+PTX"
    names = []
    for entry in entries:
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", entry)
        if match is None:
            raise CompileError(f"TORCH_CUDA_ARCH_LIST has '{entry}'; an entry looks like 9.0, 9.0a or 9.0+PTX")
        major, minor, ptx = match.groups()
        names.append(f"{major}{minor}" if ptx else f"{major}{minor}-real")
    return ";".join(names)


class CMakeBuild(build_ext):
    """Lets CMake build the extension.

    Without a compiler, CMake or torch the installation succeeds without the extension and says why, unless
    FASTSSL_REQUIRE_EXTENSION=1 or FORCE_CUDA=1. FORCE_CUDA=0 leaves CUDA out; CUDA_HOME, TORCH_CUDA_ARCH_LIST, CXX,
    CMAKE_GENERATOR and MAX_JOBS mean what they mean elsewhere.
    """

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        target.unlink(missing_ok=True)  # if this build fails, an older one must not pass for it
        cmake = shutil.which("cmake", path=os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")]))
        if cmake is None:
            raise CompileError("there is no cmake on PATH")
        build_folder = str(Path(self.build_temp).absolute())
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        try:
            subprocess.run([cmake, "-S", str(ROOT), "-B", build_folder, *self.cmake_arguments(target)], check=True)
            subprocess.run([cmake, "--build", build_folder, "--parallel", jobs], check=True)
        except subprocess.CalledProcessError as error:
            name = Path(error.cmd[0]).name
            raise CompileError(f"{name} failed with exit code {error.returncode}; its output is above") from error

    def copy_extensions_to_source(self) -> None:
        for ext in self.extensions:
            Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)  # the same for the editable installation
        super().copy_extensions_to_source()

    def cmake_arguments(self, target: Path) -> list[str]:
        """What CMakeLists.txt needs to know."""
        try:
            import pybind11
            import torch
        except (ImportError, OSError) as error:
            raise CompileError(f"{error}; install torch and pybind11 first and pass --no-build-isolation") from error

        return [
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DFASTSSL_TORCH={Path(torch.__file__).parent}",
            *self.cuda_arguments(torch.version.cuda),
        ]

    def cuda_arguments(self, torch_cuda: str | None) -> list[str]:
        """Whether to compile for CUDA, with which nvcc and for which chips."""
        force = os.environ.get("FORCE_CUDA")
        nvcc = find_nvcc(os.environ) if force != "0" else None
        release = re.search(r"release (\d+\.\d+)", nvcc_output(nvcc, "--version")) if nvcc else None
        why = why_without_cuda(force, release and release[1], torch_cuda)
        if nvcc is None or why is not None:
            self.warn(f"building extension without CUDA: {why}")
            return ["-DFASTSSL_CUDA=OFF"]
        supported = frozenset(nvcc_output(nvcc, "--list-gpu-code").split())
        archs = cuda_architectures(os.environ.get("TORCH_CUDA_ARCH_LIST"), supported)
        return ["-DFASTSSL_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCMAKE_CUDA_ARCHITECTURES={archs}"]


if __name__ == "__main__":
    required = "1" in (os.environ.get("FASTSSL_REQUIRE_EXTENSION"), os.environ.get("FORCE_CUDA"))
    sources = ["CMakeLists.txt", *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/**/*.*")))]
    # Folders of YAML and images count as packages to setuptools, hence the namespace variant.
    packages = find_namespace_packages(include=["fastssl", "fastssl.*"], exclude=["*.__pycache__"])
    setup(
        packages=[*packages, "fastssl.kernels"],
        package_dir={"fastssl.kernels": "kernels"},
        ext_modules=[Extension("fastssl._C", sources, optional=not required)],
        cmdclass={"build_ext": CMakeBuild},
    )
