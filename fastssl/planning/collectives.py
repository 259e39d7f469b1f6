"""The collectives of a step: what for, of which kind, how many bytes of this rank, among how many."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

KINDS = (
    ("allreduce", "all-reduce"), ("all_reduce", "all-reduce"), ("reduce_scatter", "reduce-scatter"),
    ("allgather", "all-gather"), ("all_gather", "all-gather"), ("alltoall", "all-to-all"),
    ("all_to_all", "all-to-all"), ("exchange_rows", "all-to-all"), ("broadcast", "broadcast"), ("barrier", "barrier"),
)  # fmt: skip
FROM_SECOND = ("allgather_", "_allgather_base_", "_reduce_scatter_base_", "reduce_scatter_", "alltoall_base_")


@dataclass(frozen=True)
class Collective:
    """One of them.

    Attributes:
        kind: all-reduce, all-gather, all-to-all, broadcast, …
        label: what for.
        bytes: that this rank brings.
        world: ranks that take part.
        later: whether its result is waited for later.
    """

    kind: str
    label: str
    bytes: int
    world: int
    later: bool = False


def kind_of(func: Any, args: Any) -> str | None:
    """The kind of collective that an operation is, or None; one process exchanges rows with nobody."""
    namespace, _, name = func._schema.name.partition("::")
    if name.startswith("exchange_rows") and not args[-1]:
        return None
    if namespace == "fastssl" and not name.startswith("exchange_rows"):
        return None
    if namespace not in ("c10d", "_c10d_functional", "fastssl"):
        return None
    return next((kind for start, kind in KINDS if name.lstrip("_").startswith(start)), None)


def own_bytes(func: Any, args: Any) -> int:
    """Bytes that this rank brings."""
    name = func._schema.name.partition("::")[2]
    mine = args[1] if name in FROM_SECOND else args[0]
    return sum(x.numel() * x.element_size() for x in tree_leaves(mine) if isinstance(x, Tensor))


def ranks(args: Any) -> int:
    """Ranks of the group that is named in the arguments of an operation of c10d."""
    for argument in args:
        if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
            return int(dist.ProcessGroup.unbox(argument).size())
    return dist.get_world_size()


def summed(collectives: Iterable[Collective]) -> list[dict[str, Any]]:
    """Count and bytes of those that are alike, as rows of a table."""
    rows: dict[tuple[str, str, int], dict[str, Any]] = {}
    for one in collectives:
        row = rows.setdefault(
            (one.label, one.kind, one.world),
            {"label": one.label, "kind": one.kind, "world": one.world, "count": 0, "bytes": 0},
        )
        row["count"] += 1
        row["bytes"] += one.bytes
    return sorted(rows.values(), key=lambda row: -row["bytes"])
