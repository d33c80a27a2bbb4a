"""The examples of fine-tuning data, token by token.

    entrenar data chat SOURCE --tokenizer FOLDER               as they are read
    entrenar data show --base.model FOLDER --data.source ...   as a run of `entrenar finetune` takes them
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entrenar.cli.parser import CommandLineError
from entrenar.cli.terminal import facts, visible
from entrenar.cli.tokens import counts, spelled, writer

if TYPE_CHECKING:
    from entrenar.data.chat import ChatData, ChatFacts
    from entrenar.training.config import FineTuning

HELP = "print the examples of fine-tuning data, token by token"
EXAMPLE = """example:
  entrenar data chat chats.jsonl --tokenizer model/

Rows of messages, prompt and completion, instruction and output, or text are
read from a file .jsonl or .json, a folder with train.jsonl, or - (standard
input). Trained tokens are coloured; see entrenar data show --help."""
COUNT = 3  # examples that are shown where no number is given


def add_arguments(verbs: Any) -> None:
    usage = "entrenar data chat SOURCE --tokenizer FOLDER [OPTIONS]"
    chat = verbs.add_parser("chat", help=HELP, description=HELP, epilog=EXAMPLE, usage=usage)
    chat.add_argument("chat", metavar="SOURCE", help="a file or folder of rows")
    chat.add_argument("--tokenizer", metavar="FOLDER", required=True, help="the model's, with its chat template")
    chat.add_argument("--template", metavar="FILE", help="another chat template: a file, or a name")
    chat.add_argument("--train-on", metavar="WHAT", choices=("assistant", "completion", "all"), default="assistant",
                      help="assistant (default), completion or all")  # fmt: skip
    chat.add_argument("--max-length", metavar="N", type=int, help="cut examples off behind N tokens")
    chat.add_argument("--first", metavar="N", type=int, default=1, help="begin with the N-th example (default 1)")
    chat.add_argument("-n", metavar="COUNT", type=int, dest="count", default=COUNT, help="so many (default 3)")
    chat.add_argument("--held-out", action="store_true", help="show the held-out examples instead")
    chat.add_argument("--skip-bad", action="store_true", help="leave out rows that cannot be used")


def show(args: argparse.Namespace) -> int:
    """Print the examples and what is known of the data; returns 0."""
    from entrenar.data import load_tokenizer
    from entrenar.data.chat import read_examples

    _check(args)
    data = read_examples(
        args.chat, load_tokenizer(args.tokenizer), template=args.template, train_on=args.train_on,
        max_length=args.max_length, skip_bad=args.skip_bad,
    )  # fmt: skip
    _print(data, args)
    print("\n".join(facts(told(data.facts), width=10)))
    return 0


def show_run(args: argparse.Namespace, config: FineTuning) -> int:
    """Print the examples that a run takes, batch by batch, or those it holds out; returns 0."""
    from entrenar.training.display import make_display
    from entrenar.training.finetune import examples

    config = config.settled
    with tempfile.TemporaryDirectory(prefix="entrenar-") as folder:
        display = make_display(report_every=1)
        try:
            data = examples(config, Path(folder), display)
        finally:
            display.close()
        rows = _held_out(config, data, args.batch) if args.held_out else _trained(config, data, args.batch)
        out = writer()
        for where, ids, trained in itertools.islice(rows, args.count) if args.count else _first_batch(rows):
            out.heading(f"{where}: {counts(trained)}")
            out.tokens(spelled(ids, data.tokenizer), trained)
    return 0


Shown = tuple[str, Any, Any]  # "batch 1, row 2: where it comes from"; its tokens; which of them are trained


def _trained(config: FineTuning, data: ChatData, first: int) -> Iterator[Shown]:
    from entrenar.training.chat_task import ChatTask

    batches = ChatTask.check(config, data)
    for number in itertools.count(1):
        batches.next()
        if number >= first:
            for row, numbers in enumerate(batches.taken, 1):
                for example in numbers:
                    where = f"batch {number:,}, row {row}: {visible(data.train.place(example))}"
                    yield (where, *data.train[example])


def _held_out(config: FineTuning, data: ChatData, first: int) -> Iterator[Shown]:
    size = config.training.batch_size
    for number in range((first - 1) * size, len(data.held_out)):
        where = f"batch {number // size + 1:,}, held out: {visible(data.held_out.place(number))}"
        yield (where, *data.held_out[number])


def _first_batch(rows: Iterator[Shown]) -> Iterator[Shown]:
    """Those of the same batch as the first."""
    for _, batch in itertools.groupby(rows, key=lambda row: row[0].partition(",")[0]):
        yield from batch
        return


def _check(args: argparse.Namespace) -> None:
    wanted = (("--first", args.first, 1), ("-n", args.count, 1), ("--max-length", args.max_length, 2))
    wrong = [f"{name} {value}: wanted {least} or more"
             for name, value, least in wanted if value is not None and value < least]  # fmt: skip
    wrong += [f"--{name}: no such option here" for name, _ in args.overrides]
    if wrong:
        raise CommandLineError(f"{'; '.join(wrong)}; see entrenar data chat --help")


def _print(data: ChatData, args: argparse.Namespace) -> None:
    out, (examples, side) = writer(), (data.held_out, "held-out") if args.held_out else (data.train, "training")
    if args.first > len(examples):
        raise CommandLineError(f"--first {args.first}: there are {len(examples):,} {side} examples")
    for number in range(args.first - 1, min(len(examples), args.first - 1 + args.count)):
        ids, trained = examples[number]
        place = visible(examples.place(number))
        out.heading(f"{side} example {number + 1:,} of {len(examples):,}: {place}: {counts(trained)}")
        out.tokens(spelled(ids, data.tokenizer), trained)


def told(f: ChatFacts) -> list[tuple[str, str]]:
    """(name, value) of all that is known of the examples, for people."""
    lines = [
        ("source", f.source),
        ("rows", ", ".join(f"{count:,} of {shape}" for shape, count in f.shapes.items())),
        ("template", f.template),
        ("trained on", {"assistant": "the assistant's turns", "completion": "the last answer"}.get(f.train_on, "all")),
        ("training", _side(f.train_examples, f.train_tokens, f.train_trained)),
        ("held out", _side(f.held_out_examples, f.held_out_tokens, f.held_out_trained)),
        ("longest", f"{f.longest:,} tokens"),
    ]
    lines += [(name, f"{number:,} of the {words}") for name, number, words in (
        ("cut off", f.truncated, f"rows, behind {f.max_length} tokens"),
        ("dropped", f.dropped, "rows: nothing in them is trained"),
        ("no end", f.unended, "examples: the last token they train ends no answer, none learns to stop there"),
        ("twice", f.duplicates, "training examples are held-out ones as well"),
    ) if number]  # fmt: skip
    if f.skipped_rows:
        lines.append(("left out", f"{f.skipped_rows:,} of the rows: {'; '.join(f.skipped)}"))
    return lines + [("note", note) for note in f.notes]


def _side(examples: int, tokens: int, trained: int) -> str:
    word = "example" if examples == 1 else "examples"
    return f"{examples:,} {word}, {tokens:,} tokens, {trained:,} trained ({trained / max(1, tokens):.0%})"
