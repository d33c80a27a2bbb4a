"""A fine-tuning run rehearsed without its numbers: rehearsal.py's steps with frozen weights, and adapters beside them.

A frozen weight gets no gradient and no moments, and of what goes into its layer nothing is kept; an adapted layer keeps
its input, or what dropout made of it, and h = z A^T (N, r). Through blocks below the lowest adapted one no gradient
flows: they keep nothing.
"""

# N = B T tokens, I in, O out, r rank, C channels, V vocabulary

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from entrenar.kernels.packed import TABLES
from entrenar.quant.blockwise import PIECE, Q8_0_BLOCK
from entrenar.training.heap import FLOAT, Array
from entrenar.training.rehearsal import (
    ADAPTERS,
    BACKWARD,
    BLOCK,
    FORWARD,
    LAYERS,
    MOMENTS,
    WEIGHTS,
    Rehearsal,
    scratch_floats,
)


@dataclass(frozen=True)
class LowRank:
    """What stands beside a layer W (O, I): A (r, I) and B (O, r)."""

    r: int
    rows: int
    columns: int
    dropout: bool = False
    dora: bool = False


@dataclass
class FineRehearsal(Rehearsal):
    """One fine-tuning run's arrays, by shape.

    low_rank   what stands beside which layer: "0.q", "0.gate"
    whole      "embed", "head": trained as a whole, beside the frozen one
    held       bytes of each frozen weight, by name: "embed", "0.norm1", "0.q"
    trained    share of a batch's tokens that are trained: of the others there are no logits
    """

    low_rank: Mapping[str, LowRank] = field(default_factory=dict)
    whole: frozenset[str] = frozenset()
    held: Mapping[str, int] = field(default_factory=dict)
    trained: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.extras: dict[str, list[Array]] = {}  # what an adapted layer keeps, beside its input
        self.embedding_is_trained = "embed" in self.whole
        self.head_is_trained = ("embed" if self.shape.tie_word_embeddings else "head") in self.whole
        numbers = [int(layer.partition(".")[0]) for layer in self.low_rank]
        self.lowest = 0 if self.embedding_is_trained else min(numbers, default=self.shape.num_hidden_layers)

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Those that are trained, in order: name -> shape."""
        made: dict[str, tuple[int, ...]] = {}
        for layer, one in self.low_rank.items():
            made |= {f"{layer}.A": (one.r, one.columns), f"{layer}.B": (one.rows, one.r)}
            if one.dora:
                made[f"{layer}.m"] = (one.rows,)
        return made | {name: (self.V, self.C) for name in sorted(self.whole)}

    def build(self) -> None:
        """Frozen weights, each from one in floats; adapters; both moments; the rotary tables of the first step."""
        take, drop = self.heap.take, self.heap.drop
        shapes = super().parameters()
        for name, count in self.held.items():
            floats = take(FORWARD, min(PIECE, math.prod(shapes[name]))) if self._is_packed(name) else None
            take(WEIGHTS, -(-count // FLOAT))
            drop(floats)
        for shape in self.parameters().values():
            draw = take(FORWARD, *shape)
            take(ADAPTERS, *shape)
            drop(draw)
        for _ in range(2):
            for shape in self.parameters().values():
                take(MOMENTS, *shape)
        self._rope_tables()

    # ---- forward

    def read_again(self, *layers: str) -> bool:
        """Adapted ones read it; where there is dropout, what that made of it."""
        return any(layer in self.low_rank and not self.low_rank[layer].dropout for layer in layers)

    def linear(self, name: str, layer: str, inputs: int, outputs: int, *, bias: bool, keep: bool) -> Array:
        take, drop, N, one = self.heap.take, self.heap.drop, self.N, self.low_rank.get(layer)
        if one is None:
            return super().linear(name, layer, inputs, outputs, bias=bias, keep=keep)
        kept, saved = [], BLOCK if self.checkpointing else LAYERS
        if one.dropout and keep:
            drawn, mask = take(FORWARD, N, inputs), take(saved, -(-N * inputs // FLOAT))
            drop(drawn)
            scaled, dropped = take(FORWARD, N, inputs), take(saved, N, inputs)
            drop(scaled)
            kept += [mask, dropped]
        h, y = take(saved if keep else name, N, one.r), take(name, N, outputs)
        kept.append(h)
        self.scratch(scratch_floats("packed_linear", self.threads, N, inputs))
        drop(take(name, outputs, one.r))  # B, scaled
        if one.dora:
            kept.append(self.heap.rename(y, saved if keep else name))
            y = take(name, N, outputs)
        if keep:
            self.extras[layer] = kept
        else:
            drop(*kept)
        return y

    def _loss_scratch(self) -> None:
        rows = max(1, round(self.trained * self.N))
        self.scratch(scratch_floats("linear_cross_entropy", self.threads, rows, self.C, self.V))

    def _drop_block(self, i: int, s: object) -> None:
        super()._drop_block(i, s)  # type: ignore[arg-type]
        for layer in [layer for layer in self.extras if layer.startswith(f"{i}.")]:
            self.heap.drop(*self.extras.pop(layer))

    # ---- backward

    def _linear_backward(self, name: str, inputs: int, outputs: int, bias: bool,
                         before: Array | None = None) -> Array | None:  # fmt: skip
        take, drop, N, one = self.heap.take, self.heap.drop, self.N, self.low_rank.get(name)
        made: list[Array] = []
        du = take(BACKWARD, N, outputs) if one and one.dora else None
        if one is not None:
            dh, dA = take(BACKWARD, N, one.r), take(BACKWARD, one.r, one.columns)
            drop(take(BACKWARD, N, one.r))  # h, scaled
            dB = take(BACKWARD, one.rows, one.r)
            made = [dA, dB, *([take(BACKWARD, one.rows)] if one.dora else [])]
        dx = None
        if not self._is_first(name):
            dx = before or take(BACKWARD, N, inputs)
            if before is not None and self._is_packed(name):
                drop(take(BACKWARD, N, inputs))
            if one is not None and one.dropout:
                dz = take(BACKWARD, N, inputs)
                scaled, back = take(BACKWARD, N, inputs), take(BACKWARD, N, inputs)
                drop(dz, scaled, back)
        if one is not None:
            drop(dh, du, *self.extras.pop(name))
            for part, gradient in zip("ABm", made, strict=False):
                self._give(f"{name}.{part}", gradient)
        return dx

    def _is_packed(self, name: str) -> bool:
        """Whether a product with this layer's weight makes its result anew, rather than add it to another."""
        return self.held[name] < FLOAT * math.prod(super().parameters()[name])

    def _is_first(self, name: str) -> bool:
        """Whether nothing below this layer wants a gradient."""
        return not self.embedding_is_trained and name in {f"{self.lowest}.{part}" for part in "qkv"}

    def _norm_backward(self, name: str) -> None:
        self.heap.drop(self.heap.take(BACKWARD, self.C))  # the norm's own gradient, which nobody wants
        self.scratch(scratch_floats("norm", self.N, self.C))

    def _through_norm(self, name: str, d: Array, dnorm: Array | None, x: Array, rstd: Array) -> Array:
        if dnorm is not None:
            return super()._through_norm(name, d, dnorm, x, rstd)
        self.heap.drop(x, rstd)
        return d


def held_bytes(shape: tuple[int, ...], kind: str | None, *, double_quant: bool, block: int = 64) -> int:
    """Bytes of a frozen weight of this shape as a Packed of this kind; None: floats."""
    count = math.prod(shape)
    if kind is None:
        return FLOAT * count
    if kind == "bfloat16":
        return 2 * count
    if kind == "q8_0":
        return count + FLOAT * -(-count // Q8_0_BLOCK)
    assert kind in TABLES
    blocks = -(-count // block)
    nested = blocks + FLOAT * (256 + -(-blocks // 256))
    return -(-count // 2) + (nested if double_quant else FLOAT * blocks)

