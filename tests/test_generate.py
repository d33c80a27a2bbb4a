"""How tokens are chosen and text goes on: every filter by its definition, every setting checked."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from entrenar import kernels, random
from entrenar.cli.writing import StopStrings
from entrenar.llama import Llama, LlamaConfig, Reader, generate
from entrenar.llama.generate import Sampling, candidates, sample

SMALL = LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3)  # fmt: skip
P = np.array([0.05, 0.5, 0.15, 0.3])


@pytest.fixture(scope="module")
def model():
    random.seed(3)
    return Llama(SMALL)


def kept(how, logits=None, seen=()):
    ids, p = candidates(np.log(P) if logits is None else logits, how, seen)
    assert p.sum() == pytest.approx(1) and len(ids) == len(p) >= 1
    return dict(zip(ids.tolist(), p.round(6).tolist(), strict=True))


def test_without_settings_the_candidates_are_the_whole_softmax():
    assert kept(Sampling()) == {0: 0.05, 1: 0.5, 2: 0.15, 3: 0.3}
    assert list(kept(Sampling())) == [0, 1, 2, 3]


def test_each_filter_keeps_what_its_definition_says():
    assert kept(Sampling(top_k=2)) == {1: 0.625, 3: 0.375}
    assert kept(Sampling(top_k=99)) == kept(Sampling())
    assert kept(Sampling(top_p=0.79)) == {1: 0.625, 3: 0.375}
    assert list(kept(Sampling(top_p=0.81))) == [1, 2, 3]
    assert kept(Sampling(top_p=1e-9)) == {1: 1.0}
    assert list(kept(Sampling(min_p=0.29))) == [1, 2, 3]  # 0.15 >= 0.29 * 0.5
    assert kept(Sampling(min_p=0.31)) == {1: 0.625, 3: 0.375}
    assert kept(Sampling(min_p=1)) == {1: 1.0}
    assert kept(Sampling(temperature=0, top_k=3)) == {1: 1.0}


def test_temperature_comes_before_the_filters_and_top_k_before_top_p():
    hot = P**0.5 / (P**0.5).sum()  # temperature 2
    assert kept(Sampling(temperature=2)) == pytest.approx({i: hot[i].round(6) for i in range(4)})
    assert list(kept(Sampling(temperature=2, top_p=0.6))) == [1, 3] != list(kept(Sampling(top_p=0.5)))
    # of the two that top_k leaves the first alone has 0.625
    assert list(kept(Sampling(top_k=2, top_p=0.6))) == [1]
    assert list(kept(Sampling(top_p=0.6))) == [1, 3]


def test_of_equally_probable_tokens_those_of_lower_id_stay():
    assert kept(Sampling(top_k=2), np.zeros(5)) == kept(Sampling(top_p=0.4), np.zeros(5)) == {0: 0.5, 1: 0.5}
    assert kept(Sampling(top_k=2), np.array([0.0, 1, 0, 1, 1])) == {1: 0.5, 3: 0.5}
    assert kept(Sampling(top_p=1e-300), np.zeros(7)) == {0: 1.0}


def test_the_repetition_penalty_makes_seen_tokens_less_likely_whatever_their_sign_and_counts_each_once():
    logits = np.array([2.0, -1.0, 0.5, 0.0])
    ids, p = candidates(logits, Sampling(repetition_penalty=2), seen=[0, 1, 1, 1])
    wanted = np.exp([1.0, -2.0, 0.5, 0.0])
    np.testing.assert_allclose(p[np.argsort(ids)], wanted / wanted.sum())
    assert logits.tolist() == [2.0, -1.0, 0.5, 0.0], "the caller's logits stay"
    assert sample(logits, np.random.default_rng(0), temperature=0, repetition_penalty=9, seen=[0]) == 2


def by_definition(z, how):
    """The candidates with everything sorted: {id: probability}."""
    order = sorted(range(len(z)), key=lambda i: (-z[i], i))
    p = np.exp((z[order] - z.max()) / how.temperature)
    order = order[: how.top_k or None]
    p = p[: len(order)] / p[: len(order)].sum()
    n = 1
    while n < len(p) and p[:n].sum() < how.top_p:
        n += 1
    p = p[:n] / p[:n].sum()
    p = p[p >= how.min_p * p[0]]
    return dict(zip(order, p / p.sum(), strict=False))


LOGITS = st.lists(st.integers(-90, 90).map(lambda i: i / 10), min_size=1, max_size=40)


@given(LOGITS, st.floats(0.3, 5), st.integers(0, 50), st.floats(0.01, 1), st.floats(0, 1))
def test_what_the_filters_leave_is_what_sorting_everything_leaves(logits, temperature, top_k, top_p, min_p):
    z, how = np.array(logits), Sampling(temperature, top_k, top_p, min_p)
    for off in (0, 1e-9, -1e-9):  # a sum that reaches top_p but for its rounding may go either way
        near = dataclasses.replace(how, top_p=min(1, top_p + off), min_p=min(1, min_p * (1 + off)))
        assume(by_definition(z, near).keys() == by_definition(z, how).keys())
    ids, p = candidates(z, how)
    wanted = by_definition(z, how)
    assert ids.tolist() == sorted(wanted) and p.sum() == pytest.approx(1)
    np.testing.assert_allclose(p, [wanted[i] for i in ids.tolist()], rtol=1e-9)


def test_a_tiny_temperature_is_greedy_and_not_a_division_error():
    with np.errstate(all="raise", under="ignore"):
        assert sample(np.array([1.0, 3.0, 2.0]), np.random.default_rng(0), temperature=1e-310) == 1


def test_sampled_tokens_follow_the_candidates_probabilities():
    logits, rng, how = np.log(P), np.random.default_rng(0), {"temperature": 1.3, "min_p": 0.2, "top_k": 3}
    shares = np.bincount([sample(logits, rng, **how) for _ in range(4000)], minlength=4) / 4000
    wanted = kept(Sampling(**how))
    np.testing.assert_allclose(shares, [wanted.get(i, 0) for i in range(4)], atol=4 * 0.5 / math.sqrt(4000))


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("top_k", -1), ("top_k", 1.5),
     ("top_k", True), ("top_p", 0), ("top_p", 1.01), ("top_p", math.nan), ("min_p", -0.1), ("min_p", 1.1),
     ("repetition_penalty", 0), ("repetition_penalty", math.inf)],
)  # fmt: skip
def test_a_setting_out_of_its_range_is_refused_by_name(name, value, model):
    with pytest.raises(ValueError, match=rf"{name} = {value!r}: wanted "):
        Sampling(**{name: value})
    with pytest.raises(ValueError, match=name):
        generate(model, [1], max_new_tokens=1, **{name: value})  # at once, not at the first token


def test_all_wrong_settings_are_told_at_once():
    with pytest.raises(ValueError, match="temperature = -1: .*; top_p = 2: .*; min_p = 3: "):
        Sampling(temperature=-1, top_p=2, min_p=3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_an_error_not_a_token(bad):
    logits = np.zeros(5)
    logits[3] = bad
    for temperature in (0, 1):
        with pytest.raises(ValueError, match=f"token 3 has logit {bad}: the model's weights"):
            sample(logits, np.random.default_rng(0), temperature=temperature)


@pytest.mark.parametrize(("ids", "message"), [([1, 97], "token 1 of the prompt is 97: wanted 0 to 96"),
                                              ([-1], "token 0 of the prompt is -1"), ([], "prompt is empty"),
                                              ([0] * 64, "64 tokens leaves no room in a context of 64")])  # fmt: skip
def test_a_prompt_that_cannot_be_continued_is_refused_at_once(model, ids, message):
    with pytest.raises(ValueError, match=message):
        generate(model, ids, max_new_tokens=1)
    with pytest.raises(ValueError, match="max_new_tokens = -1"):
        generate(model, [1], max_new_tokens=-1)


SETTINGS = {"temperature": 1.2, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.3}


def written(model, seed=0, prompt=(5, 17), length=30, **settings):
    rng = np.random.default_rng(seed)
    return list(generate(model, list(prompt), max_new_tokens=length, rng=rng, **(SETTINGS | settings)))


def test_the_same_seed_writes_the_same_tokens_on_any_number_of_threads_with_and_without_a_cache(model):
    before = kernels.get_num_threads()
    try:
        runs = []
        for threads in (1, 2, 3):
            kernels.set_num_threads(threads)
            runs.append(written(model))
    finally:
        kernels.set_num_threads(before)
    assert runs[0] == runs[1] == runs[2] == written(model, use_cache=False)
    assert written(model, seed=1) != runs[0]


def test_the_penalty_counts_the_prompt_and_what_was_written(model):
    tokens = written(model, temperature=0, repetition_penalty=1e6, length=60)
    assert len({5, 17, *tokens}) == 2 + len(tokens), "no token comes twice"
    assert len(set(written(model, temperature=0, repetition_penalty=1.0, length=60))) < 60, "the control"


def test_generation_ends_at_the_context_and_does_not_touch_its_prompt(model):
    prompt = [1, 2, 3]
    assert len(list(generate(model, prompt, max_new_tokens=999))) == 61 and prompt == [1, 2, 3]
    assert list(generate(model, np.array(prompt), max_new_tokens=0)) == []


# -- stop strings


def streamed(strings, pieces):
    watch = StopStrings(strings)
    return "".join([watch.push(piece) for piece in pieces] + [watch.end()]), watch.found


def by_the_letter(strings, text):
    """What is before the stop string that is complete first, found by reading one letter after the other."""
    for end in range(len(text) + 1):
        hits = [s for s in strings if text[:end].endswith(s)]
        if hits:
            found = max(hits, key=len)
            return text[: end - len(found)], found
    return text, ""


STOPS, PIECES = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3), st.lists(st.text("ab\n", max_size=3))


@given(STOPS, PIECES)
def test_a_stop_string_is_found_wherever_the_pieces_are_cut(strings, pieces):
    assert streamed(strings, pieces) == by_the_letter(strings, "".join(pieces))


@given(STOPS, PIECES)
def test_nothing_of_a_stop_string_is_ever_given_out_and_nothing_else_is_held_back(strings, pieces):
    watch, out, text = StopStrings(strings), "", ""
    for piece in pieces:
        out, text = out + watch.push(piece), text + piece
        if watch.found:
            assert out + watch.found == text[: len(out) + len(watch.found)]
            return
        assert out + watch.held == text
        assert not watch.held or any(s.startswith(watch.held) for s in strings)
        later = [text[i:] for i in range(len(out), len(text))]
        assert all(watch.held.endswith(end) for end in later if any(s.startswith(end) for s in strings))


def test_without_stop_strings_text_passes_at_once():
    assert StopStrings(()).push("anything") == "anything"


def test_the_settings_of_generate_are_those_of_sampling():
    import inspect

    fields = {f.name: f.default for f in dataclasses.fields(Sampling)}
    for function in (generate, sample):
        given_ = inspect.signature(function).parameters
        assert {name: given_[name].default for name in fields} == fields


# -- reading on


def test_a_reader_reads_only_what_differs_from_what_it_read_before(model):
    reader, rng = Reader(model), np.random.default_rng(0)
    text = rng.integers(0, 97, 20).tolist()
    first = list(generate(model, text, max_new_tokens=5, temperature=0, reader=reader))
    assert reader.read == 20 + 4  # the last token was not read
    longer = [*text, *first, 3, 4]
    assert list(generate(model, longer, max_new_tokens=5, temperature=0, reader=reader)) == list(
        generate(model, longer, max_new_tokens=5, temperature=0, use_cache=False)
    )
    assert reader.read == 24 + 3 + 4
    other = [*text[:10], (text[10] + 1) % 97]
    assert list(generate(model, other, max_new_tokens=3, temperature=0, reader=reader)) == list(
        generate(model, other, max_new_tokens=3, temperature=0, use_cache=False)
    )
    assert reader.read == 31 + 1 + 2


def test_what_was_read_already_is_predicted_from_again_by_its_last_token(model):
    reader = Reader(model)
    logits = reader.last_logits([5, 6, 7])
    np.testing.assert_allclose(reader.last_logits([5, 6, 7]), logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(reader.last_logits([5, 6]), Reader(model).last_logits([5, 6]), rtol=1e-5, atol=1e-5)
    assert reader.read == 3 + 1 + 1


def test_a_reader_that_is_stopped_in_the_middle_goes_on_rightly(model, monkeypatch):
    reader = Reader(model)
    reader.last_logits([5, 6, 7])
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "logits", lambda self, x: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            reader.last_logits([5, 6, 8, 9])
    wanted = Reader(model).last_logits([5, 6, 8, 9])
    np.testing.assert_allclose(reader.last_logits([5, 6, 8, 9]), wanted, rtol=1e-5, atol=1e-5)


def test_a_reader_grows_with_the_text_up_to_the_models_context(model):
    reader = Reader(model, capacity=2)
    for length in (1, 5, 64):
        logits = reader.last_logits(list(range(length)))
    assert reader.cache.capacity == 64 and reader.read == 64
    np.testing.assert_allclose(logits, model(np.arange(64)[None]).data[0, -1], rtol=1e-4, atol=1e-4)
