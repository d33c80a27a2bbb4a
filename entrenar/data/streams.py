"""The bytes of a source's file: opened, unpacked, read on from anywhere; every failure with the file's name."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from typing import IO, cast

from entrenar.data.corpus import SourceFile

BLOCK = 1 << 20  # bytes read at once

Moved = Callable[[int], None]  # told how many bytes of the file, as it lies on the disk, have been read


class Unusable(Exception):
    """A file or a row that cannot be used: `place` says where, `fault` what is wrong and what was wanted."""

    def __init__(self, file: SourceFile, at: str, fault: str, *, kind: str = "") -> None:
        self.place, self.fault, self.kind = f"{file}{at}", fault, kind
        super().__init__(f"{self.place} {fault}")


class _Gzip(gzip.GzipFile):
    def __init__(self, inner: IO[bytes]) -> None:
        super().__init__(fileobj=inner)
        self.inner = inner

    def close(self) -> None:
        super().close()
        self.inner.close()


def opened(file: SourceFile, at: int = 0) -> IO[bytes]:
    """The bytes of the file, unpacked, from byte `at` on. Raises Unusable."""
    try:
        inner = open(file.path, "rb")
    except OSError as error:
        raise Unusable(file, "", f"cannot be read: {error.strerror}") from None
    if not file.packing:
        inner.seek(at)
        return inner
    stream = cast(IO[bytes], _Gzip(inner)) if file.packing == "gzip" else _zstd(inner)
    while at > 0:  # packed bytes can only be reached through those before
        at -= len(read(stream, file, min(BLOCK, at))) or at
    return stream


def _zstd(inner: IO[bytes]) -> IO[bytes]:
    try:
        from compression.zstd import ZstdFile  # type: ignore[import-not-found]  # Python 3.14
    except ImportError:
        from backports.zstd import ZstdFile

    class Zstd(ZstdFile):
        def close(self) -> None:
            super().close()
            inner.close()

    stream = Zstd(inner, "r")
    stream.inner = inner
    return cast(IO[bytes], stream)


def read(stream: IO[bytes], file: SourceFile, size: int | None = None) -> bytes:
    """The next BLOCK bytes, or `size`. Raises Unusable."""
    try:
        return stream.read(BLOCK if size is None else size)
    except Exception as error:
        raise damaged(file, error) from None


def damaged(file: SourceFile, error: Exception) -> Unusable:
    """What a failed read means: a packed file that is cut off or damaged, or a disk that fails."""
    if isinstance(error, EOFError):
        return Unusable(file, "", f"is cut off: its {file.packing} data has no end; fetch or pack it again")
    if isinstance(error, (gzip.BadGzipFile, zlib.error)) or type(error).__name__ == "ZstdError":
        return Unusable(file, "", f"is damaged, or no {file.packing} file: {error}")
    if isinstance(error, OSError):
        return Unusable(file, "", f"cannot be read: {error.strerror or error}")
    raise error


def on_disk(stream: IO[bytes]) -> int:
    """How many bytes of the file itself have been read, where `stream` unpacks it."""
    inner = getattr(stream, "inner", stream)
    return inner.tell() if not inner.closed else 0
