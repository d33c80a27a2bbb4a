"""A conversation with a model: what was said, and answers to what is asked next, by the model alone or an adapter.

Every answer follows from the conversation as the chat template writes it, whole, and of its tokens only those are read
that differ from what was read before (llama/generate.py's Reader, one for each adapter). Leaves out terminals:
chat_terminal.py; side by side: side_by_side.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from entrenar.cli.models import Opened
from entrenar.cli.parser import CommandLineError
from entrenar.cli.writing import Writing
from entrenar.data import Tokenizer
from entrenar.data.chat import ChatTemplate, TemplateError
from entrenar.data.chat.rendering import CLOSE, OPEN, special_pattern
from entrenar.llama import Reader
from entrenar.llama.generate import Sampling

Message = dict[str, Any]


class ContextFull(CommandLineError):
    """The conversation has as many tokens as the model can read."""


@dataclass(frozen=True)
class Manner:
    """How answers are written: how their tokens are chosen, how many at most, from which seed."""

    how: Sampling
    max_tokens: int = 512
    seed: int = 0


class Answer:
    """What a model says to a conversation; iterating gives pieces of it as soon as they are certain.

    by         whose it is: an adapter's name, None for the model alone
    messages   what it answers
    text       what was written so far, as the model wrote it
    """

    def __init__(self, opened: Opened, by: str | None, messages: list[Message], prompt: str, writing: Writing) -> None:
        self.opened, self.by, self.messages, self.prompt, self.writing = opened, by, messages, prompt, writing
        self.text = ""

    def __iter__(self) -> Iterator[str]:
        pieces = iter(self.writing)
        while True:
            self.opened.use(self.by)  # whatever was used since the last piece: answers may come side by side
            piece = next(pieces, None)
            if piece is None:
                return
            # the space that some templates put before an answer is not the answer's
            shown = piece if self.text.strip(" ") else piece.lstrip(" ")
            self.text += piece
            if shown:
                yield shown


@dataclass
class Conversation:
    """What was said so far. `by`: who answers next, an adapter's name, or None for the model alone."""

    opened: Opened
    template: ChatTemplate
    manner: Manner
    messages: list[Message] = field(default_factory=list)
    by: str | None = None
    readers: dict[str | None, Reader] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tokens, self.stop = turn_ends(self.template, self.opened.tokenizer)
        self.ends = self.opened.stop | tokens

    @property
    def system(self) -> str:
        """What the model is told before the conversation; "" for nothing."""
        first = self.messages[:1]
        return first[0]["content"] if first and first[0]["role"] == "system" else ""

    @system.setter
    def system(self, text: str) -> None:
        """Raises TemplateError where the chat template knows no such thing; nothing is changed then."""
        rest = self.messages[1:] if self.system else self.messages
        messages = [{"role": "system", "content": text}, *rest] if text else list(rest)
        probe = messages if len(messages) > 1 else [*messages, {"role": "user", "content": "?"}]
        self.template.render(probe, add_generation_prompt=True)
        self.messages = messages

    def reset(self) -> None:
        """Forget what was said; the system's text stays."""
        self.messages = self.messages[:1] if self.system else []

    def ask(self, prompt: str) -> Answer:
        """The answer to a prompt by whose turn it is; `keep` makes it part of the conversation."""
        return self.answer(self.with_prompt(prompt), self.by)

    def with_prompt(self, prompt: str) -> list[Message]:
        return [*self.messages, {"role": "user", "content": prompt}]

    def answer(self, messages: list[Message], by: str | None, **settings: Any) -> Answer:
        """The answer to these messages; `settings` for the template: tools, documents, variables.

        Raises TemplateError where the template cannot write them, ContextFull where they are as long as the model can
        read.
        """
        text = self.template.render(messages, add_generation_prompt=True, **settings).text
        ids = encoded(text, self.opened.tokenizer)
        limit = self.opened.model.config.max_position_embeddings
        if len(ids) >= limit:
            raise ContextFull(f"the conversation has {len(ids):,} tokens, and this model reads at most {limit:,}")
        if not ids:
            raise TemplateError(f"{self.template.origin}: writes nothing for this conversation")
        writing = Writing(self.opened, ids, self.manner.how, max_tokens=self.manner.max_tokens, stop=self.stop,
                          rng=np.random.default_rng([self.manner.seed, len(messages)]), ends=self.ends,
                          reader=self.readers.setdefault(by, Reader(self.opened.model)))  # fmt: skip
        return Answer(self.opened, by, messages, text, writing)

    def keep(self, answer: Answer) -> None:
        """Go on from this answer, however far it came."""
        self.messages = [*answer.messages, {"role": "assistant", "content": self.content(answer)}]

    def content(self, answer: Answer) -> str:
        """The answer as the template's message: such that the template writes what was read and written, if it can."""
        written = answer.prompt + answer.text
        for content in (answer.text, answer.text.removeprefix(" ")):
            try:
                again = self.template.render([*answer.messages, {"role": "assistant", "content": content}]).text
            except TemplateError:
                continue
            if again.startswith(written):
                return content
        return answer.text.strip()


def encoded(text: str, tokenizer: Tokenizer) -> list[int]:
    """Tokens of what a template wrote: special tokens that are spelled in it are special tokens."""
    (spans,) = tokenizer.encode_special([text])
    return [int(i) for i in spans.ids]


def turn_ends(template: ChatTemplate, tokenizer: Tokenizer) -> tuple[frozenset[int], tuple[str, ...]]:
    """By what the end of an answer is seen: the token that the template writes behind one; and the text between one
    and the next question, where that is only text (a model that was never tuned writes on without the token).
    """
    question, said = {"role": "user", "content": OPEN}, {"role": "assistant", "content": CLOSE}
    try:
        text = template.render([question, said, question]).text
    except TemplateError:
        return frozenset(), ()
    between = text.partition(CLOSE)[2].rpartition(OPEN)[0]
    special = special_pattern(tokenizer)
    found = special.match(between.lstrip())
    tokens = frozenset({tokenizer.special[found[0]]} if found else ())
    words = special.sub("", between, count=1).rstrip()  # "\nUser:"
    is_text = words.strip() and not special.search(words)
    return tokens, (words,) if is_text else ()


def compared(conversation: Conversation) -> list[str | None]:
    """Whose answers stand side by side: the model alone and the adapter in use, or all where none is.

    Raises CommandLineError where there is no adapter.
    """
    tuned = [conversation.by] if conversation.by else list(conversation.opened.tuned)
    if not tuned:
        raise CommandLineError("there is no adapter to compare the model with; give one with --adapter FOLDER")
    return [None, *tuned]
