"""The GPU check without a GPU: what it says of that, of wrong options, and which parts it would run."""

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_check
from benchmarks.gpu_parts import Command, Part

GPU = {"name": "NVIDIA H100 80GB HBM3", "capability": "9.0", "memory_gib": 79.1, "multiprocessors": 132}
FOUND = {
    "date": "2026-12-01T10:00:00+00:00",
    "commit": "1234567-dirty",
    "torch": "2.14.1",
    "cuda": "13.0",
    "driver": "580.1",
    "gpus": [GPU],
}


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], None]:
    """What the machine is said to have; signals keep their handlers."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return lambda found: monkeypatch.setattr(gpu_check, "describe", lambda: found)


def test_without_a_gpu(described: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    described({**FOUND, "gpus": []})
    assert gpu_check.main(["--output", str(tmp_path / "new")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "needs a CUDA device" in said and "`make test` and `make bench`" in said
    assert not (tmp_path / "new").exists()


def test_a_driver_that_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_check, "DESCRIBE_SECONDS", 0.01)
    assert gpu_check.main(["--output", str(tmp_path / "new")]) == 2
    assert "torch did not tell of its devices" in capsys.readouterr().err


def test_environment_is_written_first_and_names_no_folder(
    described: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    described(FOUND)
    look = f"print(open({str(tmp_path / 'new' / 'environment.json')!r}).read())"
    command = Command("tests", (sys.executable, "-S", "-c", look))
    monkeypatch.setattr(gpu_check, "make_parts", lambda *_: [Part("tests", (command,))])
    assert gpu_check.main(["--quick", "--output", str(tmp_path / "new")]) == 0
    found = json.loads((tmp_path / "new" / "environment.json").read_text())
    assert found["command"] == "python -m benchmarks.gpu_check --quick --output new" and found["gpus"] == [GPU]
    assert "H100" in (tmp_path / "new" / "tests.log").read_text()
    summary = (tmp_path / "new" / "summary.md").read_text()
    assert summary.startswith("# GPU check: NVIDIA H100 80GB HBM3") and "Driver 580.1, CUDA 13.0" in summary


def test_a_folder_with_something_in_it_gets_a_number(tmp_path: Path) -> None:
    assert gpu_check.make_folder(tmp_path / "a") == tmp_path / "a"
    assert gpu_check.make_folder(tmp_path / "a") == tmp_path / "a"  # still empty
    (tmp_path / "a" / "file").touch()
    assert gpu_check.make_folder(tmp_path / "a") == tmp_path / "a-2"


def test_parts_are_in_order_and_as_asked(tmp_path: Path) -> None:
    parts = gpu_check.make_parts(tmp_path, gpu_check.PARTS, quick=True)
    assert tuple(one.name for one in parts) == gpu_check.PARTS
    by_name = {one.name: one for one in parts}
    for one in by_name["tests"].commands:
        assert one.junit and ({"-m", "gpu"} < set(one.argv)) is not one.name.startswith(("tests-kernels", "tests-ops"))
    assert any(one.name == "tests-ops-test_ema" for one in by_name["tests"].commands)
    assert all({"--benchmark-only", "-k", "--quick"} < set(one.argv) for one in by_name["bench"].commands)
    chosen = {one.name: one.argv[one.argv.index("-k") + 1] for one in by_name["bench"].commands}
    assert chosen["bench-test_ema"] == "cuda and test" and "bench-test_startup" not in chosen
    assert chosen["bench-test_info_nce_queue"] == "cuda and _queue"
    names = [one.name for group in parts for one in group.commands]
    assert len(names) == len(set(names))  # each has a log of its own
    [bench] = gpu_check.make_parts(tmp_path, ["bench"], quick=False)
    assert not any("--quick" in one.argv for one in bench.commands)


def test_benchmarks_of_several_files_become_one(tmp_path: Path) -> None:
    for name, count in (("a", 2), ("b", 1)):
        content = {"machine_info": {"from": name}, "benchmarks": [name] * count, "skipped": [{"side": name}]}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "killed.json").write_text('{"benchmarks": [')
    files = [tmp_path / f"{name}.json" for name in ("missing", "killed", "a", "b")]
    gpu_check.merge(files, tmp_path / "bench.json")
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["benchmarks"] == ["a", "a", "b"] and len(found["skipped"]) == 2
    assert found["machine_info"] == {"from": "a"}
    gpu_check.merge(files[:2], tmp_path / "none.json")
    assert not (tmp_path / "none.json").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--minutes", "0"], "--minutes must be above 0, got 0"),
        (["--parts", "test"], "invalid choice: 'test'"),
        (["--bench", "nowhere.json"], "nowhere.json is no file"),
    ],
)
def test_wrong_options_are_named(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main(arguments)
    assert said in capsys.readouterr().err
