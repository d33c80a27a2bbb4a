"""The kernels as other processors run them: NEON on arm64 under user-mode emulation, and vector widths that
this one would not choose: 16 lanes compiled for AVX2 test the logic of the AVX-512 build without its
hardware.

The programs are statically linked, single-threaded, and compiled here; a missing compiler or emulator is a
visible skip. The ones for this processor carry AddressSanitizer and UndefinedBehaviorSanitizer, and give
outputs memory of exactly their size: the one place that sees a kernel write past the end of a result.
"""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import foreign
import numpy as np
import pytest
from kernel_cases import CASES, PACKED, ROUNDINGS, check, mismatch, normal, random_packed, rounding_mismatch
from test_bfloat16_arithmetic import SHAPES, exact, in_bfloat16, inputs, product
from test_int16_arithmetic import KINDS, in_int16
from test_int16_arithmetic import SHAPES as FEW_SHAPES
from test_int16_arithmetic import exact as exact_int16

from entrenar.kernels import reference

pytestmark = pytest.mark.tier3

SANITIZE = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-wrapv")
AVX2 = ("-mavx2", "-mfma", "-mf16c")

# name: (compiler, flags, what runs the program, the cpu flag it needs)
BUILDS = {
    "neon": ("aarch64-linux-gnu-gcc", ("-O2", "-static"), ["qemu-aarch64"], None),
    "16 lanes on AVX2": ("cc", (*AVX2, "-DENT_W=16", *SANITIZE), [], "avx2"),
    "8 lanes on the baseline": ("cc", ("-DENT_W=8", *SANITIZE), [], None),
}


def can_link(compiler: str, folder, *flags: str) -> bool:
    source = folder / "empty.c"
    source.write_text("int main(void) { return 0; }\n")
    command = [compiler, *flags, "-o", str(folder / "empty"), str(source)]
    return subprocess.run(command, capture_output=True).returncode == 0


def program(build: str, native, folder) -> list[str] | str:
    """The command that runs one build's driver, compiled here; or why there is none."""
    compiler, flags, emulator, feature = BUILDS[build]
    for tool in (compiler, *emulator):
        if not shutil.which(tool):
            return f"{build}: no {tool}"
    if feature and feature not in native.available_isas():
        return f"{build}: this machine has no {feature}"
    if not can_link(compiler, folder, *flags):
        return f"{build}: {compiler} does not link with {' '.join(flags)}"
    return [*emulator, str(foreign.compile_driver(compiler, folder, *flags))]


@pytest.fixture(scope="module")
def programs(native, tmp_path_factory):
    """Starts the drivers, of which each is compiled once, all at the same time; skips the test where one cannot be."""
    folders = [tmp_path_factory.mktemp("driver") for _ in BUILDS]
    with ThreadPoolExecutor() as pool:
        made = [pool.submit(program, build, native, folder) for build, folder in zip(BUILDS, folders, strict=True)]

    def start(build: str) -> foreign.Foreign:
        command = dict(zip(BUILDS, made, strict=True))[build].result()
        return pytest.skip(command) if isinstance(command, str) else foreign.Foreign(command)

    return start


@pytest.fixture(scope="module", params=BUILDS)
def other(request, native, programs):
    """A running driver for one build; the native wrappers use it while the module's tests do."""
    process = programs(request.param)
    with pytest.MonkeyPatch.context() as monkeypatch:
        foreign.attach(native, process, monkeypatch)
        yield process
        assert process.calls, "nothing ran in the driver"
    process.close()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.kernel)
def test_every_kernel_equals_its_reference(case, other, native):
    rng, before = np.random.default_rng(0), other.calls
    for size in (*case.sizes, *(tail(n) for tail in case.tails for n in range(1, 40))):
        args = case.make(rng, **size)
        check(native, reference, case, args)
    assert other.calls >= before + len(case.sizes)


@pytest.mark.parametrize("name", ROUNDINGS)
def test_every_rounding_gives_its_references_bits(name, other, native):
    rng = np.random.default_rng(4)
    for n in (*range(70), 1000, 4097):
        assert not rounding_mismatch(native, reference, name, normal(rng, n))
        assert not rounding_mismatch(native, reference, name, normal(rng, n) * np.float32(1e-39))


def test_products_of_every_layout(other, native):
    rng = np.random.default_rng(1)
    for M, K, N in ((1, 40, 70), (6, 16, 16), (33, 65, 17), (64, 300, 65), (130, 513, 40)):
        a, b = normal(rng, M, K), normal(rng, K, N)
        for left in (a, np.ascontiguousarray(a.T).T):
            for right in (b, np.ascontiguousarray(b.T).T):
                check(native, reference, CASES[0], {"a": left, "b": right})


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("kind", PACKED)
def test_products_in_bfloat16(kind, direction, other, native):
    rng = np.random.default_rng(5)
    for N, O, I in SHAPES:
        w = in_bfloat16(random_packed(rng, kind, O, I))
        x = inputs(rng, direction, N, w)
        assert not mismatch(product(native, direction)(x, w), *exact(direction, x, w)), (N, O, I)


@pytest.mark.parametrize("kind", KINDS)
def test_products_in_int16(kind, other, native):
    rng = np.random.default_rng(6)
    for N, O, I in FEW_SHAPES:
        w, x = in_int16(random_packed(rng, kind, O, I)), normal(rng, N, I)
        assert not mismatch(native.packed_linear(x, w), *exact_int16(x, w)), (N, O, I)
    got = native.packed_linears(x, [w, w.smooth])
    assert got[1].tobytes() == native.packed_linear(x, w.smooth).tobytes()
    assert got[0].tobytes() == native.packed_linear(x, w).tobytes()


def test_extreme_values_go_where_the_formula_takes_them(other, native):
    rng = np.random.default_rng(2)
    for case in CASES:
        args = case.make(rng, **case.sizes[1])
        name = next(name for name, x in args.items() if isinstance(x, np.ndarray) and x.dtype.kind == "f")
        for value in (np.inf, -np.inf, np.nan, 1e-40):
            planted = args | {name: args[name].copy()}
            planted[name].flat[0] = value
            check(native, reference, case, planted, extreme=True)


def test_a_write_past_the_end_of_a_result_is_found(native, programs, monkeypatch):
    """The control: a driver told that its output is one element shorter than it is."""
    process = programs("8 lanes on the baseline")
    foreign.attach(native, process, monkeypatch)
    x = normal(np.random.default_rng(3), 2, 5)
    assert native.softmax_forward(x).shape == (2, 5)
    monkeypatch.setattr(native, "empty", lambda *shape: np.empty(9, np.float32))
    with pytest.raises(AssertionError, match="heap-buffer-overflow"):
        native.softmax_forward(x)
