"""Batch norm over several processes against torch's over all their batches, the conversion, and NVIDIA apex's."""

import copy
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from fastssl.errors import FastsslError
from fastssl.models import SyncBatchNorm, batch_norm_group, create_backbone, split_batch_norms, sync_batch_norms
from fastssl.models.sync_batch_norm import _Normalise, _statistics
from tests import processes

C = 5
NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
BATCHES = {2: ([4, 4], [1, 6], [3, 0]), 3: ([2, 2, 2], [5, 1, 3])}  # rows of each rank


def worker(rank: int, world: int, folder: str) -> None:
    processes.meet(rank, world, f"{folder}/meeting")
    try:
        for batches in BATCHES[world]:
            for shape in ((), (7,), (3, 4), (2, 3, 2)):
                check_equal(rank, batches, shape, torch.float64, 1e-10)
                check_equal(rank, batches, shape, torch.float32, 1e-5)
            check_equal(rank, batches, (3, 4), torch.float64, 1e-10, affine=False, momentum=None)
            check_equal(rank, batches, (3, 4), torch.float64, 1e-10, track_running_stats=False)
            check_equal(rank, batches, (3, 4), torch.float64, 1e-10, layout=torch.channels_last)
        check_offset(rank, world)
        check_half(rank, world)
        check_evaluation(rank)
        check_single_value(rank)
        if world == 3:
            check_groups(rank)
        check_copies()
    finally:
        dist.destroy_process_group()


def everyones(batches: list[int], shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """The values of all ranks, the same on each."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(sum(batches), C, *shape, generator=draw, dtype=torch.float64).to(dtype)


def layers(dims: int, dtype: torch.dtype, group: dist.ProcessGroup | None = None, **options: Any) -> list[nn.Module]:
    """Batch norm as torch has it, and synchronised."""
    torch.manual_seed(1)
    plain = NORMS[dims](C, **options).to(dtype)
    for p in plain.parameters():
        nn.init.normal_(p)
    return [plain, sync_batch_norms(copy.deepcopy(plain), group)]


def check_equal(
    rank: int,
    batches: list[int],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    tolerance: float,
    layout: torch.memory_format = torch.contiguous_format,
    **options: Any,
) -> None:
    """Two steps: values, gradients and running statistics."""
    plain, ours = layers(2 + len(shape), dtype, **options)
    for step in range(2):
        whole = (3 * everyones(batches, shape, dtype, step) + 2).requires_grad_()
        weights = everyones(batches, shape, dtype, 7 + step)
        mine = whole.detach().split(batches)[rank].contiguous(memory_format=layout).requires_grad_()
        expected, got = plain(whole), ours(mine)
        close(got, expected.split(batches)[rank], tolerance)
        assert got.is_contiguous(memory_format=layout)
        (expected * weights).sum().backward()
        (got * weights.split(batches)[rank]).sum().backward()
        assert whole.grad is not None and mine.grad is not None
        close(mine.grad, whole.grad.split(batches)[rank], tolerance)
        assert mine.grad.is_contiguous(memory_format=layout)
    for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        dist.all_reduce(p.grad)
        close(p.grad, q.grad, 10 * tolerance)  # a sum over all values and ranks
    assert ours.state_dict().keys() == plain.state_dict().keys()
    for name, buffer in plain.named_buffers():
        close(ours.get_buffer(name), buffer, tolerance)


def close(a: Tensor, b: Tensor, tolerance: float) -> None:
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert a.numel() == 0 or (a - b).abs().max() < tolerance


def check_offset(rank: int, world: int) -> None:
    """A mean of a thousand deviations costs digits of the values, but none of the variance."""
    batches = [32] * world
    x = everyones(batches, (4, 4), torch.float64, 3) + 1000 + torch.arange(sum(batches)).view(-1, 1, 1, 1) / 100
    _, ours = layers(4, torch.float32)
    ours(x.float().split(batches)[rank])
    expected = 0.9 + 0.1 * x.float().double().var([0, 2, 3])
    assert torch.allclose(ours.get_buffer("running_var").double(), expected, rtol=1e-5)


def check_half(rank: int, world: int) -> None:
    """Statistics are float32, results are the rounded ones of float32; also under autocast, and with half weights."""
    batches = [6] * world
    for dtype in (torch.bfloat16, torch.float16):
        x = everyones(batches, (3, 4), dtype, 5)
        plain, ours = layers(4, torch.float32)
        whole, mine = x.float().requires_grad_(), x.split(batches)[rank].requires_grad_()
        expected = plain(whole).split(batches)[rank]
        with torch.autocast("cpu", dtype):
            got = ours(mine)
        assert got.dtype == dtype
        assert torch.allclose(got, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
        expected.square().sum().backward()
        plain(whole.detach())
        got.float().square().sum().backward()
        assert mine.grad is not None and mine.grad.dtype == dtype
        assert ours.get_buffer("running_mean").dtype == torch.float32
    half = layers(4, torch.bfloat16)[1]
    half(everyones(batches, (3, 4), torch.bfloat16, 5)).sum().backward()
    assert {p.grad.dtype for p in half.parameters() if p.grad is not None} == {torch.bfloat16}


def check_evaluation(rank: int) -> None:
    """Nothing is exchanged: only one rank calls."""
    if rank == 0:
        plain, ours = (layer.eval() for layer in layers(4, torch.float32))
        x = torch.randn(3, C, 2, 2)
        assert torch.equal(ours(x), plain(x))


def check_single_value(rank: int) -> None:
    """One value a rank is enough; one in all of them is an error, as it is of torch."""
    ours = layers(2, torch.float32)[1]
    ours(torch.randn(1, C))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ours(torch.randn(1 if rank == 0 else 0, C))


def check_groups(rank: int) -> None:
    """Statistics stay among the ranks of a group; a rank alone has plain batch norm."""
    with pytest.raises(FastsslError, match="bn_group 2 must divide the number of processes, 3"):
        batch_norm_group(2)
    assert batch_norm_group(0) is None and batch_norm_group(3) is None
    alone = batch_norm_group(1)
    plain, ours = layers(4, torch.float64, alone)
    x = torch.randn(4, C, 2, 2, dtype=torch.float64) + rank
    assert torch.equal(ours(x), plain(x))
    pair = dist.new_group([0, 2])
    if rank != 1:
        assert isinstance(pair, dist.ProcessGroup)
        plain, ours = layers(4, torch.float64, pair)
        whole = everyones([2, 3], (3, 3), torch.float64, 9).requires_grad_()
        mine = whole.detach().split([2, 3])[rank // 2].requires_grad_()
        weights = everyones([2, 3], (3, 3), torch.float64, 10)
        (plain(whole) * weights).sum().backward()
        (copy.deepcopy(ours)(mine) * weights.split([2, 3])[rank // 2]).sum().backward()
        assert whole.grad is not None and mine.grad is not None
        close(mine.grad, whole.grad.split([2, 3])[rank // 2], 1e-10)


def check_copies() -> None:
    """A momentum copy stays in the group, which itself cannot be copied."""
    group = dist.group.WORLD
    norms = nn.Sequential(nn.BatchNorm1d(C))
    sync_batch_norms(norms, group)
    norm: Any = copy.deepcopy(norms)[0]
    assert norm.process_group is group
    assert norm.weight is not norms[0].weight
    norm(torch.randn(3, C))


def four_ranks(rank: int, folder: str) -> None:
    processes.meet(rank, 4, f"{folder}/meeting")
    try:
        group = batch_norm_group(2)
        assert dist.get_process_group_ranks(group) == [rank // 2 * 2, rank // 2 * 2 + 1]
        batches = [2, 3]
        plain, ours = layers(4, torch.float64, group)
        x = everyones(batches, (2, 2), torch.float64, rank // 2)
        close(ours(x.split(batches)[rank % 2]), plain(x).split(batches)[rank % 2], 1e-10)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow  # several processes
@pytest.mark.parametrize("world", BATCHES)
def test_several_processes_are_one(world: int, tmp_path: Path) -> None:
    processes.run(worker, world, world, str(tmp_path))


@pytest.mark.slow  # four processes
def test_groups_are_of_consecutive_ranks(tmp_path: Path) -> None:
    processes.run(four_ranks, 4, str(tmp_path))


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    threads = torch.get_num_threads()
    processes.meet(0, 1, f"{tmp_path}/meeting")
    yield
    dist.destroy_process_group()
    torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [(4, 3), (3, 2, 2, 2)])
def test_gradcheck(shape: tuple[int, ...], one_process: None) -> None:
    def normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        with torch.no_grad():
            mean, squares, count = _statistics(x, None)
        out: Tensor = _Normalise.apply(x, weight, bias, mean, squares / count, count, 1e-5, None)
        return out

    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(shape[1], dtype=torch.float64, requires_grad=True) for _ in "wb")
    assert torch.autograd.gradcheck(normalise, (x, weight, bias))
    assert torch.autograd.gradcheck(lambda x: normalise(x, None, None), x)
    assert torch.autograd.gradcheck(normalise, (x.detach(), weight, bias))


def test_one_process_is_plain_batch_norm(one_process: None) -> None:
    plain, ours = layers(4, torch.float32)
    x = torch.randn(3, C, 2, 2)
    assert torch.equal(ours(x), plain(x))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layers(2, torch.float32)[1](torch.randn(1, C))
    assert batch_norm_group(0) is None and batch_norm_group(1) is None
    with pytest.raises(FastsslError, match="bn_group 8 must divide the number of processes, 1"):
        batch_norm_group(8)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_fake_group_of_fake_tensors_needs_no_values(device: str, momentum: float | None) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=64)
    try:
        group = batch_norm_group(8)
        assert dist.get_world_size(group) == 8
        with FakeTensorMode():
            norm = SyncBatchNorm(C, momentum=momentum, process_group=group, device=device)
            for shape in ((6, C, 4, 4), (1, C)):
                x = torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)
                y = norm(x)
                assert isinstance(y, FakeTensor) and (y.shape, y.dtype, y.device.type) == (x.shape, x.dtype, device)
                if device == "cpu" or torch.cuda.is_available():  # autograd asks for the device
                    y.sum().backward()
                    assert isinstance(x.grad, FakeTensor)
    finally:
        dist.destroy_process_group()


class Net(nn.Sequential):
    def __init__(self) -> None:
        shared = nn.BatchNorm2d(4)
        norms = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm3d(4, eps=1e-3, momentum=None, affine=False))
        super().__init__(nn.Conv2d(3, 4, 3), shared, shared, norms)


def test_conversion_keeps_everything() -> None:
    network = Net().double()
    network[1].eval().requires_grad_(False)
    calls = []
    network[1].register_forward_hook(lambda *_: calls.append(1))
    before = {name: id(t) for name, t in network.state_dict(keep_vars=True).items()}
    assert sync_batch_norms(network) is network
    assert {name: id(t) for name, t in network.state_dict(keep_vars=True).items()} == before
    norms: list[Any] = [network[1], *network[3].children()]
    assert [type(norm).__name__ for norm in norms] == ["SyncBatchNorm"] * 3
    assert network[1] is network[2]
    assert [norm.training for norm in norms] == [False, True, True]
    assert (norms[2].eps, norms[2].momentum, norms[2].affine) == (1e-3, None, False)
    network[1](torch.randn(2, 4, 3, 3, dtype=torch.float64))
    assert calls == [1]


def test_conversion_can_be_repeated_and_takes_torchs_own() -> None:
    network = nn.SyncBatchNorm.convert_sync_batchnorm(create_backbone("small_resnet16"))
    for _ in "12":
        sync_batch_norms(network)
        assert not any(isinstance(m, nn.SyncBatchNorm) for m in network.modules())
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 128)


def test_conversion_refuses_what_it_would_leave_out() -> None:
    with pytest.raises(FastsslError, match="bn_splits 2 and sync_bn exclude each other"):
        sync_batch_norms(split_batch_norms(nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm1d(4)), 2))
    with pytest.raises(FastsslError, match="Sequential has no batch norm"):
        sync_batch_norms(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(FastsslError, match="cannot synchronise LazyBatchNorm2d"):
        sync_batch_norms(nn.Sequential(nn.LazyBatchNorm2d()))


APEX_NORM = """
import torch
class SyncBatchNorm(torch.nn.modules.batchnorm._BatchNorm):
    def __init__(self, num_features, eps=1e-5, momentum=0.1, affine=True, track_running_stats=True,
                 process_group=None, channel_last=False):
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self.process_group, self.channel_last = process_group, channel_last
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that is looked into for packages first; what was imported from it is forgotten."""
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        del sys.modules[name]
    importlib.invalidate_caches()


def test_apex_batch_norm(site: Path) -> None:
    (site / "apex" / "parallel").mkdir(parents=True)
    (site / "apex" / "__init__.py").touch()
    (site / "apex" / "parallel" / "__init__.py").write_text(APEX_NORM)
    network = Net().double()
    group: Any = object()
    before = {name: id(t) for name, t in network.state_dict(keep_vars=True).items()}
    sync_batch_norms(network, group, apex=True)
    assert {name: id(t) for name, t in network.state_dict(keep_vars=True).items()} == before
    norm: Any = network.get_submodule("3.1")
    assert type(norm).__module__ == "apex.parallel"
    assert (norm.process_group, norm.channel_last, norm.eps, norm.affine) == (group, False, 1e-3, False)
    assert norm.num_features == 4


@pytest.mark.parametrize(
    ("package", "said"),
    [(None, "is not installed"), ("pypi", "another package"), ("old", "cannot be imported"), ("broken", "no syncbn")],
)
def test_missing_apex_says_how_to_install_it(package: str | None, said: str, site: Path) -> None:
    if package:
        (site / "apex").mkdir()
        (site / "apex" / "__init__.py").touch()
    if package in ("old", "broken"):
        (site / "apex" / "parallel").mkdir()
        text = "raise ImportError('no syncbn')" if package == "broken" else ""
        (site / "apex" / "parallel" / "__init__.py").write_text(text)
    with pytest.raises(FastsslError, match=rf"{said}.*pip install .*NVIDIA/apex"):
        sync_batch_norms(Net(), apex=True)
