"""softmax and its logarithm in plain NumPy: the specification of those in C, as reference.py is. Besides, what other
kernels of the reference stand on: `log_sum_exp` (attention, the loss) and `silent`.
"""

# C channels

from __future__ import annotations

import numpy as np

from entrenar.kernels import checks

Array = np.ndarray


def silent() -> np.errstate:
    """Inside, inf and nan arise without NumPy's warnings, as they do in C."""
    return np.errstate(over="ignore", under="ignore", divide="ignore", invalid="ignore")


def softmax_forward(x: Array) -> Array:
    """y_i = exp(x_i) / sum_j exp(x_j), over the last axis          x, y (..., C)

    The greatest x is subtracted first, so that no exp overflows. A row of -inf only is zeros.
    """
    checks.rows("softmax", x)
    with silent():
        e = np.exp(x - _shift(x))
        total = e.sum(axis=-1, keepdims=True)
        return e / np.where(total == 0, 1, total)


def softmax_backward(dy: Array, y: Array) -> Array:
    """dx = y * (dy - sum(dy * y))          dy, y, dx (..., C)"""
    # dy_i/dx_j = y_i (1[i = j] - y_j): dx_j = y_j dy_j - y_j sum_i dy_i y_i
    checks.rows("softmax_backward", y)
    checks.same_shape("softmax_backward", "dy y", dy, y)
    with silent():
        return y * (dy - (dy * y).sum(axis=-1, keepdims=True))


def log_softmax_forward(x: Array) -> Array:
    """y_i = x_i - log sum_j exp(x_j), over the last axis          x, y (..., C)

    The logarithm of softmax_forward; so a row of -inf only stays -inf.
    """
    checks.rows("log_softmax", x)
    with silent():
        shifted = x - _shift(x)
        total = np.exp(shifted).sum(axis=-1, keepdims=True)
        return shifted - np.log(np.where(total == 0, 1, total))


def log_softmax_backward(dy: Array, y: Array) -> Array:
    """dx = dy - exp(y) * sum(dy)          dy, y, dx (..., C)"""
    checks.rows("log_softmax_backward", y)
    checks.same_shape("log_softmax_backward", "dy y", dy, y)
    with silent():
        return dy - np.exp(y) * dy.sum(axis=-1, keepdims=True)


def _shift(x: Array) -> Array:
    """The greatest of each row, (..., 1); 0 where that is -inf, for -inf - -inf is nan."""
    greatest = x.max(axis=-1, keepdims=True, initial=-np.inf)
    return np.where(greatest == -np.inf, 0, greatest)


def log_sum_exp(x: Array) -> Array:
    """log sum_j exp(x_j)          x (..., C) -> (...)"""
    shift = _shift(x)
    return (np.log(np.exp(x - shift).sum(axis=-1, keepdims=True)) + shift)[..., 0]
