"""Made-up parts of the GPU check: what fails, hangs or is missing is counted and named, and stops nothing else."""

import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_parts
from benchmarks.gpu_parts import Command, Outcome, Part

FAST = {"tests": "print('fine')", "bench": "print('also fine')"}


def command(name: str, code: str, **more: Any) -> Command:
    return Command(name, (sys.executable, "-S", "-c", code), **more)


def part(name: str, *codes: str, **more: Any) -> Part:
    return Part(name, tuple(command(f"{name}-{number}", code) for number, code in enumerate(codes)), **more)


def run(folder: Path, *parts: Part, minutes: float = 1.0, total: float | None = None) -> tuple[int, str]:
    code = gpu_parts.run_parts(parts, folder, minutes, total, ["# GPU check"])
    return code, (folder / "summary.md").read_text()


def cells(summary: str, name: str) -> list[str]:
    """Of a part: result, passed, failed, skipped, minutes."""
    line = next(line for line in summary.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.split("|")[2:-2]]


XML = """<?xml version="1.0"?><testsuites><testsuite name="pytest" hostname="{host}">
<testcase name="test_a"/><testcase name="test_b"><failure message="no">no</failure></testcase>
<testcase name="test_c"><skipped/></testcase><testcase name="test_d"/></testsuite></testsuites>"""


def test_all_that_passes(tmp_path: Path) -> None:
    code, summary = run(tmp_path, part("tests", FAST["tests"], files=("tests-*.log",)), part("bench", FAST["bench"]))
    assert code == 0
    assert cells(summary, "tests")[:4] == ["passed", "1", "0", "0"]
    assert "[tests-0.log](tests-0.log)" in summary and "- bench: also fine" in summary
    assert (tmp_path / "tests-0.log").read_text().endswith("fine\n")


def test_a_failing_part_does_not_stop_the_others(tmp_path: Path) -> None:
    code, summary = run(tmp_path, part("tests", "print('so it is'); raise SystemExit(3)"), part("bench", FAST["bench"]))
    assert code == 1
    assert cells(summary, "tests")[:3] == ["failed", "0", "1"] and cells(summary, "bench")[0] == "passed"
    assert "- tests-0 ([log](tests-0.log)): exit code 3: so it is" in summary


def test_a_part_over_its_time_is_ended_and_named(tmp_path: Path) -> None:
    polite = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('written at last')"
    start = time.monotonic()
    code, summary = run(tmp_path, part("tests", polite), part("bench", FAST["bench"]), minutes=1 / 60)
    assert time.monotonic() - start < 20
    assert code == 1 and "took longer than 1 s" in summary
    assert "written at last" in (tmp_path / "tests-0.log").read_text()  # Ctrl-C came first
    assert cells(summary, "bench")[0] == "passed"


def test_what_ignores_the_interrupt_is_killed_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_parts, "GRACE", 0.2)
    child = tmp_path / "child"
    stubborn = (
        "import os, signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        f"pid = os.fork()\nif pid: open({str(child)!r}, 'w').write(str(pid))\ntime.sleep(60)"
    )
    code, summary = run(tmp_path, part("tests", stubborn), minutes=1 / 60)
    assert code == 1 and "took longer than 1 s" in summary
    pid = int(child.read_text())
    for _ in range(50):  # until init has reaped it
        if not Path(f"/proc/{pid}").exists() or "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text():
            return
        time.sleep(0.1)
    raise AssertionError(f"process {pid} still runs")


def test_one_command_leaves_time_for_the_next(tmp_path: Path) -> None:
    code, summary = run(tmp_path, part("tests", "import time; time.sleep(60)", FAST["tests"]), minutes=4 / 60)
    assert code == 1 and cells(summary, "tests")[:3] == ["failed", "1", "1"]


def test_what_there_is_no_time_for_is_named(tmp_path: Path) -> None:
    slow, late = part("tests", "import time; time.sleep(60)"), part("bench", FAST["bench"], FAST["bench"])
    code, summary = run(tmp_path, slow, late, total=0.3 / 60)
    assert code == 1 and cells(summary, "bench")[:3] == ["failed", "0", "2"]
    assert "not started" in summary and "bench-0, bench-1" in summary


def test_death_by_a_signal_is_named(tmp_path: Path) -> None:
    code, summary = run(tmp_path, part("tests", "import os; os.abort()"))
    assert code == 1 and "died of SIGABRT" in summary


def test_counts_are_pytests(tmp_path: Path) -> None:
    xml = tmp_path / "tests.xml"
    write = f"open({str(xml)!r}, 'w').write({XML.format(host='')!r}); raise SystemExit(1)"
    code, summary = run(tmp_path, Part("tests", (command("tests", write, junit=xml),)))
    assert code == 1 and cells(summary, "tests")[:4] == ["failed", "2", "1", "1"]
    assert "tests ([log](tests.log)): test_b" in summary


def test_the_test_that_was_under_way_has_not_passed(tmp_path: Path) -> None:
    xml = tmp_path / "tests.xml"
    xml.write_text(XML.format(host=""))
    code, summary = run(tmp_path, Part("tests", (command("tests", "import os; os.abort()", junit=xml),)))
    assert code == 1 and cells(summary, "tests")[:4] == ["failed", "1", "2", "1"]  # of two, and the end itself
    assert "died of SIGABRT" in summary


@pytest.mark.parametrize("written", [None, "<testsuites><test"])
def test_a_crash_before_pytest_has_counted_is_a_failure(tmp_path: Path, written: str | None) -> None:
    xml = tmp_path / "tests.xml"
    if written:
        xml.write_text(written)
    code, summary = run(tmp_path, Part("tests", (command("tests", "import os; os.abort()", junit=xml),)))
    assert code == 1 and cells(summary, "tests")[:3] == ["failed", "0", "1"]


def test_a_file_without_tests_for_a_gpu_is_no_failure(tmp_path: Path) -> None:
    nothing = command("bench", "raise SystemExit(5)", junit=tmp_path / "none.xml")
    code, summary = run(tmp_path, Part("bench", (nothing, command("other", "pass"))))
    assert code == 0 and cells(summary, "bench")[:3] == ["passed", "1", "0"]


def test_a_part_of_which_nothing_ran_has_not_passed(tmp_path: Path) -> None:
    xml = tmp_path / "tests.xml"
    xml.write_text('<testsuites><testsuite><testcase name="test_c"><skipped/></testcase></testsuite></testsuites>')
    code, summary = run(tmp_path, Part("tests", (command("tests", "pass", junit=xml),)))
    assert code == 1 and cells(summary, "tests")[:4] == ["failed", "0", "0", "1"]
    assert "nothing ran: 1 tests were skipped" in summary


def test_an_error_of_our_own_does_not_stop_the_others(tmp_path: Path) -> None:
    def broken() -> None:
        raise ValueError("merge")

    code, summary = run(tmp_path, part("tests", "pass", after=broken), part("bench", "pass"))
    assert code == 1 and "ValueError('merge')" in summary and cells(summary, "bench")[0] == "passed"


def test_finished_parts_are_on_disk_when_a_later_one_runs(tmp_path: Path) -> None:
    look = f"print(open({str(tmp_path / 'summary.md')!r}).read())"
    run(tmp_path, part("tests", FAST["tests"]), part("bench", look))
    seen = (tmp_path / "bench-0.log").read_text()
    assert cells(seen, "tests")[0] == "passed" and cells(seen, "bench")[0] == "not run"


def test_when_it_is_ended_itself_it_ends_its_part_and_tells(tmp_path: Path) -> None:
    code = (
        "import signal, sys; from pathlib import Path; from benchmarks import gpu_check, gpu_parts as g\n"
        "signal.signal(signal.SIGTERM, gpu_check.end)\n"
        "c = lambda name, code: g.Part(name, (g.Command(name, (sys.executable, '-S', '-c', code)),))\n"
        "slow = 'import time; print(1, flush=True); time.sleep(60)'\n"
        "parts = [c('tests', 'pass'), c('bench', slow), c('report', '')]\n"
        f"g.run_parts(parts, Path({str(tmp_path)!r}), 1.0, None, [])"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=gpu_parts.ROOT)
    log = tmp_path / "bench.log"
    for _ in range(200):
        if log.exists() and log.read_text().endswith("1\n"):
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) != 0
    summary = (tmp_path / "summary.md").read_text()
    assert [cells(summary, name)[0] for name in ("tests", "bench", "report")] == ["passed", "failed", "not run"]
    assert "ended: SIGTERM" in summary


def test_results_do_not_name_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "node", lambda: "box7")
    (tmp_path / "a.log").write_text(f"rootdir: {gpu_parts.ROOT}/tests\n{Path.home()}/cache\n{tmp_path}/a.xml\n")
    (tmp_path / "a.xml").write_text(XML.format(host="box7"))
    gpu_parts.scrub(tmp_path)
    assert (tmp_path / "a.log").read_text() == f"rootdir: ./tests\n~/cache\n{tmp_path.name}/a.xml\n"
    assert "box7" not in (tmp_path / "a.xml").read_text()


def test_triton_is_not_interpreted_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "1")
    outcome = Outcome(part("tests", "import os; print(os.environ.get('TRITON_INTERPRET'))"))
    gpu_parts.run_part(outcome, tmp_path, 60)
    assert outcome.last_line == "None"
