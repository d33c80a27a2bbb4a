"""Layers and optimizers: names, state, gradients, and the update rules against formulas written out."""

import math

import numpy as np
import pytest

from entrenar import nn, ops, optim, random
from entrenar.gradcheck import gradcheck
from entrenar.tensor import Tensor

RNG = np.random.default_rng(0)


def layers():
    return {
        "Linear": (nn.Linear(5, 3, bias=True, dtype=np.float64), Tensor(RNG.normal(size=(2, 5)), True)),
        "RMSNorm": (nn.RMSNorm(5, dtype=np.float64), Tensor(RNG.normal(size=(2, 5)), True)),
        "LayerNorm": (nn.LayerNorm(5, dtype=np.float64), Tensor(RNG.normal(size=(2, 5)), True)),
        "Embedding": (nn.Embedding(7, 3, dtype=np.float64), np.array([[1, 6, 1]])),
        "Dropout": (nn.Dropout(0.5).eval(), Tensor(RNG.normal(size=(2, 5)), True)),
    }


@pytest.mark.tier1
@pytest.mark.parametrize("name", layers())
def test_every_layer_passes_the_gradient_check(name):
    layer, x = layers()[name]
    inputs = [*layer.parameters(), *([x] if isinstance(x, Tensor) else [])]
    gradcheck(lambda *_: layer(x), *inputs, stencil=5)


def test_every_layer_is_in_that_list():
    defined = {name for name, value in vars(nn).items()
               if isinstance(value, type) and issubclass(value, nn.Module) and value is not nn.Module}  # fmt: skip
    assert defined == set(layers())


class Net(nn.Module):
    def __init__(self):
        self.first = nn.Linear(4, 4)
        self.rest = [nn.Linear(4, 4, bias=True), nn.RMSNorm(4)]
        self.shared = self.first.weight
        self.constant = Tensor(np.zeros(2))

    def forward(self, x):
        return self.rest[1](self.rest[0](self.first(x)))


def test_names_are_paths_and_a_shared_tensor_counts_once():
    names = [name for name, _ in Net().named_parameters()]
    assert names == ["shared", "rest.0.weight", "rest.0.bias", "rest.1.weight"]
    assert len(Net().parameters()) == 4


def test_state_travels_between_modules():
    random.seed(0)
    a, b = Net(), Net()
    b.load_state_dict({name: array.copy() for name, array in a.state_dict().items()})
    for name, array in a.state_dict().items():
        np.testing.assert_array_equal(b.state_dict()[name], array)


def test_all_that_does_not_fit_is_named_before_anything_changes():
    net = Net()
    before = {name: array.copy() for name, array in net.state_dict().items()}
    state = {name: array + 1 for name, array in before.items()}
    state["rest.1.weight"] = np.zeros(5)
    state["extra"] = np.zeros(1)
    del state["rest.0.bias"]
    with pytest.raises(ValueError) as error:
        net.load_state_dict(state)
    for part in ("missing rest.0.bias (4,)", "unexpected extra (1,)", "rest.1.weight has shape (5,), wanted (4,)"):
        assert part in str(error.value)
    for name, array in net.state_dict().items():
        np.testing.assert_array_equal(array, before[name])


def test_train_and_eval_reach_every_child():
    net = Net()
    net.rest.append(nn.Dropout(0.5))
    assert net.eval().rest[2].training is False
    x = Tensor(np.ones((100, 4)))
    np.testing.assert_array_equal(net.rest[2](x).data, x.data)
    net.train()
    assert 100 < np.count_nonzero(net.rest[2](x).data) < 300


def test_a_module_without_forward_says_so():
    with pytest.raises(TypeError, match=r"Module must define forward\(\)"):
        nn.Module()()


def adamw_by_hand(p, grads, lr, b1, b2, eps, wd):
    m = v = np.zeros_like(p)
    for t, g in enumerate(grads, start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        p = p - lr * wd * p - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
    return p


@pytest.mark.parametrize("dtype, rtol", [(np.float64, 1e-12), (np.float32, 2e-6)])
def test_adamw_is_its_formula_and_spares_vectors_from_decay(dtype, rtol):
    matrix, vector = RNG.normal(size=(3, 37)).astype(dtype), RNG.normal(size=37).astype(dtype)
    start = {"w": matrix, "norm": vector, "idle": vector}
    params = {name: Tensor(array.copy(), True) for name, array in start.items()}
    opt = optim.AdamW(params.items(), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    grads = [{"w": RNG.normal(size=(3, 37)).astype(dtype), "norm": RNG.normal(size=37).astype(dtype)} for _ in range(5)]
    for step in grads:
        for name, g in step.items():
            params[name].grad = 2 * g
        opt.step(grad_scale=0.5)
    for name, start, wd in (("w", matrix, 0.1), ("norm", vector, 0.0)):
        exact = [g[name].astype(np.float64) for g in grads]
        wanted = adamw_by_hand(start.astype(np.float64), exact, 1e-2, 0.9, 0.95, 1e-8, wd)
        np.testing.assert_allclose(params[name].data, wanted, rtol=rtol, atol=rtol)
    np.testing.assert_array_equal(params["idle"].data, vector)


def test_adamw_continues_from_its_saved_state():
    def run(steps, opt, p):
        for i in steps:
            p.grad = np.full((2, 2), float(i), np.float32)
            opt.step()

    p = Tensor(np.ones((2, 2), np.float32), True)
    opt = optim.AdamW([("p", p)])
    run(range(6), opt, p)
    q = Tensor(np.ones((2, 2), np.float32), True)
    first = optim.AdamW([("p", q)])
    run(range(3), first, q)
    second = optim.AdamW([("p", q)])
    second.load_state_dict({name: np.array(value) for name, value in first.state_dict().items()})
    run(range(3, 6), second, q)
    np.testing.assert_array_equal(p.data, q.data)


def test_adamw_refuses_state_and_constants_that_do_not_fit():
    p = Tensor(np.ones((2, 2), np.float32), True)
    with pytest.raises(ValueError, match="missing m.p .2, 2."):
        optim.AdamW([("p", p)]).load_state_dict({})
    with pytest.raises(ValueError, match="lr = -1: wanted >= 0; betas = .0.9, 1.0.: wanted"):
        optim.AdamW([("p", p)], lr=-1, betas=(0.9, 1.0))


def test_sgd_with_momentum_is_its_formula():
    p, wanted, v = Tensor(np.ones(3), True), np.ones(3), np.zeros(3)
    opt = optim.SGD([p], lr=0.1, momentum=0.9)
    for i in range(4):
        p.grad = np.arange(3.0) + i
        opt.step()
        v = 0.9 * v + np.arange(3.0) + i
        wanted = wanted - 0.1 * v
    np.testing.assert_allclose(p.data, wanted, rtol=1e-14)
    opt.zero_grad()
    assert p.grad is None


def test_clipping_scales_the_whole_gradient_to_the_bound_and_never_up():
    a, b = Tensor(np.zeros(2), True), Tensor(np.zeros((1, 1)), True)
    a.grad, b.grad = np.array([3.0, 0.0]), np.array([[4.0]])
    assert optim.clip_by_global_norm([a, b], 10.0) == 5.0 and a.grad[0] == 3
    assert optim.clip_by_global_norm([a, b], 1.0) == 5.0
    assert optim.global_norm([a, b]) == pytest.approx(1.0)
    assert a.grad[0] / b.grad[0, 0] == pytest.approx(3 / 4)
    assert optim.clip_scale(5.0, 0) == 1.0


def test_schedules_have_their_shapes():
    def rates(name, **kwargs):
        return [optim.schedule(name, i, total_steps=10, **kwargs) for i in range(10)]

    assert rates("constant", warmup_steps=4)[:5] == [0.25, 0.5, 0.75, 1, 1]
    np.testing.assert_allclose(rates("linear", min_ratio=0.1), 1 - 0.09 * np.arange(1, 11))
    half_a_cosine = [(1 + math.cos(math.pi * i / 10)) / 2 for i in range(1, 11)]
    np.testing.assert_allclose(rates("cosine"), half_a_cosine, atol=1e-15)
    np.testing.assert_allclose(rates("wsd", decay_steps=4), [1] * 6 + [0.75, 0.5, 0.25, 0], atol=1e-15)
    for name in optim.SCHEDULES:
        if name != "constant":
            assert rates(name, warmup_steps=3, min_ratio=0.2, decay_steps=2)[-1] == pytest.approx(0.2)
            assert optim.schedule(name, 99, total_steps=10) == 0
    with pytest.raises(ValueError, match="unknown name 'cosin'; one of cosine"):
        optim.schedule("cosin", 0, total_steps=1)


def test_a_small_network_learns():
    random.seed(0)
    x = Tensor(RNG.normal(size=(64, 4)).astype(np.float32))
    wanted = (x.data[:, :1] * x.data[:, 1:2]).astype(np.float32)
    a, b = nn.Linear(4, 32, bias=True), nn.Linear(32, 1, bias=True)
    opt = optim.AdamW([*a.named_parameters("a."), *b.named_parameters("b.")], lr=1e-2)
    for _ in range(200):
        loss = ((b(ops.silu(a(x))) - wanted) ** 2).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert loss.item() < 0.1 * (wanted**2).mean()


def test_what_a_dict_holds_belongs_to_the_tree():
    class Two(nn.Module):
        def __init__(self):
            self.by_name = {"a": nn.Linear(2, 3), "b": Tensor(np.ones(2), requires_grad=True), "c": 5}

    model = Two()
    assert [name for name, _ in model.named_parameters()] == ["by_name.b", "by_name.a.weight"]
    assert [name for name, _ in model.named_modules()] == ["by_name.a"]
    model.eval()
    assert not model.by_name["a"].training
    model.freeze()
    assert not model.parameters() and set(model.state_dict()) == {"by_name.b", "by_name.a.weight"}
