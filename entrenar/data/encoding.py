"""Pieces of text to token files, on all cores, with a journal.

The library's encode call lets go of Python's lock and works on all cores; turning what it returns into arrays does
not. So two slabs are on their way at any time: one is encoded while the other's ids are collected.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from entrenar.data.pieces import Piece
from entrenar.data.places import PlacesWriter
from entrenar.data.tokenfile import TokenWriter
from entrenar.data.tokenizer import Tokenizer, id_type
from entrenar.data.work import HEAD, HELD_OUT, PLACES, TRAIN, Work
from entrenar.data.yardsticks import LIMIT, Yardsticks

SLAB = 1 << 19  # characters encoded in one call of the library, about; it takes some 100 bytes per token meanwhile
ON_THE_WAY = 2  # slabs
JOURNAL_EVERY = 5.0  # seconds

Encoded = list[np.ndarray]


def encode_slabs(tokenizer: Tokenizer, pieces: Iterable[Piece]) -> Iterator[tuple[list[Piece], Encoded]]:
    """The pieces, many at a time, with the token ids of each; in order."""
    with ThreadPoolExecutor(ON_THE_WAY) as pool:
        waiting: deque = deque()
        for slab in slabs(pieces):
            texts, continued = [p.text for p in slab], [p.continued for p in slab]
            waiting.append((slab, pool.submit(tokenizer.encode_batch, texts, continued=continued)))
            if len(waiting) > ON_THE_WAY:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()


def slabs(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """About SLAB characters at a time; a slab that begins inside a row ends with it, so that the journal can go on."""
    slab: list[Piece] = []
    size, inside = 0, False
    for piece in pieces:
        slab.append(piece)
        size += len(piece.text)
        if size >= SLAB or (inside and piece.after):
            yield slab
            slab, size, inside = [], 0, piece.after is None
    if slab:
        yield slab


class Writer:
    """The files that encoding fills, from where the journal says on."""

    def __init__(self, work: Work, tokenizer: Tokenizer) -> None:
        self.work, self.journal = work, work.journal()
        self.end = np.array([tokenizer.end_id], id_type(tokenizer.vocab_size))
        made = self.journal
        self.sides = [
            TokenWriter(work.path(name), self.end.dtype, count)
            for name, count in zip((TRAIN, HELD_OUT), made.tokens, strict=True)
        ]
        self.places = PlacesWriter(work.path(PLACES), made.places)
        self.head = open(work.path(HEAD), "a+b")
        self.head.truncate(made.head)
        self.yardsticks: Yardsticks | None = None
        if made.head == LIMIT:
            self._compress()
        self.kept = time.monotonic()

    def append(self, pieces: list[Piece], encoded: Encoded) -> None:
        """The tokens of these pieces, an end token after each document; the journal, now and then."""
        made = self.journal
        parts: tuple[list[np.ndarray], ...] = ([], [])
        starts, lines, files = [], [], []
        tokens = list(made.tokens)
        for piece, ids in zip(pieces, encoded, strict=True):
            side = int(piece.held_out)
            if not side:
                starts.append(tokens[0])
                lines.append(piece.line)
                files.append(piece.file)
            elif made.head < LIMIT:
                self._keep_head(piece)
            parts[side].append(ids)
            if piece.last:
                parts[side].append(self.end)
            tokens[side] += len(ids) + piece.last
            made.documents[side] += piece.last
            made.bytes[side] += piece.size
        for writer, arrays in zip(self.sides, parts, strict=True):
            if arrays:
                writer.append(np.concatenate(arrays))
        self.places.append(starts, lines, files)
        made.tokens, made.places = tokens, self.places.count
        if (after := pieces[-1].after) is not None and time.monotonic() - self.kept >= JOURNAL_EVERY:
            made.position = after
            self.keep()

    def keep(self) -> None:
        """Have the disk keep all of it, then the journal that says so."""
        for side in self.sides:
            side.sync()
        self.places.sync()
        self.head.flush()
        os.fsync(self.head.fileno())
        self.work.keep_journal(self.journal)
        self.kept = time.monotonic()

    def compressed(self) -> tuple[int, float, float]:
        """Bytes of held-out text that were compressed; gzip's and xz's bits per byte of them."""
        self._compress()
        assert self.yardsticks is not None
        return self.yardsticks.size, *self.yardsticks.bits()

    def close(self) -> None:
        for side in self.sides:
            side.close()
        self.places.close()
        self.head.close()

    def _keep_head(self, piece: Piece) -> None:
        raw = piece.text.encode()[: LIMIT - self.journal.head]
        self.head.write(raw)
        self.journal.head += len(raw)
        if self.journal.head == LIMIT:
            self._compress()

    def _compress(self) -> None:
        if self.yardsticks is None:
            self.head.flush()
            self.head.seek(0)
            self.yardsticks = Yardsticks(self.head.read())
