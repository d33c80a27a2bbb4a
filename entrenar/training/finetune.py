"""A run of `entrenar finetune`, up to its first step: base, plan, examples, adapter. (The life of a run: job.py.)

    plan(config)         what it would need
    begin(config, ...)   a new run
    go_on(config, ...)   one that was left at a checkpoint

A checkpoint holds what is trained, and not the base: a run that goes on finds that where its configuration says, and
refuses another one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from entrenar import kernels, random
from entrenar.adapters import adapt, load_adapter, write_adapter
from entrenar.data import CorpusError, Tokenizer, load_tokenizer
from entrenar.data.chat import ChatData, Keys, keep_template, load_template, read_examples
from entrenar.files import new_file
from entrenar.llama import Llama, LlamaConfig
from entrenar.llama.pretrained import read_config as read_shape
from entrenar.training.adapter import lora_config, trial
from entrenar.training.base import differences, identity_of
from entrenar.training.chat_task import ChatTask, length_of, name_of
from entrenar.training.checkpoint import Saved, Write, model_files
from entrenar.training.display import Display, size
from entrenar.training.finetune_options import FULL, FineTuning
from entrenar.training.finetune_plan import make_plan
from entrenar.training.option import ConfigError
from entrenar.training.plan import Plan
from entrenar.training.pretrain import DATA


def plan(config: FineTuning) -> Plan:
    """What such a run would need."""
    config = config.settled
    return make_plan(config, base_shape(config))


def begin(config: FineTuning, run: Path, display: Display, *, force: bool) -> tuple[ChatTask, dict[str, Any]]:
    """What a new run trains, and its plan. Makes no folder but DATA."""
    shape = base_shape(config)
    trial(config, shape)  # what an adapter cannot be, is said before anything takes its time
    make_plan(config, shape).accepted(None, force=force)
    with contextlib.ExitStack() as failed:
        failed.callback(forget_standard_input, run)
        data = examples(config, run, display)
        planned = make_plan(config, shape, length_of(config, data)).accepted(display, force=force)
        failed.pop_all()
    display.doing("reading the model")
    return task(config, data, new_model(config)), planned


def go_on(config: FineTuning, run: Path, saved: Saved, display: Display, *,
          force: bool) -> tuple[ChatTask, dict[str, Any]]:  # fmt: skip
    """The same of a run that goes on from a checkpoint. Raises ConfigError for another base, CorpusError for other
    data."""
    config = the_same_base(config, saved)
    data = examples(config, run, display)
    if data.identity != saved.state["data"]["identity"]:
        raise CorpusError(
            f"data.source: {config.data.source!r} no longer gives the tokens this run was trained on (its rows, the "
            "chat template or the tokenizer have changed): a run cannot go on with other data; put it back, or begin "
            "another run"
        )
    shape = base_shape(config)
    planned = make_plan(config, shape, length_of(config, data)).accepted(display, force=force)
    kernels.keep_freed_memory()
    display.doing("reading the model")
    if config.adapter.kind == FULL:
        model = Llama.from_pretrained(saved.folder, checkpointing=config.training.activation_checkpointing)
    else:
        model = base_model(config)
        load_adapter(model, saved.folder, trainable=True)
    return task(config, data, model), planned


def task(config: FineTuning, data: ChatData, model: Llama) -> ChatTask:
    """Model and data together."""
    folder = config.base.folder
    base = {"folder": str(folder.absolute()), "identity": identity_of(folder)}
    return ChatTask(config, data, model, write=files(config, model, data.tokenizer), base=base,
                    lines=list(about(config, model)))  # fmt: skip


def files(config: FineTuning, model: Llama, tokenizer: Tokenizer) -> Write:
    """What writes a checkpoint's own files: an adapter as PEFT has it, or a whole model; the tokenizer beside."""
    if config.adapter.kind == FULL:
        return model_files(model, tokenizer)

    def write(folder: Path) -> None:
        write_adapter(folder, model, "default")
        tokenizer.save(folder)

    return write


def about(config: FineTuning, model: Llama) -> Iterator[str]:
    """What the lines above the first step say of base and adapter."""
    shape, a = model.config, config.adapter
    weights: list[Any] = [w for _, w in model.named_packed()] + [tensor.data for _, tensor in model._named_tensors()]
    held = sum({id(weight): weight.nbytes for weight in weights}.values())
    stored = f", held as {config.base.storage}" if config.base.storage != "auto" else ""
    if config.base.compute != "float32":
        slow = "" if kernels.info().bfloat16 else ", no faster on this processor"
        stored += f", products in {config.base.compute}{slow}"
    yield (
        f"base     {name_of(config.base.model)}: {shape.parameter_count():,} parameters in {shape.num_hidden_layers} "
        f"layers of {shape.hidden_size}{stored}, {size(held)}"
    )
    trained = sum(p.size for p in model.parameters())
    share = f"{trained:,} parameters trained, {trained / shape.parameter_count():.2%}"
    if a.kind == FULL:
        yield f"trained  {share}"
    else:
        name = {"lora": "LoRA", "dora": "DoRA"}[a.kind]
        yield f"adapter  {name} of rank {a.r}, alpha {a.alpha:g}, on {', '.join(a.targets)}: {share}"


# -- what a run is made of


def base_shape(config: FineTuning) -> LlamaConfig:
    """The base's shape. Raises FormatError where there is no model that can be read, ConfigError where its context is
    shorter than the rows."""
    folder = config.base.folder
    shape = read_shape(folder, trainable=config.adapter.kind == FULL)
    if config.data.longest > shape.max_position_embeddings:
        raise ConfigError(
            f"data.max_length = {config.data.longest}: the model in {folder} has positions for "
            f"{shape.max_position_embeddings}"
        )
    return shape


def new_model(config: FineTuning) -> Llama:
    """The base before the first step, with what is trained beside it."""
    kernels.keep_freed_memory()
    random.seed(config.training.seed)
    model = base_model(config)
    if config.adapter.kind != FULL:
        adapt(model, lora_config(config))
    return model


def base_model(config: FineTuning) -> Llama:
    """The base, its weights held as base.storage says; all trained where that is what is asked for."""
    storage = None if config.adapter.kind == FULL else config.base.how
    return Llama.from_pretrained(config.base.folder, storage=storage, double_quant=config.base.double_quant,
                                 compute=config.base.compute if storage else "float32",
                                 checkpointing=config.training.activation_checkpointing)  # fmt: skip


def examples(config: FineTuning, run: Path, display: Display) -> ChatData:
    """The rows as tokens, by the base's tokenizer and chat template.

    Raises CorpusError, TokenizerError, TemplateError; ConfigError where tokenizer and model do not belong together, or
    nothing can be held out.
    """
    d, folder = config.data, config.base.folder
    tokenizer = load_tokenizer(folder)
    shape = read_shape(folder)
    if tokenizer.vocab_size > shape.vocab_size:
        raise ConfigError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size:,} tokens, the model only {shape.vocab_size:,}: they "
            "do not belong together"
        )
    template = load_template(tokenizer, os.path.expanduser(d.template) or None)
    keep_template(tokenizer, template)  # whoever loads a checkpoint writes conversations the same way
    display.doing(f"reading {d.source}")
    data = read_examples(
        str(standard_input(run / DATA)) if d.source == "-" else d.source,
        tokenizer,
        template=template,
        train_on=d.train_on,
        max_length=d.longest + 1,
        held_out=d.held_out,
        seed=config.training.seed,
        keys=Keys(**d.keys),
        skip_bad=d.skip_bad,
    )
    if not len(data.held_out):
        raise ConfigError(
            f"data.source: {d.source!r}: nothing can be held out of {data.facts.train_examples:,} rows (equal ones "
            "stay together): give at least two that differ, or a folder with train.jsonl and valid.jsonl"
        )
    for note in data.facts.notes:
        display.note(note)
    return data


def standard_input(folder: Path) -> Path:
    """What came on standard input, kept in the run's folder: nobody has to pipe it in again."""
    kept = folder / "rows.jsonl"
    if not kept.exists():
        with new_file(kept) as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
    return kept


def forget_standard_input(run: Path) -> None:
    """Of a run that cannot begin nothing is left, so that the same command can be given again."""
    if not (run / "config.toml").exists():  # else it was killed before its first checkpoint, and begins again
        shutil.rmtree(run / DATA, ignore_errors=True)
        with contextlib.suppress(OSError):
            run.rmdir()


def the_same_base(config: FineTuning, saved: Saved) -> FineTuning:
    """The configuration, with the base's folder where it was found: as it is named, or where it was when the run began.

    Raises ConfigError where it is gone, or another model.
    """
    kept = saved.state["base"]
    named = config.base.folder
    folder = named if named.is_dir() else Path(kept["folder"])
    if not folder.is_dir():
        raise ConfigError(
            f"base.model: {named}: there is no such folder; this run trains the model that was in {kept['folder']}: "
            "`--base.model FOLDER` says where it is now"
        )
    if different := differences(kept["identity"], identity_of(folder)):
        raise ConfigError(
            f"base.model: {folder} is not the model this run began from ({', '.join(different[:5])}): an adapter "
            "belongs to its base; `--base.model FOLDER` says where that one is"
        )
    return replace(config, base=replace(config.base, model=str(folder)))
