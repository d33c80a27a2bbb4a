"""How long until something happens: `import entrenar`, and the first loss of the default run.

Whole processes, timed from outside, in a folder of their own, with a cache folder that starts empty.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence

from benchmarks.driver import Bench
from benchmarks.report import Row, Target
from benchmarks.spread import Spread

TRAIN = ("-m", "entrenar.examples.train")
LOSS = re.compile(r"\bloss=[0-9.]+")


def environment(bench: Bench, cache: str | None = None) -> dict[str, str]:
    """A contender's, in which `entrenar` is the installed one, or this checkout's where none is installed."""
    env = bench.environment() | ({"XDG_CACHE_HOME": cache} if cache else {})
    found = subprocess.run([sys.executable, "-c", "import entrenar"], cwd="/", env=env, capture_output=True)
    return env if found.returncode == 0 else env | {"PYTHONPATH": str(bench.root)}


def wall(arguments: Sequence[str], env: dict[str, str], cwd: str) -> float:
    """Seconds from the start of a Python process to its end."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], env=env, cwd=cwd, check=True, capture_output=True)
    return time.perf_counter() - started


def first_loss(env: dict[str, str], cwd: str) -> float:
    """Seconds from the start of the default run to its first line with a loss; the run is then ended."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *TRAIN, "--out", tempfile.mkdtemp(dir=cwd)],
        env=env,
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    said = []
    try:
        assert process.stdout
        for line in process.stdout:
            seconds = time.perf_counter() - started
            if LOSS.search(line):
                return seconds
            said.append(line.strip())
        raise RuntimeError(f"the default run ended without a loss: {' | '.join(said[-3:])}")
    finally:
        process.kill()
        process.communicate()


def rows(bench: Bench) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        env = environment(bench)
        runs = 2 * bench.rounds
        wall(("-c", "import entrenar"), env, folder)  # byte code is compiled once, at installation as a rule
        bare, whole = [], []
        for _ in range(runs):
            bare.append(wall(("-c", "pass"), env, folder))
            whole.append(wall(("-c", "import entrenar"), env, folder))
        own = Spread.of(w - b for w, b in zip(whole, bare, strict=True))
        note = f"whole process; {own.median:.3f} s more than an empty one; {runs} runs"
        yield Row("startup", "import entrenar", "s", Spread.of(whole), Target("<", 0.3), "", note)

        cold, prepared = [], []
        for i in range(min(bench.rounds, 3)):
            env = environment(bench, cache=f"{folder}/cache{i}")
            cold.append(first_loss(env, folder))
            prepared.append(first_loss(env, folder))
            bench.say(f"  first loss: cold {cold[-1]:.2f} s, prepared {prepared[-1]:.2f} s")
        note = "from the start of the process, text to be read, tokenizer to be trained"
        yield Row(
            "startup",
            "first loss line of the default run, cold",
            "s",
            Spread.of(cold),
            Target("<", 10.0),
            "",
            note,
        )
        note = "from the start of the process, data prepared by an earlier run"
        yield Row(
            "startup",
            "first loss line of the default run, prepared",
            "s",
            Spread.of(prepared),
            Target("<", 3.0),
            "",
            note,
        )
