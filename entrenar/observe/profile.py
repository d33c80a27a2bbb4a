"""Where the time of a step goes: every call of a kernel, timed, with what it computed and moved.

    with Profile() as profile:
        step()
    profile.table()

Arithmetic happens in kernels, and these are reached as attributes of `entrenar.kernels`: while a profile is open, timed
ones stand there. What a step takes beside them is the engine's own: Python, and what ops leave to NumPy. A call costs
about a microsecond more meanwhile. One thread: kernels called in others meanwhile are counted too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from entrenar import kernels
from entrenar.observe.costs import Cost, cost


@dataclass
class Line:
    """Calls of one kernel, or of one kernel at the same sizes, together."""

    kernel: str
    sizes: str
    calls: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0

    def add(self, seconds: float, each: Cost) -> None:
        self.calls += 1
        self.seconds += seconds
        self.flops += each.flops
        self.bytes += each.bytes


class Profile:
    """Times every kernel inside its `with`.

    calls     (kernel, seconds, Cost) in order
    seconds   from beginning to end, less what the counting itself took
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, float, Cost]] = []
        self.seconds = 0.0

    def __enter__(self) -> Self:
        self.counting = 0.0
        self.before = {name: getattr(kernels, name) for name in kernels.KERNELS}
        vars(kernels).update({name: self._timed(name, kernel) for name, kernel in self.before.items()})
        self.began = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = time.perf_counter() - self.began - self.counting
        vars(kernels).update(self.before)

    def _timed(self, name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            result = kernel(*args, **options)
            ended = time.perf_counter()
            self.calls.append((name, ended - began, cost(name, args, options, result)))
            self.counting += time.perf_counter() - ended
            return result

        return call

    @property
    def inside(self) -> float:
        """Seconds in kernels."""
        return sum(seconds for _, seconds, _ in self.calls)

    @property
    def outside(self) -> float:
        """Seconds beside them."""
        return max(0.0, self.seconds - self.inside)

    def table(self, *, by_size: bool = False) -> list[Line]:
        """A line for each kernel, or for each of its sizes, the longest first."""
        lines: dict[tuple[str, str], Line] = {}
        for name, seconds, each in self.calls:
            key = name, each.sizes if by_size else ""
            lines.setdefault(key, Line(*key)).add(seconds, each)
        return sorted(lines.values(), key=lambda line: -line.seconds)
