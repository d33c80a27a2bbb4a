"""Single operations, forward and backward through either engine: entrenar's and PyTorch's.

Both as they run in training: entrenar with `kernels.keep_freed_memory()`, PyTorch with its own allocator. An op that
moves data is measured in bytes per second, each array counted once where a formula reads or writes it. Arrays of a
model's sizes may live in a cache, so more than the whole memory bandwidth is possible; how much of the bandwidth an op
takes is therefore measured apart, on arrays larger than the caches ("from memory").
"""

# T time, H heads, D head dim, C channels, F feed-forward, V vocabulary, N rows

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from benchmarks.arrays import fingerprint, integers, normal
from benchmarks.driver import Bench, Times, WrongResult
from benchmarks.groups import machine
from benchmarks.protocol import Case, WorkerError
from benchmarks.report import Row, Target


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

    def rate(self, seconds: float) -> float:
        """FLOP/s, or bytes per second."""
        return (self.flops or 4 * self.floats) / seconds


def rms_norm(N: int, C: int) -> Operation:
    return Operation(
        ((N, C), (C,)),
        lambda ops, _, x, w: ops.rms_norm(x, w, eps=1e-6),
        lambda torch, _, x, w: torch.nn.functional.rms_norm(x, (C,), w, 1e-6),
        floats=5 * N * C)  # fmt: skip


def swiglu(N: int, F: int) -> Operation:
    return Operation(
        ((N, F), (N, F)),
        lambda ops, _, gate, up: ops.swiglu(gate, up),
        lambda torch, _, gate, up: torch.nn.functional.silu(gate) * up,
        floats=8 * N * F)  # fmt: skip


def rope_tables(T: int, D: int) -> tuple[np.ndarray, ...]:
    angles = np.outer(np.arange(T), 10000.0 ** (-np.arange(0, D, 2) / D))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def torch_rope(torch, constants, x):
    """transformers' rotate_half, on x (B, T, H, D)."""
    cos, sin = (torch.cat((table, table), -1)[:, None, :] for table in constants)
    x1, x2 = x.chunk(2, -1)
    return x * cos + torch.cat((-x2, x1), -1) * sin


def rope(B: int, T: int, H: int, D: int) -> Operation:
    return Operation(((B, T, H, D),), lambda ops, tables, x: ops.rope(x, *tables), torch_rope,
                     floats=4 * B * T * H * D, constants=lambda: rope_tables(T, D))  # fmt: skip


def softmax(N: int, V: int) -> Operation:
    return Operation(((N, V),), lambda ops, _, x: ops.softmax(x), lambda torch, _, x: torch.softmax(x, -1),
                     floats=5 * N * V)  # fmt: skip


def targets(N: int, V: int) -> tuple[np.ndarray, ...]:
    return (integers(7, V, N),)


def cross_entropy(N: int, V: int) -> Operation:
    return Operation(
        ((N, V),),
        lambda ops, targets, x: ops.cross_entropy(x, *targets),
        lambda torch, targets, x: torch.nn.functional.cross_entropy(x, *targets),
        floats=3 * N * V, constants=partial(targets, N, V))  # fmt: skip


def linear_cross_entropy(N: int, C: int, V: int) -> Operation:
    return Operation(
        ((N, C), (V, C)),
        lambda ops, targets, x, w: ops.linear_cross_entropy(x, w, *targets),
        lambda torch, targets, x, w: torch.nn.functional.cross_entropy(x @ w.T, *targets),
        flops=6 * N * C * V, constants=partial(targets, N, V))  # fmt: skip


FASTER, BANDWIDTH = Target(">=", 4.0), Target(">=", 80.0)


@dataclass(frozen=True)
class Measured:
    """An operation at the size of a model's, and at one that is larger than the caches (None: the first is)."""

    usual: Operation
    from_memory: Operation | None = None
    size: str = field(kw_only=True)
    larger: str = ""
    target: Target | None = FASTER


OPERATIONS = {
    "rms_norm": Measured(rms_norm(2048, 768), rms_norm(16384, 768), size="2048 x 768", larger="16384 x 768"),
    "swiglu": Measured(swiglu(2048, 3072), swiglu(4096, 3072), size="2048 x 3072", larger="4096 x 3072"),
    "rope": Measured(rope(4, 512, 12, 64), rope(16, 1024, 12, 64), size="2048 x 12 x 64", larger="16384 x 12 x 64"),
    "softmax": Measured(softmax(2048, 2048), softmax(8192, 2048), size="2048 x 2048", larger="8192 x 2048"),
    "cross_entropy": Measured(cross_entropy(1024, 32000), size="1024 x 32000"),
    "linear_cross_entropy": Measured(linear_cross_entropy(1024, 288, 32000), size="1024 x 288 x 32000", target=None),
}


# -- contenders


def inputs(op: Operation) -> list[np.ndarray]:
    return [normal(i, *shape) for i, shape in enumerate(op.shapes, 1)]


def entrenar_case(op: Operation) -> Case:
    from entrenar import Tensor, kernels, ops

    kernels.keep_freed_memory()
    constants, leaves = op.constants(), [Tensor(x, requires_grad=True) for x in inputs(op)]
    dy = normal(9, *op.ours(ops, constants, *leaves).shape)

    def run() -> list[np.ndarray]:
        for leaf in leaves:
            leaf.grad = None
        y = op.ours(ops, constants, *leaves)
        y.backward(dy)
        return [y.data, *(leaf.grad for leaf in leaves)]

    return Case(run, fingerprint(*run()))


def torch_case(op: Operation) -> Case:
    import torch

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


def chosen(name: str, from_memory: bool = False) -> Operation:
    measured = OPERATIONS[name]
    return (from_memory and measured.from_memory) or measured.usual


CONTENDERS = {
    "entrenar": lambda **which: entrenar_case(chosen(**which)),
    "torch": lambda **which: torch_case(chosen(**which)),
    "copy": machine.copying,
}


# -- the driver's side


def rows(bench: Bench) -> Iterator[Row]:
    for name, measured in OPERATIONS.items():
        try:
            times = bench.race("ops", bench.present(("entrenar", "torch")), name=name)
            yield speed(bench, f"{name} {measured.size}", measured, times)
            if measured.usual.floats:
                yield bandwidth(bench, name)
        except (WorkerError, WrongResult) as error:
            yield Row("ops", name, "", note=f"not measured: {error}", failed=True)


def speed(bench: Bench, what: str, measured: Measured, times: Times) -> Row:
    op, seconds, what = measured.usual, times.of("entrenar").median, f"{what}, forward and backward"
    rate = op.rate(seconds)
    share = bench.share_of_peak(rate) if op.flops else bench.share_of_bandwidth(rate)
    note = f"{seconds * 1e3:.2f} ms, {rate / 1e9:.0f} {'GFLOP/s' if op.flops else 'GB/s'}"
    details = {"seconds": times.seconds}
    if "torch" not in times.seconds:
        return Row("ops", what, "", None, None, share, f"{note}; {bench.torch_missing}", details)
    note += f"; PyTorch {times.of('torch').median * 1e3:.2f} ms"
    faster = times.speedup(over="torch")
    return Row("ops", f"{what}: speed over PyTorch", "x", faster, measured.target, share, note, details)


def bandwidth(bench: Bench, name: str) -> Row:
    """On arrays larger than the caches, taking turns with a copy."""
    measured, op = OPERATIONS[name], chosen(name, from_memory=True)
    times = bench.race("ops", ("entrenar", "copy"), name=name, from_memory=True)
    rate = op.rate(times.of("entrenar").median)
    what = f"{name} {measured.larger or measured.size} from memory: share of bandwidth"
    note = f"{rate / 1e9:.1f} GB/s where a copy had {machine.COPIED / times.of('copy').median / 1e9:.1f}"
    return Row("ops", what, "%", machine.shares(times, 4 * op.floats), BANDWIDTH, "", note)
