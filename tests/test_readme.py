"""The code of the README and of the augmentation page runs as it is printed."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
BLOCKS = [
    block
    for name in ("README.md", "docs/augmentation.md")
    for block in re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)
]


@pytest.mark.parametrize("block", BLOCKS)
def test_code_runs(block: str) -> None:
    names = {
        "query": torch.randn(8, 128, requires_grad=True), "key": torch.randn(8, 128),
        "key_encoder": nn.Linear(4, 2), "query_encoder": nn.Linear(4, 2),
    }  # fmt: skip
    exec(block, names)


def test_the_loop_is_ten_lines() -> None:
    loop = next(block for block in BLOCKS if "after_step" in block)
    assert len([line for line in loop.splitlines() if line.strip() and "import" not in line]) <= 10
