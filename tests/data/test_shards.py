"""WebDataset shards as a source, and what is left out of any source."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fastssl.data import absolute, stored
from fastssl.data.sources import ArrayImages, FolderImages, TarImages, in_memory, open_source
from fastssl.errors import DataError, FastsslError
from tests.data.pictures import encode, example, write_records, write_tar


def shards(folder: Path, split: str = "train", count: int = 3, each: int = 4, start: int = 0) -> list[bytes]:
    """`count` shards of `each` images with labels; returns the images."""
    folder.mkdir(parents=True, exist_ok=True)
    images = [encode("PNG", size=(32, 32), seed=start + i) for i in range(count * each)]
    for shard in range(count):
        rows = range(shard * each, (shard + 1) * each)
        members = [m for i in rows for m in ((f"{i:04d}.png", images[i]), (f"{i:04d}.cls", str(i % 2).encode()))]
        write_tar(folder / f"{split}-{shard:06d}.tar", members)
    return images


def test_shards_are_read_where_they_lie(tmp_path: Path) -> None:
    images = shards(tmp_path)
    for data in (
        str(tmp_path),
        f"{tmp_path}/*.tar",
        f"{tmp_path}/train-{{000000..000002}}.tar",
        f"{tmp_path}/{{train,tr*n}}-*.tar",
    ):
        found = open_source(data).train
        assert isinstance(found, TarImages)
        assert [found.read(i) for i in range(len(found))] == images
        assert found.labels is not None
        assert found.labels.tolist() == [0, 1] * 6
        assert found.groups.tolist() == [0] * 4 + [1] * 4 + [2] * 4
        assert found.name(5) == f"{tmp_path}/train-000001.tar/0005.png"
        part = pickle.loads(pickle.dumps(found.subset(torch.tensor([9, 2]))))
        assert [part.read(0), part.read(1)] == [images[9], images[2]]
        assert (part.labels.tolist(), part.groups.tolist()) == ([1, 0], [2, 0])
    held = in_memory(found)
    assert isinstance(held, ArrayImages)
    assert held.pixels.shape == (12, 3, 32, 32)
    assert len(open_source(f"{tmp_path}/train-000002.tar").train) == 4


def test_splits_by_folder_and_by_name(tmp_path: Path) -> None:
    for root, folders in (("one", (".", ".")), ("two", ("train", "val"))):
        for folder, (split, count) in zip(folders, (("train", 3), ("val", 1)), strict=True):
            shards(tmp_path / root / folder, split, count)
        source = open_source(str(tmp_path / root))
        assert source.test is not None
        assert (len(source.train), len(source.test)) == (12, 4)
    glob = open_source(f"{tmp_path}/one/*.tar")  # the images held out must not slip in here either
    assert glob.test is not None
    assert len(glob.train) == 12
    held_out = open_source(f"{tmp_path}/one/train-*.tar", holdout=0.25)
    assert held_out.test is not None
    assert (len(held_out.train), len(held_out.test)) == (9, 3)


def test_a_label_must_be_in_every_sample(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("0.png", encode("PNG")), ("0.cls", b"3"), ("1.png", encode("PNG"))])
    assert open_source(str(tmp_path)).train.labels is None
    write_tar(tmp_path / "a.tar", [("0.png", encode("PNG")), ("0.cls", b"3")])
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(FastsslError, match=r"class 3, and classes\.txt there names only 2"):
        open_source(str(tmp_path))


def test_images_win_over_an_archive_beside_them(image_folder: Path) -> None:
    write_tar(image_folder / "train" / "all.tar", [("0.png", encode("PNG"))])
    assert isinstance(open_source(str(image_folder)).train, FolderImages)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("x/*.tar", r"there is no shard '.*/x/\*\.tar'"),
        ("train-{000000..000009}.tar", r"there is no shard '.*000003\.tar', of '"),
        ("train-{000009..000000}.tar", "runs backwards"),
        ("missing.tar", "there is no shard"),
        ("tfrecord:none-*", "there is no shard"),
        ("note.txt", "is a file"),
    ],
)
def test_what_is_not_there_is_named(data: str, said: str, tmp_path: Path) -> None:
    shards(tmp_path)
    (tmp_path / "note.txt").touch()
    prefix, path = ("tfrecord:", data[9:]) if data.startswith("tfrecord:") else ("", data)
    with pytest.raises(FastsslError, match=said):
        open_source(f"{prefix}{tmp_path}/{path}")


def test_a_slip_in_a_range_of_local_shards_is_told() -> None:
    for wrong, said in (("{0..99999999}", "more than 1,000,000 shards"), ("{9..0}", "backwards")):
        with pytest.raises(FastsslError, match=said):
            open_source(f"/nowhere/a-{wrong}.tar")


def test_two_kinds_of_shards_and_half_a_packing_are_refused(tmp_path: Path) -> None:
    shards(tmp_path)
    write_records(tmp_path / "x.tfrecord", [example(encode())])
    with pytest.raises(FastsslError, match="one kind of shards"):
        open_source(str(tmp_path))
    (tmp_path / ".packing").mkdir()
    with pytest.raises(FastsslError, match="half packed"):
        open_source(str(tmp_path))


def test_a_cut_shard_is_named_unless_it_is_left_out(tmp_path: Path) -> None:
    shards(tmp_path)
    bad = tmp_path / "train-000001.tar"
    bad.write_bytes(bad.read_bytes()[:3000])
    with pytest.raises(DataError, match=r"train-000001\.tar' \(it is cut short: .*--exclude FILE"):
        open_source(str(tmp_path))
    listed = tmp_path / "bad.txt"
    listed.write_text(f"# cut\n\n{bad}\n{tmp_path}/train-000002.tar/0009.png\n/gone.jpg\n")
    images = open_source(str(tmp_path), exclude=listed).train
    assert [images.name(i)[-8:] for i in range(len(images))] == [f"{i:04d}.png" for i in (0, 1, 2, 3, 8, 10, 11)]  # type: ignore[union-attr]
    assert images.labels is not None
    assert images.labels.tolist() == [0, 1, 0, 1, 0, 0, 1]


def test_a_shard_that_shrinks_afterwards_is_an_error(tmp_path: Path) -> None:
    shards(tmp_path)
    images = open_source(str(tmp_path)).train
    assert isinstance(images, TarImages)
    with open(tmp_path / "train-000002.tar", "r+b") as file:
        file.truncate(600)
    with pytest.raises(DataError, match=r"000002\.tar/0011\.png' \(its shard .* has become shorter"):
        images.read(11)
    (tmp_path / "train-000000.tar").unlink()
    with pytest.raises(DataError, match="No such file"):
        images.read(0)


def test_many_threads_and_more_shards_than_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "OPEN_FILES", 2)
    images = shards(tmp_path, count=8, each=3)
    found = open_source(str(tmp_path)).train
    assert isinstance(found, TarImages)

    def wrong(seed: int) -> list[int]:
        order = torch.randperm(24, generator=torch.Generator().manual_seed(seed)).tolist() * 20
        return [i for i in order if found.read(i) != images[i]]

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(wrong, range(8))) == [[]] * 8


def test_names_of_files_are_left_out_absolute_or_relative(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (image_folder / "val" / "cat" / "00.png").write_bytes(b"broken, and never looked at")
    listed = tmp_path / "bad.txt"
    names = [image_folder / "train/cat/00.png", "images/train/cat/02.png", "train/dog/01.png ", "val/cat"]
    listed.write_text("\r\n".join(map(str, names)))
    source = open_source("images", exclude=listed)
    assert source.test is not None
    assert (len(source.train), len(source.test)) == (9, 3)
    assert source.train.labels is not None
    assert source.train.labels.tolist() == [0] * 4 + [1] * 5
    assert isinstance(source.train, FolderImages)
    assert source.train.name(0) == "images/train/cat/04.png"


def test_leaving_out_nothing_or_all_is_an_error(image_folder: Path, tmp_path: Path) -> None:
    listed = tmp_path / "bad.txt"
    listed.write_text("")
    assert len(open_source(str(image_folder), exclude=listed).train) == 12
    listed.write_text("/other/data.jpg\n")
    with pytest.raises(FastsslError, match=r"none of the names .*bad\.txt', such as '/other/data\.jpg'"):
        open_source(str(image_folder), exclude=listed)
    listed.write_text("train\n" + "".join(f"{path}\n" for path in image_folder.glob("train/*/*")))
    with pytest.raises(FastsslError, match=r"bad\.txt' leaves no images"):
        open_source(str(image_folder), exclude=listed)
    with pytest.raises(FastsslError, match=r"cannot read the list .*nowhere\.txt"):
        open_source(str(image_folder), exclude=tmp_path / "nowhere.txt")
    with pytest.raises(FastsslError, match="the data are embedded"):
        open_source("embedded", exclude=listed)


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").symlink_to("nowhere")
    images = open_source(str(tmp_path)).train
    assert isinstance(images, FolderImages)
    for index, said in ((0, "not a regular file"), (1, "No such file")):
        with pytest.raises(DataError, match=said):
            images.read(index)


def test_a_folder_that_cannot_be_listed_is_an_error(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root no permission is missing, so the refusal is simulated."""
    import os

    real = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"train/dog' \(Permission denied"):
        open_source(str(image_folder))


def test_data_are_the_same_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute("cifar10:x") == "cifar10:x"
    assert absolute("s3://bucket/x") == "s3://bucket/x"
    assert absolute("a/*.tar") == f"{tmp_path}/a/*.tar"
    assert absolute("tfrecord:a/x-*") == f"tfrecord:{tmp_path}/a/x-*"
