"""Results are read as they were written, compared as promised, and refused where they are none."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.results import ResultsError, duels, duration, load, ratio_of, said, size
from tests.benchmarks.made_up import MACHINE, QUEUE, content, entry, run_of, skipped, write

GRAPH: dict[str, Any] = {"graph": True}


def test_everything_is_read(tmp_path: Path) -> None:
    extra: dict[str, Any] = {
        "device": "cuda", "role": "peer", "differs": "rounds", "graph": True, "peak_bytes": 7, "flops": 3.0,
        "bytes": 5, "items": 256, "unit": "images", "iqr": 0.5, "rounds": 9,
    }  # fmt: skip
    run = run_of(tmp_path, entry("one", 2.0, **extra), skips=[skipped("two", "no GPU")], threads=3)
    [row], [skip] = run.rows, run.skipped
    for name, value in extra.items():
        assert getattr(row, name) == value
    assert (row.op, row.case, row.side, row.median, row.title) == ("info_nce", QUEUE, "one", 2.0, "test_it[one]")
    assert row.spread == 0.25
    assert (skip.op, skip.case, skip.device, skip.side, skip.reason) == ("info_nce", QUEUE, "cpu", "two", "no GPU")
    assert (run.date, run.commit) == ("2026-11-22", "0123456789ab and changes not committed then")
    assert vars(run.machine) == {**MACHINE, "threads": 3}


def test_a_comparison_is_an_op_a_case_and_a_device(tmp_path: Path) -> None:
    turned = dict(reversed(QUEUE.items()))  # the same case
    run = run_of(
        tmp_path,
        entry("fastssl", 1.0),
        entry("peer", 2.0, case=turned),
        entry("peer", 2.0, case={**QUEUE, "K": 1}),
        entry("peer", 2.0, op="other"),
        entry("peer", 2.0, device="cuda"),
    )
    assert [[row.side for row in c.rows] for c in run.comparisons] == [
        ["fastssl", "peer"],
        ["peer"],
        ["peer"],
        ["peer"],
    ]


def test_ratios_are_to_the_fastest_peer_and_never_to_a_bound(tmp_path: Path) -> None:
    run = run_of(
        tmp_path,
        entry("fastssl fast", 0.5),
        entry("fastssl", 2.0, peak_bytes=10),
        entry("slow", 9.0, peak_bytes=1),
        entry("fast", 3.0, peak_bytes=40),
        entry("bound", 0.1, role="bound", peak_bytes=1),
    )
    [c] = run.comparisons
    assert c.ours is not None and c.ours.side == "fastssl"
    assert c.best_peer is not None and c.best_peer.side == "fast"
    assert (c.ratio, c.memory_ratio) == (1.5, 4.0)


@pytest.mark.parametrize(("in_turns", "peer", "ratio"), [(True, [2.0, 6.0, 9.0], 2.0), (False, [2.0, 6.0, 9.0], 6.0)])
def test_the_rounds_of_sides_that_took_turns_are_paired(
    tmp_path: Path, in_turns: bool, peer: list[float], ratio: float
) -> None:
    """The machine was slower in the second round, for both."""
    ours = [1.0, 3.0, 1.0]
    run = run_of(
        tmp_path,
        entry("fastssl", 1.0, data=ours, in_turns=in_turns),
        entry("peer", 6.0, data=peer, in_turns=in_turns),
    )
    [c] = run.comparisons
    assert c.ratio == ratio and duels(run)[0][0] == ratio


def test_the_fastest_peer_is_the_one_with_the_lowest_ratio(tmp_path: Path) -> None:
    """Not the one with the lowest median, which may have had its luck in a round that was good for us too."""
    rounds = {"fastssl": [1.0, 2.0, 4.0], "a": [3.0, 3.5, 4.0], "b": [1.5, 3.0, 9.0]}
    entries = [entry(side, 1.0, data=data, in_turns=True) for side, data in rounds.items()]
    for one, median in zip(entries, (2.0, 3.5, 3.6), strict=True):
        one["stats"]["median"] = median
    [c] = run_of(tmp_path, *entries).comparisons
    assert c.best_peer is not None and (c.best_peer.side, c.ratio) == ("b", 1.5)


@pytest.mark.parametrize("theirs", [{}, {"data": [1.0], "in_turns": True}, {"data": [1.0, 1.0, 1.0]}])
def test_rounds_that_do_not_pair_are_not_paired(tmp_path: Path, theirs: dict[str, Any]) -> None:
    run = run_of(tmp_path, entry("fastssl", 2.0, data=[2.0, 2.0, 2.0], in_turns=True), entry("peer", 3.0, **theirs))
    assert ratio_of(run.rows[1], run.rows[0]) == 1.5


def test_rounds_of_other_cases_are_not_paired(tmp_path: Path) -> None:
    one = entry("fastssl", 3.0, data=[2.0, 3.0, 4.0], in_turns=True)
    other = entry("fastssl", 3.0, case={"N": 1}, data=[3.0, 4.0, 2.0], in_turns=True)
    assert ratio_of(*run_of(tmp_path, one, other).rows) == 1.0


@pytest.mark.parametrize("sides", [("fastssl", "bound"), ("peer", "bound")])
def test_no_ratio_without_both(tmp_path: Path, sides: tuple[str, ...]) -> None:
    roles: dict[str, dict[str, Any]] = {"bound": {"role": "bound"}}
    entries = [entry(side, 1.0, **roles.get(side, {})) for side in sides]
    [c] = run_of(tmp_path, *entries).comparisons
    assert (c.ratio, c.memory_ratio, c.duels) == (None, None, ())


@pytest.mark.parametrize(("mine", "theirs"), [(None, 1), (1, None), (0, 1)])
def test_no_memory_ratio_without_both(tmp_path: Path, mine: int | None, theirs: int | None) -> None:
    [c] = run_of(tmp_path, entry("fastssl", 1.0, peak_bytes=mine), entry("peer", 1.0, peak_bytes=theirs)).comparisons
    assert c.memory_ratio is None


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        (("fastssl, CUDA graph", "peer, CUDA graph"), {"fastssl": "peer", "fastssl, CUDA graph": "peer, CUDA graph"}),
        (("fastssl, CUDA graph",), {"fastssl": "peer"}),  # a graph against a plain call would show who launches it
        (("peer, CUDA graph",), {"fastssl": "peer, CUDA graph"}),  # nobody else could take it on
    ],
)
def test_graphs_are_compared_with_graphs(tmp_path: Path, others: tuple[str, ...], expected: dict[str, str]) -> None:
    entries = [entry("fastssl", 2.0), entry("peer", 3.0)]
    [c] = run_of(tmp_path, *entries, *(entry(side, 1.0, **GRAPH) for side in others)).comparisons
    assert {ours.side: peer.side for ours, peer in c.duels} == expected


def drop(*path: Any) -> Callable[[Any], None]:
    def change(file: Any) -> None:
        for name in path[:-1]:
            file = file[name]
        del file[path[-1]]

    return change


def put(value: Any, *path: Any) -> Callable[[Any], None]:
    def change(file: Any) -> None:
        for name in path[:-1]:
            file = file[name]
        file[path[-1]] = value

    return change


ROW = ("benchmarks", 0)
WRONG: list[tuple[Callable[[Any], None], str]] = [
    (drop("benchmarks"), "has no 'benchmarks'"),
    (drop("skipped"), "has no 'skipped'"),
    (drop("datetime"), "has no 'datetime'"),
    (drop("machine_info", "fastssl"), "machine_info has no 'fastssl'"),
    (drop("machine_info", "fastssl", "threads"), "has no 'threads'"),
    (drop(*ROW, "stats", "median"), r"benchmarks\[0\] \(test_it\[fastssl\]\): stats has no 'median'"),
    (drop(*ROW, "extra_info", "op"), r"benchmarks\[0\].* has no 'op' in its extra_info"),
    *(
        (drop(*ROW, "extra_info", name), f"has no '{name}'")
        for name in entry("fastssl", 1.0)["extra_info"]
        if name != "op"
    ),
    (put("mine", *ROW, "extra_info", "role"), "'role' is 'mine', it has to be one of ours, peer, bound"),
    (put("tpu", *ROW, "extra_info", "device"), "'device' is 'tpu', it has to be one of cpu, cuda"),
    (put(1.5, *ROW, "extra_info", "case", "N"), "the case: 'N' is 1.5, it has to be of type int or str"),
    (put(True, *ROW, "extra_info", "peak_bytes"), "'peak_bytes' is True, it has to be of type int or null"),
    (put(0.0, *ROW, "stats", "median"), "a time of 0.0, it has to be a finite number above 0"),
    (put([1.0, "x"], *ROW, "stats", "data"), "a time of 'x', it has to be"),
    (put(float("nan"), *ROW, "stats", "iqr"), "'iqr' is nan, it has to be finite"),
    (put(1, "skipped", 0, "reason"), r"skipped\[0\]: 'reason' is 1"),
    (put([], "machine_info"), "'machine_info' is \\[\\], it has to be of type dict"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_what_is_wrong_is_named(tmp_path: Path, change: Callable[[Any], None], message: str) -> None:
    path, file = (
        tmp_path / "wrong.json",
        json.loads(json.dumps(content([entry("fastssl", 1.0, data=[1.0], in_turns=True)], [skipped("x", "y")]))),
    )
    change(file)
    path.write_text(json.dumps(file))
    with pytest.raises(ResultsError, match=f"wrong.json.*{message}"):
        load(path)


@pytest.mark.parametrize(
    ("text", "message"), [("{", "is not JSON"), ("[]", "has no 'benchmarks'"), (None, "cannot be read")]
)
def test_other_files_are_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "other.json").write_text(text)
    with pytest.raises(ResultsError, match=f"other.json {message}"):
        load(tmp_path / "other.json")


def test_a_side_has_one_row_a_case(tmp_path: Path) -> None:
    path = write(tmp_path / "twice.json", entry("fastssl", 1.0), entry("fastssl", 2.0))
    with pytest.raises(ResultsError, match=r"twice.json.*'info_nce', N=256, .*'fastssl': a side has one row a case"):
        load(path)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (3e-9, "3.00 ns"),
        (24.96e-6, "25.0 µs"),
        (0.0524, "52.4 ms"),
        (0.99951, "1.00 s"),
        (9.996, "10.0 s"),
        (4321, "4,320 s"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "–"), (0, "0 B"), (999, "999 B"), (1500, "1.50 kB"), (999_960, "1.00 MB"), (2_345_000_000, "2.35 GB")],
)
def test_sizes(count: int | None, text: str) -> None:
    assert size(count) == text


def test_cases_in_words() -> None:
    assert said(QUEUE) == "N=256, D=128, K=65,536, float32"
