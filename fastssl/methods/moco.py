"""MoCo v1 (arXiv:1911.05722) and v2 (arXiv:2003.04297): a queue of keys from a momentum encoder."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastssl import ops
from fastssl.errors import FastsslError
from fastssl.methods.momentum import keep_buffers_local, momentum_copy
from fastssl.models import feature_dim, moco_head, split_batch_norms


class MoCo(nn.Module):
    """Momentum contrast: a query must find its key among the keys of earlier batches.

    v1 is ``head="fc", temperature=0.07``; v2 is ``head="mlp", temperature=0.2`` with its own augmentation.

    Args:
        backbone: images N×3×H×W to features N×F (`fastssl.models.create_backbone`, a torchvision ResNet, a timm model).
        dim: D, components of queries and keys.
        queue_size: K, keys held; no multiple of the batch is needed.
        queue_dtype: of the keys. Under autocast to the same half dtype the loss multiplies half queries and keys, as
            the authors' formula does there, and sums in float32; otherwise queries stay float32.
        momentum: m of the key encoder's update.
        temperature: T of the loss.
        head: "fc" or "mlp".
        symmetric: also take the second view as the query and add the two losses (the authors' CIFAR notebook).
        bn_splits: compute batch norm over so many parts of the batch, which stands for as many GPUs on one.
        seed: of the queue's random rows and of the permutations of shuffle-BN; the same on all ranks.

    Attributes:
        encoder_q, encoder_k: backbone and projector; queue: the `fastssl.ops.KeyQueue`; embeddings: the queries and
            the keys of the last training batch, each N×D, without gradient.

    Raises:
        FastsslError: a value outside its range.

    Example:
        >>> from fastssl.models import create_backbone
        >>> method = MoCo(create_backbone("small_resnet16"), queue_size=1024)
        >>> loss = method([torch.randn(8, 3, 32, 32), torch.randn(8, 3, 32, 32)])
        >>> loss.backward()  # then optimizer.step(), and
        >>> method.after_step()
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        dim: int = 128,
        queue_size: int = 65536,
        queue_dtype: torch.dtype = torch.float32,
        momentum: float = 0.999,
        temperature: float = 0.07,
        head: str = "mlp",
        symmetric: bool = False,
        bn_splits: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if head not in ("fc", "mlp"):
            raise FastsslError(f"head must be 'fc' (v1) or 'mlp' (v2), got {head!r}")
        if not 0 <= momentum < 1:
            raise FastsslError(f"momentum must be at least 0 and below 1, got {momentum}")
        if not temperature > 0:
            raise FastsslError(f"temperature must be above 0, got {temperature}")
        self.momentum, self.temperature, self.symmetric = momentum, temperature, symmetric
        projector = moco_head(feature_dim(backbone), dim, head)
        encoder = nn.Sequential(OrderedDict(backbone=split_batch_norms(backbone, bn_splits), projector=projector))
        self.encoder_q = encoder
        self.encoder_k = momentum_copy(encoder)
        self.queue = ops.KeyQueue(queue_size, dim, dtype=queue_dtype, generator=torch.Generator().manual_seed(seed))
        self._generator = torch.Generator().manual_seed(seed)
        self._stash: list[Tensor] = []
        self.embeddings: tuple[Tensor, Tensor] | None = None
        keep_buffers_local(self)

    @property
    def backbone(self) -> nn.Module:
        """The query encoder's backbone: what the training is for."""
        return self.encoder_q.backbone  # type: ignore[return-value]

    @property
    def momentum_pair(self) -> tuple[nn.Module, nn.Module]:
        """The network that the momentum update moves, and the one that it follows."""
        return self.encoder_k, self.encoder_q

    def forward(self, views: Sequence[Tensor]) -> Tensor:
        """The contrastive loss of two views of the same images; the keys wait for `after_step`.

        Args:
            views: two batches, each N×3×H×W.
        """
        if len(views) != 2:
            raise FastsslError(f"MoCo takes two views of each image, got {len(views)}")
        view_q, view_k = views
        loss = self._contrast(view_q, view_k)
        if self.symmetric:
            loss = loss + self._contrast(view_k, view_q)
        return loss

    @torch.no_grad()
    def after_step(self) -> None:
        """To be called after ``optimizer.step()``: momentum update, then enqueue, as in the paper's Algorithm 1."""
        ops.ema_update_(self.encoder_k.parameters(), self.encoder_q.parameters(), self.momentum)
        for keys in self._stash:
            self.queue.enqueue_(keys)
        self._stash.clear()

    def skip_step(self) -> None:
        """To be called instead of `after_step` when no step was made: its keys are forgotten."""
        self._stash.clear()

    def _contrast(self, view_q: Tensor, view_k: Tensor) -> Tensor:
        if self.training:
            # Shuffle-BN: a key must not share its batch statistics with its query, or they give it away.
            shuffled, handle = ops.shuffle_batch(view_k, generator=self._generator)  # under way while q is computed
            q = self.encoder_q(view_q)  # queries: N×D
            handle.wait()
            with torch.no_grad():
                # keys: N×D, and those of all ranks for the queue
                k, everyone = ops.unshuffle_and_gather(self.encoder_k(shuffled), handle)
            self._stash.append(everyone)
            self.embeddings = q.detach(), k
        else:  # a validation loss leaves no keys behind
            q = self.encoder_q(view_q)  # queries: N×D
            with torch.no_grad():
                k = self.encoder_k(view_k)  # keys: N×D
        keys = self.queue.keys
        dtype = torch.promote_types(q.dtype, keys.dtype)  # half if both are, as under autocast with a half queue
        q, k = q.to(dtype), k.to(dtype)
        return ops.info_nce(q, k, keys, self.temperature, negatives_normalized=True, valid=self.queue.valid)

    def get_extra_state(self) -> Any:
        """The state of the permutations, so that a resumed run goes on with the same ones."""
        return self._generator.get_state()

    def set_extra_state(self, state: Any) -> None:
        """Restore what `get_extra_state` gave."""
        self._generator.set_state(state.cpu())
