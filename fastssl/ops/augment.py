"""Colour jitter, grayscale, blur, solarize, erasing, normalisation and cast of a batch of images in one op."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastssl.errors import FastsslError
from fastssl.ops import backend, blur, library, reference
from fastssl.ops.photometric import COLUMNS, PHOTOMETRIC, GaussianBlur, Step, check_steps, draw_augmentation

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@torch.no_grad()
def augment_(
    images: Tensor,
    steps: Sequence[Step],
    parameters: Tensor | None = None,
    *,
    generator: torch.Generator | None = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Augment the colours of every image by itself, and give (image / 255 - mean) / std.

    The operations are torchvision's (and PIL's blur, where kernel_size is 0): hue turns in HSV, contrast is about the
    mean luma of the image, and the four parts of the colour jitter come in an order of the image's own. Between them
    the values are whole numbers from 0 to 255, as they are between those of torchvision and PIL. What is drawn is told
    by SimCLR (arXiv:2002.05709, appendix A), MoCo v2 (arXiv:2003.04297) and BYOL (arXiv:2006.07733, appendix B).

    Nothing flows back through it: it is for data. The underscore says that `out` is written in place.

    Args:
        images: N×H×W×3, uint8; not changed.
        steps: ColorJitter, Grayscale, GaussianBlur, Solarize and RandomErasing, each at most once, in the order in
            which they are done.
        parameters: N×12 float32 with the columns `fastssl.ops.photometric.COLUMNS`, one row an image, on the CPU or
            with the images, as `draw_augmentation` gives them. Without them they are drawn here.
        generator: to draw from, on the CPU.
        mean: of the three channels, of 1.
        std: of the three channels, of 1.
        dtype: of the result: float32, bfloat16, float16 or float64. Default: that of `out`, else float32.
        out: the result is written here, if given: N×3×H×W in channels_last order.

    Returns:
        N×3×H×W in channels_last order, on the device of `images`.

    Raises:
        ValueError: shape or dtype of an argument does not fit; a step is unknown or comes twice; a sigma on the CPU
            lies above the range of its step; the images are too small for the blur's kernel_size.

    Example:
        >>> import torch
        >>> from fastssl.ops import ColorJitter, GaussianBlur, Grayscale, augment_
        >>> steps = [ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8), Grayscale(0.2), GaussianBlur((0.1, 2.0), p=0.5)]
        >>> augment_(torch.zeros(8, 32, 32, 3, dtype=torch.uint8), steps).shape
        torch.Size([8, 3, 32, 32])
    """
    check_steps(steps)
    if dtype is None:
        dtype = torch.float32 if out is None else out.dtype
    _check_images(images, mean, std, dtype)
    _check_blur(steps, images)
    if parameters is None:
        parameters = draw_augmentation(steps, len(images), (images.shape[1], images.shape[2]), generator)
    elif generator is not None:
        raise FastsslError("give augment_ parameters or a generator to draw them from, not both")
    _check_parameters(parameters, images, steps)
    if out is None:
        count, height, width, _ = images.shape
        out = torch.empty(
            (count, 3, height, width), dtype=dtype, device=images.device, memory_format=torch.channels_last
        )
    else:
        _check_out(out, images, dtype)
    if images.numel():
        run = backend.implementation("augment_", images.device, dtype)
        run(images.contiguous(), out, parameters, tuple(steps), tuple(mean), tuple(std))
    return out


def _check_images(images: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> None:
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[3] != 3:
        raise FastsslError(f"images must be N×H×W×3 of uint8, got {tuple(images.shape)} of {images.dtype}")
    if len(mean) != 3 or len(std) != 3 or not all(value > 0 for value in std):
        raise FastsslError(f"mean and std must be three numbers, those of std above 0, got {mean} and {std}")
    if dtype not in DTYPES:
        raise FastsslError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")


def _check_blur(steps: Sequence[Step], images: Tensor) -> None:
    for step in steps:
        half = step.kernel_size // 2 if isinstance(step, GaussianBlur) else 0
        if half and half >= min(images.shape[1:3]) and images.numel():
            raise FastsslError(
                f"gaussian_blur: kernel_size {2 * half + 1} needs images of more than {half} pixels, got "
                f"{images.shape[1]}×{images.shape[2]}"
            )


def _check_parameters(parameters: Tensor, images: Tensor, steps: Sequence[Step]) -> None:
    shape = (len(images), len(COLUMNS))
    if parameters.shape != shape or parameters.dtype != torch.float32:
        raise FastsslError(
            f"parameters must be {shape[0]}×{shape[1]} of float32, got {tuple(parameters.shape)} of {parameters.dtype}"
        )
    if parameters.device.type != "cpu":
        if parameters.device != images.device:
            raise FastsslError(f"parameters are on {parameters.device}, the images on {images.device}")
    elif not torch.compiler.is_compiling():  # which cannot trace a question about values
        blurs = [step for step in steps if isinstance(step, GaussianBlur)]
        sigma = parameters[:, COLUMNS.index("sigma")]
        if blurs and len(images) and not sigma.max() <= blurs[0].sigma[1] * (1 + 1e-6):
            raise FastsslError(f"a sigma of {sigma.max():g} lies above the step's {blurs[0].sigma[1]:g}")


def _check_out(out: Tensor, images: Tensor, dtype: torch.dtype) -> None:
    count, height, width, _ = images.shape
    fits = out.shape == (count, 3, height, width) and out.dtype == dtype and out.device == images.device
    if not fits or not out.is_contiguous(memory_format=torch.channels_last):
        raise FastsslError(
            f"out must be {count}×3×{height}×{width} of {dtype} in channels_last order on {images.device}, got "
            f"{tuple(out.shape)} of {out.dtype} on {out.device} with strides {out.stride()}"
        )


def _fused(
    name: str,
    images: Tensor,
    out: Tensor,
    parameters: Tensor,
    steps: tuple[Step, ...],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> None:
    rows = columns = parameters.new_empty(0)
    for step in steps:
        if isinstance(step, GaussianBlur):
            sigma = parameters[:, COLUMNS.index("sigma")]
            rows = columns = blur.table(step, sigma, images.shape[1])
            if images.shape[1] != images.shape[2]:
                columns = blur.table(step, sigma, images.shape[2])
    parameters, rows, columns = (x.to(images.device, non_blocking=True) for x in (parameters, rows, columns))
    numbers = [PHOTOMETRIC.index(type(step)) for step in steps]
    library.call("augment", name, images, out, parameters.contiguous(), rows, columns, numbers, mean, std)


library.define(
    "augment",
    "(Tensor images, Tensor(a!) out, Tensor parameters, Tensor blur_rows, Tensor blur_columns, int[] steps, "
    "float[] mean, float[] std) -> ()",
    kernel="augment.augment",
    fake=lambda *_: None,
)
for _name, _implementation in library.implementations(_fused).items():
    backend.register("augment_", _name, _implementation)
backend.register("augment_", "reference", backend.Implementation(reference.augment_))
