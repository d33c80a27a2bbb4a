"""Finite differences for adapted layers and whole adapted models: float and packed bases, checkpointed or not."""

from __future__ import annotations

import numpy as np
import pytest
from test_adapters import IDS, in_bfloat16, in_nf4, llama, trained

from entrenar import Tensor, gradcheck, random
from entrenar.adapters import LoraConfig, adapt
from entrenar.adapters.layers import LoRAEmbedding, LoRALinear, LowRank, Settings
from entrenar.adapters.model import adapted
from entrenar.gradcheck import GradcheckError
from entrenar.kernels.packed import Nested, Packed
from entrenar.nn import Embedding, Linear
from entrenar.ops.low_rank import row_squares, update_norm
from entrenar.tensor import no_grad, recorded

RNG = np.random.default_rng(4)


def packed(kind, rows, columns):
    n = rows * columns
    scales = RNG.uniform(0.1, 0.5, -(-n // 64)).astype(np.float32)
    if kind == "bfloat16":
        return Packed(
            kind, (rows, columns), (RNG.normal(size=n).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        )
    if kind == "q8_0":
        return Packed(kind, (rows, columns), RNG.integers(-127, 128, n).astype(np.int8), scales / 64)
    codes = RNG.integers(0, 256, -(-n // 2)).astype(np.uint8)
    if kind == "nested":
        table = np.sort(RNG.normal(size=256)).astype(np.float32)
        nested = Nested(RNG.integers(0, 256, len(scales)).astype(np.uint8), table, np.full(1, 0.1, np.float32), 0.3)
        return Packed("nf4", (rows, columns), codes, nested)
    return Packed(kind, (rows, columns), codes, scales)


def layer_of(base, rows, columns, *, dora, dropout=0.0, dtype=np.float64):
    """A layer of a frozen base (O, I) with an adapter of rank 3, and its tensors, all trained."""
    layer = LoRALinear(Linear(columns, rows))
    layer.base_layer.weight = (
        Tensor(RNG.normal(size=(rows, columns)).astype(dtype)) if base == "float" else packed(base, rows, columns)
    )
    values = {
        "lora_A.weight": RNG.normal(size=(3, columns)),
        "lora_B.weight": RNG.normal(size=(rows, 3)),
        "lora_magnitude_vector": RNG.uniform(0.5, 2, rows),
    }
    layer.add("a", {key: x.astype(dtype) for key, x in values.items()}, Settings(3, 0.8, dropout, dora))
    layer.freeze()
    layer.active = "a"
    for _, tensor in layer.tensors("a"):
        tensor.requires_grad = True
    return layer, [tensor for _, tensor in layer.tensors("a")]


def hold_norms(layers):
    """DoRA's norm is a constant of the gradient; to see the same, finite differences need one that stays."""
    for layer in layers:
        for name in layer.lora_magnitude_vector:
            fixed = layer.norm(name)
            layer.norm = lambda name, fixed=fixed: fixed


BASES = ["float", "nf4", "nested", "fp4", "q8_0", "bfloat16"]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("base", BASES)
def test_every_gradient_of_an_adapted_layer(base, dora, dropout):
    layer, tensors = layer_of(base, 10, 12, dora=dora, dropout=dropout)
    hold_norms([layer])
    x = Tensor(RNG.normal(size=(2, 4, 12)), requires_grad=True)

    def forward(*_):
        random.seed(2)
        with recorded():  # differences are taken under no_grad, where there is no dropout
            return layer(x)

    gradcheck(forward, x, *tensors)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("base", BASES)
def test_every_gradient_of_an_adapted_layer_through_the_float32_kernels(base, dora):
    layer, tensors = layer_of(base, 34, 70, dora=dora, dtype=np.float32)
    hold_norms([layer])
    x = Tensor(RNG.normal(size=(19, 70)).astype(np.float32), requires_grad=True)
    gradcheck(lambda *_: layer(x), x, *tensors, samples=20)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("base", ["float", "nf4"])
def test_every_gradient_of_an_adapted_embedding(base, dora):
    layer = LoRAEmbedding(Embedding(20, 8))
    layer.base_layer.weight = Tensor(RNG.normal(size=(20, 8))) if base == "float" else packed(base, 20, 8)
    values = {
        "lora_embedding_A": RNG.normal(size=(3, 20)),
        "lora_embedding_B": RNG.normal(size=(8, 3)),
        "lora_magnitude_vector": RNG.uniform(0.5, 2, 8),
    }
    layer.add("a", values, Settings(3, 0.8, 0.0, dora))
    layer.active = "a"
    tensors = [tensor for _, tensor in layer.tensors("a")]
    for tensor in tensors:
        tensor.requires_grad = True
    hold_norms([layer])
    gradcheck(lambda *_: layer(np.array([[1, 3, 3], [19, 0, 1]])), *tensors)


ADAPTERS = {
    "lora": dict(r=2, target_modules="all-linear"),
    "dora": dict(r=2, target_modules=["k_proj", "down_proj"], use_dora=True),
    "dropout": dict(r=2, target_modules=["q_proj", "up_proj"], lora_dropout=0.3, use_rslora=True),
    "all there is": dict(
        r=2,
        target_modules=["v_proj", "embed_tokens", "lm_head"],
        modules_to_save=["norm"],
        use_dora=True,
        lora_dropout=0.2,
    ),
    "copies": dict(r=2, modules_to_save=["lm_head", "embed_tokens"]),
}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("base", [lambda model: model, in_bfloat16, in_nf4], ids=["float", "bfloat16", "nf4"])
@pytest.mark.parametrize("fields", ADAPTERS.values(), ids=ADAPTERS.keys())
def test_every_gradient_of_a_whole_adapted_llama(fields, base, checkpointing):
    model = trained(fields, base(llama(np.float64)))
    model.checkpointing = checkpointing
    hold_norms([layer for _, layer in adapted(model) if isinstance(layer, LowRank)])

    def loss(*_):
        random.seed(6)
        with recorded():
            return model.loss(IDS[:, :-1], IDS[:, 1:])

    gradcheck(loss, *model.parameters(), samples=2, stencil=5)


@pytest.mark.parametrize("base", [lambda model: model, in_nf4], ids=["float", "nf4"])
def test_a_whole_adapted_llama_through_the_float32_kernels(base):
    model = trained(dict(r=4, target_modules="all-linear"), base(llama()))
    # Gradients of some 0.02 of a loss of 4: differences of a step of 0.001 would be rounding
    gradcheck(lambda *_: model.loss(IDS[:, :-1], IDS[:, 1:]), *model.parameters(), samples=2, eps=1e-2, stencil=5)


@pytest.mark.parametrize("base", [lambda model: model, in_nf4], ids=["float", "nf4"])
@pytest.mark.parametrize("fields", ADAPTERS.values(), ids=ADAPTERS.keys())
def test_checkpointing_gives_the_same_bits(fields, base):
    found = []
    for checkpointing in (False, True):
        model = trained(fields, base(llama()))
        model.checkpointing = checkpointing
        random.seed(6)
        loss = model.loss(IDS, IDS)
        loss.backward()
        found.append([loss.data, *(p.grad for p in model.parameters())])
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("fault", [0.999, -1.0, 0.0])
def test_the_check_notices_a_wrong_gradient(fault, monkeypatch):
    from entrenar.ops.low_rank import LoraLinear

    right = LoraLinear.backward

    def wrong(self, dy):
        dx, dw, db, dA, dB, dropped = right(self, dy)
        return dx, dw, db, dA * fault, dB, dropped

    monkeypatch.setattr(LoraLinear, "backward", wrong)
    layer, tensors = layer_of("float", 10, 12, dora=False)
    with pytest.raises(GradcheckError):
        gradcheck(lambda *_: layer(Tensor(RNG.normal(size=(4, 12)))), *tensors)


# -- the norm


@pytest.mark.parametrize("base", BASES)
def test_the_norm_is_that_of_the_whole_matrix(base, monkeypatch):
    monkeypatch.setattr("entrenar.ops.low_rank.BLOCK", 64)
    layer, _ = layer_of(base, 33, 20, dora=True)
    from entrenar.adapters.layers import base_array
    from entrenar.kernels import unpack

    w = base_array(layer.base_layer.weight)
    w = (unpack(w) if isinstance(w, Packed) else w).astype(np.float64)
    a, b = (t.data for t in layer.factors("a"))
    np.testing.assert_allclose(layer.norm("a"), np.linalg.norm(w + 0.8 * b @ a, axis=1), rtol=1e-12)
    np.testing.assert_allclose(row_squares(w, axis=0), (w * w).sum(axis=0), rtol=1e-12)


def test_a_row_of_zeros_stays_zero():
    norm = update_norm(np.zeros(2), np.zeros((1, 2)), np.zeros((1, 4)), np.zeros((2, 1)), scale=1.0)
    assert (norm > 0).all() and np.isfinite(0 / norm).all()
    model = llama()
    model.model.layers[0].self_attn.q_proj.weight.data[3] = 0
    adapt(model, LoraConfig(use_dora=True))
    assert np.isfinite(model(IDS).data).all()


def test_the_norm_is_kept_while_nothing_changes():
    layer, (a, *_) = layer_of("nf4", 10, 12, dora=True, dtype=np.float32)
    asked = []
    x = Tensor(np.ones((1, 12), np.float32))

    def norms_made(forward):
        asked.clear()
        forward()
        return len(asked)

    from entrenar.adapters import layers

    made = layers.base_norm
    try:
        layers.base_norm = lambda *args: asked.append(1) or made(*args)
        with no_grad():
            first = layer(x).data
            assert norms_made(lambda: layer(x)) == 0
            a.data[0, 0] += 1
            assert norms_made(lambda: layer(x)) == 1 and (layer(x).data != first).any()
        assert norms_made(lambda: [layer(x), layer(x)]) == 0, "still the same weights"
        a.data[0, 0] += 1
        assert norms_made(lambda: [layer(x), layer(x)]) == 2 and not layer._norms, "nothing is kept in training"
    finally:
        layers.base_norm = made
