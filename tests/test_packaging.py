"""Building and installing, as users do: from a checkout, an sdist and a wheel; with gcc, with clang, without
OpenMP, with no compiler at all. Minutes, so all of it is tier3; what is built is shared between the tests.

Everything is built from a copy of the checkout: its own build folder and kernels stay as they are.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MEGABYTE = 1e6

pytestmark = pytest.mark.tier3

# Runs in the installed package: says what it is, and compares every kernel, on every instruction set, with
# its twin.
PROBE = """
import sys
import numpy as np
sys.path.insert(0, sys.argv[1])
import kernel_cases
import entrenar
from entrenar import Tensor, kernels
from entrenar.kernels import reference

rng = np.random.default_rng(0)
for isa in kernels.available_isas() or [None]:
    if isa:
        kernels.use_isa(isa)
    for case in kernel_cases.CASES:
        for size in (*case.sizes, *(tail(n) for tail in case.tails for n in (3, 8, 17, 33))):
            kernel_cases.check(kernels, reference, case, case.make(rng, **size))
x = Tensor([1.0, 2.0, 3.0], requires_grad=True)
(x * x).sum().backward()
assert x.grad.tolist() == [2, 4, 6]
info = kernels.info()
print(entrenar.__file__, info.backend, info.openmp, *kernels.available_isas(), sep="|")
"""


def environment(**variables: str) -> dict[str, str]:
    """The environment without what would leak this checkout, or choices of this run, into another build."""
    dropped = (
        "ENTRENAR_",
        "PYTHON",
        "VIRTUAL_ENV",
        "CC",
        "CFLAGS",
        "LDFLAGS",
        "LD_PRELOAD",
        "ASAN_",
        "UBSAN_",
    )
    return {name: value for name, value in os.environ.items() if not name.startswith(dropped)} | variables


def execute(*command: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done


def probe(python: Path | str, cwd: Path, **variables: str) -> tuple[Path, str, bool, list[str], str]:
    """(package folder, backend, OpenMP, instruction sets, stderr) of the installed package."""
    done = execute(python, "-c", PROBE, ROOT / "tests", cwd=cwd, **variables)
    file, backend, openmp, *isas = done.stdout.strip().split("|")
    return Path(file).parent, backend, openmp == "True", isas, done.stderr


def has_compiler() -> bool:
    return shutil.which(os.environ.get("CC", "cc")) is not None


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="no C compiler")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A working folder of this module; far from the checkout."""
    return tmp_path_factory.mktemp("packaging")


BUILT = shutil.ignore_patterns(
    ".git",
    ".venv*",
    "build",
    "dist",
    "runs",
    "*.so",
    "*.o",
    "__pycache__",
    "*.egg-info",
    ".*_cache",
    ".hypothesis",
)


def checkout(folder: Path) -> Path:
    """A copy of the checkout in `folder`, as a fresh clone has it: no builds (pip leaves its own), no caches."""
    return Path(shutil.copytree(ROOT, folder / "source", ignore=BUILT))


@pytest.fixture(scope="module")
def distributions(tmp_path_factory, folder) -> tuple[Path, Path]:
    """(sdist, wheel), the wheel built from the sdist: what `python -m build` does by default."""
    source = checkout(tmp_path_factory.mktemp("distributions"))
    execute(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", source, cwd=folder)
    (sdist,), (wheel,) = (folder / "dist").glob("*.tar.gz"), (folder / "dist").glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(folder) -> Path:
    """The Python of an empty virtual environment after `pip install .` and nothing else."""
    python = new_environment(folder / "installed")
    execute(python, "-m", "pip", "install", "--quiet", checkout(folder), cwd=folder)
    return python


def new_environment(path: Path, libraries: Path | None = None) -> Path:
    """An empty virtual environment's Python; `libraries` lends it another environment's packages."""
    execute(sys.executable, "-m", "venv", path, cwd=path.parent)
    if libraries:
        (site_packages(path / "bin/python") / "lent.pth").write_text(f"{site_packages(libraries)}\n")
    return path / "bin/python"


def site_packages(python: Path) -> Path:
    (found,) = python.parent.parent.glob("lib/python*/site-packages")
    return found


def build_wheel(out: Path, **variables: str) -> tuple[Path, str]:
    """(folder with the package as installed, what the build said) under other compilers."""
    wheel_command = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-v")
    done = execute(*wheel_command, "-w", out, checkout(out), cwd=out, **variables)
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(out / "package")
    return out / "package", done.stdout + done.stderr


# From a checkout


def test_pip_install_into_an_empty_environment_gives_an_engine_that_works(installed, folder):
    package, backend, _, isas, stderr = probe(installed, folder)
    assert package.is_relative_to(folder / "installed")
    assert stderr == ""
    if has_compiler():
        assert backend == "native" and isas


def test_the_whole_environment_is_under_200_megabytes(installed):
    size = sum(path.lstat().st_size for path in site_packages(installed).rglob("*") if path.is_file())
    assert size < 200 * MEGABYTE, f"{size / MEGABYTE:.0f} MB"


def test_every_module_can_be_imported_once_installed(installed, folder):
    """What a wheel forgets to pack shows here."""
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in sorted((ROOT / "entrenar").rglob("*.py"))
        if path.name != "__main__.py"
    ]
    if not has_compiler():
        modules.remove("entrenar.kernels.native")
    execute(installed, "-c", "".join(f"import {module}\n" for module in modules), cwd=folder)


def test_the_main_job_explains_itself_once_installed(installed, folder):
    done = execute(installed, "-m", "entrenar.examples.train", "--help", cwd=folder)
    assert "--config" in done.stdout


def test_the_base_of_the_demonstrations_loads_once_installed(installed, folder):
    code = "from entrenar.examples import train_base, demo_task; demo_task.Llama.from_pretrained(train_base.BASE)"
    execute(installed, "-c", code, cwd=folder)


# From an sdist and a wheel


def test_the_sdist_holds_all_that_building_and_testing_need(distributions):
    with tarfile.open(distributions[0]) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    sources = {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir() if path.is_file()}
    tests = {f"tests/{path.name}" for path in (ROOT / "tests").glob("*.py")}
    assert sources | tests | {"pyproject.toml", "setup.py", "Makefile", "LICENSE", "CHANGELOG.md"} <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc"))]


def test_the_wheel_holds_the_package_and_nothing_else(distributions):
    wheel = distributions[1]
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "entrenar").rglob("*.py")}
    base = {f"entrenar/examples/base/{path.name}" for path in (ROOT / "entrenar/examples/base").iterdir()}
    assert package | base | {"entrenar/py.typed"} <= set(names)
    assert {name.split("/")[0] for name in names} == {
        "entrenar",
        f"entrenar-{wheel.name.split('-')[1]}.dist-info",
    }
    if has_compiler():
        assert [name for name in names if name.startswith("entrenar/_kernels") and name.endswith(".so")]
        assert not wheel.name.endswith("none-any.whl"), "compiled kernels are for one platform"


@pytest.mark.parametrize("kind", ["sdist", "wheel"])
def test_installing_from_a_distribution(kind, distributions, installed, folder):
    python = new_environment(folder / kind, libraries=installed)
    # What is lent counts as installed, entrenar included: without --ignore-installed pip would leave it at that.
    command = (python, "-m", "pip", "install", "--quiet", "--no-deps", "--ignore-installed")
    execute(*command, distributions[kind == "wheel"], cwd=folder)
    package, backend, _, _, stderr = probe(python, folder)
    assert package.is_relative_to(folder / kind)
    assert stderr == ""
    assert backend == ("native" if has_compiler() else "reference")


# Compilers


@needs_compiler
@pytest.mark.parametrize("compiler", ["clang", "gcc"])
def test_both_compilers_build_kernels_that_agree_with_the_reference(compiler, tmp_path):
    versions = [compiler, *(f"{compiler}-{n}" for n in range(25, 10, -1))]
    found = next((path for path in map(shutil.which, versions) if path), None)
    if not found:
        pytest.skip(f"no {compiler}")
    package, said = build_wheel(tmp_path, CC=found)
    where, backend, openmp, isas, stderr = probe(sys.executable, tmp_path, PYTHONPATH=str(package))
    assert where == package / "entrenar"
    assert (backend, stderr) == ("native", "") and isas
    assert openmp == ("no OpenMP here" not in said)


@needs_compiler
def test_without_openmp_kernels_run_on_one_thread(tmp_path):
    """A compiler that knows no -fopenmp: the build says so and goes on."""
    real = shutil.which(os.environ.get("CC", "cc"))
    wrapper = tmp_path / "cc"
    wrapper.write_text(
        f'#!/bin/sh\nfor word in "$@"; do [ "$word" = -fopenmp ] && exit 1; done\nexec {real} "$@"\n',
        encoding="ascii",
    )
    wrapper.chmod(0o755)
    package, said = build_wheel(tmp_path, CC=str(wrapper))
    assert "no OpenMP here" in said
    _, backend, openmp, _, stderr = probe(sys.executable, tmp_path, PYTHONPATH=str(package), ENTRENAR_NUM_THREADS="2")
    assert (backend, openmp, stderr) == ("native", False, "")
    code = "from entrenar import kernels; print(kernels.get_num_threads())"
    one = execute(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(package), ENTRENAR_NUM_THREADS="2")
    assert one.stdout == "1\n"


@pytest.mark.parametrize("how", ["a compiler that fails", "no compiler in PATH"])
def test_without_a_compiler_it_installs_and_says_once_that_it_is_slow(how, tmp_path):
    variables = {"CC": "/bin/false"} if how == "a compiler that fails" else {"PATH": str(tmp_path)}
    package, _ = build_wheel(tmp_path, **variables)
    assert not list((package / "entrenar").glob("_kernels*.so"))

    # An environment that only lends libraries: in this one, an editable install would supply the missing kernels.
    python = new_environment(tmp_path / "environment", libraries=Path(sys.executable))
    where, backend, _, isas, stderr = probe(python, tmp_path, PYTHONPATH=str(package))
    assert (where, backend, isas) == (package / "entrenar", "reference", [])
    assert stderr.count("NumPy reference") == 1 and "gcc or clang" in stderr

    asked = probe(python, tmp_path, PYTHONPATH=str(package), ENTRENAR_KERNELS="reference")
    assert asked[4] == "", "whoever asks for the reference is not warned"
    done = subprocess.run(
        [python, "-c", "import entrenar"], cwd=tmp_path, capture_output=True, text=True,
        env=environment(PYTHONPATH=str(package), ENTRENAR_KERNELS="native"),
    )  # fmt: skip
    assert done.returncode != 0 and "No module named 'entrenar._kernels'" in done.stderr
