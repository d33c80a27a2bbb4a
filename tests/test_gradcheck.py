"""gradcheck itself. A checker that cannot fail proves nothing: here are the wrong gradients it must reject.

Every case of the table and a whole network are given zeros, a sign, a missing term and a scale that is
slightly wrong: by 0.1 % in float64, by 3 % in float32, whose tolerance is 1 %.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
from cases import CASES, Case, first_of_each_op

from entrenar import GradcheckError, Op, Tensor, gradcheck, kernels, ops, random
from entrenar.kernels import reference
from entrenar.ops import elementwise
from entrenar.ops.attention import Attention, Rope
from entrenar.ops.elementwise import Add
from entrenar.ops.linear import Embedding, Linear
from entrenar.ops.loss import LinearCrossEntropy
from entrenar.ops.norm import RMSNorm
from entrenar.ops.shape import GetItem, Reshape
from entrenar.ops.swiglu import Swiglu
from entrenar.tensor import no_grad

SPOILT = {"zeros": 0.0, "sign": -1.0, "scale": 1.001}
SPOILT_FLOAT32 = {"zeros": 0.0, "sign": -1.0, "scale": 1.03}
CHECKABLE = [case for case in CASES if not case.empty and not case.zero]


def leaf(*shape: int, dtype=np.float64, seed: int = 0) -> Tensor:
    return Tensor(np.asarray(np.random.default_rng(seed).normal(size=shape), dtype), requires_grad=True)


def rejected(fn, *inputs, **options) -> str:
    """The message with which gradcheck refuses; the test fails where it does not."""
    with pytest.raises(GradcheckError) as caught:
        gradcheck(fn, *inputs, **options)
    return str(caught.value)


# -- it accepts what is right, and says what it found


@pytest.mark.tier1
def test_reports_every_input():
    x, w, ids = leaf(3, 5), leaf(5, 2), [0, 2, 1]
    report = gradcheck(lambda x, ids, w: (ops.embedding(ids, x) @ w).tanh(), x, ids, w)
    assert [r.input for r in report.inputs] == [0, 2]
    assert [r.shape for r in report.inputs] == [(3, 5), (5, 2)]
    assert [r.checked for r in report.inputs] == [15, 10]
    assert 0 < report.error == max(r.error for r in report.inputs) < report.tolerance == 1e-6
    worst = report.inputs[0]
    assert abs(worst.analytic - worst.numeric) / worst.scale == pytest.approx(worst.error)


def test_tolerance_follows_the_coarsest_type():
    assert gradcheck(ops.tanh, leaf(3)).tolerance == 1e-6
    assert gradcheck(ops.tanh, leaf(3, dtype=np.float32)).tolerance == 1e-2
    assert gradcheck(ops.add, leaf(3), leaf(3, dtype=np.float32)).tolerance == 1e-2
    assert gradcheck(ops.tanh, leaf(3), rtol=1e-4).tolerance == 1e-4


def test_data_and_earlier_gradients_are_put_back():
    x = leaf(4)
    x.grad, before = np.full(4, 7.0), x.data.copy()
    gradcheck(ops.exp, x)
    np.testing.assert_array_equal(x.data, before)
    np.testing.assert_array_equal(x.grad, np.full(4, 7.0))

    def fails_when_moved(x):
        if not np.array_equal(x.data, before):
            raise RuntimeError("moved")
        return x.exp()

    with pytest.raises(RuntimeError, match="moved"):
        gradcheck(fails_when_moved, x)
    np.testing.assert_array_equal(x.data, before)
    np.testing.assert_array_equal(x.grad, np.full(4, 7.0))


def test_parameters_that_fn_holds_can_be_the_inputs():
    w, b = leaf(2, 3), leaf(2)
    x = np.ones((4, 3))
    report = gradcheck(lambda *_: ops.linear(x, w, b).tanh().sum(), w, b)
    assert len(report.inputs) == 2
    spoilt = Spoil.apply(w, factor=1.001)
    assert spoilt.op is not None
    rejected(lambda *_: ops.linear(x, Spoil.apply(w, factor=1.001), b).tanh().sum(), w, b)


def test_five_points_see_more_than_three():
    x = Tensor(np.array([0.0, 1.0]), requires_grad=True)
    steep = lambda x: (x * 20).tanh()  # noqa: E731
    assert "error" in rejected(steep, x)
    assert gradcheck(steep, x, stencil=5).error < 1e-6


def test_inputs_may_be_views_scalars_and_empty():
    view = Tensor(np.random.default_rng(0).normal(size=(4, 6))[::-1, ::2], requires_grad=True)
    scalar, empty = leaf(), leaf(0, 3)
    report = gradcheck(lambda v, s, e: (v * s).sum() + e.sum(), view, scalar, empty)
    assert [r.checked for r in report.inputs] == [12, 1, 0]


# -- it sees elements it did not sample


def test_samples_limit_the_elements_and_directions_see_the_rest():
    x = leaf(1000)
    assert gradcheck(lambda x: x * x * x, x, samples=5, stencil=5).inputs[0].checked == 5

    class OneWrong(Op):
        """y = x^3, with one element's gradient forgotten"""

        def forward(self, x):
            self.save(x)
            return x**3

        def backward(self, dy):
            dx = 3 * self.saved[0] ** 2 * dy
            dx[np.argmax(np.abs(dx))] = 0
            return dx

    assert "random direction" in rejected(OneWrong.apply, x, samples=5, stencil=5)


def test_the_sample_follows_the_seed():
    x, found = leaf(1000), []
    for seed in (1, 1, 2):
        found.append(gradcheck(lambda x: x * x, x, samples=3, seed=seed, rtol=1).inputs[0].worst)
    assert found[0] == found[1]


# -- it refuses what could not tell right from wrong


@pytest.mark.tier1
def test_tiny_gradients_do_not_hide_a_backward_of_zeros():
    x = leaf(5)
    gradcheck(lambda x: x * 1e-12, x)
    rejected(lambda x: Spoil.apply(x, factor=0.0) * 1e-12, x)


@pytest.mark.tier1
def test_a_check_that_sees_nothing_is_refused():
    x, frozen = leaf(5), lambda x: Tensor(np.ones(5)) + x * 0
    message = rejected(frozen, x)
    assert "vacuous" in message and "input 0 (5,)" in message and "allow_zero=True" in message
    assert gradcheck(frozen, x, allow_zero=True).error == 0
    assert "every input is empty" in rejected(ops.exp, leaf(0, 3))
    gradcheck(ops.exp, leaf(0, 3), allow_zero=True)


def test_rounding_is_not_taken_for_a_gradient():
    x = leaf(5)  # a softmax sums to 1: the gradient is zero but for rounding
    assert "vacuous" in rejected(lambda x: ops.softmax(x).sum(), x)
    gradcheck(lambda x: ops.softmax(x).sum(), x, allow_zero=True)


def test_allow_zero_does_not_allow_a_gradient_out_of_nothing():
    class Invented(Op):
        """y = 0, with a gradient all the same"""

        def forward(self, x):
            return np.zeros_like(x)

        def backward(self, dy):
            return dy

    assert "differences give 0" in rejected(Invented.apply, leaf(3), allow_zero=True)


def test_a_gradient_that_is_not_finite_is_refused():
    rejected(lambda x: Spoil.apply(x, factor=math.nan), leaf(3))
    rejected(lambda x: Spoil.apply(x, factor=math.inf), leaf(3))
    with np.errstate(invalid="ignore"):
        rejected(lambda x: x.log(), Tensor(np.array([-1.0]), requires_grad=True))


def test_fn_must_give_the_same_twice():
    random.seed(0)
    assert "seed what it draws" in rejected(lambda x: ops.dropout(x, 0.5), leaf(50))


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ([np.ones(3)], {}, "no input is a tensor with requires_grad=True"),
        ([Tensor(np.ones(3))], {}, "no input is a tensor with requires_grad=True"),
        ([leaf(3, dtype=np.float16)], {}, "input 0 is float16, too coarse: use float64 or float32"),
        ([leaf(3) * 2], {}, "input 0 is the result of Mul, not a leaf"),
        ([Tensor(np.broadcast_to(1.0, 3), requires_grad=True)], {}, "input 0 is read-only"),
        ([leaf(3)], {"stencil": 4}, "wants stencil 3 or 5 and eps > 0, got stencil=4"),
        ([leaf(3)], {"eps": 0}, "got stencil=3, eps=0"),
    ],
)
def test_inputs_that_cannot_be_checked_are_errors(inputs, options, message):
    with pytest.raises(ValueError, match=message):
        gradcheck(ops.exp, *inputs, **options)


def test_message_names_input_element_values_error_and_tolerance():
    class LastWrong(Op):
        """y = 2 x, with one element's gradient 3"""

        def forward(self, x):
            return 2 * x

        def backward(self, dy):
            dx = 2 * dy
            dx[1, 2] *= 1.5
            return dx

    message = rejected(lambda a, x: LastWrong.apply(x), leaf(2), leaf(2, 3), allow_zero=True)
    for part in (
        "input 1 (2, 3) at (1, 2)",
        "backward() gives",
        "differences give",
        "of max|gradient|",
        "1e-06",
    ):
        assert part in message


# -- negative controls on every case


class Spoil(Op):
    """y = x, with its gradient times a factor"""

    def forward(self, x, *, factor):
        self.save(factor)
        return x

    def backward(self, dy):
        (factor,) = self.saved
        return dy * factor


def _with_input_spoilt(case: Case, i: int, factor: float, *inputs: Tensor) -> Tensor:
    return case.fn(*(Spoil.apply(x, factor=factor) if j == i else x for j, x in enumerate(inputs)))


def assert_spoilt_gradients_are_rejected(case: Case, dtype, spoilt: dict[str, float]) -> None:
    tensors = case.tensors(dtype)
    for i in range(len(tensors)):
        if 0 in tensors[i].shape:
            continue
        for how, factor in spoilt.items():
            spoilt_case = functools.partial(_with_input_spoilt, case, i, factor)
            message = rejected(spoilt_case, *tensors, stencil=case.stencil, samples=4)
            assert f"input {i} " in message and "vacuous" not in message, how


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, id=c.name, marks=[pytest.mark.tier1] if c in first_of_each_op(CASES) else [])
        for c in CHECKABLE
    ],
)
def test_spoilt_gradient_is_rejected_in_float64(case):
    assert_spoilt_gradients_are_rejected(case, np.float64, SPOILT)


@pytest.mark.parametrize("case", CHECKABLE, ids=lambda case: case.name)
def test_spoilt_gradient_is_rejected_in_float32(case):
    assert_spoilt_gradients_are_rejected(case, np.float32, SPOILT_FLOAT32)


# -- formulas with a term missing, each of them once seen in somebody's code


def _rms_norm_without_mean(dy, x, w, rstd):
    return dy * w * rstd[..., None], reference.rms_norm_backward(dy, x, w, rstd)[1]


def _layer_norm_without_mean(dy, x, w, mean, rstd):
    dx, dw, db = reference.layer_norm_backward(dy, x, w, mean, rstd)
    return dx + (dy * w).mean(axis=-1, keepdims=True) * rstd[..., None], dw, db


def _swiglu_without_slope(dy, gate, up):
    s = reference.sigmoid(gate)
    return dy * up * s, dy * gate * s


def _attention_without_delta(do, q, k, v, o, lse, starts, *, scale):
    return reference.attention_backward(do, q, k, v, np.zeros_like(o), lse, starts, scale=scale)


def _cross_entropy_without_target(dlosses, logits, targets, lse, *, ignore_index):
    return reference.cross_entropy_backward(
        dlosses, logits, targets, lse, ignore_index=ignore_index
    ) + np.where(np.arange(logits.shape[1]) == targets[:, None], dlosses[:, None], 0)


def _embedding_last_wins(dy, ids, *, rows):
    dw = np.zeros((rows, dy.shape[-1]), dy.dtype)
    dw[ids] = dy
    return dw


def _one_chunk_short(x, w, targets, **constants):
    losses, dx, dw = reference.linear_cross_entropy(x, w, targets, **constants)
    return losses, dx, None if dw is None else dw * (np.arange(len(dw)) < len(dw) - 1)[:, None]


def _getitem_last_wins(self, dy):
    key, shape = self.saved
    dx = np.zeros(shape, dy.dtype)
    dx[key] = dy
    return dx


MISSING_TERM = {  # case: (where, name, the formula without its term)
    "softmax-3x5": (kernels, "softmax_backward", lambda dy, y: y * dy),
    "log_softmax-3x5": (kernels, "log_softmax_backward", lambda dy, y: dy),
    "rms_norm-3x5_5": (kernels, "rms_norm_backward", _rms_norm_without_mean),
    "layer_norm-3x5_5_5": (kernels, "layer_norm_backward", _layer_norm_without_mean),
    "rope-2x4x3x6": (kernels, "rope_backward", lambda dy, cos, sin: reference.rope_forward(dy, cos, sin)),
    "swiglu-3x5_3x5": (kernels, "swiglu_backward", _swiglu_without_slope),
    "attention-1x3x4x5_1x5x2x5_1x5x2x5": (kernels, "attention_backward", _attention_without_delta),
    "cross_entropy-2x3x7": (kernels, "cross_entropy_backward", _cross_entropy_without_target),
    "linear_cross_entropy-2x3x5_7x5": (kernels, "linear_cross_entropy", _one_chunk_short),
    "embedding-5x4": (kernels, "embedding_backward", _embedding_last_wins),
    "getitem-repeated": (GetItem, "backward", _getitem_last_wins),
    "tanh-3x5": (elementwise.Tanh, "backward", lambda self, dy: dy),
    "sigmoid-3x5": (elementwise.Sigmoid, "backward", lambda self, dy: dy * self.saved[0]),
    "silu-3x5": (elementwise.Silu, "backward", lambda self, dy: dy * reference.sigmoid(self.saved[0])),
    "gelu-3x5": (elementwise.Gelu, "backward", lambda self, dy: dy * self.saved[1]),
    "div-3x5_5": (
        elementwise,
        "unbroadcast",
        lambda dx, shape: dx[(0,) * (dx.ndim - len(shape))].reshape(shape),
    ),
    "mul-itself": (elementwise.Mul, "backward", lambda self, dz: (dz * self.saved[1], 0 * dz)),
}


@pytest.mark.tier1
@pytest.mark.parametrize("name", MISSING_TERM)
def test_missing_term_is_rejected(name, monkeypatch):
    (case,) = [case for case in CASES if case.name == name]
    gradcheck(case.fn, *case.tensors(), stencil=case.stencil)
    monkeypatch.setattr(*MISSING_TERM[name])
    for dtype in np.float64, np.float32:
        message = rejected(case.fn, *case.tensors(dtype), stencil=case.stencil)
        assert "vacuous" not in message


# -- a whole network: embedding, two norms, rope, grouped attention, gated feed-forward, fused loss

# B batch, T time, C channels, H heads, KH key/value heads, D head dim, F feed-forward dim, V vocabulary
B, T, C, H, KH, D, F, V = 2, 5, 8, 2, 1, 4, 12, 7
TOKENS = np.random.default_rng(2).integers(0, V, (B, T))
NEXT = np.random.default_rng(3).integers(0, V, (B, T))
ANGLES = np.arange(T)[:, None] / 10 ** np.arange(D // 2)
WEIGHTS = {
    "embedding": (V, C), "norm1": (C,), "q": (H * D, C), "k": (KH * D, C), "v": (KH * D, C), "o": (C, H * D),
    "norm2": (C,), "gate": (F, C), "up": (F, C), "down": (C, F), "norm3": (C,), "head": (V, C),
}  # fmt: skip


def weights(dtype) -> list[Tensor]:
    rng = np.random.default_rng(4)
    drawn = [
        1 + 0.3 * rng.normal(size=s) if len(s) == 1 else 0.7 * rng.normal(size=s) for s in WEIGHTS.values()
    ]
    return [Tensor(x.astype(dtype), requires_grad=True) for x in drawn]


def network(embedding, norm1, q, k, v, o, norm2, gate, up, down, norm3, head) -> Tensor:
    x = ops.embedding(TOKENS, embedding)

    y = ops.rms_norm(x, norm1)
    q, k, v = (ops.linear(y, w).reshape(B, T, -1, D) for w in (q, k, v))
    q, k = (ops.rope(z, np.cos(ANGLES), np.sin(ANGLES)) for z in (q, k))
    x = x + ops.linear(ops.attention(q, k, v).reshape(B, T, H * D), o)

    y = ops.rms_norm(x, norm2)
    x = x + ops.linear(ops.swiglu(ops.linear(y, gate), ops.linear(y, up)), down)
    return ops.linear_cross_entropy(ops.rms_norm(x, norm3), head, NEXT, reduction="sum")


def check_network(dtype) -> None:
    gradcheck(network, *weights(dtype), stencil=5, samples=8)


@pytest.mark.tier1
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_network_is_accepted(dtype):
    check_network(dtype)


NETWORK_OPS = [
    Embedding, Linear, RMSNorm, Reshape, Rope, Attention, Add, Swiglu, LinearCrossEntropy,
]  # fmt: skip


def test_network_controls_cover_its_ops():
    with no_grad():
        network(*weights(np.float64))
    seen, waiting = set(), [network(*weights(np.float64)).op]
    while waiting:
        op = waiting.pop()
        seen.add(type(op))
        waiting += [edge for edge in op.edges if isinstance(edge, Op)]
    assert seen == set(NETWORK_OPS)


@pytest.mark.parametrize(
    ("dtype", "how"),
    [*((np.float64, how) for how in SPOILT.items()), *((np.float32, how) for how in SPOILT_FLOAT32.items())],
    ids=lambda value: value[0] if isinstance(value, tuple) else value.__name__,
)
@pytest.mark.parametrize("op", NETWORK_OPS, ids=lambda op: op.__name__)
def test_network_with_one_op_spoilt_is_rejected(op, how, dtype, monkeypatch):
    right, spoilt = op.backward, []

    def wrong(self, dout):
        result = right(self, dout)
        if spoilt:  # the youngest of its kind alone: two signs on one path would be none
            return result
        spoilt.append(self)
        results = result if isinstance(result, tuple) else (result,)
        return tuple(None if dx is None else dx * how[1] for dx in results)

    monkeypatch.setattr(op, "backward", wrong)
    with pytest.raises(GradcheckError, match="backward"):
        check_network(dtype)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(
    "name",
    [
        "rms_norm-3x5_5",
        "rope-2x4x3x6",
        "swiglu-3x5_3x5",
        "attention-1x3x4x5_1x5x2x5_1x5x2x5",
        "linear_cross_entropy-2x3x5_7x5",
        "embedding-5x4",
    ],
)
def test_network_with_a_term_missing_is_rejected(name, dtype, monkeypatch):
    monkeypatch.setattr(*MISSING_TERM[name])
    with pytest.raises(GradcheckError, match="backward"):
        check_network(dtype)
