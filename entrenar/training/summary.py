"""What a run says of itself in words when it has ended: what came out, which files there are, what to do next."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from entrenar.training.checkpoint import BEST, NEWEST
from entrenar.training.display import HeldOut, clock, make_console
from entrenar.training.task import Sample
from entrenar.training.trainer import Trainer


def summarize(trainer: Trainer, last: HeldOut | None, samples: Sequence[Sample]) -> None:
    """What came out, and what to do next."""
    console, run = make_console(), trainer.run

    def say(text: str = "", **style: Any) -> None:
        console.print(text, markup=False, **style)

    seconds = trainer.reports[-1].seconds if trainer.reports else trainer.seconds
    say()
    say(f"trained {trainer.step:,} steps, {trainer.tokens_seen:,} tokens, in {clock(seconds)}", style="bold")
    if last:
        about, rows = trainer.task.results(last, trainer.before.look if trainer.before else None)
        say(about)
        for name, value in sorted(rows, key=lambda row: row[1]):
            say(f"  {name:<12} {value:.4f}", style="bold green" if name == rows[0][0] else "none")
    else:
        say(f"stopped ({trainer.stopping}) before the end; nothing is lost")
    earlier = trainer.before.samples if trainer.before else []
    for sample, before in zip_longest(samples, earlier[: len(samples)]):
        say("\nwhat it answers:" if before else "\na sample it wrote:", style="bold")
        say("  | " + visible(written(sample, before)).rstrip().replace("\n", "\n  | "))
    say("\nfiles", style="bold")
    for name, about in FILES:
        if (run / name).exists():
            say(f"  {run / name}  {about}")
    say("\nnext", style="bold")
    for line in next_commands(trainer):
        say(f"  {line}")


def written(sample: Sample, before: Sample | None) -> str:
    """A prompt and what was written after it; where there was something before, side by side with that, and with what
    the data has."""
    if before is None:
        return sample.prompt + sample.text
    parts = [("before", before.text), ("after", sample.text), *([("wanted", sample.wanted)] if sample.wanted else [])]
    lines = (f"[{name}] {text.strip()}" for name, text in parts)
    return "\n".join([sample.prompt.rstrip(), *lines])


def visible(text: str) -> str:
    """The text with control characters shown as U+FFFD: a model may write what moves a terminal's cursor."""
    return "".join(c if c.isprintable() or c in HARMLESS else "\ufffd" for c in text)


HARMLESS = "\n\t\u00a0\u202f\u3000\u200c\u200d"  # spaces and joiners that Python does not call printable

FILES = (
    ("report.html", "all of it on one page, for a browser"),
    ("curve.png", "the picture of the loss"),
    (NEWEST, "to go on from; Hugging Face's libraries load it"),
    (BEST, "the lowest held-out loss on the way"),
    ("sample.txt", "the sample above"),
    ("metrics.jsonl", "every number of every step"),
    ("config.toml", "every option, to run again or change"),
)


def next_commands(trainer: Trainer) -> list[str]:
    """Commands worth trying after this run."""
    command, run = command_name(), shlex.quote(str(trainer.run))
    if trainer.stopping:
        return [f"{command} resume {run}  # goes on as if nothing had happened"]
    return trainer.task.next_commands(command, run, trainer.steps)


def command_name() -> str:
    """`entrenar` as it can be typed here: by its name where the shell would find this one, else by this Python."""
    found = shutil.which("entrenar")
    if found and Path(found).absolute().parent == Path(sys.executable).absolute().parent:
        return "entrenar"
    python, this = shutil.which("python"), Path(sys.executable)
    if python and Path(python).absolute() == this:
        return "python -m entrenar"
    return f"{shlex.quote(str(this.relative_to(Path.cwd()) if this.is_relative_to(Path.cwd()) else this))} -m entrenar"
