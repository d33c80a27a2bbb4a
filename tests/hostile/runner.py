"""Runs a module's cases in a process of their own, and notices those that kill it or do not end."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import entrenar

PATIENCE = 20.0  # seconds without a word; the worker itself ends a case after five, unless it is stuck outside Python
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


def run(module: str, most: int = 0, *, patience: float = PATIENCE) -> list[Result]:
    """The results of `hostile.<module>`'s cases: all of them, or `most` of each family."""
    results: list[Result] = []
    for _ in range(DEATHS):
        done, death = _run_from(len(results), module, most, patience)
        results += done
        if death is None:
            return results
        results.append(death)
    return [*results, Result("", "", f"the process died {DEATHS} times; the cases that follow were not tried")]


def _run_from(first: int, module: str, most: int, patience: float) -> tuple[list[Result], Result | None]:
    """The results from case `first` on, and the case that ended the process."""
    command = [sys.executable, "-m", "hostile.worker", f"hostile.{module}", str(most), str(first)]
    environment = os.environ | {"PYTHONPATH": PATHS, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    lines: queue.Queue[bytes] = queue.Queue()
    reader = threading.Thread(target=lambda: [lines.put(line) for line in [*_lines(process.stdout, lines), b""]])
    reader.start()
    results: list[Result] = []
    begun: dict[str, Any] = {"family": "", "name": "before the first case"}
    try:
        while True:
            try:
                line = lines.get(timeout=patience)
            except queue.Empty:
                return results, Result(begun["family"], begun["name"], f"did not end within {patience:g} s")
            facts = json.loads(line) if line else None
            if facts is None:
                return results, Result(begun["family"], begun["name"], _death(process))
            if "done" in facts:
                return results, None
            if "outcome" in facts:
                results.append(Result(begun["family"], begun["name"], facts["wrong"], facts["outcome"]))
            else:
                begun = facts
    finally:
        process.kill()
        process.wait()
        reader.join()
        process.stdout.close()
        process.stderr.close()
