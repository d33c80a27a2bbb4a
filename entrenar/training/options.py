"""The options of a training run: where each is declared and checked.

An option is written in one place: the field of a dataclass below, with its default, its type, its bounds and
its help. (The fields of [model] are LlamaConfig's own.) TOML files, command-line overrides, `--help` and
error messages are all made from these fields (config.py).
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from entrenar.llama.config import LlamaConfig
from entrenar.optim import SCHEDULES, schedule


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
    choices: Sequence[str] = (),
) -> Any:
    """A dataclass field that is an option: low <= value <= high, above < value < below, one of `choices`."""
    bounds = {"low": low, "above": above, "high": high, "below": below, "choices": tuple(choices)}
    return field(default=default, metadata={"help": help} | bounds)


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
class Training:
    """How long, on what batches, and how the weights move."""

    steps: int = option(1600, "updates of the weights", low=1)
    budget: str = option("", "time the whole run may take, as 90s, 20m or 1h30m: chooses the steps; empty: any")
    start_from: str = option(
        "", "folder of a model in Hugging Face's layout to begin with: its shape, weights and tokenizer"
    )
    batch_size: int = option(8, "windows per micro-batch", low=1)
    accumulation: int = option(1, "micro-batches per update: their tokens count as one big batch", low=1)
    context: int = option(128, "tokens per window", low=2)
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
        200, "steps between looks at a fixed part of the held-out text; 0: only at the end", low=0
    )
    eval_tokens: int = option(16384, "tokens in that part, about; the end of the run reads all of it", low=1)
    eval_overlap: float = option(
        0.5, "share of each held-out window that was read before: context for the rest", low=0, below=1
    )
    sample_tokens: int = option(200, "longest sample written at the end; 0: none", low=0)
    sample_prompt: str = option("", "what the sample continues; empty: the first line of the held-out text")
    sample_temperature: float = option(
        0.7, "0: always the most probable token; 1: as the model has it", low=0
    )
    sample_top_p: float = option(
        0.95, "only the likeliest tokens that together have this probability", above=0, high=1
    )


@dataclass
class LearningRate:
    """The learning rate over the steps."""

    schedule: str = option("cosine", "how it falls after the warmup", choices=SCHEDULES)
    learning_rate: float = option(4e-3, "its peak", above=0)
    warmup_steps: int | None = option(None, "steps of a straight rise at the start; none: a 25th of all", low=0)
    min_ratio: float = option(0.05, "the last learning rate, as a share of the peak", low=0, high=1)
    decay_steps: int | None = option(None, "wsd alone: steps of the fall at the end; none: a fifth of all", low=0)

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


SECTIONS: dict[str, type] = {
    "model": LlamaConfig,
    "training": Training,
    "lr_schedule": LearningRate,
    "data": Data,
    "checkpointing": Checkpointing,
}


@dataclass
class Config:
    """A whole run. `model` holds LlamaConfig's fields; `llama(vocab_size)` makes the LlamaConfig of them."""

    model: dict[str, Any] = field(default_factory=lambda: {o.name: o.default for o in options("model")})
    training: Training = field(default_factory=Training)
    lr_schedule: LearningRate = field(default_factory=LearningRate)
    data: Data = field(default_factory=Data)
    checkpointing: Checkpointing = field(default_factory=Checkpointing)

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

    def sections(self) -> dict[str, dict[str, Any]]:
        """All options by section and name, as in a TOML file."""
        own = {name: dataclasses.asdict(getattr(self, name)) for name in SECTIONS if name != "model"}
        return {"model": dict(self.model)} | own

    def set(self, option: Option, value: Any) -> None:
        if option.section == "model":
            self.model[option.name] = value
        else:
            setattr(getattr(self, option.section), option.name, value)


class ConfigError(ValueError):
    """The configuration cannot be used; the message names every problem, its place, and what was wanted."""


@dataclass(frozen=True)
class Option:
    """One option: what `--help` shows and what a value must be."""

    section: str
    name: str
    type: Any
    default: Any
    limits: Mapping[str, Any]

    @property
    def full_name(self) -> str:
        return f"{self.section}.{self.name}"

    @property
    def kinds(self) -> tuple[type, ...]:
        """The Python types a value may have; NoneType among them where "none" is an answer."""
        parts = typing.get_args(self.type) if isinstance(self.type, types.UnionType) else (self.type,)
        kinds = tuple(typing.get_origin(part) or part for part in parts)
        return tuple(dict.fromkeys(kinds if self.default is not None else (*kinds, types.NoneType)))

    @property
    def help(self) -> str:
        return MODEL_HELP.get(self.name, "") if self.section == "model" else self.limits["help"]

    def wanted(self) -> str:
        """What a value must be, in words."""
        words = {
            int: "a whole number",
            float: "a number",
            bool: "true or false",
            str: "text",
            dict: "a table",
            list: "a list of whole numbers",
            types.NoneType: '"none"',
        }
        if choices := self.limits.get("choices"):
            return "one of " + ", ".join(choices)
        phrases = {"low": "at least", "above": "above", "high": "at most", "below": "below"}
        bounds = [f"{p} {self.limits[b]:g}" for b, p in phrases.items() if self.limits.get(b) is not None]
        return " or ".join(words[kind] for kind in self.kinds) + (
            " " + " and ".join(bounds) if bounds else ""
        )

    def check(self, value: Any) -> Any:
        """The value as this option's type. Raises ValueError where it is not one."""
        if types.NoneType in self.kinds and value in ("none", None):
            return None
        if float in self.kinds and type(value) is int:
            value = float(value) if abs(value) < 1 << 1000 else math.inf
        if type(value) not in self.kinds or (type(value) is float and not math.isfinite(value)):
            raise ValueError(self.wanted())
        get = self.limits.get
        if choices := get("choices"):
            fits = value in choices
        elif type(value) in (int, float):
            fits = (get("low") is None or value >= get("low")) and (
                get("above") is None or value > get("above")
            )
            fits = fits and (get("high") is None or value <= get("high"))
            fits = fits and (get("below") is None or value < get("below"))
        else:
            fits = True
        if not fits:
            raise ValueError(self.wanted())
        return value

    def parse(self, text: str) -> Any:
        """The value of a command line's word. Raises ValueError where it is not this option's type."""
        if str in self.kinds:
            return self.check(text)
        number = text.replace("_", "")
        for kind in (int, float):
            if kind in self.kinds and number == number.strip():
                try:
                    return self.check(kind(number))
                except ValueError:
                    pass
        try:
            return self.check(tomllib.loads(f"x = {text}")["x"])
        except tomllib.TOMLDecodeError:
            return self.check(text)


def options(section: str | None = None) -> list[Option]:
    """Every option, or those of one section, in order."""
    found = []
    for name, kind in SECTIONS.items() if section is None else [(section, SECTIONS[section])]:
        hints = typing.get_type_hints(kind)
        for f in dataclasses.fields(kind):
            default = MODEL.get(f.name, f.default) if name == "model" else f.default
            found.append(Option(name, f.name, hints[f.name], default, f.metadata))
    return found
