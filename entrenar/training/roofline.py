"""The picture of a profile: each kernel under the machine's two roofs (Williams, Waterman and Patterson 2009).

Across, how many operations a kernel does for each byte it reads or writes; up, how many it did per second. No kernel
can be above the memory's roof (bandwidth times that ratio) nor above the processor's (its peak); a dot's area is its
share of the step. Arrays that stay in a cache may pass the memory's roof: it is that of the memory, not of the caches.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

from entrenar.observe.profile import Line
from entrenar.training.curve import BLUE, GREEN, GREY, GRID, INK, ORANGE, PINK, Page

LEFT, TOP, RIGHT, BOTTOM = 92, 104, 36, 66
COLOURS = {"matmul": BLUE, "packed": BLUE, "linear": BLUE, "attention": ORANGE, "adamw": PINK, "sum": PINK}
SHOWN, LABELLED = 0.0005, 0.003  # of the step: smaller dots are left out, have no name
LARGE = 14  # points: the name of a larger dot stands above it


@dataclass(frozen=True)
class Roofline:
    """What the picture shows: operations and bytes per second of this machine, and the lines of a profile."""

    title: str
    subtitle: str
    peak: float
    bandwidth: float
    lines: Sequence[Line]
    size: tuple[int, int] = (1200, 720)


def render(roofline: Roofline) -> bytes:
    """The picture as a PNG file's bytes."""
    from PIL import Image

    page = Page(*roofline.size)
    page.text((LEFT, 34), roofline.title, size=24)
    page.text((LEFT, 66), roofline.subtitle, size=15, colour=GREY)
    whole = sum(line.seconds for line in roofline.lines)
    dots = [line for line in roofline.lines if line.flops and line.bytes and line.seconds >= SHOWN * whole > 0]
    axes = _Axes(roofline, dots)
    axes.grid(page)
    axes.roofs(page)
    axes.dots(page, dots, whole)
    image = page.image.resize(roofline.size, Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()


class _Axes:
    """Logarithms of both quantities, to places on the page."""

    def __init__(self, roofline: Roofline, dots: Sequence[Line]) -> None:
        self.roofline = roofline
        ratios = [line.flops / line.bytes for line in dots] or [1.0]
        ridge = roofline.peak / roofline.bandwidth
        self.x = min(*ratios, ridge / 8) / 2, max(*ratios, ridge * 8) * 2
        speeds = [line.flops / line.seconds for line in dots] or [roofline.peak]
        self.y = min(*speeds, roofline.peak / 30) / 2, max(*speeds, roofline.peak) * 2
        width, height = roofline.size
        self.box = LEFT, TOP, width - RIGHT, height - BOTTOM

    def at(self, ratio: float, speed: float) -> tuple[float, float]:
        left, top, right, bottom = self.box
        across = math.log(ratio / self.x[0]) / math.log(self.x[1] / self.x[0])
        up = math.log(speed / self.y[0]) / math.log(self.y[1] / self.y[0])
        return left + across * (right - left), bottom - up * (bottom - top)

    def grid(self, page: Page) -> None:
        left, top, right, bottom = self.box
        for power in range(math.ceil(math.log10(self.x[0])), math.floor(math.log10(self.x[1])) + 1):
            x, _ = self.at(10.0**power, self.y[0])
            page.line([(x, top), (x, bottom)], colour=GRID, width=1)
            page.text((x, bottom + 16), f"{10.0**power:g}", size=14, colour=GREY, anchor="mm")
        for power in range(math.ceil(math.log10(self.y[0])), math.floor(math.log10(self.y[1])) + 1):
            _, y = self.at(self.x[0], 10.0**power)
            page.line([(left, y), (right, y)], colour=GRID, width=1)
            page.text((left - 8, y), f"{10.0**power / 1e9:g}", size=14, colour=GREY, anchor="rm")
        page.text((left, top - 12), "GFLOP/s", size=14, colour=GREY)
        page.text((right, bottom + 42), "operations for each byte read or written", size=14, colour=GREY, anchor="rm")

    def roofs(self, page: Page) -> None:
        peak, bandwidth = self.roofline.peak, self.roofline.bandwidth
        ridge = peak / bandwidth
        start = max(self.x[0], self.y[0] / bandwidth)
        slope = [self.at(start, start * bandwidth), self.at(ridge, peak)]
        page.line([*slope, self.at(self.x[1], peak)], colour=INK, width=2)
        x, y = self.at(ridge, peak)
        page.text((x - 8, y - 12), f"multiply-adds: {peak / 1e9:.0f} GFLOP/s", size=14, anchor="rm", halo=True)
        x, y = slope[0]
        page.text((x + 14, y - 6), f"memory: {bandwidth / 1e9:.0f} GB/s", size=14, halo=True)

    def dots(self, page: Page, lines: Sequence[Line], whole: float) -> None:
        places = [self.at(line.flops / line.bytes, line.flops / line.seconds) for line in lines]
        radii = [max(3.5, 40 * math.sqrt(line.seconds / whole)) for line in lines]
        for line, place, radius in zip(lines, places, radii, strict=True):
            page.dot(place, radius, COLOURS.get(line.kernel.partition("_")[0], GREEN))
        # Middles, half widths and half heights of all that a name must not cover: dots, and the names before
        taken = [(x, y, radius, radius) for (x, y), radius in zip(places, radii, strict=True)]
        for line, place, radius in zip(lines, places, radii, strict=True):  # names lie above all dots
            share = line.seconds / whole
            if share < LABELLED:
                continue
            name = f"{line.kernel.replace('_', ' ')} {share:.1%}"
            half = page.text_width(name, 14) / 2
            x, y = self.free(place, radius, half, taken)
            taken.append((x, y, half, 9))
            page.text((x, y), name, size=14, anchor="mm", halo=True)

    def free(self, place: tuple[float, float], radius: float, half: float,
             taken: Sequence[tuple[float, float, float, float]]) -> tuple[float, float]:  # fmt: skip
        """Where a name of this half width covers nothing: near its dot, above a large one, beside a small one."""
        (x, y), aside = place, half + radius + 8
        if radius > LARGE:
            spots = [(min(x, self.box[2] - half), y - radius - 14 - 18 * step) for step in range(9)]
        else:
            spots = [(x + side, y + 18 * step) for step in (0, 1, -1, 2, -2, 3, 4, 5, 6) for side in (aside, -aside)]
        inside = [(u, v) for u, v in spots if self.box[0] < u - half and u + half <= self.box[2]] or spots

        def covers(u: float, v: float) -> bool:
            return any(abs(u - mid) < half + wide + 4 and abs(v - level) < 9 + high for mid, level, wide, high in taken)

        return next((spot for spot in inside if not covers(*spot)), inside[0])
