"""What every GPU kernel compiles to on each chip, and how long it should take there. Predicted, not measured.

    python -m benchmarks.kernel_report            # all kernels and chips; needs no GPU, for those of csrc nvcc
    python -m benchmarks.kernel_report --check    # compile and check only, write nothing

For every kernel and configuration that ships, in Triton or in CUDA (csrc, by the name of the kernel and its template
arguments): registers, stack, shared memory, matrix instructions and the instruction mix of the main loop, from the code
that ptxas made (a loop's size does not depend on the number of keys). For the launches of some shapes of Triton's:
bytes and operations, counted from the launch's arguments; the roofline's floor; and a time.

- *Floor*: the largest of the matrix products at the chip's published dense peak, the exponentials at 16 a clock and
  multiprocessor, and every input read once and every output written once at the published bandwidth.
- *Device bytes* of a launch: the keys once, whatever the number of row blocks. The blocks of rows over one split of
  the queue are neighbours in the grid and run at the same time, so the first to ask brings a key into the L2 cache and
  the others find it there; with more blocks of rows than fit beside each other that holds while the keys fit the cache.
- *Cache bytes*: what all programs ask of the L2 cache, the splits' partial results among it, which are written by one
  launch and read by the next and never need to leave the cache.
- *Predicted*: the machine code of the whole kernel, its loops run as often as the shape asks, is played on a model of
  one multiprocessor (benchmarks/sass.py), with as many programs side by side as registers and shared memory allow,
  times the number of waves. What overlaps and what does not follows from the order of instructions, not from a factor.
  Left out, so that a real chip is rather slower: bank conflicts, instruction fetch, clocks lowered under load, launches
  (told apart: LAUNCH each, unless a CUDA graph hides them).
- *Enqueue* waits for memory twice in a row, for the state and for its ticket; that takes longer than its few bytes.
- *Augmentation*: programs of images that need no mean luma or are not blurred end at once and are not counted. Of the
  jitter all four parts are played, and both ways that an image can take behind it.
- *Momentum updates* only stream: predicted is their bytes at STREAMED of the published bandwidth, which is assumed.
"""

import argparse
import datetime
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import sass
from benchmarks.kernel_markdown import counted, markdown
from benchmarks.pipelining import PRODUCT, early_copies
from benchmarks.roofline import (
    AUGMENTATIONS,
    CHIPS,
    SHAPES,
    STREAMED,
    UPDATES,
    WORK,
    Augmentation,
    Chip,
    Row,
    Shape,
    Update,
    Work,
    augmentation_launches,
    ceil,
    launches,
    nbytes,
    touched,
)

LAUNCH = 2e-6  # seconds from the end of one kernel to the start of the next: assumed
MOST_THREADS = 1024  # of a block of any kernel
RESULTS = Path(__file__).parent / "results"
SOURCES = Path(__file__).parents[1] / "csrc"
PRODUCTS = ("split", "negatives", "augment_blur")  # kernels that must use matrix units
# Their instructions by chip. Any will do for tf32x3, which loads float32 and splits it in registers, and for the blur,
# whose tiles are smaller than those of the newer instructions.
MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTC", 120: "HMMA"}


def compiled(variant: Any) -> tuple[sass.Program, Any]:
    """The machine code of a variant and Triton's metadata.

    Raises:
        RuntimeError: its loop would race.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    result = triton.compile(variant.source(), target=GPUTarget("cuda", variant.chip, 32), options=variant.options)
    if variant.chip == 90 and "warp_group_dot" in result.asm["ttgir"] and not PRODUCT.search(result.asm["ttgir"]):
        raise RuntimeError(
            f"{variant.name}: benchmarks/pipelining.py does not know how Triton writes products any more"
        )
    if races := early_copies(result.asm["ttgir"], result.metadata.num_stages):
        raise RuntimeError(f"{variant.name} on sm_{variant.chip}: {'; '.join(races)}")
    return sass.read(result.asm["cubin"]), result.metadata


def kernel_row(name: str, chip: int, program: sass.Program, metadata: Any) -> Row:
    """What a table says of a compiled kernel."""
    loop = program.in_loop()
    return {
        "name": name,
        "chip": chip,
        "registers": program.registers,
        "stack": program.stack,
        "spills": sum(i.kind == "local" for i in program.instructions),
        "shared": metadata.shared,
        "warps": metadata.num_warps,
        "stages": metadata.num_stages,
        "matrix": sass.opcodes(program.instructions),
        "loop": sass.mix(loop) if program.loop else {},
        "loop_instructions": len(loop) if program.loop else 0,
    }


def find_nvcc() -> str | None:
    """The CUDA compiler of CUDA_HOME, else the one on PATH."""
    path = os.environ.get("PATH", os.defpath)
    if home := os.environ.get("CUDA_HOME"):
        path = os.pathsep.join([str(Path(home, "bin")), path])
    return shutil.which("nvcc", path=path)


def cuda_sources(parts: list[str] | None) -> list[str]:
    """The .cu files below SOURCES; given parts of kernels' names, only those that may have one, going by the file's."""
    names = sorted(str(path.relative_to(SOURCES)) for path in SOURCES.rglob("*.cu"))
    stems = {name: Path(name).stem.removesuffix("_kernel") for name in names}
    return [name for name in names if not parts or any(stems[name] in part or part in stems[name] for part in parts)]


class CudaMetadata(NamedTuple):
    """Of a CUDA kernel, what Triton's metadata says of its own."""

    shared: int
    num_warps: int
    num_stages: int = 1


def cuda_rows(chip: int, source: str) -> list[Row]:
    """Rows of the table of kernels: those of a .cu file."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("there is no nvcc on PATH or in CUDA_HOME")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "kernels.cubin")
        command = [nvcc, "-std=c++17", "-O3", f"-arch=sm_{chip}", "-cubin", f"-I{SOURCES}", "-o", str(out)]
        done = subprocess.run([*command, str(SOURCES / source)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"nvcc cannot compile {source} for sm_{chip}: {done.stderr[-2000:]}")
        cubin = out.read_bytes()
    threads = sass.most_threads(cubin)
    rows = [
        kernel_row(
            readable(name), chip, program, CudaMetadata(program.shared, ceil(threads.get(name, MOST_THREADS), 32))
        )
        for name, program in sass.read_all(cubin).items()
    ]
    return sorted(rows, key=lambda row: [int(word) if word.isdigit() else 0 for word in row["name"].split()])


def readable(mangled: str) -> str:
    """A kernel's own name and its template arguments: "ema_update 92"."""
    full = subprocess.run(["c++filt", "-p", mangled], capture_output=True, text=True, check=True).stdout.strip()
    found = re.search(r"(\w+?)(?:_kernel)?(?:<(.*)>)?$", full)
    if not found:
        raise ValueError(f"cannot read the name of {full!r}")
    return " ".join(filter(None, found.groups()))


def problems(row: Row) -> list[str]:
    """Why a kernel may not ship."""
    found = []
    where = f"{row['name']} on sm_{row['chip']}"
    if row["stack"] or row["spills"]:
        found.append(f"{where}: {row['stack']} bytes of stack and {row['spills']} accesses to it; want no spills")
    limit = CHIPS[row["chip"]].shared[0]
    if row["shared"] > limit:
        found.append(f"{where}: {row['shared']} bytes of shared memory; the chip has {limit}")
    want = "" if "tf32x3" in row["name"] or row["name"].startswith("augment") else MATRIX[row["chip"]]
    if row["name"].startswith(PRODUCTS) and not any(opcode.startswith(want) for opcode in row["matrix"]):
        found.append(f"{where}: no matrix instruction {want}; has {counted(row['matrix'])}")
    return found


def blocks_at_once(chip: Chip, program: sass.Program, metadata: Any) -> int:
    """Programs that a multiprocessor holds: by registers (given out by 256 a warp), shared memory and warps."""
    warps = metadata.num_warps
    by_registers = 65536 // (ceil(program.registers * 32, 256) * 256 * warps)
    by_shared = chip.shared[1] // (metadata.shared + 1024)
    by_tensor_memory = 512 // metadata.tmem_size if getattr(metadata, "tmem_size", 0) else 32
    return max(1, min(by_registers, by_shared, by_tensor_memory, chip.warps // warps, 24))


def quarter(chip: Chip, work: Work, program: sass.Program) -> sass.Quarter:
    """The chip as seen by a quarter of one multiprocessor during this launch."""
    active = min(chip.multiprocessors, work.programs)
    from_device = chip.bandwidth / chip.clock * max(1.0, work.cache / work.device)
    bytes_a_clock = min(64 * active, chip.cache, chip.cache if work.hot else from_device) / active
    fmas = chip.half / 2 / chip.clock / chip.multiprocessors / 4
    return sass.Quarter(
        fma=128 // chip.lanes,
        half_fmas=fmas,
        mma_sync=chip.mma_sync,
        tensor_memory=tensor_memory_clocks(chip, work, program),
        bytes_a_clock=bytes_a_clock / 4,
        latency=chip.latency[0 if work.hot else 1],
    )


def tensor_memory_clocks(chip: Chip, work: Work, program: sass.Program) -> float:
    """Clocks of a tcgen05 instruction, all being taken as equal: the products' time over their number."""
    inner = [span for span in program.others if program.loop and program.loop[0] <= span[0] <= program.loop[1]]
    matrix = [i.address for i in program.in_loop() if i.kind == "matrix"]
    count = sum(work.trips.inner if any(a <= at <= b for a, b in inner) else 1 for at in matrix)
    clocks = (work.half / chip.half + work.tf32 / chip.tf32) * chip.clock * chip.multiprocessors
    return clocks / (work.programs * work.trips.main * max(1, count))


def launch_row(launch: Any, chip: int) -> Row:
    """Counts and prediction of one launch."""
    from fastssl.kernels import aot

    name = launch.kernel.fn.__name__
    c = CHIPS[chip]
    work = WORK[name](launch.arguments)
    program, metadata = compiled(aot.variant(name, chip, launch))
    fit = min(blocks_at_once(c, program, metadata), ceil(work.programs, c.multiprocessors))
    waves = ceil(work.programs, fit * c.multiprocessors)
    model = sass.Model(program, quarter(c, work, program), fit, metadata.num_warps, work.trips)
    clocks = model.run()
    return {
        "kernel": name.removeprefix("info_nce_"),
        "operations": work.half + work.tf32,
        "exponentials": work.exponentials,
        "device_bytes": work.device,
        "cache_bytes": work.cache,
        "partial_bytes": work.partials,
        "programs": work.programs,
        "programs_a_multiprocessor": fit,
        "waves": waves,
        "tiles": work.trips.main,
        "matrix_us": micro(work.half / c.half + work.tf32 / c.tf32),
        "exponential_us": micro(work.exponentials / (16 * c.multiprocessors * c.clock)),
        "device_us": micro(work.device / c.bandwidth),
        "cache_us": micro(work.cache / (c.cache * c.clock)),
        "predicted_us": micro(waves * clocks / c.clock),
        "tile_clocks": round(model.turn()),
        "busy": {unit: round(busy / clocks, 2) for unit, busy in sorted(model.busy.items())},
    }


def micro(seconds: float) -> float:
    """Microseconds, for printing."""
    return round(seconds * 1e6, 2)


def shape_row(shape: Shape, chip: int) -> Row:
    """All launches of an operation against the floor."""
    c = CHIPS[chip]
    found = launches(shape, chip)
    rows = [launch_row(launch, chip) for launch in found]
    once = least_bytes(found)
    units = {
        "matrix units": sum(r["matrix_us"] for r in rows),
        "exponential units": micro(shape.logits / (16 * c.multiprocessors * c.clock)),
        "device memory": micro(once / c.bandwidth),
    }
    limit = max(units, key=lambda unit: units[unit])
    predicted = sum(r["predicted_us"] for r in rows)
    device = sum(r["device_bytes"] for r in rows)
    return {
        "shape": shape.title,
        "chip": chip,
        "least_bytes": once,
        "device_bytes": device,
        "bytes_ratio": round(device / once, 3),
        "partial_bytes": sum(r["partial_bytes"] for r in rows),
        "floor_us": units[limit],
        "floors_us": units,
        "limit": limit,
        "predicted_us": round(predicted, 2),
        "ratio": round(predicted / units[limit], 2),
        "launches": rows,
    }


def least_bytes(found: list[Any]) -> int:
    """Every input and every output once, without what the launches pass on to each other."""
    if found[0].kernel.fn.__name__ == "key_queue_enqueue":
        return touched(found[0].arguments)
    between = ("maxima", "sums", "accumulators")
    tensors = {
        id(value): value
        for launch in found
        for name, value in launch.arguments.items()
        if isinstance(value, torch.Tensor) and name not in between
    }
    return nbytes(*tensors.values())


def update_row(update: Update, chip: int) -> Row:
    """A momentum update against the floor."""
    floor = update.bytes / CHIPS[chip].bandwidth
    return {
        "update": update.title,
        "chip": chip,
        "tensors": update.tensors,
        "elements": update.elements,
        "bytes": update.bytes,
        "floor_us": micro(floor),
        "predicted_us": micro(floor / STREAMED),
    }


def augmentation_row(augmentation: Augmentation, chip: int) -> Row:
    """An augmentation against the floor: images read once and the result written."""
    found = augmentation_launches(augmentation, chip)
    rows = [launch_row(launch, chip) for launch in found]
    once = nbytes(found[0].arguments["images"], found[1].arguments["out"])
    floor, predicted = micro(once / CHIPS[chip].bandwidth), sum(r["predicted_us"] for r in rows)
    return {
        "augmentation": augmentation.title,
        "chip": chip,
        "count": augmentation.images,
        "side": augmentation.side,
        "jittered": augmentation.jittered,
        "blurred": augmentation.blurred,
        "least_bytes": once,
        "device_bytes": round(sum(r["device_bytes"] for r in rows)),
        "floor_us": floor,
        "predicted_us": round(predicted, 2),
        "ratio": round(predicted / floor, 2),
        "launches": rows,
    }


@functools.lru_cache
def variants(chip: int) -> dict[str, Any]:
    """What ships for a chip, by name."""
    from fastssl.kernels import aot

    return {variant.name: variant for variant in aot.variants(chip)}


def compile_row(chip: int, name: str) -> Row:
    """A row of the table of kernels."""
    variant = variants(chip)[name]
    return kernel_row(name, chip, *compiled(variant))


def in_parallel(jobs: int, function: Any, arguments: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Results in the order of arguments, in processes of their own; progress on stderr."""
    todo = list(arguments)
    results = []
    with ProcessPoolExecutor(jobs) as pool:
        for at, row in enumerate(pool.map(function, *zip(*todo, strict=True)), 1):
            if at % 20 == 0 or at == len(todo):
                print(f"{function.__name__}: {at} of {len(todo)}", file=sys.stderr)
            results.append(row)
    return results


def versions(chips: Iterable[int]) -> dict[str, str]:
    """Of the compilers."""
    import triton
    from triton.backends.nvidia.compiler import get_ptxas

    found = {"triton": triton.__version__, "torch": torch.__version__}
    for chip in chips:
        found[f"ptxas for sm_{chip}"] = release(get_ptxas(chip).path)
    if nvcc := find_nvcc():
        found["nvcc"] = release(nvcc)
    return found


def release(tool: str) -> str:
    """The version of one of NVIDIA's compilers."""
    text = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release [\d.]+, V([\d.]+)", text)
    return found[1] if found else "unknown"


def ceilings(chip: int) -> Row:
    """A chip's figures for the report."""
    c = CHIPS[chip]
    return {**c._asdict(), "exponentials_a_clock": 16 * c.multiprocessors}


def notes() -> list[str]:
    """The model in words: this file's docstring without its commands."""
    text = (
        (__doc__ or "").replace("LAUNCH each", f"about {LAUNCH * 1e6:g} µs each").replace("STREAMED", f"{STREAMED:.0%}")
    )
    start = text.index("For every kernel")
    return text[start:].strip().splitlines()


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernel_report", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--chips", type=int, nargs="+", choices=CHIPS, default=list(CHIPS), help="compute capabilities")
    parser.add_argument("--only", action="append", help="only kernels whose name contains this; may be repeated")
    parser.add_argument("--check", action="store_true", help="compile and check only")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of kernel_report.json and kernel_report.md")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes")
    return parser.parse_args()


def main() -> int:
    """Compile, check, write; 1 if a kernel may not ship."""
    options = arguments()
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise SystemExit("TRITON_INTERPRET is set, which replaces the compiler; unset it")
    names = [
        (chip, name)
        for chip in options.chips
        for name in variants(chip)
        if not options.only or any(part in name for part in options.only)
    ]
    sources = [(chip, source) for chip in options.chips for source in cuda_sources(options.only)]
    if not names and not sources:
        raise SystemExit(f"no kernel's name contains {' or '.join(options.only)}")
    kernels = in_parallel(options.jobs, compile_row, names)
    missing = None
    if sources and find_nvcc() is None:
        files = ", ".join(cuda_sources(options.only))
        missing = f"Not compiled, for there is no nvcc on PATH or in CUDA_HOME: {files} in csrc."
        print(missing)
    elif sources:
        found = [row for rows in in_parallel(options.jobs, cuda_rows, sources) for row in rows]
        kernels += [row for row in found if not options.only or any(part in row["name"] for part in options.only)]
    wrong = [text for row in kernels for text in problems(row)]
    if kernels:
        print("\n".join(wrong) or f"{len(kernels)} kernels: nothing spills, all fit, all products use matrix units")
    if not options.check:
        shapes = in_parallel(options.jobs, shape_row, [(shape, chip) for chip in options.chips for shape in SHAPES])
        views = [(augmentation, chip) for chip in options.chips for augmentation in AUGMENTATIONS]
        report = {
            "heading": "predicted, not measured",
            "date": datetime.date.today().isoformat(),
            "versions": versions(options.chips),
            "notes": notes(),
            "chips": {str(chip): ceilings(chip) for chip in options.chips},
            "shapes": shapes,
            "augmentations": in_parallel(options.jobs, augmentation_row, views),
            "updates": [update_row(update, chip) for chip in options.chips for update in UPDATES],
            "kernels": kernels,
            "missing": missing,
        }
        options.out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(report, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        (options.out / "kernel_report.json").write_text(text)
        (options.out / "kernel_report.md").write_text(markdown(json.loads(text)))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
