"""What a case is, how its outcome is judged, and mutations that suit any format.

A case is refused as it should be when an error of the right family comes, whose message names the file and says what
is wrong in words for people, within a second and 200 MB, without noise on the terminal.
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

SECONDS, MEMORY = 1.0, 200_000_000  # of the processor; bytes resident above what there were before
MESSAGE, NOISE, WARNINGS = 4000, 1000, 3  # characters, bytes on stderr, warnings


@dataclass(frozen=True)
class Case:
    """One bad file.

    name       within its family
    write      writes into an empty folder; returns the path to be opened
    open       what a user's call reaches; returns a digest of what was read
    says       regular expression that the message must match
    names      what of the path the message must have; empty: the name of what is opened
    may_load   it is as good to read the file, if that takes neither long nor much memory
    equals     the mutation is harmless: the file must be read, and to this digest
    system     an OSError with the path is as good: the file cannot be opened at all
    """

    name: str
    write: Callable[[Path], Path]
    open: Callable[[Path], str]
    says: str = ""
    names: str = ""
    may_load: bool = False
    equals: str | None = None
    system: bool = False


Family = Callable[[], Iterator[Case]]


@dataclass
class Outcome:
    """What came of a case: a digest, or an error; and what it took."""

    digest: str | None = None
    error: str = ""  # the type's name
    expected: bool = False  # whether the error is of the right family
    message: str = ""
    processor: float = 0.0  # seconds
    seconds: float = 0.0
    memory: int = 0  # bytes at the peak, above what there were before
    warnings: int = 0
    noise: int = 0  # bytes on stderr
    opened: str = ""  # the name of what was opened


# Texts of Python's own errors, which tell a programmer something and nobody else
BARE = re.compile(
    r"object has no attribute|object is not|unhashable|not supported between|invalid literal for|indices must be"
    r"|index out of range|out of bounds|Traceback|codec can't|unpack|NoneType|buffer size|reshape array|struct\.error"
    r"|positional argument|recursion|could not convert|must be str|^'[^']*'$|\b[A-Z][a-z]+Error\b|math domain"
)


def judge(case: Case, outcome: Outcome) -> str:
    """What is wrong with the outcome; "" for nothing."""
    wrong = []
    if outcome.processor > SECONDS:
        wrong.append(f"took {outcome.processor:.1f} s, at most {SECONDS:g} are allowed")
    if outcome.memory > MEMORY:
        wrong.append(f"took {outcome.memory / 1e6:,.0f} MB, at most {MEMORY / 1e6:,.0f} are allowed")
    if outcome.warnings > WARNINGS:
        wrong.append(f"gave {outcome.warnings} warnings")
    if outcome.noise > NOISE:
        wrong.append(f"wrote {outcome.noise:,} bytes to stderr")
    if outcome.error:
        wrong += _about_the_error(case, outcome)
    elif case.equals is not None and outcome.digest != case.equals:
        wrong.append("was read, and as something else than the original")
    elif case.equals is None and not case.may_load:
        wrong.append("was read as if nothing were wrong")
    return "; ".join(wrong)


def _about_the_error(case: Case, outcome: Outcome) -> Iterator[str]:
    told = f"{outcome.error}: {outcome.message[:300]}"
    if case.equals is not None:
        yield f"must be read, its change is harmless: {told}"
    if not outcome.expected:
        yield f"is no error of the right family: {told}"
        return
    message = outcome.message
    if (case.names or outcome.opened) not in message:
        yield f"the message does not name {case.names or outcome.opened}: {told}"
    if case.says and not re.search(case.says, message):
        yield f"the message does not say {case.says!r}: {told}"
    if len(message) > MESSAGE:
        yield f"the message has {len(message):,} characters"
    if not message.replace("\n", "").isprintable():
        yield f"the message has characters a terminal acts on: {ascii(told)}"
    if outcome.error != "OSError" and BARE.search(message):
        yield f"the message is Python's, not one for people: {told}"


# Mutations that suit any format

WHOLE = (-(2**63), -1, 0, 1, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**99)
WORDS = (None, True, 1.5, -0.0, "", "1", [], {}, [0], {"a": 1})
MIB = 1 << 20
GONE = object()


def others(true: Any, *values: Any) -> Iterator[tuple[str, Any]]:
    """(name, value) of each of the values once, but not `true` itself; GONE stands for its absence."""
    seen = {(type(true), repr(true))}
    for value in values:
        if (type(value), repr(value)) not in seen:
            seen.add((type(value), repr(value)))
            yield "gone" if value is GONE else f"{short(value)} {type(value).__name__}", value


def bytes_at(name: str, raw: bytes | Callable[[], bytes]) -> Callable[[Path], Path]:
    """Writes a file of these bytes; large ones are best made only then."""

    def write(folder: Path) -> Path:
        (folder / name).write_bytes(raw if isinstance(raw, bytes) else raw())
        return folder / name

    return write


def put(raw: bytes, at: int, new: bytes) -> bytes:
    return raw[:at] + new + raw[at + len(new) :]


def cuts(raw: bytes, most: int = 0) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of the file cut at every length; `most`: at about so many, the first and last 16 among them."""
    step = max(1, len(raw) // most) if most else 1
    for length in range(len(raw)):
        if length % step == 0 or length < 16 or length >= len(raw) - 16:
            yield f"at {length}", raw[:length]


def flips(raw: bytes, count: int, seed: int, stop: int | None = None) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) with one to four bytes changed (before `stop`), in a seeded way."""
    dice = random.Random(seed)
    for i in range(count):
        changed = bytearray(raw)
        for _ in range(dice.randint(1, 4)):
            changed[dice.randrange(stop or len(raw))] ^= dice.choice([1, 2, 16, 64, 128, 255, dice.randrange(1, 256)])
        yield f"{i}", bytes(changed)


def not_files(name: str) -> Iterator[tuple[str, Callable[[Path], Path], bool]]:
    """(what, write, whether the system itself refuses to open it) of things where a file is wanted."""

    def pipe(folder: Path) -> Path:
        os.mkfifo(folder / name)
        return folder / name

    def directory(folder: Path) -> Path:
        (folder / name).mkdir()
        return folder / name

    def link(target: str) -> Callable[[Path], Path]:
        def write(folder: Path) -> Path:
            (folder / name).symlink_to(target)
            return folder / name

        return write

    yield "an empty file", bytes_at(name, b""), False
    yield "a folder", directory, True
    yield "a pipe nobody writes to", pipe, False
    yield "a link to /dev/zero", link("/dev/zero"), False
    yield "a link to itself", link(name), True
    yield "a link to nowhere", link("nowhere"), True
    yield "nothing", lambda folder: folder / name, True


def bad_json(good: str, *, big: bool = True) -> Iterator[tuple[str, bytes | Callable[[], bytes]]]:
    """(name, bytes) of texts in place of the JSON object `good`; none of them is to be read.

    big   those of 60 MB and more among them
    """
    assert good.rstrip().endswith("}")
    inside = good.rstrip()[:-1]  # more keys may follow

    def with_value(value: str) -> bytes:
        return f'{inside},"k": {value}}}'.encode()

    yield "empty", b""
    yield "blank", b" \n\t"
    yield "NUL", b"\0"
    yield "NULs", bytes(1000)
    yield "a word", b"hello"
    yield "null", b"null"
    yield "a number", b"1"
    yield "a text", b'"x"'
    yield "a list", b"[]"
    yield "an empty object", b"{}"
    yield "twice", (good + good).encode()
    yield "a comma at the end", f"{inside},}}".encode()
    yield "a comment", f"// hello\n{good}".encode()
    yield "single quotes", good.replace('"', "'").encode()
    yield "UTF-16", good.encode("utf-16")
    yield "UTF-32", good.encode("utf-32")
    yield "a byte order mark", b"\xef\xbb\xbf" + good.encode()
    yield "no UTF-8 in a key", f'{inside},"@k": 1}}'.encode().replace(b"@k", b"\xff")
    yield "overlong UTF-8 in a value", with_value('"@k"').replace(b"@k", b"\xc0\x80")
    yield "NUL in a key", f'{inside},"\0": 1}}'.encode()
    yield "half a surrogate pair", with_value('"\\ud800"')
    yield "a key twice", f'{inside},"k": 1,"k": 1}}'.encode()
    yield "a key twice, inside", with_value('{"a": 1, "\\u0061": 2}')
    yield "a key twice, with an escape code", f'{inside},"\\u001b[2J": 1,"\\u001b[2J": 1}}'.encode()
    yield "NaN", with_value("NaN")
    yield "Infinity", with_value("-Infinity")
    yield "too big a number", with_value("1e999")
    yield "a number of 5,000 digits", with_value("9" * 5000)
    yield "a number of 100,000 digits", with_value("-" + "9" * 100_000)
    yield "a leading zero", with_value("01")
    for left, middle, right in ("[", "1", "]"), ('{"k":', "1", "}"):
        for depth in (101, 10_000, 1_000_000):
            name = f"{left[0]} {depth:,} deep"
            yield name, partial(with_value, left * depth + middle + right * depth)
            yield f"{name}, not closed", partial(with_value, left * depth)
    if big:
        yield "4 million lists", lambda: with_value("[" + "[]," * 4_000_000 + "[]]")
        yield "2 million keys", lambda: with_value("{" + ",".join(f'"{i:x}":0' for i in range(2_000_000)))
        yield "a text of 70 MB", lambda: with_value(f'"{"x" * 70 * MIB}"')
        yield "60 MB of backslashes", lambda: with_value('"' + "\\" * 60 * MIB)
        yield "60 MB of spaces, not closed", lambda: f"{inside},{' ' * 60 * MIB}".encode()


def nodes(tree: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The path of every value inside a JSON value, itself left out."""
    inner: Iterable[tuple[str | int, Any]] = ()
    if isinstance(tree, dict):
        inner = tree.items()
    elif isinstance(tree, list):
        inner = enumerate(tree)
    for key, value in inner:
        yield (*path, key)
        yield from nodes(value, (*path, key))


def replaced(tree: Any, path: tuple[str | int, ...], value: Any) -> Any:
    """A copy of the JSON value with another one at `path`, or nothing (GONE)."""
    copy = json.loads(json.dumps(tree))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    if value is GONE:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return copy


def tree_mutations(tree: Any, values: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """(name, tree) with every value in turn taken away, and put in place by each of `values`."""
    offered = [GONE, *values]
    for path in nodes(tree):
        for value in offered:
            what = "gone" if value is GONE else short(value)
            yield f"{'.'.join(map(str, path))} = {what}", replaced(tree, path, value)


def short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 40 else f"{text[:30]}... ({len(text):,})"


def is_system(error: BaseException) -> bool:
    """Whether this is the system's own refusal to open a path, with the path in it."""
    usual = (errno.ENOENT, errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.ENOTDIR, errno.EACCES, errno.ENODEV)
    return isinstance(error, OSError) and error.errno in usual and error.filename is not None
