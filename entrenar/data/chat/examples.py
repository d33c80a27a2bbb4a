"""Examples: the tokens of many rows in one array, which of them are trained, and where each came from."""

# N tokens, n examples

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from entrenar.data.chat.rendering import Example


@dataclass(frozen=True)
class Examples:
    """n examples, one after the other.

    ids       (N,) int32, the tokens of all
    trained   (N,) bool; of the first token of an example false
    offsets   (n + 1,) int64: example i is ids[offsets[i] : offsets[i + 1]]
    files     (n,) int32 and lines (n,) int64, where it came from; names has the files
    """

    ids: np.ndarray
    trained: np.ndarray
    offsets: np.ndarray
    files: np.ndarray
    lines: np.ndarray
    names: Sequence[str] = ()

    @staticmethod
    def of(examples: Iterable[Example]) -> Examples:
        """These, wherever they came from."""
        made = list(examples)
        nowhere = np.zeros(len(made), np.int64)
        ids, trained = [one.ids for one in made], [one.trained for one in made]
        return Examples(
            np.concatenate([np.zeros(0, np.int32), *ids]).astype(np.int32, copy=False),
            np.concatenate([np.zeros(0, bool), *trained]),
            np.concatenate([[0], np.cumsum([len(row) for row in ids], dtype=np.int64)]).astype(np.int64),
            nowhere.astype(np.int32),
            nowhere,
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, number: int) -> Example:
        if not 0 <= number < len(self):
            raise IndexError(f"example {number} of {len(self):,}")
        part = slice(self.offsets[number], self.offsets[number + 1])
        return Example(self.ids[part], self.trained[part])

    @property
    def lengths(self) -> np.ndarray:
        """(n,) tokens of each."""
        return np.diff(self.offsets)

    @property
    def tokens(self) -> int:
        return len(self.ids)

    @property
    def trained_tokens(self) -> int:
        return int(np.count_nonzero(self.trained))

    def place(self, number: int) -> str:
        """Where an example comes from, for people: "chats.jsonl line 17"."""
        file = int(self.files[number])
        return f"{self.names[file]} line {self.lines[number]:,}" if file < len(self.names) else f"example {number:,}"

    def chosen(self, which: np.ndarray) -> Examples:
        """Only the examples for which `which` (n,) is true."""
        tokens = np.repeat(which, self.lengths)
        offsets = np.concatenate([[0], np.cumsum(self.lengths[which])]).astype(np.int64)
        return Examples(
            self.ids[tokens], self.trained[tokens], offsets, self.files[which], self.lines[which], self.names
        )

    def digests(self, seed: int = 0) -> np.ndarray:
        """(n,) uint64, a hash of each: equal where the tokens and what is trained of them are."""
        key = (seed % 2**64).to_bytes(8, "little")
        ids, trained = self.ids.view(np.uint8).data, self.trained.view(np.uint8).data
        found = np.zeros(len(self), np.uint64)
        for i, (a, b) in enumerate(zip(self.offsets[:-1].tolist(), self.offsets[1:].tolist(), strict=True)):
            digest = hashlib.blake2b(ids[4 * a : 4 * b], digest_size=8, key=key)
            digest.update(trained[a:b])
            found[i] = int.from_bytes(digest.digest(), "little")
        return found

    def hash(self) -> str:
        """Of all tokens and what is trained of them."""
        digest = hashlib.sha256(len(self).to_bytes(8, "little"))
        for array in (self.offsets, self.ids, self.trained):
            digest.update(array.view(np.uint8).data)
        return digest.hexdigest()


class Gathered:
    """Examples that come one by one."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.ids: list[np.ndarray] = []
        self.trained: list[np.ndarray] = []
        self.places: list[tuple[int, int]] = []

    def add(self, one: Example, file: int, line: int) -> None:
        self.ids.append(one.ids)
        self.trained.append(one.trained)
        self.places.append((file, line))

    def done(self) -> Examples:
        """All of them; what was gathered is let go."""
        made = Examples.of(map(Example, self.ids, self.trained))
        places = np.array(self.places, np.int64).reshape(-1, 2)
        self.ids, self.trained, self.places = [], [], []
        return Examples(made.ids, made.trained, made.offsets, places[:, 0].astype(np.int32), places[:, 1], self.names)
