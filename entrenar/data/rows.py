"""Files with many documents: a row each, of JSONL or Parquet, read one after the other.

A row that cannot be used comes as an Unusable in its place: the next one may be fine. Rows are held in memory whole,
which is why they have a limit, LONGEST_ROW.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

from entrenar.data import streams
from entrenar.data.corpus import CorpusError, SourceFile
from entrenar.data.streams import Moved, Unusable, damaged, on_disk, opened

LONGEST_ROW = 16 << 20  # bytes of one line of JSONL, or of one text in it
PARQUET_BATCH = 64  # rows
BOM = b"\xef\xbb\xbf"


class Row(NamedTuple):
    """One document of many: the text, its bytes, its line (of JSONL; row of Parquet), where the next one begins."""

    text: str
    size: int
    number: int
    after: int  # byte of the unpacked file (JSONL), rows read (Parquet)


def rows(file: SourceFile, at: int = 0, number: int = 0, moved: Moved = lambda read: None) -> Iterator[Row | Unusable]:
    """The documents after row `number`, which ends at `at`. What cannot be read comes as Unusable, in its place."""
    try:
        yield from (_parquet_rows if file.kind == "parquet" else _jsonl_rows)(file, at, number, moved)
    except Unusable as bad:  # the rest of the file
        yield bad


def place(file: SourceFile, number: int) -> str:
    """Where a row stands, for people: "corpus.jsonl line 17", "corpus.parquet row 3"."""
    return f"{file} {'row' if file.kind == 'parquet' else 'line'} {number:,}"


class Line(NamedTuple):
    """A line of an unpacked file: its bytes, its number from 1 on, where it begins and where the next one does."""

    raw: bytes
    number: int
    start: int
    after: int


def lines(file: SourceFile, at: int = 0, number: int = 0,
          moved: Moved = lambda read: None) -> Iterator[Line | Unusable]:  # fmt: skip
    """The lines after line `number`, which ends at `at`; blank ones left out. Raises Unusable for a damaged file."""
    with opened(file, at) as stream:
        told = at
        while True:
            try:
                line = stream.readline(LONGEST_ROW + 1)
                size = len(line) if len(line) <= LONGEST_ROW else len(line) + _to_line_end(stream, line)
            except Exception as error:
                bad = damaged(file, error)
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
            elif (raw := line.removeprefix(BOM) if start == 0 else line) and not raw.isspace():
                yield Line(raw, number, start, at)
            if at - told >= streams.BLOCK:
                told = at
                moved(on_disk(stream))


def _jsonl_rows(file: SourceFile, at: int, number: int, moved: Moved) -> Iterator[Row | Unusable]:
    for line in lines(file, at, number, moved):
        yield line if isinstance(line, Unusable) else _jsonl_row(file, *line)


def _to_line_end(stream: IO[bytes], line: bytes) -> int:
    """Reads on to the end of an overlong line; how many bytes that were."""
    size = 0
    while line and not line.endswith(b"\n"):
        line = stream.readline(streams.BLOCK)
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
        with pyarrow.parquet.ParquetFile(file.path, buffer_size=streams.BLOCK, pre_buffer=False) as table:
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
