"""Whether all processes hold the same: their networks and queues are never sent, but computed by each from the same."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastssl.engine.team import Team
from fastssl.errors import FastsslError

CHUNK = 2**22  # numbers at a time: each takes 8 bytes while it is added


@torch.no_grad()
def fingerprint(tensors: Iterable[Tensor]) -> list[int]:
    """A number for each tensor, of its bits and their places; equal tensors have equal ones. Waits for the device once.

    Unequal ones have equal numbers with a chance of about 2⁻⁶⁴, if they do not differ on purpose.
    """
    sums = [_weighed(tensor) for tensor in tensors]
    return torch.stack(sums).tolist() if sums else []


def _weighed(tensor: Tensor) -> Tensor:
    """Σᵢ bitsᵢ·wᵢ modulo 2⁶⁴ with odd weights wᵢ, so that no single bit can change unseen."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    flat = tensor.detach().contiguous().reshape(-1).view(words)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(flat), CHUNK):
        part = flat[start : start + CHUNK].long()
        place = torch.arange(start, start + len(part), device=part.device)
        total += (part * (place * 0x5851F42D4C957F2D | 1)).sum()  # Knuth's multiplier spreads neighbouring places
    return total


def check(team: Team, method: Any, step: int) -> None:
    """Compare the parameters and the queue of all processes.

    Raises:
        RuntimeError: they differ; a restart from the newest checkpoint makes them equal again.
    """
    if team.world == 1:
        return
    named = dict(method.named_parameters())
    named |= {name: buffer for name, buffer in method.named_buffers() if name.startswith("queue.")}
    rows = team.gather(fingerprint(named.values()))
    for rank, row in enumerate(rows):
        if row != rows[0]:
            name = next(name for name, one, other in zip(named, row, rows[0], strict=True) if one != other)
            raise RuntimeError(
                f"at step {step} process {rank} holds another {name} than process 0: a broken GPU or link, or a method "
                "that computes something else on each process; go on from the checkpoint before it with --resume auto"
            )


def check_start(team: Team, config: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    """Compare what all processes are to do, and what they read.

    Raises:
        FastsslError: they have other options, see other images, or make other views.
    """
    for rank, (options, there) in enumerate(team.gather((dict(config), dict(data)))):
        for name, value in config.items():
            if options[name] != value:
                raise FastsslError(
                    f"process {rank} has {name} {options[name]}, process {team.rank} has {value}: start all of them "
                    "with the same options; a recipe that is not fastssl's must be a file that all can read"
                )
        if there != data:
            raise FastsslError(
                f"process {rank} reads {there['images']} images with {there['loader']}, process {team.rank} "
                f"{data['images']} with {data['loader']}: all need the same --data and the same software"
            )
