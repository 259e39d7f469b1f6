"""Scanning: every image that a loader would refuse is named, and no other one."""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl.data import __main__ as command
from fastssl.data.check import check, fault, refused_by_dali
from fastssl.data.exclude import Exclusions, as_comment, as_line
from fastssl.data.scan import CHUNK, _in_processes, scan
from fastssl.data.sources import open_source
from fastssl.data.stored import Location
from fastssl.errors import DataError, FastsslError
from tests.data.pictures import encode, example, readable, unreadable, write_records, write_tar


def found(data: Path | str, workers: int = 1) -> dict[str, str]:
    bad: dict[str, str] = {}
    scan(str(data), workers, bad.__setitem__)
    return bad


def mutate(encoded: bytes, draw: random.Random) -> bytes:
    """Cut, flip or blank some of an image."""
    damaged = bytearray(encoded)
    how = draw.choice(("cut", "flip", "blank"))
    if how == "cut":
        return encoded[: draw.randrange(len(encoded))]
    if how == "blank":
        at, count = draw.randrange(len(damaged)), draw.randrange(1, 64)
        damaged[at : at + count] = bytes(len(damaged[at : at + count]))
    for _ in range(draw.randrange(1, 8) if how == "flip" else 0):
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
    return bytes(damaged)


@pytest.mark.parametrize(
    "count",
    [200, pytest.param(1000, marks=pytest.mark.slow)],  # each is decoded three times, twice by DALI
)
def test_mutated_images(count: int, tmp_path: Path) -> None:
    """Against PIL without our wrapping, and against DALI where it is installed."""
    draw, good = random.Random(0), readable()
    for name, encoded in {**good, **unreadable()}.items():
        (tmp_path / name).write_bytes(encoded)
    for number in range(count):
        name = draw.choice(sorted(good))
        (tmp_path / f"{number:04d}-{name}").write_bytes(mutate(good[name], draw))
    (tmp_path / "dangling.png").symlink_to("nowhere")
    bad = {Path(name).name for name in found(tmp_path, workers=2)}
    assert not bad & good.keys()
    assert {*unreadable(), "dangling.png"} <= bad
    refused = {path.name for path in tmp_path.glob("*.*") if path.is_file() and not _decodes(path)}
    assert bad - {"dangling.png"} == refused
    assert 0.3 < len(bad) / count < 0.8


def _decodes(path: Path) -> bool:
    from PIL import Image

    try:
        with Image.open(path) as image:
            kind, mode = image.format, image.mode
            image.convert("RGB")
    except Exception:
        return False
    return kind != "GIF" and mode not in ("F", "I") and not refused_by_dali(path.read_bytes())


def test_all_that_dali_refuses_is_found() -> None:
    """With many more damages, in this process."""
    pytest.importorskip("nvidia.dali", reason="compares with DALI")
    draw, good = random.Random(1), readable()
    for _ in range(300):
        encoded = mutate(good[draw.choice(sorted(good))], draw)
        path = f"/proc/self/fd/{_in_memory(encoded)}"
        # DALI would believe a header that says 92,000×92,000, and keep the memory that it asked for.
        assert check([("x", Location(path))]) or not refused_by_dali(encoded)
        os.close(int(path.rsplit("/", 1)[1]))


def _in_memory(content: bytes) -> int:
    file = os.memfd_create("image")
    os.write(file, content)
    return file


def test_shards_are_scanned(tmp_path: Path) -> None:
    members = [("0.jpg", encode()), ("1.jpg", b"<html>"), ("2.png", encode("PNG"))]
    write_tar(tmp_path / "a.tar", members)
    cut = write_tar(tmp_path / "b.tar", members)
    cut.write_bytes(cut.read_bytes()[:4000])
    (tmp_path / "c.tar").touch()
    bad = found(tmp_path)
    assert list(bad) == [f"{tmp_path}/{name}" for name in ("b.tar", "c.tar", "a.tar/1.jpg")]
    assert "cut short" in bad[f"{tmp_path}/b.tar"]
    records = write_records(tmp_path / "x.tfrecord", [example(encode()), example(b""), example(None)])
    assert list(found(records)) == [f"{records}#1", f"{records}#2"]


def test_the_list_is_what_exclude_takes(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    listed = tmp_path / "bad.txt"
    assert command.main(["scan", "images", "--output", str(listed), "--workers=1"]) == 0
    assert listed.read_text() == ""
    odd = image_folder / "train" / "cat" / "a #\n b.jpg"
    odd.touch()
    os.mkdir(image_folder / "val" / "dog" / "y.png")
    not_text = os.fsencode(image_folder / "train") + b"/cat/\xff.jpg"
    Path(os.fsdecode(not_text)).touch()
    (image_folder / "train" / "dog" / "01.png").write_bytes(b"\x89PNG")
    assert command.main(["scan", "images", "--output", str(listed), "--workers=1"]) == 1
    printed = capsys.readouterr().out
    assert r"images/train/cat/a #\n b.jpg: it is empty" in printed
    assert len(printed.splitlines()) == 4
    remarks = [line for line in listed.read_text("utf-8", "surrogateescape").split("\n") if "y.png" in line]
    assert remarks == [
        f"# {image_folder}/val/dog/y.png: it is a folder with the name of an image, and no images are below it"
    ]
    source = open_source("images", exclude=listed)
    monkeypatch.chdir("/")
    assert len(open_source(str(image_folder), exclude=listed).train) == len(source.train) == 11


def test_a_class_with_the_name_of_an_image_stays(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "val"):
        (image_folder / split / "cat").rename(image_folder / split / "cat.png")
    (image_folder / "train" / "dog" / "empty.png").mkdir()
    listed = tmp_path / "bad.txt"
    assert command.main(["scan", str(image_folder), "--output", str(listed), "--workers=1"]) == 0
    assert [line.split(":")[0][-9:] for line in capsys.readouterr().out.splitlines()] == ["empty.png"]
    assert len(open_source(str(image_folder), exclude=listed).train) == 12


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.binary(min_size=1, max_size=12)
        | st.text("a #\\nr\r\n\x0b\x0c\x1c\x85\u2028\u2029", min_size=1, max_size=9).map(str.encode),
        min_size=1,
        max_size=6,
    )
)
def test_every_file_name_survives_the_list(names: list[bytes]) -> None:
    """Whatever bytes it has: they need not be UTF-8."""
    files = [os.fsdecode(name.replace(b"/", b"_").replace(b"\0", b"_")) for name in names]
    paths = [f"/data/{name}" for name in files if name not in (".", "..")]
    text = "".join(f"{as_comment(path)}\n{as_line(path)}\n" for path in paths)
    with tempfile.NamedTemporaryFile() as file:
        file.write(text.encode("utf-8", "surrogateescape"))
        file.flush()
        excluded = Exclusions(Path(file.name), "/elsewhere")
    assert all(path in excluded for path in paths)
    assert not any(f"/data/other/{name}" in excluded for name in files if name.strip())


def test_lists_by_hand_with_the_line_ends_of_windows(image_folder: Path, tmp_path: Path) -> None:
    listed = tmp_path / "bad.txt"
    listed.write_bytes(b"# mine\r\n\r\ntrain/cat/00.png\r\n train/dog/11.png \r\n")
    assert len(open_source(str(image_folder), exclude=listed).train) == 10


def test_without_permission(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(encode())
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("root may read everything")
    assert found(tmp_path) == {str(path): "Permission denied"}


def test_nothing_to_scan_is_an_error(tmp_path: Path) -> None:
    for data in (str(tmp_path), str(tmp_path / "nowhere"), "cifar10"):
        with pytest.raises(FastsslError):
            found(data)
    with pytest.raises(FastsslError, match="workers must be 1 or more, got 0"):
        command.main(["scan", str(tmp_path), "--workers=0"])


class _Killer(Location):
    """Kills the process that it is sent to, as the kernel does when memory runs out."""

    def __reduce__(self) -> Any:
        return eval, ("__import__('os').kill(__import__('os').getpid(), 9)",)


def test_an_image_that_kills_is_named(tmp_path: Path) -> None:
    (tmp_path / "good.jpg").write_bytes(encode())
    (tmp_path / "bad.jpg").touch()
    item = {name: (name, Location(str(tmp_path / name))) for name in ("good.jpg", "bad.jpg")}
    deadly = ("deadly.jpg", _Killer("x"))
    chunks = [[item["bad.jpg"]], [item["good.jpg"], deadly], [item["good.jpg"], item["bad.jpg"]]]
    results = list(_in_processes(iter(chunks), 1))
    assert sum(count for count, _ in results) == 5
    bad = sorted(finding for _, findings in results for finding in findings)
    assert [name for name, _ in bad] == ["bad.jpg", "bad.jpg", "deadly.jpg"]
    assert "was killed" in bad[-1][1]


def test_a_killed_process_loses_nothing(tmp_path: Path) -> None:
    for number in range(8 * CHUNK):
        (tmp_path / f"{number:04d}.jpg").write_bytes(b"" if number % 50 == 0 else encode())
    bad: list[str] = []
    killed = False

    def progress(done: int, count: int) -> None:
        nonlocal killed
        if done and not killed:
            killed = True
            os.kill(active_children()[0].pid or 0, signal.SIGKILL)

    assert scan(str(tmp_path), 2, lambda name, reason: bad.append(Path(name).name), progress) == 8 * CHUNK
    assert sorted(bad) == [f"{number:04d}.jpg" for number in range(0, 8 * CHUNK, 50)]


def test_processes_that_cannot_start_blame_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "good.jpg").write_bytes(encode())
    monkeypatch.setattr("fastssl.data.scan.start", len)  # raises: a pipe has no length
    bad: list[str] = []
    with pytest.raises(FastsslError, match="the worker processes die at their start"):
        scan(str(tmp_path), 1, lambda name, reason: bad.append(name))
    assert not bad


@pytest.mark.slow  # starts the command anew
def test_a_script_on_standard_input_is_told_to_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "good.jpg").write_bytes(encode())
    script = f"from fastssl.data.scan import scan\nscan({str(tmp_path)!r}, 1, print)\n"
    ended = subprocess.run([sys.executable], input=script, capture_output=True, text=True, timeout=120, check=False)
    assert (ended.stdout, ended.returncode) == ("", 1)
    assert "FastsslError: the worker processes die at their start" in ended.stderr.splitlines()[-1]


def test_a_fault_is_of_reading_or_of_decoding() -> None:
    def read() -> bytes:
        raise DataError("the store is gone")

    assert fault("a", encode) is None
    for reader, reason in ((lambda: b"", "it is empty"), (read, "the store is gone")):
        found = fault("a", reader)
        assert found is not None
        assert (found.name, found.reason) == ("a", reason)


@pytest.mark.slow  # starts the command anew
@pytest.mark.parametrize("how", ["ctrl-c", "killed"])
def test_it_ends_at_once_and_leaves_no_process(how: str, tmp_path: Path) -> None:
    picture = tmp_path / "picture"
    picture.write_bytes(encode(size=(700, 700)))
    (tmp_path / "0000.jpg").touch()
    for number in range(1, 4000):
        (tmp_path / f"{number:04d}.jpg").symlink_to(picture)
    listed = tmp_path / "bad.txt"
    started = subprocess.Popen(
        [sys.executable, "-m", "fastssl.data", "scan", str(tmp_path), f"--output={listed}", "--workers=2"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert started.stdout is not None
    assert "0000.jpg: it is empty" in started.stdout.readline()
    if how == "ctrl-c":
        os.killpg(started.pid, signal.SIGINT)
        assert started.wait(30) == 130
        assert started.stderr is not None
        assert "Traceback" not in started.stderr.read()
    else:
        started.kill()
        started.wait(30)
    assert not listed.exists()
    end = time.monotonic() + 30
    while _alive(started.pid) and time.monotonic() < end:
        time.sleep(0.2)
    assert not _alive(started.pid)


def _alive(session: int) -> bool:
    """Whether a process of that session runs; one that nobody has waited for yet does not."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            return True
    return False
