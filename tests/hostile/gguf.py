"""Bad GGUF files."""

from __future__ import annotations

import hashlib
import io
import struct
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from entrenar.formats import FormatError
from entrenar.formats.gguf import ALIGNMENT, ARRAY, GGUF, PLAIN, SCALARS, STRING, TYPES
from entrenar.formats.gguf_writer import Tensor, write_gguf
from hostile.case import MIB, Case, Family, bytes_at, cuts, flips, not_files, put

NAME = "model.gguf"
HUGE = (2**31 - 1, 2**31, 2**32, 2**61, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1)


def errors() -> tuple[type[BaseException], ...]:
    return (FormatError,)


def digest_of(path: Path) -> str:
    digest = hashlib.sha256()
    with GGUF(path) as file:
        digest.update(repr(file.metadata).encode())
        for name, entry in file.entries.items():
            readable = entry.dtype in PLAIN or entry.dtype in ("BF16", "Q8_0")
            array = file[name] if readable else file.raw(name)
            digest.update(f"{name} {entry.dtype} {entry.shape}".encode() + array.tobytes())
    return digest.hexdigest()


# The pieces of a file, each as wrong as one likes


def string(text: str | bytes, length: int | None = None) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def key(name: str | bytes, code: int, value: bytes) -> bytes:
    return string(name) + struct.pack("<I", code) + value


def info(name: str | bytes, shape: Sequence[int], code: int, offset: int, dimensions: int | None = None) -> bytes:
    count = len(shape) if dimensions is None else dimensions
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", count, *shape, code, offset)


def file_of(
    keys: Sequence[bytes] = (),
    infos: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    tensors: int | None = None,
    count: int | None = None,
) -> bytes:
    head = (
        magic
        + struct.pack(
            "<IQQ", version, len(infos) if tensors is None else tensors, len(keys) if count is None else count
        )
        + b"".join(keys)
        + b"".join(infos)
    )
    return head.ljust(-(-len(head) // ALIGNMENT) * ALIGNMENT, b"\0") + data


def good() -> bytes:
    metadata = {
        "general.architecture": "llama",
        "a": 1,
        "names": ["x", "yy"],
        "numbers": np.arange(3, dtype=np.float32),
        "yes": True,
    }
    arrays = {
        "t": (np.ones((2, 32), np.float32), "Q8_0"),
        "u": (np.arange(3, dtype=np.float32), "F32"),
        "v": (np.ones((2, 2), np.float32), "BF16"),
    }
    out = io.BytesIO()
    write_gguf(out, metadata, [Tensor(n, a.shape, kind, lambda a=a: a) for n, (a, kind) in arrays.items()])
    return out.getvalue()


def case(name: str, raw: bytes, **more: object) -> Case:
    return Case(name, bytes_at(NAME, raw), digest_of, **more)  # type: ignore[arg-type]


def cut_short() -> Iterator[Case]:
    raw = good()
    with tempfile.TemporaryDirectory() as folder:
        path = bytes_at(NAME, raw)(Path(folder))
        whole, last = digest_of(path), max(entry.end for entry in GGUF(path).entries.values())
    for name, part in cuts(raw):
        yield case(name, part, equals=whole if len(part) >= last else None)  # padding at the end alone


def start() -> Iterator[Case]:
    for magic in (b"gguf", b"GGUE", b"GGML", b"ggjt", b"FUGG", b"\0\0\0\0"):
        yield case(f"magic {magic!r}", file_of(magic=magic), says="begins with")
    for version in (0, 1, 4, 255, 2**16, 2**24 * 3, 2**31, 2**32 - 1):
        yield case(f"version {version}", file_of(version=version), says="version|big-endian")
    for value in (1, 2, 1000, 2**18 + 1, *HUGE):
        yield case(f"{value} tensors", file_of(tensors=value))
        yield case(f"{value} keys", file_of(count=value))
        room = bytes(100_000)  # one empty tensor, or key, is in there
        yield case(f"{value} tensors, room for some", file_of(tensors=value, data=room), may_load=value == 1)
        yield case(f"{value} keys, room for some", file_of(count=value, data=room), may_load=value == 1)
    yield case("5 MB of empty keys", file_of(count=380_000, data=bytes(5 * MIB)))
    yield case("5 MB of empty tensors", file_of(tensors=200_000, data=bytes(5 * MIB)))


def keys() -> Iterator[Case]:
    value = struct.pack("<I", 7)
    for length in (4, 100, 65536, *HUGE):
        yield case(f"a key of {length}", file_of([string(b"abc", length) + struct.pack("<I", 4) + value]))
        text = file_of([key("k", STRING, string(b"abc", length))])
        yield case(f"a text of {length}", text, may_load=length == 4)  # what follows is padding
    for name in (b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"a\xf5b"):
        yield case(f"a key {name!r}", file_of([key(name, 4, value)]), says="UTF-8")
        yield case(f"a text {name!r}", file_of([key("k", STRING, string(name))]), says="UTF-8")
    for code in (13, 14, 255, 2**16, 2**31, 2**32 - 1):
        yield case(f"type {code}", file_of([key("k", code, bytes(16))]), says=f"type {code}")
    for byte in (2, 128, 255):
        yield case(f"a truth value of {byte}", file_of([key("k", 7, bytes([byte]))]), says="wanted 0 .false. or 1")
    yield case("a key twice", file_of([key("k", 4, value)] * 2), says="twice")
    yield case("a key twice, of other types", file_of([key("k", 4, value), key("k", 7, b"\1")]), says="twice")
    yield case("a long key twice", file_of([key("k" * 60_000, 4, value)] * 2), says="twice")
    for name in ("\x1b[2J", "\0", "\n\r"):
        yield case(f"{name!r} twice", file_of([key(name, 4, value)] * 2), says="twice")
        yield case(f"{name!r} of an unknown type", file_of([key(name, 99, value)]), says="type 99")
    for code, (name, letter) in SCALARS.items():
        size = struct.calcsize("<" + letter)
        raw = file_of([key("k", code, b"")])[: 24 + 8 + 1 + 4]
        for had in range(size):
            yield case(f"{name} with {had} bytes", raw + bytes(had), says="ends inside")


def arrays() -> Iterator[Case]:
    def array(code: int, count: int, items: bytes = b"") -> bytes:
        return key("k", ARRAY, struct.pack("<IQ", code, count) + items)

    for code in (*SCALARS, STRING, ARRAY):
        for count in (1, 2, *HUGE):
            yield case(f"{count} of type {code}", file_of([array(code, count)])[:49])
            yield case(
                f"{count} of type {code}, room for some",
                file_of([array(code, count, bytes(5000))], data=b""),
                may_load=count < 3,
            )
    for code in (13, 99, 2**32 - 1):
        yield case(f"type {code}", file_of([array(code, 0)]), says=f"type {code}")
    for length in (5, *HUGE):
        yield case(
            f"texts, the second of {length}",
            file_of([array(STRING, 2, string("a") + string("b", length))]),
            may_load=length == 5,
        )
    for depth in (2, 4, 5, 100, 10_000, 100_000):
        inner = struct.pack("<IQ", ARRAY, 1) * (depth - 1) + struct.pack("<IQ", 0, 1) + b"\7"
        yield case(
            f"{depth:,} deep",
            file_of([key("k", ARRAY, inner)]),
            may_load=depth <= 4,
            says="" if depth <= 4 else "deep",
        )
    yield case("truths that are none", file_of([array(7, 3, b"\0\1\2")]), says="neither 0 nor 1")
    yield case("2.5 million empty texts", file_of([array(STRING, 2_500_000, bytes(20_000_000))]))
    yield case("1.5 million empty arrays", file_of([array(ARRAY, 1_500_000, bytes(18_000_000))]), may_load=True)
    wide = struct.pack("<IQ", 0, 0) * 1000
    yield case(
        "arrays of arrays",
        file_of([array(ARRAY, 1000, (struct.pack("<IQ", ARRAY, 1000) + wide) * 1000)]),
        may_load=True,
    )


def alignment() -> Iterator[Case]:
    for value in (0, 3, 33, 2**31 + 1, 2**32 - 1):
        yield case(
            f"{value}", file_of([key("general.alignment", 4, struct.pack("<I", value))]), says="general.alignment"
        )
    for code, (name, letter) in SCALARS.items():
        if name != "uint32":
            yield case(f"as {name}", file_of([key("general.alignment", code, struct.pack("<" + letter, 1))]))
    yield case("as a text", file_of([key("general.alignment", STRING, string("32"))]), says="general.alignment")
    yield case("as an array", file_of([key("general.alignment", ARRAY, struct.pack("<IQI", 4, 1, 32))]))
    for value in (2**20, 2**31):
        keys = [key("general.alignment", 4, struct.pack("<I", value))]
        yield case(f"{value}, beyond the end", file_of(keys, [info("t", (4,), 0, 0)], bytes(64)), says="would end")


def tensors() -> Iterator[Case]:
    def one(*parts: bytes, data: int = 64) -> bytes:
        return file_of((), parts, bytes(data))

    for length in (65, 1000, *HUGE):
        yield case(f"a name of {length}", one(string(b"t", length) + bytes(40)))
    for name in (b"\xff", b"\xc0\x80"):
        yield case(f"a name {name!r}", one(info(name, (4,), 0, 0)), says="UTF-8")
    for name in ("\x1b[2J", "\0", "\n"):
        yield case(f"{name!r} twice", one(*[info(name, (4,), 0, 0)] * 2), says="twice")
        yield case(f"{name!r} of an unknown type", one(info(name, (4,), 99, 0)), says="unknown type")
    for count in (5, 255, 2**31, 2**32 - 1):
        yield case(f"{count} dimensions", one(info("t", (4,), 0, 0, dimensions=count)), says="dimensions")
    for size in (17, 1000, *HUGE):
        for shape in ((size,), (size, 2), (2, size), (size, size), (size,) * 4):
            yield case(f"shape {shape}", one(info("t", shape, 0, 0)), says="would end at byte")
    for shape in ((0,), (0, 2**63), (2**63, 0), (2**64 - 1, 0, 2**64 - 1), (0, 0, 0, 0), ()):
        yield case(f"shape {shape}", one(info("t", shape, 0, 0)), may_load=True)
    for code in (4, 5, 31, 32, 33, 36, 37, 38, 42, 255, 2**31, 2**32 - 1):
        yield case(f"type {code}", one(info("t", (4,), code, 0)), says="unknown type")
    for code, kind in TYPES.items():
        if kind.block > 1:
            yield case(
                f"{kind.name} in rows of {kind.block + 1}", one(info("t", (kind.block + 1,), code, 0)), says="block"
            )
        yield case(
            f"{kind.name} of 100,000 blocks", one(info("t", (kind.block * 100_000,), code, 0)), says="would end"
        )
    for offset in (1, 16, 31, 33, *HUGE):
        yield case(f"offset {offset}", one(info("t", (4,), 0, offset)), says="would end|does not divide")
    for last in (96, 128, 2**63):
        yield case(f"the second at {last}", one(info("t", (4,), 0, 0), info("u", (4,), 0, last)), says="would end")
    yield case("a name twice", one(info("t", (4,), 0, 0), info("t", (4,), 0, 32)), says="twice")
    for name, (a, b) in {"the same place": (0, 0), "overlap": (0, 32)}.items():
        yield case(name, one(info("t", (16,), 0, a), info("u", (4,), 0, b)), says="overlap")


def values() -> Iterator[Case]:
    """Any bytes are numbers: read, without a warning. (NaN is for whoever uses them.)"""
    for code in (0, 1, 8, 28, 30):
        kind = TYPES[code]
        for byte in (0x7F, 0xFF):
            raw = bytes([byte]) * (kind.nbytes * 32 // kind.block)
            yield case(f"{kind.name} of {byte:#x}", file_of((), [info("t", (32,), code, 0)], raw), may_load=True)


def changed_bytes() -> Iterator[Case]:
    for name, raw in flips(good(), 600, 3):
        yield case(name, raw, may_load=True)


def changed_numbers() -> Iterator[Case]:
    """Every place of the header in turn with eight bytes of a large or small number."""
    raw = good()
    for at in range(4, 320, 3):
        for value in (0, 2**64 - 1, 2**32):
            yield case(f"byte {at} = {value}", put(raw, at, value.to_bytes(8, "little")), may_load=True)


def other_things() -> Iterator[Case]:
    for name, write, system in not_files(NAME):
        yield Case(name, write, digest_of, system=system)
    for name, raw in {
        "text": b"hello " * 100,
        "NULs": bytes(1000),
        "FFs": b"\xff" * 1000,
        "the magic alone": b"GGUF",
        "JSON": b'{"a": 1}' * 9,
    }.items():
        yield case(name, raw)


def harmless() -> Iterator[Case]:
    yield case("as it is", good(), may_load=True)
    yield case("nothing in it", file_of(), may_load=True)
    yield case("more at the end", good() + bytes(1000), may_load=True)


FAMILIES: dict[str, Family] = {
    "cut short": cut_short,
    "start": start,
    "keys": keys,
    "arrays": arrays,
    "alignment": alignment,
    "tensors": tensors,
    "values": values,
    "changed bytes": changed_bytes,
    "changed numbers": changed_numbers,
    "other things": other_things,
    "harmless": harmless,
}
