"""Where in the source the training tokens come from: an index, a record per piece of text.

A file of 24-byte records beside the token file, sorted by token; little-endian:

    byte  size
       0     8  number of the first token of the piece
       8     8  lines before it (of a row of JSONL or Parquet: its number)
      16     4  number of the file, in the list of names
      20     4  zero

It serves messages only: nothing is trained from it.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from entrenar.data.corpus import printable, source_file
from entrenar.data.tokenizer import Tokenizer
from entrenar.formats import FormatError, open_regular

FARTHEST = 1 << 24  # tokens: no piece has as many
RECORD = np.dtype([("token", "<u8"), ("line", "<u8"), ("file", "<u4"), ("zero", "<u4")])


@dataclass(frozen=True)
class Places:
    """The index and the names of the files."""

    records: np.ndarray
    names: Sequence[str]

    def of(self, offset: int, tokens: np.ndarray, tokenizer: Tokenizer) -> str:
        """Where training token `offset` comes from: "notes/a.txt line 12", "corpus.jsonl line 17"."""
        if not 0 <= offset < len(tokens):
            raise IndexError(f"place: token {offset}: wanted 0 to {len(tokens) - 1}")
        found = bisect.bisect_right(self.records["token"], offset) - 1
        if found < 0 or (number := int(self.records[found]["file"])) >= len(self.names):
            return "an unknown place: the index of places is damaged"
        name, line = self.names[number], int(self.records[found]["line"])
        kind = source_file(name, Path(name)).kind
        start = int(self.records[found]["token"])
        if kind == "text" and offset - start < FARTHEST:
            line += 1 + tokenizer.decode(tokens[start:offset].tolist()).count("\n")
        return f"{printable(name)} {'row' if kind == 'parquet' else 'line'} {line:,}"


class PlacesWriter:
    """The index as it grows; `count` records are there already, from a writer that was stopped."""

    def __init__(self, path: Path, count: int = 0) -> None:
        self.count = count
        self.file = open(path, "r+b" if count else "w+b")
        if os.fstat(self.file.fileno()).st_size < count * RECORD.itemsize:
            self.file.close()
            raise FormatError(f"{path}: has fewer than the {count:,} places that were written")
        self.file.truncate(count * RECORD.itemsize)
        self.file.seek(0, os.SEEK_END)

    def append(self, token: Sequence[int], line: Sequence[int], file: Sequence[int]) -> None:
        made = np.zeros(len(token), RECORD)
        made["token"], made["line"], made["file"] = token, line, file
        self.file.write(made.tobytes())
        self.count += len(made)

    def sync(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


def open_places(path: Path, names: Sequence[str]) -> Places:
    """Raises FormatError where the file is not whole."""
    file, size = open_regular(path)
    file.close()
    if size % RECORD.itemsize:
        raise FormatError(f"{path}: has {size:,} bytes, which is not a number of whole {RECORD.itemsize}-byte records")
    records = np.memmap(path, RECORD, "r") if size else np.empty(0, RECORD)
    return Places(records, names)
