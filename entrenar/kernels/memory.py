"""Large arrays come and go with every operation: a switch that keeps their memory in the process meanwhile."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGEST = 1 << 30, 32 << 20  # larger arrays still go back to the operating system; older glibcs take 32 MiB at most


def keep_freed_memory() -> bool:
    """Ask the C library to keep freed arrays for the next ones; False where it has no such switch (only glibc has).

    By default glibc returns large arrays to the operating system when they die, and the next one is filled page fault
    by page fault with zeros: 31,000 faults in one training step of a 15m model. The switch holds
    for the whole process and cannot be undone, so a program decides; entrenar's own training jobs do.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    kept = any(mallopt(M_MMAP_THRESHOLD, size) for size in LARGEST)
    return kept and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
