"""A training step's time is split into parts that sum to the whole, on the CPU."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import trace_step
from benchmarks.step_parts import PARTS, QUEUE, SHUFFLE, Ranges
from fastssl import ops
from fastssl.errors import FastsslError

SMALL = ["--device=cpu", "--backbone=small_resnet16", "--batch=8", "--size=32", "--steps=2", "--warm-up=1"]
LIGHT = {"moco": ["--queue_size=256"], "byol": ["--hidden_dim=32"]}


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """What the trainer sets for the process."""
    benchmark, state = torch.backends.cudnn.benchmark, torch.get_rng_state()
    yield
    torch.backends.cudnn.benchmark = benchmark
    torch.set_rng_state(state)


def traced(method: str, folder: Path) -> dict[str, Any]:
    options, others = trace_step.parser().parse_known_args(
        [f"--method={method}", f"--output={folder}", *SMALL, *LIGHT[method]]
    )
    return trace_step.trace(options, others, "a test")


@pytest.mark.parametrize("method", ["moco", "byol"])
def test_parts_sum_to_the_whole(method: str, tmp_path: Path) -> None:
    found = traced(method, tmp_path)
    parts = found["parts"]
    assert list(parts) == list(PARTS)
    assert sum(part["ms"] for part in parts.values()) == pytest.approx(found["total_ms"], rel=0.01)
    assert 0 < found["share_outside_backbone"] < 1
    assert found["steps"] == 2 and found["without_launch_ms"] == 0
    absent = {"byol": {SHUFFLE, QUEUE}, "moco": set()}[method]
    assert {name for name, part in parts.items() if part["ms"] == 0} == absent
    text = trace_step.markdown(found)
    assert f"**Share outside the backbone: {found['share_outside_backbone']:.2%}**" in text.splitlines()[-1]


def test_a_heavy_loss_is_the_losss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = traced("moco", tmp_path)["parts"]
    original = ops.info_nce

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            time.sleep(0.05)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            time.sleep(0.1)
            return gradient.clone()

    monkeypatch.setattr(ops, "info_nce", lambda *args, **kwargs: Slow.apply(original(*args, **kwargs)))
    after = traced("moco", tmp_path)["parts"]
    assert after["loss"]["ms"] >= 150  # forward and backward
    assert after["loss"]["share"] > before["loss"]["share"]


def test_nothing_of_the_hooks_is_left(tmp_path: Path) -> None:
    functions = ops.shuffle_batch, ops.unshuffle_and_gather
    options, others = trace_step.parser().parse_known_args([*SMALL, *LIGHT["moco"]])
    config = trace_step.configuration(options, others)
    step, views = trace_step.make_step(config, torch.device("cpu"), 32)
    ranges = Ranges(step)
    assert ops.shuffle_batch is not functions[0]
    ranges.close()
    assert (ops.shuffle_batch, ops.unshuffle_and_gather) == functions
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in step.method.modules())
    assert "after_step" not in vars(step.method) and "enqueue_" not in vars(step.method.queue)
    step(views, 0.01)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps=0"], "steps must be 1 or more, got 0"),
        (["--device=cpu", "--compile=true"], "compile true cannot be traced"),
        (["--device=cpu", "--queue_sizes=3"], "did you mean --queue_size"),
    ],
)
def test_wrong_options_are_named(arguments: list[str], said: str) -> None:
    with pytest.raises(FastsslError, match=said):
        trace_step.main(arguments)
