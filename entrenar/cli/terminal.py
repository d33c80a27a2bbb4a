"""Words on a terminal: colour where it is welcome, text from files made harmless, columns."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TextIO

from entrenar.training.progress import one_line as visible

STYLES = {"bold": "1", "dim": "2", "red": "1;31", "green": "32", "yellow": "33"}


def colours(stream: TextIO | None = None) -> bool:
    """Whether this stream (default: standard output) is a terminal that wants colour: see no-color.org."""
    stream = sys.stdout if stream is None else stream
    if stream is None or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return stream.isatty()


def paint(text: str, style: str) -> str:
    """The text in a style of STYLES, where standard output shows styles."""
    return f"\x1b[{STYLES[style]}m{text}\x1b[0m" if text and colours() else text


def clipped(text: str, limit: int) -> str:
    """`visible`, and no longer than `limit` letters: a file chooses its names, not the width of the table."""
    return visible(text[:limit]) if len(text) <= limit else visible(text[: limit - 3]) + "..."


def columns(rows: Sequence[Sequence[str]], *, left: int = 1) -> list[str]:
    """Rows of equal length as lines; the first `left` columns begin, the others end in line."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if number < left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def facts(pairs: Sequence[tuple[str, object]], width: int = 12, most: int = 200) -> list[str]:
    """Name and value, a line each, at most so many."""
    names = [clipped(name, 48) for name, _ in pairs[:most]]
    width = max([width, *map(len, names)])
    lines = [f"{name:<{width}}  {visible(value)}" for name, (_, value) in zip(names, pairs, strict=False)]
    return lines + ([f"... and {len(pairs) - most:,} more"] if len(pairs) > most else [])
