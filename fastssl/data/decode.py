"""From encoded bytes to an RGB image: the one definition of which images are readable. Without torch, for `scan`."""

import io
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from fastssl.errors import DataError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
# What DALI decodes too. The content counts, not the name: a GIF called .jpg is refused by both.
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "PPM")
# PIL warns at 89 million pixels and refuses at 179: a camera's 12,000×9,000 must pass without a word. 16,384×16,384
# takes 805 MB as RGB, about what a worker can bear; what claims more is a decompression bomb or a damaged header.
PIXEL_LIMIT = 2**28
Image.MAX_IMAGE_PIXELS = PIXEL_LIMIT

HINT = "`python -m fastssl.data scan DATA` finds all such images, `--exclude FILE` leaves them out of a new run"
OTHERS = {
    b"GIF8": "a GIF",
    b"%PDF": "a PDF",
    b"\x1f\x8b": "gzip-compressed",
    b"PK\x03\x04": "a zip archive",
    b"8BPS": "a Photoshop file",
    b"\x00\x00\x00\x0cjP  ": "JPEG 2000",
}


class ImageError(DataError):
    """An image that cannot be read or decoded."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"cannot read the image '{name}' ({reason}): {HINT}")
        self.name, self.reason = name, reason

    def __reduce__(self) -> Any:
        return ImageError, (self.name, self.reason)  # a worker process sends it to the trainer


def decode(encoded: bytes, name: str) -> Image.Image:
    """Decode an image to RGB; 16 bits keep the upper 8, the first of several frames counts, EXIF rotates nothing.

    Args:
        encoded: JPEG, PNG, BMP, TIFF, WebP or PPM, whole.
        name: of the image, for the error.

    Raises:
        DataError: it cannot be decoded; the message names it and says why.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            _refuse_bombs(image)
            return _rgb(image)
    except Exception as error:  # damaged bytes make PIL raise nearly anything: struct.error, IndexError, KeyError, …
        raise ImageError(name, _reason(encoded, error)) from None


def header(encoded: bytes, name: str) -> tuple[int, int]:
    """Height and width, as they are stored, of an image that `decode` knows: some microseconds, no decoding.

    Raises:
        DataError: it is none.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            _refuse_bombs(image)
            if isinstance(image, TiffImagePlugin.TiffImageFile):  # whose size PIL turns with its orientation
                return image.tag_v2[TiffImagePlugin.IMAGELENGTH], image.tag_v2[TiffImagePlugin.IMAGEWIDTH]
            return image.height, image.width
    except Exception as error:
        raise ImageError(name, _reason(encoded, error)) from None


def _refuse_bombs(image: Image.Image) -> None:
    if image.width * image.height > PIXEL_LIMIT:  # PIL itself warns, and refuses twice as many
        raise ValueError(f"{image.width}×{image.height} pixels are more than {PIXEL_LIMIT:,}")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG")):
        # 16 bits, which PIL would clip to white
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels: save it with 8 or 16 bits")
    return image.convert("RGB")


def _reason(encoded: bytes, error: Exception) -> str:
    if not encoded:
        return "it is empty"
    if isinstance(error, UnidentifiedImageError):
        return f"it is {_what(encoded)} and not {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
    return " ".join(str(error).split()) or type(error).__name__


def _what(encoded: bytes) -> str:
    """What bytes are that PIL did not take for an image."""
    for magic, what in OTHERS.items():
        if encoded.startswith(magic):
            return what
    if encoded[4:8] == b"ftyp":
        return "HEIC, AVIF or a video"
    if encoded.lstrip()[:1] == b"<":
        return "HTML, XML or SVG"
    return "something else, or damaged at its start,"
