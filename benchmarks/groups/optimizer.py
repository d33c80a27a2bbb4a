"""What follows the backward pass: clipping by the global norm, AdamW, and letting go of the gradients.

On the parameters of whole models, each side in a process of its own. Both scale by the norm of the gradients, on
both sides a gradient is gone afterwards, and the next step's (here: the same) takes its place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from benchmarks.arrays import fingerprint, normal
from benchmarks.driver import Bench
from benchmarks.groups import machine
from benchmarks.groups.step import ADAMW, MAX_NORM, MODELS
from benchmarks.protocol import Case
from benchmarks.report import Row, Target

TARGETS = {"15m": Target(">=", 1.5), "124m": Target(">=", 1.5)}
ARRAYS = 8  # the norm reads g; AdamW reads p, g, m, v, and writes p, m, v


def parameter_shapes(model: str) -> list[tuple[int, ...]]:
    """Of a model whose head is its embedding."""
    shape = MODELS[model]
    C, F = shape["hidden_size"], shape["intermediate_size"]
    block = [(C, C)] * 4 + [(F, C)] * 2 + [(C, F)] + [(C,)] * 2
    return [(shape["vocab_size"], C), *block * shape["num_hidden_layers"], (C,)]


def parameters_and_gradients(model: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for i, shape in enumerate(parameter_shapes(model)):
        yield normal(i, *shape, scale=0.02), normal(1000 + i, *shape)


# -- contenders


def with_entrenar(model: str) -> Case:
    from entrenar import Tensor, kernels
    from entrenar.optim import AdamW, clip_scale, global_norm

    kernels.keep_freed_memory()  # as the training job does
    arrays = list(parameters_and_gradients(model))
    parameters = [Tensor(p, requires_grad=True) for p, _ in arrays]
    optimizer = AdamW(((str(i), p) for i, p in enumerate(parameters)), **ADAMW)

    def run() -> None:
        for parameter, (_, gradient) in zip(parameters, arrays, strict=True):
            parameter.grad = gradient
        optimizer.step(grad_scale=clip_scale(global_norm(parameters), MAX_NORM))
        optimizer.zero_grad()

    run()
    return Case(run, fingerprint(*(p.data for p in parameters)))


def with_torch(model: str) -> Case:
    import torch

    arrays = [tuple(map(torch.from_numpy, pair)) for pair in parameters_and_gradients(model)]
    parameters = [p.requires_grad_() for p, _ in arrays]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2]},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, **ADAMW | {"fused": True})

    def run() -> None:
        for parameter, (_, gradient) in zip(parameters, arrays, strict=True):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    run()
    return Case(run, fingerprint(*(p.detach().numpy() for p in parameters)))


CONTENDERS = {"entrenar": with_entrenar, "torch": with_torch, "copy": machine.copying}


# -- the driver's side


def rows(bench: Bench) -> Iterator[Row]:
    for model, target in TARGETS.items():
        yield row(bench, model, target)


def row(bench: Bench, model: str, target: Target | None) -> Row:
    contenders = bench.present(("entrenar", "torch", "copy"))
    times, _ = bench.race_apart("optimizer", contenders, seconds=0.1, model=model)
    seconds, moved = times.of("entrenar").median, bytes_moved(model)
    share, details = f"{machine.shares(times, moved).median:.0f}% of bandwidth", {"seconds": times.seconds}
    size = f"{ARRAYS} arrays of {count(model) / 1e6:.1f} million"
    note = f"{seconds * 1e3:.1f} ms, {moved / seconds / 1e9:.0f} GB/s counting {size}"
    what = f"clip, AdamW and zeroing, {model}"
    if "torch" not in contenders:
        return Row("optimizer", what, "", None, None, share, f"{note}; {bench.torch_missing}", details)
    note += f"; PyTorch's fused AdamW {times.of('torch').median * 1e3:.1f} ms"
    faster = times.speedup(over="torch")
    return Row("optimizer", f"{what}: speed over PyTorch", "x", faster, target, share, note, details)


def count(model: str) -> int:
    return sum(map(math.prod, parameter_shapes(model)))


def bytes_moved(model: str) -> int:
    return 4 * ARRAYS * count(model)
