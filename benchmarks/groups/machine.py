"""The machine: what it is, and how fast it can multiply and copy at the moment."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.driver import Times
from benchmarks.protocol import Case
from benchmarks.report import unquiet
from benchmarks.spread import Spread

COPIED = 512 << 20  # bytes, half of them read and half written
READ = 512 << 20  # bytes

# -- asked of a contender's process


def kernel_facts() -> dict[str, Any]:
    """Which kernels run, and the FLOP/s of fused multiply-adds on registers, on all threads."""
    from entrenar import kernels

    info = kernels.info()
    return {
        "backend": info.backend,
        "isa": info.isa,
        "threads": info.threads,
        "fma_peak": kernels.fma_peak(0.3),
    }


def copying(**_: Any) -> Case:
    """A copy too large for any cache, on all threads: a contender that others take turns with, to tell what share of
    the bandwidth was theirs. Neighbours on the same processor change that within minutes.
    """
    threads = int(os.environ["OMP_NUM_THREADS"])
    source = np.ones(COPIED // 8, np.float32)
    parts = list(zip(np.array_split(source, threads), np.array_split(np.empty_like(source), threads), strict=True))
    pool = ThreadPoolExecutor(threads)  # NumPy copies without the lock
    return Case(lambda: list(pool.map(lambda part: np.copyto(part[1], part[0]), parts)))


PRODUCT = 1024, 768, 3072  # rows, depth and columns of a product


def multiplying(**_: Any) -> Case:
    """NumPy's product of the 124m model's up_proj: a contender that others take turns with, for what the processor
    gives at that moment. Neighbours change that, too.
    """
    N, I, O = PRODUCT
    x, w, y = np.ones((N, I), np.float32), np.ones((I, O), np.float32), np.empty((N, O), np.float32)
    return Case(lambda: np.matmul(x, w, out=y))


def bandwidth() -> float:
    """Bytes per second, read and written, of that copy; the best of a few."""
    (copy,) = copying().runs
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        copy()
        best = max(best, COPIED / (time.perf_counter() - started))
    return best


def summing(**_: Any) -> Case:
    """kernels.sum_of_squares, which reads an array too large for any cache once: a contender that others take turns
    with, to tell what share of what can be read was theirs.
    """
    from entrenar import kernels

    source = np.ones(READ // 4, np.float32)
    return Case(lambda: kernels.sum_of_squares(source))


def reading() -> float:
    """Bytes per second of that; the best of a few."""
    (read,) = summing().runs
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        read()
        best = max(best, READ / (time.perf_counter() - started))
    return best


def numpy_version() -> str:
    return np.__version__


def torch_version() -> dict[str, str]:
    import torch
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}


# -- the driver's side


def facts(bench: Any) -> dict[str, Any]:
    """Everything a number needs beside it to mean something."""
    versions = {"numpy": bench.worker("numpy").call("machine", "numpy_version")}
    if bench.torch_missing is None:
        versions |= bench.worker("torch").call("machine", "torch_version")
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "peers": ", ".join(f"{name} {version}" for name, version in versions.items()),
        **moving(bench),
    }


def shares(times: Times, moved: float) -> Spread:
    """Of the bandwidth, in percent, taken by a contender that moves so many bytes and took turns with "copy"."""
    both = zip(times.seconds["entrenar"], times.seconds["copy"], strict=True)
    return Spread.of(100 * (moved / ours) / (COPIED / copy) for ours, copy in both)


def beside_product(times: Times, flops: float) -> Spread:
    """FLOP/s of a contender that does so many FLOPs, over those of "product", with which it took turns."""
    both = zip(times.seconds["entrenar"], times.seconds["product"], strict=True)
    return Spread.of((flops / ours) / (2 * math.prod(PRODUCT) / product) for ours, product in both)


def moving(bench: Any) -> dict[str, Any]:
    """What changes with the threads, and with the neighbours."""
    return {
        "busy": busy(),
        "bandwidth": bench.worker("numpy").call("machine", "bandwidth"),
        "reading": bench.worker("entrenar").call("machine", "reading"),
        **bench.worker("entrenar").call("machine", "kernel_facts"),
    }


def look_again(bench: Any) -> None:
    """The peaks once more: a neighbour on the same processor may have taken some of them the last time."""
    now = moving(bench)
    for name in ("busy", "bandwidth", "reading", "fma_peak"):
        bench.machine[name] = max(now[name], bench.machine[name])


@contextmanager
def on_threads(bench: Any, threads: int) -> Iterator[Any]:
    """The same bench on another number of threads: contenders of their own, and what the machine does on as many."""
    other = dataclasses.replace(bench, threads=threads, workers={})
    try:
        other.machine = bench.machine | moving(other)
        yield other
    finally:
        other.close()


def busy(seconds: float = 0.5) -> float:
    """The share of the processors that others take while nothing is measured; 0 where that is not told."""

    def idle_and_all() -> tuple[int, int]:
        counts = [int(word) for word in stat.read_text().split("\n", 1)[0].split()[1:9]]
        return counts[3] + counts[4], sum(counts)  # idle and iowait; neighbours' "steal" counts as busy

    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    before = idle_and_all()
    time.sleep(seconds)
    after = idle_and_all()
    return 1 - (after[0] - before[0]) / max(1, after[1] - before[1])


def stolen() -> tuple[int, int]:
    """Ticks that other machines on the same host took while this one wanted to run, and all ticks; so far."""
    stat = Path("/proc/stat")
    counts = [int(word) for word in stat.read_text().split("\n", 1)[0].split()[1:9]] if stat.exists() else [0] * 8
    return counts[7], sum(counts)


def share_stolen(before: tuple[int, int], after: tuple[int, int]) -> float:
    return (after[0] - before[0]) / max(1, after[1] - before[1])


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def line(facts: dict[str, Any]) -> str:
    return (
        f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, "
        f"{facts['isa']} ({facts['backend']} kernels); "
        f"FMA peak {facts['fma_peak'] / 1e9:.0f} GFLOP/s, bandwidth {facts['bandwidth'] / 1e9:.1f} GB/s, "
        f"of reading {facts['reading'] / 1e9:.1f}; "
        f"Python {facts['python']}, {facts['peers']}{unquiet(facts)}"
    )
