"""What a run says of itself in words: the lines above the first step, the picture's contents, the lines at the end."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from entrenar.observe.record import Record
from entrenar.training import machine
from entrenar.training.checkpoint import BEST, NEWEST
from entrenar.training.curve import Curve
from entrenar.training.display import HeldOut, clock, make_console
from entrenar.training.trainer import Trainer


def introduction(trainer: Trainer, here: machine.Machine) -> list[str]:
    """What is trained, on what, where: the lines above the first step."""
    shape, t, data, facts = trainer.model.config, trainer.config.training, trainer.data, trainer.data.facts
    batch = f"{t.batch_size} x {t.context} tokens" + (f" x {t.accumulation}" if t.accumulation > 1 else "")
    lines = [
        f"model    {shape.num_hidden_layers} layers, {shape.hidden_size} wide, "
        f"{shape.num_attention_heads} heads, feed-forward {shape.intermediate_size}, "
        f"vocabulary {shape.vocab_size:,} ({data.tokenizer.kind})",
        f"text     {facts.train_bytes:,} bytes in {facts.train_documents:,} documents, "
        f"{facts.train_tokens:,} tokens",
        f"held out {facts.held_out_bytes:,} bytes in {facts.held_out_documents:,} documents; "
        f"gzip -9 {facts.gzip_bits:.3f}, xz -9 {facts.xz_bits:.3f} bits per byte",
        f"steps    as many as fit into {t.budget}, of {batch}" if t.budget else f"steps    {t.steps:,} of {batch}",
        f"machine  {here.cpu}, {here.threads} threads, {here.kernels}, "
        f"measured peak {here.peak_flops / 1e9:.0f} GFLOP/s",
        f"folder   {trainer.run}",
    ]
    if t.start_from:
        lines.insert(1, f"weights  those of {t.start_from}")
    if facts.skipped:
        skipped = f"skipped  {facts.skipped_documents:,} files or rows that cannot be used, e.g. {facts.skipped[0]}"
        lines.insert(3, skipped)
    return lines


def curve(trainer: Trainer, here: machine.Machine) -> Curve:
    """The picture's contents, of all steps in metrics.jsonl: those before the run was resumed too."""
    shape, facts, t = trainer.model.config, trainer.data.facts, trainer.config.training
    subtitle = (
        f"{shape.parameter_count() / 1e6:.1f} M parameters, {shape.num_hidden_layers} layers of "
        f"{shape.hidden_size}, vocabulary {shape.vocab_size:,}, "
        f"{t.batch_size * t.accumulation} x {t.context} tokens per step · "
        f"{clock(trainer.reports[-1].seconds if trainer.reports else 0)} on {here.threads} threads of {here.cpu}"
    )
    record = Record(trainer.run)
    looks = {column.step: column.mean for column in record.held_out.columns()}
    looks |= {seen.step: seen.bits_per_byte for seen in trainer.looks[-1:]}  # at the end: the whole text
    return Curve(
        f"A LLaMA learns {_short(facts.source)}", subtitle,
        [(column.step, column.mean) for column in record.series["bits_per_byte"].columns()],
        list(looks.items()),
        [("gzip -9", facts.gzip_bits), ("xz -9", facts.xz_bits)],
    )  # fmt: skip


def summarize(trainer: Trainer, last: HeldOut | None, sample: str) -> None:
    """What came out, and what to do next."""
    console, facts, run = make_console(), trainer.data.facts, trainer.run

    def say(text: str = "", **style: Any) -> None:
        console.print(text, markup=False, **style)

    seconds = trainer.reports[-1].seconds if trainer.reports else trainer.seconds
    say()
    say(f"trained {trainer.step:,} steps, {trainer.tokens_seen:,} tokens, in {clock(seconds)}", style="bold")
    if last:
        part = f"all {last.bytes:,} bytes" if last.whole else f"a sample of {last.bytes:,} bytes"
        rows = [("this model", last.bits_per_byte), ("gzip -9", facts.gzip_bits), ("xz -9", facts.xz_bits)]
        say(f"bits per byte on held-out text it never saw, {part}:")
        for name, bits in sorted(rows, key=lambda row: row[1]):
            say(f"  {name:<12} {bits:.4f}", style="bold green" if name == "this model" else "none")
    else:
        say(f"stopped ({trainer.stopping}) before the end; nothing is lost")
    if sample:
        say("\na sample it wrote:", style="bold")
        say("  | " + visible(sample).rstrip().replace("\n", "\n  | "))
    say("\nfiles", style="bold")
    for name, about in FILES:
        if (run / name).exists():
            say(f"  {run / name}  {about}")
    say("\nnext", style="bold")
    for line in next_commands(trainer):
        say(f"  {line}")


def visible(text: str) -> str:
    """The text with control characters shown as U+FFFD: a model may write what moves a terminal's cursor."""
    return "".join(c if c.isprintable() or c in HARMLESS else "\ufffd" for c in text)


HARMLESS = "\n\t\u00a0\u202f\u3000\u200c\u200d"  # spaces and joiners that Python does not call printable

FILES = (
    ("report.html", "all of it on one page, for a browser"),
    ("curve.png", "the picture of the loss"),
    (NEWEST, "to go on from; transformers loads it"),
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
    return [
        f'{command} generate {run} --prompt "..."  # let it write',
        f"{command} train --data.source path/to/your/text  # a file, a folder, or a glob pattern",
        f"{command} resume {run} --training.steps {2 * trainer.steps}  # train it longer",
        f"{command} export {run} --to gguf --out model.gguf  # for llama.cpp and its friends",
    ]


def command_name() -> str:
    """`entrenar` as it can be typed here: by its name where the shell would find this one, else by this Python."""
    found = shutil.which("entrenar")
    if found and Path(found).absolute().parent == Path(sys.executable).absolute().parent:
        return "entrenar"
    python, this = shutil.which("python"), Path(sys.executable)
    if python and Path(python).absolute() == this:
        return "python -m entrenar"
    return f"{shlex.quote(str(this.relative_to(Path.cwd()) if this.is_relative_to(Path.cwd()) else this))} -m entrenar"


def _short(source: str) -> str:
    if source == "stdlib:":
        return "Python's standard library"
    name = "standard input" if source == "-" else Path(source).name or source
    return name if len(name) <= 60 else name[:57] + "..."
