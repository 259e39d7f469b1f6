"""Small host work beside busy threads: it is done sooner by one thread than by a team whose members wait for a core."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

SMALL = 2**19  # pixels; some milliseconds of `augment_` on one core


@contextmanager
def one_thread(pixels: int = 0) -> Iterator[None]:
    """Let torch compute with one thread, if `pixels` to work on are few.

    A team of OpenMP's is done when its last member is, and while DALI decodes there is no core for that one: what takes
    1 ms alone takes 20. The number of threads is the process's, so it is set back as soon as possible.
    """
    threads = torch.get_num_threads()
    if pixels > SMALL or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
