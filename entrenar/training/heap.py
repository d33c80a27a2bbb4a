"""Where arrays come to lie in a process's memory: glibc's malloc for large blocks, without the memory.

What a process holds is more than what lives in it: a freed array leaves a gap, and the next one that is a little larger
lies elsewhere. Leaves out small blocks (the C library keeps lists of those) and everything but float32 arrays.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import Counter
from typing import NamedTuple

FLOAT = 4  # bytes
HEADER, UNIT = 8, 16  # of glibc's malloc: what it adds to a block, and what it rounds to
PAGE = 4096
TRIM = 2**31 - 1  # kernels/memory.py's threshold


class Array(NamedTuple):
    """One that lives: where it begins in the heap (-1: has its own mapping), and its bytes as the heap counts them."""

    number: int
    start: int
    size: int


class Heap:
    """Where arrays come to lie, as glibc's malloc does it once `kernels.keep_freed_memory` was called.

    A block goes into the smallest gap that holds it, at its lower end, and otherwise on top; neighbouring gaps are
    one; what is on top goes back only once it is more than 2 GiB. Blocks of `own_mapping` bytes or more never enter
    the heap, and go back when dropped.

    peak      most bytes held at once, gaps included
    at_peak   the bytes that lived then, by name
    most      most bytes that lived at once
    """

    def __init__(self, own_mapping: int = 1 << 30) -> None:
        self.own_mapping = own_mapping
        self.top = self.reach = 0  # where the last block ends now, and up to where memory was ever touched
        self.mapped = self.now = self.most = self.peak = self.count = 0
        self.gaps: list[tuple[int, int]] = []  # (size, start), smallest first
        self.starts: dict[int, int] = {}  # of gaps: start -> size
        self.ends: dict[int, int] = {}  # of gaps: end -> size
        self.names: dict[int, str] = {}
        self.living: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self.higher = False  # a new peak, not remembered yet

    def take(self, name: str, *shape: int) -> Array:
        """A float32 array of this shape."""
        size = max(2 * UNIT, -(-(math.prod(shape) * FLOAT + HEADER) // UNIT) * UNIT)
        self.count += 1
        if size >= self.own_mapping:
            array = Array(self.count, -1, -(-(size + HEADER) // PAGE) * PAGE)
            self.mapped += array.size
        else:
            array = Array(self.count, self._place(size), size)
        self.names[array.number] = name
        self.living[name] += array.size
        self.now += array.size
        self.most = max(self.most, self.now)
        if self.reach + self.mapped > self.peak:
            self.peak = self.reach + self.mapped
            self.higher = True
        return array

    def drop(self, *arrays: Array | None) -> None:
        """Nothing refers to these any longer."""
        self._remember()
        for array in arrays:
            if array is None:
                continue
            self.now -= array.size
            self.living[self.names.pop(array.number)] -= array.size
            if array.start < 0:
                self.mapped -= array.size
            else:
                self._add_gap(array.start, array.size)

    def add_alone(self, name: str, size: int) -> None:
        """So many bytes, for a moment, beside what lives: the gaps went back to the system before."""
        self._remember()
        self.most = max(self.most, self.now + size)
        if self.now + size > self.peak:
            self.peak, self.at_peak = self.now + size, self.living + Counter({name: size})

    def rename(self, array: Array, name: str) -> Array:
        """It lives on as something else."""
        self._remember()
        self.living[self.names[array.number]] -= array.size
        self.living[name] += array.size
        self.names[array.number] = name
        return array

    def _remember(self) -> None:
        """What lives at a new peak, before any of it goes: arrays often come in rows, each a new peak."""
        if self.higher:
            self.at_peak, self.higher = self.living.copy(), False

    def _place(self, size: int) -> int:
        at = bisect_left(self.gaps, (size, -1))
        if at < len(self.gaps):
            gap, start = self.gaps[at]
            self._remove_gap(start, gap)
            if gap > size:
                self._add_gap(start + size, gap - size)
            return start
        start, self.top = self.top, self.top + size
        self.reach = max(self.reach, self.top)
        return start

    def _add_gap(self, start: int, size: int) -> None:
        if (before := self.ends.get(start)) is not None:
            self._remove_gap(start - before, before)
            start, size = start - before, size + before
        if (after := self.starts.get(start + size)) is not None:
            self._remove_gap(start + size, after)
            size += after
        if start + size == self.top:  # the next block that fits no gap begins here
            self.top = start
            if self.reach - self.top > TRIM:
                self.reach = self.top
            return
        self.starts[start], self.ends[start + size] = size, size
        insort(self.gaps, (size, start))

    def _remove_gap(self, start: int, size: int) -> None:
        del self.starts[start], self.ends[start + size]
        del self.gaps[bisect_left(self.gaps, (size, start))]
