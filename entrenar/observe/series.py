"""One quantity over a run's steps, kept small however long the run: a column of the picture is what is stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

COLUMNS = 600  # of a picture: finer than anyone sees
LARGEST = 1e30  # values beyond are no measurement, and their sums would overflow


class Column(NamedTuple):
    """The values of neighbouring steps: at which step on average, their mean, the least, the greatest."""

    step: float
    mean: float
    low: float
    high: float


class Series:
    """Mean, least and greatest value per column, of steps 0 .. `last`."""

    def __init__(self, last: int, columns: int = COLUMNS) -> None:
        self.last, self.count, self.not_finite = last, 0, 0
        self.places = min(columns, last + 1)
        self.sums: list[list[float] | None] = [None] * self.places  # count, sum of steps, of values, low, high

    def add(self, step: int, value: float | None) -> None:
        """Count the value of a step in, 0 <= step <= last; None where there was none.

        NaN, infinities and what is absurdly large are counted, and nothing else.
        """
        if value is None:
            return
        if not abs(value) <= LARGEST:  # NaN compares as false
            self.not_finite += 1
            return
        self.count += 1
        place = step * self.places // (self.last + 1)
        if (sums := self.sums[place]) is None:
            self.sums[place] = [1, step, value, value, value]
        else:
            sums[0] += 1
            sums[1] += step
            sums[2] += value
            if value < sums[3]:
                sums[3] = value
            elif value > sums[4]:
                sums[4] = value

    def columns(self) -> list[Column]:
        """In the order of steps, without the empty ones."""
        found = []
        for sums in self.sums:
            if sums is not None:
                count, steps, values, low, high = sums
                found.append(Column(steps / count, min(max(values / count, low), high), low, high))  # within: rounding
        return found


def column_of(step: int, last: int, columns: int = COLUMNS) -> int:
    """Which of the columns over 0 .. `last` a step falls into; the last one for a step beyond."""
    return min(columns - 1, step * columns // (last + 1))


def smooth(columns: Sequence[Column]) -> list[Column]:
    """The columns with their means smoothed."""
    means = smoothed([column.mean for column in columns])
    return [column._replace(mean=mean) for column, mean in zip(columns, means, strict=True)]


def smoothed(values: Sequence[float], share: float = 0.03) -> list[float]:
    """Each value as the weighted mean of its neighbours, within `share` of the line to each side.

    Near the steep beginning the window shrinks on both sides alike, so that the slope adds no bias.
    """
    reach, out = max(1, round(len(values) * share)), []
    for i in range(len(values)):
        near = min(reach, i)
        offsets = range(-near, min(near, len(values) - 1 - i) + 1)
        weights = [near + 1 - abs(k) for k in offsets]
        out.append(sum(w * values[i + k] for k, w in zip(offsets, weights, strict=True)) / sum(weights))
    return out
