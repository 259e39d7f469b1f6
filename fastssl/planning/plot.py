"""Plans as a picture: memory by part beside the device's, and speed beside what every GPU by itself would give."""

from collections.abc import Sequence
from pathlib import Path

from fastssl.errors import FastsslError
from fastssl.planning.devices import GIB
from fastssl.planning.plan import Plan


def plot(plans: Sequence[Plan], path: Path) -> None:
    """Draw and save; the suffix of `path` says in which format.

    Raises:
        FastsslError: the suffix is none that matplotlib writes.
    """
    from matplotlib.figure import Figure  # half a second, and without a display

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    known = figure.canvas.get_supported_filetypes()
    if path.suffix.lstrip(".") not in known:
        raise FastsslError(f"plot '{path}': give a name that ends in .{', .'.join(sorted(known))}")
    memory, speed = figure.subplots(1, 2)
    _memory(memory, plans)
    _speed(speed, plans)
    first = plans[0]
    figure.suptitle(f"{first.name} on {first.device.title}: predicted, not measured")
    figure.savefig(path)


def _memory(axes, plans: Sequence[Plan]) -> None:  # type: ignore[no-untyped-def]
    places, bottom = range(len(plans)), [0.0] * len(plans)
    for number, kind in enumerate(dict.fromkeys(kind for plan in plans for kind in plan.memory)):
        heights = [plan.memory.get(kind, 0) / GIB for plan in plans]
        axes.bar(places, heights, 0.5, bottom=bottom, label=kind, color=f"C{number}", hatch="//" * (number // 10))
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    device = plans[0].device.memory / GIB
    if max(bottom) > device / 4:  # otherwise there would be nothing else to see
        axes.axhline(device, color="black", linestyle="--")
    axes.set_xticks(list(places), [f"{plan.gpus:,}" for plan in plans])
    axes.set(xlabel="GPUs", ylabel="predicted GiB a GPU", title=f"memory: the device has {device:.1f} GiB")
    axes.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5))


def _speed(axes, plans: Sequence[Plan]) -> None:  # type: ignore[no-untyped-def]
    gpus = [plan.gpus for plan in plans]
    axes.plot(gpus, [plan.images_per_second for plan in plans], marker="o", label="predicted")
    busy = [plan.images_per_second * plan.times.step / sum(plan.times.busy.values()) for plan in plans]
    axes.plot(gpus, busy, linestyle=":", marker=".", label="without waiting for host and network")
    for plan in plans:
        text = f"{plan.images_per_second:,.0f}, {plan.hours:,.1f} h"
        axes.annotate(text, (plan.gpus, plan.images_per_second), (4, -10), textcoords="offset points", fontsize="small")
    axes.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="predicted images/s", title="speed")
    axes.margins(x=0.25, y=0.2)
    axes.minorticks_off()
    axes.set_xticks(gpus, [f"{n:,}" for n in gpus])
    axes.legend(fontsize="small")
