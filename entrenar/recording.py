"""Whether operations are recorded for backward(), and who watches them: for each thread, known to tensor.py."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Protocol


class _Recording(threading.local):
    def __init__(self) -> None:  # runs once in each thread
        self.on = True
        self.before: list[bool] = []  # what `on` was outside each no_grad this thread is inside of
        self.watcher: Watcher | None = None


recording = _Recording()


def is_recording() -> bool:
    """Whether operations are recorded for backward() in this thread."""
    return recording.on


class no_grad(contextlib.ContextDecorator):
    """Nothing is recorded, and so nothing saved, inside `with no_grad():` or a function decorated `@no_grad()`."""

    on = False

    def __enter__(self) -> None:
        recording.before.append(recording.on)
        recording.on = self.on

    def __exit__(self, *error: object) -> None:
        recording.on = recording.before.pop()


class recorded(no_grad):
    """The opposite, for what is computed again during a backward() that is called inside no_grad."""

    on = True


class Watcher(Protocol):
    """Sees every operation of this thread, right after it was computed; what it raises ends the computation.

        forward    an op, what it was given (tensors, or whatever else came positionally), and its output
        backward   an op, the gradient of its output, and what its backward returned for its inputs: their gradients,
                   or sums of earlier ones it has added to (`so_far`)
        inside     a module (nn.py) whose forward is about to run: a context around it
    """

    def forward(self, op: Any, inputs: Sequence[Any], out: Any) -> None: ...
    def backward(self, op: Any, dout: Any, grads: Any) -> None: ...
    def inside(self, module: Any) -> contextlib.AbstractContextManager[None]: ...


@contextlib.contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Inside, `watcher` sees every operation of this thread (instead of another one that did before)."""
    before, recording.watcher = recording.watcher, watcher
    try:
        yield
    finally:
        recording.watcher = before


def current_watcher() -> Watcher | None:
    """Who watches this thread's operations, if anyone."""
    return recording.watcher
