"""Batches of examples: several in a row side by side, none of which sees another; or one in a row.

    ids      (B, T)   tokens
    targets  (B, T)   the token that follows, where it is trained and of the same example; else IGNORE
    starts   (B, T)   where in the row the example of this token begins: it sees nothing before

An example of n tokens takes n - 1 places at most: its last token is a target, and never read. Nor are the tokens
behind its last trained one, from which nothing is learned. Places that are left over are filled by PADDING, which no
loss counts, and which sees itself alone. It is no token in particular: what is ignored is told by place, so that the
end token of an answer is trained.

Packing is best-fit decreasing: the longest example first, each into the fullest row that has room for it. An epoch
takes each example once, in an order of its own.
"""

# B batch, T time (at most the context length)

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from entrenar.data.batches import IGNORE
from entrenar.data.chat.examples import Examples
from entrenar.data.corpus import CorpusError
from entrenar.data.epochs import Epochs

PADDING = 0
MULTIPLE = 16  # of which a batch's T is one: odd lengths would each need memory of their own


class ChatBatch(NamedTuple):
    """Each (B, T) int64; T is as long as the longest row needs, rounded up, and at most the context."""

    ids: np.ndarray
    targets: np.ndarray
    starts: np.ndarray


class Packing(NamedTuple):
    """How full the rows of an epoch are."""

    examples: int
    rows: int
    places: int  # rows x context
    used: int  # of them

    @property
    def share(self) -> float:
        return self.used / max(1, self.places)


class ExampleBatches(Epochs):
    """An endless supply of training batches; where it stands is three numbers, fit for a checkpoint.

    `taken` has, of each row of the last batch, the numbers of its examples. Raises CorpusError for examples of more
    than context + 1 tokens, and where there are none.
    """

    def __init__(self, examples: Examples, *, batch_size: int, context: int, seed: int = 0,
                 packing: bool = True) -> None:  # fmt: skip
        _check(examples, context)
        self.examples, self.batch_size, self.packing, self.context = examples, batch_size, packing, context
        self.needs = places_needed(examples)
        self.numbers = np.flatnonzero(self.needs)  # from the others nothing is learned
        super().__init__(seed, context)
        self.taken: list[list[int]] = []

    def next(self) -> ChatBatch:
        """The next batch."""
        self.taken = self.take(self.batch_size)
        return filled(self.examples, self.needs, self.taken, self.context)

    def filling(self) -> Packing:
        """Of this epoch."""
        rows = len(self.order)
        return Packing(len(self.examples), rows, rows * self.context, int(self.needs.sum()))

    def _order(self, seed: int, epoch: int) -> list[list[int]]:
        """The rows of an epoch, each the numbers of its examples, in random order."""
        random = np.random.Generator(np.random.PCG64([seed, epoch]))
        order = random.permutation(self.numbers)
        if not self.packing:
            return [[number] for number in order.tolist()]
        rows = packed(self.needs, self.context, order)
        return [rows[i] for i in random.permutation(len(rows)).tolist()]


def evaluation_batches(examples: Examples, *, batch_size: int, context: int,
                       packing: bool = True) -> Iterator[ChatBatch]:  # fmt: skip
    """Every example once, always in the same batches; the last may have fewer rows."""
    _check(examples, context)
    needs = places_needed(examples)
    numbers = np.flatnonzero(needs)
    rows = packed(needs, context, numbers) if packing else [[number] for number in numbers.tolist()]
    for first in range(0, len(rows), batch_size):
        yield filled(examples, needs, rows[first : first + batch_size], context)


def places_needed(examples: Examples) -> np.ndarray:
    """(n,) how many tokens of each example are read: those before its last trained one."""
    at = np.where(examples.trained, np.arange(examples.tokens), 0)
    starts = examples.offsets[:-1]
    last = np.maximum.reduceat(np.append(at, 0), starts) if len(examples) else starts
    return np.where(examples.lengths > 0, np.maximum(last - starts, 0), 0)


def packed(needs: np.ndarray, context: int, order: np.ndarray) -> list[list[int]]:
    """Rows of at most `context` places, each the numbers of its examples; equally long ones come as in `order`.

    Best fit by a table of rows by the room they have left, and a bit for every room there is one of: O(n log n).
    """
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(context + 1)]
    rooms = 0  # bit r: there is a row with room for r more
    for number in order[np.argsort(-needs[order], kind="stable")].tolist():
        need = int(needs[number])
        if fitting := rooms >> need:
            room = need + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = context, len(rows)
            rows.append([])
        rows[row].append(number)
        by_room[room - need].append(row)
        rooms |= 1 << (room - need)
    return rows


def filled(examples: Examples, needs: np.ndarray, rows: Sequence[Sequence[int]], context: int) -> ChatBatch:
    """The batch of these rows."""
    longest = max(int(needs[list(row)].sum()) for row in rows)
    size = min(context, max(1, -(-longest // MULTIPLE)) * MULTIPLE)
    ids = np.full((len(rows), size), PADDING, np.int64)
    targets = np.full((len(rows), size), IGNORE, np.int64)
    starts = np.tile(np.arange(size, dtype=np.int64), (len(rows), 1))
    for b, row in enumerate(rows):
        at = 0
        for number in row:
            need, (tokens, trained) = int(needs[number]), examples[number]
            part = slice(at, at + need)
            ids[b, part] = tokens[:need]
            targets[b, part] = np.where(trained[1 : need + 1], tokens[1 : need + 1], IGNORE)
            starts[b, part] = at
            at += need
    return ChatBatch(ids, targets, starts)


def _check(examples: Examples, context: int) -> None:
    if not examples.trained_tokens:
        raise CorpusError("there are no examples with trained tokens to make batches of")
    if (longest := int(examples.lengths.max())) > context + 1:
        number = int(examples.lengths.argmax())
        raise CorpusError(
            f"{examples.place(number)} has {longest:,} tokens, a window of context {context:,} takes {context + 1:,}: "
            "read the examples with max_length = context + 1, or give a longer context"
        )
