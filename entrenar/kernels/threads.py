"""How many threads the kernels may use: what the user asked for, else what this process may really run on.

Leaves out the threads themselves: csrc/parallel.h.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def default_num_threads() -> int:
    """ENTRENAR_NUM_THREADS, else the processors of this process's affinity mask, capped by its container's CPU
    quota (cgroup v2 or v1) rounded up: more threads than that only wait for each other."""
    asked = os.environ.get("ENTRENAR_NUM_THREADS", "").strip()
    if asked:
        if not asked.isdecimal() or int(asked) < 1:
            raise ValueError(f"ENTRENAR_NUM_THREADS is {asked!r}: wanted a whole number, 1 or more")
        return int(asked)
    quota = cpu_quota()
    return max(1, min(processors(), math.ceil(quota) if quota else processors()))


def processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_quota(cgroup: Path = CGROUP, own: Path = Path("/proc/self/cgroup")) -> float | None:
    """Processors' worth of time this process's control groups allow, None where unlimited.

    Every group on the way up counts: a limit on a parent binds its children."""
    quotas = [quota for folder in cgroup_folders(cgroup, own) if (quota := read_quota(folder)) is not None]
    return min(quotas, default=None)


def cgroup_folders(cgroup: Path, own: Path) -> list[Path]:
    """Folders that may hold a limit: the mount points, and this process's groups and their parents below them."""
    folders = [cgroup, cgroup / "cpu", cgroup / "cpu,cpuacct"]
    for line in read(own).splitlines():                # "0::/a/b" (v2) or "4:cpu,cpuacct:/a/b" (v1)
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = cgroup / "cpu" if controllers else cgroup
        parts = [part for part in path.split("/") if part not in ("", "..")]
        folders += [root.joinpath(*parts[:i]) for i in range(1, len(parts) + 1)]
    return folders


def read_quota(folder: Path) -> float | None:
    limit, _, period = read(folder / "cpu.max").strip().partition(" ")      # v2: "max 100000" or "150000 100000"
    if not limit:
        limit, period = read(folder / "cpu.cfs_quota_us").strip(), read(folder / "cpu.cfs_period_us").strip()
    try:
        return int(limit) / int(period) if int(limit) > 0 else None         # v1 says -1 for unlimited
    except (ValueError, ZeroDivisionError):
        return None


def read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


SHORT_WAIT = {"GOMP_SPINCOUNT": "3000", "KMP_BLOCKTIME": "0"}  # gcc's OpenMP: turns of a loop; clang's: milliseconds


@contextlib.contextmanager
def short_waits() -> Iterator[None]:
    """Around the first import of the kernels: their threads sleep soon when they wait for each other.

    OpenMP's own default is to spin for milliseconds, which on a busy machine takes the processor from the very thread
    that is waited for. A step of 2,048 tokens of a 1m model, on two cores: 89 ms with these settings and 94 with
    libgomp's own on an idle machine, 199 and 263 beside one busy process, 210 and 350 beside two. Writing text would
    gain 3 to 10 % from 30,000 turns and more where the machine is idle; beside one busy process a token of a 124m
    model then takes 77 ms, with ours 29. OpenMP reads these variables once, when it is loaded; what the user has set
    stays, and children inherit nothing.
    """
    ours = {name: value for name, value in SHORT_WAIT.items() if name not in os.environ}
    if "OMP_WAIT_POLICY" in os.environ:
        ours = {}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)
