"""Attention and its parts: softmax, rotary position embedding, and causal attention as one op.

Formulas and their sources stand in kernels/reference.py and reference_attention.py; here is what each op keeps.
"""

# B batch, T time, S key/value length, H heads, KH key/value heads, D head dim

from __future__ import annotations

from typing import Any

import numpy as np

from entrenar import kernels
from entrenar.ops.elementwise import constant, tensor
from entrenar.ops.shape import transpose
from entrenar.tensor import Op, Tensor


class Softmax(Op):
    """y_i = exp(x_i) / sum_j exp(x_j)          x, y (..., C)"""

    def forward(self, x):
        y = kernels.softmax_forward(x)
        self.save(y)
        return y

    def backward(self, dy):
        return kernels.softmax_backward(dy, *self.saved)


class LogSoftmax(Op):
    """y_i = x_i - log sum_j exp(x_j)          x, y (..., C)"""

    def forward(self, x):
        y = kernels.log_softmax_forward(x)
        self.save(y)
        return y

    def backward(self, dy):
        return kernels.log_softmax_backward(dy, *self.saved)


class Rope(Op):
    """y = each head's halves (x1, x2) turned: (x1 cos - x2 sin, x2 cos + x1 sin)

    x, y (B, T, H, D)   cos, sin (T, D/2), constants
    """

    def forward(self, x, cos, sin):
        self.save(cos, sin)
        return kernels.rope_forward(x, cos, sin)

    def backward(self, dy):
        return kernels.rope_backward(dy, *self.saved), None, None


class Attention(Op):
    """o_t = sum over starts_t <= s <= t + S - T of softmax(scale * q_t k_s) v_s

    q, o (B, T, H, D)   k, v (B, S, KH, D)   starts (B, T), a constant, or None: from the first key on
    """

    def forward(self, q, k, v, *, starts, scale):
        o, lse = kernels.attention_forward(q, k, v, starts, scale=scale)
        # lse (B, H, T) stands for the T x S scores, which backward makes again.
        self.save(q, k, v, o, lse, starts, scale)
        return o

    def backward(self, do):
        *arrays, scale = self.saved
        return kernels.attention_backward(do, *arrays, scale=scale)


def softmax(x: Any, axis: int = -1) -> Tensor:
    """exp(x) to a sum of 1 along an axis; where all is -inf, zeros. Raises ValueError for a scalar."""
    return _along(Softmax, tensor(x), axis)


def log_softmax(x: Any, axis: int = -1) -> Tensor:
    """The logarithm of softmax(x), without forming it. Raises ValueError for a scalar."""
    return _along(LogSoftmax, tensor(x), axis)


def _along(op: type[Op], x: Tensor, axis: int) -> Tensor:
    """`op` works along the last axis; another one is brought there and back."""
    if x.ndim and not -x.ndim <= axis < x.ndim:
        raise ValueError(f"{op.__name__}: no axis {axis} in a tensor of shape {x.shape}")
    if axis in (-1, x.ndim - 1) or not x.ndim:
        return op.apply(x)
    axes = list(range(x.ndim))
    axes[axis], axes[-1] = axes[-1], axes[axis]  # a swap is its own inverse
    return transpose(op.apply(transpose(x, axes)), axes)


def rope(x: Any, cos: Any, sin: Any) -> Tensor:
    """Rotary position embedding: pair i of a head at time t turned by the angle whose cosine is cos[t, i].

    x, y (B, T, H, D)   cos, sin (T, D/2), constants: they get no gradient
    Raises ValueError for shapes that do not fit.
    """
    x = tensor(x)
    return Rope.apply(x, _angles(cos, x.dtype), _angles(sin, x.dtype))


def _angles(angles: Any, dtype: np.dtype) -> np.ndarray:
    if isinstance(angles, np.ndarray) and angles.dtype == dtype:
        return angles
    if not isinstance(angles, Tensor):
        return np.asarray(constant(angles, dtype))
    if angles.requires_grad:
        raise ValueError("rope: cos and sin are constants and get no gradient; pass arrays")
    return angles.data.astype(dtype, copy=False)


def attention(q: Any, k: Any, v: Any, scale: float | None = None, starts: np.ndarray | None = None) -> Tensor:
    """Causal attention: each query sees the keys up to its own time, the last query all of them.

    q, o (B, T, H, D)   k, v (B, S, KH, D), S >= T, KH a divisor of H   scale 1/sqrt(D) unless given
    starts (B, T), integers, for rows of several documents (S = T): the index of the first token of each token's
    document, before which it sees nothing.
    The T x S scores are never stored. Raises ValueError for shapes that do not fit, and what `starts` wants besides.
    """
    q, k, v = tensor(q), tensor(k), tensor(v)
    if scale is None:
        scale = max(q.shape[-1:] or (1,)) ** -0.5 if q.size else 1.0
    return Attention.apply(q, k, v, starts=starts, scale=float(scale))
