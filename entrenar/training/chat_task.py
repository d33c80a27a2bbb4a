"""The task of `entrenar finetune`: a model learns to answer. How it comes to model and data, finetune.py knows."""

# B batch, T time

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from entrenar.data import Batch, Tokenizer
from entrenar.data.chat import ChatData, ExampleBatches, Examples, evaluation_batches
from entrenar.data.chat.packing import MULTIPLE
from entrenar.llama import Llama, generate
from entrenar.observe.finite import Place
from entrenar.observe.record import Record
from entrenar.training.checkpoint import Write
from entrenar.training.curve import Curve
from entrenar.training.display import Heading, HeldOut, clock
from entrenar.training.evaluate import Evaluation, evaluate_batches, perplexity
from entrenar.training.finetune_options import FULL, FineTuning
from entrenar.training.finetune_plan import Length, flops
from entrenar.training.machine import Machine
from entrenar.training.task import Sample

if TYPE_CHECKING:
    from entrenar.training.trainer import Trainer

SHOWN = 2000  # characters of a prompt that a sample keeps: its end


class ChatTask:
    """A model of which something is trained, and examples.

    write       puts what is trained into the folder of a checkpoint
    base        what is known of the model it began from, for state.json
    lines       what the heading says of model and adapter
    """

    knows_something = True

    def __init__(self, config: FineTuning, data: ChatData, model: Llama, *, write: Write, base: Mapping[str, Any],
                 lines: list[str]) -> None:  # fmt: skip
        t = config.training
        self.config, self.data, self.model = config, data, model
        self.write, self.base, self.lines = write, dict(base), lines
        self.context = config.data.longest
        self.batches = self.check(config, data)
        self.steps = length_of(config, data).steps
        self.flops_per_token = flops(model.config, sum(p.size for p in model.parameters()), self.context)
        self.held_out_tokens = data.facts.held_out_trained
        self.part = part_of(data.held_out, t.eval_tokens)

    @staticmethod
    def check(config: FineTuning, data: ChatData) -> ExampleBatches:
        """The batches. Raises CorpusError where there is nothing to make them of."""
        t, d = config.training, config.data
        return ExampleBatches(data.train, batch_size=t.batch_size, context=d.longest, seed=t.seed, packing=d.packing)

    # -- training

    def next(self) -> tuple[Batch, Place]:
        batch, taken = Batch(*self.batches.next()), self.batches.taken

        def place(row: int, time: int) -> str:
            assert batch.starts is not None
            number = len(np.unique(batch.starts[row, : time + 1])) - 1  # of the examples in the row
            return self.data.train.place(taken[row][min(number, len(taken[row]) - 1)])

        return batch, place

    def place(self) -> dict[str, Any]:
        return self.batches.state()

    def go_to(self, place: Mapping[str, Any]) -> None:
        self.batches.load_state(place)

    # -- looking

    def evaluate(self, *, whole: bool, progress: Callable[[int, int], object],
                 stop: Callable[[], bool]) -> Evaluation:  # fmt: skip
        """Some of the held-out examples, always the same, or all."""
        examples = self.data.held_out if whole else self.part
        t, d = self.config.training, self.config.data
        batches = evaluation_batches(examples, batch_size=t.batch_size, context=self.context, packing=d.packing)
        return evaluate_batches(self.model, (Batch(*batch) for batch in batches), examples.trained_tokens,
                                progress=progress, stop=stop)  # fmt: skip

    def samples(self) -> list[Sample]:
        """What it answers in held-out conversations, beside what is answered there; or to training.sample_prompt."""
        t, tokenizer = self.config.training, self.data.tokenizer
        written = []
        for prompt, wanted in self._prompts():
            prompt = prompt[-max(1, self.model.config.max_position_embeddings - t.sample_tokens) :]
            ids = generate(
                self.model,
                prompt,
                max_new_tokens=t.sample_tokens,
                temperature=t.sample_temperature,
                top_p=t.sample_top_p,
                rng=np.random.default_rng(t.seed),
                stop=(tokenizer.end_id,),
            )
            before, text, there = (tokenizer.decode(self._shown(part)) for part in (prompt, ids, wanted))
            written.append(Sample(before[-SHOWN:], text, there))
        return written

    def _shown(self, ids: Iterable[int]) -> list[int]:
        """Without the tokens that begin and end a text, which say nothing to people."""
        tokenizer = self.data.tokenizer
        return [token for token in ids if token not in (tokenizer.end_id, tokenizer.begin_id)]

    def _prompts(self) -> Iterator[tuple[list[int], list[int]]]:
        """(ids before an answer, ids of the answer) of the first held-out examples, or the prompt that was given."""
        t = self.config.training
        if t.sample_prompt:
            yield asked(t.sample_prompt, self.data), []
            return
        for number in range(min(t.samples, len(self.data.held_out))):
            ids, trained = self.data.held_out[number]
            at = last_answer(trained)
            yield ids[:at].tolist(), ids[at:].tolist()

    def bits_per_byte(self, loss: float) -> None:
        return None

    # -- keeping

    def identity(self) -> dict[str, Any]:
        return {"data": {"source": self.config.data.source, "identity": self.data.identity}, "base": self.base}

    # -- telling

    def facts(self) -> dict[str, Any]:
        shape = self.model.config
        trained = sum(p.size for p in self.model.parameters())
        model = {"parameters": shape.parameter_count(), "trained": trained, **shape.to_dict()}
        return {"data": asdict(self.data.facts), "model": model, "base": self.base}

    def heading(self, trainer: Trainer, here: Machine) -> Heading:
        t, d, facts = self.config.training, self.config.data, self.data.facts
        rows = self.batches.filling()
        batch = f"{t.batch_size} x {self.context} tokens" + (f" x {t.accumulation}" if t.accumulation > 1 else "")
        steps = f"as many as fit into {t.budget}, of {batch}" if t.budget else f"{trainer.steps:,} of {batch}"
        epochs = trainer.steps * t.batch_size * t.accumulation / max(1, rows.rows)
        lines = [
            *self.lines,
            f"data     {facts.train_examples:,} rows, {facts.train_tokens:,} tokens, {facts.train_trained:,} of them "
            f"trained ({d.train_on}); chat template: {facts.template}",
            f"held out {facts.held_out_examples:,} rows, {facts.held_out_trained:,} tokens to predict",
            f"steps    {steps}" + ("" if t.budget else f": each row {epochs:.3g} times"),
            f"packing  {rows.examples:,} rows in {rows.rows:,}, {rows.share:.0%} full" if d.packing else
            f"padding  {1 - rows.share:.0%} of a batch, at most",
            f"machine  {here}",
            f"folder   {trainer.run}",
        ]  # fmt: skip
        if facts.skipped_rows:
            first = f", e.g. {facts.skipped[0]}" if facts.skipped else ""
            lines.insert(len(self.lines), f"skipped  {facts.skipped_rows:,} rows that cannot be used{first}")
        return Heading(f"{name_of(self.config.base.model)} learns to answer from {facts.source}", lines)

    def curve(self, trainer: Trainer, here: Machine) -> Curve:
        """Of all steps in metrics.jsonl: those before the run was resumed too."""
        t, kind = self.config.training, self.config.adapter.kind
        trained = sum(p.size for p in self.model.parameters())
        subtitle = (
            f"{trained / 1e6:.1f} M of {self.model.config.parameter_count() / 1e6:.1f} M parameters trained ({kind}), "
            f"{t.batch_size * t.accumulation} x {self.context} tokens per step · "
            f"{clock(trainer.reports[-1].seconds if trainer.reports else 0)} on {here.threads} threads of {here.cpu}"
        )
        record = Record(trainer.run)
        looks = {column.step: column.mean for column in record.held_out.columns()}
        looks |= {seen.step: seen.loss for seen in trainer.looks[-1:]}  # at the end: all of it
        before = trainer.before.look.loss if trainer.before else 0.0
        return Curve(
            f"{name_of(self.config.base.model)} learns to answer", subtitle,
            [(column.step, column.mean) for column in record.series["loss"].columns()],
            list(looks.items()),
            [("before", before)] if before else [],
            unit="nats per trained token",
        )  # fmt: skip

    def results(self, last: HeldOut, before: HeldOut | None) -> tuple[str, list[tuple[str, float]]]:
        """The loss, beside that of the model it began from."""
        part = f"all {last.tokens:,} trained tokens" if last.whole else f"a part with {last.tokens:,} trained tokens"
        confused = f"{perplexity(before.loss):.3f} before, " if before else ""
        about = (
            f"nats per trained token of held-out conversations, {part}\n"
            f"(perplexity {confused}{perplexity(last.loss):.3f} after):"
        )
        return about, [("after", last.loss), *([("before", before.loss)] if before else [])]

    def next_commands(self, command: str, run: str, steps: int) -> list[str]:
        longer = f"{command} resume {run} --training.steps {2 * steps}  # train it longer"
        if self.config.adapter.kind == FULL:
            return [f"{command} chat {run}  # talk to it", longer]
        base = shlex.quote(self.config.base.model)
        return [
            f"{command} chat {base} --adapter {run} --compare  # talk to it, and to the base beside it",
            f"{command} merge {run} --out tuned  # make it one plain model",
            longer,
        ]


def length_of(config: FineTuning, data: ChatData) -> Length:
    """By the rows of the first epoch; those of others are like them."""
    t, batches = config.training, ChatTask.check(config, data)
    steps = t.steps or max(1, math.ceil(t.epochs * len(batches.order) / (t.batch_size * t.accumulation) - 1e-9))
    longest = max(int(batches.needs[row].sum()) for row in batches.order)
    trained = data.facts.train_trained / max(1, int(batches.needs.sum()))
    return Length(steps, min(config.data.longest, -(-longest // MULTIPLE) * MULTIPLE), min(1.0, trained))


def part_of(examples: Examples, tokens: int) -> Examples:
    """Every k-th example, so that about so many tokens are read."""
    every = max(1, examples.tokens // tokens)
    return examples.chosen(np.arange(len(examples)) % every == 0)


def last_answer(trained: np.ndarray) -> int:
    """Where the last row of trained tokens begins; where nothing goes before it, behind a quarter of the tokens."""
    marks = np.flatnonzero(trained)
    gaps = np.flatnonzero(np.diff(marks) > 1)
    at = int(marks[gaps[-1] + 1]) if len(gaps) else int(marks[0])
    return at if at > 1 else max(1, len(trained) // 4)


def asked(prompt: str, data: ChatData) -> list[int]:
    """The ids of a question, up to where the answer begins."""
    text = data.template.render([{"role": "user", "content": prompt}], add_generation_prompt=True).text
    return encoded(text, data.tokenizer)


def encoded(text: str, tokenizer: Tokenizer) -> list[int]:
    """Special tokens that are spelled in the text are special tokens."""
    (spans,) = tokenizer.encode_special([text])
    return spans.ids.tolist()


def name_of(folder: str) -> str:
    """What people call the model of a folder."""
    return Path(folder).expanduser().resolve().name or folder
