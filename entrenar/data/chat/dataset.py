"""Reading fine-tuning data: from files to examples, a part of them held out, and the facts about it.

Rows are read one after the other and tokenized many at a time, on all cores; what stays in memory is five bytes per
token. Nothing is cached: a million tokens take some seconds.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from entrenar.data.chat.examples import Examples, Gathered
from entrenar.data.chat.rendering import TRAIN_ON, Example, Marked, example, marked, special_pattern
from entrenar.data.chat.rows import BadRow, ChatRow, Keys
from entrenar.data.chat.sources import find_files, rows
from entrenar.data.chat.template import OWN, ChatTemplate, load_template
from entrenar.data.corpus import CorpusError, SourceFile
from entrenar.data.documents import Unusable
from entrenar.data.tokenizer import Tokenizer
from entrenar.data.tokenizer_protocol import Spans

SLAB = 1 << 18  # characters tokenized in one call
MOST_PROBLEMS = 20  # told at once
TOLD = 5  # of what was left out with skip_bad
TWO_BEGINNINGS = "the template writes the token a text begins with twice: take it out of the template or the messages"


@dataclass(frozen=True)
class ChatFacts:
    """What is known of the examples beside their tokens.

    shapes      rows of each shape that were read
    dropped     rows without a trained token (in what is left of them)
    truncated   rows longer than max_length
    unended     examples in whose last trained token no answer ends: the model does not learn to stop from them
    duplicates  training examples that are held-out examples too
    skipped     how many rows were left out as unusable (skip_bad), and the first few of them in words
    """

    source: str
    template: str
    train_on: str
    max_length: int | None
    shapes: Mapping[str, int]
    train_examples: int
    train_tokens: int
    train_trained: int
    held_out_examples: int
    held_out_tokens: int
    held_out_trained: int
    longest: int
    dropped: int
    truncated: int
    unended: int
    duplicates: int
    skipped_rows: int = 0
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ChatData:
    """Examples to train on and held out, and the facts about them.

    identity   a hash of the tokens and of what is trained: equal identity, same bits of training
    """

    train: Examples
    held_out: Examples
    facts: ChatFacts
    tokenizer: Tokenizer
    template: ChatTemplate
    identity: str


def read_examples(source: str, tokenizer: Tokenizer, *, template: ChatTemplate | str | None = None,
                  train_on: str = "assistant", max_length: int | None = None, held_out: float = 0.05, seed: int = 0,
                  keys: Keys | None = None, skip_bad: bool = False) -> ChatData:  # fmt: skip
    """The examples of a source (sources.py).

    template    None: the tokenizer's own, else the default one; or the name of one of its, a file, a template
    train_on    "assistant", "completion" or "all" (rendering.py)
    max_length  tokens of an example, the context + 1; what goes beyond is cut off at the end
    held_out    the share of the rows that is held out, by a hash of seed and row; a folder's own held-out file instead
    skip_bad    leave out rows that cannot be used
    Raises CorpusError (all problems at once, up to MOST_PROBLEMS), TokenizerError, TemplateError; OSError.
    """
    _check(train_on, max_length, held_out)
    files = find_files(source)
    chosen = template if isinstance(template, ChatTemplate) else load_template(tokenizer, template)
    reader = _Reader(tokenizer, chosen, train_on, max_length, keys or Keys(), skip_bad)
    train, other = reader.read(files.train), reader.read(files.held_out)
    reader.finish()
    if not files.held_out:
        train, other = _split(train, held_out, seed)
    if not len(train):
        read = f"{sum(reader.shapes.values()):,} rows, {reader.dropped:,} of them without a token to train"
        raise CorpusError(f"data.source: {source!r} has nothing to train on: {read}; wanted answers by the assistant")
    facts = ChatFacts(
        source, chosen.origin, train_on, max_length, dict(reader.shapes),
        len(train), train.tokens, train.trained_tokens, len(other), other.tokens, other.trained_tokens,
        int(max(train.lengths.max(initial=0), other.lengths.max(initial=0))), reader.dropped, reader.truncated,
        reader.unended, int(np.isin(train.digests(), other.digests()).sum()), reader.skipped,
        tuple(reader.problems[:TOLD]), tuple(reader.notes()),
    )  # fmt: skip
    identity = hashlib.sha256(f"{train.hash()} {other.hash()}".encode()).hexdigest()
    return ChatData(train, other, facts, tokenizer, chosen, identity)


def _check(train_on: str, max_length: int | None, held_out: float) -> None:
    if train_on not in TRAIN_ON:
        raise ValueError(f"read_examples: train_on = {train_on!r}: wanted one of {', '.join(TRAIN_ON)}")
    if max_length is not None and max_length < 2:
        raise ValueError(f"read_examples: max_length = {max_length}: wanted 2 or more, a token and one that follows")
    if not 0 <= held_out < 1:
        raise ValueError(f"read_examples: held_out = {held_out}: wanted a share from 0 to below 1")


def _split(examples: Examples, share: float, seed: int) -> tuple[Examples, Examples]:
    """(training, held out): by the order of the examples' hashes, so that equal ones stay together."""
    count = len(examples)
    wanted = min(max(1, round(share * count)), count - 1) if share and count > 1 else 0
    digests = examples.digests(seed)
    order = np.argsort(digests, kind="stable")
    while 0 < wanted < count and digests[order[wanted]] == digests[order[wanted - 1]]:
        wanted += 1
    held_out = np.zeros(count, bool)
    held_out[order[: wanted if wanted < count else 0]] = True
    return examples.chosen(~held_out), examples.chosen(held_out)


@dataclass
class _Waiting:
    """A row that is text already, and where it stands."""

    row: Marked
    file: int
    line: int


@dataclass
class _Reader:
    """Rows to examples, and what is counted on the way."""

    tokenizer: Tokenizer
    template: ChatTemplate
    train_on: str
    max_length: int | None
    keys: Keys
    skip_bad: bool
    shapes: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    skipped: int = 0
    dropped: int = 0
    truncated: int = 0
    unended: int = 0
    twice: bool = False  # a row began with two beginnings
    spelled: int = 0  # conversations in which somebody spells a special token
    unseen: int = 0  # conversations with tools of which the template says nothing

    def __post_init__(self) -> None:
        self.special: re.Pattern[str] = special_pattern(self.tokenizer)
        self.endings = np.array(sorted({*self.tokenizer.special.values(), self.tokenizer.end_id}))

    def read(self, files: tuple[SourceFile, ...]) -> Examples:
        """The examples of these files."""
        gathered = Gathered([str(file) for file in files])
        for waiting, spans in self._tokenized(_slabs(self._texts(files))):
            if (one := self._example(waiting.row, spans)) is not None:
                gathered.add(one, waiting.file, waiting.line)
        return gathered.done()

    def finish(self) -> None:
        """Raises CorpusError where rows were unusable, and they are not to be left out."""
        if self.problems and not self.skip_bad:
            raise CorpusError(f"data.source: {_told(self.problems)}")

    def notes(self) -> Iterator[str]:
        """What a user should know."""
        if self.twice:
            yield TWO_BEGINNINGS
        if self.spelled:
            yield (f"conversations in which somebody spells a special token: {self.spelled:,}; it becomes that token, "
                   "as in transformers")  # fmt: skip
        if self.unseen:
            yield f"conversations with tools, which this template does not tell the model of: {self.unseen:,}"
        if any("strftime_now" in source for source in self.template.templates.values()):
            yield "the template writes today's date: tomorrow the same rows give other tokens"
        if self.template.origin == OWN and any("messages" in s or "instruction" in s for s in self.shapes):
            yield "the tokenizer brings no chat template: entrenar's own is used (User: ... Assistant: ...)"

    def _texts(self, files: tuple[SourceFile, ...]) -> Iterator[_Waiting]:
        for number, file in enumerate(files):
            for found in rows(file, self.keys):
                if isinstance(found, Unusable):
                    self._problem(str(found))
                else:
                    try:
                        row = marked(found.row, self.template, self.special, self.train_on)
                    except BadRow as error:
                        self._problem(f"{file} line {found.number:,} {error}")
                        continue
                    self.shapes[found.row.shape] += 1
                    if isinstance(found.row, ChatRow):
                        self._look_at(found.row)
                    yield _Waiting(row, number, found.number)
                if len(self.problems) >= MOST_PROBLEMS and not self.skip_bad:
                    return

    def _look_at(self, row: ChatRow) -> None:
        self.spelled += any(self.special.search(message.get("content", "")) for message in row.messages)
        self.unseen += row.tools is not None and "tools" not in self.template.source(row.tools)

    def _problem(self, words: str) -> None:
        self.skipped += 1
        if len(self.problems) < MOST_PROBLEMS:
            self.problems.append(words)

    def _tokenized(self, slabs: Iterable[list[_Waiting]]) -> Iterator[tuple[_Waiting, Spans]]:
        """The rows with their tokens; while one slab is tokenized, the rows of the next are written."""
        with ThreadPoolExecutor(1) as pool:
            before: list[_Waiting] = []
            future = pool.submit(self.tokenizer.encode_special, [])
            for slab in slabs:
                after = pool.submit(self.tokenizer.encode_special, [waiting.row.text for waiting in slab])
                yield from zip(before, future.result(), strict=True)
                before, future = slab, after
            yield from zip(before, future.result(), strict=True)

    def _example(self, row: Marked, spans: Spans) -> Example | None:
        """The example; None where nothing in it is trained."""
        one = example(row, spans, self.tokenizer)
        begin = self.tokenizer.begin_id
        if not self.twice and begin is not None and one.ids[:2].tolist() == [begin, begin]:
            self.twice = True
            warnings.warn(TWO_BEGINNINGS, stacklevel=4)
        if self.max_length is not None and len(one.ids) > self.max_length:
            self.truncated += 1
            one = Example(one.ids[: self.max_length], one.trained[: self.max_length])
        if not one.trained.any():
            self.dropped += 1
            return None
        last = int(np.flatnonzero(one.trained)[-1])
        self.unended += int(one.ids[last]) not in self.endings
        return one


def _told(problems: list[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    more = "\nand maybe more: reading ended there" if len(problems) == MOST_PROBLEMS else ""
    return f"{len(problems)} rows cannot be used (skip_bad leaves them out):\n" + "\n".join(problems) + more


def _slabs(waiting: Iterable[_Waiting]) -> Iterator[list[_Waiting]]:
    """Rows of about SLAB characters together."""
    slab: list[_Waiting] = []
    size = 0
    for one in waiting:
        slab.append(one)
        size += len(one.row.text)
        if size >= SLAB:
            yield slab
            slab, size = [], 0
    if slab:
        yield slab
