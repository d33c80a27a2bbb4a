"""Whether speed holds as things grow: tokens in a step, parameters of a model, bytes of a text.

Ours alone. A training step's arithmetic in FLOP/s, as a share of the peak, is tokens a second for each FLOP a token
costs: the same for small and large where nothing but the size changes. Each curve is a process of its own, from the
small end on, for what takes seconds is run once.
"""

# B batch, T time

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.arrays import integers, normal
from benchmarks.driver import Bench
from benchmarks.groups.step import ADAMW, MAX_NORM, MODELS
from benchmarks.report import Row, Target
from benchmarks.spread import Spread

FLAT = 0.9  # of the best, at least, all along the curve
CONTEXT = 256
TOKENS = {"15m": (64, 256, 1024, 4096), "124m": (64, 512, 4096)}
SECONDS = 0.4  # for one point of a curve, or one run

llama = dict(vocab_size=32000, max_position_embeddings=2048, rms_norm_eps=1e-6, tie_word_embeddings=True)
# A few layers stand for all of the last, whose gradients would fill a small machine: its layers are all alike.
SIZES: dict[str, dict[str, Any]] = {
    "2m": llama
    | dict(hidden_size=128, num_hidden_layers=6, num_attention_heads=4, intermediate_size=352, vocab_size=4096),
    "15m": MODELS["15m"],
    "124m": MODELS["124m"],
    "350m": llama
    | dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=2816),
    "1.1b, 4 of its 22 layers": llama
    | dict(hidden_size=2048, num_hidden_layers=4, num_attention_heads=32, num_key_value_heads=4,
           intermediate_size=5632, tie_word_embeddings=False),
}  # fmt: skip
MEGABYTES = (1, 4, 16)


# -- in entrenar's process


def made(shape: dict[str, Any]) -> Any:
    """A model of drawn weights: as fast as memory can be filled."""
    from entrenar.llama import Llama, LlamaConfig
    from entrenar.nn import unfilled

    with unfilled():
        model = Llama(LlamaConfig(**shape))
    for i, (_, tensor) in enumerate(model.named_parameters()):
        tensor.data = normal(i, *tensor.shape, scale=0.02) if tensor.ndim > 1 else np.ones(tensor.shape, np.float32)
    return model


def batch(tokens: int, vocabulary: int) -> tuple[np.ndarray, np.ndarray]:
    """ids and targets (B, T)"""
    T = min(tokens, CONTEXT)
    ids = integers(0, vocabulary, tokens // T, T + 1)
    return ids[:, :-1], ids[:, 1:]


def best(run: Callable[[], None], seconds: float = SECONDS) -> float:
    """Seconds of the fastest of some runs, two at least: in the first of a size, its memory comes."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 2 or time.perf_counter() < end:
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times)


def by_tokens(model: str) -> list[dict[str, float]]:
    """Seconds of forward and backward, and of the whole step, of ever more tokens."""
    from entrenar import kernels
    from entrenar.optim import AdamW, clip_scale, global_norm

    kernels.keep_freed_memory()  # as the training job does
    network = made(MODELS[model])
    optimizer = AdamW(network.named_parameters(), **ADAMW)
    parameters = network.parameters()

    def step(ids: np.ndarray, targets: np.ndarray, lap: list[float]) -> None:
        started = time.perf_counter()
        network.loss(ids, targets, reduction="mean").backward()
        lap.append(time.perf_counter() - started)
        optimizer.step(grad_scale=clip_scale(global_norm(parameters), MAX_NORM))
        optimizer.zero_grad()

    def measured(tokens: int) -> dict[str, float]:
        data = batch(tokens, MODELS[model]["vocab_size"])
        laps: list[float] = []
        whole = best(lambda: step(*data, laps))
        flops = tokens * network.config.flops_per_token(min(tokens, CONTEXT))
        return {"tokens": tokens, "flops": flops, "step": whole, "forward and backward": min(laps)}

    measured(TOKENS[model][0])  # memory comes, threads wake up
    return [measured(tokens) for tokens in TOKENS[model]]


def by_size() -> list[dict[str, Any]]:
    """Seconds of forward and backward on CONTEXT tokens, of ever larger models."""
    from entrenar import kernels

    kernels.keep_freed_memory()
    points = []
    for name, shape in SIZES.items():
        network = made(shape)
        data = batch(CONTEXT, shape["vocab_size"])

        def run(network: Any = network, data: Any = data) -> None:
            network.zero_grad()
            network.loss(*data, reduction="mean").backward()

        run()
        flops = CONTEXT * network.config.flops_per_token(CONTEXT)
        points.append({"model": name, "flops": flops, "seconds": best(run)})
    return points


def by_bytes() -> list[dict[str, float]]:
    """Seconds to read, split, learn a tokenizer from, and encode, text that grows: Python's library, over and over."""
    from entrenar.data import prepare

    text = library()
    points = []
    with tempfile.TemporaryDirectory() as folder:
        for megabytes in MEGABYTES:
            path, size = Path(folder, f"{megabytes}.txt"), megabytes << 20
            path.write_bytes((text * (size // len(text) + 1))[:size])
            started = time.perf_counter()
            prepare(str(path), cache="off", into=Path(folder, f"{megabytes}"))
            points.append({"bytes": size, "seconds": time.perf_counter() - started})
    return points


def library() -> bytes:
    """Python's own library, what of it is ASCII: many megabytes, no line of which was written for this."""
    files = sorted(path for path in Path(os.__file__).parent.rglob("*.py") if "site-packages" not in path.parts)
    return b"\n".join(data for file in files if (data := file.read_bytes()).isascii())


# -- the driver's side


def rows(bench: Bench) -> Iterator[Row]:
    for model in TOKENS:
        points = asked(bench, "by_tokens", model=model)
        for what in ("step", "forward and backward"):
            shares = {f"{p['tokens']} tokens": share(bench, p["flops"] / p[what]) for p in points}
            target = Target(">=", FLAT) if what == "step" else None
            name = f"{model} {what}, {TOKENS[model][0]} to {TOKENS[model][-1]} tokens"
            yield flatness(name, "share of FMA peak", shares, target)
    points = asked(bench, "by_size")
    shares = {p["model"]: share(bench, p["flops"] / p["seconds"]) for p in points}
    what = f"forward and backward of {CONTEXT} tokens, 2M to 1.1B parameters"
    yield flatness(what, "share of FMA peak", shares, Target(">=", FLAT))
    points = asked(bench, "by_bytes")
    rates = {f"{p['bytes'] >> 20} MB": p["bytes"] / p["seconds"] / 1e6 for p in points}
    what = f"preparing data, {MEGABYTES[0]} to {MEGABYTES[-1]} MB"
    yield flatness(what, "MB/s", rates, Target(">=", FLAT), falls=True)


def asked(bench: Bench, what: str, **args: Any) -> list[dict[str, Any]]:
    worker = bench.start("entrenar")
    try:
        return worker.call("growth", what, **args)
    finally:
        worker.close()


def share(bench: Bench, flops_per_second: float) -> float:
    return 100 * flops_per_second / bench.machine["fma_peak"]


def flatness(what: str, unit: str, curve: dict[str, float], target: Target | None, falls: bool = False) -> Row:
    """The lowest point over the highest. falls: only what falls counts, the first point to the lowest after it."""
    top = next(iter(curve.values())) if falls else max(curve.values())
    ratio = min(min(curve.values()) / top, 1.0)
    note = ", ".join(f"{name} {value:.3g}" for name, value in curve.items()) + f" ({unit})"
    details = {"table": chart(unit, curve), "curve": curve}
    name = f"{what}: lowest to {'first' if falls else 'highest'}"
    return Row("growth", name, "x", Spread.of([ratio]), target, "", note, details)


def chart(unit: str, curve: dict[str, float], width: int = 40) -> list[list[str]]:
    """A table with a bar beside each number."""
    longest = max(curve.values())
    bars = [[name, f"{value:.3g}", "#" * round(width * value / longest)] for name, value in curve.items()]
    return [["size", unit, ""], *bars]
