"""A training step of MoCo and BYOL: whole, from images to updated queue, and what is computed on ready views.

Each begins from the same weights and queue; `test_same_method.py` shows that ours and lightly's then lose the same.
What lightly does otherwise, without another result:
- The momentum update comes before the forward pass (the authors' code), ours after the optimizer (Algorithm 1): the
  first of lightly's does nothing, and then both have made the same ones when a key is computed.
- Its queue is written while the loss is computed, from a copy that the loss still reads; ours after the step. A batch
  that does not fit the end of its queue is cut; K here is a multiple of the batch.
- Shuffle-BN on one device changes the order of the batch only: not the statistics, but the time. Both do it.
- Its jitter, blur and crop are torchvision's and PIL's, image by image; ours give the same images (color "exact"), and
  erase before the values are normalised, as here. The random numbers differ.
Ours runs as the command line runs it: bfloat16 where the device has it, channels_last. lightly's users get float32;
``lightly, tuned`` is theirs with both.

On the CPU each runs in a process of its own (see `Apart`), with two loader workers or threads for whole steps.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import trace_step
from benchmarks.apart import Apart, ApartCall
from benchmarks.lightly_sides import BareStep, training
from benchmarks.peers import peer
from benchmarks.sides import Case, Side, grid
from fastssl import train
from fastssl.engine.build import build_method

# Not among the ops: with their tensors these fourteen processes need most of a small machine's memory.
pytestmark = pytest.mark.together("steps")

BATCHES = {("MoCo", "demo"): 256, ("BYOL", "demo"): 128}  # of the recipes; else 256
TOTAL_STEPS = 1000  # of the training that a step on CUDA is part of


class Steps(ApartCall):
    """Steps of a training in another process.

    Args:
        case: which.
        name: of the side.
    """

    may_repeat = False  # steps are long

    def __init__(self, case: Case, name: str) -> None:
        self._part, self._count = case["part"], count(case)
        # Several whole steps where they are short: how far a loader is ahead when its turn ends differs.
        self.seconds = 0.8 if self._part == "whole" else 0.3
        super().__init__(Apart(training, name, case["method"].lower(), []))

    def __call__(self) -> float:
        return float(self.peer("run", self._part, self._count))

    def peak_memory(self, device: str) -> int | None:
        """Of that process, in which a step on ready views is made; of whole ones nothing is told."""
        peak: int | None = self.peer("peak_memory") if self._part == "compute" else None
        return peak


def count(case: Case) -> int:
    """Steps a call: of a whole one each of a loader's two workers, which make whole batches, has its turn."""
    return 2 if case["part"] == "whole" else 1


def configuration(case: Case) -> Any:
    """Of the method's ImageNet recipe on one GPU."""
    method = case["method"].lower()
    chosen = [f"--recipe={train.default_recipe(method, 'folder')}", "--gpus=1", "--batch_size=256"]
    # The recipe's 8 parts stand for 8 GPUs; lightly has no such thing.
    return train.parse([method, *chosen, *(["--bn_splits=1"] if method == "moco" else [])])[0]


def on_cuda(case: Case, name: str) -> Callable[[], float]:
    """One step on ready views of 224 pixels, in this process."""
    device, config = torch.device("cuda"), configuration(case)
    ours, views = trace_step.make_step(config, device, 224)  # also lets cuDNN try its algorithms, for everybody
    step: Any = ours
    if name == "bare backbone":
        step = BareStep(ours)
    elif name != "fastssl":
        from benchmarks.lightly_moco import lightly_step

        step = lightly_step(config, build_method(config, TOTAL_STEPS), TOTAL_STEPS, name != "lightly", device)
        views = [view.float().contiguous() for view in views]
    # No host waits for the loss: a training reads it now and then only.
    return lambda: step(views, config.lr)


def side(name: str, **other: Any) -> Side:
    def make(case: Case) -> Callable[[], float]:
        if name.startswith("lightly"):
            peer("lightly")
        return on_cuda(case, name) if case.device == "cuda" else Steps(case, name)

    return Side(name, make, **other)


BIAS = "the momentum update comes first; BYOL's heads have a bias in the last layer"
SIDES = (
    side("lightly", differs=f"float32; {BIAS}"),
    side("lightly, tuned", differs=BIAS),
    side(
        "bare backbone", role="bound", differs="as many passes through the backbone, nothing else", agrees=False,
        when=lambda case: case["part"] == "compute",
    ),
    side("fastssl", role="ours"),
)  # fmt: skip


def case(method: str, setup: str, part: str, device: str = "cpu", quick: bool = False) -> Case:
    axes = (("method", method), ("set-up", setup), ("part", part))
    made = Case("training step", axes, device, unit="images", quick=quick)
    return replace(made, items=count(made) * BATCHES.get((method, setup), 256))


WHOLE = [case("MoCo", "demo", "whole"), case("BYOL", "demo", "whole")]
COMPUTE = [case("MoCo", "demo", "compute", quick=True), case("BYOL", "demo", "compute")]
COMPUTE += [case(method, "ResNet-50, batch 256", "compute", "cuda") for method in ("MoCo", "BYOL")]
LOSSES: dict[Case, float] = {}  # of the first step, by the first side that made one


def check(case: Case, loss: float | torch.Tensor) -> None:
    """On the same views all lose the same at first, up to the precision they compute in."""
    assert float(loss) == pytest.approx(LOSSES.setdefault(case, float(loss)), rel=0.03)


@pytest.mark.parametrize(("case", "side"), grid(WHOLE, SIDES, check=None))
def test_whole(turns: Callable[..., None], case: Case, side: Side) -> None:
    turns(case, side)


@pytest.mark.parametrize(("case", "side"), grid(COMPUTE, SIDES, check))
def test_compute(turns: Callable[..., None], case: Case, side: Side) -> None:
    turns(case, side)
