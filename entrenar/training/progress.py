"""How far the text's preparation has come: a bar on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import time
from typing import Any, TextIO

EVERY = 5.0  # seconds between lines where no terminal is


class Progress:
    """Where the preparation stands, in plain lines: one for each task, and one every EVERY seconds."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.task, self.told = "", 0.0

    def doing(self, what: str, done: int = 0, total: int = 0) -> None:
        now = time.monotonic()
        if what != self.task or total and now - self.told >= EVERY:
            self.task, self.told = what, now
            part = f": {done / 1e6:,.1f} of {total / 1e6:,.1f} MB, {done / total:.0%}" if total and done else ""
            print(f"# {one_line(what)}{part}", file=self.stream, flush=True)

    def close(self) -> None:
        pass

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Bars(Progress):
    """The same as a bar on a terminal, gone in the end."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
        from rich.progress import Progress as RichProgress

        super().__init__(stream)
        # rich draws at each refresh(), not in a thread of its own: that would take time from the tokenizer
        self.bars = RichProgress(
            TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
            TimeRemainingColumn(), console=Console(file=self.stream), transient=True, auto_refresh=False,
        )  # fmt: skip
        self.bar: Any = None
        self.bars.start()

    def doing(self, what: str, done: int = 0, total: int = 0) -> None:
        if what != self.task:
            self.task = what
            self._take_away()
            if not total:
                self.bars.console.print(one_line(what), style="dim", markup=False)
        if total and self.bar is None:
            self.bar = self.bars.add_task(one_line(what), total=total)
        if self.bar is not None:
            self.bars.update(self.bar, completed=done)
            self.bars.refresh()

    def _take_away(self) -> None:
        if self.bar is not None:
            self.bars.remove_task(self.bar)
            self.bar = None

    def close(self) -> None:
        self.bars.stop()


def one_line(text: object) -> str:
    """The text with control characters shown as U+FFFD: a file's name must not move the cursor."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in str(text))
