"""What a fine-tuning run needs, said before it starts: plan.py's buffers, of frozen weights in their storage format and
of adapters. It is compared with the peak of real runs by tests/test_finetune_plan.py.
"""

# O out, I in, r rank

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from entrenar import kernels
from entrenar.formats import FormatError, safetensors
from entrenar.llama import Llama, LlamaConfig
from entrenar.llama.packed import kind_of, storage_of
from entrenar.llama.pretrained import config_values, open_weights
from entrenar.nn import unfilled
from entrenar.quant import bitsandbytes
from entrenar.training.adapter import short, trial
from entrenar.training.advice import Changes, ladders, with_changes
from entrenar.training.display import size
from entrenar.training.finetune_options import FULL, FineTuning
from entrenar.training.finetune_rehearsal import FineRehearsal, held_bytes
from entrenar.training.heap import Heap
from entrenar.training.plan import (
    PROGRAM,
    TOKEN_BYTES,
    TOKENIZER,
    Arrays,
    Buffer,
    Plan,
    arrays_of,
    buffers_of,
    extrapolated,
    own_mapping,
    planned,
    preparing,
    with_advice,
)
from entrenar.training.program import measured_program
from entrenar.training.rehearsal import ADAPTERS, WEIGHTS, Rehearsal


@dataclass(frozen=True)
class Length:
    """What the rows make of a run: how many steps, how many tokens the longest row has, which share is trained."""

    steps: int
    tokens: int
    trained: float


def make_plan(config: FineTuning, shape: LlamaConfig, length: Length | None = None) -> Plan:
    """Plan a run of `config` on a base of this shape; without its length the rows are still to be read.

    Raises ConfigError for an adapter that cannot be.
    """
    config = config.fitting(shape.max_position_embeddings)
    t, tried, program = config.training, trial(config, shape), measured_program()
    share = length.trained if length else 1.0
    context = length.tokens if length else config.data.longest
    config = with_changes(config, {"data.max_length": context})
    arrays = predicted(config, shape, share)
    beside = [Buffer(PROGRAM, program, "measured here")]
    if length is None:
        beside.append(Buffer(TOKENIZER, TOKEN_BYTES * shape.vocab_size))
    kind = "float32" if config.adapter.kind == FULL else config.base.storage
    notes = {
        WEIGHTS: f"{shape.parameter_count():,} parameters, " + ("as stored" if kind == "auto" else kind),
        ADAPTERS: f"{tried.trained:,} parameters",
    }
    buffers = beside + buffers_of(arrays, shape, batch=t.batch_size, context=context, notes=notes)
    plan = planned(
        buffers,
        mapped=0,
        preparing=0 if length is None else preparing(buffers, None),
        shape=shape,
        batch=t.accumulation * t.batch_size,
        context=context,
        steps=length.steps if length else t.steps or 0,
        flops_per_token=flops(shape, tried.trained, context),
    )
    last = f"a smaller model: the weights of this one alone are {size(arrays.parts[WEIGHTS])}"
    return with_advice(plan, ways(config), lambda changes: predicted(with_changes(config, changes), shape, share).bytes,
                       arrays.bytes, fixed=0, last=last)  # fmt: skip


def flops(shape: LlamaConfig, trained: int, context: int) -> int:
    """Arithmetic of a token, forward and backward: of frozen weights there is no gradient, a third less."""
    whole = shape.flops_per_token(context)
    return whole if trained >= shape.parameter_count() else whole * 2 // 3 + 6 * trained


def predicted(config: FineTuning, shape: LlamaConfig, trained: float = 1.0) -> Arrays:
    """Rehearse the run, this share of whose tokens are trained."""
    return extrapolated(lambda shape: arrays_of(rehearsal(config, shape, trained)), shape)


def rehearsal(config: FineTuning, shape: LlamaConfig, trained: float) -> Rehearsal:
    """The run's arrays, still to be rehearsed."""
    t = config.training
    if config.adapter.kind == FULL:
        return Rehearsal(
            shape, t.batch_size, config.data.longest, t.accumulation, t.activation_checkpointing,
            kernels.get_num_threads(), Heap(own_mapping()),
        )  # fmt: skip
    tried = trial(config, shape)
    return FineRehearsal(
        shape, t.batch_size, config.data.longest, t.accumulation, t.activation_checkpointing,
        kernels.get_num_threads(), Heap(own_mapping()), tried.low_rank, tried.whole, held(config, shape), trained,
    )  # fmt: skip


def held(config: FineTuning, shape: LlamaConfig) -> dict[str, int]:
    """Bytes in memory of every frozen weight, by rehearsal.py's names."""
    folder, found = config.base.folder, {}
    values = config_values(folder)
    storage = storage_of(values, config.base.how, str(folder)) or "float32"
    four = bitsandbytes.kind_of(values["quantization_config"], str(folder)) if "quantization_config" in values else None
    with unfilled():
        own = dict(Llama(shape).named_parameters())
    with contextlib.ExitStack() as opened:
        files = open_weights(folder, opened)
        for name, tensor in own.items():
            if name not in files:
                raise FormatError(f"{folder}: {name} is missing")
            stored = safetensors.numpy_dtype(files[name].entries[name].dtype)
            kind = four if four and stored == np.uint8 else kind_of(name, np.empty(0, stored), storage)
            kind = None if storage == "float32" else kind
            path, _, attribute = name.rpartition(".")
            layer = short(path) + ("" if attribute == "weight" else f".{attribute}")
            found[layer] = held_bytes(tensor.shape, kind, double_quant=config.base.double_quant)
    return found


def ways(config: FineTuning) -> Iterator[list[Changes]]:
    """Ways to need less, each in steps from small to large; the ways that cost least come first."""
    t, d, a = config.training, config.data, config.adapter
    less: Changes = {"adapter.kind": "lora"} if a.kind == FULL else {}
    kinds = [kind for kind in ("bfloat16", "q8_0", "nf4") if kind != config.base.storage]
    stored: list[Changes] = []
    if config.base.storage in ("auto", "float32", "bfloat16"):
        stored = [*([less] if less else []), *({**less, "base.storage": kind} for kind in kinds)]
    yield stored
    yield from ladders(t, "data.max_length", d.longest)
    if stored:  # and the last steps of all of these together
        last = [ladder[-1] for ladder in ladders(t, "data.max_length", d.longest) if ladder]
        yield [stored[-1] | changes for changes in last[1:]]
