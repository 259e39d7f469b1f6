"""Reads what ptxas made of kernels, instruction by instruction, and plays one on a model of a multiprocessor.

The model is one of the multiprocessor's four quarters, which the others equal: a scheduler that issues one instruction
of one of its warps a clock, and pipes that an instruction occupies for some clocks. Instructions issue in order; the
stall counts and scoreboards that ptxas encoded into each of them say when the next one may. Caches, bank conflicts and
instruction fetch are not modelled, so a real chip is rather slower than faster.
"""

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

FIRST = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;?\s+/\* 0x([0-9a-f]{16}) \*/"
)
SECOND = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/")
ADDRESS = re.compile(r"0x([0-9a-f]+)$")
USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
LISTED = re.compile(r"^\s*Function : (\S+)\n", re.MULTILINE)
BOUNDS = re.compile(r"EIATTR_MAX_THREADS\s+Format:\s+EIFMT_SVAL\s+Value:\s+0x(\w+) 0x(\w+) 0x(\w+)")
CLASSES = {
    "matrix": "HMMA HGMMA IMMA DMMA QMMA OMMA UTCHMMA UTCQMMA UTCIMMA UTCOMMA",
    "fp32": "FADD FMUL FFMA FADD2 FMUL2 FFMA2 FADD32I FMUL32I FFMA32I",
    "shared": "LDS STS LDSM STSM SHFL ATOMS LDTM STTM",
    "global": "LDG STG LDGSTS UBLKCP UTMALDG UTMASTG ATOMG RED LD ST",
    "local": "LDL STL",
    "control": "BAR BRA BSSY BSYNC WARPSYNC WARPGROUP DEPBAR LDGDEPBAR MEMBAR FENCE SYNCS CALL RET EXIT UTCBAR NOP"
    " YIELD ELECT UCGABAR_ARV UCGABAR_WAIT ERRBAR CCTL ARRIVES ACQBULK",
}
CLASS = {opcode: name for name, opcodes in CLASSES.items() for opcode in opcodes.split()}


class Instruction(NamedTuple):
    """`stall`: clocks until the warp's next one; `write`, `read`: scoreboards it holds; `wait`: those it waits for."""

    address: int
    guard: str
    opcode: str
    operands: str
    stall: int
    write: int
    read: int
    wait: int

    @property
    def base(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".")[0]

    @property
    def kind(self) -> str:
        """A key of CLASSES, "exp2", "mufu" (other special functions) or "integer" (with moves and conversions)."""
        if self.base == "MUFU":
            return "exp2" if ".EX2" in self.opcode else "mufu"
        return CLASS.get(self.base, "integer")

    @property
    def target(self) -> int:
        """Where a branch goes, or -1."""
        found = ADDRESS.search(self.operands) if self.base == "BRA" else None
        return int(found[1], 16) if found else -1


class Program(NamedTuple):
    """A compiled kernel; `loop` holds the addresses of its main loop's first and last instruction.

    `shared` is what it declares itself; Triton's kernels get theirs from whoever launches them.
    """

    instructions: list[Instruction]
    loop: tuple[int, int] | None
    others: list[tuple[int, int]]
    registers: int
    stack: int
    shared: int = 0

    def in_loop(self) -> list[Instruction]:
        """Of the main loop, or all if there is none."""
        if self.loop is None:
            return self.instructions
        return [i for i in self.instructions if self.loop[0] <= i.address <= self.loop[1]]


def tool(name: str) -> Path:
    """Path of cuobjdump, as Triton brings it."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; this Triton was built without NVIDIA's tools")
    return path


def read(cubin: bytes) -> Program:
    """Disassemble a kernel."""
    (program,) = read_all(cubin).values()
    return program


def read_all(cubin: bytes) -> dict[str, Program]:
    """Disassemble all kernels of a cubin, by their names as the compiler mangled them; {} if it has none."""
    usage, listing = _dump(cubin, "-res-usage"), _dump(cubin, "-sass")
    _, *parts = LISTED.split(listing)
    listings = dict(zip(parts[::2], parts[1::2], strict=True))
    found = {}
    for name, registers, stack, shared, local in USAGE.findall(usage):
        instructions = parse(listings.get(name, ""))
        if not instructions:
            raise ValueError(f"cuobjdump printed no instructions of {name}")
        loop, others = loops(instructions)
        found[name] = Program(instructions, loop, others, int(registers), int(stack) + int(local), int(shared))
    if found.keys() != listings.keys():
        raise ValueError(f"cuobjdump printed the instructions of {[*listings]} and the resources {usage[-500:]!r}")
    return found


def most_threads(cubin: bytes) -> dict[str, int]:
    """Threads of a block that each kernel of a cubin is compiled for, where it says so (__launch_bounds__)."""
    _, *parts = re.split(r"^\.nv\.info\.(\S+)\n", _dump(cubin, "-elf"), flags=re.MULTILINE)
    bounds = {name: BOUNDS.search(text) for name, text in zip(parts[::2], parts[1::2], strict=True)}
    return {name: int(found[1], 16) * int(found[2], 16) * int(found[3], 16) for name, found in bounds.items() if found}


def _dump(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _run(option, file.name)


def _run(option: str, path: str) -> str:
    return subprocess.run([tool("cuobjdump"), option, path], capture_output=True, text=True, check=True).stdout


def parse(text: str) -> list[Instruction]:
    """Instructions of a listing of cuobjdump -sass; the control bits lie in the second word of each."""
    found = []
    first = None
    for line in text.splitlines():
        if match := FIRST.match(line):
            first = match
        elif first and (match := SECOND.match(line)):
            bits = int(match[1], 16) >> 41
            control = (bits & 15, bits >> 5 & 7, bits >> 8 & 7, bits >> 11 & 63)
            found.append(Instruction(int(first[1], 16), first[2] or "", first[3], first[4], *control))
            first = None
    return found


def loops(instructions: list[Instruction]) -> tuple[tuple[int, int] | None, list[tuple[int, int]]]:
    """The main loop (the smallest with the most matrix instructions, or else the most of any) and the others."""
    far = 16 * 8  # spinning on a barrier is no loop, nor is the way back from a spin that was put out of line
    spans = [(i.target, i.address) for i in instructions if 0 <= i.target <= i.address - far]
    spins = {i.address + 16 for i in instructions if i.address - far < i.target < i.address}
    spans = [span for span in spans if span[1] not in spins]
    if not spans:
        return None, []

    def weight(span: tuple[int, int]) -> tuple[int, int]:
        inside = [i for i in instructions if span[0] <= i.address <= span[1]]
        matrix = sum(i.kind == "matrix" for i in inside)
        return (matrix, -len(inside)) if matrix else (0, len(inside))

    main = max(spans, key=weight)
    return main, [span for span in spans if span != main]


def mix(instructions: list[Instruction]) -> dict[str, int]:
    """How many instructions of each kind."""
    return dict(sorted(Counter(i.kind for i in instructions).items()))


def opcodes(instructions: list[Instruction]) -> dict[str, int]:
    """The matrix instructions with their shapes and types, counted."""
    return dict(sorted(Counter(i.opcode for i in instructions if i.kind == "matrix").items()))


class Quarter(NamedTuple):
    """What the model knows of a chip, in clocks and per quarter of a multiprocessor.

    Attributes:
        fma: clocks of a warp's float32 instruction (32 lanes: 1, 16 lanes: 2).
        half_fmas: multiply-adds of half precision that the matrix unit does in a clock; half as many in tf32.
        mma_sync: share of that which mma.sync (HMMA) reaches.
        tensor_memory: clocks of the matrix unit for each tcgen05 instruction, whose shape is not in its opcode.
        bytes_a_clock: share of the cache's bandwidth, or of the device memory's if that is less.
        latency: of global memory.
    """

    fma: int
    half_fmas: float
    mma_sync: float
    tensor_memory: float
    bytes_a_clock: float
    latency: float


L1_LATENCY = 40
LATENCY = {"shared": 30, "exp2": 20, "mufu": 20, "local": 200}
OTHERS = 25  # constants, special registers, conversions
MATRIX_LATENCY = 32
XU = ("I2F", "F2I", "I2FP", "F2F", "POPC", "FLO")


def width(instruction: Instruction) -> int:
    """Bytes of a warp's access."""
    for bits in (128, 64):
        if f".{bits}" in instruction.opcode:
            return 32 * bits // 8
    if instruction.base in ("LDSM", "STSM"):
        return 128 * (4 if instruction.opcode.endswith(".4") else 2 if instruction.opcode.endswith(".2") else 1)
    columns = re.search(r"\.x(\d+)$", instruction.opcode)  # tensor memory: 32 rows × 4 bytes each
    return 128 * int(columns[1]) // (2 if "16dp" in instruction.opcode else 1) if columns else 128


def matrix_clocks(instruction: Instruction, quarter: Quarter) -> float:
    """How long the quarter's matrix unit is busy; its share of a warp group's 64×N×16 is 16×N×16."""
    if instruction.base.startswith("UTC"):
        return quarter.tensor_memory
    fmas = quarter.half_fmas / (2 if "TF32" in instruction.opcode else 1)
    if wide := re.match(r"HGMMA\.64x(\d+)x(\d+)", instruction.opcode):
        return 16 * int(wide[1]) * int(wide[2]) / fmas
    shape = re.match(r"HMMA\.(16)(8)(\d+)", instruction.opcode)
    return 16 * 8 * int(shape[3] if shape else 16) / (fmas * quarter.mma_sync)


def pipe(instruction: Instruction, quarter: Quarter) -> tuple[str, float]:
    """Which pipe an instruction needs and for how many clocks."""
    kind, base = instruction.kind, instruction.base
    if kind == "matrix":
        return "matrix", matrix_clocks(instruction, quarter)
    if kind in ("exp2", "mufu") or base in XU:
        return "special", 8  # 16 results a clock and multiprocessor
    if kind == "fp32":
        return "fma", quarter.fma * (2 if base.endswith("2") else 1)
    if base == "IMAD":
        return "fma", 2
    if base in ("LDTM", "STTM"):
        return "tensor memory", width(instruction) / 128  # a column of 32 rows a clock
    if kind in ("shared", "local"):
        return "memory", width(instruction) / 32  # 128 bytes a clock and multiprocessor
    if kind == "global":
        return "memory", max(4, width(instruction) / 32)
    if kind == "control" or base.startswith("U") or base in ("S2R", "S2UR", "LDC", "LDCU", "R2UR", "CS2R"):
        return "issue", 1
    return "alu", 2  # 64 results a clock and multiprocessor


class Trips(NamedTuple):
    """How often the main loop, a loop inside it and any other loop run."""

    main: int
    inner: int = 1
    before: int = 1


class Warp:
    """One warp of a block: where it is and what it waits for."""

    def __init__(self, block: int, first: bool) -> None:
        self.block, self.first = block, first
        self.at = 0
        self.ready = 0.0
        self.boards: dict[int, list[float]] = {}
        self.trips: Counter[int] = Counter()
        self.groups: list[float] = []  # when each group that it gave the matrix unit is done
        self.copies = 0.0
        self.lines: set[tuple[str, int]] = set()  # read since the last turn of a loop
        self.arrived = False

    def has_read(self, load: Instruction) -> bool:
        """Whether the line of 128 bytes is in the multiprocessor's own cache, going by register and offset."""
        found = re.search(r"\[(R\d+)\.64(?:\+0x([0-9a-f]+))?\]", load.operands)
        line = (found[1], int(found[2] or "0", 16) // 128) if found else ("", load.address)
        known = line in self.lines
        self.lines.add(line)
        return known


class Model:
    """Plays `program` with `blocks` resident blocks of `warps` warps each: loops `trips.main` and so on times."""

    def __init__(self, program: Program, quarter: Quarter, blocks: int, warps: int, trips: Trips) -> None:
        self.program, self.quarter = program, quarter
        self.index = {i.address: n for n, i in enumerate(program.instructions)}
        self.pipes = [pipe(i, quarter) for i in program.instructions]
        each = max(1, warps // 4)
        self.warps = [Warp(block, n == 0) for block in range(blocks) for n in range(each)]
        self.free: dict[str, float] = {}
        self.busy: dict[str, float] = {}
        self.memory = 0.0
        self.committed = [0.0] * blocks  # tcgen05 work that a block has handed over
        self.turns: list[float] = []  # when the first warp began the main loop again
        self.trips = {}
        if program.loop:
            self.trips = {
                b: trips.inner if program.loop[0] <= a <= program.loop[1] else trips.before for a, b in program.others
            }
            self.trips[program.loop[1]] = max(1, trips.main - outside(program))

    def run(self) -> float:
        """Clocks until the last warp ends."""
        now = end = 0.0
        running = list(self.warps)
        while running:
            candidates = [w for w in running if not w.arrived]
            if not candidates:
                raise RuntimeError("every warp waits at a barrier")
            warp = min(candidates, key=self.earliest)
            now = max(now, self.earliest(warp))
            done = self.issue(warp, now)
            end = max(end, warp.ready)
            if done:
                running.remove(warp)
            now += 1
        return end

    def turn(self) -> float:
        """Clocks of one turn of the main loop; 0 if it ran but once."""
        return (self.turns[-1] - self.turns[0]) / (len(self.turns) - 1) if len(self.turns) > 1 else 0.0

    def earliest(self, warp: Warp) -> float:
        """When the warp's next instruction may issue."""
        instruction = self.program.instructions[warp.at]
        time = warp.ready
        for board in range(6):
            if instruction.wait >> board & 1 and warp.boards.get(board):
                time = max(time, *warp.boards[board])
        if instruction.base == "DEPBAR":
            time = max(time, self._depbar(warp, instruction))
        elif instruction.opcode.startswith("WARPGROUP.DEPBAR"):
            time = max(time, self._groups(warp, instruction))
        elif instruction.base == "SYNCS" and "TRYWAIT" in instruction.opcode:
            time = max(time, self.committed[warp.block])
        name, _ = self.pipes[warp.at]
        if name not in ("issue", "matrix") or instruction.base == "HMMA":
            time = max(time, self.free.get(name, 0.0))
        return time

    def _depbar(self, warp: Warp, instruction: Instruction) -> float:
        """Copies of all but the last n groups are there."""
        found = re.match(r"SB(\d), 0x([0-9a-f]+)", instruction.operands)
        if not found:
            return 0.0
        pending = warp.boards.get(int(found[1]), [])
        return pending[-1 - int(found[2], 16)] if len(pending) > int(found[2], 16) else 0.0

    def _groups(self, warp: Warp, instruction: Instruction) -> float:
        """All but the last n groups of wgmma are done."""
        last = int(instruction.operands.rpartition("0x")[2] or "0", 16)
        return warp.groups[-1 - last] if len(warp.groups) > last else 0.0

    def issue(self, warp: Warp, now: float) -> bool:
        """Issue the warp's next instruction; true if it was the last."""
        instruction = self.program.instructions[warp.at]
        name, clocks = self.pipes[warp.at]
        start = max(now, self.free.get(name, 0.0))
        self.free[name] = start + clocks
        self.busy[name] = self.busy.get(name, 0.0) + clocks
        finished = self._finish(warp, instruction, start, clocks)
        if instruction.write < 6:
            warp.boards.setdefault(instruction.write, []).append(finished)
            del warp.boards[instruction.write][:-16]
        if instruction.read < 6:
            warp.boards.setdefault(instruction.read, []).append(start + clocks + 10)
            del warp.boards[instruction.read][:-16]
        warp.ready = now + max(1, instruction.stall)
        if instruction.opcode.startswith("BAR.SYNC"):
            self._barrier(warp)
        return self._advance(warp, instruction)

    def _finish(self, warp: Warp, instruction: Instruction, start: float, clocks: float) -> float:
        kind = instruction.kind
        if kind == "matrix":
            done = start + clocks + MATRIX_LATENCY
            self.committed[warp.block] = done
            if "gsb0" in instruction.operands:
                warp.groups = [*warp.groups[-8:], done]
            return done
        if kind == "global":
            return self._global(warp, instruction, start, clocks)
        if instruction.base == "LDGDEPBAR":
            return max(warp.copies, start)
        return start + clocks + LATENCY.get(kind, OTHERS)

    def _global(self, warp: Warp, instruction: Instruction, start: float, clocks: float) -> float:
        if instruction.base == "LDG" and warp.has_read(instruction):
            return start + clocks + L1_LATENCY
        size = width(instruction)
        # narrow loads are those of vectors, of which many lanes read the same part
        size = size // 4 if instruction.base == "LDG" and size < 512 else size
        self.memory = max(self.memory, start) + size / self.quarter.bytes_a_clock
        if instruction.base == "STG":
            return start + clocks
        warp.copies = self.memory + self.quarter.latency
        return warp.copies

    def _barrier(self, warp: Warp) -> None:
        """All warps of the block leave together."""
        warp.arrived = True
        block = [w for w in self.warps if w.block == warp.block]
        if all(w.arrived for w in block):
            time = max(w.ready for w in block)
            for w in block:
                w.ready, w.arrived = time, False

    def _advance(self, warp: Warp, instruction: Instruction) -> bool:
        """Backward branches as often as their loop runs; forward ones if nothing guards them, or for one warp only."""
        if instruction.base == "EXIT" and not instruction.guard:
            return True
        warp.at += 1
        target = instruction.target
        if target < 0:
            return warp.at >= len(self.program.instructions)
        if target <= instruction.address:
            warp.lines.clear()
            if warp is self.warps[0] and self.program.loop and instruction.address == self.program.loop[1]:
                self.turns.append(warp.ready)
            warp.trips[instruction.address] += 1
            if warp.trips[instruction.address] < self.trips.get(instruction.address, 1):
                warp.at = self.index[target]
            else:
                warp.trips[instruction.address] = 0
        elif not instruction.guard and not instruction.operands.startswith(("U", "!U")):
            warp.at = self.index[target]
        elif not warp.first and self._is_for_one_warp(instruction):
            warp.at = self.index[target]
        return False

    def _is_for_one_warp(self, branch: Instruction) -> bool:
        """Whether a branch jumps over instructions to the matrix unit that a single warp issues."""
        skipped = self.program.instructions[self.index[branch.address] : self.index[branch.target]]
        return len(skipped) < 200 and any(i.base.startswith("UTC") for i in skipped)


def outside(program: Program) -> int:
    """Tiles whose products a rotated loop does before it begins."""
    if program.loop is None:
        return 0
    inside = sum(i.kind == "matrix" for i in program.in_loop())
    before = sum(i.kind == "matrix" and i.address < program.loop[0] for i in program.instructions)
    return before // inside if inside else 0
