"""Packing a folder into shards and opening them again."""

import errno
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl.data import __main__ as command
from fastssl.data import tar_index, wds_index
from fastssl.data.pack import pack, size
from fastssl.data.sources import FolderImages, TarImages, open_source
from fastssl.errors import DataError, FastsslError
from tests.data.pictures import example, write_records


def contents(images: object) -> list[tuple[bytes, int]]:
    assert isinstance(images, FolderImages | TarImages)
    assert images.labels is not None
    return sorted((images.read(i), int(images.labels[i])) for i in range(len(images)))


def test_bytes_labels_classes_and_splits_are_kept(image_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert command.main(["pack", str(image_folder), str(out), "--images-per-shard=5"]) == 0
    names = ["train-000000", "train-000001", "train-000002", "val-000000", "val-000001"]
    files = [f"{name}.{kind}" for name in names for kind in ("idx", "tar")]
    assert sorted(path.name for path in out.iterdir()) == ["classes.txt", *files]
    folder, shards = open_source(str(image_folder)), open_source(str(out))
    assert contents(folder.train) == contents(shards.train)
    assert contents(folder.test) == contents(shards.test)
    assert shards.train.classes == ("cat", "dog")
    assert isinstance(shards.train, TarImages)
    assert shards.train.groups.bincount().tolist() == [5, 5, 2]
    assert shards.train.labels is not None
    assert shards.train.labels.tolist() != sorted(shards.train.labels.tolist())  # shuffled
    keys = [name.split(".")[0] for name in shards.train.members]
    assert len(set(keys)) == 12


def test_indexes_tell_where_the_images_lie(image_folder: Path, tmp_path: Path) -> None:
    pack(open_source(str(image_folder)), tmp_path / "out", images_per_shard=5)
    for path in (tmp_path / "out").glob("*.tar"):
        found = tar_index.index(str(path))
        listed = list(zip(found.members, found.offsets, found.lengths, strict=True))
        assert wds_index.parse(path.with_suffix(".idx").read_text()) == listed


def test_the_seed_decides_the_bytes(image_folder: Path, tmp_path: Path) -> None:
    source = open_source(str(image_folder))
    for name, seed, workers in (("one", 3, 1), ("same", 3, 4), ("other", 4, 4)):
        pack(source, tmp_path / name, images_per_shard=4, seed=seed, workers=workers)
    one, same, other = (
        [path.read_bytes() for path in sorted((tmp_path / name).glob("*.tar"))] for name in ("one", "same", "other")
    )
    assert one == same
    assert one != other


@settings(max_examples=15, deadline=None)
@given(st.integers(11_000, 60_000))
def test_no_shard_is_larger_than_asked(limit: int) -> None:
    """Except those of a single image."""
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        images = Path(temporary) / "images" / "cat"
        images.mkdir(parents=True)
        for i in range(12):
            (images / f"{i}.jpg").write_bytes(bytes(i * 700))
        pack(open_source(str(images.parent)), Path(temporary) / "out", shard_bytes=limit)
        sizes = [path.stat().st_size for path in Path(temporary).glob("out/*.tar")]
        members = []
        for path in Path(temporary).glob("out/*.tar"):
            with tarfile.open(path) as tar:
                members.append(len(tar.getmembers()))
        assert sum(members) == 24
        assert all(s <= limit or m == 2 for s, m in zip(sizes, members, strict=True))


def test_unlabelled_images_and_records_are_packed(tmp_path: Path, image_folder: Path) -> None:
    pack(open_source(str(image_folder / "train" / "cat")), tmp_path / "out")
    assert open_source(str(tmp_path / "out")).train.labels is None
    encoded = [path.read_bytes() for path in image_folder.rglob("*.png")]
    write_records(tmp_path / "x.tfrecord", [example(image, 7) for image in encoded])
    pack(open_source(str(tmp_path / "x.tfrecord")), tmp_path / "again")
    again = open_source(str(tmp_path / "again")).train
    assert contents(again) == sorted((image, 7) for image in encoded)


def test_a_folder_with_shards_is_refused(image_folder: Path, tmp_path: Path) -> None:
    source = open_source(str(image_folder))
    pack(source, tmp_path / "out")
    with pytest.raises(FastsslError, match=r"has shards already, such as .*train-000000\.tar"):
        pack(source, tmp_path / "out")
    with pytest.raises(FastsslError, match="embedded lies in memory"):
        pack(open_source("embedded"), tmp_path / "other")


def test_an_unreadable_file_ends_the_packing_unless_left_out(image_folder: Path, tmp_path: Path) -> None:
    bad = image_folder / "train" / "cat" / "x.jpg"
    bad.symlink_to("nowhere")
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"x\.jpg' \(No such file.*--exclude"):
        command.main(["pack", str(image_folder), str(out)])
    (tmp_path / "bad.txt").write_text(f"{bad}\n")
    assert command.main(["pack", str(image_folder), str(out), f"--exclude={tmp_path}/bad.txt"]) == 0
    assert len(open_source(str(out)).train) == 12


def test_a_full_disk_is_one_error_and_leaves_nothing(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, written = open_source(str(image_folder)), 0

    def fsync(file: int) -> None:
        nonlocal written
        written += 1
        if written > 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fsync)
    with pytest.raises(FastsslError, match=r"no space for the shards in '.*out': they take 0\.\d+ GB"):
        pack(source, tmp_path / "out", images_per_shard=2, workers=2)
    assert list((tmp_path / "out").iterdir()) == []
    monkeypatch.undo()
    usage: Any = type("usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(FastsslError, match="no space"):
        pack(source, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_ctrl_c_leaves_nothing(image_folder: Path, tmp_path: Path) -> None:
    def progress(done: int, count: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(open_source(str(image_folder)), tmp_path / "out", images_per_shard=1, workers=2, progress=progress)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("how", [KeyboardInterrupt, PermissionError])
@pytest.mark.parametrize("after", [0, 3, 8])
def test_an_interruption_among_the_last_moves_leaves_nothing(
    how: type[BaseException], after: int, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And another one, while that is tidied up, what nobody takes for whole data."""
    out, moves, replace, unlink = tmp_path / "out", 0, os.replace, Path.unlink

    def interrupted(source: Path, target: Path) -> None:
        nonlocal moves
        if Path(target).parent == out:
            moves += 1
            if moves > after:
                raise how
        replace(source, target)

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(how):
        pack(open_source(str(image_folder)), out, images_per_shard=3)
    assert list(out.iterdir()) == []
    if after:
        moves = 0

        def again(path: Path, missing_ok: bool = False) -> None:
            if path.parent == out:
                raise KeyboardInterrupt
            unlink(path, missing_ok)

        monkeypatch.setattr(Path, "unlink", again)
        with pytest.raises(KeyboardInterrupt):
            pack(open_source(str(image_folder)), out, images_per_shard=3)
        with pytest.raises(FastsslError, match="half packed"):
            open_source(str(out))


def test_remote_shards_are_refused_before_anything_is_fetched(tmp_path: Path) -> None:
    for arguments in (["pack", "s3://b/a.tar", str(tmp_path)], ["scan", "s3://b/{0..9}.tar"]):
        with pytest.raises(FastsslError, match=rf"{arguments[0]} works on local data: download the shards of 's3://b/"):
            command.main(arguments)


def test_what_a_killed_packing_leaves_is_not_taken_for_whole(image_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(open_source(str(image_folder)), out, images_per_shard=3)
    (out / ".packing").mkdir()  # there until the last shard is in its place
    with pytest.raises(FastsslError, match="half packed"):
        open_source(str(out))
    with pytest.raises(FastsslError, match="half packed"):
        pack(open_source(str(image_folder)), out)


@pytest.mark.parametrize(
    ("text", "bytes_"), [("256MB", 256 * 10**6), ("1.5GiB", 3 * 2**29), ("10 kb", 10_000), ("7", 7)]
)
def test_sizes(text: str, bytes_: int) -> None:
    assert size(text) == bytes_


@pytest.mark.parametrize("text", ["", "0MB", "big", "-1MB", "256M B"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(FastsslError, match="shard_size must be"):
        size(text)


def test_wrong_options_are_told(image_folder: Path, tmp_path: Path) -> None:
    for options, said in (
        (["--images_per_shard=0"], "1 or more"),
        (["--shard_size=1MB", "--images_per_shard=3"], "not both"),
    ):
        with pytest.raises(FastsslError, match=said):
            command.main(["pack", str(image_folder), str(tmp_path / "out"), *options])
