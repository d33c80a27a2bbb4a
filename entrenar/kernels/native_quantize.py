"""Wrappers of the C kernels that round floats to a storage format (csrc/quantize.c.inc), with the names and errors of
reference_quantize.py. Any float type goes through float32: that is the specification."""

from __future__ import annotations

import numpy as np

from entrenar.kernels import checks
from entrenar.kernels.calling import Array, at, empty, ffi, floats, from_buffer, lib
from entrenar.kernels.reference_quantize import Q8_0_BLOCK, as_float16, decisions

BYTES, SIGNED, HALVES = ffi.typeof("uint8_t *"), ffi.typeof("int8_t *"), ffi.typeof("uint16_t *")


def quantize_4bit(x: Array, *, kind: str, block: int) -> tuple[Array, Array]:
    checks.quantize_4bit(x, kind, block)
    bounds, order = decisions(kind)
    x, codes, absmax = floats(x), np.empty(-(-x.size // 2), np.uint8), empty(-(-x.size // block))
    lib.ent_quantize_4bit(from_buffer(BYTES, codes), at(absmax), at(x), at(bounds), from_buffer(BYTES, order), block,
                          x.size)
    return codes, absmax


def quantize_q8_0(x: Array) -> tuple[Array, Array]:
    checks.flat("quantize_q8_0", x)
    x, codes, scales = floats(x), np.empty(x.size, np.int8), empty(-(-x.size // Q8_0_BLOCK))
    lib.ent_quantize_q8_0(from_buffer(SIGNED, codes), at(scales), at(x), x.size)
    return codes, as_float16(scales)


def round_bfloat16(x: Array) -> Array:
    checks.flat("round_bfloat16", x)
    x, y = floats(x), np.empty(x.size, np.uint16)
    lib.ent_round_bfloat16(from_buffer(HALVES, y), at(x), x.size)
    return y
