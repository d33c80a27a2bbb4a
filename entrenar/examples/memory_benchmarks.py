"""How much memory fine-tuning takes: arithmetic and measurement side by side. `make memory`

    python -m entrenar.examples.memory_benchmarks            all of it, minutes; needs 6 GB of memory
    python -m entrenar.examples.memory_benchmarks --quick    the model of 124 million weights alone

Full fine-tuning, LoRA and QLoRA, real steps, each in a process of its own; up to a model of 7 billion weights. Weights
are generated: memory and time do not depend on what they say. Prints bars and what was claimed, writes memory.png and
memory.json; the exit code is 1 where a claim does not hold.

In reading order: memory_arithmetic.py (what a step holds, from its shape), memory_measure.py (what a process held),
memory_picture.py (bars), this file (which cases, what is claimed).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from entrenar import kernels
from entrenar.examples.memory_arithmetic import Case, arithmetic, reduction, saved, weight_bytes
from entrenar.examples.memory_measure import Measurement
from entrenar.examples.memory_picture import Bar, picture, table
from entrenar.files import write_file
from entrenar.training import machine
from entrenar.training.display import make_console, size

SMALL = [Case("124m", "full", 2, 512), Case("124m", "lora", 2, 512, r=16), Case("124m", "qlora", 2, 512, r=16)]
MIDDLE = [Case("1.1b", "full", 1, 256), Case("1.1b", "lora", 1, 256, r=16), Case("1.1b", "qlora", 1, 256, r=16)]
LARGE = [Case("7b", "qlora", 1, 256, r=r, checkpointing=True) for r in (16, 64)]
# 108 GB and 27: nobody measures these here
TOO_LARGE = [Case("7b", "full", 1, 256, checkpointing=True), Case("7b", "lora", 1, 256, r=16, checkpointing=True)]
STEPS = {"124m": 4, "1.1b": 2, "7b": 1}

REDUCTIONS = {("124m", 16): 99.28, ("7b", 16): 99.75, ("7b", 64): 99.01}  # percent
SAVED = 85.0  # percent of the weights' memory, at least: 7b
PEAK = 6e9  # bytes, at most: QLoRA of 7b
CLOSE = 0.05  # of what was measured: how far arithmetic may be from it
PROGRAM = 50 * 10**6  # bytes of interpreter and libraries, about: where nothing was measured


@dataclass(frozen=True)
class Claim:
    """What was claimed, what was found, and whether it holds."""

    what: str
    wanted: str
    found: str
    holds: bool


# ---- measuring


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, show, check; the exit code."""
    args = parser().parse_args(arguments)
    measured, bars = [], []
    for case in SMALL if args.quick else SMALL + MIDDLE + TOO_LARGE + LARGE:
        found = "by arithmetic alone" if case in TOO_LARGE else measure(case)
        measured += [found] if isinstance(found, Measurement) else []
        bars.append(Bar(case, by_arithmetic(case), None, found) if isinstance(found, str)
                    else Bar(case, found.parts, found.peak))  # fmt: skip
    checked = claims(measured, quick=args.quick)
    show(bars, measured, checked)
    write(args.out, bars, measured, checked)
    print(f"written: {args.out / 'memory.png'}, {args.out / 'memory.json'}")
    return 0 if all(claim.holds for claim in checked) else 1


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m entrenar.examples.memory_benchmarks",
                                description="memory of full fine-tuning, LoRA and QLoRA: arithmetic and measurement")
    p.add_argument("--quick", action="store_true", help="the 124m model alone, without 1.1b and 7b")
    p.add_argument("--out", type=Path, default=Path("runs/memory"), metavar="DIR",
                   help="where memory.png and memory.json go (default: runs/memory)")  # fmt: skip
    return p


def measure(case: Case) -> Measurement | str:
    """What a process of its own held; or why none was started, or what it said in the end."""
    needed, free = sum(by_arithmetic(case).values()), machine.memory_available()
    if needed > free:
        return f"not measured: needs {size(needed)}, {size(free)} are free"
    request = json.dumps(dataclasses.asdict(case) | {"steps": STEPS[case.model]})
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "entrenar.examples.memory_measure", request]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return f"not measured: the process ended with status {done.returncode}"
    return Measurement.from_dict(json.loads(done.stdout))


def by_arithmetic(case: Case) -> dict[str, int]:
    return arithmetic(case, threads=kernels.get_num_threads(), program=PROGRAM)


# ---- what is claimed


def claims(measured: list[Measurement], *, quick: bool = False) -> list[Claim]:
    """Every claim against what was measured; without 7b (`quick`) its arithmetic stands for it."""
    by_case = {m.case: m for m in measured}
    cases = SMALL[2:] + LARGE
    checked = [reduction_claim(case, by_case.get(case)) for case in cases]
    checked.append(saved_claim(LARGE[0], by_case.get(LARGE[0])))
    if not quick:
        checked += [peak_claim(case, by_case.get(case)) for case in LARGE]
    for m in measured:
        checked += [weights_claim(m), close_claim(m)]
    return checked


def reduction_claim(case: Case, m: Measurement | None) -> Claim:
    wanted = REDUCTIONS[case.model, case.r]
    found, how = (100 * (1 - m.trained / m.total), "") if m else (reduction(case), " (by arithmetic)")
    return Claim(f"{case.model}, r = {case.r}: fewer weights trained by", f"{wanted:.2f} %", f"{found:.4f} %{how}",
                 round(found, 2) == wanted)  # fmt: skip


def saved_claim(case: Case, m: Measurement | None) -> Claim:
    """Against LoRA, which keeps the same weights as float32."""
    floats = weight_bytes(dataclasses.replace(case, method="lora"))
    found, how = (100 * (1 - m.weights / floats), "") if m else (saved(case), " (by arithmetic)")
    return Claim(f"{case.model} in NF4: memory of weights saved", f"at least {SAVED:.0f} %", f"{found:.2f} %{how}",
                 found >= SAVED)  # fmt: skip


def peak_claim(case: Case, m: Measurement | None) -> Claim:
    found = size(m.peak) if m else "not measured"
    return Claim(f"{case.name}: peak", f"under {size(int(PEAK))}", found, m is not None and m.peak < PEAK)


def weights_claim(m: Measurement) -> Claim:
    said = weight_bytes(m.case)
    return Claim(f"{m.case.name}: bytes of weights", f"{said:,}", f"{m.weights:,}", m.weights == said)


def close_claim(m: Measurement) -> Claim:
    off = m.said / m.peak - 1
    return Claim(f"{m.case.name}: arithmetic of the peak", f"within {CLOSE:.0%}", f"{off:+.1%}", abs(off) <= CLOSE)


# ---- for people


def step_seconds(m: Measurement) -> float:
    """Of a step; the first, where memory comes for the first time, counts only where it is the only one."""
    return statistics.median(m.seconds[1:] or m.seconds)


def times(measured: list[Measurement]) -> list[str]:
    """How long a step takes, and how much less than one of full fine-tuning."""
    lines = []
    full = {m.case.model: step_seconds(m) for m in measured if m.case.method == "full"}
    for m in measured:
        seconds = step_seconds(m)
        faster = f", {full[m.case.model] / seconds:.2f} times as fast as full" if m.case.model in full else ""
        lines.append(f"{m.case.name}: {seconds:.2f} s a step" + ("" if m.case.method == "full" else faster))
    return lines


def show(bars: list[Bar], measured: list[Measurement], checked: list[Claim]) -> None:
    console = make_console()
    console.print(table(bars))
    console.print("")
    for line in times(measured):
        console.print(line)
    console.print("")
    for claim in checked:
        mark = "[green]holds[/]" if claim.holds else "[bold red]FAILS[/]"
        console.print(f"{mark}  {claim.what}: {claim.found} (claimed: {claim.wanted})")


def write(folder: Path, bars: list[Bar], measured: list[Measurement], checked: list[Claim]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "memory.png", picture(bars))
    found = {"measured": [dataclasses.asdict(m) for m in measured], "claims": [dataclasses.asdict(c) for c in checked]}
    write_file(folder / "memory.json", json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
