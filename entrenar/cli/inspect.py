"""`entrenar inspect`: what a file or folder holds - format, metadata, tensors, statistics - and whether it is sound.

Nothing is trusted, nothing is run, and no tensor is in memory as a whole. Leaves out the kinds of files and folders:
inspect_files.py, inspect_folders.py.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from entrenar.cli.found import Found
from entrenar.cli.inspect_folders import look
from entrenar.cli.tensors import grouped, table
from entrenar.cli.terminal import facts, paint, visible

NAME = "inspect"
HELP = "say what a run, model, adapter, GGUF or token file holds"
EXAMPLE = """
entrenar inspect runs/notes
entrenar inspect model.gguf --all
"""
SMALL = 10**9  # bytes of tensors whose statistics are taken without being asked for


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a run's folder, a checkpoint, a model's folder, or a file")
    parser.add_argument("--all", action="store_true", help="a row for every tensor, not one for all layers")
    parser.add_argument("--stats", action=argparse.BooleanOptionalAction, default=None,
                        help="minimum, maximum, mean, deviation, zeros (default: below 1 GB)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument_group("exit codes", "0 it is sound; 2 it is broken, or holds numbers that are NaN or infinite")


def run(args: argparse.Namespace) -> int:
    found = look(Path(args.path))
    if args.stats or (args.stats is None and found.nbytes < SMALL):
        found.measure()
    print(json.dumps(found.to_dict()) if args.json else "\n".join(lines_of(found, every=args.all)))
    return 2 if any(part.problems for part in found.parts()) else 0


def lines_of(found: Found, *, every: bool) -> list[str]:
    """The report for people; problems come last, where they are seen."""
    lines: list[str] = []
    for part in found.parts():
        lines += [*([""] if lines else []), paint(f"{visible(part.path)}: {part.kind}", "bold"), *facts_of(part)]
        if part.weights and (every or not part.aside):
            head, *rows = table(part.weights if every else grouped(part.weights))
            lines += ["", paint(head, "dim"), *rows]
    problems = [f"{visible(part.path)}: {problem}" for part in found.parts() for problem in part.problems]
    return lines + (["", *(paint(problem, "red") for problem in problems)] if problems else [])


def facts_of(part: Found) -> list[str]:
    from entrenar.training.display import size

    pairs = [(name, short(value)) for name, value in part.facts.items()]
    if part.weights:
        numbers, nbytes = sum(w.size for w in part.weights), sum(w.nbytes for w in part.weights)
        kinds = ", ".join(sorted({w.dtype for w in part.weights}))
        pairs.append(("tensors", f"{len(part.weights):,}, {numbers:,} numbers ({kinds}), {size(nbytes)}"))
    return facts(pairs)


def short(value: Any, limit: int = 100) -> str:
    """A value on one line of a reasonable length."""
    if isinstance(value, (list, tuple)):
        return ", ".join(short(x, limit // 4) for x in value[:8]) + (", ..." if len(value) > 8 else "") or "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
