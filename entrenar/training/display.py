"""What a run shows while it works: a live panel on a terminal, one plain line per report anywhere else.

The plain lines are `key=value` pairs, fit for grep and awk. NO_COLOR and TERM=dumb are respected. Leaves out
files: the trainer writes metrics.jsonl whatever is shown.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TextIO, cast

from entrenar.training.evaluate import perplexity
from entrenar.training.progress import Bars, Progress

if TYPE_CHECKING:
    from rich.console import Console

BARS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Report:
    """One training step, as it is shown and as metrics.jsonl has it. Loss in nats per trained token.

    bits_per_byte   None where tokens of a text were left out of the loss: it would be no measure of the text
    """

    step: int
    steps: int
    loss: float
    bits_per_byte: float | None
    learning_rate: float
    grad_norm: float
    tokens: int
    tokens_per_second: float
    peak_share: float
    memory: int
    memory_peak: int
    seconds: float
    seconds_left: float


@dataclass(frozen=True)
class HeldOut:
    """A look at what is held out; `whole` where it was all of it. `bits_per_byte`, `bytes`: None, 0 as in Report."""

    step: int
    loss: float
    bits_per_byte: float | None
    tokens: int
    bytes: int
    seconds: float
    whole: bool


@dataclass(frozen=True)
class Heading:
    """What is known before the first step; of a text, what compressors need for it, in bits per byte."""

    title: str
    lines: Sequence[str]
    gzip_bits: float = 0.0
    xz_bits: float = 0.0


class Display(Protocol):
    """What the trainer tells. `close` may come at any time, and more than once."""

    def start(self, heading: Heading) -> None: ...
    def step(self, report: Report) -> None: ...
    def held_out(self, seen: HeldOut) -> None: ...
    def note(self, text: str) -> None: ...
    def doing(self, what: str, done: int = 0, total: int = 0) -> None: ...
    def close(self) -> None: ...


def make_display(*, report_every: int, stream: TextIO | None = None) -> Display:
    """The live panel where `stream` is a terminal that can draw, plain lines otherwise."""
    stream = sys.stdout if stream is None else stream
    if stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb"):
        return LivePanel(cast(TextIO, Lasting(stream)))
    return PlainLines(stream, report_every=report_every)


class Lasting:
    """A terminal that may go away (a closed window, a lost ssh): from then on what is written goes nowhere."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            self.stream = open(os.devnull, "w")
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            self.stream = open(os.devnull, "w")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class PlainLines:
    """`step=10/1200 loss=5.1234 ...`: the first step, the last, and every `report_every`-th."""

    def __init__(self, stream: TextIO, *, report_every: int) -> None:
        self.stream, self.report_every, self.started = stream, report_every, False
        self.progress = Progress(stream)

    def start(self, heading: Heading) -> None:
        self.started = True
        for line in (heading.title, *heading.lines):
            self._write(f"# {line}")

    def step(self, report: Report) -> None:
        r = report
        if r.step == 1 or r.step == r.steps or r.step % self.report_every == 0:
            self._write(
                f"step={r.step}/{r.steps} loss={r.loss:.4f} {measure(r.loss, r.bits_per_byte)} "
                f"lr={r.learning_rate:.3e} grad_norm={r.grad_norm:.3f} "
                f"tokens_per_second={r.tokens_per_second:.0f} peak_share={r.peak_share:.3f} "
                f"memory_mb={r.memory / 1e6:.0f} memory_peak_mb={r.memory_peak / 1e6:.0f} "
                f"seconds={r.seconds:.1f} seconds_left={r.seconds_left:.0f}"
            )

    def held_out(self, seen: HeldOut) -> None:
        part = "whole" if seen.whole else "sample"
        self._write(
            f"step={seen.step} held_out_loss={seen.loss:.4f} held_out_{measure(seen.loss, seen.bits_per_byte)} "
            f"held_out_part={part} held_out_tokens={seen.tokens}"
        )

    def note(self, text: str) -> None:
        self._write(f"# {text}")

    def doing(self, what: str, done: int = 0, total: int = 0) -> None:
        if what and not self.started:  # afterwards the reports tell
            with contextlib.suppress(OSError):  # nobody reads any more: `_write` will see to it
                self.progress.doing(what, done, total)

    def close(self) -> None:
        pass

    def _write(self, line: str) -> None:
        try:
            print(line, file=self.stream, flush=True)
        except OSError:  # the reader went away (`| head`), the log's disk is full: the run goes on, with metrics.jsonl
            self.stream = open(os.devnull, "w")


class LivePanel:
    """A panel that redraws in place, at most `rate` times a second and from the training thread itself.

    (A drawing thread of its own would take time from the kernels.)
    """

    def __init__(self, stream: TextIO, *, rate: float = 4.0, width: int | None = None) -> None:
        from rich.console import Console

        self.console = Console(file=stream, highlight=False, width=width)
        self.wait, self.drawn = 1 / rate, 0.0
        self.heading: Heading | None = None
        self.report: Report | None = None
        self.seen: HeldOut | None = None
        self.first: HeldOut | None = None
        self.task = "starting"
        self.losses = array("d")
        self.live: Any = None
        self.bars: Bars | None = None  # until the first step

    def start(self, heading: Heading) -> None:
        from rich.live import Live

        self.heading = heading
        self._end_bars()
        self.console.print(f"[bold]{_plain(heading.title)}[/]")
        for line in heading.lines:
            self.console.print(f"[dim]{_plain(line)}[/]")
        self.live = Live(self.panel(), console=self.console, auto_refresh=False)
        self.live.start(refresh=True)

    def step(self, report: Report) -> None:
        self.report, self.task = report, "training"
        self.losses.append(report.loss if report.bits_per_byte is None else report.bits_per_byte)
        self._draw(now=report.step in (1, report.steps))

    def held_out(self, seen: HeldOut) -> None:
        self.seen, self.first = seen, self.first or seen
        self._draw(now=True)

    def note(self, text: str) -> None:
        self.console.print(f"[yellow]{_plain(text)}[/]")

    def doing(self, what: str, done: int = 0, total: int = 0) -> None:
        before, self.task = self.task, f"{what} {done}/{total}" if total else what
        if self.heading is None:
            if what:
                self.bars = self.bars or Bars(self.console.file)  # type: ignore[arg-type]
                self.bars.doing(what, done, total)
        else:
            self._draw(now=before.split(" ")[0] != what.split(" ")[0])

    def close(self) -> None:
        self._end_bars()
        if self.live is not None:
            self._draw(now=True)
            self.live.stop()
            self.live = None

    def _end_bars(self) -> None:
        if self.bars is not None:
            self.bars.close()
            self.bars = None

    def _draw(self, *, now: bool = False) -> None:
        clock = time.monotonic()
        if self.live is not None and (now or clock - self.drawn >= self.wait):
            self.live.update(self.panel(), refresh=True)
            self.drawn = clock

    def panel(self) -> Any:
        """The panel as it stands."""
        from rich.console import Group
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        r = self.report
        if r is None or self.heading is None:
            return Panel(Text(self.task), title="entrenar", title_align="left", border_style="blue")
        top = Table.grid(expand=True, padding=(0, 1))
        top.add_column(no_wrap=True)
        top.add_column(ratio=1)
        top.add_column(no_wrap=True, justify="right")
        top.add_row(
            Text(f"step {r.step:,}/{r.steps:,}", style="bold"),
            ProgressBar(total=r.steps, completed=r.step, complete_style="blue", finished_style="green"),
            Text(f"{clock(r.seconds)} gone, {clock(r.seconds_left)} left"),
        )

        numbers = Table.grid(expand=True, padding=(0, 2))
        for justify in ("left", "right", "left", "right"):
            numbers.add_column(justify=justify, no_wrap=True)  # type: ignore[arg-type]
        for left, right in zip(self._learning(r), self._machine(r), strict=True):
            numbers.add_row(Text(left[0], style="dim"), left[1], Text(right[0], style="dim"), right[1])

        room = max(10, self.console.width - 16)
        curve = Text.assemble(("loss  ", "dim"), (sparkline(self.losses, room), "blue"))
        return Panel(
            Group(top, Text(), numbers, Text(), curve),
            title=f"entrenar: {self.task}",
            title_align="left",
            border_style="blue",
            padding=(1, 2),
        )

    def _learning(self, r: Report) -> list[tuple[str, Any]]:
        from rich.text import Text

        assert self.heading is not None
        recent = self.losses[-20:]
        if r.bits_per_byte is None:
            return self._learning_to_answer(r, sum(recent) / len(recent))
        bits = self.seen.bits_per_byte if self.seen else None
        beaten = ""
        if bits is not None:
            beaten = (
                "green bold"
                if bits < self.heading.xz_bits
                else "yellow"
                if bits < self.heading.gzip_bits
                else ""
            )
        held = f"{self.seen.loss:.4f}" if self.seen else "not yet"
        return [
            ("loss", Text(f"{r.loss:.4f}", style="bold")),
            ("held-out loss", Text(held)),
            ("bits/byte, training", Text(f"{sum(recent) / len(recent):.3f}")),
            ("bits/byte, held out", Text(f"{bits:.3f}" if bits is not None else "not yet", style=beaten)),
            ("  gzip -9 / xz -9", Text(f"{self.heading.gzip_bits:.3f} / {self.heading.xz_bits:.3f}")),
        ]

    def _learning_to_answer(self, r: Report, recent: float) -> list[tuple[str, Any]]:
        """Where there are no bytes to count: the loss, and among how many tokens the model still wavers."""
        from rich.text import Text

        seen, first = self.seen, self.first
        return [
            ("loss, trained tokens", Text(f"{r.loss:.4f}", style="bold")),
            ("held-out loss", Text(f"{seen.loss:.4f}" if seen else "not yet")),
            ("  at first", Text(f"{first.loss:.4f}" if first else "not yet")),
            ("perplexity, training", Text(f"{perplexity(recent):.3f}")),
            ("perplexity, held out", Text(f"{perplexity(seen.loss):.3f}" if seen else "not yet")),
        ]

    def _machine(self, r: Report) -> list[tuple[str, Any]]:
        return [
            ("tokens/s", f"{r.tokens_per_second:,.0f}"),
            ("of machine's peak", f"{r.peak_share:.0%}"),
            ("memory, peak", f"{size(r.memory)}, {size(r.memory_peak)}"),
            ("learning rate", f"{r.learning_rate:.2e}"),
            ("gradient norm", f"{r.grad_norm:.3f}"),
        ]


def measure(loss: float, bits: float | None) -> str:
    """What a plain line says beside the loss."""
    return f"perplexity={perplexity(loss):.4f}" if bits is None else f"bits_per_byte={bits:.4f}"


def sparkline(values: Sequence[float], width: int) -> str:
    """The values as a row of at most `width` bars, each the mean of its share; the steep start is cut off."""
    if not values:
        return ""
    width = min(width, len(values))
    edges = [len(values) * i // width for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    low, high = min(means), sorted(means)[int(0.9 * (len(means) - 1))]
    span = (high - low) or 1.0
    return "".join(BARS[max(0, min(7, int((mean - low) / span * 7.999)))] for mean in means)


def clock(seconds: float) -> str:
    """75 -> 1:15, 3700 -> 1:01:40, 1e6 -> 11.6 days"""
    if seconds >= 2 * 86400:
        return (
            f"{seconds / 86400:,.1f} days"
            if seconds < 1000 * 86400
            else f"{seconds / 86400 / 365:,.0f} years"
        )
    minutes, rest = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def size(count: int) -> str:
    """Bytes in the unit that reads best."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}" if count < 100 * scale else f"{count / scale:,.0f} {unit}"
    return f"{count / 1e3:,.0f} kB"


def make_console(stream: TextIO | None = None) -> Console:
    """For the words around a run: bold and colour on terminals alone."""
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            raise  # the BrokenPipeError itself, where rich would end the program

    return Plain(file=stream, highlight=False, soft_wrap=True)


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
