"""The curves of a run: which quantities, on which scales, beside which levels, and what is said of each in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from entrenar.observe import charts
from entrenar.observe.charts import Chart, Level, Line, even, scale_for
from entrenar.observe.page import size
from entrenar.observe.record import BITS, NATS, Record, finite, table
from entrenar.observe.series import Column, smooth

UNITS = {BITS: "bits per byte", NATS: "nats per trained token"}
HELD_OUT = {BITS: "text", NATS: "conversations"}
LOOKS = {"before": "xz"}  # the style a level is drawn in, where it has none of its own


def curves(record: Record) -> str:
    """All figures as HTML; nothing where no step and no look is known."""
    if not record.last and not record.held_out.count:
        return ""
    again = f"{record.steps_again:,} recorded steps were made again after a resume; the later ones are drawn."
    note = f'<p class="small grey">{again}</p>\n' if record.steps_again else ""
    small = _learning_rate(record) + _grad_norm(record) + _speed(record) + _memory(record)
    return _loss(record) + _sign_legend(record) + note + f'<div class="charts">\n{small}</div>'


def _loss(record: Record) -> str:
    raw, held = record.course.columns(), record.held_out.columns()
    if not raw and not held:
        return ""
    fine = smooth(raw)
    levels = [Level(name, LOOKS.get(name, name), height) for name, height in record.levels()]
    lines = [Line("training", "train", fine, raw=raw)] if raw else []
    lines += [Line("held out", "held", held, dots=True)] if held else []
    shown = [level.value for level in levels] + [c.mean for c in held]
    scale = scale_for(fine, shown, cut=0.05, count=7)
    legend = [_swatch("line train", "training", fine[-1].mean, ".3f")] if raw else []
    legend += [_swatch("line held", "held out", held[-1].mean, ".3f", dot=True)] if held else []
    legend += [_swatch(f"level {level.style}", level.name, level.value, ".3f") for level in levels]
    told = [_course("Training", fine), _course(f"held-out {HELD_OUT[record.measure]}", held), _highest(raw, scale.high)]
    told += [f"{level.name}: {level.value:.3f}" if record.measure == NATS else
             f"{level.name} reaches {level.value:.3f}" for level in levels]  # fmt: skip
    about = "; ".join(part for part in told if part) + "."
    title = UNITS[record.measure].capitalize()
    return _figure(record, "loss", title, about, scale, lines, levels, legend, height=340, named=True)


def _course(name: str, columns: Sequence[Column], form: Callable[[float], str] = "{:.3f}".format) -> str:
    """Where a line begins and ends, for those who cannot see it."""
    if not columns:
        return ""
    first, last = columns[0], columns[-1]
    if len(columns) == 1:
        return f"{name}: {form(first.mean)} at step {first.step:,.0f}"
    return f"{name}: from {form(first.mean)} at step {first.step:,.0f} to {form(last.mean)} at step {last.step:,.0f}"


def _highest(columns: Sequence[Column], top: float) -> str:
    """What the drawing cuts off."""
    beyond = max(columns, key=lambda c: c.high, default=None)
    if beyond is None or beyond.high <= top:
        return ""
    where = f"near step {beyond.step:,.0f}"
    return f"values above {charts.plain(top)} are cut off, the highest is {beyond.high:.4g} {where}"


def _learning_rate(record: Record) -> str:
    columns = record.series["learning_rate"].columns()
    if not columns:
        return ""
    scale = scale_for(columns, zero=True)
    last, highest = (charts.plain(float(f"{rate:.3g}")) for rate in (columns[-1].mean, max(c.high for c in columns)))
    about = f"{_course('Learning rate', columns, '{:.3g}'.format)}; its highest is {highest}."
    legend = [_words("last", last), _words("highest", highest)]
    return _figure(record, "rate", "Learning rate", about, scale, [Line("learning rate", "train", columns)], [], legend)


def _grad_norm(record: Record) -> str:
    columns = record.series["grad_norm"].columns()
    if not columns:
        return ""
    fine, highest = smooth(columns), max(columns, key=lambda c: c.high)
    scale = scale_for(columns, zero=True, log=True)
    clip = finite(record.option("training", "clip_norm"))
    levels = [Level("clipped above", "xz", clip)] if scale.low < clip < scale.high else []
    about = f"{_course('Norm of the gradient', fine)}; its highest is {highest.high:.4g} near step {highest.step:,.0f}."
    legend = [_words("highest", f"{highest.high:.4g}")]
    legend += [_swatch("level xz", "clipped above", clip, "g")] if levels else []
    lines = [Line("gradient norm", "train", fine, raw=columns)]
    return _figure(record, "norm", "Gradient norm", about, scale, lines, levels, legend)


def _speed(record: Record) -> str:
    columns = record.series["tokens_per_second"].columns()
    if not columns:
        return ""
    scale = scale_for(columns, zero=True)
    about = f"{_course('Tokens per second', columns, '{:,.0f}'.format)}; {record.tokens_per_second:,.0f} on average."
    legend = [_words("mean", f"{record.tokens_per_second:,.0f}"), _words("last", f"{columns[-1].mean:,.0f}")]
    lines = [Line("tokens per second", "train", columns, raw=columns)]
    return _figure(record, "speed", "Tokens per second", about, scale, lines, [], legend)


def _memory(record: Record) -> str:
    columns = record.series["memory"].columns()
    if not columns:
        return ""
    highest, planned = max(c.high for c in columns), finite(record.plan.get("peak"))
    limit = finite(record.plan.get("limit")) or finite(table(record.start.get("machine")).get("memory_limit"))
    levels = [Level("plan", "planned", planned)] if planned else []
    levels += [Level("limit", "limit", limit)] if 0 < limit < 2 * max(highest, planned) else []
    scale = scale_for(columns, [level.value for level in levels], zero=True)
    about = f"{_course('Resident memory', columns, size)}; {size(highest)} at most"
    about += "".join(f"; {level.name}: {size(level.value)}" for level in levels) + "."
    legend = [_swatch("line train", "resident", size(columns[-1].mean))]
    legend += [_swatch(f"level {level.style}", level.name, size(level.value)) for level in levels]
    lines = [Line("memory", "train", columns, raw=columns)]
    label = _bytes(scale.high)
    return _figure(record, "memory", "Memory", about, scale, lines, levels, legend, label=label, unit="bytes")


def _bytes(high: float) -> Callable[[float], str]:
    """Labels in one unit for a whole axis."""
    units = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    unit, scale = next((unit for unit in units if high >= unit[1]), ("B", 1.0))
    return lambda value: f"{value / scale:.4g} {unit}" if value else "0"


def _figure(record: Record, key: str, title: str, about: str, scale: charts.Scale, lines: Sequence[Line],
            levels: Sequence[Level], legend: Sequence[str], *, height: int = 170, named: bool = False,
            label: Callable[[float], str] | None = None, unit: str = "") -> str:  # fmt: skip
    marks = {kind: sorted(columns.values()) for kind, columns in record.marks.items()}
    label = label or (charts.plain if scale.log else even(scale.ticks))
    chart = Chart(f"chart-{key}", title, about, record.last_step, scale, label, lines, levels, marks,
                  height=height, unit=unit, named=named)  # fmt: skip
    style = ' class="named"' if named else ""
    return (
        f'<figure{style}><figcaption><h3>{title}</h3><ul class="legend">{"".join(legend)}</ul></figcaption>'
        f'<div class="plot">{charts.draw(chart)}</div></figure>\n'
    )


def _swatch(style: str, name: str, value: float | str, form: str = "", *, dot: bool = False) -> str:
    """A line of the legend: how it is drawn, what it is, its last value."""
    shown = value if isinstance(value, str) else format(value, form)
    point = f'<path class="dot {style.split()[-1]}" d="M11 6h0"/>' if dot else ""
    picture = f'<svg aria-hidden="true"><path class="{style}" d="M0 6h22"/>{point}</svg>'
    return f"<li>{picture}<span>{name} <b>{shown}</b></span></li>"


def _words(name: str, value: str) -> str:
    return f"<li><span>{name} <b>{value}</b></span></li>"


SIGNS = {
    "checkpoint": ("checkpoint", "checkpoints"),
    "resume": ("resume", "resumes"),
    "warning": ("warning", "warnings"),
    "error": ("error", "errors"),
}


def _sign_legend(record: Record) -> str:
    """What the signs on the step axis mean, where there are any."""
    entries = []
    for kind, (one, many) in SIGNS.items():
        if record.marks[kind]:
            count = record.kinds[kind]
            picture = f'<svg aria-hidden="true"><path class="mark {kind}" d="M11 6h0"/></svg>'
            entries.append(f"<li>{picture}<span>{count:,} {one if count == 1 else many}</span></li>")
    return f'<ul class="legend signs">{"".join(entries)}</ul>\n' if entries else ""
