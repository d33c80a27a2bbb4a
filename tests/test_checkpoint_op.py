"""Activation checkpointing: same bits, less memory, and the traps that others document."""

import gc
import weakref

import numpy as np
import pytest

from entrenar import nn, ops, random
from entrenar.tensor import Tensor, no_grad


def leaf(*shape):
    return Tensor(np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32), requires_grad=True)


def gradients(f, *leaves):
    for x in leaves:
        x.grad = None
    y = f()
    y.backward(np.ones(y.shape, np.float32))
    return [y.data, *[x.grad for x in leaves]]


def assert_same_bits(plain, checkpointed):
    for a, b in zip(plain, checkpointed, strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_input_used_inside_and_outside_gets_the_same_sum_bit_for_bit():
    x, w = leaf(5, 7), leaf(7, 7)

    def inside(x):
        return ops.tanh(x @ w) * x + x

    def f(run):
        h = ops.exp(x)  # not a leaf: its gradient is summed inside the walk
        return run(inside, h) * 3 + h * w[0] + ops.sigmoid(h)

    assert_same_bits(
        gradients(lambda: f(lambda fn, h: fn(h)), x, w), gradients(lambda: f(ops.checkpoint), x, w)
    )  # fmt: skip


def test_backward_inside_no_grad_still_reaches_the_leaves():
    """What is computed again must be recorded, whoever calls backward()."""
    x, w = leaf(3, 4), leaf(4, 4)

    def backward(y):
        with no_grad():
            y.backward(np.ones(y.shape, np.float32))
        return x.grad, w.grad

    plain = backward(ops.tanh(x @ w))
    x.grad = w.grad = None
    assert_same_bits(plain, backward(ops.checkpoint(lambda x: ops.tanh(x @ w), x)))


def test_checkpoints_nest():
    x, w = leaf(3, 4), leaf(4, 4)

    def block(h):
        return ops.silu(h @ w) + h

    def two(h):
        return ops.checkpoint(block, ops.checkpoint(block, h))

    assert_same_bits(gradients(lambda: block(block(x)), x, w), gradients(lambda: ops.checkpoint(two, x), x, w))


def test_parameters_inside_get_gradients_though_no_input_wants_one():
    layer, x = nn.Linear(4, 3), Tensor(np.ones((2, 4)))
    ops.checkpoint(layer, x).sum().backward()
    assert np.abs(layer.weight.grad).sum() > 0


def test_dropout_is_replayed_and_the_generator_goes_on_as_before():
    x = leaf(50, 50)

    def f(h):
        return ops.dropout(h * 2, 0.5) * h

    random.seed(3)
    plain = gradients(lambda: f(x), x)
    after_plain = random.get_state()
    random.seed(3)
    checkpointed = gradients(lambda: ops.checkpoint(f, x), x)
    assert_same_bits(plain, checkpointed)
    assert random.get_state() == after_plain


def test_nothing_inside_is_kept_between_forward_and_backward():
    kept = []

    def f(h):
        inner = ops.exp(h)
        kept.append(weakref.ref(inner.data))
        return ops.exp(inner)

    x = leaf(4, 4)
    gc.disable()
    try:
        y = ops.checkpoint(f, x)
        assert kept[0]() is None
        y.sum().backward()
        assert kept[1]() is None
    finally:
        gc.enable()


def test_nothing_is_recorded_where_nothing_wants_a_gradient():
    x = leaf(2, 2)
    with no_grad():
        assert ops.checkpoint(ops.exp, x).op is None
    assert ops.checkpoint(ops.exp, x.detach()).op is None


def test_constants_pass_through_and_an_identity_is_fine():
    x, table = leaf(3, 3), np.ones(3, np.float32)
    plain = gradients(lambda: x * table, x)
    assert_same_bits(plain, gradients(lambda: ops.checkpoint(lambda h, t, n: h * t * n, x, table, 1), x))
    assert_same_bits(gradients(lambda: x * 1.0, x), gradients(lambda: ops.checkpoint(lambda h: h, x), x))


def test_anything_but_one_tensor_is_refused():
    with pytest.raises(TypeError, match="fn must return one Tensor, got tuple"):
        ops.checkpoint(lambda h: (h, h), leaf(2, 2))
