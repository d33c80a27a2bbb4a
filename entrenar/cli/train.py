"""`entrenar train`: a LLaMA learns a text. The job itself is training/job.py."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from entrenar.cli.configuration import Override, add_config

if TYPE_CHECKING:
    from entrenar.training.config import Run

NAME = "train"
HELP = "train a model on a text; with no options, on Python's own library"
EXAMPLE = """
entrenar train --data.source notes/ --out runs/notes --budget 20m
entrenar train --config my.toml --training.steps 500
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "entrenar train [OPTIONS] [--section.key VALUE ...]"
    add_start(parser)
    add_config(parser)


def add_start(parser: argparse.ArgumentParser) -> None:
    """The short names and switches of whatever begins a run."""
    parser.add_argument("--out", metavar="DIR", dest="checkpointing.out", action=Override, default=argparse.SUPPRESS,
                        help="the run's folder, new or empty (default: runs/<date>)")  # fmt: skip
    parser.add_argument("--budget", metavar="TIME", dest="training.budget", action=Override,
                        default=argparse.SUPPRESS,
                        help="choose the steps so that the run ends in 90s, 20m, 1h30m")  # fmt: skip
    parser.add_argument("--skip-bad", dest="data.skip_bad", action=Override, nargs=0, default=argparse.SUPPRESS,
                        help="leave out files and rows that cannot be read")  # fmt: skip
    parser.add_argument("--force", action="store_true", help="start although the plan says memory will not do")
    parser.add_argument("--plan", action="store_true", help="say what the run would need, and stop")
    parser.add_argument("--help-options", action="store_true", help="list every option of the configuration")


def run(args: argparse.Namespace) -> int:
    from entrenar.training.config import Config

    return begin(args, Config)


def begin(args: argparse.Namespace, kind: type[Run]) -> int:
    """Begin a run of this kind, or do what the words ask for instead."""
    from entrenar.training.config import help_text, read_config

    if args.help_options:
        print(help_text(kind).lstrip("\n"))
        return 0
    config = read_config(args.config, args.overrides, kind)
    if args.plan:
        from entrenar.training.job import plan_of
        from entrenar.training.plan import render

        print(render(plan_of(config)))
        return 0
    from entrenar.training.job import start

    return start(config, force=args.force)
