"""The same numbers in every process, and a few numbers by which results are compared across processes."""

from __future__ import annotations

import math

import numpy as np

BLOCK = 1_000_003  # a prime: no row of a matrix is another's copy


def normal(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    """float32 from N(0, scale^2): the same in every process, for NumPy keeps its generators' streams.

    Large arrays repeat one block of draws, which are slow to make.
    """
    size = math.prod(shape)
    drawn = np.random.default_rng(seed).standard_normal(min(size, BLOCK), np.float32) * np.float32(scale)
    return np.resize(drawn, shape)


def integers(seed: int, high: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, shape)


def fingerprint(*arrays: np.ndarray) -> list[float]:
    """Two numbers per array: its length, and its projection on a direction of random signs.

    Every single element moves the projection: an error of a share e of the array's length, wherever it sits,
    moves it by about e lengths, seldom by less than e/10.
    """
    numbers = []
    for array in arrays:
        flat = np.ascontiguousarray(array).reshape(-1)
        signs = np.random.default_rng(0).integers(0, 2, flat.size, np.int8)
        # Block by block: a float64 copy of the whole array could be the peak of the process's memory.
        length = projection = 0.0
        for start in range(0, flat.size, 1 << 20):
            block = flat[start : start + (1 << 20)].astype(np.float64)
            length += float(block @ block)
            projection += float(block @ (2.0 * signs[start : start + (1 << 20)] - 1))
        numbers += [length**0.5, projection]
    return numbers


def agree(a: list[float], b: list[float], *, tolerance: float) -> bool:
    """Whether two fingerprints are of equal arrays, up to `tolerance` of their lengths. nan never agrees."""
    if len(a) != len(b):
        return False
    lengths = [max(abs(x), abs(y)) for x, y in zip(a[::2], b[::2], strict=True) for _ in range(2)]
    return all(abs(x - y) <= tolerance * length for x, y, length in zip(a, b, lengths, strict=True))
