"""The adapter of a fine-tuning run: its options by PEFT's names, and what it would be on a model of a given shape."""

# O out, I in, r rank

from __future__ import annotations

import math
from dataclasses import dataclass

from entrenar.adapters import LoraConfig
from entrenar.adapters.matching import plan as match
from entrenar.adapters.matching import shapes as tensors_of
from entrenar.llama import Llama, LlamaConfig
from entrenar.nn import unfilled
from entrenar.training.finetune_options import FULL, FineTuning
from entrenar.training.finetune_rehearsal import LowRank
from entrenar.training.option import ConfigError

PROJECTIONS = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "gate_proj": "gate", "up_proj": "up",
               "down_proj": "down"}  # fmt: skip
SHORT = PROJECTIONS | {"input_layernorm": "norm1", "post_attention_layernorm": "norm2"}  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """What an adapter would be on a model of which only the shape is known.

    low_rank   what stands beside which layer, by rehearsal.py's names
    whole      "embed", "head": trained as a whole
    trained    how many weights are trained
    """

    low_rank: dict[str, LowRank]
    whole: frozenset[str]
    trained: int


def trial(config: FineTuning, shape: LlamaConfig) -> Trial:
    """Match the adapter with the model's shape. Raises ConfigError, with all that does not fit."""
    if config.adapter.kind == FULL:
        return Trial({}, frozenset(), shape.parameter_count())
    with unfilled():
        model = Llama(shape)
    try:
        matched = match(model, lora_config(config))
    except ValueError as error:
        raise ConfigError(f"[adapter] {str(error).replace('LoraConfig does not fit', 'does not fit')}") from None
    tensors = tensors_of(model, matched)
    parameters = {name: tensor.shape for name, tensor in model.named_parameters()}
    low_rank, wrong = {}, []
    for name, how in matched.low_rank.items():
        rows, columns = parameters.get(f"{name}.weight", (0, 0))
        if how.r > min(rows, columns):
            wrong.append(f"r = {how.r} for {name}, which is {rows} x {columns}: wanted at most {min(rows, columns)}")
        low_rank[short(name)] = LowRank(how.r, rows, columns, how.dropout > 0, how.dora)
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ConfigError(f"[adapter] {wrong[0]}{more}; --adapter.r says how many")
    trained = sum(math.prod(tensor) for tensor in tensors.values())
    return Trial(low_rank, frozenset(short(name) for name in matched.whole), trained)


def lora_config(config: FineTuning) -> LoraConfig:
    """The adapter's options by PEFT's names. Raises ConfigError, naming every one that cannot be."""
    a = config.adapter
    try:
        return LoraConfig(
            r=a.r,
            lora_alpha=a.alpha,
            lora_dropout=a.dropout,
            use_rslora=a.rslora,
            use_dora=a.kind == "dora",
            target_modules=list(PROJECTIONS) if a.targets == ["all-linear"] else a.targets,
            exclude_modules=a.exclude or None,
            layers_to_transform=a.layers or None,
            rank_pattern=a.rank_pattern,
            alpha_pattern=a.alpha_pattern,
            modules_to_save=a.modules_to_save or None,
            init_lora_weights=True if a.init == "kaiming" else a.init,
            base_model_name_or_path=str(config.base.folder.absolute()),
        )
    except ValueError as error:
        raise ConfigError(f"[adapter] {str(error).removeprefix('LoraConfig: ')}") from None


def short(name: str) -> str:
    """A module's name as rehearsal.py has it: "model.layers.0.self_attn.q_proj" -> "0.q"."""
    parts = name.split(".")
    if parts[-1] == "lm_head":
        return "head"
    if parts[-1] == "embed_tokens":
        return "embed"
    return "norm" if parts[-1] == "norm" else f"{parts[2]}.{SHORT[parts[-1]]}"
