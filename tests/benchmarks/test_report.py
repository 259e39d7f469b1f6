"""The report says what the results say, losses first, puts it where the markers are, and is stable."""

import json
import re
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest

from benchmarks import pages, plots, report
from benchmarks.results import Run
from tests.benchmarks.made_up import QUEUE, entry, run_of, skipped, write

NAME, SLUG = "made_up.json", "made-up-cpu-2-threads"
SIZES = (256, 1024, 4096)
README, PAGE = (
    f"# Title\n\nBefore.\n\n{report.START.format(name=SLUG)}\nold\n{report.END}\n\nAfter {title}.\n"
    for title in ("the table", "everything")
)


def entries() -> list[dict[str, Any]]:
    """A file with something for every section and every plot: two losses among them."""
    found = []
    for n in SIZES:
        case = {**QUEUE, "N": n}
        work: dict[str, Any] = {"flops": 4e9, "bytes": 1e8}
        found += [
            entry("fastssl", 1e-3 * n, case=case, peak_bytes=1000 * n, **work),
            entry("authors, eager", 4e-3 * n, case=case, peak_bytes=100_000 * n, differs="keeps all logits", **work),
            entry("two products alone", 0.5e-3 * n, case=case, role="bound", **work),
        ]
    found += [
        entry("fastssl", 2.0, op="ema_update_", case={"tensors": "one"}),
        entry("torch._foreach_lerp_", 1.0, op="ema_update_", case={"tensors": "one"}, differs="rounds | once"),
        entry("fastssl", 5.0, op="loader", case={"images": "few"}, items=100, unit="images", iqr=1.0),
        entry("DALI alone", 4.0, op="loader", case={"images": "few"}, items=100, unit="images"),
        entry("product", 0.01, op="machine", case={"what": "matmul", "dtype": "float32"}, role="bound", flops=1e9),
        entry("triad", 0.01, op="machine", case={"what": "triad"}, role="bound", bytes=3e8),
    ]
    return found


SKIPS = [
    skipped("lightly", "not\ninstalled"),
    skipped("lightly", "not\ninstalled", case={"N": 1}),
    skipped("x", "no GPU"),
]


def body(run: Run) -> str:
    return "\n".join(pages.body(run, NAME, plots.plots(run, "made_up"), lambda name: f"plots/{name}", 2))


def section(text: str, title: str) -> str:
    return re.split(r"^#+ ", text.split(f"# {title}\n")[1], flags=re.MULTILINE)[0]


def cells(text: str) -> list[list[str]]:
    """Rows of a table, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def test_losses_stand_first_and_the_worst_is_the_first_of_them(tmp_path: Path) -> None:
    text = body(run_of(tmp_path, *entries()))
    titles = re.findall(r"^### (.*)", text, re.MULTILINE)
    assert titles == [
        "Where a peer is faster", "The bars", "All comparisons", "How it grows", "Skipped", "How it was measured",
    ]  # fmt: skip
    lost = section(text, titles[0])
    assert "In 2 of 5 comparisons, the worst first." in lost
    assert [(row[0], row[6]) for row in cells(lost)] == [("ema_update\\_", "0.500"), ("loader", "0.800")]
    assert cells(lost)[0][3:6] == ["2.00 s ± 1.0%", "torch.\\_foreach_lerp\\_ [1]", "1.00 s ± 1.0%"]
    assert "[1] rounds | once" in lost


def test_no_losses_are_said(tmp_path: Path) -> None:
    lost = section(body(run_of(tmp_path, entry("fastssl", 1.0), entry("peer", 1.0))), "Where a peer is faster")
    assert "Nowhere: fastssl is as fast as the fastest peer, or faster, in all 1 comparisons." in lost
    assert not cells(lost)


def test_all_sides_of_an_op(tmp_path: Path) -> None:
    text = body(run_of(tmp_path, *entries()))
    first = cells(section(text, "info_nce"))
    assert first[:3] == [
        ["N=256, D=128, K=65,536, float32", "two products alone (bound)", "128 ms", "1.0%", "0.500", "–"],
        ["N=256, D=128, K=65,536, float32", "fastssl", "256 ms", "1.0%", "1.00", "256 kB"],
        ["N=256, D=128, K=65,536, float32", "authors, eager [1]", "1.02 s", "1.0%", "4.00", "25.6 MB"],
    ]
    assert section(text, "info_nce").count("[1] keeps all logits") == 1
    loader = section(text, "loader")
    assert "images/s" in loader and cells(loader)[1] == ["few", "fastssl", "5.00 s", "10.0%", "1.00", "–", "20.0"]


def test_bars_growth_and_skips(tmp_path: Path) -> None:
    text = body(run_of(tmp_path, *entries(), skips=SKIPS))
    bars = section(text, "The bars")
    assert "2 kept, 1 not kept, 16 not measured." in bars
    faster, compiled, products, memory = cells(bars)[:4]
    assert faster[3:] == ["time, authors, eager ÷ fastssl", "≥ 3.5", "4.00", "yes"]
    assert compiled[5:] == ["–", "not measured: torch.compile, N=256, D=128, K=65,536, float32 not run"]
    assert products[4:] == ["≥ 1", "0.500", "**no**"]
    assert memory[3:] == ["peak memory, fastssl ÷ authors, eager", "≤ 0.05", "0.0100", "yes"]
    grows = cells(section(text, "How it grows"))
    assert grows[0] == [
        "info_nce", "N", "D=128, K=65,536, float32", "fastssl", "time", "256 to 4,096, 3 points", "1.00", "1",
    ]  # fmt: skip
    skips = [line for line in section(text, "Skipped").splitlines() if line]
    assert skips == ["- not installed, 2: info_nce (lightly × 2)", "- no GPU, 1: info_nce (x × 1)"]


def test_an_exponent_that_is_off_is_bold(tmp_path: Path) -> None:
    rows = [entry("fastssl", 1e-6 * n**1.3, case={**QUEUE, "N": n}) for n in SIZES]
    assert cells(section(body(run_of(tmp_path, *rows)), "How it grows"))[0][6:] == ["**1.30**", "1"]


def test_how_it_was_measured(tmp_path: Path) -> None:
    text = section(body(run_of(tmp_path, *entries(), quick=True)), "How it was measured")
    where = "2026-11-22, from `made_up.json` at commit 0123456789ab and changes not committed then"
    assert f"- Measured on Made-up CPU, 2 threads, {where}\n" in text
    assert "- CPU Made-up CPU, 2 threads, load 0.25 when the run began" in text
    assert (
        "- What the machine itself does (cpu): 100 Gop/s in matrix products of float32, 30.0 GB/s in the triad" in text
    )
    assert "- fastssl 0.1, torch 2.14.1" in text
    assert "A quick run" in body(run_of(tmp_path, *entries(), quick=True))
    assert "A quick run" not in body(run_of(tmp_path, *entries()))


def test_devices_are_told_apart_where_there_are_two(tmp_path: Path) -> None:
    run = run_of(tmp_path, *entries(), entry("fastssl", 3.0, device="cuda"), entry("peer", 2.0, device="cuda"))
    assert [row[2] for row in cells(section(body(run), "Where a peer is faster"))] == ["cpu", "cuda", "cpu"]


def test_bars_of_another_device(tmp_path: Path) -> None:
    bars = section(body(run_of(tmp_path, entry("fastssl", 3.0, device="cuda"))), "The bars")
    assert bars.strip() == "The bars are for other devices than those of this run."


def test_the_readme_hides_no_loss(tmp_path: Path) -> None:
    many = [
        entry(side, time, case={**QUEUE, "D": d})
        for d in range(1, 40)
        for side, time in (("fastssl", 1.0), ("peer", 2.0))
    ]
    run = run_of(tmp_path, *many, *entries(), entry("fastssl", 3.0, op="new"), entry("peer", 1.0, op="new"))
    chosen = pages.headlines(run)
    assert {"ema_update_", "loader", "new"} < {c.op for c in chosen}
    assert [said for c in chosen if c.op == "info_nce" for said in [c.case["N"], c.case["D"]]] == [256, 1, 256, 128]
    lines = pages.readme_block(run, "made_up.json", "docs/page.md", "make it")
    assert len(cells("\n".join(lines))) == len(chosen)
    assert "Measured on Made-up CPU, 2 threads, 2026-11-22, with `make it` ([results](made_up.json)" in lines[-2]
    assert "a peer is faster in 3 of 45 comparisons." in lines[-2]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """The command line for a README, a page and results in folders of their own."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "results").mkdir()
    write(tmp_path / "results" / NAME, *entries(), skips=SKIPS)
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "docs" / "page.md").write_text(PAGE)
    at = [str(tmp_path / name) for name in ("results/made_up.json", "README.md", "docs/page.md", "plots")]
    return [at[0], "--readme", at[1], "--page", at[2], "--plots", at[3]]


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.*")) if path.is_file()}


def test_files_plots_and_check(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = everything(tmp_path)
    assert report.main([*files, "--check"]) == 1
    assert everything(tmp_path) == before
    assert "README.md" in capsys.readouterr().err

    assert report.main(files) == 0
    first = everything(tmp_path)
    assert set(first) - set(before) == {
        "results/made_up.md", "plots/made_up-ratios.svg", "plots/made_up-growth-info_nce-N.svg",
        "plots/made_up-roofline-cpu.svg",
    }  # fmt: skip
    for name in set(first) - set(before) - {"results/made_up.md"}:
        text = first[name].decode()
        assert len(text) < 100_000 and "<dc:date>" not in text
        xml.etree.ElementTree.fromstring(text)
    ratios = first["plots/made_up-ratios.svg"].decode()
    assert ratios.count(plots.LOST) == 2 and ratios.count(plots.WON) == 3

    assert report.main(files) == 0
    assert everything(tmp_path) == first  # the same bytes, plots too
    assert report.main([*files, "--check"]) == 0

    for document in ("README.md", "docs/page.md", "results/made_up.md"):
        for link in re.findall(r"\]\(([^)]*)\)", first[document].decode()):
            assert ((tmp_path / document).parent / link).is_file(), link
    readme, page = first["README.md"].decode(), first["docs/page.md"].decode()
    for text, end in ((readme, "the table"), (page, "everything")):
        assert text.startswith("# Title\n\nBefore.\n\n") and text.endswith(f"\n\nAfter {end}.\n")
        assert "\nold\n" not in text and "Measured on Made-up CPU, 2 threads, 2026-11-22" in text
    assert "![Time of the fastest peer divided by ours](../plots/made_up-ratios.svg)" in page
    assert "(../plots/" in first["results/made_up.md"].decode()

    (tmp_path / "plots" / "made_up-ratios.svg").unlink()
    assert report.main([*files, "--check"]) == 1
    assert "made_up-ratios.svg" in capsys.readouterr().err


@pytest.mark.parametrize("document", ["README.md", "docs/page.md", "results/made_up.md"])
def test_check_sees_what_changed_by_hand(
    files: list[str], tmp_path: Path, document: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "plots", lambda run, stem: {})  # they take the time
    assert report.main(files) == 0
    assert report.main([*files, "--check"]) == 0
    path = tmp_path / document
    path.write_text(path.read_text().replace("fastssl", "slowssl", 5))
    assert report.main([*files, "--check"]) == 1


def test_no_file_is_written_where_one_has_no_place(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs" / "page.md").write_text("# Title\n")
    before = everything(tmp_path)
    assert report.main(files) == 2
    error = capsys.readouterr().err
    assert "page.md has no block for made-up-cpu-2-threads" in error
    assert f"{report.START.format(name=SLUG)}\n{report.END}" in error
    assert everything(tmp_path) == before


START, OTHER = report.START.format(name=SLUG), report.START.format(name="other")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{OTHER}\n{report.END}\n", "has no block for made-up-cpu-2-threads"),
        (f"{START}\n", "has no block for made-up-cpu-2-threads"),
        (f"{report.END}\n{START}\n", "has no block for made-up-cpu-2-threads"),
        (f"{START}\n{OTHER}\n{report.END}\n", "has no block for made-up-cpu-2-threads"),
        (f"{START}\n{report.END}\n{START}\n{report.END}\n", "more than once"),
    ],
)
def test_markers_that_are_not_there_once(text: str, message: str) -> None:
    with pytest.raises(report.BlockError, match=f"page.md has .*{message}|{message}"):
        report.replaced(text, Path("page.md"), SLUG, "new")


def test_blocks_of_other_machines_stay() -> None:
    text = f"a\n{OTHER}\n1\n{report.END}\nb\n{START}\n2\n{report.END}\nc\n"
    assert report.replaced(text, Path("page.md"), SLUG, "new") == f"a\n{OTHER}\n1\n{report.END}\nb\nnew\nc\n"


def test_what_is_no_result_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / NAME).write_text(json.dumps({}))
    assert report.main([str(tmp_path / NAME)]) == 2
    assert "has no 'benchmarks'" in capsys.readouterr().err
    assert not (tmp_path / "made_up.md").exists()


def test_an_empty_run_has_a_report(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    assert plots.plots(run, "x") == {}
    assert "No axis was measured at three sizes" in body(run)


def test_nothing_in_a_cell_breaks_the_table() -> None:
    assert (
        pages.table([{"a": "x | y\nz", "b": "ema_update_ <built-in>"}])[2]
        == r"| x \| y z | ema_update\_ &lt;built-in> |"
    )
