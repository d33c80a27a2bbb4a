"""What an installation weighs: all that `pip install .` puts into an empty environment. Needs an index."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.driver import Bench
from benchmarks.protocol import WorkerError
from benchmarks.report import Row, Target
from benchmarks.spread import Spread


def size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())


def rows(bench: Bench) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        commands = (
            [sys.executable, "-m", "venv", folder],
            [f"{folder}/bin/python", "-m", "pip", "--quiet", "install", str(bench.root)],
        )
        for command in commands:
            done = subprocess.run(command, env=bench.environment(), capture_output=True, text=True)
            if done.returncode:
                raise WorkerError(f"{' '.join(command)}: {done.stderr.strip()[-300:]}")
        (packages,) = Path(folder, "lib").glob("python*/site-packages")
        parts = sorted(
            ((size(path), path.name) for path in packages.iterdir() if path.is_dir()), reverse=True
        )
        note = ", ".join(f"{name} {number / 1e6:.0f}" for number, name in parts[:4])
        yield Row(
            "install",
            "environment after pip install, unpacked",
            "MB",
            Spread.of([size(packages) / 1e6]),
            Target("<", 200.0),
            note=f"pip included; largest: {note}",
        )
