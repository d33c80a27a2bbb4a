"""The house's floors: a file imports only from floors below its own (docs/architecture.md). Read from the
syntax tree, so that an import inside a function counts like any other.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SAME_PACKAGE

ROOT = Path(__file__).parent.parent

# From the ground up; names on one line may not import one another.
FLOORS = (
    ("_kernels",),  # compiled from csrc/
    ("kernels",),
    ("recording",),
    ("tensor", "random", "state", "files", "version"),
    ("ops",),
    ("gradcheck",),
    ("nn",),
    ("optim",),
    ("formats",),
    ("quant",),
    ("llama",),
    ("adapters",),
    ("data",),
    ("convert",),
    ("observe",),
    ("training",),
    ("cli",),
    ("examples", "__main__"),
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
NEVER = {("data", "llama"), ("data", "adapters")}  # tokens do not know who reads them

ENGINE = {"_kernels", "kernels", "recording", "tensor", "random", "state", "files", "ops", "gradcheck", "nn", "optim",
          "llama"}  # fmt: skip
# slow to import: at the point of use only
LATE = {"tokenizers", "jinja2", "rich", "PIL", "ml_dtypes", "backports", "pyarrow", "shtab", "compression"}
ELSEWHERE = {"numpy", *LATE}  # what a file may import that is neither Python's nor ours


def imports(tree: ast.AST) -> set[str]:
    """Every module a file imports, anywhere in it, by its full name."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the floor: write the full name"
            # `from entrenar import kernels` names the floor on the right
            found |= {
                f"{node.module}.{alias.name}" if node.module == "entrenar" else node.module
                for alias in node.names
            }
    return found


def violations(path: str, source: str) -> list[str]:
    """What is wrong with the imports of entrenar/`path`, one sentence each."""
    own = path.removesuffix(".py").split("/")[0]
    if own == "__init__":
        return []  # the roof: gathers the public names of every floor
    if own not in FLOOR:
        return [f"{path}: {own} has no floor; give it one in tests/test_floors.py and docs/architecture.md"]
    wrong = []
    for module in sorted(imports(ast.parse(source))):
        top, *rest = module.split(".")
        if top == "entrenar":
            other = rest[0] if rest else "__init__"
            if other == own:
                continue
            if other not in FLOOR:
                wrong.append(f"{path} imports {module}: no floor")
            elif FLOOR[other] >= FLOOR[own] or (own, other) in NEVER:
                wrong.append(f"{path} imports {module}: {own} may not know {other}")
        elif top not in sys.stdlib_module_names and top not in (
            ELSEWHERE if own not in ENGINE else {"numpy"}
        ):
            wrong.append(f"{path} imports {module}: not among what {own} may use")
    return wrong


def source_files() -> dict[str, str]:
    package = ROOT / "entrenar"
    return {path.relative_to(package).as_posix(): path.read_text() for path in sorted(package.rglob("*.py"))}


def test_every_file_imports_only_from_floors_below():
    files = source_files()
    assert {"tensor.py", "kernels/reference.py", "ops/linear.py", "nn.py"} <= set(files)
    wrong = [sentence for path, source in files.items() for sentence in violations(path, source)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("tensor.py", "from entrenar.ops import add"),
        ("tensor.py", "from entrenar import ops"),
        ("kernels/reference.py", "import entrenar.tensor"),
        ("ops/linear.py", "def f():\n    from entrenar.nn import Linear"),
        ("data/corpus.py", "from entrenar.llama import Llama"),
        ("llama/model.py", "from entrenar.training import trainer"),
        ("nn.py", "import torch"),
        ("training/trainer.py", "import pandas"),
        ("random.py", "from entrenar.tensor import Tensor"),
        ("ops/loss.py", "from entrenar import Tensor"),
        ("novelty.py", "import numpy"),
    ],
)
def test_a_violation_is_found(path, source):
    assert violations(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "ops/linear.py",
            "from entrenar import kernels\nfrom entrenar.ops.shape import reshape\nimport numpy as np",
        ),
        ("training/display.py", "def f():\n    import rich"),
        ("__init__.py", "from entrenar import optim"),
    ],
)
def test_what_is_allowed_passes(path, source):
    assert not violations(path, source)


def imported_by(code: str) -> set[str]:
    code += "; import sys; print(*{name.split('.')[0] for name in sys.modules})"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=SAME_PACKAGE, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_entrenar_imports_no_slow_library():
    assert not imported_by("import entrenar") & (LATE | {"torch", "pytest", "hypothesis"})
    assert "rich" in imported_by("import entrenar, rich"), "the control"
