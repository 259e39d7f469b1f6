"""Where the time of a training step goes: a profiler trace of the product's own step, split into its parts. Measured.

    python -m benchmarks.trace_step --method moco              # ResNet-50, 256 images of 224 pixels, on the GPU
    python -m benchmarks.trace_step --device cpu --backbone small_resnet16 --batch 16 --size 32 --steps 2
    python -m benchmarks.trace_step --trace FILE.json.gz       # split up a trace made before, on any machine

Other options are those of `python -m fastssl.train METHOD`, such as --queue_size 4096. The views are random and lie on
the device; everything else (recipe, autocast, optimizer, check of the gradients) is what the command line makes.
`benchmarks.attribution` says what counts as which part's time.
"""

import argparse
import datetime
import gzip
import json
import shlex
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.attribution import Split, read_trace, split
from benchmarks.kernel_markdown import table
from benchmarks.step_parts import BACKBONE, STEP, Ranges
from fastssl import cli, info, train
from fastssl.engine.build import build_method
from fastssl.engine.config import Config, check
from fastssl.engine.device import autocast_dtype, keep_freed_memory
from fastssl.engine.optimizers import make_optimizer
from fastssl.engine.step import TrainingStep
from fastssl.errors import FastsslError

RATE = 0.01  # learning rate: any that leaves the gradients finite
WARM_UP = 5  # steps: cuDNN tries its algorithms, Triton compiles, the allocator and the clocks settle
OUTPUT = Path("runs/trace_step")
LARGEST = 12  # kernels outside the backbone that are named


def configuration(options: argparse.Namespace, others: list[str]) -> Config:
    """The configuration that the command line makes of the method's ImageNet recipe and these options.

    Raises:
        FastsslError: an option that does not exist or cannot be traced.
    """
    chosen = [f"--recipe={train.default_recipe(options.method, 'folder')}", f"--backbone={options.backbone}"]
    chosen += [f"--batch_size={options.batch}", f"--gpus={int(options.device == 'cuda')}"]
    if options.method == "moco":
        # One GPU's part of a batch; the recipe's 8 parts stand for 8 GPUs and would make the backbone slower.
        chosen.append("--bn_splits=1")
    config, _ = train.parse([options.method, *chosen, *others])
    check(config)
    if config.compile:
        raise FastsslError("compile true cannot be traced by part: torch.compile would trace the hooks; leave it out")
    return config


def make_step(config: Config, device: torch.device, size: int) -> tuple[TrainingStep, list[Tensor]]:
    """The training step as the trainer makes it, and two random views.

    Args:
        config: of the training.
        device: to train on.
        size: pixels of the views' sides.
    """
    dtype = autocast_dtype(config.precision, device)
    torch.manual_seed(config.seed)
    torch.backends.cudnn.benchmark = not config.deterministic
    order = torch.channels_last if config.channels_last else torch.contiguous_format
    method = build_method(config, total_steps=1000).to(device=device, memory_format=order).train()  # type: ignore[call-overload]
    step = TrainingStep(config, method, make_optimizer(method, config, apex=config.apex), device, dtype)
    views = [
        torch.randn(config.batch_size, 3, size, size, device=device, dtype=dtype).contiguous(memory_format=order)
        for _ in "qk"
    ]
    return step, views


def record(step: TrainingStep, views: list[Tensor], count: int, file: Path, warm_up: int) -> float:
    """Make steps, and write a trace of them.

    Args:
        step: to make.
        views: of every batch.
        count: steps to record.
        file: Chrome trace to write, ends in .json.gz.
        warm_up: steps before that.

    Returns:
        Seconds of a step without the profiler, the median of `count`.

    Raises:
        FastsslError: a step was left out for its gradients.
    """
    for _ in range(warm_up):
        step(views, RATE)
    seconds = [timed(step, views) for _ in range(count)]
    with Ranges(step):
        with torch.profiler.profile():  # the first one sets CUPTI up
            step(views, RATE)
        with torch.profiler.profile() as profile:
            for _ in range(count):
                with torch.profiler.record_function(STEP):
                    step(views, RATE)
    if step.skipped:
        raise FastsslError(f"{step.skipped} steps had gradients that are not finite: the trace lacks their updates")
    file.parent.mkdir(parents=True, exist_ok=True)
    profile.export_chrome_trace(str(file))
    content = json.loads(gzip.decompress(file.read_bytes()))
    for name in ("host_name", "traceName"):  # this machine's name and a folder of it
        content.pop(name, None)
    file.write_bytes(gzip.compress(json.dumps(content).encode(), 6))
    return statistics.median(seconds)


def timed(step: TrainingStep, views: list[Tensor]) -> float:
    """Seconds of a step, from a device that has nothing to do to one that has done it."""
    wait = torch.cuda.synchronize if step.device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    step(views, RATE)
    wait()
    return time.perf_counter() - start


def report(result: Split) -> dict[str, Any]:
    """What a trace says, as data that JSON can hold; times in milliseconds a step."""
    scale = 1e-3 / result.steps
    outside = [item for item in result.times.items() if item[0][0] not in BACKBONE]
    return {
        "steps": result.steps,
        "time_of": "kernels, copies and fills" if result.on_gpu else "the calling thread, profiler included",
        "total_ms": result.total * scale,
        "parts": {part: {"ms": time * scale, "share": time / result.total} for part, time in result.parts.items()},
        "share_outside_backbone": result.outside,
        "without_launch_ms": result.without_launch * scale,
        "largest_outside_backbone": [
            {"part": part, "name": name, "ms": time * scale}
            for (part, name), time in sorted(outside, key=lambda item: -item[1])[:LARGEST]
        ],
    }


def tables(found: dict[str, Any]) -> list[str]:
    """A report for people, in lines of Markdown."""
    lines = table(
        [
            {"part": part, "ms a step": f"{row['ms']:.3f}", "share": f"{row['share']:.2%}"}
            for part, row in found["parts"].items()
        ]
    )
    lines += [f"Time of {found['time_of']}: {found['total_ms']:.3f} ms a step, mean of {found['steps']}."]
    if found["without_launch_ms"]:
        lines += [f"Without a launch in the trace, so in rest: {found['without_launch_ms']:.3f} ms."]
    lines += ["", "Largest outside the backbone:", ""]
    lines += table(
        [
            # A kernel's name may be hundreds of characters of template arguments.
            {"part": row["part"], "name": row["name"][:90], "ms a step": f"{row['ms']:.3f}"}
            for row in found["largest_outside_backbone"]
        ]
    )
    return [*lines, f"**Share outside the backbone: {found['share_outside_backbone']:.2%}**"]


def markdown(found: dict[str, Any]) -> str:
    """The report of a run, with its facts before the tables."""
    step = f"A step without the profiler: {found['step_ms']:.3f} ms"
    if found["device_type"] == "cuda":
        step += f"; the GPU is busy {found['total_ms'] / found['step_ms']:.1%} of it"
    lines = [
        f"# A training step of {found['method']}: where its time goes",
        "",
        f"Measured on {found['device']}, {found['date']}: `{found['command']}`.",
        ", ".join(f"{name} {found[name]}" for name in ("backbone", "batch", "size", "dtype", "torch")) + ".",
        f"{step}.",
        "",
        *tables(found),
    ]
    return "\n".join(lines) + "\n"


def device_name(device: torch.device) -> str:
    """The device as people call it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{info.collect()['cpu']['model']}, {torch.get_num_threads()} threads"


def trace(options: argparse.Namespace, others: list[str], command: str) -> dict[str, Any]:
    """Build, warm up, record and split up.

    Args:
        options: of the command line.
        others: options for the training.
        command: to be told in the report.
    """
    device = torch.device(options.device)
    config = configuration(options, others)
    file = options.output / f"trace-{options.method}-{device.type}.json.gz"
    if device.type == "cpu":
        keep_freed_memory()
    step, views = make_step(config, device, options.size)
    seconds = record(step, views, options.steps, file, options.warm_up)
    return {
        "method": options.method,
        "device": device_name(device),
        "device_type": device.type,
        "date": datetime.date.today().isoformat(),
        "command": command,
        "backbone": config.backbone,
        "batch": config.batch_size,
        "size": options.size,
        "dtype": str(step.dtype or torch.float32).removeprefix("torch."),
        "torch": torch.__version__,
        "step_ms": seconds * 1e3,
        **report(split(read_trace(file), on_gpu=device.type == "cuda")),
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.trace_step", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    result.add_argument("--method", choices=("moco", "byol"), default="moco")
    result.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    result.add_argument("--steps", type=int, default=5, help="to record")
    result.add_argument("--warm-up", type=int, default=WARM_UP, help="steps before")
    result.add_argument("--backbone", default="resnet50")
    result.add_argument("--batch", type=int, default=256, help="images a step")
    result.add_argument("--size", type=int, default=224, help="pixels of the views' sides")
    result.add_argument("--output", type=Path, default=OUTPUT, help="folder for trace, JSON and Markdown")
    result.add_argument("--trace", type=Path, help="do not train, split up this trace")
    return result


def main(arguments: list[str]) -> int:
    """Trace, print, write."""
    options, others = parser().parse_known_args(arguments)
    if options.trace:
        print("\n".join(tables(report(split(read_trace(options.trace))))))
        return 0
    for name in ("steps", "warm_up", "batch", "size"):
        if getattr(options, name) < 1:
            raise FastsslError(f"{name} must be 1 or more, got {getattr(options, name)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise FastsslError("device cuda: torch sees no CUDA device here; use --device cpu with a small network")
    found = trace(options, others, shlex.join(["python", "-m", "benchmarks.trace_step", *arguments]))
    name = f"step-{options.method}-{options.device}"
    text = markdown(found)
    (options.output / f"{name}.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    (options.output / f"{name}.md").write_text(text)
    print(text, end="")
    return 0


if __name__ == "__main__":
    cli.run(main)
