"""How the driver and a contender's process speak: one JSON object per line, requests in, answers out.

    {"do": "prepare", "group": "gemm", "args": {...}}  -> {"check": [...]}   builds a case, runs it once
    {"do": "time", "seconds": 0.05}                    -> {"times": [[...]]} seconds per run, for each run of the case
    {"do": "call", "group": "machine", "what": "bandwidth", "args": {...}}
                                                       -> {"result": ...}    any other question
    {"do": "peak"}                                     -> {"bytes": ...}     most memory so far

An answer with "error" in it says what went wrong; the process lives on. Between requests it blocks on stdin:
an idle contender takes no processor from the one being measured.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

SHORT = 0.002  # seconds: a sample lasts at least so long, or the clock and the loop are what is measured
LONG = 0.05  # a case that takes longer needs no run to warm up
WARM = 0.1  # seconds of warming up: threads that wake up may share a core until the scheduler has spread them


class WorkerError(RuntimeError):
    """A contender could not do what it was asked."""


@dataclass
class Case:
    """Something to time, and numbers that tell whether it computed what it should (arrays.fingerprint).

    run       one thing to time, or several, each timed by itself: they share a turn and its warming up
    seconds   that a run took, of a case that has run warm already; None: one run more will tell
    """

    run: Callable[[], Any] | Sequence[Callable[[], Any]]
    check: list[float] = field(default_factory=list)
    seconds: float | None = None

    @property
    def runs(self) -> Sequence[Callable[[], Any]]:
        return [self.run] if callable(self.run) else self.run


# -- the contender's side


class Server:
    """Answers requests. `find(group)` gives the module (or object) that holds a group's functions."""

    def __init__(self, contender: str, find: Callable[[str], Any]) -> None:
        self.contender, self.find = contender, find
        self.case: Case | None = None
        self.last: list[float] = []  # seconds each run of the case took the last time

    def serve(self, requests: TextIO, answers: TextIO) -> None:
        for line in requests:
            try:
                answer = self.answer(json.loads(line))
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
            answers.write(json.dumps(answer) + "\n")
            answers.flush()

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        match request["do"]:
            case "prepare":
                return self.prepare(request["group"], request["args"])
            case "time":
                return {"times": self.time(request["seconds"])}
            case "call":
                return {"result": getattr(self.find(request["group"]), request["what"])(**request["args"])}
            case "peak":
                return {"bytes": peak_memory()}
        raise ValueError(f"unknown request {request['do']!r}")

    def prepare(self, group: str, args: Mapping[str, Any]) -> dict[str, Any]:
        self.case = None  # the last one's memory goes before the next one's comes
        self.case = self.find(group).CONTENDERS[self.contender](**args)
        known = self.case.seconds
        self.last = [self.sample(run, 1) if known is None else known for run in self.case.runs]
        return {"check": self.case.check}

    def time(self, seconds: float) -> list[list[float]]:
        """Seconds per run, each run of the case sampled for about `seconds`, at least once."""
        if self.case is None:
            raise ValueError("nothing is prepared")
        self.warm_up(self.case)
        return [self.samples(i, run, seconds) for i, run in enumerate(self.case.runs)]

    def warm_up(self, case: Case) -> None:
        """Threads wake up and spread, caches fill: by the shortest run, unless that is long enough by itself."""
        shortest = min(range(len(self.last)), key=self.last.__getitem__)
        end = time.perf_counter() + (WARM if self.last[shortest] < LONG else 0)
        while time.perf_counter() < end:
            self.last[shortest] = self.sample(case.runs[shortest], 1)

    def samples(self, i: int, run: Callable[[], Any], seconds: float) -> list[float]:
        if self.last[i] < LONG:
            self.last[i] = self.sample(run, 1)  # the one before left its own numbers in the caches
        runs = max(1, round(SHORT / max(self.last[i], 1e-9)))
        times: list[float] = []
        end = time.perf_counter() + seconds
        while not times or time.perf_counter() < end:
            times.append(self.sample(run, runs))
        self.last[i] = times[-1]
        return times

    def sample(self, run: Callable[[], Any], times: int) -> float:
        started = time.perf_counter()
        for _ in range(times):
            run()
        return (time.perf_counter() - started) / times


def peak_memory() -> int:
    """Most resident bytes this process has ever had."""
    # ru_maxrss starts from the parent's size on Linux (it survives exec), the kernel's own mark does not.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# -- the driver's side


class Worker:
    """A contender's process, as the driver sees it. Raises WorkerError with what the process said."""

    def __init__(
        self, command: Sequence[str], env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> None:
        self.errors = tempfile.TemporaryFile("w+")
        # A session of its own: Ctrl-C reaches the driver alone, which keeps what was measured.
        self.process = subprocess.Popen(
            command,
            env=env,
            cwd=cwd,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            start_new_session=True,
        )

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"the process ended (status {self.process.wait()}): {self.last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def prepare(self, group: str, **args: Any) -> list[float]:
        return self.ask("prepare", group=group, args=args)["check"]

    def time(self, seconds: float) -> list[list[float]]:
        return self.ask("time", seconds=seconds)["times"]

    def call(self, group: str, what: str, **args: Any) -> Any:
        return self.ask("call", group=group, what=what, args=args)["result"]

    def peak(self) -> int:
        return self.ask("peak")["bytes"]

    def alive(self) -> bool:
        return self.process.poll() is None

    def last_words(self) -> str:
        self.errors.seek(0)
        return " | ".join(self.errors.read().strip().splitlines()[-3:]) or "it said nothing"

    def close(self) -> None:
        """End the process: kindly, by closing its stdin, then not."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.close()
            self.process.wait(timeout=5)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.errors.close()
