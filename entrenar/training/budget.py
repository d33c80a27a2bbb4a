"""A run that ends on time: how many steps fit into what is left.

The steps are planned once before the first one, from a few rehearsed steps that change nothing, and again on the way
where the machine turns out faster or slower. The learning rate follows the share of the steps that is done, so its
schedule ends where the run does.
"""

from __future__ import annotations

import re

TOLERANCE = 0.01  # a plan that is off by less is left alone
SPARE = 0.01  # of the budget, kept for what nobody foresees

_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s)?")


def seconds_of(text: str) -> float:
    """ "90s", "20m", "1h30m", "2h" in seconds; a bare number counts minutes. Raises ValueError for anything else."""
    if re.fullmatch(r"\d+(\.\d+)?", text):
        total = 60 * float(text)
    else:
        match = _DURATION.fullmatch(text)
        hours, minutes, seconds = match.groups() if match else (None, None, None)
        total = 3600 * int(hours or 0) + 60 * int(minutes or 0) + float(seconds or 0)
    if not 0 < total < 1e9:
        raise ValueError(f"{text!r}: wanted a time such as 90s, 20m or 1h30m")
    return total


def steps_that_fit(left: float, *, step: float, look: float, every: int, last: float) -> int:
    """How many steps of `step` seconds fit into `left` seconds, with a look of `look` seconds each `every` steps (0:
    none) and `last` seconds at the end."""
    return max(0, int((left - last) / (step + (look / every if every else 0.0))))


def replanned(steps: int, wanted: int, done: int) -> int:
    """The new number of steps: `wanted`, unless it hardly differs from `steps`; never fewer than are done."""
    wanted = max(wanted, done, 1)
    return steps if abs(wanted - steps) <= TOLERANCE * steps else wanted
