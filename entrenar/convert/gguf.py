"""A model into a GGUF file, as llama.cpp and what is built on it (ollama, LM Studio, ...) load it.

Weights go through one at a time, straight out of the model's memory: a 7B model needs no more than a matrix of room.
For the smaller types (Q4_K_M, ...) export F16 and let `llama-quantize` make them.
"""

# C hidden size, H heads, KH key/value heads, D head dim, V vocabulary, L layers

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from entrenar.convert import ConvertError, interleave
from entrenar.convert.vocabulary import UNUSED, Vocabulary, read_vocabulary
from entrenar.data import Tokenizer
from entrenar.files import new_file
from entrenar.formats.gguf_writer import Tensor, write_gguf
from entrenar.llama import Llama, LlamaConfig
from entrenar.llama.model import rope_frequencies
from entrenar.llama.packed import Floats

# kind -> (type of the matrices, general.file_type)
KINDS = {"f32": ("F32", 0), "f16": ("F16", 1), "bf16": ("BF16", 32), "q8_0": ("Q8_0", 7)}

NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def export_gguf(model: Llama, tokenizer: Tokenizer | None, path: str | Path, *, kind: str = "f16",
                name: str = "", replace: bool = False,
                say: Callable[[str], None] = lambda text: None) -> Path:  # fmt: skip
    """Write `model` as a GGUF file, which appears whole or not at all.

    kind       "f32", "f16", "bf16" or "q8_0": the matrices' type; norms and biases are F32 always
    tokenizer  None: a file without one, for programs that bring their own
    name       general.name; default: the file's
    say        is told of matrices whose rows Q8_0 cannot hold (32 must divide them): they are written as F16

    Raises ConvertError (kind, vocabulary or tokenizer that GGUF cannot hold), FormatError (weights that are not finite
    or too large for the type), FileExistsError unless the file may be replaced, OSError where the disk refuses.
    """
    path = Path(path)
    model.refuse_adapters("export_gguf")
    if kind not in KINDS:
        raise ConvertError(f"export_gguf: kind = {kind!r}: wanted {', '.join(KINDS)}")
    metadata = model_metadata(model.config, name or path.stem, kind)
    if tokenizer is not None:
        metadata |= tokenizer_metadata(read_vocabulary(tokenizer), model.config.vocab_size)
    tensors = list(_tensors(model, KINDS[kind][0]))
    fallen = [tensor.name for tensor in tensors if kind == "q8_0" and tensor.dtype == "F16"]
    if fallen:
        say(f"{len(fallen)} matrices stay F16, 32 does not divide their rows: {', '.join(fallen[:3])}, ...")
    with new_file(path, replace=replace) as file:
        write_gguf(file, metadata, tensors)
    return path


def model_metadata(config: LlamaConfig, name: str, kind: str) -> dict[str, Any]:
    """The keys that say what the model is."""
    H, KH, D = config.heads
    values = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": name,
        "general.file_type": KINDS[kind][1],
        "general.quantization_version": 2,
        "llama.vocab_size": config.vocab_size,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": H,
        "llama.attention.head_count_kv": KH,
        "llama.attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "llama.rope.dimension_count": D,
        "llama.rope.freq_base": float(config.rope_theta),
    }
    if D * H != config.hidden_size:
        values |= {"llama.attention.key_length": D, "llama.attention.value_length": D}
    return values


def tokenizer_metadata(vocabulary: Vocabulary, vocab_size: int) -> dict[str, Any]:
    """The keys that hold the tokenizer, filled up to the model's `vocab_size` with tokens nobody uses."""
    missing = vocab_size - len(vocabulary.tokens)
    if missing < 0:
        raise ConvertError(
            f"tokenizer: has {len(vocabulary.tokens):,} tokens, the model knows {vocab_size:,}; "
            "give the tokenizer the model was trained with"
        )
    tokens = [token or f"[PAD{i}]" for i, token in enumerate([*vocabulary.tokens, *[""] * missing])]
    twice = len(tokens) - len(set(tokens))
    if twice:  # llama.cpp ends the process over this
        raise ConvertError(f"tokenizer: {twice} tokens are there twice; wanted every text once")
    values: dict[str, Any] = {
        "tokenizer.ggml.model": vocabulary.family,
        "tokenizer.ggml.pre": vocabulary.splitter,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.pad(vocabulary.types, (0, missing), constant_values=UNUSED),
    }
    if vocabulary.scores is not None:
        values["tokenizer.ggml.scores"] = np.pad(vocabulary.scores, (0, missing), constant_values=-1e6)
    else:
        values["tokenizer.ggml.merges"] = [f"{left} {right}" for left, right in vocabulary.merges]
    ids = {"bos": vocabulary.begin_id, "eos": vocabulary.end_id, "unknown": vocabulary.unknown_id,
           "padding": vocabulary.pad_id}  # fmt: skip
    values |= {f"tokenizer.ggml.{key}_token_id": i for key, i in ids.items() if i is not None}
    values["tokenizer.ggml.add_bos_token"] = vocabulary.begin_id is not None
    values["tokenizer.ggml.add_eos_token"] = False
    values["tokenizer.ggml.add_space_prefix"] = vocabulary.prefix_space
    if vocabulary.chat_template:
        values["tokenizer.chat_template"] = vocabulary.chat_template
    return values


def _tensors(model: Llama, dtype: str) -> Iterator[Tensor]:
    """Every tensor of the file; vectors are F32, matrices `dtype`, or F16 where their rows are no whole Q8_0 blocks."""
    if model.config.rope_scaling is not None:
        factors = rope_factors(model.config)
        yield Tensor("rope_freqs.weight", factors.shape, "F32", lambda: factors)
    weights = Floats(model)
    for key in weights:
        shape = weights.shape(key)
        stem, _, part = key.rpartition(".")  # weight or bias
        kind = "F32" if len(shape) == 1 else "F16" if dtype == "Q8_0" and shape[1] % 32 else dtype
        yield Tensor(f"{gguf_name(stem)}.{part}", shape, kind, functools.partial(_values, weights, key, model.config))


def _values(weights: Floats, key: str, config: LlamaConfig) -> np.ndarray:
    return turned(weights[key], key.rpartition(".")[0], config)


def gguf_name(stem: str) -> str:
    """A module's name in GGUF: "model.layers.3.self_attn.q_proj" -> "blk.3.attn_q"."""
    block, _, inside = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{block}.{NAMES[inside]}" if stem.startswith("model.layers.") else NAMES[stem]


def turned(weight: np.ndarray, stem: str, config: LlamaConfig) -> np.ndarray:
    """The rows of a query or key projection in llama.cpp's order of pairs, for RoPE; any other weight as it is."""
    H, KH, _ = config.heads
    heads = {"q_proj": H, "k_proj": KH}.get(stem.rpartition(".")[2])
    return weight if heads is None else interleave(weight, heads)


def rope_factors(config: LlamaConfig) -> np.ndarray:
    """(D/2,) what llama.cpp divides each frequency theta^(-2i/D) by: 1 for short waves, up to `factor` for long."""
    _, _, D = config.heads
    plain = config.rope_theta ** (-np.arange(0, D, 2, dtype=np.float64) / D)
    return (plain / rope_frequencies(config)).astype(np.float32)
