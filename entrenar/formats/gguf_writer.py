"""A GGUF file (gguf.py), written as a stream: never back, and one tensor at a time in memory."""

# I row length, always the last dimension here: shapes are NumPy's, GGUF has them in reverse

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from entrenar.formats import FormatError
from entrenar.formats.gguf import ALIGNMENT, ARRAY, CODES, MAGIC, SCALARS, STRING, TYPES, VERSION, quantize_q8_0

CHUNK = 1 << 18  # values converted at a time while writing: 1 MB of float32 stays in the cache


@dataclass(frozen=True)
class Tensor:
    """A tensor to be written: `values()` is called when its turn comes, so that one at a time is in memory."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    values: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        kind = TYPES[CODES[self.dtype]]
        return math.prod(self.shape) // kind.block * kind.nbytes


def write_gguf(file: BinaryIO, metadata: Mapping[str, Any], tensors: Sequence[Tensor]) -> None:
    """Write a GGUF file of F32, F16, BF16 and Q8_0 tensors, one after the other, never going back.

    metadata   bool, int (uint32), float (float32), str, a NumPy scalar (its own type), a list of str, a 1-D array

    Raises ValueError for a value that has no type here, FormatError for a tensor whose values its type cannot hold.
    """
    start = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(metadata)))
    for key, value in metadata.items():
        code, raw = _encode_value(key, value)
        start += _string(key) + struct.pack("<I", code) + raw
    offset = 0
    for tensor in tensors:
        dimensions = struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *reversed(tensor.shape))
        start += _string(tensor.name) + dimensions + struct.pack("<IQ", CODES[tensor.dtype], offset)
        offset += _padded(tensor.nbytes)
    file.write(start.ljust(_padded(len(start)), b"\0"))
    for tensor in tensors:
        written = sum(file.write(chunk.data) for chunk in _encode(tensor))
        assert written == tensor.nbytes, f"{tensor.name}: wrote {written} bytes of {tensor.nbytes}"
        file.write(bytes(_padded(written) - written))


def _encode(tensor: Tensor) -> Iterator[np.ndarray]:
    """The tensor's values in its type, about CHUNK of them at a time."""
    values = tensor.values()
    assert values.shape == tensor.shape, f"{tensor.name}: {values.shape}, wanted {tensor.shape}"
    rows = values.reshape(-1, values.shape[-1])  # (N, I)
    step = max(1, CHUNK // max(1, rows.shape[1]))
    for i in range(0, len(rows), step):
        chunk = np.ascontiguousarray(rows[i : i + step], "<f4")
        if not np.isfinite(chunk).all():
            raise FormatError(f"tensor {tensor.name}: has values that are not finite; nothing useful can be written")
        yield _convert(chunk, tensor).reshape(-1).view(np.uint8)


def _convert(chunk: np.ndarray, tensor: Tensor) -> np.ndarray:
    if tensor.dtype == "F32":
        return chunk
    if tensor.dtype == "F16":
        _check_fits(tensor, chunk, 65519.99, "float16 ends at 65504")  # from 65520 on it rounds to infinity
        return chunk.astype("<f2")
    if tensor.dtype == "BF16":
        import ml_dtypes

        _check_fits(tensor, chunk, 3.3961775e38, "bfloat16 ends at 3.39e38")
        return chunk.astype(ml_dtypes.bfloat16)
    assert tensor.dtype == "Q8_0", tensor.dtype
    _check_fits(tensor, chunk, 127 * 65504.0, "Q8_0 ends at 127 * 65504")
    return quantize_q8_0(chunk)


def _check_fits(tensor: Tensor, chunk: np.ndarray, limit: float, why: str) -> None:
    largest = float(np.abs(chunk).max(initial=0))
    if largest > limit:
        raise FormatError(f"tensor {tensor.name}: {largest:g} does not fit {tensor.dtype}: {why}; write it as F32")


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _encode_value(key: str, value: Any) -> tuple[int, bytes]:
    """(type, bytes) of a value of the metadata."""
    letters = {letter: code for code, (_, letter) in SCALARS.items()}
    if isinstance(value, str):
        return STRING, _string(value)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ARRAY, struct.pack("<IQ", STRING, len(value)) + b"".join(map(_string, value))
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.char in letters:
        raw = np.ascontiguousarray(value, value.dtype.newbyteorder("<")).tobytes()
        return ARRAY, struct.pack("<IQ", letters[value.dtype.char], len(value)) + raw
    letter = value.dtype.char if isinstance(value, np.generic) else {bool: "?", int: "I", float: "f"}.get(type(value))
    if letter not in letters:
        raise ValueError(f"write_gguf: {key} = {value!r}: GGUF has no type for {type(value).__name__}")
    try:
        return letters[letter], struct.pack("<" + letter, value)
    except (struct.error, OverflowError):
        name = SCALARS[letters[letter]][0]
        raise ValueError(f"write_gguf: {key} = {value!r} does not fit {name}; give a wider NumPy scalar") from None
