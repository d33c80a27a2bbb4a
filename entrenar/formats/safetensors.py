"""safetensors: named arrays in one file - a JSON header, then their bytes, nothing else.

    8 bytes   N, the length of the header, little-endian
    N bytes   {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, ..., "__metadata__": {...}}
    the rest  the arrays' bytes, little-endian, rows first; offsets count from here

Reading checks everything the header claims before one byte is used, and is stricter than the library of that name: it
refuses a name that is there twice, space before the header, keys that mean nothing, names that cannot be printed.

Writing is here too because it converts on the way, a block at a time: a float32 model becomes a bfloat16 file
without a second copy of any tensor. The library writes arrays as they lie, so it would need one. The bytes are the
same (a test compares them).
"""

from __future__ import annotations

import contextlib
import functools
import json
import mmap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from entrenar.formats import Entry, FormatError, open_regular, short, strict_json

HEADER_LIMIT = 16 * 1000**2  # bytes, a sixth of the library's own limit: read, it may take ten times as much memory
DIMENSIONS = 64  # NumPy's limit
BLOCK = 1 << 18  # elements converted at a time: 1 MB of float32 stays in the cache
METADATA = "__metadata__"

# safetensors' word: (bytes of an element, NumPy's name; ml_dtypes defines what NumPy does not have)
DTYPES = {
    "F64": (8, "float64"), "F32": (4, "float32"), "F16": (2, "float16"), "BF16": (2, "bfloat16"),
    "F8_E4M3": (1, "float8_e4m3fn"), "F8_E5M2": (1, "float8_e5m2"),
    "I64": (8, "int64"), "I32": (4, "int32"), "I16": (2, "int16"), "I8": (1, "int8"),
    "U64": (8, "uint64"), "U32": (4, "uint32"), "U16": (2, "uint16"), "U8": (1, "uint8"), "BOOL": (1, "bool"),
}  # fmt: skip
WORDS = {name: word for word, (_, name) in DTYPES.items()}
FLOATS = ("F64", "F32", "F16", "BF16")  # what weights are stored in


@dataclass(frozen=True)
class Header:
    """What a file says it holds, all of it checked against the file's size."""

    entries: dict[str, Entry]
    metadata: dict[str, str]


def read_header(path: str | Path) -> Header:
    """The header of a safetensors file, checked.

    Raises FormatError naming the file, the tensor, what came and what was wanted; OSError where it cannot be read.
    """
    file, size = open_regular(path)
    with file:
        return _read_header(file, size, str(path))


class SafeTensors(Mapping[str, np.ndarray]):
    """A file's arrays by name, each a read-only view of the mapped file: nothing is read before it is looked at.

        with SafeTensors("model.safetensors") as file:
            norm = np.array(file["model.norm.weight"])

    entries, metadata   as `read_header`

    The file must stay as it is while it is mapped: where another program cuts it shorter, looking at the part that
    is gone kills this process with SIGBUS, as with every map. Copy what is to last. Views stay good after `close`:
    the map goes with the last of them.

    Raises FormatError and OSError as `read_header`; KeyError for a name that is not there.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        file, size = open_regular(path)
        with file:
            header = _read_header(file, size, str(path))
            try:
                self._map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
            except ValueError:
                raise FormatError(f"{path}: became shorter than {size:,} bytes while it was opened") from None
        self.entries, self.metadata = header.entries, header.metadata

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self.entries[name]
        view = np.frombuffer(self._map, numpy_dtype(entry.dtype), entry.size, entry.start).reshape(entry.shape)
        return view if view.flags.aligned else view.copy()  # the format allows it; kernels in C do not

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def release(self, name: str) -> None:
        """Let the pages of this array leave memory: they are read again from the file if looked at again."""
        entry, page = self.entries[name], mmap.PAGESIZE
        start = entry.start // page * page
        if entry.nbytes and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, start, entry.end - start)

    def close(self) -> None:
        with contextlib.suppress(BufferError):  # views are left: the map goes with the last of them
            self._map.close()

    def __enter__(self) -> SafeTensors:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def save(path: str | Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None, *,
         dtype: str | Mapping[str, str] | None = None) -> None:  # fmt: skip
    """Write named arrays as a safetensors file, a block at a time; no copy of an array is made.

    metadata   text by name; transformers asks for {"format": "pt"}
    dtype      "F32", "F16" or "BF16": floats are stored as this; None: each array as it is; or by name, and those
               without one as they are

    Writes into place and does not sync: call it inside `files.new_folder`, which does.
    Raises OSError where the disk refuses (what was written is removed), ValueError for a type that safetensors does
    not have, or a number too big for `dtype`, which would become infinite.
    """
    words = {name: dtype.get(name) if isinstance(dtype, Mapping) else dtype for name in arrays}
    stored = {name: _stored(array, words[name]) for name, array in arrays.items()}
    order = sorted(arrays, key=lambda name: (-stored[name].itemsize, name))  # big ones first: aligned
    header = _header_bytes({name: arrays[name] for name in order}, metadata, stored)
    try:
        with open(path, "wb") as file:
            file.write(header)
            for name in order:
                for block in _blocks(name, arrays[name], stored[name]):
                    file.write(block)
    except BaseException:
        Path(path).unlink(missing_ok=True)
        raise


@functools.cache
def numpy_dtype(word: str) -> np.dtype[Any]:
    """NumPy's type for safetensors' word: "BF16" -> ml_dtypes.bfloat16."""
    _, name = DTYPES[word]
    if word == "BF16" or word.startswith("F8"):
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))
    return np.dtype(name).newbyteorder("<")


# Reading


def _read_header(file: BinaryIO, size: int, path: str) -> Header:
    raw = _header_text(file, size, path)
    content = strict_json.parse(raw, f"{path}: header", values=strict_json.USUAL_VALUES)
    metadata = _metadata(content.pop(METADATA, {}), path)
    start = 8 + len(raw)
    entries = {name: _entry(name, value, start, size, path) for name, value in content.items()}
    _check_filled(entries.values(), start, size, path)
    return Header(entries, metadata)


def _header_text(file: BinaryIO, size: int, path: str) -> bytes:
    first = file.read(8)
    if len(first) < 8:
        raise FormatError(f"{path}: has {size} bytes; a safetensors file begins with 8 for the length of its header")
    length = int.from_bytes(first, "little")
    if length > HEADER_LIMIT:
        raise FormatError(
            f"{path}: claims a header of {length:,} bytes, at most {HEADER_LIMIT:,} are read; is it a safetensors file?"
        )
    if 8 + length > size:
        raise FormatError(f"{path}: claims a header of {length:,} bytes but has {size:,} in all; it was cut short")
    raw = file.read(length)
    if len(raw) < length:
        raise FormatError(f"{path}: ended after {8 + len(raw):,} of {size:,} bytes while it was read")
    if not raw.startswith(b"{"):
        raise FormatError(f"{path}: the header begins with {raw[:1]!r}, wanted '{{'; is it a safetensors file?")
    return raw


def _metadata(value: Any, path: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise FormatError(f"{path}: {METADATA} = {short(value)}: wanted texts by name")
    return value


def _entry(name: str, value: Any, start: int, size: int, path: str) -> Entry:
    """The entry a header has for `name`; `start`: where in the file the arrays begin, `size`: where it ends."""

    def refuse(why: str) -> FormatError:
        return FormatError(f"{path}: tensor {short(name)}: {why}")

    if not name.isprintable():
        raise refuse("its name cannot be printed")
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise refuse(f"is described by {short(value)}, wanted dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise refuse(f"dtype = {short(dtype)}: not read here; wanted one of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or not all(_is_size(n) for n in shape):
        raise refuse(f"shape = {short(shape)}: wanted a list of whole numbers of at least 0")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(n) for n in offsets):
        raise refuse(f"data_offsets = {short(offsets)}: wanted [begin, end], whole numbers of at least 0")
    if len(shape) > DIMENSIONS:
        raise refuse(f"has {len(shape):,} dimensions; at most {DIMENSIONS} are read")
    begin, end = offsets
    if not begin <= end <= size - start:
        raise refuse(f"data_offsets = {short(offsets)}: wanted begin <= end <= {size - start}, where the file ends")
    wanted = _product(shape, DTYPES[dtype][0])
    if wanted is None:
        raise refuse(f"shape = {short(shape)}: multiplies to more than any file can hold")
    if end - begin != wanted:
        raise refuse(f"has {end - begin:,} bytes; {dtype} of shape {short(shape)} has {wanted:,}")
    return Entry(name, dtype, tuple(shape), start + begin, start + end)


def _product(shape: list[int], itemsize: int) -> int | None:
    """Bytes of an array; None where its sizes (but zeros) multiply to 2^63: C would overflow, and NumPy refuses."""
    total = itemsize
    for n in shape:
        total *= n or 1
        if total >= 1 << 63:  # and before a number with a million digits is made
            return None
    return 0 if 0 in shape else total


def _check_filled(entries: Iterable[Entry], start: int, size: int, path: str) -> None:
    """Raise FormatError unless the arrays lie one after the other from `start` to the end of the file."""
    at, before = start, "the header"
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.end)):
        if entry.start != at:
            what = "overlaps" if entry.start < at else f"begins {entry.start - at:,} bytes after the end of"
            raise FormatError(f"{path}: tensor {short(entry.name)} {what} {before}; wanted them one after the other")
        at, before = entry.end, f"tensor {short(entry.name)}"
    if at != size:
        raise FormatError(f"{path}: {size - at:,} bytes follow the last tensor; wanted none")


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


# Writing


def _header_bytes(arrays: dict[str, np.ndarray], metadata: Mapping[str, str] | None,
                  stored: Mapping[str, np.dtype[Any]]) -> bytes:  # fmt: skip
    header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    at = 0
    for name, array in arrays.items():
        if name == METADATA or not name.isprintable():
            raise ValueError(f"safetensors: a tensor cannot be called {short(name)}")
        size = array.size * stored[name].itemsize
        header[name] = {"dtype": WORDS[stored[name].name], "shape": list(array.shape), "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _stored(array: np.ndarray, dtype: str | None) -> np.dtype[Any]:
    """The type an array has in the file."""
    if array.dtype.name not in WORDS:
        raise ValueError(f"safetensors: has no type for {array.dtype}; convert to one of {', '.join(WORDS)}")
    word = WORDS[array.dtype.name]
    return numpy_dtype(dtype if dtype is not None and word in FLOATS else word)


def _blocks(name: str, array: np.ndarray, stored: np.dtype[Any]) -> Iterator[memoryview]:
    """The array's bytes as they are in the file, rows first, BLOCK elements at a time."""
    flat = array.reshape(-1) if array.flags.c_contiguous else array.flat  # a transposed view: as its indices run
    for at in range(0, array.size, BLOCK):
        part = _converted(name, flat[at : at + BLOCK], stored)
        yield np.ascontiguousarray(part).view(np.uint8).data


def _converted(name: str, part: np.ndarray, stored: np.dtype[Any]) -> np.ndarray:
    if part.dtype == stored:
        return part
    with np.errstate(over="ignore"):
        out = part.astype(stored)
    lost = np.isinf(out) & np.isfinite(part)
    if lost.any():
        raise ValueError(
            f"safetensors: {name} has {part[lost][0]:g}, too big for {stored.name}; store it as a wider type"
        )
    return out
