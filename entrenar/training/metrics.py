"""metrics.jsonl: what happened in a run, a line of JSON per event."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from pathlib import Path
from typing import Any, TextIO

METRICS = "metrics.jsonl"


class Metrics:
    """The open file, in a folder that is made where it is not there; what was written before stays."""

    def __init__(self, run: Path) -> None:
        run.mkdir(parents=True, exist_ok=True)
        self.path = run / METRICS
        self.file: TextIO = open(self.path, "a", encoding="utf-8")

    def log(self, event: str, **values: Any) -> None:
        """One line. Raises OSError, with the file's name, where the disk refuses it."""
        try:
            self.file.write(json.dumps({"event": event, **values}) + "\n")
            self.file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.file.name) from error

    def sync(self) -> None:
        """Have the disk keep it. Raises OSError where the file was removed meanwhile, with the run's folder."""
        self.file.flush()
        if os.fstat(self.file.fileno()).st_nlink == 0:
            gone = "the run's folder was removed while it trained"
            raise OSError(errno.ENOENT, gone, str(self.path.parent))
        os.fsync(self.file.fileno())

    @property
    def size(self) -> int:
        """Bytes so far."""
        return os.fstat(self.file.fileno()).st_size

    def cut(self, size: int) -> None:
        """Forget what came after the first `size` bytes."""
        if self.size > size:
            self.file.truncate(size)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of what `log` could not write, and said so
            self.file.close()
