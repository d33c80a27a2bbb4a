"""The kernels in C, float32: one wrapper per kernel of csrc/kernels.h, with the names, signatures and errors of
reference.py. Any other float type goes to the reference.

A wrapper checks (checks.py), brings its inputs into the layout the kernel trusts (`floats`), makes the outputs
(`empty`), and passes pointers (`at`): calling.py has these. Attention, the kernels of packed matrices and quantizing
are in native_attention.py, native_packed.py and native_quantize.py.
Importing this module raises ImportError where no C kernels were built.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable

import numpy as np

from entrenar.kernels import checks, reference
from entrenar.kernels.calling import (  # noqa: F401 (what kernels/__init__.py asks of a backend is among them)
    F32,
    OPENMP,
    Array,
    at,
    at_ints,
    at_strided,
    available_isas,
    empty,
    ffi,
    float32,
    floats,
    get_num_threads,
    ints,
    isa,
    lib,
    multiplies_bfloat16,
    rows,
    scratch,
    set_num_threads,
    use_isa,
)
from entrenar.kernels.native_attention import attention_backward, attention_forward  # noqa: F401
from entrenar.kernels.native_packed import (  # noqa: F401
    packed,
    packed_linear,
    packed_linear_backward,
    packed_linears,
    unpack,
    unpack_rows,
)
from entrenar.kernels.native_quantize import quantize_4bit, quantize_q8_0, round_bfloat16  # noqa: F401
from entrenar.kernels.packed import Packed


# ---- matmul ---------------------------------------------------------------------------------------------------------
def matrices(a: Array) -> tuple[Array, int, int]:
    """`a` and the element strides (row, column) of its last two axes, one of which is 1: transposed, sliced, reversed
    or repeated rows stay where they are, anything else is copied. An axis of length 1 may have any stride."""
    (rows, columns), (row, column) = a.shape[-2:], a.strides[-2:]
    if a.dtype is F32 and a.flags.aligned:
        if (column == 4 or columns == 1) and row % 4 == 0:
            return a, row // 4, 1
        if (row == 4 or rows == 1) and column % 4 == 0:
            return a, 1, column // 4
    return floats(a), columns, 1


def group_stride(a: Array, batch: tuple[int, ...]) -> tuple[Array, int]:
    """`a` and the one element stride that walks over its matrices broadcast to `batch`; copied where none does."""
    own = a.shape[:-2]
    if own == batch and a.flags.c_contiguous:
        return a, a.shape[-2] * a.shape[-1]
    if math.prod(own) == 1:
        return a, 0
    missing = len(batch) - len(own)
    strides = [0] * missing + [0 if size == 1 else stride for size, stride in zip(own, a.strides, strict=False)]
    axes = [(size, stride) for size, stride in zip(batch, strides, strict=True) if size != 1]
    first = wanted = axes[-1][1]
    for size, stride in reversed(axes):
        if stride != wanted or stride % 4:
            return floats(np.broadcast_to(a, batch + a.shape[-2:])), a.shape[-2] * a.shape[-1]
        wanted = stride * size
    return a, first // 4


def matmul(a: Array, b: Array) -> Array:
    checks.matmul(a, b)
    if not float32(a, b):
        return reference.matmul(a, b)
    (m, k), n = a.shape[-2:], b.shape[-1]
    batch = a.shape[:-2]
    if b.ndim > 2 and b.shape[:-2] != batch:
        batch = np.broadcast_shapes(batch, b.shape[:-2])
    count = math.prod(batch)
    c = empty(*batch, m, n)
    if not c.size:
        return c

    (a, a_row, a_col), (b, b_row, b_col) = matrices(a), matrices(b)
    a_group = b_group = 0
    if count > 1:
        if b.ndim == 2 and a.flags.c_contiguous:                  # x (B, T, C) @ w: one tall matrix
            a, m, count, a_row, a_col = a.reshape(count * m, k), count * m, 1, k, 1
        else:
            a, a_group = group_stride(a, batch)
            b, b_group = group_stride(b, batch)
            (_, a_row, a_col), (_, b_row, b_col) = matrices(a), matrices(b)
    threads = lib.ent_num_threads
    work = scratch(lib.ent_matmul_scratch(threads))
    lib.ent_matmul(at(c), at_strided(a), at_strided(b), work, threads, count, m, n, k,
                   a_group, a_row, a_col, b_group, b_row, b_col, 0)
    return c


def matmul_add(c: Array, a: Array, b: Array) -> None:
    checks.matmul_add(c, a, b)
    if not (c.dtype is F32 and c.flags.carray and float32(a, b)):
        return reference.matmul_add(c, a, b)
    (m, k), n = a.shape, b.shape[1]
    if c.size and k:
        (a, a_row, a_col), (b, b_row, b_col) = matrices(a), matrices(b)
        threads = lib.ent_num_threads
        work = scratch(lib.ent_matmul_scratch(threads))
        lib.ent_matmul(at(c), at_strided(a), at_strided(b), work, threads, 1, m, n, k,
                       0, a_row, a_col, 0, b_row, b_col, 1)


# ---- rows: softmax, norms, rope, swiglu, loss, embedding, optimizer -------------------------------------------------
def softmax_forward(x: Array) -> Array:
    checks.rows("softmax", x)
    if not float32(x):
        return reference.softmax_forward(x)
    x, y = floats(x), empty(*x.shape)
    lib.ent_softmax_forward(at(y), at(x), *rows(x))
    return y


def softmax_backward(dy: Array, y: Array) -> Array:
    checks.rows("softmax_backward", y)
    checks.same_shape("softmax_backward", "dy y", dy, y)
    if not float32(dy, y):
        return reference.softmax_backward(dy, y)
    dy, y, dx = floats(dy), floats(y), empty(*y.shape)
    lib.ent_softmax_backward(at(dx), at(dy), at(y), *rows(y))
    return dx


def log_softmax_forward(x: Array) -> Array:
    checks.rows("log_softmax", x)
    if not float32(x):
        return reference.log_softmax_forward(x)
    x, y = floats(x), empty(*x.shape)
    lib.ent_log_softmax_forward(at(y), at(x), *rows(x))
    return y


def log_softmax_backward(dy: Array, y: Array) -> Array:
    checks.rows("log_softmax_backward", y)
    checks.same_shape("log_softmax_backward", "dy y", dy, y)
    if not float32(dy, y):
        return reference.log_softmax_backward(dy, y)
    dy, y, dx = floats(dy), floats(y), empty(*y.shape)
    lib.ent_log_softmax_backward(at(dx), at(dy), at(y), *rows(y))
    return dx


def rms_norm_forward(x: Array, w: Array, *, eps: float) -> tuple[Array, Array]:
    checks.norm("rms_norm", x, w)
    if not float32(x, w) or not x.shape[-1]:  # without channels there are no rows to count
        return reference.rms_norm_forward(x, w, eps=eps)
    x, w, y, rstd = floats(x), floats(w), empty(*x.shape), empty(*x.shape[:-1])
    lib.ent_rms_norm_forward(at(y), at(rstd), at(x), at(w), eps, *rows(x))
    return y, rstd


def rms_norm_backward(dy: Array, x: Array, w: Array, rstd: Array) -> tuple[Array, Array]:
    checks.norm_backward("rms_norm_backward", dy, x, w, rstd)
    if not float32(dy, x, w, rstd):
        return reference.rms_norm_backward(dy, x, w, rstd)
    dy, x, w, rstd = floats(dy), floats(x), floats(w), floats(rstd)
    dx, dw, (N, C) = empty(*x.shape), empty(*w.shape), rows(x)
    partial = scratch(lib.ent_norm_blocks(N) * C)
    lib.ent_rms_norm_backward(at(dx), at(dw), at(dy), at(x), at(w), at(rstd), N, C, partial)
    return dx, dw


def layer_norm_forward(x: Array, w: Array, b: Array, *, eps: float) -> tuple[Array, Array, Array]:
    checks.norm("layer_norm", x, w, b)
    if not float32(x, w, b) or not x.shape[-1]:
        return reference.layer_norm_forward(x, w, b, eps=eps)
    x, w, b = floats(x), floats(w), floats(b)
    y, mean, rstd = empty(*x.shape), empty(*x.shape[:-1]), empty(*x.shape[:-1])
    lib.ent_layer_norm_forward(at(y), at(mean), at(rstd), at(x), at(w), at(b), eps, *rows(x))
    return y, mean, rstd


def layer_norm_backward(dy: Array, x: Array, w: Array, mean: Array, rstd: Array) -> tuple[Array, Array, Array]:
    checks.norm_backward("layer_norm_backward", dy, x, w, mean, rstd)
    if not float32(dy, x, w, mean, rstd):
        return reference.layer_norm_backward(dy, x, w, mean, rstd)
    dy, x, w, mean, rstd = floats(dy), floats(x), floats(w), floats(mean), floats(rstd)
    dx, dw, db, (N, C) = empty(*x.shape), empty(*w.shape), empty(*w.shape), rows(x)
    partial = scratch(2 * lib.ent_norm_blocks(N) * C)
    lib.ent_layer_norm_backward(
        at(dx), at(dw), at(db), at(dy), at(x), at(w), at(mean), at(rstd), N, C, partial)
    return dx, dw, db


def rope_forward(x: Array, cos: Array, sin: Array) -> Array:
    checks.rope("rope", x, cos, sin)
    if not float32(x, cos, sin):
        return reference.rope_forward(x, cos, sin)
    x, cos, sin, y, (B, T, H, D) = floats(x), floats(cos), floats(sin), empty(*x.shape), x.shape
    lib.ent_rope_forward(at(y), at(x), at(cos), at(sin), B, T, H, D // 2)
    return y


def rope_backward(dy: Array, cos: Array, sin: Array) -> Array:
    checks.rope("rope_backward", dy, cos, sin)
    if not float32(dy, cos, sin):
        return reference.rope_backward(dy, cos, sin)
    dy, cos, sin, dx, (B, T, H, D) = floats(dy), floats(cos), floats(sin), empty(*dy.shape), dy.shape
    lib.ent_rope_backward(at(dx), at(dy), at(cos), at(sin), B, T, H, D // 2)
    return dx


def swiglu_forward(gate: Array, up: Array) -> Array:
    checks.same_shape("swiglu", "gate up", gate, up)
    if not float32(gate, up):
        return reference.swiglu_forward(gate, up)
    gate, up, y = floats(gate), floats(up), empty(*gate.shape)
    lib.ent_swiglu_forward(at(y), at(gate), at(up), y.size)
    return y


def packed_mlp(x: Array, gate: Packed, up: Packed, down: Packed) -> Array:
    checks.packed_mlp(x, gate, up, down)
    (F, I), N, O = gate.shape, len(x), down.shape[0]
    if not (float32(x) and N and I and F and O):
        return reference.packed_mlp(x, gate, up, down)
    x, y, threads = floats(x), empty(N, O), lib.ent_num_threads
    work = scratch(lib.ent_packed_mlp_scratch(threads, N, I, F))
    lib.ent_packed_mlp(at(y), at(x), [packed(gate), packed(up), packed(down)], work, threads, N)
    return y


def swiglu_backward(dy: Array, gate: Array, up: Array) -> tuple[Array, Array]:
    checks.same_shape("swiglu_backward", "dy gate up", dy, gate, up)
    if not float32(dy, gate, up):
        return reference.swiglu_backward(dy, gate, up)
    dy, gate, up, dgate, dup = floats(dy), floats(gate), floats(up), empty(*dy.shape), empty(*dy.shape)
    lib.ent_swiglu_backward(at(dgate), at(dup), at(dy), at(gate), at(up), dy.size)
    return dgate, dup


def cross_entropy_forward(logits: Array, targets: Array, *, ignore_index: int) -> tuple[Array, Array]:
    targets = checks.cross_entropy("cross_entropy", logits, targets, ignore_index=ignore_index)
    if not float32(logits):
        return reference.cross_entropy_forward(logits, targets, ignore_index=ignore_index)
    logits, targets, (N, V) = floats(logits), ints(targets), logits.shape
    losses, lse = empty(N), empty(N)
    lib.ent_cross_entropy_forward(at(losses), at(lse), at(logits), at_ints(targets), ignore_index, N, V)
    return losses, lse


def cross_entropy_backward(dlosses: Array, logits: Array, targets: Array, lse: Array, *, ignore_index: int) -> Array:
    targets = checks.cross_entropy("cross_entropy_backward", logits, targets, ignore_index=ignore_index)
    checks.same_shape("cross_entropy_backward", "dlosses lse targets", dlosses, lse, targets)
    if not float32(dlosses, logits, lse):
        return reference.cross_entropy_backward(dlosses, logits, targets, lse, ignore_index=ignore_index)
    dlosses, logits, targets, lse = floats(dlosses), floats(logits), ints(targets), floats(lse)
    dlogits, (N, V) = empty(*logits.shape), logits.shape
    lib.ent_cross_entropy_backward(
        at(dlogits), at(dlosses), at(logits), at_ints(targets), at(lse), ignore_index, N, V)
    return dlogits


def embedding_backward(dy: Array, ids: Array, *, rows: int) -> Array:
    checks.embedding_backward(dy, ids, rows=rows)
    if not float32(dy):
        return reference.embedding_backward(dy, ids, rows=rows)
    dw = np.zeros((rows, dy.shape[-1]), F32)
    embedding_add(dw, dy, ids)
    return dw


def embedding_add(dw: Array, dy: Array, ids: Array) -> None:
    ids = checks.embedding_add(dw, dy, ids)
    if not (dw.dtype is F32 and dw.flags.carray and float32(dy)):
        return reference.embedding_add(dw, dy, ids)
    dy, ids = floats(dy), ints(ids)
    lib.ent_embedding_backward(at(dw), at(dy), at_ints(ids), ids.size, dy.shape[-1])


def adamw_step(
    p: Array, g: Array, m: Array, v: Array, *, lr: float, beta1: float, beta2: float, eps: float,
    weight_decay: float, step: int, grad_scale: float,
) -> None:
    adamw_steps([(p, g, m, v, weight_decay)], lr=lr, beta1=beta1, beta2=beta2, eps=eps, step=step,
                grad_scale=grad_scale)


def adamw_steps(
    parameters: Iterable[tuple[Array, Array, Array, Array, float]], *, lr: float, beta1: float, beta2: float,
    eps: float, step: int, grad_scale: float,
) -> None:
    parameters, table, gradients = list(parameters), [], []
    for p, g, m, v, _ in parameters:
        checks.adamw_step(p, g, m, v, step=step)
    for p, g, m, v, weight_decay in parameters:
        in_place = all(a.dtype is F32 and a.flags.carray for a in (p, m, v))  # contiguous, aligned, writable
        if not in_place or not float32(g):
            reference.adamw_step(p, g, m, v, lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay,
                                 step=step, grad_scale=grad_scale)
            continue
        g = floats(g)
        gradients.append(g)  # the table does not keep a copy alive
        table.append((at(p), at(m), at(v), at(g), lr * weight_decay, p.size))
    lib.ent_adamw_steps(ffi.new("ent_adamw_parameter[]", table), len(table), grad_scale, beta1, 1 - beta1, beta2,
                        1 - beta2, 1 / (1 - beta2**step), eps, lr / (1 - beta1**step))


def sum_of_squares(*xs: Array) -> float:
    if not float32(*xs):
        return reference.sum_of_squares(*xs)
    xs = tuple(floats(x) for x in xs)
    blocks = sum(x.size // 4096 + 1 for x in xs)
    work = scratch(2 * blocks)  # named: the cast pointer does not keep it alive
    return lib.ent_sum_of_squares(ffi.new("float *[]", [at(x) for x in xs]), [x.size for x in xs], len(xs),
                                  ffi.cast("double *", work))


# ---- linear_cross_entropy -------------------------------------------------------------------------------------------
LOGITS_AT_ONCE = 1 << 23  # floats, 32 MB: a chunk in linear_cross_entropy; 16 MB would cost 5 % more time


def linear_cross_entropy(
    x: Array, w: Array | Packed, targets: Array, *, ignore_index: int, scale: float, need_dx: bool, need_dw: bool
) -> tuple[Array, Array | None, Array | None]:
    targets = checks.linear_cross_entropy(x, w, targets, ignore_index=ignore_index, need_dw=need_dw)
    if not float32(x) or not (isinstance(w, Packed) or float32(w)):
        return reference.linear_cross_entropy(
            x, w, targets, ignore_index=ignore_index, scale=scale, need_dx=need_dx, need_dw=need_dw)
    x, w, targets = floats(x), w if isinstance(w, Packed) else floats(w), ints(targets)
    head = (ffi.NULL, packed(w)) if isinstance(w, Packed) else (at(w), ffi.NULL)
    trained = np.flatnonzero(targets != ignore_index)
    N, C, V = len(trained), x.shape[1], w.shape[0]

    make = np.empty if N == len(targets) else np.zeros  # C writes the trained rows only
    losses = make(len(targets), F32)
    dx = make(x.shape, F32) if need_dx else None
    dw = (np.empty if N else np.zeros)(w.shape, F32) if need_dw else None
    if N:
        chunk, threads = linear_cross_entropy_chunk(N, V), lib.ent_num_threads
        work = scratch(lib.ent_linear_cross_entropy_scratch(threads, chunk, C, V))
        lib.ent_linear_cross_entropy(
            at(losses), ffi.NULL if dx is None else at(dx), ffi.NULL if dw is None else at(dw), at(x), *head,
            at_ints(targets), at_ints(trained), work, threads, scale, N, C, V, chunk)
    return losses, dx, dw


def linear_cross_entropy_chunk(N: int, V: int) -> int:
    """Rows that go together: as few chunks as LOGITS_AT_ONCE allows, of even size; from shapes alone, since the
    order of dw's sums hangs on it."""
    most = max(96, LOGITS_AT_ONCE // V)
    return -(-N // -(-N // most))


# ---- the machine ----------------------------------------------------------------------------------------------------
def fma_peak(seconds: float = 0.1) -> float:
    """FLOP/s of fused multiply-adds on registers, all threads together: what 100 % of peak means here."""
    threads, best, rounds = get_num_threads(), 0.0, 100_000
    sink = at(empty(threads))
    end = time.perf_counter() + seconds
    while True:
        started = time.perf_counter()
        flops = lib.ent_fma_peak(sink, threads, rounds) * threads
        now = time.perf_counter()
        best = max(best, flops / (now - started))
        if now >= end:
            return best
