"""Corpora: where text comes from, and which part of it the model never trains on.

A source is named by one string:

    stdlib:            the Python standard library's own source on this machine: real text, always there
    path/to/file.txt   one text file; its last part is held out, cut at the start of a line
    path/to/folder     every file below it (hidden ones and binary ones are left out)
    'notes/**/*.md'    the files a glob pattern finds
    -                  standard input, treated like one file

Of many files, each goes to one side or the other by a hash of its name: stable between machines and runs, and
unmoved when files are added. Where they are so few that the hash leaves a side empty, the last part of each is
held out. Leaves out tokens (tokenizer.py) and batches (batches.py).
"""

from __future__ import annotations

import functools
import glob
import hashlib
import os
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

STDLIB = "stdlib:"
STDLIB_LEAVES_OUT = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


class CorpusError(ValueError):
    """The text cannot be used; the message says which file, what is wrong and what was wanted."""


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents held out; `skipped` files were not text."""

    source: str
    train: list[str]
    held_out: list[str]
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sources:
    """The files behind a source: (name, path), sorted by name. `text` is set for standard input alone."""

    source: str
    files: tuple[tuple[str, Path], ...]
    text: bytes | None = None

    def fingerprint(self) -> str:
        """Changes when a file is added, removed, renamed or written to; reads no file."""
        digest = hashlib.blake2b(os.fsencode(self.source), digest_size=16)
        if self.text is not None:
            digest.update(self.text)
        for name, path in self.files:
            stat = path.stat()
            facts = f"\0{name}\0{path.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}"
            digest.update(os.fsencode(facts))  # a name may hold bytes that are no UTF-8
        return digest.hexdigest()


def find_sources(source: str) -> Sources:
    """The files that `source` names. Raises CorpusError when there are none."""
    if source == STDLIB:
        return Sources(source, _stdlib_files())
    if source == "-":
        return Sources(source, (), _stdin_bytes())
    path = Path(os.path.expanduser(source))
    if path.is_file():
        return Sources(source, ((path.name, path),))
    if path.is_dir():
        files = _files_below(path)
        wanted = "a folder with text files"
    elif glob.has_magic(source):
        found = sorted(Path(p) for p in glob.glob(str(path), recursive=True))
        files = tuple((p.as_posix(), p) for p in found if p.is_file())
        wanted = "a pattern that finds files"
    else:
        fault = "is neither a file nor a folder" if path.exists() else "does not exist"
        raise CorpusError(
            f"data.source: {source!r} {fault} (looked from {Path.cwd()}); "
            f"wanted a text file, a folder, a glob pattern, '-' for standard input, or '{STDLIB}'"
        )
    if not files:
        raise CorpusError(f"data.source: {source!r} holds no files; wanted {wanted}")
    return Sources(source, files)


def read_corpus(sources: Sources, *, held_out: float = 0.05) -> Corpus:
    """Read every file and set about `held_out` of the text aside.

    Raises CorpusError for text that is not UTF-8 (naming line and byte), for binary files where a file was
    named, and where one of the two sides would be empty.
    """
    if sources.text is not None:
        return _split_one("standard input", sources.source, _decode(sources.text, "standard input"), held_out)
    if len(sources.files) == 1:
        name, path = sources.files[0]
        return _split_one(str(path), sources.source, _decode(_read(path), str(path)), held_out)

    texts, skipped = _read_texts(sources)
    if not texts:
        raise CorpusError(
            f"data.source: {sources.source!r}: all {len(sources.files)} files are empty or binary"
        )
    train = [text for name, text in texts.items() if not is_held_out(name, held_out)]
    held = [text for name, text in texts.items() if is_held_out(name, held_out)]
    if not train or not held:
        train, held = _split_each(list(texts.values()), held_out)
        if not train or not held:
            raise CorpusError(f"data.source: {sources.source!r}: too little text to hold a part out")
    return Corpus(sources.source, train, held, skipped)


def is_held_out(name: str, share: float) -> bool:
    """Whether a stable hash of the name, as a number in [0, 1), falls below `share`."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def _read_texts(sources: Sources) -> tuple[dict[str, str], tuple[str, ...]]:
    """Text by name, of every file that has some; and the names of those that are no text."""
    texts: dict[str, str] = {}
    skipped: list[str] = []
    for name, path in sources.files:
        raw = _read(path)
        if b"\0" in raw:
            skipped.append(name)
            continue
        try:
            text = _decode(raw, str(path))
        except CorpusError:
            if sources.source != STDLIB:  # whose files may declare another encoding, and are not the user's
                raise
            skipped.append(name)
            continue
        if text.strip():
            texts[name] = text
    return texts, tuple(skipped)


def _split_one(name: str, source: str, text: str, held_out: float) -> Corpus:
    if not text.strip():
        raise CorpusError(f"data.source: {name} is empty; wanted UTF-8 text")
    cut = _cut(text, held_out)
    if cut == 0:
        raise CorpusError(f"data.source: {name} has {len(text)} characters: too short to hold a part out")
    return Corpus(source, [text[:cut]], [text[cut:]])


def _split_each(texts: Sequence[str], held_out: float) -> tuple[list[str], list[str]]:
    cuts = [(text, _cut(text, held_out)) for text in texts]
    return [text[:cut] for text, cut in cuts if cut], [text[cut:] for text, cut in cuts if cut]


def _cut(text: str, held_out: float) -> int:
    """Where the last part begins: at the start of a line, if that leaves at least half of what was asked."""
    size = max(1, int(len(text) * held_out))
    line = text.find("\n", len(text) - size) + 1
    return line if 0 < line <= len(text) - size / 2 else len(text) - size


def _decode(raw: bytes, name: str) -> str:
    if (zero := raw.find(b"\0")) >= 0:
        raise CorpusError(f"data.source: {name} is binary, not text: byte {zero} is NUL; wanted UTF-8")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise CorpusError(
            f"data.source: {name} is not UTF-8: line {line}, byte {error.start} is 0x{raw[error.start]:02x} "
            f"({error.reason}); convert it first, e.g. with iconv -f latin1 -t utf-8"
        ) from None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CorpusError(f"data.source: cannot read {path}: {error.strerror}") from None


@functools.cache
def _stdin_bytes() -> bytes:
    return sys.stdin.buffer.read()


def _stdlib_files() -> tuple[tuple[str, Path], ...]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in STDLIB_LEAVES_OUT)
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise CorpusError(
            f"data.source: no .py files in {root}: this Python keeps its library elsewhere; name a text"
        )
    return tuple(sorted((path.relative_to(root).as_posix(), path) for path in files))


def _files_below(root: Path) -> tuple[tuple[str, Path], ...]:
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__pycache__")
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    return tuple(sorted((p.relative_to(root).as_posix(), p) for p in files if p.is_file()))
