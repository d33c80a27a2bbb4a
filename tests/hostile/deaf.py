"""An opener that never comes back to Python, as C may: no alarm reaches it, and its process has to be ended."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

from hostile.case import Case, Family, bytes_at
from hostile.planted import errors as errors
from hostile.planted import refuse, sleeps


def sleeps_deaf(path: Path) -> str:
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    return sleeps(path)


def deaf() -> Iterator[Case]:
    yield Case("a hang", bytes_at("file", b"x"), sleeps_deaf)
    yield Case("the next", bytes_at("file", b"x"), refuse)


FAMILIES: dict[str, Family] = {"deaf": deaf}
