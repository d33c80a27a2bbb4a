"""The kernels that round floats to a storage format, in plain NumPy: the specification of those in C, bit for bit.

What a format is says packed.py; whole matrices, and scales in 8 bits, are made in entrenar/quant.
"""

# n values of a flat matrix

from __future__ import annotations

import functools

import numpy as np

from entrenar.kernels import checks
from entrenar.kernels.packed import TABLES

Array = np.ndarray

SMALLEST = np.float32(1e-38)  # what a block is divided by at least: bitsandbytes' own floor
Q8_0_BLOCK = 32


@functools.cache
def decisions(kind: str) -> tuple[Array, Array]:
    """(bounds (15,) float32, order (16,) uint8): x / absmax becomes the code order[i], i the number of bounds below it.

    The bounds lie halfway between neighbours of the sorted table; what lies on one goes down.
    """
    order = np.argsort(TABLES[kind], kind="stable")
    table = TABLES[kind][order]
    return (table[:-1] + table[1:]) / np.float32(2), order.astype(np.uint8)


def quantize_4bit(x: Array, *, kind: str, block: int) -> tuple[Array, Array]:
    """codes (ceil(n / 2),) uint8, the first in the high nibble, and absmax (ceil(n / block),) float32 of x (n,).

    absmax is the greatest |x| of a block; a code the nearest of the table to x / absmax. Whole blocks are multiplied by
    1 / absmax, a shorter last one is divided by absmax, and its absmax at least SMALLEST: so does bitsandbytes, and
    the last bit is not the same.
    """
    checks.quantize_4bit(x, kind, block)
    bounds, order = decisions(kind)
    x = x.astype(np.float32)
    whole = x.size // block * block
    blocks, rest = x[:whole].reshape(-1, block), x[whole:]
    absmax = np.abs(blocks).max(axis=1, initial=0)
    scaled = (blocks * (1 / np.maximum(absmax, SMALLEST))[:, None]).reshape(-1)
    if rest.size:
        last = np.maximum(np.abs(rest).max(), SMALLEST)
        absmax, scaled = np.append(absmax, last), np.append(scaled, rest / last)
    codes = order[np.searchsorted(bounds, np.pad(scaled, (0, x.size % 2)), side="left")]
    return codes[0::2] << 4 | codes[1::2], absmax


def quantize_q8_0(x: Array) -> tuple[Array, Array]:
    """codes (n,) int8 and scales d (ceil(n / 32),) float32 of x (n,), in blocks of 32.

    d = max|x| / 127, codes = round(x (1/d)), halves away from zero; d is stored rounded to float16. A block too small
    for 1/d to be a number is zeros.
    """
    checks.flat("quantize_q8_0", x)
    blocks = np.pad(x.astype(np.float32), (0, -x.size % Q8_0_BLOCK)).reshape(-1, Q8_0_BLOCK)
    d = np.abs(blocks).max(axis=1, initial=0) / np.float32(127)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = 1 / d
    scaled = blocks * np.where(np.isfinite(inverse), inverse, np.float32(0))[:, None]
    magnitude = np.abs(scaled)
    whole = np.floor(magnitude)
    whole += magnitude - whole >= 0.5
    return np.copysign(whole, scaled).astype(np.int8).reshape(-1)[: x.size], as_float16(d)


def as_float16(d: Array) -> Array:
    """d rounded to float16, as float32; infinite from 65520 on."""
    with np.errstate(over="ignore"):
        return d.astype(np.float16).astype(np.float32)


def round_bfloat16(x: Array) -> Array:
    """The upper 16 bits of x (n,) float32, rounded to the nearest, halves to even: uint16. NaN stays NaN."""
    checks.flat("round_bfloat16", x)
    bits = x.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16  # may carry into the exponent, and to infinity, as it should
    return np.where(np.isnan(x), bits >> 16 | 0x40, rounded).astype(np.uint16)
