"""Train a method: ``python -m fastssl.train moco|byol [--recipe NAME|FILE] [--data …] [--gpus N] …``."""

from pathlib import Path

import jsonargparse

from fastssl import cli
from fastssl.data import absolute, is_named
from fastssl.engine import launch
from fastssl.engine.config import CONFIGS, Config, check, recipe_names, recipe_path
from fastssl.engine.config import RECIPES as SHIPPED
from fastssl.errors import FastsslError

# The recipe when --data is given and --recipe is not.
DEFAULTS = {
    "moco": {"cifar": "moco_cifar10", "folder": "moco_v2_in1k_200ep"},
    "byol": {"cifar": "byol_cifar10", "folder": "byol_in1k_300ep"},
}


def default_recipe(method: str, data: str | None) -> str:
    """demo_moco on the embedded images, moco_cifar10 on CIFAR, moco_v2_in1k_200ep on a folder; BYOL alike."""
    if data is None or data == "embedded":
        return f"demo_{method}"
    return DEFAULTS[method]["cifar" if is_named(data) else "folder"]


def build_parser() -> jsonargparse.ArgumentParser:
    """The command line: one sub-command a method, every field of its configuration an option."""
    parser = cli.new_parser("Train a self-supervised method.", prog="python -m fastssl.train")
    methods = parser.add_subcommands(dest="method", metavar="METHOD", help="")
    for method, config in CONFIGS.items():
        summary = (config.__doc__ or "").splitlines()[0]
        sub = cli.new_parser(summary)
        names = ", ".join(recipe_names(method))
        sub.add_argument(
            "--recipe",
            action="config",
            help=f"What to start from, before the defaults shown here: a YAML file or {names}.",
        )
        sub.add_class_arguments(config)
        methods.add_subcommand(method, sub, help=summary)
    return parser


def parse(arguments: list[str]) -> tuple[Config, str]:
    """The configuration and the name of the run."""
    parser = build_parser()
    if not arguments or arguments[0] not in CONFIGS:
        cli.parse(parser, arguments)  # prints the help, or raises
        raise FastsslError(f"give a method first: {' or '.join(CONFIGS)}")
    method, options = arguments[0], arguments[1:]
    recipe, options = _take_option(options, "recipe")
    data, output, resume = (_take_option(options, name)[0] for name in ("data", "output", "resume"))
    path = recipe_path(recipe or _resumed(output, resume) or default_recipe(method, data))
    if path.name == "config.yaml" and output is None and resume not in (None, "never"):
        options = [*options, f"--output={path.parent}"]  # a run folder's own configuration goes on there
    if path.parent == SHIPPED and path.stem not in recipe_names(method):
        raise FastsslError(f"recipe '{path.stem}' is not for {method}: give one of {', '.join(recipe_names(method))}")
    # First the recipe, then the options, so that options win wherever they stand.
    if path.parent != SHIPPED:
        try:
            cli.parse(parser, [method, f"--recipe={path}"])  # alone, to tell its errors from those of the options
        except FastsslError as error:
            raise FastsslError(f"{path}: {error}") from None
    parsed = cli.parse(parser, [method, f"--recipe={path}", *options])
    values = {key: value for key, value in vars(parsed[method]).items() if key not in ("recipe", "print_config")}
    config = CONFIGS[method](**values)
    # The configuration is kept with the run, which may be resumed or evaluated from another folder.
    config.data = absolute(config.data)
    if config.exclude is not None:
        config.exclude = str(Path(config.exclude).absolute())
    if config.augmentation.endswith((".yaml", ".yml")):
        config.augmentation = str(Path(config.augmentation).absolute())
    return config, _run_name(path, method)


def _resumed(output: str | None, resume: str | None) -> str | None:
    """The configuration of the run that is resumed: without `--recipe`, what it goes on with."""
    if resume is None or resume == "never":
        return None
    folder = Path(output) if output else Path(resume).parent.parent
    kept = folder / "config.yaml"
    return str(kept) if kept.is_file() and (output or resume != "auto") else None


def _take_option(options: list[str], name: str) -> tuple[str | None, list[str]]:
    """The last value of an option, and the options without it."""
    value, rest, waiting = None, [], False
    for option in options:
        if waiting:
            value, waiting = option, False
        elif option == f"--{name}":
            waiting = True
        elif option.startswith(f"--{name}="):
            value = option.partition("=")[2]
        else:
            rest.append(option)
    if waiting:
        raise FastsslError(f"--{name} needs a value")
    return value, rest


def _run_name(recipe: Path, method: str) -> str:
    return method if recipe.name == "config.yaml" else recipe.stem


def main(arguments: list[str]) -> int:
    """Parse, train, and return the exit code."""
    config, name = parse(arguments)
    check(config)
    if processes := launch.processes_to_start(config):
        from fastssl.engine.run_folder import open_run_folder  # imports torch, which takes seconds

        output = open_run_folder(config, name).path  # one for all, also when they are started again
        return launch.start([*arguments, f"--output={output}"], config, processes)
    return launch.worker(config, name)


if __name__ == "__main__":
    cli.run(main)
