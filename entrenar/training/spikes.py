"""Loss spikes: a step whose loss lies far above the recent ones."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

KEEP = 0.98  # the weight of the past in the running mean and variance: about fifty steps
WARMUP = 50  # steps before anything counts as a spike


@dataclass
class SpikeWatch:
    """Running mean and variance of the loss; tells by how many standard deviations a new loss lies above them.

        mean <- k mean + (1 - k) loss          variance <- k (variance + (1 - k) (loss - mean)^2)

    A spike moves them no further than `sigma` deviations would: one does not hide the next.
    Source: West 1979, "Updating mean and variance estimates", in its exponential form.
    """

    sigma: float
    mean: float = 0.0
    variance: float = 0.0
    steps: int = 0

    def see(self, loss: float) -> float:
        """Take in one step's loss; how many deviations above the mean it was where that is a spike, else 0."""
        self.steps += 1
        if self.steps == 1:
            self.mean = loss
            return 0.0
        deviation = math.sqrt(self.variance)
        far = (loss - self.mean) / deviation if deviation > 0 else 0.0
        spike = far > self.sigma and self.steps > WARMUP
        step = (self.sigma * deviation if spike else loss - self.mean) * (1 - KEEP)
        self.variance = KEEP * (self.variance + step * step / (1 - KEEP))
        self.mean += step
        return far if spike else 0.0

    def state(self) -> dict[str, Any]:
        return asdict(self)

    def load_state(self, state: dict[str, Any]) -> None:
        """Stand where `state()` was taken; sigma stays what this run's configuration says."""
        self.mean, self.variance, self.steps = float(state["mean"]), float(state["variance"]), int(state["steps"])
