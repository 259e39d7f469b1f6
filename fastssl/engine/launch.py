"""Starting the processes of a training on this machine, or joining those that torchrun or srun have started."""

import contextlib
import ctypes
import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from fastssl.engine.config import Config
from fastssl.errors import FastsslError
from fastssl.files import write_text

PARENT = "FASTSSL_AGENT"  # process id of the agent that we are, for its workers
ERROR, SAVED = "error.json", "saved"  # files in the folder of a job
GRACE = 120  # seconds to save after a signal, before a process is killed


def processes_to_start(config: Config) -> int:
    """How many processes this command has to start; 0: it is one of them, or the only one."""
    if config.procs is not None and config.gpus:
        raise FastsslError(f"gpus {config.gpus} and procs {config.procs}: processes are on GPUs or on the CPU")
    join_slurm()
    if "RANK" in os.environ:
        return 0
    wanted = config.procs
    if wanted is None:
        import torch

        there = torch.cuda.device_count()
        wanted = there if config.gpus is None else config.gpus
        if wanted > there:
            raise FastsslError(
                f"gpus {wanted} asks for more than the {there} GPU{'s' * (there != 1)} of this machine: use --gpus "
                f"{there}, or --procs {wanted} for as many processes on the CPU"
            )
    return wanted if wanted > 1 else 0


def start(arguments: list[str], config: Config, processes: int) -> int:
    """Run this command in `processes` processes under torch's elastic agent; returns its exit code.

    The agent starts all of them again, at most `max_restarts` times, when one dies.

    Args:
        arguments: of `fastssl.train`, with the output folder.
        config: what they mean.
        processes: to start.
    """
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # what it would say is said below
    os.environ[PARENT] = str(os.getpid())
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a thread that spins takes a core from another process
    # torch 2.14 keeps one store for all attempts, in which processes started again may find the addresses of dead ones,
    # for which they wait.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    with tempfile.TemporaryDirectory(prefix="fastssl-") as logs:
        agent = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id="fastssl", rdzv_backend="c10d",
            rdzv_endpoint="localhost:0", local_addr="localhost", max_restarts=config.max_restarts,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
            **_if_known(LaunchConfig, shutdown_timeout=GRACE),
        )  # fmt: skip
        try:
            elastic_launch(agent, sys.executable)("-m", "fastssl.train", *arguments)
        except SignalException as stop:
            return _ended_by(stop.sigval, Path(logs))
        except ChildFailedError as error:
            return _report(error)
    return 0


def _ended_by(number: signal.Signals, logs: Path) -> int:
    """The exit code after a signal; what went wrong is told if nothing could be saved."""
    if list(logs.glob(f"*/{SAVED}")):
        return 128 + number.value
    for attempt in _attempts(logs, "*/attempt_*")[-1:]:
        for path in attempt.glob(f"*/{ERROR}"):
            message = json.loads(path.read_text())["message"]["message"]
            print(f"error: {number.name}, and then: {message}", file=sys.stderr)
            return 2
    print(f"{number.name}: ended without a new checkpoint", file=sys.stderr)
    return 128 + number.value


def worker(config: Config, name: str) -> int:
    """Train in this process, alone or as one of many; what goes wrong is told once, by the agent if there is one."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return _train(config, name)
    error_file = Path(os.environ["TORCHELASTIC_ERROR_FILE"])
    logs = error_file.parents[2]  # of this job, of no other
    _end_with_the_agent()
    died_of = _earlier_errors(logs)
    for error in died_of:
        if error["extraInfo"].get("user") == "yes":  # another attempt cannot mend it
            write_text(error_file, json.dumps({"message": error}))
            return 2
    try:
        code = _train(config, name, str(logs), died_of[-1]["extraInfo"]["py_callstack"] if died_of else "")
    except Exception as error:
        _record(error_file, error)
        return 2 if isinstance(error, FastsslError) else 1
    if code > 128:
        (logs / SAVED).touch()
    return code


def join_slurm() -> None:
    """Translate what srun says of this process to torchrun's variables; nothing if srun started one or none.

    Raises:
        FastsslError: where the first process runs cannot be found out.
    """
    env = os.environ
    if "RANK" in env or int(env.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return
    world, nodes = int(env["SLURM_STEP_NUM_TASKS"]), int(env.get("SLURM_STEP_NUM_NODES", "1"))
    if world % nodes:
        raise FastsslError(f"srun started {world} tasks on {nodes} nodes: start as many on each, one a GPU")
    env.setdefault("MASTER_ADDR", _first_host())
    env.setdefault("MASTER_PORT", str(20000 + (int(env["SLURM_JOB_ID"]) * 7 + int(env["SLURM_STEP_ID"])) % 20000))
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], str(world)
    alone = "CUDA_VISIBLE_DEVICES" in env and "," not in env["CUDA_VISIBLE_DEVICES"]  # with the one GPU it sees
    env["LOCAL_RANK"], env["LOCAL_WORLD_SIZE"] = "0" if alone else env["SLURM_LOCALID"], str(world // nodes)


def _first_host() -> str:
    nodes = os.environ["SLURM_STEP_NODELIST"]
    if not set(nodes) & set("[,"):
        return nodes
    try:
        listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise FastsslError(
            f"cannot tell the first host of SLURM_STEP_NODELIST={nodes} ({error}): set MASTER_ADDR to it"
        ) from None
    return listed.stdout.split()[0]


def _train(config: Config, name: str, job: str = "", died_of: str = "") -> int:
    from fastssl.engine.team import joined
    from fastssl.engine.trainer import Trainer  # torch and its company take seconds; a wrong option should not

    with joined(config.gpus, config.procs, job, died_of) as team:
        return Trainer(config, name, team).fit()


def _end_with_the_agent() -> None:
    """Ask the kernel for a SIGTERM when our agent dies, since it cannot end us any more; end at its Ctrl-C silently."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))  # until there is something to save
    pr_set_pdeathsig = 1  # prctl.h
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if PARENT in os.environ and os.getppid() != int(os.environ[PARENT]):
        sys.exit(128 + signal.SIGTERM)  # it was dead before we asked


def _earlier_errors(logs: Path) -> list[Any]:
    """What ended the attempts before this one, oldest first; of each what was not a consequence of something else."""
    paths = [path for attempt in _attempts(logs, "attempt_*") for path in sorted(attempt.glob(f"*/{ERROR}"))]
    errors = [json.loads(path.read_text())["message"] for path in paths]
    return [error for error in errors if not _lost_contact(error["message"])]


def _attempts(folder: Path, pattern: str) -> list[Path]:
    """The folders of a job's attempts, oldest first."""
    return sorted(folder.glob(pattern), key=lambda path: int(path.name.rpartition("_")[2]))


def _record(error_file: Path, error: Exception) -> None:
    """Write an error as torch's agents read it."""
    user = isinstance(error, FastsslError)
    extra = {
        "py_callstack": f"error: {error}" if user else traceback.format_exc(),
        "timestamp": str(int(time.time())),
        "user": "yes" if user else "no",
    }
    message = str(error) if user else f"{type(error).__name__}: {error}"
    write_text(error_file, json.dumps({"message": {"message": message, "extraInfo": extra}}))


def _report(error: Any) -> int:
    """Print the failure that came first, of those that are not its consequences."""
    rank, failure = min(error.failures.items(), key=lambda item: (_consequence(item[1]), item[1].timestamp))
    if isinstance(failure.message, str):  # it ended without a word
        print(f"error: process {rank} died: {failure.message}", file=sys.stderr)
        return 1
    extra = failure.message["extraInfo"]
    if extra.get("user") == "yes":
        print(f"error: {failure.message['message']}", file=sys.stderr)
        return 2
    print(f"process {rank} failed:\n{extra['py_callstack']}", file=sys.stderr)
    return 1


def _consequence(failure: Any) -> bool:
    """Whether it says only that another process has gone."""
    return not isinstance(failure.message, str) and _lost_contact(failure.message["message"])


def _lost_contact(text: str) -> bool:
    return any(
        sign in text for sign in ("Connection closed by peer", "Connection reset by peer", "has one of them died")
    )


def _if_known(function: Any, **options: Any) -> dict[str, Any]:
    """The options that this version of torch has."""
    known = {field.name for field in dataclasses.fields(function)}
    return {name: value for name, value in options.items() if name in known}
