"""`entrenar eval --chat`: what the answers in conversations cost a model, as fine-tuning counts it.

Only what training would train is predicted: the assistant's words and the token that ends them, each once, in the
conversation that the chat template writes.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from entrenar.cli.bar import Progress

if TYPE_CHECKING:
    from entrenar.cli.models import Opened


@dataclass(frozen=True)
class ChatScore:
    """What the answers cost in nats, in how many tokens and conversations."""

    source: str
    nats: float
    tokens: int
    rows: int
    seconds: float

    def numbers(self) -> dict[str, Any]:
        """By name, as --json has them: a perplexity that no float holds is null."""
        from entrenar.training.evaluate import perplexity

        confused = perplexity(self.nats / self.tokens)
        return {
            "source": self.source,
            "loss": self.nats / self.tokens,
            "perplexity": confused if math.isfinite(confused) else None,
            "tokens": self.tokens,
            "rows": self.rows,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens / self.seconds,
        }

    def about(self) -> str:
        return f"{self.tokens:,} tokens of answers in {self.rows:,} row{'' if self.rows == 1 else 's'}"

    @staticmethod
    def together(scores: Sequence[ChatScore]) -> ChatScore:
        parts = zip(*((s.nats, s.tokens, s.rows, s.seconds) for s in scores), strict=True)
        nats, tokens, rows, seconds = map(sum, parts)
        return ChatScore("together" if len(scores) > 1 else scores[0].source, nats, tokens, rows, seconds)


def score_chats(opened: Opened, source: str, *, context: int, batch_size: int, skip_bad: bool = False) -> ChatScore:
    """Read the rows of a file, or those that a folder holds out (valid.jsonl), and predict their answers.

    Raises CorpusError where they cannot be read or have none, TemplateError where the template cannot write them,
    FormatError where the model's weights are no numbers.
    """
    from entrenar.data import Batch, CorpusError
    from entrenar.data.chat import evaluation_batches, read_examples
    from entrenar.formats import FormatError
    from entrenar.training.evaluate import evaluate_batches

    try:
        data = read_examples(source, opened.tokenizer, max_length=context + 1, held_out=0, skip_bad=skip_bad)
    except CorpusError as error:
        raise CorpusError(str(error).removeprefix("data.source: ")) from None
    examples = data.held_out if len(data.held_out) else data.train
    if data.facts.truncated:
        print(f"entrenar eval: {source}: rows longer than the context of {context:,} tokens are cut there: "
              f"{data.facts.truncated:,}", file=sys.stderr)  # fmt: skip
    width = min(context, max(1, int(examples.lengths.max()) - 1))
    batches = evaluation_batches(examples, batch_size=batch_size, context=width)
    with Progress(source, examples.trained_tokens) as progress:
        seen = evaluate_batches(opened.model, (Batch(*batch) for batch in batches), examples.trained_tokens,
                                progress=progress)  # fmt: skip
    if not math.isfinite(seen.nats):
        raise FormatError(f"{opened.folder}: the loss is {seen.loss}: the model's weights hold NaN or infinity")
    return ChatScore(source, seen.nats, seen.tokens, len(examples), seen.seconds)
