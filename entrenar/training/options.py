"""The options of a run of `entrenar train`, each written in one place: the field of a dataclass below.

The fields of [model] are LlamaConfig's own. `Loop`, `LearningRate` and `Checkpointing` are those of fine-tuning too
(finetune_options.py), with other defaults.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from entrenar.llama.config import LlamaConfig
from entrenar.optim import SCHEDULES, schedule
from entrenar.training.budget import seconds_of
from entrenar.training.option import ConfigError, Option, Places, Sections, option

# The [model] of the default run, where it differs from LlamaConfig's defaults (which are the 7B LLaMA's).
MODEL = {
    "vocab_size": None,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.06,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
}

MODEL_HELP = {
    "vocab_size": "tokens; none: the tokenizer's size, which is the only one that fits",
    "hidden_size": "width of the residual stream",
    "intermediate_size": "width inside the feed-forward block",
    "num_hidden_layers": "blocks",
    "num_attention_heads": "heads; they divide hidden_size, or head_dim is given",
    "num_key_value_heads": "key/value heads, a divisor of the heads; none: as many",
    "head_dim": "width of a head; none: hidden_size / num_attention_heads",
    "hidden_act": "activation of the gate",
    "max_position_embeddings": "longest context; at least training.context",
    "initializer_range": "standard deviation of the first weights",
    "rms_norm_eps": "added to the mean square in a norm",
    "tie_word_embeddings": "the head is the embedding, transposed",
    "rope_theta": "base of the rotary wavelengths",
    "rope_scaling": "table for Llama 3.1's longer contexts",
    "attention_bias": "biases in the attention's projections",
    "mlp_bias": "biases in the feed-forward block",
    "bos_token_id": "token that begins a text; none: the tokenizer's end token",
    "eos_token_id": "token that ends a text; none: the tokenizer's end token",
}


@dataclass
class Loop:
    """How long, in what batches, and how the weights move."""

    steps: int = option(1600, "updates of the weights", low=1)
    budget: str = option("", "time the whole run may take, as 90s, 20m or 1h30m: chooses the steps; empty: any")
    batch_size: int = option(8, "windows per micro-batch", low=1)
    accumulation: int = option(1, "micro-batches per update: their tokens count as one big batch", low=1)
    beta1: float = option(0.9, "AdamW: memory of the mean gradient", low=0, below=1)
    beta2: float = option(0.99, "AdamW: memory of its square", low=0, below=1)
    eps: float = option(1e-8, "AdamW: added to the root of the square", above=0)
    weight_decay: float = option(0.1, "AdamW: decoupled decay of the matrices, none on norms", low=0)
    clip_norm: float = option(1.0, "longest gradient, by its norm over all weights; 0: any", low=0)
    seed: int = option(1, "of first weights, order of batches and samples", low=0)
    activation_checkpointing: bool = option(
        False, "recompute activations: less memory, about a third more time"
    )
    on_spike: str = option("warn", "what a loss far above its recent course does", choices=("warn", "stop", "ignore"))
    spike_sigma: float = option(6.0, "how far: standard deviations of the recent losses", above=0)
    report_every: int = option(10, "steps between lines when there is no terminal to draw on", low=1)
    eval_every: int = option(
        200, "steps between looks at a fixed part of what is held out; 0: only at the end", low=0
    )
    eval_tokens: int = option(16384, "tokens in that part, about; the end of the run reads all of it", low=1)
    sample_tokens: int = option(200, "longest sample written at the end; 0: none", low=0)
    sample_prompt: str = option("", "what the sample continues; empty: the first line of the held-out text")
    sample_temperature: float = option(
        0.7, "0: always the most probable token; 1: as the model has it", low=0
    )
    sample_top_p: float = option(
        0.95, "only the likeliest tokens that together have this probability", above=0, high=1
    )


@dataclass
class Training(Loop):
    """How long, on what batches, and how the weights move."""

    start_from: str = option(
        "", "folder of a model in Hugging Face's layout to begin with: its shape, weights and tokenizer"
    )
    context: int = option(128, "tokens per window", low=2)
    eval_overlap: float = option(
        0.5, "share of each held-out window that was read before: context for the rest", low=0, below=1
    )


@dataclass
class LearningRate:
    """The learning rate over the steps."""

    schedule: str = option("cosine", "how it falls after the warmup", choices=SCHEDULES)
    learning_rate: float = option(4e-3, "its peak", above=0)
    warmup_steps: int | None = option(None, "steps of a straight rise at the start; none: a 25th of all", low=0)
    min_ratio: float = option(0.05, "the last learning rate, as a share of the peak", low=0, high=1)
    decay_steps: int | None = option(None, "wsd alone: steps of the fall at the end; none: a fifth of all", low=0)

    @property
    def peak(self) -> float:
        return self.learning_rate

    def share(self, step: int, steps: int) -> float:
        """The learning rate at `step` of `steps`, as a share of its peak."""
        return schedule(
            self.schedule,
            step,
            total_steps=steps,
            warmup_steps=steps // 25 if self.warmup_steps is None else self.warmup_steps,
            min_ratio=self.min_ratio,
            decay_steps=steps // 5 if self.decay_steps is None else self.decay_steps,
        )


@dataclass
class Data:
    """The text, and how it becomes tokens."""

    source: str = option(
        "stdlib:",
        "a text file, a folder, a glob pattern, '-' (standard input), or 'stdlib:': the "
        "source of Python's own library on this machine",
    )
    held_out: float = option(0.05, "share of the text never trained on", above=0, below=1)
    tokenizer: str = option(
        "bpe", "'bpe' (trained on this text), 'bytes', or a folder with a tokenizer.json or tokenizer.model"
    )
    vocab_size: int = option(2048, "tokens of the BPE, with the 256 bytes and the end of a text", low=257)
    skip_bad: bool = option(False, "leave out files and rows that cannot be read, instead of an error")
    cache: str = option(
        "", "folder for prepared data; empty: $XDG_CACHE_HOME/entrenar or ~/.cache/entrenar; 'off'"
    )


@dataclass
class Checkpointing:
    """What is kept, and where."""

    out: str = option("", "the run's folder, new or empty; empty: runs/<date and time>")
    every: int = option(0, "steps between checkpoints; 0: one at the end (and at Ctrl-C)", low=0)
    minutes: float = option(10.0, "and whenever so many minutes have passed since the last; 0: never", low=0)
    keep_last_n: int = option(2, "how many of the newest checkpoints stay, beside the best", low=1)
    best: bool = option(True, "also write and keep the one with the lowest held-out loss so far")


def loop_contradictions(t: Loop, lr: LearningRate, at: Places) -> list[str]:
    """Steps against the parts of the schedule, and a budget that is no time. `t.steps` may be none: not known yet."""
    problems = []
    if t.budget:
        try:
            seconds_of(t.budget)
        except ValueError as error:
            problems.append(f"{at('training.budget')}: {error}")
    if not t.steps:
        return problems
    room = t.steps - (lr.warmup_steps or 0)
    if room < 0:
        problems.append(f"{at('lr_schedule.warmup_steps')}: wanted at most training.steps = {t.steps}")
    if lr.schedule == "wsd" and (lr.decay_steps or 0) > room:
        problems.append(f"{at('lr_schedule.decay_steps')}: wanted at most {room}, the steps after the warmup")
    return problems


@dataclass
class Config(Sections):
    """A whole run. `model` holds LlamaConfig's fields; `llama(vocab_size)` makes the LlamaConfig of them."""

    SECTIONS: ClassVar[Mapping[str, type]] = {
        "model": LlamaConfig,
        "training": Training,
        "lr_schedule": LearningRate,
        "data": Data,
        "checkpointing": Checkpointing,
    }
    TITLES: ClassVar[Mapping[str, str]] = {"model": "The model's shape, by Hugging Face's names."}
    VERB: ClassVar[str] = "train"

    model: dict[str, Any] = field(default_factory=lambda: _default_model())
    training: Training = field(default_factory=Training)
    lr_schedule: LearningRate = field(default_factory=LearningRate)
    data: Data = field(default_factory=Data)
    checkpointing: Checkpointing = field(default_factory=Checkpointing)

    @classmethod
    def declared(cls, section: str, one: dataclasses.Field) -> tuple[Any, Mapping[str, Any]]:
        if section != "model":
            return super().declared(section, one)
        return MODEL.get(one.name, one.default), {"help": MODEL_HELP[one.name]}

    def llama(self, vocab_size: int, end_id: int | None = None) -> LlamaConfig:
        """The model's shape, once the tokenizer's size is known.

        Raises ConfigError for a shape that cannot be, or a [model] vocab_size that is not the tokenizer's.
        """
        asked = self.model["vocab_size"]
        if asked not in (None, vocab_size):
            raise ConfigError(
                f"[model] vocab_size = {asked}, but the tokenizer has {vocab_size} tokens: leave vocab_size "
                f"out, or set it to {vocab_size}"
            )
        values = self.model | {"vocab_size": vocab_size}
        for name in ("bos_token_id", "eos_token_id"):
            values[name] = end_id if values[name] is None else values[name]
        try:
            return LlamaConfig(**values)
        except ValueError as error:
            raise ConfigError(f"[model] {str(error).removeprefix('LlamaConfig: ')}") from None

    def section(self, name: str) -> dict[str, Any]:
        return dict(self.model) if name == "model" else super().section(name)

    def set(self, option: Option, value: Any) -> None:
        if option.section == "model":
            self.model[option.name] = value
        else:
            super().set(option, value)

    def contradictions(self, at: Places) -> list[str]:
        t, problems = self.training, []
        try:
            size = self.model["vocab_size"]
            shape = self.llama(257 if size is None else size)
            if t.context > shape.max_position_embeddings and not t.start_from:
                limit = f"model.max_position_embeddings = {shape.max_position_embeddings}"
                problems.append(f"{at('training.context')}: wanted at most {limit}")
        except ConfigError as error:
            message = str(error).removeprefix("[model] ")
            place = at.given.get(f"model.{message.split()[0].rstrip(':,=')}")
            problems.append(f"{place}: {message}" if place else f"{at.file}{error}")
        return problems + loop_contradictions(t, self.lr_schedule, at)


def _default_model() -> dict[str, Any]:
    return {one.name: MODEL.get(one.name, one.default) for one in dataclasses.fields(LlamaConfig)}
