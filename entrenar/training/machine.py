"""What this machine is, and how much of it this process uses. Linux has all of it, macOS most."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import re
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

    def __str__(self) -> str:
        return f"{self.cpu}, {self.threads} threads, {self.kernels}, measured peak {self.peak_flops / 1e9:.0f} GFLOP/s"


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
    """Bytes of memory this process may hold: the machine's, or less where a control group or an rlimit says so."""
    limits = [physical_memory(), *(group.limit for group in memory_groups())]
    for resource_, counted in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        limit = resource.getrlimit(resource_)[0]
        if limit != resource.RLIM_INFINITY:  # counts what is reserved: what was never touched is lost to us
            limits.append(max(0, limit - max(0, _status(counted) - memory_used())))
    return min(limits)


def memory_available() -> int:
    """Bytes this process could hold now, beside what others hold: at most `memory_limit()`.

    What it holds already is part of it, and so is the page cache, which the kernel gives up when asked.
    """
    own = memory_used()
    free = [memory_limit()]
    if found := re.search(r"^MemAvailable:\s+(\d+) kB", _read("/proc/meminfo"), re.MULTILINE):
        free.append(int(found[1]) * 1024 + own)
    free += [group.limit - group.used + own for group in memory_groups()]
    return max(0, min(free))


def physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@dataclass(frozen=True)
class MemoryGroup:
    """A control group with a limit: bytes it may hold, and holds now (page cache that can go does not count)."""

    folder: Path
    limit: int
    used: int


def memory_groups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[MemoryGroup]:
    """The control groups (v2 and v1) that limit this process: its own and all above it, for each binds its children.

    Inside a container the folders may be mounted as the root, while /proc/self/cgroup tells the host's names for
    them: whatever is there counts.
    """
    folders = [root, root / "memory"]
    for line in _read(str(own)).splitlines():  # "0::/a/b" (v2) or "4:memory:/a/b" (v1)
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for base in [root / "memory"] if controllers else [root, root / "unified"]:
            folders += [base.joinpath(*parts[:i]) for i in range(1, len(parts) + 1)]
    return [group for folder in folders if (group := _memory_group(folder)) is not None]


GROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)  # of cgroup v2, of v1; the third is a line of memory.stat


def _memory_group(folder: Path) -> MemoryGroup | None:
    """None where the folder is no group, or says "max", or as much as the machine has (v1's word for it)."""
    for limit_file, used_file, cache in GROUP_FILES:
        limit, used = _read(str(folder / limit_file)).strip(), _read(str(folder / used_file)).strip()
        if limit.isdecimal() and int(limit) < physical_memory():
            stat = re.search(rf"^{cache} (\d+)$", _read(str(folder / "memory.stat")), re.MULTILINE)
            going = int(stat[1]) if stat else 0
            return MemoryGroup(folder, int(limit), max(0, int(used) - going) if used.isdecimal() else 0)
    return None


def memory_used() -> int:
    """Bytes of memory this process holds now (its resident set); its peak where that is not told."""
    fields = _read("/proc/self/statm").split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") if len(fields) > 1 else memory_peak()


def memory_peak() -> int:
    """The most bytes of memory this process has held."""
    if peak := _status("VmHWM"):
        return peak  # Linux's ru_maxrss begins at what the program had that started this one, perhaps far more
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def give_back_memory() -> None:
    """Hand what was freed and the C library keeps back to the system: then `memory_used` is what is really used."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)


def _status(name: str) -> int:
    """Bytes, by a name of /proc/self/status; 0 where it is not told."""
    found = re.search(rf"^{name}:\s+(\d+) kB", _read("/proc/self/status"), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
