"""What the C++ kernel of augment_ adds: a chain in one pass, blurs by bands, vectors with rests, threads, bare tensors.

Between operations there are whole numbers. So all operations at once must give, bit for bit, what they give one after
the other; and each alone what the reference gives, but for numbers that are cut off on the other side because a hue or
a blur was computed in another order.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastssl import _extension
from fastssl.ops import (
    ColorJitter,
    GaussianBlur,
    Grayscale,
    RandomErasing,
    Solarize,
    augment_,
    blur,
    photometric,
    use_backend,
)
from fastssl.ops.photometric import COLUMNS, JITTER_ORDERS, NEUTRAL, PHOTOMETRIC, Step

pytestmark = pytest.mark.skipif(_extension.missing() is not None, reason="the extension is missing")

PIL, WIDE = GaussianBlur((0.1, 2.0)), GaussianBlur((0.1, 2.0), 23)
STEPS: tuple[Step, ...] = (ColorJitter(1, 1, 1, 0.5), Grayscale(), PIL, Solarize(), RandomErasing())
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def pictures(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """Bytes at random; greys, black and white among them."""
    images = torch.randint(256, (count, height, width, 3), generator=generator, dtype=torch.uint8)
    images[::3, ::2] = images[::3, ::2, :, :1]
    images[1::3, :, ::3] = images[1::3, :, ::3] // 128 * 255
    return images


def table(count: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Parameters of all kinds, each neutral in a third of the images."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    height, width = size
    columns = {
        "brightness": uniform(0, 2),
        "contrast": uniform(0, 2),
        "saturation": uniform(0, 2),
        "hue": uniform(-0.5, 0.5),
        "order": uniform(0, 24).floor(),
        "grayscale": torch.ones(count),
        "sigma": uniform(0.1, 2),
        "threshold": uniform(-0.1, 1),
        "top": uniform(-2, height).round(),
        "left": uniform(-2, width).round(),
        "height": uniform(0, height + 2).round(),
        "width": uniform(0, width + 2).round(),
    }
    drawn = torch.stack([columns[name] for name in COLUMNS], 1)
    return torch.where(torch.rand(drawn.shape, generator=generator) < 1 / 3, torch.tensor(NEUTRAL), drawn)


def plain(images: Tensor, steps: Sequence[Step], parameters: Tensor, backend: str = "native", **others: Any) -> Tensor:
    """Numbers of 0…255, not normalised."""
    arguments: dict[str, Any] = {"mean": (0,) * 3, "std": (1 / 255,) * 3} | others
    with use_backend(backend):
        return augment_(images.clone(), steps, parameters, **arguments)


def one_by_one(steps: Sequence[Step], parameters: Tensor) -> Iterator[tuple[list[Step], Tensor]]:
    """The same as operations one after the other; of the jitter one part at a time, an image's own."""
    for step in steps:
        if not isinstance(step, ColorJitter):
            yield [step], parameters
            continue
        orders = torch.tensor(JITTER_ORDERS)[parameters[:, COLUMNS.index("order")].long()]  # N×4
        for position in range(4):
            alone = torch.tensor(NEUTRAL).repeat(len(parameters), 1)
            part = orders[:, position : position + 1]
            yield [step], alone.scatter(1, part, parameters.gather(1, part))


def check(images: Tensor, steps: Sequence[Step], parameters: Tensor) -> None:
    at_once = plain(images, steps, parameters)
    for step, alone in one_by_one(steps, parameters):
        ours, theirs = (plain(images, step, alone, backend) for backend in ("native", "reference"))
        off = (ours - theirs).abs().round()
        turned = alone[:, COLUMNS.index("hue")].any() or isinstance(step[0], GaussianBlur)
        assert off.max() <= turned, (step, tuple(images.shape))
        assert off.sum() <= max(3, off.numel() // 1000), (step, tuple(images.shape), off.sum())
        images = ours.permute(0, 2, 3, 1).byte().contiguous()
        assert torch.equal(images.permute(0, 3, 1, 2).float(), ours)
    assert torch.equal(at_once, images.permute(0, 3, 1, 2).float()), (steps, tuple(images.shape))


SIDES = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 129, 500]))


@settings(deadline=None, max_examples=200, database=None)
@given(
    steps=st.permutations(STEPS),
    length=st.integers(0, 5),
    wide=st.booleans(),
    count=st.integers(1, 5),
    height=SIDES,
    width=SIDES,
    seed=st.integers(0, 2**32),
)
def test_equals_the_reference(
    steps: list[Step], length: int, wide: bool, count: int, height: int, width: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    kernel = WIDE if wide and min(height, width) > 11 else PIL
    chosen = [kernel if step is PIL else step for step in steps[:length]]
    check(pictures(count, height, width, generator), chosen, table(count, (height, width), generator))


@pytest.mark.parametrize("size", [(1, 1), (1, 400), (400, 1), (7, 1200), (2, 2), (12, 13), (13, 12), (224, 224)])
@pytest.mark.parametrize("kernel", [PIL, GaussianBlur((0.1, 9.0)), GaussianBlur((0.1, 2.0), 3), WIDE])
def test_sizes_and_kernels(size: tuple[int, int], kernel: GaussianBlur, generator: torch.Generator) -> None:
    if kernel.kernel_size // 2 >= min(size):
        pytest.skip("refused by augment_")
    parameters = table(4, size, generator)
    parameters[:, COLUMNS.index("sigma")] = torch.tensor([0.1, 0.6, 2.0, kernel.sigma[1]])
    check(pictures(4, *size, generator), [ColorJitter(), kernel, Solarize()], parameters)


def test_every_order_of_the_jitter(generator: torch.Generator) -> None:
    parameters = table(24, (9, 11), generator)
    parameters[:, :4] = torch.tensor([1.3141, 0.5926, 1.7979, -0.2384])
    parameters[:, COLUMNS.index("order")] = torch.arange(24.0)
    check(pictures(24, 9, 11, generator), [ColorJitter()], parameters)


def test_jitter_after_a_blur(generator: torch.Generator) -> None:
    check(pictures(9, 33, 70, generator), [PIL, ColorJitter(), RandomErasing()], table(9, (33, 70), generator))


@pytest.mark.parametrize("dtype", HALF)
def test_halves_are_the_rounded_floats(dtype: torch.dtype, generator: torch.Generator) -> None:
    for size in ((1, 1), (5, 7), (33, 65)):
        images, parameters = pictures(6, *size, generator), table(6, size, generator)
        normal: dict[str, Any] = {"mean": (0.4, 0.5, 0.6), "std": (1e-3, 0.2, 1e3)}  # large, usual and subnormal ones
        for steps in (STEPS, STEPS[3:]):
            floats = plain(images, steps, parameters, **normal)
            assert torch.equal(plain(images, steps, parameters, dtype=dtype, **normal), floats.to(dtype))


@pytest.mark.usefixtures("threads")
def test_threads_do_not_matter(generator: torch.Generator) -> None:
    images, parameters = pictures(13, 40, 50, generator), table(13, (40, 50), generator)
    results = []
    for count in (1, 2, 3, 8, 20):
        torch.set_num_threads(count)
        results.append(plain(images, STEPS, parameters))
    alone = torch.cat([plain(images[i : i + 1], STEPS, parameters[i : i + 1]) for i in range(13)])
    assert all(torch.equal(result, alone) for result in results)


def bare(
    images: Tensor, out: Tensor, parameters: Tensor, steps: Sequence[Step], others: dict[str, Any] | None = None
) -> None:
    """The op itself, with `others` in the place of what belongs there."""
    sigma = parameters[:, COLUMNS.index("sigma")]
    rows, columns = (blur.table(PIL, sigma, side) for side in images.shape[1:3])
    arguments = {
        "images": images,
        "out": out,
        "parameters": parameters,
        "blur_rows": rows,
        "blur_columns": columns,
        "steps": [PHOTOMETRIC.index(type(step)) for step in steps],
        "mean": [0.0] * 3,
        "std": [1 / 255] * 3,
    }
    torch.ops.fastssl.augment_native(*(arguments | (others or {})).values())


def empty_like(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    count, height, width, _ = images.shape
    return torch.full((count, height, width, 3), math.nan, dtype=dtype).permute(0, 3, 1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (16, 16), (21, 67)])
def test_nothing_around_is_read_or_written(
    size: tuple[int, int], dtype: torch.dtype, generator: torch.Generator
) -> None:
    images, parameters = pictures(3, *size, generator), table(3, size, generator)
    for steps in (STEPS, STEPS[:2], STEPS[2:], ()):
        expected = plain(images, steps, parameters, dtype=dtype)
        for margin in (64, 67):  # aligned and not
            for surroundings in (0, 255):
                within = torch.full((images.numel() + 2 * margin,), surroundings, dtype=torch.uint8)
                given = within[margin : margin + images.numel()].view_as(images).copy_(images)
                buffer = torch.full((images.numel() + 2 * margin,), math.nan, dtype=dtype)
                out = buffer[margin : margin + images.numel()].view(images.shape).permute(0, 3, 1, 2)
                bare(given, out, parameters, steps)
                assert torch.equal(out, expected)
                assert buffer[:margin].isnan().all()
                assert buffer[-margin:].isnan().all()
                assert torch.equal(given, images)
                assert (within[:margin] == surroundings).all()
                assert (within[-margin:] == surroundings).all()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_neutral_parameters_only_normalise(dtype: torch.dtype, generator: torch.Generator) -> None:
    images = pictures(4, 19, 45, generator)
    neutral = torch.tensor(NEUTRAL).repeat(4, 1)
    with use_backend("native"):
        expected = augment_(images, (), dtype=dtype)
        assert torch.equal(augment_(images, STEPS, neutral, dtype=dtype), expected)
    close = (images.permute(0, 3, 1, 2).double() / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / (
        torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    )
    assert (expected - close).abs().max() <= {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 99.0, -99.0, 1e30, -1e30])
def test_parameters_out_of_their_range(value: float, generator: torch.Generator) -> None:
    """Whatever comes out, nothing breaks; and what is none the less defined is right."""
    images = pictures(2, 20, 30, generator)
    for index, name in enumerate(COLUMNS):
        parameters = torch.tensor(NEUTRAL).repeat(2, 1)
        parameters[:, :4] = torch.tensor([1.3141, 0.5926, 1.7979, 0.2384])
        parameters[:, -2:] = 5
        parameters[1, index] = value
        out = empty_like(images)
        steps = [step for step in STEPS if step is not PIL]
        bare(images, out, parameters, steps)
        assert torch.equal(out[0], plain(images[:1], steps, parameters[:1])[0])
        if name == "order":
            parameters[1, index] = 23 if value > 0 else 0
        if name in ("order", "threshold", "top", "left", "height", "width"):
            check(images, steps, parameters)
        everything = torch.full_like(parameters, value)
        bare(images, out, everything, STEPS)
        broken = torch.full((2, 13, 13), value)
        bare(
            images,
            out,
            photometric.draw_augmentation([PIL], 2, (20, 30)),
            STEPS,
            {"blur_rows": broken, "blur_columns": broken},
        )


IMAGES, PARAMETERS = torch.zeros(2, 8, 9, 3, dtype=torch.uint8), torch.tensor(NEUTRAL).repeat(2, 1)


@pytest.mark.parametrize(
    ("others", "match"),
    [
        ({"images": IMAGES.float()}, "images must be contiguous N×H×W×3 of uint8"),
        ({"images": IMAGES[..., :2]}, "images must be"),
        ({"images": IMAGES.permute(0, 2, 1, 3)}, "images must be"),
        ({"images": IMAGES[0]}, "images must be"),
        ({"out": torch.zeros(2, 3, 8, 9)}, "channels_last"),
        ({"out": empty_like(IMAGES)[:1]}, "out must be 2×3×8×9"),
        ({"out": empty_like(IMAGES).double()}, "out cannot be Double"),
        ({"out": empty_like(IMAGES).int()}, "out cannot be Int"),
        ({"parameters": PARAMETERS[:1]}, "parameters must be contiguous 2×12"),
        ({"parameters": PARAMETERS[:, :11]}, "parameters must be"),
        ({"parameters": PARAMETERS.double()}, "parameters must be"),
        ({"parameters": PARAMETERS.T.contiguous().T}, "parameters must be"),
        ({"blur_rows": torch.zeros(0)}, "blur_rows must be 2×T×T"),
        ({"blur_rows": torch.zeros(2, 9, 9)}, "blur_rows must be 2×T×T, T odd and at most 8 or 8"),
        ({"blur_rows": torch.zeros(2, 0, 0)}, "blur_rows must be"),
        ({"blur_columns": torch.zeros(2, 8, 8)}, "blur_columns must be 2×T×T, T odd and at most 9 or 9"),
        ({"blur_columns": torch.zeros(1, 9, 9)}, "blur_columns must be"),
        ({"blur_columns": torch.zeros(2, 7, 9)}, "blur_columns must be"),
        ({"blur_columns": torch.zeros(2, 9, 9).double()}, "blur_columns must be contiguous float32"),
        ({"steps": [2, 0, 2]}, r"different numbers of 0…4, got \[2, 0, 2\]"),
        ({"steps": [5]}, "steps"),
        ({"steps": [-1]}, "steps"),
        ({"mean": [0.0]}, "three numbers"),
        ({"std": [1.0] * 4}, "three numbers"),
    ],
)
def test_what_does_not_fit_is_refused(others: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        bare(IMAGES, empty_like(IMAGES), PARAMETERS, STEPS, others)


@pytest.mark.parametrize("shape", [(0, 4, 5, 3), (2, 0, 5, 3), (2, 4, 0, 3)])
def test_nothing_to_do(shape: tuple[int, ...]) -> None:
    count, height, width, _ = shape
    out = torch.empty((count, 3, height, width)).to(memory_format=torch.channels_last)
    nothing = torch.zeros(0)
    parameters = torch.tensor(NEUTRAL).repeat(shape[0], 1)
    torch.ops.fastssl.augment_native(
        torch.empty(shape, dtype=torch.uint8), out, parameters, nothing, nothing, [0, 2], [0.0] * 3, [1.0] * 3
    )
