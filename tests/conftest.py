"""What every test file may count on: hypothesis profiles, the list of instruction sets, and the C kernels by
name.
"""

from __future__ import annotations

import gc
import os
import platform
import shutil
from pathlib import Path

import hypothesis
import pytest

import entrenar

# Everyday runs try the same few examples each time; tier3 tries many, and new ones every time.
hypothesis.settings.register_profile(
    "everyday", max_examples=20, deadline=None, derandomize=True, database=None
)
hypothesis.settings.register_profile("tier3", max_examples=120, deadline=None, database=None)
hypothesis.settings.load_profile("everyday")

X86 = platform.machine().lower() in ("x86_64", "amd64")
ISAS = ("baseline", "avx2", "avx512") if X86 else ("neon",)


# A subprocess imports the package these tests import, wherever it runs
SAME_PACKAGE = os.environ | {"PYTHONPATH": str(Path(entrenar.__file__).parent.parent)}


@pytest.fixture(scope="session")
def native():
    """The C kernels. Without a compiler there are none; with one, their absence is a failure."""
    try:
        from entrenar.kernels import native
    except ImportError as error:
        reason = f"the C kernels are not built: {error}"
        if shutil.which(os.environ.get("CC", "cc")):
            pytest.fail(reason)
        pytest.skip(reason)
    return native


@pytest.fixture(params=ISAS)
def isa(request, native):
    """One instruction set after the other, by name; the best one again afterwards."""
    if request.param not in native.available_isas():
        pytest.skip(f"{request.param}: this machine has only {', '.join(native.available_isas())}")
    before = native.isa()
    native.use_isa(request.param)
    yield request.param
    native.use_isa(before)


@pytest.fixture
def thread_count(native):
    """Sets the number of threads; as it was afterwards."""
    before = native.get_num_threads()
    yield native.set_num_threads
    native.set_num_threads(before)


def pytest_collection_finish() -> None:
    """What was imported and collected stays: no collection of garbage needs to look at it again."""
    gc.collect()
    gc.freeze()
