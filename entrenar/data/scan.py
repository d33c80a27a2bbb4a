"""The first reading of a corpus: is all of it text, how much is it, and which side does each document go to?

Of many documents each goes to one side or the other by a hash, stable between machines and runs and unmoved when
others are added: a text file by its name, a row of JSONL or Parquet by its text (so that copies of it stay
together). Of a single text file the last part is held out, cut at the start of a line; and so it is of every
document where they are so few that the hash leaves a side empty.

Every file is read to its end before anything is refused, so that the error can say how much is bad.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from entrenar.data.corpus import STDLIB, CorpusError, SourceFile, Sources, is_held_out, printable
from entrenar.data.documents import Unusable, rows, text_slabs

PATIENCE = 30.0  # seconds of further reading once something bad was found
NAMED = 10  # of what was left out, so many are named

Say = Callable[..., None]


class Progress:
    """Tells `say` how many bytes of all files have been read, twice a second at most."""

    def __init__(self, sources: Sources, say: Say) -> None:
        self.say, self.text, self.told = say, "", 0.0
        self.before, total = [], 0
        for file in sources.files:
            self.before.append(total)
            total += file.path.stat().st_size if file.path.exists() else 0
        self.total = total

    def begin(self, text: str) -> None:
        self.text, self.told = text, time.monotonic()
        self.say(text, 0, self.total)

    def moved(self, number: int) -> Callable[[int], None]:
        """For the reading of file `number`: what it calls with the bytes it has read."""
        return lambda read: self.at(self.before[number] + read)

    def at(self, done: int) -> None:
        if (now := time.monotonic()) - self.told >= 0.5:
            self.told = now
            self.say(self.text, min(done, self.total), self.total)


@dataclass
class Scan:
    """What the first reading found; plain values, fit for JSON. Lists have an entry per file."""

    tails: bool = False  # whether the last part of each document is held out, not some documents
    chars: list[int] = field(default_factory=list)  # characters of a text file; -1: it is left out
    cuts: list[int] = field(default_factory=list)  # with `tails`: characters before its held-out part
    train_chars: int = 0  # about
    skipped: list[str] = field(default_factory=list)  # the first few names
    skipped_documents: int = 0

    def skip(self, name: str) -> None:
        self.skipped_documents += 1
        if len(self.skipped) < NAMED:
            self.skipped.append(printable(name))


@dataclass
class _Sides:
    """Documents and characters so far on each side, by the hash."""

    held_out: float
    documents: list[int] = field(default_factory=lambda: [0, 0])
    chars: list[int] = field(default_factory=lambda: [0, 0])
    longest: int = 0

    def add(self, name: str, chars: int) -> None:
        side = is_held_out(name, self.held_out)
        self.documents[side] += 1
        self.chars[side] += chars
        self.longest = max(self.longest, chars)


class _Faults:
    """What cannot be used: the first of it, and how much more there is."""

    def __init__(self, *, patience: float) -> None:
        self.first, self.patience = "", patience
        self.count, self.files, self.deadline = 0, set[int](), math.inf

    def add(self, number: int, bad: Unusable) -> None:
        self.count += 1
        self.files.add(number)
        if self.count == 1:
            self.first, self.deadline = str(bad), time.monotonic() + self.patience

    def must_not_be_late(self) -> None:
        """Raises CorpusError when enough time has gone into counting what is bad."""
        if time.monotonic() > self.deadline:
            raise self.error(whole=False)

    def error(self, *, whole: bool) -> CorpusError:
        more, text = self.count - 1, self.first
        if more or not whole:
            least = "" if whole else "at least "
            files = f" in {len(self.files):,} files" if len(self.files) > 1 else ""
            text += f"; and {least}{more:,} more cannot be used{files}"
            text += "" if whole else f" (not read to the end: {self.patience:.0f} seconds had gone)"
        return CorpusError(f"data.source: {text}; --skip-bad (data.skip_bad) leaves out what cannot be used")


def scan(sources: Sources, *, held_out: float, skip_bad: bool, progress: Progress) -> Scan:
    """Read every file once.

    Raises CorpusError for text that is not UTF-8, binary files where a file was named, damaged ones, broken rows
    (unless `skip_bad`: then they are left out, and named in the Scan), and where one of the two sides would be empty.
    """
    found, sides = Scan(), _Sides(held_out)
    faults = _Faults(patience=math.inf if skip_bad else PATIENCE)
    for number, file in enumerate(sources.files):
        faults.must_not_be_late()
        moved = progress.moved(number)
        if file.kind == "text":
            found.chars.append(_scan_text(sources, number, found, faults, moved))
            if found.chars[-1] > 0:
                sides.add(file.name, found.chars[-1])
        else:
            found.chars.append(-1)
            _scan_rows(file, number, found, faults, sides, moved)
    if faults.count and not skip_bad:
        raise faults.error(whole=True)
    _must_hold_text(sources, found, sides)
    alone = len(sources.files) == 1 and sources.files[0].kind == "text"
    found.tails = alone or not all(sides.documents)
    found.train_chars = sides.chars[False]
    if found.tails:
        _cut_tails(sources, found, sides, held_out)
    return found


def _scan_text(sources: Sources, number: int, found: Scan, faults: _Faults, moved: Callable[[int], None]) -> int:
    """Characters of one text file; -1 where it is left out: blank, or unusable."""
    file = sources.files[number]
    try:
        chars, blank = _measured(file, moved)
        return -1 if blank else chars
    except Unusable as bad:
        # a folder may hold pictures; the standard library declares other encodings, and is not the user's
        harmless = {"binary"} if len(sources.files) > 1 else set()
        harmless |= {"encoding"} if sources.source == STDLIB else set()
        if bad.kind not in harmless:
            faults.add(number, bad)
        found.skip(file.name)
        return -1


def _scan_rows(file: SourceFile, number: int, found: Scan, faults: _Faults, sides: _Sides,
               moved: Callable[[int], None]) -> None:  # fmt: skip
    for row in rows(file, moved=moved):
        if isinstance(row, Unusable):
            faults.add(number, row)
            faults.must_not_be_late()
            found.skip(row.place)
        elif not is_blank(row.text):
            sides.add(row.text, len(row.text))


def is_blank(text: str) -> bool:
    return not text or text.isspace()


def cut_of(text: str, held_out: float) -> int:
    """Where the last part begins: at the start of a line, if that leaves at least half of what was asked.

    Of one character nothing is held out.
    """
    return _cut(iter([text]), len(text), held_out)


def _measured(file: SourceFile, moved: Callable[[int], None]) -> tuple[int, bool]:
    """Characters, and whether they are blank. Raises Unusable."""
    chars, blank = 0, True
    for slab in text_slabs(file, moved=moved):
        chars += len(slab)
        blank = blank and is_blank(slab)
    return chars, blank


def _must_hold_text(sources: Sources, found: Scan, sides: _Sides) -> None:
    if any(sides.documents):
        return
    left_out = f" ({found.skipped_documents:,} documents that cannot be used were left out)" * bool(found.skipped)
    if len(sources.files) == 1:
        raise CorpusError(f"data.source: {sources.files[0]} is empty; wanted UTF-8 text{left_out}")
    raise CorpusError(f"data.source: {sources.source!r}: all {len(sources.files)} files are empty or binary{left_out}")


def _cut_tails(sources: Sources, found: Scan, sides: _Sides, held_out: float) -> None:
    """Where each text file is cut. Raises CorpusError where no document is long enough to be cut."""
    if sides.longest < 2:
        fault = f"{sources.source!r}: too little text to hold a part out"
        if len(sources.files) == 1:
            fault = f"{sources.files[0]} has {sides.longest} characters: too short to hold a part out"
        raise CorpusError(f"data.source: {fault}")
    found.cuts = [
        _cut(text_slabs(file), chars, held_out) if chars > 0 and file.kind == "text" else 0
        for file, chars in zip(sources.files, found.chars, strict=True)
    ]
    of_rows = sum(sides.chars) - sum(max(0, chars) for chars in found.chars)
    found.train_chars = sum(found.cuts) + round(of_rows * (1 - held_out))


def _cut(slabs: Iterator[str], chars: int, held_out: float) -> int:
    """`cut_of`, of a text that comes in slabs and has `chars` characters."""
    if chars < 2:
        return chars
    size = max(1, int(chars * held_out))
    start, last = chars - size, chars - size / 2
    seen = 0
    for slab in slabs:
        if seen + len(slab) > start and (line := slab.find("\n", max(0, start - seen))) >= 0:
            return seen + line + 1 if seen + line + 1 <= last else start
        seen += len(slab)
        if seen > last:
            break
    return start
