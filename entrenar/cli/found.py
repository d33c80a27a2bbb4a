"""What was found at a path: the one form in which `entrenar inspect` has every kind of file and folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from entrenar.cli.tensors import Weight, not_finite

SHOWN = 20  # problems of one kind told one by one


@dataclass
class Found:
    """What is at a path.

    facts     name and value, for people and for JSON
    weights   its tensors
    problems  what is wrong with it, a sentence each
    below     the files of a folder, the newest checkpoint of a run
    aside     its table of tensors is shown with --all only
    """

    kind: str
    path: Path
    facts: dict[str, Any] = field(default_factory=dict)
    weights: list[Weight] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    below: list[Found] = field(default_factory=list)
    aside: bool = False

    def parts(self) -> Iterator[Found]:
        """This and all below it."""
        yield self
        for part in self.below:
            yield from part.parts()

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(weight.nbytes for part in self.parts() for weight in part.weights)

    def measure(self) -> None:
        """Take the statistics of every tensor; those that are not finite become problems."""
        for part in self.parts():
            part.weights = [weight.measured() for weight in part.weights]
            bad = not_finite(part.weights)
            part.problems += [f"NOT FINITE: {sentence}" for sentence in bad[:SHOWN]]
            part.problems += [f"NOT FINITE: {len(bad) - SHOWN} more tensors"] if len(bad) > SHOWN else []

    def to_dict(self) -> dict[str, Any]:
        own: dict[str, Any] = {"kind": self.kind, "path": str(self.path), "facts": self.facts}
        if self.weights:
            own["numbers"] = sum(weight.size for weight in self.weights)
            own["tensors"] = [weight.to_dict() for weight in self.weights]
        if self.below:
            own["contains"] = [part.to_dict() for part in self.below]
        return own | {"problems": self.problems}
