"""How far something has come: a bar on stderr where that is a terminal, nothing elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from entrenar.cli.terminal import visible


class Progress:
    """`with Progress(what, total) as progress: progress(done, total)`."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.drawn = what, total, 0.0
        self.bar: Any = None
        self.task: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            name = TextColumn("{task.description}", markup=False)
            self.bar = Bar(name, BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), transient=True,
                           console=Console(stderr=True), auto_refresh=False)  # fmt: skip
            self.bar.start()
            self.task = self.bar.add_task(visible(self.what), total=self.total)
        return self

    def __call__(self, done: int, total: int) -> None:
        now = time.perf_counter()
        if self.bar is not None and (done == self.total or now - self.drawn > 0.1):  # drawing takes time too
            self.bar.update(self.task, completed=done, total=total, refresh=True)
            self.drawn = now

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()
