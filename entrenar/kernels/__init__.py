"""Kernels: arrays in, arrays out. Two implementations under the same names and signatures: reference.py, in NumPy, for
any float type, which says what each computes; and native.py, in C, for float32. This file picks one.

    ENTRENAR_KERNELS=reference|native    picks by hand
    ENTRENAR_ISA, ENTRENAR_NUM_THREADS   see native.py, threads.py
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

from entrenar.kernels import reference
from entrenar.kernels.memory import keep_freed_memory as keep_freed_memory

if TYPE_CHECKING:  # what `globals().update` below brings in, for type checkers
    from entrenar.kernels.reference import *  # noqa: F403

KERNELS = tuple(reference.__all__)


@dataclass(frozen=True)
class Info:
    """Which kernels run, and why."""
    backend: str                # "native" or "reference"
    isa: str                    # instruction set in use, "numpy" for the reference
    isas: tuple[str, ...]       # those that would run here
    threads: int
    openmp: bool
    why: str
    bfloat16: bool = False      # whether products of bfloat16 (Packed.compute) are faster than float32's


HOW = ("To get them, install gcc or clang and reinstall "
       "(pip install --force-reinstall --no-cache-dir --no-deps entrenar)")


def pick() -> tuple[ModuleType, str]:
    asked = os.environ.get("ENTRENAR_KERNELS", "").strip()
    if asked not in ("", "reference", "native"):
        raise ValueError(f"ENTRENAR_KERNELS is {asked!r}: wanted reference or native")
    if asked == "reference":
        return reference, "ENTRENAR_KERNELS=reference"
    try:
        from entrenar.kernels import native
        return native, "ENTRENAR_KERNELS=native" if asked else "the C kernels are built"
    except ImportError as error:
        if asked == "native":
            raise ImportError(f"ENTRENAR_KERNELS=native, but its C kernels were not built ({error}). {HOW}") from None
        warnings.warn(
            f"entrenar runs on its NumPy reference, many times slower: its C kernels were not built. {HOW}; "
            "to keep the reference silently, set ENTRENAR_KERNELS=reference", RuntimeWarning, stacklevel=3)
        return reference, f"no C kernels: {error}"


backend, why = pick()
globals().update({name: getattr(backend, name) for name in KERNELS})


def available_isas() -> list[str]:
    """Instruction sets that were compiled in and run on this machine, the best one last."""
    return [] if backend is reference else backend.available_isas()


def use_isa(name: str) -> None:
    """Uses one instruction set from here on, in every thread; for tests and measurements, while no kernel runs."""
    if backend is reference:
        raise ValueError(f"instruction set {name!r} is not available: {why}")
    backend.use_isa(name)


def get_num_threads() -> int:
    return 1 if backend is reference else backend.get_num_threads()


def set_num_threads(n: int) -> None:
    """Sets how many threads a kernel uses; results are the same bits for any number. The reference has NumPy's own,
    a forked child has one whatever is asked for."""
    if n < 1:
        raise ValueError(f"set_num_threads: wanted 1 or more, got {n}")
    if backend is not reference:
        backend.set_num_threads(n)


def give_back_scratch() -> None:
    """Frees the working memory that kernels keep between this thread's calls."""
    if backend is not reference:
        backend.scratch.give_back()


def info() -> Info:
    """What runs here and why."""
    if backend is reference:
        return Info("reference", "numpy", (), get_num_threads(), False, why)
    return Info("native", backend.isa(), tuple(available_isas()), get_num_threads(), backend.OPENMP, why,
                backend.multiplies_bfloat16())
