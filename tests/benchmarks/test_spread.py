"""Ratios of several runs: which of them cannot be repeated."""

from pathlib import Path

import pytest

from benchmarks import spread
from benchmarks.results import load
from tests.benchmarks.made_up import entry, write


def runs(folder: Path, *peers: float) -> list[Path]:
    """A file for each time of the peer; ours takes 1 s."""
    return [
        write(folder / f"{number}.json", entry("fastssl", 1.0), entry("lightly", peer))
        for number, peer in enumerate(peers)
    ]


def test_distance_from_the_median(tmp_path: Path) -> None:
    (found,) = spread.spreads([load(path) for path in runs(tmp_path, 2.0, 1.6, 2.2)])
    assert found.ratios == [2.0, 1.6, 2.2]
    assert found.median == 2.0 and found.furthest == pytest.approx(0.2)


@pytest.mark.parametrize(("peers", "code"), [((2.0, 1.6, 2.2), 1), ((2.0, 1.8, 2.2), 0)])
def test_exit_code(tmp_path: Path, peers: tuple[float, ...], code: int) -> None:
    assert spread.main([str(path) for path in runs(tmp_path, *peers)]) == code


def test_a_comparison_that_one_run_lacks_is_left_out(tmp_path: Path) -> None:
    files = [*runs(tmp_path, 2.0, 2.0), write(tmp_path / "alone.json", entry("fastssl", 1.0))]
    assert spread.spreads([load(path) for path in files]) == []


def test_a_file_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert spread.main([str(tmp_path / "no.json")]) == 2
    assert "no.json" in capsys.readouterr().err
