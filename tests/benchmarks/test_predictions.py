"""Predicted times are joined with measured ones, and nothing that has no partner is dropped."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from benchmarks import predictions
from benchmarks.predictions import GRAPH, PLAIN

REPORT = predictions.read(predictions.REPORT)
QUEUE = {"N": 256, "D": 128, "K": 65536, "dtype": "bfloat16"}


def entry(op: str, case: dict[str, Any], micro: float, side: str = PLAIN, device: str = "cuda") -> dict[str, Any]:
    return {
        "name": "test",
        "stats": {"median": micro * 1e-6},
        "extra_info": {"op": op, "case": case, "device": device, "side": side},
    }


def bench(
    *entries: dict[str, Any], capability: str | None = "9.0", gpu: str = "NVIDIA H100 80GB HBM3"
) -> dict[str, Any]:
    machine = {"gpu": gpu, "device": gpu, "capability": capability, "quick": False}
    return {"machine_info": {"fastssl": machine}, "datetime": "2026-12-01T10:00:00", "benchmarks": list(entries)}


def of_report(kind: str, name: str, title: str, chip: int = 90) -> dict[str, Any]:
    return next(row for row in REPORT[kind] if row[name] == title and row["chip"] == chip)


def line(text: str, start: str) -> list[str]:
    """The cells of the table's row that begins so."""
    return next(
        [cell.strip() for cell in row.strip("|").split("|")]
        for row in text.splitlines()
        if row.startswith(f"| {start} |")
    )


def test_a_shape_is_joined_with_its_prediction() -> None:
    text = predictions.compare(bench(entry("info_nce", QUEUE, 90.0), entry("info_nce", QUEUE, 30.0, GRAPH)), REPORT)
    row = of_report("shapes", "shape", "queue N=256 D=128 K=65,536 bf16")
    assert line(text, row["shape"]) == [
        row["shape"],
        "90.00",
        "30.00",
        f"{row['predicted_us']:.2f}",
        f"{30 / row['predicted_us']:.2f}",
        f"{row['floor_us']:.2f}",
        f"{30 / row['floor_us']:.2f}",
    ]
    assert "Measured on NVIDIA H100 80GB HBM3, 2026-12-01" in text and "another product" not in text


def test_without_a_graph_the_plain_call_is_compared_and_marked() -> None:
    text = predictions.compare(bench(entry("info_nce", QUEUE, 90.0)), REPORT)
    predicted = of_report("shapes", "shape", "queue N=256 D=128 K=65,536 bf16")["predicted_us"]
    cells = line(text, "queue N=256 D=128 K=65,536 bf16")
    assert cells[2] == "–" and cells[4] == f"{90 / predicted:.2f}¹"


@pytest.mark.parametrize(
    ("op", "case", "titles"),
    [
        (
            "info_nce in-batch",
            {"N": 4096, "D": 128, "dtype": "bfloat16"},
            ["in-batch N=4,096 D=128 bf16", "in-batch negatives N=4,096 D=128 bf16"],
        ),
        ("KeyQueue", {"N": 256, "D": 128, "K": 65536, "dtype": "float32"}, ["enqueue N=256 D=128 K=65,536 fp32"]),
        ("KeyQueue", {"rows": 256, "D": 128, "K": 65536, "dtype": "bfloat16"}, ["enqueue N=256 D=128 K=65,536 bf16"]),
        ("ema_update_", {"tensors": "ResNet-50", "sources": "bfloat16"}, ["ResNet-50, bfloat16 sources"]),
        ("ema_update_", {"parameters": "ResNet-50"}, ["ResNet-50, float32 sources"]),
        ("augment_", {"N": 256, "side": 224, "dtype": "bfloat16"}, ["MoCo v2"]),
        ("augment_", {"augmentation": "BYOL, second view"}, ["BYOL, second view"]),
    ],
)
def test_every_kind_finds_its_partner(op: str, case: dict[str, Any], titles: list[str]) -> None:
    kinds = (("shapes", "shape"), ("updates", "update"), ("augmentations", "augmentation"))
    rows = [row for kind, name in kinds for row in REPORT[kind] if row[name] in titles and row["chip"] == 90]
    assert len(rows) == len(titles)
    text = predictions.compare(bench(entry(op, case, 50.0, GRAPH)), REPORT)
    assert line(text, titles[0])[3] == f"{sum(row['predicted_us'] for row in rows):,.2f}"
    assert "Measured, not predicted" not in text


def test_shapes_without_a_partner_are_listed() -> None:
    odd = {**QUEUE, "dtype": "float32"}
    text = predictions.compare(
        bench(entry("info_nce", QUEUE, 30.0), entry("info_nce", odd, 70.0), entry("augment_", {"images": 64}, 5.0)),
        REPORT,
    )
    without = text[text.index("Measured, not predicted") : text.index("Predicted, not measured")]
    assert "- queue N=256 D=128 K=65,536 fp32: 70.00, –" in without and "- augment_, images=64: 5.00, –" in without
    missing = text[text.index("Predicted, not measured") :]
    count = sum(row["chip"] == 90 for kind in ("shapes", "updates", "augmentations") for row in REPORT[kind])
    assert missing.count("\n- ") == count - 2  # the one that was measured, and in-batch's two rows are one


def test_other_sides_and_devices_do_not_count() -> None:
    text = predictions.compare(
        bench(
            entry("info_nce", QUEUE, 30.0),
            entry("info_nce", QUEUE, 1.0, "authors, eager"),
            entry("info_nce", QUEUE, 2.0, device="cpu"),
        ),
        REPORT,
    )
    assert line(text, "queue N=256 D=128 K=65,536 bf16")[1:3] == ["30.00", "–"]


def test_the_median_is_of_all_shapes() -> None:
    ks = (16384, 65536, 262144)
    text = predictions.compare(
        bench(*(entry("info_nce", {**QUEUE, "K": k}, 40.0 + number, GRAPH) for number, k in enumerate(ks))), REPORT
    )
    ratios = [
        (40.0 + number) / of_report("shapes", "shape", f"queue N=256 D=128 K={k:,} bf16")["predicted_us"]
        for number, k in enumerate(ks)
    ]
    assert f"CUDA graphs: **{statistics.median(ratios):.2f}** of 3" in text.splitlines()[-1]


@pytest.mark.parametrize(
    ("capability", "said"), [("8.9", "compute capability 8.9.*A100"), (None, "is None.*such as '9.0'")]
)
def test_an_unknown_chip_is_named(capability: str | None, said: str) -> None:
    with pytest.raises(predictions.PredictionsError, match=said):
        predictions.compare(bench(entry("info_nce", QUEUE, 30.0), capability=capability), REPORT)


def test_another_product_of_the_architecture_is_told() -> None:
    text = predictions.compare(bench(entry("info_nce", QUEUE, 30.0), gpu="NVIDIA H200"), REPORT)
    assert "NVIDIA H200 is another product than H100 SXM" in text


def test_nothing_on_cuda_is_an_error() -> None:
    with pytest.raises(predictions.PredictionsError, match="none of the 1 benchmarks"):
        predictions.compare(bench(entry("info_nce", QUEUE, 30.0, device="cpu")), REPORT)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "bench.json", tmp_path / "new" / "predictions.md"
    file.write_text(json.dumps(bench(entry("info_nce", QUEUE, 30.0))))
    assert predictions.main([str(file), "--output", str(out)]) == 0
    assert out.read_text() == capsys.readouterr().out
    assert predictions.main([str(tmp_path / "missing.json")]) == 2
    assert "missing.json cannot be read" in capsys.readouterr().err
    file.write_text("{")
    assert predictions.main([str(file)]) == 2
    assert "is not JSON" in capsys.readouterr().err


def test_the_suite_measures_what_is_predicted() -> None:
    """At MoCo's shape, for every op: the axes are those of the benchmarks as they stand."""
    from benchmarks import test_augment, test_ema, test_info_nce, test_queue

    queue, in_batch = (make("cuda") for make in (test_info_nce.queue_cases, test_info_nce.in_batch_cases))
    cases = [*queue, *in_batch, *test_queue.CASES, *test_ema.CASES, *test_augment.CUDA]
    found = {predictions.TITLES[case.op](dict(case.axes)) for case in cases if case.device == "cuda"}
    assert {
        "queue N=256 D=128 K=65,536 bf16",
        "in-batch N=4,096 D=128 bf16",
        "enqueue N=256 D=128 K=65,536 fp32",
        "ResNet-50, float32 sources",
        "ResNet-50, bfloat16 sources",
        "MoCo v2",
    } <= found & set(predictions.predictions(REPORT, "90"))
