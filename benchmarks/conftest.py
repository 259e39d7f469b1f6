"""What all benchmarks share: the fixture `turns`, ``--quick``, and what the result file says of the machine."""

import os
import platform
import re
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.allocator import fix_thresholds
from benchmarks.environment import driver, nvidia_smi
from benchmarks.sides import Case, Side
from benchmarks.turns import TOLD, Turns, parameters_of, report

PACKAGES = (
    "torch", "triton", "torchvision", "fastssl", "info-nce-pytorch", "lightly", "pytorch-metric-learning", "inf-cl",
    "memeff", "timm", "nvidia-dali-cuda120", "nvidia-dali-cuda130",
)  # fmt: skip
_turns = pytest.StashKey[Turns]()
_skipped = pytest.StashKey[list[dict[str, Any]]]()
_load = pytest.StashKey[float]()  # before we made it ourselves


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="benchmarks: the smallest cases, few rounds")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_skipped], config.stash[_load] = [], os.getloadavg()[0]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Times are told, not taken, by pytest-benchmark; with --quick only what is marked so is left."""
    ours = [item for item in items if Path(__file__).parent in item.path.parents]
    for item in ours:
        item.add_marker(pytest.mark.benchmark(timer=TOLD))
    if config.getoption("--quick"):
        left_out = [item for item in ours if item.get_closest_marker("quick") is None]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture
def turns(request: pytest.FixtureRequest, benchmark: BenchmarkFixture) -> Iterator[Callable[..., None]]:
    """``turns(case, side)``: measure this side of the case and report it."""
    stash = request.config.stash
    if _turns not in stash:
        plugins = request.config.pluginmanager
        reporter: Any = plugins.get_plugin("terminalreporter")
        capture: Any = plugins.get_plugin("capturemanager")

        def say(line: str) -> None:
            with capture.global_and_fixture_disabled():
                reporter.write_line(line)

        fix_thresholds()  # losses of 2,048 rows take blocks of 2 MiB, and new pages for them or not
        stash[_turns] = Turns(request.session.items, request.config.getoption("--quick"), say)

    def run(case: Case, side: Side) -> None:
        report(benchmark, case, stash[_turns].measure(request.node, case, side))

    yield run


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Remember who was skipped, and why: the result file has only what ran."""
    outcome = yield
    result = outcome.get_result()  # type: ignore[attr-defined]
    parameters = parameters_of(item)
    if result.skipped and "case" in parameters and "side" in parameters:
        case, reason = parameters["case"], str(result.longrepr[2]).removeprefix("Skipped: ")
        item.config.stash[_skipped].append(
            {"op": case.op, "case": dict(case.axes), "device": case.device, "side": parameters["side"].name}
            | {"reason": reason}
        )


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    threads = torch.get_num_threads()
    cpu = machine_info.get("cpu", {}).get("brand_raw") or platform.machine()
    device = gpu.name if gpu else f"{cpu}, {threads} thread{'s' * (threads != 1)}"
    machine_info["fastssl"] = {
        "device": device,
        "slug": re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-"),
        "cpu": cpu,
        "gpu": gpu.name if gpu else None,
        "capability": f"{gpu.major}.{gpu.minor}" if gpu else None,
        "driver": driver(nvidia_smi()) if gpu else None,
        "cuda": torch.version.cuda if gpu else None,
        "threads": threads,
        "load": round(config.stash[_load], 2),
        "quick": config.getoption("--quick"),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }
    machine_info.pop("node", None)  # the host's name is nobody's business
    machine_info.get("cpu", {}).pop("flags", None)  # two pages


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    output_json["skipped"] = config.stash[_skipped]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
