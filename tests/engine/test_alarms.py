"""The alarms: each rings in a training broken on purpose, none in a healthy one."""

import json
import math
from collections.abc import Callable, Iterator
from statistics import fmean, stdev
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastssl.data.sources import embedded
from fastssl.engine.alarms import LEAST_ROWS, MOST_ROWS, NAMES, WINDOWS, Alarm, Alarms, health
from fastssl.methods import BYOL, MoCo
from fastssl.models import create_backbone

K = 1024
CHANCE = math.log(K + 1)
HEALTHY = {
    "loss": 5.0, "lr": 0.06, "momentum": 0.99, "images_per_second": 1000.0, "skipped": 0, "skipped_in_a_row": 0,
    "spread": 0.9, "effective_rank": 40.0, "d_prime": 3.0, "drift": 0.05,
}  # fmt: skip


class Tiny(nn.Sequential):
    """Two layers on 8×8 pixels: a network that learns in seconds."""

    num_features = 64

    def __init__(self) -> None:
        super().__init__(
            nn.Flatten(), nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 64), nn.BatchNorm1d(64),
            nn.ReLU(),
        )  # fmt: skip


def moco(backbone: nn.Module | None = None, **options: Any) -> MoCo:
    torch.manual_seed(0)
    options = {"dim": 64, "queue_size": K, "momentum": 0.99, "temperature": 0.1, "head": "fc", **options}
    return MoCo(backbone or Tiny(), **options)


def byol(backbone: nn.Module | None = None) -> BYOL:
    torch.manual_seed(0)
    return BYOL(backbone or Tiny(), projection_dim=64, hidden_dim=128, base_momentum=0.97, total_steps=600)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Two threads on such small networks wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def images() -> Tensor:
    """2,048 of the embedded images as N×1×8×8 in 0…1."""
    return F.avg_pool2d(large_images(), 4)


def large_images() -> Tensor:
    return embedded().train.pixels[:2048, :1].float() / 255  # type: ignore[union-attr]


def augment(images: Tensor) -> Tensor:
    """Another brightness, a third of the rows erased, noise: what collapse needs is that views differ."""
    count, _, size, _ = images.shape
    first, row = torch.randint(size - size // 3, (count, 1, 1, 1)), torch.arange(size).view(1, 1, size, 1)
    kept = (row < first) | (row >= first + size // 3)
    return images * torch.empty(count, 1, 1, 1).uniform_(0.5, 1.5) * kept + 0.1 * torch.randn_like(images)


def train(
    method: Any, images: Tensor, *, lr: float, steps: int, alarms: Alarms | None = None
) -> tuple[list[Alarm], list[dict[str, float]]]:
    """A loop as the engine's, with windows of 10 steps of 64 images; gives the alarms and the windows' metrics."""
    alarms = alarms or Alarms(negatives=K if isinstance(method, MoCo) else None)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr, momentum=0.9)
    rung: list[Alarm] = []
    rows: list[dict[str, float]] = []
    losses: list[float] = []
    skipped = in_a_row = 0
    for step in range(1, steps + 1):
        chosen = images[torch.randint(len(images), (64,))]
        loss = method([augment(chosen), augment(chosen)])
        optimizer.zero_grad()
        loss.backward()
        if all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None):
            optimizer.step()
            method.after_step()
            in_a_row = 0
        else:
            method.skip_step()
            skipped, in_a_row = skipped + 1, in_a_row + 1
        losses.append(loss.item())
        if step % 10 == 0:
            rows.append({
                "loss": sum(losses) / len(losses), "lr": lr, "momentum": float(method.momentum),
                "images_per_second": 1000.0, "skipped": skipped, "skipped_in_a_row": in_a_row, **health(method),
            })  # fmt: skip
            rung += alarms.check(step, step * 64 / len(images), rows[-1])
            losses = []
    return rung, rows


def names(rung: list[Alarm]) -> list[str]:
    return [alarm.name for alarm in rung]


def simulate(alarms: Alarms, count: int, ranks: list[float] | None = None, start: int = 2000, **changed: float) -> Any:
    """`count` windows of 10 steps with healthy numbers, but for `changed`."""
    rung = []
    for window in range(count):
        step = start + 10 * window
        rung += alarms.check(step, step / 30, {**HEALTHY, **changed}, ranks)
    return rung


# Whole trainings.


@pytest.mark.parametrize(("method", "steps"), [(moco, 700), (byol, 400)])
def test_nothing_rings_in_a_healthy_training(method: Callable[[], Any], steps: int, images: Tensor) -> None:
    rung, rows = train(method(), images, lr=0.06, steps=steps)
    assert rung == []
    assert rows[-1]["loss"] < 0.9 * rows[4]["loss"]
    assert {"spread", "effective_rank", "d_prime", "drift"} <= rows[0].keys()
    assert min(row["d_prime"] for row in rows[20:]) > 1


@pytest.mark.slow  # a minute each
@pytest.mark.parametrize(("method", "steps"), [(moco, 600), (byol, 250)])
def test_nothing_rings_in_a_small_resnet(method: Callable[[nn.Module], Any], steps: int) -> None:
    images = large_images().expand(-1, 3, -1, -1)
    rung, _ = train(method(create_backbone("small_resnet16")), images, lr=0.06, steps=steps)
    assert rung == []


def test_byol_without_a_predictor_collapses(images: Tensor) -> None:
    method = byol()
    method.predictor = nn.Identity()  # type: ignore[assignment]
    rung, rows = train(method, images, lr=0.1, steps=200)
    assert names(rung) == ["collapse"]
    assert rows[-1]["spread"] < 0.2
    assert rows[-1]["loss"] < 0.05  # which looks like success
    assert "a predictor that trains" in rung[0].text


@pytest.mark.parametrize(("method", "steps"), [(moco, 700), (byol, 300)])
def test_a_thousand_times_the_learning_rate_rings(method: Callable[[], Any], steps: int, images: Tensor) -> None:
    rung, _ = train(method(), images, lr=60.0, steps=steps)
    assert "collapse" in names(rung)
    assert all("lr (now 60; try a tenth" in alarm.text for alarm in rung if alarm.name == "collapse")


def test_a_learning_rate_beyond_all_measure_stops_the_training(images: Tensor) -> None:
    rung, _ = train(moco(), images, lr=1e38, steps=40)
    assert names(rung)[:1] == ["nonfinite"]
    assert "at 20 in a row the training stops" in rung[0].text
    assert names(rung).count("nonfinite") == 2  # and once more when it does


def test_a_momentum_of_zero_rings(images: Tensor) -> None:
    rung, _ = train(moco(momentum=0.0), images, lr=0.06, steps=200)
    assert names(rung) == ["drift"]
    assert "a mere copy" in rung[0].text
    assert "momentum or base_momentum (now 0;" in rung[0].text


def test_a_momentum_network_that_never_moves_rings(images: Tensor) -> None:
    rung, _ = train(moco(momentum=1 - 1e-9), images, lr=0.5, steps=300)
    assert names(rung) == ["drift"]
    assert "no longer follows" in rung[0].text


def test_images_that_are_all_the_same_ring(images: Tensor) -> None:
    rung, _ = train(moco(), images[:1].expand(512, -1, -1, -1), lr=0.06, steps=700)
    assert sorted(names(rung)) == ["alike", "collapse", "stuck"]
    assert "do they and their views differ" in next(alarm.text for alarm in rung if alarm.name == "stuck")


def test_images_that_are_all_the_same_ring_without_negatives_too(images: Tensor) -> None:
    rung, rows = train(byol(), images[:1].expand(512, -1, -1, -1), lr=0.06, steps=600)
    assert names(rung) == ["alike"]
    assert rows[-1]["spread"] > 0.2  # their views differ, and are all that it sees
    assert "are they all the same, black or empty" in rung[0].text


@pytest.mark.parametrize("method", [moco, byol])
def test_black_images_ring(method: Callable[[], Any]) -> None:
    alarms = Alarms(negatives=K if method is moco else None)
    trained = method()
    for step in range(3):
        trained([torch.zeros(64, 1, 8, 8)] * 2).backward()
        trained.after_step()
        assert abs(health(trained)["d_prime"]) < 0.01, step
    values = health(trained)
    rung = [alarm for step in range(600, 700, 10) for alarm in alarms.check(step, 40, values)]
    assert "alike" in names(rung)


# Conditions by numbers.


def test_every_name_can_ring_and_every_text_is_one_line() -> None:
    alarms = Alarms(negatives=K)
    rung = simulate(alarms, 20, [0.1, 0.1, 0.1])
    assert rung == []
    broken = {"loss": CHANCE, "spread": 0.01, "d_prime": 0.0, "drift": 0.0, "images_per_second": 400.0, "skipped": 1}
    # A skipped step explains a drift of 0, so it must be over.
    rung = simulate(alarms, 20, [0.1, 0.3, 0.1], start=2200, **broken)
    assert set(names(rung)) == set(NAMES) == set(WINDOWS)
    assert all("\n" not in alarm.text and "Look at" in alarm.text for alarm in rung)
    assert len(rung) == len(NAMES)


@pytest.mark.parametrize(("symmetric", "loss"), [(1, CHANCE), (2, 2 * CHANCE), (1, 0.97 * CHANCE), (1, 1.2 * CHANCE)])
def test_a_loss_near_chance_rings_after_the_first_epochs_only(symmetric: int, loss: float) -> None:
    alarms = Alarms(negatives=K, directions=symmetric)
    early = [alarms.check(step, step / 30, {"loss": loss}) for step in range(10, 500, 10)]  # 30 steps an epoch
    assert not any(early)
    late = [alarms.check(step, step / 30, {"loss": loss}) for step in range(500, 600, 10)]
    assert [names(rung) for rung in late] == [[], [], [], [], ["stuck"], [], [], [], [], []]
    long_epochs = Alarms(negatives=K, directions=symmetric)
    assert not any(long_epochs.check(step, step / 5000, {"loss": loss}) for step in range(100, 10_000, 100))
    assert any(long_epochs.check(step, step / 5000, {"loss": loss}) for step in range(10_000, 11_000, 100))


def test_a_loss_below_chance_or_without_negatives_does_not_ring() -> None:
    assert simulate(Alarms(negatives=K), 50, loss=0.9 * CHANCE) == []
    assert simulate(Alarms(negatives=None), 50, loss=CHANCE) == []


def test_a_slow_first_window_or_evaluation_is_no_drop_of_throughput() -> None:
    alarms = Alarms(negatives=None)
    assert simulate(alarms, 2, images_per_second=10.0) == []  # compiling
    for _ in range(8):
        assert simulate(alarms, 8) == []
        assert simulate(alarms, 3, images_per_second=100.0) == []  # evaluating


def test_a_lasting_drop_of_throughput_rings_once_and_again_when_it_comes_back() -> None:
    alarms = Alarms(negatives=None)
    assert simulate(alarms, 40) == []
    assert simulate(alarms, 9, images_per_second=450.0) == []
    rung = simulate(alarms, 1, images_per_second=450.0)
    assert names(rung) == ["throughput"]
    assert rung[0].text.startswith("450 images/s, less than half the usual 1,000")
    assert simulate(alarms, 10, images_per_second=450.0) == []
    assert simulate(alarms, 30) == []
    assert names(simulate(alarms, 10, images_per_second=450.0)) == ["throughput"]


def test_a_machine_that_stays_slower_becomes_the_usual() -> None:
    alarms = Alarms(negatives=None)
    simulate(alarms, 60)
    assert names(simulate(alarms, 200, images_per_second=400.0)) == ["throughput"]
    assert names(simulate(alarms, 20, images_per_second=150.0)) == ["throughput"]


@pytest.mark.parametrize("count", [2, 3, 8])
def test_the_lagging_rank_is_named(count: int) -> None:
    alarms = Alarms(negatives=None)
    ranks = [0.2] * count
    assert simulate(alarms, 10, ranks) == []
    ranks[1] = 0.29
    assert simulate(alarms, 10, ranks) == []
    ranks[1] = 0.4
    assert simulate(alarms, 4, ranks) == []
    rung = simulate(alarms, 5, ranks)
    assert names(rung) == ["lag"]
    assert rung[0].text.startswith(f"rank 1 of {count} needs 0.4 s of its own work a step, 2.0 times")


def test_ranks_that_take_turns_do_not_lag_and_two_slow_ones_are_both_named() -> None:
    alarms = Alarms(negatives=None)
    for _ in range(10):
        assert simulate(alarms, 2, [0.1, 0.3, 0.1, 0.1]) == []
        assert simulate(alarms, 2, [0.1, 0.1, 0.3, 0.1]) == []
    rung = simulate(alarms, 10, [0.1, 0.3, 0.1, 0.1, 0.3])
    assert [alarm.text.split(" of ")[0] for alarm in rung] == ["rank 1", "rank 4"]
    assert simulate(alarms, 10, [0.1]) == simulate(alarms, 10, []) == simulate(alarms, 10, [0.0, 0.0]) == []


def test_every_skipped_step_is_said_and_the_end_too() -> None:
    alarms = Alarms(negatives=None, nonfinite_limit=4)
    rung = alarms.check(10, 0.1, {**HEALTHY, "skipped": 2, "skipped_in_a_row": 1})
    assert rung[0].text.startswith("2 steps since the last line, 2 in all, 1 in a row, were skipped")
    assert alarms.check(20, 0.2, {**HEALTHY, "skipped": 5, "skipped_in_a_row": 3}) == []  # it goes on
    rung = alarms.check(21, 0.2, {**HEALTHY, "loss": math.nan, "skipped": 6, "skipped_in_a_row": 4})
    assert "at 4 in a row the training stops. Look" in rung[0].text
    assert alarms.check(30, 0.3, {**HEALTHY, "skipped": 6}) == []
    assert names(alarms.check(40, 0.4, {**HEALTHY, "skipped": 7})) == ["nonfinite"]
    assert names(alarms.check(50, 0.5, {**HEALTHY, "skipped": 0})) == []
    assert names(alarms.check(60, 0.6, {**HEALTHY, "skipped": 1})) == ["nonfinite"]


def test_a_training_that_never_stops_is_not_said_to() -> None:
    rung = Alarms(negatives=None, nonfinite_limit=0).check(9, 1, {**HEALTHY, "skipped": 9, "skipped_in_a_row": 9})
    assert names(rung) == ["nonfinite"]
    assert "stops" not in rung[0].text


def test_a_loss_scaler_may_skip_a_few() -> None:
    alarms = Alarms(negatives=None, loss_scaled=True)
    assert alarms.check(10, 0.1, {**HEALTHY, "skipped": 9, "skipped_in_a_row": 9}) == []
    assert names(alarms.check(20, 0.2, {**HEALTHY, "skipped": 10, "skipped_in_a_row": 10})) == ["nonfinite"]
    assert alarms.check(30, 0.3, {**HEALTHY, "skipped": 10}) == []
    assert names(alarms.check(40, 0.4, {**HEALTHY, "skipped": 22, "skipped_in_a_row": 1})) == ["nonfinite"]


def test_a_drift_of_zero_is_expected_without_updates_or_without_a_momentum_network() -> None:
    assert simulate(Alarms(negatives=None), 20, drift=0.0, lr=0.0) == []
    assert simulate(Alarms(negatives=None, momentum_used=False), 20, drift=0.0) == []
    alarms = Alarms(negatives=None, loss_scaled=True)
    for window in range(20):
        assert alarms.check(1000 + window, 9, {**HEALTHY, "drift": 0.0, "skipped": 40 * window}) == [] or window == 1


@pytest.mark.parametrize(("name", "value"), [("spread", 0.1), ("effective_rank", 3.0)])
def test_collapse_needs_windows_in_a_row_and_rings_again_after_it_has_cleared(name: str, value: float) -> None:
    broken: Any = {name: value}
    for negatives in (None, K):
        alarms = Alarms(negatives=negatives)
        for _ in range(5):
            assert simulate(alarms, 4, **broken) == []
            assert simulate(alarms, 1) == []
        assert names(simulate(alarms, 30, **broken)) == ["collapse"]
        assert simulate(alarms, 4) == []
        assert simulate(alarms, 30, **broken) == []  # it was hardly over
        assert simulate(alarms, 5) == []
        assert names(simulate(alarms, 30, **broken)) == ["collapse"]


def test_a_contrastive_loss_may_begin_collapsed_and_byol_may_not() -> None:
    assert simulate(Alarms(negatives=K), 30, start=0, spread=0.05) == []
    assert names(simulate(Alarms(negatives=None), 30, start=0, spread=0.05)) == ["collapse"]


@pytest.mark.parametrize("negatives", [None, K])
def test_views_that_tell_nothing_ring_after_the_first_epochs(negatives: int | None) -> None:
    alarms = Alarms(negatives=negatives)
    assert simulate(alarms, 48, start=10, d_prime=0.0) == []
    assert names(simulate(alarms, 5, d_prime=0.29)) == ["alike"]
    assert simulate(alarms, 20, d_prime=-0.1) == []  # it was said
    assert simulate(alarms, 20, d_prime=0.31) == []


def test_what_is_missing_or_no_number_is_not_looked_at() -> None:
    alarms = Alarms(negatives=K)
    assert alarms.check(1000, 9.0, {}) == []
    simulate(alarms, 4, spread=0.0)
    assert alarms.check(3000, 9.0, {"spread": math.nan, "loss": math.nan, "drift": math.inf}) == []
    assert names(simulate(alarms, 1, spread=0.0)) == ["collapse"]  # not knowing clears nothing


def test_a_resumed_run_says_the_same(images: Tensor) -> None:
    rows = [
        {**HEALTHY, "skipped": n // 7, "skipped_in_a_row": 0, "loss": CHANCE * (1.1 if n % 20 < 12 else 0.5),
         "images_per_second": 300.0 if n % 40 > 20 else 1000.0, "drift": 0.0 if n % 30 > 12 else 0.1,
         "d_prime": 0.1 if n % 25 > 9 else 3.0}
        for n in range(120)
    ]  # fmt: skip

    def said(alarms: Alarms, first: int, last: int) -> list[list[Alarm]]:
        slow = (0.3 if n % 16 < 8 else 0.1 for n in range(120))
        lags = [[0.1, second, 0.1] for second in slow]
        return [alarms.check(600 + 10 * n, 20 + n, rows[n], lags[n]) for n in range(first, last)]

    whole = said(Alarms(negatives=K), 0, 120)
    assert {alarm.name for rung in whole for alarm in rung} >= {
        "alike",
        "stuck",
        "nonfinite",
        "drift",
        "throughput",
        "lag",
    }
    for cut in range(0, 120, 7):
        before, after = Alarms(negatives=K), Alarms(negatives=K)
        start = said(before, 0, cut)
        state = before.state_dict()
        kept = json.loads(json.dumps(state))
        assert kept == state  # plain values, so it may lie in a checkpoint
        after.load_state_dict(kept)
        said(before, cut, min(cut + 9, 120))
        assert state == kept  # no part of the state is shared with the alarms
        assert start + said(after, cut, 120) == whole


# What is measured.


def networks(target: list[float], source: list[float]) -> tuple[nn.Module, nn.Module]:
    pair = []
    for values in (target, source):
        layer = nn.Linear(2, 1)
        layer.weight.data = torch.tensor([values[:2]])
        layer.bias.data = torch.tensor(values[2:])
        pair.append(layer)
    return pair[0], pair[1]


def measured(embeddings: Tensor | None, other: Tensor | None = None) -> dict[str, float]:
    """Of two views, or of one that is both."""
    pair = networks([1.0, 2.0, 5.0], [1.0, 2.0, 2.0])
    views = None if embeddings is None else (embeddings, embeddings if other is None else other)
    return health(SimpleNamespace(embeddings=views, momentum_pair=pair))


def test_drift_is_the_distance_over_the_size() -> None:
    assert measured(None) == {"drift": pytest.approx(3 / 3)}
    pair = networks([0.0, 0.0, 0.0], [0.0, 0.0, 0.0])
    assert health(SimpleNamespace(embeddings=None, momentum_pair=pair)) == {}  # 0/0


def test_embeddings_along_all_axes_are_spread_and_equal_ones_collapsed() -> None:
    axes = torch.cat([torch.eye(64), -torch.eye(64)])
    values = measured(7 * axes)
    assert values["spread"] == pytest.approx(1)
    assert values["effective_rank"] == pytest.approx(64)
    values = measured(torch.randn(1, 64).expand(128, -1))
    assert values["spread"] == pytest.approx(0, abs=1e-6)
    assert values["effective_rank"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("rank", [1, 2, 5, 40])
@pytest.mark.parametrize(("count", "dim"), [(64, 128), (256, 64)])
def test_effective_rank_counts_directions(rank: int, count: int, dim: int, generator: torch.Generator) -> None:
    directions = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0][:rank]
    chosen = directions[torch.arange(count) % rank]
    balanced = chosen[: count // rank * rank]  # as often each
    assert measured(balanced)["effective_rank"] == pytest.approx(rank, abs=1e-3)


def test_health_is_what_the_papers_define(generator: torch.Generator) -> None:
    embeddings = torch.randn(96, 48, generator=generator) * torch.linspace(0.01, 3, 48) + 0.5
    unit = embeddings.double() / embeddings.double().norm(dim=1, keepdim=True)
    singular = torch.linalg.svdvals(unit)
    p = singular / singular.sum()
    values = measured(embeddings)
    assert values["effective_rank"] == pytest.approx(torch.exp(-(p * p.log()).sum()).item())
    assert values["spread"] == pytest.approx(unit.std(0, correction=0).mean().item() * math.sqrt(48))
    half = measured(embeddings.bfloat16())
    assert half["spread"] == pytest.approx(values["spread"], rel=1e-2)


def test_d_prime_is_the_distance_of_two_means_in_standard_deviations(generator: torch.Generator) -> None:
    first = torch.randn(40, 16, generator=generator)
    second = (first + torch.randn(40, 16, generator=generator)).bfloat16()
    cosines = F.cosine_similarity(first[:, None].double(), second[None].double(), dim=2)
    same = [cosines[i, i].item() for i in range(40)]
    others = [cosines[i, j].item() for i in range(40) for j in range(40) if i != j]
    expected = (fmean(same) - fmean(others)) / stdev(others)
    assert measured(first, second)["d_prime"] == pytest.approx(expected)
    assert abs(measured(first, second.roll(1, 0))["d_prime"]) < 4 / 40**0.5


@pytest.mark.parametrize("dim", [64, 65, 100])
@pytest.mark.parametrize("noise", [0.0, 1e-7])
def test_d_prime_of_images_that_are_all_the_same_is_zero(dim: int, noise: float, generator: torch.Generator) -> None:
    rows = torch.randn(1, dim, generator=generator) + noise * torch.randn(64, dim, generator=generator)
    assert measured(rows, rows.clone())["d_prime"] == pytest.approx(0, abs=0.01)


def test_d_prime_of_many_images_looks_at_some(generator: torch.Generator) -> None:
    rows = torch.randn(MOST_ROWS, 8, generator=generator)
    with_more = torch.cat([rows, torch.zeros(100, 8)])
    assert measured(with_more)["d_prime"] == measured(rows)["d_prime"] > 1


def test_what_cannot_be_measured_is_left_out() -> None:
    assert "d_prime" not in measured(torch.randn(LEAST_ROWS - 1, 64))
    assert "d_prime" in measured(torch.randn(LEAST_ROWS, 2))
    assert "effective_rank" not in measured(torch.randn(LEAST_ROWS - 1, 64))
    assert "spread" in measured(torch.randn(LEAST_ROWS - 1, 64))
    assert "spread" not in measured(torch.randn(1, 64))
    assert set(measured(torch.full((64, 64), math.nan))) == {"drift"}


@pytest.mark.parametrize("method", [moco, byol])
def test_measuring_changes_nothing(method: Callable[[], Any], images: Tensor) -> None:
    trained = method()
    assert set(health(trained)) == {"drift"}
    train(trained, images, lr=0.06, steps=9)
    before = {name: value.clone() for name, value in trained.state_dict().items() if isinstance(value, Tensor)}
    embeddings, drawn = [view.clone() for view in trained.embeddings], torch.get_rng_state()
    assert set(health(trained)) == {"spread", "effective_rank", "d_prime", "drift"}
    assert all(torch.equal(value, trained.state_dict()[name]) for name, value in before.items())
    assert all(map(torch.equal, embeddings, trained.embeddings))
    assert torch.equal(drawn, torch.get_rng_state())
