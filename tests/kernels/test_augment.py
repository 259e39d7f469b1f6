"""Augmentation against the reference: every step in many orders and shapes, and nothing touched but the result."""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from fastssl.kernels import augment, interpreted
from fastssl.kernels.launch import recording
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastssl.ops import augment_, blur, reference, use_backend
from fastssl.ops.photometric import (
    COLUMNS,
    JITTER_ORDERS,
    NEUTRAL,
    PHOTOMETRIC,
    ColorJitter,
    GaussianBlur,
    Grayscale,
    RandomErasing,
    Solarize,
    Step,
    draw_augmentation,
)
from tests.kernels import fences

# The interpreter computes with numpy, which tells of every odd number.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Half the distance of neighbouring numbers around 1; the interpreter cuts bfloat16 off.
ROUNDING = {BF16: 2.0**-7 if interpreted() else 2.0**-8, FP16: 2.0**-11, FP32: 2.0**-22}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LEVEL = 1 / 255
SENTINEL = 171
SLOW = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]

JITTER, GRAY, ERASE = ColorJitter(0.4, 0.4, 0.4, 0.2, p=0.8), Grayscale(0.4), RandomErasing((0.1, 0.4), p=0.6)
BOX, SOLAR = GaussianBlur((0.1, 2.0), p=0.6), Solarize(0.3, p=0.6)
RECIPES: dict[str, tuple[Step, ...]] = {
    "none": (),
    "moco_v1": (GRAY, JITTER),
    "moco_v2": (JITTER, GRAY, BOX),
    "byol": (JITTER, GRAY, GaussianBlur((0.1, 2.0), 23, p=0.6), SOLAR),
    "erasing": (JITTER, BOX, ERASE),
    "solarized_first": (SOLAR, GRAY, ERASE, JITTER),
    "jitter_last": (ERASE, replace(BOX, p=0.9), SOLAR, JITTER),
    "grayscale_last": (JITTER, replace(BOX, p=1.0), Grayscale(0.7)),
    "all_after_the_blur": (BOX, JITTER, SOLAR, GRAY, ERASE),
    "blur_only": (BOX,),
}


@dataclass(frozen=True)
class Case:
    steps: tuple[Step, ...]
    height: int
    width: int
    count: int = 3
    dtype: torch.dtype = FP32
    seed: int = 0


def images_of(case: Case) -> Tensor:
    """Bytes, the last of whose images is flat and grey."""
    generator = torch.Generator().manual_seed(case.seed)
    images = torch.randint(256, (case.count, case.height, case.width, 3), generator=generator, dtype=torch.uint8)
    images[-1] = 77
    return images


def parameters_of(case: Case) -> Tensor:
    return draw_augmentation(
        case.steps, case.count, (case.height, case.width), torch.Generator().manual_seed(case.seed)
    )


def fenced(images: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of bytes at no particular alignment, and the buffer around it."""
    buffer = torch.full((images.numel() + 2 * fences.FENCE + 1,), SENTINEL, dtype=torch.uint8, device=fences.DEVICE)
    return buffer[fences.FENCE + 1 : -fences.FENCE].view(images.shape).copy_(images), buffer


def run(case: Case, images: Tensor, parameters: Tensor) -> Tensor:
    """The kernels' result; no image, parameter or table may be changed, nothing around any buffer touched."""
    inside, buffer = fenced(images)
    before = buffer.clone()
    table = fences.dense(parameters)
    out = fences.new_empty(table, case.count, case.height, case.width, 3, dtype=case.dtype).permute(0, 3, 1, 2)
    rows = columns = parameters.new_empty(0)
    for step in case.steps:
        if isinstance(step, GaussianBlur):
            sigma = parameters[:, COLUMNS.index("sigma")]
            rows, columns = (fences.dense(blur.table(step, sigma, side)) for side in (case.height, case.width))
    numbers = [PHOTOMETRIC.index(type(step)) for step in case.steps]
    augment.augment(inside, out, table, rows, columns, numbers, MEAN, STD)
    assert torch.equal(buffer, before)
    assert torch.equal(table.cpu().nan_to_num(), parameters.nan_to_num())
    return out.cpu()


def expected(case: Case, images: Tensor, parameters: Tensor, dtype: torch.dtype = FP32) -> Tensor:
    out = torch.empty(case.count, 3, case.height, case.width, dtype=dtype)
    reference.augment_(images, out, parameters, case.steps, MEAN, STD)
    return out


def undecided(case: Case, images: Tensor, parameters: Tensor) -> Tensor:
    """Where a threshold lies so near a value that rounding decides."""
    at = COLUMNS.index("threshold")
    lower, higher = parameters.clone(), parameters.clone()
    lower[:, at] -= 1.1 * LEVEL
    higher[:, at] += 1.1 * LEVEL
    return (expected(case, images, lower) - expected(case, images, higher)).abs() > 1e-4


def check(case: Case, images: Tensor | None = None, parameters: Tensor | None = None) -> None:
    """One batch against the reference."""
    fences.allocated.clear()
    images = images_of(case) if images is None else images
    parameters = parameters_of(case) if parameters is None else parameters
    found = run(case, images, parameters).float()
    want = expected(case, images, parameters)
    is_blurred = parameters[:, COLUMNS.index("sigma")].view(-1, 1, 1, 1) > 0
    error = ((found - want).abs() - ROUNDING[case.dtype] * want.abs()) * min(STD) / LEVEL
    error = error.masked_fill(undecided(case, images, parameters), 0.0)
    assert not found.isnan().any()
    assert error.max() < 5  # a value next to a whole number may be cut off to its neighbour
    share = (error > 1e-3).float().mean((1, 2, 3), keepdim=True)
    assert (share <= torch.where(is_blurred, 0.06, 0.004) + 3.5 / want[0].numel()).all()
    fences.check()


@pytest.mark.parametrize("name", list(RECIPES))
def test_recipes(name: str) -> None:
    check(Case(RECIPES[name], 33, 48))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (5, 3), (32, 32), (17, 96), (224, 1), (1, 224)])
def test_shapes(height: int, width: int) -> None:
    check(Case((JITTER, GRAY, BOX, SOLAR, ERASE), height, width))
    check(Case((JITTER, SOLAR), height, width))


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_dtypes(dtype: torch.dtype) -> None:
    for seed in range(3):
        check(Case((JITTER, GRAY, BOX, SOLAR, ERASE), 16, 16, dtype=dtype, seed=seed))


@pytest.mark.parametrize("count", [1, 7])
def test_counts(count: int) -> None:
    check(Case(RECIPES["byol"], 25, 30, count))


def test_every_order_of_the_jitter() -> None:
    case = Case((JITTER, GRAY), 6, 7, len(JITTER_ORDERS))
    parameters = draw_augmentation((replace(JITTER, p=1.0), GRAY), case.count, (6, 7), torch.Generator().manual_seed(0))
    parameters[:, COLUMNS.index("order")] = torch.arange(len(JITTER_ORDERS)).float()
    check(case, parameters=parameters)


@pytest.mark.parametrize("column", ["brightness", "contrast", "saturation", "hue"])
def test_parts_of_the_jitter(column: str) -> None:
    turns = column == "hue"
    values = torch.tensor([-0.5, -0.3, -0.1, 0.0, 0.05, 1 / 3, 0.5] if turns else [0.0, 0.3, 0.99, 1.0, 1.2, 2.0, 7.0])
    parameters = torch.tensor(NEUTRAL).repeat(7, 1)
    parameters[:, COLUMNS.index(column)] = values
    check(Case((JITTER,), 40, 40, 7), parameters=parameters)  # two blocks of the interpreter's


def test_luma_is_not_that_of_what_lies_beyond_the_image() -> None:
    """Black is white there too, once it is solarized."""
    steps = Solarize(0.0, p=1.0), replace(JITTER, p=1.0)
    check(Case(steps, 9, 5))


def test_a_share_of_luma_of_several_blocks() -> None:
    check(Case((replace(JITTER, p=1.0),), 70, 70, 2))


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=SLOW)
@given(
    st.permutations([JITTER, GRAY, BOX, SOLAR, ERASE]),
    st.integers(0, 5),
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.integers(0, 2**31),
)
def test_orders_of_steps(steps: list[Step], count: int, size: tuple[int, int], seed: int) -> None:
    check(Case(tuple(steps[:count]), *size, 3, seed=seed))


@pytest.mark.parametrize(
    ("step", "height", "width"),
    [
        (GaussianBlur((0.1, 12.0), p=0.9), 100, 20),  # several chunks of rows
        (GaussianBlur((0.1, 12.0), p=0.9), 20, 150),  # and of columns
        (GaussianBlur((30.0, 40.0), p=0.9), 36, 70),  # tables as large as the image
        (GaussianBlur((0.1, 2.0), 17, p=0.9), 9, 70),
        (GaussianBlur((0.1, 0.2), 3, p=0.9), 2, 2),
        (GaussianBlur((1.5, 2.0), 5, p=0.9), 40, 36),  # cut off where its weights are large
    ],
)
def test_reach_of_the_blur(step: GaussianBlur, height: int, width: int) -> None:
    check(Case((step,), height, width, 2), parameters=draw_augmentation((replace(step, p=1.0),), 2, (height, width)))


@pytest.mark.parametrize("kernel_size", [0, 23])
def test_rounded_weights_cost_a_tenth_of_a_level_at_most(kernel_size: int) -> None:
    """For every sigma and the image for which it is worst."""
    step = GaussianBlur((0.1, 2.0), kernel_size)
    table = blur.table(step, torch.linspace(0.1, 2.0, 2000), 64)
    worst = (table.half().float() - table).abs().sum(2).max()
    assert 2 * 128 * worst < 0.1
    assert (table.sum(2) - 1).abs().max() < 1e-6


def test_flat_images_stay_flat() -> None:
    parameters = torch.tensor(NEUTRAL).repeat(18, 1)
    parameters[:, COLUMNS.index("sigma")] = torch.linspace(0.1, 2.0, 18)
    images = torch.arange(0, 256, 15, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 9, 16, 3)
    case = Case((replace(BOX, p=1.0),), 9, 16, 18)
    torch.testing.assert_close(run(case, images, parameters), expected(case, images, parameters))


def test_solarize_begins_at_the_threshold() -> None:
    parameters = torch.tensor(NEUTRAL).repeat(86, 1)
    parameters[:, COLUMNS.index("threshold")] = torch.arange(0, 256, 3) / 255
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, -1, 1).expand(86, -1, -1, 3)
    case = Case((SOLAR,), 1, 256, 86)
    torch.testing.assert_close(run(case, images, parameters), expected(case, images, parameters))


@pytest.mark.parametrize("name", ["byol", "all_after_the_blur"])
def test_same_bits_twice(name: str) -> None:
    case = Case(RECIPES[name], 33, 40)
    images, parameters = images_of(case), parameters_of(case)
    assert torch.equal(run(case, images, parameters), run(case, images, parameters))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e30, 24.0])
def test_odd_parameters_spoil_their_own_image_only(value: float) -> None:
    case = Case((JITTER, GRAY, BOX, SOLAR, ERASE), 12, 16, len(COLUMNS) + 1)
    images, parameters = images_of(case), parameters_of(case)
    for column, _ in enumerate(COLUMNS):
        parameters[column, column] = value
    found = run(case, images, parameters)
    alone = replace(case, count=1)
    assert torch.equal(found[-1:], run(alone, images[-1:], parameters[-1:]))


def test_the_op() -> None:
    case = Case(RECIPES["moco_v2"], 16, 18, dtype=FP16)
    parameters = parameters_of(case)
    with use_backend("triton"):
        found = augment_(images_of(case).to(fences.DEVICE), case.steps, parameters, dtype=FP16).cpu()
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found, run(case, images_of(case), parameters))


def test_no_more_launches_than_steps_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    kernels = {}
    for name, steps in RECIPES.items():
        images, out = torch.empty(2, 8, 8, 3, dtype=torch.uint8, device="meta"), torch.empty(2, 3, 8, 8, device="meta")
        table, rows = torch.empty(2, 12, device="meta"), torch.empty(2, 8, 8, device="meta")
        with recording(90, "tf32") as found:
            augment.augment(images, out, table, rows, rows, [PHOTOMETRIC.index(type(s)) for s in steps], MEAN, STD)
        kernels[name] = [launch.kernel.fn.__name__.removeprefix("augment_") for launch in found]
    assert kernels["none"] == ["color"]
    assert kernels["moco_v1"] == ["luma", "color"]
    assert kernels["moco_v2"] == kernels["byol"] == ["luma", "color", "blur"]
    assert kernels["blur_only"] == ["color", "blur"]
    assert kernels["grayscale_last"] == ["luma", "color", "blur", "color"]
    assert kernels["jitter_last"] == ["color", "blur", "luma", "color"]


def test_numbers_of_the_kernels_are_those_of_the_op() -> None:
    from fastssl.kernels import pixels

    kinds = pixels.JITTER, pixels.GRAYSCALE, pixels.BLUR, pixels.SOLARIZE, pixels.ERASING
    assert [PHOTOMETRIC[kind.value] for kind in kinds] == [
        ColorJitter,
        Grayscale,
        GaussianBlur,
        Solarize,
        RandomErasing,
    ]
    names = "brightness contrast saturation hue order gray sigma threshold top left height width".split()
    for at, name in enumerate(names):
        assert getattr(pixels, name.upper()).value == at
        assert COLUMNS[at].startswith(name)
    assert pixels.COLUMNS.value == len(COLUMNS)
    assert JITTER_ORDERS == tuple(itertools.permutations(range(4)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_of_more_than_2_to_the_31_bytes() -> None:
    count = 15_000
    images = torch.randint(256, (count, 224, 224, 3), dtype=torch.uint8, device="cuda")
    parameters = draw_augmentation(RECIPES["byol"], count, (224, 224))
    with use_backend("triton"):
        last = augment_(images[-4:].clone(), RECIPES["byol"], parameters[-4:], dtype=BF16)
        assert torch.equal(augment_(images, RECIPES["byol"], parameters, dtype=BF16)[-4:], last)
