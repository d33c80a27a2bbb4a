"""How far a stored weight may be from the one it was made of, and how far off a layer's output is."""

# N rows (tokens), O features out, I features in

from __future__ import annotations

import numpy as np

from entrenar import kernels
from entrenar.kernels.packed import TABLES, Nested, Packed
from entrenar.kernels.reference_packed import unpack_scales
from entrenar.kernels.reference_quantize import decisions
from entrenar.quant.nested import LOOKUP

Array = np.ndarray
EPS = float(np.finfo(np.float32).eps)
TINY = float(np.finfo(np.float32).smallest_subnormal)
ROUNDINGS = 4 * EPS  # scaling, comparing with rounded bounds, decoding: relative to a block's greatest value


def half_step(w: Packed) -> Array:
    """(O, I) float64: |x - unpack(w)| is at most this for every x that `quantize` can have made w of.

    x lies within the half step h of its code's value t, in units of the true scale s: |x - s t| <= s h. The stored
    scale s' is off by at most e (it was rounded, too): |x - s' t| <= (s' + e) h + |t| e. bfloat16: half a unit in the
    last place.
    """
    if w.kind == "bfloat16":
        values = np.abs(kernels.unpack(w).astype(np.float64))
        return np.maximum(values * 2.0**-8, 2.0**-134)
    values, halves = _codes(w)
    scale, off = (np.repeat(part, w.block)[: w.size].reshape(w.shape) for part in _scales(w))
    return (scale + off) * (halves + _greatest(w) * ROUNDINGS) + values * off + TINY


def _greatest(w: Packed) -> float:
    return 127 if w.kind == "q8_0" else 1


def _codes(w: Packed) -> tuple[Array, Array]:
    """(|t|, h): of every value that of its code, and the farthest that anything with this code may be from it."""
    if w.kind == "q8_0":
        return np.abs(w.codes.astype(np.float64)).reshape(w.shape), np.full(w.shape, 0.5)
    table, (bounds, order) = TABLES[w.kind].astype(np.float64), decisions(w.kind)
    edges = np.concatenate([[-1.0], bounds.astype(np.float64), [1.0]])
    halves = np.empty(16)
    halves[order] = np.maximum(table[order] - edges[:-1], edges[1:] - table[order])
    codes = np.stack([w.codes >> 4, w.codes & 15], axis=1).reshape(-1)[: w.size].reshape(w.shape)
    return np.abs(table)[codes], halves[codes]


def _scales(w: Packed) -> tuple[Array, Array]:
    """(|s'|, e): of every block the scale, and how far the true one may be from it."""
    scale = np.abs(unpack_scales(w).astype(np.float64))
    if w.kind == "q8_0":  # float16, ten bits below the first; what is smaller than its smallest became 0
        return scale, np.maximum(scale * 2.0**-11, 2.0**-25)
    if not isinstance(w.scales, Nested):
        return scale, np.zeros_like(scale)
    n = w.scales
    table = n.table.astype(np.float64)
    edges = np.concatenate([[-1.0], (table[:-1] + table[1:]) / 2, [1.0]])
    halves = np.maximum(table - edges[:-1], edges[1:] - table) + 1.5 / LOOKUP  # looked up, not compared
    absmax = np.repeat(n.absmax.astype(np.float64), n.block)[: n.size]
    return scale, absmax * halves[n.codes] + ROUNDINGS * (absmax + abs(n.offset))


def output_error(x: Array, w: Array, packed: Packed) -> float:
    """|x W^T - x P^T| / |x W^T|, root mean squares: how far off a layer is that has P in place of W.

    x (N, I)   W (O, I) float32   P its packed form
    """
    exact = kernels.matmul(x, w.T)
    off = kernels.packed_linear(x, packed) - exact
    return float(np.linalg.norm(off) / np.linalg.norm(exact))
