"""One measurement of memory_benchmarks.py, in a process of its own: real steps of fine-tuning, and the most it held.

    python -m entrenar.examples.memory_measure '{"model": "124m", "method": "qlora", "r": 16, ...}'

Weights are generated, one matrix at a time, and QLoRA's are quantized as they come: no float32 copy of the model is
ever there. Prints one line of JSON (`Measurement`); says on stderr what it is doing.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from entrenar import kernels
from entrenar.adapters import LoraConfig, adapt, count
from entrenar.data import Batch
from entrenar.examples.memory_arithmetic import TARGETS, Case, arithmetic
from entrenar.llama import Llama, LlamaConfig
from entrenar.llama.packed import LAYER, place
from entrenar.nn import unfilled
from entrenar.optim import AdamW, clip_scale, global_norm
from entrenar.quant import quantize
from entrenar.training import machine
from entrenar.training.trainer import accumulate_gradients

DRAWN = 1_000_003  # random numbers that all weights are made of; a prime: no row is another's copy
STD = 0.02
TINY = LlamaConfig(vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
                   max_position_embeddings=64)  # fmt: skip


@dataclass(frozen=True)
class Measurement:
    """What a process found.

    peak       the most resident bytes the process had, as the system counts them
    parts      what arithmetic says, by part; "program" alone is measured: what the process held before it began
    weights    bytes of the base, as its arrays have them
    trained    weights that are trained, of `total`
    losses     of each step, in nats
    seconds    of each step
    """

    case: Case
    peak: int
    parts: dict[str, int]
    weights: int
    trained: int
    total: int
    losses: list[float]
    seconds: list[float]

    @property
    def said(self) -> int:
        """The peak by arithmetic."""
        return sum(self.parts.values())

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Measurement:
        return cls(**values | {"case": Case(**values["case"])})


def say(words: str) -> None:
    print(f"  {words}", file=sys.stderr, flush=True)


# ---- weights


def generated(which: int, shape: tuple[int, ...], drawn: np.ndarray) -> np.ndarray:
    """A matrix from N(0, STD^2), its own stretch of one long draw, in one of two signs: cheap where drawing is slow."""
    stretch = np.roll(drawn, -which * 7919) * np.float32(STD if which % 2 else -STD)
    out = np.empty(math.prod(shape), np.float32)
    for at in range(0, out.size, DRAWN):
        part = out[at : at + DRAWN]
        part[:] = stretch[: part.size]
    return out.reshape(shape)


def base_model(shape: LlamaConfig, method: str, *, checkpointing: bool = False) -> Llama:
    """The model with generated weights; for QLoRA NF4 in the blocks, embedding and head bfloat16, all frozen."""
    with unfilled():
        model = Llama(shape, checkpointing=checkpointing)
    drawn = np.random.default_rng(0).standard_normal(DRAWN, np.float32)
    parameters = list(model.named_parameters())
    # Embedding and head first: no float32 matrix is larger, and the others are not there yet
    for i, (name, tensor) in sorted(enumerate(parameters), key=lambda item: bool(LAYER.fullmatch(item[1][0]))):
        if tensor.ndim == 1:
            tensor.data = np.ones(tensor.shape, np.float32)
        elif method == "qlora":
            kind = "nf4" if LAYER.fullmatch(name) else "bfloat16"
            place(model, name, quantize(generated(i, tensor.shape, drawn), kind))
        else:
            tensor.data = generated(i, tensor.shape, drawn)
    return model


def weight_bytes(model: Llama) -> int:
    return sum(array.nbytes for array in model.state_dict().values()) + sum(w.nbytes for _, w in model.named_packed())


# ---- steps


def steps(case: Case, shape: LlamaConfig, model: Llama) -> Iterator[float]:
    """Train on the same tokens again and again, without end; yields the loss of each step, in nats."""
    optimizer = AdamW(model.named_parameters(), lr=1e-3)
    rng = np.random.default_rng(1)
    ids = (rng.random((case.batch, case.context)) ** 3 * shape.vocab_size).astype(np.int64)
    targets = np.concatenate([ids[:, 1:], np.full_like(ids[:, :1], -100)], axis=1)
    while True:
        loss, _ = accumulate_gradients(model, [Batch(ids, targets)])
        optimizer.step(grad_scale=clip_scale(global_norm(model.parameters()), 1.0))
        optimizer.zero_grad()
        yield loss


def prepared(case: Case, shape: LlamaConfig) -> tuple[Llama, int]:
    """The model, ready to be trained, and the bytes of its base."""
    model = base_model(shape, case.method, checkpointing=case.checkpointing)
    bytes_ = weight_bytes(model)
    if case.method != "full":
        adapt(model, LoraConfig(r=case.r, lora_alpha=2 * case.r, target_modules=list(TARGETS)))
    return model, bytes_


def program(case: Case) -> int:
    """Bytes this process holds before it begins: interpreter, libraries, all code that a step goes through."""
    model, _ = prepared(case, TINY)
    small = dataclasses.replace(case, batch=1, context=16)
    for _ in itertools.islice(steps(small, TINY, model), 2):
        pass
    del model
    machine.give_back_memory()
    return machine.memory_used()


def measure(case: Case, count_of_steps: int) -> Measurement:
    before = program(case)
    say(f"{case.name}: making {case.shape.parameter_count():,} weights")
    started = time.perf_counter()
    model, bytes_ = prepared(case, case.shape)
    say(f"{case.name}: made in {time.perf_counter() - started:.0f} s")
    kernels.keep_freed_memory()  # as the training job does; not before: what making weights freed is given back
    losses, seconds = [], []
    training = steps(case, case.shape, model)
    for i in range(count_of_steps):
        started = time.perf_counter()
        losses.append(next(training))
        seconds.append(time.perf_counter() - started)
        say(f"{case.name}: step {i + 1} of {count_of_steps}, loss {losses[-1]:.4f}, {seconds[-1]:.1f} s")
    counted = count(model)
    parts = arithmetic(case, threads=kernels.get_num_threads(), program=before)
    return Measurement(case, machine.memory_peak(), parts, bytes_, counted.trainable, counted.total, losses, seconds)


def main() -> None:
    values = json.loads(sys.argv[1])
    count_of_steps = values.pop("steps")
    print(json.dumps(dataclasses.asdict(measure(Case(**values), count_of_steps))))


if __name__ == "__main__":
    main()
