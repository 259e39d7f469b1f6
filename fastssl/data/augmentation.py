"""Augmentation recipes as data: what is done to an image, in which order; `per_image` and `batched` execute it."""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import yaml

from fastssl.errors import FastsslError

FOLDER = Path(__file__).parent / "augmentations"
Range = tuple[float, float]


def _is_number(value: object, whole: bool = False) -> bool:
    """A finite number; True and False, which Python counts as numbers, are none."""
    kinds = int if whole else (int, float)
    return isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Step:
    """One random operation; sub-classes list its parameters in the field's usual units."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                object.__setattr__(self, field.name, tuple(value))
            if field.type in (float, int) and not _is_number(value, whole=field.type is int):
                kind = "a whole number" if field.type is int else "a number"
                raise FastsslError(f"{self.name}: {field.name} must be {kind}, got {value!r}")
        for name in ("area", "aspect", "sigma"):
            self._check_range(name)
        p = getattr(self, "p", 1.0)
        if not 0 <= p <= 1:
            raise FastsslError(f"{self.name}: p must lie in 0…1, got {p!r}")

    def _check_range(self, name: str) -> None:
        bounds = getattr(self, name, (1.0, 1.0))
        numbers = isinstance(bounds, tuple) and len(bounds) == 2 and all(map(_is_number, bounds))
        if not numbers or not 0 < bounds[0] <= bounds[1]:
            raise FastsslError(f"{self.name}: {name} must be [low, high] with 0 < low <= high, got {bounds!r}")


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


@dataclass(frozen=True)
class ColorJitter(Step):
    """torchvision's ColorJitter: factors from 1±x (hue: ±x of a turn), the four in random order."""

    name: ClassVar[str] = "color_jitter"
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    p: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("brightness", "contrast", "saturation"):
            if getattr(self, field) < 0:
                raise FastsslError(f"{self.name}: {field} must be 0 or more, got {getattr(self, field)!r}")
        if not 0 <= self.hue <= 0.5:
            raise FastsslError(f"{self.name}: hue must lie in 0…0.5, got {self.hue!r}")


@dataclass(frozen=True)
class Grayscale(Step):
    """Replace the colours by their luma, keeping three channels."""

    name: ClassVar[str] = "grayscale"
    p: float = 0.2


@dataclass(frozen=True)
class GaussianBlur(Step):
    """Blur with sigma drawn uniformly, in pixels.

    kernel_size 0 is PIL's GaussianBlur(radius=sigma), three box blurs, as in MoCo v2's code; an odd number is a true
    Gaussian cut to so many taps, as in BYOL's (23 at 224 pixels).
    """

    name: ClassVar[str] = "gaussian_blur"
    sigma: Range = (0.1, 2.0)
    kernel_size: int = 0
    p: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel_size != 0 and (self.kernel_size < 3 or self.kernel_size % 2 == 0):
            raise FastsslError(f"{self.name}: kernel_size must be 0 (PIL) or odd and >= 3, got {self.kernel_size!r}")


@dataclass(frozen=True)
class Solarize(Step):
    """Invert every value at or above the threshold (of 1)."""

    name: ClassVar[str] = "solarize"
    threshold: float = 0.5
    p: float = 0.2


@dataclass(frozen=True)
class RandomErasing(Step):
    """Blacken a random rectangle; aspect is height / width here, as in torchvision."""

    name: ClassVar[str] = "random_erasing"
    area: Range = (0.02, 0.2)
    aspect: Range = (0.3, 3.3)
    p: float = 0.5


STEPS: dict[str, type[Step]] = {step.name: step for step in Step.__subclasses__()}


@dataclass(frozen=True)
class View:
    """How one view of an image is made: size x size pixels, the steps in order, then (x - mean) / std."""

    size: int
    steps: tuple[Step, ...]
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    @property
    def crops(self) -> bool:
        """Whether a random crop brings images to the view's size; otherwise they are resized first."""
        return any(isinstance(step, RandomResizedCrop) for step in self.steps)

    @property
    def evaluation(self) -> "View":
        """The same size and normalisation with nothing random: for kNN and retrieval."""
        return View(self.size, (), self.mean, self.std)


@dataclass(frozen=True)
class Augmentation:
    """A list of views of each image: two for MoCo and BYOL."""

    views: tuple[View, ...]


def short_side(shape: tuple[int, ...], size: int) -> int:
    """To what the short side is resized before the centre crop: 256 for 224, as on ImageNet; a fitting one stays."""
    return size if min(shape[-2:]) == size else round(size * 8 / 7)


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
    if not _is_number(size, whole=True) or size < 1:
        raise FastsslError(f"a view's size must be a whole number of pixels, got {size!r}")
    if not isinstance(steps, list):
        raise FastsslError(f"a view's steps must be a list, got {steps!r}")
    for name, value in keys.items():
        if not (isinstance(value, list) and len(value) == 3 and all(map(_is_number, value))):
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
