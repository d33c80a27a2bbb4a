"""What a rehearsal is held against: the most bytes that NumPy really had; and, as controls, rehearsals that differ."""

from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Callable

import numpy as np

from entrenar import optim
from entrenar.llama import Llama
from entrenar.tensor import no_grad

BATCH, CONTEXT = 4, 64  # of `two_steps`


def most_held(job: Callable[[], None]) -> int:
    """The most bytes that NumPy held at once during the job, or since it called tracemalloc.reset_peak."""
    peak: list[int] = []

    def traced() -> None:  # in a thread of its own, whose scratch memory is not there yet
        tracemalloc.start()
        job()
        peak.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()

    thread = threading.Thread(target=traced)
    thread.start()
    thread.join()
    return peak[0]


def two_steps(model: Llama, micro_batches: int = 1) -> None:
    """Train for two steps, with a look at held-out text after each."""
    optimizer = optim.AdamW(model.named_parameters())
    ids = np.zeros((BATCH, CONTEXT), np.int64)
    for _ in range(2):
        for _ in range(micro_batches):
            loss = model.loss(ids, ids, reduction="sum")
            loss.backward(np.full((), 1 / ids.size, np.float32))
        optim.global_norm(model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        with no_grad():
            model.loss(ids, ids)


class Forgetful:
    """Before a rehearsal's class: drops a layer's gate too early, as if the backward of swiglu did without it."""

    def block(self, i, x, name, *, keep):
        y, saved = super().block(i, x, name, keep=keep)
        if keep:
            self.heap.drop(saved.gate)
            saved.gate = None
        return y, saved
