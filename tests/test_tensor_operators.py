"""Operators and methods of Tensor read as a NumPy user expects: on random shapes, strides and broadcasts they
compute what NumPy computes, and hand the gradient back to where each element came from."""

from __future__ import annotations

import operator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from entrenar import Tensor, gradcheck, ops

seeds = st.integers(0, 2**32 - 1)
dtypes = st.sampled_from([np.float32, np.float64])


def tolerance(dtype, terms: int = 1) -> float:
    return 8 * np.finfo(dtype).eps * np.sqrt(max(terms, 1))


@st.composite
def arrays(draw, shape=None, dtype=np.float64, low: float = -2.0, high: float = 2.0):
    """An array of a random (or the given) shape and a random layout: steps, backwards too, any axis order."""
    if shape is None:
        shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
    rng = np.random.default_rng(draw(seeds))
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from([1, 2, -1, -2])) for _ in shape]
    wide = [shape[axis] * abs(steps[axis]) for axis in order]
    base = rng.uniform(low, high, wide).astype(dtype)
    x = base.transpose(np.argsort(order)) if shape else base
    x = x[tuple(slice(None, None, step) for step in steps)] if shape else x
    assert x.shape == tuple(shape)
    return x


@st.composite
def broadcasting_pairs(draw, low: float = -2.0):
    shapes = draw(hnp.mutually_broadcastable_shapes(num_shapes=2, max_dims=4, min_side=0, max_side=4))
    dtype = draw(dtypes)
    return tuple(draw(arrays(shape, dtype, low)) for shape in shapes.input_shapes)


def grad_of(fn, *inputs: np.ndarray, dout: np.ndarray) -> list[np.ndarray]:
    tensors = [Tensor(x, requires_grad=True) for x in inputs]
    fn(*tensors).backward(dout)
    return [x.grad for x in tensors]


def assert_adjoint(fn, x: np.ndarray, seed: int) -> None:
    """<fn(x), u> = <x, dx(u)>: what the gradient of a linear operation must satisfy for every x and u."""
    y = fn(Tensor(x)).data
    u = np.random.default_rng(seed).normal(size=y.shape).astype(y.dtype)
    (dx,) = grad_of(fn, x, dout=u)
    wide = np.float64
    size = np.abs(x.astype(wide)).sum() * np.abs(u).max(initial=0) + 1
    difference = np.sum(y.astype(wide) * u) - np.sum(x.astype(wide) * dx)
    assert abs(difference) <= tolerance(x.dtype, y.size) * size


# -- arithmetic


@pytest.mark.parametrize("op", [operator.add, operator.sub, operator.mul], ids=lambda op: op.__name__)
@given(pair=broadcasting_pairs())
def test_arithmetic_broadcasts_as_numpy(op, pair):
    x, y = pair
    z = op(Tensor(x), Tensor(y)).data
    np.testing.assert_array_equal(z, op(x, y))
    assert z.dtype == x.dtype


@pytest.mark.parametrize("op", [operator.truediv, operator.pow], ids=lambda op: op.__name__)
@given(pair=broadcasting_pairs(low=0.5))
def test_division_and_power_broadcast_as_numpy(op, pair):
    np.testing.assert_allclose(op(*map(Tensor, pair)).data, op(*pair), rtol=tolerance(pair[0].dtype))


@given(pair=broadcasting_pairs(), seed=seeds)
def test_a_broadcast_gradient_is_the_sum_over_its_copies(pair, seed):
    x, y = pair
    dz = np.random.default_rng(seed).normal(size=np.broadcast_shapes(x.shape, y.shape)).astype(x.dtype)
    dx, dy = grad_of(operator.mul, x, y, dout=dz)
    for d, own, other in ((dx, x, y), (dy, y, x)):
        # One element of `own` at a time: every place of z that reads it.
        places = np.broadcast_to(np.arange(own.size).reshape(own.shape), dz.shape)
        terms = dz * np.broadcast_to(other, dz.shape)
        wanted = np.bincount(places.ravel(), terms.ravel().astype(float), own.size).reshape(own.shape)
        np.testing.assert_allclose(d, wanted, rtol=0, atol=tolerance(x.dtype, dz.size) * 8)


@pytest.mark.parametrize("op", [operator.add, operator.sub, operator.mul, operator.truediv, operator.pow])
def test_constants_on_either_side_keep_float32(op):
    x = Tensor([1.0, 2.0])
    for constant in (2, 2.0, np.float64(2), np.int64(2), np.array([2.0, 3.0]), [2, 3], np.array(2.0), True):
        for found, wanted in (
            (op(x, constant), op(x.data.astype(float), np.asarray(constant, float))),
            (op(constant, x), op(np.asarray(constant, float), x.data.astype(float))),
        ):
            assert isinstance(found, Tensor) and found.dtype == np.float32
            np.testing.assert_allclose(found.data, wanted, rtol=1e-6)


def test_two_tensors_promote_as_numpy_and_each_gradient_keeps_its_type():
    x, y = Tensor(np.float32([1, 2]), requires_grad=True), Tensor(np.float64([3, 4]), requires_grad=True)
    z = x * y
    assert z.dtype == np.float64
    z.sum().backward()
    assert x.grad.dtype == np.float32 and y.grad.dtype == np.float64


def test_shapes_that_do_not_broadcast_are_errors():
    with pytest.raises(ValueError, match=r"could not be broadcast.*\(2,\) \(3,\)"):
        Tensor([1.0, 2.0]) + Tensor([1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    "name", ["exp", "log", "sqrt", "tanh", "sigmoid", "relu", "silu", "gelu"]
)  # fmt: skip
@given(x=arrays(low=0.25))
def test_methods_are_the_functions(name, x):
    formula = {
        "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
        "relu": lambda x: np.maximum(x, 0),
        "silu": lambda x: x / (1 + np.exp(-x)),
        "gelu": lambda x: x * 0.5 * (1 + np.vectorize(__import__("math").erf, [float])(x / np.sqrt(2))),
    }.get(name, getattr(np, name, None))
    found = getattr(Tensor(x), name)().data
    np.testing.assert_allclose(found, formula(x), rtol=1e-13)
    np.testing.assert_array_equal(found, getattr(ops, name)(x).data)


@given(pair=broadcasting_pairs(), seed=seeds)
def test_choices_are_numpys(pair, seed):
    x, y = pair
    condition = np.random.default_rng(seed).random(np.broadcast_shapes(x.shape, y.shape)) < 0.5
    np.testing.assert_array_equal(ops.maximum(x, y).data, np.maximum(x, y))
    np.testing.assert_array_equal(ops.minimum(x, y).data, np.minimum(x, y))
    np.testing.assert_array_equal(ops.where(condition, Tensor(x), Tensor(y)).data, np.where(condition, x, y))
    dz = np.ones(condition.shape, x.dtype)
    dx, dy = grad_of(ops.maximum, x, y, dout=dz)
    assert float(dx.sum() + dy.sum()) == pytest.approx(dz.sum())  # between them they get all of it


# -- comparisons


def test_comparisons_give_plain_arrays_of_bools():
    x = Tensor([1.0, 2.0, 3.0])
    for found, wanted in ((x < 2, [1, 0, 0]), (x <= 2, [1, 1, 0]), (x > 2, [0, 0, 1]), (x >= 2, [0, 1, 1])):
        assert type(found) is np.ndarray and found.dtype == bool
        assert found.tolist() == [bool(w) for w in wanted]
    assert (x < Tensor([2.0, 2.0, 9.0])).tolist() == [True, False, True]
    assert (2 < x).tolist() == [False, False, True] and (np.full(3, 2.0) < x).tolist() == [False, False, True]
    assert x[x > 1.5].data.tolist() == [2, 3]


def test_equality_is_identity_so_that_tensors_can_be_keys():
    x, y = Tensor([1.0]), Tensor([1.0])
    assert x == x and x != y and len({x, y}) == 2 and y in [x, y] and [x, y].index(y) == 1


# -- reductions


@st.composite
def reductions(draw):
    x = draw(arrays(dtype=draw(dtypes)))
    one = st.integers(-x.ndim, x.ndim - 1) if x.ndim else st.none()
    some = hnp.valid_tuple_axes(x.ndim)
    return x, draw(st.none() | one | some), draw(st.booleans())


@given(reductions(), seeds)
def test_sum_is_numpys_and_its_gradient_the_adjoint(case, seed):
    x, axis, keepdims = case
    wanted = x.sum(axis=axis, keepdims=keepdims)
    found = Tensor(x).sum(axis=axis, keepdims=keepdims).data
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2 * tolerance(x.dtype, x.size))
    assert found.shape == np.shape(wanted) and found.dtype == x.dtype
    assert_adjoint(lambda x: x.sum(axis=axis, keepdims=keepdims), x, seed)


@given(reductions(), seeds)
def test_mean_is_the_sum_over_the_count(case, seed):
    x, axis, keepdims = case
    total, ones = x.sum(axis=axis, keepdims=keepdims), np.ones(x.shape).sum(axis=axis, keepdims=keepdims)
    if x.size:
        found = Tensor(x).mean(axis=axis, keepdims=keepdims).data
        np.testing.assert_allclose(found, total / ones, rtol=0, atol=2 * tolerance(x.dtype, x.size))
        assert_adjoint(lambda x: x.mean(axis=axis, keepdims=keepdims), x, seed)


@given(reductions(), seeds)
def test_max_is_numpys_and_hands_the_gradient_on_whole(case, seed):
    x, axis, keepdims = case
    if not x.size:
        return
    x = np.round(x * 2) / 2  # many ties
    y = x.max(axis=axis, keepdims=keepdims)
    np.testing.assert_array_equal(Tensor(x).max(axis=axis, keepdims=keepdims).data, y)
    dy = np.random.default_rng(seed).normal(size=np.shape(y)).astype(x.dtype)
    (dx,) = grad_of(lambda x: x.max(axis=axis, keepdims=keepdims), x, dout=dy)
    np.testing.assert_allclose(
        dx.sum(axis=axis, keepdims=keepdims), dy, rtol=0, atol=8 * tolerance(x.dtype, x.size)
    )
    greatest = x == x.max(axis=axis, keepdims=True)
    assert not dx[~greatest].any()


# -- shape


@given(arrays(), st.data(), seeds)
def test_transpose_is_numpys(x, data, seed):
    axes = tuple(data.draw(st.permutations(range(x.ndim))))
    np.testing.assert_array_equal(Tensor(x).transpose(axes).data, x.transpose(axes))
    np.testing.assert_array_equal(Tensor(x).transpose(*axes).data if axes else x, x.transpose(*axes))
    np.testing.assert_array_equal(Tensor(x).T.data, x.T)
    assert_adjoint(lambda x: x.transpose(axes), x, seed)


@given(arrays(), st.data(), seeds)
def test_reshape_is_numpys(x, data, seed):
    shape = tuple(data.draw(st.permutations(x.shape))) if x.ndim else (1, 1)
    np.testing.assert_array_equal(Tensor(x).reshape(shape).data, x.reshape(shape))
    np.testing.assert_array_equal(Tensor(x).reshape(*shape).data, x.reshape(*shape))
    if x.size:
        assert Tensor(x).reshape(-1).shape == (x.size,)
    assert_adjoint(lambda x: x.reshape(shape), x, seed)


@given(arrays(), st.data(), seeds)
def test_slices_numbers_and_new_axes_index_as_numpy(x, data, seed):
    key = data.draw(hnp.basic_indices(x.shape, allow_newaxis=True))
    np.testing.assert_array_equal(Tensor(x)[key].data, x[key])
    assert_adjoint(lambda x: x[key], x, seed)


@given(arrays((3, 4, 2)), st.data(), seeds)
def test_integer_arrays_index_as_numpy(x, data, seed):
    key = data.draw(hnp.integer_array_indices(x.shape))
    np.testing.assert_array_equal(Tensor(x)[key].data, x[key])
    assert_adjoint(lambda x: x[key], x, seed)
    mixed = (slice(1, None), data.draw(st.lists(st.integers(-4, 3), max_size=5)), 1)
    assert_adjoint(lambda x: x[mixed], x, seed)


@given(arrays(), seeds)
def test_masks_index_as_numpy(x, seed):
    mask = np.random.default_rng(seed).random(x.shape) < 0.5
    np.testing.assert_array_equal(Tensor(x)[mask].data, x[mask])
    assert_adjoint(lambda x: x[mask], x, seed)


@given(st.data(), seeds)
def test_concat_stack_and_split_are_numpys(data, seed):
    shape = data.draw(hnp.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=4))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    parts = [data.draw(arrays(shape)) for _ in range(data.draw(st.integers(1, 4)))]
    joined = ops.concat([Tensor(x) for x in parts], axis=axis)
    np.testing.assert_array_equal(joined.data, np.concatenate(parts, axis=axis))
    np.testing.assert_array_equal(ops.stack(parts, axis=axis).data, np.stack(parts, axis=axis))
    for found, wanted in zip(ops.split(joined, len(parts), axis=axis), parts, strict=True):
        np.testing.assert_array_equal(found.data, wanted)
    places = sorted(data.draw(st.lists(st.integers(0, joined.shape[axis]), max_size=3)))
    for found, wanted in zip(
        ops.split(joined, places, axis), np.split(joined.data, places, axis), strict=True
    ):
        np.testing.assert_array_equal(found.data, wanted)
    assert_adjoint(lambda x: ops.concat([x, np.zeros_like(x.data), x], axis=axis), parts[0], seed)
    assert_adjoint(lambda x: ops.stack([x, 2 * x], axis=axis), parts[0], seed)


@given(hnp.mutually_broadcastable_shapes(num_shapes=2, min_side=0, max_side=4), st.data(), seeds)
def test_broadcast_to_is_numpys(shapes, data, seed):
    x = data.draw(arrays(shapes.input_shapes[0]))
    np.testing.assert_array_equal(
        ops.broadcast_to(x, shapes.result_shape).data, np.broadcast_to(x, shapes.result_shape)
    )
    assert_adjoint(lambda x: ops.broadcast_to(x, shapes.result_shape), x, seed)


def test_iterating_yields_rows():
    x = Tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    first, second = x
    (first * 2 + second).sum().backward()
    assert x.grad.tolist() == [[2, 2], [1, 1]]
    with pytest.raises(TypeError):
        list(Tensor(1.0))


# -- matrix products


@given(
    hnp.mutually_broadcastable_shapes(signature=np.matmul.signature, max_dims=2, min_side=0, max_side=5),
    st.data(),
)
def test_matmul_is_numpys(shapes, data):
    dtype = data.draw(dtypes)
    a, b = (data.draw(arrays(shape, dtype)) for shape in shapes.input_shapes)
    found, wanted = (Tensor(a) @ Tensor(b)).data, np.asarray(np.matmul(a.astype(float), b.astype(float)))
    assert found.dtype == dtype and found.shape == wanted.shape
    np.testing.assert_allclose(
        found, wanted, rtol=0, atol=4 * tolerance(dtype, a.shape[-1]) * max(a.shape[-1], 1)
    )
    u = np.random.default_rng(0).normal(size=found.shape).astype(dtype)
    da, db = grad_of(operator.matmul, a, b, dout=u)
    for x, dx in ((a, da), (b, db)):
        difference = np.sum(found.astype(float) * u) - np.sum(x.astype(float) * dx)
        assert abs(difference) <= tolerance(dtype, found.size * a.shape[-1]) * (10 + found.size * a.shape[-1])


def test_numpy_arrays_multiply_from_either_side():
    a, b = np.arange(6.0).reshape(2, 3), np.arange(6.0).reshape(3, 2)
    for found in (Tensor(a) @ b, a @ Tensor(b), Tensor(a) @ b.tolist(), ops.matmul(a, b)):
        assert isinstance(found, Tensor)
        np.testing.assert_allclose(found.data, a @ b)


def test_an_expression_of_all_operators_has_the_right_gradient():
    rng = np.random.default_rng(0)
    x, w = (Tensor(rng.uniform(0.5, 1.5, shape), requires_grad=True) for shape in ((3, 4), (4, 3)))

    def expression(x, w):
        y = (x @ w) ** 2 / (1 + x.sum()) - (2 - x.T * w).exp()[:, 0:3].mean() + -(3**w).T @ w
        return (0.1 * y[1:]).sigmoid().log()

    gradcheck(expression, x, w, stencil=5)
