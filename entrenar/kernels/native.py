"""The kernels in C, float32: one wrapper per kernel of csrc/kernels.h, with the names, signatures and errors of
reference.py. Any other float type goes to the reference.

A wrapper checks (checks.py), brings its inputs into the layout the kernel trusts (`floats`), makes the outputs
(`empty`), and passes pointers (`at`). Importing this module raises ImportError where no C kernels were built.
"""

from __future__ import annotations

import math
import os
import threading
import time

import numpy as np

from entrenar._kernels import ffi, lib
from entrenar.kernels import checks, reference
from entrenar.kernels.threads import default_num_threads

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
    if a.flags.aligned and a.dtype is F32 and a.strides[-1] == 4 and min(a.strides) >= 4:
        return a
    return floats(a)


def empty(*shape: int) -> Array:
    return np.empty(shape, F32)


def at(a: Array):
    """Pointer to the first element of a contiguous float32 array; it keeps the array alive. 0.2 us, where
    a.ctypes.data takes 1.2."""
    return from_buffer(FLOATS, a)


def at_strided(a: Array):
    """Pointer to the first element of any float32 array; the caller keeps the array alive."""
    if a.flags.c_contiguous:
        return from_buffer(FLOATS, a)
    if a.flags.f_contiguous:
        return from_buffer(FLOATS, a.T)
    return ffi.cast(FLOATS, a.ctypes.data)


def at_ints(a: Array):
    """Pointer to a contiguous int64 array."""
    return from_buffer(INTS, a)


class Scratch(threading.local):
    """Working memory lent to kernels, 64-byte aligned, one for each Python thread. It is kept between calls, because
    fresh pages cost more than most kernels, and grows when a kernel asks for more."""
    size = 0
    pointer = ffi.NULL

    def __call__(self, size: int):
        if size > self.size:
            self.size = 0
            self.memory = np.empty(size + 16, F32)
            offset = -self.memory.ctypes.data % 64 // 4
            self.pointer, self.size = from_buffer(FLOATS, self.memory[offset:]), size
        return self.pointer


scratch = Scratch()


# ---- instruction sets and threads -----------------------------------------------------------------------------------
COMPILED = [ffi.string(lib.ent_isa_name(i)).decode() for i in range(lib.ent_isa_count())]
OPENMP = bool(lib.ent_has_openmp())


def available_isas() -> list[str]:
    """The instruction sets that were compiled in and run on this machine, the best one last."""
    return [name for i, name in enumerate(COMPILED) if lib.ent_isa_runs(i)]


def use_isa(name: str) -> None:
    """Uses one instruction set from here on, in every thread; for tests and measurements."""
    if name not in available_isas():
        raise ValueError(f"instruction set {name!r} is not available; this build on this machine has: "
                         f"{', '.join(available_isas())}")
    lib.ent_use_isa(COMPILED.index(name))


def isa() -> str:
    return COMPILED[lib.ent_isa()]


def set_num_threads(n: int) -> None:
    if n < 1:
        raise ValueError(f"set_num_threads: wanted 1 or more, got {n}")
    lib.ent_num_threads = int(n) if OPENMP else 1


def get_num_threads() -> int:
    return lib.ent_num_threads


def one_thread() -> None:
    lib.ent_num_threads = 1


def start() -> None:
    """Runs once, at import."""
    try:
        use_isa(os.environ.get("ENTRENAR_ISA") or available_isas()[-1])
    except ValueError as error:
        raise ValueError(f"ENTRENAR_ISA: {error}") from None
    set_num_threads(default_num_threads())
    # libgomp's threads do not survive a fork, and a child that asks for them waits for ever.
    os.register_at_fork(after_in_child=one_thread)


start()


# ---- matmul ---------------------------------------------------------------------------------------------------------
def matrices(a: Array) -> tuple[Array, int, int]:
    """`a` and the element strides (row, column) of its last two axes, one of which is 1: transposed, sliced, reversed
    or repeated rows stay where they are, anything else is copied. An axis of length 1 may have any stride."""
    (rows, columns), (row, column) = a.shape[-2:], a.strides[-2:]
    if a.dtype is F32 and a.flags.aligned:
        if (column == 4 or columns == 1) and row % 4 == 0:
            return a, row // 4, 1
        if (row == 4 or rows == 1) and column % 4 == 0:
            return a, 1, column // 4
    return floats(a), columns, 1


def group_stride(a: Array, batch: tuple[int, ...]) -> tuple[Array, int]:
    """`a` and the one element stride that walks over its matrices broadcast to `batch`; copied where none does."""
    if math.prod(a.shape[:-2]) == 1:
        return a, 0
    a = np.broadcast_to(a, batch + a.shape[-2:])
    axes = [(size, stride) for size, stride in zip(batch, a.strides, strict=False) if size != 1]
    stride = span = axes[-1][1]
    for size, step in reversed(axes):
        if step != span or step % 4:
            a = floats(a)
            return a, a.shape[-2] * a.shape[-1]
        span = step * size
    return a, stride // 4


def matmul(a: Array, b: Array) -> Array:
    checks.matmul(a, b)
    if not float32(a, b):
        return reference.matmul(a, b)
    batch, count, (m, k), n = (), 1, a.shape[-2:], b.shape[-1]
    if a.ndim > 2 or b.ndim > 2:
        batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        count = math.prod(batch)
    c = empty(*batch, m, n)
    if not c.size:
        return c

    (a, a_row, a_col), (b, b_row, b_col) = matrices(a), matrices(b)
    a_group = b_group = 0
    if count > 1:
        if b.ndim == 2 and a.flags.c_contiguous:                  # x (B, T, C) @ w: one tall matrix
            a, m, count, a_row, a_col = a.reshape(-1, k), count * m, 1, k, 1
        else:
            a, a_group = group_stride(a, batch)
            b, b_group = group_stride(b, batch)
            (_, a_row, a_col), (_, b_row, b_col) = matrices(a), matrices(b)
    work = scratch(lib.ent_matmul_scratch(lib.ent_num_threads))
    lib.ent_matmul(at(c), at_strided(a), at_strided(b), work, count, m, n, k,
                   a_group, a_row, a_col, b_group, b_row, b_col)
    return c


# ---- rows: softmax, norms, rope, swiglu, loss, embedding, optimizer -------------------------------------------------


# ---- attention, linear_cross_entropy --------------------------------------------------------------------------------


# ---- the machine ----------------------------------------------------------------------------------------------------
def fma_peak(seconds: float = 0.1) -> float:
    """FLOP/s of fused multiply-adds on registers, all threads together: what 100 % of peak means here."""
    threads, best, rounds = get_num_threads(), 0.0, 100_000
    sink = at(empty(threads))
    end = time.perf_counter() + seconds
    while True:
        started = time.perf_counter()
        flops = lib.ent_fma_peak(sink, rounds) * threads
        now = time.perf_counter()
        best = max(best, flops / (now - started))
        if now >= end:
            return best
