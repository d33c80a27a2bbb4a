"""Tokens on a terminal, or in a file: which are trained, and where each ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from entrenar.cli.terminal import colours, visible

if TYPE_CHECKING:
    from entrenar.data import Tokenizer

PENDING = "\N{MIDDLE DOT}"  # a token that ends inside a character
SHADES = ("black on bright_cyan", "black on cyan")
DIM = ("bright_black", "bright_black italic")


def counts(trained: np.ndarray) -> str:
    return f"{int(trained.sum()):,} trained, {int((~trained).sum()):,} ignored"


def spelled(tokens: np.ndarray, tokenizer: Tokenizer) -> list[str]:
    """The text of each token, as it stands in the middle of a text; "" where it ends inside a character."""
    decoder = tokenizer.decoder(after=[tokenizer.end_id])
    texts = [decoder.push(int(token)) for token in tokens]
    texts[-1] += decoder.end()
    return texts


class Writer(Protocol):
    def heading(self, text: str) -> None: ...
    def tokens(self, texts: Sequence[str], trained: np.ndarray) -> None: ...


class _Plain:
    """`# heading`, then a line of tokens separated by |, ignored ones in [brackets]."""

    ESCAPES = str.maketrans({"\\": "\\\\", "|": "\\|", "[": "\\[", "]": "\\]", "\n": "\\n", "\r": "\\r", "\t": "\\t"})

    def heading(self, text: str) -> None:
        print(f"# {text}")

    def tokens(self, texts: Sequence[str], trained: np.ndarray) -> None:
        print("|".join(self._one(text) if counts else f"[{self._one(text)}]"
                       for text, counts in zip(texts, trained, strict=True)))  # fmt: skip

    def _one(self, text: str) -> str:
        return visible(text.translate(self.ESCAPES)) or PENDING


class _Coloured:
    """Trained tokens on a ground of two shades in turns, so that their borders show; ignored ones dim."""

    ESCAPES = str.maketrans({"\n": "\u21b5\n", "\r": "\u240d", "\t": "\u2192   "})  # arrows, and CR in small letters

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(highlight=False)

    def heading(self, text: str) -> None:
        self.console.print(text, style="bold", markup=False)

    def tokens(self, texts: Sequence[str], trained: np.ndarray) -> None:
        from rich.text import Text

        shown = Text()
        for number, (text, counts) in enumerate(zip(texts, trained, strict=True)):
            style = (SHADES if counts else DIM)[number % 2]
            # the ground ends with the letters: a line break in it would colour the rest of the line
            for i, part in enumerate((text.translate(self.ESCAPES) or PENDING).split("\n")):
                shown.append("\n" * (i > 0)).append(visible(part), style)
        self.console.print(shown, soft_wrap=True)
        self.console.print()


def writer() -> Writer:
    """What suits standard output."""
    return _Coloured() if colours() else _Plain()
