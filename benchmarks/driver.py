"""Who is measured when: contenders take turns, each in its own process, and a wrong result stops the race.

Two thread pools that spin in one process slow each other tenfold, so each contender has its own, which sleeps
while another is timed. A round times every contender once, one after the other (A B A B ...); ratios
are taken within a round, and the median of the rounds counts.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.arrays import agree
from benchmarks.protocol import Worker, WorkerError
from benchmarks.spread import Spread, ratios

ROOT = Path(__file__).resolve().parent.parent
SETTLE = 0.06  # seconds for a thread pool to stop spinning: OpenBLAS's spins 25 ms, libgomp's less
TOLERANCE = 1e-4  # of an array's length, in float32

# Thread pools of libraries: whatever the caller's shell says of spinning and pinning is not passed on.
UNSET = (
    "OMP_WAIT_POLICY",
    "OMP_PROC_BIND",
    "OMP_PLACES",
    "GOMP_SPINCOUNT",
    "GOMP_CPU_AFFINITY",
    "KMP_AFFINITY",
    "KMP_BLOCKTIME",
    "ENTRENAR_KERNELS",
    "PYTHONPATH",
    "PYTHONSTARTUP",
)


# What holds entrenar, PyTorch (with oneDNN and MKL in it) and NumPy's OpenBLAS to an instruction set.
ISAS: dict[str, dict[str, str]] = {
    "": {},
    "avx2": {
        "ENTRENAR_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
    },
}


Agreement = Callable[
    [list[float], list[float]], bool
]  # whether two contenders' checks are of the same results


def is_peer(contender: str) -> bool:
    """Whether this one runs in the peers' environment: "torch", or one of several, "torch-bfloat16", "llama-f16"."""
    return contender.partition("-")[0] in ("torch", "llama")


class WrongResult(RuntimeError):
    """Two contenders do not compute the same; their times mean nothing."""


def agreeing(a: list[float], b: list[float]) -> bool:
    """Equal, but for rounding. A contender with nothing to check, a copy, has an empty list."""
    return not b or agree(a, b, tolerance=TOLERANCE)


@dataclass
class Times:
    """Seconds per run of each contender: one median per round."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def of(self, contender: str) -> Spread:
        return Spread.of(self.seconds[contender])

    def speedup(self, over: str, of: str = "entrenar") -> Spread:
        """How many times as fast `of` ran as `over`."""
        return ratios(self.seconds[of], self.seconds[over])

    def best_peer(self, of: str = "entrenar") -> str | None:
        peers = [name for name in self.seconds if name != of]
        return min(peers, key=lambda name: self.of(name).median, default=None)


@dataclass
class Bench:
    """What a group of benchmarks is given: interpreters, processes, and the rules of the race."""

    peers_python: str = ".venv-peers/bin/python"
    rounds: int = 5
    threads: int = 2
    full: bool = False
    isa: str = ""  # every contender is held to this instruction set; empty: to none
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)
    root: Path = ROOT
    machine: dict[str, Any] = field(
        default_factory=dict
    )  # filled in by groups/machine.py, before the groups run
    workers: dict[str, Worker] = field(default_factory=dict)

    def python(self, contender: str) -> str:
        return self.peers_python if is_peer(contender) else sys.executable

    def environment(self) -> dict[str, str]:
        env = {name: value for name, value in os.environ.items() if name not in UNSET}
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "ENTRENAR_NUM_THREADS")
        return env | dict.fromkeys(names, str(self.threads)) | {"HF_HUB_OFFLINE": "1"} | ISAS[self.isa]

    def start(self, contender: str) -> Worker:
        """A new process of this contender, the caller's to close."""
        command = [self.python(contender), "-P", str(self.root / "benchmarks" / "worker.py"), contender]
        return Worker(command, env=self.environment(), cwd=self.root)

    def worker(self, contender: str) -> Worker:
        """This contender's process, started when first asked for, or when the last one died, and kept."""
        if contender not in self.workers or not self.workers[contender].alive():
            self.workers[contender] = self.start(contender)
        return self.workers[contender]

    def share_of_peak(self, flops_per_second: float) -> str:
        return f"{flops_per_second / self.machine['fma_peak']:.0%} of FMA peak"

    def share_of_bandwidth(self, bytes_per_second: float) -> str:
        return f"{bytes_per_second / self.machine['bandwidth']:.0%} of bandwidth"

    def share_of_reading(self, bytes_per_second: float) -> str:
        return f"{bytes_per_second / self.machine['reading']:.0%} of the bandwidth of reading"

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()
        self.workers.clear()

    @cached_property
    def torch_missing(self) -> str | None:
        """Why PyTorch takes no part; None if it does."""
        if not Path(self.peers_python).exists():
            return f"peer not installed ({self.peers_python} is not there)"
        try:
            self.worker("torch").call("machine", "torch_version")
        except WorkerError as error:
            self.workers.pop("torch").close()
            return f"peer not installed ({error})"
        return None

    @cached_property
    def llama_missing(self) -> str | None:
        """Why llama.cpp takes no part; None if it does."""
        if self.torch_missing:
            return self.torch_missing
        try:
            self.worker("torch").call("llama_cpp", "version")
        except WorkerError as error:
            return f"peer not installed ({error})"
        return None

    def missing(self, contender: str) -> str | None:
        """Why this one takes no part; None if it does."""
        kind = contender.partition("-")[0]
        return self.torch_missing if kind == "torch" else self.llama_missing if kind == "llama" else None

    def present(self, contenders: Sequence[str]) -> list[str]:
        """Those of the contenders that can take part."""
        return [name for name in contenders if self.missing(name) is None]

    def race(self, group: str, contenders: Sequence[str], **how_and_args: Any) -> Times:
        """`races` of a case that is one thing to time."""
        (times,) = self.races(group, contenders, **how_and_args)
        return times

    def races(
        self,
        group: str,
        contenders: Sequence[str],
        *,
        seconds: float = 0.05,
        rounds: int | None = None,
        agree: Agreement | Mapping[str, Agreement] = agreeing,
        workers: Mapping[str, Worker] | None = None,
        **args: Any,
    ) -> list[Times]:
        """Time a case of a group on each contender, in turns, run by run. Raises WrongResult, before timing anything.

        agree   how a contender's check is compared with the first one's; by name where contenders differ in it
        """
        workers = workers or {name: self.worker(name) for name in contenders}
        self.prepare(group, {name: workers[name] for name in contenders}, agree, **args)
        return self.turns({name: workers[name] for name in contenders}, seconds, rounds)

    def race_apart(
        self, group: str, contenders: Sequence[str], **args: Any
    ) -> tuple[Times, dict[str, int]]:
        """A race of new processes that do nothing else: their peak memory is that of this case alone."""
        with self.apart(contenders) as workers:
            times = self.race(group, contenders, workers=workers, **args)
            return times, {name: worker.peak() for name, worker in workers.items()}

    @contextmanager
    def apart(self, contenders: Sequence[str]) -> Iterator[dict[str, Worker]]:
        """New processes of these contenders, which end with the block."""
        workers: dict[str, Worker] = {}
        try:
            for name in contenders:
                workers[name] = self.start(name)
            yield workers
        finally:
            for worker in workers.values():
                worker.close()

    def prepare(
        self, group: str, workers: Mapping[str, Worker], agree: Agreement | Mapping[str, Agreement], **args: Any
    ) -> None:
        """Build a case in each of these processes. Raises WrongResult unless they agree with the first."""
        checks = {name: worker.prepare(group, **args) for name, worker in workers.items()}
        refuse_wrong(f"{group} {args}", checks, agree)

    def take_turns(self, workers: Mapping[str, Worker], seconds: float, rounds: int | None = None) -> Times:
        """`turns` of cases that are one thing to time."""
        (times,) = self.turns(workers, seconds, rounds)
        return times

    def turns(self, workers: Mapping[str, Worker], seconds: float, rounds: int | None = None) -> list[Times]:
        """Time what was prepared in these processes, A B A B ..., run by run."""
        rounds_of: dict[str, list[list[float]]] = {name: [] for name in workers}
        for _ in range(rounds or self.rounds):
            for name, worker in workers.items():
                time.sleep(SETTLE)
                rounds_of[name].append([Spread.of(run).median for run in worker.time(seconds)])
        runs_of = {name: list(map(list, zip(*rounds, strict=True))) for name, rounds in rounds_of.items()}
        return [Times(dict(zip(runs_of, runs, strict=True))) for runs in zip(*runs_of.values(), strict=True)]


def refuse_wrong(
    what: str, checks: dict[str, list[float]], agree: Agreement | Mapping[str, Agreement]
) -> None:
    """Raise WrongResult unless every contender agrees with the first."""
    first, *others = checks
    for other in others:
        agrees = agree if callable(agree) else agree.get(other, agreeing)
        if not agrees(checks[first], checks[other]):
            raise WrongResult(f"{what}: {first} computed {checks[first]}, {other} {checks[other]}")
