"""The fine-tuning demonstrations: a model learns what it cannot do, with `entrenar finetune`, offline, in minutes.

    1. write the rows of the task as users have theirs: train.jsonl, and valid.jsonl, which is never trained on
    2. ask the base the held-out questions
    3. entrenar finetune --base.model ... --data.source ...
    4. put the adapter that came of it beside the base, and ask them again
"""

from __future__ import annotations

import argparse
import os
import shlex
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path

from entrenar.adapters import count, load_adapter
from entrenar.cli import main as entrenar
from entrenar.cli import told
from entrenar.data import load_tokenizer
from entrenar.examples.demo_task import answers, exact_match, write_rows
from entrenar.examples.train_base import BASE
from entrenar.formats import FormatError
from entrenar.llama import Llama
from entrenar.training.machine import memory_peak
from entrenar.training.summary import command_name

# What the demonstrations change of the defaults, which are for larger bases: a small one needs, and bears, larger steps
OPTIONS = {
    "lr_schedule.learning_rate": 3e-3, "training.steps": 1000, "training.accumulation": 1, "training.eval_every": 100,
    "training.report_every": 25, "training.sample_tokens": 16, "data.max_length": 256,
}  # fmt: skip
SHOWN = 6  # held-out rows printed


@dataclass(frozen=True)
class Outcome:
    """Exact match before and after, and the exit code: 0 where both were measured."""

    code: int
    before: float
    after: float


def run(name: str, storage: str, arguments: Sequence[str] | None = None) -> int:
    """`demonstrate` as a command: returns the exit code, and says in one line what went wrong."""
    try:
        return demonstrate(name, storage, arguments).code
    except (OSError, FormatError, KeyboardInterrupt) as error:
        return told("", error)


def demonstrate(name: str, storage: str, arguments: Sequence[str] | None = None) -> Outcome:
    """The whole demonstration, the base held in `storage`; `arguments` are --out and options of `entrenar finetune`."""
    began = time.perf_counter()
    out, more = _parsed(name, arguments)
    rows = write_rows(out / "rows")

    print(f"{len(rows)} held-out lines, of days that no line it learns from has: which day is it?\n", flush=True)
    model, tokenizer = Llama.from_pretrained(BASE, storage=storage), load_tokenizer(BASE)
    prompts = [row["prompt"] for row in rows]
    first = answers(model, tokenizer, prompts)
    before = exact_match(first, rows)
    _show(["line", "the base answers"], zip(prompts, first, strict=True))
    print(f"\nexact match before: {before:.1%}\n")

    words = _words(out, storage, more)
    print(f"$ {command_name()} {shlex.join(words)}\n", flush=True)
    if code := entrenar(words):
        return Outcome(code, before, 0.0)

    adapter = out / "run" / "checkpoint"
    load_adapter(model, adapter, trainable=True)
    last = answers(model, tokenizer, prompts)
    after = exact_match(last, rows)
    print()
    _show(["line", "before", "after"], zip(prompts, first, last, strict=True))
    size = (adapter / "adapter_model.safetensors").stat().st_size
    print(f"\nexact match on {len(rows)} held-out lines: before {before:.1%}, after {after:.1%}")
    print(f"adapter  {adapter}, {size / 1e6:.2f} MB; {count(model)}")
    print(f"took     {time.perf_counter() - began:.0f} seconds, {time.process_time():.0f} of processor time, "
          f"{memory_peak() / 1e6:.0f} MB of memory at most")  # fmt: skip
    for line in _next(out):
        print(line)
    return Outcome(0, before, after)


def _parsed(name: str, arguments: Sequence[str] | None) -> tuple[Path, list[str]]:
    """The folder to write into, new or empty, and what is for `entrenar finetune`."""
    parser = argparse.ArgumentParser(
        prog=f"python -m entrenar.examples.{name}", usage="%(prog)s [--out FOLDER] [--section.key VALUE ...]",
        allow_abbrev=False, epilog="`entrenar finetune --help-options` lists the options that may follow.",
        description="A small model learns to read dates: measured before, fine-tuned, measured after.",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="where rows and run go, new or empty (default: runs/<name>_<date>)")
    args, more = parser.parse_known_args(arguments)
    out = args.out or Path("runs", f"{name}_{datetime.now():%Y-%m-%d_%H-%M-%S}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        parser.error(f"--out {out}: exists and is not an empty folder")
    return out, more


def _words(out: Path, storage: str, more: Sequence[str]) -> list[str]:
    """The command that fine-tunes."""
    words = ["finetune", "--base.model", os.path.relpath(BASE), "--base.storage", storage,
             "--data.source", str(out / "rows"), "--out", str(out / "run")]  # fmt: skip
    return words + [word for key, value in OPTIONS.items() for word in (f"--{key}", str(value))] + list(more)


def _next(out: Path) -> Iterator[str]:
    """Commands worth trying."""
    base, run, merged = (shlex.quote(str(path)) for path in (os.path.relpath(BASE), out / "run", out / "merged"))
    yield f"next     {command_name()} generate {base} --adapter {run} --temperature 0 --prompt $'Due May 4th, 1999\\n'"
    yield f"         {command_name()} merge {run} --out {merged}  # base and adapter as one plain model"


def _show(heading: Sequence[str], lines: Iterable[tuple[str, ...]]) -> None:
    """The first few of the lines, in columns."""
    rows = [heading, *(tuple(_visible(text) for text in line) for line in islice(lines, SHOWN))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  " + "   ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def _visible(text: str) -> str:
    """On one line, and such that spaces show."""
    text = text.strip("\n") if text.strip() else text
    return text if text.isprintable() and text.strip() == text else repr(text)
