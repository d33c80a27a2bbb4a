"""Openers with every fault a reader can have: the runner must notice each, and pass the one that has none."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from entrenar.formats import FormatError
from hostile.case import Case, Family, bytes_at


def errors() -> tuple[type[BaseException], ...]:
    return (FormatError,)


def refuse(path: Path, what: str = "is no such file; wanted another") -> str:
    raise FormatError(f"{path}: {what}")


def sleeps(path: Path) -> str:
    time.sleep(60)
    return refuse(path)


def waits_for_a_pipe(path: Path) -> str:
    os.mkfifo(path.with_name("pipe"))
    return open(path.with_name("pipe")).read()


def computes(path: Path) -> str:
    signal.setitimer(signal.ITIMER_REAL, 0)  # seconds of the processor are counted, not of the clock
    stop = time.process_time() + 1.1
    while time.process_time() < stop:
        pass
    return refuse(path)


def allocates(path: Path) -> str:
    bytearray(b"x") * 300_000_000
    return refuse(path)


def aborts(path: Path) -> str:
    os.abort()


def recurses(path: Path) -> str:
    return recurses(path)


def warns(path: Path) -> str:
    for i in range(50):
        warnings.warn(f"hello {i}", stacklevel=2)
    return refuse(path)


def prints(path: Path) -> str:
    os.write(2, b"panicked!\n" * 500)
    return refuse(path)


def wrong_error(path: Path) -> str:
    return {}["model"]


def system_error(path: Path) -> str:
    raise OSError(5, "Input/output error", str(path))


OPENERS: dict[str, Callable[[Path], str]] = {
    "nothing": refuse,
    "a hang": sleeps,
    "a wait for a pipe": waits_for_a_pipe,
    "too long a computation": computes,
    "300 MB": allocates,
    "endless recursion": recurses,
    "an error of another family": wrong_error,
    "an error of the system": system_error,
    "acceptance": lambda path: "read",
    "a message without the file": lambda path: refuse(Path("."), "wrong"),
    "a message of Python's": partial(refuse, what="'NoneType' object has no attribute 'get'"),
    "a message of a bare key": partial(refuse, what="KeyError 'model'"),
    "a message with an escape code": partial(refuse, what="tensor \x1b[2J is unknown"),
    "an endless message": partial(refuse, what="wrong " * 10_000),
    "warnings": warns,
    "noise": prints,
}


def faults() -> Iterator[Case]:
    for name, opener in OPENERS.items():
        yield Case(name, bytes_at("file", b"x"), opener)
    yield Case("the wrong words", bytes_at("file", b"x"), refuse, says="byte 7")
    yield Case("harmless, and refused", bytes_at("file", b"x"), refuse, equals="read")
    yield Case("harmless, and read as something else", bytes_at("file", b"x"), lambda path: "other", equals="read")


def harmless() -> Iterator[Case]:
    yield Case("read as the original", bytes_at("file", b"x"), lambda path: "read", equals="read")
    yield Case("read", bytes_at("file", b"x"), lambda path: "read", may_load=True)
    yield Case("refused", bytes_at("file", b"x"), refuse, says="wanted another")


def deaths() -> Iterator[Case]:
    """The last: each takes the process with it."""
    yield Case("a crash", bytes_at("file", b"x"), aborts)
    yield Case("an exit", bytes_at("file", b"x"), lambda path: os._exit(0))


FAMILIES: dict[str, Family] = {"faults": faults, "harmless": harmless, "deaths": deaths}
