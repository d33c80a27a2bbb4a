"""The kernels that read a Packed matrix, in plain NumPy: the specification of those in C, as reference.py is.

Here a packed matrix is made floats as a whole; C never does that: it decodes on the way into its registers.
"""

# N rows (tokens), O features out, I features in

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from entrenar.kernels import checks
from entrenar.kernels.packed import (
    FEW_ROWS,
    GROUP,
    INTEGER_SCALES,
    INTEGERS,
    TABLES,
    Nested,
    Packed,
)
from entrenar.kernels.reference_quantize import round_bfloat16

Array = np.ndarray


def unpack_scales(w: Packed) -> Array:
    """The scale of each block, (blocks,) float32: as stored, or table[code] * absmax + offset, each step rounded."""
    s = w.scales
    if not isinstance(s, Nested):
        return np.asarray(s)
    return s.table[s.codes] * np.repeat(s.absmax, s.block)[: s.size] + np.float32(s.offset)


def unpack(w: Packed) -> Array:
    """W (O, I) float32: a table's value or an int8, times its block's scale; of bfloat16 the same number."""
    return _values(w, np.arange(w.size), TABLES.get(w.kind)).reshape(w.shape)


def unpack_rows(ids: Array, w: Packed) -> Array:
    """W[ids]          ids (...) integers   -> (..., I) float32"""
    ids = checks.indices("unpack_rows", "ids", ids, w.shape[0])
    return _values(w, ids[..., None] * w.shape[1] + np.arange(w.shape[1]), TABLES.get(w.kind))


def _values(w: Packed, places: Array, table: Array | None) -> Array:
    """The values at `places` of the flat matrix; of nibbles, by `table`."""
    if w.kind == "bfloat16":
        return (w.codes[places].astype(np.uint32) << 16).view(np.float32)
    if table is None:
        values = w.codes[places].astype(np.float32)
    else:
        values = table[(w.codes[places // 2] >> (4 * (1 - places % 2))) & 15]
    return values * unpack_scales(w)[places // w.block]


def rounded(x: Array) -> Array:
    """x, of any shape, with each number rounded to bfloat16 (by way of float32), as its own type."""
    halves = round_bfloat16(np.ascontiguousarray(x, np.float32).reshape(-1))
    return (halves.astype(np.uint32) << 16).view(np.float32).reshape(x.shape).astype(x.dtype)


def operands(x: Array, w: Packed) -> tuple[Array, Array]:
    """x and W as a product of `w` multiplies them, both of x's type.

    In bfloat16 both are rounded, W after its scale; products of such numbers are exact in float32, and so are sums but
    for float32's own rounding, in whatever order. (Instructions of the processor may take denormal numbers as 0.)
    """
    W = unpack(w)
    if w.compute == "bfloat16" and len(x) > FEW_ROWS:
        x, W = rounded(x), rounded(W)
    return x, W.astype(x.dtype)


def integer_operands(x: Array, w: Packed) -> tuple[Array, Array]:
    """x (N, I) and W as a product of few rows multiplies them in int16, both of x's type.

    Each group of 64 of x, and the table, as whole numbers times one scale: sums of a group are exact in 32 bits. What
    is less than 2^-99 counts as 0.
    """
    groups = np.ascontiguousarray(x, np.float32).reshape(-1, GROUP)
    scale = np.maximum(np.abs(groups).max(axis=1, keepdims=True) / np.float32(2**14), np.float32(2.0**-98))
    whole = np.rint(groups.astype(np.float64) * (1 / scale)).astype(x.dtype)
    table = INTEGERS[w.kind] / INTEGER_SCALES[w.kind]
    W = _values(w, np.arange(w.size), table).reshape(w.shape)
    return (whole * scale.astype(x.dtype)).reshape(x.shape), W.astype(x.dtype)


def packed_linear(x: Array, w: Packed) -> Array:
    """y = x W^T          x (N, I)   W (O, I)   y (N, O)"""
    checks.packed("packed_linear", x, w, 1)
    with np.errstate(all="ignore"):
        x, W = (integer_operands if w.in_integers and len(x) <= FEW_ROWS else operands)(x, w)
        return x @ W.T


def packed_linears(x: Array, ws: Sequence[Packed]) -> list[Array]:
    """[x W^T for W in ws]          x (N, I)   each W (O, I), O its own   -> (N, O) each"""
    return [packed_linear(x, w) for w in ws]


def packed_linear_backward(dy: Array, w: Packed) -> Array:
    """dx = dy W          dy (N, O)   W (O, I)   dx (N, I)"""
    checks.packed("packed_linear_backward", dy, w, 0)
    with np.errstate(all="ignore"):
        dy, W = operands(dy, w)
        return dy @ W
