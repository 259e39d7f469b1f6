"""The plan of a training on some GPUs: memory, collectives, operations, time and cost, all predicted."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from fastssl.engine.config import Config, check
from fastssl.errors import FastsslError
from fastssl.planning import collectives, memory, parts
from fastssl.planning.devices import GIB, Device
from fastssl.planning.timing import Times, play
from fastssl.planning.trace import Operation, Trace, trace_step

# Assumed bytes that no tensor accounts for.
CONTEXT = 0.6 * GIB  # the driver, its libraries and their kernels
COMMUNICATION = 0.4 * GIB  # NCCL's buffers
WORKSPACE = 0.5 * GIB  # of cuDNN and cuBLAS
FRAGMENTS = 0.05  # of the tensors, lost between them
DTYPES = {"auto": torch.bfloat16, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": None}


@dataclass(frozen=True)
class Plan:
    """What is predicted.

    Attributes:
        name, device, gpus, batch: the recipe, the device, how many, and images a step and GPU.
        trace: the step of one GPU.
        times: of the step.
        largest_batch: images a GPU that fit; 0: not even one.
        prefetched: bytes of batches made ahead.
        steps, images: of the whole training, and of the data set.
    """

    name: str
    device: Device
    gpus: int
    batch: int
    trace: Trace
    times: Times
    largest_batch: int
    prefetched: int
    steps: int
    images: int

    @property
    def memory(self) -> dict[str, float]:
        """Bytes by part at the peak, with what no tensor accounts for."""
        return {
            **self.trace.memory,
            "prefetched batches": self.prefetched,
            "outside tensors": reserve(self.trace.peak + self.prefetched, self.gpus),
        }

    @property
    def peak(self) -> float:
        """Bytes a GPU."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether the device has as much memory."""
        return self.peak <= self.device.memory

    @property
    def images_per_second(self) -> float:
        """Over all GPUs."""
        return self.batch * self.gpus / self.times.step

    @property
    def hours(self) -> float:
        """Of all steps, without evaluations, checkpoints and waiting for images."""
        return self.steps * self.times.step / 3600

    @property
    def operations(self) -> list[dict[str, Any]]:
        """Operations, bytes and kernels of a step by part and pass."""
        rows: dict[tuple[str, bool], dict[str, Any]] = {}
        for event in self.trace.events:
            if isinstance(event, Operation):
                direction = "backward" if event.backward else "forward" if event.part in parts.NETWORK else ""
                start = {"part": event.part, "pass": direction, "flops": 0.0, "bytes": 0.0, "kernels": 0}
                row = rows.setdefault((event.part, event.backward), start)
                for key in ("flops", "bytes", "kernels"):
                    row[key] += getattr(event.work, key)
        return [row for row in rows.values() if row["kernels"]]

    @property
    def shares(self) -> dict[str, float]:
        """Shares of the step: outside the backbone by part, in all, and what self-supervision adds of it."""
        times, inside = self.times, (parts.BACKBONE, parts.MOMENTUM_BACKBONE)
        names = {*times.busy, *times.idle, *times.exposed}
        shares = sorted(((times.of(name) / times.step, name) for name in names), reverse=True)
        rest = {name: share for share, name in shares if name not in inside}
        return {
            **rest,
            "outside the backbone": sum(rest.values()),
            "added by self-supervision": sum(rest.get(name, 0.0) for name in parts.ADDED),
        }

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        times = self.times
        return {
            "recipe": self.name, "device": self.device.title, "gpus": self.gpus,
            "batch_per_gpu": self.batch, "batch": self.batch * self.gpus, "parameters": self.trace.parameters[0],
            "momentum_parameters": self.trace.parameters[1], "predicted_memory_bytes": self.memory,
            "predicted_peak_bytes": self.peak, "predicted_fits": self.fits,
            "predicted_largest_batch_per_gpu": self.largest_batch,
            "collectives": collectives.summed(self.trace.collectives), "operations": self.operations,
            "predicted_step_seconds": times.step, "predicted_busy_seconds": dict(times.busy),
            "predicted_idle_seconds": dict(times.idle), "predicted_exposed_seconds": dict(times.exposed),
            "predicted_hidden_communication_seconds": times.hidden, "predicted_shares": self.shares,
            "predicted_images_per_second": self.images_per_second, "images": self.images, "steps": self.steps,
            "predicted_hours": self.hours, "predicted_gpu_hours": self.hours * self.gpus,
        }  # fmt: skip


def make_plan(config: Config, name: str, gpus: int, device: Device, images: int) -> Plan:
    """Plan a training; takes seconds and no GPU.

    Args:
        config: of the training; its data are not opened.
        name: of the recipe.
        gpus: how many.
        device: of which kind.
        images: in the data set.

    Raises:
        FastsslError: the configuration is wrong, or the batch cannot be divided among the GPUs.
    """
    check(config)
    batch = _share(config, gpus)
    if images < config.batch_size:
        raise FastsslError(f"images {images} is less than one batch of {config.batch_size}")
    dtype = DTYPES[config.precision]
    trace = trace_step(config, gpus, batch, dtype)
    return Plan(
        name=name, device=device, gpus=gpus, batch=batch, trace=trace, times=play(trace, device, config.compile),
        largest_batch=_largest(config, trace, device, dtype), prefetched=config.prefetch * trace.views,
        steps=config.steps or max(1, round(config.epochs * (images // config.batch_size))), images=images,
    )  # fmt: skip


def reserve(tensors: float, gpus: int) -> float:
    """Bytes that a GPU holds beside its tensors: assumed."""
    return CONTEXT + WORKSPACE + (COMMUNICATION if gpus > 1 else 0) + FRAGMENTS * tensors


def _share(config: Config, gpus: int) -> int:
    """Images of each GPU."""
    if gpus < 1:
        raise FastsslError(f"gpus must be 1 or more, got {gpus}: a plan is for GPUs")
    if config.batch_size % gpus:
        near = max(1, round(config.batch_size / gpus)) * gpus
        raise FastsslError(
            f"batch_size {config.batch_size} cannot be divided among {gpus} GPUs: use --batch_size {near}, or "
            "--batch_per_gpu N for as many images on each"
        )
    batch = config.batch_size // gpus
    if batch % config.accumulate:
        raise FastsslError(f"accumulate {config.accumulate} does not divide the {batch} images of a GPU")
    return batch


def _largest(config: Config, trace: Trace, device: Device, dtype: torch.dtype | None) -> int:
    """Images a GPU that fit: what grows with the batch gives a guess, a step with as many the rest."""
    unit = math.lcm(config.accumulate, max(1, getattr(config, "bn_splits", 1) // trace.world))
    room = (device.memory - reserve(0, trace.world)) / (1 + FRAGMENTS)

    def fitting(batch: int, used: float, an_image: float) -> int:
        return max(0, math.floor((batch + (room - used) / an_image) / unit) * unit)

    used = trace.peak + config.prefetch * trace.views
    grows = used - sum(trace.memory.get(kind, 0) for kind in memory.FIXED)
    guess = fitting(trace.batch, used, grows / trace.batch)
    if guess in (0, trace.batch):
        return guess
    other = trace_step(config, trace.world, guess, dtype, settled=False)
    there = other.peak + config.prefetch * other.views
    return fitting(guess, there, (there - used) / (guess - trace.batch))
