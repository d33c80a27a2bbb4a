"""Dropout: the one operation that draws random numbers, from entrenar.random."""

from __future__ import annotations

from typing import Any

import numpy as np

from entrenar import random
from entrenar.ops.elementwise import tensor
from entrenar.tensor import Op, Tensor


class Dropout(Op):
    """y = x * keep / (1 - p),   keep = 1 with probability 1 - p, else 0          any shape

    Dividing by 1 - p keeps the expected value, so that nothing has to be scaled when dropout is off.
    Srivastava et al., "Dropout", 2014.
    """

    def forward(self, x, *, p):
        keep = random.generator().random(x.shape, np.float32) >= p
        self.save(keep, p)
        return np.where(keep, x / (1 - p), 0)

    def backward(self, dy):
        keep, p = self.saved
        return np.where(keep, dy / (1 - p), 0)


def dropout(x: Any, p: float, training: bool = True) -> Tensor:
    """Each element 0 with probability p, else scaled by 1 / (1 - p); x itself if p is 0 or training False.

    Raises ValueError for p outside 0 <= p < 1.
    """
    if not 0 <= p < 1:
        raise ValueError(f"dropout: p is {p}: wanted a probability 0 <= p < 1")
    return Dropout.apply(tensor(x), p=float(p)) if training and p > 0 else tensor(x)
