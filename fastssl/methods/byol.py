"""BYOL (arXiv:2006.07733): predict the target network's projection of another view; no negatives."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastssl import ops
from fastssl.errors import FastsslError
from fastssl.methods.momentum import keep_buffers_local, momentum_copy
from fastssl.models import byol_head, feature_dim
from fastssl.ops.reference import in_float


class BYOL(nn.Module):
    """Bootstrap your own latent: the online network predicts what a slowly moving target sees in the other view.

    Args:
        backbone: images N×3×H×W to features N×F (`fastssl.models.create_backbone`, a torchvision ResNet, a timm model).
        projection_dim: components of projections and predictions.
        hidden_dim: width of the hidden layer of projector and predictor.
        base_momentum: τ₀, the target's momentum at the start; it rises to 1 at the last step.
        total_steps: K, the steps of the whole training.

    Attributes:
        online, target: backbone and projector; predictor; step: steps made so far; embeddings: the online projections
            of both views of the last training batch, each N×D, without gradient.

    Raises:
        FastsslError: a value outside its range.

    Example:
        >>> from fastssl.models import create_backbone
        >>> method = BYOL(create_backbone("small_resnet16"), hidden_dim=512, total_steps=100)
        >>> loss = method([torch.randn(8, 3, 32, 32), torch.randn(8, 3, 32, 32)])
        >>> loss.backward()  # then optimizer.step(), and
        >>> method.after_step()
    """

    step: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        *,
        projection_dim: int = 256,
        hidden_dim: int = 4096,
        base_momentum: float = 0.996,
        total_steps: int,
    ) -> None:
        super().__init__()
        if not 0 <= base_momentum <= 1:
            raise FastsslError(f"base_momentum must lie in 0…1, got {base_momentum}")
        if total_steps < 1:
            raise FastsslError(f"total_steps must be 1 or more, got {total_steps}")
        self.base_momentum, self.total_steps = base_momentum, total_steps
        projector = byol_head(feature_dim(backbone), hidden_dim, projection_dim)
        self.online = nn.Sequential(OrderedDict(backbone=backbone, projector=projector))
        self.target = momentum_copy(self.online)
        self.embeddings: tuple[Tensor, Tensor] | None = None
        self.predictor = byol_head(projection_dim, hidden_dim, projection_dim)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        keep_buffers_local(self)

    @property
    def backbone(self) -> nn.Module:
        """The online network's backbone: what the training is for."""
        return self.online.backbone  # type: ignore[return-value]

    @property
    def momentum_pair(self) -> tuple[nn.Module, nn.Module]:
        """The network that the momentum update moves, and the one that it follows."""
        return self.target, self.online

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        """The symmetrised loss of two views, each N×3×H×W: the sum of both directions, the mean over the batch."""
        if len(views) != 2:
            raise FastsslError(f"BYOL takes two views of each image, got {len(views)}")
        v, v_prime = views
        loss, projections = self._regress(v, v_prime)
        loss_prime, projections_prime = self._regress(v_prime, v)
        if self.training:
            self.embeddings = projections, projections_prime
        return loss + loss_prime

    @torch.no_grad()
    def after_step(self) -> None:
        """To be called after ``optimizer.step()``: move the target with τ(k), k from 0."""
        ops.ema_update_(self.target.parameters(), self.online.parameters(), self.momentum)
        self.step.add_(1)

    def skip_step(self) -> None:
        """To be called instead of `after_step` when no step was made: τ goes on nevertheless."""
        self.step.add_(1)

    @property
    def momentum(self) -> Tensor:
        """τ(k) = 1 - (1-τ₀)·(cos(πk/K)+1)/2, a 0-d float64 tensor; 1 from step K on (section 3.3)."""
        progress = self.step.clamp(max=self.total_steps).double() / self.total_steps
        return 1 - (1 - self.base_momentum) * (torch.cos(torch.pi * progress) + 1) / 2

    def _regress(self, view: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        projections = self.online(view)  # N×D
        q = self.predictor(projections)  # predictions: N×D
        with torch.no_grad():
            z = self.target(other)  # target projections: N×D
        loss = ops.normalized_mse(in_float(q), in_float(z)).mean()  # half under autocast; the loss is not
        return loss, projections.detach()
