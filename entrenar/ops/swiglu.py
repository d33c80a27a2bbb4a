"""The gated unit of a LLaMA's feed-forward layer. Formula: kernels/reference.py.

Cheap beside the product that reads it: nobody keeps its output.
"""

from __future__ import annotations

from typing import Any

from entrenar import kernels
from entrenar.ops.elementwise import tensor
from entrenar.tensor import Op, Tensor


class Swiglu(Op):
    """y = silu(gate) * up          gate, up, y one shape"""

    cheap = True

    def forward(self, gate, up):
        self.save(gate, up)
        return kernels.swiglu_forward(gate, up)

    def again(self):
        return kernels.swiglu_forward(*self.saved)

    def backward(self, dy):
        dgate, dup = kernels.swiglu_backward(dy, *self.saved)
        return dgate, dup


def swiglu(gate: Any, up: Any) -> Tensor:
    """silu(gate) * up, in one pass over memory; one shape. Raises ValueError where the shapes differ."""
    return Swiglu.apply(tensor(gate), tensor(up))
