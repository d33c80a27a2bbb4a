"""The one source of randomness: weight initialisation and dropout draw from it, in order.

One generator, seeded once, makes a run repeatable; its state is a small dictionary, so that a checkpoint can
put it in a file, and activation checkpointing can replay the same dropout mask.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_generator = np.random.Generator(np.random.PCG64(0))


def seed(n: int) -> None:
    """Start again from seed `n`."""
    global _generator
    _generator = np.random.Generator(np.random.PCG64(n))


def generator() -> np.random.Generator:
    """The generator itself; drawing from it moves it on."""
    return _generator


def get_state() -> dict[str, Any]:
    """Where the generator stands: plain integers and strings, fit for JSON."""
    return dict(_generator.bit_generator.state)


def set_state(state: dict[str, Any]) -> None:
    """Go back to a state from `get_state`."""
    _generator.bit_generator.state = state
