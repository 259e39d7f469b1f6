"""How time and peak memory grow with an axis of the cases: exponents fitted to a run, beside those expected."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from benchmarks.results import Case, Row, Run

Quantity = Literal["time", "memory"]
LEAST = 3  # points of a series

# What y ~ axis^exponent should be, by the side's name or else its role. Memory of peers is told by name: one that works
# in chunks would be another matter. shuffle_batch: what all ranks send together, on cores that they share; the authors'
# gather sends every batch to every rank.
EXPECTED: dict[tuple[str, str, Quantity, str], float] = {
    **{("info_nce", axis, "time", role): 1 for axis in "NDK" for role in ("ours", "peer", "bound")},
    ("info_nce", "K", "memory", "ours"): 0,
    ("info_nce", "N", "memory", "ours"): 1,
    **{
        ("info_nce", axis, "memory", side): 1
        for axis in "NK"
        for side in ("authors, eager", "info-nce-pytorch", "two products alone")
    },
    **{("info_nce in-batch", "N", "time", role): 2 for role in ("ours", "peer", "bound")},
    ("info_nce in-batch", "N", "memory", "ours"): 1,
    ("info_nce in-batch", "N", "memory", "authors, eager"): 2,
    ("info_nce in-batch", "N", "memory", "info-nce-pytorch"): 2,
    **{("normalized_mse", axis, "time", role): 1 for axis in "ND" for role in ("ours", "peer", "bound")},
    ("KeyQueue", "K", "time", "ours"): 0,
    ("KeyQueue", "K", "memory", "ours"): 0,
    ("shuffle_batch", "ranks", "time", "ours"): 1,
    ("shuffle_batch", "ranks", "time", "authors"): 2,
    **{("augment_", "side", "time", role): 2 for role in ("ours", "peer", "bound")},
}


@dataclass(frozen=True)
class Series:
    """Rows that differ in one axis only, from the smallest to the largest."""

    op: str
    axis: str
    fixed: Case  # the other axes
    device: str
    side: str
    role: str
    rows: tuple[Row, ...]

    def points(self, quantity: Quantity) -> list[tuple[int, float]]:
        """Axis and seconds or bytes; rows whose memory is unknown or nothing are left out, they have no logarithm."""
        found = [(row.case[self.axis], row.median if quantity == "time" else row.peak_bytes) for row in self.rows]
        return [(x, y) for x, y in found if isinstance(x, int) and y]


@dataclass(frozen=True)
class Growth:
    """A fitted exponent: quantity ~ axis^fitted between `low` and `high`."""

    op: str
    axis: str
    fixed: Case
    device: str
    side: str
    quantity: Quantity
    low: int
    high: int
    points: int
    fitted: float
    expected: float | None


def series(rows: Iterable[Row]) -> list[Series]:
    """All series of at least three rows with numbers above 0 on the axis, in the order of their first rows."""
    groups: dict[object, list[Row]] = {}
    for row in rows:
        for axis, value in row.case.items():
            if isinstance(value, int) and value > 0:
                others = frozenset(item for item in row.case.items() if item[0] != axis)
                groups.setdefault((row.op, axis, others, row.device, row.side), []).append(row)
    found = []
    for (op, axis, *_), members in ((key, members) for key, members in groups.items() if isinstance(key, tuple)):
        if len(members) >= LEAST:
            first = members[0]
            fixed = {name: value for name, value in first.case.items() if name != axis}
            ordered = tuple(sorted(members, key=lambda row: row.case[axis]))
            found.append(Series(op, axis, fixed, first.device, first.side, first.role, ordered))
    return found


def upper(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """The points that are fitted: the upper half of them, and at least three.

    Fixed costs (launches, threads, the allocator) hide the slope at small sizes; three points show at least whether
    they lie on a line.
    """
    return points[-max(LEAST, math.ceil(len(points) / 2)) :]


def exponent(points: list[tuple[int, float]]) -> float:
    """The slope of log y on log x by least squares."""
    x, y = [math.log(point[0]) for point in points], [math.log(point[1]) for point in points]
    middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
    products = sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True))
    return products / sum((a - middle_x) ** 2 for a in x)


def growth(run: Run) -> list[Growth]:
    """The exponents of every op, axis, side and quantity that has enough points."""
    found: list[Growth] = []
    quantities: tuple[Quantity, ...] = ("time", "memory")
    for line in series(run.rows):
        for quantity in quantities:
            points = line.points(quantity)
            if len(points) < LEAST:
                continue
            used = upper(points)
            expected = EXPECTED.get(
                (line.op, line.axis, quantity, line.side), EXPECTED.get((line.op, line.axis, quantity, line.role))
            )
            found.append(
                Growth(
                    op=line.op,
                    axis=line.axis,
                    fixed=line.fixed,
                    device=line.device,
                    side=line.side,
                    quantity=quantity,
                    low=used[0][0],
                    high=used[-1][0],
                    points=len(used),
                    fitted=exponent(used),
                    expected=expected,
                )
            )
    return found
