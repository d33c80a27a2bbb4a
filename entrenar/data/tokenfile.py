"""Token files: a long row of token ids on the disk, mapped into memory and never read whole.

The format, for other programs. All numbers are little-endian; a header of 128 bytes, then the ids, nothing else:

    byte  size
       0     8  magic: 89 45 4E 54 4F 4B 0D 0A ("\\x89ENTOK\\r\\n")
       8     4  version of the format: 1
      12     4  bytes of one id: 2 (unsigned 16-bit, where the vocabulary has at most 65536 tokens) or 4 (32-bit)
      16     8  number of ids
      24     8  size of the vocabulary: every id is below it
      32    16  hash of the source and the settings it was prepared with (BLAKE2b of 128 bits)
      48    16  hash of the tokenizer's files (BLAKE2b of 128 bits)
      64    32  SHA-256 of the ids: of everything after the header
      96    32  SHA-256 of the 96 bytes before
     128        the ids

While it is being written, the header is 128 zeros: a file that was never finished is not a token file. Opening one
reads it once from end to end (about a second per gigabyte), compares the hash and looks at every id: none outside the
vocabulary ever reaches a model.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from entrenar.formats import FormatError, open_regular

MAGIC = b"\x89ENTOK\r\n"
VERSION = 1
HEADER = struct.Struct("<8sIIQQ16s16s32s32s")
SEALED = 96  # bytes of the header that its own hash covers
BLOCK = 1 << 20


@dataclass(frozen=True)
class Header:
    """What a token file says of itself; hashes in hexadecimal."""

    dtype: np.dtype
    count: int
    vocab_size: int
    source: str
    tokenizer: str
    content: str


class TokenWriter:
    """A token file that grows; a reader can open it once `finish` is through.

    dtype   of the ids: uint16 or uint32
    count   how many ids are there already, from a writer that was stopped: what lies behind them is cut off
    Raises OSError (a full disk), and FormatError where fewer than `count` ids are there.
    """

    def __init__(self, path: Path, dtype: np.dtype, count: int = 0) -> None:
        self.path, self.dtype, self.count = path, np.dtype(dtype).newbyteorder("<"), count
        if count == 0:
            path.write_bytes(bytes(HEADER.size))
        self.file = open(path, "r+b")
        size = HEADER.size + count * self.dtype.itemsize
        if os.fstat(self.file.fileno()).st_size < size:
            self.file.close()
            raise FormatError(f"{path}: has fewer than the {count:,} tokens that were written")
        self.file.truncate(size)
        self.file.seek(size)

    def append(self, ids: np.ndarray) -> None:
        self.file.write(np.ascontiguousarray(ids, self.dtype).data)
        self.count += len(ids)

    def sync(self) -> None:
        """Have the disk keep what was appended."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def finish(self, *, vocab_size: int, source: str, tokenizer: str) -> np.ndarray:
        """Write the header; returns how often each token occurs, (V,). `source` and `tokenizer` are hashes in hex.

        Raises FormatError where an id is not below `vocab_size`.
        """
        self.file.flush()
        counts = np.zeros(vocab_size, np.int64)
        digest = hashlib.sha256()
        self.file.seek(HEADER.size)
        while block := self.file.read(BLOCK):
            digest.update(block)
            seen = np.bincount(np.frombuffer(block, self.dtype), minlength=vocab_size)
            if len(seen) > vocab_size:
                raise FormatError(f"{self.path}: holds the id {len(seen) - 1}; the vocabulary has {vocab_size:,}")
            counts += seen
        head = HEADER.pack(
            MAGIC, VERSION, self.dtype.itemsize, self.count, vocab_size, bytes.fromhex(source),
            bytes.fromhex(tokenizer), digest.digest(), bytes(32),
        )[:SEALED]  # fmt: skip
        self.file.seek(0)
        self.file.write(head + hashlib.sha256(head).digest())
        self.sync()
        self.close()
        return counts

    def close(self) -> None:
        self.file.close()


def read_header(path: str | Path) -> Header:
    """The header, checked against the size of the file. Raises FormatError, OSError."""
    file, size = open_regular(path)
    with file:
        return _header(file, size, path)


def open_tokens(path: str | Path) -> np.ndarray:
    """The ids, (N,) uint16 or uint32, a read-only map of the file; every one is below the header's vocab_size.

    Raises FormatError for anything that is not a whole, unchanged token file; OSError where it cannot be read.
    """
    file, size = open_regular(path)
    with file:
        header = _header(file, size, path)
        _check_content(file, header, path)
        mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    _advise(mapped, "MADV_RANDOM")  # a window is a few hundred bytes: reading ahead would fetch what nobody asked for
    return np.frombuffer(mapped, header.dtype, header.count, HEADER.size)


def forget(tokens: np.ndarray) -> None:
    """Let go of the pages of a mapped token file that reading has brought in: they can be read again at any time.

    Pages that were looked at count as this process's memory until then. Other arrays are left alone.
    """
    base: Any = tokens
    while not isinstance(base, mmap.mmap):
        base = base.obj if isinstance(base, memoryview) else getattr(base, "base", None)
        if base is None:
            return
    _advise(base, "MADV_DONTNEED")


def _advise(mapped: mmap.mmap, advice: str) -> None:
    with contextlib.suppress(OSError, AttributeError):  # a hint only
        mapped.madvise(getattr(mmap, advice))


def _header(file: BinaryIO, size: int, path: str | Path) -> Header:
    raw = file.read(HEADER.size)
    if not raw.startswith(MAGIC):
        what = "was never finished" if raw and not any(raw) else "does not begin with the magic of one"
        raise FormatError(f"{path}: is no token file: it {what}; prepare the text again")
    if len(raw) < HEADER.size:
        raise FormatError(f"{path}: has {size} bytes, a token file's header alone has {HEADER.size}")
    _, version, width, count, vocab_size, source, tokenizer, content, seal = HEADER.unpack(raw)
    if version != VERSION:
        raise FormatError(f"{path}: byte 8: version {version} of the token file format; this entrenar reads {VERSION}")
    if hashlib.sha256(raw[:SEALED]).digest() != seal:
        raise FormatError(f"{path}: its first {SEALED} bytes do not match their hash at byte {SEALED}: damaged")
    if width not in (2, 4):
        raise FormatError(f"{path}: byte 12: ids of {width} bytes; wanted 2 or 4")
    if size != HEADER.size + count * width:
        raise FormatError(
            f"{path}: has {size:,} bytes; {count:,} ids of {width} bytes after a header of {HEADER.size} are "
            f"{HEADER.size + count * width:,}: the file was cut off, or has grown"
        )
    if not 1 <= vocab_size <= 1 << 8 * width:
        raise FormatError(f"{path}: byte 24: a vocabulary of {vocab_size:,} does not go with ids of {width} bytes")
    return Header(np.dtype(f"<u{width}"), count, vocab_size, source.hex(), tokenizer.hex(), content.hex())


def _check_content(file: BinaryIO, header: Header, path: str | Path) -> None:
    """Raises FormatError where the ids are not those that were written, or outside the vocabulary."""
    digest, done = hashlib.sha256(), 0
    file.seek(HEADER.size)
    while block := file.read(BLOCK):
        ids = np.frombuffer(block[: len(block) // header.dtype.itemsize * header.dtype.itemsize], header.dtype)
        if len(ids) and (highest := int(ids.max())) >= header.vocab_size:
            at = done + int(ids.argmax())
            raise FormatError(
                f"{path}: token {at:,} (byte {HEADER.size + at * header.dtype.itemsize:,}) is {highest}; "
                f"the vocabulary has {header.vocab_size:,} tokens"
            )
        digest.update(block)
        done += len(ids)
    if digest.hexdigest() != header.content:
        raise FormatError(f"{path}: its {header.count:,} ids do not match their hash: the file was changed or damaged")
