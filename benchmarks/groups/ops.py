"""Single operations, forward and backward through either engine, and the optimizer: entrenar's and PyTorch's.

For information: where a step's time goes, and how near each op is to what the machine can do. An op that
moves data is measured in bytes per second, each array counted once where a formula reads or writes it; arrays
of these sizes may live in a cache, so more than the whole memory bandwidth is possible.
"""

# B batch, T time, H heads, D head dim, C channels, F feed-forward, V vocabulary, N rows = B T

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.arrays import fingerprint, integers, normal
from benchmarks.driver import Bench, WrongResult
from benchmarks.groups.step import ADAMW, MAX_NORM, MODELS
from benchmarks.protocol import Case, WorkerError
from benchmarks.report import Row

N, C, F, V = 1024, 288, 768, 32000  # the 15m model at 4 x 256


@dataclass(frozen=True)
class Operation:
    """ours(ops, constants, *leaves) and theirs(torch, constants, *leaves) give y.

    floats, flops   numbers moved, or arithmetic done, forward and backward together
    """

    shapes: tuple[tuple[int, ...], ...]
    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    floats: int = 0
    flops: int = 0
    constants: Callable[[], tuple[np.ndarray, ...]] = tuple


def rope_tables(T: int, D: int) -> tuple[np.ndarray, ...]:
    angles = np.outer(np.arange(T), 10000.0 ** (-np.arange(0, D, 2) / D))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def torch_rope(torch, constants, x):
    """transformers' rotate_half, on x (B, T, H, D)."""
    cos, sin = (torch.cat((table, table), -1)[:, None, :] for table in constants)
    x1, x2 = x.chunk(2, -1)
    return x * cos + torch.cat((-x2, x1), -1) * sin


def torch_attention(torch, constants, q, k, v):
    heads = [x.transpose(1, 2) for x in (q, k, v)]  # (B, H, T, D), views, as transformers makes them
    return torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)


def attention(B: int, H: int, T: int, D: int) -> Operation:
    # Two products of (T, D) x (D, T) forward, five backward, half of each masked.
    return Operation(((B, T, H, D),) * 3, lambda ops, _, q, k, v: ops.attention(q, k, v), torch_attention,
                     flops=7 * B * H * T * T * D)  # fmt: skip


def targets() -> tuple[np.ndarray, ...]:
    return (integers(7, V, N),)


OPERATIONS = {
    "rms_norm": Operation(
        ((N, C), (C,)),
        lambda ops, _, x, w: ops.rms_norm(x, w, eps=1e-6),
        lambda torch, _, x, w: torch.nn.functional.rms_norm(x, (C,), w, 1e-6),
        floats=5 * N * C),
    "swiglu": Operation(
        ((N, F), (N, F)),
        lambda ops, _, gate, up: ops.swiglu(gate, up),
        lambda torch, _, gate, up: torch.nn.functional.silu(gate) * up,
        floats=8 * N * F),
    "rope": Operation(
        ((4, 256, 6, 48),),
        lambda ops, tables, x: ops.rope(x, *tables), torch_rope,
        floats=4 * N * C, constants=lambda: rope_tables(256, 48)),
    "softmax": Operation(
        ((N, 2048),),
        lambda ops, _, x: ops.softmax(x),
        lambda torch, _, x: torch.softmax(x, -1),
        floats=5 * N * 2048),
    "cross_entropy": Operation(
        ((N, V),),
        lambda ops, targets, x: ops.cross_entropy(x, *targets),
        lambda torch, targets, x: torch.nn.functional.cross_entropy(x, *targets),
        floats=3 * N * V, constants=targets),
    "linear_cross_entropy": Operation(
        ((N, C), (V, C)),
        lambda ops, targets, x, w: ops.linear_cross_entropy(x, w, *targets),
        lambda torch, targets, x, w: torch.nn.functional.cross_entropy(x @ w.T, *targets),
        flops=6 * N * C * V, constants=targets),
    "attention 4x256, 6 heads of 48": attention(4, 6, 256, 48),
    "attention 2x512, 12 heads of 64": attention(2, 12, 512, 64),
}  # fmt: skip


# -- contenders


def inputs(op: Operation) -> list[np.ndarray]:
    return [normal(i, *shape) for i, shape in enumerate(op.shapes, 1)]


def with_entrenar(name: str) -> Case:
    if name == OPTIMIZER:
        return entrenar_optimizer()
    from entrenar import Tensor, ops

    op = OPERATIONS[name]
    constants, leaves = op.constants(), [Tensor(x, requires_grad=True) for x in inputs(op)]
    dy = normal(9, *op.ours(ops, constants, *leaves).shape)

    def run() -> list[np.ndarray]:
        for leaf in leaves:
            leaf.grad = None
        y = op.ours(ops, constants, *leaves)
        y.backward(dy)
        return [y.data, *(leaf.grad for leaf in leaves)]

    return Case(run, fingerprint(*run()))


def with_torch(name: str) -> Case:
    if name == OPTIMIZER:
        return torch_optimizer()
    import torch

    op = OPERATIONS[name]
    constants = tuple(map(torch.from_numpy, op.constants()))
    leaves = [torch.from_numpy(x).requires_grad_() for x in inputs(op)]
    dy = torch.from_numpy(normal(9, *op.theirs(torch, constants, *leaves).shape))

    def run() -> list[Any]:
        for leaf in leaves:
            leaf.grad = None
        y = op.theirs(torch, constants, *leaves)
        y.backward(dy)
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    return Case(run, fingerprint(*(x.numpy() for x in run())))


CONTENDERS = {"entrenar": with_entrenar, "torch": with_torch}


# -- the optimizer

OPTIMIZER = "clip and AdamW"


def parameter_shapes() -> list[tuple[int, ...]]:
    """Those of the 15m model."""
    C, F = MODELS["15m"]["hidden_size"], MODELS["15m"]["intermediate_size"]
    block = [(C, C)] * 4 + [(F, C)] * 2 + [(C, F)] + [(C,)] * 2
    return [(MODELS["15m"]["vocab_size"], C), *block * MODELS["15m"]["num_hidden_layers"], (C,)]


def parameters_and_gradients() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for i, shape in enumerate(parameter_shapes()):
        yield normal(i, *shape, scale=0.02), normal(1000 + i, *shape)


def entrenar_optimizer() -> Case:
    from entrenar import Tensor
    from entrenar.optim import AdamW, clip_scale, global_norm

    parameters = []
    for p, g in parameters_and_gradients():
        parameters.append(Tensor(p, requires_grad=True))
        parameters[-1].grad = g
    optimizer = AdamW(((str(i), p) for i, p in enumerate(parameters)), **ADAMW)

    def run() -> None:
        optimizer.step(grad_scale=clip_scale(global_norm(parameters), MAX_NORM))

    run()
    return Case(run, fingerprint(*(p.data for p in parameters)))


def torch_optimizer() -> Case:
    import torch

    parameters = []
    for p, g in parameters_and_gradients():
        parameters.append(torch.from_numpy(p).requires_grad_())
        parameters[-1].grad = torch.from_numpy(g)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2]},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, **ADAMW | {"fused": True})

    def run() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()

    run()
    return Case(run, fingerprint(*(p.detach().numpy() for p in parameters)))


# -- the driver's side


def rows(bench: Bench) -> Iterator[Row]:
    contenders = bench.present(("entrenar", "torch"))
    optimizer = 8 * sum(
        map(math.prod, parameter_shapes())
    )  # the norm reads g; AdamW p, g, m, v, and writes p, m, v
    amounts = {name: (op.floats, op.flops) for name, op in OPERATIONS.items()} | {OPTIMIZER: (optimizer, 0)}
    for name, (floats, flops) in amounts.items():
        what = name if name == OPTIMIZER else f"{name}, forward and backward"
        try:
            times = bench.race("ops", contenders, name=name)
        except (WorkerError, WrongResult) as error:
            yield Row("ops", what, "", note=f"not measured: {error}", failed=True)
            continue
        seconds = times.of("entrenar").median
        rate = (flops or 4 * floats) / seconds
        share = bench.share_of_peak(rate) if flops else bench.share_of_bandwidth(rate)
        note = f"{seconds * 1e3:.2f} ms, {rate / 1e9:.0f} {'GFLOP/s' if flops else 'GB/s'}"
        details = {"seconds": times.seconds}
        if "torch" in contenders:
            note += f"; PyTorch {times.of('torch').median * 1e3:.2f} ms"
            faster = times.speedup(over="torch")
            yield Row("ops", f"{what}: speed over PyTorch", "x", faster, None, share, note, details)
        else:
            yield Row("ops", what, "", None, None, share, f"{note}; {bench.torch_missing}", details)
