"""Foreign files, read strictly: JSON, safetensors, GGUF. What is malformed is refused before it is used.

Knows nothing of models, tokenizers or training.
"""

from __future__ import annotations

import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO


class FormatError(ValueError):
    """A file is not what it should be; the message says which file, where in it, what came and what was wanted."""


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: its type by the format's own name, its shape, and the bytes start..end it fills there."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def size(self) -> int:
        """How many elements."""
        return math.prod(self.shape)


def open_regular(path: str | Path) -> tuple[BinaryIO, int]:
    """The file, open for reading bytes, and its size in bytes.

    Raises FormatError for what is no regular file (a folder, a pipe, a device: none has a size to check), OSError
    where it is missing or cannot be read.
    """
    # O_NONBLOCK: opening a pipe that nobody writes to would wait for ever
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    facts = os.fstat(number)
    if not stat.S_ISREG(facts.st_mode):
        os.close(number)
        raise FormatError(f"{path}: is no regular file; give the path of a file on disk")
    return os.fdopen(number, "rb"), facts.st_size


def short(value: Any) -> str:
    """The value as an error message quotes it: at most 100 characters, all of them printable."""
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
