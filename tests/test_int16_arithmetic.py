"""compute = "int16": what the products of few rows are, on every instruction set; how far they lie from float32's;
that gradients never meet them; and where the switch may stand.

x is off by half of max |x| / 2^14 of its group of 64, a table's value by half of 1 / its scale: `off` adds that up.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from kernel_cases import TINY, bound_matmul, mismatch, normal, random_packed
from small_base import write_base

from entrenar import Tensor, nn, ops
from entrenar.formats import FormatError
from entrenar.kernels import reference
from entrenar.kernels.packed import FEW_ROWS, GROUP, INTEGER_SCALES, INTEGERS, TABLES, Packed
from entrenar.kernels.reference_packed import integer_operands
from entrenar.llama import Llama, generate
from entrenar.tensor import no_grad
from entrenar.training.config import ConfigError, FineTuning, read_config

KINDS = ("nf4", "nf4 nested", "fp4")
# (N, O, I): rows of one group and of more than the scales that are decoded at a time, rows of W in pairs and alone
SHAPES = ((1, 1, 64), (1, 7, 4160), (2, 6, 128), (3, 5, 192), (4, 33, 64), (8, 9, 320))


def in_int16(w: Packed) -> Packed:
    return dataclasses.replace(w, compute="int16")


def exact(x, w: Packed):
    """The reference in float64, and what float32's sums may add: as kernel_cases.py has it, of the rounded numbers."""
    x, W = integer_operands(x.astype(np.float64), w)
    return x @ W.T, bound_matmul(x @ W.T, x, W.T)


def off(x, w: Packed):
    """How far a product may lie from that of the numbers themselves, sums being exact."""
    x, groups = x.astype(np.float64), x.reshape(len(x), -1, GROUP)
    dx = np.repeat(np.abs(groups).max(axis=2), GROUP, axis=1) / 2**14 / 2 * (1 + 1e-6)
    whole = INTEGERS[w.kind] / INTEGER_SCALES[w.kind]
    dtable = np.abs(whole - TABLES[w.kind]).max()
    W = np.abs(reference.unpack(w).astype(np.float64))
    absmax = reference.unpack(dataclasses.replace(w, codes=np.full_like(w.codes, 0xFF if w.kind == "nf4" else 0x33)))
    dW = dtable * np.abs(absmax.astype(np.float64))
    return dx @ (W + dW).T + np.abs(x) @ dW.T


# -- the kernels


@pytest.mark.tier1
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_whole_numbers(kind, isa, native):
    rng = np.random.default_rng(0)
    for N, O, I in SHAPES:
        w, x = in_int16(random_packed(rng, kind, O, I)), normal(rng, N, I)
        x[:, : I // 2] *= 100  # groups of unequal size
        want, bound = exact(x, w)
        np.testing.assert_allclose(reference.packed_linear(x.astype(np.float64), w), want, rtol=1e-13, atol=1e-13)
        assert not mismatch(native.packed_linear(x, w), want, bound), (N, O, I)


def test_products_of_numbers_not_rounded_are_told_apart(native):
    """The check above, of the float32 product: it must fail."""
    rng = np.random.default_rng(1)
    w, x = random_packed(rng, "nf4", 70, 256), normal(rng, 1, 256)
    assert mismatch(native.packed_linear(x, w), *exact(x, in_int16(w)))


@pytest.mark.parametrize("kind", KINDS)
def test_products_lie_as_far_from_exact_ones_as_roundings_allow(kind, isa, native):
    """And a table of 12 bits, or x of 12 bits, would not."""
    rng = np.random.default_rng(2)
    w, x = random_packed(rng, kind, 200, 512), normal(rng, 4, 512)
    W = reference.unpack(w).astype(np.float64)
    want = x.astype(np.float64) @ W.T
    float32 = bound_matmul(want, x.astype(np.float64), W.T)
    assert not mismatch(native.packed_linear(x, in_int16(w)), want, off(x, w) + float32)
    step = np.repeat(np.abs(x.reshape(4, -1, GROUP)).max(axis=2), GROUP, axis=1) / 2**7
    coarse = (np.rint(x / step) * step).astype(np.float32)
    assert mismatch(native.packed_linear(coarse, w), want, off(x, w) + float32)


def test_sums_of_a_group_are_exact_in_32_bits(isa, native):
    """The greatest numbers there are, all of one sign and of both; a sum past 2^31 would come out with another."""
    for kind, most in (("nf4", 0xFF), ("fp4", 0x33)):
        for x in (np.ones((1, 64), np.float32), -np.ones((1, 64), np.float32)):
            w = in_int16(Packed(kind, (1, 64), np.full(32, most, np.uint8), np.ones(1, np.float32)))
            np.testing.assert_array_equal(native.packed_linear(x, w), [[x.sum()]])
        assert 8 * int(np.abs(INTEGERS[kind]).max()) * 2**14 < 2**31


def test_every_code_meets_its_own_number_of_x(isa, native):
    """One number of x at a time, a power of two: the product is the value of the table, to its rounding."""
    rng = np.random.default_rng(3)
    w = in_int16(random_packed(rng, "nf4", 3, 128))
    W = integer_operands(np.ones((1, 128)), w)[1]
    for i in range(128):
        x = np.zeros((1, 128), np.float32)
        x[0, i] = 4
        np.testing.assert_allclose(native.packed_linear(x, w)[0], 4 * W[:, i], rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_among_few_has_the_bits_it_has_alone_and_many_rows_are_float32(kind, isa, native):
    rng = np.random.default_rng(4)
    w = random_packed(rng, kind, 7, 192)
    x, fixed = normal(rng, FEW_ROWS + 1, 192), in_int16(w)
    alone = np.concatenate([native.packed_linear(row[None], fixed) for row in x])
    for N in range(1, FEW_ROWS + 1):
        assert native.packed_linear(x[:N], fixed).tobytes() == alone[:N].tobytes(), N
    assert native.packed_linear(x, fixed).tobytes() == native.packed_linear(x, w).tobytes()


@pytest.mark.parametrize("kind, I, block", [("q8_0", 64, 32), ("bfloat16", 64, 64), ("nf4", 100, 64), ("nf4", 64, 32),
                                            ("fp4", 128, 128)])  # fmt: skip
def test_what_has_no_whole_groups_of_a_table_stays_float32(kind, I, block, isa, native):
    rng = np.random.default_rng(5)
    w, x = random_packed(rng, kind, 6, I, block=block), normal(rng, 2, I)
    assert not in_int16(w).in_integers
    assert native.packed_linear(x, in_int16(w)).tobytes() == native.packed_linear(x, w).tobytes()


def test_several_matrices_at_once_of_either_arithmetic_have_the_bits_of_one_after_the_other(isa, native, thread_count):
    rng = np.random.default_rng(6)
    ws = [in_int16(random_packed(rng, "nf4 nested", 900, 1024)), random_packed(rng, "nf4", 300, 1024),
          random_packed(rng, "bfloat16", 5, 1024), in_int16(random_packed(rng, "fp4", 301, 1024))]  # fmt: skip
    for N in (1, 3, FEW_ROWS + 1):
        x, found = normal(rng, N, 1024), set()
        for threads in (1, 2, 3, 4, 8):
            thread_count(threads)
            got = [y.tobytes() for y in native.packed_linears(x, ws)]
            assert got == [native.packed_linear(x, w).tobytes() for w in ws]
            found.add(b"".join(got))
        assert len(found) == 1


def test_zeros_denormal_and_largest_numbers(isa, native):
    rng = np.random.default_rng(7)
    w = in_int16(random_packed(rng, "nf4", 5, 128))
    largest = np.float32(np.finfo(np.float32).max)
    for scale in (0.0, 1e-45, 1e-38, 1e-34, float(largest) / 1e3):
        x = (np.sign(normal(rng, 1, 128)) * np.float32(scale)).astype(np.float32)
        want, bound = exact(x, w)
        assert not mismatch(native.packed_linear(x, w), want, bound + TINY), scale


def test_inf_and_nan_in_a_row_stay_in_its_product(isa, native):
    rng = np.random.default_rng(8)
    w, x = in_int16(random_packed(rng, "nf4", 6, 128)), normal(rng, 3, 128)
    plain = native.packed_linear(x, w)
    for value in (np.inf, -np.inf, np.nan):
        x[1, 70] = value
        for got in (native.packed_linear(x, w), reference.packed_linear(x, w)):
            assert not np.isfinite(got[1]).any()
        assert np.delete(native.packed_linear(x, w), 1, 0).tobytes() == np.delete(plain, 1, 0).tobytes()


# -- gradients


def test_what_is_recorded_is_float32_and_so_is_the_gradient(native):
    rng = np.random.default_rng(9)
    w = random_packed(rng, "nf4", 10, 64)
    x, fixed = Tensor(normal(rng, 2, 64), requires_grad=True), in_int16(w)
    plain, rounded = native.packed_linear(x.data, w), native.packed_linear(x.data, fixed)
    assert plain.tobytes() != rounded.tobytes()
    layers = [nn.Linear(64, 10), nn.Linear(64, 10)]
    for layer in layers:
        layer.weight = fixed
    assert ops.linear(x, fixed).data.tobytes() == plain.tobytes()
    assert {y.data.tobytes() for y in nn.side_by_side(x, *layers)} == {plain.tobytes()}
    with no_grad():
        assert ops.linear(x, fixed).data.tobytes() == rounded.tobytes()
        assert {y.data.tobytes() for y in nn.side_by_side(x, *layers)} == {rounded.tobytes()}
    ops.linear(x, fixed).sum().backward()
    np.testing.assert_array_equal(x.grad, native.packed_linear_backward(np.ones((2, 10), np.float32), w))
    assert fixed.smooth is fixed.smooth and fixed.smooth.codes is fixed.codes and w.smooth is w


# -- the switch


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("models") / "base")


def test_text_written_in_int16_is_the_text_of_float32(base):
    found = [list(generate(Llama.from_pretrained(base, storage="nf4", compute=compute), [1, 2, 3], max_new_tokens=40,
                           temperature=0)) for compute in ("float32", "int16")]  # fmt: skip
    assert found[0] == found[1]


def test_logits_are_less_than_a_hundredth_of_nf4s_own_error_away(base):
    ids = np.array([[1, 2, 3, 4]])
    with no_grad():
        floats, plain, fixed = (
            Llama.from_pretrained(base, **how).forward(ids).data
            for how in ({}, {"storage": "nf4"}, {"storage": "nf4", "compute": "int16"})
        )
    assert 0 < np.linalg.norm(fixed - plain) < 1e-2 * np.linalg.norm(plain - floats)


def test_weights_that_are_not_in_4_bits_refuse_it(base):
    for storage in ("q8_0", "bfloat16", "stored"):
        with pytest.raises(FormatError, match="none of its weights are in 4 bits.*storage = nf4"):
            Llama.from_pretrained(base, storage=storage, compute="int16")
    with pytest.raises(ValueError, match="is for frozen weights in a storage format"):
        Llama.from_pretrained(base, compute="int16")


def test_a_run_that_trains_refuses_it():
    rest = [("base.model", "base"), ("data.source", "rows.jsonl"), ("base.storage", "nf4"), ("base.compute", "int16")]
    with pytest.raises(ConfigError, match=r"base\.compute.*float32, bfloat16"):
        read_config(None, rest, FineTuning)
