"""Runs a module's cases in a process of their own, and notices those that kill it or do not end."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import entrenar

HANG = 5.0  # seconds by the clock, after which the worker ends a case: longer than one may take on a busy machine
START = 60.0  # until the first case: imports, and the good file
PATIENCE = 20.0  # seconds without a word, after which it is stuck outside Python, and ended itself
DEATHS = 20  # then the rest is not tried

TESTS = Path(__file__).parent.parent
PATHS = os.pathsep.join([str(TESTS), str(Path(entrenar.__file__).parent.parent)])


@dataclass(frozen=True)
class Result:
    """A case, and what is wrong with what came of it ("": nothing)."""

    family: str
    name: str
    wrong: str
    outcome: dict[str, Any] | None = None


def run(module: str, most: int = 0, *, patience: float = PATIENCE, hang: float = HANG) -> list[Result]:
    """The results of `hostile.<module>`'s cases: all of them, or `most` of each family."""
    results: list[Result] = []
    for _ in range(DEATHS):
        done, death = _run_from([module, most, len(results), hang], patience)
        results += done
        if death is None:
            return results
        results.append(death)
    return [*results, Result("", "", f"the process died {DEATHS} times; the cases that follow were not tried")]


def _run_from(task: list[Any], patience: float) -> tuple[list[Result], Result | None]:
    """The results of a worker's task, and the case that ended it, if one did."""
    results: list[Result] = []
    family, name = "", ""
    with tempfile.TemporaryFile() as errors, _worker(task, errors) as (process, lines):
        while True:
            try:
                line = lines.get(timeout=patience if name else START)
            except queue.Empty:
                if not name:
                    raise RuntimeError(f"hostile.{task[0]}: no case within {START:g} s") from None
                return results, Result(family, name, f"did not end within {patience:g} s")
            if not line and not name:  # no case's fault
                raise RuntimeError(f"hostile.{task[0]}: {_death(process, errors)}")
            if not line:
                return results, Result(family, name, _death(process, errors))
            facts = json.loads(line)
            if "done" in facts:
                return results, None
            if "outcome" in facts:
                results.append(Result(family, name, facts["wrong"], facts["outcome"]))
            else:
                family, name = facts["family"], facts["name"]


@contextlib.contextmanager
def _worker(task: list[Any], errors: IO[bytes]) -> Iterator[tuple[Any, queue.Queue[bytes]]]:
    """(the process, its lines as they come, and b"" when it is gone); killed at the end."""
    command = [sys.executable, "-m", "hostile.worker", *map(str, task)]
    environment = os.environ | {"PYTHONPATH": PATHS, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors
    )
    lines: queue.Queue[bytes] = queue.Queue()

    def read() -> None:
        for line in process.stdout:
            lines.put(line)
        lines.put(b"")

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield process, lines
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stdout.close()


def _death(process: subprocess.Popen[bytes], errors: IO[bytes]) -> str:
    code = process.wait()
    errors.seek(0)
    told = errors.read()[-2000:].decode(errors="replace").strip()
    how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
    return f"ended the process: {how}; {told}"
