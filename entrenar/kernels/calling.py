"""What every wrapper of a C kernel needs: arrays as pointers, working memory, instruction sets and threads.

Importing this module raises ImportError where no C kernels were built. The wrappers are in native.py.
"""

from __future__ import annotations

import os
import threading

import numpy as np

from entrenar.kernels.threads import default_num_threads, short_waits

with short_waits():
    from entrenar._kernels import ffi, lib

Array = np.ndarray
F32, I64 = np.dtype(np.float32), np.dtype(np.int64)


# ---- arrays in, pointers out ----------------------------------------------------------------------------------------
FLOATS, INTS = ffi.typeof("float *"), ffi.typeof("int64_t *")
from_buffer = ffi.from_buffer


def float32(*arrays: Array) -> bool:
    """Whether C computes this: every float array is float32, of either byte order."""
    for a in arrays:
        if a.dtype is not F32 and a.dtype.char != "f":
            return False
    return True


def floats(a: Array) -> Array:
    """`a`, or its copy if it is strided, misaligned or byte-swapped: contiguous float32."""
    flags = a.flags
    if flags.c_contiguous and flags.aligned and a.dtype is F32:
        return a
    return np.array(a, F32, order="C")


def strided(a: Array) -> Array:
    """As `floats`, but any strides will do while the last axis is contiguous and the others step forward."""
    flags = a.flags
    if flags.aligned and a.dtype is F32 and (flags.c_contiguous or a.strides[-1] == 4 and min(a.strides) >= 4):
        return a
    return floats(a)


def empty(*shape: int) -> Array:
    return np.empty(shape, F32)


def at(a: Array):
    """Pointer to the first element of a contiguous float32 array; it keeps the array alive. 0.2 us, where
    a.ctypes.data takes 1.2."""
    return from_buffer(FLOATS, a)


FIRST = (slice(1),) * 64  # an array of one element, which is contiguous; NumPy has no more axes


def at_strided(a: Array):
    """Pointer to the first element of any float32 array, which it keeps alive."""
    return from_buffer(FLOATS, a if a.flags.c_contiguous else a[FIRST[: a.ndim]])


def at_ints(a: Array):
    """Pointer to a contiguous int64 array."""
    return from_buffer(INTS, a)


def rows(a: Array) -> tuple[int, int]:
    """(N, C): an array (..., C) seen as rows."""
    C = a.shape[-1]
    return (a.size // C if C else 0), C


def ints(a: Array) -> Array:
    """Indices that checks.py has passed, contiguous and aligned."""
    return np.require(a, I64, ["C", "A"])


class Scratch(threading.local):
    """Working memory lent to kernels, 64-byte aligned, one for each Python thread. It is kept between calls, because
    fresh pages cost more than most kernels, and grows when a kernel asks for more."""
    size = 0
    memory: Array | None = None
    pointer = ffi.NULL

    def __call__(self, size: int):
        if size > self.size:
            self.size = 0
            self.memory = np.empty(size + 16, F32)
            offset = -self.memory.ctypes.data % 64 // 4
            self.pointer, self.size = from_buffer(FLOATS, self.memory[offset:]), size
        return self.pointer

    def give_back(self) -> None:
        """Frees what this thread's kernels were lent; the next that asks gets new memory."""
        self.memory, self.pointer, self.size = None, ffi.NULL, 0


scratch = Scratch()


# ---- instruction sets and threads -----------------------------------------------------------------------------------
COMPILED = [ffi.string(lib.ent_isa_name(i)).decode() for i in range(lib.ent_isa_count())]
OPENMP = bool(lib.ent_has_openmp())


def available_isas() -> list[str]:
    """The instruction sets that were compiled in and run on this machine, the best one last."""
    return [name for i, name in enumerate(COMPILED) if lib.ent_isa_runs(i)]


def use_isa(name: str) -> None:
    """Uses one instruction set from here on, in every thread; for tests and measurements. Not while another thread
    runs kernels: scratch memory made for one instruction set may be too small for the next."""
    if name not in available_isas():
        raise ValueError(f"instruction set {name!r} is not available; this build on this machine has: "
                         f"{', '.join(available_isas())}")
    lib.ent_use_isa(COMPILED.index(name))


def isa() -> str:
    return COMPILED[lib.ent_isa()]


def multiplies_bfloat16() -> bool:
    """Whether the instruction set in use multiplies bfloat16 faster than floats, on this processor."""
    return bool(lib.ent_multiplies_bfloat16())


def set_num_threads(n: int) -> None:
    if n < 1:
        raise ValueError(f"set_num_threads: wanted 1 or more, got {n}")
    lib.ent_num_threads = int(n) if OPENMP and not forked else 1


def get_num_threads() -> int:
    return lib.ent_num_threads


def stay_on_one_thread() -> None:
    """In a forked child: libgomp's threads did not survive the fork, and whoever asks for them waits for ever."""
    global forked
    forked = True
    lib.ent_num_threads = 1


forked = False


def start() -> None:
    """Runs once, at import."""
    try:
        use_isa(os.environ.get("ENTRENAR_ISA") or available_isas()[-1])
    except ValueError as error:
        raise ValueError(f"ENTRENAR_ISA: {error}") from None
    set_num_threads(default_num_threads())
    os.register_at_fork(after_in_child=stay_on_one_thread)


start()
