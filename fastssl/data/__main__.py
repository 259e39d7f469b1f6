"""Look after images: ``python -m fastssl.data scan DATA [--output FILE]``, ``python -m fastssl.data pack DIR OUT``."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fastssl import cli
from fastssl.errors import FastsslError


@dataclass
class ScanOptions:
    """Decode every image and name those that cannot be read; exit code 1 if there are any."""

    data: str
    """A folder of images or shards, a shard, 'shards/*.tar', 'tfrecord:GLOB'."""
    output: Path | None = None
    """Where to write the names, one a line: for --exclude."""
    workers: int | None = None
    """Processes that decode. Default: one a core."""


@dataclass
class PackOptions:
    """Pack images into WebDataset shards OUT/train-000000.tar …, shuffled, their bytes unchanged."""

    data: str
    """A folder of images; shards are packed anew."""
    out: Path
    """A folder without shards."""
    shard_size: str | None = None
    """Most bytes of a shard. Default: 256MB."""
    images_per_shard: int | None = None
    """Most images of a shard, instead of its size."""
    workers: int = 4
    """Shards written at a time."""
    seed: int = 0
    """Of the order of the images."""
    exclude: Path | None = None
    """A file with names of images to leave out, one a line, as scan writes it."""


def scan(options: ScanOptions) -> int:
    """Print what cannot be read, and write the list."""
    from fastssl.data.exclude import as_comment, as_line
    from fastssl.data.scan import scan as run
    from fastssl.files import atomic_write

    workers = len(os.sched_getaffinity(0)) if options.workers is None else options.workers
    _at_least(1, workers=workers)
    lines: list[str] = []
    bad = 0

    def report(name: str, reason: str) -> None:
        nonlocal bad
        bad += 1
        print(_printable(f"{name}: {reason}"), flush=True)
        lines.append(f"{as_comment(reason)}\n{as_line(name)}\n")

    def remark(name: str, reason: str) -> None:
        print(_printable(f"{name}: {reason}"), flush=True)
        lines.append(f"{as_comment(f'{as_line(name)}: {reason}')}\n")

    with _bar("decoding") as progress:
        count = run(options.data, workers, report, progress, remark)
    print(f"{count:,} images, {bad:,} of them (or shards, or folders) cannot be read", file=sys.stderr)
    if options.output is not None:
        with atomic_write(options.output) as file:
            file.write("".join(lines).encode("utf-8", "surrogateescape"))
        if bad:
            print(f"leave them out with --exclude {options.output}", file=sys.stderr)
    return 1 if bad else 0


def pack(options: PackOptions) -> int:
    """Write the shards."""
    from fastssl.data.pack import pack as run
    from fastssl.data.pack import size
    from fastssl.data.sources import is_remote, not_on_disk, open_source

    if is_remote(options.data):  # before all its indexes are fetched
        raise not_on_disk("pack", options.data)
    _at_least(1, workers=options.workers, images_per_shard=options.images_per_shard)
    if options.shard_size is not None and options.images_per_shard is not None:
        raise FastsslError("give --shard_size or --images_per_shard, not both")
    limit = None if options.images_per_shard is not None else size(options.shard_size or "256MB")
    source = open_source(options.data, exclude=options.exclude)
    with _bar("packing") as progress:
        count = run(
            source,
            options.out,
            shard_bytes=limit,
            images_per_shard=options.images_per_shard,
            workers=options.workers,
            seed=options.seed,
            progress=progress,
        )
    images = len(source.train) + (0 if source.test is None else len(source.test))
    print(f"{images:,} images in {count:,} shards: --data {options.out}", file=sys.stderr)
    return 0


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error, so that standard output is the names and nothing else."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(
        *columns,
        console=console,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task(what, total=None)
        yield lambda done, all: bar.update(task, completed=done, total=all)


def _at_least(least: int, **values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < least:
            raise FastsslError(f"{name} must be {least} or more, got {value}")


def _printable(text: str) -> str:
    """File names need not be UTF-8, and may hold line breaks."""
    return text.replace("\n", "\\n").replace("\r", "\\r").encode("utf-8", "backslashreplace").decode()


def main(arguments: list[str]) -> int:
    """Parse and do it."""
    parser = cli.new_parser("Look after images: find broken ones, pack folders.", prog="python -m fastssl.data")
    commands = parser.add_subcommands(dest="command", metavar="COMMAND", help="")
    for name, kind in (("scan", ScanOptions), ("pack", PackOptions)):
        sub = cli.new_parser(kind.__doc__ or "")
        sub.add_class_arguments(kind, as_positional=True)
        commands.add_subcommand(name, sub, help=(kind.__doc__ or "").splitlines()[0])
    parsed = cli.parse(parser, arguments)
    if parsed["command"] == "scan":
        return scan(ScanOptions(**vars(parsed["scan"])))
    return pack(PackOptions(**vars(parsed["pack"])))


if __name__ == "__main__":
    cli.run(main)
