"""The options of a run of `entrenar finetune`, each written in one place: the field of a dataclass below.

The defaults are what those who fine-tune expect. LoRA on all seven projections of a block, as QLoRA's authors found it
necessary to reach full fine-tuning (Dettmers et al. 2023), of rank 16 with alpha = 2 r; a learning rate of 2e-4, ten
times that of full fine-tuning, with a short warmup; no weight decay, no dropout (which costs a copy of every input).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from entrenar.llama.pretrained import read_config as read_shape
from entrenar.training.option import Places, Sections, option
from entrenar.training.options import Checkpointing, LearningRate, Loop, loop_contradictions

STORAGES = ("auto", "float32", "bfloat16", "q8_0", "nf4", "fp4")
FULL = "full"  # the kind of adapter that is none: all weights are trained
LONGEST = 512  # tokens of a row, where the model has positions for more
PEAK = {"lora": 2e-4, "dora": 2e-4, "full": 2e-5}  # learning rates by kind of adapter


@dataclass
class Base:
    """The model to begin with, and how its weights are held while others are trained."""

    model: str = option("", "folder of a LLaMA-family model in Hugging Face's layout: the one option without a default")
    storage: str = option(
        "auto",
        "how the frozen weights are held: auto: as the folder stores them; nf4, fp4: 4 bits (QLoRA); q8_0: 8 bits",
        choices=STORAGES,
    )
    double_quant: bool = option(True, "nf4 and fp4: hold the blocks' scales in 8 bits too")
    compute: str = option(
        "float32",
        "products with the frozen weights; bfloat16: both operands rounded, twice as fast where doctor says so",
        choices=("float32", "bfloat16"),  # int16 is for products whose gradients nobody wants
    )

    @property
    def folder(self) -> Path:
        """Where it is; of a run of `entrenar train`, its newest checkpoint."""
        named = Path(os.path.expanduser(self.model))
        newest = named / "checkpoint"
        return newest.resolve() if not (named / "config.json").exists() and newest.is_dir() else named

    @property
    def how(self) -> str:
        """The storage as `Llama.from_pretrained` calls it."""
        return "stored" if self.storage == "auto" else self.storage


@dataclass
class Adapter:
    """What is trained. Names as in PEFT's LoraConfig, which the checkpoint has."""

    kind: str = option("lora", "dora: also the length of each row; full: all weights", choices=("lora", "dora", "full"))
    r: int = option(16, "rank: rows of A, columns of B", low=1)
    alpha: float = option(32.0, "W + alpha/r B A", above=0)
    dropout: float = option(0.0, "share of what goes into A that is zeroed in training", low=0, below=1)
    targets: list[str] = option(
        ["all-linear"], "projections that get one: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
    )
    exclude: list[str] = option([], "of those, modules that get none, by name or end of name")
    layers: list[int] = option([], "numbers of the blocks that get them, from 0; empty: all")
    rslora: bool = option(False, "alpha/sqrt(r) instead of alpha/r")
    rank_pattern: dict[str, int] = option({}, "other ranks: a table of modules' names (or ends of them) and r")
    alpha_pattern: dict[str, float] = option({}, "other alphas: the same")
    modules_to_save: list[str] = option([], "modules trained whole, beside: embed_tokens, lm_head")
    init: str = option("kaiming", "first A; B is zero", choices=("kaiming", "gaussian"))


@dataclass
class FineTraining(Loop):
    """How long, in what batches, and how the weights move."""

    steps: int | None = option(None, "updates of the weights; none: as many as `epochs` need", low=1)  # type: ignore[assignment]
    batch_size: int = option(4, "rows of data.max_length tokens per micro-batch", low=1)
    accumulation: int = option(2, "micro-batches per update: their trained tokens count as one big batch", low=1)
    beta2: float = option(0.999, "AdamW: memory of its square", low=0, below=1)
    weight_decay: float = option(0.0, "AdamW: decoupled decay of the matrices, none on norms", low=0)
    report_every: int = option(5, "steps between lines when there is no terminal to draw on", low=1)
    eval_every: int = option(50, "steps between looks at a part of what is held out; 0: only before and after", low=0)
    sample_tokens: int = option(200, "longest answer written before and after; 0: none", low=0)
    sample_prompt: str = option("", "what is asked before and after; empty: what held-out conversations ask")
    sample_temperature: float = option(0.0, "0: always the most probable token; 1: as the model has it", low=0)
    epochs: float = option(3.0, "times that all rows are seen, where steps does not say how long", above=0)
    samples: int = option(2, "how many held-out conversations are answered before and after", low=0)


@dataclass
class FineLearningRate(LearningRate):
    """The learning rate over the steps."""

    learning_rate: float | None = option(  # type: ignore[assignment]
        None, "its peak; none: 2e-4 for adapters, 2e-5 for full fine-tuning", above=0
    )

    @property
    def peak(self) -> float:
        """Of a run's settled options."""
        assert self.learning_rate is not None
        return self.learning_rate


@dataclass
class FineData:
    """The conversations, and how they become tokens."""

    source: str = option(
        "", "a file .jsonl or .json, a folder with train.jsonl, a glob pattern, or '-': an option without a default"
    )
    held_out: float = option(
        0.05, "share of the rows never trained on, where the source holds none out", above=0, below=1
    )
    train_on: str = option(
        "assistant",
        "whose words are learned; completion: the last answer alone",
        choices=("assistant", "completion", "all"),
    )
    max_length: int | None = option(
        None, "tokens of a row at most; none: 512, or as many as the model has positions for", low=2
    )
    packing: bool = option(True, "several conversations in a row, none of which sees another")
    keys: dict[str, str] = option({}, "what the rows call text, prompt, completion, messages, where not so")
    template: str = option("", "file of a chat template; empty: the model's own, or entrenar's where it has none")
    skip_bad: bool = option(False, "leave out rows that cannot be read, instead of an error")

    @property
    def longest(self) -> int:
        """max_length of a run's settled options."""
        assert self.max_length is not None
        return self.max_length


@dataclass
class FineTuning(Sections):
    """A whole fine-tuning run."""

    SECTIONS: ClassVar[Mapping[str, type]] = {
        "base": Base,
        "adapter": Adapter,
        "training": FineTraining,
        "lr_schedule": FineLearningRate,
        "data": FineData,
        "checkpointing": Checkpointing,
    }
    VERB: ClassVar[str] = "finetune"

    base: Base = field(default_factory=Base)
    adapter: Adapter = field(default_factory=Adapter)
    training: FineTraining = field(default_factory=FineTraining)
    lr_schedule: FineLearningRate = field(default_factory=FineLearningRate)
    data: FineData = field(default_factory=FineData)
    checkpointing: Checkpointing = field(default_factory=Checkpointing)

    @property
    def settled(self) -> FineTuning:
        """With what goes with the kind of adapter and with the base, where nothing is given: learning rate, max_length.

        Raises FormatError where there is no base that can be read.
        """
        lr = self.lr_schedule
        rate = PEAK[self.adapter.kind] if lr.learning_rate is None else lr.learning_rate
        config = replace(self, lr_schedule=replace(lr, learning_rate=rate))
        return config if self.data.max_length else config.fitting(read_shape(self.base.folder).max_position_embeddings)

    def fitting(self, positions: int) -> FineTuning:
        """With rows that a model with so many positions takes, where their length is not given."""
        length = self.data.max_length or min(LONGEST, positions)
        return replace(self, data=replace(self.data, max_length=length))

    def contradictions(self, at: Places) -> list[str]:
        full, problems = self.adapter.kind == FULL, []
        if not self.base.model:
            problems.append(f"{at('base.model')}: wanted the folder of a model in Hugging Face's layout")
        if not self.data.source:
            problems.append(f"{at('data.source')}: wanted a file of JSON lines, a conversation in each")
        if full and self.base.storage not in ("auto", "float32"):
            problems.append(
                f"{at('base.storage')}: weights that are trained are float32; wanted auto or float32 with "
                "adapter.kind = full, or adapter.kind = lora"
            )
        if self.base.compute != "float32" and (full or self.base.storage == "float32"):
            problems.append(
                f"{at('base.compute')}: {self.base.compute} is for frozen weights in a storage format; wanted "
                "another base.storage than float32 and another adapter.kind than full, or base.compute = float32"
            )
        if full and self.adapter.modules_to_save:
            problems.append(f"{at('adapter.modules_to_save')}: adapter.kind = full trains all modules; leave it empty")
        return problems + loop_contradictions(self.training, self.lr_schedule, at)
