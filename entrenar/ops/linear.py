"""Matrix products: matmul, linear (x W^T + b) and embedding (rows of W).

The W of linear and embedding may be a Packed: frozen in a storage format, decoded inside the kernels.
"""

# I in, O out, V vocabulary, C channels

from __future__ import annotations

from typing import Any

import numpy as np

from entrenar import kernels
from entrenar.kernels import checks
from entrenar.kernels.packed import Packed
from entrenar.ops.elementwise import operands, tensor, unbroadcast
from entrenar.ops.shape import reshape
from entrenar.tensor import Op, Tensor, is_recording


def rows(x: np.ndarray) -> np.ndarray:
    """(..., C) -> (N, C)"""
    return x.reshape(-1, x.shape[-1]) if x.size else x.reshape(int(np.prod(x.shape[:-1])), x.shape[-1])


class Matmul(Op):
    """c = a b          a (..., M, K)   b (..., K, N)   c (..., M, N), batch axes broadcast"""

    def forward(self, a, b):
        self.save(a if self.needs[1] else None, b if self.needs[0] else None, a.shape, b.shape)
        if b.ndim == 2 and a.ndim > 2:  # one tall product instead of many small ones
            return kernels.matmul(rows(a), b).reshape(*a.shape[:-1], b.shape[1])
        return kernels.matmul(a, b)

    def backward(self, dc):
        # da = dc b^T, db = a^T dc, each summed over the batch axes it was broadcast along
        a, b, a_shape, b_shape = self.saved
        da = db = None
        if self.needs[0]:
            da = unbroadcast(kernels.matmul(dc, b.swapaxes(-1, -2)), a_shape)
        if self.needs[1] and len(b_shape) == 2:
            db = kernels.matmul(rows(a).T, rows(dc))  # the sum over the batch is part of the product
        elif self.needs[1]:
            db = unbroadcast(kernels.matmul(a.swapaxes(-1, -2), dc), b_shape)
        return da, db


def times_transposed(x: np.ndarray, w: np.ndarray | Packed) -> np.ndarray:
    """x W^T          x (N, I)   W (O, I), floats or packed   -> (N, O)"""
    return kernels.packed_linear(x, in_use(w)) if isinstance(w, Packed) else kernels.matmul(x, w.T)


def in_use(w: Packed) -> Packed:
    """The matrix to multiply rows by: where gradients may be asked for, one whose product has them."""
    return w.smooth if is_recording() else w


def times(dy: np.ndarray, w: np.ndarray | Packed) -> np.ndarray:
    """dy W          dy (N, O)   W (O, I), floats or packed   -> (N, I)"""
    return kernels.packed_linear_backward(dy, w) if isinstance(w, Packed) else kernels.matmul(dy, w)


def product(op: Op, i: int, a: np.ndarray, b: np.ndarray | Packed) -> np.ndarray:
    """The gradient a b of the op's input i, in that input's shape: added to what came before it, where b is floats."""
    if isinstance(b, Packed) or (total := op.so_far(i)) is None:
        return times(a, b).reshape(op.input_shape(i))
    kernels.matmul_add(rows(total), a, b)
    return total


class Linear(Op):
    """y = x W^T + b          x (..., I)   W (O, I)   b (O,) or None   y (..., O)"""

    def forward(self, x, w, b):
        # A frozen W keeps no input.
        self.save(x if self.needs[1] else None, w if self.needs[0] else None)
        y = times_transposed(rows(x), w).reshape(*x.shape[:-1], w.shape[0])
        return y if b is None else y + b

    def backward(self, dy):
        # dx = dy W, dW = dy^T x and db = sum of dy over all rows
        (x, w), dy = self.saved, rows(dy)
        dx = product(self, 0, dy, w) if self.needs[0] else None
        dw = product(self, 1, dy.T, rows(x)) if self.needs[1] else None
        db = dy.sum(axis=0) if self.needs[2] else None
        return dx, dw, db


class Embedding(Op):
    """y = W[ids]          ids (...)   W (V, C)   y (..., C)"""

    def forward(self, ids, w):
        self.save(ids, w.shape[0])
        return kernels.unpack_rows(ids, w) if isinstance(w, Packed) else w[ids]

    def backward(self, dy):
        # dW[i] = sum of dy over the places where ids is i
        (ids, V), total = self.saved, self.so_far(1)
        if total is None:
            return None, kernels.embedding_backward(dy, ids, rows=V)
        kernels.embedding_add(total, dy, ids)
        return None, total


def matmul(a: Any, b: Any) -> Tensor:
    """a @ b: matrices, batches of them (batch axes broadcast), or vectors, as in NumPy.

    Raises ValueError for scalars and where the inner or the batch dimensions do not fit.
    """
    a, b = (x if isinstance(x, Tensor) else Tensor(np.asarray(x)) for x in operands(a, b))
    if not a.ndim or not b.ndim:
        raise ValueError(f"matmul: a {a.shape} @ b {b.shape}: no scalars; use * to multiply by a number")
    if a.shape[-1] != b.shape[-2 if b.ndim > 1 else 0]:
        raise ValueError(f"matmul: inner dimensions differ: a {a.shape} @ b {b.shape}")

    # A vector is a matrix of one row on the left, of one column on the right, and that axis goes away again.
    c = Matmul.apply(
        reshape(a, 1, a.shape[0]) if a.ndim == 1 else a,
        reshape(b, b.shape[0], 1) if b.ndim == 1 else b,
    )
    if a.ndim > 1 and b.ndim > 1:
        return c
    return reshape(c, (*c.shape[: -2 if a.ndim == 1 else -1], *(c.shape[-1:] if b.ndim > 1 else ())))


def weight(w: Any) -> Tensor | Packed:
    """A layer's weight as ops take it."""
    return w if isinstance(w, Packed) else tensor(w)


def linear(x: Any, w: Any, b: Any = None) -> Tensor:
    """x W^T + b          x (..., I)   W (O, I)   b (O,) or None   y (..., O)

    W may be a Packed, which gets no gradient. Raises ValueError where the shapes do not fit.
    """
    x, w = tensor(x), weight(w)
    b = None if b is None else tensor(b)
    x_shape, w_shape = x.shape, w.shape
    if not x_shape or len(w_shape) != 2 or x_shape[-1] != w_shape[1] or (b is not None and b.shape != w_shape[:1]):
        raise ValueError(
            "linear: wants x (..., I), w (O, I) and b (O,), "
            f"got x {x_shape}, w {w_shape} and b {None if b is None else b.shape}"
        )
    return Linear.apply(x, w, b)


def embedding(ids: Any, w: Any) -> Tensor:
    """W[ids]          ids (...) integers   W (V, C)   y (..., C)

    Raises TypeError for ids that are not integers, IndexError for one out of range, ValueError for another W.
    """
    w = weight(w)
    if w.ndim != 2:
        raise ValueError(f"embedding: wants w (V, C), got {w.shape}")
    ids = ids.data if isinstance(ids, Tensor) else ids
    return Embedding.apply(checks.indices("embedding", "ids", ids, w.shape[0]), w)
