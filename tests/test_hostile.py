"""Files that are not what they should be: each gives a clear error, within a second and 200 MB, and none a crash or a
hang. The cases are in hostile/, by format; here they are run, a test for each family, and the runner is tested.

An everyday run takes a few of each family, spread evenly; tier3 takes all.
"""

from __future__ import annotations

import functools
import importlib

import pytest
from hostile import planted, runner

MODULES = ("safetensors", "pretrained", "quantized", "adapter", "tokenfile", "prepared", "config", "tokenizer", "gguf",
           "llama2c", "checkpoint", "chat")  # fmt: skip
EVERYDAY = 2  # cases of each family
FAMILIES = [(m, family) for m in MODULES for family in importlib.import_module(f"hostile.{m}").FAMILIES]

run = functools.cache(runner.run)


def told(results: list[runner.Result]) -> str:
    return "\n".join(f"{r.family}: {r.name}: {r.wrong}" for r in results if r.wrong)


@pytest.mark.parametrize("module", MODULES)
def test_some_files_of_each_family_are_refused_clearly(module):
    results = run(module, EVERYDAY)
    assert {r.family for r in results} == set(importlib.import_module(f"hostile.{module}").FAMILIES)
    assert not told(results)


@pytest.mark.tier3
@pytest.mark.parametrize("module, family", FAMILIES, ids=[f"{module}: {family}" for module, family in FAMILIES])
def test_every_file_of_a_family_is_refused_clearly(module, family):
    results = [r for r in run(module) if r.family in (family, "")]
    assert results and not told(results)


@pytest.mark.tier3
def test_there_are_as_many_cases_as_promised():
    """At least 500, in at least 80 families: cutting a file at every length is one."""
    assert sum(len(run(module)) for module in MODULES) >= 500 and len(FAMILIES) >= 80


# The runner itself


# Planted fault -> what must be said of it; "": nothing
WRONG = {
    "nothing": "", "refused": "", "read": "", "read as the original": "",
    "a wait for a pipe": "Hang: did not end within 0.4 s",
    "too long a computation": "took 1.",
    "300 MB": "at most 200 are allowed",
    "endless recursion": "RecursionError",
    "an error of another family": "is no error of the right family: KeyError",
    "an error of the system": "is no error of the right family: OSError",
    "acceptance": "was read as if nothing were wrong",
    "a message without the file": "does not name file",
    "a message of Python's": "is Python's",
    "a message of a bare key": "is Python's",
    "a message with an escape code": "characters a terminal acts on",
    "an endless message": "the message has 60,0",
    "warnings": "gave 50 warnings",
    "noise": "wrote 5,000 bytes to stderr",
    "the wrong words": "does not say 'byte 7'",
    "harmless, and refused": "must be read, its change is harmless",
    "harmless, and read as something else": "as something else than the original",
    "a hang": "Hang: did not end within 0.4 s",
    "a crash": "SIGABRT",
    "an exit": "ended the process: exit code 0",
}  # fmt: skip


@pytest.fixture(scope="module")
def faults():
    return {r.name: r.wrong for r in runner.run("planted", hang=0.4)}


@pytest.mark.parametrize("name, wrong", WRONG.items())
def test_the_runner_notices_every_planted_fault_and_nothing_else(faults, name, wrong):
    assert wrong in faults[name] if wrong else faults[name] == ""


def test_every_planted_fault_is_asked_for():
    assert {case.name for make in planted.FAMILIES.values() for case in make()} == set(WRONG)


@pytest.mark.tier3
def test_what_never_comes_back_to_python_is_ended_from_outside():
    found = {r.name: r.wrong for r in runner.run("deaf", patience=6, hang=0.5)}
    assert found == {"a hang": "did not end within 6 s", "the next": ""}


def test_a_process_that_dies_again_and_again_ends_the_run(monkeypatch):
    monkeypatch.setattr(runner, "DEATHS", 1)
    assert "the cases that follow were not tried" in runner.run("planted", 1, hang=0.4)[-1].wrong
