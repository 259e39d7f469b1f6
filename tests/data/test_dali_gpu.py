"""DALI on a GPU: the views of the CPU's pipeline but for rounding, exact resumes, and damaged images by name."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI")

from fastssl.data import augmentation as aug
from fastssl.data.dali_loader import DaliLoader
from fastssl.data.loading import Loading
from fastssl.data.order import Order
from fastssl.data.sources import Images, open_source
from fastssl.errors import DataError
from tests.data.test_dali_loader import arrays, save_jpegs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
BATCH, STEPS = 16, 3
LEVEL = 1 / 255 / 0.225  # of a pixel, once it is normalised


def views_of(images: Images, recipe: str, color: str, device: str, start: int = 0) -> list[list[Tensor]]:
    options = Loading("dali", color, torch.device(device), seed=3)
    loader = DaliLoader(images, aug.load(recipe).views, Order(BATCH * STEPS, BATCH, seed=3), options)
    found = [[view.float().cpu() for view in batch] for batch in loader.batches(1, start)]
    assert len(found) == STEPS - start
    return found


@pytest.mark.parametrize("color", ["exact", "dali"])
@pytest.mark.parametrize("encoded", [False, True])
@pytest.mark.parametrize("recipe", ["moco_v2", "byol"])
def test_the_views_are_those_of_the_cpu(recipe: str, encoded: bool, color: str, tmp_path: Path) -> None:
    # The decoders differ a little, more where the GPU repeats chroma.
    allowed = 1 if not encoded else 2 if color == "exact" else 8
    count = BATCH * STEPS
    images: Images = open_source(str(save_jpegs(tmp_path, count))).train if encoded else arrays(count)
    for ours, theirs in zip(*(views_of(images, recipe, color, device) for device in ("cuda", "cpu")), strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert one.shape == other.shape == (BATCH, 3, 224, 224)
            assert (one - other).abs().mean() < allowed * LEVEL
            assert one.std() > 0.2


def test_the_rest_of_an_epoch_is_the_same(tmp_path: Path) -> None:
    images = open_source(str(save_jpegs(tmp_path, BATCH * STEPS))).train
    whole, rest = (views_of(images, "moco_v2", "exact", "cuda", start) for start in (0, 1))
    for one, other in zip(whole[1:], rest, strict=True):
        assert all(map(torch.equal, one, other))


def test_a_damaged_image_is_named(tmp_path: Path) -> None:
    root = save_jpegs(tmp_path, BATCH * STEPS)
    (root / "a" / "0008.jpg").write_bytes((root / "a" / "0008.jpg").read_bytes()[:300])
    (root / "b" / "0009.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"000[89]\.jpg"):
        views_of(open_source(str(root)).train, "moco_v2", "exact", "cuda")
