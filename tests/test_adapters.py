"""Adapters on a model: what is trained, what is frozen, what is kept; switching, removing, saving, generating."""

from __future__ import annotations

import gc
import tracemalloc

import numpy as np
import pytest

from entrenar import Tensor, ops, random
from entrenar.adapters import (
    LoraConfig,
    active_adapter,
    adapt,
    adapter_names,
    adapter_tensors,
    count,
    load_adapter,
    remove_adapter,
    save_adapter,
    use_adapter,
)
from entrenar.adapters.layers import LoRAEmbedding, LoRALinear
from entrenar.adapters.model import adapted
from entrenar.kernels import unpack
from entrenar.kernels.packed import Packed
from entrenar.llama import Llama, LlamaConfig, generate
from entrenar.nn import Embedding, Linear
from entrenar.optim import AdamW

SHAPE = dict(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.2,
)
IDS = np.random.default_rng(0).integers(0, 61, (2, 9))
KINDS = {
    "lora": dict(r=3, target_modules="all-linear"),
    "rslora, dropout": dict(r=3, use_rslora=True, lora_dropout=0.2, target_modules=["q_proj", "down_proj"]),
    "dora": dict(r=3, use_dora=True, target_modules=["v_proj", "gate_proj"], lora_dropout=0.1),
    "everything": dict(
        r=2, target_modules=["q_proj", "embed_tokens", "lm_head"], modules_to_save=["norm"], use_dora=True
    ),
    "copies": dict(r=2, modules_to_save=["lm_head", "embed_tokens"]),
}
every_kind = pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS.keys())


def llama(dtype=np.float32, **changes):
    random.seed(5)
    return Llama(LlamaConfig(**SHAPE | changes), dtype=dtype)


def in_bfloat16(model):
    """The same model, the layers of its blocks frozen in bfloat16."""
    for name, module in model.named_modules():
        if isinstance(module, Linear) and name != "lm_head":
            upper = (module.weight.data.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
            module.weight = Packed("bfloat16", upper.shape, upper.reshape(-1))
    return model


def in_nf4(model):
    rng = np.random.default_rng(9)
    for name, module in model.named_modules():
        if isinstance(module, Linear) and name != "lm_head":
            n = module.weight.size
            scales = rng.uniform(0.1, 0.25, -(-n // 64)).astype(np.float32)
            codes = rng.integers(0, 256, -(-n // 2)).astype(np.uint8)
            module.weight = Packed("nf4", module.weight.shape, codes, scales)
    return model


def trained(fields, model=None, name="default"):
    """A model with an adapter whose update is not zero."""
    model = llama() if model is None else model
    adapt(model, LoraConfig(**fields, init_lora_weights=False), name)
    rng = np.random.default_rng(len(name))
    for key, tensor in adapter_tensors(model, name).items():
        if "lora_" not in key or "magnitude" in key:
            tensor.data *= (1 + 0.1 * rng.normal(size=tensor.shape)).astype(tensor.dtype)
    return model


# -- what is trained, and what is not


@every_kind
def test_exactly_the_adapter_s_tensors_are_trained(fields):
    model = trained(fields)
    own = {id(tensor) for tensor in adapter_tensors(model).values()}
    assert {id(tensor) for tensor in model.parameters()} == own
    assert len(own) == len(dict(model.named_parameters()))


def test_names_are_peft_s():
    model = trained(KINDS["everything"], name="mine")
    names = [name for name, _ in model.named_parameters()]
    for name in (
        "model.embed_tokens.lora_embedding_A.mine",
        "model.layers.0.self_attn.q_proj.lora_A.mine.weight",
        "model.layers.1.self_attn.q_proj.lora_magnitude_vector.mine.weight",
        "lm_head.lora_B.mine.weight",
        "model.norm.modules_to_save.mine.weight",
    ):
        assert name in names
    assert "model.layers.0.self_attn.q_proj.base_layer.weight" in model.state_dict()


@every_kind
def test_a_new_adapter_changes_nothing(fields):
    model = llama()
    before = model(IDS).data
    adapt(model, LoraConfig(**fields))
    model.eval()
    far = (
        0 if not fields.get("use_dora") else 64 * np.finfo(np.float32).eps * np.abs(before).max()
    )  # m / ||W|| is not 1
    np.testing.assert_allclose(model(IDS).data, before, atol=far, rtol=0)


@every_kind
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_base_has_no_gradient_and_no_optimizer_state(fields, checkpointing):
    model = trained(fields)
    model.checkpointing = checkpointing
    kept = {name: tensor.data.copy() for name, tensor in model._named_tensors() if not tensor.requires_grad}
    optimizer = AdamW(model.named_parameters(), lr=0.1)
    model.loss(IDS, IDS).backward()
    optimizer.step()
    own = {name for name, _ in model.named_parameters()}
    assert set(optimizer.m) == set(optimizer.v) == own
    for name, tensor in model._named_tensors():
        assert (tensor.grad is not None) == (name in own), name
        if name in kept:
            assert np.array_equal(tensor.data, kept[name]), name
    assert all(tensor.grad.any() for tensor in model.parameters()), "the control: gradients reached the adapter"


@pytest.mark.parametrize("dora", [False, True])
def test_nothing_is_kept_for_the_base(dora):
    """Of the arrays an adapted layer keeps, none is as large as (N, O) or W, but for W itself and DoRA's product."""
    rng = np.random.default_rng(0)
    layer = LoRALinear(Linear(32, 48))
    layer.freeze()
    adapted_by = dict(r=2, scale=1.0, dora=dora)
    values = {
        "lora_A.weight": rng.normal(size=(2, 32)),
        "lora_B.weight": rng.normal(size=(48, 2)),
        "lora_magnitude_vector": rng.normal(size=48),
    }
    from entrenar.adapters.layers import Settings

    layer.add("a", {key: x.astype(np.float32) for key, x in values.items()}, Settings(**adapted_by))
    layer.active = "a"
    for _, tensor in layer.tensors("a"):
        tensor.requires_grad = True
    x = Tensor(rng.normal(size=(500, 32)).astype(np.float32), requires_grad=True)
    y = layer(x)
    saved = [array for array in y.op.saved if isinstance(array, np.ndarray)]
    w = layer.base_layer.weight.data
    fresh = [array for array in saved if not np.shares_memory(array, x.data) and array is not w]
    large = [array.shape for array in fresh if array.size >= 500 * 32]
    assert large == ([(500, 48)] if dora else [])
    x.requires_grad = False
    assert not any(array is w for array in layer(x).op.saved), "W is kept only for the gradient of x"


def test_activations_take_as_much_memory_as_the_input_alone():
    def forward(layer, x):
        gc.collect()
        tracemalloc.start()
        try:
            y = layer(x)
            return tracemalloc.get_traced_memory()[0], y
        finally:
            tracemalloc.stop()

    from entrenar.adapters.layers import Settings

    layer = LoRALinear(Linear(256, 256))
    layer.freeze()
    values = {"lora_A.weight": np.ones((8, 256), np.float32), "lora_B.weight": np.ones((256, 8), np.float32)}
    layer.add("a", values, Settings(8, 1.0))
    x = Tensor(np.ones((2000, 256), np.float32), requires_grad=True)
    bare, _ = forward(layer, x)
    layer.active = "a"
    for _, tensor in layer.tensors("a"):
        tensor.requires_grad = True
    full, _ = forward(layer, x)
    assert full - bare < 2 * 2000 * 8 * 4, "x A^T, and not another (N, I) or (N, O)"


def test_counts():
    model = llama()
    total = model.config.parameter_count()
    adapt(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert count(model).trainable == 2 * 2 * (24 + 24) and count(model).total == total + count(model).trainable
    assert (
        str(count(model))
        == f"192 of {total + 192:,} weights are trained, {100 * (1 - 192 / (total + 192)):.3f} % fewer"
    )
    use_adapter(model, None)
    assert count(model).trainable == 0
    assert count(in_bfloat16(llama())).total == total, "packed weights count as many as they are"


# -- how an adapter starts


def test_initial_distributions_are_peft_s():
    model = Llama(LlamaConfig(**SHAPE | dict(hidden_size=256, num_hidden_layers=1)))
    for kind, b_zero in ((True, True), ("gaussian", True), (False, False)):
        adapt(model, LoraConfig(r=16, target_modules=["q_proj"], init_lora_weights=kind), str(kind))
        a, b = (t.data for t in adapter_tensors(model, str(kind)).values())
        assert a.shape == (16, 256) and b.shape == (256, 16)
        assert (not b.any()) == b_zero
        if kind == "gaussian":
            assert abs(a.std() - 1 / 16) < 0.1 / 16
        else:  # U(-1/sqrt(in), 1/sqrt(in)), whose standard deviation is 1/sqrt(3 in)
            assert np.abs(a).max() <= 1 / 16 and abs(a.std() - 1 / np.sqrt(3 * 256)) < 0.1 / np.sqrt(3 * 256)
        if not b_zero:
            assert np.abs(b).max() <= 1 / 4 and abs(b.std() - 1 / np.sqrt(3 * 16)) < 0.1 / np.sqrt(3 * 16)


@pytest.mark.parametrize("kind", [True, "gaussian", False])
def test_an_embedding_starts_with_A_zero(kind):
    model = llama()
    adapt(model, LoraConfig(r=4, target_modules=["embed_tokens"], init_lora_weights=kind))
    a, b = (t.data for t in adapter_tensors(model).values())
    assert a.any() == (kind is False) and 0.7 < b.std() < 1.3


def test_the_start_comes_from_the_seed():
    made = []
    for _ in range(2):
        model = llama()
        random.seed(11)
        adapt(model, LoraConfig(init_lora_weights="gaussian", modules_to_save=["norm"]))
        made.append({name: tensor.data for name, tensor in adapter_tensors(model).items()})
    assert made[0].keys() == made[1].keys()
    assert all(np.array_equal(made[0][name], made[1][name]) for name in made[0])


def test_dora_starts_from_the_norms_of_the_base():
    model = in_nf4(llama())
    adapt(model, LoraConfig(use_dora=True, target_modules=["q_proj"]))
    for path, layer in adapted(model):
        wanted = np.linalg.norm(unpack(layer.base_layer.weight).astype(np.float64), axis=1)
        np.testing.assert_allclose(adapter_tensors(model)[f"{path}.lora_magnitude_vector"].data, wanted, rtol=1e-6)


# -- switching


@every_kind
def test_switching_gives_the_same_bits_as_fresh_loads(fields, tmp_path):
    model = trained(fields, name="first")
    trained(dict(r=5, target_modules=["up_proj", "q_proj"]), model, "second")
    model.eval()
    before = llama()(IDS).data
    for name in ("first", "second"):
        save_adapter(model, tmp_path / name, name)
    for name in ("first", "second", None, "second", "first", None):
        use_adapter(model, name)
        assert active_adapter(model) == name
        if name is None:
            assert np.array_equal(model(IDS).data, before)
            continue
        fresh = llama()
        load_adapter(fresh, tmp_path / name)
        fresh.eval()
        assert np.array_equal(model(IDS).data, fresh(IDS).data)
        assert np.array_equal(model.loss(IDS, IDS).data, fresh.loss(IDS, IDS).data)
        tokens = [list(generate(m, [1, 2, 3], max_new_tokens=12, temperature=0.8)) for m in (model, fresh)]
        assert tokens[0] == tokens[1]


def test_generation_with_and_without_an_adapter():
    model = trained(dict(r=4, target_modules="all-linear", lora_dropout=0.5))
    on = list(generate(model, [1, 2, 3], max_new_tokens=20, temperature=0))
    assert on == list(generate(model, [1, 2, 3], max_new_tokens=20, temperature=0, use_cache=False)), "no dropout in it"
    use_adapter(model, None)
    off = list(generate(model, [1, 2, 3], max_new_tokens=20, temperature=0))
    assert off == list(generate(llama(), [1, 2, 3], max_new_tokens=20, temperature=0)) and on != off


def test_only_the_active_adapter_is_trained():
    model = trained(dict(r=2), name="a")
    trained(dict(r=2), model, "b")
    assert all(".b." in name for name, _ in model.named_parameters())
    use_adapter(model, "a")
    assert all(".a." in name for name, _ in model.named_parameters())
    model.loss(IDS, IDS).backward()
    use_adapter(model, "b")
    assert all(tensor.grad is None for _, tensor in model._named_tensors()), "a switch leaves no gradient behind"


def test_removing_all_adapters_leaves_the_plain_model():
    model, before = llama(), list(llama().state_dict())
    logits = model(IDS).data
    for name, fields in KINDS.items():
        trained(fields, model, name.split(",")[0])
    assert adapter_names(model) == ["lora", "rslora", "dora", "everything", "copies"]
    for name in adapter_names(model)[::-1]:
        remove_adapter(model, name)
    assert list(model.state_dict()) == before and not adapter_names(model) and active_adapter(model) is None
    assert not any(isinstance(m, (LoRALinear, LoRAEmbedding)) for _, m in model.named_modules())
    assert isinstance(model.model.embed_tokens, Embedding) and np.array_equal(model(IDS).data, logits)


def test_a_failed_adapt_leaves_the_model_as_it_was():
    model = llama()
    before = list(model.state_dict())
    for fields, name in ((dict(target_modules=["nothing"]), "a"), (dict(), "bad.name"), (dict(), "")):
        with pytest.raises(ValueError):
            adapt(model, LoraConfig(**fields), name)
    assert list(model.state_dict()) == before and all(p.requires_grad for p in model.parameters())
    adapt(model, LoraConfig())
    with pytest.raises(ValueError, match="there is one of this name"):
        adapt(model, LoraConfig())
    with pytest.raises(ValueError, match="no adapter is called 'x'; there are: default"):
        use_adapter(model, "x")


# -- dropout


def test_dropout_is_on_in_training_alone():
    model = trained(dict(r=4, lora_dropout=0.5))
    first, second = (model.loss(IDS, IDS).item() for _ in range(2))
    assert first != second
    model.eval()
    assert model.loss(IDS, IDS).item() == model.loss(IDS, IDS).item()
    assert not any(layer.training for _, layer in adapted(model))


@pytest.mark.parametrize(
    "fields",
    [
        dict(r=4, lora_dropout=0.5, target_modules="all-linear"),
        dict(r=4, lora_dropout=0.5, target_modules=["lm_head", "q_proj"], use_dora=True),
    ],
)
def test_checkpointing_replays_the_same_dropout(fields):
    found = []
    for checkpointing in (False, True):
        model = trained(fields)
        model.checkpointing = checkpointing
        random.seed(8)
        loss = model.loss(IDS, IDS)
        loss.backward()
        found.append([loss.data, *(p.grad for p in model.parameters())])
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))


# -- the head


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_adapted_head_has_the_loss_of_its_logits(reduction, monkeypatch):
    monkeypatch.setattr("entrenar.adapters.layers.HEAD_ROWS", 4)
    model = trained(dict(r=4, target_modules=["lm_head", "v_proj"]), llama(np.float64))
    targets = IDS.copy()
    targets[0, :5] = -100
    loss = model.loss(IDS, targets, reduction=reduction)
    loss.backward()
    found = [loss.item(), *(p.grad for p in model.parameters())]
    model.zero_grad()
    loss = ops.cross_entropy(model(IDS), targets, reduction=reduction)
    loss.backward()
    for a, b in zip(found, [loss.item(), *(p.grad for p in model.parameters())], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)
    assert model.loss(IDS, np.full_like(IDS, -100)).item() == 0


def test_a_head_tied_to_an_adapted_embedding_stays_what_it_was():
    model = trained(dict(r=4, target_modules=["embed_tokens"]), llama(tie_word_embeddings=True))
    assert model.head_weight is model.model.embed_tokens.base_layer.weight
    with pytest.raises(ValueError, match="lm_head is the embedding's own matrix here"):
        adapt(model, LoraConfig(target_modules=["lm_head"]), "other")
    with pytest.raises(ValueError, match="lm_head is the embedding's own matrix here"):
        adapt(model, LoraConfig(modules_to_save=["lm_head"]), "other")
