"""LoRA: a small adapter beside a frozen base learns a task the base cannot do. (What is done: demonstration.py.)"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from entrenar.examples.demonstration import run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demonstration; returns the exit code."""
    return run("finetune_lora", "bfloat16", arguments)


if __name__ == "__main__":
    sys.exit(main())
