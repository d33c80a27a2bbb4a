"""Choosing tokens, generating and evaluating against transformers: same kept tokens, same probabilities, same text."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="make test-peers installs PyTorch")
transformers = pytest.importorskip("transformers", reason="make test-peers installs transformers")

from entrenar.data import IGNORE, evaluation_windows  # noqa: E402
from entrenar.llama import Llama, LlamaConfig, generate  # noqa: E402
from entrenar.llama.generate import Sampling, candidates  # noqa: E402
from entrenar.training.evaluate import evaluate  # noqa: E402

pytestmark = pytest.mark.peers

BASE = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, rms_norm_eps=1e-5, initializer_range=0.15)  # fmt: skip
MODELS = {
    "multi-head": {},
    "grouped": {"num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "own head_dim": {"head_dim": 16, "num_key_value_heads": 1},
    "biases": {"attention_bias": True, "mlp_bias": True},
}
FILTERS = {
    "temperature": Sampling(temperature=0.7),
    "top_k": Sampling(top_k=13),
    "top_p": Sampling(top_p=0.8),
    "min_p": Sampling(min_p=0.07),
    "penalty": Sampling(repetition_penalty=1.7),
    "penalty below 1": Sampling(repetition_penalty=0.6),
    "all": Sampling(temperature=1.4, top_k=60, top_p=0.93, min_p=0.02, repetition_penalty=1.2),
    "all, hot": Sampling(temperature=3.0, top_k=150, top_p=0.7, min_p=0.05, repetition_penalty=1.05),
}


def their_probabilities(logits, how, seen):
    """(V,): softmax of what transformers' own processors leave, in the order in which its generate() applies them."""
    config = transformers.GenerationConfig(
        do_sample=True, temperature=how.temperature, top_k=how.top_k or None, top_p=how.top_p, min_p=how.min_p or None,
        repetition_penalty=how.repetition_penalty, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**BASE))
    processors = model._get_logits_processor(generation_config=config, input_ids_seq_length=len(seen))
    names = [type(p).__name__ for p in processors]
    assert len(names) == sum((how.temperature != 1, how.top_k > 0, how.top_p < 1, how.min_p > 0,
                              how.repetition_penalty != 1)), names  # fmt: skip
    scores = processors(torch.tensor([seen]), torch.tensor(logits)[None].clone())
    return torch.softmax(scores, -1)[0].numpy()


@pytest.mark.parametrize("how", FILTERS.values(), ids=FILTERS.keys())
def test_each_filter_keeps_the_same_tokens_with_the_same_probabilities(how):
    worst = 0.0
    for seed in range(5):
        rng = np.random.default_rng(seed)
        logits, seen = rng.normal(0, 2.5, 300), rng.integers(0, 300, 40).tolist()
        ids, p = candidates(logits, how, seen)
        ours = np.zeros(300)
        ours[ids] = p
        theirs = their_probabilities(logits, how, seen)
        assert set(ids.tolist()) == set(np.flatnonzero(theirs).tolist())
        worst = max(worst, np.abs(ours - theirs).max())
    assert worst < 1e-6, worst


def test_the_comparison_notices_another_order_of_the_filters():
    rng = np.random.default_rng(0)
    logits, seen = rng.normal(0, 2.5, 300), rng.integers(0, 300, 40).tolist()
    how = FILTERS["all, hot"]
    late = Sampling(top_k=how.top_k, top_p=how.top_p, min_p=how.min_p, repetition_penalty=how.repetition_penalty)
    ids, _ = candidates(logits, late, seen)  # temperature last: which tokens stay does not know of it
    assert set(ids.tolist()) != set(np.flatnonzero(their_probabilities(logits, how, seen)).tolist())


def both(changes):
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**BASE, **changes, attn_implementation="eager"))
    ours = Llama(LlamaConfig(**BASE, **changes))
    ours.load_state_dict({name: p.detach().numpy() for name, p in theirs.named_parameters()})
    return ours, theirs.eval()


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
def test_greedy_text_equals_theirs_with_and_without_a_repetition_penalty(changes, penalty):
    ours, theirs = both(changes)
    for prompt in ([5, 17, 42], [3], list(range(20))):
        ids = torch.tensor([prompt])
        wanted = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False,
                                 eos_token_id=None, pad_token_id=0, repetition_penalty=penalty)  # fmt: skip
        got = generate(ours, prompt, max_new_tokens=40, temperature=0, repetition_penalty=penalty)
        assert list(got) == wanted[0, len(prompt) :].tolist()


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("context, stride", [(32, 16), (64, 64), (16, 3)])
def test_the_loss_of_an_evaluation_equals_theirs_on_the_same_windows(changes, context, stride):
    ours, theirs = both(changes)
    tokens = np.random.default_rng(1).integers(0, 97, 203).astype(np.uint16)
    seen = evaluate(ours, tokens, first=1, context=context, stride=stride, batch_size=4)
    nats, count = 0.0, 0
    for ids, targets in evaluation_windows(tokens, first=1, context=context, stride=stride):
        with torch.no_grad():
            logits = theirs(torch.tensor(ids[None])).logits[0].double()
        nats += torch.nn.functional.cross_entropy(logits, torch.tensor(targets), reduction="sum").item()
        count += int((targets != IGNORE).sum())
    assert seen.tokens == count == len(tokens)
    assert seen.loss == pytest.approx(nats / count, abs=1e-5, rel=0)
