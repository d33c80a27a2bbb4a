"""Layers: parameters with a forward. A Module is a tree of named tensors; names are the keys of its checkpoint.

Leaves out: everything that knows what a LLaMA is (`entrenar/llama`), and how parameters are updated (`optim.py`).
"""

# B batch, T time, I features in, O features out, C channels, V vocabulary

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from entrenar import kernels, ops, random
from entrenar.kernels.packed import Packed
from entrenar.ops.linear import in_use
from entrenar.ops.loss import Reduction
from entrenar.state import check_fits
from entrenar.tensor import Tensor, current_watcher, is_recording


class Module:
    """A tree: tensors that require a gradient are its parameters, modules (and lists and dicts of them) its children.

    Attribute names, joined by dots, are the names of the parameters: `model.layers.0.mlp.up_proj.weight`.
    """

    training = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if (watcher := current_watcher()) is not None:
            with watcher.inside(self):
                return self.forward(*args, **kwargs)
        return self.forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"{type(self).__name__} must define forward()")

    def children(self) -> Iterator[tuple[str, Module]]:
        """(name, module) one level down, in the order of definition; the items of a list or dict count one by one."""
        for name, value in self._attributes():
            if isinstance(value, Module):
                yield name, value

    def _attributes(self) -> Iterator[tuple[str, Any]]:
        for name, value in vars(self).items():
            if isinstance(value, (list, tuple, dict)):
                items = value.items() if isinstance(value, dict) else enumerate(value)
                yield from ((f"{name}.{key}", item) for key, item in items)
            else:
                yield name, value

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of every parameter of the tree, each tensor once, under its first name."""
        seen: set[int] = set()
        for name, tensor in self._named_tensors(prefix):
            if tensor.requires_grad and id(tensor) not in seen:
                seen.add(id(tensor))
                yield name, tensor

    def parameters(self) -> list[Tensor]:
        return [tensor for _, tensor in self.named_parameters()]

    def _named_tensors(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        for name, value in self._attributes():
            if isinstance(value, Tensor):
                yield prefix + name, value
        for name, child in self.children():
            yield from child._named_tensors(f"{prefix}{name}.")

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """(name, module) of every module below this one, parents before their children."""
        for name, child in self.children():
            yield prefix + name, child
            yield from child.named_modules(f"{prefix}{name}.")

    def named_packed(self) -> Iterator[tuple[str, Packed]]:
        """(name, matrix) of every weight that is frozen in a storage format; `state_dict` has the others."""
        for path, module in self.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, Packed):
                    yield f"{path}.{name}", value

    def freeze(self) -> None:
        """No tensor of the tree requires a gradient any more: none is computed, no input is kept for it."""
        for _, tensor in self._named_tensors():
            tensor.requires_grad, tensor.grad = False, None

    def zero_grad(self) -> None:
        """Forget every gradient."""
        for tensor in self.parameters():
            tensor.grad = None

    def train(self, mode: bool = True) -> Module:
        """Training behaviour (dropout on) for the whole tree; `eval()` is the opposite."""
        self.training = mode
        for _, child in self.children():
            child.train(mode)
        return self

    def eval(self) -> Module:
        return self.train(False)

    def state_dict(self) -> dict[str, np.ndarray]:
        """Every tensor by name: the arrays themselves, not copies."""
        return {name: tensor.data for name, tensor in self._named_tensors()}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Copy arrays into the tensors of these names, converting to each tensor's own type.

        Raises ValueError, before anything is changed, with every missing, unexpected and misshapen name at once.
        """
        own = dict(self._named_tensors())
        check_fits(f"{type(self).__name__}.load_state_dict", state, {name: tensor.data for name, tensor in own.items()})
        for name, tensor in own.items():
            tensor.data[...] = state[name]


class _Making(threading.local):
    unfilled = False


_making = _Making()


@contextlib.contextmanager
def unfilled() -> Iterator[None]:
    """Inside, in this thread, parameters are made without values: right in shape and type, read-only, without memory.

    For models whose weights come from elsewhere: give each parameter its `data` before it is used. Nothing is drawn
    from `entrenar.random`.
    """
    before, _making.unfilled = _making.unfilled, True
    try:
        yield
    finally:
        _making.unfilled = before


def normal(*shape: int, std: float, dtype: Any = np.float32) -> Tensor:
    """A parameter drawn from N(0, std^2) out of `entrenar.random`."""
    if _making.unfilled:
        return constant(*shape, value=0, dtype=dtype)
    values = random.generator().standard_normal(shape, dtype=np.float32)
    return Tensor((values * np.float32(std)).astype(dtype, copy=False), requires_grad=True)


def constant(*shape: int, value: float, dtype: Any = np.float32) -> Tensor:
    """A parameter with `value` everywhere."""
    if _making.unfilled:  # one zero, shown everywhere
        return Tensor(np.broadcast_to(np.zeros((), dtype), shape), requires_grad=True)
    return Tensor(np.full(shape, value, dtype), requires_grad=True)


class Linear(Module):
    """y = x W^T + b          x (..., I)   weight W (O, I)   bias b (O,) or None   y (..., O)

    W is drawn from N(0, std^2), std = 1/sqrt(I) unless given; b starts at zero. A weight that is frozen in a storage
    format is a Packed, here and in Embedding: assign it.
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False, std: float | None = None,
                 dtype: Any = np.float32) -> None:  # fmt: skip
        self.weight: Tensor | Packed = normal(outputs, inputs, std=inputs**-0.5 if std is None else std, dtype=dtype)
        self.bias = constant(outputs, value=0, dtype=dtype) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)

    def cross_entropy(self, x: Tensor, targets: np.ndarray, *, reduction: Reduction = "mean") -> Tensor:
        """The loss of y as logits against targets (N,), -100 ignored, in the memory of a few rows of them.  x (N, I)"""
        if self.bias is not None:
            return ops.cross_entropy(self(x), targets, reduction=reduction)
        return ops.linear_cross_entropy(x, self.weight, targets, reduction=reduction)


def side_by_side(x: Tensor, *layers: Module, width: int | None = None) -> list[Tensor]:
    """[layer(x) for layer in layers], bit for bit: several that read one x. With a width, cut into (..., n, width).

    Where `unnoticed` one kernel does them all: to write one token, waking the threads costs about as much as a small
    product.
    """
    weights = unnoticed(x, *layers)
    if not weights:
        ys = [layer(x) for layer in layers]
        return ys if width is None else [y.reshape(*y.shape[:-1], -1, width) for y in ys]
    before, channels = x.shape[:-1], x.shape[-1]
    arrays = kernels.packed_linears(x.data.reshape(-1, channels), weights)
    return [Tensor(y.reshape(*before, *((y.shape[1],) if width is None else (-1, width)))) for y in arrays]


def unnoticed(x: Tensor, *layers: Module) -> list[Packed]:
    """The layers' weights, where one kernel for several of them will not be missed as several operations; else none.

    That is where all are plain, frozen in a storage format, and neither recorded nor watched.
    """
    if (is_recording() and x.requires_grad) or current_watcher() is not None:
        return []
    plain = [layer for layer in layers if type(layer) is Linear and layer.bias is None]
    weights = [in_use(layer.weight) for layer in plain if isinstance(layer.weight, Packed)]
    return weights if len(weights) == len(layers) else []


class Embedding(Module):
    """y = W[ids]             ids (...) integers in 0..V-1   weight W (V, C)   y (..., C)"""

    def __init__(self, rows: int, channels: int, *, std: float = 0.02, dtype: Any = np.float32) -> None:
        self.weight: Tensor | Packed = normal(rows, channels, std=std, dtype=dtype)

    def forward(self, ids: np.ndarray) -> Tensor:
        return ops.embedding(ids, self.weight)


class RMSNorm(Module):
    """y = x / sqrt(mean(x^2) + eps) * w          x, y (..., C)   weight w (C,)

    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
    """

    def __init__(self, channels: int, *, eps: float = 1e-6, dtype: Any = np.float32) -> None:
        self.weight = constant(channels, value=1, dtype=dtype)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, eps=self.eps)


class LayerNorm(Module):
    """y = (x - mean(x)) / sqrt(var(x) + eps) * w + b          x, y (..., C)   weight w, bias b (C,)"""

    def __init__(self, channels: int, *, eps: float = 1e-5, dtype: Any = np.float32) -> None:
        self.weight = constant(channels, value=1, dtype=dtype)
        self.bias = constant(channels, value=0, dtype=dtype)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, eps=self.eps)


class Dropout(Module):
    """In training each element is zeroed with probability p, the others grow by 1/(1-p); otherwise y = x."""

    def __init__(self, p: float) -> None:
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return ops.dropout(x, self.p, training=self.training)
