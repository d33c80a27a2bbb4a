"""Scales in 8 bits (double quantization, Dettmers et al. 2023, "QLoRA"), the bits those of bitsandbytes 0.50 on a CPU.

    offset    the mean of all scales
    table     256 numbers in [-1, 1], dense around 0: the dynamic map
    codes     of (scale - offset) / absmax, absmax the greatest |scale - offset| of 256 scales

The mean is PyTorch's float32 sum divided by the count: not the exact mean, but one in PyTorch's own order, which
`torch_sum` follows. PyTorch itself sums 32768 numbers and more in as many parts as it has threads: the order here is
that of one thread, and with others its offset, and then a few codes, may differ in the last bit. On a GPU bitsandbytes
adds in another order again, and finds codes by comparison, where its CPU code (and this) looks them up in a table of
65536: 0.15 % of the codes are a neighbour then, at most 3.1e-5 of a block's absmax further away.
"""

# n scales

from __future__ import annotations

import functools

import numpy as np

from entrenar.kernels.packed import Nested

Array = np.ndarray
F32 = np.float32

BLOCK = 256
LANES, ROWS, LEVELS = 8, 4, 4  # PyTorch's: floats of a vector (on any processor), vectors at once, levels of sums
LOOKUP = 65536


@functools.cache
def dynamic_map() -> Array:
    """(256,) float32, sorted: 0, 1, and plus and minus 10^(i-6) times the middles of 2^i equal parts of [0.1, 1],
    i = 0..6 (Dettmers et al. 2021, "8-bit Optimizers via Block-wise Quantization")."""
    values = [np.array([0, 1], F32)]
    for i in range(7):
        ends = _linspace(0.1, 1, 2**i + 1)
        middles = (ends[:-1] + ends[1:]) / F32(2) * F32(10.0 ** (i - 6))
        values += [middles, -middles]
    table = np.sort(np.concatenate(values))
    table.setflags(write=False)
    return table


def nest(scales: Array) -> Nested:
    """The scales (n,) float32 in 8 bits each."""
    offset = torch_mean(scales)
    if not np.isfinite(offset):
        raise OverflowError(f"{scales.size:,} scales up to {scales.max():g} add up to more than float32 holds")
    centred = np.pad(scales - offset, (0, -scales.size % BLOCK)).reshape(-1, BLOCK)
    absmax = np.abs(centred).max(axis=1, initial=0)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        scaled = np.clip(centred * (1 / absmax)[:, None], F32(-1), F32(1))
    scaled[np.isnan(scaled)] = -1  # 0 / 0: bitsandbytes gives it the code 0, which times the block's absmax is nothing
    places = (scaled + F32(1)) * F32(0.5) * F32(LOOKUP - 1) + F32(0.5)
    codes = _lookup()[places.astype(np.uint16)].reshape(-1)[: scales.size]
    return Nested(codes, dynamic_map(), absmax, float(offset), BLOCK)


@functools.cache
def _lookup() -> Array:
    """The code of each of 65536 places from -1 to 1: how many midpoints of the map lie below it."""
    table = dynamic_map()
    places = F32(-1) + F32(2) * np.arange(LOOKUP, dtype=F32) / F32(LOOKUP - 1)
    return np.searchsorted(F32(0.5) * (table[:-1] + table[1:]), places, side="left").astype(np.uint8)


def torch_mean(x: Array) -> np.float32:
    """torch.mean of x (n,) float32 on one thread, to the bit; 0 for none."""
    return torch_sum(x) / F32(x.size) if x.size else F32(0)


def torch_sum(x: Array) -> np.float32:
    """torch.sum of x (n,) float32 on one thread, to the bit: in lanes of a vector, then the rest, then the lanes."""
    lanes = LANES if x.size >= LANES else 1
    vectors = x.size // lanes
    total = F32(0)
    with np.errstate(over="ignore"):
        for value in [*x[vectors * lanes :], *_sum_rows(x[: vectors * lanes].reshape(vectors, lanes))]:
            total += value
    return total


def _sum_rows(x: Array) -> Array:
    """(rows, lanes) -> (lanes,): every fourth row by itself, in a cascade; then the last rows; then these four."""
    groups = len(x) // ROWS
    sums = _cascade(x[: groups * ROWS].reshape(groups, ROWS, x.shape[1]))  # (ROWS, lanes)
    total = sums[0]
    for row in [*x[groups * ROWS :], *sums[1:]]:
        total = total + row
    return total


def _cascade(x: Array) -> Array:
    """Sum along the first axis, in order: runs of `step`, then runs of `step` of these sums, and so on."""
    step = 1 << max(4, _ceil_log2(len(x)) // LEVELS)
    left = []
    for _ in range(LEVELS - 1):
        runs = len(x) // step
        left.append(_in_order(x[runs * step :]))
        x = _in_order(np.moveaxis(x[: runs * step].reshape(runs, step, *x.shape[1:]), 1, 0))
    total = left[0]
    for part in [*left[1:], _in_order(x)]:
        total = total + part
    return total


def _in_order(x: Array) -> Array:
    """Sum along the first axis, one after the other (np.sum may go in pairs)."""
    total = np.zeros(x.shape[1:], F32)
    for row in x:
        total += row
    return total


def _ceil_log2(n: int) -> int:
    return max(1, (n - 1).bit_length())


def _linspace(start: float, stop: float, count: int) -> Array:
    """torch.linspace in float32: up from the start in its first half, down from the stop in the second; every number
    rounded once, as a fused multiply-add does (PyTorch's, on a processor that has it)."""
    step = (F32(stop) - F32(start)) / F32(count - 1)
    i = np.arange(count, dtype=np.float64)  # a product of two float32 is exact in float64
    return np.where(i < count // 2, F32(start) + step * i, F32(stop) - step * i[::-1]).astype(F32)
