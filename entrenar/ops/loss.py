"""The loss of a language model: cross_entropy, and linear_cross_entropy, which never holds all the logits."""

# N tokens, C channels, V vocabulary

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from entrenar import kernels
from entrenar.ops.elementwise import tensor
from entrenar.ops.linear import rows, weight
from entrenar.tensor import Op, Tensor

Reduction = Literal["mean", "sum"]


class CrossEntropy(Op):
    """loss = weight * sum_n (log sum_v exp(logits[n, v]) - logits[n, target_n]), over rows not ignored

    logits (..., V)   targets (...)   weight 1, or for the mean 1 / (rows not ignored)
    """

    def forward(self, logits, targets, *, ignore_index, weight):
        flat, targets = rows(logits), targets.reshape(-1)
        losses, lse = kernels.cross_entropy_forward(flat, targets, ignore_index=ignore_index)
        self.save(logits, targets, lse, ignore_index, weight)
        return _total(losses, weight)

    def backward(self, dloss):
        # dlogits = weight * dloss * (softmax(logits) - onehot(target))
        logits, targets, lse, ignore_index, weight = self.saved
        dlosses = np.full(lse.shape, dloss * weight, lse.dtype)
        dlogits = kernels.cross_entropy_backward(
            dlosses, rows(logits), targets, lse, ignore_index=ignore_index
        )
        return dlogits.reshape(logits.shape), None


class LinearCrossEntropy(Op):
    """loss = cross_entropy(x W^T, targets)          x (..., C)   W (V, C)   targets (...)

    The gradients are made in forward, chunk by chunk, while each chunk's logits are there; here they wait.
    """

    def forward(self, x, w, targets, *, ignore_index, weight):
        losses, dx, dw = kernels.linear_cross_entropy(
            rows(x),
            w,
            targets.reshape(-1),
            ignore_index=ignore_index,
            scale=weight,
            need_dx=self.needs[0],
            need_dw=self.needs[1],
        )
        self.save(None if dx is None else dx.reshape(x.shape), dw)
        return _total(losses, weight)

    def backward(self, dloss):
        (dx, dw), self.saved = self.saved, ()  # made here and handed over, not kept: they may change in place
        for d in (dx, dw):
            if d is not None and dloss != 1:
                np.multiply(d, dloss, out=d)
        return dx, dw, None


def cross_entropy(
    logits: Any, targets: Any, ignore_index: int = -100, reduction: Reduction = "mean"
) -> Tensor:
    """The mean (or the sum) of -log softmax(logits)[target], over the targets that are not ignore_index.

    logits (..., V)   targets (...) integers   loss ()
    The mean over no targets is 0, and so is its gradient. Raises ValueError for shapes that do not fit or
    another reduction, TypeError for targets that are not integers, IndexError for one outside the vocabulary.
    """
    logits, targets = tensor(logits), _integers(targets)
    if targets.shape != logits.shape[:-1] or not logits.ndim:
        raise ValueError(
            f"cross_entropy: wants logits (..., V) and targets (...), got {logits.shape} and {targets.shape}"
        )
    weight = _weight("cross_entropy", targets, ignore_index, reduction)
    return CrossEntropy.apply(logits, targets, ignore_index=ignore_index, weight=weight)


def linear_cross_entropy(
    x: Any, w: Any, targets: Any, ignore_index: int = -100, reduction: Reduction = "mean"
) -> Tensor:
    """cross_entropy(linear(x, w), targets), in the memory of a few rows of logits instead of all.

    x (..., C)   w (V, C), a Tensor or a Packed   targets (...) integers   loss ()          Raises as cross_entropy.
    """
    x, w, targets = tensor(x), weight(w), _integers(targets)
    if targets.shape != x.shape[:-1] or not x.ndim or w.ndim != 2 or w.shape[1] != x.shape[-1]:
        raise ValueError(
            "linear_cross_entropy: wants x (..., C), w (V, C) and targets (...), "
            f"got {x.shape}, {w.shape} and {targets.shape}"
        )
    share = _weight("linear_cross_entropy", targets, ignore_index, reduction)
    return LinearCrossEntropy.apply(x, w, targets, ignore_index=ignore_index, weight=share)


def _integers(targets: Any) -> np.ndarray:
    return targets.data if isinstance(targets, Tensor) else np.asarray(targets)


def _weight(op: str, targets: np.ndarray, ignore_index: int, reduction: str) -> float:
    if reduction not in ("mean", "sum"):
        raise ValueError(f"{op}: reduction is {reduction!r}: wanted 'mean' or 'sum'")
    if reduction == "sum":
        return 1.0
    return 1.0 / max(int(np.count_nonzero(targets != ignore_index)), 1)


def _total(losses: np.ndarray, weight: float) -> np.ndarray:
    """The weighted sum, added up in float64: a batch of 100,000 tokens would lose digits in float32"""
    return np.asarray(losses.sum(dtype=np.float64) * weight, losses.dtype)
