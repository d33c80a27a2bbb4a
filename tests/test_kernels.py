"""The C kernels against their NumPy twins, on every instruction set this machine has: sizes, tails, layouts,
extreme values, guard pages. The table of kernels, their inputs and their error bounds is in kernel_cases.py.
"""

from __future__ import annotations

import inspect
import itertools
import os
import re
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from conftest import SAME_PACKAGE
from kernel_cases import (
    CASES,
    IGNORE,
    TINY,
    as_type,
    bound_matmul,
    check,
    expected,
    mismatch,
    normal,
    run,
    split,
    targets,
)

from entrenar import kernels
from entrenar.kernels import memory, reference

ROOT = Path(__file__).parent.parent
BY_NAME = {case.kernel: case for case in CASES}
F32 = np.float32

every_kernel = pytest.mark.parametrize("case", CASES, ids=lambda case: case.kernel)


@cache
def prepared(kernel: str, size: tuple[tuple[str, int], ...]):
    """Inputs of one size, computed once for all instruction sets, with what the reference makes of them."""
    case = BY_NAME[kernel]
    args = case.make(np.random.default_rng(len(size) + sum(n for _, n in size if type(n) is int)), **dict(size))
    return args, *expected(reference, case, args)


def check_size(native, case, size: dict[str, int]) -> None:
    args, wanted, bounds = prepared(case.kernel, tuple(size.items()))
    outputs = run(native, case, args)
    assert len(outputs) == len(wanted)
    for i, (got, want, bound) in enumerate(zip(outputs, wanted, bounds, strict=True)):
        problem = mismatch(got, want, np.broadcast_to(bound, want.shape))
        assert not problem, f"{case.kernel} {size}, output {i}: {problem}"


# The table


def test_every_kernel_of_the_header_and_of_the_package_is_in_the_table():
    header = (ROOT / "csrc/kernels.h").read_text()
    in_c = {name for name in re.findall(r"^void ent_(\w+)\(", header, re.MULTILINE)}
    in_c |= {name for name in re.findall(r"^double ent_(\w+)\(", header, re.MULTILINE)}
    elsewhere = {"fma_peak", "unpack", "unpack_rows", "packed_linears", "packed_mlp"}  # but one: test_packed_kernels.py
    elsewhere |= {"quantize_4bit", "quantize_q8_0", "round_bfloat16"}  # bit for bit: test_quantize_kernels.py
    in_c = in_c - {"adamw_steps"} | {"adamw_step"}  # in C, one parameter is a list of one
    assert in_c - set(BY_NAME) == elsewhere, "a kernel without a case"
    # adamw_steps: test_many_parameters_step_as_one_after_the_other
    assert set(kernels.KERNELS) - set(BY_NAME) == elsewhere | {"adamw_steps"}, "a kernel without a case"
    assert set(BY_NAME) <= set(kernels.KERNELS), "a case without a kernel"


def test_every_kernel_is_computed_in_c(native):
    """The package falls back to the reference where a wrapper is missing: none may be."""
    where = {name: getattr(getattr(native, name, None), "__module__", "") for name in kernels.KERNELS}
    assert not [name for name, module in where.items() if not module.startswith(native.__name__)]


def test_the_peak_is_a_plausible_number_of_operations(native):
    assert 1e8 < native.fma_peak(0.01) < 1e14


def test_both_kernels_of_a_name_have_one_signature(native):
    for name in kernels.KERNELS:
        here, there = (inspect.signature(getattr(module, name)) for module in (native, reference))
        described = [[(p.name, p.kind, p.default) for p in s.parameters.values()] for s in (here, there)]
        assert described[0] == described[1], f"{name}{here}, but {name}{there}"


@pytest.mark.parametrize(("most", "kept"), [(1 << 31, 1 << 30), (32 << 20, 32 << 20), (0, None)])
def test_freed_memory_is_kept_as_far_as_the_c_library_allows(most, kept, monkeypatch):
    """Older glibcs refuse a threshold above 32 MiB."""
    settings = {}

    class Library:
        def __init__(self, name):
            pass

        def mallopt(self, what: int, size: int) -> int:
            if what == memory.M_MMAP_THRESHOLD and size > most:
                return 0
            settings[what] = size
            return 1

    monkeypatch.setattr(memory.ctypes, "CDLL", Library)
    monkeypatch.setattr(memory, "_ask_for_huge_pages", lambda libc: None)
    assert kernels.keep_freed_memory() == (kept is not None)
    assert settings.get(memory.M_MMAP_THRESHOLD) == kept


WHERE_A_MEGABYTE_LIES = """
import sys
import numpy as np
from entrenar import kernels
kept = kernels.keep_freed_memory() if "keep" in sys.argv else None
array = np.ones(1 << 18, np.float32)
address, inside = array.ctypes.data, False
for line in open("/proc/self/smaps"):
    first, _, rest = line.partition(" ")
    if "-" in first:
        start, end = (int(edge, 16) for edge in first.split("-"))
        inside = start <= address < end
    elif inside and first == "VmFlags:":
        print(kept, "hg" in rest.split())
"""


@pytest.mark.skipif(not os.path.exists("/sys/kernel/mm/transparent_hugepage"), reason="the kernel has no huge pages")
@pytest.mark.parametrize("argument", ["keep", "leave"])
def test_kept_memory_lies_in_huge_pages(argument):
    done = subprocess.run([sys.executable, "-c", WHERE_A_MEGABYTE_LIES, argument], capture_output=True, text=True)
    kept, huge = done.stdout.split()
    if argument == "leave":
        assert (kept, huge) == ("None", "False")
    elif kept == "False":
        pytest.skip("the C library has no such switch")
    else:
        assert huge == "True"


# Sizes


@every_kernel
def test_sizes(case, isa, native):
    for size in case.sizes:
        check_size(native, case, size)


@every_kernel
def test_empty_arrays(case, native):
    for size in case.empty:
        check_size(native, case, size)


@every_kernel
def test_every_length_from_1_to_70(case, isa, native):
    for tail, n in itertools.product(case.tails, range(1, 71)):
        check_size(native, case, tail(n))


# Layouts: each makes a view with the values of x in another place or order; values may repeat


def misaligned(x: np.ndarray, offset: int) -> np.ndarray:
    buffer = np.zeros(x.nbytes + 64, np.uint8)
    view = buffer[offset : offset + x.nbytes].view(x.dtype).reshape(x.shape)
    view[...] = x
    return view


def every_second(x: np.ndarray) -> np.ndarray:
    """Twice as many elements along every axis, of which every second is used."""
    room = np.full([2 * n for n in x.shape], np.nan, x.dtype)
    view = room[(slice(None, None, 2),) * x.ndim]
    view[...] = x
    return view


def backwards(x: np.ndarray) -> np.ndarray:
    return x[(slice(None, None, -1),) * x.ndim].copy()[(slice(None, None, -1),) * x.ndim]


def wider_rows(x: np.ndarray) -> np.ndarray:
    """The last axis is a slice of a longer one: rows lie apart."""
    room = np.full((*x.shape[:-1], x.shape[-1] + 3), np.nan, x.dtype)
    room[..., 1:-2] = x
    return room[..., 1:-2]


LAYOUTS = {
    "offset 1 byte": lambda x: misaligned(x, 1),
    "offset 2 bytes": lambda x: misaligned(x, 2),
    "offset 3 bytes": lambda x: misaligned(x, 3),
    "offset 4 bytes": lambda x: misaligned(x, 4),
    "every second element": every_second,
    "backwards": backwards,
    "wider rows": wider_rows,
    "Fortran order": np.asfortranarray,
    "rows broadcast": lambda x: np.broadcast_to(x[:1], x.shape),
    "columns broadcast": lambda x: np.broadcast_to(x[..., :1], x.shape),
    "byte-swapped": lambda x: x.astype(x.dtype.newbyteorder()),
    "read only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
}


def laid_out(args: dict, layout: str, only: str | None = None) -> dict:
    """The arguments with every float array (or the one named) in another layout."""
    return {
        name: LAYOUTS[layout](x) if isinstance(x, np.ndarray) and x.dtype.kind == "f" and only in (None, name) else x
        for name, x in args.items()
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [case for case in CASES if not case.in_place], ids=lambda case: case.kernel)
def test_layouts(case, layout, native):
    """All arrays in the layout, then one at a time; a fresh result, and inputs as they were."""
    args = case.make(np.random.default_rng(5), **case.sizes[1])
    floats = [name for name, x in args.items() if isinstance(x, np.ndarray) and x.dtype.kind == "f"]
    for only in (None, *floats) if len(floats) > 1 else (None,):
        views = laid_out(args, layout, only)
        before = {name: x.tobytes() for name, x in split(views)[0].items()}
        plain = {name: np.array(x, x.dtype.newbyteorder("=")) if name in before else x for name, x in views.items()}

        wanted, bounds = expected(reference, case, plain)
        outputs = run(native, case, views)
        for i, (got, want, bound) in enumerate(zip(outputs, wanted, bounds, strict=True)):
            problem = mismatch(got, want, np.broadcast_to(bound, want.shape))
            assert not problem, f"{case.kernel}, {only or 'all'} {layout}, output {i}: {problem}"
            assert not any(np.shares_memory(got, x) for x in split(views)[0].values())
            assert got.flags.writeable and got.flags.owndata | (got.base is not None)
        after = {name: x.tobytes() for name, x in split(views)[0].items()}
        assert after == before, f"{case.kernel} changed its input"


@pytest.mark.parametrize(
    "layout",
    [layout for layout in LAYOUTS if layout not in ("rows broadcast", "columns broadcast")],
)
@pytest.mark.parametrize("only", [None, "p", "g", "m", "v"])
def test_in_place_kernels_change_views_or_refuse_them(layout, only, native):
    case = BY_NAME["adamw_step"]
    args = case.make(np.random.default_rng(5), **case.sizes[1])
    (wanted, bounds), views = expected(reference, case, args), laid_out(args, layout, only)
    before = {name: x.tobytes() for name, x in split(views)[0].items()}
    arrays, constants = split(views)
    try:
        native.adamw_step(*arrays.values(), **constants)
    except ValueError as error:
        assert "adamw_step" in str(error)
        assert {name: x.tobytes() for name, x in arrays.items()} == before, "refused, but changed"
        return
    for name, want, bound in zip(case.in_place, wanted, bounds, strict=True):
        problem = mismatch(arrays[name].astype(F32), want, bound)
        assert not problem, f"{name}: {problem}"
    assert arrays["g"].tobytes() == before["g"], "the gradient is read only"


def large(rng: np.random.Generator, rows: int, columns: int, offset: int) -> np.ndarray:
    """(rows, columns) that begin `offset` floats into an allocation, of numbers that repeat."""
    memory = np.resize(normal(rng, 10_007), rows * columns + offset)
    return memory[offset:].reshape(rows, columns)


@pytest.mark.parametrize("columns", [2048, 2051])
def test_results_that_go_past_the_caches_are_those_of_their_parts(columns, isa, native):
    """From 2^22 numbers on (csrc/rows.c.inc), stores are others; rows of 2051 begin anywhere in a vector."""
    rng, rows = np.random.default_rng(2), (1 << 22) // columns + 3
    gate, up, dy = (large(rng, rows, columns, offset) for offset in (0, 1, 3))
    parts = [slice(0, 700), slice(700, rows)]
    whole = [native.swiglu_forward(gate, up), *native.swiglu_backward(dy, gate, up)]
    pieces = [[native.swiglu_forward(gate[i], up[i]), *native.swiglu_backward(dy[i], gate[i], up[i])] for i in parts]
    for got, *want in zip(whole, *pieces, strict=True):
        assert np.array_equal(got, np.concatenate(want))

    classes, weights = targets(rng, rows, columns), normal(rng, rows)
    _, lse = native.cross_entropy_forward(gate, classes, ignore_index=IGNORE)
    got, *want = (
        native.cross_entropy_backward(weights[i], gate[i], classes[i], lse[i], ignore_index=IGNORE)
        for i in (slice(0, rows), *parts)
    )
    assert np.array_equal(got, np.concatenate(want))


SHAPES = ((700, 64), (3,), (1,), (0, 4), (129, 33), (4097,), (64, 65))
RATES = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "step": 3, "grad_scale": 0.7}


def some_parameters() -> list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, float]]:
    """(p, g, m, v, weight decay) of many shapes, one of float64, one with a strided gradient."""
    rng = np.random.default_rng(4)
    parameters = [
        (*(rng.standard_normal(shape, F32) for _ in range(3)), rng.random(shape, F32), 0.1 * i)
        for i, shape in enumerate(SHAPES)
    ]
    p, g, m, v, decay = parameters[4]
    parameters.append((*(x.astype(np.float64) for x in (p, g, m, v)), decay))
    parameters.append((p.copy(), rng.standard_normal((129, 66), F32)[:, ::2], m.copy(), v.copy(), decay))
    return parameters


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_many_parameters_step_as_one_after_the_other(isa, threads, native, thread_count):
    native.set_num_threads(threads)
    together, alone = some_parameters(), some_parameters()
    native.adamw_steps(together, **RATES)
    for p, g, m, v, weight_decay in alone:
        native.adamw_step(p, g, m, v, weight_decay=weight_decay, **RATES)
    for one, other in zip(together, alone, strict=True):
        assert [x.tobytes() for x in one[:4]] == [x.tobytes() for x in other[:4]]


def test_no_parameters_step_nowhere(native):
    for backend in (native, reference):
        backend.adamw_steps([], **RATES)
        assert backend.sum_of_squares() == 0


@pytest.mark.parametrize("which", ["native", "reference"])
def test_one_wrong_parameter_keeps_all_from_stepping(which, native):
    kernels, parameters = {"native": native, "reference": reference}[which], some_parameters()
    parameters[-1][0].flags.writeable = False
    before = [x.tobytes() for *arrays, _ in parameters for x in arrays]
    with pytest.raises(ValueError, match="adamw_step: p is read-only"):
        kernels.adamw_steps(parameters, **RATES)
    assert [x.tobytes() for *arrays, _ in parameters for x in arrays] == before


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_the_squares_of_many_arrays_are_added_array_by_array(isa, threads, native, thread_count):
    native.set_num_threads(threads)
    gradients = [g for _, g, *_ in some_parameters() if g.dtype == F32]
    one_by_one = [native.sum_of_squares(g) for g in gradients]
    assert native.sum_of_squares(*gradients) == sum(one_by_one)
    exact = sum(float(np.square(g.astype(np.float64)).sum()) for g in gradients)
    assert native.sum_of_squares(*gradients) == pytest.approx(exact, rel=1e-12)
    assert reference.sum_of_squares(*gradients) == pytest.approx(exact, rel=1e-12)


@every_kernel
def test_contiguous_inputs_are_left_unchanged(case, isa, native):
    args = case.make(np.random.default_rng(6), **case.sizes[-1])
    before = {name: x.tobytes() for name, x in split(args)[0].items()}
    arrays, constants = split(args)
    getattr(native, case.kernel)(*arrays.values(), **constants)
    changed = [name for name, x in arrays.items() if x.tobytes() != before[name] and name not in case.in_place]
    assert not changed


@every_kernel
def test_float64_goes_to_the_reference_and_keeps_its_type(case, native):
    args = as_type(case.make(np.random.default_rng(7), **case.sizes[1]), np.float64)
    for got, want in zip(run(native, case, args), run(reference, case, args), strict=True):
        assert got.dtype == want.dtype == np.float64
        assert got.tobytes() == want.tobytes()


@pytest.mark.parametrize("kernel", ["softmax_forward", "rms_norm_forward", "log_softmax_backward", "swiglu_backward"])
def test_row_kernels_take_any_number_of_leading_axes(kernel, native):
    case = BY_NAME[kernel]
    args = case.make(np.random.default_rng(8), N=12, C=7)
    shapes = {(12, 7): (2, 3, 2, 7), (12,): (2, 3, 2)}
    deep = {n: x.reshape(shapes.get(x.shape, x.shape)) if isinstance(x, np.ndarray) else x for n, x in args.items()}
    for got, flat in zip(run(native, case, deep), run(native, case, args), strict=True):
        assert got.shape == shapes.get(flat.shape, flat.shape)
        assert got.tobytes() == flat.tobytes()
    if kernel == "softmax_forward":
        assert native.softmax_forward(args["x"][0]).shape == (7,)


# Extreme values

EXTREMES = (np.inf, -np.inf, np.nan, 1e38, -1e38, 1e-40, -1e-45, -0.0)


@every_kernel
def test_extreme_values(case, isa, native):
    """One extreme value in one place of one input at a time: inf and nan go where the formula takes them, not
    further.
    """
    rng = np.random.default_rng(9)
    args = case.make(rng, **case.sizes[1])
    for name, x in split(args)[0].items():
        if x.dtype.kind != "f":
            continue
        for value in EXTREMES:
            if case.kernel == "attention_backward" and abs(value) == 1e38:
                value /= 1e36  # exp(score - lse) means nothing once a score's rounding error exceeds one
            planted = args | {name: x.copy()}
            planted[name].flat[int(rng.integers(x.size))] = value
            try:
                check(native, reference, case, planted, extreme=True)
            except AssertionError as error:
                raise AssertionError(f"{value} in {name}: {error}") from None


def test_masked_logits(isa, native):
    """-inf is a mask: no probability, no gradient, and a row of nothing else is zero."""
    rng = np.random.default_rng(10)
    for length in (1, 2, 7, 16, 33, 70):
        x = normal(rng, 6, length)
        x[1, ::2] = -np.inf
        x[2] = -np.inf
        x[3, 0], x[4, -1] = -np.inf, -np.inf
        for case in (BY_NAME["softmax_forward"], BY_NAME["log_softmax_forward"]):
            check(native, reference, case, {"x": x})
        y = native.softmax_forward(x)
        assert not y[2].any() and np.all(y[x == -np.inf] == 0)

        targets = np.array([0, length // 2 - 1 if length > 2 else IGNORE, IGNORE, IGNORE, 0, 0])
        args = {"logits": x, "targets": targets, "ignore_index": IGNORE}
        check(native, reference, BY_NAME["cross_entropy_forward"], args)


def test_exp_is_accurate_over_its_whole_range(isa, native):
    """softmax of (0, -t) has the ratio exp(-t): within 8 ulp from 0 to where float32 ends."""
    t = np.concatenate([np.linspace(0, 87, 20_001), 2.0 ** np.arange(-30, 6), [88, 100, 1e4, 1e30]]).astype(F32)
    y = native.softmax_forward(np.stack([np.zeros_like(t), -t], axis=1))
    ratio, want = y[:, 1].astype(np.float64) / y[:, 0], np.exp(-t.astype(np.float64))
    assert np.all(np.abs(ratio - want) <= 8 * np.finfo(F32).eps * want + TINY)


def test_large_logits_do_not_overflow(isa, native):
    for shift in (0, 1e4, -1e4, 1e30):
        y = native.softmax_forward(np.full((3, 37), shift, F32))
        np.testing.assert_allclose(y, 1 / 37, rtol=1e-6)


# Guard pages


def guard(argument: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "tests/guard.py"), argument],
        env=SAME_PACKAGE,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_no_kernel_reads_outside_its_inputs(isa):
    """Inputs that end right before, and start right after, a forbidden page; in a process of its own."""
    done = guard(isa)
    last = done.stdout.strip().rsplit("\n", 1)[-1]
    assert done.returncode == 0 and last == "done", f"{last}: exit {done.returncode}\n{done.stderr[-2000:]}"


@pytest.mark.parametrize("side", ["overrun", "underrun"])
def test_a_read_outside_a_guarded_array_dies(side):
    done = guard(side)
    assert done.returncode < 0 or done.returncode == 99, "a signal, or a sanitizer's own exit code: no Python error"
    assert done.stdout == "touching\n"


# The checker itself


class Faulty:
    """Kernels whose last output is spoilt."""

    def __init__(self, kernels, fault):
        self.kernels, self.fault = kernels, fault

    def __getattr__(self, name):
        def kernel(*arrays, **constants):
            result = getattr(self.kernels, name)(*arrays, **constants)
            if result is None:  # in place
                return self.fault(arrays[0])
            if isinstance(result, tuple):
                return *result[:-1], self.fault(result[-1])
            return self.fault(result)

        return kernel


def zeros(x):
    x = np.asarray(x)
    x[...] = 0
    return x


def last_element_missing(x):
    x = np.array(x) if np.ndim(x) == 0 else x
    x.reshape(-1)[np.flatnonzero(x)[-1]] = 0
    return x


def scaled(x):
    x = np.asarray(x)
    x *= x.dtype.type(1.001)
    return x


@pytest.mark.parametrize("fault", [zeros, last_element_missing, scaled])
@every_kernel
def test_planted_faults_are_found(case, fault):
    """The reference in float32 passes; the same, spoilt, does not."""
    args = case.make(np.random.default_rng(11), **case.sizes[1])
    check(reference, reference, case, args)
    with pytest.raises(AssertionError):
        check(Faulty(reference, fault), reference, case, args)


def test_a_nan_or_an_inf_too_many_is_found():
    good, bound = np.ones(3), np.full(3, 1e-6)
    for value in (np.nan, np.inf, -np.inf):
        assert mismatch(np.array([1, value, 1], F32), good, bound)
        assert mismatch(np.ones(3, F32), np.array([1, value, 1]), bound)
    assert mismatch(np.array([1, np.inf, 1], F32), np.array([1, -np.inf, 1]), bound)
    assert not mismatch(np.array([1, np.nan, 1], F32), np.array([1, np.nan, 1]), bound)


# Matrix products

LENGTHS = (0, 1, 2, 3, 5, 7, 8, 13, 16, 17, 31, 32, 33, 63, 64, 65, 129, 257, 300)


def stored(x: np.ndarray, how: str) -> np.ndarray:
    """The same matrix in memory by rows, by columns, or as part of a larger one by rows or by columns."""
    if how == "rows":
        return np.ascontiguousarray(x)
    if how == "columns":
        return np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2)
    if how == "wide rows":
        return wider_rows(x)
    return wider_rows(x.swapaxes(-1, -2)).swapaxes(-1, -2)


STORED = ("rows", "columns", "wide rows", "wide columns")


def check_matmul(native, a: np.ndarray, b: np.ndarray) -> None:
    want = a.astype(np.float64) @ b.astype(np.float64)
    problem = mismatch(native.matmul(a, b), want, bound_matmul(want, a.astype(np.float64), b.astype(np.float64)))
    assert not problem, f"matmul {a.shape} {a.strides} @ {b.shape} {b.strides}: {problem}"


@pytest.mark.parametrize("b_stored", STORED)
@pytest.mark.parametrize("a_stored", STORED)
def test_matmul_transposed_and_strided(a_stored, b_stored, isa, native):
    """20 of the 6,859 sizes with M, N, K in LENGTHS, other ones for each way to store the operands."""
    rng = np.random.default_rng([STORED.index(a_stored), STORED.index(b_stored)])
    for _ in range(20):
        M, N, K = (int(n) for n in rng.choice(LENGTHS, 3))
        check_matmul(native, stored(normal(rng, M, K), a_stored), stored(normal(rng, K, N), b_stored))


@pytest.mark.tier3
def test_matmul_all_sizes_on_every_instruction_set(native):
    rng, before = np.random.default_rng(12), native.isa()
    for M, N, K in itertools.product(LENGTHS, repeat=3):
        a_stored, b_stored = rng.choice(STORED, 2)
        a, b = stored(normal(rng, M, K), a_stored), stored(normal(rng, K, N), b_stored)
        want, bound = a.astype(np.float64) @ b.astype(np.float64), bound_matmul(None, a, b)
        for isa in native.available_isas():
            native.use_isa(isa)
            problem = mismatch(native.matmul(a, b), want, bound)
            assert not problem, f"{isa}: matmul {a.shape} {a.strides} @ {b.shape} {b.strides}: {problem}"
    native.use_isa(before)


@pytest.mark.parametrize(
    ("a_batch", "b_batch"),
    [
        ((3,), (3,)),
        ((2, 3), (2, 3)),
        ((3,), ()),
        ((), (3,)),
        ((2, 1), (3,)),
        ((1,), (4,)),
        ((0,), (0,)),
        ((2, 0), (1, 1)),
    ],
)
def test_matmul_batched_and_broadcast(a_batch, b_batch, isa, native):
    rng = np.random.default_rng(13)
    for M, K, N in ((1, 1, 1), (5, 7, 9), (1, 40, 33), (33, 20, 17), (70, 64, 65), (2, 0, 3)):
        for a_stored, b_stored in itertools.product(STORED, repeat=2):
            a, b = normal(rng, *a_batch, M, K), normal(rng, *b_batch, K, N)
            check_matmul(native, stored(a, a_stored), stored(b, b_stored))


def test_matmul_of_broadcast_and_permuted_batches(isa, native):
    rng = np.random.default_rng(14)
    heads = normal(rng, 2, 9, 3, 8).transpose(0, 2, 1, 3)  # (B, H, T, D) out of (B, T, H, D)
    check_matmul(native, heads, heads.swapaxes(-1, -2))
    check_matmul(native, np.broadcast_to(normal(rng, 4, 5), (3, 4, 5)), normal(rng, 3, 5, 6))
    check_matmul(native, normal(rng, 3, 4, 5)[::-1], normal(rng, 3, 5, 6)[::-1, ::-1, ::-1])
    check_matmul(native, np.broadcast_to(normal(rng, 4, 1), (4, 5)), np.broadcast_to(normal(rng, 1, 6), (5, 6)))


def test_edge_tiles_compute_as_full_ones_do(isa, native):
    """The last columns of a product do not depend on how many there are."""
    rng = np.random.default_rng(15)
    a, b = normal(rng, 200, 130), normal(rng, 130, 200)
    whole = native.matmul(a, b)
    for n in (131, 150, 163, 199):
        assert native.matmul(a, b[:, :n]).tobytes() == np.ascontiguousarray(whole[:, :n]).tobytes()


def test_a_product_across_many_blocks(isa, native):
    rng = np.random.default_rng(16)
    for M, K, N in ((37, 1300, 45), (700, 40, 21), (19, 40, 2100), (4, 1500, 600)):
        check_matmul(native, normal(rng, M, K), normal(rng, K, N))
        check_matmul(native, normal(rng, K, M).T, normal(rng, N, K).T)


# Attention


def test_attention_reads_views_of_a_fused_projection_and_of_a_cache(isa, native):
    """q, k, v as slices of one (B, T, H + 2 KH, D) array; k, v as the filled part of a longer cache."""
    rng = np.random.default_rng(17)
    B, T, H, KH, D = 2, 19, 4, 2, 12
    fused, case = normal(rng, B, T, H + 2 * KH, D), BY_NAME["attention_forward"]
    q, k, v = fused[:, :, :H], fused[:, :, H : H + KH], fused[:, :, H + KH :]
    check(native, reference, case, {"q": q, "k": k, "v": v, "scale": 0.3})

    cache = normal(rng, 2, B, KH, 64, D).swapaxes(2, 3)[:, :, :T]  # (B, S, KH, D) out of (B, KH, longest, D)
    check(native, reference, case, {"q": q[:, -1:], "k": cache[0], "v": cache[1], "scale": 0.3})

    (o, lse), backward = native.attention_forward(q, k, v, scale=0.3), BY_NAME["attention_backward"]
    args = {"do": normal(rng, B, T, H, D), "q": q, "k": k, "v": v, "o": o, "lse": lse, "scale": 0.3}
    check(native, reference, backward, args)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_attention_forward_is_blind_to_whatever_comes_later(value, isa, native):
    rng = np.random.default_rng(18)
    q, k, v = (normal(rng, 1, 70, 2, 8) for _ in range(3))
    before, _ = native.attention_forward(q, k, v, scale=0.5)
    for seen in (1, 30, 64, 69):
        later_k, later_v = k.copy(), v.copy()
        later_k[:, seen:], later_v[:, seen:] = value, value
        after, _ = native.attention_forward(q, later_k, later_v, scale=0.5)
        assert after[:, :seen].tobytes() == before[:, :seen].tobytes()


# Documents packed into one row

BORDERS = {  # lengths of documents, against blocks of 96 queries and 96 keys
    "tiny": [1, 2, 1, 3, 5, 1, 4, 6, 7],
    "one token each": [1] * 9,
    "one block each": [96, 96],
    "around one block": [95, 1, 97, 2, 96, 191],
    "across blocks": [50, 100, 3, 193],
    "one document": [150],
}


def packed(rng, lengths: list[int], H: int = 4, KH: int = 2, D: int = 11):
    """q, k, v, do and starts of one row of documents; and the slice of each."""
    T, ends = sum(lengths), np.cumsum(lengths)
    heads = [normal(rng, 1, T, heads, D) for heads in (H, KH, KH, H)]
    documents = [slice(end - n, end) for end, n in zip(ends, lengths, strict=True)]
    return *heads, np.repeat(ends - lengths, lengths)[None], documents


def attention(native, q, k, v, do, starts=None):
    """o, lse (turned to (B, T, H)), dq, dk, dv"""
    o, lse = native.attention_forward(q, k, v, starts, scale=0.3)
    return o, lse.swapaxes(1, 2), *native.attention_backward(do, q, k, v, o, lse, starts, scale=0.3)


@pytest.mark.parametrize("lengths", BORDERS.values(), ids=BORDERS)
def test_a_packed_document_is_computed_to_the_bits_it_has_alone(lengths, isa, native):
    """But for dk and dv, which shares of the work are added up to: those within rounding, where there are several."""
    *heads, starts, documents = packed(np.random.default_rng(23), lengths)
    whole, case = attention(native, *heads, starts), BY_NAME["attention_backward"]
    for at in documents:
        q, k, v, do = (x[:, at] for x in heads)
        o, lse, *grads = attention(native, q, k, v, do)
        for alone, among in zip((o, lse, grads[0]), whole, strict=False):
            assert alone.tobytes() == among[:, at].tobytes()
        args = {"do": do, "q": q, "k": k, "v": v, "o": o, "lse": lse.swapaxes(1, 2).copy(), "scale": 0.3}
        wanted, bounds = expected(reference, case, args)
        for among, want, bound in zip(whole[3:], wanted[1:], bounds[1:], strict=True):
            problem = mismatch(among[:, at], want, bound)
            assert not problem, f"tokens {at.start} to {at.stop}: {problem}"


def test_starts_of_zero_change_no_bit(isa, native):
    for T in (1, 2, 3, 4, 5, 64, 97, 300):
        *heads, starts, _ = packed(np.random.default_rng(T), [T])
        for one, other in zip(attention(native, *heads, starts), attention(native, *heads), strict=True):
            assert one.tobytes() == other.tobytes(), f"T = {T}"


def blind(native, lengths, value, *, lie: int = 0) -> bool:
    """Whether one document's results are what they were when all others hold `value` in q, k, v and do; `lie` tells
    the kernel starts so many tokens too early.
    """
    *heads, starts, documents = packed(np.random.default_rng(24), lengths)
    starts = np.maximum(starts - lie, 0)
    before = attention(native, *heads, starts)
    for at in documents:
        spoilt = [np.full_like(x, value) for x in heads]
        for x, own in zip(spoilt, heads, strict=True):
            x[:, at] = own[:, at]
        after = attention(native, *spoilt, starts)
        if any(x[:, at].tobytes() != y[:, at].tobytes() for x, y in zip(before, after, strict=True)):
            return False
    return True


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("lengths", BORDERS.values(), ids=BORDERS)
def test_no_document_is_touched_by_what_another_holds(lengths, value, isa, native):
    assert blind(native, lengths, value)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_a_start_one_token_too_early_is_found(value, native):
    for lengths in (BORDERS["tiny"], BORDERS["around one block"]):
        assert not blind(native, lengths, value, lie=1)


def test_documents_cost_what_is_theirs_not_what_the_row_would(native):
    """64 documents of 32 tokens take a small part of the time of one of 2048 (1/18 where this was measured)."""
    *heads, starts, _ = packed(np.random.default_rng(28), [32] * 64, D=64)

    def fastest(starts) -> float:
        times = []
        for _ in range(5):
            started = time.perf_counter()
            attention(native, *heads, starts)
            times.append(time.perf_counter() - started)
        return min(times)

    assert fastest(starts) < fastest(None) / 4


def test_starts_need_not_be_documents(isa, native):
    """A window: each query sees itself and the 7 keys before it."""
    *heads, _, _ = packed(np.random.default_rng(25), [150])
    q, k, v, do = heads
    starts = np.maximum(np.arange(150) - 7, 0)[None]
    args = {"q": q, "k": k, "v": v, "starts": starts, "scale": 0.3}
    check(native, reference, BY_NAME["attention_forward"], args)
    o, lse = native.attention_forward(q, k, v, starts, scale=0.3)
    args = {"do": do, "q": q, "k": k, "v": v, "o": o, "lse": lse, "starts": starts, "scale": 0.3}
    check(native, reference, BY_NAME["attention_backward"], args)


@pytest.mark.parametrize("kernel", ["attention_forward", "attention_backward"])
def test_extreme_values_stay_in_their_document(kernel, isa, native):
    case, rng = BY_NAME[kernel], np.random.default_rng(26)
    args = case.make(rng, B=2, T=9, S=9, H=2, KH=1, D=3, documents=4)
    floats = [name for name, x in args.items() if isinstance(x, np.ndarray) and x.dtype.kind == "f"]
    for name, value in itertools.product(floats, (np.inf, -np.inf, np.nan)):
        planted = args | {name: args[name].copy()}
        planted[name].flat[int(rng.integers(args[name].size))] = value
        check(native, reference, case, planted, extreme=True)


# Losses


def test_the_fused_loss_leaves_out_what_is_not_needed(native):
    case = BY_NAME["linear_cross_entropy"]
    args = case.make(np.random.default_rng(19), N=7, C=5, V=11)
    arrays, constants = split(args)
    losses, dx, dw = native.linear_cross_entropy(*arrays.values(), **constants)
    for need_dx, need_dw in itertools.product((False, True), repeat=2):
        some = native.linear_cross_entropy(*arrays.values(), **constants | {"need_dx": need_dx, "need_dw": need_dw})
        assert some[0].tobytes() == losses.tobytes()
        assert some[1] is None if not need_dx else some[1].tobytes() == dx.tobytes()
        assert some[2] is None if not need_dw else some[2].tobytes() == dw.tobytes()


def test_ignored_rows_cost_and_change_nothing(isa, native):
    rng = np.random.default_rng(20)
    x, w, targets = normal(rng, 9, 5), normal(rng, 12, 5), np.full(9, IGNORE)
    constants = {"ignore_index": IGNORE, "scale": 1.0, "need_dx": True, "need_dw": True}
    losses, dx, dw = native.linear_cross_entropy(x, w, targets, **constants)
    assert not losses.any() and not dx.any() and not dw.any()

    targets[4] = 3
    x[:4], x[5:] = np.nan, np.nan  # rows without a target: nobody should look at them
    losses, dx, dw = native.linear_cross_entropy(x, w, targets, **constants)
    assert np.isfinite(losses).all() and np.isfinite(dw).all() and not dx[:4].any() and not dx[5:].any()


# Index arrays


INTEGERS = ["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", ">i4", ">i8"]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_starts_of_any_integer_type(dtype, native):
    *heads, starts, _ = packed(np.random.default_rng(27), BORDERS["tiny"])
    want = attention(native, *heads, starts)
    for got, wanted in zip(attention(native, *heads, starts.astype(dtype)), want, strict=True):
        assert got.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("dtype", INTEGERS)
def test_ids_of_any_integer_type(dtype, native):
    rng = np.random.default_rng(21)
    ids, dy = rng.integers(0, 7, 30), normal(rng, 30, 5)
    want = native.embedding_backward(dy, ids, rows=7)
    assert native.embedding_backward(dy, ids.astype(dtype), rows=7).tobytes() == want.tobytes()

    losses, _ = native.cross_entropy_forward(dy, ids.astype(dtype) % 5, ignore_index=IGNORE)
    want, _ = native.cross_entropy_forward(dy, ids % 5, ignore_index=IGNORE)
    assert losses.tobytes() == want.tobytes()


def test_ids_in_any_layout(native):
    rng = np.random.default_rng(22)
    ids, dy = rng.integers(0, 7, (6, 4)), normal(rng, 6, 4, 5)
    want = native.embedding_backward(dy, ids, rows=7)
    assert want.shape == (7, 5)
    for layout in ("offset 1 byte", "every second element", "backwards", "Fortran order"):
        if layout == "every second element":
            view = np.zeros((12, 8), ids.dtype)[::2, ::2]
            view[...] = ids
        else:
            view = LAYOUTS[layout](ids)
        assert native.embedding_backward(dy, view, rows=7).tobytes() == want.tobytes()


WRONG = {
    "matmul inner": (ValueError, lambda k: k.matmul(ones(4, 8), ones(7, 3))),
    "matmul batch": (ValueError, lambda k: k.matmul(ones(2, 4, 8), ones(3, 8, 3))),
    "matmul 1-d": (ValueError, lambda k: k.matmul(ones(8), ones(8, 3))),
    "norm weight": (ValueError, lambda k: k.rms_norm_forward(ones(4, 8), ones(7), eps=1e-5)),
    "norm rstd": (ValueError, lambda k: k.rms_norm_backward(ones(4, 8), ones(4, 8), ones(8), ones(5))),
    "layer norm bias": (ValueError, lambda k: k.layer_norm_forward(ones(4, 8), ones(8), ones(9), eps=1e-5)),
    "softmax scalar": (ValueError, lambda k: k.softmax_forward(ones())),
    "softmax shapes": (ValueError, lambda k: k.softmax_backward(ones(3, 4), ones(3, 5))),
    "rope odd": (ValueError, lambda k: k.rope_forward(ones(1, 2, 1, 5), ones(2, 2), ones(2, 2))),
    "rope short": (ValueError, lambda k: k.rope_forward(ones(1, 3, 1, 4), ones(2, 2), ones(2, 2))),
    "swiglu": (ValueError, lambda k: k.swiglu_forward(ones(3, 4), ones(4, 3))),
    "attention heads": (
        ValueError,
        lambda k: k.attention_forward(*qkv((1, 3, 4, 8), (1, 3, 3, 8)), scale=1.0),
    ),
    "attention keys": (
        ValueError,
        lambda k: k.attention_forward(*qkv((1, 5, 4, 8), (1, 3, 4, 8)), scale=1.0),
    ),
    "attention axes": (ValueError, lambda k: k.attention_forward(*qkv((5, 4, 8), (5, 4, 8)), scale=1.0)),
    "starts shape": (ValueError, lambda k: start(k, [[0, 0]])),
    "starts axes": (ValueError, lambda k: start(k, [0, 0, 0])),
    "starts of floats": (TypeError, lambda k: start(k, [[0.0, 0, 0]])),
    "start later": (IndexError, lambda k: start(k, [[0, 1, 3]])),
    "start below 0": (IndexError, lambda k: start(k, [[0, -1, 0]])),
    "start u64": (IndexError, lambda k: start(k, np.array([[0, 2**64 - 1, 0]], np.uint64))),
    "starts decrease": (ValueError, lambda k: start(k, [[0, 1, 0]])),
    "starts u8 decrease": (ValueError, lambda k: start(k, np.array([[0, 1, 0]], np.uint8))),
    "starts with a cache": (
        ValueError,
        lambda k: k.attention_forward(*qkv((1, 3, 2, 4), (1, 5, 2, 4)), np.zeros((1, 3), int), scale=1.0),
    ),
    "starts backward": (ValueError, lambda k: start_backward(k, [[0, 1, 0]])),
    "targets shape": (
        ValueError,
        lambda k: k.cross_entropy_forward(ones(3, 4), np.zeros(4, int), ignore_index=-1),
    ),
    "targets type": (TypeError, lambda k: k.cross_entropy_forward(ones(3, 4), ones(3), ignore_index=-1)),
    "target high": (
        IndexError,
        lambda k: k.cross_entropy_forward(ones(3, 4), np.array([0, 4, 1]), ignore_index=-1),
    ),
    "target low": (
        IndexError,
        lambda k: k.cross_entropy_forward(ones(3, 4), np.array([0, 3, -2]), ignore_index=-1),
    ),
    "fused target": (
        IndexError,
        lambda k: k.linear_cross_entropy(
            ones(3, 2),
            ones(4, 2),
            np.array([0, 9, 1]),
            ignore_index=-1,
            scale=1.0,
            need_dx=True,
            need_dw=True,
        ),
    ),
    "id": (IndexError, lambda k: k.embedding_backward(ones(2, 3), np.array([0, 5]), rows=5)),
    "id u64": (
        IndexError,
        lambda k: k.embedding_backward(ones(2, 3), np.array([0, 2**64 - 1], np.uint64), rows=5),
    ),
    "adamw shapes": (ValueError, lambda k: step(k, ones(3), ones(4), 1)),
    "adamw step": (ValueError, lambda k: step(k, ones(3), ones(3), 0)),
    "adamw read-only p": (ValueError, lambda k: step(k, np.broadcast_to(ones(1), 3), ones(3), 1)),
    "adamw p is g": (ValueError, lambda k: step(k, *[ones(3)] * 2, 1)),
    "adamw p meets g": (ValueError, lambda k: (lambda both: step(k, both[:3], both[2:], 1))(ones(5))),
}


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, F32)


def qkv(q: tuple[int, ...], k: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    return ones(*q), ones(*k), ones(*k)


def start(kernels, starts):
    kernels.attention_forward(*qkv((1, 3, 2, 4), (1, 3, 2, 4)), np.asarray(starts), scale=1.0)


def start_backward(kernels, starts):
    (q, k, v), lse = qkv((1, 3, 2, 4), (1, 3, 2, 4)), ones(1, 2, 3)
    kernels.attention_backward(q, q, k, v, q, lse, np.asarray(starts), scale=1.0)


def step(kernels, p, g, number):
    constants = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0, "grad_scale": 1.0}
    kernels.adamw_step(p, g, ones(3), ones(3), step=number, **constants)


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_arguments_are_refused_in_the_reference_s_words(wrong, native):
    kind, call = WRONG[wrong]
    with pytest.raises(kind) as by_reference:
        call(reference)
    with pytest.raises(kind) as by_native:
        call(native)
    assert str(by_native.value) == str(by_reference.value)
    assert len(str(by_native.value)) > 20
