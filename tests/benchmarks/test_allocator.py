"""Blocks up to 32 MiB are kept when they are freed, larger ones given back; without it most of both are."""

import platform
import subprocess
import sys

import pytest

KEPT = """
import resource, torch
from benchmarks.allocator import fix_thresholds
{fix}
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20
def kept(mib):  # of six blocks
    before = resident()
    blocks = [torch.ones(mib * 2**18) for _ in range(6)]
    assert resident() - before > 5 * mib
    blocks.clear()
    return resident() - before
print(kept(48), kept(16))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has other rules")
@pytest.mark.parametrize("fixed", [True, False])
def test_which_blocks_a_process_keeps(fixed: bool) -> None:
    code = KEPT.format(fix="fix_thresholds()" if fixed else "")
    large, small = map(float, subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert large < 16  # MiB of 288
    assert small > 80 if fixed else small < 48  # of 96
