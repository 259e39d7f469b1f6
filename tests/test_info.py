"""The report of ``python -m fastssl.info``."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from fastssl import __version__, _extension, info
from fastssl.ops import backend


@pytest.fixture(autouse=True)
def free_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTSSL_BACKEND", raising=False)


def rendered(report: dict[str, Any]) -> str:
    stream = io.StringIO()
    info.render(report, Console(file=stream, width=1000, markup=False))
    return stream.getvalue()


def test_names_the_backend_of_every_op() -> None:
    report = info.collect()
    assert list(report["ops"]) == backend.ops()
    for op, devices in report["ops"].items():
        for device, choices in devices.items():
            for dtype, choice in choices.items():
                assert choice == backend.choose(op, torch.device(device), getattr(torch, dtype))


def test_text_says_what_the_data_says() -> None:
    report = info.collect()
    lines = [line.split() for line in rendered(report).splitlines()]
    assert ["fastssl", __version__] in lines
    assert ["torch", torch.__version__] in lines
    assert ["FASTSSL_BACKEND", "not", "set"] in lines
    for op, devices in report["ops"].items():
        for device, choices in devices.items():
            rows = [line for line in lines if line[:2] == [op, device]]
            for dtype, choice in choices.items():
                assert any(row[-1] == choice and dtype in " ".join(row).replace(",", "").split() for row in rows)


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    info.main(["--json"])
    assert json.loads(capsys.readouterr().out) == info.collect()


def test_pipe_gets_one_line_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    info.main([])
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert all(op in text for op in backend.ops())


@pytest.mark.parametrize("name", ["cuda", "warp"])
def test_backend_that_cannot_run_is_told_in_its_row(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    implementation = backend.Implementation(abs, missing="this [machine] has none")
    monkeypatch.setattr(backend, "_implementations", {"op": {"cuda": implementation}})
    monkeypatch.setenv("FASTSSL_BACKEND", name)
    (row,) = (line for line in rendered(info.collect()).splitlines() if line.split()[:2] == ["op", "cpu"])
    assert "float32, bfloat16, float64" in row
    why = "cannot run: this [machine] has none" if name == "cuda" else "unknown backend 'warp'"
    assert "error: " in row and why in row


def test_extension_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "build_info", lambda: None)
    monkeypatch.setattr(_extension, "missing", lambda: "it was not built")
    assert info.collect()["extension"] == {"missing": "it was not built"}


@pytest.mark.parametrize(("folder", "expected"), [("optimizers", "NVIDIA's, without amp_C"), ("auth", "not NVIDIA's")])
def test_apex_is_told_by_what_it_contains(
    folder: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "apex" / folder).mkdir(parents=True)
    (tmp_path / "apex" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert info.collect()["versions"]["apex"].startswith(expected)
