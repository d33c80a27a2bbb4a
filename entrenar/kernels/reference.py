"""Every kernel in plain NumPy: the specification of the C kernels, their test oracle, and their fallback. Attention,
softmax, packed matrices and quantizing stand in files of their own, and are kernels here.

Written for the reader, not for speed: a kernel is its formula. It takes any float type, answers in it,
changes no input (except the optimizer's step, whose purpose that is) and returns fresh arrays. inf and nan go
where the formula takes them, silently; empty arrays are fine. Left out: threads and blocking, which C has.
"""

# B batch, T time, C channels, H heads, D head dim, V vocabulary, N rows (tokens)

from __future__ import annotations

import time
from collections.abc import Iterable

import numpy as np

from entrenar.kernels import checks
from entrenar.kernels.packed import Packed
from entrenar.kernels.reference_attention import attention_backward, attention_forward
from entrenar.kernels.reference_packed import (
    packed_linear,
    packed_linear_backward,
    packed_linears,
    unpack,
    unpack_rows,
)
from entrenar.kernels.reference_quantize import quantize_4bit, quantize_q8_0, round_bfloat16
from entrenar.kernels.reference_softmax import (
    log_softmax_backward,
    log_softmax_forward,
    log_sum_exp,
    silent,
    softmax_backward,
    softmax_forward,
)

__all__ = [  # the kernels, each of them also in native.py; besides, ops/elementwise.py reads sigmoid and erf
    "matmul", "matmul_add",
    "unpack", "unpack_rows", "packed_linear", "packed_linears", "packed_mlp", "packed_linear_backward",
    "quantize_4bit", "quantize_q8_0", "round_bfloat16",
    "softmax_forward", "softmax_backward", "log_softmax_forward", "log_softmax_backward",
    "rms_norm_forward", "rms_norm_backward", "layer_norm_forward", "layer_norm_backward",
    "rope_forward", "rope_backward", "swiglu_forward", "swiglu_backward",
    "attention_forward", "attention_backward",
    "cross_entropy_forward", "cross_entropy_backward", "linear_cross_entropy",
    "embedding_backward", "embedding_add", "adamw_step", "adamw_steps", "sum_of_squares", "fma_peak",
]  # fmt: skip

Array = np.ndarray

SUM_BLOCK = 4096  # sum_of_squares adds up blocks of so many numbers
LOGITS_AT_ONCE = 1024 * 1024  # linear_cross_entropy holds at most so many logits (4 MB of float32)


# -- matrices


def matmul(a: Array, b: Array) -> Array:
    """c = a b          a (..., M, K)   b (..., K, N)   c (..., M, N), batch axes broadcast"""
    checks.matmul(a, b)
    with silent():
        return np.matmul(a, b)


def matmul_add(c: Array, a: Array, b: Array) -> None:
    """c += a b, in place          a (M, K)   b (K, N)   c (M, N)"""
    checks.matmul_add(c, a, b)
    with silent():
        c += np.matmul(a, b)


# -- norms


def rms_norm_forward(x: Array, w: Array, *, eps: float) -> tuple[Array, Array]:
    """y = x * rstd * w,   rstd = 1 / sqrt(mean(x^2) + eps)          x, y (..., C)   w (C,)   rstd (...)

    Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
    """
    checks.norm("rms_norm", x, w)
    with silent():
        rstd = 1 / np.sqrt(_mean(x * x) + eps)
        return x * rstd * w, rstd[..., 0]


def rms_norm_backward(dy: Array, x: Array, w: Array, rstd: Array) -> tuple[Array, Array]:
    """dx = rstd * (g - n * mean(g * n)),   dw = sum over rows of dy * n;   n = x * rstd, g = dy * w

    dy, x, dx (..., C)   w, dw (C,)   rstd (...)
    """
    # y = w n and n = x r: drstd = sum(g x), d rstd / dx = -r^3 x / C, so dx = r g - r^3 x mean(g x).
    checks.norm_backward("rms_norm_backward", dy, x, w, rstd)
    with silent():
        r = rstd[..., None]
        n, g = x * r, dy * w
        dx = r * (g - n * _mean(g * n))
        return dx, _sum_rows(dy * n)


def layer_norm_forward(x: Array, w: Array, b: Array, *, eps: float) -> tuple[Array, Array, Array]:
    """y = (x - mean) * rstd * w + b,   rstd = 1 / sqrt(var(x) + eps)

    x, y (..., C)   w, b (C,)   mean, rstd (...)          Ba, Kiros and Hinton, "Layer Normalization", 2016.
    """
    checks.norm("layer_norm", x, w, b)
    with silent():
        mean = _mean(x)
        centred = x - mean
        rstd = 1 / np.sqrt(_mean(centred * centred) + eps)
        return centred * rstd * w + b, mean[..., 0], rstd[..., 0]


def layer_norm_backward(
    dy: Array, x: Array, w: Array, mean: Array, rstd: Array
) -> tuple[Array, Array, Array]:
    """dx = rstd * (g - mean(g) - n * mean(g * n)),   dw = sum of dy * n,   db = sum of dy   (over rows)

    with n = (x - mean) * rstd, g = dy * w          dy, x, dx (..., C)   w, dw, db (C,)   mean, rstd (...)
    """
    # As in rms_norm_backward, and x also moves every n through the mean: minus mean(g).
    checks.norm_backward("layer_norm_backward", dy, x, w, mean, rstd)
    with silent():
        r = rstd[..., None]
        n, g = (x - mean[..., None]) * r, dy * w
        dx = r * (g - _mean(g) - n * _mean(g * n))
        return dx, _sum_rows(dy * n), _sum_rows(dy)


def _mean(x: Array) -> Array:
    """The mean over the last axis, kept: (..., C) -> (..., 1); 0 where C is 0."""
    return x.sum(axis=-1, keepdims=True) / max(x.shape[-1], 1)


def _sum_rows(x: Array) -> Array:
    """(..., C) -> (C,)"""
    return x.sum(axis=tuple(range(x.ndim - 1)))


# -- rotary position embedding


def rope_forward(x: Array, cos: Array, sin: Array) -> Array:
    """y1 = x1 * cos - x2 * sin,   y2 = x2 * cos + x1 * sin,   with x1, x2 the halves of each head

    x, y (B, T, H, D)   cos, sin (T, D/2)
    Su et al., "RoFormer", 2021, in Hugging Face's "rotate half" order.
    """
    checks.rope("rope", x, cos, sin)
    return _rotate(x, cos, sin)


def rope_backward(dy: Array, cos: Array, sin: Array) -> Array:
    """The same rotation by the opposite angle          dy, dx (B, T, H, D)   cos, sin (T, D/2)"""
    checks.rope("rope_backward", dy, cos, sin)
    return _rotate(dy, cos, -sin)


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    x1, x2 = np.split(x, 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]  # (T, 1, D/2): every head turns alike
    with silent():
        return np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


# -- gated feed-forward


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), written with exp(-|x|), which cannot overflow          any shape"""
    with silent():
        e = np.exp(-np.abs(x))
        return np.where(x >= 0, 1, e) / (1 + e)


def swiglu_forward(gate: Array, up: Array) -> Array:
    """y = silu(gate) * up,   silu(g) = g * sigmoid(g)          gate, up, y one shape

    Shazeer, "GLU Variants Improve Transformer", 2020.
    """
    checks.same_shape("swiglu", "gate up", gate, up)
    with silent():
        return gate * sigmoid(gate) * up


def packed_mlp(x: Array, gate: Packed, up: Packed, down: Packed) -> Array:
    """y = (silu(x Wgate^T) * (x Wup^T)) Wdown^T          x (N, I)   gate, up (F, I)   down (O, F)   y (N, O)"""
    checks.packed_mlp(x, gate, up, down)
    return packed_linear(swiglu_forward(*packed_linears(x, (gate, up))), down)


def swiglu_backward(dy: Array, gate: Array, up: Array) -> tuple[Array, Array]:
    """dgate = dy * up * s * (1 + gate * (1 - s)),   dup = dy * gate * s,   with s = sigmoid(gate)"""
    # silu = g s and s' = s (1 - s): silu' = s + g s (1 - s)
    checks.same_shape("swiglu_backward", "dy gate up", dy, gate, up)
    with silent():
        s = sigmoid(gate)
        return dy * up * s * (1 + gate * (1 - s)), dy * gate * s


def erf(x: Array) -> Array:
    """erf(x) = 2/sqrt(pi) * integral of exp(-t^2) from 0 to x          any shape

    NumPy has none. W. J. Cody's rational approximations (Math. Comp. 23, 1969) for |x| < 0.46875 and for up
    to 4, the latter used on to 6, where erf is 1. Computed in float64, to within 2 units in its last place.
    """
    with silent():
        a = np.minimum(np.abs(x.astype(np.float64)), 6)
        near = a * np.polyval(_ERF_P, a * a) / np.polyval(_ERF_Q, a * a)
        far = 1 - np.exp(-a * a) * np.polyval(_ERFC_P, a) / np.polyval(_ERFC_Q, a)
        return np.copysign(np.where(a < 0.46875, near, far), x).astype(x.dtype)


_ERF_P = [1.85777706184603153e-1, 3.16112374387056560e0, 1.13864154151050156e2, 3.77485237685302021e2]
_ERF_P += [3.20937758913846947e3]
_ERF_Q = [1.0, 2.36012909523441209e1, 2.44024637934444173e2, 1.28261652607737228e3, 2.84423683343917062e3]
_ERFC_P = [2.15311535474403846e-8, 5.64188496988670089e-1, 8.88314979438837594e0, 6.61191906371416295e1]
_ERFC_P += [2.98635138197400131e2, 8.81952221241769090e2, 1.71204761263407058e3, 2.05107837782607147e3]
_ERFC_P += [1.23033935479799725e3]
_ERFC_Q = [1.0, 1.57449261107098347e1, 1.17693950891312499e2, 5.37181101862009858e2, 1.62138957456669019e3]
_ERFC_Q += [3.29079923573345963e3, 4.36261909014324716e3, 3.43936767414372164e3, 1.23033935480374942e3]


# -- loss


def cross_entropy_forward(logits: Array, targets: Array, *, ignore_index: int) -> tuple[Array, Array]:
    """loss_n = lse_n - logits[n, target_n],   lse_n = log sum_v exp(logits[n, v])

    logits (N, V)   targets (N,)   losses, lse (N,). The loss of a row whose target is ignore_index is 0.
    """
    targets = checks.cross_entropy("cross_entropy", logits, targets, ignore_index=ignore_index)
    kept = np.flatnonzero(targets != ignore_index)
    with silent():
        lse = log_sum_exp(logits)
        losses = np.zeros_like(lse)
        losses[kept] = lse[kept] - logits[kept, targets[kept]]
    return losses, lse


def cross_entropy_backward(
    dlosses: Array, logits: Array, targets: Array, lse: Array, *, ignore_index: int
) -> Array:
    """dlogits[n] = dloss_n * (softmax(logits[n]) - onehot(target_n)), 0 where ignored

    logits, dlogits (N, V)   targets, dlosses, lse (N,)
    """
    targets = checks.cross_entropy("cross_entropy_backward", logits, targets, ignore_index=ignore_index)
    checks.same_shape("cross_entropy_backward", "dlosses lse targets", dlosses, lse, targets)
    kept = np.flatnonzero(targets != ignore_index)
    with silent():
        p = np.exp(logits - lse[:, None])
        p[kept, targets[kept]] -= 1
        dlogits = p * dlosses[:, None]
    dlogits[targets == ignore_index] = 0
    return dlogits


def linear_cross_entropy(
    x: Array, w: Array | Packed, targets: Array, *, ignore_index: int, scale: float, need_dx: bool, need_dw: bool
) -> tuple[Array, Array | None, Array | None]:
    """losses = cross_entropy(x w^T, targets), and the gradients dx, dw of scale * sum(losses)

    x, dx (N, C)   w, dw (V, C)   targets, losses (N,); dx, dw None unless needed, dw never of a packed w. Rows are
    taken in chunks, and a chunk's gradients are made while its logits are there, so the (N, V) logits are never whole.
    Rows whose target is ignored are left out from the start.
    """
    targets = checks.linear_cross_entropy(x, w, targets, ignore_index=ignore_index, need_dw=need_dw)
    kept, V = np.flatnonzero(targets != ignore_index), w.shape[0]
    dtype = x.dtype if isinstance(w, Packed) else np.result_type(x, w)
    losses = np.zeros(x.shape[0], dtype)
    dx = np.zeros(x.shape, dtype) if need_dx else None
    dw = np.zeros(w.shape, dtype) if need_dw else None

    size = max(1, LOGITS_AT_ONCE // max(V, 1))
    for start in range(0, len(kept), size):
        rows = kept[start : start + size]
        logits = packed_linear(x[rows], w) if isinstance(w, Packed) else matmul(x[rows], w.T)  # (size, V)
        losses[rows], lse = cross_entropy_forward(logits, targets[rows], ignore_index=ignore_index)
        if not (need_dx or need_dw):
            continue
        dlosses = np.full(lse.shape, scale, dtype)
        dlogits = cross_entropy_backward(dlosses, logits, targets[rows], lse, ignore_index=ignore_index)
        if dx is not None:
            dx[rows] = packed_linear_backward(dlogits, w) if isinstance(w, Packed) else matmul(dlogits, w)
        if dw is not None:
            dw += matmul(dlogits.T, x[rows])
    return losses, dx, dw


# -- embedding


def embedding_backward(dy: Array, ids: Array, *, rows: int) -> Array:
    """dw[i] = sum of dy over the places where ids is i          dy (..., C)   ids (...)   dw (rows, C)"""
    checks.embedding_backward(dy, ids, rows=rows)
    dw = np.zeros((rows, dy.shape[-1]), dy.dtype)
    embedding_add(dw, dy, ids)
    return dw


def embedding_add(dw: Array, dy: Array, ids: Array) -> None:
    """dw[ids[n]] += dy[n], for n in order, in place          dy (..., C)   ids (...)   dw (V, C)"""
    ids = checks.embedding_add(dw, dy, ids)
    with silent():
        np.add.at(dw, ids.reshape(-1), dy.reshape(ids.size, dw.shape[1]))


# -- optimizer


def adamw_step(
    p: Array,
    g: Array,
    m: Array,
    v: Array,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float,
) -> None:
    """One AdamW step in place on p, m, v (one shape); g is read only.

        g' = grad_scale * g
        m  = beta1 m + (1 - beta1) g'             v = beta2 v + (1 - beta2) g'^2
        p  = p (1 - lr weight_decay) - lr (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)

    Steps are counted from 1. Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019.
    """
    checks.adamw_step(p, g, m, v, step=step)
    with silent():
        scaled = g * grad_scale
        m[...] = beta1 * m + (1 - beta1) * scaled
        v[...] = beta2 * v + (1 - beta2) * scaled * scaled
        root = np.sqrt(v / (1 - beta2**step)) + eps
        p *= 1 - lr * weight_decay
        p -= lr * (m / (1 - beta1**step)) / root


def adamw_steps(
    parameters: Iterable[tuple[Array, Array, Array, Array, float]],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    grad_scale: float,
) -> None:
    """`adamw_step` of every (p, g, m, v, weight_decay), no two of which share memory; all are checked first."""
    parameters = list(parameters)
    for p, g, m, v, _ in parameters:
        checks.adamw_step(p, g, m, v, step=step)
    for p, g, m, v, weight_decay in parameters:
        adamw_step(p, g, m, v, lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, step=step,
                   grad_scale=grad_scale)  # fmt: skip


def sum_of_squares(*xs: Array) -> float:
    """sum of x^2 in float64 over all arrays: of each by blocks of 4096 added in order          any shapes"""
    total = 0.0
    with silent():
        for flat in (x.reshape(-1) for x in xs):
            blocks = [flat[i : i + SUM_BLOCK].astype(np.float64) for i in range(0, flat.size, SUM_BLOCK)]
            total += float(sum(np.square(block).sum() for block in blocks))
    return total


# -- the machine


def fma_peak(seconds: float = 0.1) -> float:
    """FLOP/s of np.matmul on 512 x 512 float32, best of as many runs as fit in `seconds`.

    The C kernel counts bare multiply-adds; without it, NumPy's matrix product is the best the process can do.
    """
    a = np.ones((512, 512), np.float32)
    best, end = np.inf, time.perf_counter() + seconds
    while best == np.inf or time.perf_counter() < end:
        start = time.perf_counter()
        np.matmul(a, a)
        best = min(best, time.perf_counter() - start)
    return 2 * 512**3 / best
