"""Kill trainings at random moments and let them go on: ``python -m tests.kill --runs 60``.

Every run is a job of two processes under the elastic agent. Either the whole job is killed (and started again with
--resume auto) or one process (and the agent starts the others again), at a random moment or while a checkpoint is being
written. In the end its metrics must be those of an uninterrupted run, bit for bit; the newest checkpoint before a kill,
or a newer one, must be there after it, and all that are there must be whole.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from fastssl.engine.checkpoint import CheckpointFolder, load, step_of
from fastssl.engine.run_folder import read_metrics

TIMES = ("time", "seconds", "images_per_second")  # what no two runs share
TIMED = ("alarm/lag", "alarm/throughput")  # as these
WAYS = ("job", "job while writing", "process", "process while writing")


def make_images(folder: Path, count: int = 32) -> None:
    """Two classes of random images, a quarter held out."""
    draw = torch.Generator().manual_seed(0)
    for index in range(count):
        path = folder / ("val" if index % 4 == 3 else "train") / ("cat", "dog")[index // 4 % 2] / f"{index:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(torch.randint(256, (32, 32, 3), generator=draw, dtype=torch.uint8).numpy()).save(path)


def command(images: Path, output: Path, steps: int) -> list[str]:
    """A job of two processes; checkpoints every second step, metrics in windows that do not fit them."""
    options = {
        "recipe": "moco_cifar10", "data": images, "output": output, "procs": 2, "backbone": "small_resnet16",
        "batch_size": 8, "bn_splits": 2, "queue_size": 20, "steps": steps, "augmentation": "moco_v2_small",
        "precision": "float32", "checkpoint_steps": 2, "log_steps": 3, "knn_epochs": 9, "knn_k": 3, "workers": 1,
        "resume": "auto", "max_restarts": 3, "queue_check_steps": 5,
    }  # fmt: skip
    return [sys.executable, "-m", "fastssl.train", "moco", *(f"--{name}={value}" for name, value in options.items())]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    """The job, in a process group of its own, with a thread a process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )


def workers(agent: int) -> list[int]:
    """The processes that an agent has started."""
    with contextlib.suppress(OSError):
        return [int(pid) for pid in Path(f"/proc/{agent}/task/{agent}/children").read_text().split()]
    return []


def rows(output: Path) -> list[dict[str, object]]:
    """The metrics without what depends on the clock."""
    found = read_metrics(output / "metrics.jsonl")
    found = [row for row in found if not row.keys() & set(TIMED)]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in found]


def wait_for(way: str, output: Path, job: subprocess.Popen[str], usual: float) -> None:
    """Until the moment of the kill: any time, any time after the first metrics, or while a checkpoint is written."""
    folder, metrics = output / "checkpoints", output / "metrics.jsonl"
    if "writing" in way:
        chosen, seen = random.randrange(1, 20), set[str]()
        while job.poll() is None and len(seen) < chosen:
            seen |= {path.name for path in folder.glob("*.tmp")}
            time.sleep(0.0005)
        return
    length = metrics.stat().st_size if metrics.exists() else 0
    if random.random() < 0.8:
        while job.poll() is None and (metrics.stat().st_size if metrics.exists() else 0) <= length:
            time.sleep(0.01)
        usual *= 0.3
    end = time.time() + random.uniform(0, usual)
    while job.poll() is None and time.time() < end:
        time.sleep(0.005)


def strike(way: str, job: subprocess.Popen[str]) -> bool:
    """Kill; returns whether there was something to kill."""
    if job.poll() is not None:
        return False
    victims = workers(job.pid)
    if way.startswith("process"):
        victims = random.sample(victims, min(1, len(victims)))
    else:
        victims = [job.pid, *victims]
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return bool(victims)


def saved(output: Path) -> list[Path]:
    """The checkpoints, oldest first."""
    return CheckpointFolder(output / "checkpoints").paths()


def newest(output: Path) -> int:
    """The step of the newest checkpoint; 0 without one."""
    return max(map(step_of, saved(output)), default=0)


def one_run(images: Path, output: Path, steps: int, whole: list[dict[str, object]], usual: float) -> str:
    """Kill a run once or twice, let it come to its end, and compare; returns what was done to it.

    Raises:
        AssertionError: it is not the uninterrupted run, or something saved was lost.
    """
    way, wanted, reached = random.choice(WAYS), random.choice((1, 1, 2)), 0
    kills: list[int] = []
    while True:
        job = start(command(images, output, steps))
        while len(kills) < wanted and job.poll() is None:
            wait_for(way, output, job, usual)
            reached = max(reached, newest(output))
            if strike(way, job):
                kills.append(reached)
            if way.startswith("job"):
                break
            time.sleep(1)  # until the agent has seen it
        text, _ = job.communicate(timeout=600)
        for path in saved(output):
            load(path)  # whole
        assert newest(output) >= reached, f"{way}: the checkpoint of step {reached} is gone\n{text}"
        if job.returncode == 0:
            break
        assert way.startswith("job") and job.returncode == -signal.SIGKILL, f"{way}: {job.returncode}\n{text}"
    assert rows(output) == whole, f"{way}: other metrics\n{text}"
    return f"{way} killed after the checkpoint of step {' and '.join(map(str, kills)) or 'none'}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--steps", type=int, default=91)
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    seed = int(time.time()) if options.seed is None else options.seed
    random.seed(seed)
    print(f"seed {seed}")
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        make_images(images)
        begin = time.time()
        text, _ = (job := start(command(images, Path(folder) / "whole", options.steps))).communicate()
        assert job.returncode == 0, text
        usual, whole = time.time() - begin, rows(Path(folder) / "whole")
        print(f"uninterrupted: {usual:.0f} s, {len(whole)} rows of metrics", flush=True)
        for number in range(options.runs):
            done = one_run(images, Path(folder) / str(number), options.steps, whole, usual)
            print(f"run {number + 1}: {done}: equal", flush=True)


if __name__ == "__main__":
    main()
