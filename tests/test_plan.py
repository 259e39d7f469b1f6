"""The command line of fastssl.plan: what it prints and writes, and what it says of wrong options."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastssl import cli, plan

TINY = ["moco", "--backbone=small_resnet16", "--queue_size=128", "--augmentation=moco_v2_small", "--bn_splits=1"]


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        cli.run(plan.main, arguments)
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1
    return printed.err


def test_several_numbers_of_gpus_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    options = ["--gpus=1,8,1024", "--batch_per_gpu=8", "--device=a100", "--images=100000", "--epochs=2"]
    assert plan.main([*TINY, *options, f"--json={file}", f"--plot={picture}"]) == 0
    text = capsys.readouterr().out
    for words in ("1 GPU ", "8 GPUs", "1,024 GPUs", "predicted peak", "predicted GPU-hours", "keys: all-gather"):
        assert words in text
    plans = json.loads(file.read_text())
    assert [p["gpus"] for p in plans] == [1, 8, 1024]
    for one in plans:
        assert one["device"] == "A100 SXM 80 GB" and one["batch_per_gpu"] == 8
        assert one["steps"] == 2 * (100_000 // one["batch"])
        assert one["predicted_peak_bytes"] == pytest.approx(sum(one["predicted_memory_bytes"].values()))
        assert one["predicted_fits"] and one["predicted_largest_batch_per_gpu"] > 8
        assert one["predicted_hours"] == pytest.approx(one["steps"] * one["predicted_step_seconds"] / 3600)
        assert (
            0
            < one["predicted_shares"]["added by self-supervision"]
            < one["predicted_shares"]["outside the backbone"]
            < 1
        )
    assert not plans[0]["collectives"]
    header = next(row for row in plans[2]["collectives"] if row["label"] == "shuffle header")
    assert header == {"label": "shuffle header", "kind": "all-gather", "world": 1024, "count": 1, "bytes": 16}
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_what_does_not_fit_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main([*TINY, "--gpus=1", "--batch_size=400000", "--device=rtx4090"]) == 0
    assert "400000 images a GPU do not fit on GeForce RTX 4090: predicted" in capsys.readouterr().out


def test_byol_and_its_batch_norm(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--backbone=small_resnet16", "--augmentation=byol_small", "--hidden_dim=64", "--batch_size=64"]
    assert plan.main(["byol", "--gpus=8", *options]) == 0
    text = capsys.readouterr().out
    assert "byol_in1k_300ep: 1,281,167 images" in text and "sync batch norm: all-gather" in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--device=h10"], "unknown device 'h10': did you mean h100"),
        (["--gpus=0"], "gpus must be a whole number above 0, got '0'"),
        (["--gpus=8,x"], "gpus must be a whole number above 0, got 'x'; several are separated by commas"),
        (
            ["--gpus=8", "--batch_size=100", "--bn_splits=1"],
            "batch_size 100 cannot be divided among 8 GPUs: use --batch_size 96",
        ),
        (["--gpus=1024"], "batch_size 256 cannot be divided among 1024 GPUs: use --batch_size 1024"),
        (["--images=many"], "images must be a whole number above 0, got 'many'"),
        (["--images=5", "--gpus=1"], "images 5 is less than one batch of 256"),
        (["--gpus"], "--gpus: expected one argument"),
        (["--tempreature=1"], "unknown option or key --tempreature=1: did you mean --temperature?"),
        (["--recipe=moco_v3"], "unknown recipe 'moco_v3'"),
        (["--gpus=8", "--accumulate=5"], "accumulate 5"),
    ],
)
def test_wrong_options(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in failure(capsys, "moco", *options)


def test_a_wrong_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert "moco" in failure(capsys, "moca")


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["--help"]) == 0
    assert "--batch_per_gpu" in capsys.readouterr().out


@pytest.mark.slow
def test_the_default_takes_less_than_a_minute() -> None:
    """In seconds of the processor, since others may be using it."""
    code = (
        "import time; from fastssl import plan; plan.main(['moco', '--gpus', '64']); "
        "print('seconds', time.process_time())"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    seconds = float(done.stdout.split()[-1])
    print(f"{seconds:.1f} s of the processor, {time.perf_counter() - start:.1f} s on the clock")
    assert seconds < 60
    assert "predicted" in done.stdout and "64 × H100 SXM" in done.stdout
