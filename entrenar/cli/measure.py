"""Measured for `entrenar doctor`: how fast this machine multiplies and copies, and whether it multiplies rightly."""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from entrenar import kernels, ops
from entrenar.tensor import Tensor


def fma_peak(threads: int, seconds: float) -> float:
    """FLOP/s of multiply-adds in registers; the best of four looks, since a neighbour can only slow them."""
    before = kernels.get_num_threads()
    kernels.set_num_threads(threads)
    try:
        return max(kernels.fma_peak(seconds / 4) for _ in range(4))
    finally:
        kernels.set_num_threads(before)


def memory_bandwidth(threads: int, seconds: float, nbytes: int) -> float:
    """Bytes per second, read and written, of a copy of `nbytes`, the threads sharing it; the best within `seconds`."""
    source, copy = np.ones((2, nbytes // 4), np.float32)  # both written: fresh pages would be measured instead
    pairs = list(zip(np.array_split(source, threads), np.array_split(copy, threads), strict=True))
    best, end = 0.0, time.perf_counter() + seconds
    with ThreadPoolExecutor(threads) as pool:
        while True:
            began = time.perf_counter()
            list(pool.map(lambda pair: np.copyto(pair[1], pair[0]), pairs))  # NumPy copies without Python's lock
            best = max(best, 2 * source.nbytes / (time.perf_counter() - began))
            if time.perf_counter() >= end and best:
                return best


ROWS, INNER, OUTER = 61, 257, 83  # multiples of no vector's length


def product_error() -> float:
    """The largest error of y = x W^T and of both its gradients, as a share of the largest number of each."""
    rng = np.random.default_rng(0)
    shapes = (ROWS, INNER), (OUTER, INNER), (ROWS, OUTER)
    x, w, dy = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)

    def results(dtype: type) -> list[np.ndarray]:
        inputs = [Tensor(array.astype(dtype), requires_grad=True) for array in (x, w)]
        y = ops.linear(*inputs)
        (y * dy.astype(dtype)).sum().backward()
        return [np.asarray(y.data), *(np.asarray(tensor.grad) for tensor in inputs)]

    pairs = zip(results(np.float32), results(np.float64), strict=True)
    return max(float(np.abs(ours - right).max() / np.abs(right).max()) for ours, right in pairs)


def tolerance() -> float:
    """Rounding of sums of up to INNER products in float32: a few eps times the root of their number."""
    return 4 * float(np.finfo(np.float32).eps) * math.sqrt(INNER)
