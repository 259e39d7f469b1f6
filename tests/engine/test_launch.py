"""Starting many processes: the elastic agent, torchrun, srun, and what a user sees of those that fail."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastssl.engine import launch
from fastssl.engine.checkpoint import CheckpointFolder, load
from fastssl.engine.config import MoCoConfig
from fastssl.engine.run_folder import read_metrics
from fastssl.engine.team import joined
from fastssl.errors import FastsslError
from tests import kill

pytestmark = pytest.mark.slow  # every process imports torch

Environment = dict[str, str]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    kill.make_images(tmp_path / "images")
    return tmp_path / "images"


def arguments(images: Path, output: Path, *more: str, steps: int = 6) -> list[str]:
    """Of fastssl.train, without a number of processes."""
    return [a for a in kill.command(images, output, steps)[3:] if not a.startswith("--procs")] + list(more)


def run(command: list[str], extra: Environment | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(extra or {})}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=300)


def saboteur(folder: Path, code: str) -> Environment:
    """Lets every Python process run `code` at its start; RANK is in its environment, if it has one."""
    (folder / "sabotage").mkdir()
    (folder / "sabotage" / "sitecustomize.py").write_text(f"import os\nrank = os.environ.get('RANK')\n{code}\n")
    return {"PYTHONPATH": os.pathsep.join([str(folder / "sabotage"), *filter(None, [os.environ.get("PYTHONPATH")])])}


STEP_3 = """
if rank == '1':
    import threading, sys
    def sabotage():
        import time
        while not hasattr(sys.modules.get('fastssl.engine.step'), 'TrainingStep'):
            time.sleep(.01)
        step, calls = sys.modules['fastssl.engine.step'].TrainingStep, []
        whole = step.__call__
        def call(self, views, rate):
            calls.append(1)
            if len(calls) == 3:
                {what}
            return whole(self, views, rate)
        step.__call__ = call
    threading.Thread(target=sabotage, daemon=True).start()
"""


def test_one_command_starts_all_and_process_0_alone_speaks(images: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    done = run(["-m", "fastssl.train", *arguments(images, output, "--procs=2")])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run folder: ") == 1
    assert "6 steps of 8 (4 a process) on 2 processes" in done.stdout
    assert done.stderr == ""
    assert [row["step"] for row in read_metrics(output / "metrics.jsonl") if "loss" in row] == [3, 6]
    state = load(CheckpointFolder(output / "checkpoints").paths()[-1])
    assert (state["world"], len(state["processes"]), state["step"]) == (2, 2, 6)
    assert list((output / "checkpoints").glob("*.tmp")) == []


def test_torchrun_and_srun_start_the_same_training(images: Path, tmp_path: Path) -> None:
    """And each of them goes on with what another way of starting has left."""
    output = tmp_path / "run"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fastssl.train"]
    done = run([*torchrun, *arguments(images, output, steps=4)])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run folder: ") == 1
    slurm = {
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "localhost",
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    tasks = [
        subprocess.Popen(
            [sys.executable, "-m", "fastssl.train", *arguments(images, output)],
            env={**os.environ, **slurm, "SLURM_PROCID": task, "SLURM_LOCALID": task},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for task in "01"
    ]  # fmt: skip
    texts = [task.communicate(timeout=200)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], texts
    assert "at step 4" in texts[0]
    assert texts[1] == ""


def test_processes_that_die_are_started_again(images: Path, tmp_path: Path) -> None:
    """From the newest checkpoint, and at most as often as was said."""
    died = str(tmp_path / "died")
    once = f"os.path.exists({died!r}) or (open({died!r}, 'w'), os.kill(os.getpid(), 9))"
    output = tmp_path / "run"
    done = run(
        ["-m", "fastssl.train", *arguments(images, output, "--procs=2", "--resume=never")],
        saboteur(tmp_path, STEP_3.format(what=once)),
    )
    assert done.returncode == 0, done.stderr
    assert "restart 1, after a process that died without a word" in done.stdout
    assert "resumed from" in done.stdout
    whole = tmp_path / "whole"
    assert run(["-m", "fastssl.train", *arguments(images, whole, "--procs=2")]).returncode == 0
    assert kill.rows(output) == kill.rows(whole)


@pytest.mark.parametrize(
    ("what", "seen"),
    [
        ("raise KeyError('a bug')", ["process 1 failed:", "KeyError: 'a bug'"]),
        ("os.kill(os.getpid(), 9)", ["process 1 died: Signal 9 (SIGKILL)"]),
    ],
)
def test_the_failure_that_came_first_is_what_a_user_sees(
    what: str, seen: list[str], images: Path, tmp_path: Path
) -> None:
    done = run(
        ["-m", "fastssl.train", *arguments(images, tmp_path / "run", "--procs=2", "--max_restarts=0")],
        saboteur(tmp_path, STEP_3.format(what=what)),
    )
    assert done.returncode == 1
    for text in seen:
        assert text in done.stderr
    assert done.stderr.count("Traceback") == what.count("raise"), done.stderr


def test_an_error_of_the_user_is_one_line_and_no_reason_to_start_again(images: Path, tmp_path: Path) -> None:
    for path in sorted((images / "train").rglob("*.png"))[:9]:
        path.write_bytes(path.read_bytes()[:200])
    (images / "train" / "cat" / "large.png").write_bytes((images / "val" / "cat" / "03.png").read_bytes())
    done = run(["-m", "fastssl.train", *arguments(images, tmp_path / "run", "--procs=2")])
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert "restart" not in done.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_agent_saves(number: signal.Signals, images: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    job = kill.start([sys.executable, "-m", "fastssl.train", *arguments(images, output, "--procs=2", steps=100_000)])
    while not CheckpointFolder(output / "checkpoints").paths() and job.poll() is None:
        time.sleep(0.05)
    job.send_signal(number)
    text, _ = job.communicate(timeout=100)
    assert job.returncode == 128 + number, text
    assert f"{number.name}: saved" in text
    assert "Traceback" not in text
    said = re.search(r"saved (\S+) at step (\d+)", text)
    assert said is not None
    assert load(Path(said[1]))["step"] == int(said[2])


def test_workers_end_when_their_agent_is_killed(images: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    job = kill.start([sys.executable, "-m", "fastssl.train", *arguments(images, output, "--procs=2", steps=100_000)])
    while not CheckpointFolder(output / "checkpoints").paths() and job.poll() is None:
        time.sleep(0.05)
    workers = kill.workers(job.pid)
    assert len(workers) == 2
    job.kill()
    text, _ = job.communicate(timeout=100)  # when the last worker has closed its end of the pipe
    assert "SIGTERM: saved" in text
    for worker in workers:
        with contextlib.suppress(FileNotFoundError):
            assert Path(f"/proc/{worker}/cmdline").read_text() == ""  # nobody may have asked how it ended


def test_another_number_of_processes_goes_on_in_the_same_place(images: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert run(["-m", "fastssl.train", *arguments(images, output, "--procs=2", steps=5)]).returncode == 0
    done = run(["-m", "fastssl.train", *arguments(images, output, "--gpus=0", steps=8)])
    assert done.returncode == 0, done.stderr
    assert "2 processes were training and 1 are from here on: the same images in the same batches" in done.stdout
    assert [row["step"] for row in read_metrics(output / "metrics.jsonl") if "loss" in row] == [3, 5, 6, 8]


def test_wrong_numbers_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FastsslError, match="gpus 2 and procs 3"):
        launch.processes_to_start(MoCoConfig(gpus=2, procs=3))
    assert launch.processes_to_start(MoCoConfig(procs=3)) == 3
    assert launch.processes_to_start(MoCoConfig(procs=1)) == 0
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    for missing in ("MASTER_ADDR", "MASTER_PORT"):
        with pytest.raises(FastsslError, match=f"has RANK, but not {missing}"), joined(0, None):
            pass
        monkeypatch.setenv(missing, "1")
    with (
        pytest.raises(FastsslError, match=r"procs 3, but 2 processes were started.*--nproc-per-node 3"),
        joined(None, 3),
    ):
        pass
    assert launch.processes_to_start(MoCoConfig(procs=3)) == 0


def test_srun_on_several_nodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[3-5]" ] && printf "n3\\nn4\\nn5\\n"\n')
    scontrol.chmod(0o755)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in {
        "STEP_NUM_TASKS": "24", "STEP_NUM_NODES": "3", "STEP_NODELIST": "n[3-5]", "JOB_ID": "77", "STEP_ID": "0",
        "PROCID": "17", "LOCALID": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("PATH", str(tmp_path))
    launch.join_slurm()
    seen = [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")]
    assert seen == ["17", "24", "1", "8", "n3"]
    assert 20000 <= int(os.environ["MASTER_PORT"]) < 40000
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("MASTER_ADDR")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(
        FastsslError, match=r"cannot tell the first host of SLURM_STEP_NODELIST=n\[3-5\].*set MASTER_ADDR"
    ):
        launch.join_slurm()
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "5")
    with pytest.raises(FastsslError, match="srun started 24 tasks on 5 nodes"):
        launch.join_slurm()
