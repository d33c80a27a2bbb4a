"""Bad llama2.c files: model.bin of versions 0, 1 and 2, and tokenizer.bin."""

from __future__ import annotations

import functools
import hashlib
import math
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from entrenar import random
from entrenar.convert.llama2c import HEADER, MAGIC, export_llama2c, import_llama2c, import_tokenizer, read_header
from entrenar.formats import FormatError
from entrenar.llama import Llama, LlamaConfig
from hostile.case import Case, Family, bytes_at, cuts, flips, not_files, put

NAME, WORDS = "model.bin", "tokenizer.bin"
SHAPE = LlamaConfig(
    vocab_size=7,
    hidden_size=8,
    intermediate_size=6,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=4,
    rms_norm_eps=1e-5,
    bos_token_id=1,
    eos_token_id=2,
)
FIELDS = ("dim", "hidden_dim", "layers", "heads", "kv_heads", "vocab", "seq_len")
NUMBERS = (-(2**31), -1, 0, 1, 2, 3, 1000, 1024, 1025, 65536, 2**30, 2**31 - 1)


def errors() -> tuple[type[BaseException], ...]:
    return (FormatError,)


def digest_of(path: Path) -> str:
    model = import_llama2c(path)
    digest = hashlib.sha256(repr(model.config).encode())
    for name, array in sorted(model.state_dict().items()):
        digest.update(f"{name} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


def words_of(path: Path) -> str:
    tokenizer = import_tokenizer(path)
    return f"{tokenizer.vocab_size} {tokenizer.encode('hello <s> world').tolist()}"


@functools.cache
def good(version: int) -> bytes:
    random.seed(4)
    if version == 2:
        return _quantized()
    with tempfile.TemporaryDirectory() as folder:
        return export_llama2c(Llama(SHAPE), Path(folder, "m.bin"), version=version).read_bytes()


def _quantized(group: int = 8) -> bytes:
    """Version 2, whose weights are all 1/2: no program here writes it."""
    sizes = struct.unpack("<7i", good(1)[8:36])
    head = struct.pack("<I8iBi", MAGIC, 2, *sizes, 0, group).ljust(HEADER, b"\0")
    with tempfile.TemporaryDirectory() as folder:
        shapes = list(read_header(bytes_at(NAME, good(1))(Path(folder))).shapes())
    out = head
    for _, shape, layers in shapes:
        size = math.prod(shape)
        scales = np.full(size // group, 0.5, "<f4").tobytes()
        out += (
            np.ones(size, "<f4").tobytes() if len(shape) == 1 else np.ones(size, np.int8).tobytes() + scales
        ) * layers
    return out


def case(name: str, raw: bytes, **more: object) -> Case:
    return Case(name, bytes_at(NAME, raw), digest_of, **more)  # type: ignore[arg-type]


def words(name: str, raw: bytes, **more: object) -> Case:
    return Case(name, bytes_at(WORDS, raw), words_of, **more)  # type: ignore[arg-type]


def cut_short() -> Iterator[Case]:
    for version in (0, 1, 2):
        for name, raw in cuts(good(version), 300):
            yield case(f"version {version}, {name}", raw)


def too_long() -> Iterator[Case]:
    for version in (0, 1, 2):
        for more in (1, 4, 1000):
            yield case(f"version {version}, {more} more", good(version) + bytes(more), says="has [0-9,]+ bytes")


def header_fields() -> Iterator[Case]:
    for version, first in ((0, 0), (1, 8), (2, 8)):
        raw = good(version)
        for i, field in enumerate(FIELDS):
            (true,) = struct.unpack_from("<i", raw, first + 4 * i)
            for value in dict.fromkeys((*NUMBERS, true - 1, true + 1, -true)):
                if value != true:
                    changed = put(raw, first + 4 * i, struct.pack("<i", value))
                    free = field == "seq_len" and version and value > 0  # nothing in the file has this size
                    yield case(f"version {version}, {field} = {value}", changed, may_load=bool(free))
    for version in (-1, 0, 3, 4, 2**31 - 1, -(2**31)):
        yield case(f"version {version}", put(good(1), 4, struct.pack("<i", version)), says="version")
    for shared in (1, 2, 127, 255):
        for version in (1, 2):
            yield case(f"version {version}, shared = {shared}", put(good(version), 36, bytes([shared])))
    for group in (-(2**31), -8, -1, 0, 3, 7, 16, 1024, 2**31 - 1):
        yield case(f"groups of {group}", put(good(2), 37, struct.pack("<i", group)), says="group|bytes")
    for magic in (0, MAGIC + 1, 0x67676D6C, 2**32 - 1):
        yield case(f"magic {magic:#x}", put(good(1), 0, struct.pack("<I", magic)))


def many_layers() -> Iterator[Case]:
    """Small numbers that ask for much work: files of the right size, or not."""
    for layers in (1024, 1025, 100_000):
        sizes = (2, 1, layers, 1, 1, 1, 1)
        yield case(f"{layers:,} layers without data", struct.pack("<7i", *sizes) + bytes(1000))
    for shape in ((2**15, 2**15, 1024, 1, 1, 2**15, 2**15), (2**30, 2**30, 1024, 2**29, 1, 2**30, 2**30)):
        yield case(f"{shape} without data", struct.pack("<7i", *shape) + bytes(1000), says="has 1,028 bytes")


def not_finite() -> Iterator[Case]:
    for version in (0, 1):
        raw = good(version)
        start = 28 if version == 0 else HEADER
        with tempfile.TemporaryDirectory() as folder:
            header = read_header(bytes_at(NAME, raw)(Path(folder)))
        at = start
        for name, shape, layers in header.shapes():
            if name not in ("cos", "sin"):  # made anew, never read
                for value in (np.nan, np.inf, -np.inf):
                    changed = put(raw, at, struct.pack("<f", value))
                    yield case(f"version {version}, {name} {value}", changed, says=f"{name} .*not finite")
            at += layers * header.nbytes(shape)
    scale = len(good(2)) - 4  # the last of the head
    for value in (np.nan, np.inf, -np.inf):
        yield case(f"version 2, a scale of {value}", put(good(2), scale, struct.pack("<f", value)), says="not finite")
    overflow = put(put(good(2), scale, struct.pack("<f", 3e38)), scale - 4 * 7 - 8, b"\x7f" * 8)
    yield case("version 2, a scale that overflows", overflow, says="not finite")


def changed_bytes() -> Iterator[Case]:
    for version in (0, 1, 2):
        for name, raw in flips(good(version), 150, 4 + version, 48):
            yield case(f"version {version}, header {name}", raw, may_load=True)
        for name, raw in flips(good(version), 60, 14 + version):
            yield case(f"version {version}, {name}", raw, may_load=True)


def other_things() -> Iterator[Case]:
    for name, write, system in not_files(NAME):
        yield Case(name, write, digest_of, system=system)
    for name, raw in {
        "text": b"hello " * 100,
        "NULs": bytes(1000),
        "FFs": b"\xff" * 1000,
        "ones": b"\1" * 5000,
        "a pickle": b"\x80\x02}q\x00." * 20,
        "a zip": b"PK\3\4" + bytes(500),
    }.items():
        yield case(name, raw)


# tokenizer.bin


def pieces() -> list[tuple[float, bytes]]:
    begin = [(0.0, b"<unk>"), (0.0, b"\n<s>\n"), (0.0, b"\n</s>\n")]
    return (
        begin
        + [(0.0, b"<0x%02X>" % i) for i in range(256)]
        + [(-i, bytes([97 + i])) for i in range(8)]
        + [(-9.0, b"ab")]
    )


def vocabulary(table: list[tuple[float, bytes]], longest: int = 6) -> bytes:
    return struct.pack("<I", longest) + b"".join(struct.pack("<fi", score, len(raw)) + raw for score, raw in table)


def words_cut_short() -> Iterator[Case]:
    raw, whole = vocabulary(pieces()), _ends()
    for name, part in cuts(raw, 250):
        yield words(name, part, may_load=len(part) in whole)


def _ends() -> set[int]:
    """Where a token ends, after all that there must be: the file does not say how many there are."""
    return {len(vocabulary(pieces()[:n])) for n in range(259, 268)}


def words_changed() -> Iterator[Case]:
    table, raw = pieces(), vocabulary(pieces())
    for value in (-(2**31), -1, 6, 1000, 2**31 - 1):
        yield words(f"a length of {value}", put(raw, 8, struct.pack("<i", value)))
        yield words(f"the last length {value}", put(raw, len(raw) - 6, struct.pack("<i", value)))
    for i in (3, 100, 258):
        yield words(
            f"another byte at {i}", vocabulary([*table[:i], (0.0, b"<0xZZ>"), *table[i + 1 :]]), says=f"token {i} "
        )
    for score in (np.nan, np.inf, -np.inf):
        yield words(f"a score of {score}", vocabulary([*table[:-1], (score, b"ab")]), says="score")
    for text in (b"", b"\xff", b"\xed\xa0\x80", b"a", "é".encode()[:1]):
        yield words(f"a token {text[:9]!r}", vocabulary([*table[:-1], (-9.0, text)]))
    for name, raw in {
        "same scores": vocabulary([*table, (-9.0, b"bc")]),
        "no begin": vocabulary([*table[:1], *table[2:]]),
    }.items():
        yield words(name, raw)
    many = [(-9.0 - i, f"{i:x}".encode()) for i in range(50_000)]
    yield words("50,000 tokens", vocabulary([*table[:-9], *many]), may_load=True)
    yield words("a token of 5,000", vocabulary([*table[:-1], (-9.0, b"x" * 5000)]))
    yield words("a token of 5 MB", vocabulary([*table[:-1], (-9.0, b"x" * 5_000_000)]))
    yield words("a million empty tokens", vocabulary(table) + struct.pack("<fi", 0.0, 0) * 1_000_000)
    for name, part in flips(vocabulary(table), 150, 9):
        yield words(f"bytes {name}", part, may_load=True)


def words_not_files() -> Iterator[Case]:
    for name, write, system in not_files(WORDS):
        yield Case(name, write, words_of, system=system)
    for name, raw in {"text": b"hello " * 100, "NULs": bytes(5000), "FFs": b"\xff" * 5000}.items():
        yield words(name, raw)
    yield words("as it is", vocabulary(pieces()), may_load=True)


FAMILIES: dict[str, Family] = {
    "cut short": cut_short,
    "too long": too_long,
    "header fields": header_fields,
    "many layers": many_layers,
    "not finite": not_finite,
    "changed bytes": changed_bytes,
    "other things": other_things,
    "tokenizer.bin cut short": words_cut_short,
    "tokenizer.bin changed": words_changed,
    "tokenizer.bin, other things": words_not_files,
}
