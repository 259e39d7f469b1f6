"""Two runs are compared beyond noise and drift, and the exit code says whether something of ours became slower."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare
from benchmarks.compare import Difference, difference, noise_of
from tests.benchmarks.made_up import entry, run_of, write


def rows(mine: float, *peers: float, **other: Any) -> list[dict[str, Any]]:
    return [entry("fastssl", mine, **other), *(entry(f"peer {n}", time, **other) for n, time in enumerate(peers))]


def between(folder: Path, before: list[dict[str, Any]], after: list[dict[str, Any]], **options: Any) -> Difference:
    return difference(run_of(folder, *before), run_of(folder, *after), **options)


@pytest.mark.parametrize(
    ("time", "regressions", "improvements"), [(1.14, 0, 0), (1.16, 1, 0), (0.88, 0, 0), (0.86, 0, 1)]
)
def test_changes_beyond_noise(tmp_path: Path, time: float, regressions: int, improvements: int) -> None:
    found = between(tmp_path, rows(1.0, 1.0), rows(time, 1.0))
    assert (len(found.regressions), len(found.improvements)) == (regressions, improvements)


def test_a_given_noise(tmp_path: Path) -> None:
    assert between(tmp_path, rows(1.0), rows(1.09), noise=0.08).regressions
    assert not between(tmp_path, rows(1.0), rows(1.09), noise=0.1).regressions


def test_noise_is_that_of_both_runs(tmp_path: Path) -> None:
    a, b = (run_of(tmp_path, entry("fastssl", 2.0, iqr=iqr)).rows[0] for iqr in (0.6, 0.8))
    assert noise_of(a, b) == pytest.approx(0.5)
    runs = run_of(tmp_path, entry("fastssl", 2.0, iqr=0.6)), run_of(tmp_path, entry("fastssl", 2.0, iqr=0.8))
    assert [difference(*runs, noise=least).changes[0].noise for least in (0.15, 0.6)] == [pytest.approx(0.5), 0.6]
    assert not difference(run_of(tmp_path, entry("fastssl", 1.0, iqr=0.4)), run_of(tmp_path, *rows(1.3))).regressions


def test_a_yardstick_that_is_unsteady_blames_nobody(tmp_path: Path) -> None:
    def run(peer: float, iqr: float) -> list[dict[str, Any]]:
        return [entry("fastssl", 1.0), entry("peer", peer, iqr=iqr)]

    assert between(tmp_path, run(1.0, 0.02), run(0.75, 0.02)).regressions
    found = between(tmp_path, run(1.0, 0.3), run(0.75, 0.3))
    assert not found.regressions
    assert found.changes[0].noise == pytest.approx(0.5, rel=0.02)  # of 0.3 and 0.4, and a little of ours


def test_the_drift_of_the_op_is_taken_out(tmp_path: Path) -> None:
    # The median of 1.5, 1.6 and 9; the other op, and ours, count for nothing.
    before = [*rows(1.0, 1.0, 1.0, 1.0), *rows(1.0, 1.0, op="other")]
    after = [*rows(1.6, 1.5, 1.6, 9.0), *rows(1.6, 1.0, op="other")]
    found = between(tmp_path, before, after)
    assert found.drifts == {("info_nce", "cpu"): 1.6, ("other", "cpu"): 1.0}
    assert [(change.before.op, change.ratio) for change in found.regressions] == [("other", 1.6)]
    assert [change.before.side for change in found.others] == ["peer 2"]
    absolute = between(tmp_path, before, after, absolute=True)
    assert absolute.drifts == {} and [change.ratio for change in absolute.regressions] == [1.6, 1.6]


def test_a_case_drifts_with_its_own_yardsticks(tmp_path: Path) -> None:
    """One case's memory came to lie well and the other's badly: neither is a regression."""
    small, large = {"N": 1}, {"N": 2}
    before = [*rows(1.0, 1.0, case=small), *rows(1.0, 1.0, case=large), entry("fastssl", 1.0, case={"N": 3})]
    after = [*rows(0.5, 0.5, case=small), *rows(1.3, 1.3, case=large), entry("fastssl", 0.9, case={"N": 3})]
    found = between(tmp_path, before, after)
    assert [change.drift for change in found.changes] == [0.5, 0.5, 1.3, 1.3, 0.9]  # the last: of the op
    assert not found.regressions and not found.improvements


def test_a_slow_machine_hides_no_regression(tmp_path: Path) -> None:
    [change] = between(tmp_path, rows(1.0, 1.0), rows(1.0, 0.5)).regressions  # twice as fast, and we are not
    assert change.ratio == 2


def test_bounds_are_yardsticks_too(tmp_path: Path) -> None:
    before, after = ([entry("fastssl", t), entry("copy", t, role="bound")] for t in (1.0, 2.0))
    assert between(tmp_path, before, after).drifts == {("info_nce", "cpu"): 2.0}


def test_devices_drift_by_themselves(tmp_path: Path) -> None:
    before, after = ([*rows(1.0, 1.0), *rows(t, t, device="cuda")] for t in (1.0, 2.0))
    assert between(tmp_path, before, after).drifts == {("info_nce", "cpu"): 1.0, ("info_nce", "cuda"): 2.0}


def test_a_slower_peer_is_no_regression(tmp_path: Path) -> None:
    found = between(tmp_path, rows(1.0, 1.0, 1.0, 1.0), rows(1.0, 1.0, 1.0, 2.0))
    assert not found.regressions and [change.before.side for change in found.others] == ["peer 2"]


def test_the_worst_stands_first(tmp_path: Path) -> None:
    before = [entry("fastssl", 1.0, op=op) for op in "abcd"]
    after = [entry("fastssl", t, op=op) for op, t in zip("abcd", (2.0, 3.0, 0.5, 0.2), strict=True)]
    found = between(tmp_path, before, after)
    assert [change.before.op for change in found.regressions] == ["b", "a"]
    assert [change.before.op for change in found.improvements] == ["d", "c"]


def test_rows_in_one_file_only(tmp_path: Path) -> None:
    found = between(tmp_path, rows(1.0, op="old"), rows(1.0, op="new"))
    assert ([r.op for r in found.only_before], [r.op for r in found.only_after], found.changes) == (
        ["old"],
        ["new"],
        (),
    )


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"device": "Another CPU"}, "devices differ: Made-up CPU, 2 threads and Another CPU"),
        ({"threads": 8}, "numbers of threads differ: 2 and 8"),
        ({"quick": True}, "settings of --quick differ: False and True"),
        ({"load": 9.0}, None),
    ],
)
def test_warnings(tmp_path: Path, other: dict[str, Any], words: str | None) -> None:
    a, b = run_of(tmp_path, *rows(1.0)), run_of(tmp_path, *rows(1.0), **other)
    assert difference(a, b).warnings == ((f"the {words}",) if words else ())


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *argv: Any) -> tuple[int, str]:
    monkeypatch.setenv("COLUMNS", "160")
    code = compare.main(list(map(str, argv)))
    out, err = capsys.readouterr()
    return code, out + err


def test_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    before = [*rows(1.0, 1.0), *rows(1.0, op="gone"), *rows(1.0, op="alone"), *rows(1.0, 1.0, op="other")]
    after = [*rows(3.0, 2.0), *rows(1.0, op="come"), *rows(1.0, op="alone"), *rows(0.1, 1.0, op="other")]
    a, b = write(tmp_path / "a.json", *before), write(tmp_path / "b.json", *after, threads=3)
    code, text = run(capsys, monkeypatch, a, b)
    assert code == 1
    wanted = (
        "Warning: the numbers of threads differ: 2 and 3", "divided by the drift", "info_nce, cpu: 2.00",
        "not divided, for want of peers and bounds in both: alone, cpu", "Regressions: 1", "1.50", "Improvements: 1",
        "1 regressions, 3 of 5 unchanged", "Only in the first file: 1", "gone", "Only in the second file: 1", "come",
    )  # fmt: skip
    places = [text.find(words) for words in wanted]
    assert -1 not in places and places == sorted(places)
    code, text = run(capsys, monkeypatch, a, b, "--absolute")
    assert code == 1 and "not divided by the drift" in text and "3.00" in text


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = write(tmp_path / "a.json", *rows(1.0)), write(tmp_path / "b.json", *rows(2.0))
    assert run(capsys, monkeypatch, a, b)[0] == 1
    assert run(capsys, monkeypatch, b, a)[0] == 0
    assert run(capsys, monkeypatch, a, a)[0] == 0
    assert run(capsys, monkeypatch, a, b, "--noise", "1.5")[0] == 0
    (tmp_path / "c.json").write_text("{}")
    code, text = run(capsys, monkeypatch, a, tmp_path / "c.json")
    assert code == 2 and "c.json has no 'benchmarks'" in text
    for noise in ("-1", "nan", "inf"):
        with pytest.raises(SystemExit, match="2"):
            compare.main([str(a), str(b), "--noise", noise])
