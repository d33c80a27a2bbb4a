"""What this machine is, and how much of it this process uses. Linux has all of it, macOS most."""

from __future__ import annotations

import os
import platform
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

from entrenar import kernels


@dataclass(frozen=True)
class Machine:
    """`peak_flops`: multiply-adds in registers on every thread, two operations each, per second, measured."""

    cpu: str
    threads: int
    kernels: str
    memory_limit: int
    peak_flops: float


def look(seconds: float = 0.2) -> Machine:
    """Describe the machine, measuring its floating-point peak for `seconds`."""
    info = kernels.info()
    name = f"{info.isa} C" if info.backend == "native" else "NumPy reference"
    peak = max(kernels.fma_peak(seconds / 4) for _ in range(4))  # the best: a neighbour can only slow it
    return Machine(cpu_name(), info.threads, name, memory_limit(), peak)


def cpu_name() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.lower().startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "unknown CPU"


def memory_limit() -> int:
    """Bytes this process may use: the machine's memory, or less where a control group says so."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = _read(file).strip()
        if text.isdigit():
            limits.append(int(text))
    return min(limits)


def memory_used() -> int:
    """Bytes of memory this process holds now (its resident set); its peak where that is not told."""
    fields = _read("/proc/self/statm").split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") if len(fields) > 1 else memory_peak()


def memory_peak() -> int:
    """The most bytes of memory this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
