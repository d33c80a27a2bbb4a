"""Epoch after epoch: everything once, each time in an order of its own; where it stands is three numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Epochs:
    """An endless supply of what an epoch holds, `context` tokens each: the base of all training batches.

    A subclass says what the epochs are: `_order(seed, epoch)`, in the order in which it is taken, the same every time;
    and calls it by name, `ROWS`.
    """

    ROWS = "rows"

    def __init__(self, seed: int, context: int) -> None:
        self.seed, self.context = seed, context
        self.epoch = self.position = 0
        self.order = self._order(seed, 0)

    def _order(self, seed: int, epoch: int) -> Any:
        raise TypeError(f"{type(self).__name__} must define _order()")

    def take(self, count: int) -> list[Any]:
        """The next so many. They may end one epoch and begin the next."""
        chosen: list[Any] = []
        while len(chosen) < count:
            if self.position == len(self.order):
                self.epoch, self.position = self.epoch + 1, 0
                self.order = self._order(self.seed, self.epoch)
            taken = self.order[self.position : self.position + count - len(chosen)]
            self.position += len(taken)
            chosen += list(taken)
        return chosen

    def state(self) -> dict[str, Any]:
        return {"seed": self.seed, "epoch": self.epoch, "position": self.position}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Stand where `state()` was taken (of the same data and context).

        Raises ValueError, and stays where it was, for a state that is none of these batches.
        """
        for name in ("seed", "epoch", "position"):
            value = state.get(name)
            if type(value) is not int or not 0 <= value < 2**63:
                raise ValueError(f"Batches: the state's {name} is {str(value)[:40]}, wanted a whole number from 0 on")
        order = self._order(state["seed"], state["epoch"])
        if state["position"] > len(order):
            raise ValueError(
                f"Batches: the state's position is {state['position']:,}, but an epoch has {len(order):,} "
                f"{self.ROWS} of context {self.context}: it is the state of other data or another context"
            )
        self.seed, self.epoch, self.position = state["seed"], state["epoch"], state["position"]
        self.order = order
