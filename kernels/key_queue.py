"""The queue of keys: a batch normalised, cast and written behind the newest row in one launch; the oldest dropped."""

import triton
import triton.language as tl
from fastssl.kernels import config
from fastssl.kernels.launch import chip, launch
from fastssl.kernels.rows import modulo, unit_rows
from torch import Tensor


@triton.jit(do_not_specialize=["rows", "skipped", "capacity"])
def key_queue_enqueue(
    queue: tl.tensor,  # capacity×DIM
    tail: tl.tensor,
    filled: tl.tensor,
    arrived: tl.tensor,  # programs of this launch that are done
    keys: tl.tensor,  # skipped + rows
    rows: tl.tensor,
    skipped: tl.tensor,  # the first keys, which the others of the batch would push out again
    capacity: tl.tensor,
    key_stride: tl.tensor,
    DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
) -> None:
    """A few rows; the last program to finish moves tail and filled."""
    oldest, held = tl.load(tail), tl.load(filled)
    size = capacity.to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    dims = tl.arange(0, BLOCK_DIM)
    within = (row < rows)[:, None] & (dims < DIM)[None, :]
    key = keys + ((row + skipped) * key_stride)[:, None] + dims[None, :]
    unit, _ = unit_rows(tl.load(key, mask=within, other=0).to(tl.float32))
    at = wrapped(oldest + held + skipped, size) + row
    at = tl.where(at >= size, at - size, at)
    tl.store(queue + at[:, None] * DIM + dims[None, :], unit.to(queue.dtype.element_ty), mask=within)

    # Nobody may find tail and filled moved already. Every warp loads them for itself and one thread takes the ticket,
    # so the barrier makes all loads of this program happen before it (warps have stored to where they point, too), and
    # release and acquire make them happen before the stores of the program that gets the last one.
    tl.debug_barrier()
    if tl.atomic_add(arrived, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        count = held + skipped + rows
        dropped = tl.maximum(count - size, 0)
        tl.store(tail, wrapped(oldest + dropped, size))
        tl.store(filled, count - dropped)
        tl.store(arrived, 0)


@triton.jit(do_not_specialize=["capacity", "count"])
def key_queue_dequeue(tail: tl.tensor, filled: tl.tensor, capacity: tl.tensor, count: tl.tensor) -> None:
    """One program."""
    oldest, held = tl.load(tail), tl.load(filled)
    dropped = tl.minimum(held, count)
    # Every thread loads for itself, one of them stores.
    tl.debug_barrier()
    tl.store(tail, wrapped(oldest + dropped, capacity.to(tl.int64)))
    tl.store(filled, held - dropped)


@triton.jit
def wrapped(at: tl.tensor, size: tl.tensor) -> tl.tensor:
    """`at` mod `size`; without a division below 2·size, where it nearly always is."""
    return modulo(tl.where(at >= size, at - size, at), size)


def enqueue(queue: Tensor, tail: Tensor, filled: Tensor, arrived: Tensor, keys: Tensor) -> None:
    """Normalise and write keys in one launch, nothing allocated and nothing read back: a CUDA graph can capture it.

    Args:
        queue: K×D, contiguous; float32, bfloat16 or float16.
        tail: the oldest row, 0-d int64.
        filled: how many rows there are, 0-d int64.
        arrived: 0-d int32, 0 before and after; launches that may run at the same time need one each.
        keys: N×D, of which the newest K are written; not a part of `queue`. Copied only if its rows are not dense.
    """
    if not len(keys):
        return
    if keys.stride(1) != 1:
        keys = keys.contiguous()
    (capacity, dim), count = queue.shape, len(keys)
    rows = min(count, capacity)
    block_dim = config.block(dim)
    at_once = config.queue_rows(chip(queue.device), block_dim)
    launch(
        key_queue_enqueue,
        (config.blocks(rows, at_once),),
        config.row_warps(block_dim),
        1,
        queue,
        queue=queue,
        tail=tail,
        filled=filled,
        arrived=arrived,
        keys=keys,
        rows=rows,
        skipped=count - rows,
        capacity=capacity,
        key_stride=keys.stride(0),
        DIM=dim,
        BLOCK_ROWS=at_once,
        BLOCK_DIM=block_dim,
    )


def dequeue(tail: Tensor, filled: Tensor, capacity: int, count: int) -> None:
    """Drop the `count` oldest rows, or all if there are fewer; arguments as in `enqueue`."""
    launch(key_queue_dequeue, (1,), 1, 1, tail, tail=tail, filled=filled, capacity=capacity, count=count)
