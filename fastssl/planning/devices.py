"""The table of devices: what each can do at most, what share of that is reached, and where the numbers are from."""

import difflib
from dataclasses import dataclass

from fastssl.errors import FastsslError

GIB = 2**30
NODE = 8  # GPUs of a machine


@dataclass(frozen=True, kw_only=True)
class Device:
    """A GPU, its neighbours in a machine of 8, and the network between the machines.

    Attributes:
        title: as printed.
        half, tf32, float32: dense operations a second, of bfloat16 and float16, tf32 and float32.
        bandwidth: of device memory, bytes a second.
        memory: bytes that programs can have.
        convolution: share of the peak that cuDNN's convolutions reach in channels_last order (assumed: 0.55 brings
            ResNet-50 near the A100's published rate, a higher peak is harder to reach, the others
            follow their neighbours).
        streaming: share of the bandwidth that a kernel reaches which only streams (assumed).
        link: bytes a second and direction of one GPU to its neighbours.
        hop: seconds that a message takes to a neighbour (assumed).
        network: bytes a second and direction of a machine of 8 to the others (the common choice for such machines).
        network_hop: seconds that a message takes to another machine (assumed).
        reached: share of link and network that NCCL reaches with large messages (assumed, after nccl-tests).
        source: of the published figures.
    """

    title: str
    half: float
    tf32: float
    float32: float
    bandwidth: float
    memory: float
    convolution: float
    streaming: float = 0.8
    link: float
    hop: float = 1e-6
    network: float
    network_hop: float = 5e-6
    reached: float = 0.8
    source: str


DEVICES = {
    "a100-40": Device(
        title="A100 SXM 40 GB", half=312e12, tf32=156e12, float32=19.5e12, bandwidth=1.555e12, memory=39.4 * GIB,
        convolution=0.55, link=300e9, network=200e9,
        source="NVIDIA A100 datasheet (40 GB SXM); DGX A100: NVLink 3, 8 × 200 Gb/s",
    ),
    "a100-80": Device(
        title="A100 SXM 80 GB", half=312e12, tf32=156e12, float32=19.5e12, bandwidth=2.039e12, memory=79.1 * GIB,
        convolution=0.55, link=300e9, network=200e9,
        source="NVIDIA A100 datasheet (80 GB SXM); DGX A100: NVLink 3, 8 × 200 Gb/s",
    ),
    "b200": Device(
        title="B200", half=2250e12, tf32=1125e12, float32=75e12, bandwidth=8e12, memory=178 * GIB,
        convolution=0.35, link=900e9, network=400e9,
        source="NVIDIA Blackwell architecture technical brief (dense: half of the figures with sparsity); DGX B200: "
        "NVLink 5, 8 × 400 Gb/s",
    ),
    "h100": Device(
        title="H100 SXM", half=989.4e12, tf32=494.7e12, float32=66.9e12, bandwidth=3.35e12, memory=79.1 * GIB,
        convolution=0.45, link=450e9, network=400e9,
        source="NVIDIA H100 datasheet (SXM); DGX H100: NVLink 4, 8 × 400 Gb/s",
    ),
    "h200": Device(
        title="H200", half=989.4e12, tf32=494.7e12, float32=66.9e12, bandwidth=4.8e12, memory=139.8 * GIB,
        convolution=0.45, link=450e9, network=400e9,
        source="NVIDIA H200 datasheet (SXM); DGX H200: NVLink 4, 8 × 400 Gb/s",
    ),
    "l40s": Device(
        title="L40S", half=362e12, tf32=183e12, float32=91.6e12, bandwidth=0.864e12, memory=44.4 * GIB,
        convolution=0.5, link=32e9, hop=5e-6, network=50e9, reached=0.6,
        source="NVIDIA L40S datasheet (dense); PCIe 4.0 × 16; the network, 2 × 200 Gb/s a machine, is assumed",
    ),
    "rtx4090": Device(
        title="GeForce RTX 4090", half=165.2e12, tf32=82.6e12, float32=82.6e12, bandwidth=1.008e12, memory=23.5 * GIB,
        convolution=0.6, link=32e9, hop=10e-6, network=12.5e9, reached=0.6,
        source="NVIDIA Ada GPU architecture whitepaper (dense, float32 accumulation); PCIe 4.0 × 16 through the host; "
        "the network, 100 Gb/s a machine, is assumed",
    ),
}  # fmt: skip
ALIASES = {"a100": "a100-80", "4090": "rtx4090", "h100-sxm": "h100"}


def find_device(name: str) -> Device:
    """The device of that name.

    Raises:
        FastsslError: there is none; with the nearest.
    """
    key = ALIASES.get(name.lower(), name.lower())
    if key in DEVICES:
        return DEVICES[key]
    close = difflib.get_close_matches(key, [*DEVICES, *ALIASES], n=2, cutoff=0.4)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise FastsslError(f"unknown device '{name}': {hint}known are {', '.join(DEVICES)}")
