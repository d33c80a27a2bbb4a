"""`entrenar generate`: a model continues a text, shown as it is written.

A pipe or a file gets the text and nothing else, byte for byte; a terminal also shows the prompt, dim, and makes
control characters visible. How a token is chosen is llama/generate.py's `Sampling`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from entrenar.cli.model_options import OFF, add_model_options, opened
from entrenar.cli.parser import CommandLineError, told_together
from entrenar.cli.terminal import paint
from entrenar.cli.writing import Page, Writing

if TYPE_CHECKING:
    from entrenar.cli.models import Opened
    from entrenar.llama.generate import Sampling

NAME = "generate"
HELP = "let a model continue a text"
EXAMPLE = """
entrenar generate runs/mine --prompt "def main" --stop $'\\n\\n'
"""



def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "entrenar generate MODEL [options]"
    parser._actions[0].help = argparse.SUPPRESS  # -h, and two headings, would be more than a screen
    add = parser._optionals.add_argument
    add("model", metavar="MODEL", help="a run, checkpoint, adapter, or Hugging Face folder")
    add_model_options(add)
    add("--prompt", metavar="TEXT", default="", help="what to continue; -: standard input, to the byte")
    add_sampling(add)
    add("--stop", metavar="TEXT", action="append", default=[], help="end before this text; may come again")
    told_together(
        add("--seed", metavar="N", type=int, default=0, help="same seed, same text; so many, each its own"),
        add("-n", metavar="COUNT", type=int, default=1, dest="count", help="so many texts, each from its own seed"),
    )
    add("--ignore-eos", action="store_true", help="go on after the end of a text")
    told_together(
        add("--echo", action="store_true", help="in a pipe: the prompt too; a text when it is whole"),
        add("--no-stream", action="store_true", help="write each text when it is whole"),
    )
    add("--truncate-prompt", action="store_true", help="of a prompt too long keep the end")
    add("--tokens-per-second", action="store_true", help="tell the speed on stderr, terminal or not")


def add_sampling(add: Callable[..., argparse.Action], max_tokens: int = 256) -> None:
    """How long a text may be, and how its tokens are chosen."""
    add("--max-tokens", metavar="N", type=int, default=max_tokens, help=f"stop after so many (default {max_tokens})")
    add("--temperature", metavar="T", type=float, default=0.7, help="0: always the likeliest token (default 0.7)")
    add("--top-p", metavar="P", type=float, default=0.95, help="only the likeliest with sum P (default 0.95)")
    told_together(
        add("--top-k", metavar="K", type=int, default=0, help="only the K likeliest; those of P x the likeliest"),
        add("--min-p", metavar="P", type=float, default=0.0, help="only those of P x the likeliest (default 0)"),
    )
    add("--repetition-penalty", metavar="R", type=float, default=1.0, help="above 1: say less again (default 1)")


def run(args: argparse.Namespace) -> int:
    """Write the texts; returns 0, or 130 after Ctrl-C. Raises CommandLineError before the model takes its time."""
    how = sampling(args)
    _check(args)
    prompt = read_prompt(args.prompt)
    found = opened(args, NAME, writes=True)
    ids = prompt_ids(found, prompt, args.max_tokens, truncate=args.truncate_prompt)
    texts = [(turn, number) for turn in found.turns for number in range(args.count)]
    page = Page(sys.stdout)
    for place, (turn, number) in enumerate(texts):
        found.use(turn)
        writing = Writing(found, ids, how, rng=np.random.default_rng([args.seed, number]), max_tokens=args.max_tokens,
                          stop=args.stop, ends=frozenset() if args.ignore_eos else found.stop)  # fmt: skip
        by = f", {turn or OFF}" if len(found.turns) > 1 else ""
        page.begin(place, f"{place + 1} of {len(texts)}{by}" if len(texts) > 1 else "", prompt, echo=args.echo)
        try:
            page.write_all(writing, at_once=args.no_stream)
        except KeyboardInterrupt:
            writing.ended = "Ctrl-C"
        page.end()
        if args.tokens_per_second or sys.stderr.isatty():
            told = writing.summary()
            print(paint(told, "dim") if sys.stderr.isatty() else told, file=sys.stderr)
        if writing.ended == "Ctrl-C":
            return 130
    return 0


def sampling(args: argparse.Namespace) -> Sampling:
    from entrenar.llama.generate import Sampling

    try:
        return Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty)
    except ValueError as error:
        raise CommandLineError(str(error)) from None


def _check(args: argparse.Namespace) -> None:
    wrong = [
        f"{name} {value}: wanted at least {low}"
        for name, value, low in (("--max-tokens", args.max_tokens, 1), ("-n", args.count, 1), ("--seed", args.seed, 0))
        if value < low
    ]
    wrong += ["--stop: the text is empty; wanted at least one character"] if "" in args.stop else []
    if wrong:
        raise CommandLineError("; ".join(wrong))


def read_prompt(asked: str) -> str:
    """The prompt itself, or for "-" all of standard input. Raises CommandLineError for bytes that are no UTF-8."""
    if asked == "-":
        if sys.stdin is None:
            raise CommandLineError("--prompt -: standard input is closed; pipe the prompt in, or give it as a word")
        if sys.stdin.isatty():
            print("entrenar generate: type the prompt; Ctrl-D at the start of a line ends it", file=sys.stderr)
        raw, where = sys.stdin.buffer.read(), "standard input"
    else:
        raw, where = os.fsencode(asked), "--prompt"
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise CommandLineError(
            f"{where}: byte {error.start} (0x{raw[error.start]:02x}) is not UTF-8; wanted UTF-8 text"
        ) from None


def prompt_ids(opened: Opened, prompt: str, max_tokens: int, *, truncate: bool = False) -> list[int]:
    """The prompt's tokens, behind the one that begins a text.

    truncate   leave out as much of the prompt's beginning as makes room for `max_tokens`, or half the context
    Raises CommandLineError where nothing is left to continue, or no room.
    """
    limit = opened.model.config.max_position_embeddings
    ids = [*opened.begin, *opened.tokenizer.encode(prompt).tolist()]
    if not ids:
        raise CommandLineError("--prompt: is empty, and this tokenizer has no token that begins a text; give some text")
    most = limit - max(1, min(max_tokens, limit // 2))
    if truncate and len(ids) > most:
        tail = max(0, most - len(opened.begin))
        ids = [*opened.begin, *ids[len(ids) - tail :]]
    if len(ids) >= limit:
        raise CommandLineError(
            f"--prompt: has {len(ids):,} tokens, the model's context holds {limit:,}, and one at least must be free: "
            "shorten it, or let --truncate-prompt keep its end"
        )
    return ids
