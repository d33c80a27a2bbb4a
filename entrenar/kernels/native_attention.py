"""Attention in C, float32: the wrappers, with the names, signatures and errors of reference_attention.py. Rows that are
apart in memory, as the parts of one projection are, stay where they are: the kernel takes strides."""

# B batch, T time, S key/value length, H heads, KH key/value heads, D head dim

from __future__ import annotations

from entrenar.kernels import checks, reference_attention
from entrenar.kernels.calling import (
    Array,
    at,
    at_ints,
    at_strided,
    empty,
    ffi,
    float32,
    floats,
    ints,
    lib,
    scratch,
    strided,
)


def head_strides(*arrays: Array):
    """The element strides of q, k, v along their first three axes; cffi makes an array of them for the call."""
    q, k, v = (a.strides for a in arrays)
    return [stride // 4 for stride in q[:3] + k[:3] + v[:3]]


def at_starts(starts: Array | None):
    return ffi.NULL if starts is None else at_ints(starts)


def attention_forward(
    q: Array, k: Array, v: Array, starts: Array | None = None, *, scale: float
) -> tuple[Array, Array]:
    checks.attention("attention", q, k, v)
    starts = checks.documents("attention", starts, q, k)
    if not float32(q, k, v) or not q.size:
        return reference_attention.attention_forward(q, k, v, starts, scale=scale)
    (B, T, H, D), (S, KH) = q.shape, k.shape[1:3]
    q, k, v, starts = strided(q), strided(k), strided(v), None if starts is None else ints(starts)
    o, lse, threads = empty(B, T, H, D), empty(B, H, T), lib.ent_num_threads
    work = scratch(lib.ent_attention_forward_scratch(threads, B, T, S, H, KH, D))
    lib.ent_attention_forward(at(o), at(lse), at_strided(q), at_strided(k), at_strided(v), at_starts(starts), work,
                              threads, scale, B, T, S, H, KH, D, head_strides(q, k, v))
    return o, lse


def attention_backward(
    do: Array, q: Array, k: Array, v: Array, o: Array, lse: Array, starts: Array | None = None, *, scale: float
) -> tuple[Array, Array, Array]:
    checks.attention_backward("attention_backward", do, q, k, v, o, lse)
    starts = checks.documents("attention_backward", starts, q, k)
    if not float32(do, q, k, v, o, lse) or not q.size:
        return reference_attention.attention_backward(do, q, k, v, o, lse, starts, scale=scale)
    (B, T, H, D), (S, KH) = q.shape, k.shape[1:3]
    do, o, lse = floats(do), floats(o), floats(lse)
    q, k, v, starts = strided(q), strided(k), strided(v), None if starts is None else ints(starts)
    dq, dk, dv = empty(B, T, H, D), empty(B, S, KH, D), empty(B, S, KH, D)
    threads = lib.ent_num_threads
    work = scratch(lib.ent_attention_backward_scratch(threads, B, T, S, H, KH, D))
    lib.ent_attention_backward(at(dq), at(dk), at(dv), at(do), at_strided(q), at_strided(k), at_strided(v), at(o),
                               at(lse), at_starts(starts), work, threads, scale, B, T, S, H, KH, D,
                               head_strides(q, k, v))
    return dq, dk, dv
