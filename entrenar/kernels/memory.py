"""Large arrays come and go with every operation; this keeps their pages in the process instead of the kernel's hands."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGEST = 1 << 30  # arrays above 1 GiB still come from, and go back to, the operating system


def keep_freed_memory() -> bool:
    """Ask the C library to keep freed arrays for the next ones; False where it has no such switch (only glibc has).

    By default glibc returns every array above a few megabytes to the operating system when it dies, and the next one
    is filled page fault by page fault with zeros: 31,000 faults in one training step of a 15m model. The switch holds for
    the whole process and cannot be undone, so a program decides; entrenar's own training jobs do.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
