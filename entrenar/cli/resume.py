"""`entrenar resume`: a run goes on where its last whole checkpoint is. The job itself is training/job.py."""

from __future__ import annotations

import argparse
from pathlib import Path

NAME = "resume"
HELP = "go on with a run that was stopped: bit for bit as if it had not been"
EXAMPLE = """
entrenar resume runs/notes
entrenar resume runs/notes --training.steps 3000
"""
MAY_CHANGE = """--training.steps VALUE          more of them, or fewer
--training.report_every VALUE   and what is looked at, sampled and watched
--lr_schedule.key VALUE         the learning rate from here on
--checkpointing.key VALUE       what is kept"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "entrenar resume RUN [--force] [--section.key VALUE ...]"
    parser.add_argument("run", metavar="RUN", help="the run's folder")
    parser.add_argument("--force", action="store_true", help="go on although the plan says memory will not do")
    parser.add_argument_group("what may change on the way", MAY_CHANGE)


def run(args: argparse.Namespace) -> int:
    from entrenar.training.job import resume

    return resume(Path(args.run), args.overrides, force=args.force)
