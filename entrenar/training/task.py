"""What a run is about: the seam between the trainer, which knows only batches and losses, and the kinds of runs.

    text_task.py   a model learns a text         entrenar train
    chat_task.py   a model learns to answer      entrenar finetune

A task holds the model and the data. The trainer asks it for micro-batches, for the loss on what is held out, for
samples, and for what belongs into a checkpoint; job.py asks it how it wants to be told of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from entrenar.data import Batch
from entrenar.llama import Llama
from entrenar.observe.finite import Place
from entrenar.training.display import HeldOut

if TYPE_CHECKING:
    from entrenar.training.curve import Curve
    from entrenar.training.display import Heading
    from entrenar.training.evaluate import Evaluation
    from entrenar.training.machine import Machine
    from entrenar.training.trainer import Trainer


@dataclass(frozen=True)
class Sample:
    """What the model wrote after a prompt; `wanted` is what the data has there, where it has something."""

    prompt: str
    text: str
    wanted: str = ""


@dataclass(frozen=True)
class Before:
    """What a model that is trained further was like before the first step."""

    look: HeldOut
    samples: list[Sample]

    @staticmethod
    def of(state: Mapping[str, Any]) -> Before:
        """As a checkpoint keeps it."""
        return Before(HeldOut(**state["look"]), [Sample(**sample) for sample in state["samples"]])


class Task(Protocol):
    """What a run trains on, how it looks at itself, what it keeps.

    knows_something   whether the model is worth a look before the first step
    steps             how many updates were asked for
    flops_per_token   arithmetic of one token, forward and backward
    held_out_tokens   how many tokens a whole look predicts
    """

    model: Llama
    knows_something: bool
    steps: int
    flops_per_token: int
    held_out_tokens: int

    # -- training

    def next(self) -> tuple[Batch, Place]:
        """The next micro-batch, and where its tokens come from, should someone have to be told."""
        ...

    def place(self) -> dict[str, Any]:
        """Where `next` stands, as JSON can say it."""
        ...

    def go_to(self, place: Mapping[str, Any]) -> None:
        """Stand where `place()` was taken. Raises ValueError for a place that is none of this data."""
        ...

    # -- looking

    def evaluate(self, *, whole: bool, progress: Callable[[int, int], object],
                 stop: Callable[[], bool]) -> Evaluation:  # fmt: skip
        """The loss on what is held out: on a fixed part of it, or on all."""
        ...

    def samples(self) -> list[Sample]:
        """What the model writes, always after the same prompts and with the same dice."""
        ...

    def bits_per_byte(self, loss: float) -> float | None:
        """A training loss in nats per token as bits per byte of text; None where that says nothing."""
        ...

    # -- keeping

    def write(self, folder: Path) -> None:
        """Put what was trained into the folder of a checkpoint."""
        ...

    def identity(self) -> dict[str, Any]:
        """What a run that goes on must find again, as state.json keeps it."""
        ...

    # -- telling

    def facts(self) -> dict[str, Any]:
        """What metrics.jsonl's first event says of data and model."""
        ...

    def heading(self, trainer: Trainer, here: Machine) -> Heading:
        """What is shown above the first step."""
        ...

    def curve(self, trainer: Trainer, here: Machine) -> Curve:
        """The picture's contents."""
        ...

    def results(self, last: HeldOut, before: HeldOut | None) -> tuple[str, list[tuple[str, float]]]:
        """What came out: a line that says which number it is, and the numbers by name, the model's own first."""
        ...

    def next_commands(self, command: str, run: str, steps: int) -> list[str]:
        """Commands worth trying after a whole run of so many steps; `command` is how entrenar is called here."""
        ...
