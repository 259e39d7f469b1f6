"""The measures against hand-written formulas, and the report's parts."""

import base64
import io
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from fastssl.data import augmentation as aug
from fastssl.data.sources import ArrayImages, Source, open_source
from fastssl.errors import FastsslError
from fastssl.evaluation.evaluator import Evaluator
from fastssl.evaluation.features import extract, raw_pixels
from fastssl.evaluation.knn import knn_accuracy
from fastssl.evaluation.report import NEIGHBOURS, curve, neighbours, percent, thumbnail
from fastssl.evaluation.retrieval import retrieval_accuracy

CPU = torch.device("cpu")


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (5, 0.07), (20, 1.0), (99, 0.1)])
def test_knn_is_the_weighted_vote(k: int, temperature: float, generator: torch.Generator) -> None:
    bank, queries = (F.normalize(torch.randn(n, 4, generator=generator), dim=1) for n in (30, 17))
    labels, wanted = (torch.randint(3, (n,), generator=generator) for n in (30, 17))
    correct = 0
    for query, label in zip(queries, wanted, strict=True):
        cosines = [float(query @ row) for row in bank]
        votes = [0.0, 0.0, 0.0]
        for i in sorted(range(30), key=lambda i: -cosines[i])[:k]:
            votes[labels[i]] += math.exp(cosines[i] / temperature)
        correct += votes.index(max(votes)) == label
    got = knn_accuracy(bank, labels, queries, wanted, k=k, temperature=temperature, chunk=5)
    assert got == correct / 17


def test_knn_does_not_overflow_at_small_temperatures() -> None:
    bank = torch.eye(3)
    assert knn_accuracy(bank, torch.arange(3), bank, torch.arange(3), temperature=1e-3) == 1


def test_knn_refuses_nothing() -> None:
    rows, labels = torch.eye(2), torch.arange(2)
    for bank, k, temperature in ((rows[:0], 1, 0.1), (rows, 0, 0.1), (rows, 1, 0.0)):
        with pytest.raises(FastsslError):
            knn_accuracy(bank, labels[: len(bank)], rows, labels, k=k, temperature=temperature)


def test_retrieval_counts_what_finds_its_source() -> None:
    originals = torch.eye(4)
    augmented = originals[[0, 1, 3, 3]]
    assert retrieval_accuracy(augmented, originals, chunk=3) == 0.75
    with pytest.raises(FastsslError):
        retrieval_accuracy(augmented[:2], originals)


def test_features_are_unit_rows_in_evaluation_mode() -> None:
    backbone = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Dropout(0.5))
    batches = [torch.randn(3, 3, 2, 2), torch.randn(2, 3, 2, 2)]
    before = backbone[1].running_mean.clone()  # type: ignore[operator]
    features = extract(backbone, batches)
    assert torch.allclose(features.norm(dim=1), torch.ones(5))
    assert torch.equal(features, extract(backbone, batches))
    assert torch.equal(before, backbone[1].running_mean)  # type: ignore[arg-type]
    assert backbone.training


def test_raw_pixels_shrink_large_images() -> None:
    assert raw_pixels([torch.rand(2, 3, 64, 64)]).shape == (2, 3 * 32 * 32)


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    """600 images to train on and 200 held out of the embedded ones."""
    source = open_source("embedded")
    assert source.test is not None
    train = source.train.subset(torch.arange(0, 8000, 13))
    test = source.test.subset(torch.arange(0, 2000, 10))
    return Evaluator(Source("part", train, test), aug.load("demo"), CPU, k=20)


def test_raw_pixels_are_a_strong_baseline_for_classes_and_a_weak_one_for_instances(evaluator: Evaluator) -> None:
    measures = evaluator.measure(None)
    assert measures.knn is not None
    assert measures.retrieval is not None
    assert 0.6 < measures.knn < 0.9
    assert measures.retrieval < 0.5
    assert evaluator.measure(None) == measures  # the augmented views are always the same


def test_what_cannot_be_measured_says_why(evaluator: Evaluator) -> None:
    train, test = evaluator.source.train, evaluator.source.test
    assert isinstance(train, ArrayImages)
    no_test = Evaluator(Source("x", train, None), evaluator.augmentation, CPU)
    no_labels = Evaluator(Source("x", ArrayImages(train.pixels, None), test), evaluator.augmentation, CPU)
    assert "--holdout" in (no_test.cannot_knn or "")
    assert "labels" in (no_labels.cannot_knn or "")
    assert no_test.knn(None) is None
    assert no_test.retrieval(None) is None
    assert no_labels.knn(None) is None
    assert no_labels.retrieval(None) is not None


def test_the_grid_shows_other_images_and_their_classes(evaluator: Evaluator) -> None:
    rows = neighbours(evaluator, nn.Flatten())
    assert all(len(row) == 1 + NEIGHBOURS for row in rows)
    for query, *found in rows:
        assert query.correct is None
        assert query.image not in {cell.image for cell in found}
        assert all(cell.correct == (cell.caption.split()[1] == query.caption) for cell in found)


def test_thumbnails_are_pictures(image_folder: Path) -> None:
    images = open_source(str(image_folder)).train
    data = base64.b64decode(thumbnail(images, 0).removeprefix("data:image/png;base64,"))
    assert Image.open(io.BytesIO(data)).size == (32, 32)


def test_curves_hold_what_was_measured() -> None:
    rows = [{"epoch": 0.0, "knn": 0.3}, {"epoch": 1.0, "loss": 5.0}, {"epoch": 1.0, "knn": 0.4}]
    assert curve(rows, "knn", "accuracy").startswith("<svg")
    assert curve(rows, "lr", "learning rate") == ""
    assert (percent(0.1234), percent(None)) == ("12.3%", "–")
