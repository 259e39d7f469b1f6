"""BYOL as lightly's documentation writes it (docs.lightly.ai, examples/byol): heads, loss, momentum and its schedule.

Network, first weights and numbers are those of our recipe. Otherwise than in ours, its heads have no bias before batch
norm, where it does nothing, and one in the last layer, which begins at zero here.
"""

import copy

import torch
from lightly.loss import NegativeCosineSimilarity
from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
from lightly.models.utils import deactivate_requires_grad, get_weight_decay_parameters, update_momentum
from lightly.utils.lars import LARS
from lightly.utils.scheduler import cosine_schedule
from torch import Tensor, nn

from benchmarks.lightly_sides import CPU
from fastssl.engine.config import BYOLConfig
from fastssl.engine.device import autocast_dtype
from fastssl.methods import BYOL


class LightlyBYOL(nn.Module):
    """The two networks as lightly's example has them.

    Args:
        method: whose network, heads and weights to take.
        config: its configuration.
    """

    def __init__(self, method: BYOL, config: BYOLConfig) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(method.backbone)
        features: int = self.backbone.num_features  # type: ignore[assignment]
        self.projection_head = BYOLProjectionHead(features, config.hidden_dim, config.projection_dim)
        self.prediction_head = BYOLPredictionHead(config.projection_dim, config.hidden_dim, config.projection_dim)
        _take(self.projection_head, method.online.projector)  # type: ignore[arg-type]
        _take(self.prediction_head, method.predictor)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)

    def forward(self, x: Tensor) -> Tensor:
        return self.prediction_head(self.projection_head(self.backbone(x).flatten(start_dim=1)))

    def forward_momentum(self, x: Tensor) -> Tensor:
        return self.projection_head_momentum(self.backbone_momentum(x).flatten(start_dim=1)).detach()


class LightlyBYOLStep:
    """One step as in lightly's example, with the momentum's schedule of its ImageNet benchmark, by steps.

    Args:
        config: of the training.
        method: whose weights to begin with.
        total_steps: of the training.
        tuned: compute in channels_last, and in bfloat16 where the device has it.
        device: of the step.
    """

    def __init__(
        self, config: BYOLConfig, method: BYOL, total_steps: int, tuned: bool = False, device: torch.device = CPU
    ) -> None:
        self.config, self.total_steps, self.device, self.number = config, total_steps, device, 0
        self.order = torch.channels_last if tuned else torch.contiguous_format
        self.dtype = autocast_dtype("auto", device) if tuned else None
        self.model = LightlyBYOL(method, config).to(device).to(memory_format=self.order)
        self.criterion = NegativeCosineSimilarity()
        model = self.model
        decayed, others = get_weight_decay_parameters([model.backbone, model.projection_head, model.prediction_head])
        groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        kind = LARS if config.optimizer == "lars" else torch.optim.SGD
        self.optimizer = kind(
            groups, lr=config.lr, momentum=config.optimizer_momentum, weight_decay=config.weight_decay
        )

    def __call__(self, views: list[Tensor], rate: float) -> Tensor:
        """Make one step with the learning rate `rate`; returns the loss."""
        model = self.model
        x0, x1 = (view.to(self.device, non_blocking=True, memory_format=self.order) for view in views)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # With ours, which updates after the step: τ(k) of the step before, and 1 at step K, not at K - 1.
        momentum = cosine_schedule(max(0, self.number - 1), self.total_steps + 1, self.config.base_momentum, 1.0)
        update_momentum(model.backbone, model.backbone_momentum, m=momentum)
        update_momentum(model.projection_head, model.projection_head_momentum, m=momentum)
        with torch.autocast(self.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            p0, z0 = model(x0), model.forward_momentum(x0)
            p1, z1 = model(x1), model.forward_momentum(x1)
        # Theirs is half of (-cos - cos); the paper's, which the recipe's learning rate is for, 2 - 2cos and 2 - 2cos.
        loss = 4 + 4 * 0.5 * (self.criterion(p0.float(), z1.float()) + self.criterion(p1.float(), z0.float()))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.number += 1
        return loss.detach()


@torch.no_grad()
def _take(head: BYOLProjectionHead, ours: nn.Sequential) -> None:
    """Our weights; the bias that ours has not begins at zero."""
    first, norm, _, last = head.layers
    first.weight.copy_(ours[0].weight)
    norm.load_state_dict(ours[1].state_dict())
    last.weight.copy_(ours[3].weight)
    last.bias.zero_()
