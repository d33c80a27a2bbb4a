"""`entrenar doctor`: what it says of a machine, and that it finds what is wrong."""

import json
import re
import subprocess
import sys
import tomllib
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from conftest import SAME_PACKAGE

from entrenar import kernels
from entrenar.cli import doctor, main, measure

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Nothing is measured for long, and the cache is the test's own."""
    monkeypatch.setattr(kernels, "fma_peak", lambda seconds: 1e11)
    monkeypatch.setattr(doctor, "COPIED", 1 << 20)
    monkeypatch.setattr(doctor, "SECONDS", 0.001)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def told(capsys):
    """(exit code, the text) of a checkup."""
    code = main(["doctor"])
    return code, capsys.readouterr().out


def test_a_sound_machine_ends_with_all_good(capsys):
    code, text = told(capsys)
    assert code == 0 and text.endswith("all good\n")
    for title in ("installed", "kernels", "threads", "memory", "disk", "speed, measured", "self-check"):
        assert f"\n{title}\n" in f"\n{text}"
    assert kernels.info().isa in text and "100 GFLOP/s" in text and "GB/s" in text
    assert "\x1b" not in text


def test_json_is_one_object_with_plain_numbers(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["problems"] == [] and report["threads"]["threads"] == kernels.get_num_threads()
    assert report["memory"]["machine"] >= report["memory"]["free now"] > 0
    assert report["speed, measured"]["multiply-adds, 1 thread"] == 1e11


def test_the_extras_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {name: needs for name, needs in project["optional-dependencies"].items() if name not in ("test", "lint")}
    assert {name: [module] for name, module in doctor.EXTRAS.items()} == extras
    names = {re.split(r"[>=;<\[]", need)[0].strip() for need in project["dependencies"]}
    modules = {{"PIL": "pillow"}.get(name, name) for name in doctor.NEEDED}
    assert modules | {"backports.zstd"} == names - {"numpy", "cffi"}


# What is wrong is found


@pytest.mark.parametrize("wrong", [1.0001, -1.0, np.nan])
def test_a_kernel_that_multiplies_wrongly_is_found(capsys, monkeypatch, wrong):
    right = kernels.matmul
    monkeypatch.setattr(kernels, "matmul", lambda a, b: right(a, b) * (wrong if a.dtype == np.float32 else 1))
    code, text = told(capsys)
    assert code == 1 and "kernels compute wrong numbers" in text and "all good" not in text
    assert "ENTRENAR_KERNELS=reference" in text


def test_a_kernel_wrong_in_one_number_of_one_gradient_is_found(capsys, monkeypatch):
    right = kernels.matmul

    def nearly(a, b):
        c = right(a, b)
        if a.dtype == np.float32 and c.shape == (measure.OUTER, measure.INNER):
            c[-1, -1] += np.abs(c).max() / 1000
        return c

    monkeypatch.setattr(kernels, "matmul", nearly)
    assert told(capsys)[0] == 1


def test_the_self_check_leaves_the_instruction_set_as_it_was(isa):
    assert doctor.self_check().problems == [] and kernels.info().isa == isa


def info(**changes):
    return kernels.Info(**({
        "backend": "native", "isa": "avx2", "isas": ("baseline", "avx2"), "threads": 4, "openmp": True, "why": "built",
    } | changes))  # fmt: skip


def test_kernels_that_were_not_built_are_a_problem_with_a_way_out(monkeypatch):
    missing = info(backend="reference", isa="numpy", isas=(), openmp=False, why="no C kernels")
    monkeypatch.setattr(kernels, "info", lambda: missing)
    monkeypatch.delenv("ENTRENAR_KERNELS", raising=False)
    (problem,) = doctor.kernels_in_use().problems
    assert "install gcc or clang and reinstall" in problem
    monkeypatch.setenv("ENTRENAR_KERNELS", "reference")
    assert doctor.kernels_in_use().problems == []


def test_kernels_without_openmp_are_a_problem_on_more_than_one_processor(monkeypatch):
    monkeypatch.setattr(kernels, "info", lambda: info(threads=1, openmp=False))
    monkeypatch.setattr(doctor, "cpu_quota", lambda: None)
    monkeypatch.setattr(doctor, "processors", lambda: 8)
    (problem,) = doctor.threads().problems
    assert "use 1 of 8 processors" in problem and "libomp" in problem
    monkeypatch.setattr(doctor, "processors", lambda: 1)
    assert doctor.threads().problems == []


@pytest.mark.parametrize(
    ("asked", "quota", "own", "reason"),
    [
        ("3", None, 8, "3: ENTRENAR_NUM_THREADS=3"),
        ("", 2.5, 8, "3: the container's quota of 2.5 processors, rounded up"),
        ("", None, 3, "3: the affinity mask leaves 3 of 16 processors"),
        ("", None, 16, "3: every processor"),
    ],
)
def test_the_number_of_threads_has_a_reason(monkeypatch, asked, quota, own, reason):
    monkeypatch.setattr(kernels, "info", lambda: info(threads=3))
    monkeypatch.setenv("ENTRENAR_NUM_THREADS", asked)
    monkeypatch.setattr(doctor, "cpu_quota", lambda: quota)
    monkeypatch.setattr(doctor, "processors", lambda: own)
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    assert doctor.threads().facts[0][2] == reason


def test_more_threads_than_processors_are_a_problem(monkeypatch):
    monkeypatch.setattr(kernels, "info", lambda: info(threads=8))
    monkeypatch.setattr(doctor, "processors", lambda: 4)
    monkeypatch.setattr(doctor, "cpu_quota", lambda: 1.5)
    assert "8 threads on 2 processors" in doctor.threads().problems[0]


def test_a_missing_library_is_a_problem_and_a_missing_extra_is_not(monkeypatch):
    find, gone = doctor.importlib.util.find_spec, ("rich", "pyarrow")
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name in gone else find(name))
    section = doctor.installed()
    assert section.problems == ["rich: not installed; pip install --force-reinstall entrenar does it"]
    assert ("parquet", False) in [fact[:2] for fact in section.facts]


def test_a_full_disk_and_a_folder_that_cannot_be_written_to_are_problems(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**12, 10**12 - 10**6, 10**6))
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may all
    problems = doctor.storage().problems
    assert sum("only 1.0 MB are free" in problem for problem in problems) == 2
    assert any("--out" in problem for problem in problems) and any("XDG_CACHE_HOME" in problem for problem in problems)


def test_the_cache_is_counted(tmp_path):
    (tmp_path / "entrenar" / "abc").mkdir(parents=True)
    (tmp_path / "entrenar" / "abc" / "tokens").write_bytes(b"x" * 5_000_000)
    assert "1 entry, 5.0 MB" in dict((name, words) for name, _, words in doctor.storage().facts)["cache"]


def test_what_is_copied_fits_into_a_small_container(monkeypatch):
    copied = []
    monkeypatch.setattr(doctor, "COPIED", 128 << 20)
    monkeypatch.setattr(doctor, "memory_bandwidth", lambda threads, seconds, nbytes: copied.append(nbytes) or 1e9)
    monkeypatch.setattr("entrenar.training.machine.memory_available", lambda: 64 << 20)
    doctor.speed()
    assert set(copied) == {8 << 20}


def test_little_memory_is_a_problem(monkeypatch):
    monkeypatch.setattr("entrenar.training.machine.memory_available", lambda: 3 * 10**8)
    assert doctor.memory().problems == ["only 300 MB of memory are free: end other programs, or raise the limit"]


# Measuring


def test_bandwidth_and_peak_are_measured_and_threads_are_put_back(monkeypatch):
    monkeypatch.undo()
    before = kernels.get_num_threads()
    assert measure.memory_bandwidth(1, 0.01, 1 << 22) > 1e8
    assert measure.fma_peak(1, 0.01) > 1e8
    assert kernels.get_num_threads() == before


@pytest.mark.tier3
def test_the_doctor_itself_is_done_within_seconds():
    command = [sys.executable, "-m", "entrenar", "doctor"]
    done = subprocess.run(command, env=SAME_PACKAGE, capture_output=True, text=True, timeout=20)
    assert done.returncode in (0, 1) and "self-check" in done.stdout and done.stderr == ""
