"""Augmentation recipes: the published ones, and what is refused."""

from pathlib import Path

import pytest

from fastssl import ops
from fastssl.data import augmentation as aug
from fastssl.errors import FastsslError
from fastssl.ops.photometric import Step


def step(view: aug.View, kind: type[Step]) -> Step:
    [found] = [s for s in view.steps if isinstance(s, kind)]
    return found


def test_moco_v1_is_the_published_one() -> None:
    one, other = aug.load("moco_v1").views
    assert one == other
    assert one == aug.View(
        224,
        (
            aug.RandomResizedCrop((0.2, 1.0)),
            ops.Grayscale(0.2),
            ops.ColorJitter(0.4, 0.4, 0.4, 0.4, p=1.0),
            aug.HorizontalFlip(0.5),
        ),
    )


def test_moco_v2_is_the_published_one() -> None:
    one, other = aug.load("moco_v2").views
    assert one == other
    assert one.steps == (
        aug.RandomResizedCrop((0.2, 1.0)),
        ops.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        ops.Grayscale(0.2),
        ops.GaussianBlur((0.1, 2.0), kernel_size=0, p=0.5),
        aug.HorizontalFlip(0.5),
    )


def test_byol_is_the_published_one() -> None:
    t, t_prime = aug.load("byol").views
    common = (
        aug.RandomResizedCrop((0.08, 1.0), interpolation="bicubic"),
        aug.HorizontalFlip(0.5),
        ops.ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8),
        ops.Grayscale(0.2),
    )
    assert t.steps == (*common, ops.GaussianBlur((0.1, 2.0), kernel_size=23, p=1.0))
    assert t_prime.steps == (*common, ops.GaussianBlur((0.1, 2.0), kernel_size=23, p=0.1), ops.Solarize(0.5, p=0.2))


@pytest.mark.parametrize("name", aug.names())
def test_every_shipped_augmentation_has_two_views(name: str) -> None:
    assert len(aug.load(name).views) == 2


VIEW = "views: [{size: 32, steps: [%s]}]"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("views: [", "not YAML"),
        ("[1]", "must be a mapping"),
        ("view: []", "unknown key 'view'"),
        ("views: []", "at least one"),
        ("views: [{size: big}]", "'big'"),
        ("views: [{size: 32, mean: [1]}]", r"mean must be three numbers"),
        (VIEW % "{spin: {}}", "unknown step 'spin'; known are color_jitter"),
        (VIEW % "{grayscale: {q: 1}}", "unknown key 'q' in grayscale"),
        (VIEW % "{grayscale: {p: 2}}", "p must lie in 0…1, got 2"),
        (VIEW % "{grayscale: {p: often}}", "'often'"),
        (VIEW % "{random_resized_crop: {area: [1, 0.2]}}", "low <= high"),
        (VIEW % "{random_resized_crop: {interpolation: nearest}}", "'nearest'"),
        (VIEW % "{gaussian_blur: {kernel_size: 4}}", "odd"),
        (VIEW % "{gaussian_blur: {kernel_size: abc}}", "kernel_size must be a whole number, got 'abc'"),
        (VIEW % "{color_jitter: {brightness: .nan}}", "brightness must be a number, got nan"),
        (VIEW % "{grayscale: {p: true}}", "p must be a number, got True"),
        ("views: [{size: 32, std: [1, 0, 1]}]", "std must be above 0"),
        (VIEW % "{color_jitter: {hue: 0.9}}", "0.9"),
        (VIEW % "{random_shift: {pixels: 0}}", "pixels"),
        (VIEW % "grayscale", "name: {...}"),
    ],
)
def test_what_is_wrong_is_named(text: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(FastsslError, match=named):
        aug.load(str(path))


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(FastsslError, match=r"'moco_v9'.*moco_v2"):
        aug.load("moco_v9")
