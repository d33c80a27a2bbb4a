"""`entrenar doctor`: what runs here and why, how fast it is, and what is wrong with it, with the way out.

Everything is asked of the process itself or measured in it. Ends with "all good" (exit code 0) or the list of
problems (1).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from entrenar import kernels
from entrenar.cli.measure import fma_peak, memory_bandwidth, product_error, tolerance
from entrenar.cli.terminal import facts, paint
from entrenar.kernels.threads import cpu_quota, processors
from entrenar.version import __version__

NAME = "doctor"
HELP = "say what runs here, how fast, and what is wrong with it"
EXAMPLE = """
entrenar doctor
"""
NEEDED: tuple[str, ...] = ("tokenizers", "jinja2", "ml_dtypes", "rich", "PIL", "shtab")
NEEDED += () if sys.version_info >= (3, 14) else ("backports.zstd",)
EXTRAS = {"parquet": "pyarrow"}  # extra of the package -> what it brings
ROOM = 1 << 30  # bytes of disk and of memory below which even the default run is tight
COPIED = 128 << 20  # bytes copied to measure the memory: more than most caches hold
SECONDS = 0.2  # of each measurement
GB, GFLOP = 1e9, 1e9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument_group("exit codes", "0 all good; 1 there are problems")


@dataclass
class Section:
    """Facts under one title, as (name, value for JSON, words for people), and what is wrong, with the way out."""

    title: str
    facts: list[tuple[str, Any, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def fact(self, name: str, value: Any, words: str = "") -> None:
        self.facts.append((name, value, words or str(value)))


def run(args: argparse.Namespace) -> int:
    sections = []
    for examine in EXAMINATIONS:
        sections.append(section := examine())
        if not args.json:
            rows = facts([(f"  {name}", words) for name, _, words in section.facts], 26)
            print("\n".join([paint(section.title, "bold"), *rows]), flush=True)
    problems = [problem for section in sections for problem in section.problems]
    if args.json:
        told = {s.title: {name: value for name, value, _ in s.facts} for s in sections}
        print(json.dumps({**told, "problems": problems}))
    elif problems:
        print("\n" + "\n".join(paint(f"problem: {problem}", "red") for problem in problems))
    else:
        print("\n" + paint("all good", "green"))
    return 1 if problems else 0


# -- what is installed


def installed() -> Section:
    section = Section("installed")
    section.fact("entrenar", __version__, f"{__version__} in {Path(kernels.__file__).parent.parent}")
    section.fact("python", platform.python_version(), f"{platform.python_version()}, {sys.executable}")
    section.fact("system", platform.platform())
    section.fact("numpy", np.__version__, f"{np.__version__} with {blas()}")
    missing = [name for name in NEEDED if not there(name)]
    section.fact("libraries", [name for name in NEEDED if name not in missing],
                 ", ".join(f"{name} {version(name)}" for name in NEEDED if name not in missing) or "none")  # fmt: skip
    for extra, module in EXTRAS.items():
        section.fact(extra, there(module), f"{module} {version(module)}" if there(module)
                     else f"not installed: pip install 'entrenar[{extra}]' reads such files")  # fmt: skip
    if missing:
        section.problems.append(f"{', '.join(missing)}: not installed; pip install --force-reinstall entrenar does it")
    return section


def there(module: str) -> bool:
    """Whether a module could be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package it would be in
        return False


def blas() -> str:
    """NumPy's library of matrix products, by its own account."""
    try:
        found = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
        return f"{found['name']} {found['version']}"
    except (KeyError, TypeError):
        return "an unknown BLAS"


def version(module: str) -> str:
    from importlib import metadata

    try:
        return metadata.version({"PIL": "pillow"}.get(module, module))
    except metadata.PackageNotFoundError:
        return ""


# -- kernels and threads


def kernels_in_use() -> Section:
    section, info = Section("kernels"), kernels.info()
    section.fact("backend", info.backend, f"{info.backend}: {info.why}")
    section.fact("instruction set", info.isa, f"{info.isa}{isa_reason(info)}")
    section.fact("others that run", [isa for isa in info.isas if isa != info.isa],
                 ", ".join(isa for isa in info.isas if isa != info.isa) or "none")  # fmt: skip
    section.fact("bfloat16 products", info.bfloat16, "twice as fast as float32's (--compute bfloat16)"
                 if info.bfloat16 else "no faster than float32's on this processor")  # fmt: skip
    compiler = c_compiler()
    section.fact("C compiler", compiler or None, compiler or "none found (needed only to build the kernels)")
    if info.backend == "reference" and os.environ.get("ENTRENAR_KERNELS", "").strip() != "reference":
        section.problems.append(f"the C kernels were not built, training is many times slower without. {kernels.HOW}")
    return section


def isa_reason(info: kernels.Info) -> str:
    asked = os.environ.get("ENTRENAR_ISA")
    if info.backend == "reference":
        return ""
    return f", because of ENTRENAR_ISA; {info.isas[-1]} is the best here" if asked else ", the best this machine runs"


def c_compiler() -> str:
    """The first line of what the compiler says of itself, "" where there is none."""
    words = os.environ.get("CC", "").split()
    for name in (*words[:1], "cc", "gcc", "clang"):
        if found := shutil.which(name):
            try:
                asked = [found, "--version"]
                done = subprocess.run(asked, capture_output=True, text=True, timeout=10, errors="replace")
            except (OSError, subprocess.SubprocessError):
                continue
            return f"{found}: {(done.stdout.splitlines() or ['unknown version'])[0]}"
    return ""


def threads() -> Section:
    section, info = Section("threads"), kernels.info()
    section.fact("threads", info.threads, f"{info.threads}: {thread_reason(info)}")
    quota = cpu_quota()
    section.fact("processors", processors(), f"{processors()} for this process, of {os.cpu_count()}")
    load = os.getloadavg()[0]
    section.fact("busy", load, f"{load:.1f} processors on average in the last minute")
    section.fact("container's quota", quota, f"{quota:g} processors' time" if quota else "none")
    section.fact("OpenMP", info.openmp, "yes" if info.openmp else "no")
    room = min(processors(), math.ceil(quota) if quota else processors())
    if info.backend == "native" and not info.openmp and room > 1:
        section.problems.append(f"the kernels were built without OpenMP: they use 1 of {room} processors. Install it "
                                f"(gcc has it; with clang, libomp-dev) and reinstall. {kernels.HOW}")  # fmt: skip
    if info.threads > room:
        section.problems.append(f"{info.threads} threads on {room} processors wait for each other: unset "
                                "ENTRENAR_NUM_THREADS, or give this container more")  # fmt: skip
    return section


def thread_reason(info: kernels.Info) -> str:
    """Where the number of threads comes from: kernels/threads.py decides it."""
    asked, quota = os.environ.get("ENTRENAR_NUM_THREADS", "").strip(), cpu_quota()
    own, everywhere = processors(), os.cpu_count()
    if info.backend == "reference":
        return "the reference is NumPy, which has threads of its own"
    if not info.openmp:
        return "without OpenMP there is but one"
    if asked:
        return f"ENTRENAR_NUM_THREADS={asked}"
    if quota and math.ceil(quota) < own:
        return f"the container's quota of {quota:g} processors, rounded up"
    return "every processor" if own == everywhere else f"the affinity mask leaves {own} of {everywhere} processors"


# -- memory and disk


def memory() -> Section:
    from entrenar.training import machine
    from entrenar.training.display import size

    section = Section("memory")
    whole, limit, free = machine.physical_memory(), machine.memory_limit(), machine.memory_available()
    section.fact("machine", whole, size(whole))
    less = limit < whole
    section.fact("limit", limit if less else None, f"{size(limit)}, by a control group or ulimit" if less else "none")
    section.fact("free now", free, size(free))
    if free < ROOM:
        section.problems.append(f"only {size(free)} of memory are free: end other programs, or raise the limit")
    return section


def storage() -> Section:
    from entrenar.training.display import size

    section, cache = Section("disk"), cache_folder()
    places = {"here": Path.cwd(), "cache": cache} if cache else {"here": Path.cwd()}
    if cache:
        entries = list(cache.iterdir()) if cache.is_dir() else []
        count = f"{len(entries)} entr{'y' if len(entries) == 1 else 'ies'}"
        used = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()) if entries else 0
        section.fact("cache", str(cache), f"{cache}: {count}, {size(used)}; deleting it is safe")
    for name, path in places.items():
        there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        free = shutil.disk_usage(there).free
        section.fact(f"free, {name}", free, f"{size(free)} in {there}")
        if free < ROOM:
            section.problems.append(f"only {size(free)} are free in {there}: a run may not be able to save itself")
        if not os.access(there, os.W_OK | os.X_OK):
            section.problems.append(f"{there} cannot be written to: choose another place for the "
                                    f"{'cache (XDG_CACHE_HOME)' if name == 'cache' else 'run (--out)'}")  # fmt: skip
    return section


def cache_folder() -> Path | None:
    """Where prepared data is kept unless data.cache says otherwise; None where the user has no home."""
    user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return None if user.startswith("~") else Path(user, "entrenar")


# -- how fast


def speed() -> Section:
    from entrenar.training import machine

    section, several = Section("speed, measured"), kernels.get_num_threads()
    copied = max(1 << 20, min(COPIED, machine.memory_available() // 8))  # two arrays of it, in a small container too
    for threads in sorted({1, several}):
        words = f"{threads} thread{'s' if threads > 1 else ''}"
        peak, moved = fma_peak(threads, SECONDS), memory_bandwidth(threads, SECONDS, copied)
        section.fact(f"multiply-adds, {words}", peak, f"{peak / GFLOP:,.0f} GFLOP/s")
        section.fact(f"memory, {words}", moved, f"{moved / GB:,.1f} GB/s read and written by a copy")
    return section


# -- whether it computes what it should


def self_check() -> Section:
    """A product and its gradients in float32, on every instruction set, against float64 in NumPy."""
    section, before = Section("self-check"), kernels.info()
    for isa in before.isas or ("numpy",):
        if before.isas:
            kernels.use_isa(isa)
        try:
            error, bound = product_error(), tolerance()
        finally:
            if before.isas:
                kernels.use_isa(before.isa)
        section.fact(isa, error, f"a product and its gradients are right to {error:.1e}, allowed are {bound:.1e}")
        if not error <= bound:  # nan is no right answer either
            section.problems.append(f"the {isa} kernels compute wrong numbers (error {error:.1e} of the largest, "
                                    f"allowed are {bound:.1e}): do not train with them. {kernels.HOW}; until then, "
                                    "ENTRENAR_KERNELS=reference is slow but right")  # fmt: skip
    return section


EXAMINATIONS: tuple[Callable[[], Section], ...] = (
    installed, kernels_in_use, threads, memory, storage, speed, self_check,
)  # fmt: skip
