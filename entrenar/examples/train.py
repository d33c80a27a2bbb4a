"""The main job: a LLaMA learns real text. `python -m entrenar.examples.train --help` lists every option.

Exit codes: 0 done; 1 training failed; 2 the configuration or the text cannot be used; 130 stopped by Ctrl-C
or SIGTERM (after finishing the step, saving, and writing sample and curve).
"""

from __future__ import annotations

import io
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from entrenar import kernels, random
from entrenar.data import ByteTokenizer, CorpusError, Prepared, TokenizerError, load_tokenizer, prepare
from entrenar.files import write_file
from entrenar.llama import Llama, LlamaConfig
from entrenar.training import machine
from entrenar.training.checkpoint import BEST, NEWEST
from entrenar.training.config import Config, ConfigError, help_text, read_config, to_toml
from entrenar.training.curve import Curve, render
from entrenar.training.display import Display, Heading, HeldOut, clock, make_console, make_display, size
from entrenar.training.trainer import Trainer, TrainingError, interruptible

COMMAND = "python -m entrenar.examples.train"
SMALLEST = ByteTokenizer.vocab_size  # no tokenizer has fewer tokens than the bytes and the end

USAGE = f"""usage: {COMMAND} [--config FILE.toml] [--section.key VALUE ...]

Trains a LLaMA on real text: with no options, on the source of Python's own standard library, in about three
minutes on two cores. Writes a folder: checkpoint, curve.png, sample.txt, metrics.jsonl, config.toml.

  --config FILE.toml    read options from a file; examples/llama2/configs has some
  --section.key VALUE   set one option; goes over the file
  --out FOLDER          short for --checkpointing.out
  --plan                print parameters, memory and arithmetic of the configuration, and stop
  --help                this text

Exit codes: 0 done, 1 training failed, 2 bad configuration or text, 130 stopped by Ctrl-C (saved before)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code."""
    display: Display | None = None
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a letter the terminal lacks must not end a run
            stream.reconfigure(errors="replace")
    try:
        asked = parse(sys.argv[1:] if arguments is None else arguments)
        if asked.help:
            print(USAGE + "\n" + help_text())
            return 0
        config = read_config(asked.file, asked.overrides)
        if asked.plan:
            print(plan(config))
            return 0
        display = make_display(report_every=config.training.report_every)
        return train(config, display)
    except (ConfigError, CorpusError, TokenizerError) as error:
        return _fail(display, str(error), 2)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        return _fail(display, f"{place}{error.strerror or error}", 1)
    except (TrainingError, MemoryError) as error:
        return _fail(display, str(error) or "out of memory", 1)
    except KeyboardInterrupt:
        return _fail(display, "stopped at once, nothing more was saved", 130)


@dataclass
class Arguments:
    """The command line, taken apart but not understood."""

    file: str | None = None
    overrides: list[tuple[str, str]] = field(default_factory=list)
    plan: bool = False
    help: bool = False


def parse(words: Sequence[str]) -> Arguments:
    """Take `--name value` and `--name=value` apart. Raises ConfigError for a word that is neither."""
    found, problems, rest = Arguments(), [], list(words)
    problems += [f"{word!r}: wanted UTF-8" for word in words if not _is_unicode(word)]
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if word in ("--help", "-h"):
            found.help = True
        elif word == "--plan":
            found.plan = True
        elif not word.startswith("--"):
            problems.append(f"{word}: wanted --section.key VALUE (or --config FILE.toml)")
        elif not equals and (not rest or rest[0].startswith("--")):
            problems.append(f"{word}: a value is missing")
        else:
            value = value if equals else rest.pop(0)
            if name == "--config":
                found.file = value
            else:
                found.overrides.append(("checkpointing.out" if name == "--out" else name[2:], value))
    if problems:
        raise ConfigError("the command line cannot be read:\n  " + "\n  ".join(problems))
    return found


def _is_unicode(word: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in word)


def train(config: Config, display: Display) -> int:
    """The whole job, from text to picture."""
    run = run_folder(config)
    must_fit(config, config.llama(config.model["vocab_size"] or SMALLEST))  # before the text takes its time
    data = prepare(config.data.source, tokenizer=config.data.tokenizer, vocab_size=config.data.vocab_size,
                   held_out=config.data.held_out, cache=config.data.cache, say=display.doing)  # fmt: skip
    shape = config.llama(data.tokenizer.vocab_size, data.tokenizer.end_id)
    must_fit(config, shape)

    kernels.keep_freed_memory()
    random.seed(config.training.seed)
    model = Llama(shape, checkpointing=config.training.activation_checkpointing)
    here = machine.look()
    trainer = Trainer(config, data, model, run, display, peak_flops=here.peak_flops)
    again = replace(config, checkpointing=replace(config.checkpointing, out=""))  # another run, another folder
    write_file(run / "config.toml", to_toml(again))
    about = Heading(
        f"a LLaMA of {shape.parameter_count():,} parameters learns {config.data.source}",
        introduction(config, data, shape, here, run),
        data.facts.gzip_bits,
        data.facts.xz_bits,
    )
    trainer.log("start", config=config.sections(), data=asdict(data.facts), machine=asdict(here))
    try:
        with interruptible(trainer.stop):
            display.start(about)
            trainer.train()
            return finish(trainer, about, here)
    finally:
        trainer.close()
        display.close()


def finish(trainer: Trainer, about: Heading, here: machine.Machine) -> int:
    """Checkpoint, last look at the held-out text, sample and picture: also after Ctrl-C."""
    if trainer.stopping:
        trainer.display.note(f"{trainer.stopping}: stopping after step {trainer.step}; once more stops at once")
    if trainer.step:
        trainer.save()
    last = trainer.look(whole=not trainer.stopping)
    trainer.display.doing("writing a sample")
    sample = trainer.sample() if trainer.config.training.sample_tokens else ""
    write_file(trainer.run / "sample.txt", sample + "\n")
    write_file(trainer.run / "curve.png", render(curve(trainer, here)))
    stopped = trainer.stopping
    trainer.log("end", step=trainer.step, stopped=stopped, held_out_bits_per_byte=last.bits_per_byte)
    trainer.display.doing("done")
    trainer.display.close()
    summarize(trainer, last, sample)
    return 130 if stopped else 0


def run_folder(config: Config) -> Path:
    """Where the run goes. Raises ConfigError rather than write into a folder that holds something."""
    if config.checkpointing.out:
        run = Path(os.path.expanduser(config.checkpointing.out))
        if run.exists() and (not run.is_dir() or any(run.iterdir())):
            raise ConfigError(
                f"--out {run}: exists and is not an empty folder; name a new one, or move it away"
            )
    else:
        stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
        names = [stamp, *(f"{stamp}-{n}" for n in range(2, 1000))]
        run = next(run for name in names if not (run := Path("runs", name)).exists())
    there = next(folder for folder in (run, *run.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"--out {run}: cannot be made: {there} is no folder you can write into")
    return run


def must_fit(config: Config, shape: LlamaConfig) -> None:
    """Raises ConfigError for a model and a micro-batch that exceed this machine's memory."""
    t, limit = config.training, machine.memory_limit()
    need = shape.memory_estimate(t.batch_size, t.context)
    kept = need.activations if not t.activation_checkpointing else 0  # recomputed: much less than estimated
    if need.total - need.activations + kept > limit:
        raise ConfigError(
            f"this run needs about {size(need.total)} to be trained, this machine has {size(limit)}: choose a "
            "smaller [model], training.batch_size or context; --plan shows where the memory goes"
        )


def plan(config: Config) -> str:
    """What a configuration costs, by arithmetic alone."""
    t = config.training
    vocab = config.model["vocab_size"] or expected_vocabulary(config)
    shape = config.llama(vocab)
    need = shape.memory_estimate(t.batch_size, t.context)
    flops = shape.flops_per_token(t.context)
    tokens = t.steps * t.accumulation * t.batch_size * t.context
    limit, peak = machine.memory_limit(), machine.look().peak_flops
    rows = [
        ("parameters", f"{shape.parameter_count():,}"),
        ("vocabulary", f"{vocab:,}"),
        ("memory: weights", size(need.weights)),
        ("memory: gradients", size(need.gradients)),
        ("memory: AdamW's moments", size(need.optimizer)),
        (
            "memory: activations",
            f"{size(need.activations)} for {t.batch_size} x {t.context} tokens"
            + (", less with activation_checkpointing" if t.activation_checkpointing else ""),
        ),
        (
            "memory together",
            f"{size(need.total)} of {size(limit)} here" + ("" if need.total < limit else ": too much"),
        ),
        ("arithmetic per token", f"{flops / 1e6:,.1f} MFLOP, forward and backward"),
        ("tokens", f"{tokens:,} in {t.steps:,} steps"),
        ("arithmetic together", f"{flops * tokens / 1e12:,.0f} TFLOP"),
        (
            "time at half the peak",
            f"{clock(flops * tokens / (peak / 2))} with {peak / 1e9:,.0f} GFLOP/s measured here",
        ),
    ]
    return "\n".join(f"{name:<24} {value}" for name, value in rows)


def expected_vocabulary(config: Config) -> int:
    """The tokenizer's size, before there is one; of a BPE the most it may have."""
    name = config.data.tokenizer
    if name == "bytes":
        return SMALLEST
    return config.data.vocab_size if name == "bpe" else load_tokenizer(os.path.expanduser(name)).vocab_size


def introduction(
    config: Config, data: Prepared, shape: LlamaConfig, here: machine.Machine, run: Path
) -> list[str]:
    """What is trained, on what, where: the lines above the first step."""
    t, facts = config.training, data.facts
    batch = f"{t.batch_size} x {t.context} tokens" + (f" x {t.accumulation}" if t.accumulation > 1 else "")
    lines = [
        f"model    {shape.num_hidden_layers} layers, {shape.hidden_size} wide, "
        f"{shape.num_attention_heads} heads, feed-forward {shape.intermediate_size}, "
        f"vocabulary {shape.vocab_size:,} ({data.tokenizer.kind})",
        f"text     {facts.train_bytes:,} bytes in {facts.train_documents:,} documents, "
        f"{facts.train_tokens:,} tokens",
        f"held out {facts.held_out_bytes:,} bytes in {facts.held_out_documents:,} documents; "
        f"gzip -9 {facts.gzip_bits:.3f}, xz -9 {facts.xz_bits:.3f} bits per byte",
        f"steps    {t.steps:,} of {batch}",
        f"machine  {here.cpu}, {here.threads} threads, {here.kernels}, "
        f"measured peak {here.peak_flops / 1e9:.0f} GFLOP/s",
        f"folder   {run}",
    ]
    if facts.skipped:
        skipped = f"skipped  {len(facts.skipped)} files that are not UTF-8 text, e.g. {facts.skipped[0]}"
        lines.insert(3, skipped)
    return lines


def curve(trainer: Trainer, here: machine.Machine) -> Curve:
    """The picture's contents."""
    shape, facts, t = trainer.model.config, trainer.data.facts, trainer.config.training
    seconds = trainer.reports[-1].seconds if trainer.reports else 0.0
    subtitle = (
        f"{shape.parameter_count() / 1e6:.1f} M parameters, {shape.num_hidden_layers} layers of "
        f"{shape.hidden_size}, vocabulary {shape.vocab_size:,}, "
        f"{t.batch_size * t.accumulation} x {t.context} tokens per step · "
        f"{clock(seconds)} on {here.threads} threads of {here.cpu}"
    )
    looks = {seen.step: seen.bits_per_byte for seen in trainer.looks}  # the last look is the whole text
    return Curve(
        f"A LLaMA learns {_short(facts.source)}", subtitle,
        [(r.step, r.bits_per_byte) for r in trainer.reports],
        list(looks.items()),
        [("gzip -9", facts.gzip_bits), ("xz -9", facts.xz_bits)],
    )  # fmt: skip


def summarize(trainer: Trainer, last: HeldOut, sample: str) -> None:
    """What came out, and what to do next."""
    console, facts, run = make_console(), trainer.data.facts, trainer.run

    def say(text: str = "", **style: Any) -> None:
        console.print(text, markup=False, **style)

    seconds = trainer.reports[-1].seconds if trainer.reports else 0.0
    part = f"all {last.bytes:,} bytes" if last.whole else f"a sample of {last.bytes:,} bytes"
    say()
    say(f"trained {trainer.step:,} steps, {trainer.tokens_seen:,} tokens, in {clock(seconds)}", style="bold")
    rows = [("this model", last.bits_per_byte), ("gzip -9", facts.gzip_bits), ("xz -9", facts.xz_bits)]
    say(f"bits per byte on held-out text it never saw, {part}:")
    for name, bits in sorted(rows, key=lambda row: row[1]):
        say(f"  {name:<12} {bits:.4f}", style="bold green" if name == "this model" else "none")
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
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


FILES = (
    ("curve.png", "the picture of the loss"),
    (NEWEST, "weights, tokenizer, optimizer: transformers can load it"),
    (BEST, "the one with the lowest held-out loss on the way"),
    ("sample.txt", "the sample above"),
    ("metrics.jsonl", "every number of every step"),
    ("config.toml", "this configuration, to run again or to change"),
)


def next_commands(trainer: Trainer) -> list[str]:
    """Commands worth trying after this run."""
    steps, source = trainer.config.training.steps, trainer.config.data.source
    command = f"{interpreter()} -m entrenar.examples.train"
    again = f"--config {shlex.quote(str(trainer.run / 'config.toml'))} --training.steps {2 * steps}"
    return [
        f"{command} --data.source path/to/your/text  # a file, a folder, or a glob pattern",
        f"{command} {again}" + (" < the/same/text" if source == "-" else ""),
        f"{command} --help  # every option",
    ]


def interpreter() -> str:
    """This Python as it can be typed here: `python` if that is it, else its path."""
    found, this = shutil.which("python"), Path(sys.executable)
    if found and Path(found).absolute() == this:
        return "python"
    return shlex.quote(str(this.relative_to(Path.cwd()) if this.is_relative_to(Path.cwd()) else this))


def _short(source: str) -> str:
    if source == "stdlib:":
        return "Python's standard library"
    name = "standard input" if source == "-" else Path(source).name or source
    return name if len(name) <= 60 else name[:57] + "..."


def _fail(display: Display | None, message: str, code: int) -> int:
    if display is not None:
        display.close()
    print(f"{COMMAND}: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
