"""Batches: windows of a long row of tokens, and the token that follows each.

    inputs  (B, T)   tokens[s : s + T]
    targets (B, T)   tokens[s + 1 : s + T + 1]

Training takes each window of an epoch once, in random order; the next epoch cuts at another offset and
shuffles anew. Evaluation walks in order and predicts every token exactly once.
"""

# B batch, T time (the context length)

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from entrenar.data.corpus import CorpusError
from entrenar.data.epochs import Epochs
from entrenar.data.tokenfile import forget

IGNORE = -100  # a target that counts for nothing
FORGET_AFTER = 256  # windows: each brings in up to 64 kB of a mapped file, so that 16 MB of it are in memory at most


class Batch(NamedTuple):
    """A micro-batch: what goes in, what shall come out, and in which documents.

    ids       (B, T) integers
    targets   (B, T) the token after each, IGNORE where it counts for nothing
    starts    (B, T) where in its row each token's document begins; none: every row is one document
    """

    ids: np.ndarray
    targets: np.ndarray
    starts: np.ndarray | None = None

    @property
    def trained(self) -> int:
        """How many targets count."""
        return int((self.targets != IGNORE).sum())


class Batches(Epochs):
    """An endless supply of training batches; where it stands is three numbers, fit for a checkpoint.

    `taken` has the first token's place of each window of the last batch. Tokens may be a mapped file: a window is
    copied out of it and no more. Raises CorpusError where the tokens do not fill one window.
    """

    ROWS = "windows"

    def __init__(self, tokens: np.ndarray, *, batch_size: int, context: int, seed: int = 0) -> None:
        if len(tokens) < context + 1:
            raise CorpusError(
                f"the training text has {len(tokens)} tokens, too short for one window of context "
                f"{context} + 1: give more text, or a context of at most {max(0, len(tokens) - 1)}"
            )
        self.tokens, self.batch_size, self.context = tokens, batch_size, context
        super().__init__(seed, context)
        self.taken: list[int] = []
        self.touched = 0  # windows read since pages were given back

    def next(self) -> tuple[np.ndarray, np.ndarray]:
        """The next inputs and targets, (B, T) int64 each."""
        self.taken = [int(start) for start in self.take(self.batch_size)]
        windows = np.stack([self.tokens[s : s + self.context + 1] for s in self.taken]).astype(np.int64)
        self.touched += self.batch_size
        if self.touched >= FORGET_AFTER:
            self.touched = 0
            forget(self.tokens)
        return windows[:, :-1], windows[:, 1:]

    def _order(self, seed: int, epoch: int) -> np.ndarray:
        """Starts of an epoch's windows: cut side by side from a random offset on, in random order."""
        random = np.random.Generator(np.random.PCG64([seed, epoch]))
        spare = len(self.tokens) - self.context - 1  # the last start that still fits
        offset = int(random.integers(0, min(self.context, spare + 1)))
        kind = np.dtype(np.uint32 if spare < 2**32 else np.int64)
        starts = np.arange(offset, spare + 1, self.context, dtype=kind)
        random.shuffle(starts)
        return starts


def evaluation_windows(tokens: np.ndarray, *, first: int, context: int, stride: int,
                       every: int = 1) -> Iterator[tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """Inputs and targets, (T,) each, that predict every token of `tokens` exactly once, in order.

    The row begins with the token `first` (the end token), so that its very first token is predicted too.
    Windows move on by `stride` <= T, and in each only the tokens that no earlier window predicted count, the
    others are IGNORE: but at the start, a token is predicted from at least T - stride tokens before it. With
    `every` = k only each k-th window comes: a fixed sample of the same predictions.
    """
    if not 1 <= stride <= context:
        raise ValueError(f"evaluation_windows: stride = {stride}: wanted 1 to the context, {context}")
    done = 0  # tokens predicted so far
    for number, start in enumerate(range(0, len(tokens), stride)):
        if number % FORGET_AFTER == 0:
            forget(tokens)
        stop = min(start + context, len(tokens))
        if number % every == 0 and done < stop:
            x, y = np.full(context, first, np.int64), np.full(context, IGNORE, np.int64)
            x[: stop - start] = tokens[start - 1 : stop - 1] if start else [first, *tokens[: stop - 1]]
            y[done - start : stop - start] = tokens[done:stop]
            yield x, y
        done = stop


def batched(windows: Iterable[tuple[np.ndarray, np.ndarray]],
            size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """Windows stacked: inputs and targets (B, T), B = size, less in the last."""
    waiting = list(itertools.islice(windows := iter(windows), size))
    while waiting:
        yield np.stack([x for x, _ in waiting]), np.stack([y for _, y in waiting])
        waiting = list(itertools.islice(windows, size))
