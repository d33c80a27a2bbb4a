"""A step of fine-tuning: LoRA and QLoRA by entrenar, by PEFT with bitsandbytes, and full fine-tuning beside them.

Same base, bit for bit, same adapter, same tokens, same optimizer. Losses of the first steps must agree, or nothing is
timed. The base is a folder of bfloat16, as people download it: entrenar's LoRA holds it as it is stored, PEFT's as
float32, in which both compute; for QLoRA both quantize it while they load it. PEFT's QLoRA runs twice, its 4-bit layers
computing in float32 and in bfloat16; the faster of the two counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from benchmarks.driver import Agreement, Bench, Times, is_peer
from benchmarks.groups import bases, step
from benchmarks.protocol import Case
from benchmarks.report import Row, Target
from benchmarks.spread import Spread

ADAMW: dict[str, Any] = dict(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
MAX_NORM, FIRST = step.MAX_NORM, step.FIRST
TOLERANCE = 2e-4  # nats, of losses in float32; half a unit of the last of bfloat16's digits at a loss of 10 is 0.02:
TOLERANCE_BFLOAT16 = 0.05  # nats
FEW_ROUNDS = 3
# FLOPs for each weight and token: forward 2, backward 2 for the input's gradient and 2 for the weight's own.
BOUND = (2 + 2 + 2) / (2 + 2)

FULL, LORA, QLORA, LORA_FLOAT32 = "entrenar-full", "entrenar-lora", "entrenar-qlora", "entrenar-lora-float32"
PEFT, PEFT_FLOAT32, PEFT_BFLOAT16 = "torch-lora", "torch-qlora-float32", "torch-qlora-bfloat16"
NAMES = {
    LORA_FLOAT32: "ours with a base of float32",
    PEFT: "PEFT",
    PEFT_FLOAT32: "PEFT, computing in float32",
    PEFT_BFLOAT16: "PEFT, computing in bfloat16",
}


# -- contenders


def with_entrenar(method: str, model: str, batch: int, context: int, base: str, adapter: str) -> Case:
    from entrenar import kernels
    from entrenar.adapters import load_adapter
    from entrenar.llama import Llama
    from entrenar.optim import AdamW, clip_scale, global_norm

    llama = Llama.from_pretrained(base, storage="nf4" if method == QLORA else "stored")
    if method in (LORA_FLOAT32, FULL):
        bases.to_float32(llama)
    if method == FULL:
        llama = bases.trainable(llama)
    else:
        load_adapter(llama, adapter, trainable=True)
    kernels.keep_freed_memory()  # as the training job does
    parameters = llama.parameters()
    optimizer = AdamW(llama.named_parameters(), **ADAMW)
    data = step.cycle(step.batches(batch, context, bases.MODELS[model]["vocab_size"]))

    def run() -> float:
        ids = next(data)
        targets = np.full_like(ids, -100)  # the last token of a row has no successor, as in transformers
        targets[:, :-1] = ids[:, 1:]
        loss = llama.loss(ids, targets, reduction="mean")
        loss.backward()
        optimizer.step(grad_scale=clip_scale(global_norm(parameters), MAX_NORM))
        optimizer.zero_grad()
        return loss.item()

    return Case(run, [run() for _ in range(FIRST)])


def with_peft(method: str, compute: str, model: str, batch: int, context: int, base: str, adapter: str) -> Case:
    import torch
    from peft import PeftModel

    llama = bases.torch_model(base, compute, "float32", quantized=method == QLORA)
    llama = PeftModel.from_pretrained(llama, adapter, is_trainable=True)
    llama.train()
    parameters = [p for p in llama.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, **ADAMW | {"fused": True})
    batches = step.batches(batch, context, bases.MODELS[model]["vocab_size"])
    data = step.cycle([torch.from_numpy(ids) for ids in batches])

    def run() -> float:
        ids = next(data)
        with torch.autocast("cpu", torch.bfloat16, enabled=compute == "bfloat16"):  # as transformers' Trainer does
            loss = llama(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return Case(run, [run() for _ in range(FIRST)])


CONTENDERS: dict[str, Callable[..., Case]] = {
    **{method: partial(with_entrenar, method) for method in (FULL, LORA, QLORA, LORA_FLOAT32)},
    PEFT: partial(with_peft, LORA, "float32"),
    PEFT_FLOAT32: partial(with_peft, QLORA, "float32"),
    PEFT_BFLOAT16: partial(with_peft, QLORA, "bfloat16"),
}


# -- the driver's side


def rows(bench: Bench) -> Iterator[Row]:
    with bases.written(bench, "124m", "bfloat16") as folders:
        yield from lora_and_peft(bench, "124m", 2, 512, folders)
        yield from qlora_and_peft(bench, "124m", 2, 512, folders)
    with bases.written(bench, "124m", "nf4") as folders:
        yield from own_methods(bench, "124m", 2, 512, folders)
    with bases.written(bench, "1.1b", "bfloat16") as folders:
        yield from qlora_and_peft(bench, "1.1b", 1, 256, folders)
    with bases.written(bench, "1.1b", "nf4") as folders:
        yield from qlora_and_lora(bench, "1.1b", 1, 256, folders)


def same_losses(tolerance: float, a: list[float], b: list[float]) -> bool:
    return len(a) == len(b) and all(abs(x - y) <= tolerance for x, y in zip(a, b, strict=True))


def same_start(a: list[float], b: list[float]) -> bool:
    """Of methods that train different weights from the same start."""
    return same_losses(TOLERANCE, a[:1], b[:1])


AGREE: dict[str, Agreement] = {
    **dict.fromkeys((PEFT, PEFT_FLOAT32, LORA, QLORA, LORA_FLOAT32), partial(same_losses, TOLERANCE)),
    PEFT_BFLOAT16: partial(same_losses, TOLERANCE_BFLOAT16),
    FULL: same_start,
}


def race(
    bench: Bench, contenders: list[str], model: str, batch: int, context: int, folders: dict[str, str]
) -> tuple[Times, dict[str, int]]:
    """Times and peak memory, of processes of their own that do nothing else."""
    workers = {name: bench.start(name) for name in contenders}
    try:
        times = bench.race("finetune", contenders, seconds=1.0, rounds=min(bench.rounds, FEW_ROUNDS), agree=AGREE,
                           workers=workers, model=model, batch=batch, context=context, **folders)  # fmt: skip
        return times, {name: worker.peak() for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.close()


def lora_and_peft(bench: Bench, model: str, batch: int, context: int, folders: dict[str, str]) -> Iterator[Row]:
    contenders = bench.present((LORA, PEFT, LORA_FLOAT32))
    what = f"{model} LoRA step, {batch} x {context}, r = {bases.RANK}"
    measured = race(bench, contenders, model, batch, context, folders)
    yield from against_peft(bench, what, batch * context, *measured, Target(">=", 1.3), Target("<=", 0.4))


def qlora_and_peft(bench: Bench, model: str, batch: int, context: int, folders: dict[str, str]) -> Iterator[Row]:
    # Held to AVX2, PyTorch has no arithmetic in bfloat16: a step takes it minutes
    contenders = bench.present((QLORA, PEFT_FLOAT32) if bench.isa else (QLORA, PEFT_FLOAT32, PEFT_BFLOAT16))
    what = f"{model} QLoRA step, {batch} x {context}, r = {bases.RANK}"
    measured = race(bench, contenders, model, batch, context, folders)
    yield from against_peft(bench, what, batch * context, *measured, Target(">=", 1.5), Target("<=", 0.3))


def against_peft(
    bench: Bench, what: str, tokens: int, times: Times, peaks: dict[str, int], faster: Target, smaller: Target
) -> Iterator[Row]:
    """Speed and peak memory over the faster of PEFT's contenders."""
    ours = next(iter(times.seconds))
    speed = {name: tokens / times.of(name).median for name in times.seconds}
    details = {"tokens_per_second": speed, "peak_bytes": peaks, "seconds": times.seconds}
    peers = [name for name in speed if is_peer(name)]
    if not peers:
        yield Row("finetune", f"{what}: speed", "tokens/s", Spread.of([speed[ours]]), None, "",
                  bench.torch_missing or "", details)  # fmt: skip
        return
    peer = max(peers, key=lambda name: speed[name])
    others = [name for name in speed if name not in (ours, peer)]
    slower = "".join(f", {speed[name]:.0f} of {NAMES[name]}" for name in others)
    note = f"{speed[ours]:.0f} tokens/s to {speed[peer]:.0f} of {NAMES[peer]}{slower}"
    ratio = times.speedup(of=ours, over=peer)
    yield Row("finetune", f"{what}: speed over PEFT", "x", ratio, faster, "", note, details)
    note = f"{peaks[ours] / 2**20:.0f} MB to {peaks[peer] / 2**20:.0f} MB, whole process, loading included"
    note += "".join(f"; {peaks[name] / 2**20:.0f} MB of {NAMES[name]}" for name in others)
    memory = Spread.of([peaks[ours] / peaks[peer]])
    yield Row("finetune", f"{what}: peak memory over PEFT's", "x", memory, smaller, "", note)


def own_methods(bench: Bench, model: str, batch: int, context: int, folders: dict[str, str]) -> Iterator[Row]:
    """LoRA and QLoRA against full fine-tuning, and each other; a base of float32 is what the 4 bits stand for."""
    times, _ = race(bench, [LORA_FLOAT32, QLORA, FULL], model, batch, context, folders)
    what = f"{model}, {batch} x {context}"
    note = f"FLOPs alone allow {BOUND:.2g}x: the gradients of frozen weights are not made"
    for method, name in ((LORA_FLOAT32, "LoRA"), (QLORA, "QLoRA")):
        ratio = times.speedup(of=method, over=FULL)
        yield Row("finetune", f"{what}: {name} step, speed over full fine-tuning", "x", ratio, None, "",
                  f"{seconds(times, method, FULL)}; {note}")  # fmt: skip
    yield qlora_row(what, times)


def qlora_and_lora(bench: Bench, model: str, batch: int, context: int, folders: dict[str, str]) -> Iterator[Row]:
    times, _ = race(bench, [LORA_FLOAT32, QLORA], model, batch, context, folders)
    yield qlora_row(f"{model}, {batch} x {context}", times)


def qlora_row(what: str, times: Times) -> Row:
    ratio = times.speedup(of=QLORA, over=LORA_FLOAT32)
    return Row("finetune", f"{what}: QLoRA step, speed over our LoRA", "x", ratio, Target(">=", 0.9), "",
               seconds(times, QLORA, LORA_FLOAT32), {"seconds": times.seconds})  # fmt: skip


def seconds(times: Times, one: str, other: str) -> str:
    return f"{times.of(one).median:.2f} s to {times.of(other).median:.2f} s"
