"""Kernels' predicted times beside measured ones: kernel_report.json against a result file of the benchmark suite.

    python -m benchmarks.predictions BENCH.json
    python -m benchmarks.predictions BENCH.json --report benchmarks/results/kernel_report.json --output FILE.md

Measured are the rows of device "cuda" and side "fastssl" or "fastssl, CUDA graph". The prediction is of kernels alone,
without launches and the host, as in a CUDA graph; so it is compared with the graph where there is one.
"""

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.kernel_markdown import table
from benchmarks.results import ResultsError, read_json

Case = dict[str, int | str]

REPORT = Path(__file__).parent / "results" / "kernel_report.json"
PLAIN, GRAPH = "fastssl", "fastssl, CUDA graph"
PRECISIONS = {"bfloat16": "bf16", "float32": "fp32"}
# How benchmarks call an axis.
ROWS, DIM, KEYS, SIDE = (
    ("N", "rows", "batch", "images"),
    ("D", "dim"),
    ("K", "keys", "capacity"),
    ("side", "size", "pixels"),
)
NEGATIVES = "in-batch negatives"  # its own row in the report; the benchmark takes both gradients in one call
NOTE = """Measured/predicted is of the CUDA graph, else (marked ¹) of the plain call, whose launches and host the
prediction does not have. The in-batch loss is measured with both gradients: its prediction is the sum of two rows."""


class PredictionsError(ValueError):
    """A file that cannot be compared; the message names it and what would be right."""


@dataclass
class Prediction:
    """Of one shape on one chip, in microseconds."""

    title: str
    predicted: float
    floor: float


@dataclass
class Measured:
    """One shape, in microseconds by side.

    Attributes:
        title: as the report has it if it has, else the case in words.
        times: by side, PLAIN or GRAPH.
        joins: whether `title` may be a row of the report.
    """

    title: str
    joins: bool
    times: dict[str, float] = field(default_factory=dict)

    @property
    def best(self) -> float:
        """What the prediction is compared with."""
        return self.times.get(GRAPH, self.times.get(PLAIN, 0.0))


def read(path: Path) -> dict[str, Any]:
    """A JSON file with an object in it.

    Raises:
        ResultsError: it cannot be read, or is not JSON.
        PredictionsError: there is something else in it.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise PredictionsError(f"{path} has a {type(content).__name__} in it, it must be a JSON object")
    return content


def chip_of(bench: dict[str, Any], report: dict[str, Any]) -> str:
    """The chip that was measured, as the report's key: its compute capability without the dot.

    Raises:
        PredictionsError: it is not told, or the report has no predictions for it.
    """
    machine = bench.get("machine_info", {}).get("fastssl", {})
    capability = machine.get("capability")
    name = machine.get("gpu") or machine.get("device") or "an unknown device"
    if not capability:
        raise PredictionsError(
            f"machine_info['fastssl']['capability'] is {capability!r} ({name}): it must be a GPU's, such as '9.0'"
        )
    chip = str(capability).replace(".", "")
    if chip not in report["chips"]:
        known = ", ".join(f"{c['name']} ({key})" for key, c in sorted(report["chips"].items(), key=lambda i: int(i[0])))
        raise PredictionsError(f"{name} has compute capability {capability}; there are predictions for {known} only")
    return chip


def predictions(report: dict[str, Any], chip: str) -> dict[str, Prediction]:
    """What the report says of a chip, by title; in-batch with its negatives as one."""
    found = {}
    for kind, name in (("shapes", "shape"), ("updates", "update"), ("augmentations", "augmentation")):
        for row in report[kind]:
            if str(row["chip"]) == chip:
                found[row[name]] = Prediction(row[name], row["predicted_us"], row["floor_us"])
    for title in [title for title in found if title.startswith(NEGATIVES)]:
        whole = title.replace(NEGATIVES, "in-batch")
        if whole in found:
            other = found.pop(title)
            found[whole].predicted += other.predicted
            found[whole].floor += other.floor
    return found


def axis(case: Case, names: Iterable[str]) -> int | None:
    """The number on the axis that has one of these names."""
    values = [case[name] for name in names if isinstance(case.get(name), int)]
    return int(values[0]) if values else None


def _queue(case: Case, op: str = "queue") -> str | None:
    rows, dim, keys = (axis(case, names) for names in (ROWS, DIM, KEYS))
    precision = PRECISIONS.get(str(case.get("dtype", "float32")))
    if rows is None or dim is None or keys is None or precision is None:
        return None
    return f"{op} N={rows:,} D={dim} K={keys:,} {precision}"


def _in_batch(case: Case) -> str | None:
    rows, dim = axis(case, ROWS), axis(case, DIM)
    precision = PRECISIONS.get(str(case.get("dtype", "float32")))
    return None if rows is None or dim is None or precision is None else f"in-batch N={rows:,} D={dim} {precision}"


def _enqueue(case: Case) -> str | None:
    return None if "dequeue" in words(case) else _queue(case, "enqueue")


def _update(case: Case) -> str | None:
    """Of a ResNet-50; the dtype of the sources is on an axis that says so, or on one called dtype."""
    if not re.search(r"resnet-?50\b", words(case)):
        return None
    named = [str(value) for name, value in case.items() if "source" in name or name == "dtype"]
    dtype = next((dtype for dtype in PRECISIONS for text in (*named, words(case)) if dtype in text), "float32")
    return f"ResNet-50, {dtype} sources"


def _augmentation(case: Case) -> str | None:
    """By the view's name, MoCo v2 where none is; predicted are 256 images of 224 pixels to bfloat16."""
    count, side = axis(case, ROWS), axis(case, SIDE)
    if (count or 256, side or 224, case.get("dtype", "bfloat16")) != (256, 224, "bfloat16"):
        return None
    text = words(case)
    if "byol" in text:
        view = next((name for name in ("first", "second") if name in text), None)
        return f"BYOL, {view} view" if view else None
    return "MoCo v2" if re.search(r"moco[ _-]?v2", text) or "moco" not in text else None


TITLES: dict[str, Callable[[Case], str | None]] = {
    "info_nce": _queue,
    "info_nce in-batch": _in_batch,
    "KeyQueue": _enqueue,
    "ema_update_": _update,
    "augment_": _augmentation,
}


def words(case: Case) -> str:
    """All words of a case."""
    return ", ".join(str(value) for value in case.values() if isinstance(value, str)).lower()


def said(op: str, case: Case) -> str:
    """A case that has no name in the report."""
    return ", ".join([op, *(v if isinstance(v, str) else f"{k}={v:,}" for k, v in case.items())])


def measured(bench: dict[str, Any]) -> list[Measured]:
    """Ours on CUDA, of the ops that the report is about, by shape."""
    found: dict[str, Measured] = {}
    for entry in bench.get("benchmarks", []):
        extra = entry.get("extra_info", {})
        op, case, side = extra.get("op"), extra.get("case", {}), extra.get("side")
        if extra.get("device") != "cuda" or side not in (PLAIN, GRAPH) or op not in TITLES:
            continue
        title = TITLES[op](case)
        one = found.setdefault(said(op, case), Measured(title or said(op, case), joins=title is not None))
        one.times[side] = entry["stats"]["median"] * 1e6
    return list(found.values())


def number(value: float | None) -> str:
    """Microseconds, or a dash."""
    return "–" if value is None else f"{value:,.2f}"


def row(one: Measured, prediction: Prediction) -> dict[str, str]:
    """A line of the table."""
    mark = "" if GRAPH in one.times else "¹"
    return {
        "shape": one.title,
        "measured µs": number(one.times.get(PLAIN)),
        "CUDA graph µs": number(one.times.get(GRAPH)),
        "predicted µs": number(prediction.predicted),
        "measured/predicted": f"{one.best / prediction.predicted:.2f}{mark}",
        "floor µs": number(prediction.floor),
        "measured/floor": f"{one.best / prediction.floor:.2f}{mark}",
    }


def said_median(ratios: dict[str, float], what: str) -> str:
    """The middle of the ratios, and their range."""
    values = list(ratios.values())
    low, high = min(ratios, key=ratios.__getitem__), max(ratios, key=ratios.__getitem__)
    return (
        f"Median of measured/predicted, {what}: **{statistics.median(values):.2f}** of {len(values)} "
        f"({ratios[low]:.2f} {low}, {ratios[high]:.2f} {high})"
    )


def compare(bench: dict[str, Any], report: dict[str, Any]) -> str:
    """Markdown of all shapes, with a partner or without.

    Args:
        bench: a result file of the suite.
        report: that of benchmarks.kernel_report.

    Raises:
        PredictionsError: the chip is not known, or nothing was measured on a GPU.
    """
    chip = chip_of(bench, report)
    found, expected = measured(bench), predictions(report, chip)
    if not found:
        count = len(bench.get("benchmarks", []))
        raise PredictionsError(
            f"none of the {count} benchmarks is of side '{PLAIN}' on device 'cuda' and of {', '.join(TITLES)}: run "
            "pytest benchmarks/ --benchmark-only -k cuda on a GPU"
        )
    machine = bench["machine_info"]["fastssl"]
    pairs = [(one, expected[one.title]) for one in found if one.joins and one.title in expected]
    lines = ["# Predicted and measured", ""]
    name, product = str(machine.get("gpu") or machine["device"]), report["chips"][chip]["name"]
    date, quick = str(bench.get("datetime", "date unknown"))[:10], " --quick" * bool(machine.get("quick"))
    lines += [
        f"Measured on {name}, {date}, by pytest benchmarks/ --benchmark-only{quick}; predicted on {report['date']} for "
        f"{product} by python -m benchmarks.kernel_report.",
    ]
    if not any(word in name for word in product.split() if any(letter.isdigit() for letter in word)):
        lines[-1] += f" {name} is another product than {product}, of the same architecture: expect other times."
    lines += [""]
    lines += table([row(one, prediction) for one, prediction in pairs])
    lines += [" ".join(NOTE.split()), ""]
    alone = [one for one in found if not (one.joins and one.title in expected)]
    if alone:
        lines += ["Measured, not predicted (µs; plain, CUDA graph):", ""]
        lines += [f"- {o.title}: {number(o.times.get(PLAIN))}, {number(o.times.get(GRAPH))}" for o in alone] + [""]
    titles = {one.title for one, _ in pairs}
    missing = [prediction for title, prediction in expected.items() if title not in titles]
    if missing:
        lines += ["Predicted, not measured (µs):", ""]
        lines += [f"- {prediction.title}: {number(prediction.predicted)}" for prediction in missing] + [""]
    # Of graphs and of plain calls apart: one says how good the model is, the other how much the host adds.
    medians = []
    for side, what in ((PLAIN, "plain calls"), (GRAPH, "CUDA graphs")):
        ratios = {one.title: one.times[side] / p.predicted for one, p in pairs if side in one.times}
        medians += [said_median(ratios, what)] if ratios else []
    lines += ["  \n".join(medians) or "Median of measured/predicted: nothing was both measured and predicted"]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.predictions", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("bench", type=Path, metavar="BENCH.json", help="of pytest benchmarks/ --benchmark-json=FILE")
    parser.add_argument("--report", type=Path, default=REPORT, help="of python -m benchmarks.kernel_report")
    parser.add_argument("--output", type=Path, help="Markdown to write as well")
    options = parser.parse_args(argv)
    try:
        text = compare(read(options.bench), read(options.report))
    except (PredictionsError, ResultsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text, end="")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
