"""float32 matrix products of LLaMA's linear layers, in the three forms training takes them in.

forward   y = x W^T        backward   dx = dy W,   dW = dy^T x          x (N, I)   W (O, I)   dy (N, O)

Peers write into an array that is there; entrenar makes one for each product, with `kernels.keep_freed_memory()`, as
in training. The layers of a model share a turn (a suite): each is timed by itself.
"""

# N rows (tokens), I inputs, O outputs

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks.arrays import fingerprint, normal
from benchmarks.driver import Bench, Times
from benchmarks.groups import machine
from benchmarks.protocol import Case
from benchmarks.report import Row, Target
from benchmarks.spread import Spread, mean_of

# model: (hidden C, feed-forward F, vocabulary to measure the head of; the larger heads go by like up_proj)
MODELS = {"15m": (288, 768, 32000), "124m": (768, 3072, 0), "1b": (2048, 5632, 0)}
FORMS = ("x W^T", "dY W", "dY^T X")
TOKENS = (64, 512, 4096)
FEW = (1, 4, 16)  # rows of a text being written; 64 are among TOKENS
ONE_THREAD = (64, 512)  # tokens of the products measured on one thread, too
MOST = 40e9  # FLOPs of the largest product: q_proj stands for 1b's others at 4096 tokens
CUBE = 512  # from so many rows, columns and terms of each sum on, a product should come near the peak
FLOOR = 0.93  # of the better peer's speed
AGAIN = 3  # times as many rounds for a shape under the floor


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

    @property
    def smallest_side(self) -> int:
        return min(self.tokens, self.inputs, self.outputs)


Suite = list[Product]
Results = dict[Product, Times]


def suite(model: str, form: str, tokens: int) -> Suite:
    """The layers of a model. Its head goes by chunks of a few hundred tokens only, as the loss takes it."""
    C, F, V = MODELS[model]
    layers = {"q_proj": (C, C), "up_proj": (C, F), "down_proj": (F, C)} | (
        {"lm_head": (C, V)} if V and tokens <= CUBE else {}
    )
    made = [Product(model, layer, form, tokens, *sides) for layer, sides in layers.items()]
    return [product for product in made if product.flops <= MOST]


def suites(tokens: Iterable[int], forms: Iterable[str] = FORMS) -> Iterator[Suite]:
    tokens = tuple(tokens)
    for model in MODELS:
        for form in forms:
            for n in tokens:
                yield suite(model, form, n)


# -- contenders


def operands(form: str, tokens: int, inputs: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """The two matrices as a training step holds them: the transposed one is a view."""
    if form == "x W^T":
        return normal(1, tokens, inputs), normal(2, outputs, inputs).T
    if form == "dY W":
        return normal(3, tokens, outputs), normal(2, outputs, inputs)
    return normal(3, tokens, outputs).T, normal(1, tokens, inputs)


Multiply = Callable[[np.ndarray, np.ndarray], Callable[[], Any]]  # gives what multiplies, again and again


def case(multiply: Multiply, products: list[dict]) -> Case:
    runs = [multiply(*operands(p["form"], p["tokens"], p["inputs"], p["outputs"])) for p in products]
    return Case(runs, fingerprint(*(np.asarray(run()) for run in runs)))


def with_entrenar(products: list[dict]) -> Case:
    from entrenar import kernels

    kernels.keep_freed_memory()
    return case(lambda a, b: lambda: kernels.matmul(a, b), products)


def with_numpy(products: list[dict]) -> Case:
    def multiply(a: np.ndarray, b: np.ndarray) -> Callable[[], Any]:
        out = np.empty((len(a), b.shape[1]), np.float32)
        return lambda: np.matmul(a, b, out=out)

    return case(multiply, products)


def with_torch(products: list[dict]) -> Case:
    import torch

    def multiply(a: np.ndarray, b: np.ndarray) -> Callable[[], Any]:
        x, y, out = torch.from_numpy(a), torch.from_numpy(b), torch.empty(len(a), b.shape[1])
        return lambda: torch.matmul(x, y, out=out)

    return case(multiply, products)


CONTENDERS = {"entrenar": with_entrenar, "numpy": with_numpy, "torch": with_torch}


# -- the driver's side


def rows(bench: Bench) -> Iterator[Row]:
    """Rows that count over all shapes, the slowest shape, those near the peak; then one per model and form."""
    results = measured(bench, suites(TOKENS))
    few = measured(bench, suites(FEW, FORMS[:1]))
    few |= {p: t for p, t in results.items() if p.form == FORMS[0] and p.tokens == TOKENS[0]}
    yield summary(bench, "GEMM on LLaMA shapes, to the better of NumPy and PyTorch", results, Target(">=", 1.0))
    yield slowest(bench, "GEMM on LLaMA shapes: the slowest shape", results)
    yield from near_the_peak(bench, results)
    yield summary(bench, "GEMM of 1, 4, 16 and 64 rows, to the better of both", few, Target(">=", 1.2))
    with machine.on_threads(bench, 1) as one:
        alone = measured(one, suites(ONE_THREAD))
        yield summary(one, "GEMM on one thread, to the better of both", alone, Target(">=", 1.0))
        yield slowest(one, "GEMM on one thread: the slowest shape", alone)
    for model in MODELS:
        for form in FORMS:
            same = {p: t for p, t in results.items() if (p.model, p.form) == (model, form)}
            yield summary(bench, f"GEMM {model}, {form}", same)


EVERYBODY = ("entrenar", "numpy", "torch")


def measured(bench: Bench, each: Iterable[Suite], rounds: int = 0, contenders: tuple[str, ...] = EVERYBODY) -> Results:
    """Every product of the suites by every contender that is there."""
    results: Results = {}
    for products in each:
        times = bench.races("gemm", bench.present(contenders), seconds=0.03, rounds=rounds or bench.rounds,
                            products=[asdict(p) for p in products])  # fmt: skip
        for product, of_product in zip(products, times, strict=True):
            results[product] = of_product
            bench.say(f"  {in_words(product, of_product)}")
    return results


def to_best(times: Times) -> Spread:
    """entrenar's speed over that of whichever peer is faster at this shape."""
    peer = times.best_peer()
    assert peer, "NumPy is always there"
    return times.speedup(over=peer)


def summary(bench: Bench, name: str, results: Results, target: Target | None = None) -> Row:
    ratios = {product: to_best(times) for product, times in results.items()}
    mean, worst = mean_of(ratios.values()), min(ratios, key=lambda product: ratios[product].median)
    flops = sum(p.flops for p in results) / sum(t.of("entrenar").median for t in results.values())
    note = f"geometric mean of {len(results)}; worst {ratios[worst].median:.2f}x: {shape_name(worst)}"
    if bench.torch_missing:
        note += f"; NumPy alone, PyTorch: {bench.torch_missing}"
    details = {"table": detail(bench, results)} if target else {}
    return Row("gemm", name, "x", mean, target, bench.share_of_peak(flops), note, details)


def slowest(bench: Bench, name: str, results: Results) -> Row:
    """The shape with the lowest ratio, after those under the floor had more rounds: those then count, alone."""
    under = [product for product, times in results.items() if to_best(times).median < FLOOR]
    if under:
        results = results | measured(bench, ([product] for product in under), AGAIN * bench.rounds)
    worst = min(results, key=lambda product: to_best(results[product]).median)
    still = sum(to_best(results[product]).median < FLOOR for product in under)
    note = f"of {len(results)}: {shape_name(worst)}"
    if under:
        more = AGAIN * bench.rounds
        note += f"; {len(under)} under {FLOOR:g}x were measured again, {more} rounds each: {still} still are"
    share = bench.share_of_peak(1e9 * gflops(worst, results[worst], "entrenar"))
    return Row("gemm", name, "x", to_best(results[worst]), Target(">=", FLOOR), share, note)


def near_the_peak(bench: Bench, results: Results) -> Iterator[Row]:
    """Large products: each one's share of the peak."""
    shares = {
        product: 1e11 * gflops(product, times, "entrenar") / bench.machine["fma_peak"]
        for product, times in results.items()
        if product.smallest_side >= CUBE
    }
    worst = min(shares, key=shares.__getitem__)
    what, target = f"GEMM from {CUBE} x {CUBE} x {CUBE} up: share of FMA peak", Target(">=", 88.0)
    yield Row("gemm", f"{what}, median", "%", Spread.of(shares.values()), target, "", f"of {len(shares)}, over all")
    yield Row("gemm", f"{what}, lowest", "%", Spread.of([shares[worst]]), target, "", shape_name(worst))


def shape_name(product: Product) -> str:
    p = product
    return f"{p.model} {p.layer} {p.form}, {rows_of(p.tokens)} ({p.inputs} -> {p.outputs})"


def rows_of(tokens: int) -> str:
    return f"{tokens} token{'s' * (tokens > 1)}"


def gflops(product: Product, times: Times, contender: str) -> float:
    return product.flops / times.of(contender).median / 1e9


def in_words(product: Product, times: Times) -> str:
    speeds = ", ".join(f"{name} {gflops(product, times, name):.0f}" for name in times.seconds)
    return f"{shape_name(product)}: {speeds} GFLOP/s, {to_best(times).median:.2f}x"


def detail(bench: Bench, results: Results) -> list[list[str]]:
    names = {"entrenar": "entrenar", "numpy": "NumPy", "torch": "PyTorch"}
    present = list(next(iter(results.values())).seconds)
    speeds_of = [f"{names[contender]} GFLOP/s" for contender in present]
    lines = [["model", "layer", "form", "tokens", *speeds_of, "ratio", "share of peak"]]
    for p, t in results.items():
        speeds = [f"{gflops(p, t, contender):.0f}" for contender in present]
        share = f"{gflops(p, t, 'entrenar') * 1e9 / bench.machine['fma_peak']:.0%}"
        layer = f"{p.layer} {p.inputs} -> {p.outputs}"
        lines.append([p.model, layer, p.form, str(p.tokens), *speeds, f"{to_best(t).median:.2f}", share])
    return lines
