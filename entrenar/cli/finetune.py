"""`entrenar finetune`: a model learns from conversations to answer. The job itself is training/job.py."""

from __future__ import annotations

import argparse

from entrenar.cli.configuration import Override, add_config
from entrenar.cli.train import add_start, begin

NAME = "finetune"
HELP = "fine-tune a model on your own conversations: LoRA, QLoRA"
EXAMPLE = """
entrenar finetune --base.model Llama-3.2-1B --data.source chats.jsonl
entrenar finetune --base.model llama/ --base.storage nf4 --data.source chats/
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "entrenar finetune --base.model FOLDER --data.source FILE [OPTIONS] [--section.key VALUE ...]"
    add_start(parser)
    parser.add_argument("--epochs", metavar="N", dest="training.epochs", action=Override, default=argparse.SUPPRESS,
                        help="times that all rows are seen (default: 3)")  # fmt: skip
    add_config(parser, NAME)


def run(args: argparse.Namespace) -> int:
    from entrenar.training.config import FineTuning

    return begin(args, FineTuning)
