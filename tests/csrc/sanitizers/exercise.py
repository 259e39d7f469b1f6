"""Calls every native op on odd shapes; results are other tests' business. test_sanitizers.py runs it instrumented."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fastssl.ops import (
    ColorJitter,
    GaussianBlur,
    Grayscale,
    KeyQueue,
    RandomErasing,
    Solarize,
    augment_,
    ema_update_,
    info_nce,
    normalized_mse,
    shuffle_batch,
    unshuffle_batch,
    use_backend,
)
from fastssl.ops.photometric import COLUMNS, Step

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# N, M and D around the kernels' panels of 32, their tiles of keys and their vectors, with whole ones and with rests.
SHAPES = ((1, 1, 1), (3, 2, 7), (31, 33, 15), (33, 257, 16), (65, 300, 33), (40, 700, 129), (130, 71, 300))


def rows(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def queues(m: int, d: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Negatives that lie in memory in different ways."""
    yield rows(m, d, dtype=dtype)
    yield rows(m, d + 1, dtype=dtype)[:, 1:]  # rows that are not aligned
    yield rows(d, m, dtype=dtype).T


def exercise_info_nce(n: int, m: int, d: int, dtype: torch.dtype) -> None:
    query, key = rows(n, d, dtype=dtype), rows(n, d, dtype=dtype)
    temperature = torch.tensor(0.2, requires_grad=True)
    info_nce(query, key, temperature=temperature).backward()
    for queue in queues(m, d, dtype):
        for valid in (None, (m - 1, m // 2 + 1), (0, 0), (m // 2, m)):
            for normalized in (False, True):
                info_nce(query, key, queue, temperature, valid=valid, negatives_normalized=normalized).backward()
    own = rows(n, m % 40 + 1, d, dtype=dtype)
    info_nce(query, key, own, temperature, negative_mode="paired").backward()
    with torch.no_grad():
        info_nce(query, key, rows(m, d, dtype=dtype), temperature)
        info_nce(query, key, own, temperature, negative_mode="paired")


def exercise_normalized_mse(n: int, m: int, d: int, dtype: torch.dtype) -> None:
    prediction, target = rows(n + m, d, dtype=dtype), rows(n + m, d, dtype=dtype)
    normalized_mse(prediction, target).mean().backward()
    with torch.no_grad():
        normalized_mse(prediction.T.contiguous().T, target)


def exercise_ema_update(n: int, m: int, d: int, dtype: torch.dtype) -> None:
    targets = [torch.randn(n, m), torch.randn(m * d + 1)[1:], torch.randn(d, n).double().T, torch.arange(n)]
    sources = [torch.randn(n, m).to(dtype), torch.randn(m * d).to(dtype), torch.randn(n, d), torch.arange(n)]
    shadows = [torch.empty(n, m, dtype=torch.half), torch.empty(m * d).bfloat16(), torch.empty(n, d), torch.arange(n)]
    for momentum in (0.0, 0.3, 0.999, torch.tensor(0.9)):
        ema_update_(targets, sources, momentum)
        ema_update_(targets, sources, momentum, shadows=shadows)
    ema_update_([torch.zeros(200_000)], [torch.zeros(200_000, dtype=dtype)], 0.9)  # several of the threads' chunks


def exercise_key_queue(n: int, m: int, d: int, dtype: torch.dtype) -> None:
    KeyQueue(4, 20_000).enqueue_(torch.randn(3, 20_000).to(dtype))  # several threads' rows
    for queue_dtype in DTYPES:
        queue = KeyQueue(m, d, dtype=queue_dtype, fill="empty")
        for count in (n, 1, m, 3 * m + 2, 0, m // 2 + 1):
            for keys in queues(count, d, dtype):
                queue.enqueue_(keys)
            queue.dequeue_(n // 2)


def exercise_shuffle(n: int, m: int, d: int, dtype: torch.dtype) -> None:
    for x in (
        torch.randn(n, m, d).to(dtype),
        torch.randn(n, 3, d, m + 1).contiguous(memory_format=torch.channels_last),
    ):
        for _ in range(3):  # memory is used again
            shuffled, handle = shuffle_batch(x, generator=torch.Generator())
            handle.wait()
            unshuffle_batch(shuffled, handle)


def exercise_augment(n: int, m: int, d: int, dtype: torch.dtype) -> None:
    jitter: Step = ColorJitter(1, 1, 1, 0.5)
    rest: list[Step] = [Grayscale(0.3), Solarize(p=0.5), RandomErasing((0.1, 0.9), p=0.8)]
    for height, width in ((m, d), (d, m)):
        blurs = [GaussianBlur((0.1, largest), p=0.8) for largest in (0.5, 2.0, 9.0)]
        blurs += [GaussianBlur(kernel_size=taps) for taps in (3, 23) if taps // 2 < min(m, d)]
        recipes: list[list[Step]] = [[], [jitter], [blurs[0]]]
        recipes += [[jitter, *rest[:1], blur, *rest[1:]] for blur in blurs]
        for steps in recipes:
            for order in (steps, steps[::-1]):
                images = torch.randint(256, (n % 7 + 1, height, width, 3), dtype=torch.uint8)
                augment_(images, order, dtype=dtype)
        for value in (torch.nan, torch.inf, -torch.inf, 1e9):
            wild = torch.full((1, len(COLUMNS)), value)
            wild[:, COLUMNS.index("sigma")] = 1
            augment_(images[:1], [jitter, *rest, blurs[1]], wild, dtype=dtype)


EXERCISES = (
    exercise_info_nce,
    exercise_normalized_mse,
    exercise_ema_update,
    exercise_key_queue,
    exercise_shuffle,
    exercise_augment,
)  # a new op adds its own

if __name__ == "__main__":
    torch.manual_seed(0)
    with use_backend("native"):
        for exercise in EXERCISES:
            for dtype in DTYPES:
                for shape in SHAPES:
                    exercise(*shape, dtype)
        info_nce(rows(0, 5, dtype=torch.float32), rows(0, 5, dtype=torch.float32), rows(3, 5, dtype=torch.float32))
