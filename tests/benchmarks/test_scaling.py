"""Series differ in one axis only, exponents are those of the upper part, and known ones are looked up."""

import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.scaling import EXPECTED, exponent, growth, series, upper
from tests.benchmarks.made_up import QUEUE, entry, run_of

SIZES = (1024, 4096, 16384, 65536)


def sweep(side: str, power: float, memory: float = 0.0, **other: Any) -> list[dict[str, Any]]:
    """Rows over K; K=1,024 is last, and ruled by a fixed cost."""
    case = other.pop("case", QUEUE)
    return [
        entry(
            side, 1e-6 * k**power + 50 * (k == 1024), case={**case, "K": k}, peak_bytes=round(1e6 * k**memory), **other
        )
        for k in reversed(SIZES)
    ]


def test_exponents(tmp_path: Path) -> None:
    run = run_of(tmp_path, *sweep("fastssl", 1.0), *sweep("authors, eager", 1.5, 1.0))
    found = {(g.side, g.quantity): g for g in growth(run)}
    assert len(found) == 4
    for (side, quantity), (fitted, expected) in {
        ("fastssl", "time"): (1.0, 1),
        ("fastssl", "memory"): (0.0, 0),
        ("authors, eager", "time"): (1.5, 1),
        ("authors, eager", "memory"): (1.0, 1),
    }.items():
        g = found[side, quantity]  # type: ignore[index]
        assert g.fitted == pytest.approx(fitted, abs=1e-6)
        assert (g.op, g.axis, g.expected, g.low, g.high, g.points) == ("info_nce", "K", expected, 4096, 65536, 3)
        assert g.fixed == {"N": 256, "D": 128, "dtype": "float32"}


def test_the_upper_half_is_fitted_and_at_least_three() -> None:
    points = [(n, 1.0) for n in range(1, 10)]
    assert upper(points) == points[4:]
    assert upper(points[:4]) == points[1:4]
    assert upper(points[:3]) == points[:3]


def test_least_squares() -> None:
    # Slope of y = (0, 3, 0, 3) on x = (0, 1, 2, 3): covariance 3 over variance 5.
    assert exponent([(round(math.exp(0)), 1.0), (10, 10**3), (100, 1.0), (1000, 10**3)]) == pytest.approx(3 / 5)


@pytest.mark.parametrize("other", [{"N": 512}, {"dtype": "bfloat16"}])
def test_other_axes_make_another_series(tmp_path: Path, other: dict[str, int | str]) -> None:
    run = run_of(tmp_path, *sweep("fastssl", 1.0)[:2], *sweep("fastssl", 1.0, case={**QUEUE, **other})[2:])
    assert [line for line in series(run.rows) if line.axis == "K"] == []


@pytest.mark.parametrize("other", [{"device": "cuda"}, {"op": "other"}, {"side": "fastssl, CUDA graph"}])
def test_other_rows_make_another_series(tmp_path: Path, other: dict[str, Any]) -> None:
    rest = sweep("fastssl", 1.0)[2:]
    for one in rest:
        one["extra_info"].update(other)
    assert series(run_of(tmp_path, *sweep("fastssl", 1.0)[:2], *rest).rows) == []


def test_words_and_two_points_are_no_series(tmp_path: Path) -> None:
    words = [entry("fastssl", 1.0, case={"dtype": name}) for name in ("a", "b", "c")]
    assert series(run_of(tmp_path, *words, *sweep("fastssl", 1.0)[:2]).rows) == []


def test_memory_that_is_unknown_or_nothing_is_left_out(tmp_path: Path) -> None:
    entries = sweep("fastssl", 1.0)
    entries[0]["extra_info"]["peak_bytes"], entries[1]["extra_info"]["peak_bytes"] = None, 0
    run = run_of(tmp_path, *entries)
    assert [g.quantity for g in growth(run)] == ["time"]
    assert [x for x, _ in series(run.rows)[0].points("memory")] == [1024, 4096]


def test_series_are_in_order(tmp_path: Path) -> None:
    [line] = series(run_of(tmp_path, *sweep("fastssl", 1.0)).rows)
    assert [x for x, _ in line.points("time")] == list(SIZES)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (("info_nce", "K", "time", "ours"), 1),
        (("info_nce", "D", "time", "peer"), 1),
        (("info_nce", "K", "memory", "ours"), 0),
        (("info_nce", "K", "memory", "authors, eager"), 1),
        (("info_nce in-batch", "N", "time", "ours"), 2),
        (("info_nce in-batch", "N", "memory", "ours"), 1),
        (("info_nce in-batch", "N", "memory", "authors, eager"), 2),
        (("shuffle_batch", "ranks", "time", "authors"), 2),
        (("KeyQueue", "K", "time", "ours"), 0),
    ],
)
def test_expected(key: Any, value: float) -> None:
    assert EXPECTED[key] == value


def test_what_nobody_expects_has_no_expectation(tmp_path: Path) -> None:
    run = run_of(tmp_path, *sweep("in chunks", 1.0, 0.5))
    assert [(g.quantity, g.expected) for g in growth(run)] == [("time", 1), ("memory", None)]
