"""Encoded images, tars and TFRecords for the tests of this folder."""

import io
import struct
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastssl.data.tfrecord import IMAGE, LABEL, _example, _masked_crc


def encode(
    format: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (61, 47), seed: int = 0, **how: Any
) -> bytes:
    """A smooth random picture."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode).save(buffer, format, **how)
    return buffer.getvalue()


def deep(format: str = "PNG") -> bytes:
    """16-bit grey, all values 0x8000."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((9, 7), 0x8000, np.uint16)).save(buffer, format)
    return buffer.getvalue()


def animated(format: str) -> bytes:
    """Three frames, the first one red."""
    first, *others = [Image.new("RGB", (32, 24), color) for color in ("red", "lime", "blue")]
    buffer = io.BytesIO()
    first.save(buffer, format, save_all=True, append_images=others)
    return buffer.getvalue()


def turned() -> bytes:
    """61×47, to be shown rotated."""
    exif = Image.Exif()
    exif[0x112] = 6
    return encode(exif=exif)


def readable() -> dict[str, bytes]:
    """Images of many kinds that every loader must decode, by file name."""
    return {
        "plain.jpg": encode(),
        "progressive.jpg": encode(progressive=True),
        "grey.jpeg": encode(mode="L"),
        "cmyk.JPG": encode(mode="CMYK"),
        "exif.jpg": turned(),
        "one.jpg": encode(size=(1, 1)),
        "one.png": encode("PNG", size=(1, 1)),
        "deep.png": deep(),
        "palette.png": encode("PNG", "P"),
        "alpha.png": encode("PNG", "RGBA"),
        "bits.png": encode("PNG", "1"),
        "animated.png": animated("PNG"),
        "plain.bmp": encode("BMP"),
        "plain.tif": encode("TIFF"),
        "deep.tiff": deep("TIFF"),
        "plain.webp": encode("WEBP"),
        "animated.webp": animated("WEBP"),
        "plain.ppm": encode("PPM"),
        "grey.pgm": encode("PPM", "L"),
        "png_called.jpg": encode("PNG"),
    }


def unreadable() -> dict[str, bytes]:
    """What is no image that a loader decodes, by file name."""
    return {
        "empty.jpg": b"",
        "html.jpg": b"<!DOCTYPE html><html>404</html>",
        "gif.jpg": animated("GIF"),
        "cut.jpg": encode(size=(200, 200))[:900],
        "cut.png": encode("PNG")[:400],
        "noise.png": np.random.default_rng(0).bytes(500),
        "float.tif": _float(),
    }


def _float() -> bytes:
    buffer = io.BytesIO()
    Image.new("F", (4, 4)).save(buffer, "TIFF")
    return buffer.getvalue()


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> Path:
    """A tar of regular files."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def example(encoded: bytes | None, label: int | None = None) -> bytes:
    """A serialised tf.train.Example as ImageNet's."""
    made = _example()()
    features = made.features.feature
    if encoded is not None:
        features[IMAGE].bytes_list.value.append(encoded)
    features["image/height"].int64_list.value.append(47)
    features["image/object/bbox/xmin"].float_list.value.extend([0.25, 0.5])
    features["image/class/synset"].bytes_list.value.append(b"n01440764")
    if label is not None:
        features[LABEL].int64_list.value.append(label)
    return bytes(made.SerializeToString())


def write_records(path: Path, records: Sequence[bytes]) -> Path:
    """A TFRecord file, framed by hand."""
    with open(path, "wb") as file:
        for record in records:
            length = struct.pack("<Q", len(record))
            crcs = (struct.pack("<I", _masked_crc(part)) for part in (length, record))
            file.write(length + next(crcs) + record + next(crcs))
    return path
