"""QLoRA: the same as finetune_lora.py, the frozen base held in 4 bits (NF4, its scales in 8 bits)."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from entrenar.examples.demonstration import run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demonstration; returns the exit code."""
    return run("finetune_qlora", "nf4", arguments)


if __name__ == "__main__":
    sys.exit(main())
