"""The figures in the README and on the page are those of the committed result files."""

import re
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.__main__ import RESULTS, keep
from benchmarks.bars import evaluate
from benchmarks.results import load
from tests.benchmarks.made_up import entry, write

ROOT = Path(__file__).parents[2]
README, PAGE = ROOT / "README.md", ROOT / "docs" / "performance.md"
FILES = sorted(set(re.findall(r"benchmarks/results/([\w-]+\.json)", README.read_text())))


def test_there_is_one() -> None:
    assert len(FILES) == 1


@pytest.mark.parametrize("name", FILES)
def test_readme_and_page_are_generated(name: str) -> None:
    file = str(RESULTS / name)
    assert report.main([file, "--readme", str(README), "--page", str(PAGE), "--check"]) == 0


@pytest.mark.parametrize("name", FILES)
def test_every_bar_was_measured(name: str) -> None:
    """Also by the names of sides and cases that the suites have now: a bar whose side was renamed is not."""
    run = load(RESULTS / name)
    assert not run.machine.quick
    assert [verdict.reason for verdict in evaluate(run) if verdict.value is None] == []


def test_a_result_is_kept_under_machine_and_date_without_samples(tmp_path: Path) -> None:
    found = write(
        tmp_path / "run.json",
        entry("fastssl", 1.0) | {"stats": {"median": 1.0, "iqr": 0.1, "rounds": 3, "data": [1.0]}},
    )
    kept = keep(found, tmp_path / "results")
    assert kept.name == "made-up-cpu-2-threads-2026-11-22.json"
    assert '"data"' not in kept.read_text()
    assert load(kept).rows == load(found).rows
