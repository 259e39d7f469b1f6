"""Training on a GPU: the losses of the CPU, every precision, exact resumes, torch.compile, one process a GPU."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastssl.engine.checkpoint import load
from fastssl.engine.config import BYOLConfig, MoCoConfig
from fastssl.engine.optimizers import make_optimizer
from fastssl.engine.run_folder import read_metrics
from fastssl.engine.step import TrainingStep
from fastssl.methods import BYOL, MoCo
from fastssl.models import create_backbone

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GPUS = torch.cuda.device_count()
ON_GPU = [
    "moco", "--recipe=moco_cifar10", "--backbone=small_resnet16", "--batch_size=4", "--epochs=2", "--knn_k=3",
    "--log_steps=1", "--queue_size=12", "--augmentation=moco_v2_small", "--bn_splits=2", "--checkpoint_steps=2",
    "--keep_checkpoints=9",
]  # fmt: skip


def make(method: str) -> tuple[torch.nn.Module, Any]:
    torch.manual_seed(0)
    backbone = create_backbone("small_resnet16")
    if method == "moco":
        options: dict[str, Any] = {"precision": "float32", "weight_decay": 1e-4, "lr": 0.03}
        return MoCo(backbone, dim=32, queue_size=64, bn_splits=2), MoCoConfig(**options)
    return BYOL(backbone, hidden_dim=32, projection_dim=16, total_steps=9), BYOLConfig(precision="float32")


def losses_on(device: str, method: str) -> Tensor:
    made, config = make(method)
    target = torch.device(device)
    made = made.to(target, memory_format=torch.channels_last)  # type: ignore[call-overload]
    step = TrainingStep(config, made, make_optimizer(made, config), target, None)
    draw = torch.Generator().manual_seed(1)
    batches = [[torch.randn(16, 3, 32, 32, generator=draw) for _ in "qk"] for _ in range(4)]
    return torch.stack([step(views, 0.03).cpu() for views in batches])


@pytest.mark.parametrize("method", ["moco", "byol"])
def test_the_losses_are_those_of_the_cpu(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    cpu, gpu = losses_on("cpu", method), losses_on("cuda", method)
    assert (cpu[0] - gpu[0]).abs() < 1e-4 * cpu[0].abs()
    assert (cpu - gpu).abs().max() < 2e-2 * cpu.abs().max()  # steps let rounding grow
    assert cpu.std() > 0


def train(data: Path, output: Path, *options: str) -> str:
    """Run the command line in a process of its own, and return what it printed."""
    command = [sys.executable, "-m", "fastssl.train", *ON_GPU, f"--data={data}", f"--output={output}", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def losses(output: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(output / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_every_precision_trains(precision: str, image_folder: Path, tmp_path: Path) -> None:
    train(image_folder, tmp_path / "run", "--gpus=1", f"--precision={precision}")
    found = losses(tmp_path / "run")
    assert len(found) == 6 and all(0 < loss < 20 for loss in found)


@pytest.mark.parametrize("option", ["--compile=true", "--checkpoint_activations=true"])
def test_options_that_change_how_it_is_computed(option: str, image_folder: Path, tmp_path: Path) -> None:
    fixed = ["--gpus=1", "--precision=float32", "--knn_epochs=0", "--epochs=1"]
    train(image_folder, tmp_path / "plain", *fixed)
    train(image_folder, tmp_path / "other", *fixed, option)
    plain, other = torch.tensor(losses(tmp_path / "plain")), torch.tensor(losses(tmp_path / "other"))
    assert (plain - other).abs().max() < 2e-2 * plain.abs().max()


def test_a_resumed_run_equals_an_uninterrupted_one(image_folder: Path, tmp_path: Path) -> None:
    fixed = ["--gpus=1", "--deterministic=true", "--knn_epochs=0"]
    train(image_folder, tmp_path / "whole", *fixed)
    train(image_folder, tmp_path / "broken", *fixed)
    for path in (tmp_path / "broken" / "checkpoints").iterdir():
        if int(path.stem.split("-")[1]) > 2:
            path.unlink()
    train(image_folder, tmp_path / "broken", *fixed, "--resume=auto")
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    one, other = (load(max((tmp_path / name / "checkpoints").iterdir()))["model"] for name in ("whole", "broken"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.skipif(GPUS < 2, reason="needs two CUDA devices")
def test_one_process_a_gpu(image_folder: Path, tmp_path: Path) -> None:
    said = train(image_folder, tmp_path / "run", "--gpus=2", "--queue_check_steps=1", "--bn_splits=2")
    assert "2 processes, each on a cuda" in said
    assert len(losses(tmp_path / "run")) == 6
