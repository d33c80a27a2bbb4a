"""A whole model against transformers' LlamaForCausalLM: same weights, same loss, same gradients."""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="make test-peers installs PyTorch")
transformers = pytest.importorskip("transformers", reason="make test-peers installs transformers")

from entrenar.llama import Llama, LlamaConfig, generate  # noqa: E402

pytestmark = pytest.mark.peers

BASE = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, rms_norm_eps=1e-5, initializer_range=0.15)  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
MODELS = {
    "multi-head": {},
    "grouped": {"num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "llama3 rope": {"rope_scaling": LLAMA3},
    "own head_dim": {"head_dim": 16, "num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
}


def both(changes, dtype):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**BASE, **copy.deepcopy(changes), attn_implementation="eager")
    theirs = transformers.LlamaForCausalLM(config)
    theirs = theirs.to(getattr(torch, dtype))
    with torch.no_grad():
        for parameter in theirs.parameters():  # norms and biases too: nothing may hide behind ones and zeros
            parameter.add_(0.05 * torch.randn_like(parameter))
    ours = Llama(LlamaConfig(**BASE, **changes), dtype=np.dtype(dtype))
    state = {name: p.detach().numpy() for name, p in theirs.named_parameters()}
    ours.load_state_dict(state)
    return ours, theirs


@pytest.mark.parametrize("dtype, tolerance", [("float64", 2e-6), ("float32", 1e-4)])  # their RoPE tables are float32
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_loss_and_every_gradient_equal_transformers(changes, dtype, tolerance):
    ours, theirs = both(changes, dtype)
    ids = np.random.default_rng(0).integers(0, 97, (3, 33))
    targets = ids[:, 1:].copy()
    targets[1, 4:9] = -100
    logits = theirs(torch.tensor(ids[:, :-1])).logits
    their_loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 97), torch.tensor(targets.reshape(-1)))
    their_loss.backward()
    our_logits = ours(ids[:, :-1])
    np.testing.assert_allclose(our_logits.data, logits.detach().numpy(), atol=tolerance * float(logits.abs().max()))
    loss = ours.loss(ids[:, :-1], targets)
    loss.backward()
    assert loss.item() == pytest.approx(their_loss.item(), rel=tolerance)
    their_gradients = {name: p.grad.numpy() for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        wanted = their_gradients[name]
        np.testing.assert_allclose(p.grad, wanted, atol=tolerance * np.abs(wanted).max(), rtol=0, err_msg=name)


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_greedy_tokens_equal_transformers(changes):
    ours, theirs = both(changes, "float32")
    prompt = [5, 17, 42]
    settings = dict(max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    wanted = theirs.generate(torch.tensor([prompt]), **settings)
    assert list(generate(ours, prompt, max_new_tokens=20, temperature=0)) == wanted[0, 3:].tolist()
