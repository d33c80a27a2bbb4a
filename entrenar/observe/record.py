"""What a run's folder says, for a report: metrics.jsonl, config.toml, sample.txt, and nothing else.

metrics.jsonl is read from its end to its beginning. A run that was killed and resumed has some steps twice, and the
later line is the true one: read backwards, a step counts only if it lies before every step already seen. So one pass
is enough, and what is kept does not grow with the file.

Nothing here fails for what a file holds: half a line, an unknown event, a word where a number should be are passed
over, and `notes` says so.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

from entrenar.observe.series import LARGEST, Series, column_of

LONGEST_LINE = 1 << 20  # bytes; longer ones are not read as JSON
LARGEST_FILE = 1 << 20  # bytes read of config.toml, and of sample.txt
LARGEST_STEP = 10**15
BITS, NATS = "bits_per_byte", "loss"  # what a run is measured by: a text by the first, answers by the second
QUANTITIES = ("learning_rate", "grad_norm", "tokens_per_second", "memory")
TOLD = ("start", "resume", "warning", "error", "end")  # events that are listed one by one
MARKED = ("checkpoint", "resume", "warning", "error")  # events that are marked on the step axis

Event = dict[str, Any]
T = TypeVar("T")


class Ends(Generic[T]):
    """The newest and the oldest of things that come newest first, and how many there were."""

    def __init__(self, newest: int, oldest: int) -> None:
        self.count, self.most = 0, newest
        self.newest: list[T] = []
        self.oldest: deque[T] = deque(maxlen=oldest)

    def add(self, thing: T) -> None:
        self.count += 1
        (self.newest if len(self.newest) < self.most else self.oldest).append(thing)

    @property
    def left_out(self) -> int:
        """How many lie between the oldest and the newest kept."""
        return self.count - len(self.newest) - len(self.oldest)

    def in_order(self) -> tuple[list[T], list[T]]:
        """The oldest and the newest, each in the order in which they happened."""
        return list(reversed(self.oldest)), self.newest[::-1]


class Record:
    """A run as its files tell it.

    start, resumed        the first event, and the newest resume ({} where there is none)
    end, error            how it ended; None where the file does not say
    last, look            the newest step, and the newest look at held-out text ({} where there is none)
    measure               BITS or NATS: what the newest step has
    series, held_out      quantities over the steps, the measure among them; the measure of what is held out
    before                the first look, of a model that knew something before the run ({} where there is none)
    marks                 kind -> {column: step}: where on the step axis something happened
    seconds               in training, over all resumes
    config, defaults      options by section ({} where they are not known)
    plan                  the newest: {"peak", "limit", "buffers": [[name, bytes], ...]}
    notes                 what could not be read, one sentence each
    """

    def __init__(self, run: Path) -> None:
        self.run, self.metrics = run, run / "metrics.jsonl"
        self.start: Event = {}
        self.resumed: Event = {}
        self.end: Event | None = None
        self.error: Event | None = None
        self.last: Event = {}
        self.look: Event = {}
        self.before: Event = {}
        self.events: Ends[Event] = Ends(60, 40)
        self.samples: Ends[Event] = Ends(4, 2)
        self.kinds = dict.fromkeys(MARKED, 0)  # how many of each
        self.marks: dict[str, dict[int, int]] = {kind: {} for kind in MARKED}
        self.notes: list[str] = []
        self.seconds = 0.0
        self.memory_peak = 0.0
        self.tokens_per_second = 0.0  # mean over all steps
        self.steps_again = 0  # told by a later line again
        self._broken, self._cut = 0, False  # lines that are no events; whether the last one has no end
        self._limit = LARGEST_STEP + 1  # steps from here on were told by later lines
        self._looks_limit = LARGEST_STEP + 1
        self._later_seconds = math.inf
        self._saved: int | None = None  # step of the checkpoint seen before: the best may be written twice
        self._rates = 0

        # read twice, and the run may go on meanwhile: what is written after this moment does not count
        self._size = self.metrics.stat().st_size if self.metrics.is_file() else 0
        self.measure = BITS
        last = self._last_step()
        self.last_step = last
        self.series = {name: Series(last) for name in (self.measure, *QUANTITIES)}
        self.held_out = Series(last)
        self._read()
        self.config, self.defaults = self._config()
        self.plan = table(self.resumed.get("plan")) or table(self.start.get("plan"))
        self.sample = self._sample()

    @property
    def peak(self) -> float:
        """The most bytes that were ever resident; 0 where nobody looked."""
        return max(self.memory_peak, finite((self.end or {}).get("memory_peak")))

    def option(self, section: str, name: str) -> Any:
        """A value of the configuration; None where it is not known."""
        return table(self.config.get(section)).get(name)

    @property
    def course(self) -> Series:
        """The measure over the steps of training."""
        return self.series[self.measure]

    def levels(self) -> list[tuple[str, float]]:
        """What to compare with: the bits per byte that gzip and xz need; the loss before fine-tuning."""
        if self.measure == NATS:
            return [("before", loss)] if (loss := finite(self.before.get(NATS))) else []
        told = table(self.start.get("data"))
        named = (("gzip", finite(told.get("gzip_bits"))), ("xz", finite(told.get("xz_bits"))))
        return [(name, bits) for name, bits in named if bits > 0]

    def _last_step(self) -> int:
        """The greatest step that counts: the first one met from the end."""
        limit = LARGEST_STEP + 1
        for event in self._events():
            kind, step = event.get("event"), whole(event.get("step"))
            if kind == "step" and step is not None and step < limit:
                self.measure = NATS if BITS in event and event[BITS] is None else BITS
                return step
            if kind == "resume" and step is not None:
                limit = min(limit, step + 1)
        return 0

    def _read(self) -> None:
        for event in self._events():
            self._take(event)
        not_finite = sum(series.not_finite for series in (*self.series.values(), self.held_out))
        if not self.metrics.is_file():
            self.notes.append("There is no metrics.jsonl in this folder: no number of this run is known.")
        elif not self.start:
            self.notes.append("metrics.jsonl has no start event: what was trained, on what, is not known.")
        if self._cut:
            self.notes.append("The last line of metrics.jsonl is cut off, as a killed run leaves it.")
        if self._broken:
            lines = "1 line" if self._broken == 1 else f"{self._broken:,} lines"
            self.notes.append(f"{lines} of metrics.jsonl could not be read and were left out.")
        if not_finite:
            values = "1 value" if not_finite == 1 else f"{not_finite:,} values"
            self.notes.append(f"{values} of metrics.jsonl: not finite (NaN or infinite), so not drawn.")

    def _events(self) -> Iterator[Event]:
        """The events of metrics.jsonl, the newest first, back to the newest start."""
        self._broken, self._cut = 0, False
        if not self.metrics.is_file():
            return
        for place, line in enumerate(lines_backward(self.metrics, self._size)):
            if (event := parse(line)) is not None:
                yield event
                if event["event"] == "start":
                    return
            elif place == 0:
                self._cut = bool(line)  # a whole last line ends with a newline: after it comes an empty one
            elif line.strip():
                self._broken += 1

    def _take(self, event: Event) -> None:
        kind, step = event["event"], whole(event.get("step"))
        if kind in MARKED and not (kind == "checkpoint" and step == self._saved):
            self.kinds[kind] += 1
        if kind == "checkpoint":
            self._saved = step
        if kind == "step" and step is not None:
            self._take_step(step, event)
        elif kind == "held_out" and step is not None:
            self._take_look(step, event)
        elif kind == "sample":
            self.samples.add(clipped(event))
        if kind in TOLD:
            self.events.add(clipped(event))
            self._take_turn(kind, event)
        if kind in MARKED and step is not None and step <= self.last_step + 1:  # the step that failed has no number
            self.marks[kind].setdefault(column_of(step, self.last_step), min(step, self.last_step))
        if kind == "resume" and step is not None:
            self._limit = min(self._limit, step + 1)

    def _take_turn(self, kind: str, event: Event) -> None:
        """How the run began and ended; what lies before a resume did not end it."""
        if kind == "start":
            self.start = event
        elif kind == "resume":
            self.resumed = self.resumed or event
        elif not self.resumed and kind == "end":
            self.end = self.end or clipped(event)
        elif not self.resumed and kind == "error":
            self.error = self.error or clipped(event)

    def _take_step(self, step: int, event: Event) -> None:
        if step >= self._limit:
            self.steps_again += 1
            return
        self._limit = step
        self.last = self.last or event
        for name, series in self.series.items():
            series.add(step, number(event.get(name)))
        self.memory_peak = max(self.memory_peak, finite(event.get("memory_peak")), finite(event.get("memory")))
        if (seconds := finite(event.get("seconds"))) > self._later_seconds or math.isinf(self._later_seconds):
            self.seconds += seconds  # a clock that began again: at a resume, or at the newest step
        self._later_seconds = seconds
        if (rate := finite(event.get("tokens_per_second"))) > 0:
            self._rates += 1
            self.tokens_per_second += (rate - self.tokens_per_second) / self._rates

    def _take_look(self, step: int, event: Event) -> None:
        if step >= min(self._limit, self._looks_limit) or step > self.last_step:
            return
        self._looks_limit = step
        self.look = self.look or event
        if step == 0 and event.get("whole"):
            self.before = event
        self.held_out.add(step, number(event.get(self.measure)))

    def _config(self) -> tuple[Event, Event]:
        """The configuration by sections, and the defaults where the start event has them."""
        config = table(self.resumed.get("config")) or table(self.start.get("config"))
        defaults = table(self.start.get("defaults"))
        path = self.run / "config.toml"
        if not config and path.is_file():
            try:
                with open(path, "rb") as file:
                    config = tomllib.loads(file.read(LARGEST_FILE).decode("utf-8"))
            except (OSError, ValueError, RecursionError) as error:
                self.notes.append(f"config.toml cannot be read: {str(error) or 'nested too deep'}.")
        return config, defaults

    def _sample(self) -> str:
        path = self.run / "sample.txt"
        if not path.is_file():
            return ""
        try:
            with open(path, "rb") as file:
                return file.read(LARGEST_FILE).decode("utf-8", errors="replace").rstrip("\n")
        except OSError as error:
            self.notes.append(f"sample.txt cannot be read: {error.strerror}.")
            return ""


def lines_backward(path: Path, end: int, *, block: int = 1 << 18, longest: int = LONGEST_LINE) -> Iterator[bytes]:
    """The lines of a file's first `end` bytes, the last one first, without their newlines; of one above `longest`
    bytes only the end."""
    with open(path, "rb") as file:
        rest = b""  # the end of a line whose beginning lies further up in the file
        while end > 0:
            start = max(0, end - block)
            file.seek(start)
            rest, *whole_lines = (file.read(end - start) + rest).split(b"\n")
            yield from reversed(whole_lines)
            rest, end = rest[-longest:], start
        yield rest


def parse(line: bytes) -> Event | None:
    """A line as an event; None where it is none."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None


def clipped(event: Event, most: int = 4000) -> Event:
    """The event's words and numbers, long texts cut: a hundred are kept, however large they were."""
    short = {name: value for name, value in event.items() if not isinstance(value, list | dict)}
    return {name: value[:most] if isinstance(value, str) else value for name, value in list(short.items())[:20]}


def number(value: Any) -> float | None:
    """A JSON number as a float (which may be NaN or infinite); None for anything else."""
    if type(value) is float:  # nearly always: a million steps have ten million numbers
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def finite(value: Any) -> float:
    """A JSON number that can be a measurement; 0 for anything else."""
    found = number(value)
    return found if found is not None and abs(found) <= LARGEST else 0.0


def whole(value: Any) -> int | None:
    """A JSON number that can be a step; None for anything else."""
    fits = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_STEP
    return value if fits else None


def table(value: Any) -> Event:
    """A JSON object; empty for anything else."""
    return value if isinstance(value, dict) else {}

