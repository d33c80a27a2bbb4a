"""Merging: the plain model is base + adapter; what rounding would erase is refused; GGUF adapters."""

from __future__ import annotations

import json

import numpy as np
import pytest
from test_adapters import IDS, every_kind, in_bfloat16, in_nf4, llama, trained

from entrenar.adapters import (
    Erased,
    LoraConfig,
    active_adapter,
    adapt,
    adapter_names,
    adapter_tensors,
    merge_adapter,
    merged,
    merged_config,
    save_adapter,
    use_adapter,
)
from entrenar.adapters.merge import compare
from entrenar.adapters.model import adapted
from entrenar.convert import ConvertError, deinterleave
from entrenar.convert.gguf import export_gguf
from entrenar.convert.gguf_adapter import export_gguf_adapter
from entrenar.convert.llama2c import export_llama2c
from entrenar.formats.gguf import GGUF
from entrenar.kernels import unpack
from entrenar.kernels.packed import Packed
from entrenar.llama import Llama
from entrenar.llama.quantizing import quantize_folder
from entrenar.quant import quantize

EPS = np.finfo(np.float32).eps


def plain(model, name="default"):
    """The merged model, in memory."""
    made = Llama(merged_config(model, name))
    made.load_state_dict({key: unpack(x) if isinstance(x, Packed) else x for key, x in merged(model, name)})
    return made


BASES = {"float": lambda m: m, "bfloat16": in_bfloat16, "nf4": in_nf4}


@pytest.mark.parametrize("base", BASES.values(), ids=BASES.keys())
@every_kind
def test_the_merged_model_is_base_and_adapter(fields, base):
    model = trained(fields, base(llama()))
    model.eval()
    wanted = model(IDS).data
    found = plain(model)(IDS).data
    # two ways to sum the same products, through two layers
    np.testing.assert_allclose(found, wanted, atol=256 * EPS * np.abs(wanted).max(), rtol=0)
    use_adapter(model, None)
    assert np.abs(model(IDS).data - wanted).max() > 0.01, "the control: the adapter changes something"


@every_kind
def test_a_merged_model_is_written_read_and_proven(fields, tmp_path):
    model = trained(fields)
    told = []
    proof = merge_adapter(model, "default", tmp_path / "out", held_out=IDS, report=told.append)
    assert proof.tokens == IDS.size and proof.max_logit_difference < 1e-4 and proof.kl < 1e-8 and proof.kept > 0.999
    assert told[-1] == str(proof) and "18 held-out tokens" in told[-1]
    assert active_adapter(model) == "default" and adapter_names(model) == ["default"]
    read = Llama.from_pretrained(tmp_path / "out")
    assert compare(model, read, [IDS[0]])[0] < 1e-4
    assert not any("lora" in name or "base_layer" in name for name in read.state_dict())


def test_the_proof_notices_another_model(tmp_path):
    model = trained(dict(r=2))
    difference, kl, tokens = compare(model, llama(), [IDS[0], IDS[1]])
    assert difference > 0.01 and kl > 1e-5 and tokens == IDS.size


def test_folders_of_base_and_adapter_are_merged(tmp_path):
    llama().save_pretrained(tmp_path / "base", dtype="bfloat16")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    base = Llama.from_pretrained(tmp_path / "base")
    save_adapter(trained(dict(r=4, target_modules="all-linear"), base), tmp_path / "adapter")
    proof = merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", held_out=IDS.ravel())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16" and (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert 0.9 < proof.kept < 1.1 and proof.kl < 1e-2
    with pytest.raises(FileExistsError):
        merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", held_out=IDS)
    model = llama()
    merge_adapter(model, tmp_path / "adapter", tmp_path / "other", held_out=IDS)
    assert adapter_names(model) == [] and list(model.state_dict()) == list(llama().state_dict())


def test_a_base_in_4_bits_is_merged_into_bfloat16(tmp_path):
    llama().save_pretrained(tmp_path / "base", dtype="bfloat16")
    quantize_folder(tmp_path / "base", tmp_path / "nf4")
    base = Llama.from_pretrained(tmp_path / "nf4")
    adapter = trained(dict(r=4, target_modules=["q_proj", "up_proj"], use_dora=True), base)
    save_adapter(adapter, tmp_path / "adapter")
    proof = merge_adapter(tmp_path / "nf4", tmp_path / "adapter", tmp_path / "out", held_out=IDS)
    assert proof.kl < 1e-3 and 0.95 < proof.kept < 1.05
    assert {w.kind for _, w in Llama.from_pretrained(tmp_path / "out", storage="stored").named_packed()} == {"bfloat16"}
    exact = merge_adapter(tmp_path / "nf4", tmp_path / "adapter", tmp_path / "f32", held_out=IDS, dtype="float32")
    assert exact.max_logit_difference < 1e-4 < proof.max_logit_difference


def test_values_that_are_not_finite_are_not_written(tmp_path):
    model = trained(dict(r=2))
    next(iter(adapter_tensors(model).values())).data[0, 0] = np.inf
    with pytest.raises(ValueError, match="make values that are not finite; nothing is written"):
        merge_adapter(model, "default", tmp_path / "out", held_out=IDS)
    assert list(tmp_path.iterdir()) == []


def test_an_adapted_embedding_is_untied_from_the_head(tmp_path):
    model = trained(dict(r=3, target_modules=["embed_tokens", "q_proj"]), llama(tie_word_embeddings=True))
    proof = merge_adapter(model, "default", tmp_path / "out", held_out=IDS)
    assert proof.max_logit_difference < 1e-4
    read = Llama.from_pretrained(tmp_path / "out")
    assert not read.config.tie_word_embeddings
    assert np.array_equal(read.lm_head.weight.data, model.head_weight.data)
    other = trained(dict(r=3), llama(tie_word_embeddings=True))
    assert merged_config(other).tie_word_embeddings


@pytest.mark.parametrize(
    "write",
    [lambda m, p: m.save_pretrained(p), lambda m, p: export_gguf(m, None, p), export_llama2c],
    ids=["save_pretrained", "export_gguf", "export_llama2c"],
)
def test_a_model_with_adapters_is_no_plain_model(write, tmp_path):
    model = trained(dict(r=2))
    with pytest.raises(ValueError, match=r"has adapters beside its layers; save_adapter\(\).*merge_adapter\(\)"):
        write(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- rounding


def small_update(model, size):
    """An adapter whose update is `size` times as large as the weights."""
    adapt(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    for _, layer in adapted(model):
        a, b = layer.factors("default")
        w = layer.base_layer.weight
        w = unpack(w) if isinstance(w, Packed) else w.data
        b.data *= size * np.linalg.norm(w) / np.linalg.norm(2 * b.data @ a.data)
    return model


def test_an_update_that_bfloat16_would_erase_is_refused(tmp_path):
    model = small_update(in_bfloat16(llama()), 1e-4)
    with pytest.raises(
        Erased, match=r"(?s)stored as bfloat16, \d % of the update.*dtype='float32'.*proj.weight: -?\d % "
    ):
        merge_adapter(model, "default", tmp_path / "out", held_out=IDS)
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"
    assert merge_adapter(model, "default", tmp_path / "out", held_out=IDS, force=True).kept < 0.5
    assert merge_adapter(model, "default", tmp_path / "exact", held_out=IDS, dtype="float32").kept > 0.99
    model = small_update(in_bfloat16(llama()), 0.05)
    assert 0.9 < merge_adapter(model, "default", tmp_path / "large", held_out=IDS).kept < 1.1


def test_an_update_that_4_bits_would_erase_is_refused(tmp_path):
    model = llama()
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            module.weight = quantize(module.weight.data, "nf4")
    small_update(model, 0.02)
    with pytest.raises(Erased, match=r"stored as nf4, -?\d+ % of the update"):
        merge_adapter(model, "default", tmp_path / "out", held_out=IDS, storage="nf4")
    assert not (tmp_path / "out").exists()
    proof = merge_adapter(model, "default", tmp_path / "bfloat16", held_out=IDS)
    assert (
        proof.kept > 0.9
        and json.loads((tmp_path / "bfloat16" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    )


def test_a_large_update_may_be_stored_in_4_bits(tmp_path):
    model = small_update(llama(), 1.0)
    proof = merge_adapter(model, "default", tmp_path / "out", held_out=IDS, storage="nf4")
    assert 0.8 < proof.kept < 1.2
    read = Llama.from_pretrained(tmp_path / "out")
    kinds = {w.kind for _, w in read.named_packed()}
    assert kinds == {"nf4"} and len(list(read.named_packed())) == 14


@pytest.mark.parametrize(
    "bad, says",
    [
        (dict(dtype="int8"), "dtype = 'int8'"),
        (dict(storage="q8_0"), "storage = 'q8_0'"),
        (dict(held_out=np.zeros(0, int)), "held_out"),
        (dict(held_out=[0.5]), "held_out"),
    ],
)
def test_settings_out_of_range_are_refused(bad, says, tmp_path):
    model = trained(dict(r=2))
    with pytest.raises(ValueError, match=says):
        merge_adapter(model, "default", tmp_path / "out", **(dict(held_out=IDS) | bad))


# -- GGUF


GGUF_KINDS = {
    "plain": dict(r=4, lora_alpha=12, target_modules="all-linear"),
    "rslora": dict(r=4, lora_alpha=3, use_rslora=True, target_modules=["q_proj", "k_proj"]),
    "patterns": dict(
        r=4, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 5}
    ),
    "rslora, patterns": dict(r=4, use_rslora=True, target_modules=["k_proj", "up_proj"], rank_pattern={"k_proj": 9}),
    "embeddings": dict(r=4, target_modules=["embed_tokens", "lm_head"]),
}


def of_gguf(name, config):
    """(our name of a module, heads of it that are turned)"""
    from entrenar.convert.gguf import NAMES

    back = {value: key for key, value in NAMES.items()}
    if not name.startswith("blk."):
        return back[name], None
    _, layer, inside = name.split(".", 2)
    H, KH, _ = config.heads
    return f"model.layers.{layer}.{back[inside]}", {"attn_q": H, "attn_k": KH}.get(inside)


@pytest.mark.parametrize("kind", ["f32", "f16"])
@pytest.mark.parametrize("fields", GGUF_KINDS.values(), ids=GGUF_KINDS.keys())
def test_a_gguf_adapter_says_the_same_update(fields, kind, tmp_path):
    """As llama.cpp computes: alpha / rank of lora_a and lora_b, rows of q and k in its order, rows of token_embd."""
    model = trained(fields)
    path = export_gguf_adapter(model, tmp_path / "adapter.gguf", kind=kind)
    base = dict(merged(llama_with_empty_adapter()))
    wanted = dict(merged(model))
    far = 1e-5 if kind == "f32" else 5e-3
    with GGUF(path) as file:
        assert file.metadata["general.type"] == "adapter" and file.metadata["adapter.type"] == "lora"
        alpha, seen = file.metadata["adapter.lora.alpha"], set()
        for name in {entry.rpartition(".")[0] for entry in file.entries}:
            a, b = (file[f"{name}.{part}"].astype(np.float32) for part in ("lora_a", "lora_b"))
            module, heads = of_gguf(name.removesuffix(".weight"), model.config)
            b = deinterleave(b, heads) if heads else b
            update = a @ b.T if name.startswith("token_embd") else b @ a
            found = base[f"{module}.weight"] + alpha / b.shape[1] * update
            np.testing.assert_allclose(found, wanted[f"{module}.weight"], atol=far * np.abs(found).max(), rtol=0)
            seen.add(module)
    assert seen == {key.rpartition(".lora_")[0] for key in adapter_tensors(model)}


def llama_with_empty_adapter():
    model = llama()
    adapt(model, LoraConfig())
    return model


@pytest.mark.parametrize(
    "fields, says",
    [
        (dict(use_dora=True), "DoRA"),
        (dict(modules_to_save=["lm_head"]), "lm_head is trained"),
        (dict(use_dora=True, modules_to_save=["norm"]), "DoRA.*are trained as a whole"),
    ],
)
def test_what_a_gguf_adapter_cannot_hold_is_refused_with_the_way_out(fields, says, tmp_path):
    with pytest.raises(ConvertError, match=f"{says}.*merge it into the base"):
        export_gguf_adapter(trained(fields), tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()
    with pytest.raises(ConvertError, match="kind = 'q8_0'"):
        export_gguf_adapter(trained(dict(r=2)), tmp_path / "a.gguf", kind="q8_0")
