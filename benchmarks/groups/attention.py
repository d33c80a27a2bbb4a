"""Causal attention, forward and backward, against PyTorch's scaled_dot_product_attention; and how its memory grows.

Grouped heads (32 of queries share 4 of keys and values) run in PyTorch both ways it has, `enable_gqa` and the keys and
values repeated beforehand; the faster one counts.
"""

# B batch, T time, H heads, KH key/value heads, D head dim

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.arrays import normal
from benchmarks.driver import Bench, Times
from benchmarks.groups import machine
from benchmarks.groups.ops import Operation, entrenar_case, torch_case
from benchmarks.protocol import Case, peak_memory
from benchmarks.report import Row, Target
from benchmarks.spread import Spread, mean_of

SHORT, LONG = (256, 512, 1024), (2048, 4096)  # T
TOKENS = 1024  # B T, at least: several sequences where they are short
GREATEST = 100e9  # FLOPs: from there on fewer groups of heads stand for all
LENGTHS = (2048, 4096, 8192)  # T at which memory is measured
LINEAR = 1.05  # times as many bytes a token at the greater lengths


@dataclass(frozen=True)
class Shape:
    B: int
    T: int
    H: int
    KH: int
    D: int

    @property
    def flops(self) -> int:
        # Two products of (T, D) x (D, T) forward, five backward, half of each masked.
        return 7 * self.B * self.H * self.T * self.T * self.D

    @property
    def name(self) -> str:
        heads = f"{self.H} heads" if self.H == self.KH else f"{self.H}/{self.KH} heads"
        return f"{self.B} x {self.T}, {heads} of {self.D}"


def shape(T: int, H: int, KH: int, D: int) -> Shape:
    """Of the 15m model, the 124m, the 1.1b: with fewer heads where that saves minutes, in the same proportion."""
    made = Shape(max(1, TOKENS // T), T, H, KH, D)
    while made.flops > GREATEST and made.KH % 2 == 0:
        made = replace(made, H=made.H // 2, KH=made.KH // 2)
    return made


HEADS = {"": ((6, 6, 48), (12, 12, 64)), " with grouped heads": ((32, 4, 64),)}


# -- contenders


def operation(sizes: Shape, repeat: bool = False) -> Operation:
    B, T, H, KH, D = sizes.B, sizes.T, sizes.H, sizes.KH, sizes.D
    shapes = ((B, T, H, D), (B, T, KH, D), (B, T, KH, D))

    def theirs(torch, constants, q, k, v):
        heads = [x.transpose(1, 2) for x in (q, k, v)]  # (B, H, T, D), views, as transformers makes them
        if repeat:
            heads[1:] = [x.repeat_interleave(H // KH, 1) for x in heads[1:]]
        grouped = {} if repeat or H == KH else {"enable_gqa": True}
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(*heads, is_causal=True, **grouped).transpose(1, 2)

    return Operation(shapes, lambda ops, _, q, k, v: ops.attention(q, k, v), theirs, flops=sizes.flops)


def with_entrenar(**sizes: int) -> Case:
    return entrenar_case(operation(Shape(**sizes)))


def with_torch(**sizes: int) -> Case:
    return torch_case(operation(Shape(**sizes)))


def with_torch_repeated(**sizes: int) -> Case:
    return torch_case(operation(Shape(**sizes), repeat=True))


CONTENDERS = {
    "entrenar": with_entrenar,
    "torch": with_torch,
    "torch-repeated": with_torch_repeated,
    "product": machine.multiplying,
}


def growth_of_memory(T: int) -> int:
    """Bytes by which the peak of this process grows for inputs, output and gradients of T tokens, and what goes by."""
    entrenar_case(operation(Shape(1, 64, 12, 12, 64)))  # threads and scratch memory are there before
    from entrenar import Tensor, ops

    before = peak_memory()
    leaves = [Tensor(normal(i, 1, T, 12, 64), requires_grad=True) for i in range(3)]
    ops.attention(*leaves).backward(normal(9, 1, T, 12, 64))
    return peak_memory() - before


# -- the driver's side


def rows(bench: Bench) -> Iterator[Row]:
    for lengths, target in ((SHORT, Target(">=", 2.0)), (LONG, Target(">=", 1.6))):
        for kind, heads in HEADS.items():
            shapes = [shape(T, *each) for each in heads for T in lengths]
            what = f"attention{kind}, T {lengths[0]} to {lengths[-1]}, forward and backward"
            yield summary(bench, what, {sizes: race(bench, sizes) for sizes in shapes}, target)
    yield memory(bench)


def race(bench: Bench, sizes: Shape, rounds: int = 0) -> Times:
    names = ("entrenar", "torch") if sizes.H == sizes.KH else ("entrenar", "torch", "torch-repeated")
    times = bench.race("attention", bench.present(names), rounds=rounds or bench.rounds, **asdict(sizes))
    bench.say(f"  attention {sizes.name}: " + ", ".join(
        f"{name} {speed(sizes, times, name) / 1e9:.0f} GFLOP/s" for name in times.seconds))  # fmt: skip
    return times


def speed(sizes: Shape, times: Times, contender: str) -> float:
    return sizes.flops / times.of(contender).median


def summary(bench: Bench, what: str, results: dict[Shape, Times], target: Target | None) -> Row:
    ours = sum(sizes.flops for sizes in results) / sum(t.of("entrenar").median for t in results.values())
    share, note = bench.share_of_peak(ours), f"{ours / 1e9:.0f} GFLOP/s"
    if bench.torch_missing:
        return Row("attention", what, "", None, None, share, f"{note}; {bench.torch_missing}")
    ratios = {sizes: times.speedup(over=times.best_peer() or "torch") for sizes, times in results.items()}
    mean, worst = mean_of(ratios.values()), min(ratios, key=lambda sizes: ratios[sizes].median)
    note += f"; geometric mean of {len(ratios)}; worst {ratios[worst].median:.2f}x: {worst.name}"
    details = {"table": table(bench, results, ratios)}
    return Row("attention", f"{what}: speed over PyTorch", "x", mean, target, share, note, details)


def table(bench: Bench, results: dict[Shape, Times], ratios: dict[Shape, Spread]) -> list[list[str]]:
    names = list(dict.fromkeys(name for times in results.values() for name in times.seconds))
    lines = [["shape", *(f"{name} GFLOP/s" for name in names), "ratio", "share of peak"]]
    for sizes, times in results.items():
        speeds = [f"{speed(sizes, times, name) / 1e9:.0f}" for name in names]
        share = f"{speed(sizes, times, 'entrenar') / bench.machine['fma_peak']:.0%}"
        lines.append([sizes.name, *speeds, f"{ratios[sizes].median:.2f}", share])
    return lines


def memory(bench: Bench) -> Row:
    """A process for each length: what one adds to its peak, a token, from the shortest to the longest."""
    grown: dict[int, int] = {}
    for T in LENGTHS:
        worker = bench.start("entrenar")
        try:
            grown[T] = worker.call("attention", "growth_of_memory", T=T)
        finally:
            worker.close()
    first, *_, last = (grown[T] / T for T in LENGTHS)
    each = ", ".join(f"{grown[T] / T / 1024:.1f} KB a token at {T}" for T in LENGTHS)
    what, note = f"attention: memory of a token, T {LENGTHS[-1]} to T {LENGTHS[0]}", f"{each}; 12 heads of 64"
    details: dict[str, Any] = {"bytes": {str(T): size for T, size in grown.items()}}
    return Row("attention", what, "x", Spread.of([last / first]), Target("<=", LINEAR), "", note, details)
