"""`entrenar plan`: what a configuration would take, said before it is taken. The arithmetic is training/plan.py."""

from __future__ import annotations

import argparse
import json

from entrenar.cli.configuration import add_config

NAME = "plan"
HELP = "say what a run would need: every buffer, the peak, and whether it fits"
EXAMPLE = """
entrenar plan examples/llama2/configs/124m.toml
entrenar plan --model.hidden_size 512 --training.batch_size 4
entrenar plan --base.model llama/ --base.storage nf4 --data.source chats.jsonl
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "entrenar plan [FILE.toml] [--json] [--section.key VALUE ...]"
    parser.add_argument("file", metavar="FILE.toml", nargs="?", help="the configuration (default: that of train)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    add_config(parser)


def run(args: argparse.Namespace) -> int:
    from entrenar.cli.parser import CommandLineError
    from entrenar.training.config import kind_of, read_config
    from entrenar.training.job import plan_of
    from entrenar.training.plan import render

    if args.file and args.config:
        raise CommandLineError(f"{args.file} and --config {args.config}: one configuration is wanted; leave one out")
    file = args.file or args.config
    plan = plan_of(read_config(file, args.overrides, kind_of(file, args.overrides)))
    print(json.dumps({**plan.summary(), "fits": plan.fits}) if args.json else render(plan))
    return 0
