"""The C kernels in a process of their own: for another processor, under its emulator, or for other vector
widths.

A small driver, generated from csrc/kernels.h and compiled together with csrc/kernels.c into one program,
waits for calls on its standard input: which kernel, then every argument, an array as its bytes. It copies
arrays into memory of exactly their size (so a sanitizer sees every step outside, in outputs as well), calls,
and sends back what may have changed. `attach` puts it under entrenar.kernels.native in place of the compiled
module: the same wrappers, the same tests, other silicon.
"""

from __future__ import annotations

import ctypes
import re
import struct
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from entrenar.kernels import native_attention, native_packed, native_quantize
from entrenar.kernels.packed import INTEGER_SCALES, INTEGERS, KINDS, TABLES, Nested, Packed

CSRC = Path(__file__).parent.parent / "csrc"
FLAGS = ("-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")  # as in setup.py


class Parameter(NamedTuple):
    """One parameter of a kernel."""

    kind: str  # "pointer", "packed" (to an ent_packed), "float" (float or double), "int", or one of LISTS
    name: str
    const: bool


class Kernel(NamedTuple):
    result: str
    name: str
    parameters: list[Parameter]


def kernels_of(header: str) -> list[Kernel]:
    header = re.sub(r"//.*|\brestrict\b", "", header)
    found = []
    for result, name, parameters in re.findall(r"^(\w+)\s+(ent_\w+)\s*\(([^)]*)\)\s*;", header, re.MULTILINE):
        found.append(Kernel(result, name, [parameter(text) for text in parameters.split(",") if text != "void"]))
    return found


# Lists of arrays, of packed matrices, of what AdamW moves: "arrays", "matrices", "parameters"
LISTS = {
    "const float *const *": "arrays",
    "const ent_packed *const *": "matrices",
    "ent_adamw_parameter *": "parameters",
}
KINDS_OF_C = LISTS | {"ent_packed *": "packed", "*": "pointer", "int64_t": "int", "": "float"}  # the first that fits


def parameter(text: str) -> Parameter:
    kind = next(kind for words, kind in KINDS_OF_C.items() if words in text)
    return Parameter(kind, re.findall(r"\w+", text)[-1], "const" in text)


DRIVER = """
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include "kernels.c"

int ent_num_threads = 1;
enum { LONGEST = 32 };
static void *block[LONGEST], *pointer[LONGEST];
static int64_t size[LONGEST], whole[LONGEST];
static double real[LONGEST];

static void get(void *to, int64_t n) { if (n && fread(to, 1, n, stdin) != (size_t)n) exit(0); }
static void put(const void *from, int64_t n) { if (n && fwrite(from, 1, n, stdout) != (size_t)n) exit(3); }

static void get_array(int i, int filled) {          /* size or -1 for NULL, offset of the pointer, bytes */
    int64_t offset;
    get(&size[i], 8), get(&offset, 8);
    block[i] = size[i] < 0 ? 0 : aligned_alloc_exactly(size[i]);
    if (filled && size[i] > 0) get(block[i], size[i]);
    pointer[i] = size[i] < 0 ? 0 : (char *)block[i] + offset;
}

/* What lists and structs point to lives until the call is over. */
enum { KEPT = 1024, LISTED = 64 };
static void *kept[KEPT];
static int keeping;

static void *get_kept(void) {  /* size or -1 for NULL, bytes */
    int64_t bytes;
    get(&bytes, 8);
    if (bytes < 0) return 0;
    if (keeping == KEPT) exit(4);
    void *p = kept[keeping++] = aligned_alloc_exactly(bytes);
    get(p, bytes);
    return p;
}

static int64_t get_count(void) {
    int64_t count;
    get(&count, 8);
    if (count < 0 || count > LISTED) exit(5);
    return count;
}

static ent_packed *get_packed(ent_packed *w) {  /* 0 for NULL; or 1, arrays, numbers */
    int64_t given;
    get(&given, 8);
    if (!given) return 0;
    w->codes = get_kept(), w->table = get_kept(), w->scales = get_kept();
    w->nested_codes = get_kept(), w->nested_table = get_kept(), w->nested_absmax = get_kept();
    w->integers = get_kept();
    get(&w->nested_offset, 2 * 8);
    get(&w->kind, 6 * 8);
    return w;
}

static ent_packed matrix_of[LISTED];
static const ent_packed *matrices[LISTED];
static const float *arrays[LISTED];
static ent_adamw_parameter parameters[LISTED];
static int64_t listed;

static void get_matrices(void) {
    listed = get_count();
    for (int64_t n = 0; n < listed; n++) matrices[n] = get_packed(&matrix_of[n]);
}

static void get_arrays(void) {
    listed = get_count();
    for (int64_t n = 0; n < listed; n++) arrays[n] = get_kept();
}

static void get_parameters(void) {
    listed = get_count();
    for (int64_t n = 0; n < listed; n++) {
        ent_adamw_parameter *x = &parameters[n];
        x->p = get_kept(), x->m = get_kept(), x->v = get_kept(), x->g = get_kept();
        get(&x->decay, 8), get(&x->n, 8);
    }
}

static void put_parameters(void) {
    for (int64_t n = 0; n < listed; n++) {
        ent_adamw_parameter *x = &parameters[n];
        put(x->p, 4 * x->n), put(x->m, 4 * x->n), put(x->v, 4 * x->n);
    }
}

int main(void) {
    for (;;) {
        int64_t which;
        double result = 0;
        get(&which, 8);
        switch (which) {
%(cases)s
        }
        fflush(stdout);
        for (int i = 0; i < LONGEST; i++) { release(block[i]); block[i] = 0; }
        while (keeping) release(kept[--keeping]);
    }
}
"""

# Scratch must lie at a multiple of 64; malloc, which sanitizers watch to the byte, promises 16.
MEMORY = """
#include <stddef.h>
static void *aligned_alloc_exactly(int64_t n) {
    void *p = 0;
    return posix_memalign(&p, 64, n ? n : 1) ? 0 : p;
}
static void release(void *p) { free(p); }
"""


def driver(kernels: list[Kernel]) -> str:
    cases = []
    for number, kernel in enumerate(kernels):
        get, call, put = [], [], []
        for i, (kind, name, const) in enumerate(kernel.parameters):
            if kind == "pointer":
                get.append(f"get_array({i}, {int(name != 'scratch')});")
                call.append(f"pointer[{i}]")
                if not const and name != "scratch":
                    put.append(f"if (size[{i}] > 0) put(block[{i}], size[{i}]);")
            elif kind == "packed":
                get.append(f"pointer[{i}] = get_packed(&matrix_of[0]);")
                call.append(f"pointer[{i}]")
            elif kind in LISTS.values():
                get.append(f"get_{kind}();")
                call.append(kind)
                put += ["put_parameters();"] if kind == "parameters" else []
            elif kind == "int":
                get.append(f"get(&whole[{i}], 8);")
                call.append(f"whole[{i}]")
            else:
                get.append(f"get(&real[{i}], 8);")
                call.append(f"real[{i}]")
        assign = "" if kernel.result == "void" else "result = "
        lines = [*get, f"{assign}{kernel.name}({', '.join(call)});", "put(&result, 8);", *put, "break;"]
        cases.append(f"        case {number}:\n            " + "\n            ".join(lines))
    text = DRIVER % {"cases": "\n".join(cases)}
    return text.replace("static void get_array", MEMORY + "\nstatic void get_array", 1)


def compile_driver(compiler: str, folder: Path, *flags: str) -> Path:
    """The driver as a program in `folder`, compiled with `flags` besides what setup.py always uses."""
    source, program = folder / "driver.c", folder / "driver"
    source.write_text(driver(kernels_of((CSRC / "kernels.h").read_text())))
    done = subprocess.run(
        [compiler, *FLAGS, *flags, f"-I{CSRC}", "-o", str(program), str(source), "-lm"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return program


class Foreign:
    """Stands for cffi's `lib`: every kernel as a function of arrays, run by the driver."""

    ent_num_threads = 1

    def __init__(self, command: list[str]):
        kernels = kernels_of((CSRC / "kernels.h").read_text())
        self.kernels = {kernel.name: (number, kernel) for number, kernel in enumerate(kernels)}
        self.calls = 0
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def __getattr__(self, name: str):
        if name not in self.kernels:
            raise AttributeError(name)
        return lambda *values: self.call(*self.kernels[name], values)

    def call(self, number: int, kernel: Kernel, values: tuple) -> float | int | None:
        message, changed = [struct.pack("q", number)], []
        for (kind, name, const), value in zip(kernel.parameters, values, strict=True):
            if kind == "int":
                message.append(struct.pack("q", value))
            elif kind == "float":
                message.append(struct.pack("d", value))
            elif kind == "packed":
                message.append(struct.pack("q", 0) if value is None else in_bytes(value))
            elif kind in LISTS.values():
                message.append(struct.pack("q", len(value)))
                message += [IN_BYTES[kind](each) for each in value]
                if kind == "parameters":
                    changed += [(array.ctypes.data, array.nbytes) for p, m, v, *_ in value for array in (p, m, v)]
            elif value is None:
                message.append(struct.pack("qq", -1, 0))
            else:
                value = np.array(value, np.int64) if isinstance(value, list) else value
                low, high = np.lib.array_utils.byte_bounds(value) if value.size else (value.ctypes.data,) * 2
                message.append(struct.pack("qq", high - low, value.ctypes.data - low))
                if name != "scratch":
                    message.append(ctypes.string_at(low, high - low))
                    if not const:
                        changed.append((low, high - low))
        self.calls += 1
        try:
            self.process.stdin.write(b"".join(message))
            self.process.stdin.flush()
        except BrokenPipeError:
            self.died(kernel)
        (result,) = struct.unpack("d", self.read(8, kernel))
        for low, size in changed:
            ctypes.memmove(low, self.read(size, kernel), size)
        return None if kernel.result == "void" else result if kernel.result == "double" else int(result)

    def read(self, size: int, kernel: Kernel) -> bytes:
        data = self.process.stdout.read(size)
        return data if len(data) == size else self.died(kernel)

    def died(self, kernel: Kernel):
        error = self.process.stderr.read().decode(errors="replace")
        raise AssertionError(f"{kernel.name}: the driver ended with {self.process.wait()}\n{error[-4000:]}")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=10)
        self.process.stdout.close()
        self.process.stderr.close()


def array_bytes(array: np.ndarray | None) -> bytes:
    """An array as the driver's get_kept reads it."""
    return struct.pack("q", -1) if array is None else struct.pack("q", array.nbytes) + array.tobytes()


def in_bytes(w: Packed) -> bytes:
    """A packed matrix as the driver's get_packed reads it."""
    n = w.scales if isinstance(w.scales, Nested) else None
    arrays = [w.codes, TABLES.get(w.kind, native_packed.NO_TABLE), None if n else w.scales]
    arrays += [n.codes, n.table, n.absmax] if n else [None] * 3
    arrays += [INTEGERS[w.kind] if w.in_integers else None]
    offset, outer = (np.float32(n.offset), n.block) if n else (0, 0)
    scale = INTEGER_SCALES.get(w.kind, 0)
    numbers = struct.pack("2d6q", offset, scale, KINDS.index(w.kind), *w.shape, w.block, outer, w.compute == "bfloat16")
    return struct.pack("q", 1) + b"".join(map(array_bytes, arrays)) + numbers


def parameter_bytes(parameter: tuple) -> bytes:
    """What AdamW moves as the driver's get_parameters reads it."""
    *arrays, decay, n = parameter
    return b"".join(map(array_bytes, arrays)) + struct.pack("dq", decay, n)


IN_BYTES = {"arrays": array_bytes, "matrices": in_bytes, "parameters": parameter_bytes}


class ArraysForPointers:
    """Stands for cffi's `ffi`: what would be a pointer stays the array it points to."""

    NULL = None

    @staticmethod
    def cast(kind: str, array: np.ndarray) -> np.ndarray:
        return array

    @staticmethod
    def new(kind: str, values: list) -> list:
        return values


def attach(native: Any, foreign: Foreign, monkeypatch: Any) -> None:
    """From here on, native's wrappers run their kernels in the driver."""
    instead = {"lib": foreign, "ffi": ArraysForPointers, "scratch": lambda size: np.empty(size, np.float32)}
    instead |= dict.fromkeys(("at", "at_strided", "at_ints", "packed"), lambda array: array)
    instead |= {"from_buffer": lambda kind, array: array}
    for module in (native, native_attention, native_packed, native_quantize):
        for name, value in instead.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
