"""Small training runs for tests of how runs end and go on: in this process, or as a process that can be killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from conftest import SAME_PACKAGE

from entrenar.cli import main
from entrenar.training.checkpoint import MODEL, OPTIMIZER, newest, read_sums

TEXT = "".join(f"{i} times {i} is {i * i}, and that is true.\n" for i in range(400))
SMALL = {
    "data.source": "text.txt", "data.tokenizer": "bytes",
    "model.hidden_size": 16, "model.intermediate_size": 32, "model.num_hidden_layers": 1,
    "model.num_attention_heads": 2, "training.steps": 12, "training.batch_size": 2, "training.context": 16,
    "training.eval_every": 4, "training.eval_tokens": 64, "training.report_every": 3, "training.sample_tokens": 8,
    "lr_schedule.warmup_steps": 2, "checkpointing.every": 2,
}  # fmt: skip


def words(**changes) -> list[str]:
    """The command line of a small run; options by keyword, "__" for the dot."""
    options = SMALL | {name.replace("__", "."): value for name, value in changes.items()}
    return [f"--{name}={value}" for name, value in options.items()]


def train(run: str, **changes) -> int:
    return main(["train", "--out", run, *words(**changes)])


def resume(run: str, *more: str) -> int:
    return main(["resume", run, *more])


def process(*command: str, before: str = "") -> subprocess.Popen:
    """`entrenar ...` as a process of its own; `before` is Python that runs first, in it."""
    script = f"{before}\nimport sys\nfrom entrenar.cli import main\nsys.exit(main({list(command)!r}))"
    return subprocess.Popen([sys.executable, "-c", script], env=SAME_PACKAGE | {"OMP_NUM_THREADS": "1"} | environment(),
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip


def environment() -> dict[str, str]:
    return {"XDG_CACHE_HOME": os.environ["XDG_CACHE_HOME"]}


def bits(run: str | Path) -> dict[str, str]:
    """SHA-256 of weights and optimizer state of a run's newest checkpoint, and which one it is."""
    folder = newest(Path(run))
    sums = read_sums(folder)
    return {"step": folder.name, MODEL: sums[MODEL], OPTIMIZER: sums[OPTIMIZER]}
