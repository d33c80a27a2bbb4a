"""A run in a process of its own, for test_plan.py: `entrenar ARGUMENTS`, then the peak the system counted.

    python plan_measure.py PEAK_FILE train --config FILE.toml --out RUN ...

The peak, in bytes, is told from inside, when all is done: what a parent process learns of its child (ru_maxrss) begins
at the parent's own.
"""

import sys
from pathlib import Path

from entrenar.cli import main
from entrenar.training import machine

code = main(sys.argv[2:])
Path(sys.argv[1]).write_text(str(machine.memory_peak()))
sys.exit(code)
