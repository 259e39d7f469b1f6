"""The kernel report for people: Markdown made of nothing but the report's JSON."""

from benchmarks.roofline import MOCO, Row


def table(rows: list[Row]) -> list[str]:
    """A Markdown table of rows with the same keys."""
    lines = ["| " + " | ".join(map(str, row.values())) + " |" for row in rows]
    return ["| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0]), *lines, ""] if rows else []


def counted(counts: dict[str, int]) -> str:
    """A histogram in one cell."""
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "–"


def mega(count: float) -> str:
    """Megabytes."""
    return f"{count / 1e6:.2f}"


def moco_table(report: Row) -> list[str]:
    """The shape of MoCo on all chips."""
    rows = [row for row in report["shapes"] if row["shape"] == MOCO.title]
    return table(
        [
            {
                "chip": report["chips"][str(row["chip"])]["name"],
                **{f"{unit} µs": f"{time:.2f}" for unit, time in sorted(row["floors_us"].items())},
                "predicted µs": f"{row['predicted_us']:.2f}",
                "÷ floor": f"{row['ratio']:.2f}",
                "device MB": mega(row["device_bytes"]),
                "÷ once": f"{row['bytes_ratio']:.3f}",
                "partials MB": mega(row["partial_bytes"]),
            }
            for row in sorted(rows, key=lambda row: row["chip"])
        ]
    )


def shape_table(rows: list[Row]) -> list[str]:
    """The predictions of one chip."""
    return table(
        [
            {
                "shape": row["shape"],
                "floor µs": f"{row['floor_us']:.2f}",
                "set by": row["limit"],
                "predicted µs": f"{row['predicted_us']:.2f}",
                "÷ floor": f"{row['ratio']:.2f}",
                "of which": " + ".join(f"{r['kernel']} {r['predicted_us']:.2f}" for r in row["launches"]),
                "device MB": mega(row["device_bytes"]),
                "÷ once": f"{row['bytes_ratio']:.3f}",
                "partials MB": mega(row["partial_bytes"]),
            }
            for row in rows
        ]
    )


def launch_table(row: Row) -> list[str]:
    """The launches of a shape, unit by unit."""
    return table(
        [
            {
                "kernel": r["kernel"],
                "programs": r["programs"],
                "waves": r["waves"],
                "tiles each": r["tiles"],
                "GFLOP": f"{r['operations'] / 1e9:.2f}",
                "matrix": r["matrix_us"],
                "exponentials": r["exponential_us"],
                "device memory": r["device_us"],
                "cache*": r["cache_us"],
                "predicted": r["predicted_us"],
                "clocks a tile": r["tile_clocks"],
                "busy": ", ".join(f"{unit} {share:.0%}" for unit, share in r["busy"].items()),
            }
            for r in row["launches"]
        ]
    )


def chip_section(report: Row, chip: str) -> list[str]:
    """All shapes on one chip, and more of the first and of those that are not the queue."""
    rows = [row for row in report["shapes"] if str(row["chip"]) == chip]
    lines = [f"## {report['chips'][chip]['name']} (sm_{chip})", "", *shape_table(rows)]
    for row in rows:
        if row["shape"] == MOCO.title or not row["shape"].startswith("queue"):
            lines += [f"Launches of {row['shape']}, in µs at each ceiling and as predicted:", "", *launch_table(row)]
    return lines


def update_table(report: Row) -> list[str]:
    """The momentum updates on all chips."""
    return table(
        [
            {
                "update": row["update"],
                "chip": report["chips"][str(row["chip"])]["name"],
                "tensors": row["tensors"],
                "elements": f"{row['elements']:,}",
                "device MB": mega(row["bytes"]),
                "floor µs": f"{row['floor_us']:.2f}",
                "predicted µs": f"{row['predicted_us']:.2f}",
            }
            for row in sorted(report["updates"], key=lambda row: (row["update"], row["chip"]))
        ]
    )


def augmentation_table(report: Row) -> list[str]:
    """Batches of images on all chips."""
    return table(
        [
            {
                "view": f"{row['augmentation']}, N={row['count']}, {row['side']} pixels",
                "jittered, blurred": f"{row['jittered']:.0%}, {row['blurred']:.0%}",
                "chip": report["chips"][str(row["chip"])]["name"],
                "floor µs": f"{row['floor_us']:.1f}",
                "predicted µs": f"{row['predicted_us']:.1f}",
                "÷ floor": f"{row['ratio']:.2f}",
                "of which": " + ".join(
                    f"{r['kernel'].removeprefix('augment_')} {r['predicted_us']:.1f}" for r in row["launches"]
                ),
                "device MB": mega(row["device_bytes"]),
                "÷ once": f"{row['device_bytes'] / row['least_bytes']:.2f}",
            }
            for row in sorted(report["augmentations"], key=lambda row: (row["augmentation"], row["chip"]))
        ]
    )


def kernel_table(report: Row) -> list[str]:
    """What ptxas made."""
    return table(
        [
            {
                "kernel": row["name"],
                "sm": row["chip"],
                "registers": row["registers"],
                "stack": row["stack"],
                "spills": row["spills"],
                "shared KB": f"{row['shared'] / 1024:.0f}",
                "warps": row["warps"],
                "matrix instructions": counted(row["matrix"]),
                "main loop": counted(row["loop"]),
            }
            for row in report["kernels"]
        ]
    )


def ceiling_table(report: Row) -> list[str]:
    """The chips."""
    return table(
        [
            {
                "chip": c["name"],
                "multiprocessors": c["multiprocessors"],
                "GHz": f"{c['clock'] / 1e9:.2f}",
                "half TFLOP/s": f"{c['half'] / 1e12:g}",
                "tf32 TFLOP/s": f"{c['tf32'] / 1e12:g}",
                "TB/s": f"{c['bandwidth'] / 1e12:g}",
                "exponentials a clock": c["exponentials_a_clock"],
                "cache bytes a clock*": c["cache"],
                "latency of cache, memory*": ", ".join(map(str, c["latency"])),
                "mma.sync*": f"{c['mma_sync']:.0%}",
                "source": c["source"],
            }
            for _, c in sorted(report["chips"].items(), key=lambda item: int(item[0]))
        ]
    )


CEILINGS = """Exponentials: 16 results a clock and multiprocessor (CUDA C++ Programming Guide, throughput of native
arithmetic instructions). Columns with * are assumptions of the model, set in the range of published microbenchmarks
(arXiv:2402.13499, 2501.12084, 2507.10789; least is known of the B200); they do not enter the floor."""


def markdown(report: Row) -> str:
    """The report for people, made of nothing but the JSON."""
    compilers = ", ".join(f"{name} {version}" for name, version in sorted(report["versions"].items()))
    lines = ["# Kernels: predicted, not measured", ""]
    lines += [f"Compiled on {report['date']} without a GPU; {compilers}.", "", *report["notes"], ""]
    lines += [
        f"## Loss and gradients of MoCo: {MOCO.title}",
        "",
        "Time at each ceiling, the largest being the floor:",
        "",
    ]
    lines += moco_table(report)
    for chip in sorted(report["chips"], key=int):
        lines += chip_section(report, chip)
    lines += ["## Augmentation", ""]
    lines += ["From bytes to bfloat16; the floor is set by device memory: bytes read and the result written, once.", ""]
    lines += augmentation_table(report)
    lines += ["## Momentum updates", ""]
    lines += ["Float32 targets read and written, sources read; the floor is set by device memory.", ""]
    lines += update_table(report)
    lines += ["## Kernels as compiled", ""]
    lines += [report["missing"], ""] if report["missing"] else []
    lines += [
        "Counts of instructions are those of one warp and one turn of the main loop, nested loops counted once.",
        "",
    ]
    lines += kernel_table(report)
    lines += ["## Ceilings", "", *ceiling_table(report), CEILINGS]
    return "\n".join(lines) + "\n"
