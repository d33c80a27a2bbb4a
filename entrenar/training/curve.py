"""The picture of a run: loss against step, with Pillow alone.

Everything is drawn at three times the size and shrunk, which smooths lines and letters alike. Colours are
Okabe and Ito's, told apart with any kind of colour vision; every line is also named where it ends.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from entrenar.observe.charts import apart, ticks
from entrenar.observe.series import smoothed

Point = tuple[float, float]

INK, GREY, GRID, PAPER = "#24292f", "#6e7781", "#e6e8eb", "#ffffff"
BLUE, PALE_BLUE, ORANGE, GREEN, PINK = "#0072B2", "#a9cfe6", "#D55E00", "#009E73", "#CC79A7"
SCALE = 3  # drawn this many times larger than shown


@dataclass(frozen=True)
class Curve:
    """What the picture shows.

    train, held_out   (step, height) points; of a long run's training the means of neighbouring steps
                      (observe/series.py)
    levels            (name, height): horizontal lines to compare with
    unit              of all heights
    """

    title: str
    subtitle: str
    train: Sequence[Point]
    held_out: Sequence[Point] = ()
    levels: Sequence[tuple[str, float]] = ()
    unit: str = "bits per byte"
    size: tuple[int, int] = (1200, 720)


def render(curve: Curve) -> bytes:
    """The picture as a PNG file's bytes."""
    from PIL import Image

    width, height = curve.size
    page = Page(width, height)
    frame = Frame.around(curve, width, height)
    _title(page, curve)
    _axes(page, frame, curve.unit)
    _levels(page, frame, curve)
    _lines(page, frame, curve)
    image = page.image.resize((width, height), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()


class Page:
    """A sheet measured in shown pixels, whatever it is drawn at."""

    def __init__(self, width: int, height: int) -> None:
        from PIL import Image, ImageDraw

        self.image = Image.new("RGB", (width * SCALE, height * SCALE), PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.fonts: dict[float, Any] = {}

    def font(self, size: float) -> Any:
        from PIL import ImageFont

        if size not in self.fonts:
            try:
                self.fonts[size] = ImageFont.load_default(size=size * SCALE)
            except TypeError:  # before Pillow 10.1: one small bitmap font
                self.fonts[size] = ImageFont.load_default()
        return self.fonts[size]

    def text(self, at: Point, words: str, *, size: float = 15, colour: str = INK, anchor: str = "lm",
             halo: bool = False) -> None:  # fmt: skip
        """Words at a point; `anchor` as in Pillow: l m r across, a m s down."""
        options: dict[str, Any] = {"stroke_width": 4 * SCALE, "stroke_fill": PAPER} if halo else {}
        where = at[0] * SCALE, at[1] * SCALE
        try:
            self.draw.text(where, words, fill=colour, font=self.font(size), anchor=anchor, **options)
            if halo:  # the stroke thickens letters: draw them once more, thin, on top
                self.draw.text(where, words, fill=colour, font=self.font(size), anchor=anchor)
        except (ValueError, TypeError):  # bitmap fonts have no anchors
            self.draw.text(where, words, fill=colour, font=self.font(size))

    def text_width(self, words: str, size: float = 15) -> float:
        return self.draw.textlength(words, font=self.font(size)) / SCALE

    def line(self, points: Sequence[Point], *, colour: str, width: float) -> None:
        scaled = [(x * SCALE, y * SCALE) for x, y in points]
        if len(scaled) > 1:
            self.draw.line(scaled, fill=colour, width=max(1, round(width * SCALE)), joint="curve")

    def dashes(
        self, a: Point, b: Point, *, colour: str, width: float, dash: float = 9, gap: float = 6
    ) -> None:
        """A dashed horizontal line."""
        x = a[0]
        while x < b[0]:
            self.line([(x, a[1]), (min(x + dash, b[0]), a[1])], colour=colour, width=width)
            x += dash + gap

    def dot(self, at: Point, radius: float, colour: str) -> None:
        for r, fill in ((radius + 2, PAPER), (radius, colour)):
            x, y, r = at[0] * SCALE, at[1] * SCALE, r * SCALE
            self.draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)


@dataclass(frozen=True)
class Frame:
    """From data to places on the page."""

    left: float
    top: float
    right: float
    bottom: float
    x: tuple[float, float]
    y: tuple[float, float]
    x_ticks: list[float] = field(default_factory=list)
    y_ticks: list[float] = field(default_factory=list)

    @classmethod
    def around(cls, curve: Curve, width: int, height: int) -> Frame:
        steps = [s for s, _ in (*curve.train, *curve.held_out)] or [0, 1]
        x = (0.0, float(max(1, *steps, 1)))
        heights = _heights(curve)
        y_ticks = ticks(min(heights), max(heights), 7)
        step = y_ticks[1] - y_ticks[0]
        y = (math.floor(min(heights) / step - 0.15) * step, math.ceil(max(heights) / step) * step)
        y = (max(0.0, y[0]), y[1])
        x_ticks = [t for t in ticks(*x, 8) if x[0] <= t <= x[1] and t.is_integer()]
        y_ticks = [y[0] + step * i for i in range(round((y[1] - y[0]) / step) + 1)]
        return cls(86, 140, width - 172, height - 76, x, y, x_ticks, y_ticks)

    def path(self, points: Sequence[Point]) -> list[Point]:
        """The places of a line's points, from where it first comes below the frame's top."""
        top = self.y[1]
        first = next((i for i, (_, y) in enumerate(points) if y <= top), len(points))
        inside = [(x, min(max(y, self.y[0]), top)) for x, y in points[first:]]
        if 0 < first < len(points):
            (x0, y0), (x1, y1) = points[first - 1], points[first]
            inside.insert(0, (x0 + (x1 - x0) * (y0 - top) / (y0 - y1), top))
        return [self.at(point) for point in inside]

    def at(self, point: Point) -> Point:
        across = (point[0] - self.x[0]) / (self.x[1] - self.x[0])
        up = (point[1] - self.y[0]) / (self.y[1] - self.y[0])
        return self.left + across * (self.right - self.left), self.bottom - up * (self.bottom - self.top)


def smooth(points: Sequence[Point]) -> list[Point]:
    """The points with their heights smoothed."""
    heights = smoothed([y for _, y in points])
    return [(step, y) for (step, _), y in zip(points, heights, strict=True)]


def _heights(curve: Curve) -> list[float]:
    """What the vertical axis must show: held-out points, levels, training without its first steep fall."""
    train = sorted(y for _, y in smooth(curve.train))
    cut = train[: max(1, math.ceil(len(train) * 0.95))]
    lowest = sorted(y for _, y in curve.train)[len(train) // 100 :][:1]
    heights = [*cut, *lowest, *(y for _, y in curve.held_out), *(y for _, y in curve.levels)]
    return [y for y in heights if math.isfinite(y)] or [0.0, 1.0]


def _title(page: Page, curve: Curve) -> None:
    page.text((86, 40), curve.title, size=26)
    page.text((86, 74), curve.subtitle, size=15, colour=GREY)


def _axes(page: Page, frame: Frame, unit: str) -> None:
    decimals = max(0, -math.floor(math.log10(frame.y_ticks[1] - frame.y_ticks[0]) + 1e-9))
    step = frame.y_ticks[1] - frame.y_ticks[0]
    decimals += 0 if round(step * 10**decimals, 6).is_integer() else 1
    for value in frame.y_ticks:
        x, y = frame.at((frame.x[0], value))
        page.line([(x, y), (frame.right, y)], colour=GRID, width=1)
        page.text((x - 12, y), f"{value:.{decimals}f}", colour=GREY, anchor="rm")
    for value in frame.x_ticks:
        x, _ = frame.at((value, frame.y[0]))
        page.line([(x, frame.bottom), (x, frame.bottom + 6)], colour=GREY, width=1)
        page.text((x, frame.bottom + 22), f"{value:,.0f}", colour=GREY, anchor="mm")
    page.line([(frame.left, frame.bottom), (frame.right, frame.bottom)], colour=GREY, width=1.2)
    page.text((frame.left - 36, frame.top - 22), unit, colour=GREY, anchor="lm")
    page.text(((frame.left + frame.right) / 2, frame.bottom + 52), "step", colour=GREY, anchor="mm")


def _levels(page: Page, frame: Frame, curve: Curve) -> None:
    for (_, bits), colour in zip(curve.levels, (PINK, GREEN) * len(curve.levels), strict=False):
        x, y = frame.at((frame.x[0], bits))
        page.dashes((x, y), (frame.right, y), colour=colour, width=1.8)


def _lines(page: Page, frame: Frame, curve: Curve) -> None:
    page.line(frame.path(curve.train), colour=PALE_BLUE, width=1)
    fine = smooth(curve.train)
    page.line(frame.path(fine), colour=BLUE, width=2.6)
    page.line(frame.path(curve.held_out), colour=ORANGE, width=1.6)
    for place in frame.path(curve.held_out):
        page.dot(place, 4.5, ORANGE)

    labels = [
        (name, bits, colour)
        for (name, bits), colour in zip(curve.levels, (PINK, GREEN) * len(curve.levels), strict=False)
    ]
    if fine:
        labels.append(("training", fine[-1][1], BLUE))
    if curve.held_out:
        labels.append(("held out", curve.held_out[-1][1], ORANGE))
    placed = apart([frame.at((frame.x[1], bits))[1] for _, bits, _ in labels], 22, frame.top, frame.bottom)
    for (name, bits, colour), y in zip(labels, placed, strict=True):
        page.text((frame.right + 14, y), f"{name}  {bits:.3f}", colour=colour, size=16)
    _legend(page, frame, bool(curve.held_out))


def _legend(page: Page, frame: Frame, held_out: bool) -> None:
    entries = [("training", PALE_BLUE, 1.5), ("training, smoothed", BLUE, 2.6)]
    entries += [("held out", ORANGE, 1.6)] if held_out else []
    x, y = frame.right, frame.top - 22
    for name, colour, width in reversed(entries):
        x -= page.text_width(name)
        page.text((x, y), name, colour=INK)
        page.line([(x - 32, y), (x - 8, y)], colour=colour, width=width)
        if name == "held out":
            page.dot((x - 20, y), 4.5, colour)
        x -= 54
