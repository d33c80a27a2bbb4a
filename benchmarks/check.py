"""`make bench-check`: has anything become slower than the committed results say it was?

    python -m benchmarks.check                 against benchmarks/results/latest.json
    python -m benchmarks.check --isa avx2      everybody held to AVX2, against latest-avx2.json

Ratios alone are compared (groups/guard.py), never times. A ratio more than TOLERANCE below the committed one is
measured again, up to TRIES times in all, and the best counts: a neighbour's noise passes, a regression is there every
time. On another kind of machine shares of the machine say nothing; speeds over peers are compared, with MORE_TOLERANCE.

Ends with 0 where nothing got slower, 1 with a line for each ratio that did, 2 without results to compare with, 3 where
others kept the processors so busy that a low ratio may be theirs, or every low one moved too much from round to round.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.__main__ import usual_threads
from benchmarks.driver import ISAS, ROOT, Bench
from benchmarks.groups import guard, machine
from benchmarks.report import NOISE, Report, Row, named, number

TOLERANCE, MORE_TOLERANCE = 0.10, 0.30
TRIES = 3
ROUNDS = 5
RESTLESS = 1.2  # highest over lowest round, of a ratio that says nothing
STOLEN = 0.02  # of the processors, by other machines on the same host, while ratios were measured
SAME = ("cpu", "cores", "threads", "isa", "backend")
FINE, SLOWER, NOTHING, UNSURE = 0, 1, 2, 3

Guard = Callable[[Bench], Iterable[Row]]


@dataclass(frozen=True)
class Verdict:
    """A ratio: the best of what was measured, against the committed one.

    calmest   the highest over the lowest round, in the try where these were nearest to each other
    """

    row: Row
    best: float
    tries: int
    committed: float
    tolerance: float
    calmest: float

    @property
    def slower(self) -> bool:
        return self.best < self.committed * (1 - self.tolerance)

    def __str__(self) -> str:
        values = f"{number(self.best, self.row.unit)}, committed {number(self.committed, self.row.unit)}"
        if not self.slower:
            return f"{self.row.name}: {values}"
        less = f"{1 - self.best / self.committed:.0%} less, {self.tolerance:.0%} would pass"
        return f"SLOWER: {self.row.name}: {values}: {less}; best of {self.tries}"


def differences(committed: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """In which of what matters the committed machine is not this one."""
    differ = [key for key in SAME if here.get(key) != committed.get(key)]
    return [f"{key} {here.get(key)}, committed {committed.get(key)}" for key in differ]


def judged(bench: Bench, measure: Guard, committed: dict[str, float], tolerance: float) -> Iterator[Verdict]:
    """A verdict for each ratio a guard measures that was committed; measured again while any is too low."""
    verdicts: dict[str, Verdict] = {}
    for tries in range(1, TRIES + 1):
        for row in measure(bench):
            if row.measured is not None and row.name in committed:
                before, measured = verdicts.get(row.name), row.measured
                best = max(before.best if before else 0.0, measured.median)
                calmest = min(before.calmest if before else math.inf, measured.high / max(measured.low, 1e-9))
                verdicts[row.name] = Verdict(row, best, tries, committed[row.name], tolerance, calmest)
        if not any(verdict.slower for verdict in verdicts.values()):
            break
        if tries < TRIES:
            machine.look_again(bench)
    yield from verdicts.values()


def check(bench: Bench, committed: Report, guards: Sequence[Guard] = guard.GUARDS,
          say: Callable[[str], None] = print) -> int:  # fmt: skip
    """One of FINE, SLOWER, NOTHING, UNSURE, and a line for each ratio."""
    other = differences(committed.machine, bench.machine)
    if other:
        say(f"Another kind of machine ({'; '.join(other)}): speeds over peers are compared, {MORE_TOLERANCE:.0%} pass.")
    ratios = {
        row.name: row.measured.median
        for row in committed.rows
        if row.group == "guard" and row.measured and (row.unit == "x" or not other)
    }
    if not ratios:
        say("Nothing to compare with: the committed results have no rows of the guard (python -m benchmarks).")
        return NOTHING
    verdicts: list[Verdict] = []
    before = machine.stolen()
    for measure in guards:
        for verdict in judged(bench, measure, ratios, MORE_TOLERANCE if other else TOLERANCE):
            say(str(verdict))
            verdicts.append(verdict)
    if missing := [name for name in ratios if name not in {verdict.row.name for verdict in verdicts}]:
        say(f"Not compared: {', '.join(missing)}" + (f" ({bench.torch_missing})" if bench.torch_missing else ""))
    slower = [verdict for verdict in verdicts if verdict.slower]
    if not slower:
        return FINE
    if all(verdict.calmest > RESTLESS for verdict in slower):
        least = min(verdict.calmest for verdict in slower) - 1
        say(f"They moved by {least:.0%} and more from round to round: try again when it is calm.")
        return UNSURE
    taken = machine.share_stolen(before, machine.stolen())
    if taken >= STOLEN:
        say(f"Other machines on this one's host took {taken:.0%} of the processors: try again when they do not.")
        return UNSURE
    if bench.machine["busy"] >= NOISE:
        say(f"Others took up to {bench.machine['busy']:.0%} of the processors: try again when they are idle.")
        return UNSURE
    return SLOWER


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m benchmarks.check", description="what got slower than the committed results")
    p.add_argument("--isa", choices=[name for name in ISAS if name], default="",
                   help="hold every contender to this instruction set")  # fmt: skip
    p.add_argument("--peers-python", default=".venv-peers/bin/python", help="an interpreter with torch")
    p.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    latest = args.results / f"{named('latest', args.isa)}.json"
    if not latest.exists():
        print(f"Nothing to compare with: {latest} is not there.")
        return NOTHING
    bench = Bench(peers_python=args.peers_python, rounds=ROUNDS, threads=usual_threads(), isa=args.isa,
                  say=lambda line: None)  # fmt: skip
    try:
        bench.machine = machine.facts(bench)
        print(machine.line(bench.machine))
        return check(bench, Report.read(latest))
    finally:
        bench.close()


if __name__ == "__main__":
    sys.exit(main())
