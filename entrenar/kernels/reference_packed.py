"""The kernels that read a Packed matrix, in plain NumPy: the specification of those in C, as reference.py is.

Here a packed matrix is made floats as a whole; C never does that: it decodes on the way into its registers.
"""

# N rows (tokens), O features out, I features in

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from entrenar.kernels import checks
from entrenar.kernels.packed import TABLES, Nested, Packed

Array = np.ndarray


def unpack_scales(w: Packed) -> Array:
    """The scale of each block, (blocks,) float32: as stored, or table[code] * absmax + offset, each step rounded."""
    s = w.scales
    if not isinstance(s, Nested):
        return np.asarray(s)
    return s.table[s.codes] * np.repeat(s.absmax, s.block)[: s.size] + np.float32(s.offset)


def unpack(w: Packed) -> Array:
    """W (O, I) float32: a table's value or an int8, times its block's scale; of bfloat16 the same number."""
    return _values(w, np.arange(w.size)).reshape(w.shape)


def unpack_rows(ids: Array, w: Packed) -> Array:
    """W[ids]          ids (...) integers   -> (..., I) float32"""
    ids = checks.indices("unpack_rows", "ids", ids, w.shape[0])
    return _values(w, ids[..., None] * w.shape[1] + np.arange(w.shape[1]))


def _values(w: Packed, places: Array) -> Array:
    """The values at `places` of the flat matrix."""
    if w.kind == "bfloat16":
        return (w.codes[places].astype(np.uint32) << 16).view(np.float32)
    if w.kind == "q8_0":
        values = w.codes[places].astype(np.float32)
    else:
        values = TABLES[w.kind][(w.codes[places // 2] >> (4 * (1 - places % 2))) & 15]
    return values * unpack_scales(w)[places // w.block]


def packed_linear(x: Array, w: Packed) -> Array:
    """y = x W^T          x (N, I)   W (O, I)   y (N, O)"""
    checks.packed("packed_linear", x, w, 1)
    with np.errstate(all="ignore"):
        return x @ unpack(w).astype(x.dtype).T


def packed_linears(x: Array, ws: Sequence[Packed]) -> list[Array]:
    """[x W^T for W in ws]          x (N, I)   each W (O, I), O its own   -> (N, O) each"""
    return [packed_linear(x, w) for w in ws]


def packed_linear_backward(dy: Array, w: Packed) -> Array:
    """dx = dy W          dy (N, O)   W (O, I)   dx (N, I)"""
    checks.packed("packed_linear_backward", dy, w, 0)
    with np.errstate(all="ignore"):
        return dy @ unpack(w).astype(dy.dtype)
