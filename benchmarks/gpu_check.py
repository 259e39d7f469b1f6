"""Everything that only a GPU can tell, in one command: tests, benchmarks, predictions and traces, in a results folder.

    make gpu-check                                # or python -m benchmarks.gpu_check
    make gpu-check ARGS='--quick --minutes 4'     # the smallest cases
    make gpu-check ARGS='--parts tests bench'     # some parts only
    make gpu-check ARGS='--total-minutes 9'       # where a command may take ten minutes; --parts the rest in the next
    make gpu-check ARGS='--parts report predictions --bench FILE.json'    # of benchmarks that ran before

Each part runs in processes of its own, with a log each, in benchmarks/results/gpu/DEVICE-DATE. Tests and benchmarks run
file by file: after a kernel has gone astray nothing works on the GPU any more, in that process. What takes longer than
its part may is ended and named. environment.json is there first; summary.md, with the counts, is written anew after
every part, so that what is done is on disk when this command itself is ended. Exit code 1: something failed; 2: there
is no GPU.
"""

import argparse
import json
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts import ROOT, Command, Part, cleaned, run_parts

RESULTS = ROOT / "benchmarks" / "results" / "gpu"
PARTS = ("tests", "bench", "report", "predictions", "trace-moco", "trace-byol")
MINUTES = 8.0  # of each part
ON_CPU = ("test_checkpoint", "test_shuffle", "test_startup")  # suites without a case for CUDA
SPLIT = {"test_info_nce": ("_queue", "_in_batch")}  # by the names of its tests: each has time of its own
DESCRIBE_SECONDS = 180.0  # to import torch and ask the driver
WHOLE = ("kernels", "ops")  # folders of tests that run on the GPU where there is one, all of them
SEVERAL = ("-n", "8")  # processes: most of the time goes into compiling
STACKS = 120  # seconds after which pytest prints where a test hangs


def make_parts(folder: Path, names: Sequence[str], quick: bool) -> list[Part]:
    """The parts by name, in the order of PARTS.

    Args:
        folder: of the results.
        names: of PARTS.
        quick: the smallest cases.
    """
    run = (sys.executable, "-m")
    bench, predictions = folder / "bench.json", folder / "predictions.md"
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    whole = [file for file in files if file.parent.name in WHOLE]
    marked = [file for file in files if file not in whole and b"mark.gpu" in file.read_bytes()]
    suites = [file for file in sorted((ROOT / "benchmarks").glob("test_*.py")) if file.stem not in ON_CPU]
    runs = [(f"{file.stem}{case}", file, case) for file in suites for case in SPLIT.get(file.stem, ("",))]
    parts = [
        Part(
            "tests",
            (
                *(pytest(folder, "tests", file, *SEVERAL) for file in whole),
                *(pytest(folder, "tests", file, "-m", "gpu") for file in marked),
            ),
            files=("tests-*.log",),
        ),
        Part(
            "bench",
            tuple(
                pytest(
                    folder, "bench", file, "--benchmark-only", "-k", f"cuda and {case or 'test'}", *["--quick"] * quick,
                    f"--benchmark-json={folder / f'bench-{name}.json'}", case=case,
                )
                for name, file, case in runs
            ),
            after=lambda: merge([folder / f"bench-{name}.json" for name, _, _ in runs], bench),
            files=("bench.json", "bench-*.log"),
        ),
        Part(
            "report",
            (Command("report", (*run, "benchmarks.report", str(bench))),),
            files=("bench.md", "*.svg", "*.png", "report.log"),
        ),
        Part(
            "predictions",
            (Command("predictions", (*run, "benchmarks.predictions", str(bench), f"--output={predictions}")),),
            files=("predictions.md", "predictions.log"),
        ),
    ]  # fmt: skip
    for method in ("moco", "byol"):
        options = (f"--method={method}", "--device=cuda", f"--output={folder}", f"--steps={3 if quick else 5}")
        name = f"trace-{method}"
        command = Command(name, (*run, "benchmarks.trace_step", *options))
        parts.append(Part(name, (command,), files=(f"*-{method}-cuda.*", f"{name}.log")))
    return [part for part in parts if part.name in names]


def pytest(folder: Path, part: str, file: Path, *options: str, case: str = "") -> Command:
    """One file of tests or benchmarks, or what `case` is called in it."""
    name = "-".join([part, *file.relative_to(ROOT).parts[1:-1], f"{file.stem}{case}"])
    xml = folder / f"{name}.xml"
    common = ("-v", "-p", "no:cacheprovider", "-o", f"faulthandler_timeout={STACKS}", f"--junitxml={xml}")
    return Command(name, (sys.executable, "-m", "pytest", *common, *options, str(file)), junit=xml)


def merge(files: Sequence[Path], out: Path) -> None:
    """Put the JSON of several runs of pytest-benchmark together, as if they had been one."""
    whole: dict[str, Any] = {}
    for file in files:
        try:
            content = json.loads(file.read_text())
        except (OSError, ValueError):  # nothing ran, or its writer was killed: that is told elsewhere
            continue
        whole = whole or {**content, "benchmarks": [], "skipped": []}
        whole["benchmarks"] += content["benchmarks"]
        whole["skipped"] += content["skipped"]
    if whole:
        out.write_text(json.dumps(whole, indent=1) + "\n")


def describe() -> dict[str, Any]:
    """What `benchmarks.environment` prints; a driver that hangs or crashes does so in its process.

    Raises:
        RuntimeError: it did.
    """
    argv = [sys.executable, "-m", "benchmarks.environment"]
    try:
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=DESCRIBE_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"torch did not tell of its devices within {DESCRIBE_SECONDS:.0f} s") from None
    if done.returncode:
        raise RuntimeError(f"torch cannot tell of its devices: {done.stderr.strip()[-500:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def make_folder(wanted: Path) -> Path:
    """The folder, or the first with a number after its name that is not taken."""
    folder, number = wanted, 1
    while folder.exists() and any(folder.iterdir()):
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def heading(found: dict[str, Any], command: str) -> list[str]:
    """The first lines of the summary."""
    gpu, several = found["gpus"][0], f" (first of {len(found['gpus'])})" if len(found["gpus"]) > 1 else ""
    return [
        f"# GPU check: {gpu['name']}",
        "",
        f"Measured on {gpu['name']}{several}, compute capability {gpu['capability']}, {found['date'][:10]}:",
        f"`{command}`",
        "",
        f"Driver {found['driver'] or 'unknown'}, CUDA {found['cuda']}, torch {found['torch']}, commit "
        f"{found['commit'] or 'unknown'}. More in [environment.json](environment.json).",
    ]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="the smallest benchmarks, few rounds")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"of each part; default {MINUTES:g}")
    parser.add_argument("--total-minutes", type=float, help="of all parts together; default: no limit")
    parser.add_argument("--output", type=Path, help="folder; a number is appended if there is something in it")
    parser.add_argument("--bench", type=Path, help="results of benchmarks that ran before, for report and predictions")
    options = parser.parse_args(argv)
    for name in ("minutes", "total_minutes"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0, got {value:g}")
    if options.bench and not options.bench.is_file():
        parser.error(f"--bench {options.bench} is no file: give the bench.json of an earlier run")
    return options


def end(number: int, _: Any) -> None:
    """A handler of signals: all that end this command do so as Ctrl-C does, after a last summary."""
    raise KeyboardInterrupt(signal.Signals(number).name)


def main(argv: Sequence[str]) -> int:
    """Ask for the GPU, run the parts, say where the results are."""
    options = parse(argv)
    try:
        found = describe()
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not found["gpus"]:
        print(
            f"error: gpu_check needs a CUDA device, and torch {found['torch']} sees none on this machine; `make test` "
            "and `make bench` check what a CPU can",
            file=sys.stderr,
        )
        return 2
    signal.signal(signal.SIGINT, end)  # also where a shell ignores it for us: our processes would inherit that
    signal.signal(signal.SIGTERM, end)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup wants it
        signal.signal(signal.SIGHUP, end)
    device = re.sub(r"[^a-z0-9]+", "-", found["gpus"][0]["name"].lower()).strip("-")
    folder = make_folder((options.output or RESULTS / f"{device}-{found['date'][:10]}").absolute())
    command = cleaned(shlex.join(["python", "-m", "benchmarks.gpu_check", *argv]), folder)
    (folder / "environment.json").write_text(json.dumps({"command": command, **found}, indent=1) + "\n")
    if options.bench:
        (folder / "bench.json").write_bytes(options.bench.read_bytes())  # what is made of it lies beside it
    parts = make_parts(folder, options.parts, options.quick)
    try:
        code = run_parts(parts, folder, options.minutes, options.total_minutes, heading(found, command))
    except KeyboardInterrupt as error:
        print(f"ended: {error}", file=sys.stderr)
        code = 1
    print(f"{'something failed' if code else 'all passed'}: {folder / 'summary.md'}")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
