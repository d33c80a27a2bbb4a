"""Runs the cases of one module, one after the other, and writes a line of JSON before and after each.

python -m hostile.worker MODULE MOST FIRST HANG     MOST cases per family (0: all), from number FIRST on, each at
                                                    most HANG seconds
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from hostile.case import Case, Outcome, is_system, judge

ROOM = 3 << 30  # bytes of addresses a case may take: a backstop, for what would take the machine down


class Hang(BaseException):
    """The alarm went off."""


def chosen(module: Any, most: int) -> Iterator[tuple[str, Case]]:
    """(family, case); of each family all, or `most` that are spread evenly."""
    for family, make in module.FAMILIES.items():
        cases = list(make())
        names = [case.name for case in cases]
        assert len(set(names)) == len(names), f"{family}: two cases have one name"
        step = max(1, len(cases) // most) if most else 1
        for case in cases[::step][: most or None]:
            yield family, case


def main(name: str, most: int, first: int, hang: float) -> None:
    module = importlib.import_module(f"hostile.{name}")
    out = os.fdopen(os.dup(1), "w")
    signal.signal(signal.SIGALRM, _alarm)
    errors = module.errors()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as noise:
        for number, (family, case) in enumerate(chosen(module, most)):
            if number < first:
                continue
            if number == first:
                gc.collect()
                gc.freeze()
                _limit_addresses()
            _tell(out, number=number, family=family, name=case.name)
            outcome = _try(case, errors, Path(folder, "case"), noise, hang)
            _tell(out, number=number, wrong=judge(case, outcome), outcome=asdict(outcome))
    _tell(out, done=True)


def _try(case: Case, errors: tuple[type[BaseException], ...], folder: Path, noise: IO[bytes], hang: float) -> Outcome:
    folder.mkdir()
    path = case.write(folder)
    gc.collect()
    outcome = Outcome(opened=path.name)
    with warnings.catch_warnings(record=True) as warned, _stderr_to(noise):
        warnings.simplefilter("always")
        before = _start_peak()
        signal.setitimer(signal.ITIMER_REAL, hang)
        clock, processor = time.perf_counter(), time.process_time()
        try:
            outcome.digest = case.open(path)
        except BaseException as error:
            signal.setitimer(signal.ITIMER_REAL, 0)
            outcome.error, outcome.message = type(error).__name__, str(error)
            outcome.expected = isinstance(error, errors)
            if isinstance(error, Hang):
                outcome.message = f"did not end within {hang:g} s"
            if case.system and is_system(error):
                outcome.error, outcome.expected = "OSError", True
        signal.setitimer(signal.ITIMER_REAL, 0)
        outcome.processor, outcome.seconds = time.process_time() - processor, time.perf_counter() - clock
        outcome.memory = _peak() - before
    outcome.warnings = len(warned)
    outcome.noise = noise.seek(0, os.SEEK_END)
    shutil.rmtree(folder)
    return outcome


def _alarm(*_: Any) -> None:
    raise Hang


@contextlib.contextmanager
def _stderr_to(file: IO[bytes]) -> Iterator[None]:
    """What a library in C or Rust prints goes to a file."""
    kept = os.dup(2)
    file.truncate(0)
    os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _start_peak() -> int:
    """Bytes resident now; from here on, the peak counts anew."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # no Linux: the peak is the process's own, and only a new one is seen
        pass
    return _peak()


def _peak() -> int:
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _limit_addresses() -> None:
    with contextlib.suppress(OSError, ValueError):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _tell(out: IO[str], **facts: Any) -> None:
    out.write(json.dumps(facts) + "\n")
    out.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
