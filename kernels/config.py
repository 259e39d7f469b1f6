"""Launch configurations by shape and chip, and how many programs share a queue: pure functions, no GPU needed."""

from typing import NamedTuple

INTERPRETER = 0  # tiles so small that small tests have several
MULTIPROCESSORS = {INTERPRETER: 3, 80: 108, 90: 132, 100: 148, 120: 170}  # A100, H100, B200, RTX 5090
WIDEST = 256  # columns of an accumulator; wider rows are done in slices


class Chip(NamedTuple):
    """`family` is one of the keys of MULTIPROCESSORS."""

    family: int
    multiprocessors: int


class Tile(NamedTuple):
    """Rows × columns of logits of one step, accumulator columns, and columns of one step of q·k."""

    rows: int
    columns: int
    dim: int
    product: int
    warps: int
    stages: int


class CombineTile(NamedTuple):
    """Rows × splits that a program of `info_nce_combine` holds."""

    rows: int
    splits: int
    warps: int


class BlurTile(NamedTuple):
    """Rows × columns of blurred pixels of one program, and of the pixels that it multiplies at once."""

    rows: int
    columns: int
    chunk_rows: int
    chunk_columns: int
    warps: int


# By the width of a row (more than 256 is done in slices): rows, columns, product, warps, stages. Chosen by compiling:
# the largest that spill no register on any chip. A product narrower than the row, that is q·k in parts, is what
# spares registers; the keys are then read a second time from the cache.
Table = dict[int, tuple[int, int, int, int, int]]
HALF: Table = {64: (128, 64, 64, 8, 3), 128: (128, 64, 64, 8, 3), 256: (64, 64, 64, 8, 2)}
TF32: Table = {64: (64, 64, 64, 8, 3), 128: (64, 64, 32, 8, 2), 256: (64, 64, 32, 8, 2)}
TF32X3: Table = {64: (64, 32, 16, 8, 2), 128: (64, 32, 32, 8, 2), 256: (32, 32, 32, 8, 2)}
# wgmma and tcgen05 take keys from shared memory, which spares registers.
HALF_HOPPER: Table = {**HALF, 128: (128, 64, 128, 8, 3)}
SPLIT = {"half": HALF, "tf32": TF32, "tf32x3": TF32X3}
MIXED: Table = {**HALF, 64: (128, 64, 32, 8, 2), 128: (128, 64, 32, 8, 2)}  # the second product in tf32
NEGATIVES = {
    "half": MIXED,
    "mixed": MIXED,
    "tf32": {**TF32, 64: (128, 64, 32, 8, 2)},
    "tf32x3": {**TF32X3, 64: (32, 32, 32, 8, 2)},
}
# Small tiles of keys of 128 columns, for each is a program; more queries at once would spill.
NEGATIVES_128 = {80: (64, 64, 128, 4, 3), 90: (64, 32, 128, 4, 3), 100: (64, 64, 128, 8, 3), 120: (64, 64, 128, 4, 3)}
# Half keys of length 1, MoCo's queue: nothing but the two products and the exponential, so tiles are large. With 256
# queries of 128 columns that is 2 blocks of rows × 64 splits, one program for nearly every multiprocessor of an H100.
QUEUE: Table = {64: (128, 128, 64, 8, 3), 128: (128, 128, 128, 8, 3), 256: (128, 64, 256, 8, 3)}
QUEUES = {
    80: {**QUEUE, 256: (64, 64, 256, 8, 3)},
    90: QUEUE,
    100: QUEUE,
    120: {64: (128, 64, 64, 8, 2), 128: (128, 64, 128, 8, 3), 256: HALF[256]},  # 99 KB of shared memory
}


PIXELS = 1024  # that a program of `augment_luma` or `augment_color` holds, with so many warps:
LUMA_WARPS, COLOR_WARPS = 4, 8


def family(major: int, minor: int) -> int:
    """The chip that a device of compute capability major.minor is treated as."""
    if major == 8 and minor in (6, 8, 9):
        return 120  # as little shared memory
    return max((f for f in (80, 90, 100, 120) if f <= 10 * major + minor), default=80)


def block(size: int, least: int = 16) -> int:
    """The power of two that holds `size`."""
    return max(least, 1 << (size - 1).bit_length())


def splits(chip: Chip, row_blocks: int, columns: int, tile: Tile) -> int:
    """Programs that share the keys of one block of rows: one wave of the chip, at least two tiles each.

    No more of them than it takes for the longest share to be as short as it can be: less is left to combine.
    """
    tiles = blocks(columns, tile.columns)
    most = max(1, min(chip.multiprocessors // max(row_blocks, 1), tiles // 2))
    return blocks(tiles, blocks(tiles, most)) if tiles else 1


def split_tile(chip: Chip, dim: int, kind: str, normalized: bool) -> Tile:
    """For `info_nce_split`; `kind` says how it multiplies: "half", "tf32" or "tf32x3"."""
    if chip.family == INTERPRETER:
        return Tile(16, 16, min(block(dim), 64), min(block(dim), 32), 4, 1)
    size = min(block(dim, 64), WIDEST)
    table = SPLIT[kind]
    if kind == "half" and normalized and dim <= WIDEST:
        table = QUEUES[chip.family]
    elif kind == "half" and chip.family in (90, 100):
        table = HALF_HOPPER
    return _tile(dim, table[size])


def candidates(chip: Chip, tile: Tile) -> list[Tile]:
    """What FASTSSL_AUTOTUNE=1 tries for `info_nce_split`, the usual tile first; the ones that do not fit drop out."""
    if chip.family == INTERPRETER:
        return [tile]
    shapes = [(128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 8, 2), (64, 128, 4, 3), (64, 64, 4, 3), (64, 32, 4, 2)]
    others = [Tile(rows, columns, tile.dim, tile.product, *rest) for rows, columns, *rest in shapes]
    return [tile, *(other for other in others if other != tile)]


def negatives_tile(chip: Chip, dim: int, kind: str) -> Tile:
    """For `info_nce_negatives`, whose rows are keys and columns queries; `kind` may be "mixed" too, float16."""
    if chip.family == INTERPRETER:
        return Tile(16, 16, min(block(dim), 64), min(block(dim), 32), 4, 1)
    size = min(block(dim, 64), WIDEST)
    return _tile(dim, NEGATIVES_128[chip.family] if kind == "half" and size == 128 else NEGATIVES[kind][size])


def _tile(dim: int, entry: tuple[int, int, int, int, int]) -> Tile:
    rows, columns, product, warps, stages = entry
    width = min(block(dim), WIDEST)
    return Tile(rows, columns, width, min(width, product), warps, stages)


def row_warps(block_dim: int) -> int:
    """Warps of a program that holds whole rows."""
    return min(max(block_dim // 256, 4), 16)


def combine_tile(chip: Chip, splits: int, block_dim: int) -> CombineTile:
    """A row's splits are asked for at once, 64 of them at 128 columns; of few splits a program does several rows."""
    most, few = (128, 64) if chip.family == INTERPRETER else (8192, 2048)
    at_once = min(block(splits, 1), max(1, most // block_dim))
    return CombineTile(max(1, few // (at_once * block_dim)), at_once, row_warps(block_dim))


def rows_at_once(chip: Chip, block_dim: int) -> int:
    """Rows of BLOCK_DIM columns that a program without matrix products holds."""
    return max(1, (256 if chip.family == INTERPRETER else 4096) // block_dim)


def queue_rows(chip: Chip, block_dim: int) -> int:
    """Rows of BLOCK_DIM columns that a program of the queue writes: few, so that a batch spreads over the chip."""
    return max(1, (64 if chip.family == INTERPRETER else 512) // block_dim)


def paired_splits(chip: Chip, rows: int, columns: int, at_once: int) -> int:
    """Programs that share one query's own negatives: several for each multiprocessor, at least two tiles each."""
    return max(1, min(blocks(8 * chip.multiprocessors, max(rows, 1)), columns // (2 * at_once), 65535))


def luma_shares(chip: Chip, blocks: int) -> int:
    """Programs that sum the luma of an image of so many blocks; every program of the next launch adds them up."""
    return min(blocks, 2 if chip.family == INTERPRETER else 128)


def blur_tile(chip: Chip, taps: int) -> BlurTile:
    """For `augment_blur`: up to 26 taps all pixels that a tile is made of at once."""
    tile = BlurTile(32, 32, 64, 64, 4)
    if taps + tile.columns + 6 > tile.chunk_columns or chip.family == INTERPRETER:
        tile = tile._replace(chunk_rows=32, chunk_columns=32)  # which a loop with its weights leaves registers for
    return tile


def blocks(a: int, b: int) -> int:
    """a/b, rounded up."""
    return -(-a // b)
