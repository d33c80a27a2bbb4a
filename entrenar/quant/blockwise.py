"""A matrix of floats into a storage format, a piece at a time: no whole copy of it is made on the way."""

# O features out (rows), I features in

from __future__ import annotations

from typing import Any

import numpy as np

from entrenar import kernels
from entrenar.kernels.memory import lasting
from entrenar.kernels.packed import KINDS, TABLES, Packed
from entrenar.quant.nested import nest

Array = np.ndarray

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # bitsandbytes' own
Q8_0_BLOCK = 32  # GGUF's
PIECE = 1 << 20  # values at a time: whole blocks of any size
# The greatest |x| that stays finite: q8_0 stores |x| / 127 as float16, and rounds
LARGEST = {"nf4": np.inf, "fp4": np.inf, "q8_0": 127 * 65504.0, "bfloat16": 3.3961775e38}


class QuantizeError(ValueError):
    """A matrix that a storage format cannot hold; the message says what came and what was wanted."""


def quantize(w: Array, kind: str, *, block: int = 64, double_quant: bool = True, name: str = "quantize") -> Packed:
    """W (O, I), of any float type, as a Packed of this kind.

    block         nf4, fp4: values that share a scale; q8_0 has 32 always, bfloat16 none
    double_quant  nf4, fp4: keep the scales in 8 bits
    name          what messages call the matrix

    nf4 and fp4 are bitsandbytes' bits, q8_0 GGUF's (where 32 divides I; else blocks run across rows), bfloat16 is
    rounded to the nearest, halves to even.
    Raises QuantizeError for NaN, infinity, and numbers too big for the kind.
    """
    if kind not in KINDS:
        raise ValueError(f"quantize: kind = {kind!r}: wanted one of {', '.join(KINDS)}")
    if kind in TABLES and block not in BLOCKS:
        raise ValueError(f"quantize: block = {block}: wanted one of {', '.join(map(str, BLOCKS))}")
    if w.ndim != 2 or not _is_float(w.dtype):
        raise ValueError(f"quantize: wanted floats of shape (O, I), got {w.dtype} {w.shape}")
    block = {"q8_0": Q8_0_BLOCK, "bfloat16": Packed.block}.get(kind, block)
    codes = lasting(-(-w.size // 2) if kind in TABLES else w.size, CODES[kind])
    scales = None if kind == "bfloat16" else np.empty(-(-w.size // block), np.float32)
    flat = w.reshape(-1) if w.flags.c_contiguous else w.flat  # a transposed view: as its indices run
    for start in range(0, w.size, PIECE):
        x = as_float32(flat[start : start + PIECE])
        _check(name, x, kind)
        _fill(codes, scales, x, kind, start, block)
    if kind in TABLES and double_quant and scales is not None:
        try:
            return Packed(kind, w.shape, codes, nest(scales), block)
        except OverflowError as error:
            raise QuantizeError(f"{name}: {error}; double_quant=False keeps them as they are") from None
    return Packed(kind, w.shape, codes, scales, block)


CODES = {"nf4": np.uint8, "fp4": np.uint8, "q8_0": np.int8, "bfloat16": np.uint16}


def _fill(codes: Array, scales: Array | None, x: Array, kind: str, start: int, block: int) -> None:
    """Codes and scales of the piece x, which begins at `start`."""
    if scales is None:
        codes[start : start + x.size] = kernels.round_bfloat16(x)
        return
    first = start // block
    if kind == "q8_0":
        made, scale = kernels.quantize_q8_0(x)
    else:
        made, scale = kernels.quantize_4bit(x, kind=kind, block=block)
        start //= 2
    codes[start : start + made.size], scales[first : first + scale.size] = made, scale


def as_float32(x: Array) -> Array:
    """x (n,) as float32; bfloat16 by its bits, twenty times as fast as ml_dtypes' conversion."""
    if x.dtype.name == "bfloat16":
        return np.left_shift(x.view(np.uint16), 16, dtype=np.uint32).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # what was too big is found infinite
        return x.astype(np.float32, copy=False)


def _check(name: str, x: Array, kind: str) -> None:
    if not np.isfinite(x).all():
        raise QuantizeError(f"{name}: has values that are not finite; {kind} cannot hold them")
    if LARGEST[kind] < np.inf and (largest := float(np.abs(x).max(initial=0))) > LARGEST[kind]:
        raise QuantizeError(f"{name}: has {largest:g}; {kind} ends at {LARGEST[kind]:g}")


def _is_float(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "f" or dtype.name == "bfloat16"
