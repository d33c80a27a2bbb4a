"""A step of fine-tuning: LoRA and QLoRA by entrenar, by PEFT with bitsandbytes, and full fine-tuning beside them.

Same base, bit for bit, same adapter, same tokens, same optimizer. Losses of the first steps must agree, or nothing is
timed. The base is a folder of bfloat16, as people download it: entrenar's LoRA holds it as it is stored, PEFT's as
float32, in which both compute; for QLoRA both quantize it while they load it. PEFT's QLoRA runs twice, its 4-bit layers
computing in float32 and in bfloat16; the faster of the two counts.

Where processor and entrenar can multiply in bfloat16, that stands against PEFT's bfloat16, in rows of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.driver import Agreement, Bench, Times
from benchmarks.groups import bases, training
from benchmarks.protocol import Case
from benchmarks.report import Row, Target
from benchmarks.spread import Spread

ADAMW: dict[str, Any] = dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
FIRST = 2  # steps whose losses are compared: the second follows from the gradients of the first
TOLERANCE = 2e-4  # nats, of losses in float32; half a unit of the last of bfloat16's digits at a loss of 10 is 0.02:
TOLERANCE_BFLOAT16 = 0.05  # nats
FEW_ROUNDS = 3
# FLOPs for each weight and token: forward 2, backward 2 for the input's gradient and 2 for the weight's own.
BOUND = (2 + 2 + 2) / (2 + 2)

FULL, LORA, QLORA, LORA_FLOAT32 = "entrenar-full", "entrenar-lora", "entrenar-qlora", "entrenar-lora-float32"
LORA_BFLOAT16, QLORA_BFLOAT16 = "entrenar-lora-bfloat16", "entrenar-qlora-bfloat16"
PEFT, PEFT_LORA_BFLOAT16 = "torch-lora", "torch-lora-bfloat16"
PEFT_FLOAT32, PEFT_BFLOAT16 = "torch-qlora-float32", "torch-qlora-bfloat16"
NAMES = {
    LORA_FLOAT32: "ours with a base of float32",
    PEFT: "PEFT",
    PEFT_LORA_BFLOAT16: "PEFT, all of it in bfloat16",
    PEFT_FLOAT32: "PEFT, computing in float32",
    PEFT_BFLOAT16: "PEFT, computing in bfloat16",
}


# -- contenders


def with_entrenar(
    method: str, model: str, batch: int, context: int, base: str, adapter: str, *, compute: str = ""
) -> Case:
    from entrenar.adapters import load_adapter
    from entrenar.llama import Llama

    how: dict[str, Any] = {"compute": compute} if compute else {}
    llama = Llama.from_pretrained(base, storage="nf4" if method == QLORA else "stored", **how)
    if method in (LORA_FLOAT32, FULL):
        bases.to_float32(llama)
    if method == FULL:
        llama = bases.trainable(llama)
    else:
        load_adapter(llama, adapter, trainable=True)
    return training.case(training.entrenar_step(llama, ADAMW, batches(model, batch, context)), FIRST)


def with_peft(
    compute: str, model: str, batch: int, context: int, base: str, adapter: str, *, held: str = "float32",
    quantized: bool = False,
) -> Case:  # fmt: skip
    """held  what the weights that are not quantized are"""
    from peft import PeftModel

    llama = bases.torch_model(base, compute, held, quantized=quantized)
    llama = PeftModel.from_pretrained(llama, adapter, is_trainable=True)
    data = batches(model, batch, context)
    return training.case(training.torch_step(llama, ADAMW, data, autocast=compute == "bfloat16"), FIRST)


CONTENDERS: dict[str, Callable[..., Case]] = {
    **{method: partial(with_entrenar, method) for method in (FULL, LORA, QLORA, LORA_FLOAT32)},
    LORA_BFLOAT16: partial(with_entrenar, LORA, compute="bfloat16"),
    QLORA_BFLOAT16: partial(with_entrenar, QLORA, compute="bfloat16"),
    PEFT: partial(with_peft, "float32"),
    PEFT_LORA_BFLOAT16: partial(with_peft, "bfloat16", held="bfloat16"),
    PEFT_FLOAT32: partial(with_peft, "float32", quantized=True),
    PEFT_BFLOAT16: partial(with_peft, "bfloat16", quantized=True),
}


def batches(model: str, batch: int, context: int) -> list[Any]:
    return training.batches(batch, context, bases.MODELS[model]["vocab_size"])


def computes_bfloat16() -> bool:
    """Whether entrenar knows how to, and this processor."""
    from inspect import signature
    from pathlib import Path

    from entrenar.llama import Llama

    cpuinfo = Path("/proc/cpuinfo")
    able = cpuinfo.exists() and "avx512_bf16" in cpuinfo.read_text()
    return able and "compute" in signature(Llama.from_pretrained).parameters


def flops_per_token(model: str, context: int) -> int:
    """Of training beside frozen weights, whose own gradients are not made: a forward pass' worth of products less."""
    from entrenar.llama import LlamaConfig

    config = LlamaConfig(**bases.MODELS[model])
    return config.flops_per_token(context) - config.flops_per_token(0, training=False)


# -- the driver's side


@dataclass(frozen=True)
class Shape:
    """What is trained, and what was promised of it."""

    model: str
    batch: int
    context: int
    lora: bool  # LoRA against PEFT and full fine-tuning too

    @property
    def tokens(self) -> int:
        return self.batch * self.context

    def named(self, method: str) -> str:
        return f"{self.model} {method} step, {self.batch} x {self.context}, r = {bases.RANK}"


SHAPES = (Shape("124m", 2, 512, lora=True), Shape("1.1b", 1, 256, lora=False))


@dataclass
class Measured:
    """Times and peak memory, of processes of their own that do nothing else."""

    bench: Bench
    shape: Shape
    times: Times
    peaks: dict[str, int]
    flops: int

    def speed(self, name: str) -> float:
        return self.shape.tokens / self.times.of(name).median

    def share(self, name: str) -> str:
        return self.bench.share_of_peak(self.flops * self.speed(name)) if self.flops else ""

    def there(self, names: Sequence[str]) -> list[str]:
        """Those of them that were measured, the fastest first."""
        return sorted((name for name in names if name in self.times.seconds), key=self.speed, reverse=True)

    @property
    def details(self) -> dict[str, Any]:
        speed = {name: self.speed(name) for name in self.times.seconds}
        return {"tokens_per_second": speed, "peak_bytes": self.peaks, "seconds": self.times.seconds}


def same_start(a: list[float], b: list[float]) -> bool:
    """Of methods that train different weights from the same start."""
    return training.same_losses(TOLERANCE, a[:1], b[:1])


AGREE: dict[str, Agreement] = {
    **dict.fromkeys((PEFT, PEFT_FLOAT32, LORA, QLORA, LORA_FLOAT32), partial(training.same_losses, TOLERANCE)),
    **dict.fromkeys((PEFT_BFLOAT16, PEFT_LORA_BFLOAT16, LORA_BFLOAT16, QLORA_BFLOAT16),
                    partial(training.same_losses, TOLERANCE_BFLOAT16)),
    FULL: same_start,
}  # fmt: skip


def rows(bench: Bench) -> Iterator[Row]:
    for shape in SHAPES:
        measured = race(bench, shape)
        if shape.lora:
            yield from against_peft(measured, "LoRA", LORA, (PEFT,), Target(">=", 1.7), Target("<=", 0.35))
            yield from over_full(measured)
        peers = (PEFT_FLOAT32, PEFT_BFLOAT16)
        yield from against_peft(measured, "QLoRA", QLORA, peers, Target(">=", 2.0), Target("<=", 0.3))
        yield qlora_row(measured)
        for name, ours, peer, target in (
            ("LoRA", LORA_BFLOAT16, PEFT_LORA_BFLOAT16, None),
            ("QLoRA", QLORA_BFLOAT16, PEFT_BFLOAT16, Target(">=", 1.0)),
        ):  # fmt: skip
            if ours in measured.times.seconds:
                yield from against_peft(measured, f"{name} (computing in bfloat16)", ours, (peer,), target, None)


def race(bench: Bench, shape: Shape) -> Measured:
    """All in turns. What starts from the same floats is compared; the same base in 4 bits is another start."""
    bfloat16 = not bench.isa and bench.worker("entrenar").call("finetune", "computes_bfloat16")
    floats = [LORA_FLOAT32]  # beside QLORA whatever the model
    if shape.lora:
        floats += [LORA, FULL, PEFT] + [LORA_BFLOAT16, PEFT_LORA_BFLOAT16] * bfloat16
    # Held to AVX2, PyTorch has no arithmetic in bfloat16: a step takes it minutes
    four_bits = [QLORA, PEFT_FLOAT32] + [PEFT_BFLOAT16] * (not bench.isa) + [QLORA_BFLOAT16] * bfloat16
    starts = [bench.present(names) for names in (floats, four_bits)]
    case = {"model": shape.model, "batch": shape.batch, "context": shape.context}
    with bases.written(bench, shape.model, "bfloat16") as folders, bench.apart(sum(starts, [])) as workers:
        for names in starts:
            bench.prepare("finetune", {name: workers[name] for name in names}, AGREE, **case, **folders)
        times = bench.take_turns(workers, seconds=1.0, rounds=min(bench.rounds, FEW_ROUNDS))
        peaks = {name: worker.peak() for name, worker in workers.items()}
    flops = bench.worker("entrenar").call("finetune", "flops_per_token", model=shape.model, context=shape.context)
    return Measured(bench, shape, times, peaks, flops)


def against_peft(
    measured: Measured, method: str, ours: str, of_peers: Sequence[str], faster: Target | None, smaller: Target | None
) -> Iterator[Row]:
    """Speed and peak memory over the faster of PEFT's contenders."""
    what, peers, speed = measured.shape.named(method), measured.there(of_peers), measured.speed(ours)
    if not peers:
        note = measured.bench.torch_missing or ""
        yield Row("finetune", f"{what}: speed", "tokens/s", Spread.of([speed]), None, measured.share(ours), note,
                  measured.details)  # fmt: skip
        return
    best, *others = peers
    note = f"{speed:.0f} tokens/s to " + ", ".join(f"{measured.speed(name):.0f} of {NAMES[name]}" for name in peers)
    ratio = measured.times.speedup(of=ours, over=best)
    yield Row("finetune", f"{what}: speed over PEFT", "x", ratio, faster, measured.share(ours), note, measured.details)

    def megabytes(name: str) -> str:
        return f"{measured.peaks[name] / 2**20:.0f} MB"

    others += measured.there((LORA_FLOAT32,)) if ours == LORA else []
    note = f"{megabytes(ours)} to {megabytes(best)}, whole process, loading included"
    note += "".join(f"; {megabytes(name)} of {NAMES[name]}" for name in others)
    memory = Spread.of([measured.peaks[ours] / measured.peaks[best]])
    yield Row("finetune", f"{what}: peak memory over PEFT's", "x", memory, smaller, "", note)


def over_full(measured: Measured) -> Iterator[Row]:
    """LoRA and QLoRA against full fine-tuning, which makes the gradients of all weights."""
    note = f"FLOPs alone allow {BOUND:.2g}x: the gradients of frozen weights are not made"
    for method, name in ((LORA_FLOAT32, "LoRA"), (QLORA, "QLoRA")):
        ratio = measured.times.speedup(of=method, over=FULL)
        yield Row("finetune", f"{measured.shape.named(name)}: speed over full fine-tuning", "x", ratio, None, "",
                  f"{seconds(measured.times, method, FULL)}; {note}")  # fmt: skip


def qlora_row(measured: Measured) -> Row:
    """A base of float32 is what the 4 bits stand for."""
    ratio = measured.times.speedup(of=QLORA, over=LORA_FLOAT32)
    return Row("finetune", f"{measured.shape.named('QLoRA')}: speed over our LoRA", "x", ratio, Target(">=", 0.93),
               measured.share(QLORA), seconds(measured.times, QLORA, LORA_FLOAT32))  # fmt: skip


def seconds(times: Times, one: str, other: str) -> str:
    return f"{times.of(one).median:.2f} s to {times.of(other).median:.2f} s"
