"""A number measured several times: its median, and how far it strayed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        values = list(values)
        if not values:
            raise ValueError("Spread.of: no values")
        return cls(statistics.median(values), min(values), max(values))


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """How many times as fast as they we were, round by round: theirs[i] / ours[i], both in seconds.

    Neighbours in time share the machine's mood, which a ratio of two medians would not.
    """
    return Spread.of(b / a for a, b in zip(ours, theirs, strict=True))


def geometric_mean(values: Iterable[float]) -> float:
    """The mean of ratios: twice as fast and half as fast make 1."""
    values = list(values)
    if not values:
        raise ValueError("geometric_mean: no values")
    return math.exp(sum(map(math.log, values)) / len(values))


def mean_of(spreads: Iterable[Spread]) -> Spread:
    """The geometric mean of ratios, between those of all at their worst round, and all at their best."""
    each = list(spreads)
    return Spread(*(geometric_mean(getattr(spread, end) for spread in each) for end in ("median", "low", "high")))
