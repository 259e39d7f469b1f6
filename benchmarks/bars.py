"""What fastssl promises about its speed on two CPU cores, as data, and what a run says about it."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from benchmarks.results import Case, Row, Run, matches, ratio_of, said

Quantity = Literal["time", "peak"]

# The names that the suites give: sides, and the cases that are held to something.
OURS = "fastssl"
EAGER, COMPILED, PRODUCTS = "authors, eager", "torch.compile", "two products alone"
LOOP, FOREACH, CAST, TRIAD = "authors' loop", "torch._foreach_lerp_", "cast, torch._foreach_lerp_", "triad"
AUTHORS = "authors"
TORCHVISION, TAPS, DALI = "torchvision", "torchvision, 23 taps", "DALI alone"
LIGHTLY = "lightly"

QUEUE: Case = {"N": 256, "D": 128, "K": 65536, "dtype": "float32"}
IN_BATCH: Case = {"N": 4096, "D": 128, "dtype": "float32"}
RESNET: Case = {"tensors": "ResNet-50", "sources": "float32"}
KEYS: Case = {"N": 256, "D": 128}
RANKS: Case = {"ranks": 4, "rows": 64}
SMALL: Case = {"images": "32 px in memory"}
JPEG: Case = {"images": "JPEG 256 to 224"}
STEP: Case = {"method": "MoCo", "set-up": "demo", "part": "whole"}


@dataclass(frozen=True)
class Bar:
    """A promise: what `over` takes, divided by what `under` takes, is at least or at most so much.

    A case need not name all axes. `over_case` and `under_case` replace axes of `case` for one of the two.
    """

    text: str
    op: str
    case: Case
    over: str
    under: str
    at_least: float | None = None
    at_most: float | None = None
    quantity: Quantity = "time"
    device: str = "cpu"
    over_case: Case = field(default_factory=dict)
    under_case: Case = field(default_factory=dict)
    note: str = ""

    def __post_init__(self) -> None:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError(
                f"the bar {self.text!r} has at_least={self.at_least} and at_most={self.at_most}: give exactly one"
            )

    def holds(self, value: float) -> bool:
        """Whether a measured value keeps the promise."""
        return value >= self.at_least if self.at_least is not None else value <= (self.at_most or 0.0)

    @property
    def asked(self) -> str:
        """The limit in words."""
        return f"≥ {self.at_least:g}" if self.at_least is not None else f"≤ {self.at_most:g}"


@dataclass(frozen=True)
class Verdict:
    """What a run says about a bar: a value, or the reason why there is none."""

    bar: Bar
    value: float | None
    reason: str

    @property
    def held(self) -> bool | None:
        """Whether the promise is kept; None where nothing was measured."""
        return None if self.value is None else self.bar.holds(self.value)


BARS = (
    Bar("faster than the authors' code", "info_nce", QUEUE, EAGER, OURS, at_least=3.5),
    Bar("faster than the authors' code, compiled", "info_nce", QUEUE, COMPILED, OURS, at_least=2),
    Bar("no slower than the two products that nobody can avoid", "info_nce", QUEUE, PRODUCTS, OURS, at_least=1),
    Bar("a twentieth of the memory", "info_nce", QUEUE, OURS, EAGER, at_most=0.05, quantity="peak"),
    Bar(
        "bfloat16 against the authors' code in float32",
        "info_nce",
        QUEUE,
        EAGER,
        OURS,
        at_least=8,
        under_case={"dtype": "bfloat16"},
        note="asked for of CPUs with AMX",
    ),
    Bar("faster than the formula", "info_nce in-batch", IN_BATCH, EAGER, OURS, at_least=2),
    Bar("faster than the authors' loop", "ema_update_", RESNET, LOOP, OURS, at_least=3),
    Bar("no slower than torch's own", "ema_update_", RESNET, FOREACH, OURS, at_least=1),
    Bar("as fast as the memory, STREAM's triad", "ema_update_", RESNET, TRIAD, OURS, at_least=0.85),
    Bar(
        "bfloat16 sources, faster than cast and torch's own",
        "ema_update_",
        {**RESNET, "sources": "bfloat16"},
        CAST,
        OURS,
        at_least=1.5,
    ),
    Bar(
        "enqueueing costs the same whatever the capacity",
        "KeyQueue",
        KEYS,
        OURS,
        OURS,
        at_most=1.2,
        over_case={"K": 1048576},
        under_case={"K": 65536},
    ),
    Bar("faster than the authors' gather and index", "shuffle_batch", RANKS, AUTHORS, OURS, at_least=4),
    Bar("faster than torchvision", "loader", SMALL, TORCHVISION, OURS, at_least=8),
    Bar("faster than torchvision with the whole Gaussian", "loader", SMALL, TAPS, OURS, at_least=8),
    Bar("no slower than DALI alone", "loader", SMALL, DALI, OURS, at_least=1),
    Bar("faster than torchvision with the whole Gaussian", "loader", JPEG, TAPS, OURS, at_least=4),
    Bar("faster than torchvision", "loader", JPEG, TORCHVISION, OURS, at_least=1.3),
    Bar("no slower than DALI alone", "loader", JPEG, DALI, OURS, at_least=1),
    Bar("faster than lightly", "training step", STEP, LIGHTLY, OURS, at_least=3.5),
)


def find(run: Run, bar: Bar, side: str, case: Case) -> Row | str:
    """The one row of a side, or why there is none."""
    what = f"{side}, {said(case)}"
    rows = [
        row
        for row in run.rows
        if (row.op, row.device, row.side) == (bar.op, bar.device, side) and matches(row.case, case)
    ]
    if len(rows) > 1:
        # Taking one of them would be choosing the result.
        return f"{what}: {len(rows)} cases match ({'; '.join(said(row.case) for row in rows)})"
    if rows:
        return rows[0]
    for entry in run.skipped:
        if (entry.op, entry.device, entry.side) == (bar.op, bar.device, side) and matches(entry.case, case):
            return f"{what} skipped: {entry.reason}"
    return f"{what} not run"


def judge(run: Run, bar: Bar) -> Verdict:
    """What a run says about one bar."""
    over = find(run, bar, bar.over, {**bar.case, **bar.over_case})
    under = find(run, bar, bar.under, {**bar.case, **bar.under_case})
    if isinstance(over, str) or isinstance(under, str):
        # Once where both are missing for the same reason.
        return Verdict(bar, None, "; ".join(dict.fromkeys(found for found in (over, under) if isinstance(found, str))))
    if bar.quantity == "time":
        return Verdict(bar, ratio_of(over, under), "")
    if over.peak_bytes is None or not under.peak_bytes:
        unknown = over.side if over.peak_bytes is None else under.side
        return Verdict(bar, None, f"{unknown}: peak memory not measured")
    return Verdict(bar, over.peak_bytes / under.peak_bytes, "")


def evaluate(run: Run, bars: Iterable[Bar] = BARS) -> list[Verdict]:
    """What a run says about every bar."""
    return [judge(run, bar) for bar in bars]
