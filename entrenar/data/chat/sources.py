"""Where fine-tuning data comes from: files, and folders laid out for it.

    chats.jsonl          a row per line; .ndjson is the same
    chats.json           an array of rows, or a row per line: what stands in the file decides, not its name
    chats.jsonl.gz       packed; .zst too
    folder/              train.jsonl, and what is held out in valid.jsonl (val, validation); test.jsonl is left alone
    'chats/*.jsonl'      the files a glob pattern finds
    -                    standard input

What cannot be read comes as an Unusable in its place, with file and line.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from entrenar.data.chat.rows import BadRow, Keys, Row, sniffed
from entrenar.data.corpus import KINDS, PACKINGS, CorpusError, SourceFile, find_sources
from entrenar.data.documents import Unusable
from entrenar.data.rows import BOM, lines
from entrenar.data.streams import opened, read
from entrenar.formats import FormatError
from entrenar.formats.strict_json import USUAL_VALUES, parse

HELD_OUT = ("valid", "val", "validation")
LONGEST_ARRAY = 1 << 30  # bytes of a file that is one array: it is read as a whole
BLANK = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Files:
    """The files to train on, and those that are held out: none where a share of the former is to be."""

    source: str
    train: tuple[SourceFile, ...]
    held_out: tuple[SourceFile, ...] = ()


class Found(NamedTuple):
    """A row, and the number of its line (of an array: the line it begins on)."""

    row: Row
    number: int


def find_files(source: str) -> Files:
    """The files of a source. Raises CorpusError."""
    path = Path(os.path.expanduser(source))
    if source and path.is_dir():
        return _folder(source, path)
    if source != "-" and not path.is_file() and not glob.has_magic(source):
        fault = "is no regular file" if path.exists() else "does not exist"
        raise CorpusError(
            f"data.source: {source!r} {fault} (looked from {Path.cwd()}); wanted a file .jsonl or .json, a folder "
            "with train.jsonl, a glob pattern, or '-' for standard input"
        )
    files = find_sources("jsonl:-" if source == "-" else source).files
    if bad := [str(file) for file in files if file.kind == "parquet"]:
        raise CorpusError(f"data.source: {bad[0]} is Parquet; fine-tuning data is JSONL: df.to_json(..., lines=True)")
    return Files(source, files)


def _folder(source: str, folder: Path) -> Files:
    train, held_out = (_named(folder, names) for names in (("train",), HELD_OUT))
    if not train:
        raise CorpusError(
            f"data.source: {source!r} has no train.jsonl (nor train.json, packed or not); wanted one, and what is "
            f"held out in valid.jsonl; or name the files: {os.path.join(source, '*.jsonl')!r}"
        )
    return Files(source, train, held_out)


def _named(folder: Path, names: tuple[str, ...]) -> tuple[SourceFile, ...]:
    """The one file of these names, with any of the endings; none where there is none."""
    endings = [kind + packing for kind in (*KINDS, ".json") if kind != ".parquet" for packing in ("", *PACKINGS)]
    found = [path for name in names for ending in endings if (path := folder / (name + ending)).is_file()]
    if len(found) > 1:
        raise CorpusError(f"data.source: {found[0]} and {found[1].name} are there both; keep one of them")
    return tuple(SourceFile(path.name, path, "jsonl", PACKINGS.get(path.suffix, "")) for path in found)


def rows(file: SourceFile, keys: Keys) -> Iterator[Found | Unusable]:
    """The rows of a file, one after the other; what cannot be used comes as an Unusable."""
    try:
        values = _array(file) if _is_array(file) else _lines(file)
        for one in values:
            yield one if isinstance(one, Unusable) else _found(file, one[0], one[1], keys)
    except Unusable as bad:  # the rest of the file
        yield bad


def _found(file: SourceFile, number: int, text: str | bytes, keys: Keys) -> Found | Unusable:
    try:
        value = parse(text, str(file), first_line=number, values=USUAL_VALUES)
        return Found(sniffed(value, keys), number)
    except FormatError as error:
        return Unusable(file, "", str(error).removeprefix(str(file)).lstrip(": "))
    except BadRow as error:
        return Unusable(file, f" line {number:,}", str(error))


def _lines(file: SourceFile) -> Iterator[tuple[int, bytes] | Unusable]:
    for line in lines(file):
        yield line if isinstance(line, Unusable) else (line.number, line.raw.rstrip(b"\r\n"))


def _is_array(file: SourceFile) -> bool:
    with opened(file) as stream:
        while block := read(stream, file, 4096):
            if rest := block.removeprefix(BOM).lstrip():
                return rest.startswith(b"[")
    return False


def _array(file: SourceFile) -> Iterator[tuple[int, str] | Unusable]:
    """(line, text) of every element of an array."""
    text, line, done = _whole(file), 1, 0
    at = text.index("[") + 1
    scan = json.JSONDecoder().raw_decode
    while (at := _behind_blank(text, at)) < len(text) and text[at] != "]":
        line, done = line + text.count("\n", done, at), at
        try:
            _, end = scan(text, at)
        except json.JSONDecodeError as error:
            where, column = line + text.count("\n", at, error.pos), error.pos - text.rfind("\n", 0, error.pos)
            fault = f"is not JSON: {error.msg[:1].lower()}{error.msg[1:]} at column {column}"
            raise Unusable(file, f" line {where:,}", fault) from None
        except (RecursionError, ValueError) as error:  # and numbers of thousands of digits
            fault = "is nested too deeply" if isinstance(error, RecursionError) else "has a number that is too long"
            raise Unusable(file, f" line {line:,}", fault) from None
        yield line, text[at:end]
        at = _behind_comma(file, text, end)
    if _behind_blank(text, at + 1) < len(text) or at >= len(text):
        raise Unusable(file, "", "is cut off: its array has no end" if at >= len(text) else "goes on after its array")


def _whole(file: SourceFile) -> str:
    parts: list[bytes] = []
    size = 0
    with opened(file) as stream:
        while block := read(stream, file):
            parts.append(block)
            if (size := size + len(block)) > LONGEST_ARRAY:
                raise Unusable(file, "", f"is an array of more than {LONGEST_ARRAY:,} bytes; write a row per line")
    raw = b"".join(parts).removeprefix(BOM)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line = 1 + raw.count(b"\n", 0, error.start)
        fault = f"is not UTF-8: its byte {error.start:,} is 0x{raw[error.start]:02x} ({error.reason})"
        raise Unusable(file, f" line {line:,}", fault) from None


def _behind_blank(text: str, at: int) -> int:
    found: Any = BLANK.match(text, at)
    return found.end()


def _behind_comma(file: SourceFile, text: str, at: int) -> int:
    """Where the next element begins, or the array ends."""
    at = _behind_blank(text, at)
    if at < len(text) and text[at] not in ",]":
        line = 1 + text.count("\n", 0, at)
        raise Unusable(file, f" line {line:,}", f"is not JSON: {text[at]!r} between two rows; wanted a comma")
    if text[at : at + 1] != ",":
        return at
    after = _behind_blank(text, at + 1)
    if text[after : after + 1] == "]":
        raise Unusable(file, f" line {1 + text.count(chr(10), 0, at):,}", "is not JSON: a comma after the last row")
    return after
