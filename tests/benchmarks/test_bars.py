"""The bars are found in a run, measured as they say, and say why where they are not."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.bars import BARS, OURS, Bar, Verdict, evaluate
from tests.benchmarks.made_up import QUEUE, entry, run_of, skipped


def verdict(folder: Path, bar: Bar, *entries: dict[str, Any], **other: Any) -> Verdict:
    [found] = evaluate(run_of(folder, *entries, **other), [bar])
    return found


def bar(**other: Any) -> Bar:
    fields: dict[str, Any] = {"text": "faster", "op": "info_nce", "case": QUEUE, "over": "eager", "under": OURS}
    if not {"at_least", "at_most"} & set(other):
        fields["at_least"] = 2
    return Bar(**{**fields, **other})


@pytest.mark.parametrize(("eager", "held"), [(4.0, True), (3.9, False)])
def test_times(tmp_path: Path, eager: float, held: bool) -> None:
    found = verdict(tmp_path, bar(), entry("eager", eager), entry("fastssl", 2.0))
    assert (found.value, found.held, found.reason) == (eager / 2, held, "")


@pytest.mark.parametrize(("mine", "held"), [(5, True), (6, False)])
def test_memory(tmp_path: Path, mine: int, held: bool) -> None:
    ask = bar(over=OURS, under="eager", at_most=0.05, quantity="peak")
    entries = entry("eager", 1.0, peak_bytes=100), entry("fastssl", 9.0, peak_bytes=mine)
    found = verdict(tmp_path, ask, *entries)
    assert (found.value, found.held) == (mine / 100, held)


def test_memory_that_was_not_measured(tmp_path: Path) -> None:
    ask = bar(over=OURS, under="eager", at_most=0.05, quantity="peak")
    found = verdict(tmp_path, ask, entry("eager", 1.0, peak_bytes=100), entry("fastssl", 1.0))
    assert (found.value, found.held, found.reason) == (None, None, "fastssl: peak memory not measured")


def test_sides_of_two_cases(tmp_path: Path) -> None:
    ask = bar(under_case={"dtype": "bfloat16"})
    half = {**QUEUE, "dtype": "bfloat16"}
    entries = [
        entry("eager", 6.0),
        entry("eager", 60.0, case=half),
        entry("fastssl", 2.0),
        entry("fastssl", 1.0, case=half),
    ]
    assert verdict(tmp_path, ask, *entries).value == 6


def test_a_case_need_not_name_all_axes(tmp_path: Path) -> None:
    ask = bar(case={"N": 256})
    assert verdict(tmp_path, ask, entry("eager", 6.0), entry("fastssl", 2.0)).value == 3


def test_one_of_many_cases_is_not_chosen(tmp_path: Path) -> None:
    ask, other = bar(case={"N": 256}), {**QUEUE, "K": 1024}
    found = verdict(tmp_path, ask, entry("eager", 6.0), entry("fastssl", 2.0), entry("fastssl", 1.0, case=other))
    assert found.value is None
    assert (
        found.reason
        == "fastssl, N=256: 2 cases match (N=256, D=128, K=65,536, float32; N=256, D=128, K=1,024, float32)"
    )


@pytest.mark.parametrize(
    "other", [{"device": "cuda"}, {"op": "other"}, {"case": {**QUEUE, "N": 512}}, {"case": {"N": 256}}]
)
def test_other_rows_are_not_taken(tmp_path: Path, other: dict[str, Any]) -> None:
    found = verdict(tmp_path, bar(), entry("eager", 4.0), entry("fastssl", 1.0, **other))
    assert (found.value, found.reason) == (None, "fastssl, N=256, D=128, K=65,536, float32 not run")


def test_the_reason_of_what_was_skipped(tmp_path: Path) -> None:
    found = verdict(tmp_path, bar(), entry("fastssl", 1.0), skips=[skipped("eager", "no memory")])
    assert (found.value, found.held) == (None, None)
    assert found.reason == "eager, N=256, D=128, K=65,536, float32 skipped: no memory"
    found = verdict(tmp_path, bar(), entry("fastssl", 1.0), skips=[skipped("eager", "no memory", op="other")])
    assert found.reason.endswith("not run")


@pytest.mark.parametrize("limits", [{"at_least": 1, "at_most": 2}, {"at_least": None}])
def test_a_bar_has_one_limit(limits: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"'faster' has at_least=.* give exactly one"):
        bar(**limits)


def test_all_bars_are_measured_in_a_run_that_has_all(tmp_path: Path) -> None:
    entries = {}
    for ask in BARS:
        for side, case in ((ask.over, ask.over_case), (ask.under, ask.under_case)):
            case = {**ask.case, **case}
            entries[ask.op, str(case), side] = entry(side, 1.0, op=ask.op, case=case, peak_bytes=1)
    found = evaluate(run_of(tmp_path, *entries.values()))
    assert [v.value for v in found] == [1.0] * len(BARS)
    assert len({(b.op, str(b.case), b.over, b.under, b.quantity, str(b.under_case)) for b in BARS}) == len(BARS)


def test_no_bar_can_be_met_by_nothing(tmp_path: Path) -> None:
    assert [v.held for v in evaluate(run_of(tmp_path))] == [None] * len(BARS)
