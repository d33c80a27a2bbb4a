"""Every differentiable operation, in rising difficulty: elementwise, shape, reduce, linear, norm, swiglu,
attention, loss, dropout; and checkpoint, which trades time for memory.

`METHODS` below is all there is to `x + y`, `x @ w`, `x[0]` and `x.sum()`. Comparisons (< <= > >=) give plain
NumPy arrays of bools, for where() and for indexing; == and != compare identity, so that tensors can be keys
of a dictionary: write x.data == y.data to compare elements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from entrenar.ops.attention import attention, log_softmax, rope, softmax
from entrenar.ops.checkpoint import checkpoint
from entrenar.ops.dropout import dropout
from entrenar.ops.elementwise import (
    add,
    div,
    exp,
    gelu,
    log,
    maximum,
    minimum,
    mul,
    neg,
    pow,
    relu,
    sigmoid,
    silu,
    sqrt,
    sub,
    tanh,
    where,
)
from entrenar.ops.linear import embedding, linear, matmul
from entrenar.ops.loss import cross_entropy, linear_cross_entropy
from entrenar.ops.low_rank import dora_linear, lora_embedding, lora_linear
from entrenar.ops.norm import layer_norm, rms_norm
from entrenar.ops.reduce import max, mean, sum
from entrenar.ops.shape import broadcast_to, concat, getitem, iterate, reshape, split, stack, transpose
from entrenar.ops.swiglu import swiglu
from entrenar.tensor import Tensor

__all__ = [
    "add", "sub", "mul", "div", "neg", "pow",
    "exp", "log", "sqrt", "tanh", "sigmoid", "relu", "silu", "gelu",
    "maximum", "minimum", "where",
    "sum", "mean", "max",
    "reshape", "transpose", "getitem", "concat", "stack", "split", "broadcast_to",
    "matmul", "linear", "embedding", "lora_linear", "dora_linear", "lora_embedding",
    "softmax", "log_softmax", "layer_norm", "rms_norm", "rope", "swiglu", "attention",
    "dropout", "cross_entropy", "linear_cross_entropy", "checkpoint",
]  # fmt: skip


def _compare(holds: np.ufunc) -> Callable[[Tensor, Any], np.ndarray]:
    return lambda x, y: holds(x.data, y.data if isinstance(y, Tensor) else y)


METHODS: dict[str, Any] = {
    "__add__": add,        "__radd__": lambda x, y: add(y, x),
    "__sub__": sub,        "__rsub__": lambda x, y: sub(y, x),
    "__mul__": mul,        "__rmul__": lambda x, y: mul(y, x),
    "__truediv__": div,    "__rtruediv__": lambda x, y: div(y, x),
    "__pow__": pow,        "__rpow__": lambda x, y: pow(y, x),
    "__matmul__": matmul,  "__rmatmul__": lambda x, y: matmul(y, x),
    "__neg__": neg,

    "__lt__": _compare(np.less),     "__le__": _compare(np.less_equal),
    "__gt__": _compare(np.greater),  "__ge__": _compare(np.greater_equal),

    "exp": exp, "log": log, "sqrt": sqrt, "tanh": tanh,
    "sigmoid": sigmoid, "relu": relu, "silu": silu, "gelu": gelu,

    "sum": sum, "mean": mean, "max": max,

    "__getitem__": getitem, "__iter__": iterate,
    "reshape": reshape, "transpose": transpose, "T": property(transpose),
}  # fmt: skip

for _name, _method in METHODS.items():
    setattr(Tensor, _name, _method)
