"""Launch configurations are pure functions, and every one of them compiles without a GPU."""

import os
import subprocess
import sys

import pytest
import torch
from fastssl.kernels import config, launch

COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from fastssl.kernels import aot
chip, names = int(sys.argv[1]), sys.argv[2:]
found = {v.name: v for v in aot.variants(chip)}
assert len(found) < 70, len(found)  # seconds each, for every chip
for name in names:
    v = found[name]
    compiled = triton.compile(v.source(), target=GPUTarget("cuda", chip, 32), options=v.options)
    print(name, compiled.metadata.shared, any(s in compiled.asm["ptx"] for s in ("mma.sync", "wgmma", "tcgen05.mma")))
"""


FAMILIES = {
    80: [(8, 0), (8, 7)],
    90: [(9, 0)],
    100: [(10, 0), (10, 3)],
    120: [(8, 6), (8, 9), (12, 0), (12, 1), (13, 0)],
}


@pytest.mark.parametrize(("capability", "family"), [(c, family) for family in FAMILIES for c in FAMILIES[family]])
def test_chips(capability: tuple[int, int], family: int) -> None:
    assert config.family(*capability) == family


def test_the_queue_of_moco_fills_an_h100_in_one_wave() -> None:
    chip = config.Chip(90, 132)
    tile = config.split_tile(chip, 128, "half", normalized=True)
    row_blocks = 256 // tile.rows
    assert row_blocks * config.splits(chip, row_blocks, 65536, tile) == 128  # 132 would have as many tiles each


@pytest.mark.parametrize("family", config.MULTIPROCESSORS)
@pytest.mark.parametrize("dim", [1, 16, 17, 128, 200, 256, 257, 4096])
def test_tiles_are_valid(family: int, dim: int) -> None:
    chip = config.Chip(family, config.MULTIPROCESSORS[family])
    for kind in ("half", "tf32", "tf32x3"):
        for tile in (config.split_tile(chip, dim, kind, True), config.negatives_tile(chip, dim, kind)):
            assert all(n >= 16 and n & (n - 1) == 0 for n in tile[:4])
            assert tile.product <= tile.dim <= config.WIDEST
        for columns in (0, 1, 1000, 10**9):
            assert 1 <= config.splits(chip, 3, columns, tile) <= max(1, chip.multiprocessors)


def test_float32_precision_follows_torch() -> None:
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("torch has only allow_tf32")
    before = matmul.fp32_precision
    try:
        for setting, expected in (("tf32", "tf32"), ("ieee", "tf32x3")):
            matmul.fp32_precision = setting
            assert launch.precision() == expected
    finally:
        matmul.fp32_precision = before


@pytest.mark.slow
@pytest.mark.parametrize("chip", [80, 90, 100, 120])
def test_compiles_for_a_chip_that_is_not_here(chip: int) -> None:
    names = ["split bf16 queue 128", "split tf32x3 64", "negatives fp16 128", "combine bf16 queue 128"]
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, str(chip), *names]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    limit = {80: 163, 90: 227, 100: 227, 120: 99}[chip] * 1024
    for line in done.stdout.splitlines():
        name, shared, tensor_cores = line.rsplit(" ", 2)
        assert int(shared) <= limit, line
        assert tensor_cores == str(not name.startswith("combine")), line
