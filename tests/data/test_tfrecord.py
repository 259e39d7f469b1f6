"""TFRecord files written by hand, read back."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastssl.data import stored, tfrecord
from fastssl.data.sources import RecordImages, open_source
from fastssl.errors import DataError, FastsslError
from tests.data.pictures import encode, example, write_records


@given(st.binary(min_size=1), st.none() | st.integers(0, 2**40))
def test_an_example_gives_back_image_and_label(encoded: bytes, label: int | None) -> None:
    record = example(encoded, label)
    assert tfrecord.image(record) == encoded
    assert tfrecord.label(record) == label


def _field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2, len(content)]) + content


def test_the_message_is_tensorflows() -> None:
    """Spelt out in protobuf's wire format with the field numbers of example.proto and feature.proto."""
    encoded = _field(1, b"image/encoded") + _field(2, _field(1, _field(1, b"JPEG")))
    label = _field(1, b"image/class/label") + _field(2, _field(3, _field(1, b"\xac\x02")))  # packed varint
    record = _field(1, _field(1, label) + _field(1, encoded))
    assert tfrecord.image(record) == b"JPEG"
    assert tfrecord.label(record) == 300
    old = _field(1, b"image/class/label") + _field(2, _field(3, b"\x08\xac\x02"))  # not packed
    assert tfrecord.label(_field(1, _field(1, old))) == 300


def test_the_checksum_is_crc32c() -> None:
    """The test vector of RFC 3720 (32 zero bytes: 0x8A9136AA), masked."""
    crc = 0x8A9136AA
    assert tfrecord._masked_crc(bytes(32)) == ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def test_files_are_opened_by_extension_prefix_and_folder(tmp_path: Path) -> None:
    images = [encode(seed=i) for i in range(7)]
    for shard, rows in (
        ("train-00000-of-00002", (0, 1, 2)),
        ("train-00001-of-00002", (3, 4)),
        ("validation-00000-of-00001", (5, 6)),
    ):
        write_records(tmp_path / shard, [example(images[i], i % 3) for i in rows])
    for data in (f"tfrecord:{tmp_path}", f"tfrecord:{tmp_path}/*-of-*"):
        source = open_source(data)
        assert isinstance(source.train, RecordImages)
        assert source.test is not None
        assert [source.train.read(i) for i in range(5)] == images[:5]
        assert source.train.labels is not None
        assert source.train.labels.tolist() == [0, 1, 2, 0, 1]
        assert source.train.groups.tolist() == [0, 0, 0, 1, 1]
        assert source.train.name(4) == f"{tmp_path}/train-00001-of-00002#1"
        part = source.train.subset(torch.tensor([4, 0]))
        assert part.read(0) == images[4]
        assert part.labels is not None
        assert part.labels.tolist() == [1, 0]
        assert len(source.test) == 2
    (tmp_path / "train-00000-of-00002").rename(tmp_path / "mine.tfrecord")
    assert len(open_source(str(tmp_path / "mine.tfrecord")).train) == 3
    with pytest.raises(FastsslError, match="no images in"):
        write_records(tmp_path / "none.tfrecord", [])
        open_source(str(tmp_path / "none.tfrecord"))


def test_labels_are_of_all_or_none(tmp_path: Path) -> None:
    path = write_records(tmp_path / "x.tfrecord", [example(encode()), example(encode())])
    assert open_source(str(path)).train.labels is None
    write_records(path, [example(encode(), 1), example(encode())])
    with pytest.raises(DataError, match=r"x\.tfrecord#1' \(it has no image/class/label"):
        _ = open_source(str(path)).train.labels


def test_labels_are_read_in_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A future for each of a million records would take more memory than the images' places."""
    tasks = []

    class Counted(ThreadPoolExecutor):
        def submit(self, *args: Any, **how: Any) -> Any:
            tasks.append(args)
            return super().submit(*args, **how)

    monkeypatch.setattr(stored, "RUN", 4)
    monkeypatch.setattr(stored, "ThreadPoolExecutor", Counted)
    path = write_records(tmp_path / "x.tfrecord", [example(b"", label) for label in range(10)])
    labels = open_source(str(path)).train.labels
    assert labels is not None
    assert labels.tolist() == list(range(10))
    assert len(tasks) == 3


def test_only_who_has_records_needs_protobuf() -> None:
    program = "import sys, fastssl.data.stored; assert 'google.protobuf' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.mark.parametrize("record", [example(None, 1), b"\xff\xff\xff", b""])
def test_a_record_without_image_is_named(record: bytes, tmp_path: Path) -> None:
    images = open_source(str(write_records(tmp_path / "x.tfrecord", [record]))).train
    assert isinstance(images, RecordImages)
    with pytest.raises(DataError, match=r"x\.tfrecord#0' \(.*tf\.train\.Example"):
        images.read(0)


def test_a_cut_and_a_damaged_frame_are_told(tmp_path: Path) -> None:
    path = write_records(tmp_path / "x.tfrecord", [example(bytes(500), 1)] * 3)
    whole = path.read_bytes()
    for cut in range(1, len(whole), len(whole) // 20):
        if cut % (len(whole) // 3):
            path.write_bytes(whole[:cut])
            with pytest.raises(DataError, match=r"x\.tfrecord' \(it is cut short"):
                open_source(str(path))
    for at, said in ((2, "not a TFRecord file"), (len(whole) // 3 + 2, "not a record")):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(DataError, match=said):
            open_source(str(path))
