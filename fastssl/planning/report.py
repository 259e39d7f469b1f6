"""How plans are shown: tables side by side, and one line that says what they come to."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from rich.table import Table

from fastssl.planning import collectives, parts
from fastssl.planning.devices import GIB
from fastssl.planning.plan import Plan

Cell = Callable[[Plan], str]


def tables(plans: Sequence[Plan]) -> list[Table]:
    """Memory, collectives, operations and time of each plan, a column each."""
    return [_memory(plans), _collectives(plans), _operations(plans), _time(plans)]


def headline(plan: Plan) -> str:
    """What a plan comes to."""
    cost = f"predicted {plan.hours:,.2f} hours, {plan.hours * plan.gpus:,.0f} GPU-hours, on {plan.gpus} × "
    if plan.fits:
        return cost + plan.device.title
    return (
        f"{plan.batch} images a GPU do not fit on {plan.device.title}: predicted {plan.peak / GIB:.1f} of "
        f"{plan.device.memory / GIB:.1f} GiB; {plan.largest_batch} fit, or use --accumulate or --checkpoint_activations"
    )


def _memory(plans: Sequence[Plan]) -> Table:
    table = _table("predicted memory of a GPU, GiB", plans)
    _row(table, plans, "images a GPU and step", lambda p: f"{p.batch:,}")
    _row(table, plans, "parameters, million", lambda p: f"{p.trace.parameters[0] / 1e6:.2f}")
    _row(table, plans, "of the momentum encoder", lambda p: f"{p.trace.parameters[1] / 1e6:.2f}")
    for kind in _keys(p.memory for p in plans):
        _row(table, plans, kind, lambda p, kind=kind: f"{p.memory.get(kind, 0) / GIB:.3f}")  # type: ignore[misc]
    _row(table, plans, "predicted peak", lambda p: f"{p.peak / GIB:.2f}")
    _row(table, plans, "the device has", lambda p: f"{p.device.memory / GIB:.1f}")
    _row(table, plans, "fits", lambda p: "yes" if p.fits else "no")
    _row(table, plans, "predicted largest batch a GPU", lambda p: f"{p.largest_batch:,}")
    return table


def _collectives(plans: Sequence[Plan]) -> Table:
    table = _table("collectives of a step: count × bytes a rank brings, in all", plans)
    found = [{_title(row): row for row in collectives.summed(p.trace.collectives)} for p in plans]
    for title in _keys(found):
        cells = [f"{rows[title]['count']} × {rows[title]['bytes']:,}" if title in rows else "" for rows in found]
        table.add_row(title, *cells)
    return table


def _title(row: dict[str, object]) -> str:
    return f"{row['label']}: {row['kind']}"


def _operations(plans: Sequence[Plan]) -> Table:
    table = _table("operations of a step and GPU: GFLOP, GB moved, kernels", plans)
    found = [{f"{row['part']} {row['pass']}".strip(): row for row in p.operations} for p in plans]
    for title in _keys(found):
        cells = [
            f"{row['flops'] / 1e9:,.1f}, {row['bytes'] / 1e9:,.3f}, {row['kernels']:,}" if row else ""
            for row in (rows.get(title) for rows in found)
        ]
        table.add_row(title, *cells)
    return table


def _time(plans: Sequence[Plan]) -> Table:
    table = _table("predicted time of a step, ms", plans)
    for name in (parts.BACKBONE, parts.MOMENTUM_BACKBONE):
        _row(table, plans, name, lambda p, name=name: _ms(p.times.of(name)))  # type: ignore[misc]
    for name in _keys(p.shares for p in plans):
        if name in ("outside the backbone", "added by self-supervision"):
            continue
        _row(table, plans, name, lambda p, name=name: _part(p, name))  # type: ignore[misc]
    _row(table, plans, "predicted step", lambda p: _ms(p.times.step))
    _row(table, plans, "of it, waiting for the host", lambda p: _ms(sum(p.times.idle.values())))
    _row(table, plans, "of it, waiting for the network", lambda p: _ms(sum(p.times.exposed.values())))
    _row(table, plans, "hidden communication", lambda p: _ms(p.times.hidden))
    _row(table, plans, "predicted share outside the backbone", lambda p: f"{p.shares['outside the backbone']:.1%}")
    _row(
        table,
        plans,
        "predicted share added by self-supervision",
        lambda p: f"{p.shares['added by self-supervision']:.1%}",
    )
    _row(table, plans, "predicted images/s", lambda p: f"{p.images_per_second:,.0f}")
    _row(table, plans, "steps", lambda p: f"{p.steps:,}")
    _row(table, plans, "predicted hours", lambda p: f"{p.hours:,.2f}")
    _row(table, plans, "predicted GPU-hours", lambda p: f"{p.hours * p.gpus:,.0f}")
    return table


def _part(plan: Plan, name: str) -> str:
    seconds = plan.times.of(name)
    return f"{_ms(seconds)} ({seconds / plan.times.step:.1%})" if seconds else ""


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.3f}"


def _table(title: str, plans: Sequence[Plan]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for plan in plans:
        table.add_column(f"{plan.gpus:,} GPU{'s' * (plan.gpus > 1)}", justify="right", no_wrap=True)
    return table


def _row(table: Table, plans: Sequence[Plan], title: str, cell: Cell) -> None:
    table.add_row(title, *map(cell, plans))


def _keys(dictionaries: Iterable[Mapping[str, object]]) -> list[str]:
    """The keys of all, in the order in which they come first."""
    return list(dict.fromkeys(key for dictionary in dictionaries for key in dictionary))
