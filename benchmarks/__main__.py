"""`python -m benchmarks`: chooses groups, runs them, keeps what was measured."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import report
from benchmarks.driver import ISAS, ROOT, Bench, WrongResult
from benchmarks.groups import GROUPS, machine
from benchmarks.protocol import WorkerError

RECORDED = 3  # fewer rounds than this are a trial, and not written down


def usual_threads() -> int:
    return min(2, os.cpu_count() or 1)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        "python -m benchmarks", description="entrenar against NumPy, PyTorch and transformers"
    )
    p.add_argument("--only", metavar="GROUPS", help=f"some of: {','.join(GROUPS)}")
    p.add_argument("--rounds", type=int, default=5, help=f"per case; fewer than {RECORDED} are not recorded")
    p.add_argument("--threads", type=int, default=usual_threads())
    p.add_argument("--isa", choices=[name for name in ISAS if name], default="",
                   help="hold every contender to this instruction set")  # fmt: skip
    p.add_argument("--full", action="store_true", help="with PyTorch's checkpointing and the size of an installation")
    p.add_argument(
        "--default-run", action="store_true", help="with the default training run, about four minutes"
    )
    p.add_argument(
        "--peers-python", default=".venv-peers/bin/python", help="an interpreter with torch and transformers"
    )
    p.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    p.add_argument("--docs", type=Path, default=ROOT / "docs" / "benchmarks.md")
    return p


def chosen(args: argparse.Namespace) -> list[str]:
    """Names of the groups to run, in their own order. Exits naming an unknown one."""
    if args.only is None:
        extra = {"install": args.full, "default_run": args.default_run}
        return [name for name in GROUPS if extra.get(name, True)]
    asked = args.only.replace("-", "_").split(",")
    if unknown := [name for name in asked if name not in GROUPS]:
        sys.exit(f"benchmarks: unknown group {', '.join(unknown)}: wanted some of {', '.join(GROUPS)}")
    return [name for name in GROUPS if name in asked]


def run(bench: Bench, names: list[str], say: Callable[[str], None] = print) -> tuple[report.Report, bool]:
    """Measures the groups, and says whether all went well. Ctrl-C and failures keep the rows so far."""
    bench.machine = machine.facts(bench)
    result = report.Report(bench.machine, report.now(), bench.rounds)
    say(machine.line(bench.machine))
    for name in names:
        started = time.perf_counter()
        try:
            machine.look_again(bench)
            for row in GROUPS[name].rows(bench):
                say(report.line(result.add(row)))
        except KeyboardInterrupt:
            say(f"{name}: interrupted; what was measured is kept")
            return result, False
        except (WorkerError, WrongResult) as error:
            say(
                report.line(
                    result.add(report.Row(name, name, "", note=f"not measured: {error}", failed=True))
                )
            )
        bench.say(f"  [{name}: {time.perf_counter() - started:.0f} s]")
    return result, not any(row.failed for row in result.rows)


def record(result: report.Report, args: argparse.Namespace) -> list[Path]:
    """Writes down what is worth it; runs on an unusual number of threads, or entrenar alone held back, apart."""
    if args.rounds < RECORDED or not result.rows:
        return []
    written = [result.write_dated(args.results, args.isa)]
    if args.threads == usual_threads() and "ENTRENAR_ISA" not in os.environ:
        written.append(result.write_latest(args.results, list(GROUPS), args.isa))
        if args.docs.exists():
            result.write_docs(args.docs, args.isa)
            written.append(args.docs)
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    names = chosen(args)
    bench = Bench(peers_python=args.peers_python, rounds=args.rounds, threads=args.threads, full=args.full,
                  isa=args.isa)  # fmt: skip
    try:
        result, fine = run(bench, names)
    finally:
        bench.close()
    written = record(result, args)
    print(
        f"written: {', '.join(map(str, written))}" if written else "a trial of few rounds: not written down"
    )
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
