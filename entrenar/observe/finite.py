"""Finding where a value stopped being a number: the first op, layer and token of a step whose loss is nan or inf.

A step that failed is computed again, slowly, with a look at everything that passes through the engine's two doors.
The first result that is not finite although all that went into it was is the culprit; everything after it inherits.
"""

# B batch, T time, C channels

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from entrenar import kernels
from entrenar.data import IGNORE, Batch
from entrenar.llama import Llama
from entrenar.nn import Module
from entrenar.tensor import Op, Tensor, no_grad, watched

Place = Callable[[int, int], str]  # row and time of a batch's token -> where it comes from, in words


class NonFinite(ArithmeticError):
    """An operation made a value that is not finite; `index` is where in its result, None where that says nothing."""

    def __init__(self, op: str, layer: str, way: str, value: float, shape: tuple[int, ...],
                 index: tuple[int, ...]) -> None:  # fmt: skip
        self.op, self.layer, self.way, self.value, self.shape, self.index = op, layer, way, value, shape, index
        super().__init__(f"{value} made by {op} in {layer} ({way})")


class FiniteWatch:
    """A watcher (tensor.py) that raises NonFinite at the first result, forward or backward, that is not finite."""

    def __init__(self, model: Module) -> None:
        self.names = {id(module): name for name, module in model.named_modules()} | {id(model): "the model"}
        self.stack = ["the model"]
        self.layers: dict[int, str] = {}  # an op's number at birth -> the layer it was born in

    @contextlib.contextmanager
    def inside(self, module: Module) -> Iterator[None]:
        self.stack.append(self.names.get(id(module), type(module).__name__))
        try:
            yield
        finally:
            self.stack.pop()

    def forward(self, op: Op, inputs: Sequence[Any], out: Tensor) -> None:
        self.layers[op.born] = self.stack[-1]
        self._check(op, self.stack[-1], "forward", out.data)

    def backward(self, op: Op, dout: np.ndarray, grads: Any) -> None:
        layer = self.layers.get(op.born, "the model")
        for grad, edge in zip(grads, op.edges or (), strict=True) if isinstance(grads, (tuple, list)) else ():
            if grad is not None:
                # The gradient of a parameter has no row per token, whatever its shape.
                self._check(op, layer, "backward", np.asarray(grad), per_token=not isinstance(edge, Tensor))

    def _check(self, op: Op, layer: str, way: str, array: np.ndarray, *, per_token: bool = True) -> None:
        # A sum is finite where all its terms are, and cheap; only one that is not is worth a closer look.
        if not np.isfinite(array.sum(dtype=np.float64)) and (index := first_nonfinite(array)) is not None:
            place = (array.shape, index) if per_token else ((), ())
            raise NonFinite(op.name, layer, way, float(array[index]), *place)


@dataclass(frozen=True)
class Replay:
    """The micro-batches of the step that failed, and for each the places its tokens came from."""

    micro_batches: Sequence[Batch]
    places: Sequence[Place]


def explain(model: Llama, replay: Replay) -> str:
    """Compute the step again with checks on; one sentence about the first value that is not finite.

    Changes the gradients (the step has failed: nobody wants them any more), never the weights.
    """
    for name, tensor in model.named_parameters():
        if bad := int((~np.isfinite(tensor.data)).sum()):
            return f"the weights themselves are not finite: {name} has {bad:,} of {tensor.size:,} values"
    model.zero_grad()
    tokens = sum(batch.trained for batch in replay.micro_batches)
    for number, batch in enumerate(replay.micro_batches):
        try:
            with watched(FiniteWatch(model)), np.errstate(all="ignore"):
                loss = model.loss(batch.ids, batch.targets, starts=batch.starts, reduction="sum")
                # As the trainer scales it: gradients `tokens` times as large would overflow where the step's did not
                loss.backward(np.full(loss.shape, 1 / max(1, tokens), loss.dtype))
        except NonFinite as found:
            return _sentence(model, replay, number, found)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, grad in grads.items():
        if first_nonfinite(grad) is not None:
            return f"every operation was finite, but the sum of the gradients of {name} over micro-batches is not"
    name = max(grads, key=lambda name: kernels.sum_of_squares(grads[name]), default="none")
    return f"computed again, every value is finite; the longest gradient is that of {name}"


def first_nonfinite(array: np.ndarray) -> tuple[int, ...] | None:
    """The index of the first value (in C order) that is nan or inf."""
    finite = np.isfinite(array)
    if finite.all():
        return None
    return tuple(int(i) for i in np.unravel_index(int(finite.argmin()), array.shape))


def _sentence(model: Llama, replay: Replay, number: int, found: NonFinite) -> str:
    batch = replay.micro_batches[number]
    what = f"the first value that is not finite is {found.value}, made by {found.op} in {found.layer} ({found.way})"
    at = _token(found, batch.ids.shape)
    if at is None and not found.shape and found.way == "forward":
        at = _worst_token(model, batch)  # of the loss, which is one number for all tokens
    if at is None:
        return f"{what}, in micro-batch {number + 1}"
    row, time = at
    return (
        f"{what}, in micro-batch {number + 1}, row {row + 1}, token {time + 1} (id {int(batch.ids[row, time])}): "
        f"{replay.places[number](row, time)}"
    )


def _token(found: NonFinite, shape: tuple[int, ...]) -> tuple[int, int] | None:
    """The row and time of a result's index, where the result has a row per token: (B, T, ...) or (B T, ...)."""
    B, T = shape
    if found.shape[:2] == (B, T):
        return found.index[0], found.index[1]
    if found.shape[:1] == (B * T,):
        return divmod(found.index[0], T)
    return None


@no_grad()
def _worst_token(model: Llama, batch: Batch) -> tuple[int, int] | None:
    """The first token whose own loss is not finite."""
    hidden = model.hidden(batch.ids, starts=batch.starts)
    for row in range(len(hidden)):
        for time in range(hidden.shape[1]):
            target = int(batch.targets[row, time])
            if target == IGNORE:
                continue
            logits = model.logits(hidden[row, time : time + 1]).data[0].astype(np.float64)
            loss = logits.max() + np.log(np.exp(logits - logits.max()).sum()) - logits[target]
            if not np.isfinite(loss):
                return row, time
    return None
