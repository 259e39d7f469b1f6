"""The model of time: rooflines by hand, overlap, and published speeds within the error that docs/plan.md states."""

from dataclasses import replace

import pytest
import torch

from fastssl.engine.config import MoCoConfig
from fastssl.planning import parts
from fastssl.planning.collectives import Collective
from fastssl.planning.devices import DEVICES, find_device
from fastssl.planning.published import RATES, predict
from fastssl.planning.timing import CALL, COLLECTIVE, LAUNCH, SYNC, play, seconds
from fastssl.planning.trace import Event, Operation, Trace, Wait, trace_step
from fastssl.planning.work import HALF, Work

H100 = replace(DEVICES["h100"], convolution=0.5, streaming=0.5)
LONG = Work(flops=1e9 * H100.half * 0.5 / 1e9, precision=HALF, bytes=8, kernels=1)  # a second
SHORT = Work(bytes=8, kernels=1)


def trace(*events: Event) -> Trace:
    return Trace(list(events), {}, (0, 0), 8, 1, 0)


def operation(work: Work, part: str = parts.BACKBONE, backward: bool = False) -> Operation:
    return Operation("op", part, backward, work)


def test_the_roofline() -> None:
    assert seconds(LONG, H100) == pytest.approx(1 + LAUNCH)
    moved = Work(flops=1, precision=HALF, bytes=H100.bandwidth * 0.5, kernels=3)
    assert seconds(moved, H100) == pytest.approx(1 + 3 * LAUNCH)


def test_the_host_is_waited_for_only_where_kernels_are_short() -> None:
    times = play(trace(*[operation(LONG)] * 3), H100)
    assert sum(times.idle.values()) == pytest.approx(0)
    times = play(trace(*[operation(SHORT)] * 100), H100)
    assert times.step == pytest.approx(100 * CALL[False], rel=0.01)
    assert times.idle[parts.BACKBONE] == pytest.approx(100 * (CALL[False] - LAUNCH), rel=0.01)


def test_a_host_that_reads_a_result_starts_late() -> None:
    late = play(trace(operation(LONG), Wait(None), operation(SHORT)), H100)
    assert sum(late.idle.values()) == pytest.approx(SYNC + 2 * CALL[False] - LAUNCH, rel=0.01)


def test_collectives_hide_behind_what_is_computed_meanwhile() -> None:
    size = int(0.5 * H100.link * H100.reached * 8 / 7 / 2)  # half a second
    later = Collective("all-reduce", parts.GRADIENTS, size, 8, later=True)
    back = operation(LONG, backward=True)
    hidden = play(trace(later, back, operation(SHORT, parts.OPTIMIZER)), H100)
    assert sum(hidden.exposed.values()) == 0
    assert hidden.hidden == pytest.approx(0.5 + COLLECTIVE, rel=0.01)
    seen = play(trace(back, later, operation(SHORT, parts.OPTIMIZER)), H100)
    assert seen.exposed[parts.GRADIENTS] == pytest.approx(0.5, rel=0.01)
    assert seen.step == pytest.approx(1.5, rel=0.01)
    at_once = play(trace(replace(later, later=False), back), H100)
    assert at_once.exposed[parts.GRADIENTS] == pytest.approx(0.5, rel=0.01)


def test_parts_add_up_to_the_step() -> None:
    config = MoCoConfig(backbone="small_resnet16", queue_size=64)
    times = play(trace_step(config, 8, 8, torch.bfloat16, size=32), DEVICES["h100"])
    names = {*times.busy, *times.idle, *times.exposed}
    assert sum(map(times.of, names)) == pytest.approx(times.step)
    assert names >= {*parts.NETWORK, parts.LOSS, parts.MOMENTUM, parts.QUEUE, parts.OPTIMIZER, parts.GRADIENTS}


def test_operations_of_a_resnet50() -> None:
    recorded = trace_step(MoCoConfig(), 8, 4, torch.bfloat16, settled=False)
    flops = {
        (part, back): sum(e.work.flops for e in recorded.events if isinstance(e, Operation)
                          and (e.part, e.backward) == (part, back)) / 4e9
        for part, back in ((parts.BACKBONE, False), (parts.BACKBONE, True), (parts.MOMENTUM_BACKBONE, False))
    }  # fmt: skip
    assert flops[parts.BACKBONE, False] == pytest.approx(2 * 4.089, rel=0.01)  # 4.09 G multiply-adds an image
    assert flops[parts.MOMENTUM_BACKBONE, False] == flops[parts.BACKBONE, False]
    # Twice as many, but for the images, which need no gradient.
    assert flops[parts.BACKBONE, True] == pytest.approx(2 * flops[parts.BACKBONE, False], rel=0.03)
    loss = [e.work.flops for e in recorded.events if isinstance(e, Operation) and e.name.startswith("info_nce")]
    assert loss == [4.0 * 4 * 128 * 65536]


def test_compiling_saves_bytes_and_calls() -> None:
    recorded = trace_step(MoCoConfig(), 1, 8, torch.bfloat16, settled=False)
    eager, compiled = play(recorded, DEVICES["h100"]), play(recorded, DEVICES["h100"], compiled=True)
    assert sum(compiled.busy.values()) < sum(eager.busy.values())
    assert sum(compiled.idle.values()) < sum(eager.idle.values())


@pytest.mark.slow
@pytest.mark.parametrize("one", RATES, ids=lambda one: f"{one.what}, {one.gpus} {one.device.title}")
def test_published_speeds(one) -> None:  # type: ignore[no-untyped-def]
    rate = one.batch * one.gpus / predict(one).step
    assert 0.8 < rate / one.rate < 1.55


def test_devices_are_found_by_name() -> None:
    assert find_device("A100") is DEVICES["a100-80"]
    with pytest.raises(ValueError, match="unknown device 'h10': did you mean h100"):
        find_device("h10")
    with pytest.raises(ValueError, match=r"unknown device 'tpu'.*known are a100-40, a100-80"):
        find_device("tpu")
    for device in DEVICES.values():
        assert device.source and device.half >= device.tf32 >= device.float32
