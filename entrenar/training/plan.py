"""What a run needs, said before it starts: every buffer, the peak, whether it fits, what would make it fit, the time.

    arrays      rehearsed by shape (rehearsal.py)
    program     interpreter, libraries and tokenizer: measured in this very process (program.py)
    token file  mapped into memory, page by page as windows are read; the kernel takes these pages back when it needs
                them, so they are part of the peak but not of what must fit

The whole is compared with the peak of real runs by tests/test_plan.py.
"""

# B batch, T time, N = B T tokens, V vocabulary

from __future__ import annotations

import math
import mmap
import os
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from entrenar import kernels
from entrenar.data import ByteTokenizer, Prepared, load_tokenizer
from entrenar.data.batches import FORGET_AFTER
from entrenar.kernels.memory import LARGEST
from entrenar.llama import LlamaConfig
from entrenar.llama.pretrained import read_config as read_shape
from entrenar.training import machine
from entrenar.training.advice import Changes, advice, ladders, with_changes
from entrenar.training.display import Display, clock, size
from entrenar.training.heap import FLOAT, Heap
from entrenar.training.option import ConfigError
from entrenar.training.options import Config
from entrenar.training.program import measured_program
from entrenar.training.rehearsal import (
    ADAPTERS,
    BACKWARD,
    BLOCK,
    FORWARD,
    GRADIENTS,
    HEAD,
    INPUTS,
    LAYERS,
    MOMENTS,
    PICTURE,
    ROPE,
    SCRATCH,
    WEIGHTS,
    Rehearsal,
    logits_floats,
)

PROGRAM, TOKENIZER, LOGITS, GAPS = "program and libraries", "tokenizer", "logits, a chunk", "gaps between arrays"
TOKENS, PREPARING, WINDOWS = "token file, mapped", "preparing the text", "order of windows"
ORDER = (WEIGHTS, ADAPTERS, GRADIENTS, MOMENTS, LAYERS, INPUTS, BLOCK, HEAD, LOGITS, FORWARD, BACKWARD, SCRATCH, ROPE,
         PICTURE, GAPS)  # fmt: skip

TOKEN_BYTES = 550  # of memory per token of a BPE: measured between 2,048 tokens and 32,000
READ_AROUND = 64 << 10  # what Linux maps around a page of a file that is touched
BAR = 24  # letters
PREPARING_BYTES = {"bytes": 60 * 10**6, "": 230 * 10**6}  # measured on 4 to 40 MB of text, 2,048 and 32,000 tokens
MOST_LAYERS = 128  # are rehearsed; each more adds as much as those before


@dataclass(frozen=True)
class Buffer:
    """A part of the peak: bytes, and a word on what they are made of."""

    name: str
    bytes: int
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """What a run needs.

    buffers      what is held at the fullest moment of training; together `training` bytes
    preparing    the most that is held before, while the text becomes tokens
    peak         the most memory the process will have held: the larger of the two
    reclaimable  of the peak, what the kernel can take back: pages of the token file
    limit        the most this process may hold here; `available` what it could now, beside what others hold
    fits         whether training, without what is reclaimable, stays below the limit
    advice       what would need less, each with what it needs, best first; empty where there is room
    """

    buffers: list[Buffer]
    training: int
    preparing: int
    reclaimable: int
    limit: int
    available: int
    advice: list[str]
    parameters: int
    tokens: int
    flops_per_token: int
    steps: int

    @property
    def peak(self) -> int:
        return max(self.training, self.preparing)

    @property
    def needed(self) -> int:
        """Bytes without which training cannot go on."""
        return self.training - self.reclaimable

    @property
    def fits(self) -> bool:
        return self.needed <= self.limit

    def refusal(self) -> str:
        """Why the run should not begin, and the way out, as one message."""
        ways = "".join(f"\n  {line}" for line in self.advice)
        return (
            f"this run would need {size(self.needed)} of memory, this machine or container has {size(self.limit)}; "
            f"what would need less:{ways}\n`entrenar plan` shows where it goes; --force starts all the same"
        )

    def warning(self) -> str:
        """Of a run that fits, but perhaps not beside what other programs hold now; empty where all is well."""
        if not self.fits or max(self.needed, self.preparing) <= self.available:
            return ""
        what = "this run will need" if self.needed > self.available else f"{PREPARING} may need"
        return (
            f"{what} {size(max(self.needed, self.preparing))} of memory, and {size(self.available)} are free now: "
            "end other programs, or it may be slowed down by swapping, or killed"
        )

    def accepted(self, display: Display | None, *, force: bool) -> dict[str, Any]:
        """The summary, where the run may begin; `display` is told the warning. Raises ConfigError where memory will not
        do, unless `force`."""
        if not self.fits and not force:
            raise ConfigError(self.refusal())
        if display is not None and self.warning():
            display.note(self.warning())
        return self.summary()

    def summary(self) -> dict[str, Any]:
        """For metrics.jsonl, where report.html finds it."""
        return {
            "peak": self.peak,
            "limit": self.limit,
            "buffers": [[buffer.name, buffer.bytes] for buffer in self.buffers],
        }


def planned(buffers: list[Buffer], *, mapped: int, preparing: int, shape: LlamaConfig, batch: int, context: int,
            steps: int, flops_per_token: int) -> Plan:  # fmt: skip
    """The plan of these buffers, `mapped` bytes of them a file's; without advice.

    preparing   the most that is held before training
    batch       rows of one update, of `context` tokens each
    """
    training = sum(buffer.bytes for buffer in buffers)
    return Plan(
        buffers=buffers,
        training=training,
        preparing=preparing,
        reclaimable=mapped,
        limit=machine.memory_limit(),
        available=machine.memory_available(),
        advice=[],
        parameters=shape.parameter_count(),
        tokens=max(1, steps) * batch * context,
        flops_per_token=flops_per_token,
        steps=steps,
    )


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


def preparing(buffers: list[Buffer], before: int | None) -> int:
    """The most that is held before training: `before`, of a run that has prepared nothing yet; else what this process
    has held before it came here, where that is more than all buffers."""
    held = machine.memory_peak()
    return before if before is not None else held if held > sum(buffer.bytes for buffer in buffers) else 0


# ---- what the arrays come to


@dataclass(frozen=True)
class Arrays:
    """The fullest moment of the float arrays: all bytes, and those of each kind (rehearsal.py's names)."""

    bytes: int
    parts: Counter[str] = field(default_factory=Counter)


def predicted(config: Config, shape: LlamaConfig) -> Arrays:
    """Rehearse the run."""
    return extrapolated(lambda shape: arrays_of(_rehearsal(config, shape)), shape)


def extrapolated(rehearse: Callable[[LlamaConfig], Arrays], shape: LlamaConfig) -> Arrays:
    """Rehearse with at most MOST_LAYERS layers; beyond that each layer adds what the last ones added."""
    layers = shape.num_hidden_layers
    if layers <= MOST_LAYERS:
        return rehearse(shape)
    more, fewer = (rehearse(replace(shape, num_hidden_layers=n)) for n in (MOST_LAYERS, MOST_LAYERS // 2))
    times, by = layers - MOST_LAYERS, MOST_LAYERS - MOST_LAYERS // 2

    def extended(high: int, low: int) -> int:
        return high + times * max(0, high - low) // by

    parts = Counter({name: extended(count, fewer.parts[name]) for name, count in more.parts.items()})
    return Arrays(max(extended(more.bytes, fewer.bytes), parts.total()), parts)


def arrays_of(rehearsal: Rehearsal) -> Arrays:
    """The fullest moment of a rehearsed run."""
    heap = rehearsal.run()
    return Arrays(heap.peak, +heap.at_peak)


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


def own_mapping() -> int:
    """From how many bytes on the C library maps an array on its own: what kernels.keep_freed_memory can make of it.

    glibc takes what it is told, before 2.35 at most 32 MiB; libraries without that switch are taken to map all that
    is large, and then freed arrays leave no gaps.
    """
    library, version = _libc()
    if library != "glibc":
        return 128 << 10
    return min(LARGEST) if version < (2, 35) else max(LARGEST)


def _libc() -> tuple[str, tuple[int, ...]]:
    name, version = platform.libc_ver()
    return name, tuple(int(part) for part in version.split(".") if part.isdecimal())


def buffers_of(arrays: Arrays, shape: LlamaConfig, *, batch: int, context: int,
               notes: Mapping[str, str]) -> list[Buffer]:  # fmt: skip
    """The parts of the fullest moment, in the order in which a reader thinks of them; they add up to all of it.

    notes   what to say of parts of which nothing follows from their size
    """
    parts, tokens, layers = Counter(arrays.parts), batch * context, shape.num_hidden_layers
    logits = min(parts[SCRATCH], FLOAT * logits_floats(tokens, shape.vocab_size))
    parts[SCRATCH] -= logits
    parts[LOGITS] = logits
    parts[GAPS] = arrays.bytes - parts.total()
    notes = {
        LAYERS: f"{layers} layers x {size(parts[LAYERS] // layers)}, for {batch} x {context:,} tokens",
        INPUTS: f"{layers} layers x {size(parts[INPUTS] // layers)}, for {batch} x {context:,} tokens",
        LOGITS: f"{logits // (FLOAT * shape.vocab_size):,} of {tokens:,} rows x {shape.vocab_size:,} at a time",
        GRADIENTS: "" if parts[GRADIENTS] else "none yet at that moment: they come as activations go",
        SCRATCH: f"{kernels.get_num_threads()} threads" if kernels.info().backend == "native" else "NumPy: about",
        GAPS: "that the C library leaves",
        PICTURE: "at the end, beyond all this",
        **notes,
    }
    return [Buffer(name, parts[name], notes.get(name, "")) for name in ORDER if parts[name] or name == GRADIENTS]


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


def with_advice(plan: Plan, ladders: Iterable[list[Changes]], arrays_with: Callable[[Changes], int], arrays: int, *,
                fixed: int, last: str) -> Plan:  # fmt: skip
    """The plan; where it exceeds this machine, or what is free of it now, with what would need less (see advice.py).

    arrays_with   bytes of the arrays after changes; `arrays` as it is
    """
    room = plan.limit if not plan.fits else plan.available
    if plan.needed <= room:
        return plan
    beside = plan.needed - arrays
    told = advice(ladders, lambda changes: beside + arrays_with(changes), needed=plan.needed, room=room, fixed=fixed,
                  last=last)  # fmt: skip
    return replace(plan, advice=told)


# ---- for people


def render(plan: Plan, *, peak_flops: float | None = None) -> str:
    """The plan as a table: a line and a bar for each buffer, the peak, whether it fits, the time at half the peak.

    peak_flops   of this machine; none: measured now
    """
    if peak_flops is None:
        peak_flops = machine.look().peak_flops
    rows = [(buffer.name, buffer.bytes, buffer.note) for buffer in plan.buffers]
    rows.append(("at the fullest moment", plan.training, ""))
    if plan.preparing:
        rows.append((PREPARING, plan.preparing, "at most, and before; not where it is prepared already"))
    whole = max(1, plan.peak, *(row[1] for row in rows))
    lines = [f"{name:<26} {size(count):>9} {_bar(count / whole):<{BAR}}  {note}".rstrip() for name, count, note in rows]
    flops = plan.flops_per_token * plan.tokens
    lines += [
        "",
        f"peak        {size(plan.peak)}; " + _verdict(plan),
        f"tokens      {plan.tokens:,} in " + (
            f"{plan.steps:,} steps of {plan.tokens // plan.steps:,}" if plan.steps else "a step, at most"),
        f"arithmetic  {flops / 1e12:,.{0 if flops > 2e12 else 3}f} TFLOP, "
        f"{plan.flops_per_token / 1e6:,.1f} MFLOP per token",
        f"time        {clock(2 * flops / peak_flops)} at half of the {peak_flops / 1e9:,.0f} GFLOP/s measured here",
    ]
    if plan.advice:
        lines += ["", "what would need less:", *(f"  {line}" for line in plan.advice)]
    return "\n".join(lines)


def _verdict(plan: Plan) -> str:
    if not plan.fits:
        return f"does not fit the {size(plan.limit)} of this machine or container"
    beside = f", but only {size(plan.available)} are free now" if plan.needed > plan.available else ""
    return f"fits the {size(plan.limit)} of this machine or container{beside}"


def _bar(share: float) -> str:
    """A bar of BAR letters at most, in eighths of a letter."""
    eighths = round(share * BAR * 8)
    return "\u2588" * (eighths // 8) + ("", *"\u258f\u258e\u258d\u258c\u258b\u258a\u2589")[eighths % 8]
