"""Sources: which files a text is made of, and what kind each is.

A source is named by one string:

    stdlib:            the Python standard library's own source on this machine: real text, always there
    path/to/file.txt   one text file; its last part is held out, cut at the start of a line
    path/to/rows.jsonl a document per line, {"text": "..."}; .ndjson is the same
    path/to/x.parquet  a document per row, in the column "text" (needs the extra `parquet`)
    path/to/folder     every file below it (hidden ones and binary ones are left out); kinds may be mixed
    'notes/**/*.md'    the files a glob pattern finds
    -                  standard input, treated like one text file; jsonl:- has a document per line

Text and JSONL may be packed: .gz or .zst after the name. Leaves out reading (documents.py), which side a document
goes to (scan.py) and tokens.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import os
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STDLIB = "stdlib:"
STDLIB_LEAVES_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
STDIN = {"-": "text", "jsonl:-": "jsonl"}
STDIN_NAME = "standard input"

KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
PACKINGS = {".gz": "gzip", ".zst": "zstd"}


class CorpusError(ValueError):
    """The text cannot be used; the message says which file, what is wrong and what was wanted."""


@dataclass(frozen=True)
class SourceFile:
    """One file of a source. `name` is what stays the same on other machines: the path below the source."""

    name: str
    path: Path
    kind: str = "text"  # or "jsonl", "parquet"
    packing: str = ""  # or "gzip", "zstd"

    def __str__(self) -> str:
        """What messages call it."""
        return STDIN_NAME if self.name == STDIN_NAME else printable(str(self.path))


@dataclass(frozen=True)
class Sources:
    """The files behind a source, sorted by name. `content` is the hash of standard input, if that was it."""

    source: str
    files: tuple[SourceFile, ...]
    content: str = ""

    def fingerprint(self) -> str:
        """Changes when a file is added, removed, renamed or written to; reads no file."""
        digest = hashlib.blake2b(os.fsencode(self.source), digest_size=16)
        if self.content:
            digest.update(self.content.encode())
            return digest.hexdigest()
        for file in self.files:
            try:
                stat = file.path.stat()
            except OSError as error:
                raise CorpusError(f"data.source: {file} has gone: {error.strerror}") from None
            facts = f"\0{file.name}\0{file.path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}"
            digest.update(os.fsencode(facts))  # a name may hold bytes that are no UTF-8
        return digest.hexdigest()


def find_sources(source: str) -> Sources:
    """The files that `source` names. Raises CorpusError when there are none."""
    if source == STDLIB:
        return Sources(source, _stdlib_files())
    if source in STDIN:
        path, content = _standard_input()
        return Sources(source, (SourceFile(STDIN_NAME, path, STDIN[source]),), content)
    path = Path(os.path.expanduser(source))
    if not source:
        raise CorpusError("data.source is empty: wanted a text file, a folder ('.' is this one), a glob pattern or '-'")
    if path.is_file():
        return Sources(source, (source_file(path.name, path),))
    if path.is_dir():
        files = _files_below(path)
        wanted = "a folder with text files"
    elif glob.has_magic(source):
        found = sorted(Path(p) for p in glob.glob(str(path), recursive=True))
        files = tuple(source_file(p.as_posix(), p) for p in found if p.is_file())
        wanted = "a pattern that finds files"
    else:
        fault = "is neither a file nor a folder" if path.exists() else "does not exist"
        raise CorpusError(
            f"data.source: {source!r} {fault} (looked from {Path.cwd()}); wanted a text file, a folder, a glob "
            f"pattern, '-' for standard input ('jsonl:-': with a document per line), or '{STDLIB}'"
        )
    if not files:
        raise CorpusError(f"data.source: {source!r} holds no files; wanted {wanted}")
    return Sources(source, files)


def source_file(name: str, path: Path) -> SourceFile:
    """The file with what its name's ending says: notes.jsonl.gz is JSONL, packed by gzip."""
    stem, ending = os.path.splitext(name.lower())
    packing = PACKINGS.get(ending, "")
    kind = KINDS.get(os.path.splitext(stem)[1] if packing else ending, "text")
    return SourceFile(name, path, "text" if packing and kind == "parquet" else kind, packing)


def printable(name: str) -> str:
    """The name of a file, with escapes for bytes that are no UTF-8 and for what a terminal would act on."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return text if text.isprintable() else repr(text)[1:-1]


def is_held_out(name: str, share: float) -> bool:
    """Whether a stable hash of the name, as a number in [0, 1), falls below `share`."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


@functools.cache
def _spooled() -> tuple[Any, str]:
    """Standard input in a temporary file, which goes when this process ends, and the hash of its bytes."""
    digest = hashlib.blake2b(digest_size=16)
    kept = tempfile.NamedTemporaryFile(prefix="entrenar-stdin-")  # noqa: SIM115 (as long as the process lives)
    while block := sys.stdin.buffer.read(1 << 20):
        digest.update(block)
        kept.write(block)
    kept.flush()
    return kept, digest.hexdigest()


def _standard_input() -> tuple[Path, str]:
    if sys.stdin is None:
        raise CorpusError("data.source: '-' is standard input, which is closed; name a file, or pipe the text in")
    kept, content = _spooled()
    return Path(kept.name), content


def _stdlib_files() -> tuple[SourceFile, ...]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in STDLIB_LEAVES_OUT)
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise CorpusError(
            f"data.source: no .py files in {root}: this Python keeps its library elsewhere; name a text"
        )
    return _named(root, files)


def _files_below(root: Path) -> tuple[SourceFile, ...]:
    def unreadable(error: OSError) -> None:
        raise CorpusError(
            f"data.source: cannot read the folder {printable(error.filename)}: {error.strerror}; what is in it would "
            "be missing: let it be read, or name what you mean by a glob pattern"
        )

    files = []
    for folder, folders, names in os.walk(root, onerror=unreadable):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__pycache__")
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    return _named(root, [path for path in files if path.is_file()])


def _named(root: Path, paths: list[Path]) -> tuple[SourceFile, ...]:
    """The files by their paths below `root`, sorted by these."""
    names = sorted((path.relative_to(root).as_posix(), path) for path in paths)
    return tuple(source_file(name, path) for name, path in names)
