"""What training on a text needs, said before it starts.

    arrays      rehearsed by shape (rehearsal.py)
    program     interpreter, libraries and tokenizer: measured in this very process (program.py)
    token file  mapped into memory, page by page as windows are read; the kernel takes these pages back when it needs
                them, so they are part of the peak but not of what must fit

The whole is compared with the peak of real runs by tests/test_plan.py.
"""

from __future__ import annotations

import math
import mmap
import os
from typing import Any

import numpy as np

from entrenar import kernels
from entrenar.data import ByteTokenizer, Prepared, load_tokenizer
from entrenar.data.batches import FORGET_AFTER
from entrenar.llama import LlamaConfig
from entrenar.llama.pretrained import read_config as read_shape
from entrenar.training.advice import ladders, with_changes
from entrenar.training.display import size
from entrenar.training.heap import FLOAT, Heap
from entrenar.training.options import Config
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
from entrenar.training.rehearsal import WEIGHTS, Rehearsal

TOKENS, WINDOWS = "token file, mapped", "order of windows"
READ_AROUND = 64 << 10  # what Linux maps around a page of a file that is touched
PREPARING_BYTES = {"bytes": 60 * 10**6, "": 230 * 10**6}  # measured on 4 to 40 MB of text, 2,048 and 32,000 tokens


def make_plan(config: Config, *, shape: LlamaConfig | None = None, data: Prepared | None = None) -> Plan:
    """Plan a run of `config`.

    shape   the model's; none: by the configuration, with the vocabulary its tokenizer will have
    data    what will be trained on, prepared already; none: the text is still to be prepared, and its size unknown
    Raises ConfigError for a shape that cannot be, TokenizerError for a tokenizer that cannot be read, FormatError for
    a model to start from that cannot be read.
    """
    shape = shape or expected_shape(config)
    program = measured_program()
    beside = [Buffer(PROGRAM, program, "measured here")]
    if data is None:
        beside.append(Buffer(TOKENIZER, tokenizer_bytes(config, shape)))
    mapped = mapped_tokens(config, data)
    arrays = predicted(config, shape)
    t = config.training
    notes = {WEIGHTS: f"{shape.parameter_count():,} parameters"}
    buffers = beside + buffers_of(arrays, shape, batch=t.batch_size, context=t.context, notes=notes)
    if order := window_order(config, data):
        buffers.append(Buffer(WINDOWS, order, "of an epoch, shuffled"))
    if mapped:
        buffers.append(Buffer(TOKENS, mapped, "the system takes it back when it needs it"))
    t = config.training
    plan = planned(
        buffers,
        mapped=mapped,
        preparing=preparing(buffers, program + preparing_bytes(config) if data is None else None),
        shape=shape,
        batch=t.accumulation * t.batch_size,
        context=t.context,
        steps=t.steps,
        flops_per_token=shape.flops_per_token(t.context),
    )
    fixed = 4 * FLOAT * shape.parameter_count()
    last = f"a smaller [model]: weights, gradients and moments of this one alone are {size(fixed)}"
    ways = ladders(t, "training.context", t.context)
    return with_advice(plan, ways, lambda changes: predicted(with_changes(config, changes), shape).bytes,
                       arrays.bytes, fixed=fixed, last=last)  # fmt: skip


def predicted(config: Config, shape: LlamaConfig) -> Arrays:
    """Rehearse the run."""
    return extrapolated(lambda shape: arrays_of(_rehearsal(config, shape)), shape)


def _rehearsal(config: Config, shape: LlamaConfig) -> Rehearsal:
    t = config.training
    return Rehearsal(
        shape,
        batch=t.batch_size,
        context=t.context,
        micro_batches=t.accumulation,
        checkpointing=t.activation_checkpointing,
        threads=kernels.get_num_threads(),
        heap=Heap(own_mapping()),
    )


# ---- what there is beside the arrays


def expected_shape(config: Config) -> LlamaConfig:
    """The model's shape before there is a tokenizer; of a BPE the most tokens it may have."""
    if config.training.start_from:
        return read_shape(os.path.expanduser(config.training.start_from))
    return config.llama(config.model["vocab_size"] or _expected_vocabulary(config))


def _expected_vocabulary(config: Config) -> int:
    name = config.data.tokenizer
    if name == "bytes":
        return ByteTokenizer.vocab_size
    return config.data.vocab_size if name == "bpe" else load_tokenizer(os.path.expanduser(name)).vocab_size


def tokenizer_bytes(config: Config, shape: LlamaConfig) -> int:
    return 0 if config.data.tokenizer == "bytes" else TOKEN_BYTES * shape.vocab_size


def mapped_tokens(config: Config, data: Prepared | None) -> int:
    """Bytes of the token files in memory at most: of each what FORGET_AFTER windows bring in, or all that the run will
    have read (where windows fall evenly, so many pieces stay unread are (1 - 1 / pieces)^(windows x pieces in each); of
    held-out text nothing stays unread). 0 where the text is not prepared yet.
    """
    if data is None or not _is_mapped(data.train):
        return 0
    t = config.training
    windows = t.steps * t.accumulation * t.batch_size
    pieces = max(1.0, data.train.nbytes / READ_AROUND)
    touched = 1 + t.context * data.train.itemsize / READ_AROUND
    read = round(data.train.nbytes * -math.expm1(-windows * touched / pieces))
    most = round(FORGET_AFTER * touched * READ_AROUND)
    return min(read, most) + min(data.held_out.nbytes, most)


def window_order(config: Config, data: Prepared | None) -> int:
    """Bytes of the shuffled starts of an epoch's windows, and of the unshuffled ones while they are drawn."""
    return 0 if data is None else 2 * 8 * (len(data.train) // config.training.context)


def _is_mapped(array: np.ndarray) -> bool:
    """Whether its memory is a file's."""
    base: Any = array
    while base is not None and not isinstance(base, mmap.mmap):
        base = base.obj if isinstance(base, memoryview) else getattr(base, "base", None)
    return base is not None


def preparing_bytes(config: Config) -> int:
    """The most that is held beside the program while the text becomes tokens: bounded for a text of any size."""
    return PREPARING_BYTES.get(config.data.tokenizer, PREPARING_BYTES[""])
