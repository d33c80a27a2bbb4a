"""Bad token files. All but the ids is sealed by a hash, so most cases come twice: as they are, and sealed anew."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from entrenar.data.tokenfile import HEADER, MAGIC, SEALED, VERSION, open_tokens, read_header
from entrenar.formats import FormatError
from hostile.case import MIB, Case, Family, bytes_at, cuts, flips, not_files, put

NAME = "train.tokens"
IDS = np.arange(0, 300, 15, np.uint16)


def errors() -> tuple[type[BaseException], ...]:
    return (FormatError,)


def digest_of(path: Path) -> str:
    header = read_header(path)
    return f"{header} {open_tokens(path).tolist()}"


def file_of(
    ids: np.ndarray = IDS,
    *,
    magic: bytes = MAGIC,
    version: int = VERSION,
    width: int = 2,
    count: int | None = None,
    vocab: int = 300,
) -> bytes:
    """A file whose hashes are right, whatever else it says."""
    content = ids.tobytes()
    head = HEADER.pack(
        magic,
        version,
        width,
        len(ids) if count is None else count,
        vocab,
        bytes(16),
        bytes(16),
        hashlib.sha256(content).digest(),
        bytes(32),
    )[:SEALED]
    return head + hashlib.sha256(head).digest() + content


def case(name: str, raw: bytes, **more: object) -> Case:
    return Case(name, bytes_at(NAME, raw), digest_of, **more)  # type: ignore[arg-type]


GOOD = file_of()


def cut_short() -> Iterator[Case]:
    for name, raw in cuts(GOOD):
        yield case(name, raw)
    wide = file_of(IDS.astype(np.uint32), width=4)
    for name, raw in cuts(wide):
        yield case(f"four bytes an id, {name}", raw)


def too_long() -> Iterator[Case]:
    for more in (1, 2, 3, 4, 128, MIB):
        yield case(f"{more} more", GOOD + bytes(more))


LONG = (0, 1, 19, 21, 2**31, 2**32, 2**63 - 20, 2**63 - 1, 2**63, 2**64 - 128, 2**64 - 1)


def header_fields() -> Iterator[Case]:
    """Each number of the header, sealed anew and not."""
    for what, at, size, values in (
        ("version", 8, 4, (0, 2, 255, 2**31, 2**32 - 1)),
        ("width", 12, 4, (0, 1, 3, 4, 8, 2**31, 2**32 - 1)),
        ("count", 16, 8, LONG),
        ("vocabulary", 24, 8, (0, 1, 285, 2**16 + 1, *LONG[4:])),
    ):
        for value in values:
            raw = put(GOOD, at, value.to_bytes(size, "little"))
            yield case(f"{what} = {value}", raw)
            yield case(f"{what} = {value}, sealed", put(raw, SEALED, hashlib.sha256(raw[:SEALED]).digest()))
    for magic in (b"", b"\x89ENTOK\n", b"\x89ENTOK\r\r", b"ENTOK\r\n\0", bytes(8), b"\x89PNG\r\n\x1a\n"):
        yield case(f"magic {magic!r}", file_of(magic=magic), says="no token file")


def hashes() -> Iterator[Case]:
    for at in range(32, 128, 4):
        yield case(f"byte {at}", put(GOOD, at, bytes([GOOD[at] ^ 1])))
    for at in range(64, 96, 4):
        raw = put(GOOD, at, bytes([GOOD[at] ^ 1]))
        yield case(f"byte {at}, sealed", put(raw, SEALED, hashlib.sha256(raw[:SEALED]).digest()), says="do not match")


def ids_out_of_range() -> Iterator[Case]:
    """Whole files with right hashes, whose ids the vocabulary does not have."""
    for i in range(len(IDS)):
        for value in (300, 65535):
            ids = IDS.copy()
            ids[i] = value
            yield case(f"id {i} = {value}", file_of(ids), says=f"token {i} ")
            wide = IDS.astype(np.uint32)
            wide[i] = 2**32 - value
            yield case(f"wide id {i} = {2**32 - value}", file_of(wide, width=4), says=f"token {i} ")
    long = np.zeros(2 * MIB, np.uint16)
    long[-1] = 300
    yield case("the last of two million", file_of(long), says="token 2,097,151 ")


def wrong_widths() -> Iterator[Case]:
    yield case("odd bytes", file_of(np.zeros(41, np.uint8), width=2, count=20))
    yield case("odd bytes of four", file_of(np.zeros(42, np.uint8), width=4, count=10))
    yield case("two bytes told as four", file_of(width=4, count=10), says="token")
    yield case("a large vocabulary with two bytes", file_of(vocab=70_000), says="vocabulary of 70,000")


def changed_bytes() -> Iterator[Case]:
    for name, raw in flips(GOOD, 300, 2):
        if raw != GOOD:
            yield case(name, raw)
    for at in range(len(GOOD)):
        yield case(f"bit {at % 8} of byte {at}", put(GOOD, at, bytes([GOOD[at] ^ 1 << at % 8])))


def other_things() -> Iterator[Case]:
    for name, write, system in not_files(NAME):
        yield Case(name, write, digest_of, system=system)
    for name, raw in {
        "text": b"hello " * 100,
        "NULs": bytes(1000),
        "FFs": b"\xff" * 1000,
        "flat ids": IDS.tobytes(),
        "NumPy": b"\x93NUMPY" + bytes(200),
    }.items():
        yield case(name, raw)


def harmless() -> Iterator[Case]:
    yield case("as it is", GOOD, may_load=True)
    yield case("no ids", file_of(IDS[:0]), may_load=True)
    yield case("four bytes an id", file_of(IDS.astype(np.uint32), width=4), may_load=True)


FAMILIES: dict[str, Family] = {
    "cut short": cut_short,
    "too long": too_long,
    "header fields": header_fields,
    "hashes": hashes,
    "ids out of range": ids_out_of_range,
    "wrong widths": wrong_widths,
    "changed bytes": changed_bytes,
    "other things": other_things,
    "harmless": harmless,
}
