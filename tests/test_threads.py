"""Threads: the same bits for any number of them, no more of them than the container allows, and none left
hanging after a fork. And the environment variables that choose kernels, instruction set and threads.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import SAME_PACKAGE
from kernel_cases import CASES, run

from entrenar.kernels import threads

ROOT = Path(__file__).parent.parent


# Same bits


def bits(kernels, case, args) -> list[bytes]:
    return [x.tobytes() for x in run(kernels, case, args)]


def differing(kernels, case, args, set_num_threads) -> list[int]:
    """The thread counts whose results differ from those of one thread."""
    set_num_threads(1)
    alone = bits(kernels, case, args)
    counts = []
    for n in (2, 3, 4):
        set_num_threads(n)
        if bits(kernels, case, args) != alone:
            counts.append(n)
    return counts


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.kernel)
def test_same_bits_for_1_2_3_and_4_threads(case, isa, native, thread_count):
    rng = np.random.default_rng(0)
    for size in (case.large, *case.sizes):
        assert differing(native, case, case.make(rng, **size), thread_count) == [], f"{case.kernel} {size}"


@pytest.mark.parametrize("shape", [(1, 4000, 300), (9, 700, 1000), (700, 9, 1000), (288, 288, 1500), (130, 2000, 40)])
def test_same_bits_for_products_of_every_shape(shape, isa, native, thread_count):
    """Thin, wide, deep: whichever way a product is divided among threads."""
    rng = np.random.default_rng(1)
    M, N, K = shape
    for transposed in (False, True):
        a, b = ((K, M), (N, K)) if transposed else ((M, K), (K, N))
        a, b = rng.standard_normal(a, np.float32), rng.standard_normal(b, np.float32)
        args = {"a": a.T, "b": b.T} if transposed else {"a": a, "b": b}
        assert differing(native, CASES[0], args, thread_count) == []


def test_same_bits_again(isa, native):
    """The same call twice: nothing depends on where an array lies or what scratch memory held."""
    for case in CASES:
        args = case.make(np.random.default_rng(2), **case.sizes[-1])
        first = bits(native, case, args)
        moved = {
            name: np.concatenate([np.full(3, 7, x.dtype), x.ravel()])[3:].reshape(x.shape)
            if isinstance(x, np.ndarray)
            else x
            for name, x in args.items()
        }
        assert bits(native, case, moved) == first, case.kernel


def test_a_result_that_depends_on_the_number_of_threads_is_found():
    """The control: a sum split among threads, as most libraries do it."""
    current = [1]

    class Careless:
        @staticmethod
        def sum_of_squares(x):
            parts = np.array_split(x, current[0])
            return float(sum(np.cumsum(np.square(part))[-1] for part in parts))

    case = next(case for case in CASES if case.kernel == "sum_of_squares")
    args = case.make(np.random.default_rng(3), **case.large)
    assert differing(Careless, case, args, lambda n: current.__setitem__(0, n)) != []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_threads_are_really_started(native):
    """Otherwise equal bits would say nothing."""
    code = """
import os, numpy as np
from entrenar.kernels import native
x, count = np.ones((500, 500), np.float32), lambda: len(os.listdir("/proc/self/task"))
native.set_num_threads(1), native.matmul(x, x)
before = count()
native.set_num_threads(3), native.matmul(x, x)
print(count() - before)
"""
    assert python(code) == ("2" if native.OPENMP else "0")


@pytest.mark.parametrize(
    "kernel", ["matmul", "attention_forward", "attention_backward", "linear_cross_entropy"]
)
def test_more_threads_while_a_kernel_starts_do_not_overrun_its_scratch(kernel, native, thread_count, monkeypatch):
    """Another Python thread may set the number between a kernel's asking for scratch and its start."""
    from entrenar.kernels import native_attention

    case = next(case for case in CASES if case.kernel == kernel)
    args = case.make(np.random.default_rng(5), **case.large)
    thread_count(1)
    wanted, lent = bits(native, case, args), []

    def scratch(size: int):
        native.set_num_threads(3)
        lent.append((np.full(3 * size + 16, 7, np.float32), size))
        return native.at(lent[-1][0])

    for module in (native, native_attention):
        monkeypatch.setattr(module, "scratch", scratch)
    assert bits(native, case, args) == wanted
    assert lent and all((memory[size:] == 7).all() for memory, size in lent)


def test_the_number_of_threads_is_kept_and_checked(native, thread_count):
    thread_count(3)
    assert native.get_num_threads() == (3 if native.OPENMP else 1)
    for wrong in (0, -1):
        with pytest.raises(ValueError, match=f"wanted 1 or more, got {wrong}"):
            thread_count(wrong)


# How many: affinity and control groups


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("cpu_", "cpu.")).write_text(text)


def quota(tmp_path: Path, own: str) -> float | None:
    (tmp_path / "self").write_text(own)
    return threads.cpu_quota(tmp_path / "cgroup", tmp_path / "self")


def test_no_control_groups_no_limit(tmp_path):
    assert threads.cpu_quota(tmp_path / "none", tmp_path / "none") is None


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("max 100000\n", None),
        ("150000 100000\n", 1.5),
        ("50000 100000\n", 0.5),
        ("400000 100000\n", 4.0),
        ("", None),
        ("nonsense\n", None),
    ],
)
def test_a_version_2_limit_at_the_mount_point(tmp_path, text, want):
    """As a container sees it: its own group is the root."""
    group(tmp_path / "cgroup", cpu_max=text)
    assert quota(tmp_path, "0::/\n") == want


def test_a_version_2_limit_of_a_parent_binds(tmp_path):
    group(tmp_path / "cgroup/pod", cpu_max="200000 100000\n")
    group(tmp_path / "cgroup/pod/job", cpu_max="max 100000\n")
    assert quota(tmp_path, "0::/pod/job\n") == 2.0
    group(tmp_path / "cgroup/pod/job", cpu_max="100000 100000\n")
    assert quota(tmp_path, "0::/pod/job\n") == 1.0


@pytest.mark.parametrize(("limit", "want"), [("-1\n", None), ("150000\n", 1.5)])
@pytest.mark.parametrize("place", ["cpu", "cpu/pod/job", "cpu,cpuacct"])
def test_a_version_1_limit(tmp_path, place, limit, want):
    group(tmp_path / "cgroup" / place, cpu_cfs_quota_us=limit, cpu_cfs_period_us="100000\n")
    assert quota(tmp_path, "5:cpu,cpuacct:/pod/job\n3:memory:/elsewhere\n0::/\n") == want


@pytest.mark.parametrize(
    ("processors", "limit", "want"), [(8, None, 8), (8, 1.5, 2), (8, 0.2, 1), (2, 16.0, 2), (8, 3.0, 3)]
)
def test_the_default_is_the_smaller_of_affinity_and_quota_rounded_up(monkeypatch, processors, limit, want):
    monkeypatch.delenv("ENTRENAR_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "processors", lambda: processors)
    monkeypatch.setattr(threads, "cpu_quota", lambda: limit)
    assert threads.default_num_threads() == want


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_affinity_is_respected():
    one = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, {{{one}}}); from entrenar import kernels as k"
    code += "; print(k.get_num_threads())"
    assert python(code) == "1"


# Environment variables, each in a process of its own


def process(code: str, **variables: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in SAME_PACKAGE.items() if not name.startswith("ENTRENAR_")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=kept | variables,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=os.getcwd(),
    )


def python(code: str, **variables: str) -> str:
    done = process(code, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


INFO = "from entrenar import kernels; i = kernels.info(); print(i.backend, i.isa, i.threads)"


def test_the_number_of_threads_can_be_set(native):
    want = 3 if native.OPENMP else 1
    assert python(INFO, ENTRENAR_NUM_THREADS="3").split()[2] == str(want)


@pytest.mark.parametrize("value", ["0", "-2", "two", "1.5", "1e1", "+ 1"])
def test_a_wrong_number_of_threads_is_refused(value, monkeypatch):
    monkeypatch.setenv("ENTRENAR_NUM_THREADS", value)
    with pytest.raises(ValueError) as refusal:
        threads.default_num_threads()
    assert str(refusal.value) == f"ENTRENAR_NUM_THREADS is {value!r}: wanted a whole number, 1 or more"


def test_a_wrong_number_of_threads_ends_the_import(native):
    done = process(INFO, ENTRENAR_NUM_THREADS="many")
    assert done.returncode == 1 and "ValueError: ENTRENAR_NUM_THREADS is 'many'" in done.stderr


def test_the_instruction_set_can_be_set(isa, native):
    assert python(INFO, ENTRENAR_ISA=isa).split()[:2] == ["native", isa]


def test_the_best_instruction_set_is_the_default(native):
    assert python(INFO).split()[:2] == ["native", native.available_isas()[-1]]


@pytest.mark.parametrize("value", ["avx9", "AVX2"])
def test_an_unknown_instruction_set_is_refused_naming_what_there_is(value, native):
    done = process(INFO, ENTRENAR_ISA=value)
    assert done.returncode == 1
    last = done.stderr.strip().rsplit("\n", 1)[-1]
    assert last.startswith("ValueError") and "ENTRENAR_ISA" in last and repr(value) in last
    assert all(name in last for name in native.available_isas())


def test_the_reference_can_be_chosen_silently():
    done = process(INFO, ENTRENAR_KERNELS="reference")
    assert done.stdout.split()[:2] == ["reference", "numpy"] and done.stderr == ""


def test_unknown_kernels_are_refused():
    done = process(INFO, ENTRENAR_KERNELS="cuda")
    assert done.returncode == 1
    assert "ValueError: ENTRENAR_KERNELS is 'cuda': wanted reference or native" in done.stderr


def test_importing_prints_nothing(native):
    done = process("import entrenar")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# Fork


def in_child(work) -> int:
    """Exit status of a forked child that does `work`; one that hangs is killed after 20 s."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if work() else 2
        finally:
            os._exit(status)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -signal.SIGKILL


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python 3.12: fork with threads; that is the point
def test_kernels_in_a_forked_child_do_not_hang_and_compute_the_same(native, thread_count):
    thread_count(2)
    inputs = [(case, case.make(np.random.default_rng(4), **case.large)) for case in CASES]
    wanted = [bits(native, case, args) for case, args in inputs]  # threads have been started by now

    assert in_child(lambda: [bits(native, case, args) for case, args in inputs] == wanted) == 0
    assert in_child(lambda: native.get_num_threads() == 1) == 0

    def asking_for_more() -> bool:
        thread_count(2)
        return [bits(native, case, args) for case, args in inputs] == wanted

    assert in_child(asking_for_more) == 0
    assert native.get_num_threads() == (2 if native.OPENMP else 1), "the parent keeps its threads"
    assert [bits(native, case, args) for case, args in inputs] == wanted


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_child_that_hangs_would_be_found(monkeypatch):
    ticks = iter(range(0, 1000, 7))
    monkeypatch.setattr(time, "monotonic", lambda: next(ticks))
    assert in_child(signal.pause) == -signal.SIGKILL


def test_python_threads_can_call_kernels_at_once(native):
    """Scratch memory belongs to one Python thread each."""
    from concurrent.futures import ThreadPoolExecutor

    inputs = [(case, case.make(np.random.default_rng(5), **case.sizes[-1])) for case in CASES]
    wanted = [bits(native, case, args) for case, args in inputs]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(2):
            results = list(pool.map(lambda pair: bits(native, *pair), inputs * 2))
            assert results == wanted * 2
