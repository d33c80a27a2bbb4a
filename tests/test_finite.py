"""The search for the first value that is not finite: planted faults must be found where they were planted."""

import numpy as np
import pytest

from entrenar import random
from entrenar.data import IGNORE, Batch
from entrenar.llama import Llama, LlamaConfig
from entrenar.observe.finite import FiniteWatch, NonFinite, Replay, explain, first_nonfinite
from entrenar.ops.elementwise import Mul
from entrenar.tensor import Tensor, current_watcher, watched

SHAPE = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
                    max_position_embeddings=16)  # fmt: skip


@pytest.fixture
def model():
    random.seed(1)
    return Llama(SHAPE)


def replay(ids, targets=None):
    targets = np.roll(ids, -1, axis=1) if targets is None else targets
    return Replay([Batch(ids, targets)], [lambda row, time: f"line {row + 1} of text.txt, token {time}"])


@pytest.fixture
def ids():
    return np.arange(20).reshape(2, 10)


def test_a_sound_step_is_called_sound(model, ids):
    assert "every value is finite; the longest gradient is that of" in explain(model, replay(ids))


def test_a_weight_that_is_no_number_is_named_first(model, ids):
    model.model.layers[1].mlp.up_proj.weight.data[3, :2] = np.nan
    assert explain(model, replay(ids)) == (
        "the weights themselves are not finite: model.layers.1.mlp.up_proj.weight has 2 of 384 values"
    )


def test_an_overflow_names_op_layer_and_token(model, ids):
    """One token's embedding is so large that the third block's feed-forward overflows for it alone."""
    model.model.layers[2].post_attention_layernorm.weight.data[:] = 1e20
    model.model.layers[2].mlp.gate_proj.weight.data[:] = 0
    model.model.layers[2].mlp.up_proj.weight.data[:] = 0
    token = int(ids[1, 4])
    direction = np.zeros(16, np.float32)
    direction[5] = 1e3  # a component no other token has as large
    model.model.embed_tokens.weight.data[:, 5] = 0
    model.model.embed_tokens.weight.data[token] = direction
    model.model.layers[2].mlp.up_proj.weight.data[:, 5] = 1e19
    for block in model.model.layers:  # nothing reaches the other tokens
        block.self_attn.o_proj.weight.data[:] = 0
        block.mlp.down_proj.weight.data[:] = 0
    text = explain(model, replay(ids))
    assert "inf, made by Linear in model.layers.2.mlp.up_proj (forward)" in text
    assert f"micro-batch 1, row 2, token 5 (id {token}): line 2 of text.txt, token 4" in text


def test_a_loss_that_overflows_names_its_token(model, ids):
    model.model.norm.weight.data[:] = 1e19
    model.lm_head.weight.data[:] = 0
    model.lm_head.weight.data[7] = 1e30
    text = explain(model, replay(ids))
    assert "LinearCrossEntropy" in text and "(forward)" in text and "row 1, token 1 (id 0)" in text


def test_the_step_is_computed_again_as_it_was(model, ids):
    """The gradient of the sum over all tokens overflows here, that of their mean, which was the step's, does not."""
    model.model.layers[0].mlp.down_proj.weight.data[:] = 0
    model.model.layers[0].input_layernorm.weight.data[:] = 0
    o_proj = model.model.layers[0].self_attn.o_proj.weight
    model.lm_head.weight.data *= 100  # so that the gradient that comes back is large enough
    tokens, found = ids.size, []
    for exponent in np.arange(36, 38.4, 0.1):
        o_proj.data[:] = 10**exponent
        model.zero_grad()
        loss = model.loss(ids, np.roll(ids, -1, axis=1), reduction="sum")
        with np.errstate(all="ignore"):
            loss.backward(np.full(loss.shape, 1 / tokens, loss.dtype))
        sound = all(first_nonfinite(p.grad) is None for p in model.parameters() if p.grad is not None)
        found.append(sound)
        assert ("every value is finite" in explain(model, replay(ids))) == sound
    assert True in found and False in found


def test_a_token_that_is_ignored_is_not_named(model, ids):
    model.model.norm.weight.data[:] = 1e19
    model.lm_head.weight.data[:] = 0
    model.lm_head.weight.data[7] = 1e30
    targets = np.roll(ids, -1, axis=1)
    targets[0, :3] = IGNORE
    assert "row 1, token 4 (id 3)" in explain(model, replay(ids, targets))


def test_a_gradient_that_overflows_is_found_in_backward(model, ids):
    model.lm_head.weight.data *= 100
    model.model.layers[0].mlp.down_proj.weight.data[:] = 0  # forward stays small, whatever goes in
    model.model.layers[0].input_layernorm.weight.data[:] = 0
    text = None
    for scale in (1e30, 1e36, 3e38):
        model.model.layers[0].self_attn.o_proj.weight.data[:] = scale
        text = explain(model, replay(ids))
        if "(backward)" in text:
            break
    assert text and "(backward)" in text and "model.layers.0" in text


def test_the_watch_ends_with_its_block_even_after_an_error(model, ids):
    model.model.norm.weight.data[:] = 3e38
    with pytest.raises(NonFinite), watched(FiniteWatch(model)), np.errstate(all="ignore"):
        model.loss(ids, ids)
    assert current_watcher() is None


def test_a_watcher_sees_every_op_both_ways():
    seen = []

    class Log:
        def forward(self, op, inputs, out):
            seen.append(("forward", op.name, out.shape))

        def backward(self, op, dout, grads):
            seen.append(("backward", op.name, dout.shape))

    x = Tensor([1.0, 2.0], requires_grad=True)
    with watched(Log()):
        (x * x).sum().backward()
    assert [(way, name) for way, name, _ in seen] == [
        ("forward", Mul.__name__), ("forward", "Sum"), ("backward", "Sum"), ("backward", Mul.__name__)
    ]  # fmt: skip


@pytest.mark.parametrize(("array", "index"), [([1.0, 2.0], None), ([[1.0], [np.inf]], (1, 0)), (np.nan, ())])
def test_the_first_value_that_is_not_finite(array, index):
    assert first_nonfinite(np.array(array)) == index


def test_the_gradient_of_a_weight_is_not_taken_for_rows_of_tokens(model):
    """o_proj has 16 rows, and so many tokens there are: the index of its gradient says nothing about a token."""
    watch = FiniteWatch(model)
    x = Tensor(np.full((2, 8, 16), 1e30, np.float32), requires_grad=True)
    with watched(watch), np.errstate(all="ignore"), pytest.raises(NonFinite) as found:
        y = model.model.layers[0].self_attn.o_proj(x)
        y.backward(np.full(y.shape, 1e20, np.float32))
    assert (found.value.way, found.value.op, found.value.shape) == ("backward", "Linear", ())
