"""What gzip and xz make of the held-out text: the scale beside a model's bits per byte.

Both compress the first LIMIT bytes at most, alone, in one piece, at their best level; xz with a dictionary as large
as the text, which finds the same as a larger one and needs 12 bytes of memory for each byte of text.
"""

from __future__ import annotations

import gzip
import lzma
import threading
from collections.abc import Callable
from concurrent.futures import Future

LIMIT = 8 << 20  # xz takes 100 MB and five seconds for them


class Yardsticks:
    """gzip and xz at work on a text, beside whatever else this process does."""

    def __init__(self, text: bytes) -> None:
        self.size = len(text)
        self.sizes = [_in_background(work, text) for work in (gzip_size, xz_size)]

    def bits(self) -> tuple[float, float]:
        """(gzip, xz) in bits per byte, once they are done."""
        gzipped, xzipped = (8 * size.result() / self.size for size in self.sizes)
        return gzipped, xzipped


def gzip_size(text: bytes) -> int:
    return len(gzip.compress(text, 9, mtime=0))


def xz_size(text: bytes) -> int:
    best = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": max(4096, len(text))}
    return len(lzma.compress(text, filters=[best]))


def _in_background(work: Callable[[bytes], int], text: bytes) -> Future[int]:
    """In a daemon thread, which Ctrl-C does not wait for (those of an executor it would)."""
    made: Future[int] = Future()

    def run() -> None:
        try:
            made.set_result(work(text))
        except BaseException as error:
            made.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return made
