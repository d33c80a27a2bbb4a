"""The kernels that round to a storage format: C gives the reference's bits, on every instruction set, for any length,
number of threads and layout; and what the reference does at its edges.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from kernel_cases import ROUNDINGS, normal, rounding_mismatch

from entrenar.kernels import reference
from entrenar.kernels.packed import FP4, NF4
from entrenar.kernels.reference_quantize import decisions

F32 = np.float32
every_rounding = pytest.mark.parametrize("name", ROUNDINGS)


def hard(n: int, rng: np.random.Generator) -> np.ndarray:
    """Numbers of all sizes, zeros of both signs, subnormal ones, blocks of nothing else, and equal ones."""
    x = normal(rng, n) * F32(10) ** rng.integers(-44, 38, n).astype(F32)
    x[rng.random(n) < 0.1] = -0.0
    x[n // 3 : n // 2] *= F32(1e-40)
    x[n // 2 : n // 2 + n // 8] = 0
    x[-n // 8 :] = 3
    return x


@every_rounding
def test_c_gives_the_references_bits(name, isa, native):
    rng = np.random.default_rng(0)
    for n in (*range(135), 4095, 4096, 4097, 50_000, 100_001):
        for x in (normal(rng, n), hard(n, rng)):
            assert not rounding_mismatch(native, reference, name, x)


@every_rounding
def test_the_bits_do_not_depend_on_the_number_of_threads(name, isa, native):
    x, before = hard(300_001, np.random.default_rng(1)), native.get_num_threads()
    try:
        for threads in (1, 2, 3, 4):
            native.set_num_threads(threads)
            assert not rounding_mismatch(native, reference, name, x)
    finally:
        native.set_num_threads(before)


@every_rounding
def test_any_layout_and_float_type_is_taken(name, native):
    rng = np.random.default_rng(2)
    x = normal(rng, 400)
    read_only = x.copy()
    read_only.setflags(write=False)
    misaligned = np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(F32)
    for view in (x[::2], x[::-1], read_only, misaligned, x.astype(">f4"), x.astype(np.float64), x.astype(np.float16)):
        before = view.tobytes()
        assert not rounding_mismatch(native, reference, name, view)
        assert view.tobytes() == before


@pytest.mark.parametrize("fault", [0, 1])
def test_a_wrong_bit_is_found(fault):
    class Faulty:
        def quantize_4bit(self, x, **constants):
            outputs = reference.quantize_4bit(x, **constants)
            outputs[fault].view(np.uint8)[3] ^= 1
            return outputs

    x = normal(np.random.default_rng(3), 200)
    assert "differs at" in rounding_mismatch(Faulty(), reference, "quantize_4bit nf4 64", x)


@pytest.mark.parametrize("x, constants, message", [
    (np.ones((2, 2), F32), {"kind": "nf4", "block": 64}, r"wants floats of shape \(n,\), got float32 \(2, 2\)"),
    (np.ones(4, np.int8), {"kind": "nf4", "block": 64}, r"got int8 \(4,\)"),
    (np.ones(4, F32), {"kind": "nf3", "block": 64}, "kind = 'nf3', block = 64: wanted nf4 or fp4 and an even number"),
    (np.ones(4, F32), {"kind": "fp4", "block": 3}, "block = 3"),
    (np.ones(4, F32), {"kind": "fp4", "block": 0}, "block = 0"),
])  # fmt: skip
def test_what_cannot_be_quantized_is_refused_alike(native, x, constants, message):
    for kernels in (native, reference):
        with pytest.raises(ValueError, match=message):
            kernels.quantize_4bit(x, **constants)


# The specification at its edges


def test_every_value_of_a_table_becomes_its_own_code():
    for kind, table in (("nf4", NF4), ("fp4", FP4)):
        codes, absmax = reference.quantize_4bit(table * 2, kind=kind, block=16)
        got = np.stack([codes >> 4, codes & 15], axis=1).reshape(-1)
        np.testing.assert_array_equal(table[got], table)
        assert absmax.tolist() == [2] and (kind == "fp4" or got.tolist() == list(range(16)))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_halfway_goes_down(kind):
    bounds, order = decisions(kind)
    x = np.append(bounds, F32(1))
    codes, _ = reference.quantize_4bit(x, kind=kind, block=16)
    got = np.stack([codes >> 4, codes & 15], axis=1).reshape(-1)
    first = np.searchsorted(bounds, bounds, side="left")  # FP4 has two zeros: the bound between them is itself 0
    assert got.tolist() == [*order[first], order[15]]


def test_an_odd_length_is_filled_with_a_zero_and_a_block_of_zeros_stays_one():
    codes, absmax = reference.quantize_4bit(np.array([3, 0, -3], F32), kind="nf4", block=2)
    assert codes.tolist() == [0xF7, 0x07] and absmax.tolist() == [3, 3]
    codes, absmax = reference.quantize_4bit(np.zeros(130, F32), kind="nf4", block=64)
    assert set(codes) == {0x77} and absmax.tolist() == [0, 0, F32(1e-38)], "the floor of a shorter last block"


def test_bfloat16_rounds_as_ml_dtypes_does_and_keeps_nan(native):
    bits = np.arange(1 << 16, dtype=np.uint32) << 16
    x = np.concatenate([bits + more for more in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]).view(F32)
    for kernels in (native, reference):
        y = kernels.round_bfloat16(x)
        with np.errstate(over="ignore", invalid="ignore"):
            want = x.astype(ml_dtypes.bfloat16).view(np.uint16)
        nan = np.isnan(x)
        np.testing.assert_array_equal(y[~nan], want[~nan])
        assert np.isnan(y[nan].view(ml_dtypes.bfloat16).astype(F32)).all()
