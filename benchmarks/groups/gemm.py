"""float32 matrix products of LLaMA's linear layers, in the three forms training takes them in.

forward   y = x W^T        backward   dx = dy W,   dW = dy^T x          x (N, I)   W (O, I)   dy (N, O)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from benchmarks.arrays import fingerprint, normal
from benchmarks.driver import Bench, Times
from benchmarks.protocol import Case
from benchmarks.report import Row, Target
from benchmarks.spread import Spread, geometric_mean

# model: (hidden C, feed-forward F, vocabulary to measure the head of; the larger heads go by like up_proj)
MODELS = {"15m": (288, 768, 32000), "124m": (768, 3072, 0), "1b": (2048, 5632, 0)}
TOKENS = (64, 512, 4096)
FORMS = ("x W^T", "dY W", "dY^T X")
HEAD_TOKENS = (64, 512)  # the loss goes through the head in chunks of about so many tokens
FEW_ROUNDS = 3  # for products that take most of a second
LARGE = 30e9  # FLOPs of such a product


@dataclass(frozen=True)
class Product:
    model: str
    layer: str
    form: str
    tokens: int
    inputs: int
    outputs: int

    @property
    def flops(self) -> int:
        return 2 * self.tokens * self.inputs * self.outputs


def products() -> Iterator[Product]:
    for model, (C, F, V) in MODELS.items():
        layers = {"q_proj": (C, C), "up_proj": (C, F), "down_proj": (F, C)}
        for form in FORMS:
            for layer, (inputs, outputs) in layers.items():
                for tokens in TOKENS:
                    yield Product(model, layer, form, tokens, inputs, outputs)
            for tokens in HEAD_TOKENS if V else ():
                yield Product(model, "lm_head", form, tokens, C, V)


# -- contenders


def operands(form: str, tokens: int, inputs: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """The two matrices as a training step holds them: the transposed one is a view."""
    if form == "x W^T":
        return normal(1, tokens, inputs), normal(2, outputs, inputs).T
    if form == "dY W":
        return normal(3, tokens, outputs), normal(2, outputs, inputs)
    return normal(3, tokens, outputs).T, normal(1, tokens, inputs)


def with_entrenar(**shape) -> Case:
    from entrenar import kernels

    a, b = operands(**shape)
    return Case(lambda: kernels.matmul(a, b), fingerprint(kernels.matmul(a, b)))


def with_numpy(**shape) -> Case:
    a, b = operands(**shape)
    return Case(lambda: np.matmul(a, b), fingerprint(np.matmul(a, b)))


def with_torch(**shape) -> Case:
    import torch

    a, b = (torch.from_numpy(x) for x in operands(**shape))
    return Case(lambda: torch.matmul(a, b), fingerprint(torch.matmul(a, b).numpy()))


CONTENDERS = {"entrenar": with_entrenar, "numpy": with_numpy, "torch": with_torch}


# -- the driver's side


def rows(bench: Bench) -> Iterator[Row]:
    """One row per model and form, then the one that counts: over all shapes, geometric mean and worst."""
    contenders = bench.present(("entrenar", "numpy", "torch"))
    results: dict[Product, Times] = {}
    everything = list(products())
    for i, product in enumerate(everything, 1):
        rounds = min(bench.rounds, FEW_ROUNDS) if product.flops > LARGE else bench.rounds
        results[product] = bench.race(
            "gemm", contenders, seconds=0.03, rounds=rounds, form=product.form, tokens=product.tokens,
            inputs=product.inputs, outputs=product.outputs)  # fmt: skip
        bench.say(f"  {i}/{len(everything)} {in_words(product, results[product])}")
        last = i == len(everything)
        if last or (everything[i].model, everything[i].form) != (product.model, product.form):
            same = {p: t for p, t in results.items() if (p.model, p.form) == (product.model, product.form)}
            yield summary(bench, f"GEMM {product.model}, {product.form}", same)
    yield summary(
        bench, "GEMM on LLaMA shapes, to the better of NumPy and PyTorch", results, target=Target(">=", 0.9)
    )


def to_best(times: Times) -> Spread:
    """entrenar's speed over that of whichever peer is faster at this shape."""
    peer = times.best_peer()
    assert peer, "NumPy is always there"
    return times.speedup(over=peer)


def summary(bench: Bench, name: str, results: dict[Product, Times], target: Target | None = None) -> Row:
    ratios = {product: to_best(times).median for product, times in results.items()}
    mean = geometric_mean(ratios.values())
    # Bounds of the mean: all shapes at their worst round, and at their best.
    low, high = (
        geometric_mean(getattr(to_best(t), end) for t in results.values()) for end in ("low", "high")
    )
    worst = min(ratios, key=ratios.__getitem__)
    flops = sum(p.flops for p in results) / sum(t.of("entrenar").median for t in results.values())
    note = f"geometric mean of {len(results)}; worst {ratios[worst]:.2f}x: {shape_name(worst)}"
    if bench.torch_missing:
        note += f"; NumPy alone, PyTorch: {bench.torch_missing}"
    details = {"table": detail(bench, results)} if target else {}
    threads = "" if bench.threads == 2 else f" ({bench.threads} threads)"
    return Row(
        "gemm",
        name + threads,
        "x",
        Spread(mean, low, high),
        target,
        bench.share_of_peak(flops),
        note,
        details,
    )


def shape_name(product: Product) -> str:
    p = product
    return f"{p.model} {p.layer} {p.form}, {p.tokens} tokens ({p.inputs} -> {p.outputs})"


def gflops(product: Product, times: Times, contender: str) -> float:
    return product.flops / times.of(contender).median / 1e9


def in_words(product: Product, times: Times) -> str:
    speeds = ", ".join(f"{name} {gflops(product, times, name):.0f}" for name in times.seconds)
    return f"{shape_name(product)}: {speeds} GFLOP/s, {to_best(times).median:.2f}x"


def detail(bench: Bench, results: dict[Product, Times]) -> list[list[str]]:
    names = {"entrenar": "entrenar", "numpy": "NumPy", "torch": "PyTorch"}
    present = list(next(iter(results.values())).seconds)
    lines = [
        [
            "model",
            "layer",
            "form",
            "tokens",
            *(f"{names[c]} GFLOP/s" for c in present),
            "ratio",
            "share of peak",
        ]
    ]
    for p, t in results.items():
        speeds = [f"{gflops(p, t, contender):.0f}" for contender in present]
        share = f"{gflops(p, t, 'entrenar') * 1e9 / bench.machine['fma_peak']:.0%}"
        layer = f"{p.layer} {p.inputs} -> {p.outputs}"
        lines.append([p.model, layer, p.form, str(p.tokens), *speeds, f"{to_best(t).median:.2f}", share])
    return lines
