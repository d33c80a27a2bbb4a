"""A whole training step of a LLaMA - forward, backward, clip, AdamW - by entrenar, and by transformers.

Same weights, same tokens, same optimizer. Losses of the first steps must agree, or nothing is timed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.driver import Bench
from benchmarks.protocol import Case
from benchmarks.report import Row, Target
from benchmarks.spread import Spread

# Those of examples/llama2/configs, written out: the peers' environment may have no entrenar to read them.
MODELS: dict[str, dict[str, Any]] = {
    "15m": dict(
        hidden_size=288,
        num_hidden_layers=6,
        num_attention_heads=6,
        intermediate_size=768,
        vocab_size=32000,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
    ),
    "124m": dict(
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        vocab_size=32000,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
    ),
}
ADAMW: dict[str, Any] = dict(lr=3e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
MAX_NORM = 1.0
FIRST = 3  # steps whose losses are compared
LOSS_TOLERANCE = 1e-4  # nats


def batches(batch: int, context: int, vocabulary: int) -> list[np.ndarray]:
    """A few batches of tokens (B, T), more often small than large, as in text; taken in turn."""
    draws = np.random.default_rng(0).random((4, batch, context))
    return list((draws**3 * vocabulary).astype(np.int64))


# -- contenders


def with_entrenar(model: str, batch: int, context: int, weights: str) -> Case:
    from entrenar import kernels
    from entrenar.formats.safetensors import SafeTensors
    from entrenar.llama import Llama, LlamaConfig
    from entrenar.optim import AdamW, clip_scale, global_norm

    kernels.keep_freed_memory()  # as the training job does
    llama = Llama(LlamaConfig(**MODELS[model]))
    with SafeTensors(weights) as file:
        llama.load_state_dict(file)
    parameters = llama.parameters()
    optimizer = AdamW(llama.named_parameters(), **ADAMW)
    data = cycle(batches(batch, context, MODELS[model]["vocab_size"]))

    def step() -> float:
        ids = next(data)
        targets = np.full_like(ids, -100)  # the last token of a row has no successor, as in transformers
        targets[:, :-1] = ids[:, 1:]
        loss = llama.loss(ids, targets, reduction="mean")
        loss.backward()
        optimizer.step(grad_scale=clip_scale(global_norm(parameters), MAX_NORM))
        optimizer.zero_grad()
        return loss.item()

    return Case(step, [step() for _ in range(FIRST)])


def with_torch(model: str, batch: int, context: int, weights: str) -> Case:
    import torch
    from safetensors.torch import load_file

    llama = new_torch_model(model)
    llama.load_state_dict(load_file(weights), strict=False)  # the tied head is not in the file
    llama.train()
    parameters = list(llama.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": ADAMW["weight_decay"]},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, **ADAMW | {"fused": True})
    data = cycle([torch.from_numpy(ids) for ids in batches(batch, context, MODELS[model]["vocab_size"])])

    def step() -> float:
        ids = next(data)
        loss = llama(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return Case(step, [step() for _ in range(FIRST)])


CONTENDERS = {"entrenar": with_entrenar, "torch": with_torch}


def new_torch_model(model: str):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**MODELS[model], attn_implementation="sdpa", dtype="float32"))


def write_weights(model: str, path: str) -> None:
    """Initial weights, drawn by transformers, for both contenders."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    state = new_torch_model(model).state_dict()
    if MODELS[model]["tie_word_embeddings"]:
        state.pop("lm_head.weight")  # the embedding again
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)


def write_own_weights(model: str, path: str) -> None:
    """The same from entrenar, where transformers is not installed."""
    from entrenar.formats import safetensors
    from entrenar.llama import Llama, LlamaConfig

    safetensors.save(path, Llama(LlamaConfig(**MODELS[model])).state_dict())


def flops_per_token(model: str, context: int) -> int:
    from entrenar.llama import LlamaConfig

    return LlamaConfig(**MODELS[model]).flops_per_token(context)


def cycle(items: list) -> Iterator[Any]:
    while True:
        yield from items


# -- the driver's side


def rows(bench: Bench) -> Iterator[Row]:
    yield from race(bench, "15m", batch=4, context=256, rounds=bench.rounds, targets=True)
    if bench.full:
        yield from race(bench, "124m", batch=2, context=512, rounds=min(bench.rounds, 3), targets=False)


def same_losses(a: list[float], b: list[float]) -> bool:
    return len(a) == len(b) and all(abs(x - y) <= LOSS_TOLERANCE for x, y in zip(a, b, strict=True))


def race(bench: Bench, model: str, *, batch: int, context: int, rounds: int, targets: bool) -> Iterator[Row]:
    """Processes of their own, that do nothing else: their peak memory is that of this training alone."""
    contenders = bench.present(("entrenar", "torch"))
    with tempfile.TemporaryDirectory() as folder:
        weights = str(Path(folder, "weights.safetensors"))
        write = "write_weights" if "torch" in contenders else "write_own_weights"
        bench.worker(contenders[-1]).call("step", write, model=model, path=weights)
        workers = {name: bench.start(name) for name in contenders}
        try:
            times = bench.race(
                "step",
                contenders,
                seconds=1.0,
                rounds=rounds,
                agree=same_losses,
                workers=workers,
                model=model,
                batch=batch,
                context=context,
                weights=weights,
            )
            peaks = {name: worker.peak() for name, worker in workers.items()}
        finally:
            for worker in workers.values():
                worker.close()
    tokens, what = batch * context, f"{model} training step, {batch} x {context}"
    speed = {name: tokens / times.of(name).median for name in contenders}
    flops = bench.worker("entrenar").call("step", "flops_per_token", model=model, context=context)
    share = bench.share_of_peak(flops * speed["entrenar"])
    details = {"tokens_per_second": speed, "peak_bytes": peaks, "seconds": times.seconds}
    if "torch" not in contenders:
        measured = Spread.of([speed["entrenar"]])
        yield Row(
            "step", f"{what}: speed", "tokens/s", measured, None, share, bench.torch_missing or "", details
        )
        return
    note = f"{speed['entrenar']:.0f} tokens/s to transformers' {speed['torch']:.0f}"
    target = Target(">=", 1.2) if targets else None
    faster = times.speedup(over="torch")
    yield Row("step", f"{what}: speed over transformers", "x", faster, target, share, note, details)
    note = f"{peaks['entrenar'] / 2**20:.0f} MB to {peaks['torch'] / 2**20:.0f} MB, whole process"
    target = Target("<=", 0.6) if targets else None
    memory = Spread.of([peaks["entrenar"] / peaks["torch"]])
    yield Row("step", f"{what}: peak memory over transformers'", "x", memory, target, "", note)
