"""What all tests share: two threads at most, and a folder of small images."""

import os
from pathlib import Path

import pytest
import torch
from PIL import Image

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton or fastssl is imported

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)  # of as many processes as there are cores


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """train/ and val/ with 12 and 6 images of two classes, 32×32."""
    draw = torch.Generator().manual_seed(0)
    for split, count in (("train", 12), ("val", 6)):
        for index in range(count):
            folder = tmp_path / "images" / split / ("cat", "dog")[index % 2]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(256, (32, 32, 3), generator=draw, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / f"{index:02d}.png")
    return tmp_path / "images"
