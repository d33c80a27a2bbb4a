"""A training step of a configuration, on tokens drawn at random: what `entrenar profile` looks at.

The model, optimizer and micro-batches are those the run would have; only the text is not read. Every token is trained.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from entrenar import optim
from entrenar.data import Batch
from entrenar.llama import Llama
from entrenar.observe.profile import Profile
from entrenar.training import finetune, pretrain
from entrenar.training.adapter import trial
from entrenar.training.config import FineTuning, Run
from entrenar.training.pretrain_plan import expected_shape
from entrenar.training.trainer import accumulate_gradients, optimizer_of


@dataclass
class Step:
    """One optimizer step, again and again on the same micro-batches."""

    model: Llama
    optimizer: optim.AdamW
    clip_norm: float
    batches: list[Batch]

    @property
    def tokens(self) -> int:
        return sum(batch.ids.size for batch in self.batches)

    def run(self) -> Profile:
        """Do what the trainer does in a step, and time it."""
        with Profile() as profile:
            accumulate_gradients(self.model, self.batches)
            norm = optim.global_norm(self.model.parameters())
            self.optimizer.step(grad_scale=optim.clip_scale(norm, self.clip_norm))
            self.optimizer.zero_grad()
        return profile


def step_of(config: Run) -> Step:
    """Build it. Raises ConfigError and FormatError where the configuration or the model it names cannot be used."""
    config = config.settled
    if isinstance(config, FineTuning):
        shape = finetune.base_shape(config)
        trial(config, shape)
        model, context = finetune.new_model(config), config.data.longest
    else:
        shape = pretrain.pretrained_shape(config) or expected_shape(config)
        model, context = pretrain.new_model(config, shape), config.training.context
    t = config.training
    batches = [_batch(number, t.batch_size, context, shape.vocab_size) for number in range(t.accumulation)]
    return Step(model, optimizer_of(config, model), t.clip_norm, batches)


def _batch(seed: int, batch: int, context: int, vocabulary: int) -> Batch:
    """Tokens (B, T), more often small than large, as in text."""
    drawn = np.random.default_rng(seed).random((batch, context + 1)) ** 3
    ids = (drawn * vocabulary).astype(np.int64)
    return Batch(ids[:, :-1], ids[:, 1:])
