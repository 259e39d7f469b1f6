"""The DALI pipeline of a recipe: decode once, then crop, resize and flip for each view; with color="dali" colours too.

Nothing random happens inside: the boxes come from outside with every batch, so a pipeline has no state to save.
"""

from collections.abc import Sequence
from typing import Any

from nvidia.dali import fn, pipeline_def, types

from fastssl.data import dali_color
from fastssl.data.augmentation import HorizontalFlip, RandomResizedCrop, RandomShift, View

# Added before rounding: DALI rounds halves to the even neighbour, PIL upwards, and float32 misses some by a little.
ROUND_UP = 1 / 2048
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

    Its inputs are "images" (files as 1-d uint8, or H×W×3), those of `geometry.inputs` with the number of the view
    behind their names ("corner0", …), and with color="dali" "color0", … (`fastssl.ops.draw_augmentation`). Its outputs
    are one a view: size×size×3, uint8 (from a bilinear crop float32, still to be rounded), or with color="dali"
    normalised in float32.

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
    steps = [{type(step): step for step in view.geometry} for view in views]  # DALI would hide the error of a wrong one
    # exec_pipelined=False: a batch starts when it is scheduled, and only then. Up to `prefetch` are under way at once.
    return _graph(
        views, steps, encoded, color, on_gpu,
        batch_size=batch_size, num_threads=threads, device_id=device_id, prefetch_queue_depth=prefetch,
        exec_pipelined=False, exec_async=True, exec_dynamic=True,
    )  # fmt: skip


@pipeline_def(enable_conditionals=True)
def _graph(
    views: Sequence[View], steps: Sequence[dict[type, Any]], encoded: bool, color: str, on_gpu: bool
) -> tuple[Any, ...]:
    if encoded:
        files = fn.external_source(name="images", dtype=types.UINT8, ndim=1)
        size = fn.peek_image_shape(files, adjust_orientation=False, dtype=types.FLOAT)
        # DALI 2.4's decoder may crash on a file that it cannot make out. So the loader gives it none that PIL cannot,
        # and here it waits until the operator above, which fails in an orderly way, has read the headers of the batch.
        files = fn.reshape(files, rel_shape=fn.stack(0 * size[0] + 1))
        # EXIF turns nothing, as with PIL. "mixed" takes the hardware decoder where there is one; for exact colours the
        # GPU's cores, which can interpolate chroma as libjpeg does: repeated it is off by 4 levels in the mean.
        fancy: dict[str, Any] = {"jpeg_fancy_upsampling": True} if on_gpu and color == "exact" else {}
        images = fn.decoders.image(
            files, device="mixed" if on_gpu else "cpu", output_type=types.RGB, adjust_orientation=False, **fancy
        )
    else:
        images = fn.external_source(name="images", dtype=types.UINT8, ndim=3, layout="HWC")
        if on_gpu:
            images = images.gpu()
    results = []
    for number, view in enumerate(views):
        result = _view(view.size, steps[number], images, _Inputs(number, on_gpu), color == "exact")
        if color == "dali":
            # DALI removes inputs that nothing uses, and then they cannot be fed.
            result = dali_color.apply(
                view, result, _Inputs(number, on_gpu).floats("color") if view.photometric else None
            )
        results.append(result)
    return tuple(results)


class _Inputs:
    """What a view is fed with every batch."""

    def __init__(self, number: int, on_gpu: bool) -> None:
        self._number, self._on_gpu = number, on_gpu

    def floats(self, name: str) -> Any:
        return fn.external_source(name=f"{name}{self._number}", dtype=types.FLOAT, ndim=1)

    def weights(self, name: str) -> Any:
        """Of a whole image, where images are."""
        values = fn.external_source(name=f"{name}{self._number}", dtype=types.FLOAT, ndim=3)
        return values.gpu() if self._on_gpu else values

    def integers(self, name: str, ndim: int = 1) -> Any:
        return fn.external_source(name=f"{name}{self._number}", dtype=types.INT32, ndim=ndim)


def _view(size: int, steps: dict[type, Any], images: Any, inputs: _Inputs, exact: bool) -> Any:
    if RandomResizedCrop in steps:
        result = _resized(_sliced(images, inputs), inputs, size, steps[RandomResizedCrop].interpolation, exact)
    else:
        whole = fn.resize(images, size=inputs.floats("whole"), interp_type=types.INTERP_LINEAR, antialias=True)
        result = _sliced(whole, inputs)
    if RandomShift in steps:
        extent = types.Constant([size, size], dtype=types.INT32, device="cpu")
        outside: dict[str, Any] = {"out_of_bounds_policy": "pad", "fill_values": 0}
        result = fn.slice(result, inputs.integers("shift"), extent, axes=(0, 1), **outside)
    # With a crop and no shift in between the flip costs nothing: the part to resize runs from right to left.
    if HorizontalFlip in steps and (RandomShift in steps or RandomResizedCrop not in steps):
        result = fn.flip(result, horizontal=inputs.integers("flip", ndim=0))
    return result


def _sliced(images: Any, inputs: _Inputs) -> Any:
    # The boxes follow from the size in PIL's eyes. Should DALI see a smaller image, that must not end a training.
    return fn.slice(
        images, inputs.integers("corner"), inputs.integers("extent"), axes=(0, 1), out_of_bounds_policy="trim_to_shape"
    )


def _resized(crop: Any, inputs: _Inputs, size: int, interpolation: str, exact: bool) -> Any:
    """Resize along the width, then along the height: PIL and torchvision round to 8 bits in between.

    If `exact`, the result of bilinear is not rounded yet: the loader does it for a batch, in half the time.
    """
    kind = {"interp_type": INTERPOLATION[interpolation], "antialias": True}
    part = {"size": inputs.floats("narrow"), "roi_start": inputs.floats("start"), "roi_end": inputs.floats("end")}
    if interpolation == "bilinear":
        narrow = fn.resize(crop, **part, **kind)
        return fn.resize(narrow, size=[size, size], dtype=types.FLOAT if exact else types.UINT8, **kind)

    side = inputs.integers("side")
    cut: dict[str, Any] = {"axes": (0, 1), "out_of_bounds_policy": "pad"}  # as `_sliced`: DALI may see a smaller image
    first, last = (fn.slice(crop, inputs.integers(name), side, **cut) for name in ("first", "last"))
    narrow = fn.resize(crop, dtype=types.FLOAT, **part, **kind)
    narrow = _rounded(_without_outside(narrow, first, last, inputs, "column"))

    corner, across = (types.Constant(xy, dtype=types.INT32, device="cpu") for xy in ([0, 0], [1, size]))
    top, bottom = (fn.slice(narrow, at, across, axes=(0, 1)) for at in (corner, inputs.integers("bottom")))
    result = fn.resize(narrow, size=[size, size], dtype=types.FLOAT, **kind)
    return _rounded(_without_outside(result, top, bottom, inputs, "row"))


def _without_outside(result: Any, first: Any, last: Any, inputs: _Inputs, along: str) -> Any:
    """What DALI gave to border pixels for weights outside of the image taken away, as `geometry.border` says."""
    before, after, gain = (inputs.weights(f"{part}_{along}") for part in ("before", "after", "gain"))
    return (result - before * first - after * last) * gain


def _rounded(x: Any) -> Any:
    """To 8 bits, halves upwards."""
    return fn.brightness_contrast(x, brightness_shift=ROUND_UP / 255, dtype=types.UINT8)
