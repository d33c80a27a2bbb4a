"""Trains the base of the fine-tuning demonstrations again: `python -m entrenar.examples.train_base FOLDER`.

What it was trained on, and how, is in base/train.toml; what came of it lies beside that file. The text is the source of
the running Python's own library: another version of Python gives another model, as good.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from entrenar.cli import main as entrenar
from entrenar.data import load_tokenizer
from entrenar.llama import Llama

BASE = Path(__file__).parent / "base"
SHARD = 350_000  # bytes: files of a repository stay small


def main(arguments: Sequence[str] | None = None) -> int:
    """Train and write the model, in bfloat16; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m entrenar.examples.train_base", usage="%(prog)s FOLDER [--section.key VALUE ...]",
        allow_abbrev=False, description="Trains the base of the fine-tuning demonstrations again.",
        epilog="`entrenar train --help-options` lists the options that may follow.",
    )  # fmt: skip
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="where it goes; the run goes into FOLDER-run")
    args, more = parser.parse_known_args(arguments)
    folder, run = args.folder, args.folder.with_name(f"{args.folder.name}-run")
    code = entrenar(["train", "--config", str(BASE / "train.toml"), "--out", str(run), *more])
    if code == 0:
        write_base(run / "checkpoint", folder)
        print(f"{folder}: the base, as {BASE} has it")
    return code


def write_base(checkpoint: Path, folder: Path) -> None:
    model, tokenizer = Llama.from_pretrained(checkpoint), load_tokenizer(checkpoint)
    model.save_pretrained(folder, dtype="bfloat16", max_shard_size=SHARD, tokenizer=tokenizer)


if __name__ == "__main__":
    raise SystemExit(main())
