"""Augmentation recipes as data: what is done to an image, in which order.

DALI and `augment_` execute them (`dali_loader`), or torchvision (`per_image`).
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import yaml

from fastssl.errors import FastsslError
from fastssl.ops.augment import IMAGENET_MEAN, IMAGENET_STD
from fastssl.ops.photometric import PHOTOMETRIC, Range, Step, check_steps, is_number

FOLDER = Path(__file__).parent / "augmentations"


@dataclass(frozen=True)
class RandomResizedCrop(Step):
    """Crop a random rectangle and resize it to the view's size (Inception-style)."""

    name: ClassVar[str] = "random_resized_crop"
    area: Range = (0.2, 1.0)  # of the image
    aspect: Range = (3 / 4, 4 / 3)  # width / height
    interpolation: str = "bilinear"  # or bicubic; antialiased

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.interpolation not in ("bilinear", "bicubic"):
            raise FastsslError(f"{self.name}: interpolation must be bilinear or bicubic, got {self.interpolation!r}")


@dataclass(frozen=True)
class RandomShift(Step):
    """Move the image by up to `pixels` along each axis, black flowing in; the image already has the view's size."""

    name: ClassVar[str] = "random_shift"
    pixels: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pixels < 1:
            raise FastsslError(f"{self.name}: pixels must be 1 or more, got {self.pixels!r}")


@dataclass(frozen=True)
class HorizontalFlip(Step):
    """Mirror left and right."""

    name: ClassVar[str] = "horizontal_flip"
    p: float = 0.5


GEOMETRIC: tuple[type[Step], ...] = (RandomResizedCrop, RandomShift, HorizontalFlip)
STEPS: dict[str, type[Step]] = {step.name: step for step in (*GEOMETRIC, *PHOTOMETRIC)}


@dataclass(frozen=True)
class View:
    """How one view of an image is made: size x size pixels, the steps in order, then (x - mean) / std."""

    size: int
    steps: tuple[Step, ...]
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    @property
    def crops(self) -> bool:
        """Whether a random crop brings images to the view's size; otherwise they are resized first."""
        return any(isinstance(step, RandomResizedCrop) for step in self.steps)

    @property
    def geometry(self) -> tuple[Step, ...]:
        """Crop, shift and flip, which are done first: the rest neither sees where a pixel lies nor prefers a side.

        Raises:
            FastsslError: a crop or a shift follows what it would change, or a kind of step comes twice.
        """
        steps = tuple(step for step in self.steps if isinstance(step, GEOMETRIC))
        if len({type(step) for step in steps}) < len(steps):
            raise FastsslError("the dali loader does each kind of step once: use --loader torchvision")
        # A flip may come anywhere.
        rank = {RandomResizedCrop: 0, RandomShift: 1}
        ranks = [rank.get(type(step), 2) for step in self.steps if not isinstance(step, HorizontalFlip)]
        if ranks != sorted(ranks):
            raise FastsslError(
                "the dali loader does random_resized_crop, then random_shift, then what changes colours: "
                "order the steps so, or use --loader torchvision"
            )
        return steps

    @property
    def photometric(self) -> tuple[Step, ...]:
        """Colours, blur and erasing, in order: what `augment_` does.

        Raises:
            FastsslError: a kind of step comes twice.
        """
        steps = tuple(step for step in self.steps if isinstance(step, PHOTOMETRIC))
        check_steps(steps)
        return steps

    @property
    def evaluation(self) -> "View":
        """The same size and normalisation with nothing random: for kNN and retrieval."""
        return View(self.size, (), self.mean, self.std)


@dataclass(frozen=True)
class Augmentation:
    """A list of views of each image: two for MoCo and BYOL."""

    views: tuple[View, ...]


def short_side(shape: tuple[int, ...], size: int) -> int:
    """To what the short side is resized before the centre crop; one that fits stays."""
    return size if min(shape[-2:]) == size else margin_around(size)


def margin_around(size: int) -> int:
    """The short side of an image of which the centre is cropped: 256 for 224, as on ImageNet."""
    return round(size * 8 / 7)


def names() -> list[str]:
    """The augmentations that ship with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(name: str) -> Augmentation:
    """Read a shipped augmentation by name, or a YAML file by path.

    Raises:
        FastsslError: no such name or file; an unknown key; a value of the wrong type or out of range.
    """
    path = FOLDER / f"{name}.yaml"
    if not path.exists():
        path = Path(name)
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        raise FastsslError(f"unknown augmentation '{name}': give a YAML file or one of {', '.join(names())}")
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FastsslError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    try:
        return parse(content)
    except FastsslError as error:
        raise FastsslError(f"{path}: {error}") from None


def parse(content: Any) -> Augmentation:
    """Build an Augmentation from what YAML gave: {views: [{size, steps: [{step: {...}}], mean, std}]}."""
    keys = _mapping(content, "the augmentation", {"views"})
    views = keys.get("views")
    if not isinstance(views, list) or not views:
        raise FastsslError("an augmentation needs `views`, a list of at least one view")
    return Augmentation(tuple(_view(view) for view in views))


def _view(content: Any) -> View:
    keys = _mapping(content, "a view", {field.name for field in fields(View)})
    size, steps = keys.pop("size", None), keys.pop("steps", [])
    if not is_number(size, whole=True) or size < 1:
        raise FastsslError(f"a view's size must be a whole number of pixels, got {size!r}")
    if not isinstance(steps, list):
        raise FastsslError(f"a view's steps must be a list, got {steps!r}")
    for name, value in keys.items():
        if not (isinstance(value, list) and len(value) == 3 and all(map(is_number, value))):
            raise FastsslError(f"a view's {name} must be three numbers, got {value!r}")
        if name == "std" and min(value) <= 0:
            raise FastsslError(f"a view's std must be above 0, got {value!r}")
    return View(size, tuple(_step(step) for step in steps), **{name: tuple(value) for name, value in keys.items()})


def _step(content: Any) -> Step:
    if not isinstance(content, dict) or len(content) != 1:
        raise FastsslError(f"a step must be written `name: {{...}}`, got {content!r}")
    [(name, parameters)] = content.items()
    if name not in STEPS:
        raise FastsslError(f"unknown step '{name}'; known are {', '.join(sorted(STEPS))}")
    kind = STEPS[name]
    return kind(**_mapping(parameters or {}, name, {field.name for field in fields(kind)}))


def _mapping(content: Any, what: str, known: set[str]) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise FastsslError(f"{what} must be a mapping, got {content!r}")
    for key in content:
        if key not in known:
            raise FastsslError(f"unknown key '{key}' in {what}; known are {', '.join(sorted(known))}")
    return dict(content)
