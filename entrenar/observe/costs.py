"""What a call of a kernel computes and moves: the two numbers that place it under the machine's roofs.

Operations are those of the formula, a multiplication and an addition counting one each, an exp EXP; bytes are those of
every array read and every array written, once each. A kernel that does more than that (packs, reads again) is not
excused by it: what it does too much shows as a lower share.
"""

# B batch, T time, S keys, C channels, H heads, D head dim, V vocabulary, N rows, I in, O out

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from entrenar.kernels.packed import Packed

EXP = 20  # operations of the polynomial in csrc/simd.h, with what brings its argument near 0


@dataclass(frozen=True)
class Cost:
    """Of one call: floating-point operations, bytes read and written, and the sizes that set them, for people."""

    flops: float
    bytes: float
    sizes: str


def cost(kernel: str, args: tuple[Any, ...], options: dict[str, Any], result: Any) -> Cost:
    """What this call did. A kernel this file does not know counts no operations, and all its arrays."""
    flops = OPERATIONS.get(kernel)
    moved = MOVED.get(kernel)
    arrays = list(_arrays((args, list(options.values()))))
    return Cost(
        float(flops(*args, **options)) if flops else 0.0,
        float(moved(*args, **options) if moved else sum(a.nbytes for a in [*arrays, *_arrays(result)])),
        SIZES[kernel](*args, **options) if kernel in SIZES else " x ".join(map(str, arrays[0].shape)) if arrays else "",
    )


def _arrays(values: Any) -> Iterator[np.ndarray | Packed]:
    if isinstance(values, (np.ndarray, Packed)):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _arrays(value)


def _matmul(a: np.ndarray, b: np.ndarray) -> int:
    batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return 2 * math.prod(batch) * a.shape[-2] * a.shape[-1] * b.shape[-1]


def _packed_linear(x: np.ndarray, w: Packed) -> int:
    return 2 * (x.size // x.shape[-1]) * math.prod(w.shape)


def _packed_linears(x: np.ndarray, ws: Sequence[Packed]) -> int:
    return sum(_packed_linear(x, w) for w in ws)


def _packed_mlp(x: np.ndarray, gate: Packed, up: Packed, down: Packed) -> int:
    units = (x.size // x.shape[-1]) * gate.shape[0]
    return _packed_linears(x, (gate, up)) + (EXP + 4) * units + 2 * units * down.shape[0]


def seen(q: np.ndarray, k: np.ndarray, starts: np.ndarray | None = None) -> int:
    """How many pairs of a query and a key that it sees: of one head, over the batch."""
    B, T, S = *q.shape[:2], k.shape[1]
    return B * (T * (S - T) + T * (T + 1) // 2) - (0 if starts is None else int(starts.sum()))


def _attention(products: int, exps: int) -> Callable[..., int]:
    """So many products of D for each pair, and a softmax."""

    def flops(q: np.ndarray, k: np.ndarray, starts: np.ndarray | None) -> int:
        return seen(q, k, starts) * q.shape[2] * (2 * products * q.shape[3] + exps * (EXP + 4))

    return flops


_forward, _backward = _attention(2, 1), _attention(5, 1)


def _linear_cross_entropy(x: np.ndarray, w: Any, targets: np.ndarray, *, ignore_index: int, need_dx: bool,
                          need_dw: bool, **_: Any) -> int:  # fmt: skip
    counted = int(np.count_nonzero(targets != ignore_index))
    return counted * w.shape[0] * (2 * x.shape[-1] * (1 + need_dx + need_dw) + EXP + 4)


def _each(count: int) -> Callable[..., int]:
    """So many operations for each number of the first array."""
    return lambda first, *rest, **options: count * first.size


OPERATIONS: dict[str, Callable[..., float]] = {
    "matmul": _matmul,
    "matmul_add": lambda c, a, b: _matmul(a, b) + c.size,
    "packed_linear": _packed_linear,
    "packed_linears": _packed_linears,
    "packed_mlp": _packed_mlp,
    "packed_linear_backward": _packed_linear,
    "attention_forward": lambda q, k, v, starts=None, **_: _forward(q, k, starts),
    "attention_backward": lambda do, q, k, v, o, lse, starts=None, **_: _backward(q, k, starts),
    "linear_cross_entropy": _linear_cross_entropy,
    "cross_entropy_forward": _each(EXP + 3),
    "cross_entropy_backward": _each(EXP + 2),
    "softmax_forward": _each(EXP + 4),
    "softmax_backward": _each(4),
    "log_softmax_forward": _each(EXP + 4),
    "log_softmax_backward": _each(EXP + 3),
    "rms_norm_forward": _each(4),
    "rms_norm_backward": _each(9),
    "layer_norm_forward": _each(8),
    "layer_norm_backward": _each(12),
    "rope_forward": _each(3),
    "rope_backward": _each(3),
    "swiglu_forward": _each(EXP + 4),
    "swiglu_backward": _each(EXP + 10),
    "embedding_backward": _each(1),
    "embedding_add": lambda dw, dy, ids: dy.size,
    "adamw_step": _each(16),
    "adamw_steps": lambda parameters, **_: 16 * sum(p.size for p, *_ in parameters),
    "sum_of_squares": lambda *xs: 2 * sum(x.size for x in xs),
}

MOVED: dict[str, Callable[..., int]] = {
    "adamw_step": lambda p, g, m, v, **_: 7 * p.nbytes,  # p, m and v there and back, g
    "adamw_steps": lambda parameters, **_: 7 * sum(p.nbytes for p, *_ in parameters),
    "matmul_add": lambda c, a, b: 2 * c.nbytes + a.nbytes + b.nbytes,
    # of the table only the rows that are asked for
    "embedding_add": lambda dw, dy, ids: 3 * dy.nbytes + ids.nbytes,
    "unpack_rows": lambda ids, w: ids.size * w.shape[1] * 4 + ids.size * w.nbytes // max(1, w.shape[0]),
}

SIZES: dict[str, Callable[..., str]] = {
    "adamw_steps": lambda parameters, **_: f"{sum(p.size for p, *_ in parameters)}",
    "sum_of_squares": lambda *xs: f"{sum(x.size for x in xs)}",
    "matmul": lambda a, b: f"{a.shape[-2]} x {a.shape[-1]} x {b.shape[-1]}",
    "matmul_add": lambda c, a, b: f"{a.shape[-2]} x {a.shape[-1]} x {b.shape[-1]}",
    "packed_linear": lambda x, w: f"{x.size // x.shape[-1]} x {w.shape[1]} x {w.shape[0]} {w.kind}",
    "packed_linears": lambda x, ws: (
        f"{x.size // x.shape[-1]} x {ws[0].shape[1]} x ({' + '.join(str(w.shape[0]) for w in ws)}) {ws[0].kind}"
    ),
    "packed_mlp": lambda x, gate, up, down: (
        f"{x.size // x.shape[-1]} x {gate.shape[1]} x 2 * {gate.shape[0]} x {down.shape[0]} {gate.kind}"
    ),
    "packed_linear_backward": lambda dy, w: f"{dy.size // dy.shape[-1]} x {w.shape[0]} x {w.shape[1]} {w.kind}",
    "linear_cross_entropy": lambda x, w, *_, **__: f"{x.shape[0]} x {w.shape[1]} x {w.shape[0]}",
}
