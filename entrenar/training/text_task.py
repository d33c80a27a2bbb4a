"""The task of `entrenar train`: a model learns a text. How it comes to both, pretrain.py knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from entrenar.data import Batch, Batches, Prepared, bits_per_byte
from entrenar.llama import Llama, generate
from entrenar.observe.finite import Place
from entrenar.observe.record import Record
from entrenar.training.checkpoint import model_files
from entrenar.training.curve import Curve
from entrenar.training.display import Heading, HeldOut, clock
from entrenar.training.evaluate import Evaluation, evaluate, stride_of
from entrenar.training.machine import Machine
from entrenar.training.options import Config
from entrenar.training.task import Sample

if TYPE_CHECKING:
    from entrenar.training.trainer import Trainer


class TextTask:
    """A model and a prepared text. Raises CorpusError where the text is too short for one window."""

    knows_something = False  # and where it does, the run is not about that

    def __init__(self, config: Config, data: Prepared, model: Llama) -> None:
        t = config.training
        self.config, self.data, self.model = config, data, model
        self.batches = self.check(config, data)
        self.steps = t.steps
        self.flops_per_token = model.config.flops_per_token(t.context)
        self.held_out_tokens = data.facts.held_out_tokens
        self.write = model_files(model, data.tokenizer)

    @staticmethod
    def check(config: Config, data: Prepared) -> Batches:
        """The batches. Raises CorpusError where the text is too short for one window."""
        t = config.training
        return Batches(data.train, batch_size=t.batch_size, context=t.context, seed=t.seed)

    # -- training

    def next(self) -> tuple[Batch, Place]:
        batch, starts = Batch(*self.batches.next()), self.batches.taken

        def place(row: int, time: int) -> str:
            offset = starts[row] + time
            return f"training token {offset:,}, {self.data.place(offset)}"

        return batch, place

    def place(self) -> dict[str, Any]:
        return self.batches.state()

    def go_to(self, place: Mapping[str, Any]) -> None:
        self.batches.load_state(place)

    # -- looking

    @property
    def begin(self) -> int:
        """The token before a text: the tokenizer's own for that, or the one that ends the text before."""
        tokenizer = self.data.tokenizer
        return tokenizer.end_id if tokenizer.begin_id is None else tokenizer.begin_id

    def evaluate(self, *, whole: bool, progress: Callable[[int, int], object],
                 stop: Callable[[], bool]) -> Evaluation:  # fmt: skip
        """A fixed sample of the windows of the held-out text, or all of them."""
        t, facts = self.config.training, self.data.facts
        stride = stride_of(t.context, t.eval_overlap)
        count = -(-len(self.data.held_out) // stride)
        found = evaluate(
            self.model,
            self.data.held_out,
            first=self.begin,
            context=t.context,
            stride=stride,
            batch_size=t.batch_size,
            every=1 if whole else max(1, count * stride // t.eval_tokens),
            lengths=self.data.tokenizer.byte_lengths(),
            progress=progress,
            stop=stop,
        )
        if facts.exact_bytes:
            return replace(found, bytes=max(1, found.bytes))
        # the tokenizer changes the text: count the bytes of the text as it was
        size = round(found.bytes * facts.held_out_bytes / max(1, facts.held_out_token_bytes))
        return replace(found, bytes=max(1, size))

    def samples(self) -> list[Sample]:
        """After the prompt, or after the first line of the held-out text."""
        t, tokenizer = self.config.training, self.data.tokenizer
        prompt = t.sample_prompt or tokenizer.decode(self.data.held_out[:64]).partition("\n")[0] + "\n"
        ids = [self.begin, *tokenizer.encode(prompt).tolist()]
        ids = ids[: self.model.config.max_position_embeddings - 1]
        written = generate(
            self.model,
            ids,
            max_new_tokens=t.sample_tokens,
            temperature=t.sample_temperature,
            top_p=t.sample_top_p,
            rng=np.random.default_rng(t.seed),
            stop=(tokenizer.end_id,),
        )
        decoder = tokenizer.decoder(after=ids)
        text = "".join(decoder.push(token) for token in written if token != tokenizer.end_id) + decoder.end()
        return [Sample(prompt, text)]

    def bits_per_byte(self, loss: float) -> float:
        """By the training text's bytes per token."""
        facts = self.data.facts
        return bits_per_byte(loss * facts.train_tokens, facts.train_bytes)

    # -- keeping

    def identity(self) -> dict[str, Any]:
        return {"data": {"folder": str(self.data.folder), "identity": self.data.identity}}

    # -- telling

    def facts(self) -> dict[str, Any]:
        shape = self.model.config
        model = {"parameters": shape.parameter_count(), **shape.to_dict()}
        return {"data": asdict(self.data.facts), "model": model}

    def heading(self, trainer: Trainer, here: Machine) -> Heading:
        """What is trained, on what, where."""
        shape, t, facts = self.model.config, self.config.training, self.data.facts
        batch = f"{t.batch_size} x {t.context} tokens" + (f" x {t.accumulation}" if t.accumulation > 1 else "")
        lines = [
            f"model    {shape.num_hidden_layers} layers, {shape.hidden_size} wide, "
            f"{shape.num_attention_heads} heads, feed-forward {shape.intermediate_size}, "
            f"vocabulary {shape.vocab_size:,} ({self.data.tokenizer.kind})",
            f"text     {facts.train_bytes:,} bytes in {facts.train_documents:,} documents, "
            f"{facts.train_tokens:,} tokens",
            f"held out {facts.held_out_bytes:,} bytes in {facts.held_out_documents:,} documents; "
            f"gzip -9 {facts.gzip_bits:.3f}, xz -9 {facts.xz_bits:.3f} bits per byte",
            f"steps    as many as fit into {t.budget}, of {batch}" if t.budget else f"steps    {t.steps:,} of {batch}",
            f"machine  {here}",
            f"folder   {trainer.run}",
        ]
        if t.start_from:
            lines.insert(1, f"weights  those of {t.start_from}")
        if facts.skipped:
            skipped = f"{facts.skipped_documents:,} files or rows that cannot be used, e.g. {facts.skipped[0]}"
            lines.insert(3, f"skipped  {skipped}")
        title = f"a LLaMA of {shape.parameter_count():,} parameters learns {facts.source}"
        return Heading(title, lines, facts.gzip_bits, facts.xz_bits)

    def curve(self, trainer: Trainer, here: Machine) -> Curve:
        """Of all steps in metrics.jsonl: those before the run was resumed too."""
        shape, facts, t = self.model.config, self.data.facts, self.config.training
        subtitle = (
            f"{shape.parameter_count() / 1e6:.1f} M parameters, {shape.num_hidden_layers} layers of "
            f"{shape.hidden_size}, vocabulary {shape.vocab_size:,}, "
            f"{t.batch_size * t.accumulation} x {t.context} tokens per step · "
            f"{clock(trainer.reports[-1].seconds if trainer.reports else 0)} on {here.threads} threads of {here.cpu}"
        )
        record = Record(trainer.run)
        looks = {column.step: column.mean for column in record.held_out.columns()}
        looks |= {seen.step: seen.bits_per_byte or 0.0 for seen in trainer.looks[-1:]}  # at the end: the whole text
        return Curve(
            f"A LLaMA learns {_short(facts.source)}", subtitle,
            [(column.step, column.mean) for column in record.series["bits_per_byte"].columns()],
            list(looks.items()),
            [("gzip -9", facts.gzip_bits), ("xz -9", facts.xz_bits)],
        )  # fmt: skip

    def results(self, last: HeldOut, before: HeldOut | None) -> tuple[str, list[tuple[str, float]]]:
        """Bits per byte, beside what compressors need."""
        part = f"all {last.bytes:,} bytes" if last.whole else f"a sample of {last.bytes:,} bytes"
        facts = self.data.facts
        rows = [("this model", last.bits_per_byte or 0.0), ("gzip -9", facts.gzip_bits), ("xz -9", facts.xz_bits)]
        return f"bits per byte on held-out text it never saw, {part}:", rows

    def next_commands(self, command: str, run: str, steps: int) -> list[str]:
        return [
            f'{command} generate {run} --prompt "..."  # let it write',
            f"{command} train --data.source path/to/your/text  # a file, a folder, or a glob pattern",
            f"{command} resume {run} --training.steps {2 * steps}  # train it longer",
            f"{command} export {run} --to gguf --out model.gguf  # for llama.cpp and its friends",
        ]


def _short(source: str) -> str:
    if source == "stdlib:":
        return "Python's standard library"
    name = "standard input" if source == "-" else Path(source).name or source
    return name if len(name) <= 60 else name[:57] + "..."
