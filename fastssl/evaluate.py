"""Evaluate a checkpoint: ``python -m fastssl.evaluate knn --checkpoint FILE [--data …] [--k K] [--temperature T]``."""

from dataclasses import dataclass
from pathlib import Path

from fastssl import cli
from fastssl.errors import FastsslError


@dataclass(kw_only=True)
class KnnOptions:
    """Weighted kNN accuracy and instance retrieval of a checkpoint's backbone, beside raw pixels and random weights."""

    checkpoint: Path
    """A checkpoint of fastssl.train, or its run folder (then the newest one)."""
    data: str | None = None
    """Images: embedded, cifar10, cifar100, or a folder. Default: those it was trained on."""
    holdout: float | None = None
    """Share of a folder's images used as queries when it has no val or test folder. Default: as in training."""
    gpus: int | None = None
    """1: the GPU; 0: the CPU. Default: the GPU if there is one."""
    k: int | None = None
    """Neighbours that vote. Default: as in training."""
    temperature: float | None = None
    """Temperature of the votes' weights, exp(cosine / temperature). Default: as in training."""
    bank_images: int = 50_000
    """Most training images used as the bank."""
    workers: int = 2
    """Threads (DALI) or processes (torchvision) that read, decode and augment."""


def knn(options: KnnOptions) -> int:
    """Print the table of `raw pixels / random initialisation / trained`."""
    import torch
    from rich.console import Console
    from torch import nn

    from fastssl.data import augmentation as aug
    from fastssl.data.loading import Loading
    from fastssl.engine.build import build_method, build_source, load_weights
    from fastssl.engine.checkpoint import CheckpointFolder, load
    from fastssl.engine.config import from_dict
    from fastssl.engine.device import autocast_dtype, keep_freed_memory, select_device
    from fastssl.evaluation.evaluator import Evaluator
    from fastssl.evaluation.report import Result, table

    path = options.checkpoint
    if path.is_dir():
        found = CheckpointFolder(path / "checkpoints").newest()
        if found is None:
            raise FastsslError(f"there is no checkpoint in '{path / 'checkpoints'}'")
        path, state, _ = found
    else:
        state = load(path)
    for name, least in (("bank_images", 1), ("workers", 0)):
        if getattr(options, name) < least:
            raise FastsslError(f"{name} must be {least} or more, got {getattr(options, name)}")
    config = from_dict(state["method"], state["config"])
    config.data = options.data or config.data
    config.holdout = config.holdout if options.holdout is None else options.holdout
    k = config.knn_k if options.k is None else options.k
    temperature = config.knn_temperature if options.temperature is None else options.temperature
    device = select_device(min(1, torch.cuda.device_count()) if options.gpus is None else options.gpus)
    keep_freed_memory()
    augmentation = aug.load(config.augmentation)
    trained = build_method(config, state["total_steps"])
    load_weights(trained, state)
    evaluator = Evaluator(
        build_source(config, augmentation), augmentation, device, autocast_dtype(config.precision, device),
        k=k, temperature=temperature, bank_images=options.bank_images,
        loading=Loading(config.loader, workers=options.workers, seed=config.seed),
    )  # fmt: skip
    if evaluator.cannot_knn:
        raise FastsslError(f"no kNN accuracy for '{config.data}': {evaluator.cannot_knn}")
    backbones: dict[str, nn.Module | None] = {
        "raw pixels": None,
        "random initialisation": build_method(config, 1).backbone.to(device),
        f"{path.name}, step {state['step']:,}": trained.backbone.to(device),
    }
    console = Console(highlight=False, emoji=False)
    console.print(table([Result(name, evaluator.measure(backbone)) for name, backbone in backbones.items()]))
    console.print(f"{state['method']} {config.backbone} on {config.data}, k={k}, temperature={temperature}")
    return 0


def main(arguments: list[str]) -> int:
    """Parse and evaluate."""
    parser = cli.new_parser("Evaluate a checkpoint.", prog="python -m fastssl.evaluate")
    measures = parser.add_subcommands(dest="measure", metavar="MEASURE", help="")
    sub = cli.new_parser(KnnOptions.__doc__ or "")
    sub.add_class_arguments(KnnOptions)
    measures.add_subcommand("knn", sub, help=(KnnOptions.__doc__ or "").splitlines()[0])
    parsed = cli.parse(parser, arguments)
    return knn(KnnOptions(**vars(parsed["knn"])))


if __name__ == "__main__":
    cli.run(main)
