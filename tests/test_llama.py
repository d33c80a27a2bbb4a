"""The model as a whole: gradients, causality, the cache, the arithmetic of its size, and what it refuses."""

import dataclasses
import math

import numpy as np
import pytest

from entrenar import random
from entrenar.gradcheck import GradcheckError, gradcheck
from entrenar.llama import KVCache, Llama, LlamaConfig, generate
from entrenar.llama.generate import sample
from entrenar.llama.model import rope_frequencies
from entrenar.tensor import Op, no_grad

SMALL = LlamaConfig(
    vocab_size=19, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=32, initializer_range=0.3,
)  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
SHAPES = {
    "grouped heads": {},
    "tied": {"tie_word_embeddings": True},
    "multi-head, own head_dim": {"num_key_value_heads": 2, "head_dim": 4},
    "biases, llama3 rope": {"attention_bias": True, "mlp_bias": True, "rope_scaling": LLAMA3},
}


def small(dtype=np.float64, checkpointing=False, **changes):
    random.seed(1)
    return Llama(dataclasses.replace(SMALL, head_dim=None, **changes) if "head_dim" not in changes else
                 dataclasses.replace(SMALL, **changes), dtype=dtype, checkpointing=checkpointing)  # fmt: skip


def batch(vocab=19, shape=(2, 7)):
    rng = np.random.default_rng(0)
    ids, targets = rng.integers(0, vocab, shape), rng.integers(0, vocab, shape)
    targets[0, 2] = -100
    return ids, targets


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
def test_every_gradient_of_a_whole_llama(changes):
    model, (ids, targets) = small(**changes), batch()
    gradcheck(lambda *_: model.loss(ids, targets), *model.parameters(), samples=3, stencil=5)


@pytest.mark.tier1
def test_a_whole_llama_passes_the_gradient_check():
    model, (ids, targets) = small(tie_word_embeddings=True), batch()
    gradcheck(lambda *_: model.loss(ids, targets), *model.parameters(), samples=2, stencil=5)


@pytest.mark.tier1
def test_a_whole_llama_through_the_float32_kernels():
    model, (ids, targets) = small(np.float32), batch()
    gradcheck(lambda *_: model.loss(ids, targets), *model.parameters(), samples=3)


@pytest.mark.parametrize(
    "fault",
    [
        lambda g: g * 0,
        lambda g: -g,
        lambda g: g * 1.001,
        lambda g: np.concatenate([g[:1] * 0, g[1:]]),
    ],
    ids=["zeros", "sign", "0.1 percent", "missing rows"],
)
@pytest.mark.parametrize("name", ["k_proj", "norm"])
def test_the_check_of_a_whole_llama_rejects_a_planted_fault(name, fault):
    class Corrupted(Op):
        """y = x, with a wrong gradient"""

        def forward(self, x):
            return x + 0

        def backward(self, dy):
            return fault(dy)

    model, (ids, targets) = small(), batch()
    layer = model.model.layers[0].self_attn.k_proj if "k_proj" in name else model.model.norm
    weight = layer.weight

    def loss(*_):
        layer.weight = Corrupted.apply(weight)
        return model.loss(ids, targets)

    with pytest.raises(GradcheckError):
        gradcheck(loss, weight, stencil=5)


def test_parameter_names_are_the_keys_of_a_hugging_face_checkpoint():
    names = set(small().state_dict())
    layer = {f"model.layers.{i}.{part}.weight" for i in range(2) for part in (
        "input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
        "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")}  # fmt: skip
    assert names == layer | {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert "lm_head.weight" not in small(tie_word_embeddings=True).state_dict()


def test_a_later_token_changes_no_earlier_logit():
    model, (ids, _) = small(), batch()
    changed = ids.copy()
    changed[:, 4] = (changed[:, 4] + 1) % 19
    before, after = model(ids).data, model(changed).data
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert np.abs(before[:, 4:] - after[:, 4:]).max() > 1e-3


def test_loss_equals_cross_entropy_of_the_logits():
    model, (ids, targets) = small(), batch()
    z = model(ids).data
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    nats = [-math.log(p[b, t, targets[b, t]]) for b, t in np.ndindex(2, 7) if targets[b, t] >= 0]
    assert model.loss(ids, targets).item() == pytest.approx(np.mean(nats), rel=1e-12)
    assert model.loss(ids, targets, reduction="sum").item() == pytest.approx(np.sum(nats), rel=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_checkpointing_changes_no_bit(dtype):
    ids, targets = batch()
    grads = []
    for checkpointing in (False, True):
        model = small(dtype, checkpointing, tie_word_embeddings=True)
        loss = model.loss(ids, targets)
        loss.backward()
        grads.append({"loss": loss.data} | {name: p.grad for name, p in model.named_parameters()})
    assert grads[0].keys() == grads[1].keys()
    for name in grads[0]:
        np.testing.assert_array_equal(grads[0][name], grads[1][name], err_msg=name)


@pytest.mark.parametrize("dtype, tolerance", [(np.float32, 2e-5), (np.float64, 1e-12)])
@pytest.mark.parametrize("pieces", [[7], [1] * 7, [3, 1, 2, 1]])
def test_cached_logits_equal_uncached_ones(dtype, tolerance, pieces):
    model, (ids, _) = small(dtype), batch()
    cache = KVCache(model.config, batch=2, capacity=9, dtype=dtype)
    with no_grad():
        whole, at, parts = model(ids).data, 0, []
        for n in pieces:
            parts.append(model(ids[:, at : at + n], cache).data)
            at += n
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, rtol=0, atol=tolerance * np.abs(whole).max())


def test_a_full_cache_is_an_error():
    model = small()
    cache = KVCache(model.config, capacity=4, dtype=np.float64)
    with pytest.raises(ValueError, match="5 tokens do not fit a capacity of 4"):
        model(np.zeros((1, 5), int), cache)


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 0.9, "top_k": 7}, {"top_p": 0.8}])
def test_generation_with_a_cache_gives_the_same_tokens(settings):
    model = small(np.float32)
    runs = [
        list(generate(model, [3, 5], max_new_tokens=12, rng=np.random.default_rng(4), use_cache=cached, **settings))
        for cached in (True, False)
    ]
    assert runs[0] == runs[1] and len(runs[0]) == 12


def test_generation_stops_at_the_context_and_at_a_stop_token():
    model = small(np.float32)
    assert len(list(generate(model, [1], max_new_tokens=99))) == 31
    greedy = list(generate(model, [1], max_new_tokens=9, temperature=0))
    assert list(generate(model, [1], max_new_tokens=9, temperature=0, stop={greedy[0]})) == greedy[:1]


def test_generation_refuses_prompts_it_cannot_continue():
    model = small(np.float32)
    with pytest.raises(ValueError, match="prompt is empty"):
        next(generate(model, [], max_new_tokens=1))
    with pytest.raises(ValueError, match="a prompt of 32 tokens leaves no room in a context of 32"):
        next(generate(model, [0] * 32, max_new_tokens=1))
    with pytest.raises(ValueError, match="position 32 is beyond max_position_embeddings = 32"):
        model(np.zeros((1, 33), int))
    with pytest.raises(ValueError, match=r"ids must be \(batch, time\), got shape \(3,\)"):
        model(np.zeros(3, int))


def test_generation_leaves_recording_to_its_caller():
    from entrenar.tensor import is_recording

    tokens = generate(small(np.float32), [1], max_new_tokens=2)
    next(tokens)
    assert is_recording()


def test_sampling_follows_the_probabilities_it_is_given():
    logits, rng = np.log(np.array([0.5, 0.3, 0.15, 0.05])), np.random.default_rng(0)

    def shares(**settings):
        return np.bincount([sample(logits, rng, **settings) for _ in range(4000)], minlength=4) / 4000

    np.testing.assert_allclose(shares(), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    np.testing.assert_allclose(shares(top_k=2), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(shares(top_p=0.75), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(shares(temperature=0.5), np.array([25, 9, 2.25, 0.25]) / 36.5, atol=0.03)
    assert sample(logits, rng, temperature=0) == 0
    with pytest.raises(ValueError, match="top_p = 0"):
        sample(logits, rng, top_p=0)


def test_llama3_scaling_leaves_short_waves_and_slows_long_ones():
    config = dataclasses.replace(SMALL, head_dim=16, rope_scaling=LLAMA3)
    plain = rope_frequencies(dataclasses.replace(config, rope_scaling=None))
    for f, scaled in zip(plain, rope_frequencies(config), strict=True):
        wave = 2 * math.pi / f
        if wave < 16 / 4:
            assert scaled == f
        elif wave > 16 / 1:
            assert scaled == pytest.approx(f / 8)
        else:
            s = (16 / wave - 1) / (4 - 1)
            assert scaled == pytest.approx((1 - s) * f / 8 + s * f)


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
def test_parameter_count_is_the_number_of_weights(changes):
    model = small(**changes)
    assert model.config.parameter_count() == sum(p.size for p in model.parameters())


def test_known_models_have_their_published_sizes():
    assert LlamaConfig().parameter_count() == 6_738_415_616  # LLaMA 7B
    tiny_llama = LlamaConfig(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_key_value_heads=4)
    assert tiny_llama.parameter_count() == 1_100_048_384  # TinyLlama 1.1B


def test_flops_count_every_multiply_add_of_a_forward():
    V, C, F, L, H, KH, D, T = 19, 12, 20, 2, 2, 1, 6, 7
    products = L * (2 * T * C * (H + 2 * KH) * D + 2 * T * H * D * C + 2 * T * 3 * C * F) + 2 * T * C * V
    scores = L * H * sum(2 * 2 * D * (t + 1) for t in range(T))
    assert SMALL.flops_per_token(T, training=False) * T == products + scores
    assert SMALL.flops_per_token(T) == 3 * SMALL.flops_per_token(T, training=False)


def test_the_arithmetic_of_a_huge_model_does_not_overflow():
    huge = LlamaConfig(vocab_size=1_000_000, hidden_size=2**17, num_hidden_layers=1000, num_attention_heads=1024,
                       intermediate_size=2**19)  # fmt: skip
    assert huge.parameter_count() > 2**47
    assert huge.flops_per_token(2**20) > 2**49


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vocab_size": 0}, "vocab_size = 0: wanted a whole number of at least 1"),
        ({"num_hidden_layers": -1}, "num_hidden_layers = -1: wanted"),
        ({"hidden_size": 12.5}, "hidden_size = 12.5: wanted"),
        ({"intermediate_size": True}, "intermediate_size = True: wanted"),
        ({"hidden_size": 13, "head_dim": None}, "hidden_size = 13: not divisible by num_attention_heads = 2"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3: wanted a divisor of num_attention_heads = 2"),
        ({"head_dim": 5}, "head_dim = 5: wanted an even whole number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan: wanted a finite number above 0"),
        ({"rope_theta": 0}, "rope_theta = 0: wanted"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu': wanted 'silu'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type = 'yarn': wanted 'llama3'"),
        ({"rope_scaling": LLAMA3 | {"factor": -1}}, "rope_scaling: factor = -1: wanted"),
        ({"rope_scaling": LLAMA3 | {"facotr": 1}}, "rope_scaling: unknown key 'facotr'"),
        ({"rope_scaling": "llama3"}, "rope_scaling = 'llama3': wanted a table"),
    ],
)
def test_a_bad_size_is_an_error_that_names_the_field(changes, message):
    with pytest.raises(ValueError) as error:
        dataclasses.replace(SMALL, **changes)
    assert message in str(error.value)


def test_all_bad_fields_are_named_at_once():
    with pytest.raises(ValueError, match="vocab_size = 0.*num_attention_heads = -2.*rope_theta = -1"):
        LlamaConfig(vocab_size=0, num_attention_heads=-2, rope_theta=-1)


def test_a_config_survives_its_dictionary():
    config = dataclasses.replace(SMALL, rope_scaling=LLAMA3)
    values = config.to_dict()
    assert values["model_type"] == "llama" and values["architectures"] == ["LlamaForCausalLM"]
    assert LlamaConfig.from_dict(values) == config
