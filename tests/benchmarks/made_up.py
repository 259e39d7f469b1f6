"""Files of results that nobody measured."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.results import Run, load

QUEUE: dict[str, int | str] = {"N": 256, "D": 128, "K": 65536, "dtype": "float32"}
MACHINE = {
    "device": "Made-up CPU, 2 threads",
    "slug": "made-up-cpu-2-threads",
    "cpu": "Made-up CPU",
    "gpu": None,
    "driver": None,
    "cuda": None,
    "threads": 2,
    "load": 0.25,
    "quick": False,
    "versions": {"torch": "2.14.1", "fastssl": "0.1"},
}


def entry(
    side: str, median: float, op: str = "info_nce", case: dict[str, int | str] | None = None, **other: Any
) -> dict[str, Any]:
    """One of `benchmarks`; `other` replaces fields of extra_info and stats, or adds them: `data`, `in_turns`."""
    case = QUEUE if case is None else case
    extra = {
        "op": op,
        "case": case,
        "device": "cpu",
        "side": side,
        "role": "ours" if side.startswith("fastssl") else "peer",
        "differs": "",
        "graph": False,
        "peak_bytes": None,
        "flops": None,
        "bytes": None,
        "items": None,
        "unit": None,
    }
    stats: dict[str, Any] = {"median": median, "iqr": 0.02 * median, "rounds": 15, "mean": median}
    for name, value in other.items():
        (stats if name in (*stats, "data") else extra)[name] = value
    return {"name": f"test_it[{side}]", "fullname": "x.py::test_it", "group": op, "stats": stats, "extra_info": extra}


def skipped(side: str, reason: str, op: str = "info_nce", case: dict[str, int | str] | None = None) -> dict[str, Any]:
    """One of `skipped`."""
    return {"op": op, "case": QUEUE if case is None else case, "device": "cpu", "side": side, "reason": reason}


def content(entries: Iterable[dict[str, Any]], skips: Iterable[dict[str, Any]] = (), **machine: Any) -> dict[str, Any]:
    """A whole file."""
    return {
        "datetime": "2026-11-22T12:00:00+00:00",
        "commit_info": {"id": "0123456789abcdef", "dirty": True},
        "machine_info": {"python_version": "3.11", "fastssl": {**MACHINE, **machine}},
        "benchmarks": list(entries),
        "skipped": list(skips),
    }


def write(path: Path, *entries: dict[str, Any], skips: Iterable[dict[str, Any]] = (), **machine: Any) -> Path:
    """A valid file."""
    path.write_text(json.dumps(content(entries, skips, **machine)))
    return path


def run_of(folder: Path, *entries: dict[str, Any], skips: Iterable[dict[str, Any]] = (), **machine: Any) -> Run:
    """What is read from a valid file."""
    return load(write(folder / "made_up.json", *entries, skips=skips, **machine))
