"""What a run needs, said before it starts: every buffer, the peak, whether it fits, what would make it fit, the time.

Here is what every plan has: what it says, and how the arrays of a rehearsal (rehearsal.py) become its buffers. Those of
the two kinds of runs are made in pretrain_plan.py and finetune_plan.py.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from entrenar import kernels
from entrenar.kernels.memory import LARGEST
from entrenar.llama import LlamaConfig
from entrenar.training import machine
from entrenar.training.advice import Changes, advice
from entrenar.training.display import Display, clock, size
from entrenar.training.heap import FLOAT
from entrenar.training.option import ConfigError
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
PREPARING = "preparing the text"
ORDER = (WEIGHTS, ADAPTERS, GRADIENTS, MOMENTS, LAYERS, INPUTS, BLOCK, HEAD, LOGITS, FORWARD, BACKWARD, SCRATCH, ROPE,
         PICTURE, GAPS)  # fmt: skip

TOKEN_BYTES = 550  # of memory per token of a BPE: measured between 2,048 tokens and 32,000
BAR = 24  # letters
HUGE_PAGE = 2 << 20  # bytes
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
    # Where the C library keeps large arrays it has huge pages; of the first and the last, half is empty on average
    ends = HUGE_PAGE if heap.own_mapping > HUGE_PAGE else 0
    return Arrays(heap.peak + ends, +heap.at_peak)


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
        GAPS: "that the C library leaves, and huge pages at their ends",
        PICTURE: "at the end",
        **notes,
    }
    return [Buffer(name, parts[name], notes.get(name, "")) for name in ORDER if parts[name] or name == GRADIENTS]


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
