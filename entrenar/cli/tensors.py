"""Tensors of a file, for people: what the numbers are like, layers of one kind in one row.

Statistics are taken a block at a time, so that a file larger than the memory can be looked at. Leaves out the formats:
inspect.py opens files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from entrenar.cli.terminal import clipped, columns

BLOCK = 1 << 18  # numbers looked at together: 2 MB as float64
LAYER = re.compile(r"(?<=\.)\d{1,9}(?=\.)")  # the 3 of model.layers.3.mlp.up_proj.weight


@dataclass(frozen=True)
class Stats:
    """Of `count` numbers; low, high, mean and squares (sum of squared distances from the mean) of the finite ones."""

    count: int = 0
    zeros: int = 0
    nan: int = 0
    inf: int = 0
    low: float = math.inf
    high: float = -math.inf
    mean: float = 0.0
    squares: float = 0.0

    @property
    def finite(self) -> int:
        return self.count - self.nan - self.inf

    @property
    def std(self) -> float:
        return math.sqrt(self.squares / self.finite) if self.finite else math.nan

    def __add__(self, other: Stats) -> Stats:
        """Of both together (Chan et al. 1979)."""
        total, apart = self.finite + other.finite, other.mean - self.mean
        share = other.finite / total if total else 0.0
        return Stats(self.count + other.count, self.zeros + other.zeros, self.nan + other.nan, self.inf + other.inf,
                     min(self.low, other.low), max(self.high, other.high), self.mean + apart * share,
                     self.squares + other.squares + apart * apart * self.finite * share)  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity: null where a number is none."""
        floats = {"min": self.low, "max": self.high, "mean": self.mean if self.finite else math.nan, "std": self.std}
        told = {name: value if math.isfinite(value) else None for name, value in floats.items()}
        return told | {"zeros": self.zeros, "nan": self.nan, "inf": self.inf}


def stats_of(block: np.ndarray) -> Stats:
    """Of one block that fits into memory."""
    x = np.asarray(block).reshape(-1).astype(np.float64)
    finite = np.isfinite(x)
    good = x if finite.all() else x[finite]
    nan = int(np.isnan(x).sum()) if len(good) < len(x) else 0
    if not good.size:
        return Stats(x.size, nan=nan, inf=x.size - nan)
    with np.errstate(over="ignore", invalid="ignore"):  # sums of float64's largest
        mean = float(good.mean())
        squares = float(np.square(good - mean).sum())
    return Stats(x.size, int(x.size - np.count_nonzero(x)), nan, int(x.size - good.size - nan),
                 float(good.min()), float(good.max()), mean, squares)  # fmt: skip


def blocks_of(array: np.ndarray) -> Iterator[np.ndarray]:
    """An array (mapped from a file, perhaps) in pieces of BLOCK numbers."""
    flat = array.reshape(-1)
    for start in range(0, flat.size, BLOCK):
        yield flat[start : start + BLOCK]


@dataclass(frozen=True)
class Weight:
    """A tensor of a file, or `layers` of them that differ in nothing but the number of the layer.

    blocks   its numbers a block at a time; None where its type cannot be turned into numbers
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    blocks: Callable[[], Iterable[np.ndarray]] | None = field(default=None, compare=False)
    stats: Stats | None = None
    layers: int = 1

    @property
    def size(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape) * self.layers

    def measured(self) -> Weight:
        """With its statistics."""
        if self.blocks is None:
            return self
        return replace(self, stats=sum(map(stats_of, self.blocks()), Stats()))

    def to_dict(self) -> dict[str, Any]:
        own = {"name": self.name, "shape": list(self.shape), "dtype": self.dtype, "bytes": self.nbytes}
        return own | (self.stats.to_dict() if self.stats else {})


def grouped(weights: Sequence[Weight]) -> list[Weight]:
    """Weights of the same name but for the layer's number, shape and type, as one: model.layers.0-31.mlp..."""
    groups: dict[tuple, list[Weight]] = {}
    for weight in weights:
        groups.setdefault((LAYER.sub("*", weight.name, count=1), weight.shape, weight.dtype), []).append(weight)
    return [together(members) for members in groups.values()]


def together(members: Sequence[Weight]) -> Weight:
    """One row for the same weight of several layers."""
    first = members[0]
    if len(members) == 1:
        return first
    numbers = sorted(int(LAYER.search(member.name)[0]) for member in members)  # type: ignore[index]
    stats = [member.stats for member in members if member.stats]
    return replace(first, name=LAYER.sub(ranges(numbers), first.name, count=1), layers=len(members),
                   nbytes=sum(member.nbytes for member in members),
                   stats=sum(stats, Stats()) if len(stats) == len(members) else None)  # fmt: skip


def ranges(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5" """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def table(weights: Sequence[Weight]) -> list[str]:
    """The weights as lines of text, the first one the head; statistics where there are any."""
    from entrenar.training.display import size

    if not weights:
        return ["no tensors"]
    measured = any(weight.stats for weight in weights)
    rows = [["tensor", "shape", "type", "bytes", *(["min", "max", "mean", "std", "zeros"] if measured else [])]]
    for w in weights:
        shape = clipped(" x ".join(map(str, w.shape[:99])), 40) or "one number"
        row = [clipped(w.name, 100), f"{w.layers} x ({shape})" if w.layers > 1 else shape, w.dtype, size(w.nbytes)]
        rows.append(row + (cells(w.stats) if measured else []))
    return columns(rows)


def cells(stats: Stats | None) -> list[str]:
    if stats is None or not stats.count:
        return ["-"] * 5
    if not stats.finite:
        return ["none", "is", "finite", "", ""]
    zeros = f"{stats.zeros / stats.count:.1%}" if stats.zeros else "0"
    return [f"{x:.3g}" for x in (stats.low, stats.high, stats.mean, stats.std)] + [zeros]


def not_finite(weights: Iterable[Weight]) -> list[str]:
    """A sentence for each weight that holds NaN or infinity."""
    return [
        f"{clipped(w.name, 100)}: {w.stats.nan:,} NaN and {w.stats.inf:,} infinite of {w.stats.count:,} numbers"
        for w in weights
        if w.stats and (w.stats.nan or w.stats.inf)
    ]
