"""A base of weights in bfloat16, as small as one of 4 bits can be."""

from __future__ import annotations

from pathlib import Path

from entrenar import random
from entrenar.llama import Llama, LlamaConfig

SHAPE = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, initializer_range=0.1)  # fmt: skip


def write_base(folder: Path) -> Path:
    random.seed(0)
    return Llama(SHAPE).save_pretrained(folder, dtype="bfloat16")
