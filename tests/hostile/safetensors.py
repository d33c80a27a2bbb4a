"""Bad safetensors files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from entrenar.formats import FormatError
from entrenar.formats.safetensors import SafeTensors
from hostile.case import (
    GONE,
    MIB,
    WHOLE,
    WORDS,
    Case,
    Family,
    bad_json,
    bytes_at,
    cuts,
    flips,
    not_files,
    others,
    replaced,
    short,
)

NAME = "model.safetensors"
TENSORS: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [2], "data_offsets": [24, 28]},
    "c": {"dtype": "U8", "shape": [4], "data_offsets": [28, 32]},
}
DATA = bytes(range(32))


def errors() -> tuple[type[BaseException], ...]:
    return (FormatError,)


def digest_of(path: Path) -> str:
    digest = hashlib.sha256()
    with SafeTensors(path) as file:
        for name, array in file.items():
            digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def file_of(header: Any, data: bytes = DATA, length: int | None = None) -> bytes:
    """A file with this header (a JSON value, or text), whatever the header says."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    return ((len(raw) if length is None else length) & (1 << 64) - 1).to_bytes(8, "little") + raw + data


def case(name: str, header: Any, data: bytes = DATA, **more: Any) -> Case:
    return Case(
        name, bytes_at(NAME, lambda: file_of(header() if callable(header) else header, data)), digest_of, **more
    )


GOOD = file_of(TENSORS)


def cut_short() -> Iterator[Case]:
    for name, raw in cuts(GOOD):
        yield Case(name, bytes_at(NAME, raw), digest_of)


def too_long() -> Iterator[Case]:
    for more in (1, 2, 8, 1000, MIB):
        yield Case(f"{more} more", bytes_at(NAME, GOOD + bytes(more)), digest_of, says="bytes follow the last tensor")


def length_of_the_header() -> Iterator[Case]:
    true = len(GOOD) - 8 - len(DATA)
    near = (true - 1, true + 1, true - 8, true + 8, len(GOOD) - 8, len(GOOD), 10**8, 10**8 + 1)
    for length in sorted({n for n in (*WHOLE, *near) if -(2**63) <= n < 2**64}):
        yield Case(f"{length}", bytes_at(NAME, file_of(TENSORS, length=length)), digest_of)


def offsets() -> Iterator[Case]:
    for name in "abc":
        for i, true in enumerate(TENSORS[name]["data_offsets"]):
            for what, value in others(true, *WHOLE, true - 1, true + 1, 32, 33, *WORDS, float(true), str(true)):
                yield case(f"{name}[{i}] = {what}", replaced(TENSORS, (name, "data_offsets", i), value))
        for what, value in others(None, [], [0], [0, 24, 28], [[0, 24]], {"0": 0, "1": 24}, *WORDS, 24, GONE):
            yield case(f"{name} = {what}", replaced(TENSORS, (name, "data_offsets"), value))


def places() -> Iterator[Case]:
    """Every array inside the file, and yet not one after the other."""

    def placed(*spans: tuple[int, int], data: int = 32) -> Any:
        tensors = {
            f"t{i}": {"dtype": "U8", "shape": [b - a], "data_offsets": [a, b]} for i, (a, b) in enumerate(spans)
        }
        return file_of(tensors, bytes(data))

    layouts = {
        "the same twice": [(0, 32), (0, 32)],
        "inside another": [(0, 32), (8, 16)],
        "overlap by one": [(0, 17), (16, 32)],
        "a hole": [(0, 15), (16, 32)],
        "a hole at the start": [(1, 32)],
        "a hole at the end": [(0, 31)],
        "an empty one beyond the end": [(0, 32), (33, 33)],
        "an empty one inside another": [(0, 32), (16, 16)],
        "none, and data": [],
    }
    for name, spans in layouts.items():
        yield Case(name, bytes_at(NAME, placed(*spans)), digest_of, says="overlaps|begins|follow|wanted begin")
    yield Case("an empty one at the end", bytes_at(NAME, placed((0, 32), (32, 32))), digest_of, may_load=True)
    yield Case("back to front", bytes_at(NAME, placed((16, 32), (0, 16))), digest_of, may_load=True)


def shapes() -> Iterator[Case]:
    for name in "abc":
        for i, true in enumerate(TENSORS[name]["shape"]):
            for what, value in others(true, *WHOLE, true - 1, true + 1, *WORDS, float(true), str(true)):
                yield case(f"{name}[{i}] = {what}", replaced(TENSORS, (name, "shape", i), value))
    products = (
        [2**32, 2**32],
        [2**31, 2**31, 4],
        [2**63],
        [2**64 - 6],
        [-2, -3],
        [-1],
        [2**62, 4, 0, 7],
        [3, 2, 2],
        [],
        [6, 1, 0],
        [2**40] * 1000,
        [10**90] * 3,
        [2, 3, 2**64],
        [[2, 3]],
        {"0": 6},
        *WORDS,
    )
    for what, value in others(0, *products):
        yield case(f"a = {what}", replaced(TENSORS, ("a", "shape"), value))
    for count in (65, 10_000, 300_000):
        yield case(
            f"{count:,} dimensions", replaced(TENSORS, ("a", "shape"), [2, 3] + [1] * count), says="dimensions"
        )
    empty = {"dtype": "F32", "data_offsets": [32, 32]}
    for shape in ([0, 2**62], [2**62, 0], [2**40, 2**40, 0], [0] * 64, [0]):
        yield case(f"empty {short(shape)}", TENSORS | {"e": empty | {"shape": shape}}, may_load=True)


def types() -> Iterator[Case]:
    words = (
        "f32",
        "F32 ",
        " F32",
        "",
        "F",
        "F128",
        "F64",
        "F16",
        "I4",
        "U4",
        "F4",
        "F8",
        "F8_E8M0",
        "float32",
        "pt",
        "BOOL",
        "F32\0",
        "C64",
        "O",
        "<f4",
        "object",
        "x" * 100_000,
    )
    for what, value in others("F32", *words, *WORDS, GONE):
        yield case(what, replaced(TENSORS, ("a", "dtype"), value))


def entries() -> Iterator[Case]:
    for value in (*WORDS, 7, [0, 24], "F32"):
        yield case(f"a = {short(value)} {type(value).__name__}", replaced(TENSORS, ("a",), value))
    for key in ("extra", "Shape", "shape ", "", "\0"):
        yield case(f"with {ascii(key)}", replaced(TENSORS, ("a", key), 1))
    for key in ("dtype", "shape", "data_offsets"):
        inside = json.dumps(TENSORS).replace(f'"{key}":', f'"{key}": 1, "{key}":', 1)
        yield case(f"{key} twice", inside.encode(), says="twice")
    yield case("a tensor twice", (json.dumps(TENSORS)[:-1] + ', "a": ' + json.dumps(TENSORS["a"]) + "}").encode())
    yield case("metadata twice", (json.dumps(TENSORS)[:-1] + ', "__metadata__": {}}').encode(), says="twice")


def metadata() -> Iterator[Case]:
    for value in (
        None,
        True,
        1,
        "",
        "pt",
        [],
        ["format"],
        {"format": 1},
        {"format": None},
        {"format": {"a": "b"}},
        {"format": ["pt"]},
    ):
        yield case(
            f"{short(value)} {type(value).__name__}", replaced(TENSORS, ("__metadata__",), value), says="__metadata__"
        )
    for name, text in ("10 MB", "x" * 10 * MIB), ("escape codes", "\x1b[2J\0"):
        yield case(f"a text of {name}", replaced(TENSORS, ("__metadata__", "format"), text), may_load=True)


def names() -> Iterator[Case]:
    for name in ("\0", "a\0b", "\n", "\x1b[2J", "\u202e", "\ud800", "\x7f", "a" * 100_000 + "\0", "\u200b"):
        yield case(f"{short(name)}", TENSORS | {name: {"dtype": "U8", "shape": [0], "data_offsets": [32, 32]}})
    for name in ("", "../../etc/passwd", "a.b", "é" * 5000):
        header = TENSORS | {name: {"dtype": "U8", "shape": [0], "data_offsets": [32, 32]}}
        yield case(f"{short(name)}", header, may_load=True)
    for name in ("\x1b[2J", "x" * 100_000, "'; drop"):  # names that make it into a message
        yield case(f"{short(name)} with a bad shape", TENSORS | {name: TENSORS["a"] | {"shape": [-1]}})


def texts() -> Iterator[Case]:
    for name, raw in bad_json(json.dumps(TENSORS)):
        yield Case(name, bytes_at(NAME, partial(_with_header, raw)), digest_of)
    yield Case("a space first", bytes_at(NAME, file_of(b" " + json.dumps(TENSORS).encode())), digest_of)


def _with_header(raw: bytes | Callable[[], bytes]) -> bytes:
    return file_of(raw if isinstance(raw, bytes) else raw())


def big_headers() -> Iterator[Case]:
    entry = '"{}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    for count in (40_000, 200_000, 1_000_000):
        header = partial(lambda count: ("{" + ",".join(map(entry.format, range(count))) + "}").encode(), count)
        yield case(f"{count:,} tensors", header, b"", may_load=True)
    yield case("keys that take four bytes a character", _wide_keys, b"")
    yield case("95 MB of spaces", lambda: b"{}" + b" " * 95_000_000, b"", may_load=True)
    yield case("95 MB of NULs", lambda: b"{" + bytes(95_000_000), b"")
    yield case("95 MB of a text", lambda: b'{"__metadata__":{"a":"' + b"x" * 95_000_000 + b'"}}', b"", may_load=True)
    yield case("95 MB of text in two bytes", lambda: b'{"__metadata__":{"a":"' + "é".encode() * 47_000_000, b"")
    yield case("95 MB of text in four bytes", lambda: b'{"__metadata__":{"a":"' + "🙂".encode() * 23_000_000, b"")
    for size, length in ((1 << 40, 0), (1 << 40, 90_000_000), (1 << 40, 1 << 39), (1 << 34, (1 << 34) - 8)):
        yield Case(f"{length:,} of {size:,} bytes, which are not there", partial(sparse, size, length), digest_of)


def _wide_keys() -> bytes:
    return ("{" + ",".join(f'"{i:x}{"x" * 30}":0' for i in range(380_000)) + ',"🙂":0}').encode()


def sparse(size: int, length: int, folder: Path) -> Path:
    """A file of `size` bytes that takes no room on the disk."""
    with open(folder / NAME, "wb") as file:
        file.write(length.to_bytes(8, "little") + b"{")
        os.truncate(file.fileno(), size)
    return folder / NAME


def changed_bytes() -> Iterator[Case]:
    for name, raw in flips(GOOD, 400, 1, len(GOOD) - len(DATA)):
        yield Case(name, bytes_at(NAME, raw), digest_of, may_load=True)


def other_things() -> Iterator[Case]:
    for name, write, system in not_files(NAME):
        yield Case(name, write, digest_of, system=system)
    for name, raw in {
        "text": b"hello " * 100,
        "a GGUF file": b"GGUF" + bytes(100),
        "a zip": b"PK\3\4" + bytes(100),
        "NULs": bytes(1000),
        "a pickle": b"\x80\x02}q\x00." * 20,
        "HTML": b"<!DOCTYPE html><html>" * 20,
        "FFs": b"\xff" * 1000,
        "an LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1000\n",
    }.items():
        yield Case(name, bytes_at(NAME, raw), digest_of)


def harmless() -> Iterator[Case]:
    """Other ways to write the same file."""
    whole = _digest()
    header = json.dumps(TENSORS).encode()
    for name, raw in {
        "as it is": GOOD,
        "more padding": file_of(header + b" " * 64),
        "no padding": len(header).to_bytes(8, "little") + header + DATA,
        "escapes": file_of(header.replace(b'"a"', b'"\\u0061"')),
        "indented": file_of(json.dumps(TENSORS, indent=4).encode()),
        "no metadata": file_of(replaced(TENSORS, ("__metadata__",), GONE)),
        "another order of keys": file_of({name: dict(reversed(entry.items())) for name, entry in TENSORS.items()}),
    }.items():
        yield Case(name, bytes_at(NAME, raw), digest_of, equals=whole)


def _digest() -> str:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return digest_of(bytes_at(NAME, GOOD)(Path(folder)))


FAMILIES: dict[str, Family] = {
    "cut short": cut_short,
    "too long": too_long,
    "length of the header": length_of_the_header,
    "offsets": offsets,
    "places": places,
    "shapes": shapes,
    "types": types,
    "entries": entries,
    "metadata": metadata,
    "names": names,
    "texts": texts,
    "big headers": big_headers,
    "changed bytes": changed_bytes,
    "other things": other_things,
    "harmless": harmless,
}
