"""Normalisation of each row: layer_norm, and LLaMA's simpler rms_norm. Formulas: kernels/reference.py.

Both are cheap beside the products that read them: nobody keeps their outputs.
"""

# C channels

from __future__ import annotations

from typing import Any

from entrenar import kernels
from entrenar.ops.elementwise import tensor
from entrenar.tensor import Op, Tensor


class LayerNorm(Op):
    """y = (x - mean(x)) / sqrt(var(x) + eps) * w + b          x, y (..., C)   w, b (C,)"""

    cheap = True

    def forward(self, x, w, b, *, eps):
        y, mean, rstd = kernels.layer_norm_forward(x, w, b, eps=eps)
        self.save(x, w, b, mean, rstd, eps)
        return y

    def again(self):
        x, w, b, _, _, eps = self.saved
        return kernels.layer_norm_forward(x, w, b, eps=eps)[0]

    def backward(self, dy):
        x, w, _, mean, rstd, _ = self.saved
        return kernels.layer_norm_backward(dy, x, w, mean, rstd)


class RMSNorm(Op):
    """y = x / sqrt(mean(x^2) + eps) * w          x, y (..., C)   w (C,)"""

    cheap = True

    def forward(self, x, w, *, eps):
        y, rstd = kernels.rms_norm_forward(x, w, eps=eps)
        self.save(x, w, rstd, eps)
        return y

    def again(self):
        x, w, _, eps = self.saved
        return kernels.rms_norm_forward(x, w, eps=eps)[0]

    def backward(self, dy):
        x, w, rstd, _ = self.saved
        return kernels.rms_norm_backward(dy, x, w, rstd)


def layer_norm(x: Any, w: Any, b: Any, eps: float = 1e-5) -> Tensor:
    """Each row to mean 0 and variance 1, then scaled by w and moved by b.

    x, y (..., C)   w, b (C,)          Raises ValueError for shapes that do not fit.
    """
    return LayerNorm.apply(tensor(x), tensor(w), tensor(b), eps=eps)


def rms_norm(x: Any, w: Any, eps: float = 1e-6) -> Tensor:
    """Each row to mean square 1, then scaled by w.

    x, y (..., C)   w (C,)          Raises ValueError for shapes that do not fit.
    """
    return RMSNorm.apply(tensor(x), tensor(w), eps=eps)
