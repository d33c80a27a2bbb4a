"""What stands between csrc/kernels.h and Python, generated from kernels.h: one table of function pointers per
instruction set, the pointer `active` to the one in use, forwarding functions under the plain names, and cffi's module.

Leaves out compiling: setup.py does that, one object per instruction set.
"""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import NamedTuple

from cffi import FFI

HERE = Path(__file__).parent if "__file__" in globals() else Path("csrc")  # cffi's setuptools hook runs this by exec


class Isa(NamedTuple):
    """An instruction set: its compiler flags, and the C condition under which this machine can run it."""
    name: str
    flags: tuple[str, ...]
    runnable: str


def cpu_has(*features: str) -> str:
    # __builtin_cpu_supports also checks that the operating system saves the registers (XCR0), in libgcc and in
    # compiler-rt alike.
    return " && ".join(f'__builtin_cpu_supports("{feature}")' for feature in features)


AVX2 = ("-mavx2", "-mfma")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512")
X86 = [
    Isa("baseline", (), "1"),
    Isa("avx2", AVX2, cpu_has("avx2", "fma")),
    Isa("avx512", AVX512, cpu_has("avx512f", "avx512bw", "avx512dq", "avx512vl", "fma")),
]
# For tests on machines without AVX-512: its 16-lane source, compiled for AVX2.
WIDE = Isa("wide", (*AVX2, "-DENT_W=16"), cpu_has("avx2", "fma"))


def isas(machine: str = platform.machine()) -> list[Isa]:
    """The instruction sets to build for a processor architecture, the best one last."""
    if machine.lower() in ("x86_64", "amd64"):
        return [WIDE, *X86] if os.environ.get("ENTRENAR_BUILD_WIDE") else X86
    if machine.lower() in ("aarch64", "arm64"):
        return [Isa("neon", (), "1")]
    return [Isa("baseline", (), "1")]


class Prototype(NamedTuple):
    result: str
    name: str
    parameters: str

    @property
    def arguments(self) -> str:
        return ", ".join(re.findall(r"(\w+)\s*(?:,|$)", self.parameters.replace("void", "")))

    def declare(self, name: str) -> str:
        return f"{self.result} {name}({self.parameters})"


def prototypes() -> list[Prototype]:
    header = re.sub(r"//.*|\brestrict\b", "", (HERE / "kernels.h").read_text())
    found = re.findall(r"^(\w+)\s+(ent_\w+)\s*\(([^)]*)\)\s*;", header, re.MULTILINE)
    return [Prototype(result, name, re.sub(r"\s+", " ", parameters)) for result, name, parameters in found]


def structs() -> list[str]:
    """The types of kernels.h, as cffi and the dispatcher want them."""
    header = re.sub(r"//.*", "", (HERE / "kernels.h").read_text())
    return re.findall(r"^typedef struct \{[^}]*\} \w+;", header, re.MULTILINE)


def renames(isa: Isa) -> list[tuple[str, str]]:
    """The macros that give every kernel of one instruction set its own symbol."""
    return [(kernel.name, f"{kernel.name}_{isa.name}") for kernel in prototypes()]


CONTROL = """
int ent_isa_count(void);               // instruction sets compiled in
const char *ent_isa_name(int i);       // the best one last
int ent_isa_runs(int i);               // can this machine run it?
int ent_isa(void);                     // the one in use, -1 before the first ent_use_isa
int ent_use_isa(int i);                // 0, or -1 if it does not run here
int ent_has_openmp(void);
extern int ent_num_threads;
"""

CONTROL_CODE = """
int ent_num_threads = 1;

int ent_isa_count(void) { return sizeof isas / sizeof *isas; }
const char *ent_isa_name(int i) { return isas[i].name; }
int ent_isa(void) { return active ? (int)(active - isas) : -1; }

int ent_isa_runs(int i) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_cpu_init();
#endif
    switch (i) {
%(runs)s
    }
    return 0;
}

int ent_use_isa(int i) {
    if (i < 0 || i >= ent_isa_count() || !ent_isa_runs(i)) return -1;
    active = &isas[i];
    return 0;
}

int ent_has_openmp(void) {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}
"""


def dispatcher(built: list[Isa]) -> str:
    """C source of the dispatcher: externs, the tables, `active`, forwarding functions, control."""
    kernels = prototypes()
    externs = [f"extern {k.declare(f'{k.name}_{isa.name}')};" for isa in built for k in kernels]
    fields = [f"    {k.declare(f'(*{k.name})')};" for k in kernels]
    rows = [f'    {{"{isa.name}", {", ".join(f"{k.name}_{isa.name}" for k in kernels)}}},' for isa in built]
    forwards = [
        f"static {k.declare(k.name)} {{ {'' if k.result == 'void' else 'return '}active->{k.name}({k.arguments}); }}"
        for k in kernels
    ]
    runs = "\n".join(f"    case {i}: return {isa.runnable};" for i, isa in enumerate(built))
    table = ["static const struct isa {", "    const char *name;", *fields, "} isas[] = {", *rows, "};"]
    lines = ["#include <stdint.h>", *structs(), *externs, *table, "static const struct isa *active;", *forwards]
    return "\n".join(lines) + CONTROL_CODE % {"runs": runs}


ffi = FFI()
ffi.cdef("\n".join(structs()))
ffi.cdef("\n".join(f"{k.declare(k.name)};" for k in prototypes()) + CONTROL)
ffi.set_source("entrenar._kernels", dispatcher(isas()))
