"""What would make a run fit that does not: changes of its options, in ladders from small to large steps."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from entrenar.training.display import size
from entrenar.training.options import Loop

SHORTEST = 32  # tokens of context that advice still proposes
Changes = dict[str, Any]  # "section.name" -> another value
C = TypeVar("C", bound=Any)  # a kind of run's options


def with_changes(config: C, changes: Mapping[str, Any]) -> C:
    """The configuration with other values of some options."""
    for name, value in changes.items():
        section, _, key = name.partition(".")
        config = replace(config, **{section: replace(getattr(config, section), **{key: value})})
    return config


def advice(ladders: Iterable[list[Changes]], need: Callable[[Changes], int], *, needed: int, room: int, fixed: int,
           last: str) -> list[str]:  # fmt: skip
    """Changes that fit into `room`, each with what it needs, those that cost least first; else what comes nearest.

    ladders   ways to need less, each in steps from small to large; those that cost least come first
    need      bytes that a run needs after changes; `needed` as it is
    fixed     bytes that no change saves; `last` what to say where nothing is enough
    """
    known: dict[tuple[Any, ...], int] = {}

    def after(changes: Changes) -> int:
        key = tuple(changes.items())
        if key not in known:
            known[key] = need(changes)
        return known[key]

    fitting, nearest = [], []
    for ladder in filter(None, ladders):
        first = len(ladder) - 1 if fixed > room else 0  # where nothing can fit, the last step comes nearest
        step = bisect_left(ladder, True, first, key=lambda changes: after(changes) <= room)
        changes = ladder[min(step, len(ladder) - 1)]
        bytes_ = after(changes)
        words = ", ".join(f"{name} = {str(value).lower()}" for name, value in changes.items())
        if bytes_ <= room:
            fitting.append(f"{words}: {size(bytes_)}, fits")
        elif bytes_ < needed:
            nearest.append((bytes_, f"{words}: {size(bytes_)}, too much"))
    fitting = list(dict.fromkeys(fitting))  # two ladders may have the same step
    return fitting or [*(line for _, line in sorted(nearest)[:2]), last]


def ladders(t: Loop, context: str, tokens: int) -> Iterator[list[Changes]]:
    """What any kind of run can do; `context` is the option that says how many tokens are in a row, `tokens` its
    value."""
    halves = [{"training.batch_size": t.batch_size >> n, "training.accumulation": t.accumulation << n}
              for n in range(1, 64) if t.batch_size >> n << n == t.batch_size]  # fmt: skip
    recompute = [] if t.activation_checkpointing else [{"training.activation_checkpointing": True}]
    shorter: list[Changes] = [{context: tokens >> n} for n in range(1, 64) if tokens >> n >= SHORTEST]
    smallest: Changes = {}
    for way in (recompute, halves):
        smallest |= way[-1] if way else {}
    yield list(halves)  # the same update, in smaller parts
    yield list(recompute)  # the same update, a third slower
    if recompute and halves:
        yield [recompute[0] | half for half in halves]
    yield shorter  # another model: it sees less at a time
    if smallest:
        yield [smallest | short for short in shorter]
