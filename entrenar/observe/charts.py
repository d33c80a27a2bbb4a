"""Curves over the steps of a run, as SVG inside a page: lines, levels to compare with, marks on the step axis.

A drawing is as wide as the page allows and its letters keep their size: lines live in a box of 1000 x 1000 that is
stretched, with strokes that are not; words stand at shares of the width. Colours come from the page's style (classes),
so that they follow light and dark. What can be seen is also said, in <desc>, for those who listen.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from entrenar.observe.series import Column

SMALLEST = 1e-30  # what is smaller is drawn as zero
BOX = 1000  # both sides of the box in which lines are drawn


@dataclass(frozen=True)
class Line:
    """A quantity over the steps. `style`: the CSS class that colours it.

    raw    draw from least to greatest in each column, thin, under the line itself
    dots   draw a dot at each column
    """

    name: str
    style: str
    columns: Sequence[Column]
    raw: Sequence[Column] = ()
    dots: bool = False


@dataclass(frozen=True)
class Level:
    """A horizontal line to compare with."""

    name: str
    style: str
    value: float


@dataclass(frozen=True)
class Scale:
    """The vertical axis: from values to shares of the height."""

    low: float
    high: float
    ticks: Sequence[float]
    log: bool = False

    def up(self, value: float) -> float:
        """0 at the bottom, 1 at the top; beyond them for what lies outside, within reason."""
        if self.log:
            value, low, high = (math.log10(max(v, 1e-300)) for v in (value, self.low, self.high))
        else:
            low, high = self.low, self.high
        return min(max((value - low) / (high - low), -9.0), 9.0)


@dataclass(frozen=True)
class Chart:
    """One drawing.

    about    what can be seen in it, in words
    label    how a tick of the vertical axis is written
    marks    kind -> steps; "resume" and "error" cross the drawing, every kind has its sign below the axis
    unit     how the page's script writes a value: "" or "bytes"
    named    names stand beside the lines' ends too, where the page is wide enough
    """

    key: str
    title: str
    about: str
    last_step: int
    scale: Scale
    label: Callable[[float], str]
    lines: Sequence[Line]
    levels: Sequence[Level] = ()
    marks: Mapping[str, Sequence[int]] = field(default_factory=dict)
    height: int = 180
    unit: str = ""
    named: bool = False


def draw(chart: Chart) -> str:
    """The drawing as one <svg> element."""
    words = [
        f'<title id="{chart.key}-title">{html.escape(chart.title)}</title>',
        f'<desc id="{chart.key}-desc">{html.escape(chart.about)}</desc>',
    ]
    lines = _box(_lines(chart), "cut" if _is_cut(chart) else "")
    body = [_grid(chart), lines, _box(_dots(chart)), _marks(chart), _words(chart)]
    scale = chart.scale
    return (
        f'<svg role="img" aria-labelledby="{chart.key}-title {chart.key}-desc" width="100%" height="{chart.height}" '
        f'data-last="{chart.last_step}" data-low="{scale.low:.9g}" data-high="{scale.high:.9g}" '
        f'data-log="{int(scale.log)}" data-unit="{chart.unit}">' + "".join(words) + "".join(body) + "</svg>"
    )


def scale_for(columns: Sequence[Column], values: Sequence[float] = (), *, cut: float = 0.0, zero: bool = False,
              log: bool = False, count: int = 5) -> Scale:  # fmt: skip
    """A scale that shows the columns' least and greatest values and all of `values`.

    cut    this share of the highest columns need not be seen: a steep beginning would flatten the rest
    zero   begin at zero
    log    use powers of ten where values differ so much that a straight scale would hide the small ones
    """
    means = sorted(c.mean for c in columns)
    if cut and means:
        lowest = sorted(c.low for c in columns)[len(means) // 100]
        seen = [*means[: max(1, math.ceil(len(means) * (1 - cut)))], lowest]
    else:
        seen = [v for c in columns for v in (c.low, c.high)]
    seen = [*seen, *values] or [0.0, 1.0]
    low, high = min(seen), max(seen)
    if log and low > 0 and high > 30 * max(means[len(means) // 2], low):
        return _powers(low, high)
    marks = ticks(0.0 if zero and low >= 0 else low, high, count)
    return Scale(marks[0], marks[-1], marks)


def _powers(low: float, high: float) -> Scale:
    """Ticks at powers of ten, at most about six of them."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    last = max(last, first + 1)
    every = -(-(last - first) // 6)
    exponents = [e for e in range(first, last + every, every) if -300 <= e <= 300]
    return Scale(10.0 ** exponents[0], 10.0 ** exponents[-1], [10.0**e for e in exponents], log=True)


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers, 1, 2, 2.5 or 5 times a power of ten apart, that cover low..high."""
    size = max(abs(low), abs(high))
    size = size if size > SMALLEST else 1.0
    span = high - low if high - low > 1e-9 * size else size  # closer values, and their ticks, would be the same number
    raw = span / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.floor(low / step)
    last = max(first + 1, math.ceil(high / step))
    return [i * step for i in range(first, last + 1)]


def apart(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places for labels, near those given, at least `gap` apart and within [low, high] where they fit."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved, last = [places[i] for i in order], len(places) - 1
    for _ in range(100):
        for i in range(last):
            if (short := gap - (moved[i + 1] - moved[i])) > 1e-9:
                moved[i], moved[i + 1] = moved[i] - short / 2, moved[i + 1] + short / 2
        # each within what leaves room for those above and below it
        moved = [max(low + i * gap, min(place, high - (last - i) * gap)) for i, place in enumerate(moved)]
    return [moved[order.index(i)] for i in range(len(places))]


def _powered(value: float) -> str:
    """0.00025 -> 2.5e-4"""
    digits, _, power = f"{value:.4e}".partition("e")
    return f"{float(digits):g}e{int(power)}" if value else "0"


def plain(value: float) -> str:
    """A tick's label: 0.25, 15k, 2e-5."""
    size = abs(value)
    if size >= 1e15 or 0 < size < 1e-4:
        return _powered(value)
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if size >= scale and (scale > 1e3 or size >= 1e4):
            return f"{value / scale:.4g}{unit}"
    return f"{value:,.0f}" if size >= 1000 else f"{value:.6g}"


def even(values: Sequence[float]) -> Callable[[float], str]:
    """Labels with as many decimals as the finest of these ticks: 1.00, 1.25, 1.50."""
    texts = [plain(v) for v in values]
    if any(not t.replace(".", "").lstrip("-").isdigit() for t in texts):
        return plain
    decimals = max(len(t.partition(".")[2]) for t in texts)
    if decimals > 3:
        return _powered
    return lambda value: f"{value:.{decimals}f}"


# --- the parts of a drawing ---------------------------------------------------------------------------------


def _is_cut(chart: Chart) -> bool:
    """Whether lines leave the drawing. Only then are they cut at its edge: a line along the edge would be halved."""
    return any(c.high > chart.scale.high or c.low < chart.scale.low for line in chart.lines for c in line.columns)


def _box(content: str, style: str = "", down: int = 0) -> str:
    """The stretched box, moved down by pixels."""
    place = f'y="{down}" viewBox="0 0 {BOX} {BOX}" preserveAspectRatio="none"'
    return f'<svg class="{style}" {place} width="100%" height="100%">{content}</svg>'


def _x(chart: Chart, step: float) -> float:
    return step / max(1, chart.last_step) * BOX


def _y(chart: Chart, value: float) -> float:
    return (1 - chart.scale.up(value)) * BOX


def _short(number: float) -> str:
    return f"{number:.1f}".removesuffix(".0")


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{_short(x)} {_short(y)}" for x, y in points)


def _grid(chart: Chart) -> str:
    lines = []
    for value in chart.scale.ticks:
        y = f"{100 * (1 - chart.scale.up(value)):.2f}%"
        lines.append(f'<line class="grid" x1="0" x2="100%" y1="{y}" y2="{y}"/>')
        lines.append(f'<text class="tick" x="-8" y="{y}" dy=".35em" text-anchor="end">{chart.label(value)}</text>')
    for step in step_ticks(chart.last_step):
        x = f"{_x(chart, step) / 10:.2f}%"
        anchor = "start" if step == 0 else "end" if step > 0.97 * chart.last_step else "middle"
        lines.append(f'<text class="tick" x="{x}" y="100%" dy="24" text-anchor="{anchor}">{plain(step)}</text>')
    lines.append('<line class="axis" x1="0" x2="100%" y1="100%" y2="100%"/>')
    return "".join(lines)


def step_ticks(last: int) -> list[float]:
    """Round steps along the axis, from 0."""
    return [t for t in ticks(0, max(1, last), 6) if t <= max(1, last) and float(t).is_integer()]


def _lines(chart: Chart) -> str:
    parts = []
    for level in chart.levels:
        y = _short(_y(chart, level.value))
        parts.append(f'<path class="level {level.style}" d="M0 {y}H{BOX}"/>')
    for line in chart.lines:
        if line.raw:
            points = [(_x(chart, c.step), _y(chart, v)) for c in line.raw for v in sorted({c.low, c.high})]
            parts.append(f'<path class="raw {line.style}" d="{_path(points)}"/>')
    for line in chart.lines:
        if line.columns:
            points = [(_x(chart, c.step), _y(chart, c.mean)) for c in line.columns]
            name = html.escape(line.name)
            parts.append(f'<path class="line {line.style}" data-name="{name}" d="{_path(points)}"/>')
    return "".join(parts)


def _dots(chart: Chart) -> str:
    """A line of no length with a round end is a dot that the stretching leaves round."""
    parts = []
    for line in chart.lines:
        few = len(line.columns) == 1 or line.dots and len(line.columns) <= 60  # one point alone draws no line
        for column in line.columns if few else ():
            place = f"M{_short(_x(chart, column.step))} {_short(min(max(_y(chart, column.mean), 0), BOX))}h0"
            parts.append(f'<path class="halo" d="{place}"/><path class="dot {line.style}" d="{place}"/>')
    return "".join(parts)


def _marks(chart: Chart) -> str:
    """Resumes and errors cross the drawing; all kinds have a sign below the axis."""
    across = [
        f'<path class="across {kind}" d="{"".join(f"M{_short(_x(chart, s))} 0V{BOX}" for s in chart.marks[kind])}"/>'
        for kind in ("resume", "error")
        if chart.marks.get(kind)
    ]
    signs = [
        f'<path class="mark {kind}" d="{"".join(f"M{_short(_x(chart, s))} {BOX}h0" for s in chart.marks[kind])}"/>'
        for kind in chart.marks
        if chart.marks.get(kind)
    ]
    return _box("".join(across)) + _box("".join(signs), down=6) if across or signs else ""


def _words(chart: Chart) -> str:
    """The names at the lines' ends."""
    if not chart.named:
        return ""
    ends = [(level.name, chart.scale.up(level.value)) for level in chart.levels]
    ends += [(line.name, chart.scale.up(line.columns[-1].mean)) for line in chart.lines if line.columns]
    places = apart([(1 - up) * chart.height for _, up in ends], 18, 8, chart.height - 8)
    return "".join(
        f'<text class="end" x="100%" dx="12" y="{_short(y)}" dy=".35em">{html.escape(name)}</text>'
        for (name, _), y in zip(ends, places, strict=True)
    )
