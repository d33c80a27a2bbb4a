"""The bars of memory_benchmarks.py: what arithmetic says, part by part, and what was measured; for terminals, as PNG.

Each model has its own scale: 7 billion weights and 124 million on one would leave nothing to see of the smaller.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from entrenar.examples.memory_arithmetic import (
    ACTIVATIONS,
    ADAPTERS,
    BACKWARD,
    GAPS,
    GRADIENTS,
    MOMENTS,
    PARTS,
    PROGRAM,
    SCRATCH,
    WEIGHTS,
    Case,
)
from entrenar.training.curve import BLUE, GREEN, GREY, GRID, INK, ORANGE, PALE_BLUE, PINK, SCALE, Page
from entrenar.training.display import size

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

# Okabe and Ito's, as the picture of a run has them
COLOURS = {WEIGHTS: BLUE, ADAPTERS: GREEN, GRADIENTS: PINK, MOMENTS: "#E69F00", ACTIVATIONS: PALE_BLUE,
           BACKWARD: "#F0E442", SCRATCH: "#b0b7be", GAPS: "#e4e7ea", PROGRAM: GREY}  # fmt: skip
MEASURED = ORANGE
LETTERS = 32  # of the longest bar in a terminal
WIDTH, LEFT, RIGHT, BAR, GAP = 1200, 210, 150, 16, 18  # of the picture, in points


@dataclass(frozen=True)
class Bar:
    """A case: what arithmetic says, by part, and what was measured; or why nothing was."""

    case: Case
    parts: dict[str, int]
    peak: int | None
    why: str = ""

    @property
    def said(self) -> int:
        return sum(self.parts.values())

    @property
    def words(self) -> str:
        """What stands beside the lower of the two."""
        return self.why if self.peak is None else f"{size(self.peak)} measured"


def longest(bars: Sequence[Bar]) -> dict[str, int]:
    """The most bytes of any bar of each model: its scale."""
    most: dict[str, int] = {}
    for bar in bars:
        most[bar.case.model] = max(most.get(bar.case.model, 1), bar.said, bar.peak or 0)
    return most


# ---- in a terminal


def table(bars: Sequence[Bar]) -> RenderableType:
    """Two lines for each case: arithmetic in the colours of its parts, and what was measured."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    most = longest(bars)
    shown = Table.grid(padding=(0, 2))
    for bar in bars:
        scale = LETTERS / most[bar.case.model]
        shown.add_row(bar.case.title, said_text(bar, scale))
        measured = Text("█" * max(1, round(scale * bar.peak)) if bar.peak else "", style=MEASURED)
        shown.add_row(Text(f"  {bar.case.detail}", style="dim"), measured + Text(f" {bar.words}"[not bar.peak :]))
    words = Text("  ").join(Text(f"█ {name}", style=COLOURS[name]) for name in PARTS)
    return Group(Text("above by arithmetic, below measured"), words, Text(), shown)


def said_text(bar: Bar, scale: float) -> Text:
    from rich.text import Text

    text = Text()
    for name, start, end in stacked(bar.parts):
        text.append("█" * (round(scale * end) - round(scale * start)), style=COLOURS[name])
    return text + Text(f" {size(bar.said)}")


# ---- as a picture


def picture(bars: Sequence[Bar]) -> bytes:
    """The PNG file's bytes."""
    from PIL import Image

    models = list(dict.fromkeys(bar.case.model for bar in bars))
    height = 150 + len(bars) * (2 * BAR + GAP) + len(models) * 44
    page = Page(WIDTH, height)
    page.text((30, 36), "Memory of fine-tuning", size=26)
    page.text((30, 66), "above by arithmetic, part by part; below what a process held at most", size=15, colour=GREY)
    legend(page, 96)
    y, most = 120.0, longest(bars)
    for model in models:
        y = scale(page, model, most[model], y)
        for bar in (bar for bar in bars if bar.case.model == model):
            draw_bar(page, bar, most[model], y)
            y += 2 * BAR + GAP
    image = page.image.resize((WIDTH, height), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()


def legend(page: Page, y: float) -> None:
    x = 30.0
    for name, colour in [*((name, COLOURS[name]) for name in PARTS), ("measured", MEASURED)]:
        rectangle(page, x, y - 6, x + 12, y + 6, colour)
        page.text((x + 18, y), name, size=13)
        x += 18 + page.text_width(name, 13) + 22


def scale(page: Page, model: str, most: int, y: float) -> float:
    """The model's name and an axis; returns where its bars begin."""
    page.text((30, y + 24), model, size=18)
    page.text((WIDTH - RIGHT, y + 24), size(most), size=13, colour=GREY, anchor="rm")
    page.line([(LEFT, y + 36), (WIDTH - RIGHT, y + 36)], colour=GRID, width=1)
    return y + 44


def draw_bar(page: Page, bar: Bar, most: int, y: float) -> None:
    per_byte = (WIDTH - LEFT - RIGHT) / most
    page.text((LEFT - 12, y + BAR / 2), bar.case.title, size=14, colour=INK, anchor="rm")
    page.text((LEFT - 12, y + 1.5 * BAR), bar.case.detail, size=12, colour=GREY, anchor="rm")
    for name, start, end in stacked(bar.parts):
        rectangle(page, LEFT + per_byte * start, y, LEFT + per_byte * end, y + BAR - 1, COLOURS[name])
    page.text((LEFT + per_byte * bar.said + 8, y + BAR / 2), size(bar.said), size=12, colour=GREY, halo=True)
    if bar.peak is None:
        page.text((LEFT, y + 1.5 * BAR), bar.why, size=12, colour=GREY)
        return
    rectangle(page, LEFT, y + BAR, LEFT + per_byte * bar.peak, y + 2 * BAR - 1, MEASURED)
    page.text((LEFT + per_byte * bar.peak + 8, y + 1.5 * BAR), bar.words, size=12, halo=True)


def stacked(parts: dict[str, int]) -> Iterator[tuple[str, int, int]]:
    """(name, start, end) of each part, one after the other."""
    start = 0
    for name in PARTS:
        yield name, start, start + parts[name]
        start += parts[name]


def rectangle(page: Page, left: float, top: float, right: float, bottom: float, colour: str) -> None:
    if (right - left) * SCALE >= 1:
        page.draw.rectangle([left * SCALE, top * SCALE, right * SCALE - 1, bottom * SCALE - 1], fill=colour)
