"""Adapters against PEFT itself: who is matched, files both ways, one step of training, bitsandbytes' NF4."""

from __future__ import annotations

import copy
import json
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="make test-peers installs PyTorch")
transformers = pytest.importorskip("transformers", reason="make test-peers installs transformers")
peft = pytest.importorskip("peft", reason="make test-peers installs PEFT")

from entrenar import random  # noqa: E402
from entrenar.adapters import (  # noqa: E402
    LoraConfig,
    adapt,
    adapter_tensors,
    load_adapter,
    save_adapter,
    use_adapter,
)
from entrenar.adapters.matching import plan  # noqa: E402
from entrenar.llama import Llama, LlamaConfig  # noqa: E402

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

SHAPE = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    initializer_range=0.15,
)
IDS = np.random.default_rng(0).integers(0, 97, (2, 17))
QUIET = dict(init_lora_weights=False)  # B is not zero, so that everything shows

CONFIGS = {
    "default": dict(),
    "rslora": dict(r=4, lora_alpha=3, use_rslora=True),
    "dora": dict(r=4, use_dora=True, target_modules=["q_proj", "o_proj", "up_proj"]),
    "regex": dict(target_modules=r".*\.(1|2)\..*(q_proj|gate_proj)"),
    "all-linear": dict(target_modules="all-linear", r=2),
    "patterns": dict(
        target_modules=["q_proj", "k_proj", "down_proj"],
        rank_pattern={r"layers\.1\..*": 5, "q_proj": 3},
        alpha_pattern={"^model.layers.2.mlp.down_proj": 32, "k_proj": 1},
    ),
    "layers": dict(target_modules=["v_proj", "up_proj"], layers_to_transform=[0, 2], layers_pattern="layers"),
    "one layer": dict(target_modules=["v_proj"], layers_to_transform=1),
    "excluded": dict(target_modules="all-linear", exclude_modules=r".*\.1\..*|.*down_proj"),
    "excluded names": dict(target_modules="all-linear", exclude_modules=["q_proj", "layers.0.mlp.up_proj"]),
    "modules_to_save": dict(modules_to_save=["lm_head", "model.norm"]),
    "saved and targeted": dict(target_modules=["q_proj", "lm_head", "embed_tokens"], modules_to_save=["embed_tokens"]),
    "norms": dict(modules_to_save=["norm"]),
    "embeddings": dict(target_modules=["embed_tokens", "q_proj"]),
    "dora embeddings": dict(target_modules=["embed_tokens", "q_proj"], use_dora=True, use_rslora=True),
    "head": dict(target_modules=["lm_head", "v_proj"]),
    "whole names": dict(target_modules=["model.layers.0.self_attn.q_proj", "layers.1.mlp.up_proj"]),
}


def models(dtype="float32", **changes):
    """(transformers' model, ours) with the same weights."""
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE | changes, attn_implementation="eager"))
    theirs = theirs.to(getattr(torch, dtype))
    ours = Llama(LlamaConfig(**SHAPE | changes), dtype=np.dtype(dtype))
    state = {name: p.detach().numpy() for name, p in theirs.named_parameters()}
    ours.load_state_dict(state)
    return theirs, ours


def with_peft(model, fields, **rest):
    torch.manual_seed(1)
    made = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **fields, **rest))
    with torch.no_grad():
        for name, p in made.named_parameters():
            if p.requires_grad and ("magnitude" in name or "modules_to_save" in name):
                p.mul_(1 + 0.1 * torch.randn_like(p))
    return made.eval()


def logits(model):
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


def assert_equal_logits(ours, theirs):
    wanted = logits(theirs)
    np.testing.assert_allclose(ours(IDS).data, wanted, atol=1e-5 * max(1, np.abs(wanted).max()), rtol=0)


# -- who is matched


def theirs_matched(fields):
    """{module: (rank, scale)} of PEFT's layers, and the modules it trains as a whole."""
    model = with_peft(models()[0], fields)
    low, whole = {}, []
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            low[name] = (module.r["default"], pytest.approx(module.scaling["default"]))
        elif isinstance(module, peft.utils.ModulesToSaveWrapper):
            whole.append(name)
    return low, sorted(whole)


MORE_MATCHING = {
    "suffix of a word": dict(target_modules=["proj"]),
    "a part of the path": dict(target_modules=r"model\.layers\.\d\.self_attn\.[qk]_proj"),
    "lazy, bounded": dict(target_modules=r"(?:.*?layers\.[0-1]{1,2}\.)mlp\.(?:up|down)_\w+?"),
    "anchors": dict(target_modules=r"^model\..*\bq_proj$"),
    "first pattern wins": dict(target_modules=["q_proj"], rank_pattern={r"1\..*q_proj": 2, "q_proj": 3}),
    "pattern of a part of a word": dict(target_modules=["q_proj", "up_proj"], rank_pattern={"proj": 3, ".*p_proj": 5}),
    "no layers": dict(target_modules=["q_proj"], layers_to_transform=[]),
    "whole name and layers": dict(target_modules=["model.layers.2.mlp.up_proj", "q_proj"], layers_to_transform=[0]),
    "ALL-LINEAR": dict(target_modules="ALL-Linear", rank_pattern={"mlp.*": 2}),
    "excluded by empty list": dict(target_modules=["q_proj"], exclude_modules=[]),
    "saved inside": dict(target_modules="all-linear", modules_to_save=["0.mlp.up_proj"]),
    "two patterns of layers": dict(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern=["h", "layers"]),
}


@pytest.mark.parametrize("fields", (CONFIGS | MORE_MATCHING).values(), ids=(CONFIGS | MORE_MATCHING).keys())
def test_the_same_modules_are_matched(fields):
    try:
        wanted = theirs_matched(fields)
    except ValueError:
        with pytest.raises(ValueError):
            plan(models()[1], LoraConfig(**fields))
        return
    found = plan(models()[1], LoraConfig(**fields), strict=False)
    assert ({name: (s.r, s.scale) for name, s in found.low_rank.items()}, sorted(found.whole)) == wanted


def test_a_difference_in_matching_is_found():
    found = plan(models()[1], LoraConfig(r=7))
    assert {name: (s.r, s.scale) for name, s in found.low_rank.items()} != theirs_matched({})[0]


# -- files


@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS.keys())
def test_we_load_what_peft_wrote(fields, tmp_path):
    theirs, ours = models()
    theirs = with_peft(theirs, fields, **QUIET)
    theirs.save_pretrained(tmp_path)
    load_adapter(ours, tmp_path)
    assert_equal_logits(ours, theirs)
    plain, _ = models()
    use_adapter(ours, None)
    assert_equal_logits(ours, plain)


@pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS.keys())
def test_peft_loads_what_we_wrote(fields, tmp_path):
    theirs, ours = models()
    random.seed(3)
    adapt(ours, LoraConfig(**fields, **QUIET))
    rng = np.random.default_rng(1)
    for name, tensor in adapter_tensors(ours).items():
        if "lora_" not in name or "magnitude" in name:
            tensor.data *= 1 + 0.1 * rng.normal(size=tensor.shape).astype(np.float32)
    before = logits(theirs)
    save_adapter(ours, tmp_path / "adapter", base="somebody/model")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of keys that are missing
        warnings.filterwarnings("ignore", message=".*(tie|offline|config file).*")
        theirs = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapter")).eval()
    assert_equal_logits(ours, theirs)
    assert np.abs(logits(theirs) - before).max() > 1e-3, "the control: the adapter changes something"


def test_what_we_wrote_is_what_peft_writes(tmp_path):
    """The same keys of the configuration with the same values; the same names, shapes and types of tensors."""
    theirs, ours = models()
    theirs = with_peft(theirs, dict(r=4, use_dora=True, modules_to_save=["lm_head"]))
    theirs.save_pretrained(tmp_path / "theirs")
    adapt(ours, LoraConfig(r=4, use_dora=True, modules_to_save=["lm_head"]))
    save_adapter(ours, tmp_path / "ours")
    from entrenar.formats import safetensors

    a, b = (safetensors.read_header(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours"))
    assert {e.name: (e.shape, e.dtype) for e in a.entries.values()} == {
        e.name: (e.shape, e.dtype) for e in b.entries.values()
    }
    a, b = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("theirs", "ours"))
    a["target_modules"].sort()
    assert b.items() <= a.items(), {
        key: (value, a.get(key, "?")) for key, value in b.items() if a.get(key, "?") != value
    }


def test_the_order_of_patterns_stays(tmp_path):
    """PEFT sorts them when it writes, so that it cannot read its own files back where the order matters; we do not."""
    fields = dict(target_modules=["q_proj"], rank_pattern={"q_proj": 3, r"layers\.1\..*": 5})
    theirs, ours = models()
    adapt(ours, LoraConfig(**fields, **QUIET))
    save_adapter(ours, tmp_path / "adapter")
    assert_equal_logits(ours, peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapter")).eval())
    _, again = models()
    load_adapter(again, tmp_path / "adapter")
    np.testing.assert_array_equal(again(IDS).data, ours(IDS).data)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_precision_adapters_and_other_names_are_read(name, tmp_path):
    theirs, ours = models()
    theirs = with_peft(theirs, {}, **QUIET)
    theirs.add_adapter("second", peft.LoraConfig(r=3, target_modules=["k_proj"], init_lora_weights=False))
    theirs.set_adapter("second")
    with torch.no_grad():
        for key, p in theirs.named_parameters():
            if "second" in key:
                p.copy_(p.to(getattr(torch, name)))  # so that both compute with the same numbers
    wanted = copy.deepcopy(theirs)
    for key, p in theirs.named_parameters():
        if "second" in key:
            p.data = p.data.to(getattr(torch, name))
    theirs.save_pretrained(tmp_path)
    load_adapter(ours, tmp_path, "second")
    assert_equal_logits(ours, wanted)
    load_adapter(ours, tmp_path)
    wanted.set_adapter("default")
    assert_equal_logits(ours, wanted)


@pytest.mark.parametrize(
    "fields", [dict(target_modules=["embed_tokens", "q_proj"]), dict(modules_to_save=["embed_tokens"])]
)
def test_tied_embeddings_are_peft_s_too(fields, tmp_path):
    theirs, ours = models(tie_word_embeddings=True)
    theirs = with_peft(theirs, fields, **QUIET)
    theirs.save_pretrained(tmp_path)
    load_adapter(ours, tmp_path)
    assert_equal_logits(ours, theirs)
