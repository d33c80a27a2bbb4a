"""The kernels of packed matrices beyond the table in kernel_cases.py: decoding is exact, bit for bit; a product is that
of the decoded matrix; no dequantized matrix is ever made; and what a Packed refuses.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import tracemalloc
import weakref

import numpy as np
import pytest
from kernel_cases import PACKED, bound_matmul, mismatch, normal, random_packed

from entrenar import Tensor, kernels, nn, ops
from entrenar.gradcheck import gradcheck
from entrenar.kernels import reference
from entrenar.kernels.memory import HUGE, TOGETHER, Lasting, lasting
from entrenar.kernels.packed import FP4, NF4, Nested, Packed
from entrenar.llama import LlamaConfig
from entrenar.llama.model import MLP
from entrenar.tensor import no_grad, watched

SHAPES = ((1, 1), (3, 5), (7, 64), (5, 200), (2, 4160), (3, 16448), (70, 130))


@pytest.mark.parametrize("kind", PACKED)
def test_decoding_in_c_gives_the_references_bits(kind, isa, native):
    rng = np.random.default_rng(0)
    for O, I in SHAPES:
        for block in (2, 32, 64, 4096):
            w = random_packed(rng, kind, O, I, block=block)
            want = reference.unpack(w)
            assert native.unpack(w).tobytes() == want.tobytes(), (O, I, block)
            ids = rng.integers(0, O, (2, 3))
            assert native.unpack_rows(ids, w).tobytes() == want[ids].tobytes(), (O, I, block)


def test_a_value_is_the_tables_times_the_blocks_scale_the_high_nibble_first():
    w = Packed("nf4", (1, 4), np.array([0x0F, 0x7C], np.uint8), np.array([2, 10], np.float32), block=2)
    np.testing.assert_array_equal(reference.unpack(w), [[-2, 2, 0, 10 * NF4[12]]])
    w = dataclasses.replace(w, kind="fp4")
    np.testing.assert_array_equal(reference.unpack(w), [[0, 2 * FP4[15], 10 * FP4[7], 10 * FP4[12]]])


def test_nested_scales_are_rounded_after_the_product_and_after_the_sum(isa, native):
    """As bitsandbytes does it; a fused multiply-add gives other bits, as the last line shows for these numbers."""
    rng = np.random.default_rng(1)
    w = random_packed(rng, "nf4 nested", 300, 64)
    n = w.scales
    w = dataclasses.replace(w, scales=dataclasses.replace(n, offset=0.1), codes=np.zeros_like(w.codes))  # all are -1
    product = n.table[n.codes] * np.repeat(n.absmax, 256)[: n.size]
    twice = product + np.float32(0.1)
    np.testing.assert_array_equal(native.unpack(w)[:, 0], -twice)
    exact = n.table[n.codes].astype(np.float64) * np.repeat(n.absmax, 256)[: n.size] + np.float64(np.float32(0.1))
    assert (exact.astype(np.float32) != twice).any()


@pytest.mark.parametrize("kind", PACKED)
def test_a_product_of_many_rows_has_the_bits_of_the_decoded_matrixs(kind, isa, native):
    rng = np.random.default_rng(2)
    for N, O, I in ((9, 9, 9), (40, 70, 100), (33, 65, 520), (100, 2100, 64)):
        w = random_packed(rng, kind, O, I)
        W = native.unpack(w)
        x, dy = normal(rng, N, I), normal(rng, N, O)
        assert native.packed_linear(x, w).tobytes() == native.matmul(x, W.T).tobytes()
        assert native.packed_linear_backward(dy, w).tobytes() == native.matmul(dy, W).tobytes()


@pytest.mark.parametrize("kind", ["nf4", "bfloat16"])
def test_rows_that_are_turned_have_the_bits_of_those_that_are_not(kind, isa, native):
    """Up to 256 rows times a transposed weight are a product turned around, in several passes where k is large."""
    rng = np.random.default_rng(21)
    w = random_packed(rng, kind, 150, 2600)
    W_t, x, c = native.unpack(w).T, normal(rng, 300, 2600), normal(rng, 300, 150)
    many, added = native.packed_linear(x, w), c.copy()
    native.matmul_add(added, x, W_t)
    for N in (200, 256, 257):
        assert native.packed_linear(x[:N], w).tobytes() == many[:N].tobytes()
        assert native.matmul(x[:N], W_t).tobytes() == many[:N].tobytes()
        some = c[:N].copy()
        native.matmul_add(some, x[:N], W_t)
        assert some.tobytes() == added[:N].tobytes()


def test_rows_that_are_turned_in_several_passes_have_the_same_bits_on_any_number_of_threads(isa, native, thread_count):
    """128 x 256 are cut both ways for eight threads: each part's rows are fewer, and so are its passes."""
    rng = np.random.default_rng(22)
    x, W = normal(rng, 128, 9000), normal(rng, 256, 9000)
    got = set()
    for threads in (1, 2, 8):
        thread_count(threads)
        got.add(native.matmul(x, W.T).tobytes())
    assert len(got) == 1


@pytest.mark.parametrize("kind", PACKED)
def test_a_product_of_few_rows_is_as_exact_as_one_of_floats(kind, isa, native):
    """Rows longer than the scales that are decoded at a time, rows of W in groups and left over, every number of x."""
    rng = np.random.default_rng(8)
    w = random_packed(rng, kind, 7, 4160, block=32 if kind == "q8_0" else 64)
    W = reference.unpack(w).astype(np.float64)
    for N in (1, 2, 3, 4, 5, 8):
        x, dy = normal(rng, N, 4160), normal(rng, N, 7)
        for got, (a, b) in ((native.packed_linear(x, w), (x, W.T)), (native.packed_linear_backward(dy, w), (dy, W))):
            want = a.astype(np.float64) @ b
            problem = mismatch(got, want, bound_matmul(want, a.astype(np.float64), b))
            assert not problem, f"{N} rows: {problem}"
            coarse = want * (1 + 2.0**-8)  # as of a table in bfloat16
            assert mismatch(coarse.astype(np.float32), want, bound_matmul(want, a.astype(np.float64), b))


@pytest.mark.parametrize("kind", PACKED)
def test_a_row_among_few_has_the_bits_it_has_alone(kind, isa, native):
    rng = np.random.default_rng(10)
    w, x = random_packed(rng, kind, 7, 192), normal(rng, 8, 192)
    alone = np.concatenate([native.packed_linear(row[None], w) for row in x])
    for N in range(1, 9):
        assert native.packed_linear(x[:N], w).tobytes() == alone[:N].tobytes(), N


@pytest.mark.parametrize("N", [0, 1, 3, 8, 9])
@pytest.mark.parametrize("kinds", [("bfloat16",) * 3, ("nf4 nested", "bfloat16", "q8_0"), ("nf4",) * 2, ("fp4",), ()])
def test_several_matrices_at_once_have_the_bits_of_one_after_the_other(N, kinds, isa, native, thread_count):
    """Few rows and many, matrices of unequal height, too low for all threads, and as high as makes threads worth it."""
    rng = np.random.default_rng(12)
    for I, heights in ((192, (6, 33, 1)), (100, (5, 8, 3)), (1024, (900, 0, 301))):
        x, ws = normal(rng, N, I), [random_packed(rng, kind, O, I) for kind, O in zip(kinds, heights, strict=False)]
        for threads in (1, 2, 3):
            thread_count(threads)
            got = native.packed_linears(x, ws)
            assert [y.shape for y in got] == [(N, w.shape[0]) for w in ws]
            for y, w in zip(got, ws, strict=True):
                assert y.tobytes() == native.packed_linear(x, w).tobytes(), (I, threads, w.kind, w.shape)


@pytest.mark.parametrize("N", [0, 1, 3, 8, 9])
@pytest.mark.parametrize("kinds", [("bfloat16",) * 3, ("nf4", "q8_0", "fp4"), ("q8_0", "nf4 nested", "nf4")])
def test_feed_forward_at_once_has_the_bits_of_one_product_after_the_other(N, kinds, isa, native, thread_count):
    """Wider than it is high and higher than it is wide, in whole steps and not, worth threads and not; int16 too."""
    rng = np.random.default_rng(14)
    for I, F, O in ((64, 192, 64), (192, 64, 100), (100, 30, 5), (1024, 512, 600)):
        gate, up, down = (
            random_packed(rng, kind, *shape) for kind, shape in zip(kinds, ((F, I), (F, I), (O, F)), strict=True)
        )
        x = normal(rng, N, I)
        for compute in ("float32", "int16"):
            ws = [dataclasses.replace(w, compute=compute) for w in (gate, up, down)]
            for threads in (1, 2, 3):
                thread_count(threads)
                h = native.swiglu_forward(*native.packed_linears(x, ws[:2]))
                got = native.packed_mlp(x, *ws)
                assert got.shape == (N, O)
                assert got.tobytes() == native.packed_linear(h, ws[2]).tobytes(), (I, F, O, compute, threads)
        precise = native.packed_mlp(x.astype(np.float64), gate, up, down)
        assert precise.dtype == np.float64
        assert precise.tobytes() == reference.packed_mlp(x.astype(np.float64), gate, up, down).tobytes()


def test_feed_forward_refuses_matrices_that_do_not_follow_one_another(native):
    rng = np.random.default_rng(15)
    gate, up, down, x = (random_packed(rng, "bfloat16", *s) for s in ((6, 64), (5, 64), (64, 6), (1, 64)))
    for backend in (native, reference):
        with pytest.raises(ValueError, match=r"wants gate \(F, I\).*got \(6, 64\), \(5, 64\) and \(64, 6\)"):
            backend.packed_mlp(normal(rng, 1, 64), gate, up, down)
        with pytest.raises(ValueError, match=r"wants rows of shape \(N, 64\), got \(1, 6\)"):
            backend.packed_mlp(normal(rng, 1, 6), gate, gate, down)


def test_a_llamas_feed_forward_is_one_kernel_for_few_rows_that_nobody_records_or_watches(monkeypatch):
    rng, calls = np.random.default_rng(16), []
    mlp = MLP(LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=1,
                          vocab_size=8), np.float32)  # fmt: skip
    together = kernels.packed_mlp
    monkeypatch.setattr(kernels, "packed_mlp", lambda *args: calls.append(1) or together(*args))

    def same_and_calls(x: Tensor) -> int:
        calls.clear()
        want = mlp.down_proj(ops.swiglu(mlp.gate_proj(x), mlp.up_proj(x))).data
        assert mlp(x).data.tobytes() == want.tobytes()
        return len(calls)

    few, many = (Tensor(normal(rng, 1, T, 64)) for T in (8, 9))
    with no_grad():
        assert same_and_calls(few) == 0  # weights are floats
        for _, layer in mlp.children():
            layer.weight = random_packed(rng, "nf4", *layer.weight.shape)
        assert same_and_calls(few) == 1
        assert same_and_calls(many) == 0
        with watched(Watches()):
            assert same_and_calls(few) == 0
    assert same_and_calls(Tensor(few.data, requires_grad=True)) == 0


def test_layers_side_by_side_are_one_kernel_where_nobody_records_or_watches_them(monkeypatch):
    rng, calls = np.random.default_rng(13), []
    layers = [nn.Linear(64, outputs) for outputs in (10, 6)]
    x = Tensor(normal(rng, 2, 3, 64), requires_grad=True)
    together = kernels.packed_linears
    monkeypatch.setattr(kernels, "packed_linears", lambda x, ws: calls.append(len(ws)) or together(x, ws))

    def same_and_together(expected):
        """Whether the values are those of one layer after the other, and who made them."""
        calls.clear()
        got, want = nn.side_by_side(x, *layers), [layer(x) for layer in layers]
        if calls != expected or any(g.data.tobytes() != w.data.tobytes() for g, w in zip(got, want, strict=True)):
            return False
        cut = nn.side_by_side(x, *layers, width=2)
        return [y.shape for y in cut] == [(2, 3, 5, 2), (2, 3, 3, 2)] and all(
            c.data.tobytes() == g.data.tobytes() for c, g in zip(cut, got, strict=True))

    with no_grad():
        assert same_and_together([])  # weights are floats
        for layer in layers:
            layer.weight = random_packed(rng, "nf4", *layer.weight.shape)
        assert same_and_together([2])
        with watched(Watches()):
            assert same_and_together([])
        layers[1].bias = Tensor(normal(rng, 6))
        assert same_and_together([])
        layers[1].bias = None
    assert same_and_together([])  # x wants a gradient
    sum(y.sum() for y in nn.side_by_side(x, *layers)).backward()
    assert x.grad is not None and np.abs(x.grad).max() > 0


class Watches:
    def forward(self, op, inputs, out):
        pass

    def inside(self, module):
        return contextlib.nullcontext()


@pytest.mark.parametrize("kind", PACKED)
def test_inf_and_nan_in_a_row_stay_in_its_product(kind, isa, native):
    rng = np.random.default_rng(9)
    w, x = random_packed(rng, kind, 6, 128), normal(rng, 3, 128)
    plain = native.packed_linear(x, w)
    for value in (np.inf, np.nan):
        x[1, 70] = value
        got = native.packed_linear(x, w)
        assert not np.isfinite(got[1]).any()
        assert np.delete(got, 1, 0).tobytes() == np.delete(plain, 1, 0).tobytes()


@pytest.mark.parametrize("kind", PACKED)
def test_the_head_and_its_loss_take_a_packed_matrix(kind, isa, native):
    rng = np.random.default_rng(3)
    x, w, targets = normal(rng, 30, 64), random_packed(rng, kind, 70, 64), rng.integers(0, 70, 30)
    constants = {"ignore_index": -100, "scale": 0.5, "need_dx": True, "need_dw": False}
    got = native.linear_cross_entropy(x, w, targets, **constants)
    want = native.linear_cross_entropy(x, native.unpack(w), targets, **constants)
    assert got[0].tobytes() == want[0].tobytes() and got[1].tobytes() == want[1].tobytes() and got[2] is None
    with pytest.raises(ValueError, match="packed .nf4|packed"):
        native.linear_cross_entropy(x, w, targets, **constants | {"need_dw": True})


def test_no_dequantized_matrix_is_made(native):
    """What a forward and a backward allocate is their results: W as floats would be 16 MB."""
    rng = np.random.default_rng(4)
    w, x = random_packed(rng, "nf4 nested", 2048, 2048), normal(rng, 16, 2048)
    native.packed_linear(x, w), native.packed_linear_backward(x, w)  # scratch memory, once
    tracemalloc.start()
    for rows in (x, x[:1]):
        native.packed_linear(rows, w), native.packed_linear_backward(rows, w)
    peak = tracemalloc.get_traced_memory()[1]
    native.unpack(w)
    control = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * x.nbytes + 100_000 < 16e6 < control


def test_layers_take_a_packed_weight_and_keep_no_input():
    rng = np.random.default_rng(5)
    layer, w = nn.Linear(64, 10), random_packed(rng, "nf4 nested", 10, 64)
    layer.weight = w
    assert list(layer.named_parameters()) == [] and dict(nn_packed(layer)) == {"layer.weight": w}
    x = Tensor(normal(rng, 2, 3, 64), requires_grad=True)
    y = layer(x)
    assert all(not isinstance(kept, np.ndarray) for kept in y.op.saved)
    y.sum().backward()
    np.testing.assert_allclose(x.grad[0, 0], kernels.unpack(w).sum(axis=0), rtol=1e-4, atol=1e-5)
    table = nn.Embedding(10, 64)
    table.weight = w
    np.testing.assert_array_equal(table(np.array([[1, 9]])).data, kernels.unpack(w)[[[1, 9]]])


def nn_packed(layer):
    class Holder(nn.Module):
        def __init__(self):
            self.layer = layer

    return Holder().named_packed()


def test_packed_layers_in_float64_pass_finite_differences():
    rng = np.random.default_rng(6)
    w = random_packed(rng, "nf4 nested", 5, 12)
    gradcheck(lambda x: ops.linear(x, w), Tensor(rng.normal(size=(3, 12)), requires_grad=True))


BAD = {
    "wanted one of the kinds": {"kind": "int3"},
    "wanted a shape": {"shape": (4,)},
    "codes: wanted uint8 .128,., contiguous, got uint8 .127,.": {"codes": np.zeros(127, np.uint8)},
    "codes: wanted uint8 .128,., contiguous, got int8": {"codes": np.zeros(128, np.int8)},
    "codes: wanted an array, got list": {"codes": [1]},
    "scales: wanted float32 .4,., contiguous, got float32 .3,.": {"scales": np.zeros(3, np.float32)},
    "scales: wanted an array, got NoneType": {"scales": None},
    "block = 63: wanted an even number": {"block": 63},
    "block = 0": {"block": 0},
    "nested codes: wanted uint8 .4,.": {
        "scales": Nested(np.zeros(5, np.uint8), np.zeros(256, np.float32), np.zeros(1, np.float32), 0.0)
    },
    "nested absmax: wanted float32 .1,.": {
        "scales": Nested(np.zeros(4, np.uint8), np.zeros(256, np.float32), np.zeros(2, np.float32), 0.0)
    },
    "offset = nan": {
        "scales": Nested(np.zeros(4, np.uint8), np.zeros(256, np.float32), np.zeros(1, np.float32), float("nan"))
    },
}


@pytest.mark.parametrize("message", BAD)
def test_a_packed_that_does_not_fit_its_shape_is_refused(message):
    good = {"kind": "nf4", "shape": (4, 64), "codes": np.zeros(128, np.uint8), "scales": np.zeros(4, np.float32)}
    Packed(**good)
    with pytest.raises(ValueError, match=message):
        Packed(**good | BAD[message])


def test_rows_that_do_not_fit_a_packed_matrix_are_refused(native):
    w = random_packed(np.random.default_rng(7), "nf4", 4, 64)
    for call, shape in ((native.packed_linear, (3, 4)), (native.packed_linear_backward, (3, 64))):
        with pytest.raises(ValueError, match=r"a packed matrix of shape \(4, 64\) wants rows of shape"):
            call(np.zeros(shape, np.float32), w)
    with pytest.raises(IndexError, match="unpack_rows: ids"):
        native.unpack_rows(np.array([4]), w)


def test_matmul_add_refuses_what_it_would_overwrite(native):
    c = np.zeros((4, 4), np.float32)
    with pytest.raises(ValueError, match="changes in place"):
        native.matmul_add(c, c, np.ones((4, 4), np.float32))
    with pytest.raises(ValueError, match="wants c"):
        native.matmul_add(c, np.ones((4, 3), np.float32), np.ones((4, 4), np.float32))


# Where codes lie


def test_small_arrays_that_stay_lie_in_one_piece_and_large_ones_alone():
    make = Lasting()
    arrays = [make(count, dtype) for count, dtype in ((1000, np.uint8), (7, np.uint16), (0, np.int8), (64, np.uint16))]
    assert [(a.shape, a.dtype) for a in arrays] == [
        ((1000,), np.uint8), ((7,), np.uint16), ((0,), np.int8), ((64,), np.uint16)]  # fmt: skip
    piece = arrays[0].base
    assert HUGE <= piece.nbytes < HUGE + 100 and all(a.base is piece for a in arrays)
    assert all(a.ctypes.data % 64 == 0 and a.flags.carray for a in arrays if a.size)
    for value, a in enumerate(arrays):
        a[:] = value
    assert all((a == value).all() for value, a in enumerate(arrays)), "they overlap"
    assert make(HUGE, np.uint8).base is None


def test_a_piece_that_is_full_is_followed_by_another():
    make = Lasting()
    arrays = [make(HUGE * 3 // 4, np.uint8) for _ in range(10)]
    sizes = list({id(a.base): a.base.nbytes for a in arrays}.values())
    assert sizes == [HUGE + 64, 2 * (HUGE + 64), TOGETHER, TOGETHER]
    for a in arrays:
        start = a.ctypes.data - a.base.ctypes.data
        assert 0 <= start and start + a.nbytes <= a.base.nbytes


def test_a_piece_is_freed_with_the_last_array_in_it():
    make = Lasting()
    one, other = make(10, np.uint8), make(10, np.uint8)
    piece = weakref.ref(one.base)
    del one
    assert piece() is other.base
    del other
    assert piece() is None
    assert make(10, np.uint8).nbytes == 10


def test_each_thread_has_pieces_of_its_own():
    here, there = [lasting(10, np.uint8)], []
    thread = threading.Thread(target=lambda: there.append(lasting(10, np.uint8)))
    thread.start()
    thread.join()
    assert here[0].base is not there[0].base
