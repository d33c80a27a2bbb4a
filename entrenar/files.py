"""Writing files so that no reader sees half of one: temporary name, fsync, rename, fsync of the folder."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """`with new_folder(path) as temporary:` fill `temporary`; at the end it becomes `path`, or nothing does.

    Raises FileExistsError where `path` is there already and not empty (and leaves it alone).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        mask = _umask()
        for part in temporary.rglob("*"):  # mkdtemp makes folders for their owner alone
            part.chmod((0o777 if part.is_dir() else 0o666) & ~mask)
            sync(part)
        sync(temporary)
        temporary.chmod(0o777 & ~mask)
        try:
            os.rename(temporary, path)
        except OSError as error:
            if path.is_dir():
                raise FileExistsError(f"{path} exists already and is not empty") from error
            raise
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def new_file(path: str | Path, *, replace: bool = False) -> Iterator[BinaryIO]:
    """`with new_file(path) as file:` write into `file`; at the end it becomes `path`, on the disk, or nothing does.

    Raises FileExistsError where `path` is there already, unless it may be replaced.
    """
    path = Path(path)
    if path.exists() and not replace:
        raise FileExistsError(f"{path} exists already")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_file(path: str | Path, content: bytes | str) -> None:
    """Replace the file by `content`, or leave it as it was."""
    with new_file(path, replace=True) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def point_link(link: Path, target: str) -> None:
    """Let the symbolic link `link` lead to `target`, in one move where it led elsewhere before."""
    temporary = link.with_name(f".{link.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)
    sync(link.parent)


def sync(path: Path) -> None:
    """Have the disk keep what was written to this file or folder."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _umask() -> int:
    value = os.umask(0o022)
    os.umask(value)
    return value
