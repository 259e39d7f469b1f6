"""MoCo against a literal transcription of its paper's Algorithm 1."""

import copy

import pytest
import torch
from torch import Tensor, nn

from fastssl.errors import FastsslError
from fastssl.methods import BYOL, MoCo
from fastssl.models import SplitBatchNorm2d, create_backbone

STEPS, N, K, DIM, M, T, LR = 20, 8, 20, 6, 0.9, 0.2, 0.05


class Tiny(nn.Sequential):
    """A convolution, batch norm and pooling: 5 features."""

    num_features = 5

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def views() -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(5)
    return [tuple(torch.randn(N, 3, 6, 6, generator=draw, dtype=torch.float64) for _ in "qk") for _ in range(STEPS)]  # type: ignore[misc]


def algorithm_1(
    f_q: nn.Module, f_k: nn.Module, queue: list[Tensor], loader: list[tuple[Tensor, Tensor]]
) -> list[float]:
    """Algorithm 1 of arXiv:1911.05722, line by line; the queue is a list of keys, oldest first."""
    optimizer = torch.optim.SGD(f_q.parameters(), LR, momentum=0.9)
    losses = []
    for x_q, x_k in loader:
        q = f_q(x_q)  # queries: NxC
        with torch.no_grad():
            k = f_k(x_k)  # keys: NxC
        q, k = q / q.norm(dim=1, keepdim=True), k / k.norm(dim=1, keepdim=True)
        k = k.detach()  # no gradient to keys
        # positive logits: Nx1
        l_pos = torch.bmm(q.view(N, 1, DIM), k.view(N, DIM, 1)).view(N, 1)
        # negative logits: NxK
        l_neg = torch.mm(q.view(N, DIM), torch.stack(queue).T)
        # logits: Nx(1+K)
        logits = torch.cat([l_pos, l_neg], dim=1)
        # contrastive loss, Eqn.(1); positives are the 0-th
        labels = torch.zeros(N, dtype=torch.long)
        loss = nn.CrossEntropyLoss()(logits / T, labels)
        # SGD update: query network
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        # momentum update: key network
        for p_k, p_q in zip(f_k.parameters(), f_q.parameters(), strict=True):
            p_k.data = M * p_k.data + (1 - M) * p_q.data
        # update dictionary
        queue.extend(k)  # enqueue the current minibatch
        del queue[: len(queue) - K]  # dequeue the earliest minibatch
        losses.append(loss.item())
    return losses


def make(**options: object) -> MoCo:
    torch.manual_seed(0)
    settings: dict[str, object] = {"dim": DIM, "queue_size": K, "momentum": M, "temperature": T, **options}
    return MoCo(Tiny(), **settings).double()  # type: ignore[arg-type]


def rows(method: MoCo) -> Tensor:
    """The queue, oldest first."""
    return method.queue.keys.roll(-int(method.queue.tail), 0)


def train(method: MoCo | BYOL, loader: list[tuple[Tensor, Tensor]], momentum: float = 0.9) -> list[float]:
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], LR, momentum)
    losses = []
    for pair in loader:
        loss = method(pair)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        method.after_step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("head", ["fc", "mlp"])
def test_twenty_steps_equal_algorithm_1(head: str) -> None:
    method = make(head=head)
    f_q, f_k = copy.deepcopy(method.encoder_q), copy.deepcopy(method.encoder_k)
    queue = list(method.queue.keys.clone())  # K is no multiple of N: the ring wraps in mid-batch
    expected = algorithm_1(f_q, f_k, queue, views())
    losses = train(method, views())
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 1e-10
    for ours, theirs in ((method.encoder_q, f_q), (method.encoder_k, f_k)):
        for p, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert (p - other).abs().max() < 1e-10
    assert (rows(method) - torch.stack(queue)).abs().max() < 1e-10


def test_split_batch_norm_is_that_of_simulated_gpus() -> None:
    """Both encoders normalise each part by itself, the key's batch permuted first and its keys put back in order."""
    method = make(bn_splits=2)
    f_q, f_k = make().encoder_q, make().encoder_k
    f_q.load_state_dict(method.encoder_q.state_dict())
    f_k.load_state_dict(method.encoder_k.state_dict())
    order = torch.Generator().manual_seed(0)  # the method's own seed

    def parts(network: nn.Module, x: Tensor) -> Tensor:
        return torch.cat([network(half) for half in x.chunk(2)])

    optimizer = torch.optim.SGD(f_q.parameters(), LR)
    mine = torch.optim.SGD(method.encoder_q.parameters(), LR)
    for x_q, x_k in views():
        permutation = torch.randperm(N, generator=order)
        q = nn.functional.normalize(parts(f_q, x_q))
        with torch.no_grad():
            k = nn.functional.normalize(parts(f_k, x_k[permutation])[permutation.argsort()])
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ rows(method).T], 1) / T
        loss = nn.functional.cross_entropy(logits, torch.zeros(N, dtype=torch.long))
        ours = method((x_q, x_k))
        assert abs(loss.item() - ours.item()) < 1e-10
        for value, optim in ((loss, optimizer), (ours, mine)):
            optim.zero_grad()
            value.backward()
            optim.step()
        for p_k, p_q in zip(f_k.parameters(), f_q.parameters(), strict=True):
            p_k.data = M * p_k.data + (1 - M) * p_q.data
        method.after_step()
    for p, other in zip(method.encoder_k.parameters(), f_k.parameters(), strict=True):
        assert (p - other).abs().max() < 1e-10


def test_symmetric_adds_both_directions_and_enqueues_both() -> None:
    x1, x2 = views()[0]
    one, other, both = make(), make(), make(symmetric=True)
    total = one((x1, x2)) + other((x2, x1))
    assert torch.allclose(both((x1, x2)), total, atol=1e-12)
    both.after_step()
    assert int(both.queue.tail) == 2 * N % K


def test_forward_changes_neither_parameters_nor_queue() -> None:
    method = make()
    before = {k: v.clone() for k, v in method.state_dict().items() if isinstance(v, Tensor)}
    method(views()[0])
    after = method.state_dict()
    changed = {k for k, v in before.items() if not torch.equal(v, after[k])}
    assert all("running" in k or "num_batches" in k or k == "_extra_state" for k in changed)


def test_accumulated_micro_batches_are_all_enqueued() -> None:
    method = make()
    for pair in views()[:2]:
        method(pair).backward()
    method.after_step()
    assert int(method.queue.tail) == 2 * N
    method.after_step()  # nothing is enqueued twice
    assert int(method.queue.tail) == 2 * N


@pytest.mark.parametrize("autocast", [False, True])
def test_a_half_queue_gives_the_same_loss_but_for_rounding(autocast: bool) -> None:
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        method = MoCo(Tiny(), dim=16, queue_size=K, temperature=T, queue_dtype=dtype)
        assert method.queue.keys.dtype == dtype
        view_q, view_k = (view.float() for view in views()[0])
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = method([view_q, view_k])
        loss.backward()
        method.after_step()
        assert loss.dtype == torch.float32
        losses.append(float(loss.detach()))
    assert losses[0] != losses[1] and abs(losses[0] - losses[1]) < 0.02 * losses[0]


def test_a_validation_loss_leaves_no_keys() -> None:
    method = make().eval()
    with torch.no_grad():
        method(views()[0])
    method.after_step()
    assert int(method.queue.tail) == 0


def test_no_gradient_reaches_the_key_encoder() -> None:
    method = make()
    method(views()[0]).backward()
    assert all(p.grad is None and not p.requires_grad for p in method.encoder_k.parameters())
    assert all(p.grad is not None for p in method.encoder_q.parameters())


def test_permutations_resume() -> None:
    method, resumed = make(bn_splits=2), make(bn_splits=2)
    train(method, views()[:3])
    resumed.load_state_dict(method.state_dict())
    assert torch.equal(method(views()[4]), resumed(views()[4]))


def test_a_torchvision_network_needs_no_preparation() -> None:
    import torchvision

    method = MoCo(torchvision.models.resnet18(), queue_size=16)
    assert method([torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32)]).isfinite()


def test_bn_splits_replaces_every_batch_norm() -> None:
    method = MoCo(create_backbone("small_resnet16"), queue_size=16, bn_splits=4)
    norms = [m for m in method.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert all(isinstance(m, SplitBatchNorm2d) for m in norms)
    with pytest.raises(FastsslError, match="batch of 6"):
        method([torch.randn(6, 3, 32, 32)] * 2)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"head": "cnn"}, "'cnn'"),
        ({"momentum": 1.0}, r"1\.0"),
        ({"temperature": 0.0}, r"0\.0"),
        ({"queue_size": 0}, "0"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], named: str) -> None:
    with pytest.raises(FastsslError, match=named):
        make(**options)
