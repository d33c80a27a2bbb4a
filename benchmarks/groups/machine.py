"""The machine: what it is, and how fast it can multiply and copy at the moment."""

from __future__ import annotations

import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import unquiet

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


def bandwidth(threads: int, megabytes: int = 256) -> float:
    """Bytes per second, read and written, of a copy too large for any cache; the best of a few."""
    source = np.ones(megabytes << 18, np.float32)
    parts = list(
        zip(np.array_split(source, threads), np.array_split(np.empty_like(source), threads), strict=True)
    )
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            started = time.perf_counter()
            list(pool.map(lambda part: np.copyto(part[1], part[0]), parts))  # NumPy copies without the lock
            best = max(best, 2 * source.nbytes / (time.perf_counter() - started))
    return best


def reading(megabytes: int = 512) -> float:
    """Bytes per second that all threads read, of an array too large for any cache: by kernels.sum_of_squares, which
    goes through it once; the best of a few."""
    from entrenar import kernels

    source = np.ones(megabytes << 18, np.float32)
    best = 0.0
    for _ in range(7):
        started = time.perf_counter()
        kernels.sum_of_squares(source)
        best = max(best, source.nbytes / (time.perf_counter() - started))
    return best


def numpy_version() -> str:
    return np.__version__


def torch_version() -> dict[str, str]:
    import torch
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__}


# -- the driver's side


def facts(bench) -> dict[str, Any]:
    """Everything a number needs beside it to mean something."""
    versions = {"numpy": bench.worker("numpy").call("machine", "numpy_version")}
    if bench.torch_missing is None:
        versions |= bench.worker("torch").call("machine", "torch_version")
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        "peers": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "busy": busy(),
        "bandwidth": bench.worker("numpy").call("machine", "bandwidth", threads=bench.threads),
        **bench.worker("entrenar").call("machine", "kernel_facts"),
    }


def look_again(bench) -> None:
    """The peaks once more: a neighbour on the same processor may have taken some of them the last time."""
    now = {
        "busy": busy(),
        "fma_peak": bench.worker("entrenar").call("machine", "kernel_facts")["fma_peak"],
        "bandwidth": bench.worker("numpy").call("machine", "bandwidth", threads=bench.threads),
    }
    bench.machine |= {name: max(value, bench.machine[name]) for name, value in now.items()}


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
        f"FMA peak {facts['fma_peak'] / 1e9:.0f} GFLOP/s, bandwidth {facts['bandwidth'] / 1e9:.1f} GB/s; "
        f"Python {facts['python']}, {facts['peers']}{unquiet(facts)}"
    )
