"""The default training run itself: how long it trains, and how well it then predicts text it never saw."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.driver import Bench
from benchmarks.groups.startup import TRAIN, environment
from benchmarks.protocol import WorkerError
from benchmarks.report import Row, Target
from benchmarks.spread import Spread

COMPRESSOR = re.compile(r"^\s*(gzip|xz) -9\s+([0-9.]+)\s*$", re.MULTILINE)


def rows(bench: Bench) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        out, started = Path(folder, "run"), time.perf_counter()
        env = environment(bench, cache=f"{folder}/cache")
        run = subprocess.run(
            [sys.executable, *TRAIN, "--out", str(out)], env=env, cwd=folder, capture_output=True, text=True
        )
        whole = time.perf_counter() - started
        if run.returncode:
            raise WorkerError(
                f"the default run ended with status {run.returncode}: {run.stderr.strip()[-300:]}"
            )
        seconds, bits, steps = outcome((out / "metrics.jsonl").read_text())
    others = ", ".join(f"{name} -9 {value}" for name, value in COMPRESSOR.findall(run.stdout))
    yield Row(
        "default_run",
        "the default run: training",
        "s",
        Spread.of([seconds]),
        Target("<", 180.0),
        note=f"{steps} steps; {whole:.0f} s from command to prompt, from a cold start",
    )
    yield Row(
        "default_run",
        "the default run: held-out bits per byte",
        "bits",
        Spread.of([bits]),
        Target("<=", 1.65),
        note=f"all held-out text; {others}",
    )


def outcome(metrics: str) -> tuple[float, float, int]:
    """Seconds of training, bits per byte over all held-out text, steps: from a run's metrics.jsonl."""
    events = [json.loads(line) for line in metrics.splitlines()]
    last = [event for event in events if event["event"] == "step"][-1]
    (held_out,) = (event for event in events if event["event"] == "held_out" and event["whole"])
    return last["seconds"], held_out["bits_per_byte"], last["step"]
