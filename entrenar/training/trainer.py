"""The training loop: batch, loss, backward, clip, AdamW, report; at times held-out text, a checkpoint.

Knows nothing of command lines (examples/train.py) and draws nothing itself (display.py).
"""

# B batch, T time

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import numpy as np

from entrenar import optim, random
from entrenar.data import IGNORE, Batches, Prepared, batched, bits_per_byte, evaluation_windows
from entrenar.llama import Llama, generate
from entrenar.tensor import no_grad
from entrenar.training import machine
from entrenar.training.checkpoint import NEWEST, save_step
from entrenar.training.config import Config
from entrenar.training.display import Display, HeldOut, Report

Batch = tuple[np.ndarray, np.ndarray]


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step, why, and what may help."""


def accumulate_gradients(model: Llama, micro_batches: Sequence[Batch]) -> tuple[float, int]:
    """Add to every .grad the gradient of the mean loss over all tokens of all micro-batches.

    Each micro-batch counts by its tokens: together they equal one big batch. Returns the mean loss in nats
    per token, and the number of tokens that counted.
    """
    tokens = sum(int((targets != IGNORE).sum()) for _, targets in micro_batches)
    total = 0.0
    for ids, targets in micro_batches:
        loss = model.loss(ids, targets, reduction="sum")
        loss.backward(np.full(loss.shape, 1 / max(1, tokens), loss.dtype))
        total += loss.item()
    return total / max(1, tokens), tokens


@dataclass
class Trainer:
    """One run of one model over one prepared corpus, into one folder, which it makes.

    Raises CorpusError, before it makes the folder, where the text is too short for one window.
    """

    config: Config
    data: Prepared
    model: Llama
    run: Path
    display: Display
    peak_flops: float = math.inf

    def __post_init__(self) -> None:
        t, lr = self.config.training, self.config.lr_schedule
        self.batches = Batches(self.data.train, batch_size=t.batch_size, context=t.context, seed=t.seed)
        self.optimizer = optim.AdamW(
            self.model.named_parameters(),
            lr=lr.learning_rate,
            betas=(t.beta1, t.beta2),
            eps=t.eps,
            weight_decay=t.weight_decay,
        )
        self.step = 0
        self.tokens_seen = 0
        self.stopping = ""  # why, once something asked for an end
        self.best: HeldOut | None = None
        self.reports: list[Report] = []
        self.looks: list[HeldOut] = []
        self.began = time.perf_counter()
        self.busy = 0.0  # seconds in steps alone, smoothed, per step
        self.run.mkdir(parents=True, exist_ok=True)
        self.metrics: TextIO = open(self.run / "metrics.jsonl", "a", encoding="utf-8")

    def train(self) -> None:
        """All steps, or as many as come before `stop`. Raises TrainingError where the loss is not finite."""
        c = self.config.training
        while self.step < c.steps and not self.stopping:
            start = time.perf_counter()
            micro_batches = [self.batches.next() for _ in range(c.accumulation)]
            loss, tokens = accumulate_gradients(self.model, micro_batches)
            norm = optim.global_norm(self.model.parameters())
            self._must_be_finite(loss, norm)
            lr = self.learning_rate()
            self.optimizer.step(lr=lr, grad_scale=optim.clip_scale(norm, c.clip_norm))
            self.optimizer.zero_grad()
            self.step += 1
            self._report(loss, norm, lr, tokens, time.perf_counter() - start)
            if c.eval_every and self.step % c.eval_every == 0:
                self.look()
            if self.config.checkpointing.every and self.step % self.config.checkpointing.every == 0:
                self.save()

    def learning_rate(self) -> float:
        """Of the step that is being made."""
        s = self.config.lr_schedule
        return s.learning_rate * s.share(self.step, self.config.training.steps)

    def stop(self, why: str) -> None:
        """End after the step that is being made."""
        self.stopping = why

    @no_grad()
    def look(self, *, whole: bool = False) -> HeldOut:
        """The loss on held-out text: a fixed sample of its windows, or all of them. A new best is saved.

        A `stop` that comes while all of them are read makes do with the sample.
        """
        t, start = self.config.training, time.perf_counter()
        stride = max(1, round(t.context * (1 - t.eval_overlap)))
        count = -(-len(self.data.held_out) // stride)
        every = 1 if whole else max(1, count * stride // t.eval_tokens)
        windows = evaluation_windows(self.data.held_out, first=self.data.tokenizer.end_id, context=t.context,
                                     stride=stride, every=every)  # fmt: skip
        lengths = self.data.tokenizer.byte_lengths()
        nats, tokens, size = 0.0, 0, 0
        self.model.eval()
        for ids, targets in batched(windows, t.batch_size):
            nats += self.model.loss(ids, targets, reduction="sum").item()
            counted = targets[targets != IGNORE]
            tokens, size = tokens + len(counted), size + int(lengths[counted].sum())
            self.display.doing("reading held-out text", tokens, len(self.data.held_out) // every)
            if whole and self.stopping:
                return self.look()
        self.model.train()

        seen = HeldOut(self.step, nats / max(1, tokens), bits_per_byte(nats, max(1, size)), tokens, size,
                       time.perf_counter() - start, whole)  # fmt: skip
        self.looks.append(seen)
        self.log("held_out", **asdict(seen))
        self.display.held_out(seen)
        if not whole and (self.best is None or seen.bits_per_byte < self.best.bits_per_byte):
            self.best = seen
            if self.config.checkpointing.best:
                self.save(best=True)
        return seen

    def save(self, *, best: bool = False) -> Path:
        """Write a checkpoint of this step."""
        self.display.doing("saving a checkpoint")
        return save_step(
            self.run,
            self.step,
            best=best,
            keep=self.config.checkpointing.keep_last_n,
            model=self.model,
            tokenizer=self.data.tokenizer,
            optimizer=self.optimizer,
            state=self.state(),
        )

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, beside weights and moments; and what was reached."""
        return {
            "step": self.step,
            "tokens": self.tokens_seen,
            "batches": self.batches.state(),
            "random": random.get_state(),
            "best": asdict(self.best) if self.best else None,
            "data": asdict(self.data.facts),
            "config": self.config.sections(),
        }

    def sample(self) -> str:
        """What the model writes after the prompt, or after the first line of the held-out text."""
        t, tokenizer = self.config.training, self.data.tokenizer
        prompt = t.sample_prompt or tokenizer.decode(self.data.held_out[:64]).partition("\n")[0] + "\n"
        ids = [tokenizer.end_id, *tokenizer.encode(prompt).tolist()]
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
        return prompt + tokenizer.decode(token for token in written if token != tokenizer.end_id)

    def bits(self, loss: float) -> float:
        """A training loss in nats per token as bits per byte, by the training text's bytes per token."""
        facts = self.data.facts
        return bits_per_byte(loss * facts.train_tokens, facts.train_bytes)

    def log(self, event: str, **values: Any) -> None:
        """One line of metrics.jsonl. Raises OSError, with the file's name, where the disk refuses it."""
        try:
            self.metrics.write(json.dumps({"event": event, **values}) + "\n")
            self.metrics.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.metrics.name) from error

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of what `log` could not write, and said so
            self.metrics.close()

    def _report(self, loss: float, norm: float, lr: float, tokens: int, seconds: float) -> None:
        c = self.config.training
        self.tokens_seen += tokens
        slow = self.step <= 2  # the first step is slower than all others: the second forgets it
        self.busy = seconds if slow else 0.95 * self.busy + 0.05 * seconds
        rate, memory = tokens / self.busy, machine.memory_used()
        report = Report(
            step=self.step,
            steps=c.steps,
            loss=loss,
            bits_per_byte=self.bits(loss),
            learning_rate=lr,
            grad_norm=norm,
            tokens=self.tokens_seen,
            tokens_per_second=rate,
            peak_share=rate * self.model.config.flops_per_token(c.context) / self.peak_flops,
            memory=memory,
            memory_peak=max(memory, machine.memory_peak()),  # the system's count of the peak lags behind
            seconds=time.perf_counter() - self.began,
            seconds_left=self._seconds_left(),
        )
        self.reports.append(report)
        self.log("step", **asdict(report))
        self.display.step(report)

    def _seconds_left(self) -> float:
        """Of the steps and the looks to come, the last one at everything; of looks once there was one."""
        c = self.config.training
        steps = (c.steps - self.step) * self.busy
        if not self.looks:
            return steps
        looks = c.steps // c.eval_every - self.step // c.eval_every if c.eval_every else 0
        sample, held_out_tokens = self.looks[-1], self.data.facts.held_out_tokens
        return steps + sample.seconds * (looks + held_out_tokens / max(1, sample.tokens))

    def _must_be_finite(self, loss: float, norm: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        what = (
            f"the loss is {loss}"
            if not math.isfinite(loss)
            else f"the gradient's norm is {norm} (loss {loss:.4f})"
        )
        kept = (
            f"the last checkpoint is {self.run / NEWEST}"
            if (self.run / NEWEST).exists()
            else "no checkpoint was written yet (--checkpointing.every)"
        )
        self.log("error", step=self.step + 1, loss=str(loss), grad_norm=str(norm))
        raise TrainingError(
            f"step {self.step + 1}: {what}; the weights were not updated, {kept}. A smaller "
            f"--lr_schedule.learning_rate (now {self.config.lr_schedule.learning_rate:g}), a longer "
            "--lr_schedule.warmup_steps or --training.clip_norm may help"
        )


@contextlib.contextmanager
def interruptible(stop: Callable[[str], None]) -> Iterator[None]:
    """Inside, the first SIGINT or SIGTERM calls `stop` and a second one ends the process's work at once.

    Outside the main thread Python allows no signal handlers: then nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if len(came) > 1:
            raise KeyboardInterrupt
        stop("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
