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
    merge_adapter,
    merged,
    save_adapter,
    use_adapter,
)
from entrenar.adapters.matching import plan  # noqa: E402
from entrenar.convert.gguf_adapter import export_gguf_adapter  # noqa: E402
from entrenar.kernels.packed import Nested, Packed  # noqa: E402
from entrenar.llama import Llama, LlamaConfig  # noqa: E402
from entrenar.optim import AdamW  # noqa: E402

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


# -- one step of training


TARGETS = IDS[:, 1:].copy()
TARGETS[0, 3:6] = -100
LR, EPS = 1e-2, 1e-3  # of Adam: an eps that is not far below the gradients, whose last digits else decide the step


def peft_name(name):
    """Ours -> the name of the parameter in PEFT's model; they are the same."""
    return f"base_model.model.{name}"


def one_step(theirs, ours, tolerance):
    """Loss, gradients and what one step of AdamW makes of the adapter, in both."""
    out = theirs(torch.tensor(IDS[:, :-1])).logits
    their_loss = torch.nn.functional.cross_entropy(out.reshape(-1, 97), torch.tensor(TARGETS.reshape(-1)))
    their_loss.backward()
    loss = ours.loss(IDS[:, :-1], TARGETS)
    loss.backward()
    assert loss.item() == pytest.approx(their_loss.item(), rel=tolerance)
    trained = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    own = dict(ours.named_parameters())
    assert {peft_name(name) for name in own} == set(trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=LR, eps=EPS, weight_decay=0.0)
    optimizer.step()
    adam = AdamW(own.items(), lr=LR, eps=EPS, weight_decay=0.0)
    adam.step()
    assert set(adam.m) == set(own), "no state for the base"
    for name, p in own.items():
        wanted = trained[peft_name(name)]
        gradient = wanted.grad.numpy()
        far = tolerance * np.abs(gradient).max()
        np.testing.assert_allclose(p.grad, gradient, atol=far, rtol=0, err_msg=name)
        # the step is lr g / (|g| + eps), which turns an error of the gradient into lr / eps times as much
        step = LR * far / EPS + 4 * np.finfo(p.dtype).eps * np.abs(p.data).max()
        np.testing.assert_allclose(p.data, wanted.detach().numpy(), atol=step, rtol=0, err_msg=name)


STEPS = {
    name: CONFIGS[name]
    for name in ("rslora", "dora", "all-linear", "modules_to_save", "embeddings", "dora embeddings", "head")
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype, tolerance", [("float64", 2e-6), ("float32", 1e-4)])  # their RoPE tables are float32
@pytest.mark.parametrize("fields", STEPS.values(), ids=STEPS.keys())
def test_one_step_of_training_equals_peft(fields, dtype, tolerance, checkpointing, tmp_path):
    theirs, ours = models(dtype)
    theirs = with_peft(theirs, fields, **QUIET)
    for p in theirs.parameters():
        p.data = p.data.to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path)
    load_adapter(ours, tmp_path, trainable=True)
    ours.checkpointing = checkpointing
    one_step(theirs, ours, tolerance)


@pytest.mark.parametrize("fields", [dict(target_modules="all-linear"), dict(target_modules=["q_proj"], use_dora=True)])
def test_dropout_goes_where_peft_has_it(fields, tmp_path, monkeypatch):
    """With the same mask in both, which depends on the shape alone."""

    def mask(shape):
        return (np.random.default_rng(2).random(shape) >= 0.3) / np.float64(0.7)

    class Masked(torch.nn.Module):
        def forward(self, x):
            return x * torch.from_numpy(mask(tuple(x.shape)))

    theirs, ours = models("float64")
    theirs = with_peft(theirs, fields | dict(lora_dropout=0.3), **QUIET)
    for p in theirs.parameters():
        p.data = p.data.to(torch.float64)
    theirs.save_pretrained(tmp_path)
    for module in theirs.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.lora_dropout["default"] = Masked()
    monkeypatch.setattr("entrenar.ops.dropout", lambda x, p: x * mask(x.shape))
    load_adapter(ours, tmp_path, trainable=True)
    one_step(theirs.train(), ours, 2e-6)
    plain = ours.eval().loss(IDS[:, :-1], TARGETS).item()
    assert plain != pytest.approx(ours.train().loss(IDS[:, :-1], TARGETS).item(), rel=1e-3), "the control"


def quantized(theirs, ours, quant_type, nested):
    """Every linear layer but the head as bitsandbytes' Linear4bit in one, as the same bytes in the other."""
    bnb = pytest.importorskip("bitsandbytes")
    modules = dict(ours.named_modules())
    for name, module in list(theirs.named_modules()):
        if not isinstance(module, torch.nn.Linear) or name == "lm_head":
            continue
        made = bnb.nn.Linear4bit(
            module.in_features,
            module.out_features,
            bias=False,
            compute_dtype=torch.float32,
            quant_type=quant_type,
            compress_statistics=nested,
        )
        made.weight = bnb.nn.Params4bit(
            module.weight.data, requires_grad=False, quant_type=quant_type, compress_statistics=nested
        )
        made = made.to("cpu")
        made.support_avx512bf16_for_cpu = (
            False  # or it repacks, and loses digits of the scales, when no gradient is asked
        )
        parent, _, last = name.rpartition(".")
        setattr(theirs.get_submodule(parent), last, made)
        modules[name].weight = packed(made.weight, quant_type)
    theirs.is_loaded_in_4bit = True


def packed(weight, quant_type):
    state = weight.quant_state
    scales = state.absmax.numpy()
    if state.nested:
        inner = state.state2
        scales = Nested(scales, inner.code.numpy(), inner.absmax.numpy(), float(state.offset), inner.blocksize)
    return Packed(quant_type, tuple(state.shape), weight.data.numpy().reshape(-1).copy(), scales, state.blocksize)


@pytest.mark.parametrize(
    "fields", [CONFIGS["all-linear"], CONFIGS["dora"], CONFIGS["rslora"]], ids=["all", "dora", "rs"]
)
@pytest.mark.parametrize("quant_type, nested", [("nf4", True), ("nf4", False), ("fp4", True)])
def test_one_step_of_qlora_equals_peft_with_bitsandbytes(fields, quant_type, nested, tmp_path):
    theirs, ours = models()
    quantized(theirs, ours, quant_type, nested)
    theirs = with_peft(theirs, fields, **QUIET)
    theirs.save_pretrained(tmp_path)
    load_adapter(ours, tmp_path, trainable=True)
    one_step(theirs, ours, 1e-4)


# -- merging


@pytest.mark.parametrize("fields", STEPS.values(), ids=STEPS.keys())
def test_the_merged_model_is_the_one_peft_merges(fields, tmp_path):
    theirs, ours = models()
    theirs = with_peft(theirs, fields, **QUIET)
    theirs.save_pretrained(tmp_path / "adapter")
    load_adapter(ours, tmp_path / "adapter")
    wanted = {name: p.detach().numpy() for name, p in theirs.merge_and_unload().named_parameters()}
    found = dict(merged(ours))
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, atol=1e-6 * np.abs(array).max(), rtol=0, err_msg=name)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "fields", [dict(target_modules="all-linear"), dict(target_modules=["embed_tokens"], use_dora=True)]
)
def test_transformers_loads_the_merged_model(fields, tied, tmp_path):
    theirs, ours = models(tie_word_embeddings=tied)
    theirs = with_peft(theirs, fields, **QUIET)
    theirs.save_pretrained(tmp_path / "adapter")
    merge_adapter(ours, tmp_path / "adapter", tmp_path / "merged", held_out=IDS)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    wanted = logits(theirs)
    np.testing.assert_allclose(logits(plain), wanted, atol=1e-5 * np.abs(wanted).max(), rtol=0)


def test_the_gguf_package_reads_an_adapter(tmp_path):
    gguf = pytest.importorskip("gguf")
    _, ours = models()
    adapt(ours, LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "embed_tokens"], **QUIET))
    reader = gguf.GGUFReader(export_gguf_adapter(ours, tmp_path / "a.gguf"))
    keys = gguf.Keys
    assert reader.get_field(keys.General.TYPE).contents() == gguf.GGUFType.ADAPTER
    assert reader.get_field(keys.Adapter.TYPE).contents() == "lora"
    assert reader.get_field(keys.Adapter.LORA_ALPHA).contents() == 6
    assert reader.get_field(keys.General.ARCHITECTURE).contents() == "llama"
    found = {tensor.name: tensor.data.shape for tensor in reader.tensors}
    layers = {f"blk.{i}.attn_q.weight.lora_{x}": (4, 64) if x == "a" else (64, 4) for i in range(3) for x in "ab"}
    assert found == layers | {"token_embd.weight.lora_a": (97, 4), "token_embd.weight.lora_b": (64, 4)}
    bases = {name.rpartition(".weight.")[0] for name in found}
    known = {name.format(bid=i) for name in gguf.TENSOR_NAMES.values() for i in range(3)}
    assert bases <= known
