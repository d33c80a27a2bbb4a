"""`entrenar eval`: how well a model predicts a text, in numbers that can be compared.

Each file is read whole, nothing held out, an end token after every document, and each token is predicted exactly
once. Loss and perplexity per token depend on the tokenizer; bits per byte, and perplexity per byte and per word,
spread the same total cost over the text itself, so that models with different tokenizers can be compared.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from entrenar.cli.bar import Progress
from entrenar.cli.evaluate_chats import ChatScore, score_chats
from entrenar.cli.model_options import OFF, add_model_options, opened
from entrenar.cli.parser import CommandLineError
from entrenar.cli.terminal import paint, visible

if TYPE_CHECKING:
    from entrenar.cli.models import Opened

NAME = "eval"
HELP = "say how well a model predicts a text: loss, perplexity, bits per byte"
EXAMPLE = """
entrenar eval SmolLM2-135M notes/ test.jsonl --context 512 --json
entrenar eval llama/ --adapter off --adapter runs/tuned --chat held-out.jsonl
"""

TOKENS = 4096  # in one batch, about, where --batch-size says nothing else


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "entrenar eval MODEL FILE... [options]"
    parser.add_argument("model", metavar="MODEL", help="a run, checkpoint, adapter, or Hugging Face folder")
    parser.add_argument("files", metavar="FILE", nargs="+", help="text, JSONL, folder, pattern; -: stdin")
    add = parser.add_argument
    add_model_options(add)
    add("--chat", action="store_true", help="conversations: what their answers cost")
    add("--context", metavar="N", type=int, help="tokens per window (default: as it was trained)")
    add("--overlap", metavar="SHARE", type=float, default=0.5, help="of a window that was read before (default 0.5)")
    add("--batch-size", metavar="N", type=int, help=f"windows at once (default: about {TOKENS:,} tokens)")
    add("--json", action="store_true", help="one JSON object instead of lines")
    add("--skip-bad", action="store_true", help="leave out files and rows that cannot be read")


def run(args: argparse.Namespace) -> int:
    """Evaluate each file; returns 0. Raises CommandLineError before the model takes its time."""
    _check(args)
    found = opened(args, NAME)
    limit = found.model.config.max_position_embeddings
    context = args.context or found.context
    if context > limit:
        raise CommandLineError(f"--context {context}: this model reads at most {limit:,} tokens at once")
    if len(found.turns) > 1 and "-" in args.files:
        raise CommandLineError("-: standard input can be read once only, and several adapters are to read it")
    settings: dict[str, Any] = {"context": context} | ({} if args.chat else {"overlap": args.overlap})
    batch_size = args.batch_size or max(1, TOKENS // context)
    read: Callable[..., Score | ChatScore] = score_chats if args.chat else score
    told = []
    for turn in found.turns:
        found.use(turn)
        by = {"adapter": turn or OFF} if found.tuned else {}
        scores: list[Any] = []
        for name in args.files:
            scores.append(read(found, name, **settings, batch_size=batch_size, skip_bad=args.skip_bad))
            if not args.json:
                tell(scores[-1], by)
        together = scores[0].together(scores)
        told.append({**by, **together.numbers(), "files": [s.numbers() for s in scores]})
        if len(scores) > 1 and not args.json:
            tell(together, by)
    if args.json:
        whole = told[0] if len(told) == 1 else {"adapters": told}
        print(json.dumps({"model": str(found.folder), **settings, **whole}))
    return 0


def _check(args: argparse.Namespace) -> None:
    wrong = []
    for name, value in (("--context", args.context), ("--batch-size", args.batch_size)):
        if value is not None and value < 1:
            wrong.append(f"{name} {value}: wanted at least 1")
    if not 0 <= args.overlap < 1:
        wrong.append(f"--overlap {args.overlap:g}: wanted at least 0 and less than 1")
    if args.files.count("-") > 1:
        wrong.append("-: standard input can be read once only")
    if wrong:
        raise CommandLineError("; ".join(wrong))


@dataclass(frozen=True)
class Score:
    """What a text cost in nats, and what it consists of; words are what white space separates."""

    source: str
    nats: float
    tokens: int
    bytes: int
    words: int
    documents: int
    seconds: float

    def numbers(self) -> dict[str, Any]:
        """By name, as --json has them: a perplexity that no float holds is null."""
        from entrenar.training.evaluate import perplexity

        def per(count: int) -> float | None:
            value = perplexity(self.nats / max(1, count))
            return value if math.isfinite(value) else None

        return {
            "source": self.source,
            "loss": self.nats / self.tokens,
            "perplexity": per(self.tokens),
            "perplexity_per_word": per(self.words),
            "perplexity_per_byte": per(self.bytes),
            "bits_per_byte": self.nats / math.log(2) / self.bytes,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "words": self.words,
            "documents": self.documents,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens / self.seconds,
        }

    def about(self) -> str:
        documents = f"{self.documents:,} document{'' if self.documents == 1 else 's'}"
        return f"{self.bytes:,} bytes in {documents}, {self.tokens:,} tokens"

    @staticmethod
    def together(scores: Sequence[Score]) -> Score:
        """All of them, as if the costs had been one text's."""
        parts = zip(*((s.nats, s.tokens, s.bytes, s.words, s.documents, s.seconds) for s in scores), strict=True)
        nats, tokens, size, words, count, seconds = map(sum, parts)
        return Score("together" if len(scores) > 1 else scores[0].source, nats, tokens, size, words, count, seconds)


def score(opened: Opened, source: str, *, context: int, overlap: float, batch_size: int,
          skip_bad: bool = False) -> Score:  # fmt: skip
    """Read a source and predict all of it.

    Raises CorpusError where it cannot be read or holds nothing, FormatError where the model's weights are no numbers.
    """
    from entrenar.formats import FormatError
    from entrenar.training.evaluate import evaluate, stride_of

    text = whole_text(opened, source, skip_bad=skip_bad)
    first = opened.begin[0] if opened.begin else opened.tokenizer.end_id
    with Progress(source, len(text.tokens)) as progress:
        seen = evaluate(opened.model, text.tokens, first=first, context=context, stride=stride_of(context, overlap),
                        batch_size=batch_size, progress=progress)  # fmt: skip
    if not math.isfinite(seen.nats):
        raise FormatError(f"{opened.folder}: the loss is {seen.loss}: the model's weights hold NaN or infinity")
    return Score(source, seen.nats, seen.tokens, text.bytes, text.words, text.documents, seen.seconds)


@dataclass(frozen=True)
class Text:
    """A source as tokens (n,), and what it has been."""

    tokens: np.ndarray
    bytes: int
    words: int
    documents: int


def whole_text(opened: Opened, source: str, *, skip_bad: bool = False) -> Text:
    """All documents of a source (data/corpus.py) as one row of tokens, an end token after each. Raises CorpusError."""
    from entrenar.data import CorpusError, find_sources
    from entrenar.data.documents import read_documents

    parts, size, words, count = [], 0, 0, 0
    try:
        for _, document in read_documents(find_sources(source), skip_bad=skip_bad):
            parts.append(opened.tokenizer.encode_documents([document]))
            size, words, count = size + len(document.encode()), words + len(document.split()), count + 1
    except CorpusError as error:
        raise CorpusError(str(error).removeprefix("data.source: ")) from None
    if not size:
        raise CorpusError(f"{source}: holds no text; wanted at least one character to predict")
    return Text(np.concatenate(parts), size, words, count)


def tell(score: Score | ChatScore, by: Mapping[str, Any]) -> None:
    """The numbers on standard output: a small table on a terminal, one line of key=value pairs elsewhere.

    by   {"adapter": its name}, where there are adapters
    """
    n = score.numbers()
    if not sys.stdout.isatty():
        values = (f"{name}={_plain(value)}" for name, value in {**by, **n}.items())
        print(" ".join(values), flush=True)
        return
    title = visible(score.source) + "".join(f", {name} {value}" for name, value in by.items())
    print(paint(title, "bold"), f" {score.about()}, {score.seconds:,.1f} s, {n['tokens_per_second']:,.0f} tokens/s")
    for name in (label for label in LABELS if label in n):
        print(f"  {LABELS[name]:<36} {_number(n[name])}")
    sys.stdout.flush()


LABELS = {
    "bits_per_byte": "bits per byte",
    "loss": "loss, nats per token",
    "perplexity": "perplexity per token",
    "perplexity_per_word": "perplexity per word",
    "perplexity_per_byte": "perplexity per byte",
}


def _number(value: float | None) -> str:
    return "beyond any float" if value is None else f"{value:,.4f}" if value < 1e6 else f"{value:.4g}"


def _plain(value: Any) -> str:
    if isinstance(value, str):
        return shlex.quote(value)
    return "inf" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
