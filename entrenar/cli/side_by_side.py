"""Answers beside each other: in columns where the terminal is wide enough, row by row as they are written.

A row is shown as soon as every column has it whole; that column is written on which is behind. Nothing on the terminal
is ever painted over, so that it can be scrolled and copied. On a narrow terminal one comes after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

NARROWEST, GAP = 36, " | "


class Column:
    """A text that comes in pieces, in lines of a width."""

    def __init__(self, title: str, pieces: Iterable[str], width: int) -> None:
        self.title, self.pieces, self.width = title, iter(pieces), width
        self.text, self.done = "", False
        self.lines: list[str] = []

    def go_on(self) -> None:
        """Take one piece more."""
        piece = next(self.pieces, None)
        self.done = piece is None
        self.text += piece or ""
        lines = wrapped(self.text, self.width)
        self.lines = lines if self.done else lines[:-1]  # the last may still grow

    def has(self, row: int) -> bool:
        """Whether nothing can change in this row any more."""
        return self.done or row < len(self.lines)

    def row(self, number: int) -> str:
        return self.lines[number] if number < len(self.lines) else ""


def widths(count: int, terminal: int) -> int:
    """Letters of each of so many columns; 0 where they would be too narrow."""
    width = (terminal - 1 - len(GAP) * (count - 1)) // count
    return width if width >= NARROWEST else 0


def show(answers: Sequence[tuple[str, Iterable[str]]], width: int, put: Callable[[str], object]) -> None:
    """Write answers (title, pieces) as columns of this width, a row at a time."""
    columns = [Column(title, pieces, width) for title, pieces in answers]
    put(joined([column.title for column in columns], width))
    put(joined(["-" * min(width, letters(column.title)) for column in columns], width))
    row = 0
    while not all(column.done for column in columns) or row < max(len(column.lines) for column in columns):
        if all(column.has(row) for column in columns):
            put(joined([column.row(row) for column in columns], width))
            row += 1
        else:
            min((column for column in columns if not column.done), key=lambda column: len(column.lines)).go_on()


def joined(cells: Sequence[str], width: int) -> str:
    padded = [cell + " " * (width - letters(cell)) for cell in cells[:-1]]
    return GAP.join([*padded, cells[-1]]).rstrip() + "\n"


def wrapped(text: str, width: int) -> list[str]:
    """The text in lines, broken at spaces where there are any; what is added at its end changes only the last."""
    lines = []
    for line in text.expandtabs(4).split("\n"):
        while letters(line) > width:
            cut = fitting(line, width)
            space = line.rfind(" ", 0, cut + 1)
            at = space if line[:space].strip() and space > 0 else cut
            lines.append(line[:at])
            line = line[at + 1 :] if at == space else line[at:]
        lines.append(line)
    return lines


def fitting(line: str, width: int) -> int:
    """How many characters of a line fit into so many columns of a terminal; at least 1."""
    used = 0
    for at, character in enumerate(line):
        used += letters(character)
        if used > width:
            return max(1, at)
    return len(line)


def letters(text: str) -> int:
    """How wide a terminal shows a text: some characters take two columns, some none."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)
