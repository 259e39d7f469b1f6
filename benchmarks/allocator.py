"""glibc's allocator with fixed thresholds: left alone, they move with whatever ran before in the process."""

import ctypes
import platform

HIGHEST = 32 * 2**20  # bytes; as far as glibc moves its threshold of mapping a block, when one so large is freed


def fix_thresholds() -> None:
    """Keep freed memory in the process, but map blocks beyond 32 MiB anew where no hole in the heap is large enough.

    Freed memory at the end of the heap is otherwise given back whenever it exceeds twice that: calls with several
    blocks of 16 MiB then take new pages, each with a fault, or none, as the heap happens to lie. Does nothing on
    another C library.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
    libc = ctypes.CDLL(None)
    for name, value in ((m_mmap_threshold, HIGHEST), (m_trim_threshold, 2**31 - 1)):
        if not libc.mallopt(name, value):
            raise OSError(f"glibc refused mallopt({name}, {value})")
