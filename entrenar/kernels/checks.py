"""What every kernel asks of its arguments, in one place, for the NumPy kernels and the C wrappers alike.

One function per kernel family; each raises ValueError (shapes), TypeError (indices that are not integers) or
IndexError (indices out of range) with the kernel's name, what came and what was wanted.
"""

# B batch, T time, S key/value length, C channels, H heads, KH key/value heads, D head dim, V vocabulary
# N rows (tokens)

from __future__ import annotations

from itertools import combinations

import numpy as np

from entrenar.kernels.packed import TABLES, Packed


def matmul(a: np.ndarray, b: np.ndarray) -> None:
    """a (..., M, K) @ b (..., K, N), batch axes broadcast."""
    if a.ndim < 2 or b.ndim < 2:
        raise ValueError(f"matmul: wants matrices, at least 2 axes each: a {a.shape} @ b {b.shape}")
    if a.shape[-1] != b.shape[-2]:
        raise ValueError(f"matmul: inner dimensions differ: a {a.shape} @ b {b.shape}")
    if a.ndim > 2 and b.ndim > 2 and a.shape[:-2] != b.shape[:-2]:
        try:
            np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        except ValueError:
            raise ValueError(f"matmul: batch axes do not broadcast: a {a.shape} @ b {b.shape}") from None


def matmul_add(c: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    """c (M, N) += a (M, K) @ b (K, N); c writable, and not in the memory of a or b."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0] or c.shape != (a.shape[0], b.shape[1]):
        raise ValueError(f"matmul_add: wants c (M, N), a (M, K), b (K, N), got {c.shape}, {a.shape}, {b.shape}")
    if not c.flags.writeable or np.may_share_memory(c, a) or np.may_share_memory(c, b):
        raise ValueError("matmul_add: c changes in place: it must be writable, and not in the memory of a or b")


def packed(kernel: str, x: np.ndarray, w: Packed, axis: int) -> None:
    """x (N, features), as many as w has along `axis`: rows (0) or columns (1)."""
    if x.ndim != 2 or x.shape[1] != w.shape[axis]:
        wanted = f"(N, {w.shape[axis]})"
        raise ValueError(f"{kernel}: a packed matrix of shape {w.shape} wants rows of shape {wanted}, got {x.shape}")


def packed_mlp(x: np.ndarray, gate: Packed, up: Packed, down: Packed) -> None:
    """x (N, I), gate and up (F, I), down (O, F)."""
    packed("packed_mlp", x, gate, 1)
    if up.shape != gate.shape or down.shape[1] != gate.shape[0]:
        raise ValueError(
            f"packed_mlp: wants gate (F, I), up (F, I) and down (O, F), got {gate.shape}, {up.shape} and {down.shape}"
        )


def flat(kernel: str, x: np.ndarray) -> None:
    """x (n,) floats."""
    if x.ndim != 1 or x.dtype.kind != "f":
        raise ValueError(f"{kernel}: wants floats of shape (n,), got {x.dtype} {x.shape}")


def quantize_4bit(x: np.ndarray, kind: str, block: int) -> None:
    """x (n,) floats; an even block, so that no byte belongs to two."""
    flat("quantize_4bit", x)
    if kind not in TABLES or block < 2 or block % 2:
        raise ValueError(
            f"quantize_4bit: kind = {kind!r}, block = {block}: wanted {' or '.join(TABLES)} and an even number above 0"
        )


def rows(kernel: str, x: np.ndarray) -> None:
    """x (..., C): a last axis to work along."""
    if x.ndim < 1:
        raise ValueError(f"{kernel}: wants an array of at least 1 axis, got a scalar; reshape it to (1,)")


def same_shape(kernel: str, names: str, *arrays: np.ndarray) -> None:
    """Arrays of one shape; `names` are theirs, separated by spaces."""
    if any(array.shape != arrays[0].shape for array in arrays[1:]):
        raise ValueError(f"{kernel}: shapes differ: {_described(names, arrays)}")


def norm(kernel: str, x: np.ndarray, *weights: np.ndarray) -> None:
    """x (..., C) and vectors (C,)."""
    rows(kernel, x)
    for w in weights:
        if w.shape != x.shape[-1:]:
            raise ValueError(f"{kernel}: x {x.shape} wants weights of shape {x.shape[-1:]}, got {w.shape}")


def norm_backward(kernel: str, dy: np.ndarray, x: np.ndarray, w: np.ndarray, *statistics: np.ndarray) -> None:
    """dy, x (..., C); w (C,); one statistic (mean, rstd) per row (...)."""
    norm(kernel, x, w)
    same_shape(kernel, "dy x", dy, x)
    for statistic in statistics:
        if statistic.shape != x.shape[:-1]:
            raise ValueError(
                f"{kernel}: x {x.shape} wants statistics of shape {x.shape[:-1]}, got {statistic.shape}"
            )


def rope(kernel: str, x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> None:
    """x (B, T, H, D), D even; cos, sin (T, D/2)."""
    if x.ndim != 4 or x.shape[3] % 2:
        raise ValueError(f"{kernel}: wants x of shape (B, T, H, D) with D even, got {x.shape}")
    wanted = (x.shape[1], x.shape[3] // 2)
    if cos.shape != wanted or sin.shape != wanted:
        raise ValueError(
            f"{kernel}: x {x.shape} wants cos and sin of shape {wanted}, got {cos.shape} and {sin.shape}"
        )


def attention(kernel: str, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
    """q (B, T, H, D); k, v (B, S, KH, D); KH divides H; S >= T."""
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[::3] != k.shape[::3]:  # B and D agree
        wrong = "wants q (B, T, H, D) and k, v (B, S, KH, D)"
    elif q.shape[2] and (not k.shape[2] or q.shape[2] % k.shape[2]):
        wrong = "the key/value heads must divide the query heads"
    elif q.shape[1] > k.shape[1]:
        wrong = "causal: wants no fewer keys than queries (S >= T)"
    else:
        return
    raise ValueError(f"{kernel}: {wrong}, got q {q.shape}, k {k.shape}, v {v.shape}")


def documents(kernel: str, starts: np.ndarray | None, q: np.ndarray, k: np.ndarray) -> np.ndarray | None:
    """starts (B, T), not decreasing along T, 0 <= starts[b, t] <= t, where S = T; returns starts as int64, or None."""
    if starts is None:
        return None
    starts, (B, T), S = np.asarray(starts), q.shape[:2], k.shape[1]
    if S != T:
        raise ValueError(f"{kernel}: starts want as many keys as queries (S = T), got q {q.shape}, k {k.shape}")
    if starts.shape != (B, T):
        raise ValueError(f"{kernel}: q {q.shape} wants starts of shape {(B, T)}, got {starts.shape}")
    if starts.dtype.kind not in "iu" and starts.size:
        raise TypeError(f"{kernel}: starts must be integers, got {starts.dtype}")

    outside = (starts < 0) | (starts > np.arange(T))
    if outside.any():
        b, t = np.argwhere(outside)[0].tolist()
        raise IndexError(f"{kernel}: starts[{b}, {t}] is {starts[b, t]}, wanted 0 <= start <= {t}, the query itself")
    earlier = starts[:, 1:] < starts[:, :-1]
    if earlier.any():
        b, t = np.argwhere(earlier)[0].tolist()
        came = f"starts[{b}, {t + 1}] is {starts[b, t + 1]} after {starts[b, t]}"
        raise ValueError(f"{kernel}: {came}, wanted starts that do not decrease along a row")
    return starts.astype(np.int64, copy=False)


def attention_backward(
    kernel: str, do: np.ndarray, q: np.ndarray, k: np.ndarray, v: np.ndarray, o: np.ndarray, lse: np.ndarray
) -> None:
    """Besides: do, o like q, and lse (B, H, T)."""
    attention(kernel, q, k, v)
    same_shape(kernel, "do q o", do, q, o)
    wanted = (q.shape[0], q.shape[2], q.shape[1])
    if lse.shape != wanted:
        raise ValueError(f"{kernel}: q {q.shape} wants lse of shape {wanted}, got {lse.shape}")


def indices(
    kernel: str, name: str, ids: np.ndarray, upper: int, *, ignore_index: int | None = None
) -> np.ndarray:
    """`ids` as int64, each in [0, upper) or equal to ignore_index; IndexError names the first that is not."""
    ids = np.asarray(ids)
    if ids.dtype.kind not in "iu" and ids.size:
        raise TypeError(f"{kernel}: {name} must be integers, got {ids.dtype}")
    if ids.dtype == np.uint64 and ids.size and ids.max() > np.iinfo(np.int64).max:
        raise IndexError(f"{kernel}: {name} hold {ids.max()}, wanted 0 <= index < {upper}")
    ids = ids.astype(np.int64, copy=False)

    wrong = (ids < 0) | (ids >= upper)
    if ignore_index is not None:
        wrong &= ids != ignore_index
    if wrong.any():
        first = np.unravel_index(int(wrong.argmax()), ids.shape)
        place = f"[{', '.join(str(i) for i in first)}]" if ids.ndim else ""
        besides = "" if ignore_index is None else f" or {ignore_index} to ignore it"
        raise IndexError(f"{kernel}: {name}{place} is {ids[first]}, wanted 0 <= index < {upper}{besides}")
    return ids


def cross_entropy(kernel: str, logits: np.ndarray, targets: np.ndarray, *, ignore_index: int) -> np.ndarray:
    """logits (N, V), targets (N,); returns targets as int64."""
    if logits.ndim != 2 or np.shape(targets) != logits.shape[:1]:
        raise ValueError(
            f"{kernel}: wants logits (N, V) and targets (N,), got {logits.shape} and {np.shape(targets)}; "
            "flatten batch and time first"
        )
    return indices(kernel, "targets", targets, logits.shape[1], ignore_index=ignore_index)


def linear_cross_entropy(
    x: np.ndarray, w: np.ndarray | Packed, targets: np.ndarray, *, ignore_index: int, need_dw: bool
) -> np.ndarray:
    """x (N, C), w (V, C), targets (N,); returns targets as int64."""
    if need_dw and isinstance(w, Packed):
        raise ValueError(f"linear_cross_entropy: w is packed ({w.kind}), so frozen: it has no gradient")
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1] or np.shape(targets) != x.shape[:1]:
        raise ValueError(
            "linear_cross_entropy: wants x (N, C), w (V, C) and targets (N,), "
            f"got {x.shape}, {w.shape} and {np.shape(targets)}"
        )
    return indices("linear_cross_entropy", "targets", targets, w.shape[0], ignore_index=ignore_index)


def embedding_backward(dy: np.ndarray, ids: np.ndarray, *, rows: int) -> np.ndarray:
    """dy (..., C), ids (...); returns ids as int64."""
    if dy.ndim < 1 or np.shape(ids) != dy.shape[:-1]:
        raise ValueError(
            f"embedding_backward: wants dy (..., C) and ids (...), got {dy.shape} and {np.shape(ids)}"
        )
    return indices("embedding_backward", "ids", ids, rows)


def embedding_add(dw: np.ndarray, dy: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """dw (V, C), writable, and not in the memory of dy; dy (..., C), ids (...); returns ids as int64."""
    if dw.ndim != 2 or dy.shape != (*np.shape(ids), dw.shape[1]):
        raise ValueError(
            f"embedding_add: wants dw (V, C), dy (..., C) and ids (...), got {dw.shape}, {dy.shape} and {np.shape(ids)}"
        )
    if not dw.flags.writeable or np.may_share_memory(dw, dy):
        raise ValueError("embedding_add: dw changes in place: it must be writable, and not in the memory of dy")
    return indices("embedding_add", "ids", ids, dw.shape[0])


def adamw_step(p: np.ndarray, g: np.ndarray, m: np.ndarray, v: np.ndarray, *, step: int) -> None:
    """p, g, m, v of one shape, the three that change writable, no two in the same memory; a step counted from 1."""
    same_shape("adamw_step", "p g m v", p, g, m, v)
    for name, array in (("p", p), ("m", m), ("v", v)):
        if not array.flags.writeable:
            raise ValueError(f"adamw_step: {name} is read-only, but changes in place: pass a copy")
    for (name, array), (other, its) in combinations((("p", p), ("g", g), ("m", m), ("v", v)), 2):
        if array is not its and array.flags.owndata and its.flags.owndata:
            continue  # the usual case, ten times as fast
        if np.may_share_memory(array, its) and np.shares_memory(array, its):
            raise ValueError(f"adamw_step: {name} and {other} share memory, but three of p, g, m, v change: copy one")
    if step < 1:
        raise ValueError(f"adamw_step: steps are counted from 1, got {step}")


def _described(names: str, arrays: tuple[np.ndarray, ...]) -> str:
    return ", ".join(f"{name} {array.shape}" for name, array in zip(names.split(), arrays, strict=True))
