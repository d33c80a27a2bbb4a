"""Reading the files of a source as a stream: unpacked, decoded, and never a whole file in memory.

    text_slabs(file)   the text of a text file, about BLOCK bytes at a time; the file is one document
    rows(file)         the documents of a JSONL or Parquet file, one after the other

Both can begin in the middle, where an earlier reading stopped. What cannot be used is an Unusable, with file, line
and byte: raised where it ends the reading of a file, handed over in place of a row where the next row may be fine.
Leaves out what becomes of it (scan.py).
"""

from __future__ import annotations

import codecs
import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple, NoReturn, cast

from entrenar.data.corpus import CorpusError, SourceFile, Sources

BLOCK = 1 << 20  # bytes read at once
LONGEST_ROW = 16 << 20  # bytes of one line of JSONL, or of one text in it: a row is held in memory whole
PARQUET_BATCH = 64  # rows
BOM = b"\xef\xbb\xbf"

Moved = Callable[[int], None]  # told how many bytes of the file, as it lies on the disk, have been read


class Unusable(Exception):
    """A file or a row that cannot be used: `place` says where, `fault` what is wrong and what was wanted."""

    def __init__(self, file: SourceFile, at: str, fault: str, *, kind: str = "") -> None:
        self.place, self.fault, self.kind = f"{file}{at}", fault, kind
        super().__init__(f"{self.place} {fault}")


class Row(NamedTuple):
    """One document of many: the text, its bytes, its line (of JSONL; row of Parquet), where the next one begins."""

    text: str
    size: int
    number: int
    after: int  # byte of the unpacked file (JSONL), rows read (Parquet)


def text_slabs(file: SourceFile, at: int = 0, moved: Moved = lambda read: None) -> Iterator[str]:
    """The text from byte `at` (of the unpacked file) on. Raises Unusable: no UTF-8, binary, damaged."""
    with _opened(file, at) as stream:
        done, left = at, b""
        while True:
            block = _read(stream, file)
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


def rows(file: SourceFile, at: int = 0, number: int = 0, moved: Moved = lambda read: None) -> Iterator[Row | Unusable]:
    """The documents after row `number`, which ends at `at`. What cannot be read comes as Unusable, in its place."""
    try:
        yield from (_parquet_rows if file.kind == "parquet" else _jsonl_rows)(file, at, number, moved)
    except Unusable as bad:  # the rest of the file
        yield bad


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


def place(file: SourceFile, number: int) -> str:
    """Where a row stands, for people: "corpus.jsonl line 17", "corpus.parquet row 3"."""
    return f"{file} {'row' if file.kind == 'parquet' else 'line'} {number:,}"


def on_disk(stream: IO[bytes]) -> int:
    """How many bytes of the file itself have been read, where `stream` unpacks it."""
    inner = getattr(stream, "inner", stream)
    return inner.tell() if not inner.closed else 0


# --- bytes ------------------------------------------------------------------------------------------------


class _Gzip(gzip.GzipFile):
    def __init__(self, inner: IO[bytes]) -> None:
        super().__init__(fileobj=inner)
        self.inner = inner


def _opened(file: SourceFile, at: int = 0) -> IO[bytes]:
    """The bytes of the file, unpacked, from byte `at` on. Raises Unusable."""
    try:
        inner = open(file.path, "rb")
    except OSError as error:
        raise Unusable(file, "", f"cannot be read: {error.strerror}") from None
    if not file.packing:
        inner.seek(at)
        return inner
    stream = cast(IO[bytes], _Gzip(inner)) if file.packing == "gzip" else _zstd(inner)
    while at > 0:  # packed bytes can only be reached through those before
        at -= len(_read(stream, file, min(BLOCK, at))) or at
    return stream


def _zstd(inner: IO[bytes]) -> IO[bytes]:
    try:
        from compression.zstd import ZstdFile  # type: ignore[import-not-found]  # Python 3.14
    except ImportError:
        from backports.zstd import ZstdFile
    stream = ZstdFile(inner, "r")
    stream.inner = inner
    return cast(IO[bytes], stream)


def _read(stream: IO[bytes], file: SourceFile, size: int | None = None) -> bytes:
    try:
        return stream.read(BLOCK if size is None else size)
    except Exception as error:
        raise _damaged(file, error) from None


def _damaged(file: SourceFile, error: Exception) -> Unusable:
    """What a failed read means: a packed file that is cut off or damaged, or a disk that fails."""
    if isinstance(error, EOFError):
        return Unusable(file, "", f"is cut off: its {file.packing} data has no end; fetch or pack it again")
    if isinstance(error, (gzip.BadGzipFile, zlib.error)) or type(error).__name__ == "ZstdError":
        return Unusable(file, "", f"is damaged, or no {file.packing} file: {error}")
    if isinstance(error, OSError):
        return Unusable(file, "", f"cannot be read: {error.strerror or error}")
    raise error


# --- text -------------------------------------------------------------------------------------------------


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
    while block := _read(stream, file):
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
    with _opened(file) as stream:
        while stop > 0 and (block := _read(stream, file, min(BLOCK, stop))):
            lines, stop = lines + block.count(b"\n"), stop - len(block)
    return lines


# --- rows -------------------------------------------------------------------------------------------------


def _jsonl_rows(file: SourceFile, at: int, number: int, moved: Moved) -> Iterator[Row | Unusable]:
    with _opened(file, at) as stream:
        told = at
        while True:
            try:
                line = stream.readline(LONGEST_ROW + 1)
                size = len(line) if len(line) <= LONGEST_ROW else len(line) + _to_line_end(stream, line)
            except Exception as error:
                bad = _damaged(file, error)
                raise Unusable(file, f" after line {number:,}", bad.fault) from None
            if not line:
                return
            number, start, at = number + 1, at, at + size
            if size > LONGEST_ROW:
                yield Unusable(
                    file,
                    f" line {number:,}",
                    f"has {size:,} bytes, the longest row may have {LONGEST_ROW:,}; give it a text file of its own",
                )
            elif not line.isspace():
                yield _jsonl_row(file, line.removeprefix(BOM) if start == 0 else line, number, start, at)
            if at - told >= BLOCK:
                told = at
                moved(on_disk(stream))


def _to_line_end(stream: IO[bytes], line: bytes) -> int:
    """Reads on to the end of an overlong line; how many bytes that were."""
    size = 0
    while line and not line.endswith(b"\n"):
        line = stream.readline(BLOCK)
        size += len(line)
    return size


def _jsonl_row(file: SourceFile, line: bytes, number: int, start: int, after: int) -> Row | Unusable:
    try:
        text = _text_of(json.loads(line.rstrip(b"\r\n").decode()))
        return Row(text, len(text) if text.isascii() else len(text.encode()), number, after)
    except json.JSONDecodeError as error:
        fault = f"is not JSON: {error.msg[:1].lower()}{error.msg[1:]} at column {error.colno}"
    except UnicodeDecodeError as error:
        fault = f"is not UTF-8: its byte {error.start} is 0x{line[error.start]:02x} ({error.reason})"
    except UnicodeEncodeError as error:
        fault = f'has half a surrogate pair in "text" ({ascii(error.object[error.start])[1:-1]}), which is no Unicode'
    except RecursionError:
        fault = "is nested too deeply"
    except ValueError as error:  # _text_of's, and numbers of thousands of digits
        fault = str(error)
    return Unusable(file, f" line {number:,} (byte {start:,})", f'{fault}; wanted {{"text": "..."}}')


def _text_of(row: Any) -> str:
    """Raises ValueError, saying what the row is instead."""
    if not isinstance(row, dict):
        raise ValueError(f"is {_kind(row)}")
    if "text" not in row:
        keys = ", ".join(json.dumps(key)[:40] for key in list(row)[:5])
        raise ValueError('has no "text"' + (f", only {keys}" if row else ""))
    if not isinstance(row["text"], str):
        raise ValueError(f'has {_kind(row["text"])} as "text"')
    return row["text"]


def _kind(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list"}
    return names.get(type(value), "an object" if isinstance(value, dict) else "null")


def _parquet_rows(file: SourceFile, at: int, number: int, moved: Moved) -> Iterator[Row | Unusable]:
    """Rows from number `at` on; a Parquet file is read a few rows at a time, other columns not at all."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise CorpusError(
            f"data.source: {file} is Parquet, which needs pyarrow: pip install 'entrenar[parquet]'"
        ) from None
    seen = 0
    try:
        size = os.path.getsize(file.path)
        with pyarrow.parquet.ParquetFile(file.path, buffer_size=BLOCK, pre_buffer=False) as table:
            _check_column(file, pyarrow, table.schema_arrow)
            groups = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
            first = 0
            while first < len(groups) and seen + groups[first] <= at:
                first, seen = first + 1, seen + groups[first]
            for batch in table.iter_batches(PARQUET_BATCH, range(first, len(groups)), ["text"], use_threads=False):
                for value in batch.column(0):
                    seen += 1
                    if seen > at:
                        yield _parquet_row(file, value, seen)
                moved(size * seen // max(1, table.metadata.num_rows))
    except (pyarrow.ArrowException, OSError) as error:
        at_row = f" after row {seen:,}" if seen else ""
        raise Unusable(file, at_row, f"cannot be read as Parquet: {_first_line(error)}") from None


def _check_column(file: SourceFile, pyarrow: Any, schema: Any) -> None:
    if (names := schema.names).count("text") != 1:
        raise Unusable(file, "", f'has no column "text", but {", ".join(map(repr, names[:8]))}; rename one')
    kind = schema.field("text").type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or str(kind) == "string_view"):
        raise Unusable(file, "", f'has a column "text" of type {kind}; wanted strings')


def _parquet_row(file: SourceFile, value: Any, number: int) -> Row | Unusable:
    where = f" row {number:,}"
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        return Unusable(file, where, f"is not UTF-8: its byte {error.start} ({error.reason})")
    if text is None:
        return Unusable(file, where, 'has null as "text"')
    size = len(text) if text.isascii() else len(text.encode())
    if size > LONGEST_ROW:
        return Unusable(file, where, f"has {size:,} bytes, the longest row may have {LONGEST_ROW:,}")
    return Row(text, size, number, number)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:300]
