"""How long a recorded step takes on a device: every kernel at its roofline, played on a GPU, a host and a network."""

import math
from collections import defaultdict
from dataclasses import dataclass, field

from fastssl.planning import parts
from fastssl.planning.collectives import Collective
from fastssl.planning.devices import NODE, Device
from fastssl.planning.trace import Event, Operation, Trace
from fastssl.planning.work import FUSED, HALF, HALF_FUSED, POINTWISE, TF32, Work

# Assumed, in seconds.
LAUNCH = 2e-6  # from the end of a kernel to the work of the next
SYNC = 20e-6  # until the host knows that the GPU is done
COLLECTIVE = 10e-6  # for a collective to begin
CALL = {False: 20e-6, True: 12e-6}  # of the host for an operation with a kernel, in the forward and backward pass
VIEW = 2e-6  # of the host for one without
# Shares of the peaks (tf32's, three products for one; the half one) that the fused loss reaches. The first was measured
# on an H100: 0.70 ms for 256 queries and 65,536 float32 keys (benchmarks/results/gpu); the second is what
# benchmarks/results/kernel_report.md predicts for it with half keys.
FUSED_LOSS, HALF_FUSED_LOSS = 0.075, 0.41
COMPILED_CALLS = 0.2  # share of the host's calls that is left where torch.compile made one of many


def _zeros() -> dict[str, float]:
    return defaultdict(float)


@dataclass
class Times:
    """Of a step, in seconds, by part; the sum of busy, idle and exposed is the step.

    Attributes:
        busy: the GPU computes.
        idle: the GPU waits for the host to start a kernel.
        exposed: the GPU waits for a collective, by what it is for.
        hidden: the network works while the GPU computes.
    """

    busy: dict[str, float] = field(default_factory=_zeros)
    idle: dict[str, float] = field(default_factory=_zeros)
    exposed: dict[str, float] = field(default_factory=_zeros)
    hidden: float = 0.0

    @property
    def step(self) -> float:
        """Seconds of the step."""
        return float(sum(self.busy.values()) + sum(self.idle.values()) + sum(self.exposed.values()))

    def of(self, *names: str) -> float:
        """Seconds of some parts, waiting included."""
        return float(sum(times.get(name, 0.0) for times in (self.busy, self.idle, self.exposed) for name in names))


def play(trace: Trace, device: Device, compiled: bool = False) -> Times:
    """Let the step run twice, since the host may be ahead of the GPU or behind it, and time the second.

    Args:
        trace: the step.
        device: on which.
        compiled: whether torch.compile has fused the networks' pointwise operations into their neighbours.
    """
    player = _Player(device, compiled)
    player.step(trace.events)
    player.times = Times()
    player.step(trace.events)
    return player.times


class _Player:
    def __init__(self, device: Device, compiled: bool) -> None:
        self.device, self.compiled, self.times = device, compiled, Times()
        self.gpu = self.host = self.network = 0.0  # when each is done with what it has been given
        self.under_way: dict[str, float] = {}

    def step(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, Operation):
                self._operation(event)
            elif isinstance(event, Collective):
                self._collective(event)
            elif event.label is None:
                self.host = max(self.host, self.gpu) + SYNC
            else:
                self._wait(event.label)

    def _operation(self, one: Operation) -> None:
        if not one.backward:
            self._wait(parts.GRADIENTS)
        fused = self.compiled and one.part in parts.NETWORK
        host = one.work.calls * (CALL[one.backward] if one.work.kernels else VIEW)
        self.host += host * (COMPILED_CALLS if fused else 1)
        if not one.work.kernels or (fused and one.name in POINTWISE):
            return
        begin = max(self.gpu, self.host)
        self.times.idle[one.part] += begin - self.gpu
        busy = seconds(one.work, self.device)
        self.times.busy[one.part] += busy
        self.gpu = begin + busy

    def _collective(self, one: Collective) -> None:
        self.host += CALL[False]
        begin = max(self.gpu, self.network, self.host)
        duration = collective_seconds(one, self.device)
        self.network = begin + duration
        self.times.hidden += duration
        self.under_way[one.label] = self.network
        if not one.later:
            self._wait(one.label)

    def _wait(self, label: str) -> None:
        end = self.under_way.pop(label, 0.0)
        if end > self.gpu:
            self.times.exposed[label] += end - self.gpu
            self.times.hidden = max(0.0, self.times.hidden - (end - self.gpu))
            self.gpu = end


def seconds(one: Work, device: Device) -> float:
    """Of an operation on the GPU: the larger of its time at the reached peak and at the reached bandwidth, a launch."""
    peaks = {
        HALF: device.half * device.convolution,
        TF32: device.tf32 * device.convolution,
        FUSED: device.tf32 * FUSED_LOSS / 3,
        HALF_FUSED: device.half * HALF_FUSED_LOSS,
    }
    compute = one.flops / peaks.get(one.precision, device.float32 * device.convolution)
    return max(compute, one.bytes / (device.bandwidth * device.streaming)) + one.kernels * LAUNCH


def collective_seconds(one: Collective, device: Device) -> float:
    """Of a collective: within machines of 8 over their links, then between machines over the network (alpha-beta)."""
    inside = min(one.world, NODE)
    machines = math.ceil(one.world / NODE)
    link, network = device.link * device.reached, device.network * device.reached
    hops = (inside - 1) * device.hop + math.ceil(math.log2(machines)) * device.network_hop
    if one.kind == "all-reduce":  # reduce-scatter and all-gather inside, a part for each GPU outside
        moved = 2 * one.bytes * (inside - 1) / inside / link + 2 * one.bytes * (machines - 1) / machines / network
        return COLLECTIVE + 2 * hops + moved
    if one.kind == "all-to-all":
        others = one.bytes * (inside - 1) / one.world / link + NODE * one.bytes * (1 - inside / one.world) / network
        return (
            COLLECTIVE
            + min(one.world - 1, NODE * NODE) * device.hop
            + math.ceil(math.log2(machines)) * (device.network_hop)
            + others
        )
    if one.kind == "broadcast":
        return COLLECTIVE + hops + one.bytes / (network if machines > 1 else link)
    # All-gather, and reduce-scatter as its mirror image: what the others bring comes in.
    outside = inside * (machines - 1) * one.bytes / network
    return COLLECTIVE + hops + (one.world - 1) * one.bytes / link + outside


def share_outside(times: Times) -> float:
    """Share of the step, 0…1, that is neither the backbone's nor the momentum backbone's."""
    return 1 - times.of(parts.BACKBONE, parts.MOMENTUM_BACKBONE) / times.step
