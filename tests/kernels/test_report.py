"""The kernels of every chip neither spill nor outgrow shared memory, use matrix units, and the report says so."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from benchmarks import kernel_markdown, kernel_report, roofline, sass

JSON = kernel_report.RESULTS / "kernel_report.json"
GOOD = {"name": "split bf16 128", "chip": 90, "stack": 0, "spills": 0, "shared": 65536, "matrix": {"HGMMA.64x64x16": 8}}
LISTING = """
        /*0000*/                   MUFU.EX2 R1, R1 ;             /* 0x0000000000000000 */
                                                                 /* 0x000e640000000800 */
        /*0010*/                   HGMMA.64x128x16.F32.BF16 R24, R184, gdesc[UR8], RZ, gsb0 ;  /* 0x0000000000000000 */
                                                                 /* 0x000fe20000000000 */
        /*0020*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;    /* 0x0000000000000000 */
                                                                 /* 0x000fe20000000000 */
        /*0030*/              @!P1 BRA 0x10 ;                    /* 0x0000000000000000 */
                                                                 /* 0x002fe20000000000 */
        /*0040*/                   EXIT ;                        /* 0x0000000000000000 */
                                                                 /* 0x000fe20000000000 */
"""


CUDA = """
namespace {
template <int kCount, typename T>
__global__ void __launch_bounds__(96) good_kernel(T* x) { x[threadIdx.x] *= kCount; }
template __global__ void good_kernel<3, float>(float*);
}
extern "C" __global__ void bad(float* x, const int* at, int count) {
  float values[64] = {};
  for (int i = 0; i < count; ++i) values[at[i]] += x[i];
  for (int i = 0; i < 64; ++i) x[i] = values[i];
}
"""


def report() -> dict[str, Any]:
    return json.loads(JSON.read_text())


def check(cache: Path, *arguments: str) -> None:
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environ["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, "-m", "benchmarks.kernel_report", "--check", *arguments]
    root = Path(kernel_report.__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=environ, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


def test_a_good_kernel_passes() -> None:
    assert kernel_report.problems(GOOD) == []
    assert kernel_report.problems({**GOOD, "name": "combine bf16 128", "matrix": {}}) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stack": 16}, "16 bytes of stack"),
        ({"spills": 2}, "2 accesses"),
        ({"matrix": {}}, "no matrix instruction"),
        ({"matrix": {}, "name": "negatives fp16 64"}, "no matrix instruction"),
        ({"matrix": {}, "name": "split tf32x3 64"}, "no matrix instruction"),
        ({"matrix": {}, "name": "augment_blur bf16 byol"}, "no matrix instruction"),
        ({"matrix": {}, "name": "ema_update 92", "stack": 8}, "8 bytes of stack"),
        ({"matrix": {"HMMA.16816.F32.BF16": 64}}, "no matrix instruction HGMMA"),
        ({"shared": 227 * 1024 + 1}, "of shared memory"),
        ({"shared": 99 * 1024 + 1, "chip": 120, "matrix": {"HMMA.16816.F32.BF16": 8}}, "of shared memory"),
        ({"shared": 163 * 1024 + 1, "chip": 80, "matrix": {"HMMA.16816.F32.BF16": 8}}, "of shared memory"),
    ],
)
def test_a_bad_kernel_fails(change: dict[str, Any], message: str) -> None:
    (found,) = kernel_report.problems({**GOOD, **change})
    assert message in found


def test_the_committed_kernels_pass_on_all_chips() -> None:
    kernels = report()["kernels"]
    assert {row["chip"] for row in kernels} == {80, 90, 100, 120}
    assert [text for row in kernels for text in kernel_report.problems(row)] == []


def test_the_committed_report_has_the_cuda_kernels() -> None:
    assert report()["missing"] is None
    for chip in (80, 90, 100, 120):
        rows = [row for row in report()["kernels"] if row["chip"] == chip and row["name"].startswith("ema_update")]
        assert rows
        assert {row["warps"] for row in rows} == {8}


@pytest.mark.skipif(kernel_report.find_nvcc() is None, reason="needs nvcc")
def test_cuda_kernels_are_read_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.joinpath("two_kernel.cu").write_text(CUDA)
    monkeypatch.setattr(kernel_report, "SOURCES", tmp_path)
    assert kernel_report.cuda_sources(["two 3"]) == kernel_report.cuda_sources(None) == ["two_kernel.cu"]
    assert kernel_report.cuda_sources(["split"]) == []
    rows = {row["name"]: row for row in kernel_report.cuda_rows(90, "two_kernel.cu")}
    assert rows.keys() == {"good 3, float", "bad"}
    assert (rows["good 3, float"]["warps"], rows["bad"]["warps"]) == (3, 32)
    assert kernel_report.problems(rows["good 3, float"]) == []
    (found,) = kernel_report.problems(rows["bad"])
    assert "256 bytes of stack" in found
    tmp_path.joinpath("two_kernel.cu").write_text("nonsense")
    with pytest.raises(RuntimeError, match="nvcc cannot compile two_kernel"):
        kernel_report.cuda_rows(90, "two_kernel.cu")


def test_cuda_kernels_are_missed_without_nvcc(tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "CUDA_HOME")}
    environ["PATH"] = str(tmp_path)
    command = [sys.executable, "-m", "benchmarks.kernel_report", "--check", "--only", "ema_update"]
    root = Path(kernel_report.__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "there is no nvcc" in done.stdout
    assert "ema_update_kernel.cu" in done.stdout
    assert "Not compiled" in kernel_markdown.markdown({**report(), "missing": done.stdout})


def test_an_enqueue_moves_keys_and_as_many_rows() -> None:
    rows = [row for row in report()["shapes"] if row["shape"].startswith("enqueue")]
    assert len(rows) == 8
    for row in rows:
        size = 4 if row["shape"].endswith("fp32") else 2
        assert row["least_bytes"] == row["device_bytes"] == 256 * 128 * 2 * size + 8 + 8 + 4


def test_an_augmentation_reads_bytes_and_writes_bfloat16() -> None:
    rows = report()["augmentations"]
    assert len(rows) == 4 * len(roofline.AUGMENTATIONS)
    for row in rows:
        values = 256 * 224 * 224 * 3
        assert row["least_bytes"] == values * (1 + 2)
        tables = 2 * 256 * 23**2 * 4
        # The bytes of images with a jitter again; those of blurred ones as float16 there and back; sums and tables.
        most = row["least_bytes"] + values * (row["jittered"] + 4 * row["blurred"])
        assert most <= row["device_bytes"] <= most + tables + 256 * 49 * 4
        assert [launch["kernel"] for launch in row["launches"]] == ["augment_luma", "augment_color", "augment_blur"]


def test_the_momentum_update_is_that_of_torchvisions_resnet_50() -> None:
    with torch.device("meta"):
        parameters = list(torchvision.models.resnet50().parameters())
    for update in roofline.UPDATES:
        assert (update.tensors, update.elements) == (len(parameters), sum(p.numel() for p in parameters))
    assert [row["bytes"] for row in report()["updates"]] == 4 * [update.bytes for update in roofline.UPDATES]


def test_the_committed_markdown_is_made_of_the_committed_json() -> None:
    text = JSON.with_suffix(".md").read_text()
    assert "predicted, not measured" in text.splitlines()[0]
    assert text == kernel_markdown.markdown(report())


def test_the_queue_is_read_from_device_memory_once() -> None:
    rows = [row for row in report()["shapes"] if row["shape"] == roofline.MOCO.title]
    assert {row["chip"] for row in rows} == {80, 90, 100, 120}
    for row in rows:
        assert row["least_bytes"] > 65536 * 128 * 2
        assert row["device_bytes"] <= 1.1 * row["least_bytes"]


def test_instructions_are_read_with_what_the_assembler_scheduled() -> None:
    special, product, wait, branch, _ = sass.parse(LISTING)
    assert (special.kind, special.stall, special.write, special.read, special.wait) == ("exp2", 2, 1, 7, 0)
    assert (product.kind, product.stall, product.write) == ("matrix", 1, 7)
    assert (wait.kind, branch.target, branch.guard, branch.wait) == ("control", 0x10, "!P1", 2)


def test_the_model_waits_for_the_matrix_unit() -> None:
    instructions = sass.parse(LISTING)
    program = sass.Program(instructions, (0x10, 0x30), [], 32, 0)
    quarter = sass.Quarter(1, 512, 1, 0, 8, 600)
    assert sass.matrix_clocks(instructions[1], quarter) == 64
    ten, twenty = (sass.Model(program, quarter, 1, 4, sass.Trips(n)).run() for n in (10, 20))
    assert twenty - ten == pytest.approx(10 * (64 + sass.MATRIX_LATENCY), rel=0.1)
    two_warps = sass.Model(program, quarter, 1, 8, sass.Trips(20))
    assert two_warps.run() < 1.5 * twenty  # one waits while the other multiplies
    assert two_warps.busy["matrix"] == 2 * 20 * 64


def test_interpreting_is_refused() -> None:
    environ = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "benchmarks.kernel_report", "--check"]
    root = Path(kernel_report.__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0
    assert "TRITON_INTERPRET" in done.stderr


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Triton's, so that nothing is compiled twice, and nothing that another version has compiled counts."""
    return tmp_path_factory.mktemp("triton")


def test_the_kernel_of_moco_compiles_for_all_chips(cache: Path) -> None:
    check(cache, "--only", "split bf16 queue 128")


def distinct() -> list[str]:
    """Names of the kernels without those that differ from another one in the dtype alone.

    float16 is loaded and multiplied as bfloat16 is; tf32 is what tf32x3 does too, in fewer registers.
    """
    names = {row["name"] for row in report()["kernels"]}
    like = {name: name.replace("fp16", "bf16").replace("tf32 ", "tf32x3 ") for name in names}
    return sorted(name for name in names if like[name] == name or like[name] not in names)


@pytest.mark.slow
def test_every_kernel_compiles_for_all_chips(cache: Path) -> None:
    """For one chip all, those among them that are not in the report yet; the others share one of every kind.

    ``python -m benchmarks.kernel_report --check`` compiles everything for every chip, in three times as long.
    """
    kinds = distinct()
    assert len(kinds) > 40
    check(cache, "--chips", "90")
    for number, chip in enumerate(("80", "100", "120")):
        check(cache, "--chips", chip, *(word for name in kinds[number::3] for word in ("--only", name)))
