"""The training loop: batch, loss, backward, clip, AdamW, report; at times a look at what is held out, a checkpoint.

Knows nothing of what is learned (task.py), of command lines (cli/), of how a run begins and ends (job.py), and draws
nothing itself (display.py).
"""

# B batch, T time

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from entrenar import optim, random
from entrenar.data import Batch
from entrenar.llama import Llama
from entrenar.observe.finite import Place, Replay
from entrenar.training import budget, machine
from entrenar.training.checkpoint import Saved, save_step
from entrenar.training.display import Display, HeldOut, Report
from entrenar.training.finetune_options import FineTuning
from entrenar.training.metrics import Metrics
from entrenar.training.options import Config
from entrenar.training.signals import Requests
from entrenar.training.spikes import SpikeWatch
from entrenar.training.task import Before, Sample, Task
from entrenar.training.trouble import (
    TrainingError,
    kept,
    not_finite,
    smaller_steps,
    spike_words,
    stop_for_spike,
    weights_must_be_finite,
)


def accumulate_gradients(model: Llama, micro_batches: Sequence[Batch]) -> tuple[float, int]:
    """Add to every .grad the gradient of the mean loss over all tokens of all micro-batches.

    Each micro-batch counts by the tokens trained in it: together they equal one big batch. Returns the mean loss in
    nats per token, and the number of tokens that counted.
    """
    tokens = sum(batch.trained for batch in micro_batches)
    total = 0.0
    for batch in micro_batches:
        loss = model.loss(batch.ids, batch.targets, starts=batch.starts, reduction="sum")
        loss.backward(np.full(loss.shape, 1 / max(1, tokens), loss.dtype))
        total += loss.item()
    return total / max(1, tokens), tokens


def optimizer_of(config: Config | FineTuning, model: Llama) -> optim.AdamW:
    """AdamW over all that the model trains, as the configuration says."""
    t = config.training
    return optim.AdamW(model.named_parameters(), lr=config.lr_schedule.peak, betas=(t.beta1, t.beta2), eps=t.eps,
                       weight_decay=t.weight_decay)  # fmt: skip


@dataclass
class Trainer:
    """One run of one task, into one folder, which it makes.

    began   on time.perf_counter()'s clock: what a budget counts from
    """

    config: Config | FineTuning
    task: Task
    run: Path
    display: Display
    peak_flops: float = math.inf
    requests: Requests = field(default_factory=Requests)
    began: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        t = self.config.training
        self.model = self.task.model
        self.optimizer = optimizer_of(self.config, self.model)
        self.step, self.steps = 0, self.task.steps  # a budget moves `steps`
        self.tokens_seen = 0
        self.best: HeldOut | None = None
        self.reports: list[Report] = []  # the first and the last alone: metrics.jsonl has them all
        self.looks: list[HeldOut] = []
        self.before: Before | None = None
        self.timed: HeldOut | None = None  # a look that was only made to know how long one takes
        self.spikes = SpikeWatch(t.spike_sigma)
        self.busy = 0.0  # seconds in steps alone, smoothed, per step
        self.saved_at = time.perf_counter()
        self.metrics = Metrics(self.run)

    # -- the loop

    def train(self) -> None:
        """All steps, or as many as come before `stop`.

        Raises TrainingError where the loss or its gradient is not finite, or the loss spikes and shall stop the run.
        """
        while self.step < self.steps and not self.stopping:
            start = time.perf_counter()
            batches = self._micro_batches()
            micro_batches = [batch for batch, _ in batches]
            loss, tokens = accumulate_gradients(self.model, micro_batches)
            norm = optim.global_norm(self.model.parameters())
            if not (math.isfinite(loss) and math.isfinite(norm)):
                not_finite(self, loss, norm, Replay(micro_batches, [place for _, place in batches]))
            self._watch_for_spikes(loss)
            lr = self.learning_rate()
            self.optimizer.step(lr=lr, grad_scale=optim.clip_scale(norm, self.config.training.clip_norm))
            self.optimizer.zero_grad()
            self.step += 1
            positions = sum(batch.ids.size for batch in micro_batches)
            self._report(loss, norm, lr, tokens, positions, time.perf_counter() - start)
            self._between_steps()

    def _micro_batches(self) -> list[tuple[Batch, Place]]:
        """Those of one step, each with where its tokens come from."""
        return [self.task.next() for _ in range(self.config.training.accumulation)]

    def _watch_for_spikes(self, loss: float) -> None:
        """Tell of a loss far above its recent course, or stop, as training.on_spike says."""
        how, mean, far = self.config.training.on_spike, self.spikes.mean, self.spikes.see(loss)
        if far and how == "warn":
            self.warn(spike_words(self, loss, mean, far))
        elif far and how == "stop":
            stop_for_spike(self, spike_words(self, loss, mean, far))

    def _between_steps(self) -> None:
        """What is due after a step: a look at held-out text, a checkpoint, another plan."""
        every, c = self.config.training.eval_every, self.config.checkpointing
        if every and self.step % every == 0:
            self.look()
        waited = time.perf_counter() - self.saved_at
        if (c.every and self.step % c.every == 0) or (c.minutes and waited >= 60 * c.minutes) or self.requests.save:
            self.save()
        if self.config.training.budget and self.step % max(1, self.steps // 50) == 0:
            self.plan_steps()

    def learning_rate(self) -> float:
        """Of the step that is being made."""
        s = self.config.lr_schedule
        return s.peak * s.share(self.step, self.steps)

    @property
    def stopping(self) -> str:
        """Why the run shall end after the step that is being made; empty while it shall not."""
        return self.requests.stop

    def stop(self, why: str) -> None:
        """End after the step that is being made."""
        self.requests.stop = why

    @property
    def seconds(self) -> float:
        """How long the run has taken, with what came before it was resumed."""
        return time.perf_counter() - self.began

    # -- what is held out, samples

    def look(self, *, whole: bool = False) -> HeldOut:
        """The loss on what is held out: a fixed part of it, or all. A new best is saved.

        A `stop` that comes while all is read makes do with the part. Raises TrainingError where the loss is
        not finite: nothing is saved of such weights.
        """
        seen = self._measure(whole=whole)
        if seen is None:
            return self.look()
        if not math.isfinite(seen.loss):
            what = f"the held-out loss is {seen.loss}, though that of training was finite"
            self.log("error", step=self.step, text=what)
            raise TrainingError(f"step {self.step}: {what}; {kept(self.run)}. {smaller_steps(self.config)}")
        self.looks.append(seen)
        self.log("held_out", **asdict(seen))
        self.display.held_out(seen)
        if not whole and (self.best is None or seen.loss < self.best.loss):
            self.best = seen
            if self.config.checkpointing.best:
                self.save(best=True)
        return seen

    def look_before(self) -> None:
        """All that is held out, and samples, of a model that knows something already: what comes after is compared."""
        seen = self.look(whole=True)
        samples = self.samples() if self.config.training.sample_tokens and not self.stopping else []
        self.before = Before(seen, samples)

    def _measure(self, *, whole: bool) -> HeldOut | None:
        """The numbers of a look, kept nowhere; None where a `stop` ended a whole one."""
        found = self.task.evaluate(
            whole=whole,
            progress=lambda done, total: self.display.doing("reading what is held out", done, total),
            stop=lambda: whole and bool(self.stopping),
        )
        if not found.complete:
            return None
        bits = found.bits_per_byte if found.bytes else None
        return HeldOut(self.step, found.loss, bits, found.tokens, found.bytes, found.seconds, whole)

    def samples(self) -> list[Sample]:
        """What the model writes after the task's prompts."""
        self.display.doing("writing samples")
        written = self.task.samples()
        for sample in written:
            self.log("sample", step=self.step, **asdict(sample))
        return written

    # -- a budget of time

    def plan_steps(self) -> None:
        """Choose the number of steps so that the run ends on time, where training.budget gives one.

        Before the first step the time of a step is rehearsed: on real batches, changing nothing.
        """
        t = self.config.training
        if not t.budget:
            return
        if self.step == 0:
            self.busy = self._rehearse()
        if not self.looks and self.timed is None:
            self.timed = self._measure(whole=False)
        sample = self.looks[-1] if self.looks else self.timed
        assert sample is not None  # only a whole one can be stopped
        whole = sample.seconds * self.task.held_out_tokens / max(1, sample.tokens)
        total = budget.seconds_of(t.budget)
        left = total * (1 - budget.SPARE) - self.seconds
        fit = budget.steps_that_fit(left, step=self.busy, look=sample.seconds, every=t.eval_every, last=whole)
        steps = max(1, fit) if self.step == 0 else budget.replanned(self.steps, self.step + fit, self.step)
        if steps != self.steps:
            self.steps = steps
            self.log("plan", step=self.step, steps=steps)
            self.display.note(f"{steps:,} steps fit into {t.budget}")

    def _rehearse(self, times: int = 4) -> float:
        """Seconds of one step, the fastest of a few: forward and backward on real batches, AdamW on zeros."""
        place, drawn = self.task.place(), random.get_state()
        seconds = []
        for _ in range(times):
            start = time.perf_counter()
            accumulate_gradients(self.model, [batch for batch, _ in self._micro_batches()])
            optim.global_norm(self.model.parameters())
            for p in self.model.parameters():
                if p.grad is not None:
                    p.grad[...] = 0
            self.optimizer.step(lr=0.0)  # no gradient, no rate: moments stay zero, weights what they are
            self.optimizer.zero_grad()
            seconds.append(time.perf_counter() - start)
        self.optimizer.steps = 0
        self.task.go_to(place)
        random.set_state(drawn)
        return min(seconds)

    # -- checkpoints

    def save(self, *, best: bool = False) -> Path:
        """Write a checkpoint of this step. Raises TrainingError rather than save weights that are not finite."""
        self.display.doing("saving a checkpoint")
        weights_must_be_finite(self)
        start, self.requests.save = time.perf_counter(), False
        self.metrics.sync()
        folder = save_step(
            self.run,
            self.step,
            best=best,
            keep_last_n=self.config.checkpointing.keep_last_n,
            write=self.task.write,
            optimizer=self.optimizer,
            state=self.state(),
        )
        self.saved_at = time.perf_counter()
        size = sum(file.stat().st_size for file in folder.iterdir())
        self.log("checkpoint", step=self.step, folder=folder.name, bytes=size, seconds=self.saved_at - start)
        return folder

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, beside weights and moments; and what was reached."""
        return {
            "step": self.step,
            "steps": self.steps,
            "tokens": self.tokens_seen,
            "seconds": self.seconds,
            "busy": self.busy,
            "batches": self.task.place(),
            "random": random.get_state(),
            "spikes": self.spikes.state(),
            "best": asdict(self.best) if self.best else None,
            "before": asdict(self.before) if self.before else None,
            "looks": [asdict(seen) for seen in self.looks[-1:]],  # metrics.jsonl has them all
            "metrics_bytes": self.metrics.size,
            "config": self.config.sections(),
            **self.task.identity(),
        }

    def load_state(self, saved: Saved) -> None:
        """Stand where the checkpoint was written: the next step is the one that would have come then.

        metrics.jsonl is cut back to what it held, so that no step stands there twice. The model must have the
        checkpoint's weights already. Raises ValueError where the state does not fit this run.
        """
        state = saved.state
        self.optimizer.load_state_dict(saved.optimizer)
        self.task.go_to(state["batches"])
        random.set_state(state["random"])
        self.spikes.load_state(state["spikes"])
        self.step, self.tokens_seen = int(state["step"]), int(state["tokens"])
        if self.config.training.budget:  # which chose them; else the configuration's hold
            self.steps = int(state["steps"])
        self.best = HeldOut(**state["best"]) if state["best"] else None
        self.before = Before.of(state["before"]) if state.get("before") else None
        self.looks = [HeldOut(**seen) for seen in state["looks"]]
        self.busy, self.began = float(state["busy"]), time.perf_counter() - float(state["seconds"])
        self.metrics.cut(int(state["metrics_bytes"]))

    # -- telling

    def log(self, event: str, **values: Any) -> None:
        """One line of metrics.jsonl."""
        self.metrics.log(event, **values)

    def warn(self, text: str) -> None:
        """Something a person should know, though the run goes on."""
        self.log("warning", step=self.step, text=text)
        self.display.note(text)

    def close(self) -> None:
        self.metrics.close()

    def _report(self, loss: float, norm: float, lr: float, tokens: int, positions: int, seconds: float) -> None:
        self.tokens_seen += tokens
        slow = self.step <= 2 or not self.busy  # the first step is slower than all others: the second forgets it
        self.busy = seconds if slow else 0.95 * self.busy + 0.05 * seconds
        rate, memory = positions / self.busy, machine.memory_used()
        report = Report(
            step=self.step,
            steps=self.steps,
            loss=loss,
            bits_per_byte=self.task.bits_per_byte(loss),
            learning_rate=lr,
            grad_norm=norm,
            tokens=self.tokens_seen,
            tokens_per_second=rate,
            peak_share=rate * self.task.flops_per_token / self.peak_flops,
            memory=memory,
            memory_peak=max(memory, machine.memory_peak()),  # the system's count of the peak lags behind
            seconds=self.seconds,
            seconds_left=self._seconds_left(),
        )
        self.reports = [*self.reports[:1], report]
        self.log("step", **asdict(report))
        self.display.step(report)

    def _seconds_left(self) -> float:
        """Of the steps and the looks to come, the last one at everything; of looks once there was one."""
        every = self.config.training.eval_every
        steps = (self.steps - self.step) * self.busy
        if not self.looks:
            return steps
        looks = self.steps // every - self.step // every if every else 0
        seen = self.looks[-1]
        return steps + seen.seconds * (looks + self.task.held_out_tokens / max(1, seen.tokens))
