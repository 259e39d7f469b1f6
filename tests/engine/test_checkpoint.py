"""Checkpoints: whole or not at all."""

import concurrent.futures
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from fastssl.engine.checkpoint import CheckpointFolder, check_fits, load, save
from fastssl.engine.config import BYOLConfig, MoCoConfig, from_dict, to_dict
from fastssl.errors import FastsslError


def state(step: int = 1, **values: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "method": "moco",
        "config": to_dict(MoCoConfig()),
        "model": {"w": torch.ones(3)},
        "optimizer": {},
    }
    base |= {"training_step": {}, "alarms": {}, "seconds": 0.0, "data": {}, "world": 1, "processes": []}
    return {**base, "step": step, "total_steps": 9, **values}


def test_round_trip(tmp_path: Path) -> None:
    save(tmp_path / "a.pt", state(3))
    loaded = load(tmp_path / "a.pt")
    assert loaded["step"] == 3
    assert torch.equal(loaded["model"]["w"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.pt"
    save(path, state(1))

    def full_disk(content: object, file: Any) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(FastsslError, match=r"cannot write .*a\.pt.*No space left"):
        save(path, state(2))
    assert load(path)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]


def test_the_data_is_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (calls.append("fsync"), fsync(file))[1])  # type: ignore[func-returns-value]
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b))[1])  # type: ignore[func-returns-value]
    save(tmp_path / "a.pt", state())
    assert calls == ["fsync", "replace", "fsync"]


@pytest.mark.parametrize("share", [*(tenth / 10 for tenth in range(10)), 0.99])
def test_a_damaged_newest_gives_way_to_the_one_before(share: float, tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=3)
    folder.save(state(1))
    newest = folder.save(state(2))
    content = newest.read_bytes()
    newest.write_bytes(content[: int(len(content) * share)])
    (tmp_path / "step-000000003.tmp").write_bytes(b"killed while writing")
    found = folder.newest()
    assert found is not None
    path, loaded, complaints = found
    assert (path.name, loaded["step"]) == ("step-000000001.pt", 1)
    assert "step-000000002.pt' is damaged" in complaints[0]


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    save(tmp_path / "a.pt", state(model={"w": torch.zeros(5000)}))
    content = bytearray((tmp_path / "a.pt").read_bytes())
    content[content.index(bytes(4000)) + 2000] ^= 1
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(FastsslError, match="bad checksum"):
        load(tmp_path / "a.pt")


def test_nothing_readable_is_an_error_and_nothing_there_is_none(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    assert folder.newest() is None
    (tmp_path / "step-000000001.pt").write_bytes(b"x")
    with pytest.raises(FastsslError, match="can be read"):
        folder.newest()


def test_the_newest_are_kept(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in (1, 2, 10):
        folder.save(state(step))
    assert [p.name for p in folder.paths()] == ["step-000000002.pt", "step-000000010.pt"]


def test_other_files_are_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": {}}, tmp_path / "moco.pth")
    (tmp_path / "text.pt").write_text("hello")
    save(tmp_path / "future.pt", state(format=99))
    for name, why in (("moco.pth", "not a checkpoint of fastssl"), ("text.pt", "damaged"), ("future.pt", "format 99")):
        with pytest.raises(FastsslError, match=why):
            load(tmp_path / name)
    with pytest.raises(FastsslError, match="there is no checkpoint"):
        load(tmp_path / "none.pt")


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    save(tmp_path / "a.pt", state(model={"w": Path("x")}))  # any class of its own
    with pytest.raises(FastsslError, match="damaged or not a checkpoint"):
        load(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (BYOLConfig(), "checkpoint of moco, this is byol"),
        (MoCoConfig(backbone="resnet18"), "backbone resnet50, here it is resnet18: use --backbone resnet50"),
        (MoCoConfig(queue_size=8), "queue_size 65536, here it is 8"),
        (MoCoConfig(batch_size=8), "batch_size 256, here it is 8"),
        (MoCoConfig(decay_norm_and_bias=False), "decay_norm_and_bias True"),
        (MoCoConfig(data="elsewhere"), "data embedded, here it is elsewhere"),
    ],
)
def test_another_method_or_network_is_refused(config: MoCoConfig | BYOLConfig, named: str) -> None:
    with pytest.raises(FastsslError, match=named):
        check_fits(Path("a.pt"), state(), config)


def test_a_configuration_comes_back_as_it_was() -> None:
    for config in (MoCoConfig(lr=0.1, lr_milestones=[1.0]), BYOLConfig(steps=3)):
        assert from_dict(config.method, to_dict(config)) == config


def test_a_checkpoint_is_written_while_its_tensors_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And an error is told at the next one, which is written nevertheless."""
    folder, write, go_on = CheckpointFolder(tmp_path), torch.save, threading.Event()

    def slow(content: object, file: Any) -> None:
        assert go_on.wait(60)
        write(content, file)

    def full(content: object, file: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", slow)
    weight = torch.zeros(3)
    folder.save_later(state(1, model={"w": weight}))
    weight += 1
    assert not folder.paths()
    go_on.set()
    assert folder.finish() == folder.paths()[0]
    assert torch.equal(load(folder.paths()[0])["model"]["w"], torch.zeros(3))
    assert folder.finish() is None
    monkeypatch.setattr(torch, "save", full)
    folder.save_later(state(2))
    concurrent.futures.wait([folder._writing])  # type: ignore[list-item]
    monkeypatch.setattr(torch, "save", write)
    with pytest.raises(FastsslError, match=r"cannot write the checkpoint .*step-000000002\.pt.*No space left"):
        folder.save_later(state(3))
    assert folder.finish() == tmp_path / "step-000000003.pt"
    assert [p.name for p in folder.paths()] == ["step-000000001.pt", "step-000000003.pt"]


def test_milestones_are_kept(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=2, milestones=4)
    for step in range(1, 12):
        folder.save(state(step))
    assert [p.name for p in folder.paths()] == [f"step-{step:09d}.pt" for step in (4, 8, 10, 11)]
    (tmp_path / "step-000000012.pt.tmp").write_bytes(b"killed while writing")
    folder.clean()
    assert len(list(tmp_path.iterdir())) == 4
