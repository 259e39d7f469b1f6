"""Runs the parts of the GPU check: each command in a process with a log and a time limit, and a summary of them all."""

import contextlib
import os
import platform
import shlex
import signal
import subprocess
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
GRACE = 20.0  # seconds that an ended command has to write what it knows: pytest writes its JSON and XML then
NOTHING_COLLECTED = 5  # pytest's exit code
NAMED = 20  # failed tests of one command in the summary


@dataclass(frozen=True)
class Command:
    """One process.

    Args:
        name: of its log, FOLDER/NAME.log.
        argv: what to run, in ROOT.
        junit: the file to which pytest writes its counts.
    """

    name: str
    argv: tuple[str, ...]
    junit: Path | None = None


@dataclass(frozen=True)
class Part:
    """Commands that share a time and a row of the summary.

    Args:
        name: in the summary.
        commands: in this order, each whatever became of the ones before.
        after: called at the end, to put together what they have written.
        files: globs in the folder, linked in the summary.
    """

    name: str
    commands: tuple[Command, ...]
    after: Callable[[], None] = lambda: None
    files: tuple[str, ...] = ()


@dataclass
class Outcome:
    """What became of a part; `problems` empty: nothing failed."""

    part: Part
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)
    last_line: str = ""  # of a command that is not pytest
    done: bool = False

    @property
    def word(self) -> str:
        """In one word."""
        if not self.done:
            return "not run"
        return "failed" if self.problems else "passed"


def run_parts(parts: Sequence[Part], folder: Path, minutes: float, total: float | None, heading: list[str]) -> int:
    """Run parts one after the other, and write the summary after each.

    Args:
        parts: to run.
        folder: of the results, exists.
        minutes: that each part has.
        total: minutes of all, or None.
        heading: lines of the summary before its table.

    Returns:
        Exit code: 1 if anything failed or took too long.
    """
    until = float("inf") if total is None else time.monotonic() + total * 60
    outcomes = [Outcome(part) for part in parts]
    write_summary(folder, heading, outcomes)
    for outcome in outcomes:
        start = time.monotonic()
        left = max(0.0, min(minutes * 60, until - start))
        print(f"{outcome.part.name}: at most {left / 60:.1f} minutes", flush=True)
        try:
            run_part(outcome, folder, left)
        except Exception as error:  # ours: the others still run
            outcome.problems.append(f"gpu_check itself: {error!r}")
        except KeyboardInterrupt as error:
            outcome.problems.append(f"ended: {error}")
            raise
        finally:
            outcome.seconds, outcome.done = time.monotonic() - start, True
            write_summary(folder, heading, outcomes)
            counts = f"{outcome.passed} passed, {outcome.failed} failed, {outcome.skipped} skipped"
            print(f"{outcome.part.name}: {outcome.word}, {counts}, {outcome.seconds:.0f} s", flush=True)
    return int(any(outcome.problems for outcome in outcomes))


def run_part(outcome: Outcome, folder: Path, seconds: float) -> None:
    """Run the commands of a part, and fill in what became of them."""
    until = time.monotonic() + seconds
    waiting = list(outcome.part.commands)
    try:
        while waiting and (left := until - time.monotonic()) > 0:
            command = waiting.pop(0)
            # At most half of it, so that one that hangs leaves time for the others.
            run_command(command, outcome, folder, left / 2 if waiting else left)
        if waiting:
            names = ", ".join(command.name for command in waiting)
            outcome.failed += len(waiting)
            outcome.problems.append(f"not started, the part's {seconds / 60:.1f} minutes were over: {names}")
        elif not outcome.passed and not outcome.failed:
            outcome.problems.append(f"nothing ran: {outcome.skipped} tests were skipped; their logs say why")
    finally:
        outcome.part.after()


def run_command(command: Command, outcome: Outcome, folder: Path, seconds: float) -> None:
    """Run a command, and count what it did."""
    code, ended = None, "was under way"  # when Ctrl-C comes
    try:
        with (folder / f"{command.name}.log").open("w") as log:
            log.write(f"$ {cleaned(shlex.join(command.argv), folder)}\n")
            log.flush()
            code, ended = run_process(command.argv, log, seconds)
    finally:
        scrub(folder)
        count(command, outcome, folder, code, ended)


def run_process(argv: Sequence[str], log: Any, seconds: float) -> tuple[int | None, str]:
    """Run a command in a process group of its own, and end the group when its time is over, or ours.

    Returns:
        Exit code, and what to say of a command that did not end by itself, else nothing.
    """
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environ |= {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    process = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environ,
        start_new_session=True,
    )  # fmt: skip
    try:
        code = process.wait(seconds)
        return code, f"died of {signal.Signals(-code).name}" if code < 0 else ""
    except subprocess.TimeoutExpired:
        return None, f"took longer than {seconds:.0f} s"
    finally:
        _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """First as Ctrl-C does, at which pytest still writes its results; then by force, and whatever it has started."""
    try:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            process.wait(GRACE)
    except (subprocess.TimeoutExpired, ProcessLookupError):
        pass
    finally:  # also when Ctrl-C comes a second time
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # workers that it left behind would keep the GPU busy
        process.wait()


def count(command: Command, outcome: Outcome, folder: Path, code: int | None, ended: str) -> None:
    """Add a command's counts: pytest's own where there are any, else one for the command."""
    text = (folder / f"{command.name}.log").read_text(errors="replace").strip().splitlines()
    last = text[-1].strip()[:300] if len(text) > 1 else ""  # the first is the command
    tests = junit_counts(command.junit) if command.junit else None
    passed, skipped, wrong = tests or (0, 0, [])
    if ended:
        passed -= bool(passed)  # pytest also writes down the test that was under way, as one without a failure
    elif code and not wrong and not (command.junit and code == NOTHING_COLLECTED):
        ended = f"exit code {code}"
    if not command.junit:
        passed, outcome.last_line = int(not ended), last
    outcome.passed += passed
    outcome.skipped += skipped
    outcome.failed += len(wrong) + bool(ended)
    said = [*wrong[:NAMED], *["…"] * (len(wrong) > NAMED), *[f"{ended}: {last}"] * bool(ended)]
    if said:
        outcome.problems.append(f"{command.name} ([log]({command.name}.log)): {', '.join(said)}")


def junit_counts(file: Path) -> tuple[int, int, list[str]] | None:
    """Passed, skipped, and the names of those that failed, from pytest's XML; None if there is none."""
    try:
        cases = list(ElementTree.parse(file).getroot().iter("testcase"))
    except (OSError, ElementTree.ParseError):  # its writer was killed
        return None
    wrong = [str(case.get("name")) for case in cases if {"failure", "error"} & {child.tag for child in case}]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return len(cases) - len(wrong) - skipped, skipped, list(dict.fromkeys(wrong))


def cleaned(text: str, folder: Path) -> str:
    """A text without this machine's folders and its name: the results are meant to be published."""
    text = text.replace(str(folder), folder.name).replace(str(ROOT), ".")
    if len(home := str(Path.home())) > 1:  # a container's may be /
        text = text.replace(home, "~")
    return text.replace(f'hostname="{platform.node()}"', 'hostname=""')  # in pytest's XML


def scrub(folder: Path) -> None:
    """Clean what the commands have written."""
    for path in folder.iterdir():
        if path.suffix in (".log", ".xml", ".json", ".md"):
            before = path.read_text(errors="replace")
            if (after := cleaned(before, folder)) != before:
                path.write_text(after)


def write_summary(folder: Path, heading: list[str], outcomes: list[Outcome]) -> None:
    """What is known so far."""
    lines = [*heading, "", "| part | result | passed | failed | skipped | minutes | files |", "|" + " --- |" * 7]
    for one in outcomes:
        files = sorted({path.name for glob in one.part.files for path in folder.glob(glob)}) if one.done else []
        links = ", ".join(f"[{name}]({name})" for name in files)
        cells = [one.part.name, one.word, one.passed, one.failed, one.skipped, f"{one.seconds / 60:.1f}", links]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    said = [f"- {one.part.name}: {one.last_line}" for one in outcomes if one.last_line and not one.problems]
    lines += ["", *said] if said else []
    for one in outcomes:
        if one.problems:
            lines += ["", f"## {one.part.name}: what failed", "", *(f"- {problem}" for problem in one.problems)]
    (folder / "summary.md").write_text("\n".join(lines) + "\n")
