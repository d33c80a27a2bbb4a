"""Arrays that end, or start, at a page no one may touch: a kernel that reads one element too far dies at
once.

Run as a program, `python guard.py ISA` calls every kernel of kernel_cases.py on such arrays, naming each case
on a line of its own before it runs: the last line of a crashed run is the culprit. `python guard.py overrun`
and `underrun` are the controls: they read one element outside, and must die. AddressSanitizer (`make
sanitize`) is the wider net, but does not see an overrun inside a larger array.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from dataclasses import fields
from typing import Any

import kernel_cases
import numpy as np

from entrenar.kernels.packed import Nested, Packed

PAGE = mmap.PAGESIZE
PROT_NONE = 0
LENGTHS = (1, 2, 3, 5, 7, 9, 13, 15, 17, 31, 33)  # rows that end anywhere in a vector


def guarded(x: np.ndarray, side: str) -> np.ndarray:
    """A copy of `x` whose last element touches a forbidden page (side "end"), or whose first does."""
    pages = -(-max(x.nbytes, 1) // PAGE)
    memory = mmap.mmap(-1, (pages + 1) * PAGE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    forbidden = base + pages * PAGE if side == "end" else base
    offset = pages * PAGE - x.nbytes if side == "end" else PAGE
    if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(forbidden), PAGE, PROT_NONE):
        raise OSError(ctypes.get_errno(), "mprotect")
    copy = np.frombuffer(memory, x.dtype, x.size, offset).reshape(x.shape)  # keeps `memory` alive
    copy[...] = x
    return copy


def guarded_args(args: dict, side: str) -> dict:
    return {name: guarded_value(x, side) for name, x in args.items()}


def guarded_value(x: Any, side: str) -> Any:
    """An array, or the arrays of a packed matrix, at a forbidden page; anything else as it is."""
    if isinstance(x, np.ndarray):
        return guarded(x, side)
    if not isinstance(x, (Packed, Nested)):
        return x
    parts = {field.name: getattr(x, field.name) for field in fields(x)}
    return type(x)(**{name: guarded_value(part, side) for name, part in parts.items()})


def run_in_place(kernels, case, args) -> None:
    """As kernel_cases.run, but an in-place kernel works on the guarded arrays themselves."""
    arrays, constants = kernel_cases.split(args)
    getattr(kernels, case.kernel)(*arrays.values(), **constants)


def run_all(isa: str) -> None:
    from entrenar import kernels

    kernels.use_isa(isa)
    rng = np.random.default_rng(0)
    for case in kernel_cases.CASES:
        sizes = [*case.sizes, *(tail(n) for tail in case.tails for n in LENGTHS)]
        for size in sizes:
            args = case.make(rng, **size)
            for side in ("end", "start"):
                print(case.kernel, size, side, flush=True)
                run_in_place(kernels, case, guarded_args(args, side))
    for name, call in kernel_cases.ROUNDINGS.items():
        for n in (*range(1, 70), 130, 4097):
            for side in ("end", "start"):
                print(name, n, side, flush=True)
                call(kernels, guarded(kernel_cases.normal(rng, n), side))
    print("done", flush=True)


def touch_outside(side: str) -> None:
    """Reads the element next to a guarded array, on the forbidden page."""
    x = guarded(np.ones(5, np.float32), side)
    outside = x.ctypes.data + (x.nbytes if side == "end" else -x.itemsize)
    print("touching", flush=True)
    print(ctypes.c_float.from_address(outside).value, flush=True)


if __name__ == "__main__":
    if sys.argv[1] in ("overrun", "underrun"):
        touch_outside("end" if sys.argv[1] == "overrun" else "start")
    else:
        run_all(sys.argv[1])
