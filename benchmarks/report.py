"""What was measured: rows, kept as JSON, printed as lines, and written as a table into docs/benchmarks.md."""

from __future__ import annotations

import datetime
import json
import operator
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.spread import Spread

NOISE = 0.1  # of the processors' time: more of it taken by others is said in the report


def markers(isa: str = "") -> tuple[str, str]:
    """Around what is generated in docs/benchmarks.md: of the machine as it is, and held to an instruction set."""
    name = f"benchmarks {isa}" if isa else "benchmarks"
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


@dataclass(frozen=True)
class Target:
    """At least, or at most, this much."""

    sense: str  # ">=" "<=" ">" "<"
    value: float

    def met(self, measured: float) -> bool:
        compare = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}[self.sense]
        return compare(measured, self.value)


@dataclass
class Row:
    """One line of the table.

    unit      "x" for a ratio (entrenar's speed or size over the peer's), else "s", "ms", "GFLOP/s", ...
    measured  None where it could not be measured; then the note says why
    share     of the machine's FMA peak or memory bandwidth in the same run, in words
    failed    something went wrong, a result was refused for instance; the note says what
    """

    group: str
    name: str
    unit: str
    measured: Spread | None = None
    target: Target | None = None
    share: str = ""
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    failed: bool = False
    date: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without a target or a measurement."""
        return None if self.target is None or self.measured is None else self.target.met(self.measured.median)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"met": self.met}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Row:
        known = {key: value for key, value in values.items() if key != "met"}
        known["measured"] = Spread(**values["measured"]) if values["measured"] else None
        known["target"] = Target(**values["target"]) if values["target"] else None
        return cls(**known)


# -- words


def number(value: float, unit: str) -> str:
    """Three significant digits and the unit: `1.23x`, `0.183 s`, `142 GFLOP/s`."""
    if abs(value) >= 100:
        digits = f"{value:.0f}"
    elif value == 0:
        digits = "0"
    else:
        digits = f"{value:#.3g}".rstrip(".")
    return digits + ("x" if unit == "x" else f" {unit}" if unit else "")


def measured(row: Row) -> str:
    if row.measured is None:
        return "-"
    spread = row.measured
    text = number(spread.median, row.unit)
    return (
        text if spread.low == spread.high else f"{text} ({number(spread.low, '')}-{number(spread.high, '')})"
    )


def target(row: Row) -> str:
    return (
        f"{row.target.sense} {row.target.value:g}{'x' if row.unit == 'x' else ' ' + row.unit}"
        if row.target
        else ""
    )


def met(row: Row) -> str:
    return {None: "", True: "yes", False: "**no**"}[row.met]


def line(row: Row) -> str:
    """The row for a terminal."""
    verdict = {None: "", True: "  met", False: "  NOT MET"}[row.met]
    wanted = f"  (target {target(row)}{verdict})" if row.target else ""
    extra = "".join(f"  {text}" for text in (row.share, row.note) if text)
    return f"{row.group:12} {row.name}: {measured(row)}{wanted}{extra}"


def unquiet(facts: dict[str, Any]) -> str:
    """A warning, where others keep the processors busy while we measure."""
    if facts["busy"] < NOISE:
        return ""
    return f". NOT A QUIET MACHINE: others took up to {facts['busy']:.0%} of the processors"


def table(headers: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(headers), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines)


# -- a run


@dataclass
class Report:
    machine: dict[str, Any]
    date: str
    rounds: int
    rows: list[Row] = field(default_factory=list)

    def add(self, row: Row) -> Row:
        row.date = self.date
        self.rows.append(row)
        return row

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"rows": [row.to_dict() for row in self.rows]}

    @classmethod
    def read(cls, path: Path) -> Report:
        values = json.loads(path.read_text())
        return cls(**values | {"rows": [Row.from_dict(row) for row in values["rows"]]})

    def keep_others(self, earlier: Report) -> None:
        """Take over an earlier run's groups that this one left out, if it ran on the same kind of machine."""
        same = ("cpu", "cores", "threads", "isa")
        mine = {row.group for row in self.rows}
        if all(self.machine.get(key) == earlier.machine.get(key) for key in same):
            self.rows += [row for row in earlier.rows if row.group not in mine]

    def write(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n")
        return path

    def write_dated(self, folder: Path, isa: str = "") -> Path:
        """This run alone, for the history."""
        return self.write(folder / f"{named(self.date.replace(':', ''), isa)}.json")

    def write_latest(self, folder: Path, order: Sequence[str], isa: str = "") -> Path:
        """latest.json, or that of an instruction set: this run, with the groups it left out from earlier ones."""
        latest = folder / f"{named('latest', isa)}.json"
        if latest.exists():
            self.keep_others(Report.read(latest))
        self.rows.sort(key=lambda row: order.index(row.group))
        return self.write(latest)

    def markdown(self) -> str:
        m = self.machine
        peak, bandwidth = f"{m['fma_peak'] / 1e9:.0f} GFLOP/s", f"{m['bandwidth'] / 1e9:.1f} GB/s"
        reading = f"; {m['reading'] / 1e9:.1f} of reading" if "reading" in m else ""
        lines = [
            f"Measured {self.date[:10]} on {m['cpu']}, {m['cores']} cores, {m['threads']} threads,",
            f"{m['isa']} ({m['backend']} kernels): FMA peak {peak}, memory bandwidth {bandwidth} (of a copy,",
            f"both ways counted{reading}). Python {m['python']}, {m['peers']}{unquiet(m)}.",
            f"{self.rounds} rounds; medians, with the lowest and the highest in brackets.",
        ]
        for title, promised in ("What was promised:", True), ("For information:", False):
            if rows := [row for row in self.rows if bool(row.target or row.failed) == promised]:
                lines += ["", title, "", self.table_of(rows)]
        for row in self.rows:
            if shapes := row.details.get("table"):
                lines += ["", f"{row.name}, in detail:", "", table(shapes[0], shapes[1:])]
        return "\n".join(lines)

    def table_of(self, rows: list[Row]) -> str:
        headers = ("benchmark", "target", "measured", "met", "share of the machine", "note")
        return table(headers, ([r.name, target(r), measured(r), met(r), r.share, self.note(r)] for r in rows))

    def note(self, row: Row) -> str:
        return row.note if row.date == self.date else f"{row.note}; measured {row.date[:10]}"

    def write_docs(self, path: Path, isa: str = "") -> None:
        """Replace what stands between the two markers."""
        path.write_text(between(path.read_text(), self.markdown(), path.name, isa))


def between(text: str, new: str, name: str, isa: str = "") -> str:
    begin, end = markers(isa)
    head, begins, rest = text.partition(begin)
    _, ends, tail = rest.partition(end)
    if not begins or not ends:
        raise ValueError(f"{name}: wanted the markers {begin} and {end}, in this order")
    return f"{head}{begin}\n{new}\n{end}{tail}"


def named(name: str, isa: str) -> str:
    return f"{name}-{isa}" if isa else name


def now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S")
