"""What is a readable image, and what is said of others."""

import io
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastssl.data import decode as module
from fastssl.data.decode import ImageError, decode, header
from fastssl.errors import DataError
from tests.data.pictures import animated, deep, encode, readable, turned, unreadable


@pytest.mark.parametrize(("name", "encoded"), readable().items())
def test_readable(name: str, encoded: bytes) -> None:
    assert decode(encoded, name).mode == "RGB"


@pytest.mark.parametrize(("name", "encoded"), unreadable().items())
def test_unreadable_is_named_with_what_to_do(name: str, encoded: bytes) -> None:
    with pytest.raises(DataError, match=rf"'a/{name}' \(.+\): .*fastssl\.data scan.*--exclude"):
        decode(encoded, f"a/{name}")


@pytest.mark.parametrize(
    ("encoded", "said"),
    [
        (b"", "it is empty"),
        (animated("GIF"), "it is a GIF and not JPEG, PNG"),
        (b"\n<html>", "it is HTML"),
        (b"\0\0\0\x1cftypheic" + bytes(99), "HEIC"),
        (encode()[:700], "truncated"),
        (bytes(300), "damaged at its start"),
    ],
)
def test_the_reason_is_plain(encoded: bytes, said: str) -> None:
    with pytest.raises(ImageError, match=said):
        decode(encoded, "x.jpg")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_the_header_has_the_size_as_it_is_stored(format: str) -> None:
    """DALI's, whatever EXIF says: PIL turns a TIFF."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[274] = 6
    Image.new("RGB", (40, 20)).save(file, format, exif=exif)
    assert header(file.getvalue(), "x") == (20, 40)
    with pytest.raises(DataError, match="'x'"):
        header(file.getvalue()[:5], "x")


def test_exif_rotates_nothing_and_the_first_frame_counts() -> None:
    assert decode(turned(), "x").size == (61, 47)
    for kind in ("PNG", "WEBP", "TIFF"):
        red = np.asarray(decode(animated(kind), "x"))[5, 5].astype(int)
        assert abs(red - [255, 0, 0]).max() < 4


def test_sixteen_bits_keep_the_upper_eight() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((3, 3), 0x8000, np.int32)).save(buffer, "PPM")
    for encoded in (deep("PNG"), deep("TIFF"), buffer.getvalue()):
        assert decode(encoded, "x").getpixel((0, 0)) == (128, 128, 128)


def test_a_large_photograph_passes_and_a_bomb_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    Image.new("L", (12_000, 9_000)).save(buffer, "JPEG")
    assert decode(buffer.getvalue(), "x").size == (12_000, 9_000)
    monkeypatch.setattr(module, "PIXEL_LIMIT", 10**6)
    with pytest.raises(ImageError, match=r"12000×9000 pixels are more than 1,000,000"):
        decode(buffer.getvalue(), "x")
    with pytest.raises(ImageError, match=r"12000×9000 pixels are more than 1,000,000"):
        header(buffer.getvalue(), "x")


def test_the_error_survives_the_way_from_a_worker() -> None:
    error = pickle.loads(pickle.dumps(ImageError("a.jpg", "it is empty")))
    assert (error.name, error.reason) == ("a.jpg", "it is empty")
    assert "a.jpg" in str(error)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(readable())), st.data())
def test_damage_is_either_decoded_or_named(name: str, data: st.DataObject) -> None:
    """Whatever PIL raises on damaged bytes, what comes out is a DataError."""
    encoded = bytearray(readable()[name])
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(encoded) - 1))
        encoded[at] = data.draw(st.integers(0, 255))
    try:
        assert decode(bytes(encoded[: data.draw(st.integers(0, len(encoded)))]), name).mode == "RGB"
    except ImageError as error:
        assert error.reason
