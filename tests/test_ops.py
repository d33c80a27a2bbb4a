"""Every op on every case of the table in cases.py: its gradients, and what an op owes the engine."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
from cases import CASES, Case, first_of_each_op, ops_without_case

from entrenar import Op, Tensor, gradcheck, no_grad, ops

TIER1 = first_of_each_op(CASES)
FULL = [case for case in CASES if not case.empty]


def every(cases: list[Case]) -> pytest.MarkDecorator:
    """One test per case, the first of each op in tier 1."""
    marked = [pytest.param(c, id=c.name, marks=[pytest.mark.tier1] if c in TIER1 else []) for c in cases]
    return pytest.mark.parametrize("case", marked)


def each(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def dout_for(y: Tensor, seed: int = 7) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=y.shape).astype(y.dtype)


def gradients(case: Case, tensors: list[Tensor], dout: np.ndarray | None = None) -> list[np.ndarray]:
    for x in tensors:
        x.grad = None
    y = case.fn(*tensors)
    y.backward(dout_for(y) if dout is None else dout)
    return [x.grad for x in tensors]


def assert_near(found, wanted, rtol: float) -> None:
    """Every element within rtol of the greatest, or of 1: inputs are of that size, and sums may cancel."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max(initial=0) <= rtol * np.abs(wanted).max(initial=1)


# -- the table is complete


@pytest.mark.tier1
def test_every_op_has_a_case():
    assert ops_without_case(ops.__all__, CASES) == []


@pytest.mark.tier1
def test_an_op_without_a_case_is_found():
    assert ops_without_case(ops.__all__, [c for c in CASES if c.op != "tanh"]) == ["tanh"]
    assert ops_without_case([*ops.__all__, "brand_new"], CASES) == ["brand_new"]


def test_case_names_are_unique():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)


# -- gradients


@every(CASES)
def test_gradient_in_float64(case):
    tensors = case.tensors()
    gradcheck(case.fn, *tensors, stencil=case.stencil, allow_zero=case.empty or case.zero)


@every(FULL)
def test_gradient_in_float32(case):
    tensors = case.tensors(np.float32)
    gradcheck(case.fn, *tensors, stencil=case.stencil, allow_zero=case.zero)


@each(CASES)
def test_gradient_is_linear_in_the_output_gradient(case):
    tensors = case.tensors()
    y = case.fn(*tensors)
    first, second = dout_for(y, 1), dout_for(y, 2)
    apart = zip(gradients(case, tensors, first), gradients(case, tensors, second), strict=True)
    together = gradients(case, tensors, 2 * first - 3 * second)
    for (d1, d2), d in zip(apart, together, strict=True):
        # 1e-12 of the terms, not of their sum, which may cancel
        assert np.abs(d - (2 * d1 - 3 * d2)).max(initial=0) <= 1e-12 * (np.abs(d1) + np.abs(d2)).max(
            initial=0
        )


@each(CASES)
def test_gradients_accumulate(case):
    once = gradients(case, case.tensors())
    tensors = case.tensors()
    for _ in range(2):
        y = case.fn(*tensors)
        y.backward(dout_for(y))
    for x, dx in zip(tensors, once, strict=True):
        assert_near(x.grad, 2 * dx, 1e-14)


@each([case for case in CASES if len(case.shapes) > 1])
def test_a_frozen_input_changes_no_other_gradient(case):
    wanted = gradients(case, case.tensors())
    for i in range(len(wanted)):
        tensors = [Tensor(x, requires_grad=i == j) for j, x in enumerate(case.arrays())]
        found = gradients(case, tensors)
        assert [dx is not None for dx in found] == [i == j for j in range(len(wanted))]
        assert_near(found[i], wanted[i], 1e-14)


# -- what an op owes the engine


@each(CASES)
def test_result_and_gradients_keep_the_type(case):
    wanted = case.fn(*case.tensors()).data
    for dtype in np.float16, np.float32, np.float64:
        tensors = case.tensors(dtype)
        y = case.fn(*tensors)
        assert y.dtype == dtype
        assert all(dx.dtype == dtype for dx in gradients(case, tensors))
        # 64: sums of up to 33 terms, and the rounding of the inputs, which exp and powers magnify
        assert_near(y.data, wanted, 64 * np.finfo(dtype).eps)


@each(CASES)
def test_nothing_given_is_changed(case):
    """Inputs, result and output gradient are read-only: writing raises in NumPy. For C, they are compared."""
    for dtype in np.float32, np.float64:
        tensors = case.tensors(dtype)
        for x in tensors:
            x.data.flags.writeable = False
        y = case.fn(*tensors)
        dout = dout_for(y)
        kept = [(a, a.copy()) for a in (dout, y.data)]
        y.data.flags.writeable = dout.flags.writeable = False
        y.backward(dout)
        kept += zip((x.data for x in tensors), case.arrays(dtype), strict=True)
        assert all(np.array_equal(array, before) for array, before in kept)


def transposed(x: np.ndarray) -> np.ndarray:
    return np.array(x, order="F")


def reversed_and_strided(x: np.ndarray) -> np.ndarray:
    wide = np.full((*x.shape, 2), np.nan, x.dtype)
    wide[..., 1] = x[::-1] if x.ndim else x
    return wide[::-1, ..., 1] if x.ndim else wide[..., 1]


def misaligned(x: np.ndarray) -> np.ndarray:
    raw = np.empty(x.nbytes + 1, np.uint8)
    view = raw[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    return view


@each(CASES)
def test_memory_layout_does_not_matter(case):
    for dtype in np.float32, np.float64:
        plain, rtol = case.tensors(dtype), 16 * np.finfo(dtype).eps
        y = case.fn(*plain)
        dout = dout_for(y)
        plain_gradients = gradients(case, plain, dout)
        for layout in transposed, reversed_and_strided, misaligned:
            odd = [Tensor(layout(x), requires_grad=True) for x in case.arrays(dtype)]
            assert_near(case.fn(*odd).data, y.data, rtol)
            for found, wanted in zip(gradients(case, odd, layout(dout)), plain_gradients, strict=True):
                assert_near(found, wanted, rtol)


@each(CASES)
def test_graph_is_freed_without_the_cyclic_collector(case):
    gc.disable()
    try:
        tensors = case.tensors()
        hidden = [x * 1.0 for x in tensors]  # intermediate, so that only the graph keeps it
        arrays = [weakref.ref(x.data) for x in hidden]
        y = case.fn(*hidden)
        op, result = weakref.ref(y.op), weakref.ref(y)
        del hidden
        y.backward(dout_for(y))
        assert y.op.saved is None and y.op.edges is None
        view = y.data.base is not None  # a reshape, say, is a view of its input's memory
        assert view or not any(array() is not None for array in arrays)
        del y
        assert op() is None and result() is None
        assert not any(array() is not None for array in arrays)
    finally:
        gc.enable()


@each(CASES)
def test_nothing_is_recorded_under_no_grad(case):
    with no_grad():
        y = case.fn(*case.tensors())
    assert y.op is None and not y.requires_grad


# -- particular promises


def test_frozen_linear_keeps_no_input():
    x, w = Tensor(np.ones((3, 4)), requires_grad=True), Tensor(np.ones((5, 4)))
    assert not any(kept is x.data for kept in ops.linear(x, w).op.saved)
    w.requires_grad, x.requires_grad = True, False
    assert not any(kept is w.data for kept in ops.linear(x, w).op.saved)


@pytest.mark.parametrize(
    "make",
    [
        lambda x, w: ops.rms_norm(x, w[0]),
        lambda x, w: ops.layer_norm(x, w[0], w[0]),
        lambda x, w: ops.swiglu(x, x),
    ],
    ids=["rms_norm", "layer_norm", "swiglu"],
)
def test_what_norms_and_swiglu_make_is_kept_by_nobody_and_made_again_in_the_same_bits(make):
    rng = np.random.default_rng(0)
    x = Tensor(rng.standard_normal((3, 4), np.float32), requires_grad=True)
    w = Tensor(rng.standard_normal((4, 4), np.float32), requires_grad=True)
    h = make(x, w)
    assert h.op.again().tobytes() == h.data.tobytes()
    y = ops.linear(h, w)
    assert not any(kept is h.data for kept in y.op.saved) and any(kept is h.op for kept in y.op.saved)


def test_the_gradient_of_a_weight_is_added_to_the_one_that_is_there():
    x, w = (Tensor(np.ones(shape, np.float32), requires_grad=True) for shape in ((3, 4), (5, 4)))
    ops.linear(x, w).sum().backward()
    first = w.grad
    ops.linear(x, w).sum().backward()
    assert w.grad is first and (first == 6).all()
    ids, table = np.array([0, 2, 2]), Tensor(np.ones((4, 2), np.float32), requires_grad=True)
    ops.embedding(ids, table).sum().backward()
    first = table.grad
    ops.embedding(ids, table).sum().backward()
    assert table.grad is first and first[:, 0].tolist() == [2, 0, 4, 0]


@pytest.mark.parametrize("op", [ops.mul, ops.matmul])
def test_a_product_keeps_only_the_factor_it_needs(op):
    x, w = Tensor(np.ones((4, 4)), requires_grad=True), Tensor(np.ones((4, 4)))
    kept = op(x, w).op.saved
    assert any(k is w.data for k in kept) and not any(k is x.data for k in kept)


def test_equal_elements_share_the_gradient():
    x, y = Tensor([1.0, 2.0], requires_grad=True), Tensor([1.0, 3.0], requires_grad=True)
    ops.maximum(x, y).sum().backward()
    assert x.grad.tolist() == [0.5, 0] and y.grad.tolist() == [0.5, 1]
    x.grad = y.grad = None
    ops.minimum(x, y).sum().backward()
    assert x.grad.tolist() == [0.5, 1] and y.grad.tolist() == [0.5, 0]
    z = Tensor([[2.0, 5.0, 5.0], [1.0, 1.0, 1.0]], requires_grad=True)
    z.max(axis=1).sum().backward()
    np.testing.assert_allclose(z.grad, [[0, 0.5, 0.5], [1 / 3, 1 / 3, 1 / 3]], rtol=1e-6)


def test_relu_at_zero_has_gradient_zero():
    x = Tensor([-1.0, 0.0, 1.0], requires_grad=True)
    x.relu().sum().backward()
    assert x.grad.tolist() == [0, 0, 1]


def test_power_at_zero_has_no_nan_in_its_gradient():
    x, n = Tensor([0.0, 0.0, 2.0], requires_grad=True), Tensor([0.0, 1.0, 0.0], requires_grad=True)
    (x**n).sum().backward()
    assert x.grad.tolist() == [0, 1, 0] and np.isfinite(n.grad).all()
    x.grad = None
    (x**0).sum().backward()
    assert x.grad.tolist() == [0, 0, 0]


@pytest.mark.filterwarnings("error")
def test_sigmoid_and_softmax_do_not_overflow():
    x = Tensor([-1000.0, 0.0, 1000.0], requires_grad=True)
    np.testing.assert_array_equal(x.sigmoid().data, [0, 0.5, 1])
    np.testing.assert_array_equal(ops.softmax(x).data, [0, 0, 1])
    np.testing.assert_array_equal(ops.softmax(Tensor([-np.inf, -np.inf])).data, [0, 0])
    np.testing.assert_array_equal(ops.log_softmax(x).data, [-2000, -1000, 0])
    assert ops.cross_entropy(x.reshape(1, 3), [0]).item() == 2000


def test_the_mean_loss_over_no_targets_is_zero():
    logits = Tensor(np.ones((2, 5)), requires_grad=True)
    loss = ops.cross_entropy(logits, [-100, -100])
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()
    assert ops.cross_entropy(Tensor(np.ones((0, 5))), np.zeros(0, int)).item() == 0


def test_mean_loss_counts_only_targets_not_ignored():
    logits = Tensor(np.random.default_rng(0).normal(size=(4, 5)))
    some = ops.cross_entropy(logits, [1, -1, 3, -1], ignore_index=-1).item()
    assert some == pytest.approx(ops.cross_entropy(Tensor(logits.data[[0, 2]]), [1, 3]).item(), rel=1e-12)


def test_dropout_keeps_the_mean_and_is_off_when_not_training():
    x = Tensor(np.ones(100_000))
    y = ops.dropout(x, 0.3)
    assert set(np.unique(y.data)) == {0, 1 / 0.7}
    assert abs(y.data.mean() - 1) < 5 * np.sqrt(0.3 / 0.7 / x.size)  # five standard deviations
    assert ops.dropout(x, 0.3, training=False) is x and ops.dropout(x, 0.0) is x


def test_dropout_is_repeatable_from_its_seed():
    from entrenar import random

    masks = []
    for _ in range(2):
        random.seed(11)
        masks.append(ops.dropout(Tensor(np.ones((5, 5))), 0.5).data)
    np.testing.assert_array_equal(*masks)
    assert (ops.dropout(Tensor(np.ones((5, 5))), 0.5).data != masks[0]).any()


def test_linear_cross_entropy_never_holds_all_logits():
    import tracemalloc

    N, C, V = 2048, 8, 16_384  # 128 MB of float32 logits
    rng = np.random.default_rng(0)
    x = Tensor(rng.normal(size=(N, C)).astype(np.float32), requires_grad=True)
    w = Tensor(rng.normal(size=(V, C)).astype(np.float32), requires_grad=True)
    targets = rng.integers(0, V, N)
    tracemalloc.start()
    try:
        ops.linear_cross_entropy(x, w, targets).backward()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < N * V * 4 / 2


def test_an_operation_of_ones_own_takes_ten_lines():
    class Square(Op):
        """y = x^2"""

        def forward(self, x):
            self.save(x)
            return x * x

        def backward(self, dy):
            (x,) = self.saved
            return 2 * x * dy

    gradcheck(Square.apply, Tensor(np.array([1.0, -2.0]), requires_grad=True))


# -- errors say which op, what came, what was wanted

x23, w5 = Tensor(np.ones((2, 3))), Tensor(np.ones(5))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: x23 @ x23, ValueError, r"matmul: inner dimensions differ: a \(2, 3\) @ b \(2, 3\)"),
        (lambda: x23 @ 2, ValueError, r"matmul: a \(2, 3\) @ b \(\): no scalars; use \* to multiply"),
        (lambda: Tensor(np.ones((2, 3, 4))) @ Tensor(np.ones((3, 4, 2))), ValueError,
         "batch axes do not broadcast"),
        (lambda: ops.linear(x23, x23.T), ValueError,
         r"linear: wants x \(..., I\), w \(O, I\).*got x \(2, 3\), w \(3, 2\)"),
        (lambda: ops.embedding([0, 2], x23), IndexError, r"embedding: ids\[1\] is 2, wanted 0 <= index < 2"),
        (lambda: ops.embedding([0.0], x23), TypeError, "embedding: ids must be integers, got float64"),
        (lambda: ops.embedding([0], w5), ValueError, r"embedding: wants w \(V, C\), got \(5,\)"),
        (lambda: ops.lora_linear(x23, x23, None, x23, x23, scale=1), ValueError,
         r"lora_linear: wants x \(..., I\), w \(O, I\), b \(O,\), A \(r, I\), B \(O, r\).*got \(2, 3\)"),
        (lambda: ops.lora_linear(x23, Tensor(np.ones((4, 3)), requires_grad=True), None, np.ones((1, 3)),
                                 np.ones((4, 1)), scale=1), ValueError, "lora_linear: w and b get no gradient here"),
        (lambda: ops.dora_linear(x23, x23, None, np.ones((1, 3)), np.ones((2, 1)), w5, norm=np.ones(2), scale=1),
         ValueError, r"dora_linear: wants m and norm of shape \(2,\), got \(5,\) and \(2,\)"),
        (lambda: ops.lora_embedding([0], x23, x23, x23, scale=1), ValueError,
         r"lora_embedding: wants w \(V, C\), A \(r, V\) and B \(C, r\)"),
        (lambda: ops.lora_embedding([2], x23, np.ones((1, 2)), np.ones((3, 1)), scale=1), IndexError,
         r"lora_embedding: ids\[0\] is 2, wanted 0 <= index < 2"),
        (lambda: ops.rms_norm(x23, w5), ValueError,
         r"rms_norm: x \(2, 3\) wants weights of shape \(3,\), got \(5,\)"),
        (lambda: ops.layer_norm(x23, w5, w5), ValueError,
         r"layer_norm: x \(2, 3\) wants weights of shape \(3,\)"),
        (lambda: ops.softmax(Tensor(1.0)), ValueError,
         "softmax: wants an array of at least 1 axis, got a scalar"),
        (lambda: ops.softmax(x23, axis=2), ValueError, r"no axis 2 in a tensor of shape \(2, 3\)"),
        (lambda: ops.swiglu(x23, w5), ValueError, r"swiglu: shapes differ: gate \(2, 3\), up \(5,\)"),
        (lambda: ops.rope(x23, [1.0], [1.0]), ValueError,
         r"rope: wants x of shape \(B, T, H, D\) with D even"),
        (lambda: ops.rope(Tensor(np.ones((1, 2, 1, 4))), w5, w5), ValueError,
         r"wants cos and sin of shape \(2, 2\)"),
        (
            lambda: ops.rope(Tensor(np.ones((1, 1, 1, 2))), Tensor([[1.0]], requires_grad=True), [[0.0]]),
            ValueError,
            "rope: cos and sin are constants and get no gradient",
        ),
        (lambda: ops.attention(x23, x23, x23), ValueError,
         r"attention: wants q \(B, T, H, D\) and k, v \(B, S, KH, D\)"),
        (
            lambda: ops.attention(*(Tensor(np.ones((1, 2, h, 4))) for h in (3, 2, 2))),
            ValueError,
            "the key/value heads must divide the query heads",
        ),
        (
            lambda: ops.attention(*(Tensor(np.ones((1, t, 1, 4))) for t in (3, 2, 2))),
            ValueError,
            r"no fewer keys than queries \(S >= T\)",
        ),
        (lambda: ops.cross_entropy(x23, [0]), ValueError,
         r"cross_entropy: wants logits .* got \(2, 3\) and \(1,\)"),
        (lambda: ops.cross_entropy(x23, [0, 3]), IndexError,
         r"targets\[1\] is 3, wanted 0 <= index < 3 or -100 to ignore"),
        (lambda: ops.cross_entropy(x23, [0.0, 1.0]), TypeError, "targets must be integers, got float64"),
        (lambda: ops.cross_entropy(x23, [0, 1], reduction="none"), ValueError,
         "reduction is 'none': wanted 'mean' or 'sum'"),
        (lambda: ops.linear_cross_entropy(x23, w5, [0, 1]), ValueError,
         r"linear_cross_entropy: wants x \(..., C\)"),
        (lambda: ops.dropout(x23, 1.0), ValueError, "dropout: p is 1.0: wanted a probability 0 <= p < 1"),
        (lambda: ops.concat([]), ValueError, "concat: wants at least one tensor, got none"),
        (lambda: ops.stack([]), ValueError, "stack: wants at least one tensor, got none"),
        (lambda: ops.split(x23, 2, axis=1), ValueError,
         "split: axis 1 of length 3 does not divide into 2 equal parts"),
    ],
)  # fmt: skip
def test_error_names_op_and_what_was_wanted(call, error, message):
    with pytest.raises(error, match=message):
        call()
