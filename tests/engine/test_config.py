"""Recipes and the command line: what is published, what is refused."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fastssl import cli, train
from fastssl.data import augmentation as aug
from fastssl.engine.config import RECIPES, BYOLConfig, MoCoConfig, check, recipe_names, to_yaml
from fastssl.errors import FastsslError


def recipe(name: str) -> MoCoConfig | BYOLConfig:
    return train.parse([next(m for m in ("moco", "byol") if m in name), "--recipe", name])[0]


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_is_complete(name: str) -> None:
    config = recipe(name)
    check(config)
    assert len(aug.load(config.augmentation).views) == 2
    first = (RECIPES / f"{name}.yaml").read_text().splitlines()[0]
    assert first.startswith("# ")


def fields(config: object, names: str) -> list[object]:
    return [getattr(config, name) for name in names.split()]


def test_moco_recipes_are_the_published_ones() -> None:
    common = "augmentation backbone batch_size lr weight_decay queue_size momentum temperature dim head"
    for name in ("moco_v2_in1k_200ep", "moco_v2_in1k_800ep"):
        expected = ["moco_v2", "resnet50", 256, 0.03, 1e-4, 65536, 0.999, 0.2, 128, "mlp"]
        assert fields(recipe(name), common) == expected
        assert fields(recipe(name), "lr_schedule lr_per_epoch epochs") == ["cosine", True, int(name[-5:-2])]
    v1 = ["moco_v1", "resnet50", 256, 0.03, 1e-4, 65536, 0.999, 0.07, 128, "fc"]
    assert fields(recipe("moco_v1_in1k"), common) == v1
    assert fields(recipe("moco_v1_in1k"), "lr_schedule lr_milestones lr_gamma epochs") == ["step", [120, 160], 0.1, 200]
    ig = recipe("moco_v1_ig1b")
    assert fields(ig, "batch_size lr steps lr_schedule lr_gamma lr_decay_steps") == [
        1024, 0.12, 1_250_000, "exponential", 0.9, 62500,
    ]  # fmt: skip
    assert fields(recipe("moco_cifar10"), common) == [
        "moco_v2_small", "resnet18", 512, 0.06, 5e-4, 4096, 0.99, 0.1, 128, "fc",
    ]  # fmt: skip
    assert fields(recipe("moco_cifar10"), "bn_splits small_images symmetric") == [8, True, False]


@pytest.mark.parametrize(
    ("epochs", "lr", "momentum", "decay"),
    [(40, 0.45, 0.97, 1e-6), (100, 0.45, 0.99, 1e-6), (300, 0.3, 0.99, 1e-6), (1000, 0.2, 0.996, 1.5e-6)],
)
def test_byol_recipes_are_the_published_ones(epochs: int, lr: float, momentum: float, decay: float) -> None:
    config = recipe(f"byol_in1k_{epochs}ep")
    names = "epochs lr lr_batch base_momentum weight_decay batch_size optimizer lars_eta warmup_epochs"
    assert fields(config, names) == [epochs, lr, 256, momentum, decay, 4096, "lars", 1e-3, 10]
    names = "decay_norm_and_bias lr_per_epoch projection_dim hidden_dim augmentation"
    assert fields(config, names) == [False, False, 256, 4096, "byol"]


def test_options_win_over_the_recipe_wherever_they_stand() -> None:
    config, name = train.parse(["moco", "--lr", "0.5", "--recipe", "moco_cifar10", "--bn-splits=4"])
    assert isinstance(config, MoCoConfig)
    assert (config.lr, config.bn_splits, config.queue_size, name) == (0.5, 4, 4096, "moco_cifar10")


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["moco"], "demo_moco"),
        (["byol"], "demo_byol"),
        (["moco", "--data", "somewhere"], "moco_v2_in1k_200ep"),
        (["byol", "--data=somewhere"], "byol_in1k_300ep"),
        (["moco", "--data", "cifar10"], "moco_cifar10"),
        (["moco", "--data", "cifar_photos"], "moco_v2_in1k_200ep"),
    ],
)
def test_the_default_recipe_follows_the_data(arguments: list[str], name: str) -> None:
    assert train.parse(arguments)[1] == name


def test_a_run_can_be_repeated_from_its_config(tmp_path: Path) -> None:
    config = train.parse(["moco", "--lr", "0.5", "--lr_milestones", "[1,2]"])[0]
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert train.parse(["moco", "--recipe", str(tmp_path / "config.yaml")])[0] == config


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "moco"),
        (["mocco"], "'mocco'"),
        (["moco", "--recipe", "moco_v9"], "unknown recipe 'moco_v9': .*moco_cifar10"),
        (["moco", "--recipe", "byol_cifar10"], "is not for moco"),
        (["moco", "--recipe"], "needs a value"),
        (["moco", "--queue-sise", "3"], "did you mean --queue_size"),
        (["moco", "--epoch", "3"], "did you mean --epochs"),
        (["moco", "--hidden_dim", "3"], "--hidden_dim"),
        (["moco", "--lr", "fast"], "lr: Expected a float. Got value: fast"),
        (["moco", "--gpus", "x"], "gpus: Expected int or null. Got value: x"),
        (["moco", "--head", "cnn"], "cnn"),
    ],
)
def test_wrong_options_are_one_line(arguments: list[str], named: str) -> None:
    with pytest.raises(FastsslError, match=named) as error:
        train.parse(arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [("lr: fast", "lr: .*fast"), ("lrr: 1", "--lrr"), ("- 1", "Unexpected config: - 1"), ("lr: [", "parsing")],
)
def test_wrong_recipe_files_are_one_line(text: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(FastsslError, match=named) as error:
        train.parse(["moco", "--recipe", str(path)])
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_a_recipe_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"lr: \xff")
    with pytest.raises(FastsslError, match="UTF-8"):
        train.parse(["moco", "--recipe", str(tmp_path / "mine.yaml")])


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (MoCoConfig(batch_size=0), "batch_size must be 1 or more, got 0"),
        (MoCoConfig(lr=float("nan")), "lr must be 0 or more, got nan"),
        (MoCoConfig(epochs=0), "epochs must be above 0"),
        (MoCoConfig(lr_schedule="step"), "lr_milestones"),
        (MoCoConfig(bn_splits=7), "bn_splits 7 does not divide batch_size 256"),
        (MoCoConfig(knn_temperature=0), "knn_temperature"),
        (MoCoConfig(epochs=5, warmup_epochs=10), "warmup_epochs 10 leaves nothing of the 5 epochs"),
        (MoCoConfig(batch_size=8, bn_splits=8), "leaves one image a part"),
        (MoCoConfig(seed=2**64), "seed must be below"),
    ],
)
def test_impossible_values_are_named(config: MoCoConfig, named: str) -> None:
    with pytest.raises(FastsslError, match=named):
        check(config)


def test_print_config_shows_the_result() -> None:
    command = [
        sys.executable,
        "-m",
        "fastssl.train",
        "moco",
        "--recipe",
        "moco_cifar10",
        "--lr",
        "0.5",
        "--print_config",
    ]
    shown = yaml.safe_load(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert (shown["lr"], shown["queue_size"]) == (0.5, 4096)


def test_every_option_has_a_help_text() -> None:
    text = subprocess.run(
        [sys.executable, "-m", "fastssl.train", "byol", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert "Momentum of the target network at the start" in " ".join(text.split())
    parser = train.build_parser()
    methods = next(a for a in parser._actions if isinstance(a.choices, dict)).choices
    for sub in methods.values():  # type: ignore[union-attr]
        assert all(action.help for action in sub._actions)


def test_errors_are_one_line_and_a_code(capsys: pytest.CaptureFixture[str]) -> None:
    for error, code in (
        (FastsslError("too big"), 2),
        (OSError(28, "No space left", "x"), 2),
        (KeyboardInterrupt(), 130),
    ):

        def main(_: list[str], error: BaseException = error) -> int:
            raise error

        with pytest.raises(SystemExit) as end:
            cli.run(main, [])
        assert end.value.code == code
    assert capsys.readouterr().err == "error: too big\nerror: No space left: x\n"
