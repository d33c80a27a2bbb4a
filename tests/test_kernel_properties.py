"""What must hold for every input, whatever the kernels' formulas: tried by hypothesis on random shapes,
strides, values.

The properties run on whatever kernels were chosen (C where it is built). 20 examples each by default, 120 in
tier3 (`pytest --hypothesis-profile=tier3`).
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import CASES, IGNORE, TINY, check, expected, naive_attention, normal, per_head, run, split

from entrenar import kernels
from entrenar.kernels import reference

F32 = np.float32
EPS = float(np.finfo(F32).eps)

seeds = st.integers(0, 2**32 - 1)
lengths = st.integers(1, 80)
scales = st.sampled_from([1e-3, 1.0, 30.0])


def rows(seed: int, N: int, C: int, scale: float = 1.0) -> np.ndarray:
    return normal(np.random.default_rng(seed), N, C) * F32(scale)


# Softmax


@given(seeds, st.integers(1, 9), st.integers(1, 300), scales)
def test_softmax_rows_sum_to_one(seed, N, C, scale):
    y = kernels.softmax_forward(rows(seed, N, C, scale))
    assert np.all(y >= 0)
    np.testing.assert_allclose(y.sum(-1, dtype=np.float64), 1, rtol=EPS * (4 + np.sqrt(C)))


@given(seeds, st.integers(1, 9), st.integers(1, 300), st.integers(-64, 64))
def test_softmax_ignores_a_shift(seed, N, C, shift):
    """Values on a grid of 1/256, so that adding a whole number rounds nothing away."""
    x = np.round(rows(seed, N, C) * F32(256)) / F32(256)
    assert kernels.softmax_forward(x + F32(shift)).tobytes() == kernels.softmax_forward(x).tobytes()


@given(seeds, st.integers(1, 9), st.integers(1, 300), scales)
def test_log_softmax_is_the_logarithm_of_softmax(seed, N, C, scale):
    x = rows(seed, N, C, scale)
    y, log_y = kernels.softmax_forward(x), kernels.log_softmax_forward(x).astype(np.float64)
    reach = 4 + np.sqrt(C) + np.abs(x).max() * 2
    np.testing.assert_allclose(np.exp(log_y), y, rtol=4 * EPS * reach, atol=TINY)


@given(seeds, st.integers(1, 9), st.integers(1, 100))
def test_softmax_gradient_is_orthogonal_to_a_shift(seed, N, C):
    """Adding a constant to a row changes nothing, so each row of dx sums to zero."""
    y = kernels.softmax_forward(rows(seed, N, C))
    dy = rows(seed + 1, N, C)
    dx = kernels.softmax_backward(dy, y).astype(np.float64)
    assert np.all(np.abs(dx.sum(-1)) <= EPS * (4 + np.sqrt(C)) * np.abs(y * dy).sum(-1) * 4 + 1e-30)


# Attention


@st.composite
def attention_inputs(draw, longest: int = 70):
    KH, group, D = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 20))
    B, T = draw(st.integers(1, 2)), draw(st.integers(1, longest))
    S = T + draw(st.sampled_from([0, 0, 1, 13, 64]))
    rng = np.random.default_rng(draw(seeds))
    q, k, v = normal(rng, B, T, KH * group, D), normal(rng, B, S, KH, D), normal(rng, B, S, KH, D)
    return q, k, v, float(1 / np.sqrt(D))


@given(attention_inputs(), st.data())
def test_attention_never_lets_a_later_token_change_an_earlier_output(inputs, data):
    q, k, v, scale = inputs
    T, S = q.shape[1], k.shape[1]
    first = data.draw(st.integers(0, T - 1))  # queries before `first` see keys before `first + S - T`
    changed_q, changed_k, changed_v = q.copy(), k.copy(), v.copy()
    changed_q[:, first:] += 1
    changed_k[:, first + S - T :] *= -3
    changed_v[:, first + S - T :] += 5

    before, lse_before = kernels.attention_forward(q, k, v, scale=scale)
    after, lse_after = kernels.attention_forward(changed_q, changed_k, changed_v, scale=scale)
    assert after[:, :first].tobytes() == before[:, :first].tobytes()
    assert lse_after[:, :, :first].tobytes() == lse_before[:, :, :first].tobytes()


@given(attention_inputs(), st.data())
def test_a_gradient_reaches_no_token_after_its_output(inputs, data):
    """do is zero from some query on: keys and values only those queries see get no gradient, nor do those
    queries.
    """
    q, k, v, scale = inputs
    T, S = q.shape[1], k.shape[1]
    first = data.draw(st.integers(0, T - 1))
    o, lse = kernels.attention_forward(q, k, v, scale=scale)
    do = np.ones_like(o)
    do[:, first:] = 0
    dq, dk, dv = kernels.attention_backward(do, q, k, v, o, lse, scale=scale)
    assert not dq[:, first:].any() and not dk[:, first + S - T :].any() and not dv[:, first + S - T :].any()


@given(attention_inputs())
def test_attention_equals_its_naive_form(inputs):
    q, k, v, scale = inputs
    o, lse = kernels.attention_forward(q, k, v, scale=scale)
    p, naive_lse, _ = naive_attention(q.astype(np.float64), k.astype(np.float64), scale)
    wide_v = per_head(v.astype(np.float64), q)
    size = np.abs(naive_lse).max() + np.sqrt(k.shape[1]) + np.square(q).sum(-1).max() + np.square(k).sum(-1).max()
    np.testing.assert_allclose(o, np.einsum("bhts,bshd->bthd", p, wide_v), atol=4 * EPS * size * np.abs(v).max())
    np.testing.assert_allclose(lse, naive_lse, atol=4 * EPS * size)


@given(attention_inputs())
def test_attention_averages_values(inputs):
    """Outputs lie within the values' range, and equal values come out as they are."""
    q, k, v, scale = inputs
    o, _ = kernels.attention_forward(q, k, v, scale=scale)
    slack = EPS * (4 + np.sqrt(k.shape[1])) * np.abs(v).max()
    assert o.max() <= v.max() + 2 * slack and o.min() >= v.min() - 2 * slack
    o, _ = kernels.attention_forward(q, k, np.full_like(v, 3), scale=scale)
    np.testing.assert_allclose(o, 3, rtol=EPS * (4 + np.sqrt(k.shape[1])))


@given(attention_inputs())
def test_a_query_alone_with_all_keys_gets_what_it_gets_among_others(inputs):
    """Decoding with a cache, one token at a time, gives the last row of the whole."""
    q, k, v, scale = inputs
    whole, _ = kernels.attention_forward(q, k, v, scale=scale)
    alone, _ = kernels.attention_forward(q[:, -1:], k, v, scale=scale)
    reach = np.square(q).sum(-1).max() + np.square(k).sum(-1).max() + np.sqrt(k.shape[1])
    np.testing.assert_allclose(alone, whole[:, -1:], atol=4 * EPS * reach * np.abs(v).max())


# Rotary embedding


def turned(x: np.ndarray, positions: np.ndarray, theta: float = 10_000.0) -> np.ndarray:
    """x (B, T, H, D) by the angles of its positions (T,)"""
    half = x.shape[-1] // 2
    angle = positions[:, None] * theta ** (-np.arange(half) / half)
    return kernels.rope_forward(x, np.cos(angle).astype(F32), np.sin(angle).astype(F32))


@given(seeds, st.integers(1, 9), st.integers(1, 3), st.integers(1, 40))
def test_rope_keeps_norms(seed, T, H, half):
    x = normal(np.random.default_rng(seed), 2, T, H, 2 * half)
    norms = [np.linalg.norm(a.astype(np.float64), axis=-1) for a in (turned(x, np.arange(T)), x)]
    np.testing.assert_allclose(*norms, rtol=8 * EPS)


@given(seeds, st.integers(1, 40), st.integers(0, 500), st.integers(0, 500), st.integers(0, 500))
def test_rope_scores_depend_on_the_relative_position_only(seed, half, m, n, shift):
    rng = np.random.default_rng(seed)
    q, k = normal(rng, 1, 1, 1, 2 * half), normal(rng, 1, 1, 1, 2 * half)

    def score(a: int, b: int) -> float:
        return float(np.vdot(turned(q, np.array([a])).astype(np.float64), turned(k, np.array([b])).astype(np.float64)))

    size = float(np.linalg.norm(q) * np.linalg.norm(k))
    assert abs(score(m, n) - score(m + shift, n + shift)) <= 16 * EPS * size


@given(seeds, st.integers(1, 9), st.integers(1, 3), st.integers(1, 40))
def test_rope_backward_turns_back(seed, T, H, half):
    rng = np.random.default_rng(seed)
    x, angle = normal(rng, 2, T, H, 2 * half), rng.uniform(-9, 9, (T, half))
    cos, sin = np.cos(angle).astype(F32), np.sin(angle).astype(F32)
    back = kernels.rope_backward(kernels.rope_forward(x, cos, sin), cos, sin)
    np.testing.assert_allclose(back, x, atol=8 * EPS * np.abs(x).max())


# Norms


@given(seeds, st.integers(1, 9), st.integers(1, 200), st.integers(-20, 20))
def test_rms_norm_ignores_scale(seed, N, C, power):
    """By a power of two it is exact, with eps = 0; by any factor, within rounding."""
    x, w = rows(seed, N, C), rows(seed + 1, 1, C)[0]
    y, _ = kernels.rms_norm_forward(x, w, eps=0.0)
    scaled, _ = kernels.rms_norm_forward(x * F32(2.0**power), w, eps=0.0)
    np.testing.assert_allclose(scaled, y, rtol=EPS * 4)
    scaled, _ = kernels.rms_norm_forward(x * F32(0.37), w, eps=0.0)
    np.testing.assert_allclose(scaled, y, rtol=EPS * (8 + np.sqrt(C)))


@given(seeds, st.integers(1, 9), st.integers(1, 200))
def test_rms_norm_rows_have_mean_square_one(seed, N, C):
    y, _ = kernels.rms_norm_forward(rows(seed, N, C), np.ones(C, F32), eps=0.0)
    np.testing.assert_allclose(np.square(y.astype(np.float64)).mean(-1), 1, rtol=EPS * (8 + 2 * np.sqrt(C)))


@given(seeds, st.integers(1, 9), st.integers(2, 200), st.integers(-8, 8))
def test_layer_norm_ignores_a_shift_and_centres(seed, N, C, shift):
    """Values on a grid, so that the shift itself rounds nothing away."""
    x = np.round(rows(seed, N, C) * F32(256)) / F32(256)
    w, b = np.ones(C, F32), np.zeros(C, F32)
    y, _, rstd = kernels.layer_norm_forward(x, w, b, eps=1e-5)
    moved, _, _ = kernels.layer_norm_forward(x + F32(shift), w, b, eps=1e-5)
    slack = EPS * (4 + np.sqrt(C)) * (abs(shift) + np.abs(x).max()) * rstd.max() * (1 + np.abs(y).max())
    np.testing.assert_allclose(moved, y, atol=4 * slack)
    assert np.all(np.abs(y.astype(np.float64).mean(-1)) <= 4 * slack)


# Losses


@given(seeds, st.integers(1, 20), st.integers(1, 200), scales)
def test_cross_entropy_is_not_negative(seed, N, V, scale):
    logits = rows(seed, N, V, scale)
    targets = np.random.default_rng(seed).integers(0, V, N)
    losses, lse = kernels.cross_entropy_forward(logits, targets, ignore_index=IGNORE)
    assert np.all(losses >= -EPS * (4 + np.abs(lse)))
    uniform, _ = kernels.cross_entropy_forward(np.zeros((N, V), F32), targets, ignore_index=IGNORE)
    np.testing.assert_allclose(uniform, np.log(V), atol=EPS * (4 + np.sqrt(V)))


@given(seeds, st.integers(1, 20), st.integers(1, 200))
def test_the_gradient_of_cross_entropy_sums_to_zero_in_each_row(seed, N, V):
    logits, targets = rows(seed, N, V), np.random.default_rng(seed).integers(0, V, N)
    _, lse = kernels.cross_entropy_forward(logits, targets, ignore_index=IGNORE)
    d = kernels.cross_entropy_backward(np.ones(N, F32), logits, targets, lse, ignore_index=IGNORE)
    assert np.all(np.abs(d.astype(np.float64).sum(-1)) <= EPS * (8 + np.sqrt(V) + np.abs(lse)) * 4)


@given(seeds, st.integers(1, 60), st.integers(1, 40), st.integers(1, 150))
def test_the_fused_loss_is_a_product_and_a_cross_entropy(seed, N, C, V):
    rng = np.random.default_rng(seed)
    x, w, targets = normal(rng, N, C), normal(rng, V, C), rng.integers(0, V, N)
    targets[::3] = IGNORE
    losses, _, _ = kernels.linear_cross_entropy(
        x, w, targets, ignore_index=IGNORE, scale=1.0, need_dx=False, need_dw=False
    )
    logits = x.astype(np.float64) @ w.T.astype(np.float64)
    plain, _ = reference.cross_entropy_forward(logits, targets, ignore_index=IGNORE)
    reach = (np.abs(x) @ np.abs(w).T).max() * (1 + np.sqrt(C)) + np.sqrt(V)
    np.testing.assert_allclose(losses, plain, atol=4 * EPS * reach)


# Gradients are linear in the output gradient

BACKWARD = [case for case in CASES if case.kernel.endswith("_backward")]


@pytest.mark.parametrize("case", BACKWARD, ids=lambda case: case.kernel)
@given(seed=seeds)
def test_gradients_are_linear_in_the_output_gradient(case, seed):
    """f(a d1 + b d2) = a f(d1) + b f(d2), with a and b powers of two"""
    rng = np.random.default_rng(seed)
    args = case.make(rng, **case.sizes[int(rng.integers(3))])
    name = next(iter(args))  # the output gradient comes first
    d1, d2 = args[name], normal(rng, *args[name].shape)
    a, b = F32(2), F32(-0.5)

    def gradients_and_bounds(d: np.ndarray):
        given = args | {name: d}
        return zip(run(kernels, case, given), expected(reference, case, given)[1], strict=True)

    each = zip(*(gradients_and_bounds(d) for d in (d1, d2, a * d1 + b * d2)), strict=True)
    for (f1, bound1), (f2, bound2), (f, bound) in each:
        gap = np.abs(f.astype(np.float64) - (a * f1.astype(np.float64) + b * f2.astype(np.float64)))
        assert np.all(gap <= bound + abs(a) * bound1 + abs(b) * bound2 + TINY)


# Kernels equal their reference on random shapes and strides


def some_view(rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
    """x itself, or with random axes stored backwards, apart, or in another order."""
    how = rng.integers(5)
    if how == 0 or x.ndim == 0:
        return x
    if how == 1:
        order = rng.permutation(x.ndim)
        return np.ascontiguousarray(x.transpose(order)).transpose(np.argsort(order))
    steps = tuple(int(s) for s in rng.choice([1, 2, 3, -1, -2], x.ndim))
    if how == 2:
        steps = (1,) * (x.ndim - 1) + steps[-1:]
    if how == 3:
        steps = steps[:-1] + (1,)
    room = np.zeros([n * abs(s) for n, s in zip(x.shape, steps, strict=True)], x.dtype)
    view = room[tuple(slice(None, None, s) for s in steps)]
    view[...] = x
    return view


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.kernel)
@given(seed=seeds, tail=st.integers(0, 9), n=lengths)
def test_kernels_equal_their_reference_on_random_shapes_and_strides(case, seed, tail, n):
    rng = np.random.default_rng(seed)
    size = case.tails[tail % len(case.tails)](n)
    larger = {axis: int(rng.integers(1, 40)) for axis in ("N", "M", "K", "C", "V") if axis in size and size[axis] != n}
    args = case.make(rng, **size | larger)
    arrays, constants = split(args)
    views = {name: x if name in case.in_place else some_view(rng, x) for name, x in arrays.items()}
    check(kernels, reference, case, views | constants)


@given(
    seed=seeds,
    batch=st.lists(st.integers(0, 3), max_size=3),
    M=st.integers(0, 70),
    K=st.integers(0, 70),
    N=st.integers(0, 70),
)
def test_batched_products_equal_their_reference_with_any_broadcasting(seed, batch, M, K, N):
    rng = np.random.default_rng(seed)

    def operand(*matrix: int) -> np.ndarray:
        own = [1 if rng.random() < 0.3 else n for n in batch][int(rng.integers(len(batch) + 1)) :]
        return some_view(rng, normal(rng, *own, *matrix))

    check(kernels, reference, CASES[0], {"a": operand(M, K), "b": operand(K, N)})
