"""The shape of a LLaMA, and what it costs: parameters, FLOPs - by arithmetic on Python's integers.

Field names and defaults are those of Hugging Face's LlamaConfig. `from_dict` reads a config.json as transformers 4
and 5 write it, and refuses by name what would make the same weights another model.
"""

# B batch, T time, C hidden size, H heads, KH key/value heads, D head dim, F feed-forward dim, V vocabulary, L layers

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from entrenar.formats import FormatError, short
from entrenar.quant import bitsandbytes

ROPE_SCALING_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROPE_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")

# Keys of a config.json that are no fields here: the values with which they change nothing, and what others would mean.
# A null always changes nothing. Keys that are not here either (use_cache, transformers_version, ...) are left out.
FOREIGN = {
    "pretraining_tp": ((1,), "wanted 1: weights split for tensor parallelism are not read"),
    "sliding_window": ((), "wanted null: attention here sees the whole context"),
    "partial_rotary_factor": ((1,), "wanted 1: RoPE here turns the whole head"),
    "rope_interleaved": ((False,), "wanted false: RoPE here turns halves of the head, not neighbours"),
    "quantization_config": (
        (),
        "quantised weights are not read, but those of bitsandbytes in 4 bits; get the model in bfloat16, or "
        "dequantise it",
    ),
    "compression_config": ((), "compressed weights are not read; get the model in bfloat16, or decompress it"),
    "num_local_experts": ((0, 1), "mixtures of experts are not read"),
    "is_encoder_decoder": ((False,), "wanted false: a LLaMA is a decoder"),
    "add_cross_attention": ((False,), "wanted false: a LLaMA is a decoder"),
}


@dataclass(frozen=True)
class LlamaConfig:
    """Everything that defines a LLaMA but its weights.

    num_key_value_heads  None: as many as heads (multi-head attention); fewer: grouped-query attention
    head_dim             None: hidden_size / num_attention_heads
    rope_scaling         None, or Llama 3.1's: {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                         "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    eos_token_id         the token that ends a text, or a list of all that do (`stop_ids` is always a tuple)

    Raises ValueError with every bad field at once: its name, what came, what was wanted.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self) -> None:
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None and _is_count(self.num_attention_heads) and _is_count(self.hidden_size):
            if self.hidden_size % self.num_attention_heads == 0:
                object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if wrong := list(self._problems()):
            raise _Impossible(wrong)

    def _problems(self) -> Iterator[str]:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "max_position_embeddings")  # fmt: skip
        bad = [name for name in sizes if not _is_count(getattr(self, name))]
        for name in bad:
            yield f"{name} = {short(getattr(self, name))}: wanted a whole number of at least 1"
        if not bad and self.head_dim is None:
            yield (
                f"hidden_size = {self.hidden_size}: not divisible by num_attention_heads = "
                f"{self.num_attention_heads}; choose one that is, or give head_dim"
            )
        if self.head_dim is not None and (not _is_count(self.head_dim) or self.head_dim % 2):
            yield f"head_dim = {short(self.head_dim)}: wanted an even whole number of at least 2 (RoPE turns pairs)"
        if not bad and self.num_attention_heads % (self.num_key_value_heads or 1):
            yield (
                f"num_key_value_heads = {self.num_key_value_heads}: wanted a divisor of "
                f"num_attention_heads = {self.num_attention_heads}"
            )
        for name in ("initializer_range", "rms_norm_eps", "rope_theta"):
            if not _is_positive(getattr(self, name)):
                yield f"{name} = {short(getattr(self, name))}: wanted a finite number above 0"
        if self.hidden_act != "silu":
            yield f"hidden_act = {short(self.hidden_act)}: wanted 'silu', the only one LLaMA uses"
        for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
            if not isinstance(getattr(self, name), bool):
                yield f"{name} = {short(getattr(self, name))}: wanted true or false"
        for name, ids in (("bos_token_id", self.bos_token_id), ("eos_token_id", self.eos_token_id)):
            if not _is_id(ids) and not (name == "eos_token_id" and isinstance(ids, list) and all(map(_is_id, ids))):
                yield f"{name} = {short(ids)}: wanted a whole number of at least 0, or nothing"
        yield from self._rope_problems()

    def _rope_problems(self) -> Iterator[str]:
        if self.rope_scaling is None:
            return
        if not isinstance(self.rope_scaling, dict):
            yield f"rope_scaling = {short(self.rope_scaling)}: wanted a table or nothing"
            return
        kind = self.rope_scaling.get("rope_type", self.rope_scaling.get("type"))
        if kind != "llama3":
            yield f"rope_scaling: rope_type = {short(kind)}: wanted 'llama3'"
            return
        missing = [key for key in ROPE_SCALING_LLAMA3 if not _is_positive(self.rope_scaling.get(key))]
        for key in missing:
            yield f"rope_scaling: {key} = {short(self.rope_scaling.get(key))}: wanted a finite number above 0"
        if not missing and self.rope_scaling["low_freq_factor"] >= self.rope_scaling["high_freq_factor"]:
            yield "rope_scaling: low_freq_factor must be below high_freq_factor"
        for key in self.rope_scaling.keys() - {*ROPE_SCALING_LLAMA3, "rope_type", "type"}:
            yield f"rope_scaling: unknown key {short(key)}"

    @property
    def heads(self) -> tuple[int, int, int]:
        """(H, KH, D): query heads, key/value heads, the width of a head."""
        assert self.num_key_value_heads is not None and self.head_dim is not None  # __post_init__ saw to it
        return self.num_attention_heads, self.num_key_value_heads, self.head_dim

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Every token that ends a text; () where none is known."""
        ids = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        return tuple(token for token in ids if token is not None)

    def to_dict(self, *, dtype: str = "float32") -> dict[str, Any]:
        """The fields as Hugging Face's config.json has them, with the keys its loaders ask for.

        dtype   what the weights beside it are stored as
        """
        fixed = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": dtype}
        return fixed | dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, where: str = "LlamaConfig.from_dict") -> LlamaConfig:
        """The configuration in a config.json, as transformers 4 or 5 wrote it, or `to_dict`.

        where   what messages call it: the file's name
        Left out: keys that do not change what the model computes (attention_dropout among them: entrenar trains
        without). Raises FormatError with everything at once that would make it another model.
        """
        if not isinstance(values, dict):
            raise FormatError(f"{where}: holds {short(values)}, wanted an object: {{...}}")
        known = {field.name for field in dataclasses.fields(cls)} & values.keys()
        fields = {name: values[name] for name in known} | _rope_fields(values)
        wrong = list(_foreign_problems(values))
        try:
            config = cls(**fields)
        except _Impossible as error:
            wrong += error.problems
        if wrong:
            raise FormatError(f"{where}: {'; '.join(wrong)}")
        return config

    def parameter_count(self) -> int:
        """How many weights: embedding, L blocks, the last norm, and the head unless tied to the embedding."""
        C, F, V = self.hidden_size, self.intermediate_size, self.vocab_size
        H, KH, D = self.heads
        q, kv = H * D, KH * D
        attention = C * q + 2 * C * kv + q * C + (q + 2 * kv + C if self.attention_bias else 0)
        mlp = 3 * C * F + (2 * F + C if self.mlp_bias else 0)
        head = 0 if self.tie_word_embeddings else V * C
        return V * C + self.num_hidden_layers * (attention + mlp + 2 * C) + C + head

    def flops_per_token(self, context: int, *, training: bool = True) -> int:
        """Floating-point operations per token at sequence length `context`, a multiply-add counting two.

        Forward: 2 for every weight in a matrix product (the head included, the embedding's lookup not), and
        4 D H per earlier token and layer for the causal scores and their use, (context + 1) / 2 of them on average.
        Training adds the backward's two products per forward one: three times as much.
        """
        C, F, (H, KH, D) = self.hidden_size, self.intermediate_size, self.heads
        q, kv = H * D, KH * D
        block = 2 * (2 * C * q + 2 * C * kv + 3 * C * F) + 2 * q * (context + 1)
        forward = self.num_hidden_layers * block + 2 * C * self.vocab_size
        return 3 * forward if training else forward


class _Impossible(ValueError):
    """The fields that cannot be; `problems` one by one."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("LlamaConfig: " + "; ".join(problems))
        self.problems = problems


def _rope_fields(values: dict[str, Any]) -> dict[str, Any]:
    """rope_theta and rope_scaling, from where transformers 4 (those two) and 5 (rope_parameters) put them."""
    rope = _rope_parameters(values)
    if not isinstance(rope, dict):
        return {"rope_scaling": rope}  # refused with the other fields
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    fields = {"rope_theta": rope.get("rope_theta", values.get("rope_theta", LlamaConfig.rope_theta))}
    if _rope_type(rope) == "default":
        return fields | {"rope_scaling": None}
    length = "original_max_position_embeddings"
    context = values.get("max_position_embeddings", LlamaConfig.max_position_embeddings)
    scaling[length] = values.get(length, scaling.get(length, context))
    return fields | {"rope_scaling": scaling}


def _rope_parameters(values: dict[str, Any]) -> Any:
    return values.get("rope_scaling") or values.get("rope_parameters") or {}


def _rope_type(rope: dict[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


def _foreign_problems(values: dict[str, Any]) -> Iterator[str]:
    if values.get("model_type") != "llama":
        yield f"model_type = {short(values.get('model_type'))}: wanted 'llama', the only one entrenar reads"
    made = values.get("architectures")
    if made is not None and made != ["LlamaForCausalLM"]:
        yield f"architectures = {short(made)}: wanted ['LlamaForCausalLM']"
    layers = values.get("layer_types")
    if layers is not None and (not isinstance(layers, list) or any(kind != "full_attention" for kind in layers)):
        yield f"layer_types = {short(layers)}: wanted 'full_attention' everywhere"
    rope = _rope_parameters(values)
    rope = rope if isinstance(rope, dict) else {}
    if _rope_type(rope) == "default":
        for key in rope.keys() - set(ROPE_KEYS):
            yield f"rope_scaling: {short(key)} = {short(rope[key])}: means nothing where rope_type is 'default'"
    for key, (harmless, why) in FOREIGN.items():
        value = rope.get(key, values.get(key))
        if key == "quantization_config" and bitsandbytes.is_config(value):
            continue  # `entrenar/llama/packed.py` reads them
        if value is not None and value not in harmless:
            yield f"{key} = {short(value)}: {why}"


def _is_id(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")
