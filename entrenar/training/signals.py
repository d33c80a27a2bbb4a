"""Signals a training run answers to.

    SIGINT (Ctrl-C), SIGTERM, SIGHUP    the first: finish the step, save, stop; a second one of them: stop at once
    SIGUSR1                             save a checkpoint after this step, and go on
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
CODE = {"Ctrl-C": 128 + signal.SIGINT, "SIGTERM": 128 + signal.SIGTERM, "SIGHUP": 128 + signal.SIGHUP}


class StopAtOnce(KeyboardInterrupt):
    """A second signal came: `code` is the exit code that stands for it."""

    def __init__(self, why: str) -> None:
        super().__init__(f"{why} again: stopped at once, nothing more was saved")
        self.code = CODE[why]


@dataclass
class Requests:
    """What signals have asked for so far; the trainer looks after each step."""

    stop: str = ""  # why, once something asked for an end
    save: bool = False

    @property
    def exit_code(self) -> int:
        """0 for a run that was not stopped, 128 + the signal's number for one that was."""
        return CODE.get(self.stop, 0)


@contextlib.contextmanager
def listening(requests: Requests) -> Iterator[None]:
    """Inside, signals are noted in `requests`. Outside the main thread Python allows no handlers: nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        why = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        if requests.stop:
            raise StopAtOnce(why)
        requests.stop = why
        # Written past Python's buffers, which the interrupted code may be in the middle of using.
        with contextlib.suppress(OSError):
            os.write(2, f"\n{why}: finishing this step, then saving; once more stops at once\n".encode())

    def save(number: int, frame: FrameType | None) -> None:
        requests.save = True

    handlers = dict.fromkeys(ENDING, end) | {signal.SIGUSR1: save}
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # nohup: the terminal may go
        del handlers[signal.SIGHUP]
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
