"""What the engine costs beside its kernels: a graph of tiny operations, Python's part of a training step."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.driver import Bench
from benchmarks.groups import step
from benchmarks.protocol import Case
from benchmarks.report import Row, Target
from benchmarks.spread import Spread

PAIRS = 500  # of a multiplication and an addition


# -- contenders


def chain(x: Any, factor: Any) -> Any:
    y = x
    for _ in range(PAIRS):
        y = y * factor + x
    return y


def with_entrenar() -> Case:
    from entrenar import Tensor

    x, factor = Tensor(1.0, requires_grad=True), Tensor(0.5, requires_grad=True)

    def run() -> list[float]:
        x.grad = factor.grad = None
        y = chain(x, factor)
        y.backward()
        assert x.grad is not None and factor.grad is not None
        return [y.item(), y.item(), x.grad.item(), factor.grad.item()]

    return Case(run, run())


def with_torch() -> Case:
    import torch

    x, factor = torch.tensor(1.0, requires_grad=True), torch.tensor(0.5, requires_grad=True)

    def run() -> list[float]:
        x.grad = factor.grad = None
        y = chain(x, factor)
        y.backward()
        return [y.item(), y.item(), x.grad.item(), factor.grad.item()]

    return Case(run, run())


CONTENDERS = {"entrenar": with_entrenar, "torch": with_torch}


def time_outside_kernels(weights: str, steps: int) -> list[tuple[float, float, int]]:
    """(seconds, seconds in kernels, calls of kernels) of each of some training steps of the 15m model."""
    from entrenar import kernels

    spent, calls = 0.0, 0

    def timed(kernel):
        def call(*args, **kwargs):
            nonlocal spent, calls
            started = time.perf_counter()
            result = kernel(*args, **kwargs)
            spent, calls = spent + time.perf_counter() - started, calls + 1
            return result

        return call

    before = {name: getattr(kernels, name) for name in kernels.KERNELS}
    vars(kernels).update({name: timed(kernel) for name, kernel in before.items()})
    try:
        case = step.with_entrenar("15m", 4, 256, weights)
        measured = []
        for _ in range(steps):
            spent, calls = 0.0, 0
            started = time.perf_counter()
            case.runs[0]()
            measured.append((time.perf_counter() - started, spent, calls))
    finally:
        vars(kernels).update(before)
    return measured


# -- the driver's side


def rows(bench: Bench) -> Iterator[Row]:
    contenders = bench.present(("entrenar", "torch"))
    times = bench.race("engine", contenders)
    each = {name: times.of(name).median * 1e6 / (2 * PAIRS) for name in contenders}
    note = ", ".join(f"{name} {us:.2f} us per op" for name, us in each.items())
    what = f"graph of {2 * PAIRS:,} scalar ops, forward and backward"
    milliseconds = Spread.of(1e3 * s for s in times.seconds["entrenar"])
    yield Row("engine", what, "ms", milliseconds, Target("<", 15.0), note=note)

    with tempfile.TemporaryDirectory() as folder:
        weights = str(Path(folder, "weights.safetensors"))
        worker = bench.worker("entrenar")
        worker.call("step", "write_own_weights", model="15m", path=weights)
        measured = worker.call("engine", "time_outside_kernels", weights=weights, steps=max(2, bench.rounds))
    outside = Spread.of(100 * (whole - inside) / whole for whole, inside, _ in measured)
    milliseconds = Spread.of(1e3 * (whole - inside) for whole, inside, _ in measured)
    note = f"{milliseconds.median:.1f} ms, {measured[0][2]} kernel calls; NumPy's share of it included"
    yield Row("engine", "15m training step, 4 x 256: time outside kernels", "%", outside, Target("<", 2.0), note=note)
