"""The DALI pipeline of a recipe: decode once, then crop, resize and flip for each view; with color="dali" colours too.

Nothing random happens inside: the numbers come from outside with every batch, so a pipeline has no state to save.
"""

import math
from collections.abc import Sequence
from typing import Any

from nvidia.dali import fn, pipeline_def, types
from nvidia.dali import math as dali_math

from fastssl.data import dali_color
from fastssl.data.augmentation import HorizontalFlip, RandomResizedCrop, RandomShift, View, margin_around
from fastssl.data.geometry import COLUMNS
from fastssl.ops.photometric import TRIES

INTERPOLATION = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}


def build(
    views: Sequence[View],
    batch_size: int,
    *,
    encoded: bool,
    color: str,
    on_gpu: bool,
    device_id: int | None,
    threads: int,
    prefetch: int,
) -> Any:
    """Make the pipeline; the caller builds it (which for a GPU needs one) and feeds its inputs.

    Its inputs are "images" (files as 1-d uint8, or H×W×3), "geometry0", "geometry1", … (`geometry.draw`), and with
    color="dali" "color0", … (`fastssl.ops.draw_augmentation`). Its outputs are one a view: size×size×3, uint8, or with
    color="dali" normalised in float32.

    Args:
        views: the recipe.
        batch_size: most images a batch.
        encoded: whether images come as files.
        color: "exact" (colours are left to `augment_`) or "dali".
        on_gpu: whether to decode and augment on a GPU.
        device_id: its number; None for the CPU, and for a GPU's pipeline that is not to run.
        threads: of the CPU.
        prefetch: batches that may be under way.
    """
    # exec_pipelined=False: a batch starts when it is scheduled, and only then. Up to `prefetch` are under way at once.
    return _graph(
        views, encoded, color, on_gpu,
        batch_size=batch_size, num_threads=threads, device_id=device_id, prefetch_queue_depth=prefetch,
        exec_pipelined=False, exec_async=True, exec_dynamic=True,
    )  # fmt: skip


@pipeline_def(enable_conditionals=True)
def _graph(views: Sequence[View], encoded: bool, color: str, on_gpu: bool) -> tuple[Any, ...]:
    if encoded:
        files = fn.external_source(name="images", dtype=types.UINT8, ndim=1)
        size = fn.peek_image_shape(files, adjust_orientation=False, dtype=types.FLOAT)
        # DALI 2.4's decoder may crash on a file that it cannot make out. So the loader gives it none that PIL cannot,
        # and here it waits until the operator above, which fails in an orderly way, has read the headers of the batch.
        files = fn.reshape(files, rel_shape=fn.stack(0 * size[0] + 1))
        # EXIF turns nothing, as with PIL. "mixed" takes the hardware decoder where there is one.
        images = fn.decoders.image(
            files, device="mixed" if on_gpu else "cpu", output_type=types.RGB, adjust_orientation=False
        )
    else:
        images = fn.external_source(name="images", dtype=types.UINT8, ndim=3, layout="HWC")
        size = images.shape(dtype=types.FLOAT)
        if on_gpu:
            images = images.gpu()
    results = []
    for number, view in enumerate(views):
        # DALI removes inputs that nothing uses, and then they cannot be fed.
        drawn = fn.external_source(name=f"geometry{number}", dtype=types.FLOAT, ndim=1) if view.geometry else None
        result = _view(view, images, size[0], size[1], drawn)
        if color == "dali":
            parameters = None
            if view.photometric:
                parameters = fn.external_source(name=f"color{number}", dtype=types.FLOAT, ndim=1)
            result = dali_color.apply(view, result, parameters)
        results.append(result)
    return tuple(results)


def _view(view: View, images: Any, height: Any, width: Any, drawn: Any) -> Any:
    steps = {type(step): step for step in view.geometry}
    crop, shift = steps.get(RandomResizedCrop), steps.get(RandomShift)
    flips = HorizontalFlip in steps
    if isinstance(crop, RandomResizedCrop):
        top, left, h, w = _box(crop, height, width, fn.reshape(drawn[3:COLUMNS], shape=[4, TRIES]))
        result = fn.slice(images, *_corner_and_size(top, left, h, w), axes=(0, 1))
        # Where no shift comes in between, the flip costs nothing: the region to resize may run from right to left.
        flip = drawn[0] if flips and not shift else 0.0 * w
        flips = flips and shift is not None
        result = _resized(result, h, w, flip, view, crop)
    else:
        result = _centre(images, height, width, view.size)
    if shift:
        corner = fn.cast(fn.stack(-drawn[1], -drawn[2]), dtype=types.INT32)
        size = types.Constant([view.size, view.size], dtype=types.INT32, device="cpu")
        result = fn.slice(result, corner, size, axes=(0, 1), out_of_bounds_policy="pad", fill_values=0)
    if flips:
        result = fn.flip(result, horizontal=fn.cast(drawn[0], dtype=types.INT32))
    return result


def _box(step: RandomResizedCrop, height: Any, width: Any, tries: Any) -> tuple[Any, Any, Any, Any]:
    """`geometry.boxes` in DALI's operators: top, left, height, width."""
    areas = height * width * (step.area[0] + (step.area[1] - step.area[0]) * tries[0])
    low, high = math.log(step.aspect[0]), math.log(step.aspect[1])
    ratios = dali_math.exp(low + (high - low) * tries[1])
    w, h = _round(dali_math.sqrt(areas * ratios)), _round(dali_math.sqrt(areas / ratios))
    fits = fn.cast((w > 0) & (w <= width) & (h > 0) & (h <= height), dtype=types.FLOAT)
    rank = types.Constant([float(i) for i in range(TRIES)], dtype=types.FLOAT, device="cpu") + (1 - fits) * TRIES
    first = fn.cast(rank == fn.reductions.min(rank), dtype=types.FLOAT)  # 1 at the first that fits
    found = fn.reductions.max(fits)
    ratio = dali_math.clamp(width / height, step.aspect[0], step.aspect[1])
    h_else, w_else = dali_math.min(height, _round(width / ratio)), dali_math.min(width, _round(height * ratio))
    h = found * fn.reductions.sum(first * h) + (1 - found) * h_else
    w = found * fn.reductions.sum(first * w) + (1 - found) * w_else
    top = found * dali_math.floor(fn.reductions.sum(first * tries[2]) * (height - h + 1))
    left = found * dali_math.floor(fn.reductions.sum(first * tries[3]) * (width - w + 1))
    top = top + (1 - found) * dali_math.floor((height - h) / 2)
    left = left + (1 - found) * dali_math.floor((width - w) / 2)
    return top, left, h, w


def _resized(crop: Any, h: Any, w: Any, flip: Any, view: View, step: RandomResizedCrop) -> Any:
    """Resize along the width, then along the height: PIL and torchvision round to 8 bits in between."""
    kind = {"interp_type": INTERPOLATION[step.interpolation], "antialias": True}
    start, end = fn.stack(0.0 * w, w * flip), fn.stack(h, w * (1 - flip))
    narrow = fn.resize(crop, size=fn.stack(h, 0.0 * w + view.size), roi_start=start, roi_end=end, **kind)
    return fn.resize(narrow, size=[view.size, view.size], **kind)


def _centre(images: Any, height: Any, width: Any, size: int) -> Any:
    """What a view without a random crop does: `augmentation.short_side`, then the centre."""
    smaller = dali_math.min(height, width)
    fits = fn.cast(smaller == size, dtype=types.FLOAT)
    short = fits * size + (1 - fits) * margin_around(size)
    # torchvision cuts the longer side to a whole number of pixels.
    h = dali_math.floor(height * short / smaller + 1e-3)
    w = dali_math.floor(width * short / smaller + 1e-3)
    resized = fn.resize(images, size=fn.stack(h, w), interp_type=types.INTERP_LINEAR, antialias=True)
    top, left = _round((h - size) / 2), _round((w - size) / 2)
    corner = fn.cast(fn.stack(top, left), dtype=types.INT32)
    return fn.slice(resized, corner, types.Constant([size, size], dtype=types.INT32, device="cpu"), axes=(0, 1))


def _corner_and_size(top: Any, left: Any, h: Any, w: Any) -> tuple[Any, Any]:
    return fn.cast(fn.stack(top, left), dtype=types.INT32), fn.cast(fn.stack(h, w), dtype=types.INT32)


def _round(x: Any) -> Any:
    """Python's round: a half goes to the even neighbour, which decides where a centre lies."""
    up = dali_math.floor(x + 0.5)
    odd_half = (up == x + 0.5) & (up != 2 * dali_math.floor(up / 2))
    return up - fn.cast(odd_half, dtype=types.FLOAT)
