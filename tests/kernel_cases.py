"""Every kernel once: how to make its inputs, and how far a float32 result may lie from the float64 reference.

A bound is an array of its output's shape: what rounding can do to that element, derived from the magnitude of
the terms it is made of and the length of its sums (a sum of K terms of magnitude m: 2 eps sqrt(K) sum |m|),
never from what passes. Used by test_kernels.py, test_kernel_properties.py, test_threads.py and test_neon.py.

B batch, T queries, S keys, C channels, H heads, KH key/value heads, D head dim, V vocabulary, N rows
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from entrenar.kernels.packed import Nested, Packed
from entrenar.kernels.reference_packed import unpack

EPS = float(np.finfo(np.float32).eps)
TINY = 2 * float(np.finfo(np.float32).tiny)  # results below twice the smallest normal number may become zero
IGNORE = -100


@dataclass(frozen=True)
class Case:
    """One kernel: its inputs, its error bounds, and the sizes at which it is tried."""

    kernel: str
    make: Callable[..., dict[str, Any]]  # make(rng, **sizes) -> arrays (positional, in order) and constants
    bounds: Callable[
        ..., Any
    ]  # bounds(*outputs, **arrays and constants), all float64 -> one array per output
    sizes: tuple[dict[str, int], ...]  # ordinary, odd
    empty: tuple[dict[str, int], ...]  # with an axis of length zero
    tails: tuple[Callable[[int], dict[str, int]], ...]  # sizes whose inner length is n
    large: dict[str, int]  # enough work that every thread gets some
    in_place: tuple[str, ...] = ()  # arrays the kernel changes: its outputs
    formula: Callable[..., Any] | None = (
        None  # formula(reference, **args): the outputs, should inf or nan come in
    )


def split(args: dict[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays, which go by position, and constants, which go by keyword."""
    arrays = {name: x for name, x in args.items() if isinstance(x, np.ndarray)}
    return arrays, {name: x for name, x in args.items() if name not in arrays}


def run(kernels: Any, case: Case, args: dict[str, Any]) -> tuple[np.ndarray, ...]:
    """The kernel's outputs as a tuple of arrays; of an in-place kernel, the changed copies."""
    arrays, constants = split(args)
    arrays = {name: x.copy() if name in case.in_place else x for name, x in arrays.items()}
    result = getattr(kernels, case.kernel)(*arrays.values(), **constants)
    if case.in_place:
        result = tuple(arrays[name] for name in case.in_place)
    result = result if isinstance(result, tuple) else (result,)
    return tuple(np.asarray(x) for x in result if x is not None)


def as_type(args: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """The same inputs with every float array as `dtype`; index arrays and constants as they are."""
    return {
        name: x.astype(dtype) if isinstance(x, np.ndarray) and x.dtype.kind == "f" else x
        for name, x in args.items()
    }


def expected(
    reference: Any, case: Case, args: dict[str, Any], *, extreme: bool = False
) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """(outputs, bounds): the float64 reference on exactly these float32 inputs, and what rounding may add."""
    exact = as_type(args, np.float64)
    with np.errstate(all="ignore"):
        outputs = (
            case.formula(reference, **exact) if extreme and case.formula else run(reference, case, exact)
        )
        bounds = case.bounds(*outputs, **exact)
    return outputs, bounds if isinstance(bounds, tuple) else (bounds,)


def mismatch(got: np.ndarray, want: np.ndarray, bound: np.ndarray, twin: np.ndarray | None = None) -> str:
    """'' when `got` is `want` within `bound`; else the worst element. inf must be that inf, nan must be nan.

    `twin` (the reference computed in float32) is for extreme inputs: where float64 does not overflow and
    float32 does, being what the twin is, is right too; and of inf - inf and inf * 0 in another order, nan for
    inf.
    """
    if got.shape != want.shape:
        return f"shape {got.shape}, wanted {want.shape}"
    if got.size == 0:
        return ""
    wanted_type = np.float64 if got.ndim == 0 else np.float32  # a scalar result is a Python float
    if got.dtype != wanted_type:
        return f"dtype {got.dtype}, wanted {np.dtype(wanted_type)}"
    with np.errstate(all="ignore"):
        limit = np.where(np.isfinite(bound), bound, 1e-4 * np.abs(want)) + TINY
        rounded = want.astype(got.dtype)
        good = np.abs(got - want) <= limit
        good |= ~np.isfinite(rounded) & ((got == rounded) | (np.isnan(got) & np.isnan(rounded)))
        if twin is not None:
            good |= ~np.isfinite(rounded) & ~np.isfinite(got)
            good |= (
                (got == twin) | (np.isnan(got) & np.isnan(twin)) | (np.abs(got - twin) <= 1e-5 * np.abs(twin))
            )
        if good.all():
            return ""
        excess = np.where(good, 0, np.nan_to_num(np.abs(got - want) / limit, nan=np.inf))
    worst = np.unravel_index(int(np.argmax(excess)), got.shape)
    return (
        f"{np.count_nonzero(~good)} of {got.size} elements differ; worst at {tuple(map(int, worst))}: "
        f"{got[worst]!r}, wanted {want[worst]!r} within {limit[worst]:.3g}"
    )


def check(native: Any, reference: Any, case: Case, args: dict[str, Any], *, extreme: bool = False) -> None:
    """Asserts that the native kernel gives the float64 reference's outputs within their bounds."""
    wanted, bounds = expected(reference, case, args, extreme=extreme)
    twins: Any = [None] * len(wanted)
    with np.errstate(all="ignore"):
        outputs = run(native, case, args)
        if extreme:
            twins = case.formula(reference, **args) if case.formula else run(reference, case, args)
    assert len(outputs) == len(wanted), f"{case.kernel}: {len(outputs)} outputs, wanted {len(wanted)}"
    for i, (got, want, bound, twin) in enumerate(zip(outputs, wanted, bounds, twins, strict=True)):
        problem = mismatch(got, want, np.broadcast_to(bound, want.shape), twin)
        assert not problem, f"{case.kernel} output {i}: {problem}"


# Kernels that round to a storage format: their results are codes, and equal to the reference's bit for bit. Each as a
# call of an array x (n,); test_quantize_kernels.py, test_neon.py and guard.py run them.

ROUNDINGS: dict[str, Callable[[Any, np.ndarray], tuple[np.ndarray, ...]]] = {
    **{
        f"quantize_4bit {kind} {block}": lambda kernels, x, kind=kind, block=block: kernels.quantize_4bit(
            x, kind=kind, block=block
        )
        for kind in ("nf4", "fp4")
        for block in (2, 32, 64, 4096)
    },
    "quantize_q8_0": lambda kernels, x: kernels.quantize_q8_0(x),
    "round_bfloat16": lambda kernels, x: (kernels.round_bfloat16(x),),
}


def rounding_mismatch(native: Any, reference: Any, name: str, x: np.ndarray) -> str:
    """'' when the kernel gives the reference's types and bits; else what differs."""
    for i, (got, want) in enumerate(zip(ROUNDINGS[name](native, x), ROUNDINGS[name](reference, x), strict=True)):
        if (got.dtype, got.shape, got.tobytes()) != (want.dtype, want.shape, want.tobytes()):
            differ = np.flatnonzero(got != want)[:5] if got.shape == want.shape else "the shape"
            return f"{name} of {x.shape}, output {i}: {got.dtype} {got.shape}, differs at {differ}"
    return ""


# Inputs


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


def targets(rng: np.random.Generator, rows: int, classes: int) -> np.ndarray:
    """Random classes, every fifth row ignored."""
    t = rng.integers(0, max(classes, 1), rows)
    t[2::5] = IGNORE
    return t if classes else np.full(rows, IGNORE)


def angles(rng: np.random.Generator, length: int, half: int) -> dict[str, np.ndarray]:
    angle = rng.uniform(-np.pi, np.pi, (length, half))
    return {"cos": np.cos(angle).astype(np.float32), "sin": np.sin(angle).astype(np.float32)}


def probabilities(rng: np.random.Generator, rows: int, length: int) -> np.ndarray:
    e = np.exp(normal(rng, rows, length))
    return (e / np.maximum(e.sum(-1, keepdims=True), TINY)).astype(np.float32)


def make_rms_norm_backward(rng: np.random.Generator, N: int, C: int) -> dict[str, Any]:
    x = normal(rng, N, C)
    rstd = (1 / np.sqrt((x * x).sum(-1) / max(C, 1) + 1e-5)).astype(np.float32)
    return {"dy": normal(rng, N, C), "x": x, "w": normal(rng, C), "rstd": rstd}


def make_layer_norm_backward(rng: np.random.Generator, N: int, C: int) -> dict[str, Any]:
    x = normal(rng, N, C) + np.float32(0.5)
    mean = x.sum(-1) / np.float32(max(C, 1))
    rstd = (1 / np.sqrt(((x - mean[:, None]) ** 2).sum(-1) / max(C, 1) + 1e-5)).astype(np.float32)
    return {"dy": normal(rng, N, C), "x": x, "w": normal(rng, C), "mean": mean, "rstd": rstd}


def make_qkv(rng: np.random.Generator, B: int, T: int, S: int, H: int, KH: int, D: int) -> dict[str, Any]:
    return {"q": normal(rng, B, T, H, D), "k": normal(rng, B, S, KH, D), "v": normal(rng, B, S, KH, D)}


def make_starts(rng: np.random.Generator, B: int, T: int, documents: int) -> np.ndarray:
    """(B, T): rows of so many documents (of one token each where there are more), cut anywhere, each row elsewhere."""
    starts = np.zeros((B, T), np.int64)
    for row in starts:
        cuts = rng.permutation(np.arange(1, T))[: documents - 1]
        row[cuts] = cuts
    return np.maximum.accumulate(starts, axis=1)


def make_attention_forward(rng: np.random.Generator, documents: int = 0, **sizes: int) -> dict[str, Any]:
    """`documents` in each row; 0 for none in particular, and no `starts`."""
    starts = {"starts": make_starts(rng, sizes["B"], sizes["T"], documents)} if documents else {}
    return make_qkv(rng, **sizes) | starts | {"scale": 1 / np.sqrt(max(sizes["D"], 1)).item()}


def make_attention_backward(rng: np.random.Generator, documents: int = 0, **sizes: int) -> dict[str, Any]:
    args = make_attention_forward(rng, documents, **sizes)
    q, k, v = (args[name].astype(np.float64) for name in ("q", "k", "v"))
    starts = {"starts": args["starts"]} if documents else {}
    p, lse, _ = naive_attention(q, k, args["scale"], **starts)
    o = np.einsum("bhts,bshd->bthd", p, per_head(v, q)).astype(np.float32)
    inputs = {name: args[name] for name in ("q", "k", "v")}
    outputs = {"o": o, "lse": lse.astype(np.float32)}
    return {"do": normal(rng, *q.shape), **inputs, **outputs, **starts, "scale": args["scale"]}


def make_linear_cross_entropy(
    rng: np.random.Generator, N: int, C: int, V: int, need_dx: int = 1, need_dw: int = 1
) -> dict[str, Any]:
    return {
        "x": normal(rng, N, C),
        "w": normal(rng, V, C) * np.float32(0.3),
        "targets": targets(rng, N, V),
        "ignore_index": IGNORE,
        "scale": 0.37,
        "need_dx": bool(need_dx),
        "need_dw": bool(need_dw),
    }


def make_cross_entropy_backward(rng: np.random.Generator, N: int, V: int) -> dict[str, Any]:
    logits = normal(rng, N, V) * np.float32(3)
    lse = np.log(np.maximum(np.exp(logits.astype(np.float64)).sum(-1), 1e-300)).astype(np.float32)
    return {
        "dlosses": normal(rng, N),
        "logits": logits,
        "targets": targets(rng, N, V),
        "lse": lse,
        "ignore_index": IGNORE,
    }


def make_adamw_step(rng: np.random.Generator, N: int) -> dict[str, Any]:
    return {
        "p": normal(rng, N),
        "g": normal(rng, N),
        "m": normal(rng, N) * np.float32(0.1),
        "v": np.square(normal(rng, N)) * np.float32(0.01),
        "lr": 3e-3,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.1,
        "step": 3,
        "grad_scale": 0.7,
    }


# Bounds: (outputs, then the inputs by name, all float64) -> an array per output


def total(length: int) -> float:
    """The relative error of a sum of `length` terms, in units of the sum of their magnitudes."""
    return EPS * (4 + 2 * np.sqrt(length))


def bound_matmul(c, a, b):
    return total(a.shape[-1]) * (np.abs(a) @ np.abs(b))


def random_packed(rng: np.random.Generator, kind: str, O: int, I: int, *, block: int = 64) -> Packed:
    """A matrix in a storage format whose every code is random; kind "nf4 nested" has scales in 8 bits."""
    n, (kind, _, nested) = O * I, kind.partition(" ")
    blocks = -(-n // block)
    if kind == "bfloat16":
        return Packed(kind, (O, I), (normal(rng, n).view(np.uint32) >> 16).astype(np.uint16))
    codes = rng.integers(-127, 128, n).astype(np.int8) if kind == "q8_0" else random_bytes(rng, -(-n // 2))
    if not nested:
        return Packed(kind, (O, I), codes, rng.random(blocks, np.float32), block)
    table, absmax = np.sort(normal(rng, 256)), rng.random(-(-blocks // 256), np.float32)
    return Packed(kind, (O, I), codes, Nested(random_bytes(rng, blocks), table, absmax, 0.625), block)


def random_bytes(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.integers(0, 256, n).astype(np.uint8)


PACKED = ("nf4", "nf4 nested", "fp4", "q8_0", "bfloat16")


def oi(N: int, O: int, I: int, kind: str, block: int = 64) -> dict[str, Any]:
    return {"N": N, "O": O, "I": I, "kind": kind, "block": block}


def packed_case(kernel: str, make: Callable[..., dict[str, Any]], bounds: Callable[..., Any]) -> Case:
    """Few rows and many, rows of whole blocks and blocks that run across rows, odd rows that share a byte."""
    return Case(
        kernel,
        make,
        bounds,
        sizes=tuple(
            oi(N, O, I, kind, block)
            for kind in PACKED
            for N, O, I, block in ((1, 6, 64, 64), (3, 7, 13, 64), (8, 33, 192, 32), (4, 9, 256, 64), (40, 70, 100, 2))
        ),
        empty=(oi(0, 3, 4, "nf4"), oi(3, 0, 4, "nf4"), oi(3, 4, 0, "bfloat16"), oi(0, 0, 0, "q8_0")),
        tails=(lambda n: oi(9, 5, n, "nf4 nested"), lambda n: oi(2, n, 64, "nf4"), lambda n: oi(n, 17, 32, "q8_0", 32)),
        large=oi(160, 321, 259, "nf4 nested"),
    )


def below_max(x):
    """How far x lies below its row's largest: the argument of exp, whose rounding exp turns into relative
    error.
    """
    finite = np.where(np.isfinite(x), x, 0)
    return finite.max(-1, keepdims=True, initial=-np.inf) - finite if x.size else x


def bound_softmax_forward(y, x):
    return y * (total(x.shape[-1]) + EPS * below_max(x))


def bound_softmax_backward(dx, dy, y):
    return total(y.shape[-1]) * np.abs(y) * (np.abs(dy) + np.sum(np.abs(dy * y), -1, keepdims=True))


def bound_log_softmax_forward(y, x):
    return total(x.shape[-1]) + EPS * (below_max(x) + np.abs(y))


def bound_log_softmax_backward(dx, dy, y):
    p = np.exp(y)
    return (total(y.shape[-1]) + EPS * np.abs(y)) * (np.abs(dy) + p * np.sum(np.abs(dy), -1, keepdims=True))


def bound_rms_norm_forward(y, rstd, x, w, eps):
    return total(x.shape[-1]) * np.abs(y), total(x.shape[-1]) * rstd


def bound_rms_norm_backward(dx, dw, dy, x, w, rstd):
    C, xhat, dxhat = x.shape[-1], np.abs(x) * rstd[..., None], np.abs(dy * w)
    terms = rstd[..., None] * (dxhat + xhat * np.sum(dxhat * xhat, -1, keepdims=True) / max(C, 1))
    return total(C) * terms, total(rstd.size) * np.abs(dy * xhat).reshape(rstd.size, C).sum(0)


def bound_layer_norm_forward(y, mean, rstd, x, w, b, eps):
    C, size = (
        x.shape[-1],
        np.abs(x).sum(-1) / max(x.shape[-1], 1),
    )  # the mean is as exact as its terms are large
    cancel = 1 + size * rstd
    spread = (np.abs(x) + size[..., None]) * rstd[..., None] * np.abs(w)
    return (
        total(C) * (spread + np.abs(b)) + np.abs(y) * (total(C) * cancel)[..., None],
        total(C) * size,
        total(C) * rstd * cancel,
    )


def bound_layer_norm_backward(dx, dw, db, dy, x, w, mean, rstd):
    C, N = x.shape[-1], rstd.size
    xhat, dxhat = (np.abs(x) + np.abs(mean)[..., None]) * rstd[..., None], np.abs(dy * w)
    terms = dxhat + (dxhat.sum(-1, keepdims=True) + xhat * np.sum(dxhat * xhat, -1, keepdims=True)) / max(
        C, 1
    )
    rows = np.abs(dy).reshape(N, C)
    return (
        total(C) * rstd[..., None] * terms,
        total(N) * (rows * xhat.reshape(N, C)).sum(0),
        total(N) * rows.sum(0),
    )


def bound_rope(y, x, cos, sin):
    x1, x2 = np.split(np.abs(x), 2, axis=-1)
    c, s = np.abs(cos)[:, None, :], np.abs(sin)[:, None, :]
    return 4 * EPS * np.concatenate([x1 * c + x2 * s, x2 * c + x1 * s], axis=-1)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def bound_swiglu_forward(y, gate, up):
    # exp(-gate) overflows to inf past 88, where silu is below the smallest normal number: flushed
    return 12 * EPS * np.abs(y) + 200 * TINY * np.abs(up)


def bound_swiglu_backward(dgate, dup, dy, gate, up):
    s = sigmoid(gate)
    terms = np.abs(dy * up) * s * (1 + np.abs(gate) * (1 - s))
    return 16 * EPS * terms + 200 * TINY * np.abs(dy * up), 12 * EPS * np.abs(dup) + 200 * TINY * np.abs(dy)


def per_head(k, q):
    """Each key/value head repeated for the query heads that read it: (B, S, KH, D) -> (B, S, H, D)."""
    return np.repeat(k, q.shape[2] // max(k.shape[2], 1), axis=2)


def naive_attention(q, k, scale, starts=None):
    """(p (B, H, T, S), lse (B, H, T), scores): softmax of the causally masked scaled scores, all of them
    stored.
    """
    scores = np.einsum("bthd,bshd->bhts", q, per_head(k, q)) * scale
    T, S = scores.shape[-2:]
    hidden = np.arange(S)[None, :] > np.arange(T)[:, None] + (S - T)
    if starts is not None:
        hidden = hidden | (np.arange(S) < starts[:, None, :, None])  # (B, 1, T, S)
    masked = np.where(hidden, -np.inf, scores)
    top = masked.max(-1, keepdims=True, initial=-np.finfo(np.float64).max)
    e = np.exp(masked - top)
    z = e.sum(-1, keepdims=True)
    return e / z, (top + np.log(z))[..., 0], np.where(hidden, 0, scores)


def magnitude(x):
    """|x|, 0 where that is not finite: an inf spoils the results it reaches, not the bounds of the others."""
    return np.where(np.isfinite(x), np.abs(x), 0)


def largest(x):
    return magnitude(x).max(initial=0)


def score_error(q, k, lse, scores, scale):
    """The relative error of a probability: the absolute error of its score, wherever it is largest."""
    size = largest(np.einsum("bthd,bshd->bhts", np.abs(q), np.abs(per_head(k, q)))) * abs(scale)
    return total(q.shape[-1]) * size + EPS * (8 + largest(scores) + largest(lse))


def bound_attention_forward(o, lse, q, k, v, scale, starts=None):
    p, _, scores = naive_attention(q, k, scale, starts)
    error = score_error(q, k, lse, scores, scale) + total(k.shape[1])
    return error * np.einsum("bhts,bshd->bthd", p, magnitude(per_head(v, q))), error * (1 + np.abs(lse))


def bound_attention_backward(dq, dk, dv, do, q, k, v, o, lse, scale, starts=None):
    (_, T, _, D), (B, S, KH, _) = q.shape, k.shape
    seen, _, scores = naive_attention(q, k, scale, starts)
    p = np.where(
        seen > 0, np.exp(scores - lse[..., None]), 0
    )  # from the lse that is given, as the kernel must
    error = score_error(q, k, lse, scores, scale) + total(D) + total(S) + total(T)
    dp = np.einsum("bthd,bshd->bhts", np.abs(do), np.abs(per_head(v, q)))
    delta = np.einsum("bthd,bthd->bht", np.abs(do), np.abs(o))[..., None]
    ds = np.where(
        p > 0, p * (dp + delta) * abs(scale), 0
    )  # an inf that a query does not see is not its error
    shared = (B, S, KH, q.shape[2] // max(KH, 1), D)  # the query heads that read one kv head add up
    bound_k = np.einsum("bhts,bthd->bshd", ds, magnitude(q)).reshape(shared).sum(3)
    bound_v = np.einsum("bhts,bthd->bshd", p, magnitude(do)).reshape(shared).sum(3)
    return error * np.einsum("bhts,bshd->bthd", ds, magnitude(per_head(k, q))), error * bound_k, error * bound_v


def bound_cross_entropy_forward(losses, lse, logits, targets, ignore_index):
    size = np.abs(np.where(np.isfinite(logits), logits, 0)).max(-1, initial=0)
    bound = total(logits.shape[-1]) + 4 * EPS * (size + np.abs(lse))
    return np.where(targets == ignore_index, 0, bound), bound


def chosen(targets, ignore_index, classes):
    return (targets[:, None] == np.arange(classes)) & (targets != ignore_index)[:, None]


def bound_cross_entropy_backward(dlogits, dlosses, logits, targets, lse, ignore_index):
    p = np.exp(logits - lse[:, None])
    error = EPS * (8 + np.abs(logits) + np.abs(lse)[:, None])
    terms = error * p + EPS * 4 * chosen(targets, ignore_index, logits.shape[1])
    return np.where((targets == ignore_index)[:, None], 0, np.abs(dlosses)[:, None] * terms)


def bound_linear_cross_entropy(losses, *grads, x, w, targets, ignore_index, scale, need_dx, need_dw):
    (N, C), V = x.shape, len(w)
    trained = (targets != ignore_index)[:, None]
    logits, size = x @ w.T, np.abs(x) @ np.abs(w).T
    top = logits.max(-1, keepdims=True, initial=-np.finfo(np.float64).max)
    p = np.exp(logits - top)
    p /= np.maximum(p.sum(-1, keepdims=True), 1e-300)
    logit_error = total(C) * size.max(-1, keepdims=True, initial=0) + EPS * (8 + 4 * np.abs(top)) + total(V)
    hit = chosen(targets, ignore_index, V)
    dlogits = abs(scale) * trained * np.abs(p - hit)
    dlogits_error = abs(scale) * trained * 2 * logit_error * (p + hit)
    bounds = [np.where(trained[:, 0], 2 * logit_error[:, 0], 0)]
    if need_dx:
        bounds.append((dlogits_error + total(V) * dlogits) @ np.abs(w))
    if need_dw:
        bounds.append((dlogits_error + total(N) * dlogits).T @ np.abs(x))
    return tuple(bounds)


def bound_embedding_backward(dw, dy, ids, rows):
    bound = np.zeros_like(dw)
    np.add.at(bound, ids.reshape(-1), np.abs(dy).reshape(ids.size, dy.shape[-1]))
    return total(ids.size) * bound


def bound_embedding_add(result, dw, dy, ids):
    bound = np.abs(dw)
    np.add.at(bound, ids.reshape(-1), np.abs(dy).reshape(ids.size, dy.shape[-1]))
    return total(ids.size + 1) * bound


def bound_adamw_step(p1, m1, v1, p, g, m, v, lr, beta1, beta2, eps, weight_decay, step, grad_scale):
    m_terms = np.abs(beta1 * m) + np.abs((1 - beta1) * g * grad_scale)
    root = np.sqrt(v1 / (1 - beta2**step)) + eps
    return (
        8 * EPS * (np.abs(p) + lr * 2 * (m_terms / (1 - beta1**step)) / root),
        6 * EPS * m_terms,
        6 * EPS * v1,
    )


def bound_sum_of_squares(s, x):
    return 4 * np.finfo(np.float64).eps * np.sqrt(x.size + 1) * s  # accumulated in float64


# The table

ROWS = ({"N": 1, "C": 1}, {"N": 3, "C": 5}, {"N": 7, "C": 257}, {"N": 130, "C": 67})
NO_ROWS = ({"N": 0, "C": 5}, {"N": 0, "C": 0})
ROW_TAILS = (lambda n: {"N": 3, "C": n},)
LARGE_ROWS = {"N": 700, "C": 391}


def rows_case(kernel: str, make: Callable[..., dict[str, Any]], bounds: Callable[..., Any]) -> Case:
    """A kernel over N rows of C channels."""
    return Case(kernel, make, bounds, ROWS, NO_ROWS, ROW_TAILS, LARGE_ROWS)


def trained_rows_alone(reference, x, w, targets, ignore_index, **constants):
    """The fused loss without the ignored rows: 0 * inf is nan, a row that is not there is nothing."""
    kept = targets != ignore_index
    losses, dx = np.zeros(len(x), x.dtype), np.zeros_like(x)
    losses[kept], some_dx, dw = reference.linear_cross_entropy(
        x[kept], w, targets[kept], ignore_index=ignore_index, **constants
    )
    if some_dx is not None:
        dx[kept] = some_dx
    return tuple(out for out in (losses, dx if constants["need_dx"] else None, dw) if out is not None)


def rope_case(kernel: str, x: str) -> Case:
    def make(rng: np.random.Generator, B: int, T: int, H: int, half: int) -> dict[str, Any]:
        return {x: normal(rng, B, T, H, 2 * half), **angles(rng, T, half)}

    def bounds(y, **args):
        return bound_rope(y, args[x], args["cos"], args["sin"])

    return Case(
        kernel,
        make,
        bounds,
        sizes=(
            {"B": 1, "T": 1, "H": 1, "half": 1},
            {"B": 2, "T": 5, "H": 3, "half": 8},
            {"B": 2, "T": 9, "H": 2, "half": 33},
        ),
        empty=({"B": 0, "T": 3, "H": 2, "half": 4}, {"B": 2, "T": 0, "H": 2, "half": 4}),
        tails=(lambda n: {"B": 1, "T": 2, "H": 2, "half": n},),
        large={"B": 4, "T": 257, "H": 6, "half": 24},
    )


def qkv(B: int, T: int, S: int, H: int, KH: int, D: int, **documents: int) -> dict[str, int]:
    return {"B": B, "T": T, "S": S, "H": H, "KH": KH, "D": D, **documents}


def each_query(q, k, starts):
    """(its row, its place in it, the keys it may see) of every query, as slices."""
    T, S = q.shape[1], k.shape[1]
    for b, t in np.ndindex(q.shape[:2]):
        first = 0 if starts is None else starts[b, t]
        yield slice(b, b + 1), slice(t, t + 1), slice(first, S - T + t + 1)


def each_query_alone_forward(reference, q, k, v, scale, starts=None):
    """Attention without a mask: every query with just the keys it may see. 0 * inf is nan, so a mask that
    multiplies by zero lets an inf through; a key that is not there does not.
    """
    o, lse = np.zeros_like(q), np.zeros((q.shape[0], q.shape[2], q.shape[1]), q.dtype)
    for b, t, keys in each_query(q, k, starts):
        o[b, t], lse[b, :, t] = reference.attention_forward(q[b, t], k[b, keys], v[b, keys], scale=scale)
    return o, lse


def each_query_alone_backward(reference, do, q, k, v, o, lse, scale, starts=None):
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b, t, keys in each_query(q, k, starts):
        dq[b, t], dk_t, dv_t = reference.attention_backward(
            do[b, t], q[b, t], k[b, keys], v[b, keys], o[b, t], lse[b, :, t], scale=scale
        )
        dk[b, keys] += dk_t
        dv[b, keys] += dv_t
    return dq, dk, dv


def attention_case(
    kernel: str, make: Callable[..., dict[str, Any]], bounds: Callable[..., Any], formula: Callable[..., Any]
) -> Case:
    return Case(
        kernel,
        make,
        bounds,
        sizes=(
            qkv(1, 1, 1, 1, 1, 1),
            qkv(2, 5, 5, 3, 3, 7),
            qkv(1, 65, 65, 4, 2, 16),
            qkv(2, 3, 70, 6, 2, 9),
            qkv(1, 1, 130, 4, 1, 32),
            qkv(1, 130, 131, 2, 1, 48),
            qkv(1, 64, 128, 2, 2, 64),
            qkv(1, 33, 33, 1, 1, 257),
            qkv(2, 8, 531, 6, 2, 24),  # generation: some of the queries see a third piece of the keys, some do not
            qkv(1, 1, 600, 3, 3, 20),
            qkv(1, 4, 300, 16, 8, 64),  # keys so far apart that they crowd one set of the cache
            qkv(2, 50, 50, 2, 1, 17, documents=1),
            qkv(3, 7, 7, 2, 2, 5, documents=3),
            qkv(2, 201, 201, 4, 2, 16, documents=4),
            qkv(1, 96, 96, 1, 1, 9, documents=96),
            qkv(1, 300, 300, 3, 1, 40, documents=11),
        ),
        empty=(
            qkv(0, 3, 3, 2, 1, 4),
            qkv(2, 0, 0, 2, 1, 4),
            qkv(2, 0, 5, 2, 1, 4),
            qkv(0, 3, 3, 2, 1, 4, documents=2),
            qkv(2, 0, 0, 2, 1, 4, documents=1),
        ),
        tails=(
            lambda n: qkv(1, 3, 4, 2, 1, n),
            lambda n: qkv(1, n, n, 2, 1, 5),
            lambda n: qkv(1, 2, n + 1, 2, 2, 3),
            lambda n: qkv(1, n, n, 2, 1, 5, documents=1 + n // 9),
            lambda n: qkv(1, 96, 96, 2, 1, 6, documents=n),
        ),
        large=qkv(2, 193, 200, 6, 3, 40),
        formula=formula,
    )


def nv(N: int, V: int) -> dict[str, int]:
    return {"N": N, "V": V}


CASES = (
    Case(
        "matmul",
        lambda rng, M, K, N: {"a": normal(rng, M, K), "b": normal(rng, K, N)},
        bound_matmul,
        sizes=(
            {"M": 1, "K": 1, "N": 1},
            {"M": 7, "K": 13, "N": 17},
            {"M": 65, "K": 129, "N": 33},
            {"M": 5, "K": 700, "N": 40},
        ),
        empty=(
            {"M": 0, "K": 3, "N": 4},
            {"M": 3, "K": 0, "N": 4},
            {"M": 3, "K": 4, "N": 0},
            {"M": 0, "K": 0, "N": 0},
        ),
        tails=(
            lambda n: {"M": n, "K": 9, "N": 11},
            lambda n: {"M": 9, "K": n, "N": 11},
            lambda n: {"M": 9, "K": 11, "N": n},
            lambda n: {"M": 1, "K": n, "N": 35},
            lambda n: {"M": 2, "K": 37, "N": n},
        ),
        large={"M": 321, "K": 300, "N": 259},
    ),
    Case(
        "matmul_add",
        lambda rng, M, K, N: {"c": normal(rng, M, N), "a": normal(rng, M, K), "b": normal(rng, K, N)},
        lambda result, c, a, b: EPS * np.abs(result) + bound_matmul(c, a, b),
        sizes=({"M": 1, "K": 1, "N": 1}, {"M": 7, "K": 13, "N": 17}, {"M": 65, "K": 16, "N": 130}),
        empty=({"M": 0, "K": 3, "N": 4}, {"M": 3, "K": 0, "N": 4}, {"M": 3, "K": 4, "N": 0}),
        tails=(
            lambda n: {"M": n, "K": 9, "N": 11},
            lambda n: {"M": 9, "K": n, "N": 11},
            lambda n: {"M": 2, "K": 9, "N": n},
        ),
        large={"M": 321, "K": 300, "N": 259},
        in_place=("c",),
    ),
    packed_case(
        "packed_linear",
        lambda rng, N, O, I, kind, block: {"x": normal(rng, N, I), "w": random_packed(rng, kind, O, I, block=block)},
        lambda y, x, w: bound_matmul(y, x, unpack(w).astype(np.float64).T),
    ),
    packed_case(
        "packed_linear_backward",
        lambda rng, N, O, I, kind, block: {"dy": normal(rng, N, O), "w": random_packed(rng, kind, O, I, block=block)},
        lambda dx, dy, w: bound_matmul(dx, dy, unpack(w).astype(np.float64)),
    ),
    rows_case("softmax_forward", lambda rng, N, C: {"x": 3 * normal(rng, N, C)}, bound_softmax_forward),
    rows_case(
        "softmax_backward",
        lambda rng, N, C: {"dy": normal(rng, N, C), "y": probabilities(rng, N, C)},
        bound_softmax_backward,
    ),
    rows_case(
        "log_softmax_forward", lambda rng, N, C: {"x": 3 * normal(rng, N, C)}, bound_log_softmax_forward
    ),
    rows_case(
        "log_softmax_backward",
        lambda rng, N, C: {"dy": normal(rng, N, C), "y": np.log(probabilities(rng, N, C))},
        bound_log_softmax_backward,
    ),
    rows_case(
        "rms_norm_forward",
        lambda rng, N, C: {"x": normal(rng, N, C), "w": normal(rng, C), "eps": 1e-5},
        bound_rms_norm_forward,
    ),
    rows_case("rms_norm_backward", make_rms_norm_backward, bound_rms_norm_backward),
    rows_case(
        "layer_norm_forward",
        lambda rng, N, C: {
            "x": normal(rng, N, C) + np.float32(0.5),
            "w": normal(rng, C),
            "b": normal(rng, C),
            "eps": 1e-5,
        },
        bound_layer_norm_forward,
    ),
    rows_case("layer_norm_backward", make_layer_norm_backward, bound_layer_norm_backward),
    rope_case("rope_forward", "x"),
    rope_case("rope_backward", "dy"),
    rows_case(
        "swiglu_forward",
        lambda rng, N, C: {"gate": 3 * normal(rng, N, C), "up": normal(rng, N, C)},
        bound_swiglu_forward,
    ),
    rows_case(
        "swiglu_backward",
        lambda rng, N, C: {"dy": normal(rng, N, C), "gate": 3 * normal(rng, N, C), "up": normal(rng, N, C)},
        bound_swiglu_backward,
    ),
    attention_case(
        "attention_forward", make_attention_forward, bound_attention_forward, each_query_alone_forward
    ),
    attention_case(
        "attention_backward", make_attention_backward, bound_attention_backward, each_query_alone_backward
    ),
    Case(
        "cross_entropy_forward",
        lambda rng, N, V: {
            "logits": 3 * normal(rng, N, V),
            "targets": targets(rng, N, V),
            "ignore_index": IGNORE,
        },
        bound_cross_entropy_forward,
        sizes=(nv(1, 1), nv(3, 5), nv(7, 257), nv(130, 67)),
        empty=(nv(0, 5),),
        tails=(lambda n: nv(4, n),),
        large=nv(300, 1003),
    ),
    Case(
        "cross_entropy_backward",
        make_cross_entropy_backward,
        bound_cross_entropy_backward,
        sizes=(nv(1, 1), nv(3, 5), nv(7, 257), nv(130, 67)),
        empty=(nv(0, 5),),
        tails=(lambda n: nv(4, n),),
        large=nv(300, 1003),
    ),
    Case(
        "linear_cross_entropy",
        make_linear_cross_entropy,
        bound_linear_cross_entropy,
        sizes=(
            {"N": 1, "C": 1, "V": 1},
            {"N": 5, "C": 7, "V": 11},
            {"N": 67, "C": 33, "V": 130, "need_dx": 0},
            {"N": 67, "C": 33, "V": 130, "need_dw": 0},
            {"N": 130, "C": 20, "V": 515},
            {"N": 9, "C": 20, "V": 515, "need_dx": 0, "need_dw": 0},
        ),
        empty=({"N": 0, "C": 3, "V": 4},),
        tails=(
            lambda n: {"N": 3, "C": 5, "V": n},
            lambda n: {"N": 3, "C": n, "V": 5},
            lambda n: {"N": n, "C": 3, "V": 7},
        ),
        large={"N": 300, "C": 64, "V": 1003},
        formula=trained_rows_alone,
    ),
    Case(
        "embedding_backward",
        lambda rng, N, C, rows: {"dy": normal(rng, N, C), "ids": rng.integers(0, rows, N), "rows": rows},
        bound_embedding_backward,
        sizes=({"N": 1, "C": 1, "rows": 1}, {"N": 40, "C": 5, "rows": 7}, {"N": 33, "C": 257, "rows": 100}),
        empty=({"N": 0, "C": 3, "rows": 4}, {"N": 3, "C": 0, "rows": 4}),
        tails=(lambda n: {"N": 5, "C": n, "rows": 3}, lambda n: {"N": n, "C": 3, "rows": 4}),
        large={"N": 2000, "C": 96, "rows": 300},
    ),
    Case(
        "embedding_add",
        lambda rng, N, C, V: {"dw": normal(rng, V, C), "dy": normal(rng, N, C), "ids": rng.integers(0, V, N)},
        bound_embedding_add,
        sizes=({"N": 1, "C": 1, "V": 1}, {"N": 40, "C": 5, "V": 7}, {"N": 33, "C": 257, "V": 100}),
        empty=({"N": 0, "C": 3, "V": 4}, {"N": 3, "C": 0, "V": 4}),
        tails=(lambda n: {"N": 5, "C": n, "V": 3}, lambda n: {"N": n, "C": 3, "V": 4}),
        large={"N": 2000, "C": 96, "V": 300},
        in_place=("dw",),
    ),
    Case(
        "adamw_step",
        make_adamw_step,
        bound_adamw_step,
        sizes=({"N": 1}, {"N": 5}, {"N": 257}, {"N": 4999}),
        empty=({"N": 0},),
        tails=(lambda n: {"N": n},),
        large={"N": 300_001},
        in_place=("p", "m", "v"),
    ),
    Case(
        "sum_of_squares",
        lambda rng, N: {"x": normal(rng, N)},
        bound_sum_of_squares,
        sizes=({"N": 1}, {"N": 5}, {"N": 257}, {"N": 4999}, {"N": 20_000}),
        empty=({"N": 0},),
        tails=(lambda n: {"N": n},),
        large={"N": 300_001},
    ),
)
