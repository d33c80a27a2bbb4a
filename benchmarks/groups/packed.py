"""Linear layers whose weight is NF4: entrenar's kernels, which decode it on the way, and bitsandbytes' Linear4bit.

Two uses: many rows, forward and back to the input (training on a frozen base), and one row (writing text). The second
waits for memory, so a case goes through many copies of its matrix, more than any cache holds, and its speed is that of
one after the other. Beside both stand our own float32 and bfloat16.
"""

# N rows (tokens), O features out, I features in

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from typing import Any

from benchmarks.arrays import agree, fingerprint, normal
from benchmarks.driver import Agreement, Bench, Times
from benchmarks.protocol import Case
from benchmarks.report import Row, Target
from benchmarks.spread import Spread, geometric_mean

SHAPES = ((768, 768), (3072, 768), (2048, 2048), (5632, 2048))  # (O, I): of the 124m model and of TinyLlama's
ROWS = (256, 1024)
BEYOND_CACHES = 96 << 20  # bytes of a matrix' copies: three times a large processor's last cache
TOLERANCE_BFLOAT16 = 1e-2  # of a result's length: eight binary digits of each weight, or of everything

NF4, FLOAT32, BFLOAT16 = "entrenar-nf4", "entrenar-float32", "entrenar-bfloat16"
PEER, PEER_INFERENCE = "torch", "torch-inference"


@dataclass(frozen=True)
class Layer:
    outputs: int
    inputs: int
    rows: int

    @property
    def name(self) -> str:
        return f"{self.inputs} -> {self.outputs}, {self.rows} {'rows' if self.rows > 1 else 'row'}"


# -- contenders


def arrays(outputs: int, inputs: int, rows: int) -> tuple[Any, Any, Any]:
    """W (O, I), x (N, I), dy (N, O)"""
    return normal(2, outputs, inputs, scale=0.02), normal(1, rows, inputs), normal(3, rows, outputs)


def with_entrenar(kind: str, **shape: int) -> Case:
    from entrenar import Tensor, kernels, ops
    from entrenar.quant import quantize

    w, x, dy = arrays(**shape)
    weight: Any = quantize(w, "nf4")
    if kind == FLOAT32:
        weight = Tensor(kernels.unpack(weight))
    elif kind == BFLOAT16:
        weight = quantize(kernels.unpack(weight), "bfloat16")
    if shape["rows"] == 1:
        return one_row(weight, x)
    leaf = Tensor(x, requires_grad=True)

    def run() -> Any:
        leaf.grad = None
        y = ops.linear(leaf, weight)
        y.backward(dy)
        return y

    y = run()
    assert leaf.grad is not None
    return Case(run, fingerprint(y.data, leaf.grad))


def one_row(weight: Any, x: Any) -> Case:
    from entrenar import Tensor, no_grad, ops

    copies = cycle([another(weight) for _ in range(how_many(weight.nbytes))])
    row = Tensor(x)

    def run() -> Any:
        with no_grad():
            return ops.linear(row, next(copies))

    return Case(run, fingerprint(run().data))


def another(weight: Any) -> Any:
    """The same matrix in other memory."""
    return replace(weight, codes=weight.codes.copy(), scales=deepcopy(weight.scales))


def how_many(nbytes: int) -> int:
    return -(-BEYOND_CACHES // nbytes)


def with_torch(*, inference: bool, **shape: int) -> Case:
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit

    w, x, dy = (torch.from_numpy(array) for array in arrays(**shape))
    layer = Linear4bit(shape["inputs"], shape["outputs"], bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = Params4bit(w, requires_grad=False, quant_type="nf4", compress_statistics=True)
    layer = layer.to("cpu").train(not inference)  # which quantizes
    layer.support_avx512bf16_for_cpu &= "ATEN_CPU_CAPABILITY" not in os.environ  # --isa
    if shape["rows"] == 1:
        return one_torch_row(layer, x)
    x.requires_grad_()

    def run() -> Any:
        x.grad = None
        y = layer(x)
        y.backward(dy)
        return y

    y = run()
    return Case(run, fingerprint(y.detach().numpy(), x.grad.numpy()))


def one_torch_row(layer: Any, x: Any) -> Case:
    import torch

    with torch.inference_mode():
        y = layer(x)  # for inference it turns its weight into another layout, here, before it is copied
        copies = cycle([deepcopy(layer) for _ in range(how_many(layer.weight.nbytes))])

    def run() -> Any:
        with torch.inference_mode():
            return next(copies)(x)

    run()
    return Case(run, fingerprint(y.numpy()))


CONTENDERS: dict[str, Callable[..., Case]] = {
    **{kind: partial(with_entrenar, kind) for kind in (NF4, FLOAT32, BFLOAT16)},
    PEER: partial(with_torch, inference=False),
    PEER_INFERENCE: partial(with_torch, inference=True),
}


# -- the driver's side


def roughly(a: list[float], b: list[float]) -> bool:
    return agree(a, b, tolerance=TOLERANCE_BFLOAT16)


AGREE: dict[str, Agreement] = {BFLOAT16: roughly, PEER_INFERENCE: roughly}


def rows(bench: Bench) -> Iterator[Row]:
    training = [Layer(O, I, N) for O, I in SHAPES for N in ROWS]  # noqa: E741
    measured = raced(bench, training, (NF4, FLOAT32, PEER), seconds=0.1)
    what = "NF4 linear, forward and backward, 256 and 1024 rows"
    yield summary(bench, f"{what}: speed over bitsandbytes", measured, PEER, Target(">=", 2.0))
    yield summary(bench, f"{what}: speed to our float32", measured, FLOAT32, Target(">=", 0.93))

    writing = [Layer(O, I, 1) for O, I in SHAPES]  # noqa: E741
    measured = raced(bench, writing, (NF4, BFLOAT16, PEER, PEER_INFERENCE), seconds=0.1)
    what = "NF4 linear, 1 row from memory"
    yield summary(bench, f"{what}: speed over bitsandbytes in float32", measured, PEER, Target(">=", 20.0))
    yield summary(bench, f"{what}: speed over our bfloat16", measured, BFLOAT16, Target(">", 1.0))
    name = f"{what}: speed over bitsandbytes' kernel for inference, which computes in bfloat16"
    yield summary(bench, name, measured, PEER_INFERENCE)


def raced(bench: Bench, layers: list[Layer], contenders: tuple[str, ...], seconds: float) -> dict[Layer, Times]:
    results = {}
    for layer in layers:
        shape = {"outputs": layer.outputs, "inputs": layer.inputs, "rows": layer.rows}
        results[layer] = bench.race("packed", bench.present(contenders), seconds=seconds, agree=AGREE, **shape)
        bench.say(f"  {layer.name}: " + ", ".join(
            f"{name} {results[layer].of(name).median * 1e3:.3g} ms" for name in results[layer].seconds
        ))  # fmt: skip
    return results


def summary(bench: Bench, name: str, results: dict[Layer, Times], over: str, target: Target | None = None) -> Row:
    """The geometric mean over the layers, the worst of them, and a table of all."""
    if over not in bench.present((over,)):
        return Row("packed", name, "x", None, target, "", bench.torch_missing or "")
    ratios = {layer: times.speedup(of=NF4, over=over) for layer, times in results.items()}
    mean, low, high = (geometric_mean(getattr(r, end) for r in ratios.values()) for end in ("median", "low", "high"))
    worst = min(ratios, key=lambda layer: ratios[layer].median)
    note = f"geometric mean of {len(ratios)}; worst {ratios[worst].median:.3g}x: {worst.name}"
    details = {"table": table(results, ratios)} if target else {}
    return Row("packed", name, "x", Spread(mean, low, high), target, share(bench, results), note, details)


def share(bench: Bench, results: dict[Layer, Times]) -> str:
    """Ours, of what the machine can do: arithmetic where there are many rows, reading memory where there is one."""
    seconds = sum(times.of(NF4).median for times in results.values())
    if all(layer.rows == 1 for layer in results):
        # a nibble for each weight and a byte for each 64; a copy's bandwidth counts both ways
        return bench.share_of_bandwidth(sum(n.inputs * n.outputs * (1 / 2 + 1 / 64) for n in results) / seconds)
    return bench.share_of_peak(sum(4 * n.rows * n.inputs * n.outputs for n in results) / seconds)


def table(results: dict[Layer, Times], ratios: dict[Layer, Spread]) -> list[list[str]]:
    names = list(next(iter(results.values())).seconds)
    lines = [["layer", *(f"{name}, ms" for name in names), "ratio"]]
    for layer, times in results.items():
        each = [f"{times.of(name).median * 1e3:.3g}" for name in names]
        lines.append([layer.name, *each, f"{ratios[layer].median:.2f}"])
    return lines
