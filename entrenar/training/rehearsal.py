"""A training run rehearsed without its numbers: which arrays are taken and dropped, in which order, and where they lie.

The engine frees each array as soon as nothing refers to it, so what a step needs at most is no sum over layers but a
moment; and the C library puts each array into the gaps that earlier ones left, so what the process holds is that
moment and the gaps between. Both follow from the shapes alone. This file goes through the arrays of building a model,
of training steps and of a look at held-out text in the very order of the engine (tensor.py's walk, llama/model.py,
ops/), and heap.py says where each would lie. A test compares it with what a real step asks for.

Counts float arrays and nothing else: what the process has beside them, pretrain_plan.py and finetune_plan.py know.
"""

# B batch, T time, N = B T tokens, C channels, H heads, KH key/value heads, D head dim, F feed-forward, V vocabulary

from __future__ import annotations

import math
from dataclasses import dataclass, field

from entrenar import kernels
from entrenar.kernels import reference
from entrenar.llama import LlamaConfig
from entrenar.training.curve import SCALE, Curve
from entrenar.training.heap import Array, Heap

ABSURD = 1 << 40  # tokens, channels or words

WEIGHTS, ADAPTERS, GRADIENTS, MOMENTS = "weights", "adapters", "gradients", "AdamW's two moments"
LAYERS, INPUTS, BLOCK = "activations", "inputs of the blocks", "one block, computed again"
HEAD, BACKWARD, SCRATCH = "last norm and loss", "backward, on its way", "kernels' scratch"
ROPE, FORWARD, PICTURE = "rotary tables", "forward, on its way", "picture of the curve"


def scratch_floats(kernel: str, *sizes: int) -> int:
    """How many floats of working memory a C kernel asks for, by its own account.

    matmul: threads   packed_linear: threads, N, I   attention_forward, attention_backward: threads, B, T, S, H, KH, D
    linear_cross_entropy: threads, N, C, V   norm: N, C
    """
    if kernels.info().backend != "native":
        return _reference_floats(kernel, *sizes)
    if max(sizes) >= ABSURD:
        return 0  # C would count beyond 64 bits; the arrays of such a run fit nowhere
    from entrenar.kernels import native

    if kernel == "norm":
        rows, channels = sizes
        return native.lib.ent_norm_blocks(rows) * channels
    if kernel == "linear_cross_entropy":
        threads, N, C, V = sizes
        sizes = (threads, logits_floats(N, V) // V, C, V)
    return getattr(native.lib, f"ent_{kernel}_scratch")(*sizes)


def _reference_floats(kernel: str, *sizes: int) -> int:
    """About what the NumPy reference holds at once: scores of all queries and keys, and their like, written out."""
    if kernel.startswith("attention"):
        _, B, T, S, H, _, _ = sizes
        return (5 if kernel == "attention_backward" else 3) * B * H * T * S
    if kernel == "linear_cross_entropy":
        _, N, C, V = sizes
        return 4 * logits_floats(N, V) + V * C
    return 0


def logits_floats(N: int, V: int) -> int:
    """Of linear_cross_entropy's working memory, what holds logits: a chunk of rows."""
    if kernels.info().backend == "native":
        from entrenar.kernels import native

        return native.linear_cross_entropy_chunk(N, V) * V
    return min(N, max(1, reference.LOGITS_AT_ONCE // V)) * V


@dataclass
class Saved:
    """What a block keeps for its backward, in the order of its forward."""

    x: Array  # held for norm 1; whoever made it drops it
    rstd1: Array
    q: Array
    k: Array
    v: Array
    o: Array
    lse: Array
    middle: Array  # x + attention, held for norm 2
    rstd2: Array
    gate: Array
    up: Array


@dataclass
class Rehearsal:
    """One run's arrays, by shape; `heap.peak` and `heap.at_peak` say what it comes to.

    micro_batches   of one update. All after the second ask for the same arrays again, in the same order
    threads         of the kernels: their scratch memory depends on it
    """

    shape: LlamaConfig
    batch: int
    context: int
    micro_batches: int = 1
    checkpointing: bool = False
    threads: int = 1
    heap: Heap = field(default_factory=Heap)

    head_is_trained = embedding_is_trained = True
    lowest = 0  # block through which gradients flow

    def __post_init__(self) -> None:
        s = self.shape
        self.H, self.KH, self.D = s.heads
        self.C, self.F, self.V, self.N = s.hidden_size, s.intermediate_size, s.vocab_size, self.batch * self.context
        self.Q, self.KV = self.H * self.D, self.KH * self.D
        self.grads: dict[str, Array] = {}
        self.lent: Array | None = None  # the kernels' scratch
        self.lent_floats = 0

    def run(self, steps: int = 2, *, picture: bool = True) -> Heap:
        """Build the model, make `steps` updates of at most three micro-batches, look at held-out text; draw."""
        self.build()
        for _ in range(steps):
            for _ in range(min(self.micro_batches, 3)):
                self.backward(*self.forward())
            self.scratch(2 * (max(map(math.prod, self.parameters().values())) // 4096 + 1))  # the gradient's norm
            self.heap.drop(*(self.grads.pop(name) for name in self.parameters() if name in self.grads))
            self.look()
        if picture:
            self.draw()
        return self.heap

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """The model's, in the order in which they are made: name -> shape."""
        s, C, F = self.shape, self.C, self.F
        made: dict[str, tuple[int, ...]] = {"embed": (self.V, C)}
        for i in range(s.num_hidden_layers):
            made[f"{i}.norm1"] = (C,)
            for name, rows, columns in (("q", self.Q, C), ("k", self.KV, C), ("v", self.KV, C), ("o", C, self.Q)):
                made[f"{i}.{name}"] = (rows, columns)
                if s.attention_bias:
                    made[f"{i}.{name}.bias"] = (rows,)
            made[f"{i}.norm2"] = (C,)
            for name, rows, columns in (("gate", F, C), ("up", F, C), ("down", C, F)):
                made[f"{i}.{name}"] = (rows, columns)
                if s.mlp_bias:
                    made[f"{i}.{name}.bias"] = (rows,)
        made["norm"] = (C,)
        return made if s.tie_word_embeddings else made | {"head": (self.V, C)}

    def build(self) -> None:
        """Weights, each scaled from a draw as large; then both moments; then the rotary tables of the first step."""
        take, drop = self.heap.take, self.heap.drop
        for shape in self.parameters().values():
            draw = take(FORWARD, *shape) if len(shape) == 2 else None
            take(WEIGHTS, *shape)
            drop(draw)
        for _ in range(2):
            for shape in self.parameters().values():
                take(MOMENTS, *shape)
        self._rope_tables()

    def _rope_tables(self) -> None:
        """cos and sin in float32, of angles in float64: angles, cos64, cos, sin64, sin."""
        take, half = self.heap.take, self.D // 2
        rows = min(self.shape.max_position_embeddings, max(self.context, 256))
        angles, cos = take(FORWARD, 2 * rows * half), take(FORWARD, 2 * rows * half)
        take(ROPE, rows * half)
        self.heap.drop(cos)
        sin = take(FORWARD, 2 * rows * half)
        take(ROPE, rows * half)
        self.heap.drop(sin, angles)

    def scratch(self, floats: int) -> None:
        """A kernel wants so many: what an earlier one got stays where it suffices; what the reference makes goes at
        once. All of it counts, though a narrow product touches little: in huge pages that is nearly all of them.
        """
        if kernels.info().backend != "native":
            self.heap.drop(self.heap.take(SCRATCH, floats))
        elif floats > self.lent_floats:
            before, self.lent_floats = self.lent, floats
            self.lent = self.heap.take(SCRATCH, floats + 16)
            self.heap.drop(before)

    def linear(self, name: str, layer: str, inputs: int, outputs: int, *, bias: bool, keep: bool) -> Array:
        """A layer's output ("0.q"); what else it keeps for its backward, is not the caller's concern."""
        y = self.heap.take(name, self.N, outputs)
        self.scratch(scratch_floats("matmul", self.threads))
        if not bias:
            return y
        sum_ = self.heap.take(name, self.N, outputs)  # y + b
        self.heap.drop(y)
        return sum_

    # ---- forward

    def read_again(self, *layers: str) -> bool:
        """Whether the backward of any of these layers reads what went into it, which then is made again."""
        return True

    def block(self, i: int, x: Array, name: str, *, keep: bool) -> tuple[Array, Saved]:
        """A block's output and what it saved; without `keep` (nothing recorded) all of that is dropped on the way."""
        take, drop, N, C = self.heap.take, self.heap.drop, self.N, self.C
        bias = self.shape.attention_bias
        norm1, rstd1 = take(FORWARD, N, C), take(name, N)
        if not keep:
            drop(rstd1)
        q_flat = self.linear(name, f"{i}.q", C, self.Q, bias=bias, keep=keep)
        k_flat = self.linear(name, f"{i}.k", C, self.KV, bias=bias, keep=keep)
        v = self.linear(name, f"{i}.v", C, self.KV, bias=bias, keep=keep)
        q, k = take(name, N, self.Q), take(name, N, self.KV)  # turned by RoPE
        drop(q_flat, k_flat)
        o, lse = take(name, N, self.Q), take(name, N, self.H)
        self.scratch(self._attention_scratch("attention_forward"))
        if not keep:
            drop(lse)
        out = self.linear(FORWARD, f"{i}.o", self.Q, C, bias=bias, keep=keep)
        drop(norm1)
        if not keep:
            drop(q, k, v, o)
        middle = take(name, N, C)
        drop(out)

        norm2, rstd2 = take(FORWARD, N, C), take(name, N)
        if not keep:
            drop(rstd2)
        bias = self.shape.mlp_bias
        gate = self.linear(name, f"{i}.gate", C, self.F, bias=bias, keep=keep)
        up = self.linear(name, f"{i}.up", C, self.F, bias=bias, keep=keep)
        product = take(FORWARD, N, self.F)
        if not keep:
            drop(gate, up)
        out = self.linear(FORWARD, f"{i}.down", self.F, C, bias=bias, keep=keep)
        drop(norm2, product)
        y = take(INPUTS if self.checkpointing else name, N, C)
        drop(out)
        if not keep:
            drop(middle)
        return y, Saved(x, rstd1, q, k, v, o, lse, middle, rstd2, gate, up)

    def forward(self) -> tuple[list[Array], list[Saved], tuple[Array, Array, Array | None]]:
        """The blocks' inputs and the last one's output, what each saved, and what norm and loss left: rstd, dx, dw."""
        take, drop, N = self.heap.take, self.heap.drop, self.N
        xs, saved = [take(INPUTS if self.checkpointing else LAYERS, N, self.C)], []
        for i in range(self.shape.num_hidden_layers):
            y, kept = self.block(i, xs[-1], BLOCK if self.checkpointing else LAYERS, keep=i >= self.lowest)
            if i < self.lowest:
                drop(xs.pop())
            elif self.checkpointing:
                self._drop_block(i, kept)
            else:
                saved.append(kept)
            xs.append(y)
        normed, rstd = take(HEAD, N, self.C), take(HEAD, N)
        losses, dx = take(HEAD, N), take(HEAD, N, self.C)
        dw = take(HEAD, self.V, self.C) if self.head_is_trained else None
        self._loss_scratch()
        drop(losses, normed)
        return xs, saved, (rstd, dx, dw)

    def look(self) -> None:
        """The loss of one batch of held-out text: nothing is recorded."""
        take, drop, N = self.heap.take, self.heap.drop, self.N
        x = take(FORWARD, N, self.C)
        for i in range(self.shape.num_hidden_layers):
            y, _ = self.block(i, x, FORWARD, keep=False)
            drop(x)
            x = y
        normed, rstd = take(FORWARD, N, self.C), take(FORWARD, N)
        drop(rstd)
        losses = take(FORWARD, N)
        self._loss_scratch()
        drop(losses, normed, x)

    def draw(self) -> None:
        """The picture of the curve, once everything is trained: drawn larger, then made smaller, across and down, four
        bytes per point. What the steps no longer hold has gone back before."""
        width, height = Curve.size
        self.heap.add_alone(PICTURE, 4 * (SCALE * width * SCALE * height + width * SCALE * height + width * height))

    def _loss_scratch(self) -> None:
        self.scratch(scratch_floats("linear_cross_entropy", self.threads, self.N, self.C, self.V))

    def _attention_scratch(self, which: str) -> int:
        B, T = self.batch, self.context
        return scratch_floats(which, self.threads, B, T, T, self.H, self.KH, self.D)

    def _drop_block(self, i: int, s: Saved) -> None:
        self.heap.drop(s.rstd1, s.q, s.k, s.v, s.o, s.lse, s.middle, s.rstd2, s.gate, s.up)

    # ---- backward

    def backward(self, xs: list[Array], saved: list[Saved], head: tuple[Array, Array, Array | None]) -> None:
        """The walk of tensor.py, from the loss to the embedding."""
        take, drop, N, C = self.heap.take, self.heap.drop, self.N, self.C
        rstd, dx, dw = head
        if dw:
            self._give("embed" if self.shape.tie_word_embeddings else "head", dw)
        d = take(BACKWARD, N, C)
        self._norm_backward("norm")
        drop(dx, xs.pop(), rstd)

        for i in reversed(range(self.lowest, self.shape.num_hidden_layers)):
            x = xs.pop()
            if self.checkpointing:
                again, s = self.block(i, x, BLOCK, keep=True)
                drop(again)
            else:
                s = saved.pop()
            d = self._block_backward(i, s, d)
        if self.embedding_is_trained:
            self._gradient("embed", self.V, C)
        drop(d)

    def _block_backward(self, i: int, s: Saved, d: Array) -> Array:
        """Back through a block, its last operation first: the gradient of its input."""
        take, drop, N, C, F = self.heap.take, self.heap.drop, self.N, self.C, self.F
        product = take(BACKWARD, N, F) if self.read_again(f"{i}.down") else None
        dproduct = self._linear_backward(f"{i}.down", F, C, self.shape.mlp_bias)
        drop(product)
        dgate, dup = take(BACKWARD, N, F), take(BACKWARD, N, F)
        drop(dproduct, s.gate, s.up)
        norm2 = self._norm_again() if self.read_again(f"{i}.up") else None
        dnorm = self._linear_backward(f"{i}.up", C, F, self.shape.mlp_bias)
        drop(dup)
        norm2 = norm2 or (self._norm_again() if self.read_again(f"{i}.gate") else None)
        dnorm = self._linear_backward(f"{i}.gate", C, F, self.shape.mlp_bias, before=dnorm)
        drop(dgate, norm2)
        d = self._through_norm(f"{i}.norm2", d, dnorm, s.middle, s.rstd2)

        bias = self.shape.attention_bias
        do = self._linear_backward(f"{i}.o", self.Q, C, bias)
        dq, dk, dv = take(BACKWARD, N, self.Q), take(BACKWARD, N, self.KV), take(BACKWARD, N, self.KV)
        self.scratch(self._attention_scratch("attention_backward"))
        drop(do, s.q, s.k, s.v, s.o, s.lse)
        dk_flat = take(BACKWARD, N, self.KV)
        drop(dk)
        dq_flat = take(BACKWARD, N, self.Q)
        drop(dq)
        norm1 = dnorm = None
        for name, width, dy in (("v", self.KV, dv), ("k", self.KV, dk_flat), ("q", self.Q, dq_flat)):
            if norm1 is None and self.read_again(f"{i}.{name}"):
                norm1 = self._norm_again()
            dnorm = self._linear_backward(f"{i}.{name}", C, width, bias, before=dnorm)
            drop(dy)
        drop(norm1)
        return self._through_norm(f"{i}.norm1", d, dnorm, s.x, s.rstd1)

    def _norm_again(self) -> Array:
        """A norm's output, for those whose backward reads it."""
        y, rstd = self.heap.take(BACKWARD, self.N, self.C), self.heap.take(BACKWARD, self.N)
        self.heap.drop(rstd)
        return y

    def _linear_backward(self, name: str, inputs: int, outputs: int, bias: bool,
                         before: Array | None = None) -> Array | None:  # fmt: skip
        """dx, added to what came `before` it or new, and dw on its way to its parameter."""
        dx = before or self.heap.take(BACKWARD, self.N, inputs)
        self._gradient(name, outputs, inputs)
        if bias:
            self._give(f"{name}.bias", self.heap.take(BACKWARD, outputs))
        return dx

    def _norm_backward(self, name: str) -> None:
        self._give(name, self.heap.take(BACKWARD, self.C))
        self.scratch(scratch_floats("norm", self.N, self.C))

    def _through_norm(self, name: str, d: Array, dnorm: Array | None, x: Array, rstd: Array) -> Array:
        """The residual stream's gradient: what comes through the norm, to which d is added, that went around it."""
        dx = self.heap.take(BACKWARD, self.N, self.C)
        self._norm_backward(name)
        self.heap.drop(d, dnorm, x, rstd)
        return dx

    def _gradient(self, name: str, *shape: int) -> None:
        """A product that is added to its parameter's gradient, if there is one."""
        if name not in self.grads:
            self._give(name, self.heap.take(BACKWARD, *shape))

    def _give(self, name: str, dw: Array) -> None:
        """A parameter keeps its first gradient; later ones are added to it."""
        if name in self.grads:
            self.heap.drop(dw)
        else:
            self.grads[name] = self.heap.rename(dw, GRADIENTS)
