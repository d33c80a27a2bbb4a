"""A whole training step of a LLaMA - forward, backward, clip, AdamW - by entrenar, and by transformers, as it comes
and compiled by torch.compile (which happens before anything is timed).

Same weights, same tokens, same optimizer. Losses of the first steps must agree, or nothing is timed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.driver import Bench
from benchmarks.groups import machine, training
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
MAX_NORM = training.MAX_NORM
FIRST = 3  # steps whose losses are compared
LOSS_TOLERANCE = 1e-4  # nats
FEW_ROUNDS = 3  # of the larger model

EAGER, COMPILED = "torch", "torch-compile"
NAMES = {EAGER: "transformers", COMPILED: "transformers compiled"}


# -- contenders


def with_entrenar(
    model: str, batch: int, context: int, weights: str, first: int = FIRST, *, checkpointing: bool = False
) -> Case:
    from entrenar.formats.safetensors import SafeTensors
    from entrenar.llama import Llama, LlamaConfig

    llama = Llama(LlamaConfig(**MODELS[model]), checkpointing=checkpointing)
    with SafeTensors(weights) as file:
        llama.load_state_dict(file)
    return training.case(training.entrenar_step(llama, ADAMW, batches(model, batch, context)), first)


def with_torch(
    model: str, batch: int, context: int, weights: str, first: int = FIRST, *, checkpointing: bool = False,
    compiled: bool = False,
) -> Case:  # fmt: skip
    from safetensors.torch import load_file

    llama = new_torch_model(model)
    llama.load_state_dict(load_file(weights), strict=False)  # the tied head is not in the file
    if checkpointing:
        llama.gradient_checkpointing_enable()
    if compiled:
        llama = compile_model(llama)
    return training.case(training.torch_step(llama, ADAMW, batches(model, batch, context)), first)


def compile_model(llama: Any) -> Any:
    """For this processor, or for what --isa holds it to; in this process, so that none stays behind."""
    import torch
    from torch._inductor import config

    config.compile_threads = 1
    if os.environ.get("ATEN_CPU_CAPABILITY") == "avx2":
        config.cpp.march = "haswell"
    return torch.compile(llama)


CONTENDERS = {
    "entrenar": with_entrenar,
    EAGER: with_torch,
    COMPILED: partial(with_torch, compiled=True),
    "product": machine.multiplying,
}


def batches(model: str, batch: int, context: int) -> list[Any]:
    return training.batches(batch, context, MODELS[model]["vocab_size"])


def new_torch_model(model: str) -> Any:
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


def compiler_missing() -> str | None:
    """Why torch.compile cannot work here; None if it can."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:  # of a class that torch keeps to itself
        return f"torch.compile has no C++ compiler ({type(error).__name__})"
    return None


# -- the driver's side


def rows(bench: Bench) -> Iterator[Row]:
    for model, batch, context, first, over_eager, over_compiled, memory in (
        ("15m", 4, 256, FIRST, 1.8, 1.5, 0.4),
        ("124m", 2, 512, 2, 1.6, 1.4, 0.72),
    ):
        targets = {EAGER: Target(">=", over_eager), COMPILED: Target(">=", over_compiled)}
        rounds = bench.rounds if model == "15m" else min(bench.rounds, FEW_ROUNDS)
        yield from race(bench, model, batch=batch, context=context, first=first, rounds=rounds, targets=targets,
                        smaller=Target("<=", memory))  # fmt: skip


same_losses = partial(training.same_losses, LOSS_TOLERANCE)


@contextmanager
def written_weights(bench: Bench, model: str) -> Iterator[str]:
    """A temporary file of initial weights."""
    with tempfile.TemporaryDirectory() as folder:
        weights = str(Path(folder, "weights.safetensors"))
        drawing, how = ("entrenar", "write_own_weights") if bench.torch_missing else (EAGER, "write_weights")
        bench.worker(drawing).call("step", how, model=model, path=weights)
        yield weights


def race(
    bench: Bench, model: str, *, batch: int, context: int, first: int, rounds: int, targets: dict[str, Target],
    smaller: Target,
) -> Iterator[Row]:  # fmt: skip
    contenders = bench.present(("entrenar", EAGER, COMPILED))
    no_compiler = bench.worker(EAGER).call("step", "compiler_missing") if EAGER in contenders else None
    if no_compiler:
        contenders.remove(COMPILED)
    with written_weights(bench, model) as weights:
        times, peaks = bench.race_apart("step", contenders, seconds=1.0, rounds=rounds, agree=same_losses, model=model,
                                        batch=batch, context=context, weights=weights, first=first)  # fmt: skip
    what = f"{model} training step, {batch} x {context}"
    speed = {name: batch * context / times.of(name).median for name in contenders}
    flops = bench.worker("entrenar").call("step", "flops_per_token", model=model, context=context)
    share = bench.share_of_peak(flops * speed["entrenar"])
    details = {"tokens_per_second": speed, "peak_bytes": peaks, "seconds": times.seconds}
    if EAGER not in contenders:
        measured = Spread.of([speed["entrenar"]])
        yield Row("step", f"{what}: speed", "tokens/s", measured, None, share, bench.torch_missing or "", details)
        return
    for peer in (EAGER, COMPILED):
        name = f"{what}: speed over {NAMES[peer]}"
        if peer not in contenders:
            yield Row("step", name, "x", None, targets[peer], share, no_compiler or "")
            continue
        theirs = bench.share_of_peak(flops * speed[peer])
        note = f"{speed['entrenar']:.0f} tokens/s to {speed[peer]:.0f}, which is {theirs}"
        yield Row("step", name, "x", times.speedup(over=peer), targets[peer], share, note, details)
    note = ", ".join(f"{NAMES.get(name, 'ours')} {peak / 2**20:.0f} MB" for name, peak in peaks.items())
    memory = Spread.of([peaks["entrenar"] / peaks[EAGER]])
    yield Row("step", f"{what}: peak memory over transformers'", "x", memory, smaller, "",
              f"whole processes: {note}")  # fmt: skip
