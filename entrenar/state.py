"""Named arrays against named arrays: says at once all that does not fit, before anything is copied."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def check_fits(where: str, state: Mapping[str, np.ndarray], own: Mapping[str, np.ndarray]) -> None:
    """Raise ValueError listing every name of `own` that `state` misses, has too much, or has in another shape."""
    wrong = [f"missing {name} {own[name].shape}" for name in own if name not in state]
    wrong += [f"unexpected {name} {np.shape(state[name])}" for name in state if name not in own]
    wrong += [
        f"{name} has shape {np.shape(state[name])}, wanted {own[name].shape}"
        for name in own
        if name in state and np.shape(state[name]) != own[name].shape
    ]
    if wrong:
        raise ValueError(f"{where}: {len(wrong)} of {len(own)} tensors do not fit:\n  " + "\n  ".join(wrong))
