"""The main job: a LLaMA learns real text. `python -m entrenar.examples.train` is `entrenar train` (cli/train.py)."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from entrenar.cli import main as entrenar


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code."""
    return entrenar(["train", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
