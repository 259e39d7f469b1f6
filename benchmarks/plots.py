"""Plots of a run as SVG: growth, ratios to the best peer, and the place under the roofline."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.results import Row, Run, devices, digits, duels, said
from benchmarks.scaling import Quantity, Series, series

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GROWTH_PLOTS = (("info_nce", "K"), ("info_nce", "N"), ("info_nce in-batch", "N"))
COLUMNS = 2  # of a growth plot: the cases with the most points
WON, LOST = "#3b76af", "#c8442d"
MACHINE = "machine"  # the op that has the bounds of the machine


def roofs(run: Run, device: str) -> tuple[dict[str, float], float | None]:
    """Operations a second by dtype, and bytes a second, that the machine was measured to do."""
    rows = [row for row in run.rows if row.op == MACHINE and row.device == device]
    products = {
        str(r.case.get("dtype", "")): r.flops / r.median for r in rows if r.flops and r.case.get("what") == "matmul"
    }
    triads = [row.bytes / row.median for row in rows if row.bytes and row.case.get("what") == "triad"]
    return products, max(triads, default=None)


def growth_figure(figure: "Figure", op: str, axis: str, found: Sequence[Series]) -> None:
    """Time and peak memory over one axis, a column a case."""
    cases: dict[tuple[str, str], list[Series]] = {}
    for line in found:
        cases.setdefault((said(line.fixed), line.device), []).append(line)
    columns = sorted(cases.items(), key=lambda item: -sum(len(line.rows) for line in item[1]))[:COLUMNS]
    quantities: tuple[Quantity, ...] = ("time", "memory")
    figure.set_size_inches(1.5 + 4.0 * len(columns), 6.5)
    grid = figure.subplots(2, len(columns), squeeze=False, sharex="col")
    sides = list(dict.fromkeys(line.side for _, lines in columns for line in lines))
    handles: dict[str, Artist] = {}
    for column, ((case, device), lines) in enumerate(columns):
        grid[0][column].set_title(f"{op}, {case} [{device}]", fontsize="small")
        grid[1][column].set_xlabel(axis)
        places = sorted({x for line in lines for x, _ in line.points("time")})
        for row, quantity in enumerate(quantities):
            axes = grid[row][column]
            axes.set(xscale="log", yscale="log", ylabel="seconds" if quantity == "time" else "bytes at the peak")
            for line in lines:
                style = "--" if line.role == "bound" else "-"
                width, colour = (2.5 if line.role == "ours" else 1.2), f"C{sides.index(line.side) % 10}"
                if points := line.points(quantity):
                    x, y = zip(*points, strict=True)
                    handles[line.side] = axes.plot(x, y, style, marker="o", markersize=3, lw=width, color=colour)[0]
            axes.set_xticks(places, [f"{x:,}" for x in places], rotation=45, fontsize="x-small")
            axes.set_xticks([], minor=True)
    names = [side for side in sides if side in handles]
    figure.legend([handles[side] for side in names], names, loc="outside right upper", fontsize="x-small")


def ratios_figure(figure: "Figure", run: Run) -> None:
    """The ratio to the fastest peer in every comparison, sorted; bars start at 1."""
    found = duels(run)
    figure.set_size_inches(9, 1.2 + 0.22 * len(found))
    axes = figure.subplots()
    names = []
    for position, (ratio, c, ours, peer) in enumerate(found):
        axes.barh(position, ratio - 1, left=1, color=WON if ratio >= 1 else LOST)
        axes.annotate(
            f"{digits(ratio)}  {peer.side}",
            (max(ratio, 1.0), position),
            (3, 0),
            textcoords="offset points",
            va="center",
            fontsize="x-small",
        )
        names.append(", ".join(filter(None, (c.op, said(c.case), c.device, "CUDA graph" if ours.graph else ""))))
    axes.set_xscale("log")
    axes.axvline(1, color="black", lw=1)
    axes.set_yticks(range(len(names)), names, fontsize="x-small")
    axes.set_ylim(-0.6, len(names) - 0.4)
    low, high = found[0][0], found[-1][0]
    axes.set_xlim(min(low, 1) / 1.2, max(high, 1) * 3)  # room for the names of the peers
    axes.set_xlabel("time of the fastest peer ÷ time of fastssl")


def dtyped(row: Row) -> str:
    """An op with its dtype, which says under which roof it is."""
    return ", ".join(map(str, filter(None, (row.op, row.case.get("dtype")))))


def roofline_figure(figure: "Figure", run: Run, device: str) -> None:
    """Where fastssl's sides are under min(operations, bandwidth × intensity)."""
    figure.set_size_inches(8, 5)
    axes: Axes = figure.subplots()
    rows, (products, bandwidth) = roofline_rows(run, device), roofs(run, device)
    points = [(dtyped(r), r.flops / r.bytes, r.flops / r.median) for r in rows if r.flops and r.bytes]
    bandwidth = bandwidth or 0.0
    ridges = [speed / bandwidth for speed in products.values()]
    low, high = (pick([x for _, x, _ in points] + ridges) for pick in (min, max))
    for (dtype, speed), style in zip(products.items(), ("-", "--", ":", "-.") * len(products), strict=False):
        ridge = speed / bandwidth
        line = [low / 3, ridge, high * 3]
        label = f"roof of {dtype}: {digits(speed / 1e9)} Gop/s, {digits(bandwidth / 1e9)} GB/s"
        axes.plot(line, [min(speed, bandwidth * x) for x in line], style, color="black", label=label)
    for number, label in enumerate(dict.fromkeys(label for label, *_ in points)):
        x, y = zip(*((x, y) for name, x, y in points if name == label), strict=True)
        axes.plot(x, y, "os^Dv"[number % 5], markersize=4, color=f"C{number % 10}", label=label)
    axes.set(xscale="log", yscale="log", xlabel="operations a byte, at least", ylabel="operations a second")
    axes.set_title(f"fastssl on {run.machine.device} [{device}]", fontsize="small")
    axes.legend(fontsize="x-small")


def roofline_rows(run: Run, device: str) -> list[Row]:
    """Our sides whose operations and bytes are known."""
    mine = [c.ours for c in run.comparisons if c.ours and c.device == device and c.op != MACHINE]
    return [row for row in mine if row.flops and row.bytes]


def plots(run: Run, stem: str) -> dict[str, "Callable[[Figure], None]"]:
    """The plots that a run has enough data for: how to draw each, by file name."""
    found: dict[str, Callable[[Figure], None]] = {}
    if duels(run):
        found[f"{stem}-ratios.svg"] = partial(ratios_figure, run=run)
    lines = series(run.rows)
    for op, axis in GROWTH_PLOTS:
        if mine := [line for line in lines if (line.op, line.axis) == (op, axis)]:
            name = f"{stem}-growth-{op.replace(' ', '-')}-{axis}.svg"
            found[name] = partial(growth_figure, op=op, axis=axis, found=mine)
    for device in devices(run):
        products, bandwidth = roofs(run, device)
        if products and bandwidth and roofline_rows(run, device):
            found[f"{stem}-roofline-{device}.svg"] = partial(roofline_figure, run=run, device=device)
    return found


def draw(found: dict[str, "Callable[[Figure], None]"], folder: Path) -> None:
    """Write the plots; the same data give the same bytes."""
    import matplotlib  # half a second
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, "svg.hashsalt": "fastssl", "svg.fonttype": "none"}):
        for name, drawing in found.items():
            figure = Figure(layout="constrained")
            FigureCanvasAgg(figure)
            drawing(figure)
            figure.savefig(folder / name, format="svg", metadata={"Date": None, "Creator": None})
