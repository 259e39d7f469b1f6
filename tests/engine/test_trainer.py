"""Whole trainings on a handful of images: what is written, and what a stop or a crash leaves behind."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from fastssl import evaluate, train
from fastssl.engine.alarms import Alarm, Alarms
from fastssl.engine.checkpoint import load
from fastssl.engine.run_folder import read_metrics
from fastssl.engine.step import TrainingStep
from fastssl.engine.team import Team
from fastssl.engine.trainer import Trainer
from fastssl.errors import FastsslError
from fastssl.methods import MoCo as MoCoMethod

SMALL = (
    "--backbone small_resnet16 --batch_size 4 --epochs 3 --knn_k 3 --log_steps 1 --precision float32 --gpus 0".split()
)
MOCO = [*SMALL, "--queue_size", "10", "--augmentation", "moco_v2_small"]
BYOL = [*SMALL, "--hidden_dim", "16", "--projection_dim", "8", "--augmentation", "byol_small", "--warmup_epochs", "0"]


def run(method: str, data: Path, output: Path, *options: str) -> int:
    base = {"moco": MOCO, "byol": BYOL}[method]
    recipe = {"moco": "moco_cifar10", "byol": "byol_cifar10"}[method]
    splits = ["--bn_splits", "2"] if method == "moco" else []
    arguments = [method, "--recipe", recipe, *base, *splits, "--data", str(data), "--output", str(output), *options]
    return Trainer(*train.parse(arguments)).fit()


def weights(output: Path) -> dict[str, Any]:
    return load(sorted((output / "checkpoints").glob("*.pt"))[-1])  # a killed process may leave a .tmp


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(equal(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def losses(output: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_metrics(output / "metrics.jsonl") if "loss" in row]


@pytest.mark.parametrize("method", ["moco", "byol"])
def test_a_run_folder_describes_itself(method: str, image_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert run(method, image_folder, output) == 0
    rows = read_metrics(output / "metrics.jsonl")
    assert [step for step, _ in losses(output)] == list(range(1, 10))
    assert [row["step"] for row in rows if "knn" in row] == [0, 3, 6, 9]
    assert {"loss", "lr", "momentum", "images_per_second", "epoch"} <= rows[1].keys()
    assert [p.name for p in sorted((output / "checkpoints").iterdir())] == ["step-000000006.pt", "step-000000009.pt"]
    assert "data: " in (output / "config.yaml").read_text()
    assert "9 steps" in (output / "log.txt").read_text()
    assert any((output / "tensorboard").iterdir())
    report = (output / "report.html").read_text()
    for part in ("random initialisation", "raw pixels", "<svg", "data:image/png;base64", "Nearest neighbours"):
        assert part in report
    assert "http" not in report.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", "")  # nothing is fetched


@pytest.mark.parametrize("method", ["moco", "byol"])
def test_a_resumed_run_equals_an_uninterrupted_one(method: str, image_folder: Path, tmp_path: Path) -> None:
    """Stopped in mid-epoch, at a step with a checkpoint; what was logged after it is dropped and written anew."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(method, image_folder, whole, "--checkpoint_steps", "2", "--keep_checkpoints", "9")
    shutil.copytree(whole, broken)
    for path in sorted((broken / "checkpoints").iterdir()):
        if int(path.stem.split("-")[1]) > 4:
            path.unlink()
    with open(broken / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "lo')  # the line that a crash cut short
    run(method, image_folder, broken, "--resume", "auto", "--checkpoint_steps", "2", "--keep_checkpoints", "9")
    assert losses(broken) == losses(whole)
    one, other = weights(whole), weights(broken)
    for part in ("model", "optimizer", "training_step", "step", "processes"):
        assert equal(one[part], other[part]), part


def test_ctrl_c_saves_and_resume_goes_on(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, calls = tmp_path / "run", []
    step = TrainingStep.__call__

    def interrupted(self: TrainingStep, views: list[Tensor], rate: float) -> Tensor:
        calls.append(rate)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, views, rate)

    monkeypatch.setattr(TrainingStep, "__call__", interrupted)
    assert run("moco", image_folder, output) == 130
    reached = weights(output)["step"]
    assert 5 <= reached <= 6  # that the processes agree takes a step
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert run("moco", image_folder, output, "--resume", "auto") == 0
    assert len(calls) == 9
    assert [s for s, _ in losses(output)] == list(range(1, 10))


@pytest.mark.slow  # starts the command twice
def test_kill_9_in_mid_epoch_and_resume(image_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    options = ["--data", str(image_folder), "--output", str(output), "--resume", "auto", "--checkpoint_steps", "1"]
    command = [sys.executable, "-m", "fastssl.train", "moco", "--recipe", "moco_cifar10", *MOCO, "--bn_splits", "1"]
    command += [*options, "--epochs", "400", "--knn_epochs", "0"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.time() + 90
    while len(list((output / "checkpoints").glob("*.pt"))) < 2 and time.time() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    reached = weights(output)["step"]
    assert reached > 0
    done = subprocess.run([*command, "--steps", str(reached + 5)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout
    assert [s for s, _ in losses(output)] == list(range(1, reached + 6))


@pytest.mark.slow  # starts the command
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_ends_cleanly(number: signal.Signals, image_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    command = [sys.executable, "-m", "fastssl.train", "moco", "--recipe", "moco_cifar10", *MOCO, "--bn_splits", "1"]
    command += ["--data", str(image_folder), "--output", str(output), "--loader", "torchvision", "--workers", "2"]
    command += ["--epochs", "4000", "--knn_epochs", "0"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.time() + 90
    while not list((output / "checkpoints").glob("*.pt")) and time.time() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert f"{number.name}: saved" in stdout  # no worker died of it
    assert "Traceback" not in stderr


def test_going_back_to_a_checkpoint(image_folder: Path, tmp_path: Path) -> None:
    """--resume FILE goes on in its folder; later checkpoints are put aside, not taken for the newest."""
    output = tmp_path / "run"
    run("moco", image_folder, output, "--keep_checkpoints", "9")
    before = losses(output)
    first = output / "checkpoints" / "step-000000003.pt"
    recipe = ["moco", "--recipe", "moco_cifar10", *MOCO, "--bn_splits", "2", "--data", str(image_folder)]
    trainer = Trainer(*train.parse([*recipe, "--resume", str(first), "--keep_checkpoints", "9"]))
    assert (trainer.run.path, trainer.step) == (output, 3)
    names = sorted(p.name for p in first.parent.iterdir())
    assert names == ["step-000000003.pt", "step-000000006.pt.old", "step-000000009.pt.old"]
    trainer.fit()
    assert losses(output) == before


def test_a_run_is_not_overwritten(image_folder: Path, tmp_path: Path) -> None:
    run("moco", image_folder, tmp_path / "run", "--epochs", "1")
    with pytest.raises(FastsslError, match=r"holds a run already: go on with --resume auto"):
        run("moco", image_folder, tmp_path / "run")
    with pytest.raises(FastsslError, match="checkpoint of moco, this is byol"):
        run("byol", image_folder, tmp_path / "run", "--resume", "auto")
    with pytest.raises(FastsslError, match=r"there is no checkpoint 'gone\.pt'"):
        run("moco", image_folder, tmp_path / "other", "--resume", "gone.pt")


def test_resuming_takes_the_runs_own_configuration(image_folder: Path, tmp_path: Path) -> None:
    """What the last line of an interrupted run says to type: nothing but --resume and --output."""
    output = tmp_path / "run"
    run("moco", image_folder, output, "--epochs", "1", "--lr", "0.5")
    before = (output / "config.yaml").read_text()
    for arguments in (
        ["--resume", "auto", "--output", str(output)],
        ["--recipe", str(output / "config.yaml"), "--resume", "auto"],
    ):
        trainer = Trainer(*train.parse(["moco", *arguments]))
        assert (trainer.step, trainer.run.path, trainer.config.lr) == (3, output, 0.5)
        assert trainer.config.data == str(image_folder)
    assert (output / "config.yaml").read_text() == before


def test_what_changes_at_a_resume_is_said_and_done(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    run("moco", image_folder, output, "--epochs", "1")
    again = ["moco", "--resume", "auto", "--output", str(output), "--weight_decay", "0.25", "--epochs", "2"]
    trainer = Trainer(*train.parse(again))
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.25}
    trainer.fit()
    assert "weight_decay was 0.0005 and is 0.25 from here on" in capsys.readouterr().out
    (image_folder / "train" / "cat" / "00.png").unlink()
    with pytest.raises(FastsslError, match=r"trained on 12 images, there are 11 now"):
        Trainer(*train.parse(again))


@pytest.mark.parametrize("loader", ["torchvision", "auto"])
def test_a_corrupt_image_met_in_training_loses_nothing(
    loader: str, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, calls = TrainingStep.__call__, []
    Image.new("RGB", (40, 30)).save(image_folder / "train" / "dog" / "13.png")  # so they are not held in memory

    def damaging(self: TrainingStep, views: list[Tensor], rate: float) -> Tensor:
        calls.append(rate)
        if len(calls) == 4:
            for path in (image_folder / "train").rglob("*.png"):
                path.write_bytes(b"")
        return step(self, views, rate)

    monkeypatch.setattr(TrainingStep, "__call__", damaging)
    with pytest.raises(FastsslError, match=r"cannot read"):
        run("moco", image_folder, tmp_path / "run", "--loader", loader, "--workers", "0", "--epochs", "9")
    assert weights(tmp_path / "run")["step"] >= 4


def test_excluded_images_are_left_out(image_folder: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_text(f"{image_folder / 'train' / 'cat' / '00.png'}\n")
    (image_folder / "train" / "cat" / "00.png").write_bytes(b"")
    trainer = Trainer(*train.parse(["moco", "--recipe", "moco_cifar10", *MOCO, "--data", str(image_folder),
        "--exclude", str(bad), "--bn_splits", "1", "--output", str(tmp_path / "run")]))  # fmt: skip
    assert trainer.data["images"] == 11
    assert trainer.config.exclude == str(bad)


def test_other_images_views_or_loaders_are_refused_at_a_resume(image_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    run("moco", image_folder, output, "--epochs", "1")
    again = ("--resume", "auto", "--epochs", "2")
    with pytest.raises(FastsslError, match="was trained with another augmentation"):
        run("moco", image_folder, output, *again, "--augmentation", "moco_v1_small")
    there = weights(output)["data"]["loader"]
    if there == "dali":
        with pytest.raises(FastsslError, match=r"trained with --loader dali, .* than torchvision: use --loader dali"):
            run("moco", image_folder, output, *again, "--loader", "torchvision")
        with pytest.raises(FastsslError, match="trained with --color exact"):
            run("moco", image_folder, output, *again, "--color", "dali")
    first, second = (image_folder / "train" / "cat" / name for name in ("00.png", "02.png"))
    first.write_bytes(second.read_bytes())
    with pytest.raises(FastsslError, match="but not on these"):
        run("moco", image_folder, output, *again)


def test_default_outputs_are_numbered(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["moco", "--recipe", "moco_cifar10", *MOCO, "--bn_splits", "1", "--data", str(image_folder)]
    arguments += ["--epochs", "1", "--knn_epochs", "0"]
    for _ in range(2):
        Trainer(*train.parse(arguments)).fit()
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["moco_cifar10-001", "moco_cifar10-002"]
    trainer = Trainer(*train.parse([*arguments, "--resume", "auto"]))
    assert (trainer.run.path.name, trainer.step) == ("moco_cifar10-002", 3)


def test_unlabelled_images_train_without_knn(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for index, path in enumerate((image_folder / "train").rglob("*.png")):
        shutil.copy(path, flat / f"{index}.png")
    assert run("moco", flat, tmp_path / "run", "--epochs", "1") == 0
    assert "no kNN accuracy: no held-out images" in capsys.readouterr().out
    assert (tmp_path / "run" / "report.html").exists()
    assert run("moco", flat, tmp_path / "held", "--epochs", "1", "--holdout", "0.3") == 0
    assert "no kNN accuracy: the images have no labels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--gpus", "8"), "gpus 8 asks for more than the 0 GPUs of this machine: use --gpus 0"),
        (("--batch_size", "14"), "batch_size 14 is larger than the 12 training images"),
        (("--gpus", "-1"), "gpus must be 0 or more, got -1"),
        (("--steps", "2", "--warmup_epochs", "1"), "warmup_epochs 1 .* leaves nothing of the 2 steps"),
        (("--backbone", "resnet9"), "unknown backbone 'resnet9'"),
        (("--augmentation", "none"), "unknown augmentation 'none'"),
        (("--data", "nowhere"), "there is no folder '.*nowhere'"),
        (("--loader", "batched"), r"loader: Expected a Literal\['auto', 'dali', 'torchvision'\]. Got value: batched"),
        (("--exclude", "nowhere.txt"), "cannot read the list of excluded names '.*nowhere.txt'"),
        (("--last_batch", "fill", "--prefetch", "0"), "prefetch must be 1 or more, got 0"),
    ],
)
def test_wrong_inputs_end_before_anything_is_written(
    options: tuple[str, ...], named: str, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(FastsslError, match=named):
        run("moco", image_folder, tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


def test_an_unwritable_output_is_named(image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FastsslError, match=r"cannot write to the output folder '.*file/run'"):
        run("moco", image_folder, tmp_path / "file" / "run")


def test_a_full_disk_does_not_end_the_training(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, calls = torch.save, []

    def full_once(content: object, file: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        save(content, file)

    monkeypatch.setattr(torch, "save", full_once)

    def full(self: SummaryWriter, name: str, value: float, step: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    assert run("moco", image_folder, tmp_path / "run") == 0
    assert "No space left" in (tmp_path / "run" / "log.txt").read_text()
    assert weights(tmp_path / "run")["step"] == 9


def test_a_loss_that_is_no_number_ends_the_training(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = MoCoMethod.forward
    poisoned: list[int] = []

    def broken(self: MoCoMethod, views: list[Tensor]) -> Tensor:
        poisoned.append(len(poisoned))
        return forward(self, views) * (math.nan if len(poisoned) > 2 else 1)

    monkeypatch.setattr(MoCoMethod, "forward", broken)
    with pytest.raises(FastsslError, match=r"no finite gradients in 3 steps up to 5: lower --lr \(now 0\.0"):
        run("moco", image_folder, tmp_path / "run", "--nonfinite_limit", "3", "--checkpoint_steps", "2")
    state = weights(tmp_path / "run")
    assert all(bool(tensor.isfinite().all()) for tensor in state["model"].values() if isinstance(tensor, Tensor))
    assert state["training_step"]["skipped"] >= 3
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "ALARM nonfinite" in log
    assert "ended early: saved" in log


def test_evaluate_gives_the_trainings_last_accuracy(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("moco", image_folder, tmp_path / "run")
    last = [row["knn"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "knn" in row][-1]
    capsys.readouterr()
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000000009.pt"
    for path in (checkpoint, tmp_path / "run"):
        assert evaluate.main(["knn", "--checkpoint", str(path), "--k", "3", "--gpus", "0"]) == 0
        shown = capsys.readouterr().out
        assert "raw pixels" in shown
        assert f"{last:.1%}" in next(line for line in shown.splitlines() if "step-000000009" in line)
    with pytest.raises(FastsslError, match="there is no checkpoint"):
        evaluate.main(["knn", "--checkpoint", str(tmp_path / "none.pt")])
    with pytest.raises(FastsslError, match=r"no kNN accuracy .* --holdout"):
        evaluate.main(["knn", "--checkpoint", str(checkpoint), "--data", str(image_folder / "train")])


def test_metrics_are_json_lines(image_folder: Path, tmp_path: Path) -> None:
    run("moco", image_folder, tmp_path / "run", "--epochs", "1")
    assert all(json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())


@pytest.mark.slow  # compiles C++ for a minute
def test_compiled_networks_train_the_same(image_folder: Path, tmp_path: Path) -> None:
    for name, options in (("eager", ()), ("compiled", ("--compile", "true"))):
        run("moco", image_folder, tmp_path / name, "--epochs", "1", *options)
    one, other = losses(tmp_path / "eager"), losses(tmp_path / "compiled")
    assert [loss for _, loss in one] == pytest.approx([loss for _, loss in other], abs=1e-3)


def test_computing_activations_again_changes_nothing(image_folder: Path, tmp_path: Path) -> None:
    run("moco", image_folder, tmp_path / "kept", "--epochs", "1")
    run("moco", image_folder, tmp_path / "again", "--epochs", "1", "--checkpoint_activations", "true")
    assert losses(tmp_path / "again") == losses(tmp_path / "kept")
    one, other = weights(tmp_path / "kept"), weights(tmp_path / "again")
    assert equal(one["model"], other["model"])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's thread
def test_an_output_folder_that_goes_away_comes_back(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, calls = TrainingStep.__call__, []

    def remove(self: TrainingStep, views: list[Tensor], rate: float) -> Tensor:
        calls.append(rate)
        if len(calls) == 5:
            shutil.rmtree(tmp_path / "run")
        return step(self, views, rate)

    monkeypatch.setattr(TrainingStep, "__call__", remove)
    assert run("moco", image_folder, tmp_path / "run") == 0
    assert weights(tmp_path / "run")["step"] == 9
    assert [s for s, _ in losses(tmp_path / "run")] == [5, 6, 7, 8, 9]


def test_an_alarm_can_end_the_training(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Alarms, "check", lambda self, step, *_: [Alarm("drift", "too far. Look at --momentum")] if step == 2 else []
    )
    with pytest.raises(FastsslError, match=r"stopped by the alarm drift, as --stop_on says: too far"):
        run("moco", image_folder, tmp_path / "run", "--stop_on", "[collapse,drift]")
    assert 2 <= weights(tmp_path / "run")["step"] <= 4
    assert "ALARM drift at step 2: too far" in (tmp_path / "run" / "log.txt").read_text()
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "alarm/drift" in row] == [2]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (
            ("--accumulate", "3"),
            r"batch_size 4 cannot be spread over 1 process of 3 micro-batches: make it a multiple of 3",
        ),
        (("--sync_bn", "true"), r"bn_splits 2 and sync_bn"),
        (("--bn_group", "2"), r"bn_group 2 is for sync_bn"),
        (("--accumulate", "2"), r"leaves batch norm 1 images at a time"),
        (("--apex", "true"), r"apex"),
    ],
)
def test_options_that_do_not_go_together(
    options: tuple[str, str], named: str, image_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(FastsslError, match=named):
        run("moco", image_folder, tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


def test_a_run_that_ended_without_finite_gradients_ends_so_again(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = MoCoMethod.forward
    monkeypatch.setattr(MoCoMethod, "forward", lambda self, views: forward(self, views) * math.nan)
    for options in ((), ("--resume", "auto"), ("--resume", "auto", "--nonfinite_limit", "9")):  # the last: at the end
        with pytest.raises(FastsslError, match=r"no finite gradients in \d steps"):
            run("moco", image_folder, tmp_path / "run", "--nonfinite_limit", "2", "--epochs", "5", *options)
    assert (tmp_path / "run" / "log.txt").read_text().count("ALARM nonfinite") > 2


def test_an_error_of_the_checkpoint_before_the_last_does_not_end_the_training(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def full(content: dict[str, Any], file: Any) -> None:
        if content["step"] == 6:
            raise OSError(28, "No space left on device")
        save(content, file)

    monkeypatch.setattr(torch, "save", full)
    assert run("moco", image_folder, tmp_path / "run") == 0
    assert weights(tmp_path / "run")["step"] == 9
    assert "step-000000006.pt' ([Errno 28] No space left" in (tmp_path / "run" / "log.txt").read_text()


def test_processes_started_again_go_on_with_their_own_run_alone(image_folder: Path, tmp_path: Path) -> None:
    """Also if the first ones died before they had one: then what was asked for is done."""
    output, cpu = tmp_path / "run", torch.device("cpu")
    base = ["moco", "--recipe", "moco_cifar10", *MOCO, "--bn_splits", "2", "--data", str(image_folder)]
    parsed = train.parse([*base, "--output", str(output), "--keep_checkpoints", "9"])
    Trainer(*parsed, Team(cpu, job="first")).fit()
    again = Trainer(*parsed, Team(cpu, job="first", restarts=1, died_of="a bug"))
    assert again.step == 9
    assert again.notes[0] == ("restart 1, after a bug", True)
    with pytest.raises(FastsslError, match="holds a run already"):
        Trainer(*parsed, Team(cpu, job="second", restarts=1))
    third = output / "checkpoints" / "step-000000003.pt"
    chosen = train.parse([*base, "--resume", str(third), "--keep_checkpoints", "9"])
    assert Trainer(*chosen, Team(cpu, job="second", restarts=1)).step == 3
    assert Trainer(*chosen, Team(cpu, job="second", restarts=2)).step == 3


def test_a_checkpoint_of_an_older_format_is_told(tmp_path: Path) -> None:
    torch.save({"format": 2, "method": "moco", "model": {}, "rng": {}}, tmp_path / "old.pt")
    with pytest.raises(FastsslError, match="has format 2, this version of fastssl reads format 3"):
        load(tmp_path / "old.pt")


@pytest.mark.parametrize("limit", ["0", "20"])
def test_alarms_remember_across_a_resume(limit: str, image_folder: Path, tmp_path: Path) -> None:
    run("moco", image_folder, tmp_path / "run", "--nonfinite_limit", limit, "--knn_epochs", "0")
    kept = weights(tmp_path / "run")["alarms"]
    assert kept["speeds"]
    resumed = train.parse(["moco", "--output", str(tmp_path / "run"), "--resume", "auto"])
    assert Trainer(*resumed).alarms.state_dict() == kept
