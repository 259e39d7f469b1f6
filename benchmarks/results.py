"""What the benchmark suite has measured: its JSON read, checked, and grouped into comparisons."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Case = Mapping[str, int | str]
ROLES = ("ours", "peer", "bound")
DEVICES = ("cpu", "cuda")
PLAIN = "fastssl"  # the side that counts where there are several of ours


class ResultsError(ValueError):
    """A file that is not a JSON of the benchmark suite; the message names it and what is wrong."""


@dataclass(frozen=True)
class Row:
    """One side of one case, in seconds a call and bytes."""

    op: str
    case: Case
    device: str
    side: str
    role: str
    differs: str
    graph: bool
    median: float
    iqr: float
    rounds: int
    peak_bytes: int | None
    flops: float | None
    bytes: float | None
    items: int | None
    unit: str | None
    title: str
    samples: tuple[float, ...] = ()  # of its rounds, where the sides of the case took turns

    @property
    def spread(self) -> float:
        """The interquartile range as a share of the median."""
        return self.iqr / self.median

    @property
    def where(self) -> tuple[str, frozenset[tuple[str, int | str]], str]:
        """What the rows of a comparison share."""
        return self.op, frozenset(self.case.items()), self.device

    @property
    def key(self) -> tuple[str, frozenset[tuple[str, int | str]], str, str]:
        """What tells a row from all others of a run."""
        return *self.where, self.side


def ratio_of(over: Row, under: Row) -> float:
    """How many times as long `over` takes as `under`.

    The median of the rounds' ratios where both took turns: in a round they share the machine as it is at the moment.
    Otherwise the ratio of the medians.
    """
    if over.where == under.where and over.samples and len(over.samples) == len(under.samples):
        return statistics.median(a / b for a, b in zip(over.samples, under.samples, strict=True))
    return over.median / under.median


@dataclass(frozen=True)
class Comparison:
    """All sides of one case on one device."""

    op: str
    case: Case
    device: str
    rows: tuple[Row, ...]

    @property
    def ours(self) -> Row | None:
        """The plain side of fastssl; the first of ours where none has that name."""
        mine = [row for row in self.rows if row.role == "ours"]
        return next((row for row in mine if row.side == PLAIN), mine[0] if mine else None)

    @property
    def best_peer(self) -> Row | None:
        """The fastest peer of `ours`."""
        return self.peer_of(self.ours) if self.ours else None

    @property
    def ratio(self) -> float | None:
        """How many times faster than the best peer `ours` is; None where one of them is missing."""
        return ratio_of(self.best_peer, self.ours) if self.ours and self.best_peer else None

    @property
    def memory_ratio(self) -> float | None:
        """The best peer's peak memory over ours; None where one is unknown, or ours is nothing at all."""
        if not self.ours or not self.best_peer or self.best_peer.peak_bytes is None or not self.ours.peak_bytes:
            return None
        return self.best_peer.peak_bytes / self.ours.peak_bytes

    def peer_of(self, mine: Row) -> Row | None:
        """The fastest peer that the side of ours is compared with.

        CUDA graphs are compared with CUDA graphs, or with nobody. A peer's graph counts against the plain side only
        where we have no graph of our own: it would go uncompared otherwise.
        """
        peers = [row for row in self.rows if row.role == "peer"]
        if mine.graph or any(row.graph for row in self.rows if row.role == "ours"):
            peers = [row for row in peers if row.graph == mine.graph]
        return min(peers, key=lambda row: ratio_of(row, mine), default=None)

    @property
    def duels(self) -> tuple[tuple[Row, Row], ...]:
        """`ours` and every CUDA graph of ours, each with its fastest peer."""
        mine = [row for row in self.rows if row == self.ours or (row.role == "ours" and row.graph)]
        return tuple((row, peer) for row in mine if (peer := self.peer_of(row)))


@dataclass(frozen=True)
class Skipped:
    """A side that did not run, and why."""

    op: str
    case: Case
    device: str
    side: str
    reason: str


@dataclass(frozen=True)
class Machine:
    """Where it was measured."""

    device: str
    slug: str
    cpu: str
    gpu: str | None
    driver: str | None
    cuda: str | None
    threads: int
    load: float
    quick: bool
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Run:
    """One file of results."""

    machine: Machine
    date: str  # YYYY-MM-DD
    commit: str  # "" where it is not known; with what was changed since
    rows: tuple[Row, ...]
    comparisons: tuple[Comparison, ...]
    skipped: tuple[Skipped, ...]


def matches(case: Case, axes: Case) -> bool:
    """Whether a case has these axes with these values; it may have others too."""
    return all(name in case and case[name] == value for name, value in axes.items())


def compared(rows: Iterable[Row]) -> tuple[Comparison, ...]:
    """The rows by op, case and device, in the order of their first ones."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.where, []).append(row)
    return tuple(Comparison(found[0].op, found[0].case, found[0].device, tuple(found)) for found in groups.values())


def devices(run: Run) -> list[str]:
    """The devices that the rows are of."""
    return list(dict.fromkeys(row.device for row in run.rows))


def duels(run: Run) -> list[tuple[float, Comparison, Row, Row]]:
    """Ratio, comparison, side of ours and fastest peer, the worst first."""
    found = [(ratio_of(peer, ours), c, ours, peer) for c in run.comparisons for ours, peer in c.duels]
    return sorted(found, key=lambda duel: duel[0])


def said(case: Case) -> str:
    """A case in words: numbers with their axes, words without."""
    return ", ".join(value if isinstance(value, str) else f"{name}={value:,}" for name, value in case.items())


def duration(seconds: float) -> str:
    """A time with three digits in the unit that suits it."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= 0.9995 * scale:  # 0.9996 ms would be written as 1000 µs
            return f"{digits(seconds / scale)} {unit}"
    return f"{digits(seconds * 1e9)} ns"


def size(count: int | None) -> str:
    """A memory with three digits in the unit that suits it."""
    if count is None:
        return "–"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * scale:
            return f"{digits(count / scale)} {unit}"
    return f"{count} B"


def digits(value: float) -> str:
    """Three digits, without an exponent."""
    if value == 0:
        return "0"
    value = float(f"{value:.3g}")
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def get(source: Any, name: str, kinds: tuple[type, ...], where: str) -> Any:
    """The value of one field, checked.

    Raises:
        ResultsError: it is missing, or of another type.
    """
    if not isinstance(source, dict) or name not in source:
        raise ResultsError(f"{where} has no {name!r}")
    value = source[name]
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        raise ResultsError(f"{where}: {name!r} is {value!r}, it has to be of type {names}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ResultsError(f"{where}: {name!r} is {value!r}, it has to be finite")
    return value


NONE = type(None)
NUMBER = (int, float)
OPTIONAL = (int, float, NONE)


def get_case(source: Any, where: str) -> dict[str, int | str]:
    """The axes of a case."""
    case: dict[str, int | str] = get(source, "case", (dict,), where)
    for axis in case:
        get(case, axis, (int, str), f"{where}: the case")
    return case


def get_choice(source: Any, name: str, choices: tuple[str, ...], where: str) -> str:
    """One of a few words."""
    value: str = get(source, name, (str,), where)
    if value not in choices:
        raise ResultsError(f"{where}: {name!r} is {value!r}, it has to be one of {', '.join(choices)}")
    return value


def read_row(entry: Any, number: int, path: Path) -> Row:
    """One entry of `benchmarks`."""
    where = f"{path}: benchmarks[{number}]"
    title: str = get(entry, "name", (str,), where)
    where += f" ({title})"
    stats, extra = get(entry, "stats", (dict,), where), get(entry, "extra_info", (dict,), where)
    if "op" not in extra:
        raise ResultsError(f"{where} has no 'op' in its extra_info: it was not written by this suite")
    row = Row(
        op=get(extra, "op", (str,), where),
        case=get_case(extra, where),
        device=get_choice(extra, "device", DEVICES, where),
        side=get(extra, "side", (str,), where),
        role=get_choice(extra, "role", ROLES, where),
        differs=get(extra, "differs", (str,), where),
        graph=get(extra, "graph", (bool,), where),
        median=get(stats, "median", NUMBER, f"{where}: stats"),
        iqr=get(stats, "iqr", NUMBER, f"{where}: stats"),
        rounds=get(stats, "rounds", (int,), f"{where}: stats"),
        peak_bytes=get(extra, "peak_bytes", (int, NONE), where),
        flops=get(extra, "flops", OPTIONAL, where),
        bytes=get(extra, "bytes", OPTIONAL, where),
        items=get(extra, "items", (int, NONE), where),
        unit=get(extra, "unit", (str, NONE), where),
        title=title,
        samples=tuple(stats.get("data", ())) if extra.get("in_turns") else (),
    )
    for seconds in (row.median, *row.samples):
        if not isinstance(seconds, NUMBER) or isinstance(seconds, bool) or not 0 < seconds < math.inf:
            raise ResultsError(f"{where}: a time of {seconds!r}, it has to be a finite number above 0")
    return row


def read_skipped(entry: Any, number: int, path: Path) -> Skipped:
    """One entry of `skipped`."""
    where = f"{path}: skipped[{number}]"
    op, side, reason = (get(entry, name, (str,), where) for name in ("op", "side", "reason"))
    return Skipped(op, get_case(entry, where), get_choice(entry, "device", DEVICES, where), side, reason)


def read_machine(source: Any, path: Path) -> Machine:
    """The suite's part of `machine_info`."""
    where = f"{path}: machine_info"
    found, where = get(source, "fastssl", (dict,), where), f"{where}['fastssl']"
    versions = get(found, "versions", (dict,), where)
    for package in versions:
        get(versions, package, (str,), f"{where}: versions")
    return Machine(
        device=get(found, "device", (str,), where),
        slug=get(found, "slug", (str,), where),
        cpu=get(found, "cpu", (str,), where),
        gpu=get(found, "gpu", (str, NONE), where),
        driver=get(found, "driver", (str, NONE), where),
        cuda=get(found, "cuda", (str, NONE), where),
        threads=get(found, "threads", (int,), where),
        load=get(found, "load", NUMBER, where),
        quick=get(found, "quick", (bool,), where),
        versions=versions,
    )


def read_json(path: Path) -> Any:
    """What a JSON file has in it.

    Raises:
        ResultsError: it cannot be read, or is none.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultsError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ResultsError(f"{path} is not JSON, its writer may have been ended: {error}") from error


def load(path: Path | str) -> Run:
    """The results in a JSON of the suite.

    Raises:
        ResultsError: the file cannot be read, or is not such a JSON.
    """
    path = Path(path)
    content, where = read_json(path), str(path)
    entries = get(content, "benchmarks", (list,), where)
    rows = tuple(read_row(entry, number, path) for number, entry in enumerate(entries))
    seen: dict[Any, Row] = {}
    for row in rows:
        if (first := seen.setdefault(row.key, row)) is not row:
            raise ResultsError(
                f"{path}: {first.title} and {row.title} are both {row.op!r}, {said(row.case)}, {row.device}, "
                f"{row.side!r}: a side has one row a case"
            )
    commit = content.get("commit_info")
    return Run(
        machine=read_machine(get(content, "machine_info", (dict,), where), path),
        date=get(content, "datetime", (str,), where)[:10],
        commit=_commit(commit) if isinstance(commit, dict) else "",
        rows=rows,
        comparisons=compared(rows),
        skipped=tuple(
            read_skipped(entry, number, path) for number, entry in enumerate(get(content, "skipped", (list,), where))
        ),
    )


def _commit(info: dict[str, Any]) -> str:
    name = str(info.get("id") or "")[:12]
    return f"{name} and changes not committed then" if name and info.get("dirty") else name
