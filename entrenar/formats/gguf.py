"""GGUF, the file of llama.cpp and what is built on it, read strictly. gguf_writer.py writes it.

    "GGUF"  version u32  tensor count u64  key count u64
    per key:     name string   type u32   value
    per tensor:  name string   dimensions u32, each u64, the fastest first   type u32   offset u64
    padding to the alignment; then the tensors' data, each at its offset from here, which the alignment divides

A string is its length (u64) and UTF-8; an array the type of its items (u32), their number (u64), the items. All is
little-endian. Source: ggml's docs/gguf.md. Of the block types only Q8_0 is computed here; the others are known by size.
"""

# I row length, always the last dimension here: shapes are NumPy's, GGUF has them in reverse

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from entrenar import kernels
from entrenar.formats import Entry, FormatError, open_regular, short

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
STRING, ARRAY = 8, 9
# Type of a value in the metadata -> its name and its letter, the same for `struct` and NumPy
SCALARS = {
    0: ("uint8", "B"), 1: ("int8", "b"), 2: ("uint16", "H"), 3: ("int16", "h"), 4: ("uint32", "I"), 5: ("int32", "i"),
    6: ("float32", "f"), 7: ("bool", "?"), 10: ("uint64", "Q"), 11: ("int64", "q"), 12: ("float64", "d"),
}  # fmt: skip
BOOL = 7

# What real files stay far below; the format itself sets the first three
KEY_LENGTH, NAME_LENGTH, DIMENSIONS = 65535, 64, 4
DEPTH = 4  # arrays inside each other; llama.cpp reads 1
TENSORS, KEYS = 1 << 16, 1 << 16
ITEMS = 1 << 20  # texts in arrays, all together; the largest vocabularies have some 700,000 with their merges
ARRAY_ITEMS = 256  # how many texts an array in an array counts for: no file in use has any


@dataclass(frozen=True)
class Type:
    """How a tensor's values are stored: blocks of `block` values in `nbytes` bytes."""

    name: str
    block: int
    nbytes: int


TYPES = {
    0: Type("F32", 1, 4), 1: Type("F16", 1, 2), 2: Type("Q4_0", 32, 18), 3: Type("Q4_1", 32, 20),
    6: Type("Q5_0", 32, 22), 7: Type("Q5_1", 32, 24), 8: Type("Q8_0", 32, 34), 9: Type("Q8_1", 32, 40),
    10: Type("Q2_K", 256, 84), 11: Type("Q3_K", 256, 110), 12: Type("Q4_K", 256, 144), 13: Type("Q5_K", 256, 176),
    14: Type("Q6_K", 256, 210), 15: Type("Q8_K", 256, 292), 16: Type("IQ2_XXS", 256, 66), 17: Type("IQ2_XS", 256, 74),
    18: Type("IQ3_XXS", 256, 98), 19: Type("IQ1_S", 256, 50), 20: Type("IQ4_NL", 32, 18), 21: Type("IQ3_S", 256, 110),
    22: Type("IQ2_S", 256, 82), 23: Type("IQ4_XS", 256, 136), 24: Type("I8", 1, 1), 25: Type("I16", 1, 2),
    26: Type("I32", 1, 4), 27: Type("I64", 1, 8), 28: Type("F64", 1, 8), 29: Type("IQ1_M", 256, 56),
    30: Type("BF16", 1, 2), 34: Type("TQ1_0", 256, 54), 35: Type("TQ2_0", 256, 66), 39: Type("MXFP4", 32, 17),
    40: Type("NVFP4", 64, 36), 41: Type("Q1_0", 128, 18),
}  # fmt: skip
CODES = {kind.name: code for code, kind in TYPES.items()}
PLAIN = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I8": "<i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}


@dataclass(frozen=True)
class Header:
    """All that stands before the data.

    metadata   key -> bool, int, float, str; for arrays a list of str, an ndarray of numbers, or a list of arrays
    kinds      key -> the type's name in the file: "uint32", "string", "string[2048]"
    """

    version: int
    alignment: int
    metadata: dict[str, Any]
    kinds: dict[str, str]
    entries: dict[str, Entry]


def read_header(path: str | Path) -> Header:
    """What a GGUF file says of itself. Raises FormatError where anything is not as it should be."""
    return GGUF(path).header


class GGUF:
    """A GGUF file, mapped into memory: `.entries`, `.metadata`, and `[name]`, a tensor's values.

    F32, F16 and whole numbers are views of the file, BF16 a view as ml_dtypes.bfloat16, Q8_0 becomes float32.
    Must not be cut short by others while it is open: the operating system then ends the process.

    Raises FormatError where anything in the header is not as it should be, OSError where there is no such file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        file, size = open_regular(path)
        with file:
            if size < 24:
                raise FormatError(f"{path}: {size} bytes are no GGUF file; its header alone has 24")
            self.map = np.memmap(file, np.uint8, "r")
        self.header = _read_header(_Reader(str(path), self.map))
        self.metadata, self.entries = self.header.metadata, self.header.entries

    def __enter__(self) -> GGUF:
        return self

    def __exit__(self, *_: object) -> None:
        del self.map  # views of it keep the file mapped until they go

    def raw(self, name: str) -> np.ndarray:
        """The bytes of a tensor, as a view of the file."""
        entry = self.entries[name]
        return self.map[entry.start : entry.end]

    def __getitem__(self, name: str) -> np.ndarray:
        entry, raw = self.entries[name], self.raw(name)
        if entry.dtype in PLAIN:
            return raw.view(PLAIN[entry.dtype]).reshape(entry.shape)
        if entry.dtype == "BF16":
            import ml_dtypes

            return raw.view(ml_dtypes.bfloat16).reshape(entry.shape)
        if entry.dtype == "Q8_0":
            return dequantize_q8_0(raw).reshape(entry.shape)
        raise FormatError(
            f"{self.path}: tensor {name} is stored as {entry.dtype}; values are read of F32, F16, BF16 and Q8_0"
        )


# Q8_0: a row in blocks of 32 values x = d q, each block the scale d as float16 and 32 whole numbers q in -127..127


def quantize_q8_0(x: np.ndarray) -> np.ndarray:
    """d = max|x| / 127,  q = round(x / d), halves away from zero      x (..., I) float32 -> (..., I/32 * 34) bytes

    A block too small for 1/d to be a number is stored as zeros: its d is 0 in float16.
    """
    codes, scales = kernels.quantize_q8_0(x.reshape(-1))  # infinite scales too: the writer refuses them before
    out = np.empty((scales.size, 34), np.uint8)
    out[:, :2] = scales.astype("<f2")[:, None].view(np.uint8)
    out[:, 2:] = codes.reshape(-1, 32).view(np.uint8)
    return out.reshape(*x.shape[:-1], x.shape[-1] // 32 * 34)


def dequantize_q8_0(raw: np.ndarray) -> np.ndarray:
    """x = d q      raw (..., I/32 * 34) bytes -> (..., I) float32"""
    blocks = np.ascontiguousarray(raw).reshape(-1, 34)
    d = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    q = blocks[:, 2:].view(np.int8)
    return (q * d).reshape(*raw.shape[:-1], raw.shape[-1] // 34 * 32)


# The header


class _Reader:
    """A place in a mapped file. Whatever is taken is known to lie inside it."""

    def __init__(self, path: str, data: np.ndarray) -> None:
        self.path, self.data, self.size, self.at = path, memoryview(data.data), len(data), 0
        self.items = 0  # of all arrays of texts and of arrays, so far

    def fail(self, why: str, at: int | None = None) -> FormatError:
        return FormatError(f"{self.path}: byte {self.at if at is None else at}: {why}")

    def take(self, size: int, what: str) -> int:
        """Step over `size` bytes; where they begin."""
        if size > self.size - self.at:
            raise self.fail(f"the file ends inside {what}: {size:,} bytes wanted, {self.size - self.at:,} left")
        start, self.at = self.at, self.at + size
        return start

    def number(self, letter: str, what: str) -> Any:
        size = struct.calcsize("<" + letter)
        return struct.unpack_from("<" + letter, self.data, self.take(size, what))[0]

    def text(self, what: str, *, limit: int | None = None) -> str:
        place, length = self.at, self.number("Q", what)
        if limit is not None and length > limit:
            raise self.fail(f"{what} of {length:,} bytes; at most {limit:,} are allowed", place)
        start = self.take(length, what)
        try:
            return str(self.data[start : self.at], "utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} is not UTF-8", start + error.start) from None

    def count(self, what: str, *, smallest: int) -> int:
        """A number of things of at least `smallest` bytes each, which the rest of the file can hold."""
        place, number = self.at, self.number("Q", what)
        if number > (self.size - self.at) // smallest:
            raise self.fail(f"{number:,} {what} cannot lie in the {self.size - self.at:,} bytes that follow", place)
        return number

    def value(self, code: int, what: str, depth: int = 0) -> tuple[Any, str]:
        """(the value, its type's name)"""
        if code in SCALARS:
            name, letter = SCALARS[code]
            return self.truth(what) if code == BOOL else self.number(letter, what), name
        if code not in (STRING, ARRAY):
            raise self.fail(f"{what} has type {code}, which GGUF does not define (0 to 12)", self.at - 4)
        if code == STRING:
            return self.text(what), "string"
        return self.array(what, depth + 1)

    def truth(self, what: str) -> bool:
        byte = self.number("B", what)
        if byte > 1:
            raise self.fail(f"{what} is {byte}; wanted 0 (false) or 1 (true)", self.at - 1)
        return byte == 1

    def array(self, what: str, depth: int) -> tuple[Any, str]:
        if depth > DEPTH:
            raise self.fail(f"{what} has arrays inside each other more than {DEPTH} deep")
        code = self.number("I", what)
        if code not in (STRING, ARRAY) and code not in SCALARS:
            raise self.fail(f"{what} is an array of type {code}, which GGUF does not define (0 to 12)", self.at - 4)
        if code in SCALARS:
            return self.numbers(code, what)
        length = self.count(f"items of {what}", smallest=8 if code == STRING else 12)
        self.items += length if code == STRING else length * ARRAY_ITEMS
        if self.items > ITEMS:
            raise self.fail(f"{length:,} items of {what}: more than the {ITEMS:,} texts that are read of all metadata")
        if code == STRING:
            return self.texts(length, what), f"string[{length}]"
        return [self.array(what, depth + 1)[0] for _ in range(length)], f"array[{length}]"

    def texts(self, length: int, what: str) -> list[str]:
        """So many texts; `text` for each, but quick: a vocabulary has hundreds of thousands."""
        found, data, at, unpack = [], self.data, self.at, struct.Struct("<Q").unpack_from
        try:
            for _ in range(length):
                end = at + 8 + unpack(data, at)[0]
                if end > self.size:
                    break
                found.append(str(data[at + 8 : end], "utf-8"))
                at = end
        except (struct.error, UnicodeDecodeError):
            pass
        self.at = at
        while len(found) < length:  # says what is wrong
            found.append(self.text(what))
        return found

    def numbers(self, code: int, what: str) -> tuple[np.ndarray, str]:
        name, letter = SCALARS[code]
        dtype = np.dtype("<" + letter)
        length = self.count(f"items of {what}", smallest=dtype.itemsize)
        start = self.take(length * dtype.itemsize, what)
        raw = np.frombuffer(self.data, np.uint8, length * dtype.itemsize, start)
        if code == BOOL and (raw > 1).any():
            raise self.fail(f"{what} has a truth value that is neither 0 nor 1", start)
        return raw.copy().view(dtype), f"{name}[{length}]"


def _read_header(reader: _Reader) -> Header:
    version, tensors, keys = _read_start(reader)
    metadata, kinds = {}, {}
    for _ in range(keys):
        place, key = reader.at, reader.text("a key", limit=KEY_LENGTH)
        what = f"the key {short(key)}"
        if key in metadata:
            raise reader.fail(f"{what} is there twice", place)
        code = reader.number("I", f"the type of {what}")
        metadata[key], kinds[key] = reader.value(code, what)
    alignment = _alignment(reader, metadata, kinds)
    infos = [_read_info(reader) for _ in range(tensors)]
    data_start = -(-reader.at // alignment) * alignment
    entries = _place(reader, infos, data_start, alignment)
    return Header(version, alignment, metadata, kinds, entries)


def _read_start(reader: _Reader) -> tuple[int, int, int]:
    """(version, how many tensors, how many keys)"""
    magic = bytes(reader.data[reader.take(4, "the magic number") :][:4])
    if magic != MAGIC:
        raise reader.fail(f"begins with {magic!r}, a GGUF file with {MAGIC!r}", 0)
    version = reader.number("I", "the version")
    if version & 0xFFFF == 0 and version:
        raise reader.fail("a big-endian GGUF file; convert it to little-endian (gguf-py has gguf-convert-endian)", 4)
    if version not in (2, 3):
        raise reader.fail(f"GGUF version {version}; versions 2 and 3 are read", 4)
    place = reader.at
    tensors, keys = reader.number("Q", "the number of tensors"), reader.number("Q", "the number of keys")
    room = reader.size - reader.at
    # the least a tensor's entry (empty name, no dimensions) and a key (empty name, one byte) take
    if tensors * 24 + keys * 13 > room:
        raise reader.fail(f"{tensors:,} tensors and {keys:,} keys cannot lie in the {room:,} bytes that follow", place)
    if tensors > TENSORS or keys > KEYS:
        raise reader.fail(f"{tensors:,} tensors and {keys:,} keys; at most {TENSORS:,} and {KEYS:,} are read", place)
    return version, tensors, keys


def _alignment(reader: _Reader, metadata: dict[str, Any], kinds: dict[str, str]) -> int:
    alignment = metadata.get("general.alignment", ALIGNMENT)
    kind = kinds.get("general.alignment", "uint32")
    if kind != "uint32" or alignment == 0 or alignment & (alignment - 1):
        raise reader.fail(f"general.alignment = {short(alignment)} ({kind}); wanted a power of two (uint32)")
    return alignment


def _read_info(reader: _Reader) -> tuple[int, str, tuple[int, ...], Type, int]:
    """(place, name, shape, type, offset) of one tensor"""
    place, name = reader.at, reader.text("a tensor's name", limit=NAME_LENGTH)
    dimensions = reader.number("I", f"the dimensions of {name!r}")
    if dimensions > DIMENSIONS:
        raise reader.fail(f"tensor {name!r} has {dimensions:,} dimensions; at most {DIMENSIONS} are allowed", place)
    shape = tuple(reader.number("Q", f"the dimensions of {name!r}") for _ in range(dimensions))[::-1]
    code = reader.number("I", f"the type of {name!r}")
    if code not in TYPES:
        raise reader.fail(f"tensor {name!r} has the unknown type {code}", reader.at - 4)
    return place, name, shape, TYPES[code], reader.number("Q", f"the offset of {name!r}")


def _place(reader: _Reader, infos: list[tuple[int, str, tuple[int, ...], Type, int]], data_start: int,
           alignment: int) -> dict[str, Entry]:  # fmt: skip
    """The tensors, once each is known to lie inside the file and apart from every other."""
    entries: dict[str, Entry] = {}
    for place, name, shape, kind, offset in infos:
        if name in entries:
            raise reader.fail(f"the tensor {name!r} is there twice", place)
        row = shape[-1] if shape else 1
        if row % kind.block:
            raise reader.fail(f"tensor {name!r} has rows of {row:,}; {kind.name} stores blocks of {kind.block}", place)
        if offset % alignment:
            raise reader.fail(f"tensor {name!r} lies at offset {offset:,}, which {alignment} does not divide", place)
        if math.prod(n or 1 for n in shape) >= 1 << 60:  # NumPy has no such array, even where a 0 makes it empty
            raise reader.fail(f"tensor {name!r} {list(shape)} {kind.name} would end at byte 2^60 or later", place)
        start, size = data_start + offset, math.prod(shape) // kind.block * kind.nbytes
        if start + size > reader.size:
            raise reader.fail(
                f"tensor {name!r} {list(shape)} {kind.name} would end at byte {start + size:,}; "
                f"the file has {reader.size:,}", place)  # fmt: skip
        entries[name] = Entry(name, kind.name, shape, start, start + size)
    before = None
    for entry in sorted((e for e in entries.values() if e.nbytes), key=lambda e: e.start):
        if before is not None and entry.start < before.end:
            raise reader.fail(f"the tensors {before.name!r} and {entry.name!r} overlap", entry.start)
        before = entry
    return entries
