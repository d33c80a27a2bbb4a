"""Operations that fold axes away: sum, mean, max. Over all axes by default, over one, or over several."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from entrenar.ops.elementwise import tensor
from entrenar.tensor import Op, Tensor

Axis = int | tuple[int, ...] | None


def _spread(dy: np.ndarray, shape: tuple[int, ...], axis: Axis, keepdims: bool) -> np.ndarray:
    """dy put back along the axes that were folded away          (as a view that repeats it)"""
    if not keepdims and axis is not None:
        dy = np.expand_dims(dy, axis)
    return np.broadcast_to(dy, shape)


class Sum(Op):
    """y = sum of x over axes"""

    def forward(self, x, *, axis, keepdims):
        self.save(x.shape, axis, keepdims)
        return x.sum(axis=axis, keepdims=keepdims)

    def backward(self, dy):
        return _spread(dy, *self.saved)


class Mean(Op):
    """y = sum of x over axes / n, the number of elements folded into one"""

    def forward(self, x, *, axis, keepdims):
        self.save(x.shape, axis, keepdims)
        return x.mean(axis=axis, keepdims=keepdims)

    def backward(self, dy):
        shape = self.saved[0]
        n = math.prod(shape) // (dy.size or 1)  # this file's own max() hides the builtin
        return _spread(dy / (n or 1), *self.saved)


class Max(Op):
    """y = the greatest x over axes; equals share the gradient evenly"""

    def forward(self, x, *, axis, keepdims):
        y = x.max(axis=axis, keepdims=True)
        greatest = x == y
        self.save(greatest, greatest.sum(axis=axis, keepdims=True), axis, keepdims)
        return y if keepdims else y.reshape(()) if axis is None else y.squeeze(axis)

    def backward(self, dy):
        greatest, ties, axis, keepdims = self.saved
        dy = _spread(dy, greatest.shape, axis, keepdims)
        return np.where(greatest, dy / ties.astype(dy.dtype), 0)


def sum(x: Any, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The sum over all axes, or over `axis`; keepdims leaves them with length 1"""
    return Sum.apply(tensor(x), axis=axis, keepdims=keepdims)


def mean(x: Any, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The mean over all axes, or over `axis`; keepdims leaves them with length 1"""
    return Mean.apply(tensor(x), axis=axis, keepdims=keepdims)


def max(x: Any, axis: Axis = None, keepdims: bool = False) -> Tensor:
    """The greatest over all axes, or over `axis`; equals share the gradient. ValueError over no elements."""
    return Max.apply(tensor(x), axis=axis, keepdims=keepdims)
