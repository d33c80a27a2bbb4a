"""Small fine-tuning runs for tests of how they begin, end and go on; like runs.py's, of a tiny base."""

from __future__ import annotations

import json
from pathlib import Path

from runs import process, resume

from entrenar import random
from entrenar.cli import main
from entrenar.data import train_bpe
from entrenar.llama import Llama, LlamaConfig
from entrenar.training.checkpoint import OPTIMIZER, newest, read_sums

__all__ = ["ROWS", "SMALL", "bits", "finetune", "make_base", "process", "resume", "words", "write_rows"]

WORDS = ("red", "green", "blue", "seven", "nine", "cat")
ROWS = [
    {"messages": [{"role": "user", "content": f"say {a} and {b}"}, {"role": "assistant", "content": f"{b} {a}"}]}
    for a in WORDS
    for b in WORDS
]
SMALL = {
    "base.model": "base", "data.source": "chats.jsonl", "data.max_length": 64, "adapter.r": 4, "training.steps": 12,
    "training.batch_size": 2, "training.accumulation": 1, "training.eval_every": 4, "training.report_every": 3,
    "training.sample_tokens": 6, "lr_schedule.warmup_steps": 2, "checkpointing.every": 2, "data.held_out": 0.1,
}  # fmt: skip


def write_rows(path: Path, rows: list[dict] = ROWS) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_base(folder: Path, *, seed: int = 1, dtype: str = "float32", **shape: int) -> None:
    """A base of two layers with a tokenizer, in Hugging Face's layout."""
    tokenizer = train_bpe([json.dumps(row) for row in ROWS], vocab_size=300)
    random.seed(seed)
    config = {"vocab_size": tokenizer.vocab_size, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.1}  # fmt: skip
    model = Llama(LlamaConfig(**config | shape, bos_token_id=tokenizer.end_id, eos_token_id=tokenizer.end_id))
    model.save_pretrained(folder, tokenizer=tokenizer, dtype=dtype)


def words(**changes: object) -> list[str]:
    """The command line of a small run; options by keyword, "__" for the dot."""
    options = SMALL | {name.replace("__", "."): value for name, value in changes.items()}
    return [f"--{name}={value}" for name, value in options.items()]


def finetune(run: str, **changes: object) -> int:
    return main(["finetune", "--out", run, *words(**changes)])


def bits(run: str | Path) -> dict[str, str]:
    """SHA-256 of what was trained and of the optimizer's state in a run's newest checkpoint, and which one it is."""
    folder = newest(Path(run))
    sums = read_sums(folder)
    trained = next(name for name in ("adapter_model.safetensors", "model.safetensors") if name in sums)
    return {"step": folder.name, trained: sums[trained], OPTIMIZER: sums[OPTIMIZER]}
