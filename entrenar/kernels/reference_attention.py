"""Causal attention with grouped heads in plain NumPy: the specification of that in C, as reference.py is."""

# B batch, T time, S key/value length, H heads, KH key/value heads, G = H/KH, D head dim

from __future__ import annotations

import numpy as np

from entrenar.kernels import checks
from entrenar.kernels.reference_softmax import log_sum_exp, silent

Array = np.ndarray


def attention_forward(
    q: Array, k: Array, v: Array, starts: Array | None = None, *, scale: float
) -> tuple[Array, Array]:
    """o_t = sum_s p_ts v_s,   p_ts = exp(z_ts - lse_t),   z_ts = scale * q_t k_s,   lse_t = log sum exp z_t

    q, o (B, T, H, D)   k, v (B, S, KH, D)   lse (B, H, T)   starts (B, T) or None
    Sums are over s <= t + S - T: the last query sees all S keys. Query head h reads kv head h // (H/KH).
    Where a row is several documents (S = T), starts[b, t] is the first token of t's, and s >= starts[b, t] besides.
    This naive form stores the T x S scores, and multiplies hidden ones by 0; C does neither.
    Vaswani et al., 2017; grouped heads: Ainslie et al., "GQA", 2023; lse kept for backward: Dao et al., 2022.
    """
    checks.attention("attention", q, k, v)
    starts = checks.documents("attention", starts, q, k)
    with silent():
        scores = _masked_scores(q, k, starts, scale)  # (B, KH, G, T, S)
        lse = log_sum_exp(scores)
        p = np.exp(scores - lse[..., None])
        o = np.matmul(p, _per_head(v))  # (B, KH, G, T, D)
        return _join_heads(o, q.shape), lse.reshape(q.shape[0], q.shape[2], q.shape[1])


def attention_backward(
    do: Array, q: Array, k: Array, v: Array, o: Array, lse: Array, starts: Array | None = None, *, scale: float
) -> tuple[Array, Array, Array]:
    """dv = p^T do,   ds = p * (do v^T - sum(do * o)),   dq = scale * ds k,   dk = scale * ds^T q

    with p = exp(scores - lse)
    do, o, dq like q (B, T, H, D)   dk, dv like k (B, S, KH, D)   lse (B, H, T)   starts (B, T) or None
    """
    # softmax: ds = p (dp - sum_s dp p), and sum_s dp_ts p_ts = do_t . sum_s p_ts v_s = do_t . o_t
    checks.attention_backward("attention_backward", do, q, k, v, o, lse)
    starts, KH = checks.documents("attention_backward", starts, q, k), k.shape[2]
    with silent():
        scores = _masked_scores(q, k, starts, scale)
        p = np.exp(scores - lse.reshape(scores.shape[:-1])[..., None])
        do, o, q_heads = _group_heads(do, KH), _group_heads(o, KH), _group_heads(q, KH)
        ds = p * (np.matmul(do, _per_head(v).swapaxes(-1, -2)) - (do * o).sum(axis=-1, keepdims=True))

        dq = np.matmul(ds, _per_head(k)) * scale  # (B, KH, G, T, D)
        # A group shares its key and value, and its queries' gradients add up: (B, KH, S, D).
        dk = np.matmul(ds.swapaxes(-1, -2), q_heads).sum(axis=2) * scale
        dv = np.matmul(p.swapaxes(-1, -2), do).sum(axis=2)
        return _join_heads(dq, q.shape), _fresh(dk.swapaxes(1, 2)), _fresh(dv.swapaxes(1, 2))


def _masked_scores(q: Array, k: Array, starts: Array | None, scale: float) -> Array:
    """scale * q k^T, -inf where s > t + S - T or s < starts          (B, KH, G, T, S)"""
    T, S, KH = q.shape[1], k.shape[1], k.shape[2]
    scores = np.matmul(_group_heads(q, KH), _per_head(k).swapaxes(-1, -2)) * scale
    seen = np.tri(T, S, S - T, dtype=bool)
    if starts is not None:
        seen = seen & (np.arange(S) >= starts[:, None, None, :, None])  # (B, 1, 1, T, S)
    return np.where(seen, scores, -np.inf)


def _group_heads(x: Array, KH: int) -> Array:
    """(B, T, H, D) -> (B, KH, G, T, D), G = H/KH query heads to a key/value head"""
    B, T, H, D = x.shape
    return x.reshape(B, T, KH, H // max(KH, 1), D).transpose(0, 2, 3, 1, 4)


def _per_head(x: Array) -> Array:
    """(B, S, KH, D) -> (B, KH, 1, S, D)"""
    return x.transpose(0, 2, 1, 3)[:, :, None]


def _join_heads(x: Array, shape: tuple[int, ...]) -> Array:
    """(B, KH, G, T, D) -> (B, T, H, D)"""
    return _fresh(x.transpose(0, 3, 1, 2, 4)).reshape(shape)


def _fresh(x: Array) -> Array:
    return np.array(x, order="C")
