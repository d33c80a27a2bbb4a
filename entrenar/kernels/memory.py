"""Where arrays lie: large ones that come and go with every operation keep their memory in the process meanwhile, and
small ones that stay are put together."""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref
from typing import Any

import numpy as np

HUGE = 4 << 20  # bytes, from which on NumPy asks the operating system for pages of 2 MB instead of 4 KB
TOGETHER = 16 << 20  # bytes of small arrays in one piece at most: at its ends there may be no room for a whole page
LINE = 64  # bytes of a cache line
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
MADV_HUGEPAGE = 14  # of Linux's mman.h
HEAP = (1 << 30) - (1 << 20)  # bytes of the heap that get huge pages once they are used; less than LARGEST
LARGEST = 1 << 30, 32 << 20  # larger arrays still go back to the operating system; older glibcs take 32 MiB at most


def keep_freed_memory() -> bool:
    """Ask the C library to keep freed arrays for the next ones; False where it has no such switch (only glibc has).

    By default glibc returns large arrays to the operating system when they die, and the next one is filled page fault
    by page fault with zeros: 31,000 faults in one training step of a 15m model. The heap then holds most arrays, and
    its pages are huge ones, as those of NumPy's large arrays are: 2 % of that step. The switch holds
    for the whole process and cannot be undone, so a program decides; entrenar's own training jobs do.
    """
    try:
        libc = ctypes.CDLL(None)
        mallopt = libc.mallopt
    except (AttributeError, OSError, TypeError):
        return False
    kept = any(mallopt(M_MMAP_THRESHOLD, size) for size in LARGEST)
    kept = kept and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
    if kept:
        _ask_for_huge_pages(libc)
    return kept


def _ask_for_huge_pages(libc: ctypes.CDLL) -> None:
    """Grows the heap, which then is not given back, by memory that is not touched yet, hence takes none."""
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if start := libc.malloc(HEAP):  # None where there is less address space: then pages stay small
        page = start // mmap.PAGESIZE * mmap.PAGESIZE
        libc.madvise(page, start + HEAP - page, MADV_HUGEPAGE)
        libc.free(start)


class Lasting(threading.local):
    """Makes arrays (count,), without values, for matrices that stay and are read all the time: small ones lie behind
    one another in a large one, for the sake of its pages.

    A model that writes text reads every weight for every token; from pages of 4 KB, a 124m model takes 5 to 10 % more
    time for one. A piece is freed when the last array in it is.
    """

    piece: weakref.ref[np.ndarray] | None = None
    used = 0

    def __call__(self, count: int, dtype: Any) -> np.ndarray:
        size = count * np.dtype(dtype).itemsize
        if size >= HUGE:
            return np.empty(count, dtype)
        piece = self.piece() if self.piece else None
        if piece is None or self.used + size > piece.size:
            # the first is small, for whoever wants one array
            piece = np.empty(HUGE + LINE if piece is None else min(2 * piece.size, TOGETHER), np.uint8)
            self.piece, self.used = weakref.ref(piece), -piece.ctypes.data % LINE
        start, self.used = self.used, self.used + -(-size // LINE) * LINE
        return piece[start : start + size].view(dtype)


lasting = Lasting()
