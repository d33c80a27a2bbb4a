"""How well a model predicts a text: every token once, from a sliding window, the costs added up.

Knows nothing of where the text comes from (data/), of files and of what is shown (cli/evaluate.py, display.py).
"""

# B batch, T time (the window), V vocabulary

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from entrenar.data import IGNORE, Batch, batched, bits_per_byte, evaluation_windows
from entrenar.llama import Llama
from entrenar.tensor import no_grad


@dataclass(frozen=True)
class Evaluation:
    """What predicting a text cost, in nats over all its tokens, end tokens included.

    bytes      of text that the predicted tokens stand for; 0 where no lengths were given
    complete   whether it was read to its end (`stop` may have ended it before)
    """

    nats: float
    tokens: int
    bytes: int
    seconds: float
    complete: bool = True

    @property
    def loss(self) -> float:
        """Nats per token; 0 of no tokens."""
        return self.nats / max(1, self.tokens)

    @property
    def bits_per_byte(self) -> float:
        return bits_per_byte(self.nats, max(1, self.bytes))


def stride_of(context: int, overlap: float) -> int:
    """How far windows of `context` tokens move on when they share `overlap` (0 to 1) of them with the one before."""
    return max(1, round(context * (1 - overlap)))


def perplexity(loss: float) -> float:
    """e^loss, for a loss in nats: among how many equally likely ones the model chose; infinite beyond a float."""
    return math.exp(loss) if loss < 709 else math.inf


def evaluate(model: Llama, tokens: np.ndarray, *, first: int, context: int, stride: int, batch_size: int,
             every: int = 1, lengths: np.ndarray | None = None,
             progress: Callable[[int, int], object] = lambda done, total: None,
             stop: Callable[[], bool] = lambda: False) -> Evaluation:  # fmt: skip
    """Predict every token of `tokens` exactly once, in windows (B, T) of `context` that move on by `stride`.

    first     the token before the very first one (a tokenizer's begin_id or end_id)
    every     only each k-th window: a fixed sample of the same predictions, at a k-th of the work
    lengths   (V,) bytes of text each token stands for
    progress  called with (tokens predicted, tokens in all) after every batch
    stop      asked after every batch: True ends it there, with `complete` False

    The model is in eval() meanwhile, and as before afterwards. Raises ValueError for a stride outside 1..context.
    """
    windows = evaluation_windows(tokens, first=first, context=context, stride=stride, every=every)
    batches = (Batch(ids, targets) for ids, targets in batched(windows, batch_size))
    return evaluate_batches(model, batches, -(-len(tokens) // every), lengths=lengths, progress=progress, stop=stop)


@no_grad()
def evaluate_batches(model: Llama, batches: Iterable[Batch], total: int, *, lengths: np.ndarray | None = None,
                     progress: Callable[[int, int], object] = lambda done, total: None,
                     stop: Callable[[], bool] = lambda: False) -> Evaluation:  # fmt: skip
    """Predict what counts in these batches, `total` tokens in all. The rest is as `evaluate` has it."""
    start, was_training = time.perf_counter(), model.training
    nats, seen, size, complete = 0.0, 0, 0, True
    model.eval()
    try:
        for batch in batches:
            nats += model.loss(batch.ids, batch.targets, starts=batch.starts, reduction="sum").item()
            counted = batch.targets[batch.targets != IGNORE]
            seen += len(counted)
            size += int(lengths[counted].sum()) if lengths is not None else 0
            progress(seen, total)
            if stop():
                complete = False
                break
    finally:
        model.train(was_training)
    return Evaluation(nats, seen, size, time.perf_counter() - start, complete)
