"""The CUDA kernels run on the CPU, a thread for each thread, under sanitizers; nvcc must fit them into registers."""

import platform
import shutil
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor

from fastssl.ops import reference

ROOT = Path(__file__).parents[2]
CUDA_SOURCES = sorted((ROOT / "csrc").rglob("*.cu"))
GXX, NVCC = shutil.which("g++"), shutil.which("nvcc")

TYPES = {torch.uint8: 1, torch.float32: 2, torch.float64: 3, torch.float16: 4, torch.bfloat16: 5}  # as enum class Type
CHUNKS = {torch.uint8: 16384, torch.float32: 4096, torch.float64: 2048}  # elements that a block updates
LARGE, SMALL = 744, 92  # segments in one launch, with drivers since CUDA 12.1 and older ones
NEW_DRIVER, OLD_DRIVER = 12010, 12000


@dataclass
class Segment:
    target: Tensor
    source: Tensor
    shadow: Tensor | None = None
    offsets: tuple[int, int, int] = (0, 0, 0)  # elements from aligned memory to target, source and shadow

    @property
    def tensors(self) -> list[Tensor | None]:
        return [self.target, self.source, self.shadow]


@dataclass
class Outcome:
    error: int
    launches: list[tuple[int, int]]  # blocks and bytes of parameters
    results: list[tuple[Tensor, Tensor | None]]  # target and shadow of each segment


@pytest.fixture(scope="module", params=["address,undefined", "thread"])
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if GXX is None:
        pytest.skip("there is no g++")
    program = tmp_path_factory.mktemp("cuda_on_cpu") / "ema_update_test"
    here = Path(__file__).parent / "cuda_on_cpu"
    sources = [ROOT / "csrc/ops/cuda/ema_update_kernel.cu", here / "ema_update_test.cpp"]
    command = [GXX, "-x", "c++", "-std=c++17", "-O1", "-g1", "-pthread", f"-I{here}", f"-I{ROOT / 'csrc'}"]
    command += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    command += [f"-fsanitize={request.param}", "-fno-sanitize-recover=all"]
    if request.param == "thread" and platform.machine() == "x86_64":
        command.append(
            "-minline-all-stringops"
        )  # else the copying of parameters to each thread is watched byte by byte
    subprocess.run([*command, *map(str, sources), "-o", str(program)], check=True)
    return program


def update(
    program: Path, segments: Sequence[Segment], momentum: float, on_device: bool = False, driver: int = NEW_DRIVER
) -> Outcome:
    given, taken = program.with_suffix(".in"), program.with_suffix(".out")
    with given.open("wb") as inputs:
        inputs.write(struct.pack("=qqdqq", 1, driver, momentum, on_device, len(segments)))
        for segment in segments:
            inputs.write(struct.pack("=q", segment.target.numel()))
            for tensor, offset in zip(segment.tensors, segment.offsets, strict=True):
                if tensor is None:
                    inputs.write(struct.pack("=qq", 0, 0))
                else:
                    inputs.write(struct.pack("=qq", TYPES[tensor.dtype], offset * tensor.element_size()))
                    inputs.write(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    process = subprocess.run([program, given, taken], stderr=subprocess.PIPE, text=True)
    assert process.returncode == 0, process.stderr
    with taken.open("rb") as outputs:

        def read(like: Tensor | None) -> Tensor | None:
            if like is None:
                return None
            data = bytearray(outputs.read(like.numel() * like.element_size()))
            return torch.frombuffer(data, dtype=like.dtype) if data else torch.empty_like(like)

        error, launches = struct.unpack("=qq", outputs.read(16))
        sizes = [struct.unpack("=qq", outputs.read(16)) for _ in range(launches)]
        results = []
        for segment in segments:
            target = read(segment.target)
            assert target is not None
            results.append((target, read(segment.shadow)))
        assert not outputs.read()
    return Outcome(error, sizes, results)


def fused(t: Tensor, s: Tensor, momentum: float) -> Tensor:
    """fma(w, s − t, t) or fma(m, t − s, s) in float32; double holds the product, and rounds the sum well enough."""
    m, w = (torch.tensor(x, dtype=torch.float32) for x in (momentum, 1 - momentum))
    if w < 0.5:
        return (w.double() * (s - t).double() + t.double()).float()
    return (m.double() * (t - s).double() + s.double()).float()


def check(outcome: Outcome, segments: Sequence[Segment], momentum: float) -> None:
    assert outcome.error == 0
    for segment, (target, shadow) in zip(segments, outcome.results, strict=True):
        dtypes = [None if x is None else x.dtype for x in segment.tensors]
        what = (*dtypes, *segment.offsets, segment.target.numel(), momentum)
        if segment.target.dtype == torch.uint8:
            assert torch.equal(target, segment.source), what
            assert shadow is None or torch.equal(shadow, segment.source), what
            continue
        t, s = segment.target, segment.source.to(segment.target.dtype)
        exact = t.double()
        reference.ema_update_([exact], [s.double()], [], momentum)
        largest = torch.maximum(t.abs(), s.abs()).double()
        assert ((target.double() - exact).abs() <= 2 * torch.finfo(t.dtype).eps * largest).all(), what
        if t.dtype == torch.float32:
            assert torch.equal(target, fused(t, s, momentum)), what
        if momentum in (0, 1):
            assert torch.equal(target, t if momentum else s), what
        assert shadow is None or torch.equal(shadow, target.to(shadow.dtype)), what


def check_update(
    program: Path, segments: Sequence[Segment], momentum: float, on_device: bool = False, driver: int = NEW_DRIVER
) -> list[tuple[int, int]]:
    outcome = update(program, segments, momentum, on_device, driver)
    check(outcome, segments, momentum)
    return outcome.launches


def random_segment(
    target: torch.dtype,
    source: torch.dtype,
    shadow: torch.dtype | None,
    count: int,
    generator: torch.Generator,
    offsets: tuple[int, int, int] = (0, 0, 0),
) -> Segment:
    def draw(dtype: torch.dtype) -> Tensor:
        if dtype == torch.uint8:
            return torch.randint(256, (count,), generator=generator, dtype=dtype)
        return torch.randn(count, generator=generator, dtype=torch.float64).to(dtype)

    return Segment(draw(target), draw(source), None if shadow is None else draw(shadow), offsets)


COMBINATIONS = [
    (target, source, shadow)
    for target in (torch.float32, torch.float64)
    for source in (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    for shadow in (None, torch.float16, torch.bfloat16)
] + [(torch.uint8, torch.uint8, shadow) for shadow in (None, torch.uint8)]


@pytest.mark.parametrize(
    ("momentum", "on_device"), [(0, False), (0.25, True), (0.5, False), (0.999, False), (0.999, True), (1, True)]
)
def test_all_types_in_one_launch(program: Path, momentum: float, on_device: bool, generator: torch.Generator) -> None:
    segments = [random_segment(*types, 371, generator) for types in COMBINATIONS]
    launches = check_update(program, segments, momentum, on_device)
    assert len(launches) == 1


def test_misaligned_tensors(program: Path, generator: torch.Generator) -> None:
    segments = [
        random_segment(*types, 555, generator, offsets)
        for types in COMBINATIONS
        for offsets in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (3, 2, 1))
        if types[2] is not None or offsets != (0, 0, 1)
    ]
    for half in (segments[:SMALL], segments[SMALL:]):
        assert len(check_update(program, half, 0.99)) == 1


def test_sizes(program: Path, generator: torch.Generator) -> None:
    combinations: list[tuple[torch.dtype, torch.dtype, torch.dtype | None]] = [
        (torch.float32, torch.float32, None),
        (torch.float32, torch.float64, torch.bfloat16),
        (torch.float64, torch.float16, torch.float16),
        (torch.uint8, torch.uint8, torch.uint8),
    ]
    segments, blocks = [], 0
    for types in combinations:
        chunk = CHUNKS[types[0]]
        edges = [chunk - 1, chunk, chunk + 1, 3 * chunk + 19]
        for size in [0, 1, 2, 3, 7, 8, 15, 16, 17, 255, 256, 257, 1023, 1025, *edges, 0]:
            segments.append(random_segment(*types, size, generator))
            blocks += -(-size // chunk)
    (launch,) = check_update(program, segments, 0.9)
    assert launch[0] == blocks


def test_nothing_to_do(program: Path, generator: torch.Generator) -> None:
    nothing = random_segment(torch.float32, torch.float32, None, 0, generator)
    for segments in ([], [nothing] * 3, [nothing] * (LARGE + 1)):
        assert check_update(program, segments, 0.9) == []


def test_resnet50_is_one_launch(program: Path, generator: torch.Generator) -> None:
    with torch.device("meta"):
        state = torchvision.models.resnet50().state_dict()
    assert len(state) == 320
    segments = []
    for tensor in state.values():
        if tensor.is_floating_point():
            count = tensor.numel() // 128 + 1
            segments.append(random_segment(torch.float32, torch.float32, torch.bfloat16, count, generator))
        else:
            segments.append(random_segment(torch.uint8, torch.uint8, torch.uint8, 8, generator))
    (launch,) = check_update(program, segments, 0.999)
    assert 4096 < launch[1] <= 32764
    launches = check_update(program, segments, 0.999, driver=OLD_DRIVER)
    assert len(launches) == -(-320 // SMALL)
    assert all(size <= 4096 for _, size in launches)


def test_short_lists_travel_light_and_long_ones_in_turn(program: Path, generator: torch.Generator) -> None:
    def launches(count: int, driver: int) -> list[int]:
        segments = [random_segment(torch.float32, torch.float32, None, 3 + i % 3, generator) for i in range(count)]
        return [size for _, size in check_update(program, segments, 0.9, driver=driver)]

    (small,) = launches(SMALL, NEW_DRIVER)
    assert small <= 4096
    assert launches(SMALL + 1, OLD_DRIVER) == [small, small]
    large, last = launches(LARGE + 1, NEW_DRIVER)
    assert large == last <= 32764


def test_every_half_value_comes_through(program: Path) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    segments = [
        Segment(torch.zeros(len(bits), dtype=target), bits.view(dtype), torch.empty(len(bits), dtype=dtype))
        for target in (torch.float32, torch.float64)
        for dtype in (torch.float16, torch.bfloat16)
    ]
    for segment, (target, shadow) in zip(segments, update(program, segments, 0).results, strict=True):
        assert shadow is not None
        torch.testing.assert_close(target, segment.source.to(target.dtype), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(shadow, segment.source, rtol=0, atol=0, equal_nan=True)
    for segment, (target, _) in zip(segments, update(program, segments, 0.999).results, strict=True):
        values = segment.source.to(target.dtype)
        assert torch.equal(target.isnan(), values.isnan())
        assert torch.equal(target[values.isinf()], values[values.isinf()])


def test_what_has_no_weight_has_no_say(program: Path) -> None:
    odd, ones = torch.tensor([torch.nan, torch.inf, -torch.inf]), torch.ones(3)
    for momentum, segment in ((0, Segment(odd, ones)), (1, Segment(ones, odd))):
        ((target, _),) = update(program, [segment], momentum).results
        assert torch.equal(target, ones)


def test_shadows_are_rounded_to_nearest_even(program: Path, generator: torch.Generator) -> None:
    bits = torch.randint(-(2**31), 2**31, (20000,), generator=generator).int()
    bits[:10000] &= ~0x1FFF  # ties of float16
    bits[:5000] &= ~0x7FFF  # ties of bfloat16
    bits[:7500:2] = (bits[:7500:2] & 0x8FFFFFFF - 2**32) | 0x38000000  # of numbers that float16 has
    floats = bits.view(torch.float32)
    doubles = floats.double() * (1 + torch.tensor([-(2.0**-40), 0, 2.0**-40]).double().repeat(6667)[:20000])
    segments = [
        Segment(source, source, torch.empty(len(source), dtype=shadow))
        for source in (floats, doubles)
        for shadow in (torch.float16, torch.bfloat16)
    ]
    outcome = update(program, segments, 1)
    for segment, (target, shadow) in zip(segments, outcome.results, strict=True):
        assert shadow is not None
        number = segment.target.isfinite()
        assert torch.equal(target[number], segment.target[number])
        assert torch.equal(shadow[number], segment.target.to(shadow.dtype)[number])
        assert torch.equal(shadow.isnan(), target.isnan())


def test_a_model_that_agrees_stays(program: Path, generator: torch.Generator) -> None:
    values = torch.randn(1000, generator=generator)
    ((target, _),) = update(program, [Segment(values, values)], 0.9).results
    assert torch.equal(target, values)


def test_more_elements_than_32_bits_count(program: Path) -> None:
    process = subprocess.run([program, "far"], stderr=subprocess.PIPE, text=True)
    assert process.returncode == 0, process.stderr


def test_the_sanitizer_sees_faults(program: Path) -> None:
    process = subprocess.run([program, "fault"], stderr=subprocess.PIPE, text=True)
    assert process.returncode != 0
    assert "heap-buffer-overflow" in process.stderr or "data race" in process.stderr


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
@pytest.mark.parametrize("source", CUDA_SOURCES, ids=lambda path: path.stem)
def test_registers_suffice(source: Path, tmp_path: Path) -> None:
    chips = ("80", "90", "100", "120")
    command = [str(NVCC), "-std=c++17", "-O3", "-fatbin", "-Xptxas=-v", "--threads=2", f"-I{ROOT / 'csrc'}"]
    command += [f"-gencode=arch=compute_{chip},code=sm_{chip}" for chip in chips]
    process = subprocess.run(
        [*command, str(source), "-o", str(tmp_path / "kernels.fatbin")], check=True, stderr=subprocess.PIPE, text=True
    )
    report = [line for line in process.stderr.splitlines() if "stack frame" in line]
    assert len(report) == process.stderr.count("Compiling entry function")
    for line in report:
        assert line.strip() == "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
