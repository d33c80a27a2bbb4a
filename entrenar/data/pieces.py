"""Documents in pieces small enough to be encoded in parallel, cut where no token changes.

    pieces(sources, scan, cut)    all of a corpus, from the beginning or from where an earlier reading stopped
    sample(sources, scan)         what a tokenizer learns from: at most LEARN_FROM characters of the training side

The tokens of the pieces, joined, are those of the document: `cut` is the tokenizer's own (see Tokenizer.cut). Only
where it finds no place in LONGEST characters is a text cut before a space, or anywhere, to keep memory bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from entrenar.data.corpus import CorpusError, SourceFile, Sources, is_held_out
from entrenar.data.documents import Unusable, rows, text_slabs
from entrenar.data.scan import Progress, Scan, cut_of, is_blank
from entrenar.data.tokenizer_cuts import LINE

PIECE = 1 << 15  # characters of a piece, about: what one core encodes at a time
LONGEST = 1 << 22  # characters of a piece at most
LEARN_FROM = 1 << 25  # characters: of more than these, a tokenizer is learned from every n-th piece ...
LEARN_FROM_MANY = 1 << 24  # ... so many together; its trainer needs some 10 bytes for each

Cut = Callable[[str, int], "int | None"]


class Position(NamedTuple):
    """A place between two pieces from where reading can go on.

    `offset` is a byte of the unpacked file, or the rows before it in a Parquet file; `line` the lines (rows) before
    it; `chars` the characters of the document before it.
    """

    file: int = 0
    offset: int = 0
    line: int = 0
    chars: int = 0


BEGINNING = Position()


class Piece(NamedTuple):
    """A part of a document, or all of it."""

    text: str
    size: int  # bytes in UTF-8
    held_out: bool
    continued: bool  # the document began before
    last: bool  # it ends here, and so does its side of it
    file: int
    line: int  # where the piece begins; of a row, where the row is
    after: Position | None  # where reading can go on after it; None inside a row


def pieces(sources: Sources, scan: Scan, cut: Cut, *, held_out: float, start: Position = BEGINNING,
           progress: Progress | None = None) -> Iterator[Piece]:  # fmt: skip
    """Every document of the corpus, in order. Raises CorpusError where a file changed since it was scanned."""
    for number in range(start.file, len(sources.files)):
        at = start if number == start.file else Position(number)
        moved = progress.moved(number) if progress else lambda read: None
        if sources.files[number].kind != "text":
            yield from _of_rows(sources.files[number], at, scan, cut, held_out, moved)
        elif scan.chars[number] >= 0:
            yield from _of_text(sources.files[number], at, scan, cut, held_out, moved)


def sample(sources: Sources, scan: Scan, *, held_out: float, progress: Progress | None = None) -> list[str]:
    """Every n-th piece of the training side, n such that at most LEARN_FROM characters come together."""
    step, room = 1, LEARN_FROM
    if scan.train_chars > LEARN_FROM:
        step, room = -(-scan.train_chars // LEARN_FROM_MANY), LEARN_FROM_MANY
    chosen, count = [], 0
    for piece in pieces(sources, scan, _between_lines, held_out=held_out, progress=progress):
        if not piece.held_out:
            if count % step == 0 and len(piece.text) <= room:
                chosen.append(piece.text)
                room -= len(piece.text)
            count += 1
    return chosen


def cut_pieces(slabs: Iterable[str], cut: Cut) -> Iterator[str]:
    """A text, which comes in slabs, in pieces of about PIECE characters and at most LONGEST."""
    text = ""
    tried = PIECE  # characters of the text in which a place to cut it is no longer looked for
    for slab in slabs:
        text, start = text + slab, 0
        while len(text) - start > tried:
            place = cut(text, start + tried)
            if place is None or place - start > LONGEST:
                if len(text) - start <= LONGEST:
                    tried = max(PIECE, len(text) - start - 2)
                    break
                space = text.rfind(" ", start + 1, start + LONGEST)
                place = space if space > 0 else start + LONGEST
            yield text[start:place]
            start, tried = place, PIECE
        text = text[start:]
    if text:
        yield text


def byte_size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _of_text(file: SourceFile, at: Position, scan: Scan, cut: Cut, held_out: float,
             moved: Callable[[int], None]) -> Iterator[Piece]:  # fmt: skip
    """One document; with scan.tails its training part, then its held-out part."""
    number, whole = at.file, scan.chars[at.file]
    parts = [(0, whole, is_held_out(file.name, held_out))]
    if scan.tails:
        border = scan.cuts[number]
        parts = [(0, border, False), (border, whole, True)]
    reader = _Reader(file, text_slabs(file, at.offset, moved))
    for first, stop, side in parts:
        for text in cut_pieces(reader.take(stop - at.chars), cut):
            size, chars = byte_size(text), at.chars + len(text)
            after = Position(number, at.offset + size, at.line + text.count("\n"), chars)
            end = Position(number + 1) if chars == whole else after
            yield Piece(text, size, side, at.chars > first, chars == stop, number, at.line, end)
            at = after
    if at.chars != whole or reader.more():
        raise _changed(file)


class _Reader:
    """Text that comes in slabs, by the character."""

    def __init__(self, file: SourceFile, slabs: Iterator[str]) -> None:
        self.file, self.slabs, self.left = file, slabs, ""

    def take(self, count: int) -> Iterator[str]:
        """The next `count` characters, in slabs."""
        while count > 0 and self.more():
            taken, self.left = self.left[:count], self.left[count:]
            count -= len(taken)
            yield taken

    def more(self) -> bool:
        """Whether there is any text left."""
        try:
            self.left = self.left or next(self.slabs, "")
        except Unusable:
            raise _changed(self.file) from None
        return bool(self.left)


def _of_rows(file: SourceFile, at: Position, scan: Scan, cut: Cut, held_out: float,
             moved: Callable[[int], None]) -> Iterator[Piece]:  # fmt: skip
    """The rows of one file, each a document."""
    for row in rows(file, at.offset, at.line, moved):
        if isinstance(row, Unusable) or is_blank(row.text):  # told, or refused, by the scan
            continue
        after = Position(at.file, row.after, row.number)
        if scan.tails:
            border = cut_of(row.text, held_out)
            parts = [(row.text[:border], False), (row.text[border:], True)]
        else:
            parts = [(row.text, is_held_out(row.text, held_out))]
        yield from _of_row(parts, cut, after)


def _of_row(parts: list[tuple[str, bool]], cut: Cut, after: Position) -> Iterator[Piece]:
    parts = [(text, side) for text, side in parts if text]
    for i, (text, side) in enumerate(parts, 1):
        short = len(text) <= PIECE
        cuts = [text] if short else list(cut_pieces([text], cut))
        for j, piece in enumerate(cuts, 1):
            last = j == len(cuts)
            at = after if last and i == len(parts) else None
            yield Piece(piece, byte_size(piece), side, j > 1, last, after.file, after.line, at)


def _between_lines(text: str, at: int) -> int | None:
    """Where byte-level BPE, which is what gets learned, may be cut."""
    found = LINE.search(text, max(0, at - 1))
    return found.end() if found else None


def _changed(file: SourceFile) -> CorpusError:
    return CorpusError(f"data.source: {file} changed while it was being prepared; copy it first, then prepare the copy")
