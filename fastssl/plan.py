"""Plan a training: ``python -m fastssl.plan moco --gpus 64 [--recipe NAME|FILE] [--device h100] …``; needs no GPU."""

import argparse
import json
import warnings
from pathlib import Path

from fastssl import cli, train
from fastssl.engine.config import CONFIGS
from fastssl.errors import FastsslError

HELP = """usage: python -m fastssl.plan moco|byol [options] [options of fastssl.train]

Predict memory, communication, time and cost of a training before it is paid for.

  --gpus N[,N…]      GPUs, in machines of 8; several numbers are shown side by side (default: 8)
  --device NAME      h100, h200, b200, a100-80, a100-40, l40s or rtx4090 (default: h100)
  --recipe NAME|FILE what to train (default: moco_v2_in1k_200ep or byol_in1k_300ep)
  --batch_per_gpu N  images a step on each GPU, instead of --batch_size over all
  --images N         images in the data set (default: ImageNet-1k's 1,281,167; for CIFAR and the demo theirs)
  --json FILE        write the plans there
  --plot FILE        draw them there (.png, .svg, .pdf)

Every option of `python -m fastssl.train` that says what is trained counts too; the data are never opened.
"""
IMAGES = {"cifar": 50_000, "demo": 8_000}  # by what the recipe's name contains
IMAGENET = 1_281_167


def main(arguments: list[str]) -> int:
    """Parse, plan, print."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(HELP, end="")
        return 0
    own, rest = _own_options(arguments)
    gpus = [_positive("gpus", number) for number in own.gpus.split(",")]
    images = None if own.images is None else _positive("images", own.images)
    each = None if own.batch_per_gpu is None else _positive("batch_per_gpu", own.batch_per_gpu)
    from fastssl.planning.devices import find_device  # wrong options should not wait for torch

    device = find_device(own.device)
    config, name = train.parse(_with_recipe(rest))
    from rich.console import Console

    from fastssl.planning.plan import make_plan
    from fastssl.planning.plot import plot
    from fastssl.planning.report import headline, tables

    images = images or next((n for word, n in IMAGES.items() if word in name), IMAGENET)
    plans = []
    for count in gpus:
        if each is not None:
            config.batch_size = each * count
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's, about what only a real training meets
            plans.append(make_plan(config, name, count, device, images))
    console = Console(highlight=False, emoji=False, width=max(80, 45 + 25 * len(plans)))  # numbers are not cut
    console.print(f"{name}: {images:,} images, {device.title}. Predicted, not measured; docs/plan.md says how.\n")
    for table in tables(plans):
        console.print(table, "")
    for plan in plans:
        console.print(headline(plan))
    if own.json is not None:
        Path(own.json).write_text(json.dumps([plan.to_dict() for plan in plans], indent=1) + "\n")
    if own.plot is not None:
        plot(plans, Path(own.plot))
    return 0


def _own_options(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options that training does not have or has otherwise, and the rest."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--gpus", default="8")
    parser.add_argument("--device", default="h100")
    for name in ("images", "batch_per_gpu", "json", "plot"):
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}")
    try:
        return parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise FastsslError(f"{error.argument_name}: {error.message}") from None


def _with_recipe(arguments: list[str]) -> list[str]:
    """With the recipe of ImageNet where none is named."""
    named = any(a == "--recipe" or a.startswith("--recipe=") for a in arguments)
    if named or not arguments or arguments[0] not in CONFIGS:
        return arguments
    return [*arguments, f"--recipe={train.DEFAULTS[arguments[0]]['folder']}"]


def _positive(name: str, text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        several = "; several are separated by commas, as in 8,64" if name == "gpus" else ""
        raise FastsslError(f"{name} must be a whole number above 0, got '{text}'{several}")
    return int(text)


if __name__ == "__main__":
    cli.run(main)
