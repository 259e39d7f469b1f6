"""What a launch of a kernel costs at the least: bytes and operations from its arguments, and the chips' ceilings."""

from typing import Any, NamedTuple

import torch

from benchmarks import sass

CACHED = 16 << 20  # bytes that surely stay in the L2 cache of any of these chips
Row = dict[str, Any]


class Chip(NamedTuple):
    """Published ceilings of one product; `assumed` ones only enter the prediction, not the floor.

    Attributes:
        clock: boost clock in Hz at which the peaks are stated.
        half, tf32: dense matrix operations a second, accumulated in float32.
        bandwidth: of device memory, bytes a second.
        lanes: float32 lanes of a multiprocessor.
        shared: bytes of shared memory that a block may have, and that a multiprocessor has.
        warps: that a multiprocessor holds.
        cache: bytes a clock that the L2 cache gives all multiprocessors together (assumed: two
            thirds of the 5,120 that the A100 whitepaper states, per die).
        latency: clocks to the L2 cache and to device memory (assumed).
        mma_sync: share of the peak that mma.sync reaches, the instruction that wgmma replaced (assumed).
        source: of the published figures.
    """

    name: str
    multiprocessors: int
    clock: float
    half: float
    tf32: float
    bandwidth: float
    lanes: int
    shared: tuple[int, int]
    warps: int
    cache: int
    latency: tuple[int, int]
    mma_sync: float
    source: str


K = 1024
CHIPS = {
    80: Chip(
        name="A100 SXM 80 GB",
        multiprocessors=108,
        clock=1.41e9,
        half=312e12,
        tf32=156e12,
        bandwidth=2.039e12,
        lanes=64,
        shared=(163 * K, 164 * K),
        warps=64,
        cache=3400,
        latency=(270, 480),
        mma_sync=1,
        source="NVIDIA A100 datasheet (80 GB SXM) and A100 architecture whitepaper",
    ),
    90: Chip(
        name="H100 SXM",
        multiprocessors=132,
        clock=1.83e9,
        half=989.4e12,
        tf32=494.7e12,
        bandwidth=3.35e12,
        lanes=128,
        shared=(227 * K, 228 * K),
        warps=64,
        cache=3400,
        latency=(270, 600),
        mma_sync=0.62,
        source="NVIDIA H100 datasheet (SXM) and H100 architecture whitepaper",
    ),
    100: Chip(
        name="B200",
        multiprocessors=148,
        clock=1.85e9,
        half=2250e12,
        tf32=1125e12,
        bandwidth=8e12,
        lanes=128,
        shared=(227 * K, 228 * K),
        warps=64,
        cache=6800,
        latency=(360, 800),
        mma_sync=0.5,
        source="NVIDIA Blackwell architecture technical brief (B200; dense, half of the figures with sparsity)",
    ),
    120: Chip(
        name="GeForce RTX 5090",
        multiprocessors=170,
        clock=2.407e9,
        half=209.5e12,
        tf32=104.8e12,
        bandwidth=1.792e12,
        lanes=128,
        shared=(99 * K, 100 * K),
        warps=48,
        cache=3400,
        latency=(360, 880),
        mma_sync=1,
        source="NVIDIA RTX Blackwell GPU architecture whitepaper (dense, float32 accumulation)",
    ),
}


class Work(NamedTuple):
    """Of one launch.

    Attributes:
        half, tf32: operations of matrix products (a multiply-add is two).
        exponentials: of logits and of running maxima.
        device: bytes from and to device memory.
        cache: bytes that programs ask of the L2 cache; partial results of the splits among them.
        partials: bytes of these, written or read.
        programs: of the grid.
        trips: of the kernel's loops.
        hot: whether what it reads lies in the cache.
    """

    half: float
    tf32: float
    exponentials: float
    device: float
    cache: float
    partials: float
    programs: int
    trips: sass.Trips
    hot: bool = False


def ceil(a: int, b: int) -> int:
    """a/b, rounded up."""
    return -(-a // b)


def nbytes(*tensors: torch.Tensor | None) -> int:
    """Bytes of tensors."""
    return sum(t.nbytes for t in tensors if t is not None)


def products(a: Row, first: float, second: float) -> tuple[float, float]:
    """Operations in half precision and in tf32 of the product of rows and keys and of the one that gathers."""
    times = 3 if a["PRECISION"] == "tf32x3" else 1
    half = tf32 = 0.0
    for operations, wide in ((first, a["WIDE"]), (second, a["WIDE"] or a["WIDE_VALUES"])):
        if wide:
            tf32 += times * operations
        else:
            half += operations
    return half, tf32


def split_work(a: Row) -> Work:
    """The pass over the keys."""
    rows, columns, dim = a["rows"], a["columns"], a["DIM"]
    row_blocks, splits = ceil(rows, a["BLOCK_ROWS"]), a["maxima"].shape[0]
    slices = ceil(dim, a["BLOCK_DIM"]) if a["GRADIENTS"] else 1
    tiles = ceil(columns, a["BLOCK_COLUMNS"])
    product = 2.0 * rows * columns * dim
    partials = nbytes(a["maxima"], a["sums"], a["accumulators"])
    key = a["keys"].element_size()
    again = dim + a["BLOCK_DIM"] if a["IN_PARTS"] else min(dim, a["BLOCK_DIM"])  # columns of a key that a program reads
    reads = row_blocks * slices * columns * again * key
    if a["IN_PARTS"]:  # the queries' parts pass by for every tile
        reads += row_blocks * slices * tiles * a["BLOCK_ROWS"] * dim * a["query"].element_size()
    return Work(
        *products(a, product * slices, product if a["GRADIENTS"] else 0),
        exponentials=float(rows) * slices * (columns + tiles),
        device=nbytes(a["query"], a["keys"]),
        cache=reads + nbytes(a["query"]) * splits + partials,
        partials=partials,
        programs=row_blocks * splits * slices,
        trips=sass.Trips(ceil(tiles, splits), *[ceil(dim, a["BLOCK_PRODUCT"])] * 2),
    )


def combine_work(a: Row) -> Work:
    """Putting the splits together."""
    partials = nbytes(a["maxima"], a["sums"], a["accumulators"])
    outputs = nbytes(a["loss"], a["lse"], a["dquery"], a["dpositive"], a["dtemperature"])
    device = nbytes(a["query"], a["positive_key"]) + outputs
    return Work(
        half=0,
        tf32=0,
        exponentials=float(a["maxima"].numel()),
        device=device,
        cache=device + partials,
        partials=partials,
        programs=ceil(a["rows"], a["BLOCK_ROWS"]),
        trips=sass.Trips(ceil(a["splits"], a["BLOCK_SPLITS"])),
        hot=True,
    )


def negatives_work(a: Row) -> Work:
    """The gradient of the keys."""
    rows, columns, dim = a["rows"], a["columns"], a["DIM"]
    slices = ceil(dim, a["BLOCK_DIM"])
    programs = ceil(columns, a["BLOCK_COLUMNS"]) * slices
    product = 2.0 * rows * columns * dim
    again = dim + a["BLOCK_DIM"] if a["IN_PARTS"] else min(dim, a["BLOCK_DIM"])
    tiles = ceil(rows, a["BLOCK_ROWS"])
    reads = programs * rows * again * a["query"].element_size()
    if a["IN_PARTS"]:
        reads += programs * tiles * a["BLOCK_COLUMNS"] * dim * a["keys"].element_size()
    once = nbytes(a["query"], a["keys"], a["lse"], a["grad_loss"], a["gradient"])
    return Work(
        *products(a, product * slices, product),
        exponentials=float(rows) * columns * slices,
        device=once,
        cache=reads + nbytes(a["keys"], a["gradient"]),
        partials=0,
        programs=programs,
        trips=sass.Trips(tiles, *[ceil(dim, a["BLOCK_PRODUCT"])] * 2),
        hot=once < CACHED,
    )


def norms_work(a: Row) -> Work:
    """One number for each row."""
    once = nbytes(a["x"], a["result"])
    return Work(0, 0, 0, once, once, 0, ceil(a["rows"], a["BLOCK_ROWS"]), sass.Trips(1), hot=True)


def enqueue_work(a: Row) -> Work:
    """A batch into the queue: keys, which the network has just made, and the rows that are written."""
    once = touched(a)
    return Work(0, 0, 0, once, once, 0, ceil(a["rows"], a["BLOCK_ROWS"]), sass.Trips(1), hot=True)


def touched(a: Row) -> int:
    """Bytes that an enqueue reads and writes, each once; of the queue only the rows that are written."""
    state = nbytes(a["tail"], a["filled"], a["arrived"])
    return state + a["rows"] * a["DIM"] * (a["keys"].element_size() + a["queue"].element_size())


def luma_work(a: Row) -> Work:
    """Images read for the sums of their luma: those whose contrast changes."""
    share = a["share"]
    device = nbytes(a["images"], a["sums"]) * share
    return Work(0, 0, 0, device, device, 0, round(a["sums"].numel() * share), sass.Trips(1))


def color_work(a: Row) -> Work:
    """Images read; the result or, for a blur, planes written."""
    share = a["share"]
    device = nbytes(a["images"]) + nbytes(a["out"]) * (1 - share) + nbytes(a["planes"]) * share
    return Work(0, 0, 0, device, device, 0, len(a["images"]) * a["blocks"], sass.Trips(1))


def blur_work(a: Row) -> Work:
    """Planes read by tile, each with its surroundings, and the result written; channels one after the other."""
    count, _, height, stride = a["planes"].shape
    programs = count * a["down"] * a["across"]
    tile, chunk = (a[f"{name}_ROWS"] * a[f"{name}_COLUMNS"] for name in ("TILE", "CHUNK"))
    lines = min(a["row_taps"] + a["TILE_ROWS"] - 1, height) * min(a["CHUNK_COLUMNS"], stride)
    chunks = a["ROW_CHUNKS"] * a["COLUMN_CHUNKS"]
    half = 3 * 2.0 * (a["TILE_ROWS"] * chunk * chunks + tile * a["CHUNK_COLUMNS"] * a["COLUMN_CHUNKS"])
    tables = nbytes(a["rows"], a["columns"])
    once = nbytes(a["planes"], a["out"]) + tables
    reads = programs * (3 * lines * chunks * a["planes"].element_size() + tables // count)
    share = a["share"]
    return Work(
        half * programs * share,
        0,
        0,
        device=once * share,
        cache=(reads + nbytes(a["out"])) * share,
        partials=0,
        programs=round(programs * share),
        trips=sass.Trips(3),
    )


WORK = {
    "augment_luma": luma_work,
    "augment_color": color_work,
    "augment_blur": blur_work,
    "inverse_norms": norms_work,
    "info_nce_split": split_work,
    "info_nce_combine": combine_work,
    "info_nce_negatives": negatives_work,
    "key_queue_enqueue": enqueue_work,
}


class Shape(NamedTuple):
    """An operation of some size: `op` is "queue", "in-batch", "in-batch negatives" or "enqueue"."""

    op: str
    rows: int
    dim: int
    keys: int
    precision: str = "bf16"

    @property
    def title(self) -> str:
        """As tables print it."""
        size = f"N={self.rows:,} D={self.dim}" + (f" K={self.keys:,}" if self.op in ("queue", "enqueue") else "")
        return f"{self.op} {size} {self.precision}"

    @property
    def logits(self) -> float:
        """Exponentials that cannot be avoided."""
        return 0.0 if self.op == "enqueue" else float(self.rows) * self.keys


MOCO = Shape("queue", 256, 128, 65536)
SHAPES = [
    MOCO,
    *(Shape("queue", 256, d, k) for d in (64, 128, 256) for k in (16384, 65536, 262144) if (d, k) != (128, 65536)),
    Shape("in-batch", 4096, 128, 4096),
    Shape("in-batch negatives", 4096, 128, 4096),
    Shape("enqueue", 256, 128, 65536),
    Shape("enqueue", 256, 128, 65536, "fp32"),
]


class Update(NamedTuple):
    """A momentum update of float32 targets; `source_bytes` of an element of the sources."""

    title: str
    tensors: int
    elements: int
    source_bytes: int

    @property
    def bytes(self) -> int:
        """Targets read and written, sources read."""
        return self.elements * (4 + 4 + self.source_bytes)


# Parameters of torchvision's ResNet-50.
UPDATES = [
    Update("ResNet-50, float32 sources", 161, 25_557_032, 4),
    Update("ResNet-50, bfloat16 sources", 161, 25_557_032, 2),
]


class Augmentation(NamedTuple):
    """A batch of images to bfloat16; `jittered` and `blurred` are the shares of images that are."""

    title: str
    steps: tuple[int, ...]  # as in fastssl.ops.photometric.PHOTOMETRIC
    taps: int
    jittered: float
    blurred: float
    images: int = 256
    side: int = 224


AUGMENTATIONS = [
    Augmentation("MoCo v2", (0, 1, 2), 13, 0.8, 0.5),
    Augmentation("BYOL, first view", (0, 1, 2), 23, 0.8, 1.0),
    Augmentation("BYOL, second view", (0, 1, 2, 3), 23, 0.8, 0.1),
]
STREAMED = 0.9  # share of the published bandwidth that a kernel reaches which only streams: assumed


def augmentation_launches(augmentation: Augmentation, chip: int) -> list[Any]:
    """The kernels that an augmentation starts, with their arguments and the `share` of images that it is about."""
    from fastssl.kernels import augment
    from fastssl.kernels.launch import recording

    count, side, taps = augmentation.images, augmentation.side, augmentation.taps
    with torch.device("meta"):
        images = torch.empty(count, side, side, 3, dtype=torch.uint8)
        out = torch.empty(count, 3, side, side, dtype=torch.bfloat16)
        parameters, table = torch.empty(count, 12), torch.empty(count, taps, taps)
    with recording(chip, "tf32") as found:
        augment.augment(images, out, parameters, table, table, augmentation.steps, (0.5,) * 3, (0.2,) * 3)
    shares = {"augment_luma": augmentation.jittered}
    return [
        launch._replace(
            arguments={**launch.arguments, "share": shares.get(launch.kernel.fn.__name__, augmentation.blurred)}
        )
        for launch in found
    ]


def launches(shape: Shape, chip: int) -> list[Any]:
    """The kernels that an operation starts, with their arguments."""
    from fastssl.kernels import info_nce, key_queue
    from fastssl.kernels.launch import recording

    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[shape.precision]
    query, positive = torch.empty(2, shape.rows, shape.dim, dtype=dtype, device="meta")
    keys = torch.empty(shape.keys, shape.dim, dtype=dtype, device="meta")
    integer = torch.empty((), dtype=torch.int64, device="meta")
    grad_loss, lse = torch.empty(2, shape.rows, device="meta")
    with recording(chip, "tf32") as found:
        if shape.op == "queue":
            info_nce.forward(query, positive, keys, 0.1, None, integer, integer, True, True)
        elif shape.op == "in-batch":
            info_nce.forward(query, positive, None, 0.1, None, None, None, False, True)
        elif shape.op == "enqueue":
            arrived = torch.empty((), dtype=torch.int32, device="meta")
            key_queue.enqueue(keys, integer, integer, arrived, positive)
        else:
            info_nce.negatives(grad_loss, lse, query, positive, 0.1, None, None, None, False, True)
    return list(found)
