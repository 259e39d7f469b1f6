"""A run as Markdown: the page with everything, and the README's few rows."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.bars import BARS, Verdict, evaluate
from benchmarks.plots import roofs
from benchmarks.results import Comparison, Row, Run, devices, digits, duels, duration, matches, ratio_of, said, size
from benchmarks.scaling import Growth, growth

OFF = 0.25  # a fitted exponent that is further from the expected one is marked
Link = Callable[[str], str]  # of a plot's name


def clean(text: str) -> str:
    """A text on one line whose underscores at the ends of words, as in ema_update_, do not become emphasis."""
    text = " ".join(text.replace("<", "&lt;").split())
    return re.sub(r"(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])", r"\\_", text)


def table(rows: Sequence[dict[str, str]]) -> list[str]:
    """A Markdown table of rows with the same keys."""
    if not rows:
        return []
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    cells = ["| " + " | ".join(clean(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]
    return [cells[0], "|" + " --- |" * len(rows[0]), *cells[1:], ""]


class Footnotes:
    """What the sides of one table do otherwise: marks in its cells, and the lines beneath it."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, row: Row) -> str:
        """The side's name with the number of its note."""
        if not row.differs:
            return row.side
        if row.differs not in self.texts:
            self.texts.append(row.differs)
        return f"{row.side} [{self.texts.index(row.differs) + 1}]"

    def lines(self) -> list[str]:
        """The notes, as a paragraph."""
        notes = [f"[{number}] {clean(text)}" for number, text in enumerate(self.texts, 1)]
        return ["  \n".join(notes), ""] if notes else []


def percent(row: Row) -> str:
    """Half the interquartile range."""
    return f"{row.spread / 2:.1%}"


def place(run: Run, device: str) -> dict[str, str]:
    """A column that says the device, where there are several."""
    return {"device": device} if len(devices(run)) > 1 else {}


def lost_section(run: Run) -> list[str]:
    """Where a peer is faster."""
    found, notes = duels(run), Footnotes()
    lost = [duel for duel in found if duel[0] < 1]
    if not lost:
        return [f"Nowhere: fastssl is as fast as the fastest peer, or faster, in all {len(found)} comparisons.", ""]
    lines = table(
        [
            {
                "op": c.op,
                "case": said(c.case),
                **place(run, c.device),
                "side": notes.mark(ours),
                "time": f"{duration(ours.median)} ± {percent(ours)}",
                "fastest peer": notes.mark(peer),
                "its time": f"{duration(peer.median)} ± {percent(peer)}",
                "peer ÷ fastssl": digits(ratio),
                "peak memory": f"{size(ours.peak_bytes)}, peer {size(peer.peak_bytes)}",
            }
            for ratio, c, ours, peer in lost
        ]
    )
    return [f"In {len(lost)} of {len(found)} comparisons, the worst first.", "", *lines, *notes.lines()]


def sides_of(verdict: Verdict) -> str:
    """What a bar divides by what."""
    bar = verdict.bar
    over, under = (
        f"{side} ({said(case)})" if case else side
        for side, case in ((bar.over, bar.over_case), (bar.under, bar.under_case))
    )
    return f"{'time' if bar.quantity == 'time' else 'peak memory'}, {over} ÷ {under}"


def kept(verdict: Verdict) -> str:
    """The last cell of a bar."""
    if verdict.held is None:
        return f"not measured: {verdict.reason}"
    return ("yes" if verdict.held else "**no**") + (f" ({verdict.bar.note})" if verdict.bar.note else "")


def bars_section(run: Run) -> list[str]:
    """What was promised, and what came out."""
    verdicts = evaluate(run)
    if not {verdict.bar.device for verdict in verdicts} & set(devices(run)):
        return ["The bars are for other devices than those of this run.", ""]
    count = Counter(verdict.held for verdict in verdicts)
    lines = table(
        [
            {
                "op": verdict.bar.op,
                "case": said(verdict.bar.case),
                **place(run, verdict.bar.device),
                "promise": verdict.bar.text,
                "of": sides_of(verdict),
                "asked": verdict.bar.asked,
                "measured": "–" if verdict.value is None else digits(verdict.value),
                "kept": kept(verdict),
            }
            for verdict in verdicts
        ]
    )
    return [f"{count[True]} kept, {count[False]} not kept, {count[None]} not measured.", "", *lines]


def rate(row: Row) -> str:
    """Items a second."""
    return "–" if row.items is None else digits(row.items / row.median)


def op_table(run: Run, comparisons: Iterable[Comparison]) -> list[str]:
    """All sides of an op's cases."""
    comparisons, notes = list(comparisons), Footnotes()
    rows = [(c, row) for c in comparisons for row in sorted(c.rows, key=lambda row: row.median)]
    units = {row.unit for _, row in rows if row.items is not None}
    unit = next(iter(units)) if len(units) == 1 else "items"
    lines = table(
        [
            {
                "case": said(c.case),
                **place(run, c.device),
                "side": notes.mark(row) + (" (bound)" if row.role == "bound" else ""),
                "median": duration(row.median),
                "±": percent(row),
                "÷ fastssl": digits(ratio_of(row, c.ours)) if c.ours else "–",
                "peak memory": size(row.peak_bytes),
                **({f"{unit or 'items'}/s": rate(row)} if units else {}),
            }
            for c, row in rows
        ]
    )
    return [*lines, *notes.lines()]


def fitted(g: Growth) -> str:
    """An exponent, bold where it is not what is expected."""
    mark = "**" if g.expected is not None and abs(g.fitted - g.expected) > OFF else ""
    return f"{mark}{g.fitted:.2f}{mark}"


def growth_section(run: Run) -> list[str]:
    """Fitted exponents."""
    found = growth(run)
    if not found:
        return ["No axis was measured at three sizes or more.", ""]
    lines = table(
        [
            {
                "op": g.op,
                "axis": g.axis,
                "the rest": said(g.fixed),
                **place(run, g.device),
                "side": g.side,
                "of": g.quantity,
                "range": f"{g.low:,} to {g.high:,}, {g.points} points",
                "fitted": fitted(g),
                "expected": "–" if g.expected is None else f"{g.expected:g}",
            }
            for g in found
        ]
    )
    text = (
        "Exponents of time and peak memory over one axis, all others equal: least squares of the logarithms over the "
        f"upper half of the sizes, at least three. Bold where it is more than {OFF} from what is expected."
    )
    return [text, "", *lines]


def skipped_section(run: Run) -> list[str]:
    """Who did not run, and why."""
    lines = []
    for reason in dict.fromkeys(entry.reason for entry in run.skipped):
        counts = Counter((entry.op, entry.side) for entry in run.skipped if entry.reason == reason)
        where = "; ".join(
            f"{op} ({', '.join(f'{side} × {count}' for (other, side), count in counts.items() if other == op)})"
            for op in dict.fromkeys(op for op, _ in counts)
        )
        lines.append(f"- {clean(reason)}, {counts.total()}: {clean(where)}")
    return [*lines, ""] if lines else ["Nothing.", ""]


def method_section(run: Run, name: str) -> list[str]:
    """Machine, versions and method."""
    m = run.machine
    facts = [f"Measured on {m.device}, {run.date}, from `{name}`" + (f" at commit {run.commit}" if run.commit else "")]
    facts += [f"CPU {m.cpu}, {m.threads} threads, load {m.load:g} when the run began"]
    if m.gpu:
        facts += [f"GPU {m.gpu}, driver {m.driver or 'unknown'}, CUDA {m.cuda or 'unknown'}"]
    for device in devices(run):
        products, bandwidth = roofs(run, device)
        does = [f"{digits(speed / 1e9)} Gop/s in matrix products of {dtype}" for dtype, speed in products.items()]
        does += [f"{digits(bandwidth / 1e9)} GB/s in the triad"] if bandwidth else []
        facts += [f"What the machine itself does ({device}): {', '.join(does)}"] if does else []
    facts += [", ".join(f"{package} {version}" for package, version in sorted(m.versions.items()))]
    lines = [f"- {fact}" for fact in facts]
    paired = "the median over the rounds of a peer's time divided by ours, or the ratio of the medians without turns"
    ratio = paired if any(row.samples for row in run.rows) else "the median of the fastest peer divided by ours"
    text = (
        "Each time is the median of a side's rounds, ± half their interquartile range. Peak memory is what one call "
        f"needs beyond what was there before. A ratio is {ratio}: above 1 fastssl is faster. The fastest peer is the "
        "one with the lowest ratio. Bounds are yardsticks (bare products, copies, backbones), never peers. CUDA graphs "
        "are compared with CUDA graphs where a peer has one."
    )
    return [*lines, "", text, ""]


def quick_warning(run: Run) -> list[str]:
    """A quick run says so."""
    return ["**A quick run: few rounds of the smallest cases, nothing to quote.**", ""] if run.machine.quick else []


def body(run: Run, name: str, pictures: Iterable[str], link: Link, level: int) -> list[str]:
    """Everything: the whole Markdown file, and the block of the page."""
    mark, pictures = "#" * level, list(pictures)

    def shown(kind: str, title: str) -> list[str]:
        return [
            line
            for p in pictures
            if p.startswith(f"{Path(name).stem}-{kind}")
            for line in (f"![{title}]({link(p)})", "")
        ]

    lines = [f"{mark} Measured on {run.machine.device}, {run.date}", "", *quick_warning(run)]
    lines += [f"{mark}# Where a peer is faster", "", *lost_section(run)]
    lines += [f"{mark}# The bars", "", *bars_section(run)]
    lines += [f"{mark}# All comparisons", "", *shown("ratios", "Time of the fastest peer divided by ours")]
    for op in dict.fromkeys(c.op for c in run.comparisons):
        lines += [f"{mark}## {op}", "", *op_table(run, (c for c in run.comparisons if c.op == op))]
    lines += [f"{mark}# How it grows", "", *growth_section(run), *shown("growth", "Time and peak memory")]
    lines += [f"{mark}# Skipped", "", *skipped_section(run)]
    lines += [f"{mark}# How it was measured", "", *method_section(run, name)]
    lines += shown("roofline", "Operations a second of fastssl beside what the machine can do")
    return lines


def headlines(run: Run) -> list[Comparison]:
    """The comparisons of the README, in the order of the run.

    The worst of every op, so that no choice can hide a loss, and the cases that a bar is about, on any device.
    """
    rated = [c for c in run.comparisons if c.ratio is not None]
    worst: dict[str, Comparison] = {}
    for c in sorted(rated, key=lambda c: c.ratio or 0):
        worst.setdefault(c.op, c)
    barred = [
        c for c in rated if any(bar.op == c.op and matches(c.case, {**bar.case, **bar.under_case}) for bar in BARS)
    ]
    return [c for c in rated if any(c is one for one in [*worst.values(), *barred])]


def readme_block(run: Run, source: str, text: str, command: str) -> list[str]:
    """The compact table, and where it is from; `source` and `text` are links to the JSON and to the Markdown."""
    rows = []
    for c in headlines(run):
        ours, peer = c.ours, c.best_peer
        if ours and peer:
            rows.append(
                {
                    "op": c.op,
                    "case": said(c.case),
                    **place(run, c.device),
                    "fastssl": duration(ours.median),
                    "fastest peer": f"{duration(peer.median)} ({peer.side})",
                    "ratio": digits(ratio_of(peer, ours)),
                    "peak memory": f"{size(ours.peak_bytes)}, peer {size(peer.peak_bytes)}",
                }
            )
    found, verdicts = duels(run), evaluate(run)
    lost = sum(ratio < 1 for ratio, *_ in found)
    line = (
        f"Measured on {run.machine.device}, {run.date}, with `{command}` ([results]({source}), [all of them as tables]"
        f"({text})): of every op the case with the lowest ratio, and those of the bars. Ratio: time of the fastest "
        f"peer ÷ ours; a peer is faster in {lost} of {len(found)} comparisons. Of what was promised, "
        f"{sum(bool(v.held) for v in verdicts)} of {len(verdicts)} bars are kept."
    )
    return [*quick_warning(run), *table(rows), line, ""]
