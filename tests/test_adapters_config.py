"""LoraConfig field by field, and the regular expressions in it: the same names as Python's, in bounded time."""

from __future__ import annotations

import json
import re
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_adapters import llama

from entrenar.adapters import LoraConfig, adapt
from entrenar.adapters.matching import plain_modules, plan
from entrenar.adapters.patterns import Budget, Pattern, PatternError
from entrenar.formats import FormatError

# -- fields


def test_defaults_are_peft_s():
    config = LoraConfig()
    assert (config.r, config.lora_alpha, config.lora_dropout, config.bias, config.init_lora_weights) == (
        8,
        8,
        0.0,
        "none",
        True,
    )
    assert (
        config.target_modules is config.exclude_modules is config.modules_to_save is config.layers_to_transform is None
    )
    assert {name.rpartition(".")[2] for name in plan(llama(), config).low_rank} == {"q_proj", "v_proj"}
    assert config.scale(8, 8) == 1 and LoraConfig(use_rslora=True).scale(4, 8) == 4


BAD = {
    "r": [0, -1, 1.0, True, "8", None, 1 << 17, [8]],
    "lora_alpha": [0, -1, True, "8", None, float("nan"), float("inf"), 1e9],
    "lora_dropout": [-0.1, 1, 1.5, True, "0", None, float("nan")],
    "use_rslora": [0, 1, None, "true"],
    "use_dora": [0, 1, None, "true"],
    "target_modules": [[], "", {}, 1, [1], [""], ["x" * 300], "(", ["a\x1b"]],
    "exclude_modules": ["", {}, 1, [1], "a**"],
    "layers_to_transform": [-1, 1.5, True, "1", [-1], ["1"], {}],
    "modules_to_save": [[], "lm_head", 1, [1], {}],
    "rank_pattern": [None, [], {"q": 0}, {"q": 1.5}, {"q": True}, {"(": 4}, {1: 4}],
    "alpha_pattern": [None, [], {"q": 0}, {"q": "1"}, {"q": True}, {"(": 4}],
    "init_lora_weights": ["pissa", "olora", "Gaussian!", None, 1, 0],
    "bias": ["all", "lora_only", None, False],
    "base_model_name_or_path": [1, "a\nb", "x" * 5000],
}


@pytest.mark.parametrize("field, value", [(field, value) for field, values in BAD.items() for value in values])
def test_a_bad_value_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"LoraConfig: {field}"):
        LoraConfig(**{field: value})


def test_every_bad_field_has_a_test():
    import dataclasses

    assert set(BAD) | {"layers_pattern"} == {f.name for f in dataclasses.fields(LoraConfig)}


def test_all_bad_fields_are_said_at_once():
    with pytest.raises(ValueError) as error:
        LoraConfig(r=0, lora_alpha="x", lora_dropout=2, target_modules=[], bias="all")
    for field in (
        "r = 0: wanted a whole number from 1",
        "lora_alpha = 'x': wanted a number",
        "lora_dropout = 2",
        "target_modules = []",
        "bias = 'all': wanted 'none'",
    ):
        assert field in str(error.value)


@pytest.mark.parametrize(
    "fields, says",
    [
        (
            dict(target_modules="all-linear", layers_to_transform=[1]),
            "layers_to_transform = .* only with a list of target_modules",
        ),
        (
            dict(target_modules="a.*", layers_to_transform=1, layers_pattern="h"),
            "layers_pattern = 'h': only with a list",
        ),
        (dict(layers_pattern="layers"), "layers_pattern = 'layers': means nothing without layers_to_transform"),
        (dict(layers_to_transform=1, layers_pattern="a|b"), r"layers_pattern = 'a\|b': wanted a plain word"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        LoraConfig(**fields)


def test_a_configuration_survives_json():
    config = LoraConfig(
        r=4,
        lora_alpha=2.5,
        use_dora=True,
        target_modules=["b", "a"],
        rank_pattern={"z": 2, "a": 3},
        modules_to_save=["norm"],
        init_lora_weights="gaussian",
        base_model_name_or_path="me/it",
    )
    again = LoraConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config and list(again.rank_pattern) == ["z", "a"]
    assert LoraConfig(target_modules={"b", "a"}) == LoraConfig(target_modules=("a", "b"))


def test_a_file_s_problems_are_named_with_the_file():
    values = LoraConfig().to_dict() | {"r": 0, "trainable_token_indices": [1], "hello": 1, "peft_type": "IA3"}
    with pytest.raises(FormatError) as error:
        LoraConfig.from_dict(values, where="x/adapter_config.json")
    text = str(error.value)
    assert text.startswith("x/adapter_config.json: ")
    for part in (
        "r = 0",
        "'trainable_token_indices' = [1]: wanted None",
        "'hello' = 1: an unknown key",
        "'peft_type' = 'IA3'",
    ):
        assert part in text
    assert LoraConfig.from_dict({"peft_type": "LORA", "new_switch": False, "target_modules": ["q_proj"]}).r == 8


leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["q_proj", "all-linear", "(", "a*"]),
)
values = st.recursive(leaves, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x, max_size=3))


@given(st.dictionaries(st.sampled_from([*LoraConfig().to_dict(), "eva_config", "x"]), values, max_size=6))
def test_any_json_is_a_configuration_or_refused_in_words(changes):
    try:
        config = LoraConfig.from_dict(LoraConfig().to_dict() | changes, where="some.json")
    except FormatError as error:
        assert str(error).startswith("some.json: ") and len(str(error)) < 4000
        return
    assert LoraConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


# -- what matches nothing


def test_a_name_that_matches_nothing_is_refused_with_near_ones():
    for fields, says in (
        (dict(target_modules=["q_porj"]), "target_modules: no module is called 'q_porj'; near: q_proj"),
        (dict(target_modules=["q_proj", "qkv"]), "target_modules: no module is called 'qkv'"),
        (dict(exclude_modules=["vproj"]), "exclude_modules: no module is called 'vproj'; near: v_proj"),
        (dict(modules_to_save=["lmhead"]), "modules_to_save: no module is called 'lmhead'; near: lm_head"),
        (dict(modules_to_save=["mlp"]), "modules_to_save: model.layers.0.mlp is a MLP: name the layers inside it"),
        (dict(target_modules=r".*\.qq_proj"), "nothing is left to adapt"),
        (dict(exclude_modules=["q_proj", "v_proj"]), "nothing is left to adapt"),
        (dict(layers_to_transform=[2]), "layers_to_transform: 2: the model has layers 0 to 1"),
        (dict(rank_pattern={"k_proj": 4}), "rank_pattern: 'k_proj' is for none of them"),
        (dict(alpha_pattern={"qproj": 4}), "alpha_pattern: 'qproj' is for none of them"),
        (dict(target_modules=["mlp"]), "model.layers.1.mlp is a MLP: wanted a linear layer or an embedding"),
    ):
        with pytest.raises(ValueError, match=re.escape(says)):
            adapt(llama(), LoraConfig(**fields))


# -- patterns


NAMES = list(plain_modules(llama())) + ["", "a", "ab", "a.b", "aaa", "a-b", "0", "x_1.y", "naïve"]
PATTERNS = [
    ".*",
    "",
    "a",
    "a|b",
    "(a|b)*",
    "a{2}",
    "a{1,}",
    "a{,2}",
    "a{2,3}?",
    "a*?",
    "(?:ab?)+",
    "[a-c]+",
    "[^.]*",
    r"\w+",
    r"\d",
    r".*\d.*",
    r".*\.\d+\..*",
    r"\bmodel\b.*",
    r"^model.*$",
    r".*_proj$",
    r"(?P<x>model)\..*",
    r"[\w.]+",
    "[]a]",
    "[^]]+",
    r"a\.b",
    r"a\-b",
    "a{",
    "{",
    "a{}",
    "x{1",
    r"\Amodel.*\Z",
    r".*(q|k|v)_proj",
    r"(|a)b?",
    "(a?){3}",
    "((a|b)+)+",
    r"\S*\s?",
    r"model\.layers\.[0-9]{1,3}\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)",
    r".*\B_proj",
    "[[]|[-a]",
    "naïve|na.ve",
    r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:k_proj|v_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:"
    r"(?:k_proj|v_proj|q_proj|up_proj)))",
]


@pytest.mark.filterwarnings("ignore:Possible nested set")
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_matches_the_names_that_re_matches(pattern):
    ours = Pattern(pattern)
    for name in NAMES:
        assert ours.fullmatch(name) == bool(re.fullmatch(pattern, name)), name
        assert ours.matches_end(name) == bool(re.match(rf"(.*\.)?({pattern})$", name)), name


atoms = st.sampled_from(["a", "b", ".", r"\.", r"\w", "[ab]", "[^a]", r"\d", r"\b", "^", "$", "1"])
quantifiers = st.sampled_from(["", "", "*", "+", "?", "{2}", "{1,2}", "*?", "{,1}"])
patterns = st.recursive(
    atoms,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map("".join),
        st.tuples(inner, inner).map(lambda two: f"(?:{two[0]}|{two[1]})"),
        st.tuples(inner, quantifiers).map(lambda both: f"({both[0]}){both[1]}"),
    ),
    max_leaves=6,
)


@given(patterns, st.text("ab1.", max_size=6))
def test_any_pattern_matches_the_names_that_re_matches(pattern, name):
    assert Pattern(pattern).fullmatch(name) == bool(re.fullmatch(pattern, name))
    assert Pattern(pattern).matches_end(name) == bool(re.match(rf"(.*\.)?({pattern})$", name))


@pytest.mark.parametrize(
    "pattern",
    [
        "(",
        ")",
        "a)",
        "*a",
        "a**",
        "[",
        "[a",
        "(?=a)",
        r"\1",
        "(?i)a",
        "\\",
        "a{2,1}",
        "[b-a]",
        "a++",
        "(" * 50 + ")" * 50,
        "x" * 1001,
        r"\q",
        "^*",
    ],
)
def test_what_is_no_pattern_here_is_refused(pattern):
    with pytest.raises(PatternError):
        Pattern(pattern)


def test_patterns_that_take_re_for_ever_take_no_time():
    name = "a" * 60
    start = time.process_time()
    for pattern in ("(a+)+b", "(a|a)*b", "(a*)*b", "(.*.*)*x", "((a*)*)*b"):
        assert not Pattern(pattern).fullmatch(name)
    assert time.process_time() - start < 1


def test_steps_are_counted():
    budget = Budget(100)
    with pytest.raises(PatternError, match="takes too long to match"):
        Pattern("(.(?:(.|.|.)*x)?)*", budget).fullmatch("a" * 50)
    assert budget.left < 0
    budget = Budget()
    assert not Pattern("((){9999999}){9999999}" * 20, budget).fullmatch("model.layers.0.mlp.up_proj")
    assert budget.left > 0.9 * Budget().left, "what changes nothing is not repeated"


def test_what_people_write_takes_a_small_part_of_the_budget():
    budget = Budget()
    Pattern(PATTERNS[-1], budget).fullmatch("model.layers.100.self_attn.q_proj")
    assert budget.left > Budget().left - 5000 and np.isfinite(budget.left)
