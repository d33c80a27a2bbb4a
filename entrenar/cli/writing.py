"""A text that a model writes, piece by piece, as soon as each piece is certain: for generate and chat."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TextIO

import numpy as np

from entrenar.cli.terminal import paint

if TYPE_CHECKING:
    from entrenar.cli.models import Opened
    from entrenar.llama.generate import Reader, Sampling

BETWEEN = "\n---\n"  # two of several texts, where no terminal shows which is which


class Writing:
    """One text as it comes: iterating gives pieces of it that are certain.

    stop         texts to end before, each
    ends         tokens that end it; they are not part of it
    max_tokens   None: as many as the model's context has room for
    reader       what the model has read already is not read again

    Afterwards `ended` says why it ended (nothing: it was stopped), and `summary` how fast it was.
    """

    def __init__(self, opened: Opened, ids: list[int], how: Sampling, *, rng: np.random.Generator,
                 max_tokens: int | None = None, stop: Sequence[str] = (), ends: frozenset[int] = frozenset(),
                 reader: Reader | None = None) -> None:  # fmt: skip
        self.opened, self.ids, self.how, self.rng = opened, ids, how, rng
        limit = opened.model.config.max_position_embeddings
        self.max_tokens = limit if max_tokens is None else max_tokens
        self.stop, self.ends, self.reader = stop, ends, reader
        self.known = 0 if reader is None else reader.read
        self.tokens, self.ended = 0, ""
        self.reading = self.writing = 0.0  # seconds: the prompt and the first token; all others

    def __iter__(self) -> Iterator[str]:
        prompt = self.ids[len(self.opened.begin) :]  # the first word of a text may drop its space, later ones keep it
        decoder, watch = self.opened.tokenizer.decoder(after=prompt), StopStrings(self.stop)
        for token in self._tokens():
            if token in self.ends:
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
            for token in generate(self.opened.model, self.ids, max_new_tokens=self.max_tokens, rng=self.rng,
                                  reader=self.reader, **vars(self.how)):  # fmt: skip
                self.tokens += 1
                if self.tokens == 1:
                    self.reading = time.perf_counter() - began
                self.writing = time.perf_counter() - began - self.reading
                yield token
        except ValueError as error:  # weights that are no numbers
            raise FormatError(f"{self.opened.folder}: {error}") from None
        limit = self.opened.model.config.max_position_embeddings
        self.ended = "--max-tokens" if self.tokens == self.max_tokens else f"the full context of {limit:,} tokens"

    def summary(self) -> str:
        """`prompt 12 tokens, 900/s; written 256 tokens, 310/s; ended by --max-tokens`"""
        read, whole = len(self.ids), len(self.ids)
        if self.reader is not None:
            read = self.reader.read - self.known - max(0, self.tokens - 1)
        of = f" ({whole - read:,} more were read before)" if read < whole else ""
        parts = [f"prompt {read:,} tokens" + _rate(read, self.reading) + of,
                 f"written {self.tokens:,} tokens" + _rate(self.tokens - 1, self.writing)]  # fmt: skip
        return "; ".join([*parts, f"ended by {self.ended or 'Ctrl-C'}"])


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

    def begin(self, number: int, title: str, prompt: str, *, echo: bool) -> None:
        """What stands before the `number`-th text; its title where there are several."""
        if self.terminal and title:
            self.put(paint(f"-- {title}", "dim") + "\n")
        elif number:
            self.put(BETWEEN)
        if self.terminal:
            self.put(paint(self.readable(prompt), "dim"))
        elif echo:
            self.put(prompt)

    def write_all(self, pieces: Iterable[str], *, at_once: bool) -> None:
        """Write the pieces as they come; `at_once`: when the last has come, or Ctrl-C."""
        waiting: list[str] = []
        try:
            for piece in pieces:
                if at_once:
                    waiting.append(piece)
                else:
                    self.put(self.readable(piece))
        finally:
            self.put(self.readable("".join(waiting)))

    def end(self) -> None:
        if self.terminal:
            self.put("\n")

    def put(self, text: str) -> None:
        if text:
            self.stream.write(text)
            self.stream.flush()

    def readable(self, text: str) -> str:
        from entrenar.training.summary import visible

        return visible(text) if self.terminal else text
