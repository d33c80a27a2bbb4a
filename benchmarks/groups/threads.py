"""What a second thread brings, and what a busy neighbour takes.

Two threads against one: forward and backward of the 124m model on 1 x 512 tokens, in processes of their own, in turns;
the 124m step of 2 x 512 is twice that and the optimizer. The neighbour is a process that does nothing but count, held
to one processor: the 15m training step beside it, against the same step on an idle machine, round by round.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.driver import Bench, Times
from benchmarks.groups import growth, machine, step
from benchmarks.protocol import Case, Worker
from benchmarks.report import Row, Target
from benchmarks.spread import Spread, ratios

FEW_ROUNDS = 3
TOKENS = 512
MODEL: dict[str, Any] = dict(model="15m", batch=4, context=256)
BUSY = "import os, sys\nif sys.argv[1:]: os.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"


# -- contenders


def with_entrenar() -> Case:
    from entrenar import kernels

    kernels.keep_freed_memory()  # as the training job does
    network = growth.made(step.MODELS["124m"])
    ids, targets = (x.reshape(1, TOKENS) for x in growth.batch(TOKENS, step.MODELS["124m"]["vocab_size"]))

    def run() -> float:
        network.zero_grad()
        loss = network.loss(ids, targets, reduction="mean")
        loss.backward()
        return loss.item()

    return Case(run, [run()])


CONTENDERS = {"entrenar": with_entrenar, "entrenar-1": with_entrenar}


# -- the driver's side


def rows(bench: Bench) -> Iterator[Row]:
    yield second_thread(bench)
    yield from neighbour(bench)


def second_thread(bench: Bench) -> Row:
    """Same bits, said by the losses, which must be equal."""
    with machine.on_threads(bench, 1) as one:
        workers = {"entrenar": bench.start("entrenar"), "entrenar-1": one.start("entrenar-1")}
        try:
            times = bench.race("threads", tuple(workers), seconds=0.1, rounds=min(bench.rounds, FEW_ROUNDS),
                               agree=lambda a, b: a == b, workers=workers)  # fmt: skip
        finally:
            for worker in workers.values():
                worker.close()
        peaks = bench.machine["fma_peak"] / one.machine["fma_peak"]
    speed = {name: TOKENS / times.of(name).median for name in workers}
    note = f"{speed['entrenar-1']:.0f} tokens/s on one, {speed['entrenar']:.0f}; FMA peak alone gains {peaks:.2f}x"
    what = f"124m forward and backward, 1 x {TOKENS}: {bench.threads} threads over one"
    return Row("threads", what, "x", times.speedup(over="entrenar-1"), Target(">=", 1.85), "", note,
               {"seconds": times.seconds})  # fmt: skip


def neighbour(bench: Bench) -> Iterator[Row]:
    """A row for each contender: how many times as long a step takes beside the neighbour."""
    contenders = bench.present(("entrenar", "torch"))
    with tempfile.TemporaryDirectory() as folder:
        weights = str(Path(folder, "weights.safetensors"))
        bench.worker("entrenar").call("step", "write_own_weights", model=MODEL["model"], path=weights)
        for name in contenders:
            with bench.apart((name,)) as workers:
                times = beside(bench, workers, {**MODEL, "weights": weights})
            slower = ratios(times.seconds["idle"], times.seconds["beside"])
            note = f"{times.of('idle').median * 1e3:.0f} ms alone, {times.of('beside').median * 1e3:.0f} ms beside it"
            target = Target("<=", 2.5) if name == "entrenar" else None
            what = f"15m training step beside a busy neighbour: times as long, {name}"
            yield Row("threads", what, "x", slower, target, "", note, {"seconds": times.seconds})


def beside(bench: Bench, workers: dict[str, Worker], args: dict[str, Any]) -> Times:
    """Seconds of a step, idle and beside a neighbour, in turns."""
    (name,) = workers
    seconds: dict[str, list[float]] = {"idle": [], "beside": []}
    rounds = min(bench.rounds, FEW_ROUNDS if name == "entrenar" else 1)
    workers[name].prepare("step", **args)
    for _ in range(rounds):
        seconds["idle"] += [Spread.of(workers[name].time(0.5)[0]).median]
        with busy_neighbour():
            seconds["beside"] += [Spread.of(workers[name].time(2.0)[0]).median]
    return Times(seconds)


@contextmanager
def busy_neighbour() -> Iterator[subprocess.Popen]:
    """A process that keeps one processor busy: the last of those we may use, where the system can hold it there."""
    where = [str(max(os.sched_getaffinity(0)))] if hasattr(os, "sched_getaffinity") else []
    process = subprocess.Popen([sys.executable, "-c", BUSY, *where], start_new_session=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
