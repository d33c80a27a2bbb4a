"""Reading the files of a source as a stream: decoded, and never a whole file in memory.

    text_slabs(file)           the text of a text file, which is one document, about a megabyte at a time
    rows(file)                 the documents of a JSONL or Parquet file (rows.py)
    read_documents(sources)    whole documents, of all kinds of files

The first two can begin in the middle, where an earlier reading stopped. What cannot be used is an Unusable, with file,
line and byte. Leaves out what becomes of it (scan.py).
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import IO, NoReturn

from entrenar.data import streams
from entrenar.data.corpus import CorpusError, SourceFile, Sources
from entrenar.data.rows import Row, place, rows
from entrenar.data.streams import Moved, Unusable, on_disk, opened, read

__all__ = ["Moved", "Row", "Unusable", "place", "read_documents", "rows", "text_slabs"]


def text_slabs(file: SourceFile, at: int = 0, moved: Moved = lambda read: None) -> Iterator[str]:
    """The text from byte `at` (of the unpacked file) on. Raises Unusable: no UTF-8, binary, damaged."""
    with opened(file, at) as stream:
        done, left = at, b""
        while True:
            block = read(stream, file)
            if (zero := block.find(0)) >= 0:
                raise _binary(file, done + len(left) + zero)
            raw = left + block
            try:
                text, used = codecs.utf_8_decode(raw, "strict", not block)
            except UnicodeDecodeError as error:
                _not_utf8(file, stream, done, error)
            if text:
                yield text
            if not block:
                return
            moved(on_disk(stream))
            done, left = done + used, raw[used:]


def read_documents(sources: Sources, *, skip_bad: bool = False) -> Iterator[tuple[str, str]]:
    """Every document of the sources, whole, in order: (where it comes from, its text). Blank ones are left out.

    Raises CorpusError at the first that cannot be used, unless `skip_bad`.
    """
    for file in sources.files:
        found: Iterator[tuple[str, str] | Unusable]
        if file.kind == "text":
            found = _whole(file)
        else:
            found = (row if isinstance(row, Unusable) else (place(file, row.number), row.text) for row in rows(file))
        for document in found:
            if not isinstance(document, Unusable):
                if document[1].strip():
                    yield document
            elif not skip_bad and not (document.kind == "binary" and len(sources.files) > 1):
                raise CorpusError(f"data.source: {document}") from None


def _whole(file: SourceFile) -> Iterator[tuple[str, str] | Unusable]:
    try:
        yield str(file), "".join(text_slabs(file))
    except Unusable as bad:
        yield bad


def _binary(file: SourceFile, byte: int) -> Unusable:
    return Unusable(file, "", f"is binary, not text: byte {byte:,} is NUL; wanted UTF-8", kind="binary")


def _not_utf8(file: SourceFile, stream: IO[bytes], done: int, error: UnicodeDecodeError) -> NoReturn:
    """Raises Unusable for the byte that is no UTF-8; where a NUL comes later, the file is binary instead."""
    byte, value = done + error.start, error.object[error.start]
    seen = done + len(error.object)
    while block := read(stream, file):
        if (zero := block.find(0)) >= 0:
            raise _binary(file, seen + zero)
        seen += len(block)
    line = 1 + _count_lines(file, byte)
    raise Unusable(
        file,
        "",
        f"is not UTF-8: line {line:,}, byte {byte:,} is 0x{value:02x} ({error.reason}); convert it first, "
        "e.g. with iconv -f latin1 -t utf-8",
        kind="encoding",
    )


def _count_lines(file: SourceFile, stop: int) -> int:
    """Line breaks before byte `stop`."""
    lines = 0
    with opened(file) as stream:
        while stop > 0 and (block := read(stream, file, min(streams.BLOCK, stop))):
            lines, stop = lines + block.count(b"\n"), stop - len(block)
    return lines
