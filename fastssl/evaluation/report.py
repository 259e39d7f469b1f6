"""The report of a run: one self-contained HTML file, and the table that the console shows too."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import torch
from rich.table import Table
from torch import nn

from fastssl.data.sources import Images, load_image
from fastssl.evaluation.evaluator import Evaluator, Measures
from fastssl.files import write_text

matplotlib.use("svg")
TEMPLATE = Path(__file__).with_name("report.html")
QUERIES, NEIGHBOURS, THUMBNAIL = 12, 5, 96


@dataclass(frozen=True)
class Result:
    """The measures of one row of the table."""

    name: str
    measures: Measures


@dataclass(frozen=True)
class Cell:
    """One picture of the grid."""

    image: str  # data URI
    caption: str
    correct: bool | None  # of the query's class; None without labels, or for the query itself


def percent(value: float | None) -> str:
    """A share as people read it."""
    return "–" if value is None else f"{value:.1%}"


def table(results: Sequence[Result]) -> Table:
    """The measures as a table for the console."""
    out = Table("features", title="held-out images, top-1", title_justify="left")
    out.add_column("weighted kNN", justify="right")
    out.add_column("instance retrieval", justify="right")
    for result in results:
        out.add_row(result.name, percent(result.measures.knn), percent(result.measures.retrieval))
    return out


def neighbours(evaluator: Evaluator, backbone: nn.Module) -> list[list[Cell]]:
    """A few images, each followed by its nearest neighbours among the gallery by the backbone's features."""
    images = evaluator.gallery()
    features = evaluator.features(backbone, images, evaluator.augmentation.views[0].evaluation)
    chosen = torch.arange(min(QUERIES, len(images))) * len(images) // min(QUERIES, len(images))
    similarity = features[chosen] @ features.T
    similarity[torch.arange(len(chosen)), chosen] = -torch.inf  # not itself
    found = similarity.topk(min(NEIGHBOURS, len(images) - 1), dim=1)
    rows = []
    for query, near, scores in zip(chosen.tolist(), found.indices.tolist(), found.values.tolist(), strict=True):
        cells = [_cell(images, query, query, "")]
        cells += [_cell(images, i, query, f"{score:.2f} ") for i, score in zip(near, scores, strict=True)]
        rows.append(cells)
    return rows


def _cell(images: Images, index: int, query: int, score: str) -> Cell:
    if images.labels is None:
        return Cell(thumbnail(images, index), score, None)
    label = int(images.labels[index])
    correct = None if index == query else label == int(images.labels[query])
    return Cell(thumbnail(images, index), score + (images.classes[label] if images.classes else str(label)), correct)


def thumbnail(images: Images, index: int) -> str:
    """An image as a data URI, small ones as they are."""
    image = load_image(images, index)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def curve(metrics: Sequence[dict[str, Any]], name: str, label: str) -> str:
    """The course of one metric over the epochs as an SVG picture; empty when it was never measured."""
    from matplotlib import pyplot

    points = [(row["epoch"], row[name]) for row in metrics if name in row]
    if not points:
        return ""
    figure, axes = pyplot.subplots(figsize=(5.6, 3.0), layout="constrained")
    axes.plot(*zip(*points, strict=True), color="#2458a6", linewidth=1.6, marker="o" if len(points) < 40 else "", ms=3)
    axes.set(xlabel="epoch", ylabel=label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def write_report(
    path: Path,
    *,
    title: str,
    config: str,
    metrics: Sequence[dict[str, Any]],
    results: Sequence[Result],
    grid: Sequence[Sequence[Cell]],
) -> None:
    """Write the report; nothing in it is fetched from anywhere."""
    curves = {
        "Loss": curve(metrics, "loss", "loss"),
        "kNN accuracy": curve(metrics, "knn", "accuracy"),
        "Learning rate": curve(metrics, "lr", "learning rate"),
        "Throughput": curve(metrics, "images_per_second", "images/s"),
    }
    template = jinja2.Environment(autoescape=True).from_string(TEMPLATE.read_text())
    text = template.render(
        title=title, config=config, curves={k: v for k, v in curves.items() if v}, results=results, grid=grid,
        percent=percent, columns=len(grid[0]) if grid else 0,
    )  # fmt: skip
    write_text(path, text)
