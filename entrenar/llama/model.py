"""LLaMA, from the bottom up: rotary tables, attention, feed-forward, block, model.

Attribute names are the keys of a Hugging Face checkpoint: `model.layers.0.self_attn.q_proj.weight`.
Source: Touvron et al. 2023, "LLaMA: Open and Efficient Foundation Language Models".
"""

# B batch, T time, S keys seen so far, C channels, H heads, KH key/value heads, D head dim, F feed-forward, V vocabulary

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from entrenar import kernels, ops
from entrenar.kernels.packed import FEW_ROWS, Packed
from entrenar.llama.config import LlamaConfig
from entrenar.nn import Embedding, Linear, Module, RMSNorm, side_by_side, unnoticed
from entrenar.ops.loss import Reduction
from entrenar.tensor import Tensor

if TYPE_CHECKING:
    from entrenar.llama.pretrained import Saveable


def rope_frequencies(config: LlamaConfig) -> np.ndarray:
    """Radians per position of each pair: theta^(-2i/D), i = 0..D/2-1; slowed for long wavelengths by llama3 scaling.

    llama3: with wavelength w = 2 pi / f and L the original context, f stays where w < L/high, becomes f/factor where
    w > L/low, and moves from one to the other in between.
    Source: Su et al. 2021, "RoFormer"; the Llama 3.1 release for the scaling.
    """
    _, _, D = config.heads
    f = config.rope_theta ** (-np.arange(0, D, 2, dtype=np.float64) / D)
    if config.rope_scaling is None:
        return f
    factor, low, high, length = (
        float(config.rope_scaling[key])
        for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    keep = np.clip((length * f / (2 * math.pi) - low) / (high - low), 0, 1)  # 1 short waves, 0 long ones
    return (1 - keep) * f / factor + keep * f


def rope_tables(config: LlamaConfig, length: int, dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of position times frequency, both (length, D/2), computed in float64."""
    angles = np.outer(np.arange(length, dtype=np.float64), rope_frequencies(config))
    return np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)


class KVCache:
    """The keys and values of the tokens already read, per layer: (B, KH, capacity, D) each, filled from the left.

    A head's lie behind one another, and so are read from end to end. Plain arrays, for generation: no gradient flows
    through them.
    """

    def __init__(self, config: LlamaConfig, *, batch: int = 1, capacity: int | None = None,
                 dtype: Any = np.float32) -> None:  # fmt: skip
        capacity = config.max_position_embeddings if capacity is None else capacity
        _, KH, D = config.heads
        shape = (config.num_hidden_layers, batch, KH, capacity, D)
        self.keys, self.values = np.zeros(shape, dtype), np.zeros(shape, dtype)
        self.length, self.capacity = 0, capacity

    def grown(self, capacity: int) -> KVCache:
        """A copy with more room behind what is there."""
        grown = KVCache.__new__(KVCache)
        grown.length, grown.capacity = self.length, capacity
        grown.keys, grown.values = (_with_room(part, self.length, capacity) for part in (self.keys, self.values))
        return grown

    def extend(self, layer: int, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Write k, v (B, T, KH, D) behind what is there; all keys and values so far, as views (B, S, KH, D)."""
        end = self.length + k.shape[1]
        if end > self.capacity:
            raise ValueError(f"KVCache: {end} tokens do not fit a capacity of {self.capacity}")
        keys, values = (part[layer, :, :, :end].swapaxes(1, 2) for part in (self.keys, self.values))
        keys[:, self.length :], values[:, self.length :] = k, v
        return keys, values


def _with_room(part: np.ndarray, length: int, capacity: int) -> np.ndarray:
    L, B, KH, _, D = part.shape
    room = np.zeros((L, B, KH, capacity, D), part.dtype)
    room[..., :length, :] = part[..., :length, :]
    return room


class Attention(Module):
    """Causal self-attention with grouped key/value heads.

    q, k, v = x Wq, x Wk, x Wv in heads of D;  q, k turned by RoPE;  y = concat(softmax(q k^T / sqrt(D)) v) Wo
    """

    def __init__(self, config: LlamaConfig, layer: int, dtype: Any) -> None:
        C, (H, KH, D) = config.hidden_size, config.heads
        std, bias = config.initializer_range, config.attention_bias
        self.q_proj = Linear(C, H * D, bias=bias, std=std, dtype=dtype)
        self.k_proj = Linear(C, KH * D, bias=bias, std=std, dtype=dtype)
        self.v_proj = Linear(C, KH * D, bias=bias, std=std, dtype=dtype)
        self.o_proj = Linear(H * D, C, bias=bias, std=_residual_std(config), dtype=dtype)
        self.layer, self.head_dim = layer, D

    def forward(self, x: Tensor, cos: np.ndarray, sin: np.ndarray, cache: KVCache | None = None,
                starts: np.ndarray | None = None) -> Tensor:  # fmt: skip
        B, T, _ = x.shape
        # (B, T, H, D), (B, T, KH, D) twice
        q, k, v = side_by_side(x, self.q_proj, self.k_proj, self.v_proj, width=self.head_dim)
        q, k = ops.rope(q, cos, sin), ops.rope(k, cos, sin)
        if cache is not None:
            k, v = (Tensor(part) for part in cache.extend(self.layer, k.data, v.data))  # (B, S, KH, D)
        y = ops.attention(q, k, v, starts=starts)  # (B, T, H, D)
        return self.o_proj(y.reshape(B, T, -1))


class MLP(Module):
    """y = (silu(x Wgate) * (x Wup)) Wdown          (Shazeer 2020, "GLU Variants Improve Transformer")"""

    def __init__(self, config: LlamaConfig, dtype: Any) -> None:
        C, F, std, bias = config.hidden_size, config.intermediate_size, config.initializer_range, config.mlp_bias
        self.gate_proj = Linear(C, F, bias=bias, std=std, dtype=dtype)
        self.up_proj = Linear(C, F, bias=bias, std=std, dtype=dtype)
        self.down_proj = Linear(F, C, bias=bias, std=_residual_std(config), dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        if x.size <= FEW_ROWS * x.shape[-1] and (weights := unnoticed(x, self.gate_proj, self.up_proj, self.down_proj)):
            y = kernels.packed_mlp(x.data.reshape(-1, x.shape[-1]), *weights)
            return Tensor(y.reshape(*x.shape[:-1], y.shape[-1]))
        return self.down_proj(ops.swiglu(*side_by_side(x, self.gate_proj, self.up_proj)))


class Block(Module):
    """x = x + attention(norm(x));  x = x + mlp(norm(x))"""

    def __init__(self, config: LlamaConfig, layer: int, dtype: Any) -> None:
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.self_attn = Attention(config, layer, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)
        self.mlp = MLP(config, dtype)

    def forward(self, x: Tensor, cos: np.ndarray, sin: np.ndarray, cache: KVCache | None = None,
                starts: np.ndarray | None = None) -> Tensor:  # fmt: skip
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache, starts)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(Module):
    """Embedding, blocks, last norm: ids (B, T) -> hidden states (B, T, C)."""

    def __init__(self, config: LlamaConfig, dtype: Any) -> None:
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, std=config.initializer_range, dtype=dtype)
        self.layers = [Block(config, layer, dtype) for layer in range(config.num_hidden_layers)]
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype)


class Llama(Module):
    """The whole model, for a configuration; weights drawn from `entrenar.random`.

    Weights start from N(0, initializer_range^2); those that write into the residual stream (o_proj, down_proj) are
    smaller by 1/sqrt(2 L), so that the stream's variance does not grow with depth (Radford et al. 2019).

    checkpointing   forget each block's activations and compute them again in backward: less memory, more time
    """

    def __init__(self, config: LlamaConfig, *, checkpointing: bool = False, dtype: Any = np.float32) -> None:
        self.config, self.checkpointing = config, checkpointing
        self.model = Decoder(config, dtype)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, std=config.initializer_range, dtype=dtype)
        self.rope = rope_tables(config, 0, dtype)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, storage: str | None = None, double_quant: bool = True,
                        compute: str = "float32", dtype: Any = np.float32, checkpointing: bool = False,
                        allow_nonfinite: bool = False) -> Llama:  # fmt: skip
        """The model in a folder in Hugging Face's layout; see `entrenar/llama/pretrained.py`."""
        from entrenar.llama.pretrained import from_pretrained  # which is made of this class

        return from_pretrained(folder, storage=storage, double_quant=double_quant, compute=compute,
                               dtype=dtype, checkpointing=checkpointing, allow_nonfinite=allow_nonfinite)  # fmt: skip

    def save_pretrained(self, folder: str | Path, *, dtype: str = "float32", max_shard_size: int = 5 * 10**9,
                        tokenizer: Saveable | None = None) -> Path:  # fmt: skip
        """Write a folder in Hugging Face's layout; see `entrenar/llama/pretrained.py`."""
        from entrenar.llama.pretrained import save_pretrained

        return save_pretrained(self, folder, dtype=dtype, max_shard_size=max_shard_size, tokenizer=tokenizer)

    @property
    def head_weight(self) -> Tensor | Packed:
        """The matrix that turns hidden states into logits (V, C): the embedding's own when tied."""
        return (self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head).weight

    def hidden(self, ids: np.ndarray, cache: KVCache | None = None, starts: np.ndarray | None = None) -> Tensor:
        """ids (B, T) -> hidden states (B, T, C) after the last norm; with a cache, ids continue what it holds.

        starts (B, T), for rows of several documents: the index in its row of the first token of each token's
        document. Documents do not see each other. Positions count on through the row, for RoPE turns a query and a
        key against each other by the difference of theirs alone.
        """
        ids = np.asarray(ids)
        if ids.ndim != 2:
            raise ValueError(f"Llama: ids must be (batch, time), got shape {ids.shape}")
        if cache is not None and starts is not None:
            raise ValueError("Llama: a cache continues one document per row and takes no starts; pass one of the two")
        start = cache.length if cache is not None else 0
        cos, sin = self._rope(start, start + ids.shape[1])
        x = self.model.embed_tokens(ids)
        for block in self.model.layers:
            if self.checkpointing and cache is None:
                x = ops.checkpoint(block, x, cos, sin, None, starts)
            else:
                x = block(x, cos, sin, cache, starts)
        if cache is not None:
            cache.length += ids.shape[1]
        return self.model.norm(x)

    def forward(self, ids: np.ndarray, cache: KVCache | None = None) -> Tensor:
        """ids (B, T) -> logits (B, T, V)"""
        return self.logits(self.hidden(ids, cache))

    def logits(self, x: Tensor) -> Tensor:
        """Hidden states (..., C) -> logits (..., V)"""
        return ops.linear(x, self.head_weight) if self.config.tie_word_embeddings else self.lm_head(x)

    def loss(self, ids: np.ndarray, targets: np.ndarray, *, starts: np.ndarray | None = None,
             reduction: Reduction = "mean") -> Tensor:  # fmt: skip
        """Cross-entropy in nats of predicting targets (B, T), -100 ignored, from ids (B, T). Never holds the logits.

        starts (B, T), for rows of several documents, as in `hidden`.
        """
        x = self.hidden(ids, starts=starts)
        rows, targets = x.reshape(-1, self.config.hidden_size), np.asarray(targets).reshape(-1)
        if self.config.tie_word_embeddings:
            return ops.linear_cross_entropy(rows, self.head_weight, targets, reduction=reduction)
        return self.lm_head.cross_entropy(rows, targets, reduction=reduction)

    def refuse_adapters(self, what: str) -> None:
        """Raise ValueError where layers have adapters beside them: `what` is for plain models."""
        if any(name.endswith(".base_layer") for name, _ in self.named_modules()):
            raise ValueError(
                f"{what}: this model has adapters beside its layers; save_adapter() writes an adapter, merge_adapter() "
                "a plain model, and remove_adapter() leaves the base"
            )

    def _rope(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows start..end of the tables, which grow on demand up to the model's context."""
        limit, have = self.config.max_position_embeddings, len(self.rope[0])
        if end > limit:
            raise ValueError(f"Llama: position {end - 1} is beyond max_position_embeddings = {limit}")
        if end > have:
            length = min(limit, max(end, 2 * have, 256))
            self.rope = rope_tables(self.config, length, self.head_weight.dtype)
        cos, sin = self.rope
        return cos[start:end], sin[start:end]


def _residual_std(config: LlamaConfig) -> float:
    return config.initializer_range / math.sqrt(2 * config.num_hidden_layers)
