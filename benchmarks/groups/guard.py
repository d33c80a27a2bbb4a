"""A few ratios that are quickly measured again: `make bench-check` holds them against the committed ones.

Each is to something that takes turns with it (NumPy, PyTorch, a copy): no time stands by itself, and what a neighbour
of this machine takes, it takes from both. More is better in every one. Those to PyTorch are left out where it is not
installed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.driver import Bench
from benchmarks.groups import attention, gemm, machine, ops, optimizer, step
from benchmarks.report import Row
from benchmarks.spread import Spread, mean_of

STEP: dict[str, Any] = dict(model="15m", batch=4, context=256)
FEW_ROUNDS = 3  # of whole steps
BOTH = ("entrenar", "torch")
PRODUCT = "product"  # takes turns with what has no peer: a neighbour of this machine slows both
UNASKED = {PRODUCT: lambda ours, product: True}


def products(bench: Bench) -> Iterator[Row]:
    """The layers of the 124m model: many rows in all three forms, and few."""
    for tokens, forms in ((512, gemm.FORMS), (16, gemm.FORMS[:1])):
        suites = [gemm.suite("124m", form, tokens) for form in forms]
        results = gemm.measured(bench, suites, contenders=("entrenar", "numpy"))
        speedup = mean_of(t.speedup(over="numpy") for t in results.values())
        yield ratio(f"GEMM 124m, {tokens} rows: speed over NumPy", speedup)


def operations(bench: Bench) -> Iterator[Row]:
    for name in ("rms_norm", "swiglu", "softmax", "cross_entropy"):
        times = bench.race("ops", ("entrenar", "copy"), name=name, from_memory=True)
        moved = 4 * ops.chosen(name, from_memory=True).floats
        yield Row("guard", f"{name} from memory: share of bandwidth", "%", machine.shares(times, moved))
    if bench.torch_missing is None:
        yield ratio("swiglu: speed over PyTorch", bench.race("ops", BOTH, name="swiglu").speedup(over="torch"))


def attending(bench: Bench) -> Iterator[Row]:
    sizes = attention.Shape(2, 512, 12, 12, 64)
    times = bench.race("attention", (*bench.present(BOTH), PRODUCT), agree=UNASKED, **asdict(sizes))
    yield ratio(f"attention {sizes.name}: FLOP/s over NumPy's product", machine.beside_product(times, sizes.flops))
    if "torch" in times.seconds:
        yield ratio(f"attention {sizes.name}: speed over PyTorch", times.speedup(over="torch"))


def moving_parameters(bench: Bench) -> Iterator[Row]:
    times = bench.race("optimizer", ("entrenar", "copy"), model="15m")
    measured = machine.shares(times, optimizer.bytes_moved("15m"))
    yield Row("guard", "clip, AdamW and zeroing, 15m: share of bandwidth", "%", measured)


def stepping(bench: Bench) -> Iterator[Row]:
    """The whole step, and its memory, in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        weights = str(Path(folder, "weights.safetensors"))
        bench.worker("entrenar").call("step", "write_own_weights", model=STEP["model"], path=weights)
        agree = {"torch": step.same_losses} | UNASKED
        times, peaks = bench.race_apart("step", (*bench.present(BOTH), PRODUCT), seconds=0.5, rounds=FEW_ROUNDS,
                                        agree=agree, weights=weights, **STEP)  # fmt: skip
    tokens = STEP["batch"] * STEP["context"]
    flops = tokens * bench.worker("entrenar").call(
        "step", "flops_per_token", model=STEP["model"], context=STEP["context"]
    )
    yield ratio("15m training step: FLOP/s over NumPy's product", machine.beside_product(times, flops))
    if "torch" in peaks:
        yield ratio("15m training step: speed over transformers", times.speedup(over="torch"))
        memory = Spread.of([peaks["torch"] / peaks["entrenar"]])
        yield ratio("15m training step: transformers' peak memory over ours", memory)


GUARDS: tuple[Callable[[Bench], Iterator[Row]], ...] = (products, operations, attending, moving_parameters, stepping)


def rows(bench: Bench) -> Iterator[Row]:
    for guard in GUARDS:
        yield from guard(bench)


def ratio(name: str, measured: Spread) -> Row:
    return Row("guard", name, "x", measured)
