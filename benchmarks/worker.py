"""A contender's process: `python -P benchmarks/worker.py entrenar|numpy|torch|...`. Started by driver.py."""

import os
import sys
from importlib import import_module
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)


def main() -> None:
    # The benchmarks are this checkout's. The contender is what is installed, and this checkout's only where
    # nothing is: a checkout may lie there without its C kernels built.
    sys.path.insert(0, ROOT)
    from benchmarks.protocol import Server

    sys.path.remove(ROOT)
    sys.path.append(ROOT)

    # What a library prints goes to stderr: stdout belongs to the protocol.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    contender = sys.argv[1]
    if contender.partition("-")[0] == "torch":
        import torch

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    Server(contender, lambda group: import_module(f"benchmarks.groups.{group}")).serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
