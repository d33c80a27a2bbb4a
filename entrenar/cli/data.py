"""`entrenar data`: what a run trains on. `show` prints it token by token, `prepare` makes it ready and says so; `chat`
prints the examples of fine-tuning data (data_chat.py).

What is shown is what the run takes: the same batches, in the same order, from the same seed. A token is trained when
the model predicts it and the loss counts it; ignored when it is only read - the first of a window, and of a held-out
window what an earlier one has predicted already.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from entrenar.cli import data_chat
from entrenar.cli.configuration import Override, add_config
from entrenar.cli.parser import CommandLineError
from entrenar.cli.terminal import colours, facts, visible
from entrenar.cli.tokens import Writer, counts, spelled, writer
from entrenar.training.progress import Bars, Progress

if TYPE_CHECKING:
    from entrenar.data import Prepared
    from entrenar.training.config import Config

NAME = "data"
HELP = "show what will be trained, token by token; or prepare it and no more"
EXAMPLE = """
entrenar data show --data.source notes/ -n 4
entrenar data show --base.model llama/ --data.source chats.jsonl
entrenar data chat chats.jsonl --tokenizer model/
entrenar data prepare --data.source corpus.jsonl.gz --data.vocab_size 8192
"""
SHOW = "print the batches that a run takes, token by token"
PREPARE = "read, split and tokenize the text, and keep it for the runs to come"
SHOW_EXAMPLE = """example:
  entrenar data show --data.source notes/ -n 4

On a terminal, trained tokens have a coloured ground in two shades, ignored
ones are dim. Elsewhere, tokens are separated by |, ignored ones stand in
[brackets], with a \\ before what could be mistaken. A character spread over
several tokens stands at its last one; the others are shown as \N{MIDDLE DOT}."""
PREPARE_EXAMPLE = """example:
  entrenar data prepare --data.source corpus.jsonl.gz --data.vocab_size 8192

A preparation that was stopped goes on where it was when it is started again."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "entrenar data {show,prepare,chat} [OPTIONS] [--section.key VALUE ...]"
    verbs = parser.add_subparsers(dest="what", metavar="{show,prepare,chat}", required=True)
    show = _verb(verbs, "show", SHOW, SHOW_EXAMPLE, "[--batch N] [-n COUNT] [--held-out]")
    show.add_argument("--batch", metavar="N", type=int, default=1, help="begin with the N-th batch (default 1)")
    show.add_argument("-n", metavar="COUNT", type=int, dest="count", help="so many windows (default: one batch)")
    show.add_argument("--held-out", action="store_true", help="show the held-out text's windows instead")
    prepare = _verb(verbs, "prepare", PREPARE, PREPARE_EXAMPLE, "")
    for one in (show, prepare):
        one.add_argument("--skip-bad", dest="data.skip_bad", action=Override, nargs=0, default=argparse.SUPPRESS,
                         help="leave out files and rows that cannot be read")  # fmt: skip
        add_config(one)
    data_chat.add_arguments(verbs)


def _verb(verbs: Any, name: str, words: str, epilog: str, options: str) -> argparse.ArgumentParser:
    usage = " ".join(filter(None, [f"entrenar data {name}", options, "[--section.key VALUE ...]"]))
    return verbs.add_parser(name, help=words, description=words, epilog=epilog, usage=usage)


def run(args: argparse.Namespace) -> int:
    if args.what == "chat":
        return data_chat.show(args)
    from entrenar.training.config import FineTuning, kind_of, read_config

    config = read_config(args.config, args.overrides, kind_of(args.config, args.overrides))
    if args.what == "show":
        _check_numbers(args)
        return data_chat.show_run(args, config) if isinstance(config, FineTuning) else show(args, config)
    if isinstance(config, FineTuning):
        raise CommandLineError("prepare: fine-tuning reads its rows anew each time; `entrenar data show` shows them")
    return prepare(config)


# --- show ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A window: its tokens (T + 1,), which of them are trained (T + 1,), and where it comes from."""

    tokens: np.ndarray
    trained: np.ndarray
    batch: int
    place: str


def show(args: argparse.Namespace, config: Config) -> int:
    """Print the windows; returns 0. Raises CommandLineError for numbers that cannot be."""
    _check(args, config)
    with tempfile.TemporaryDirectory(prefix="entrenar-") as folder, make_progress() as progress:
        data = _prepared(config, Path(folder), progress)
        progress.close()
        rows = held_out_rows(data, config, args.batch) if args.held_out else training_rows(data, config, args.batch)
        chosen = itertools.islice(rows, args.count or config.training.batch_size)
        _print_rows(chosen, data, writer())
    return 0


def _check_numbers(args: argparse.Namespace) -> None:
    wrong = [f"{name} {value}: wanted 1 or more" for name, value in (("--batch", args.batch), ("-n", args.count))
             if value is not None and value < 1]  # fmt: skip
    if wrong:
        raise CommandLineError("; ".join(wrong))


def _check(args: argparse.Namespace, config: Config) -> None:
    t = config.training
    if not args.held_out and not t.budget and args.batch > t.steps * t.accumulation:
        raise CommandLineError(f"--batch {args.batch}: this run takes {t.steps * t.accumulation:,} batches")


def training_rows(data: Prepared, config: Config, first: int) -> Iterator[Row]:
    """The windows that training takes, from batch number `first` on."""
    from entrenar.data import Batches

    t = config.training
    batches = Batches(data.train, batch_size=t.batch_size, context=t.context, seed=t.seed)
    for number in itertools.count(1):
        inputs, targets = batches.next()
        if number >= first:
            for x, y, start in zip(inputs, targets, batches.taken, strict=True):
                yield _row(x, y, number, f"token {start:,} of {len(data.train):,}, {data.place(start)}")


def held_out_rows(data: Prepared, config: Config, first: int) -> Iterator[Row]:
    """The windows in which held-out text is predicted, from batch number `first` on."""
    from entrenar.data import IGNORE, evaluation_windows
    from entrenar.training.evaluate import stride_of

    t, total = config.training, len(data.held_out)
    stride = stride_of(t.context, t.eval_overlap)
    end, begin = data.tokenizer.end_id, data.tokenizer.begin_id
    windows = evaluation_windows(data.held_out, first=end if begin is None else begin, context=t.context, stride=stride)
    count = 1 + max(0, -(-(total - t.context) // stride))  # windows, until one reaches the end
    if (first - 1) * t.batch_size >= count:
        raise CommandLineError(f"--batch {first}: the held-out text has only {-(-count // t.batch_size):,} batches")
    for number, (x, y) in enumerate(windows):
        size = int(np.flatnonzero(y != IGNORE)[-1]) + 1  # the last window may be filled up
        if number // t.batch_size + 1 >= first:
            place = f"held-out text from token {number * stride:,} of {total:,} on"
            yield _row(x[:size], y[:size], number // t.batch_size + 1, place)


def _row(x: np.ndarray, y: np.ndarray, batch: int, place: str) -> Row:
    from entrenar.data import IGNORE

    trained = np.concatenate([[False], y != IGNORE])
    tokens = np.concatenate([x[:1], np.where(trained[1:], y, np.append(x[1:], y[-1:]))])
    return Row(tokens, trained, batch, place)


def _print_rows(rows: Iterable[Row], data: Prepared, out: Writer) -> None:
    lengths = data.tokenizer.byte_lengths()
    count = trained = size = tokens = 0
    for row in rows:
        count += 1
        trained, tokens = trained + int(row.trained.sum()), tokens + len(row.tokens)
        size += int(lengths[row.tokens].sum())
        out.heading(f"window {count}, batch {row.batch}: {visible(row.place)}: {counts(row.trained)}")
        out.tokens(spelled(row.tokens, data.tokenizer), row.trained)
    windows = "1 window" if count == 1 else f"{count:,} windows"
    out.heading(f"{windows}: {trained:,} of {tokens:,} tokens trained, {size / tokens:.2f} bytes per token; "
                   f"vocabulary {data.tokenizer.vocab_size:,} ({data.tokenizer.kind})")  # fmt: skip


# --- prepare ---------------------------------------------------------------------------------------------


def prepare(config: Config) -> int:
    """Prepare, and print what is known of the result; returns 0."""
    if config.data.cache == "off":
        raise CommandLineError("data.cache is 'off': nothing would be kept; name a folder, or leave it out")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="entrenar-") as folder, make_progress() as progress:
        data = _prepared(config, Path(folder), progress)
        progress.close()
        kept = not data.folder.is_relative_to(folder)
        print("\n".join(facts(told(data, time.monotonic() - started, kept=kept), width=10)))
    return 0


def told(data: Prepared, seconds: float, *, kept: bool) -> list[tuple[str, str]]:
    """(name, value) of all that is known of prepared text, for people."""
    f = data.facts
    size = f.train_bytes + f.held_out_bytes
    speed = "kept from before" if data.cached else f"{seconds:.1f} s, {size / 1e6 / max(seconds, 1e-9):.1f} MB/s"
    lines = [
        ("source", f.source),
        ("tokenizer", f"{data.tokenizer.kind}, {data.tokenizer.vocab_size:,} tokens"),
        ("training", _side(f.train_documents, f.train_bytes, f.train_tokens)),
        ("held out", _side(f.held_out_documents, f.held_out_bytes, f.held_out_tokens)),
        ("bits/byte", f"gzip -9 {f.gzip_bits:.3f}, xz -9 {f.xz_bits:.3f}, of {_amount(f.compared_bytes)} held out"),
        ("prepared", speed),
        ("folder", str(data.folder) if kept else "none: the cache's folder cannot be written"),
    ]
    if f.skipped_documents:
        more = f" and {f.skipped_documents - len(f.skipped):,} more" if f.skipped_documents > len(f.skipped) else ""
        lines.append(("left out", f"{f.skipped_documents:,}: {', '.join(f.skipped)}{more}"))
    if not f.exact_bytes:
        lines.append(("note", "this tokenizer changes the text: bits per byte are spread over its true bytes"))
    return lines


def _side(documents: int, size: int, tokens: int) -> str:
    word = "document" if documents == 1 else "documents"
    return f"{documents:,} {word}, {_amount(size)}, {tokens:,} tokens, {size / max(1, tokens):.2f} bytes each"


def _amount(size: int) -> str:
    return f"{size:,} bytes" if size < 10**5 else f"{size / 1e6:,.1f} MB"


def _prepared(config: Config, temporary: Path, progress: Progress) -> Prepared:
    """As the run prepares it; without a cache in `temporary`."""
    from entrenar.training.pretrain import prepared

    return prepared(config, temporary, progress)  # type: ignore[arg-type]


def make_progress() -> Progress:
    """Bars where standard error is a terminal that can draw, lines otherwise."""
    return Bars(sys.stderr) if colours(sys.stderr) else Progress(sys.stderr)
