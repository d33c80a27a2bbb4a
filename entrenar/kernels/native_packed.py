"""Wrappers of the C kernels that read a Packed matrix (csrc/packed.c.inc), with the names and errors of
reference_packed.py."""

# N rows (tokens), O features out, I features in

from __future__ import annotations

import weakref
from collections.abc import Sequence

import numpy as np

from entrenar.kernels import checks, reference_packed
from entrenar.kernels.calling import Array, at, at_ints, empty, ffi, float32, floats, ints, lib, scratch
from entrenar.kernels.packed import INTEGER_SCALES, INTEGERS, KINDS, TABLES, Nested, Packed

BYTES, SHORTS = ffi.typeof("uint8_t *"), ffi.typeof("int16_t *")
NO_TABLE = np.zeros(16, np.float32)  # C loads a table's registers whatever the kind

described: weakref.WeakKeyDictionary[Packed, object] = weakref.WeakKeyDictionary()


def packed(w: Packed):
    """Pointer to the ent_packed that describes `w`, made once; the caller keeps `w` alive."""
    found = described.get(w)
    if found is None:
        found = described[w] = describe(w)
    return found


def describe(w: Packed):
    made = ffi.new("ent_packed *")
    made.codes = ffi.from_buffer(BYTES, w.codes)
    made.table = at(TABLES.get(w.kind, NO_TABLE))
    made.kind, made.block = KINDS.index(w.kind), w.block
    made.rows, made.columns = w.shape
    made.bfloat16 = w.compute == "bfloat16"
    if w.in_integers:
        made.integers, made.integer_scale = ffi.from_buffer(SHORTS, INTEGERS[w.kind]), INTEGER_SCALES[w.kind]
    if isinstance(w.scales, Nested):
        n = w.scales
        made.nested_codes = ffi.from_buffer(BYTES, n.codes)
        made.nested_table, made.nested_absmax = at(n.table), at(n.absmax)
        made.nested_offset, made.nested_block = np.float32(n.offset), n.block
    elif w.scales is not None:
        made.scales = at(w.scales)
    return made


def unpack(w: Packed) -> Array:
    to = empty(*w.shape)
    lib.ent_unpack(at(to), packed(w))
    return to


def unpack_rows(ids: Array, w: Packed) -> Array:
    ids = ints(checks.indices("unpack_rows", "ids", ids, w.shape[0]))
    to = empty(*ids.shape, w.shape[1])
    lib.ent_unpack_rows(at(to), packed(w), at_ints(ids), ids.size)
    return to


def packed_linear(x: Array, w: Packed) -> Array:
    checks.packed("packed_linear", x, w, 1)
    if not float32(x):
        return reference_packed.packed_linear(x, w)
    x, threads, (O, I) = floats(x), lib.ent_num_threads, w.shape
    y = empty(len(x), O) if I else np.zeros((len(x), O), np.float32)
    if y.size and I:
        work = scratch(lib.ent_packed_linear_scratch(threads, len(x), I))
        lib.ent_packed_linear(at(y), at(x), packed(w), work, threads, len(x))
    return y


def packed_linears(x: Array, ws: Sequence[Packed]) -> list[Array]:
    for w in ws:
        checks.packed("packed_linear", x, w, 1)
    if not (float32(x) and x.size and ws):
        return [packed_linear(x, w) for w in ws]
    x, (N, I), threads = floats(x), x.shape, lib.ent_num_threads
    y, ys, end = empty(N * sum(w.shape[0] for w in ws)), [], 0
    for w in ws:
        start, end = end, end + N * w.shape[0]
        ys.append(y[start:end].reshape(N, w.shape[0]))
    work = scratch(lib.ent_packed_linear_scratch(threads, N, I))
    lib.ent_packed_linears(at(y), at(x), [packed(w) for w in ws], len(ws), work, threads, N)
    return ys


def packed_linear_backward(dy: Array, w: Packed) -> Array:
    checks.packed("packed_linear_backward", dy, w, 0)
    if not float32(dy):
        return reference_packed.packed_linear_backward(dy, w)
    dy, threads, (O, I) = floats(dy), lib.ent_num_threads, w.shape
    dx = empty(len(dy), I) if O else np.zeros((len(dy), I), np.float32)
    if dx.size and O:
        work = scratch(lib.ent_packed_linear_scratch(threads, len(dy), I))
        lib.ent_packed_linear_backward(at(dx), at(dy), packed(w), work, threads, len(dy))
    return dx
