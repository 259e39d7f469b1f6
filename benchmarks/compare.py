"""Two runs beside each other: ``python -m benchmarks.compare A.json B.json`` says what became slower."""

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.results import ResultsError, Row, Run, duration, load, said

NOISE = 0.15


@dataclass(frozen=True)
class Change:
    """A row in both runs."""

    before: Row
    after: Row
    drift: float  # what the ratio is divided by: how much slower the yardsticks were; 1 for absolute ratios
    noise: float

    @property
    def ratio(self) -> float:
        """Time after over time before, without the drift of the machine."""
        return self.after.median / self.before.median / self.drift

    @property
    def slower(self) -> bool:
        """Beyond noise."""
        return self.ratio > 1 + self.noise

    @property
    def faster(self) -> bool:
        """Beyond noise, as far as `slower` the other way."""
        return self.ratio < 1 / (1 + self.noise)

    @property
    def regression(self) -> bool:
        """A side of ours that became slower: a peer's new version is no fault of ours."""
        return self.slower and self.before.role == "ours"


@dataclass(frozen=True)
class Difference:
    """What two runs have in common, and what not."""

    changes: tuple[Change, ...]
    drifts: dict[tuple[str, str], float]  # by op and device; ops without yardsticks are missing
    only_before: tuple[Row, ...]
    only_after: tuple[Row, ...]
    warnings: tuple[str, ...]

    @property
    def regressions(self) -> list[Change]:
        """The worst first."""
        return sorted((change for change in self.changes if change.regression), key=lambda change: -change.ratio)

    @property
    def improvements(self) -> list[Change]:
        """Sides of ours that became faster, the best first."""
        found = (change for change in self.changes if change.faster and change.before.role == "ours")
        return sorted(found, key=lambda change: change.ratio)

    @property
    def others(self) -> list[Change]:
        """Peers and bounds that moved against the rest of their op."""
        return [c for c in self.changes if c.before.role != "ours" and (c.slower or c.faster)]


def noise_of(before: Row, after: Row) -> float:
    """How much the ratio of both varies: their relative interquartile ranges, as independent errors add."""
    return math.hypot(before.spread, after.spread)


def warnings_of(before: Run, after: Run) -> list[str]:
    """Why the runs may not be comparable."""
    pairs = (
        ("devices", before.machine.device, after.machine.device),
        ("numbers of threads", before.machine.threads, after.machine.threads),
        ("settings of --quick", before.machine.quick, after.machine.quick),
    )
    return [f"the {what} differ: {a} and {b}" for what, a, b in pairs if a != b]


def difference(before: Run, after: Run, noise: float = NOISE, absolute: bool = False) -> Difference:
    """Compare every row that both runs have.

    Machines differ in speed from hour to hour, so each ratio is divided by the median ratio of the peers and bounds of
    the same case, which were measured in turns with it, unless `absolute`; where a case has none in both runs, by that
    of the op on the device. Without any an op's ratios stay as they are.
    """
    old, new = {row.key: row for row in before.rows}, {row.key: row for row in after.rows}
    both = [(old[key], new[key]) for key in old if key in new]
    of_ops: dict[tuple[str, str], list[tuple[Row, Row]]] = {}
    of_cases: dict[tuple[object, ...], list[tuple[Row, Row]]] = {}
    for a, b in both:
        if a.role != "ours" and not absolute:
            of_ops.setdefault((a.op, a.device), []).append((a, b))
            of_cases.setdefault(case_of(a), []).append((a, b))

    def change(a: Row, b: Row) -> Change:
        yardsticks = of_cases.get(case_of(a)) or of_ops.get((a.op, a.device)) or []
        # Yardsticks that are unsteady themselves make an unsteady drift, the less the more there are.
        theirs = [noise_of(*pair) for pair in yardsticks]
        of_drift = statistics.median(theirs) / math.sqrt(len(theirs)) if theirs else 0.0
        return Change(a, b, drift_of(yardsticks), max(noise, math.hypot(noise_of(a, b), of_drift)))

    return Difference(
        changes=tuple(change(a, b) for a, b in both),
        drifts={key: drift_of(pairs) for key, pairs in of_ops.items()},
        only_before=tuple(row for key, row in old.items() if key not in new),
        only_after=tuple(row for key, row in new.items() if key not in old),
        warnings=tuple(warnings_of(before, after)),
    )


def drift_of(yardsticks: Sequence[tuple[Row, Row]]) -> float:
    """How much slower they were, at the median; 1 without any."""
    return statistics.median(b.median / a.median for a, b in yardsticks) if yardsticks else 1.0


def case_of(row: Row) -> tuple[object, ...]:
    """What is measured in turns."""
    return row.op, frozenset(row.case.items()), row.device


def listed(title: str, changes: Sequence[Change]) -> Table:
    """Changes as a table."""
    out = Table(title=title, title_justify="left")
    for name in ("op", "case", "device", "side"):
        out.add_column(name, overflow="fold")
    for name in ("before", "after", "÷", "÷ drift", "noise"):
        out.add_column(name, justify="right", no_wrap=True)
    for change in changes:
        row, plain = change.before, change.after.median / change.before.median
        cells = (row.op, said(row.case), row.device, row.side, duration(row.median), duration(change.after.median))
        out.add_row(*map(escape, cells), f"{plain:.2f}", f"{change.ratio:.2f}", f"{change.noise:.0%}")
    return out


def show(console: Console, found: Difference, absolute: bool) -> None:
    """Regressions, improvements, and a count of the rest."""
    for text in found.warnings:
        console.print(f"[yellow]Warning: {escape(text)}[/yellow]")
    if absolute:
        console.print("Ratios are absolute: not divided by the drift of the machine.")
    else:
        console.print(
            "Ratios are divided by the drift: the median ratio of the peers and bounds of the case, or else the op:"
        )
        for (op, device), drift in found.drifts.items():
            console.print(f"  {escape(op)}, {device}: {drift:.2f}")
        ops = dict.fromkeys((change.before.op, change.before.device) for change in found.changes)
        bare = [f"{op}, {device}" for op, device in ops if (op, device) not in found.drifts]
        if bare:
            console.print(f"  not divided, for want of peers and bounds in both: {escape('; '.join(bare))}")
    groups = (
        ("Regressions", found.regressions),
        ("Improvements", found.improvements),
        ("Peers and bounds that moved otherwise than their op (no regressions)", found.others),
    )
    for title, changes in groups:
        if changes:
            console.print(listed(f"{title}: {len(changes)}", changes))
    moved = sum(len(changes) for _, changes in groups)
    console.print(
        f"{len(found.regressions)} regressions, {len(found.changes) - moved} of {len(found.changes)} unchanged"
    )
    for name, rows in (("first", found.only_before), ("second", found.only_after)):
        if rows:
            console.print(f"Only in the {name} file: {len(rows)}")
            for row in rows:
                console.print(f"  {escape(f'{row.op}, {said(row.case)}, {row.device}, {row.side}')}")


def share(text: str) -> float:
    """A noise floor."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no noise: give a share such as {NOISE}, 0 or more")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Print the comparison; 1 if something of ours became slower, 2 for files that cannot be read or compared."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--noise", type=share, default=NOISE, help=f"smallest share that counts; default: {NOISE}")
    parser.add_argument("--absolute", action="store_true", help="do not divide by the drift of the machine")
    options = parser.parse_args(argv)
    try:
        before, after = load(options.before), load(options.after)
    except ResultsError as error:
        print(error, file=sys.stderr)
        return 2
    found = difference(before, after, options.noise, options.absolute)
    show(Console(), found, options.absolute)
    if not any(change.before.role == "ours" for change in found.changes):
        print("nothing of fastssl's is in both files, so nothing was compared", file=sys.stderr)
        return 2
    return 1 if found.regressions else 0


if __name__ == "__main__":
    sys.exit(main())
