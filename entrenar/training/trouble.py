"""How a run ends that cannot go on: what is said, what it left, what may help. Nothing of a bad step is kept."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from entrenar import kernels
from entrenar.observe.finite import Replay, explain
from entrenar.training.checkpoint import BEST, NEWEST
from entrenar.training.finetune_options import FineTuning
from entrenar.training.options import Config

if TYPE_CHECKING:
    from entrenar.training.trainer import Trainer


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step, why, and what may help."""


def not_finite(trainer: Trainer, loss: float, norm: float, replay: Replay) -> NoReturn:
    """End a step whose loss or gradient is no number, naming the operation, the layer and the place in the data."""
    broken = not math.isfinite(loss)
    what = f"the loss is {loss}" if broken else f"the gradient's norm is {norm} (loss {loss:.4f})"
    trainer.display.doing("computing the step again, with checks")
    found, step = explain(trainer.model, replay), trainer.step + 1
    trainer.model.zero_grad()
    trainer.log("error", step=step, loss=str(loss), grad_norm=str(norm), text=f"{what}; {found}")
    raise TrainingError(
        f"step {step}: {what}; {found}. The weights were not updated, {kept(trainer.run)}. "
        + smaller_steps(trainer.config)
    )


def weights_must_be_finite(trainer: Trainer) -> None:
    """Raises TrainingError naming the first weight that an update made infinite or not a number."""
    for name, p in trainer.model.named_parameters():
        if not math.isfinite(kernels.sum_of_squares(p.data)) and not np.isfinite(p.data).all():
            trainer.log("error", step=trainer.step, text=f"{name} is not finite")
            raise TrainingError(
                f"step {trainer.step}: the update made {name} infinite or not a number; nothing was saved of it, "
                f"{kept(trainer.run)}. A smaller --lr_schedule.learning_rate may help"
            )


def spike_words(trainer: Trainer, loss: float, mean: float, far: float) -> str:
    """What is said of a loss `far` standard deviations above its recent mean."""
    return (
        f"step {trainer.step + 1}: the loss is {loss:.4f}, {far:.1f} standard deviations above its recent mean of "
        f"{mean:.4f} (training.spike_sigma = {trainer.config.training.spike_sigma:g})"
    )


def stop_for_spike(trainer: Trainer, what: str) -> NoReturn:
    """End the step before it changes anything."""
    trainer.model.zero_grad()
    trainer.log("error", step=trainer.step + 1, text=what)
    raise TrainingError(
        f"{what}; the weights were not updated, {kept(trainer.run)}. `entrenar resume {trainer.run}` goes on from "
        "there: with --training.on_spike warn through this step, or with a smaller --lr_schedule.learning_rate"
    )


def smaller_steps(config: Config | FineTuning) -> str:
    return (
        f"A smaller --lr_schedule.learning_rate (now {config.lr_schedule.peak:g}), a longer "
        "--lr_schedule.warmup_steps or --training.clip_norm may help"
    )


def kept(run: Path) -> str:
    """Which checkpoint there is to go on from."""
    for name in (NEWEST, BEST):
        if (run / name).exists():
            return f"the last checkpoint is {(run / name).resolve().name} in {run}"
    return "no checkpoint was written yet (--checkpointing.every)"
