"""A run of `entrenar train`, up to its first step: plan, text, model. (The life of a run: job.py.)

    plan(config)         what it would need
    begin(config, ...)   a new run
    go_on(config, ...)   one that was left at a checkpoint
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from entrenar import kernels, random
from entrenar.data import CorpusError, Prepared, load_prepared, prepare
from entrenar.llama import Llama, LlamaConfig
from entrenar.llama.pretrained import read_config as read_shape
from entrenar.training.checkpoint import Saved, load_checkpoint
from entrenar.training.display import Display
from entrenar.training.option import ConfigError
from entrenar.training.options import Config
from entrenar.training.plan import Plan
from entrenar.training.pretrain_plan import make_plan
from entrenar.training.text_task import TextTask

DATA = "data"  # in the run's folder: prepared tokens, where there is no cache


def plan(config: Config) -> Plan:
    """What such a run would need."""
    return make_plan(config)


def begin(config: Config, run: Path, display: Display, *, force: bool) -> tuple[TextTask, dict[str, Any]]:
    """What a new run trains, and its plan. Makes no folder but DATA."""
    shape = pretrained_shape(config)
    must_fit(config, shape, None, display, force=force)  # before the text takes its time
    data = prepared(config, run, display)
    shape = shape or config.llama(data.tokenizer.vocab_size, data.tokenizer.end_id)
    planned = must_fit(config, shape, data, display, force=force)
    TextTask.check(config, data)  # before the model takes its time
    return TextTask(config, data, new_model(config, shape)), planned


def go_on(config: Config, run: Path, saved: Saved, display: Display, *,
          force: bool) -> tuple[TextTask, dict[str, Any]]:  # fmt: skip
    """The same of a run that goes on from a checkpoint."""
    checkpoint = load_checkpoint(saved.folder, check=False)  # whoever chose it has checked it
    data = the_same_data(config, run, saved, display)
    planned = must_fit(config, checkpoint.config, data, display, force=force)
    kernels.keep_freed_memory()
    return TextTask(config, data, checkpoint.model(checkpointing=config.training.activation_checkpointing)), planned


def new_model(config: Config, shape: LlamaConfig) -> Llama:
    """The model before its first step: of this shape, or the one that training.start_from names."""
    kernels.keep_freed_memory()
    random.seed(config.training.seed)
    recompute = config.training.activation_checkpointing
    if config.training.start_from:
        return Llama.from_pretrained(folder_of(config), checkpointing=recompute)
    return Llama(shape, checkpointing=recompute)


def folder_of(config: Config) -> Path:
    return Path(os.path.expanduser(config.training.start_from))


def pretrained_shape(config: Config) -> LlamaConfig | None:
    """The shape of the model that training.start_from names; None where the run starts from nothing.

    Raises FormatError where there is none that can be read, ConfigError where its context is shorter than the run's.
    """
    if not config.training.start_from:
        return None
    folder = folder_of(config)
    shape = read_shape(folder, trainable=True)
    if config.training.context > shape.max_position_embeddings:
        raise ConfigError(
            f"training.context = {config.training.context}: the model in {folder} has positions for "
            f"{shape.max_position_embeddings}"
        )
    return shape


def prepared(config: Config, run: Path, display: Display) -> Prepared:
    """The text as tokens; with training.start_from by that model's own tokenizer, unless another one is named."""
    d = config.data
    own = d.tokenizer == Config().data.tokenizer and config.training.start_from
    try:
        data = prepare(
            d.source,
            tokenizer=str(folder_of(config)) if own else d.tokenizer,
            vocab_size=d.vocab_size,
            held_out=d.held_out,
            cache=d.cache,
            skip_bad=d.skip_bad,
            into=run / DATA,
            say=display.doing,
        )
    except OSError as error:
        why = f"{error.strerror or error}, while the text was prepared; what is done is kept: make room and go on"
        place = error.filename if error.filename is not None else f"data.cache = {d.cache!r}"
        raise OSError(error.errno, f"{why}, or name another folder with --data.cache", place) from error
    shape = pretrained_shape(config)
    if shape and data.tokenizer.vocab_size > shape.vocab_size:
        raise ConfigError(
            f"data.tokenizer has {data.tokenizer.vocab_size:,} tokens, the model in {config.training.start_from} only "
            f"{shape.vocab_size:,}: they do not belong together"
        )
    return data


def the_same_data(config: Config, run: Path, saved: Saved, display: Display) -> Prepared:
    """The tokens the run was trained on: as they were kept, else prepared again and compared.

    Raises CorpusError where the text has changed since and the tokens are gone.
    """
    kept = saved.state["data"]
    with contextlib.suppress(CorpusError, OSError):
        data = load_prepared(Path(kept["folder"]))
        if data.identity == kept["identity"]:
            return data
    try:
        data = prepared(config, run, display)
    except CorpusError as error:
        raise CorpusError(f"{error}; and the tokens that were prepared of it, in {kept['folder']}, are gone") from None
    if data.identity != kept["identity"]:
        raise CorpusError(
            f"data.source: {config.data.source!r} is no longer the text this run was trained on (its files, or the "
            f"tokenizer, have changed, and the prepared tokens in {kept['folder']} are gone): a run cannot go on with "
            f"another text; `entrenar train --training.start_from {saved.folder}` begins one from these weights"
        )
    return data


def must_fit(config: Config, shape: LlamaConfig | None, data: Prepared | None, display: Display, *,
             force: bool) -> dict[str, Any]:  # fmt: skip
    """The plan's summary. Raises ConfigError where it exceeds this machine's memory, unless `force`."""
    return make_plan(config, shape=shape, data=data).accepted(display if data else None, force=force)
