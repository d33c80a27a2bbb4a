"""The folder in which a preparation is made: killed at any moment, the next one goes on where it was.

`NAME.partial` stands beside the folder NAME it will become, and holds, in the order in which they come:

    key          of what: another one, and all the rest is stale
    scan.json    what the first reading found (scan.py)
    tokenizer/   the tokenizer
    train.tokens, held_out.tokens, places, held_out.head
                 what has been encoded; `held_out.head` is the text that gzip and xz will compress
    journal.json how far: what is longer than the journal says is cut off by the next preparation

One process at a time works in it, by a lock (flock) on the folder; another one waits.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from entrenar.data.pieces import BEGINNING, Position
from entrenar.data.scan import Scan
from entrenar.files import sync, write_file
from entrenar.formats.strict_json import read_object

TRAIN, HELD_OUT, PLACES, HEAD = "train.tokens", "held_out.tokens", "places", "held_out.head"
TOKENIZER = "tokenizer"
_KEY, _SCAN, _JOURNAL = "key", "scan.json", "journal.json"
_LIMIT = 1 << 30  # bytes of scan.json: some 20 per file of the corpus


@dataclass
class Journal:
    """How far encoding has come. Pairs are (training, held out)."""

    position: Position = BEGINNING
    tokens: list[int] = field(default_factory=lambda: [0, 0])
    documents: list[int] = field(default_factory=lambda: [0, 0])
    bytes: list[int] = field(default_factory=lambda: [0, 0])
    places: int = 0
    head: int = 0


class Work:
    """The folder `NAME.partial`, made and locked; use it in a `with`.

    Raises OSError where it cannot be made. At the end of the `with` it stays, for the next preparation, unless it
    has become NAME or nothing is in it; with a ValueError (the text cannot be used) it goes.
    """

    def __init__(self, target: Path, key: str, say: Callable[..., None]) -> None:
        self.target, self.folder = target, target.with_name(f"{target.name}.partial")
        self.made = [path for path in self.folder.parents if not path.exists()]
        self.finished = False
        self.lock = self._locked(say)
        try:
            self._make_ready(key)
        except OSError:
            os.close(self.lock)
            raise

    def __enter__(self) -> Work:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        if not self.finished and (kind is None or isinstance(error, ValueError)):
            shutil.rmtree(self.folder, ignore_errors=True)
            for path in self.made if kind else []:
                with contextlib.suppress(OSError):  # others use it meanwhile
                    path.rmdir()
        os.close(self.lock)

    def path(self, name: str) -> Path:
        return self.folder / name

    def scan(self, files: int) -> Scan | None:
        """What an earlier preparation found in the same files."""
        values = self._object(_SCAN)
        with contextlib.suppress(TypeError):
            found = Scan(**values)
            if len(found.chars) == files:
                return found
        return None

    def keep_scan(self, scan: Scan) -> None:
        self._keep(_SCAN, asdict(scan))

    def journal(self) -> Journal:
        """Where an earlier preparation stopped, or the beginning."""
        values = self._object(_JOURNAL)
        with contextlib.suppress(TypeError, KeyError):
            return Journal(**values | {"position": Position(*values["position"])})
        return Journal()

    def keep_journal(self, journal: Journal) -> None:
        """Call it when what the journal says is on the disk."""
        self._keep(_JOURNAL, asdict(journal))

    def finish(self) -> None:
        """Become the target: on the disk, whole, in one move. An old one in its place goes."""
        for path in self.folder.iterdir():
            sync(path)
        sync(self.folder)
        shutil.rmtree(self.target, ignore_errors=True)
        os.rename(self.folder, self.target)
        self.finished = True
        sync(self.target.parent)
        for name in (_KEY, _SCAN, _JOURNAL, HEAD):  # after the move: until then a killed run needs them
            (self.target / name).unlink(missing_ok=True)

    def _make_ready(self, key: str) -> None:
        stale = self._text(_KEY) != key
        for path in self.folder.iterdir():
            if stale or path.name.startswith("."):  # hidden: what a killed write left behind
                _remove(path)
        if stale:
            write_file(self.folder / _KEY, key)

    def _locked(self, say: Callable[..., None]) -> int:
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            number = os.open(self.folder, os.O_RDONLY)
            try:
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say("another run is preparing this text: waiting for it")
                fcntl.flock(number, fcntl.LOCK_EX)
            except OSError:
                return number  # a file system without locks: renaming still decides who was first
            with contextlib.suppress(OSError):
                if os.path.samestat(os.stat(self.folder), os.fstat(number)):
                    return number
            os.close(number)  # it was renamed while this process waited

    def forget_journal(self) -> None:
        """Encode from the beginning."""
        self.path(_JOURNAL).unlink(missing_ok=True)

    def _keep(self, name: str, values: Any) -> None:
        write_file(self.path(name), json.dumps(values))

    def _object(self, name: str) -> dict[str, Any]:
        try:
            return read_object(self.path(name), limit=_LIMIT)
        except (OSError, ValueError):
            return {}

    def _text(self, name: str) -> str:
        try:
            return self.path(name).read_text(encoding="utf-8")
        except (OSError, ValueError):
            return ""


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
