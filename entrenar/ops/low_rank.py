"""A frozen weight and a low-rank update beside it: LoRA and DoRA, each one operation.

    LoRA    W' = W + s B A                                      (Hu et al. 2021)
    DoRA    W' = m (W + s B A) / ||W + s B A||, row by row      (Liu et al. 2024)

W' is never made. W is a frozen Tensor or a Packed: it gets no gradient, and nothing is kept for it. Of the arrays as
large as the output (N, O), forward makes the output alone (DoRA one more, which the magnitude's gradient reads).
"""

# N rows (tokens), I in, O out, r rank, V vocabulary, C channels

from __future__ import annotations

from typing import Any

import numpy as np

from entrenar import kernels
from entrenar.kernels import checks
from entrenar.kernels.packed import Packed
from entrenar.ops.elementwise import tensor
from entrenar.ops.linear import product, rows, times, times_transposed, weight
from entrenar.tensor import Op, Tensor

BLOCK = 1 << 20  # elements of a packed matrix that are floats at a time
ROWS = 64  # of a product of two (N, O) arrays that is summed: they stay in the cache


class LoraLinear(Op):
    """y = x W^T + b + s (z A^T) B^T,   z = dropped, or x where there is none

    x, z (..., I)   W (O, I)   b (O,) or None   A (r, I)   B (O, r)   y (..., O)
    """

    def forward(self, x, w, b, A, B, dropped, *, scale):
        z = x if dropped is None else dropped
        h = kernels.matmul(rows(z), A.T)  # (N, r)
        y = times_transposed(rows(x), w)
        kernels.matmul_add(y, h, (B * scale).T)  # the small one is scaled, never the (N, O) one
        if b is not None:
            y += b
        need_x, _, _, need_A, need_B, need_dropped = self.needs
        self.save(z if need_A else None, h if need_B else None, w if need_x else None,
                  A if need_x or need_dropped else None, B, dropped is None, scale)  # fmt: skip
        return y.reshape(*x.shape[:-1], w.shape[0])

    def backward(self, dy):
        # dh = s dy B, dA = dh^T z, dB = s dy^T h, dz = dh A, dx = dy W (+ dz where z is x)
        z, h, w, A, B, is_x, scale = self.saved
        need_x, _, _, need_A, need_B, need_dropped = self.needs
        dy = rows(dy)
        dh = kernels.matmul(dy, B * scale)
        dA = kernels.matmul(dh.T, rows(z)) if need_A else None
        dB = kernels.matmul(dy.T, h * scale) if need_B else None
        dx = None
        if need_x:
            dx = product(self, 0, dy, w)
            if is_x:
                kernels.matmul_add(rows(dx), dh, A)
        dz = product(self, 5, dh, A) if need_dropped else None
        return dx, None, None, dA, dB, dz


class DoraLinear(Op):
    """y = g u + (x - z) W^T + b,   u = z W^T + s (z A^T) B^T,   g = m / norm

    z is `dropped`, or x where there is none, and then the middle term is not there. As in PEFT: of x W^T itself, only
    the part that DoRA changes is dropped. norm (O,), of the rows of W + s B A, is a constant of the gradient
    (section 4.3 of the paper). m (O,); the others as in LoraLinear.
    """

    def forward(self, x, w, b, A, B, m, dropped, *, norm, scale):
        z = x if dropped is None else dropped
        h = kernels.matmul(rows(z), A.T)
        u = times_transposed(rows(z), w)
        kernels.matmul_add(u, h, (B * scale).T)
        g = m / norm
        y = u * g
        if dropped is not None:
            y += times_transposed(rows(x - z), w)
        if b is not None:
            y += b
        need_x, _, _, need_A, need_B, need_m, need_dropped = self.needs
        self.save(x.shape, z if need_A else None, h if need_B else None, u if need_m else None,
                  w if need_x or need_dropped else None, A if need_x or need_dropped else None, B,
                  dropped is None, g, norm, scale)  # fmt: skip
        return y.reshape(*x.shape[:-1], w.shape[0])

    def backward(self, dy):
        # du = g dy, and from there as in LoraLinear; dm = sum of dy u over the rows, / norm
        x_shape, z, h, u, w, A, B, is_x, g, norm, scale = self.saved
        need_x, _, _, need_A, need_B, need_m, need_dropped = self.needs
        dy = rows(dy)
        du = dy * g
        dh = kernels.matmul(du, B * scale)
        dA = kernels.matmul(dh.T, rows(z)) if need_A else None
        dB = kernels.matmul(du.T, h * scale) if need_B else None
        dm = _column_products(dy, u).astype(dy.dtype) / norm if need_m else None
        dx = dropped = None
        if not is_x and need_x:  # x reaches y through (x - z) W^T alone
            dx = times(dy, w).reshape(x_shape)
        if need_x if is_x else need_dropped:
            dz = times(du if is_x else du - dy, w)
            kernels.matmul_add(dz, dh, A)
            dx, dropped = (dz.reshape(x_shape), None) if is_x else (dx, dz.reshape(x_shape))
        return dx, None, None, dA, dB, dm, dropped


class LoraEmbedding(Op):
    """y = W[ids] + s (A^T)[ids] B^T          ids (...)   W (V, C)   A (r, V)   B (C, r)   y (..., C)"""

    def forward(self, ids, w, A, B, *, scale):
        h = A[:, ids.reshape(-1)].T  # (N, r)
        y = kernels.unpack_rows(ids, w) if isinstance(w, Packed) else w[ids]
        y = y.reshape(-1, w.shape[1]).astype(A.dtype, copy=False)
        kernels.matmul_add(y, h, (B * scale).T)
        self.save(ids, h if self.needs[3] else None, B, A.shape[1], scale)
        return y.reshape(*ids.shape, w.shape[1])

    def backward(self, dy):
        # dh = s dy B, and (dA^T)[i] = sum of dh over the places where ids is i
        ids, h, B, V, scale = self.saved
        dy = rows(dy)
        dA = dB = None
        if self.needs[2]:
            dh = kernels.matmul(dy, B * scale)
            dA = kernels.embedding_backward(dh, ids.reshape(-1), rows=V).T
        if self.needs[3]:
            dB = kernels.matmul(dy.T, h * scale)
        return None, None, dA, dB


def _column_products(dy: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Sum over the rows of dy u, both (N, O) -> (O,) float64; a few rows at a time, always in the same order."""
    total = np.zeros(dy.shape[1])
    for at in range(0, len(dy), ROWS):
        total += (dy[at : at + ROWS] * u[at : at + ROWS]).sum(axis=0)
    return total


def lora_linear(x: Any, w: Any, b: Any, A: Any, B: Any, *, scale: float, dropped: Any = None) -> Tensor:
    """x W^T + b + scale (z A^T) B^T,   z = dropped or x

    x, dropped (..., I)   w (O, I), a Tensor or a Packed   b (O,) or None   A (r, I)   B (O, r)   -> (..., O)
    w and b are frozen. Raises ValueError where they are not, or where the shapes do not fit.
    """
    x, w, b, A, B, dropped = _checked("lora_linear", x, w, b, A, B, dropped)
    return LoraLinear.apply(x, w, b, A, B, dropped, scale=float(scale))


def dora_linear(x: Any, w: Any, b: Any, A: Any, B: Any, m: Any, *, norm: np.ndarray, scale: float,
                dropped: Any = None) -> Tensor:  # fmt: skip
    """m / norm * (z W^T + scale (z A^T) B^T) + (x - z) W^T + b,   z = dropped or x

    m (O,)   norm (O,): `update_norm`, of which no gradient is taken; the others, and what is raised, as `lora_linear`
    """
    x, w, b, A, B, dropped = _checked("dora_linear", x, w, b, A, B, dropped)
    m, norm = tensor(m), np.asarray(norm)
    if m.shape != w.shape[:1] or norm.shape != m.shape:
        raise ValueError(f"dora_linear: wants m and norm of shape {w.shape[:1]}, got {m.shape} and {norm.shape}")
    return DoraLinear.apply(x, w, b, A, B, m, dropped, norm=norm.astype(m.dtype, copy=False), scale=float(scale))


def lora_embedding(ids: Any, w: Any, A: Any, B: Any, *, scale: float) -> Tensor:
    """W[ids] + scale (A^T)[ids] B^T          ids (...) integers   w (V, C), frozen   A (r, V)   B (C, r)   -> (..., C)

    Raises as `embedding` and `lora_linear`.
    """
    w, A, B = weight(w), tensor(A), tensor(B)
    if w.ndim != 2 or A.shape != (A.shape[0], w.shape[0]) or B.shape != (w.shape[1], A.shape[0]):
        raise ValueError(f"lora_embedding: wants w (V, C), A (r, V) and B (C, r), got {w.shape}, {A.shape}, {B.shape}")
    _refuse_trained("lora_embedding", w, None)
    ids = ids.data if isinstance(ids, Tensor) else ids
    return LoraEmbedding.apply(checks.indices("lora_embedding", "ids", ids, w.shape[0]), w, A, B, scale=float(scale))


def _checked(op: str, x: Any, w: Any, b: Any, A: Any, B: Any, dropped: Any) -> tuple[Any, ...]:
    x, w, A, B = tensor(x), weight(w), tensor(A), tensor(B)
    b = None if b is None else tensor(b)
    dropped = None if dropped is None else tensor(dropped)
    fits = x.ndim and w.ndim == 2 and x.shape[-1] == w.shape[1] and (b is None or b.shape == w.shape[:1])
    fits = fits and A.ndim == 2 and A.shape[1] == w.shape[1] and B.shape == (w.shape[0], A.shape[0])
    if not fits or (dropped is not None and dropped.shape != x.shape):
        came = [None if t is None else t.shape for t in (x, w, b, A, B, dropped)]
        raise ValueError(
            f"{op}: wants x (..., I), w (O, I), b (O,), A (r, I), B (O, r) and dropped as x, got {came[0]}, {came[1]}, "
            f"{came[2]}, {came[3]}, {came[4]} and {came[5]}"
        )
    _refuse_trained(op, w, b)
    return x, w, b, A, B, dropped


def _refuse_trained(op: str, w: Any, b: Any) -> None:
    if w.requires_grad or (b is not None and b.requires_grad):
        raise ValueError(f"{op}: w and b get no gradient here: freeze them (requires_grad = False)")


# The norm of W + s B A, without making it


def row_squares(w: np.ndarray | Packed, axis: int = 1) -> np.ndarray:
    """||w_o||^2 of every row of w (O, I), or of every column (axis 0), float64; w is looked at by blocks of rows."""
    O, I = w.shape  # noqa: E741
    total = np.zeros(w.shape[1 - axis])
    step = max(1, BLOCK // max(1, I))
    for at in range(0, O, step):
        part = slice(at, min(at + step, O))
        block = kernels.unpack_rows(np.arange(part.start, part.stop), w) if isinstance(w, Packed) else w[part]
        squares = np.square(block, dtype=np.float64).sum(axis=axis)
        if axis == 1:
            total[part] = squares
        else:
            total += squares
    return total


def update_norm(squares: np.ndarray, aw: np.ndarray, A: np.ndarray, B: np.ndarray, *, scale: float) -> np.ndarray:
    """||W_o + s B_o A|| for each row o of W (O, I), float64

        ||W_o||^2 + 2 s B_o . (A W_o^T) + s^2 B_o (A A^T) B_o^T

    squares (O,) = row_squares(W)   aw (r, O) = A W^T   A (r, I)   B (O, r)
    At least the smallest float: a row of zeros has a magnitude of 0 too, and is to stay 0.
    """
    A, B = A.astype(np.float64, copy=False), B.astype(np.float64, copy=False)
    cross = (B * aw.T).sum(axis=1)  # not einsum, whose order of summing depends on where arrays lie
    own = ((B @ (A @ A.T)) * B).sum(axis=1)
    total = squares + 2 * scale * cross + scale * scale * own
    return np.sqrt(np.maximum(total, np.finfo(np.float32).tiny))
