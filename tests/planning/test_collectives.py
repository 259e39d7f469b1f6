"""The planned collectives are those that four real processes make, counted by gloo's own flight recorder."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from fastssl.engine.config import BYOLConfig, Config, MoCoConfig
from fastssl.planning.collectives import Collective
from fastssl.planning.devices import DEVICES
from fastssl.planning.timing import collective_seconds
from fastssl.planning.trace import SETTLED, trace_step
from tests import processes

WORLD, BATCH, SIZE = 4, 6, 32
SIZES = {"Float": 4, "Int": 4, "Long": 8, "Byte": 1, "Double": 8, "BFloat16": 2}


def config(method: str) -> Config:
    if method == "moco":
        return MoCoConfig(backbone="small_resnet16", queue_size=64, dim=16)
    return BYOLConfig(backbone="small_resnet16", hidden_dim=64, projection_dim=16)


def train(rank: int, method: str, folder: str) -> None:
    """Make the steps that the plan makes, and save what gloo says of the last one.

    The flight recorder is written by ProcessGroupGloo itself, whoever calls it: DistributedDataParallel's C++, the
    exchange of csrc, or Python.
    """
    os.environ["TORCH_FR_BUFFER_SIZE"] = "10000"
    from fastssl.engine.build import build_method
    from fastssl.engine.optimizers import make_optimizer
    from fastssl.engine.step import TrainingStep

    processes.meet(rank, WORLD, f"{folder}/meeting")
    chosen = config(method)
    network = build_method(chosen, 1000, WORLD).train().to(memory_format=torch.channels_last)
    step = TrainingStep(chosen, network, make_optimizer(network, chosen), torch.device("cpu"), None)
    seen = 0
    for number in range(SETTLED + 1):
        if number == SETTLED:
            seen = len(recorded())
        step([torch.randn(BATCH, 3, SIZE, SIZE) for _ in range(2)], 0.1)
    if rank == 0:
        Path(folder, "recorded.json").write_text(json.dumps(recorded()[seen:]))


def recorded() -> list[dict[str, Any]]:
    dump = getattr(torch._C._distributed_c10d, "_dump_fr_trace_json")  # noqa: B009
    entries: list[dict[str, Any]] = json.loads(dump())["entries"]
    return entries


def measured(folder: Path) -> Counter[tuple[str, int]]:
    entries = json.loads((folder / "recorded.json").read_text())
    found: Counter[tuple[str, int]] = Counter()
    for entry in entries:
        kind = entry["profiling_name"].partition(":")[2].replace("_", "-")
        size = sum(
            SIZES[dtype] * int(torch.Size(shape).numel())
            for shape, dtype in zip(entry["input_sizes"], entry["input_dtypes"], strict=True)
        )
        found[kind, size] += 1
    return found


def planned(method: str, gpu: bool) -> list[Collective]:
    return trace_step(config(method), WORLD, BATCH, None, size=SIZE, gpu=gpu).collectives


@pytest.mark.skipif(not hasattr(torch._C._distributed_c10d, "_dump_fr_trace_json"), reason="no flight recorder")
@pytest.mark.parametrize("method", ["moco", "byol"])
def test_as_many_bytes_as_four_processes_exchange(method: str, tmp_path: Path) -> None:
    processes.run(train, WORLD, method, str(tmp_path))
    real = measured(tmp_path)
    assert sum(real.values()) > 3
    for gpu in (False, True):  # what runs on the CPU, and the GPU's batch norm
        assert Counter((c.kind, c.bytes) for c in planned(method, gpu)) == real


def test_what_they_are_for() -> None:
    found = {(c.label, c.kind) for c in planned("moco", True)}
    assert found == {
        ("gradients", "all-reduce"), ("shuffle", "all-to-all"), ("shuffle header", "all-gather"), ("keys", "all-gather")
    }  # fmt: skip
    found = {(c.label, c.kind) for c in planned("byol", True)}
    assert found == {
        ("gradients", "all-reduce"), ("sync batch norm", "all-gather"), ("sync batch norm", "all-reduce")
    }  # fmt: skip


def test_gradients_are_all_there_once() -> None:
    trace = trace_step(config("moco"), WORLD, BATCH, None, size=SIZE)
    assert sum(c.bytes for c in trace.collectives if c.label == "gradients") == 4 * trace.parameters[0]


def test_one_process_exchanges_nothing() -> None:
    assert not trace_step(config("moco"), 1, BATCH, None, size=SIZE).collectives


@pytest.mark.parametrize("kind", ["all-reduce", "all-gather", "all-to-all", "broadcast"])
def test_time_grows_with_bytes_and_ranks(kind: str) -> None:
    def seconds(size: int, world: int) -> float:
        return collective_seconds(Collective(kind, "", size, world), DEVICES["h100"])

    for world in (2, 8, 16, 64, 1024):
        assert 0 < seconds(10**6, world) < seconds(10**8, world)
    assert seconds(10**8, 8) < seconds(10**8, 16) <= seconds(10**8, 1024)


def test_an_all_reduce_takes_what_the_slowest_link_needs() -> None:
    h100 = DEVICES["h100"]
    inside = collective_seconds(Collective("all-reduce", "", 10**9, 8), h100)
    assert inside == pytest.approx(2 * 7 / 8 * 1e9 / (450e9 * 0.8), rel=0.02)
    between = collective_seconds(Collective("all-reduce", "", 10**9, 1024), h100)
    assert between == pytest.approx(inside + 2 * 127 / 128 * 1e9 / (400e9 * 0.8), rel=0.02)
