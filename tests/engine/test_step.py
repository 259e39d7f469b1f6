"""One training step: over several processes as over one, in micro-batches, in float16, and left out when not finite."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastssl.engine import agreement
from fastssl.engine.config import BYOLConfig, MoCoConfig
from fastssl.engine.optimizers import make_optimizer
from fastssl.engine.step import TrainingStep
from fastssl.engine.team import Team
from fastssl.errors import FastsslError
from fastssl.methods import BYOL, MoCo
from fastssl.models import create_backbone, sync_batch_norms
from tests import processes
from tests.ops.test_distributed import BATCH, LR, STEPS, make_moco, one_process
from tests.ops.test_distributed import views as moco_views

CPU = torch.device("cpu")


def moco_config(**values: Any) -> MoCoConfig:
    options = {"lr": LR, "weight_decay": 0.0, "precision": "float32", "channels_last": False}
    return MoCoConfig(**{**options, **values})


def byol_config(**values: Any) -> BYOLConfig:
    return BYOLConfig(**{"precision": "float32", "weight_decay": 1e-3, "channels_last": False, **values})


def make_byol() -> BYOL:
    torch.manual_seed(0)
    return BYOL(create_backbone("small_resnet16"), hidden_dim=32, projection_dim=16, total_steps=STEPS)


def byol_views(images: int = 16) -> list[list[Tensor]]:
    draw = torch.Generator().manual_seed(5)
    return [[torch.randn(images, 3, 16, 16, generator=draw) for _ in "ab"] for _ in range(STEPS)]


def stepper(method: nn.Module, config: Any, dtype: torch.dtype | None = None) -> TrainingStep:
    return TrainingStep(config, method, make_optimizer(method, config), CPU, dtype)


def weights(method: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in method.parameters()])


def moco_over(rank: int, world: int, meeting: str) -> None:
    """Losses and queue are those of one process that normalises each rank's part by itself."""
    processes.meet(rank, world, meeting)
    step = stepper(make_moco(), moco_config())
    losses = []
    for batch in moco_views(world):
        losses.append(step([view.chunk(world)[rank] for view in batch], LR))
    everyone = torch.stack(losses)
    dist.all_reduce(everyone)
    expected, method, _ = one_process(world)
    assert (everyone / world - torch.tensor(expected, dtype=torch.float64)).abs().max() < 1e-9
    assert (weights(step.method) - weights(method)).abs().max() < 1e-9
    assert isinstance(step.model, DistributedDataParallel)
    team = Team(CPU, rank, world, control=dist.group.WORLD)
    agreement.check(team, step.method, STEPS)  # the queue is one on all ranks
    if rank == world - 1:
        step.method.queue.keys[3, 1] += 1e-6
    with pytest.raises(RuntimeError, match=rf"at step 7 process {world - 1} holds another queue.keys than process 0"):
        agreement.check(team, step.method, 7)
    assert step.backward_seconds() > 0
    dist.destroy_process_group()


def byol_over(rank: int, world: int, meeting: str) -> None:
    """Batch norm over all processes: the losses and weights of one process with the whole batch."""
    batches = [[view.double() for view in views] for views in byol_views()]  # float32 is chaotic with LARS at this lr
    alone = stepper(make_byol().double(), byol_config())
    expected = torch.stack([alone(views, 0.1) for views in batches])
    processes.meet(rank, world, meeting)
    method = make_byol().double()
    sync_batch_norms(method)
    step = stepper(method, byol_config())
    losses = torch.stack([step([view.chunk(world)[rank] for view in views], 0.1) for views in batches])
    dist.all_reduce(losses)
    assert (losses / world - expected).abs().max() < 1e-9
    assert (weights(method) - weights(alone.method)).abs().max() < 1e-9
    agreement.check(Team(CPU, rank, world, control=dist.group.WORLD), method, STEPS)
    dist.destroy_process_group()


def accumulating(rank: int, world: int, meeting: str) -> None:
    """Two processes with three micro-batches are one process with one batch, where no batch norm tells them apart."""
    processes.meet(rank, world, meeting)
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.ReLU())
    backbone.num_features = 6  # type: ignore[assignment]
    method = MoCo(backbone, dim=4, queue_size=30, momentum=0.9).double()
    step = stepper(method, moco_config(accumulate=3))
    draw = torch.Generator().manual_seed(1)
    for number in range(4):
        views = [torch.randn(12, 3, 2, 2, dtype=torch.float64, generator=draw) for _ in "qk"]
        queue = method.queue.keys.clone()
        with torch.no_grad():
            q, k = method.encoder_q(views[0]), method.encoder_k(views[1])
            from fastssl.ops import info_nce

            loss = info_nce(q, k, queue, 0.07, negatives_normalized=True, valid=method.queue.valid)
        own = step([view.chunk(world)[rank] for view in views], LR)
        dist.all_reduce(own)
        assert abs(own / world - loss) < 1e-12
        assert int(method.queue.tail) == (number + 1) * 12 % 30  # the keys of every micro-batch
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("worker", [moco_over, byol_over])
def test_several_processes_train_as_one(worker: Any, world: int, tmp_path: Path) -> None:
    processes.run(worker, world, world, str(tmp_path / "meeting"))


def test_micro_batches_make_one_step(tmp_path: Path) -> None:
    processes.run(accumulating, 2, 2, str(tmp_path / "meeting"))


class Broken(BYOL):
    """Gives a gradient that is no number whenever it is told to."""

    broken = False

    def forward(self, views: Any) -> Tensor:
        return super().forward(views) * (torch.nan if self.broken else 1.0)


def test_a_step_without_finite_gradients_is_left_out() -> None:
    torch.manual_seed(0)
    method = Broken(create_backbone("small_resnet16"), hidden_dim=32, projection_dim=16, total_steps=STEPS)
    step, views = stepper(method, byol_config()), byol_views()
    step(views[0], 0.1)
    before = weights(method)
    momentum = [state["momentum_buffer"].clone() for state in step.optimizer.state.values()]
    method.broken = True
    views[1][0][0, 0, 0, 0] = torch.inf  # also in the batch norm's statistics
    assert step(views[1], 0.1).isnan()
    step(views[2], 0.1)
    assert torch.equal(weights(method), before)
    assert all(map(torch.equal, momentum, [s["momentum_buffer"] for s in step.optimizer.state.values()]))
    assert all(bool(buffer.isfinite().all()) for buffer in method.buffers())
    assert (step.skipped, step.skipped_in_a_row, int(method.step)) == (2, 2, 3)
    method.broken = False
    step(views[3], 0.1)
    assert (step.skipped, step.skipped_in_a_row) == (2, 0)
    assert not torch.equal(weights(method), before)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_one_value_that_is_not_finite_is_enough(value: float) -> None:
    step, [views, *_] = stepper(make_byol(), byol_config()), byol_views()
    step(views, 0.1)
    assert step.skipped == 0
    before, gradient = weights(step.method), next(p.grad for p in step.method.parameters() if p.grad is not None)
    gradient.view(-1)[-1] = value
    assert not step._finite()
    gradient.view(-1)[-1] = 1.0
    assert step._finite()
    assert torch.equal(weights(step.method), before)


def test_keys_of_a_step_left_out_are_not_enqueued() -> None:
    method = make_moco()
    step = stepper(method, moco_config())
    (x_q, x_k), *_ = moco_views(1)
    before = method.queue.keys.clone()
    step([x_q * torch.nan, x_k], LR)
    step([x_q, x_k], LR)
    assert int(method.queue.tail) == BATCH
    assert bool(method.queue.keys.isfinite().all())
    assert torch.equal(method.queue.keys[BATCH:], before[BATCH:])


def test_without_a_limit_nobody_looks() -> None:
    step = stepper(make_byol(), byol_config(nonfinite_limit=0))
    step([view * torch.nan for view in byol_views()[0]], 0.1)
    assert step.skipped == 0
    assert not bool(weights(step.method).isfinite().all())
    scaled = stepper(
        make_byol(), byol_config(nonfinite_limit=0), torch.float16
    )  # whose scale grows until they overflow
    scaled([view * torch.nan for view in byol_views()[0]], 0.1)
    assert scaled.skipped == 1
    assert bool(weights(scaled.method).isfinite().all())


def test_float16_scales_the_loss_and_restores_its_scaler() -> None:
    """At an overflow the scale halves and the step is left out."""
    views = byol_views()
    wide, half = stepper(make_byol(), byol_config()), stepper(make_byol(), byol_config(), torch.float16)
    assert half.scaler.get_scale() == 2**16
    half.scaler.scale(torch.ones(()))  # which makes its tensors
    half.scaler.update(2.0**8)
    before = weights(half.method)
    assert abs(half(views[0], 0.05) - wide(views[0], 0.05)) < 0.02
    moved, expected = weights(half.method) - before, weights(wide.method) - before
    assert (moved - expected).norm() < 0.2 * expected.norm()  # not scaled
    assert half.skipped == 0
    half.scaler.update(2.0**60)
    before = weights(half.method)
    assert half(views[1], 0.05).isfinite()
    assert (half.skipped, half.scaler.get_scale()) == (1, 2.0**59)
    assert torch.equal(weights(half.method), before)
    other = stepper(make_byol(), byol_config(), torch.float16)
    other.load_state_dict(half.state_dict())
    assert other.scaler.get_scale() == half.scaler.get_scale()
    assert other.skipped == half.skipped


def differently(rank: int, meeting: str) -> None:
    """Options or images that are not the same everywhere are told before anything is trained."""
    processes.meet(rank, 2, meeting)
    team = Team(CPU, rank, 2, control=dist.group.WORLD)
    data = {"images": 3, "loader": "dali"}
    agreement.check_start(team, {"lr": 0.1, "epochs": 3}, data)
    with pytest.raises(FastsslError, match=rf"process {1 - rank} has lr {1.5 - rank}, process {rank} has {0.5 + rank}"):
        agreement.check_start(team, {"lr": 0.5 + rank}, data)
    with pytest.raises(FastsslError, match=rf"process {1 - rank} reads {4 - rank} images with dali, process {rank}"):
        agreement.check_start(team, {}, {**data, "images": 3 + rank})
    dist.destroy_process_group()


def test_processes_that_were_started_differently(tmp_path: Path) -> None:
    processes.run(differently, 2, str(tmp_path / "meeting"))


def test_fingerprints_see_every_bit() -> None:
    x = torch.randn(1000)
    same = agreement.fingerprint([x])
    assert agreement.fingerprint([x.clone(), x[:0]]) == [same[0], 0]
    for place in (0, 1, 999):
        for bit in (0, 15, 31):
            y = x.clone()
            y.view(torch.int32)[place] ^= (1 << bit) - (1 << 32) * (bit == 31)
            assert agreement.fingerprint([y]) != same
    swapped = x.clone()
    swapped[[3, 4]] = swapped[[4, 3]]
    assert agreement.fingerprint([swapped]) != same
    for dtype in (torch.int64, torch.bfloat16, torch.float64, torch.uint8):
        assert len(agreement.fingerprint([torch.ones(3, 2).to(dtype).T])) == 1
