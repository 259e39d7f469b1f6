"""What a training is: every field is an option of the command line and a key of a YAML recipe."""

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml

from fastssl.errors import FastsslError

RECIPES = Path(__file__).parents[1] / "recipes"
AlarmName = Literal["collapse", "alike", "stuck", "nonfinite", "drift", "throughput", "lag"]


@dataclass(kw_only=True)
class Recipe:
    """What a paper fixes, whatever the method: augmentation, network, optimizer, schedule."""

    augmentation: str = "moco_v2"
    """Views of an image: a name (moco_v1, moco_v2, byol, moco_v2_small, …) or a YAML file."""
    backbone: str = "resnet50"
    """Network: small_resnet16/32/64, a ResNet of torchvision, or timm/NAME."""
    small_images: bool = False
    """Give a ResNet a 3×3 stem of stride 1 and no max-pooling, for images of about 32 pixels."""
    batch_size: int = 256
    """Images a step, over all processes."""
    epochs: float = 200.0
    """Length of the training in passes over the images."""
    steps: int | None = None
    """Length of the training in steps; wins over epochs."""
    optimizer: Literal["sgd", "lars"] = "sgd"
    """SGD with momentum, or LARS as in BYOL."""
    lr: float = 0.03
    """Learning rate at its highest, before lr_batch."""
    lr_batch: int | None = None
    """Multiply lr by batch_size / lr_batch (BYOL: 256); without it lr is taken as it is."""
    optimizer_momentum: float = 0.9
    """Momentum of SGD or LARS."""
    weight_decay: float = 1e-4
    """L2 weight decay."""
    decay_norm_and_bias: bool = True
    """Whether bias and normalisation parameters take weight decay and LARS's scaling (MoCo: yes, BYOL: no)."""
    lars_eta: float = 1e-3
    """Trust coefficient of LARS."""
    lr_schedule: Literal["constant", "cosine", "step", "exponential"] = "cosine"
    """Course of the learning rate after the warm-up."""
    lr_per_epoch: bool = True
    """Change the learning rate at the start of epochs only, as MoCo's authors; otherwise at every step."""
    lr_milestones: list[float] | None = None
    """For step: the epochs at which the learning rate is multiplied by lr_gamma."""
    lr_gamma: float = 0.1
    """For step and exponential: the factor."""
    lr_decay_steps: int = 62500
    """For exponential: steps between two multiplications by lr_gamma."""
    warmup_epochs: float = 0.0
    """Linear rise of the learning rate from 0, in epochs."""
    sync_bn: bool = False
    """Batch norm over the batch of all processes (BYOL: yes). MoCo's keys are shuffled among the processes instead."""
    seed: int = 0
    """Seed of weights, queue, order of the images and augmentations."""


@dataclass(kw_only=True)
class RunOptions:
    """How a training is run here: data, devices, files, what is shown."""

    data: str = "embedded"
    """Images: embedded, cifar10, cifar100 (NAME:FOLDER to say where), or a folder of images."""
    holdout: float = 0.0
    """Share of a folder's images (0…1) kept out of training for evaluation when it has no val or test folder."""
    gpus: int | None = None
    """GPUs of this machine to train on, a process each; 0 is the CPU. Default: all there are."""
    procs: int | None = None
    """Processes to train with on the CPU, over gloo, instead of GPUs."""
    max_restarts: int = 3
    """How often processes that died are started again, each time from the newest checkpoint."""
    output: str | None = None
    """Run folder. Default: runs/NAME-NUMBER."""
    resume: str = "never"
    """auto: go on from the newest checkpoint of the run folder; or a checkpoint file; or never."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """bfloat16 or float16 autocast (the latter with a loss scaler), or none; auto: bfloat16 where it is faster."""
    accumulate: int = 1
    """Micro-batches whose gradients make one step: a part of the memory, the same batch_size."""
    checkpoint_activations: bool = False
    """Compute the backbone's blocks once more in the backward pass instead of keeping what they computed."""
    channels_last: bool = True
    """Keep images and convolutions in channels_last order."""
    compile: bool = False
    """Compile the networks with torch.compile: a minute at the start, faster steps."""
    deterministic: bool = False
    """Use algorithms alone that give the same bits every time; on a GPU they are slower."""
    apex: bool = False
    """Use the fused SGD and, with sync_bn, the batch norm of NVIDIA apex, which must be installed."""
    bn_group: int = 0
    """With sync_bn: batch norm over groups of so many processes; 0: over all."""
    exclude: str | None = None
    """File with the names of images to leave out, as `python -m fastssl.data scan` writes it."""
    loader: Literal["auto", "dali", "torchvision"] = "auto"
    """Make the views with NVIDIA DALI, or image by image with torchvision; auto: with DALI where it is installed."""
    color: Literal["exact", "dali"] = "exact"
    """With DALI: colours exactly as torchvision and PIL change them (a fused op), or DALI's own approximation."""
    workers: int | None = None
    """Threads (DALI) or processes (torchvision) that read, decode and augment. Default: one a core, at most 8."""
    prefetch: int = 2
    """Batches made ahead."""
    last_batch: Literal["drop", "fill"] = "drop"
    """Images that do not fill a last batch: left out until the next epoch's order, or filled up with its first ones."""
    checkpoint_steps: int = 0
    """Steps between checkpoints; 0: at the end of every epoch only."""
    keep_checkpoints: int = 2
    """Checkpoints kept; older ones are deleted."""
    milestone_epochs: float = 0.0
    """Epochs between checkpoints that are kept for good; 0: none."""
    queue_check_steps: int = 100
    """Steps between two checks that all processes hold the same queue and networks; 0: none."""
    nonfinite_limit: int = 20
    """Steps in a row without finite gradients, each left out, after which the training ends; 0: do not look."""
    stop_on: list[AlarmName] = field(default_factory=list)
    """Alarms that end the training, after a checkpoint: collapse, alike, stuck, nonfinite, drift, throughput, lag."""
    log_steps: int = 10
    """Steps between two lines of metrics."""
    knn_epochs: float = 1.0
    """Epochs between two kNN evaluations; 0: none."""
    knn_k: int = 200
    """Neighbours that vote."""
    knn_temperature: float = 0.1
    """Temperature of the votes' weights."""
    knn_images: int = 50_000
    """Most training images used as the kNN's bank."""


@dataclass(kw_only=True)
class MoCoConfig(Recipe, RunOptions):
    """MoCo v1 and v2 (arXiv:1911.05722, arXiv:2003.04297); the defaults are v2's 200 epochs on ImageNet-1k."""

    method: ClassVar[str] = "moco"

    dim: int = 128
    """Components of queries and keys."""
    queue_size: int = 65536
    """Keys in the queue."""
    queue_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the keys. A half one takes half the memory; if it is also the precision's, the loss multiplies in it."""
    momentum: float = 0.999
    """Momentum m of the key encoder."""
    temperature: float = 0.2
    """Temperature T of the loss."""
    head: Literal["fc", "mlp"] = "mlp"
    """Projection head: fc (v1) or mlp (v2)."""
    symmetric: bool = False
    """Take each view as the query once and add the losses."""
    bn_splits: int = 1
    """Compute batch norm over so many parts of the batch, spread over the processes: the statistics of as many GPUs."""


@dataclass(kw_only=True)
class BYOLConfig(Recipe, RunOptions):
    """BYOL (arXiv:2006.07733); the defaults are its 300 epochs on ImageNet-1k."""

    method: ClassVar[str] = "byol"

    augmentation: str = "byol"
    """Views of an image: a name (moco_v1, moco_v2, byol, byol_small, …) or a YAML file."""
    batch_size: int = 4096
    """Images a step, over all processes."""
    epochs: float = 300.0
    """Length of the training in passes over the images."""
    optimizer: Literal["sgd", "lars"] = "lars"
    """SGD with momentum, or LARS as in BYOL."""
    lr: float = 0.3
    """Learning rate at its highest, before lr_batch."""
    lr_batch: int | None = 256
    """Multiply lr by batch_size / lr_batch; null: take lr as it is."""
    weight_decay: float = 1e-6
    """L2 weight decay."""
    decay_norm_and_bias: bool = False
    """Whether bias and normalisation parameters take weight decay and LARS's scaling (MoCo: yes, BYOL: no)."""
    lr_per_epoch: bool = False
    """Change the learning rate at the start of epochs only, as MoCo's authors; otherwise at every step."""
    warmup_epochs: float = 10.0
    """Linear rise of the learning rate from 0, in epochs."""
    sync_bn: bool = True
    """Batch norm over the batch of all processes."""
    projection_dim: int = 256
    """Components of projections and predictions."""
    hidden_dim: int = 4096
    """Width of the hidden layers of projector and predictor."""
    base_momentum: float = 0.99
    """Momentum of the target network at the start; it rises to 1 along a cosine."""


Config = MoCoConfig | BYOLConfig
CONFIGS: dict[str, type[MoCoConfig] | type[BYOLConfig]] = {"moco": MoCoConfig, "byol": BYOLConfig}

# What must be the same for a checkpoint to be loaded at all, and for its place in the data to mean anything.
IDENTITY = ("backbone", "small_images", "dim", "queue_size", "head", "bn_splits", "projection_dim", "hidden_dim")
PLACE = ("batch_size", "optimizer", "decay_norm_and_bias", "seed", "data", "holdout", "last_batch")
LEAST = {
    "batch_size": 1, "epochs": 0, "steps": 1, "lr": 0, "lr_batch": 1, "optimizer_momentum": 0, "weight_decay": 0,
    "lars_eta": 0, "lr_gamma": 0, "lr_decay_steps": 1, "warmup_epochs": 0, "seed": 0, "gpus": 0, "workers": 0,
    "prefetch": 1, "checkpoint_steps": 0, "keep_checkpoints": 1, "log_steps": 1, "knn_epochs": 0, "knn_k": 1,
    "knn_images": 1, "procs": 1, "max_restarts": 0, "accumulate": 1, "bn_group": 0, "milestone_epochs": 0,
    "queue_check_steps": 0, "nonfinite_limit": 0,
    "dim": 1, "queue_size": 1, "bn_splits": 1, "projection_dim": 1, "hidden_dim": 1,
}  # fmt: skip


def check(config: Config) -> None:
    """Find what is wrong with a configuration before anything is loaded.

    Raises:
        FastsslError: naming the option, its value and what would be right.
    """
    for name, least in LEAST.items():
        value = getattr(config, name, None)
        if value is not None and not value >= least:  # `not >=` also refuses nan
            raise FastsslError(f"{name} must be {least} or more, got {value}")
    if config.seed >= 2**63:
        raise FastsslError(f"seed must be below 2^63, got {config.seed}")
    if config.steps is None and config.epochs == 0:
        raise FastsslError("epochs must be above 0, or give steps")
    if config.steps is None and 0 < config.epochs <= config.warmup_epochs:
        raise FastsslError(f"warmup_epochs {config.warmup_epochs:g} leaves nothing of the {config.epochs:g} epochs")
    if not config.knn_temperature > 0:
        raise FastsslError(f"knn_temperature must be above 0, got {config.knn_temperature}")
    if config.lr_schedule == "step" and not config.lr_milestones:
        raise FastsslError("lr_schedule step needs lr_milestones, e.g. --lr_milestones [120,160]")
    splits = getattr(config, "bn_splits", 1)
    if config.batch_size % splits:
        raise FastsslError(f"bn_splits {splits} does not divide batch_size {config.batch_size}")
    if splits > 1 and config.batch_size // splits < 2:
        raise FastsslError(f"bn_splits {splits} leaves one image a part of batch_size {config.batch_size}")
    if splits > 1 and config.sync_bn:
        raise FastsslError(
            f"bn_splits {splits} and sync_bn: batch norm is over parts of the batch or over all, use one"
        )
    if config.bn_group and not config.sync_bn:
        raise FastsslError(f"bn_group {config.bn_group} is for sync_bn: add --sync_bn true, or leave it out")


def images_a_process(config: Config, world: int) -> int:
    """This process's part of the batch.

    Raises:
        FastsslError: the batch cannot be spread evenly over `world` processes, their micro-batches and the parts of
            batch norm.
    """
    splits, parts = getattr(config, "bn_splits", 1), world * config.accumulate
    if config.batch_size % parts:
        micro = f" of {config.accumulate} micro-batches" if config.accumulate > 1 else ""
        spread = f"{world} process{'es' * (world > 1)}{micro}"
        raise FastsslError(
            f"batch_size {config.batch_size} cannot be spread over {spread}: make it a multiple of {parts}"
        )
    if splits > world and splits % world:
        raise FastsslError(f"bn_splits {splits} cannot be spread over {world} processes: make it a multiple of them")
    here = max(1, splits // world)
    if config.batch_size // parts % here or (config.batch_size // parts // here < 2 and not config.sync_bn):
        raise FastsslError(
            f"batch_size {config.batch_size} over {world} processes with accumulate {config.accumulate} and bn_splits "
            f"{splits} leaves batch norm {config.batch_size / parts / here:g} images at a time: give it a whole "
            "number, 2 or more"
        )
    return config.batch_size // world


def recipe_names(method: str | None = None) -> list[str]:
    """The recipes that ship with the package, of one method or all."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml") if method is None or method in path.stem)


def recipe_path(recipe: str) -> Path:
    """The file of a shipped recipe by name, or the file given by path.

    Raises:
        FastsslError: there is neither.
    """
    shipped = RECIPES / f"{recipe}.yaml"
    path = shipped if shipped.exists() else Path(recipe)
    if not path.is_file():
        raise FastsslError(f"unknown recipe '{recipe}': give a YAML file or one of {', '.join(recipe_names())}")
    return path


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain values, without what belongs to one start of a run only."""
    return {key: value for key, value in asdict(config).items() if key not in ("output", "resume")}


def from_dict(method: str, values: dict[str, Any]) -> Config:
    """The configuration that `to_dict` gave."""
    if method not in CONFIGS:
        raise FastsslError(f"unknown method '{method}'; known are {', '.join(CONFIGS)}")
    known = {f.name for f in fields(CONFIGS[method])}
    return CONFIGS[method](**{key: value for key, value in values.items() if key in known})


def to_yaml(config: Config) -> str:
    """The configuration as a recipe file."""
    header = f"# python -m fastssl.train {config.method} --recipe THIS_FILE\n"
    return header + yaml.safe_dump(to_dict(config), sort_keys=False)
