"""Activation checkpointing: trade time for memory. Forget a block's activations, compute them again in backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from entrenar import random
from entrenar.tensor import Op, Tensor, is_recording, recorded


class Checkpoint(Op):
    """y = fn(*inputs), keeping the inputs alone.

    backward() does not return gradients: it records fn again, on tensors that stand where the inputs stood, and
    hands the new graph to the walk, which goes on through it. So every gradient is added up in the very order it
    would have been without the checkpoint: same bits, not only the same value.
    """

    def backward(self, dout: np.ndarray) -> Tensor:
        fn, inputs, state = self.saved
        now = random.get_state()
        random.set_state(state)  # the same dropout masks as the first time
        try:
            with recorded():
                return fn(*[_standing_at(edge, x) for edge, x in zip(self.edges or (), inputs, strict=True)])
        finally:
            random.set_state(now)


def checkpoint(fn: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """fn(*inputs), whose activations are not kept but computed again during backward().

    fn      makes one tensor from the inputs and from parameters it holds, and nothing else that may change before
            backward(); random numbers from `entrenar.random` are replayed
    inputs  tensors, or anything else fn takes

    Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost".
    Raises TypeError if fn returns anything but one Tensor.
    """
    state = random.get_state()
    stand_ins = [Tensor(x.data, x.requires_grad) if isinstance(x, Tensor) else x for x in inputs]
    out = fn(*stand_ins)
    if not isinstance(out, Tensor):
        raise TypeError(f"checkpoint: fn must return one Tensor, got {type(out).__name__}")
    if not (is_recording() and out.requires_grad):
        return out
    # Recorded once only to learn whether a gradient is wanted, perhaps by a parameter inside fn alone; that graph
    # dies with `out` here.
    op, result = Checkpoint(), Tensor(out.data)
    op.needs = [isinstance(x, Tensor) and x.requires_grad for x in inputs]
    op.save(fn, [x.detach() if isinstance(x, Tensor) else x for x in inputs], state)
    op.record(inputs, result)
    return result


def _standing_at(edge: Op | Tensor | None, x: Any) -> Any:
    """The input as fn shall see it again: the leaf itself where it was one, else its data in its place in the graph."""
    if edge is None or isinstance(edge, Tensor):
        return x if edge is None else edge
    stand_in = Tensor(x.data, requires_grad=True)
    stand_in.op = edge
    return stand_in
