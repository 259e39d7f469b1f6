"""InfoNCE, forward and backward: against a queue, as MoCo has it, and against the other keys of the batch.

What peers compute otherwise stands beside them below. Their losses and gradients are first asserted to agree with those
of the authors' formula, except where `differs` says that another set of negatives is meant.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from itertools import chain
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import peers
from benchmarks.apart_ops import on_cpu_apart
from benchmarks.sides import DEVICES, Case, Side, grid
from fastssl.ops import info_nce

pytestmark = pytest.mark.together("ops")

TEMPERATURE = 0.07
N, D, K = 256, 128, 65536  # MoCo's: batch of a GPU's share, dim, queue
Step = Callable[[], tuple[Tensor, ...]]


def authors(query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
    """The formula of the authors' builder.py, with the loss of their main_moco.py."""
    query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
    l_pos = torch.einsum("nc,nc->n", query, key).unsqueeze(-1)
    l_neg = torch.einsum("nc,ck->nk", query, queue.T)
    logits = torch.cat([l_pos, l_neg], dim=1) / TEMPERATURE
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device=query.device))


def authors_in_batch(query: Tensor, key: Tensor) -> Tensor:
    """Likewise with the keys of the batch, as MoCo v3 has it."""
    query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
    return F.cross_entropy(query @ key.T / TEMPERATURE, torch.arange(len(query), device=query.device))


def inputs(case: Case) -> list[Tensor]:
    """Query and key; with a K, the queue too, whose rows are normalised."""
    draw = torch.Generator().manual_seed(0)
    in_batch = "K" not in dict(case.axes)
    query, key = (torch.randn(case["N"], case["D"], generator=draw).to(case.device, case.dtype) for _ in "qk")
    if in_batch:
        return [query.requires_grad_(), key.requires_grad_()]
    queue = torch.randn(case["K"], case["D"], generator=draw)
    return [query.requires_grad_(), key, F.normalize(queue).to(case.device, case.dtype)]


def backward_of(loss: Callable[..., Tensor], given: list[Tensor]) -> Step:
    """One step: the loss, and its gradient to what asks for one."""
    leaves = [x for x in given if x.requires_grad]

    def step() -> tuple[Tensor, ...]:
        value = loss(*given)
        return value.detach(), *torch.autograd.grad(value, leaves)

    return step


def plain(loss: Callable[..., Tensor], case: Case) -> Step:
    return backward_of(loss, inputs(case))


def compiled(loss: Callable[..., Tensor], case: Case) -> Step:
    # Not dynamic: the second shape would be compiled for any shape.
    return backward_of(torch.compile(loss, dynamic=False), inputs(case))


def package(case: Case) -> Step:
    theirs = peers.peer("info_nce", "info-nce-pytorch").info_nce
    return backward_of(lambda q, k, queue=None: theirs(q, k, queue, temperature=TEMPERATURE), inputs(case))


def lightly(case: Case) -> Step:
    loss = peers.peer("lightly.loss", "lightly").NTXentLoss(TEMPERATURE, memory_bank_size=(case["K"], case["D"]))
    query, key, queue = inputs(case)
    loss = loss.to(case.device)
    loss.memory_bank.bank = queue.clone()
    return backward_of(loss, [query, key])


def metric_learning(case: Case) -> Step:
    losses = peers.peer("pytorch_metric_learning.losses", "pytorch-metric-learning")
    query, key, queue = inputs(case)
    n, k = case["N"], case["K"]
    memory = losses.CrossBatchMemory(losses.NTXentLoss(TEMPERATURE), case["D"], k)
    memory.embedding_memory, memory.label_memory = queue.clone(), torch.arange(k, device=case.device) + n
    memory.has_been_filled = True
    labels = torch.arange(n, device=case.device).repeat(2)
    new = torch.arange(2 * n, device=case.device) >= n  # the keys are stored, the queries compared

    def loss(query: Tensor, key: Tensor) -> Tensor:
        memory.queue_idx = 0  # the same rows are replaced each time: else they would hold ever more positives
        value: Tensor = memory(torch.cat([query, key]), labels, enqueue_mask=new)
        return value

    return backward_of(loss, [query, key])


def metric_learning_in_batch(case: Case) -> Step:
    loss = peers.peer("pytorch_metric_learning.losses", "pytorch-metric-learning").NTXentLoss(TEMPERATURE)
    labels = torch.arange(case["N"], device=case.device)
    others = labels.clone()  # told to be one tensor, it takes the queries for their own keys and finds no pair
    return backward_of(lambda q, k: loss(q, labels, ref_emb=k, ref_labels=others), inputs(case))


def products(case: Case) -> Step:
    """(A Qᵀ) Q."""
    query, _, queue = (x.detach() for x in inputs(case))
    return lambda: ((query @ queue.T) @ queue,)


def inf_cl(case: Case) -> Step:
    loss = peers.peer("inf_cl").cal_flash_loss  # its kernels take normalised rows

    def normalised(query: Tensor, key: Tensor) -> Tensor:
        query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
        return loss(query, key, scale=1 / TEMPERATURE, head_dim=min(256, query.shape[1])).mean()

    return backward_of(normalised, inputs(case))


def memeff(case: Case) -> Step:
    # A margin of 2 drops no negative; `stable` would scale the gradients.
    loss = peers.peer("memeff").MemoryEfficientQwen3Loss(temperature=TEMPERATURE, margin=2.0, stable=False)
    return backward_of(loss, inputs(case))


def ours(query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
    return info_nce(query, key, queue, TEMPERATURE, negatives_normalized=True)


def ours_in_batch(query: Tensor, key: Tensor) -> Tensor:
    return info_nce(query, key, temperature=TEMPERATURE)


@lru_cache(maxsize=1)
def expected(case: Case) -> tuple[Tensor, ...]:
    """The authors' formula on the same numbers in float32 (in float64 the largest would take gigabytes)."""
    given = [x.detach().float().requires_grad_(x.requires_grad) for x in inputs(case)]
    return backward_of(authors if len(given) == 3 else authors_in_batch, given)()


def check(case: Case, result: tuple[Tensor, ...]) -> None:
    """Loss and gradients; half precision within its rounding."""
    tolerance = {"bfloat16": 3e-2, "float32": 1e-3 if case.device == "cuda" else 1e-4}[case["dtype"]]
    for one, right in zip(result, expected(case), strict=True):
        torch.testing.assert_close(one.float(), right, rtol=tolerance, atol=tolerance * float(right.abs().max()))


def is_base(case: Case) -> bool:
    """The shape at which everybody is measured; the others show how the time grows."""
    return case["dtype"] == "float32" and (case["N"], case["D"]) == (N, D) and case["K"] in (4096, K)


def is_mocos(case: Case) -> bool:
    """Compiling takes many seconds a shape."""
    return (case["N"], case["D"], case["K"]) == (N, D, K) and (case.device == "cuda" or case["dtype"] == "float32")


def is_small(case: Case) -> bool:
    """pytorch-metric-learning compares every positive pair with every negative one: N times the memory of others."""
    return (case["N"], case["K"], case["dtype"]) == (32, 4096, "float32")


def is_small_in_batch(case: Case) -> bool:
    """Likewise: with N = 256 it takes 0.3 GB, and on a CPU was 213 to 231 times as slow as ours, but once 393."""
    return bool(case["N"] == (128 if case.device == "cpu" else 256))


def is_base_in_batch(case: Case) -> bool:
    return bool(case["N"] == 4096)


def queue_case(device: str, n: int = N, d: int = D, k: int = K, dtype: str = "float32") -> Case:
    width = 4 if dtype == "float32" else 2
    return Case(
        "info_nce", (("N", n), ("D", d), ("K", k), ("dtype", dtype)), device,
        flops=4 * n * d * k,  # two products
        bytes=width * d * (k + 3 * n),  # the queue, both inputs and the gradient once
        quick=k == 4096 and n <= N,
    )  # fmt: skip


def in_batch_case(device: str, n: int, d: int = D, dtype: str = "float32") -> Case:
    width = 4 if dtype == "float32" else 2
    return Case(
        "info_nce in-batch", (("N", n), ("D", d), ("dtype", dtype)), device,
        flops=6 * n * n * d,  # the logits and two gradients
        bytes=width * d * 4 * n,
        quick=n == 1024,
    )  # fmt: skip


def queue_cases(device: str) -> list[Case]:
    """One axis at a time around MoCo's shape, on a CPU around smaller ones; on CUDA in both precisions, and corners."""
    ds = [{"d": d} for d in (64, 256, 512)]
    if device == "cpu":
        # What the pages cost that the authors' code takes anew at every call changes from run to run, for one where
        # a virtual machine gives free pages back to its host. With 0.8 GB it was 4.5 to 6.4 times as slow as ours, with
        # 3 GB 5 to 11 times, and with 0.2 GB (D=64 and 65,536 keys) mostly 7.5 times, but once 20. So only MoCo's own
        # shape needs more than 0.15 GB. Four queries have blocks of 16 MiB with a million keys, which are kept.
        axes = [{"k": k} for k in (4096, 16384, K)]
        axes += [{"n": 32, "k": k} for k in (4096, 16384, K)] + [{"n": 4, "k": k} for k in (K, 262_144, 1_048_576)]
        axes += [{"n": 64}, {"n": 1024, "k": 4096}, *(d | {"k": 16384} for d in ds)]
        return [queue_case("cpu", dtype="float32", **axis) for axis in axes] + [queue_case("cpu", dtype="bfloat16")]
    axes = [{"k": k} for k in (4096, 16384, K, 262_144, 1_048_576)]
    axes += [{"n": n} for n in (32, 64, 128, 1024)] + ds + [{"n": 32, "k": 4096}]
    cases = [queue_case(device, dtype=dtype, **axis) for dtype in ("float32", "bfloat16") for axis in axes]
    corners = [(n, d, k) for n in (32, 1024) for d in (64, 512) for k in (4096, 1_048_576)]
    return cases + [queue_case(device, n, d, k, "bfloat16") for n, d, k in corners]


def in_batch_cases(device: str) -> list[Case]:
    if device == "cpu":
        return [in_batch_case(device, n) for n in (128, 256, 1024, 2048, 4096)]  # 8,192 take 0.8 GB as well
    sizes = (256, 1024, 2048, 4096, 8192, 16384, 32768)
    return [in_batch_case(device, n, dtype=dtype) for dtype in ("float32", "bfloat16") for n in sizes]


ENQUEUES = "also enqueues the keys, into a copy of the bank, whose rows it takes for normalised"
MASKS = "the keys are enqueued first and are each other's negatives too; finds its pairs by labels, as for any loss"


def side(name: str, make: Callable[[Case], Step], **other: Any) -> Side:
    return Side(name, on_cpu_apart(make), **other)


QUEUE_SIDES = (
    side("authors, eager", partial(plain, authors)),
    side("torch.compile", partial(compiled, authors), when=is_mocos),
    side("info-nce-pytorch", package, differs="normalises the queue as well", when=is_base),
    side("lightly", lightly, differs=ENQUEUES, when=is_base),
    side("pytorch-metric-learning", metric_learning, differs=MASKS, agrees=False, when=is_small),
    side("two products alone", products, role="bound", agrees=False),
    side("fastssl", partial(plain, ours), role="ours"),
)
IN_BATCH_SIDES = (
    side("authors, eager", partial(plain, authors_in_batch)),
    side("torch.compile", partial(compiled, authors_in_batch), when=is_base_in_batch),
    side("info-nce-pytorch", package, when=is_base_in_batch),
    side("pytorch-metric-learning", metric_learning_in_batch, when=is_small_in_batch),
    side("inf-cl", inf_cl, differs="computes in float32", when=lambda c: c.device == "cuda"),
    side("memeff", memeff, when=lambda c: c.device == "cuda"),
    side("fastssl", partial(plain, ours_in_batch), role="ours"),
)
GRAPHS = ("authors, eager", "torch.compile", "fastssl")


@pytest.mark.parametrize(
    ("case", "side"), grid(chain.from_iterable(map(queue_cases, DEVICES)), QUEUE_SIDES, check, GRAPHS)
)
def test_queue(turns: Callable[..., None], case: Case, side: Side) -> None:
    turns(case, side)


@pytest.mark.parametrize(
    ("case", "side"), grid(chain.from_iterable(map(in_batch_cases, DEVICES)), IN_BATCH_SIDES, check, GRAPHS)
)
def test_in_batch(turns: Callable[..., None], case: Case, side: Side) -> None:
    turns(case, side)
