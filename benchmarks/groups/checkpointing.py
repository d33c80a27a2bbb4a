"""A training step on a long row, whose blocks forget their activations and compute them again in backward.

What it costs in time, against the same step without; what is left of memory, beside what a step cannot do without:
parameters, gradients, two moments. PyTorch's own checkpointing stands beside ours with --full.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from benchmarks.driver import Bench
from benchmarks.groups import step
from benchmarks.report import Row, Target
from benchmarks.spread import Spread

MODEL, BATCH, CONTEXT = "124m", 1, 2048
PLAIN, OURS, PEER = "entrenar", "entrenar-checkpointed", "torch-checkpointed"
FLOAT = 4  # bytes

CONTENDERS = {
    PLAIN: step.with_entrenar,
    OURS: partial(step.with_entrenar, checkpointing=True),
    PEER: partial(step.with_torch, checkpointing=True),
}


def parameter_bytes(model: str) -> int:
    from entrenar.llama import LlamaConfig

    return FLOAT * LlamaConfig(**step.MODELS[model]).parameter_count()


# -- the driver's side


def rows(bench: Bench) -> Iterator[Row]:
    contenders = bench.present((PLAIN, OURS, PEER) if bench.full else (PLAIN, OURS))
    with step.written_weights(bench, MODEL) as weights:
        times, peaks = bench.race_apart(
            "checkpointing", contenders, seconds=1.0, rounds=min(bench.rounds, step.FEW_ROUNDS), agree=step.same_losses,
            model=MODEL, batch=BATCH, context=CONTEXT, weights=weights, first=1,
        )  # fmt: skip
    what = f"{MODEL} training step with checkpointing, {BATCH} x {CONTEXT}"
    speed = {name: BATCH * CONTEXT / times.of(name).median for name in contenders}
    details = {"tokens_per_second": speed, "peak_bytes": peaks, "seconds": times.seconds}

    # Of the FLOPs that are wanted: those of computing again are the cost
    flops = bench.worker(PLAIN).call("step", "flops_per_token", model=MODEL, context=CONTEXT)
    share = bench.share_of_peak(flops * speed[OURS])
    note = f"{speed[OURS]:.0f} tokens/s to {speed[PLAIN]:.0f}, which is {bench.share_of_peak(flops * speed[PLAIN])}"
    slower = times.speedup(of=PLAIN, over=OURS)
    yield Row("checkpointing", f"{what}: time of it over that of a step without", "x", slower, Target("<=", 1.35),
              share, note, details)  # fmt: skip

    weights_alone = bench.worker(PLAIN).call("checkpointing", "parameter_bytes", model=MODEL)
    note = (
        f"{peaks[OURS] / 2**20:.0f} MB, whole process, {peaks[PLAIN] / 2**20:.0f} without checkpointing; "
        f"{peaks[OURS] / (3 * weights_alone):.3g}x of parameters and moments alone"
    )
    yield Row("checkpointing", f"{what}: peak memory over parameters, gradients and moments", "x",
              Spread.of([peaks[OURS] / (4 * weights_alone)]), Target("<=", 1.15), "", note)  # fmt: skip

    if PEER in contenders:
        note = f"{speed[OURS]:.0f} tokens/s to {speed[PEER]:.0f}, {peaks[PEER] / 2**20:.0f} MB"
        faster = times.speedup(of=OURS, over=PEER)
        yield Row("checkpointing", f"{what}: speed over transformers' with its own", "x", faster, None, share, note)
