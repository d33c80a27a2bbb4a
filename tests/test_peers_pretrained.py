"""Models that transformers wrote are read here, those written here there: same logits, gradients and tokens."""

import copy
import json
import logging

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="make test-peers installs PyTorch")
transformers = pytest.importorskip("transformers", reason="make test-peers installs transformers")

from entrenar import optim, random  # noqa: E402
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
    "llama3 rope": {"rope_scaling": LLAMA3, "rope_theta": 5e5},
    "own head_dim": {"head_dim": 16, "num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "all of it": {"num_key_value_heads": 2, "tie_word_embeddings": True, "head_dim": 16, "rope_scaling": LLAMA3,
                  "attention_bias": True, "mlp_bias": True, "eos_token_id": [2, 5]},
}  # fmt: skip
STORED = ["float32", "bfloat16"]
IDS = np.random.default_rng(0).integers(0, 97, (3, 33))


@pytest.fixture(autouse=True)
def quiet():
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity(logging.ERROR)


def theirs_of(changes):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**BASE, **copy.deepcopy(changes)))
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too: nothing may hide behind ones and zeros
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def ours_of(changes):
    random.seed(0)
    return Llama(LlamaConfig(**BASE, **copy.deepcopy(changes)))


def load_there(folder):
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def largest_error(ours, theirs):
    """max |ours - theirs| as a share of max |theirs|, both arrays of one shape."""
    assert ours.shape == tuple(theirs.shape)
    return float(np.abs(ours - theirs.detach().numpy()).max() / np.abs(theirs.detach().numpy()).max())


def same_model(ours, theirs, *, tolerance=1e-4):
    """Logits and every gradient agree; returns how far they are apart at most."""
    logits = theirs(torch.tensor(IDS[:, :-1])).logits
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 97), torch.tensor(IDS[:, 1:].reshape(-1)))
    theirs.zero_grad()
    loss.backward()
    ours.zero_grad()
    ours.loss(IDS[:, :-1], IDS[:, 1:]).backward()
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert wanted.keys() == dict(ours.named_parameters()).keys()
    apart = {"logits": largest_error(ours(IDS[:, :-1]).data, logits)}
    apart |= {name: largest_error(parameter.grad, wanted[name]) for name, parameter in ours.named_parameters()}
    assert max(apart.values()) < tolerance, apart
    return apart


def greedy(ours, theirs, prompt=(5, 17, 42)):
    settings = dict(max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    wanted = theirs.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()
    return list(generate(ours, list(prompt), max_new_tokens=20, temperature=0)), wanted


@pytest.mark.parametrize("shard", ["5GB", "30KB"], ids=["one file", "sharded"])
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_what_transformers_saved_computes_the_same_here(tmp_path, changes, stored, shard):
    theirs_of(changes).to(getattr(torch, stored)).save_pretrained(tmp_path / "theirs", max_shard_size=shard)
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists() == (shard == "30KB")
    ours, theirs = Llama.from_pretrained(tmp_path / "theirs"), load_there(tmp_path / "theirs")
    same_model(ours, theirs)
    ids, wanted = greedy(ours, theirs)
    assert ids == wanted


def test_the_comparison_sees_a_weight_that_is_off_by_a_thousandth(tmp_path):
    theirs_of({}).save_pretrained(tmp_path / "theirs")
    ours, theirs = Llama.from_pretrained(tmp_path / "theirs"), load_there(tmp_path / "theirs")
    ours.model.layers[1].self_attn.k_proj.weight.data *= 1.001
    with pytest.raises(AssertionError):
        same_model(ours, theirs)


@pytest.mark.parametrize("size", [5 * 10**9, 30_000], ids=["one file", "sharded"])
@pytest.mark.parametrize("stored", [*STORED, "float16"])
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_what_is_saved_here_computes_the_same_there(tmp_path, changes, stored, size):
    folder = ours_of(changes).save_pretrained(tmp_path / "ours", dtype=stored, max_shard_size=size)
    ours, theirs = Llama.from_pretrained(folder), load_there(folder)
    same_model(ours, theirs)
    ids, wanted = greedy(ours, theirs)
    assert ids == wanted
    assert transformers.AutoConfig.from_pretrained(folder).dtype == getattr(torch, stored)
    stop = changes.get("eos_token_id", 2)
    assert theirs.config.eos_token_id == stop == theirs.generation_config.eos_token_id


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_a_configuration_comes_back_from_transformers_as_it_was(tmp_path, changes):
    ours = ours_of(changes)
    load_there(ours.save_pretrained(tmp_path / "ours")).save_pretrained(tmp_path / "theirs")
    assert "rope_parameters" in json.loads((tmp_path / "theirs" / "config.json").read_text())  # transformers 5
    assert Llama.from_pretrained(tmp_path / "theirs").config == ours.config


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_a_model_of_transformers_is_trained_on_here_and_loaded_there_again(tmp_path, changes):
    theirs_of(changes).save_pretrained(tmp_path / "theirs")
    ours, before = Llama.from_pretrained(tmp_path / "theirs"), load_there(tmp_path / "theirs")
    optimizer = optim.AdamW(ours.named_parameters(), lr=1e-3)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = ours.loss(IDS[:, :-1], IDS[:, 1:])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = load_there(ours.save_pretrained(tmp_path / "ours"))
    same_model(ours, after)
    assert largest_error(ours(IDS).data, before(torch.tensor(IDS)).logits) > 1e-2  # the control: it did move
