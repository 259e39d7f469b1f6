"""One step of a training, on one process or many: forward, backward, optimizer, momentum update, queue."""

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from fastssl.engine.config import Config


class TrainingStep:
    """What happens between a batch and the next.

    With several processes the method's gradients are averaged by DistributedDataParallel, in buckets, while the
    backward pass goes on. A step without finite gradients is left out: nothing moves, no key is enqueued.

    Args:
        config: of the training.
        method: on its device.
        optimizer: of its trainable parameters.
        device: of the step.
        dtype: to autocast to, or None.

    Attributes:
        skipped: steps left out so far; skipped_in_a_row: of them, the latest ones without one in between.
    """

    def __init__(
        self, config: Config, method: Any, optimizer: Optimizer, device: torch.device, dtype: torch.dtype | None
    ) -> None:
        self.config, self.method, self.optimizer, self.device, self.dtype = config, method, optimizer, device, dtype
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
        self.model = self._distributed() if dist.is_initialized() and dist.get_world_size() > 1 else method
        self.skipped = self.skipped_in_a_row = 0

    def __call__(self, views: list[Tensor], rate: float) -> Tensor:
        """Make one step with the learning rate `rate`.

        Args:
            views: this process's part of the batch, each N×3×H×W.
            rate: learning rate.

        Returns:
            The loss of this process's part, without gradient.
        """
        order = torch.channels_last if self.config.channels_last else torch.contiguous_format
        views = [view.to(self.device, non_blocking=True, memory_format=order) for view in views]
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._gradients(views)
        self.scaler.unscale_(self.optimizer)
        if self._finite():
            self.optimizer.step()
            self.method.after_step()
            self.skipped_in_a_row = 0
        else:
            self.method.skip_step()
            _mend_statistics(self.method)
            self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        self.scaler.update()
        return loss

    def backward_seconds(self) -> float:
        """How long this process last took for its own gradients, without the exchange; 0 if it is alone."""
        if not isinstance(self.model, DistributedDataParallel):
            return 0.0
        return float(self.model._get_ddp_logging_data().get("backward_compute_time", 0)) / 1e9

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside the method and the optimizer."""
        counts = {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}
        return {"scaler": self.scaler.state_dict(), **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        if self.scaler.is_enabled() and state["scaler"]:  # empty if the run was in another precision
            self.scaler.load_state_dict(state["scaler"])

    def _distributed(self) -> DistributedDataParallel:
        model = DistributedDataParallel(
            self.method,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            # Its one order of gradients lets it start sooner; `no_sync` and compiled parts do not keep to one.
            static_graph=self.config.accumulate == 1 and not self.config.compile,
        )
        model._set_ddp_runtime_logging_sample_rate(self.config.log_steps)  # for `backward_seconds`
        return model

    def _gradients(self, views: list[Tensor]) -> Tensor:
        """The mean loss over the micro-batches, and its gradients over all processes."""
        count = self.config.accumulate
        losses = []
        for number, part in enumerate(zip(*(view.chunk(count) for view in views), strict=True), 1):
            last = number == count
            with nullcontext() if last or self.model is self.method else self.model.no_sync():
                with torch.autocast(self.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None):
                    loss = self.model(list(part)) / count
                self.scaler.scale(loss).backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def _finite(self) -> bool:
        """Whether a step can be made; the same on all processes, whose gradients are the same."""
        if not self.config.nonfinite_limit and not self.scaler.is_enabled():  # a scaler goes up until they overflow
            return True
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        # Their lengths, as torch takes many times as long to find the largest values on a CPU. A length that overflows
        # counts as not finite: such a step is lost anyhow.
        return bool(torch.stack(torch._foreach_norm(gradients)).isfinite().all())  # waits for the device


@torch.no_grad()
def _mend_statistics(method: nn.Module) -> None:
    """Set running statistics that are no numbers any more back to their start; the next batches move them again."""
    for name, buffer in method.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.nan_to_num_(*[float(name.endswith("var"))] * 3)
