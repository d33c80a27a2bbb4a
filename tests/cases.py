"""The table of cases: what an op is called with, and so what it is checked on.

One line per case names the op, the shapes of the inputs that are differentiated, how to call it where that is
more than ops.<name>(*inputs), and how PyTorch is called where its function has another name. A line buys the
float64 and the float32 gradient check, the checks in test_ops.py (inputs unchanged, graph freed, types kept,
...) and the comparison with PyTorch in test_peers_torch.py. An op without a line fails the suite.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from entrenar import Tensor, ops, random

# -- how the inputs are drawn


def normal(rng: np.random.Generator, shape: tuple[int, ...], i: int) -> np.ndarray:
    return rng.normal(size=shape)


def small(rng: np.random.Generator, shape: tuple[int, ...], i: int) -> np.ndarray:
    return 0.5 * rng.normal(size=shape)


def positive(rng: np.random.Generator, shape: tuple[int, ...], i: int) -> np.ndarray:
    return rng.uniform(0.5, 2, size=shape)


def apart(rng: np.random.Generator, shape: tuple[int, ...], i: int) -> np.ndarray:
    """No two elements, of this input or another, closer than 0.02, and none near 0: away from kinks, ties."""
    size = int(np.prod(shape))
    return rng.permutation(size).reshape(shape) * 0.1 - 0.05 * (size - 1) + 0.03 + 0.02 * i


# -- the table's line


@dataclass(frozen=True)
class Case:
    op: str
    what: str  # with `op`, the test's name
    shapes: tuple[tuple[int, ...], ...]
    fn: Callable[..., Tensor]
    torch: Callable[..., Any]  # of the module torch and the inputs
    draw: Callable[[np.random.Generator, tuple[int, ...], int], np.ndarray] = normal
    stencil: int = 3
    zero: bool = False  # the gradient of some input is zero everywhere, and should be

    @property
    def name(self) -> str:
        return f"{self.op}-{self.what}"

    @property
    def empty(self) -> bool:
        return any(0 in shape for shape in self.shapes)

    def arrays(self, dtype: Any = np.float64) -> list[np.ndarray]:
        """The inputs, the same at every call."""
        rng = np.random.default_rng(sum(map(ord, self.name)))
        return [np.asarray(self.draw(rng, shape, i)).astype(dtype) for i, shape in enumerate(self.shapes)]

    def tensors(self, dtype: Any = np.float64) -> list[Tensor]:
        return [Tensor(x, requires_grad=True) for x in self.arrays(dtype)]


def _case(op: str, *shapes: Any, what: str = "", fn: Any = None, torch: Any = None, **rest: Any) -> Case:
    fn = fn or getattr(ops, op)
    torch = torch or (lambda t, *inputs: getattr(t, op)(*inputs))
    what = what or "_".join("x".join(map(str, shape)) or "scalar" for shape in shapes)
    return Case(op, what, shapes, fn, torch, **rest)


def _each(op: str, *rows: Sequence[tuple[int, ...]], **rest: Any) -> list[Case]:
    """One case per row of shapes."""
    return [_case(op, *shapes, **rest) for shapes in rows]


# -- constants of the cases

KEEP = np.array([[True, False, True], [False, False, True]])
IDS = np.array([[1, 0, 4], [4, 4, 2]])
TARGETS = np.array([[1, 0, 6], [-100, 3, 3]])
IGNORED = np.full((2, 3), -100)
STARTS = np.array([[0, 0, 2, 2, 2], [0, 1, 1, 1, 4]])
ANGLES = np.random.default_rng(1).uniform(-3, 3, size=(4, 3))
REPEATED = np.array([[0, 2], [2, 2]])
FROZEN = np.random.default_rng(2).normal(size=(5, 4))
BIAS, NORM = np.linspace(-1, 1, 5), np.linspace(0.5, 2, 5)


def _dropout(x: Tensor) -> Tensor:
    random.seed(3)
    return ops.dropout(x, 0.4)


def _torch_dropout(torch: Any, x: Any) -> Any:
    random.seed(3)
    keep = random.generator().random(tuple(x.shape), np.float32) >= 0.4  # our mask: torch draws others
    return x * torch.from_numpy(keep) / 0.6


def _torch_rope(torch: Any, x: Any) -> Any:
    """As in Hugging Face's modeling_llama: x cos + rotate_half(x) sin"""
    x1, x2 = x.chunk(2, dim=-1)
    cos = torch.from_numpy(np.cos(ANGLES)).to(x.dtype).repeat(1, 2)[:, None]
    sin = torch.from_numpy(np.sin(ANGLES)).to(x.dtype).repeat(1, 2)[:, None]
    return x * cos + torch.cat([-x2, x1], dim=-1) * sin


def _torch_attention(
    torch: Any, q: Any, k: Any, v: Any, scale: float | None = None, starts: np.ndarray | None = None
) -> Any:
    T, S, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
    mask = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    if starts is not None:
        mask = mask & (torch.arange(S) >= torch.from_numpy(starts)[:, None, :, None])  # (B, 1, T, S)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return sdpa(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def _torch_loss(torch: Any, logits: Any, targets: np.ndarray, reduction: str) -> Any:
    flat, targets = logits.reshape(-1, logits.shape[-1]), torch.from_numpy(targets.reshape(-1))
    return torch.nn.functional.cross_entropy(flat, targets, ignore_index=-100, reduction=reduction)


def _torch_lora(torch: Any, x: Any, A: Any, B: Any, w: np.ndarray = FROZEN) -> Any:
    return x @ torch.from_numpy(w).to(x.dtype).T + 0.7 * (x @ A.T) @ B.T


def _dora(x: Tensor, A: Tensor, B: Tensor, m: Tensor, **rest: Any) -> Tensor:
    return ops.dora_linear(x, Tensor(FROZEN.astype(x.dtype)), None, A, B, m, norm=NORM, scale=0.7, **rest)


def _torch_dora(torch: Any, x: Any, A: Any, B: Any, m: Any) -> Any:
    return m / torch.from_numpy(NORM).to(x.dtype) * _torch_lora(torch, x, A, B)


def _torch_dora_dropped(torch: Any, x: Any, z: Any, A: Any, B: Any, m: Any) -> Any:
    """As PEFT: the base on x, and what DoRA changes in it on the input after dropout"""
    g, base = m / torch.from_numpy(NORM).to(x.dtype), lambda x: x @ torch.from_numpy(FROZEN).to(x.dtype).T
    return base(x) + (g - 1) * base(z) + 0.7 * g * ((z @ A.T) @ B.T)


def _block(x: Tensor, w: Tensor) -> Tensor:
    return ops.tanh(ops.linear(x, w)) * x


BROADCAST = [
    [(3, 5), (3, 5)], [(3, 5), (5,)], [(3, 1), (4,)], [(2, 1, 3), (4, 1)], [(), (2, 3)], [(0, 3), (3,)],
    [(), ()]
]  # fmt: skip
SHAPES = [[(3, 5)], [(7,)], [()], [(0, 3)], [(2, 3, 4)]]

CASES: list[Case] = [
    # -- elementwise
    *_each("add", *BROADCAST),
    _case("add", (2, 3), what="number", fn=lambda x: 2 + x, torch=lambda t, x: 2 + x),
    _case("add", (2, 3), what="itself", fn=lambda x: x + x, torch=lambda t, x: x + x),
    *_each("sub", *BROADCAST),
    _case("sub", (2, 3), what="number", fn=lambda x: 2 - x, torch=lambda t, x: 2 - x),
    *_each("mul", *BROADCAST),
    _case("mul", (2, 3), what="number", fn=lambda x: np.float64(3) * x, torch=lambda t, x: 3 * x),
    _case("mul", (2, 3), what="itself", fn=lambda x: x * x, torch=lambda t, x: x * x),
    *_each("div", *BROADCAST, draw=positive, stencil=5),
    _case("div", (2, 3), what="number", fn=lambda x: 2 / x, torch=lambda t, x: 2 / x, draw=positive,
          stencil=5),
    *_each("neg", *SHAPES),
    *_each("pow", *BROADCAST, draw=positive, stencil=5),
    _case("pow", (2, 3), what="square", fn=lambda x: x**2, torch=lambda t, x: x**2),
    _case("pow", (2, 3), what="cube", fn=lambda x: x**3, torch=lambda t, x: x**3, stencil=5),
    _case("pow", (2, 3), what="root", fn=lambda x: x**-0.5, torch=lambda t, x: x**-0.5,
          draw=positive, stencil=5),
    _case("pow", (2, 3), what="zeroth", fn=lambda x: x**0, torch=lambda t, x: x**0, zero=True),
    _case("pow", (2, 3), what="of_number", fn=lambda x: 2**x, torch=lambda t, x: 2**x, stencil=5),
    *_each("exp", *SHAPES, stencil=5),
    *_each("log", *SHAPES, draw=positive, stencil=5),
    *_each("sqrt", *SHAPES, draw=positive, stencil=5),
    *_each("tanh", *SHAPES, stencil=5),
    *_each("sigmoid", *SHAPES, stencil=5),
    *_each("relu", *SHAPES, draw=apart),
    *_each("silu", *SHAPES, stencil=5, torch=lambda t, x: t.nn.functional.silu(x)),
    *_each("gelu", *SHAPES, stencil=5, torch=lambda t, x: t.nn.functional.gelu(x)),
    *_each("maximum", *BROADCAST[:-1], draw=apart),
    _case("maximum", (4, 5), what="number", fn=lambda x: ops.maximum(x, 0.1), draw=apart,
          torch=lambda t, x: t.clamp(x, min=0.1)),
    *_each("minimum", *BROADCAST[:-1], draw=apart),
    *_each("where", [(2, 3), (2, 3)], [(3,), (2, 1)], [(), (2, 3)],
           fn=lambda x, y: ops.where(KEEP, x, y), torch=lambda t, x, y: t.where(t.from_numpy(KEEP), x, y)),
    _case("where", (2, 3), what="number", fn=lambda x: ops.where(KEEP, x, 0.0),
          torch=lambda t, x: t.where(t.from_numpy(KEEP), x, 0.0)),
    *_each("swiglu", [(3, 5), (3, 5)], [(2, 3, 17), (2, 3, 17)], [(0, 4), (0, 4)], [(), ()], stencil=5,
           torch=lambda t, gate, up: t.nn.functional.silu(gate) * up),

    # -- reduce
    *_each("sum", *SHAPES),
    _case("sum", (2, 3, 4), what="axis", fn=lambda x: x.sum(axis=1), torch=lambda t, x: x.sum(1)),
    _case("sum", (2, 3, 4), what="axes_kept", fn=lambda x: x.sum(axis=(0, -1), keepdims=True),
          torch=lambda t, x: x.sum((0, -1), keepdim=True)),
    _case("sum", (2, 0, 4), what="over_nothing", fn=lambda x: x.sum(axis=1), torch=lambda t, x: x.sum(1)),
    *_each("mean", [(3, 5)], [(7,)], [()]),
    _case("mean", (2, 3, 4), what="axis", fn=lambda x: x.mean(axis=-1), torch=lambda t, x: x.mean(-1)),
    _case("mean", (2, 3, 4), what="axes_kept", fn=lambda x: x.mean(axis=(0, 2), keepdims=True),
          torch=lambda t, x: x.mean((0, 2), keepdim=True)),
    _case("mean", (0, 3), what="empty_rows", fn=lambda x: x.mean(axis=1), torch=lambda t, x: x.mean(1)),
    *_each("max", [(3, 5)], [(7,)], [()], draw=apart, torch=lambda t, x: t.amax(x)),
    _case("max", (2, 3, 4), what="axis", fn=lambda x: x.max(axis=1), torch=lambda t, x: x.amax(1),
          draw=apart),
    _case("max", (2, 3, 4), what="axes_kept", fn=lambda x: x.max(axis=(0, 2), keepdims=True), draw=apart,
          torch=lambda t, x: x.amax((0, 2), keepdim=True)),

    # -- shape
    _case("reshape", (2, 6), fn=lambda x: x.reshape(3, -1), torch=lambda t, x: x.reshape(3, -1)),
    _case("reshape", (), what="scalar", fn=lambda x: x.reshape(1, 1), torch=lambda t, x: x.reshape(1, 1)),
    _case("reshape", (0, 3), what="empty", fn=lambda x: x.reshape((3, 0)),
          torch=lambda t, x: x.reshape(3, 0)),
    _case("transpose", (2, 3), fn=lambda x: x.T, torch=lambda t, x: x.T),
    _case("transpose", (2, 3, 4), fn=lambda x: x.transpose(1, -1, 0), torch=lambda t, x: x.permute(1, 2, 0)),
    _case("getitem", (4, 5), what="number", fn=lambda x: x[-2], torch=lambda t, x: x[-2]),
    _case("getitem", (4, 5), what="slices", fn=lambda x: x[1:, ::2], torch=lambda t, x: x[1:, ::2]),
    _case("getitem", (4, 5), what="backwards", fn=lambda x: x[::-1], torch=lambda t, x: x.flip(0)),
    _case("getitem", (4, 5), what="new_axis", fn=lambda x: x[..., None, 2],
          torch=lambda t, x: x[..., None, 2]),
    _case("getitem", (3, 5), what="repeated", fn=lambda x: x[REPEATED], torch=lambda t, x: x[REPEATED]),
    _case("getitem", (3, 5), what="list", fn=lambda x: x[:, [0, 0, 3]], torch=lambda t, x: x[:, [0, 0, 3]]),
    _case("getitem", (2, 3), what="mask", fn=lambda x: x[KEEP], torch=lambda t, x: x[t.from_numpy(KEEP)]),
    _case("getitem", (4, 5), what="nothing", fn=lambda x: x[4:], torch=lambda t, x: x[4:], zero=True),
    _case("concat", (2, 3), (1, 3), fn=lambda x, y: ops.concat([x, y]), torch=lambda t, x, y: t.cat([x, y])),
    _case("concat", (2, 3), (2, 1), (2, 0), fn=lambda *xs: ops.concat(xs, axis=-1),
          torch=lambda t, *xs: t.cat(xs, -1)),
    _case("stack", (2, 3), (2, 3), fn=lambda *xs: ops.stack(xs), torch=lambda t, *xs: t.stack(xs)),
    _case("stack", (2, 3), (2, 3), what="last", fn=lambda *xs: ops.stack(xs, axis=-1),
          torch=lambda t, *xs: t.stack(xs, -1)),
    _case("split", (3, 6), fn=lambda x: _weighted(ops.split(x, 3, axis=1)),
          torch=lambda t, x: _weighted(x.split(2, 1))),
    _case("split", (5, 2), what="uneven",
          fn=lambda x: ops.concat([s * s for s in ops.split(x, [1, 3])[::-1]]),
          torch=lambda t, x: t.cat([s * s for s in x.split([1, 2, 2])[::-1]])),
    _case("broadcast_to", (3, 1), fn=lambda x: ops.broadcast_to(x, (2, 3, 4)),
          torch=lambda t, x: x.broadcast_to(2, 3, 4)),
    _case("broadcast_to", (), fn=lambda x: ops.broadcast_to(x, (5,)), torch=lambda t, x: x.broadcast_to(5)),

    # -- linear
    *_each("matmul", [(3, 4), (4, 5)], [(1, 1), (1, 1)], [(2, 3, 4), (4, 5)], [(2, 3, 4), (2, 4, 5)],
           [(2, 1, 3, 4), (5, 4, 2)], [(3, 4), (2, 4, 5)], [(4,), (4,)], [(4,), (4, 5)], [(3, 4), (4,)],
           [(4,), (2, 4, 3)],
           [(2, 3, 4), (4,)], [(0, 4), (4, 3)], [(3, 0), (0, 2)], [(2, 0, 4), (4, 3)], [(17, 33), (33, 9)]),
    _case("matmul", (3, 4), what="square", fn=lambda x: x @ x.T, torch=lambda t, x: x @ x.T),
    *_each("linear", [(3, 4), (5, 4)], [(2, 3, 4), (5, 4), (5,)], [(4,), (5, 4), (5,)],
           [(0, 4), (5, 4), (5,)],
           [(2, 0, 4), (5, 4)], [(19, 33), (18, 33), (18,)],
           torch=lambda t, *xs: t.nn.functional.linear(*xs)),
    _case("embedding", (5, 4), fn=lambda w: ops.embedding(IDS, w),
          torch=lambda t, w: t.nn.functional.embedding(t.from_numpy(IDS), w)),
    _case("embedding", (5, 4), what="one", fn=lambda w: ops.embedding(3, w), torch=lambda t, w: w[3]),
    _case("embedding", (5, 4), what="none", fn=lambda w: ops.embedding(np.zeros((0, 2), int), w), zero=True,
          torch=lambda t, w: w[np.zeros((0, 2), int)]),

    # -- low rank, W frozen
    *_each("lora_linear", [(3, 4), (2, 4), (5, 2)], [(2, 3, 4), (1, 4), (5, 1)], [(4,), (6, 4), (5, 6)],
           [(0, 4), (2, 4), (5, 2)],
           fn=lambda x, A, B: ops.lora_linear(x, Tensor(FROZEN.astype(x.dtype)), None, A, B, scale=0.7),
           torch=_torch_lora),
    _case("lora_linear", (2, 3, 4), (2, 4), (5, 2), what="bias", torch=lambda t, x, A, B: _torch_lora(t, x, A, B)
          + t.from_numpy(BIAS).to(x.dtype), fn=lambda x, A, B: ops.lora_linear(
              x, Tensor(FROZEN.astype(x.dtype)), Tensor(BIAS.astype(x.dtype)), A, B, scale=0.7)),
    _case("lora_linear", (3, 4), (3, 4), (2, 4), (5, 2), what="dropped", fn=lambda x, z, A, B: ops.lora_linear(
              x, Tensor(FROZEN.astype(x.dtype)), None, A, B, scale=0.7, dropped=z),
          torch=lambda t, x, z, A, B: _torch_lora(t, x, A, 0 * B) + _torch_lora(t, z, A, B, 0 * FROZEN)),
    *_each("dora_linear", [(3, 4), (2, 4), (5, 2), (5,)], [(2, 3, 4), (1, 4), (5, 1), (5,)],
           [(0, 4), (2, 4), (5, 2), (5,)], fn=_dora, torch=_torch_dora),
    _case("dora_linear", (3, 4), (3, 4), (2, 4), (5, 2), (5,), what="dropped",
          fn=lambda x, z, A, B, m: _dora(x, A, B, m, dropped=z), torch=_torch_dora_dropped),
    _case("lora_embedding", (2, 5), (4, 2),
          fn=lambda A, B: ops.lora_embedding(IDS, Tensor(FROZEN.astype(A.dtype)), A, B, scale=0.7),
          torch=lambda t, A, B: t.from_numpy(FROZEN).to(A.dtype)[IDS] + 0.7 * A.T[IDS] @ B.T),

    # -- norm
    *_each("layer_norm", [(3, 5), (5,), (5,)], [(2, 3, 33), (33,), (33,)], [(7,), (7,), (7,)],
           [(0, 4), (4,), (4,)],
           stencil=5, torch=lambda t, x, w, b: t.nn.functional.layer_norm(x, w.shape, w, b)),
    *_each("rms_norm", [(3, 5), (5,)], [(2, 3, 33), (33,)], [(7,), (7,)], [(0, 4), (4,)],
           [(3, 1), (1,)], stencil=5,
           fn=lambda x, w: ops.rms_norm(x, w, eps=0.1),
           torch=lambda t, x, w: t.nn.functional.rms_norm(x, w.shape, w, 0.1)),

    # -- attention and its parts
    *_each("softmax", [(3, 5)], [(33,)], [(2, 3, 4)], [(0, 3)], stencil=5,
           torch=lambda t, x: t.softmax(x, -1)),
    _case("softmax", (2, 3, 4), what="axis", fn=lambda x: ops.softmax(x, axis=1), stencil=5,
          torch=lambda t, x: t.softmax(x, 1)),
    *_each("log_softmax", [(3, 5)], [(33,)], [(2, 3, 4)], [(0, 3)], stencil=5,
           torch=lambda t, x: t.log_softmax(x, -1)),
    _case("log_softmax", (2, 3, 4), what="axis", fn=lambda x: ops.log_softmax(x, axis=0), stencil=5,
          torch=lambda t, x: t.log_softmax(x, 0)),
    *_each("rope", [(2, 4, 3, 6)], [(0, 4, 1, 6)], fn=lambda x: ops.rope(x, np.cos(ANGLES), np.sin(ANGLES)),
           torch=_torch_rope),
    *_each("attention", [(2, 3, 2, 4), (2, 3, 2, 4), (2, 3, 2, 4)],
           [(1, 3, 4, 5), (1, 5, 2, 5), (1, 5, 2, 5)],
           [(2, 1, 3, 4), (2, 6, 1, 4), (2, 6, 1, 4)], [(1, 18, 2, 3), (1, 18, 1, 3), (1, 18, 1, 3)],
           [(0, 3, 2, 4), (0, 3, 2, 4), (0, 3, 2, 4)], stencil=5, torch=_torch_attention),
    _case("attention", (2, 3, 2, 4), (2, 3, 2, 4), (2, 3, 2, 4), what="scale", stencil=5,
          fn=lambda q, k, v: ops.attention(q, k, v, scale=0.7),
          torch=lambda t, q, k, v: _torch_attention(t, q, k, v, 0.7)),
    _case("attention", (2, 5, 4, 3), (2, 5, 2, 3), (2, 5, 2, 3), what="documents", stencil=5,
          fn=lambda q, k, v: ops.attention(q, k, v, starts=STARTS),
          torch=lambda t, q, k, v: _torch_attention(t, q, k, v, starts=STARTS)),

    # -- dropout
    *_each("dropout", [(4, 5)], [(0, 3)], fn=_dropout, torch=_torch_dropout),

    # -- loss
    _case("cross_entropy", (2, 3, 7), fn=lambda x: ops.cross_entropy(x, TARGETS), stencil=5,
          torch=lambda t, x: _torch_loss(t, x, TARGETS, "mean")),
    _case("cross_entropy", (2, 3, 7), what="sum", fn=lambda x: ops.cross_entropy(x, TARGETS, reduction="sum"),
          stencil=5, torch=lambda t, x: _torch_loss(t, x, TARGETS, "sum")),
    _case("cross_entropy", (2, 3, 7), what="all_ignored",
          fn=lambda x: ops.cross_entropy(x, IGNORED), zero=True,
          torch=lambda t, x: 0 * x.sum()),  # torch's mean over nothing is nan, ours 0
    _case("linear_cross_entropy", (2, 3, 5), (7, 5), fn=lambda x, w: ops.linear_cross_entropy(x, w, TARGETS),
          stencil=5, torch=lambda t, x, w: _torch_loss(t, x @ w.T, TARGETS, "mean")),
    _case("linear_cross_entropy", (2, 3, 5), (7, 5), what="sum", stencil=5,
          fn=lambda x, w: 3 * ops.linear_cross_entropy(x, w, TARGETS, reduction="sum"),
          torch=lambda t, x, w: 3 * _torch_loss(t, x @ w.T, TARGETS, "sum")),
    _case("linear_cross_entropy", (2, 3, 5), (7, 5), what="all_ignored", zero=True,
          fn=lambda x, w: ops.linear_cross_entropy(x, w, IGNORED), torch=lambda t, x, w: 0 * (x @ w.T).sum()),

    # -- checkpoint
    _case("checkpoint", (3, 4), (4, 4), fn=lambda x, w: ops.checkpoint(_block, x, w), stencil=5,
          torch=lambda t, x, w: t.tanh(x @ w.T) * x),
]  # fmt: skip


def _weighted(parts: Any) -> Any:
    """1, 2, 3, ... times the parts: so that none can be taken for another."""
    total = 0
    for n, part in enumerate(parts):
        total = total + part * (n + 1)
    return total


def ops_without_case(names: Sequence[str], cases: Sequence[Case]) -> list[str]:
    return sorted(set(names) - {case.op for case in cases})


def first_of_each_op(cases: Sequence[Case]) -> list[Case]:
    """One case per op: the tier 1 selection."""
    return list({case.op: case for case in reversed(cases)}.values())[::-1]
