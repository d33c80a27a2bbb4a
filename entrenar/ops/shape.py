"""Operations that move elements and change none: reshape, transpose, index, concat, stack, split, broadcast.

Forward is NumPy's, so a result may be a view of its input's memory, and errors about shapes and indices are
NumPy's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from entrenar.ops.elementwise import tensor, unbroadcast
from entrenar.tensor import Op, Tensor


class Reshape(Op):
    """y = x in another shape, in C order"""

    def forward(self, x, *, shape):
        self.save(x.shape)
        return x.reshape(shape)

    def backward(self, dy):
        (shape,) = self.saved
        return dy.reshape(shape)


class Transpose(Op):
    """y[.., i_axes[k], ..] = x[.., i_k, ..]: axis k of y is axis axes[k] of x"""

    def forward(self, x, *, axes):
        self.save(axes)
        return x.transpose(axes)

    def backward(self, dy):
        # argsort inverts the permutation
        (axes,) = self.saved
        return dy.transpose(np.argsort(axes) if axes is not None else None)


class GetItem(Op):
    """y = x[key]"""

    def forward(self, x, *, key):
        self.save(key, x.shape)
        return x[key]

    def backward(self, dy):
        # dx is 0 but at the key; an element read twice gets the sum, which plain assignment would lose
        key, shape = self.saved
        dx = np.zeros(shape, dy.dtype)
        if _may_repeat(key):
            np.add.at(dx, key, dy)
        else:
            dx[key] = dy
        return dx


def _may_repeat(key: Any) -> bool:
    """Whether `key` can name an element twice: arrays of integers can; slices, numbers and masks cannot."""
    parts = key if isinstance(key, tuple) else (key,)
    return any(isinstance(part, (list, np.ndarray)) and np.asarray(part).dtype != bool for part in parts)


class Concat(Op):
    """y = the x_i one after the other along an axis          they agree in every other axis"""

    def forward(self, *xs, axis):
        y = np.concatenate(xs, axis=axis)
        self.save(np.cumsum([x.shape[axis] for x in xs])[:-1], axis)
        return y

    def backward(self, dy):
        ends, axis = self.saved
        return tuple(np.split(dy, ends, axis=axis))


class Stack(Op):
    """y[i] = x_i, along a new axis          the x_i of one shape"""

    def forward(self, *xs, axis):
        self.save(axis)
        return np.stack(xs, axis=axis)

    def backward(self, dy):
        (axis,) = self.saved
        return tuple(np.moveaxis(dy, axis, 0))


class BroadcastTo(Op):
    """y = x repeated to `shape`"""

    def forward(self, x, *, shape):
        self.save(x.shape)
        return np.broadcast_to(x, shape)

    def backward(self, dy):
        (shape,) = self.saved
        return unbroadcast(dy, shape)


def reshape(x: Any, *shape: Any) -> Tensor:
    """x in another shape, one length may be -1: reshape(x, 2, 3) or reshape(x, (2, 3))"""
    return Reshape.apply(tensor(x), shape=_unpacked(shape))


def transpose(x: Any, *axes: Any) -> Tensor:
    """x with its axes reversed, or in the given order: transpose(x, 0, 2, 1) or transpose(x, (0, 2, 1))"""
    x = tensor(x)
    axes = _unpacked(axes)
    if axes in ((), None):
        return Transpose.apply(x, axes=None)
    return Transpose.apply(x, axes=tuple(axis % x.ndim if -x.ndim <= axis < 0 else axis for axis in axes))


def getitem(x: Any, key: Any) -> Tensor:
    """x[key]: numbers, slices, None, ..., integer arrays and boolean masks, as in NumPy"""
    return GetItem.apply(tensor(x), key=key)


def concat(tensors: Sequence[Any], axis: int = 0) -> Tensor:
    """The tensors one after the other along an existing axis. Raises ValueError for an empty list."""
    return Concat.apply(*_together("concat", tensors), axis=axis)


def stack(tensors: Sequence[Any], axis: int = 0) -> Tensor:
    """The tensors side by side along a new axis. Raises ValueError for an empty list."""
    return Stack.apply(*_together("stack", tensors), axis=axis)


def split(x: Any, sections: int | Sequence[int], axis: int = 0) -> list[Tensor]:
    """The parts of x along an axis, as np.split: `sections` equal parts, or cut at the given places.

    Raises ValueError where the axis does not divide into equal parts.
    """
    x = tensor(x)
    length = x.shape[axis]
    if isinstance(sections, int):
        if sections < 1 or length % sections:
            raise ValueError(
                f"split: axis {axis} of length {length} does not divide into {sections} equal parts; "
                "give a list of places to cut at instead"
            )
        sections = range(length // sections, length, length // sections) if length else [0] * (sections - 1)
    before = (slice(None),) * (axis % x.ndim)
    starts, ends = [0, *sections], [*sections, length]
    return [getitem(x, (*before, slice(start, end))) for start, end in zip(starts, ends, strict=True)]


def broadcast_to(x: Any, shape: Sequence[int]) -> Tensor:
    """x repeated along new axes and axes of length 1; no memory is copied"""
    return BroadcastTo.apply(tensor(x), shape=tuple(shape))


def iterate(x: Tensor) -> Iterator[Tensor]:
    """x[0], x[1], ...: what `for row in x` yields"""
    return (x[i] for i in range(len(x)))


def _unpacked(arguments: tuple[Any, ...]) -> Any:
    one_sequence = len(arguments) == 1 and not isinstance(arguments[0], (int, np.integer))
    return arguments[0] if one_sequence else arguments


def _together(op: str, tensors: Sequence[Any]) -> list[Any]:
    if not len(tensors):
        raise ValueError(f"{op}: wants at least one tensor, got none")
    first = next((x for x in tensors if isinstance(x, Tensor)), None)
    if first is None:
        return [Tensor(x) for x in tensors]
    return [x if isinstance(x, Tensor) else np.asarray(x, first.dtype) for x in tensors]
