"""Whether ratios can be repeated: ``python -m benchmarks.spread A.json B.json C.json`` of runs on one machine."""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.results import ResultsError, Run, digits, load, ratio_of, said

LIMIT = 0.15  # of the median


class Spread(NamedTuple):
    """The ratio of one comparison in several runs."""

    what: str
    ratios: list[float]

    @property
    def median(self) -> float:
        """Of the runs."""
        return statistics.median(self.ratios)

    @property
    def furthest(self) -> float:
        """The largest distance from the median, as a share of it."""
        return max(abs(ratio / self.median - 1) for ratio in self.ratios)


def spreads(runs: Sequence[Run]) -> list[Spread]:
    """Ours against every peer, where all runs have both; the least steady first."""
    found: dict[tuple[object, ...], Spread] = {}
    for run in runs:
        for c in run.comparisons:
            for peer in (row for row in c.rows if row.role == "peer" and c.ours):
                assert c.ours is not None
                same = c.op, frozenset(c.case.items()), c.device, peer.side
                name = f"{c.op}, {said(c.case)}, {c.device}: {peer.side}"
                found.setdefault(same, Spread(name, [])).ratios.append(ratio_of(peer, c.ours))
    steady = [spread for spread in found.values() if len(spread.ratios) == len(runs)]
    return sorted(steady, key=lambda spread: -spread.furthest)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the ratios of all runs; 1 if one lies further from its median than the limit, 2 for unreadable files."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.spread", description=__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--limit", type=float, default=LIMIT, help=f"share of the median; default: {LIMIT}")
    options = parser.parse_args(argv)
    try:
        found = spreads([load(file) for file in options.files])
    except ResultsError as error:
        print(error, file=sys.stderr)
        return 2
    table = Table("comparison", *(str(file.stem) for file in options.files), "furthest from the median")
    for spread in found:
        color = "red" if spread.furthest > options.limit else "default"
        table.add_row(escape(spread.what), *map(digits, spread.ratios), f"[{color}]{spread.furthest:.0%}[/{color}]")
    Console().print(table)
    far = sum(spread.furthest > options.limit for spread in found)
    print(f"{far} of {len(found)} ratios lie more than {options.limit:.0%} from their median")
    return 1 if far else 0


if __name__ == "__main__":
    sys.exit(main())
