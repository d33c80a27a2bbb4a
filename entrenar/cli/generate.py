"""`entrenar generate`: a model continues a text, shown as it is written.

A pipe or a file gets the text and nothing else, byte for byte; a terminal also shows the prompt, dim, and makes
control characters visible. How a token is chosen is llama/generate.py's `Sampling`.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TextIO

import numpy as np

from entrenar.cli.parser import CommandLineError
from entrenar.cli.terminal import paint

if TYPE_CHECKING:
    from entrenar.cli.models import Opened
    from entrenar.llama.generate import Sampling

NAME = "generate"
HELP = "let a model continue a text"
EXAMPLE = """
entrenar generate runs/mine --prompt "def main" --stop $'\\n\\n'
"""

BETWEEN = "\n---\n"  # two of several texts, where no terminal shows which is which


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "entrenar generate MODEL [options]"
    parser._actions[0].help = argparse.SUPPRESS  # -h, and two headings, would be more than a screen
    add = parser._optionals.add_argument
    add("model", metavar="MODEL", help="a run, checkpoint, or folder as Hugging Face has it")
    add("--prompt", metavar="TEXT", default="", help="what to continue; -: standard input, to the byte")
    add("--max-tokens", metavar="N", type=int, default=256, help="stop after so many (default 256)")
    add("--temperature", metavar="T", type=float, default=0.7, help="0: always the likeliest token (default 0.7)")
    add("--top-k", metavar="K", type=int, default=0, help="only the K likeliest (default 0: all)")
    add("--top-p", metavar="P", type=float, default=0.95, help="only the likeliest with sum P (default 0.95)")
    add("--min-p", metavar="P", type=float, default=0.0, help="only those of P x the likeliest (default 0)")
    add("--repetition-penalty", metavar="R", type=float, default=1.0, help="above 1: say less again (default 1)")
    add("--stop", metavar="TEXT", action="append", default=[], help="end before this text; may come again")
    add("--seed", metavar="N", type=int, default=0, help="same seed, same text (default 0)")
    add("-n", metavar="COUNT", type=int, default=1, dest="count", help="so many texts, each from its own seed")
    add("--no-stream", action="store_true", help="write each text when it is whole")
    add("--ignore-eos", action="store_true", help="go on after the end of a text")
    add("--echo", action="store_true", help="write the prompt too, where no terminal is")
    add("--truncate-prompt", action="store_true", help="of a prompt too long keep the end")
    add("--tokens-per-second", action="store_true", help="tell the speed on stderr, terminal or not")


def run(args: argparse.Namespace) -> int:
    """Write the texts; returns 0, or 130 after Ctrl-C. Raises CommandLineError before the model takes its time."""
    how = sampling(args)
    _check(args)
    prompt = read_prompt(args.prompt)
    from entrenar.cli.models import open_model

    opened = open_model(args.model, warn=lambda text: print(f"entrenar generate: {text}", file=sys.stderr))
    ids = prompt_ids(opened, prompt, args.max_tokens, truncate=args.truncate_prompt)
    page = Page(sys.stdout)
    for number in range(args.count):
        writing = Writing(opened, ids, how, args, np.random.default_rng([args.seed, number]))
        page.begin(number, args.count, prompt, echo=args.echo)
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


class Writing:
    """One text as it comes: iterating gives pieces of it that are certain.

    Afterwards `ended` says why it ended, and `summary` how fast it was.
    """

    def __init__(self, opened: Opened, ids: list[int], how: Sampling, args: argparse.Namespace,
                 rng: np.random.Generator) -> None:  # fmt: skip
        self.opened, self.ids, self.how, self.args, self.rng = opened, ids, how, args, rng
        self.tokens, self.ended = 0, ""
        self.reading = self.writing = 0.0  # seconds: the prompt and the first token; all others

    def __iter__(self) -> Iterator[str]:
        prompt = self.ids[len(self.opened.begin) :]  # the first word of a text may drop its space, later ones keep it
        decoder, watch = self.opened.tokenizer.decoder(after=prompt), StopStrings(self.args.stop)
        for token in self._tokens():
            if token in self.opened.stop and not self.args.ignore_eos:
                self.ended = "the end of the text"
                break
            yield watch.push(decoder.push(token))
            if watch.found:
                self.ended = "a stop text"
                return
        yield watch.push(decoder.end()) + watch.end()

    def _tokens(self) -> Iterator[int]:
        from entrenar.formats import FormatError
        from entrenar.llama.generate import generate

        began = time.perf_counter()
        try:
            for token in generate(self.opened.model, self.ids, max_new_tokens=self.args.max_tokens, rng=self.rng,
                                  **vars(self.how)):  # fmt: skip
                self.tokens += 1
                if self.tokens == 1:
                    self.reading = time.perf_counter() - began
                self.writing = time.perf_counter() - began - self.reading
                yield token
        except ValueError as error:  # weights that are no numbers
            raise FormatError(f"{self.opened.folder}: {error}") from None
        limit = self.opened.model.config.max_position_embeddings
        self.ended = "--max-tokens" if self.tokens == self.args.max_tokens else f"the full context of {limit:,} tokens"

    def summary(self) -> str:
        """`prompt 12 tokens, 900/s; written 256 tokens, 310/s; ended by --max-tokens`"""
        parts = [f"prompt {len(self.ids):,} tokens" + _rate(len(self.ids), self.reading),
                 f"written {self.tokens:,} tokens" + _rate(self.tokens - 1, self.writing)]  # fmt: skip
        return "; ".join([*parts, f"ended by {self.ended}"])


def _rate(count: int, seconds: float) -> str:
    return f", {count / seconds:,.0f}/s" if count > 0 and seconds > 0 else ""


class StopStrings:
    """Finds the first of some strings in a text that comes in pieces, wherever the pieces are cut.

    `push` gives back what is certainly before it: the longest end of the text that could still become one of them is
    held back, until more comes. The string that is complete first counts; of two that end together, the longer.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings, self.held, self.found = tuple(strings), "", ""

    def push(self, piece: str) -> str:
        if self.found:
            return ""
        text = self.held + piece
        hits = [(at + len(s), at, s) for s in self.strings if (at := text.find(s)) >= 0]
        if hits:
            _, cut, self.found = min(hits)
        else:
            cut = len(text) - self._could_begin(text)
        self.held = "" if hits else text[cut:]
        return text[:cut]

    def end(self) -> str:
        """No more comes: what was held back was text after all."""
        held, self.held = self.held, ""
        return held

    def _could_begin(self, text: str) -> int:
        """How many of the last characters are the beginning of one of the strings."""
        longest = max(map(len, self.strings), default=0) - 1
        sizes = range(min(longest, len(text)), 0, -1)
        return next((n for n in sizes if any(s.startswith(text[-n:]) for s in self.strings)), 0)


class Page:
    """Where the text goes, `sys.stdout`: a terminal gets it with everything visible, a pipe or a file as it is."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.terminal = stream, stream.isatty()

    def begin(self, number: int, count: int, prompt: str, *, echo: bool) -> None:
        """What stands before the `number`-th text of `count`."""
        if self.terminal and count > 1:
            self._put(paint(f"-- {number + 1} of {count}", "dim") + "\n")
        elif number:
            self._put(BETWEEN)
        if self.terminal:
            self._put(paint(self._readable(prompt), "dim"))
        elif echo:
            self._put(prompt)

    def write_all(self, pieces: Iterable[str], *, at_once: bool) -> None:
        """Write the pieces as they come; `at_once`: when the last has come, or Ctrl-C."""
        waiting: list[str] = []
        try:
            for piece in pieces:
                if at_once:
                    waiting.append(piece)
                else:
                    self._put(self._readable(piece))
        finally:
            self._put(self._readable("".join(waiting)))

    def end(self) -> None:
        if self.terminal:
            self._put("\n")

    def _put(self, text: str) -> None:
        if text:
            self.stream.write(text)
            self.stream.flush()

    def _readable(self, text: str) -> str:
        from entrenar.training.summary import visible

        return visible(text) if self.terminal else text
