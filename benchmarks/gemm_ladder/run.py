"""Climbs the ladder of docs/kernels.md: compiles ladder.c with the local compiler, checks every rung against NumPy,
and prints what each reaches, on one thread, beside entrenar's own kernel and the processor's peak.

    python benchmarks/gemm_ladder/run.py [--size 1536] [--json FILE]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np  # noqa: E402

from entrenar import kernels  # noqa: E402

RUNGS = ("naive", "blocked", "vectorised", "packed")
# Rungs 3 and 4 say themselves what is a vector; 1 and 2 are there to show what goes without.
FLAGS = ["-O3", "-fno-tree-vectorize", "-fno-tree-slp-vectorize", "-std=gnu11", "-fno-math-errno",
         "-fno-trapping-math", "-Wno-psabi", "-shared", "-fPIC"]
AVX2 = ["-mavx2", "-mfma"]


def build(folder: str) -> ctypes.CDLL:
    """ladder.c as a library: with AVX2 where this processor has it, as the rungs are written for 8 lanes."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    library = Path(folder, "ladder.so")
    flags = FLAGS + (AVX2 if "avx2" in kernels.available_isas() else [])
    subprocess.run([*compiler, *flags, Path(__file__).with_name("ladder.c"), "-o", library], check=True)
    return ctypes.CDLL(str(library))


def gflops(function, n: int, seconds: float) -> float:
    """The best of as many runs as fit into some seconds, at least two."""
    best, end, runs = float("inf"), time.perf_counter() + seconds, 0
    while runs < 2 or time.perf_counter() < end:
        started = time.perf_counter()
        function()
        best, runs = min(best, time.perf_counter() - started), runs + 1
    return 2 * n**3 / best / 1e9


def climb(n: int, seconds: float = 0.5) -> dict[str, float]:
    """GFLOP/s of every rung, of this package's matmul, and of the peak, by name."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((n, n), dtype=np.float32) for _ in range(2))
    expected = a.astype(np.float64) @ b.astype(np.float64)
    # n rounded products add to at most n eps |a| @ |b|; random signs leave about its square root.
    tolerance = 4 * np.finfo(np.float32).eps * np.sqrt(n) * (np.abs(a) @ np.abs(b))
    measured = {}
    with tempfile.TemporaryDirectory() as folder:
        library = build(folder)
        for rung in RUNGS:
            function = getattr(library, f"rung_{rung}")
            c = np.zeros((n, n), np.float32)
            pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (c, a, b)]

            def run(function=function, pointers=pointers):
                function(*pointers, ctypes.c_int64(n))

            measured[rung] = gflops(run, n, seconds)
            if not (np.abs(c - expected) <= tolerance).all():
                sys.exit(f"rung {rung}: wrong by {np.abs(c - expected).max():.3g}")
    kernels.set_num_threads(1)
    measured["entrenar"] = gflops(lambda: kernels.matmul(a, b), n, seconds)
    measured["peak"] = kernels.fma_peak(0.1) / 1e9
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=1536, help="n of the n x n matrices, a multiple of 96")
    parser.add_argument("--json", type=Path, help="write the numbers there, too")
    options = parser.parse_args()
    if options.size < 96 or options.size % 96:
        parser.error(f"--size {options.size}: wanted a multiple of 96")
    measured = climb(options.size)
    print(f"float32, {options.size} x {options.size}, one thread, {platform.machine()}, {kernels.info().isa}")
    for name, speed in measured.items():
        shares = f"{speed / measured['peak']:7.1%} of peak {speed / measured['naive']:7.1f}x naive"
        print(f"{name:12} {speed:8.1f} GFLOP/s {shares}")
    if options.json:
        options.json.write_text(json.dumps({"size": options.size, "gflops": measured}, indent=1) + "\n")


if __name__ == "__main__":
    main()
