"""Models with frozen weights in storage formats: loaded, saved, quantized from folder to folder, and the memory that
takes.
"""

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import runs
from conftest import SAME_PACKAGE
from test_pretrained import IDS, change_json, change_weights, refusal, small

from entrenar import Tensor, kernels, nn, random
from entrenar.convert.gguf import export_gguf
from entrenar.convert.llama2c import export_llama2c
from entrenar.formats import FormatError, safetensors
from entrenar.formats.gguf import GGUF
from entrenar.formats.safetensors import SafeTensors
from entrenar.kernels.packed import Nested, Packed
from entrenar.llama import Llama, LlamaConfig, generate
from entrenar.llama import pretrained as folders
from entrenar.llama.packed import LAYER, Floats
from entrenar.llama.quantizing import quantize_folder
from entrenar.quant import QuantizeError, quantize

KINDS = ("nf4", "fp4", "q8_0", "bfloat16")
HEADS = {"own head": {}, "tied": {"tie_word_embeddings": True}, "biases": {"attention_bias": True, "mlp_bias": True}}


def weights(model) -> dict:
    """Every weight by name: an array, or everything a Packed consists of."""

    def parts(w):
        scales = vars(w.scales) if isinstance(w.scales, Nested) else {"scales": w.scales}
        return {"kind": w.kind, "block": w.block, "codes": w.codes, **scales}

    return model.state_dict() | {name: parts(w) for name, w in model.named_packed()}


def assert_same(first, second):
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_equal(second[name], first[name], err_msg=name)


def decoded(model) -> Llama:
    """The same model in floats."""
    floats = Llama(model.config)
    floats.load_state_dict(model.state_dict() | {name: kernels.unpack(w) for name, w in model.named_packed()})
    return floats


@pytest.fixture
def saved(tmp_path):
    return small().save_pretrained(tmp_path / "model")


@pytest.fixture
def halves(tmp_path):
    return small().save_pretrained(tmp_path / "halves", dtype="bfloat16")


@pytest.fixture
def quantized(tmp_path, saved):
    return Llama.from_pretrained(saved, storage="nf4").save_pretrained(tmp_path / "quantized")


# Loading


@pytest.mark.parametrize("changes", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_packed_and_the_rest_is_frozen_floats(tmp_path, kind, changes):
    original = small(**changes)
    model = Llama.from_pretrained(original.save_pretrained(tmp_path / "model"), storage=kind)
    packed, state = dict(model.named_packed()), original.state_dict()
    assert packed.keys() == {name for name in state if LAYER.fullmatch(name)} and len(packed) == 14
    for name, w in packed.items():
        np.testing.assert_array_equal(kernels.unpack(w), kernels.unpack(quantize(state[name], kind)), err_msg=name)
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, state[name])
    assert model.parameters() == [] and model.model.norm.weight.data.flags.writeable


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_computes_what_its_decoded_weights_do(saved, kind):
    model = Llama.from_pretrained(saved, storage=kind)
    floats = decoded(model)
    np.testing.assert_allclose(model(IDS).data, floats(IDS).data, rtol=0, atol=1e-5)
    targets = np.roll(IDS, -1, axis=1)
    assert abs(model.loss(IDS, targets).data - floats.loss(IDS, targets).data) < 1e-5
    assert len(list(generate(model, [1, 2, 3], max_new_tokens=4))) == 4


@pytest.mark.parametrize("storage", ["stored", "bfloat16"])
def test_a_file_in_bfloat16_is_kept_without_loss(halves, storage):
    model = Llama.from_pretrained(halves, storage=storage)
    with SafeTensors(halves / "model.safetensors") as file:
        for name, w in model.named_packed():
            np.testing.assert_array_equal(w.codes, file[name].reshape(-1).view(np.uint16))
    assert len(list(model.named_packed())) == 16, "embedding and head are, too"
    assert_same(decoded(model), Llama.from_pretrained(halves))


@pytest.mark.parametrize("word", ["float32", "float16"])
def test_stored_is_float32_where_the_file_is_not_bfloat16(tmp_path, word):
    folder = small().save_pretrained(tmp_path / "model", dtype=word)
    model, floats = Llama.from_pretrained(folder, storage="stored"), Llama.from_pretrained(folder)
    assert not list(model.named_packed()) and model.parameters() == []
    assert_same(model, floats)


def test_embedding_and_head_stay_as_the_file_has_them(halves):
    model = Llama.from_pretrained(halves, storage="nf4")
    kinds = {name: w.kind for name, w in model.named_packed() if not LAYER.fullmatch(name)}
    assert kinds == {"model.embed_tokens.weight": "bfloat16", "lm_head.weight": "bfloat16"}


def test_floats_are_trainable_as_ever(saved):
    for storage in (None, "float32"):
        model = Llama.from_pretrained(saved, storage=storage)
        assert len(model.parameters()) == 21 and not list(model.named_packed())


def test_scales_are_plain_floats_where_double_quant_is_off(saved):
    model = Llama.from_pretrained(saved, storage="nf4", double_quant=False)
    assert all(not isinstance(w.scales, Nested) for _, w in model.named_packed())


def test_storing_draws_no_random_numbers(saved):
    before = random.get_state()
    Llama.from_pretrained(saved, storage="nf4")
    assert random.get_state() == before


def test_weights_that_cannot_be_stored_are_named_at_once(saved):
    change_weights(saved, model__layers__1__mlp__down_proj__weight=np.full((12, 20), np.nan, np.float32),
                   model__norm__weight=np.full(12, np.inf))  # fmt: skip
    for kind in KINDS:
        message = refusal(saved, storage=kind)
        assert f"model: cannot be kept as {kind}" in message
        assert f"model.layers.1.mlp.down_proj.weight: has values that are not finite; {kind} cannot" in message
        assert "model.norm.weight: has values that are not finite" in message


def test_a_storage_that_is_none_is_refused(saved):
    with pytest.raises(ValueError, match="storage = 'int8': wanted one of float32, stored, nf4, fp4, q8_0, bfloat16"):
        Llama.from_pretrained(saved, storage="int8")
    with pytest.raises(ValueError, match="stored as nf4 compute as float32, not .*float64"):
        Llama.from_pretrained(saved, storage="nf4", dtype=np.float64)


# bitsandbytes' folders


@pytest.mark.parametrize("changes", HEADS.values(), ids=HEADS.keys())
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("settings", [{}, {"double_quant": False}])
def test_what_is_saved_in_4_bits_is_loaded_bit_for_bit(tmp_path, kind, settings, changes):
    folder = small(**changes).save_pretrained(tmp_path / "model")
    model = Llama.from_pretrained(folder, storage=kind, **settings)
    out = model.save_pretrained(tmp_path / "quantized")
    for storage in (None, "stored", kind):
        assert_same(Llama.from_pretrained(out, storage=storage), model)
    again = Llama.from_pretrained(out).save_pretrained(tmp_path / "again")
    for file in out.iterdir():
        assert file.read_bytes() == (again / file.name).read_bytes()


def test_config_json_says_what_transformers_needs(quantized):
    values = json.loads((quantized / "config.json").read_text())
    settings = values["quantization_config"]
    assert settings["quant_method"] == "bitsandbytes" and settings["load_in_4bit"] is True
    assert settings["bnb_4bit_quant_type"] == "nf4" and settings["bnb_4bit_use_double_quant"] is True
    assert settings["bnb_4bit_compute_dtype"] == values["torch_dtype"] == "float32"
    assert settings["llm_int8_skip_modules"] is None
    with SafeTensors(quantized / "model.safetensors") as file:
        name = "model.layers.0.mlp.up_proj.weight"
        assert file.entries[name].shape == (20 * 12 // 2, 1) and file.entries[name].dtype == "U8"
        assert json.loads(file[f"{name}.quant_state.bitsandbytes__nf4"].tobytes())["shape"] == [20, 12]
        assert file.metadata == {"format": "pt"} and file.entries["lm_head.weight"].dtype == "F32"


def test_dtype_is_what_bitsandbytes_is_to_compute_in_and_the_rest_is_stored_as(tmp_path, saved):
    model = Llama.from_pretrained(saved, storage="nf4")
    out = model.save_pretrained(tmp_path / "quantized", dtype="bfloat16")
    assert json.loads((out / "config.json").read_text())["quantization_config"]["bnb_4bit_compute_dtype"] == "bfloat16"
    with SafeTensors(out / "model.safetensors") as file:
        words = {name: entry.dtype for name, entry in file.entries.items()}
    assert words["lm_head.weight"] == words["model.norm.weight"] == "BF16"
    name = "model.layers.0.mlp.up_proj.weight"
    assert (words[f"{name}.nested_absmax"], words[f"{name}.absmax"], words[name]) == ("F32", "U8", "U8")
    loaded = dict(Llama.from_pretrained(out).named_packed())
    for name, w in model.named_packed():
        np.testing.assert_array_equal(loaded[name].codes, w.codes)


def test_layers_that_were_left_out_are_named_and_kept_as_they_are(tmp_path, saved):
    model, name = Llama.from_pretrained(saved, storage="nf4"), "model.layers.1.self_attn.o_proj"
    model.model.layers[1].self_attn.o_proj.weight = Tensor(small().state_dict()[f"{name}.weight"])
    out = model.save_pretrained(tmp_path / "quantized")
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert settings["llm_int8_skip_modules"] == ["lm_head", name]
    assert_same(Llama.from_pretrained(out), model)


def test_a_folder_that_is_quantized_is_not_quantized_otherwise(quantized):
    for storage in ("fp4", "q8_0", "bfloat16", "float32"):
        message = refusal(quantized, storage=storage)
        assert f"stored as nf4 (quantization_config), asked for was storage = '{storage}'" in message


def test_wrong_parts_of_a_quantized_folder_are_named(quantized):
    name = "model.layers.0.mlp.up_proj.weight"
    change_weights(quantized, **{f"{name}.absmax": np.zeros(3, np.uint8)})
    assert f"{name}: as bitsandbytes stores it: absmax is uint8 (3,), wanted uint8 (4,)" in refusal(quantized)
    change_weights(quantized, **{f"{name}.absmax": None})
    assert f"{name}: as bitsandbytes stores it: absmax is missing" in refusal(quantized)
    change_weights(quantized, **{name: None})
    assert f"missing {name} (20, 12)" in refusal(quantized)


def test_only_matrices_can_be_quantized(quantized):
    change_weights(quantized, model__norm__weight=np.zeros((6, 1), np.uint8),
                   **{"model.norm.weight.absmax": np.zeros(1, np.float32)})  # fmt: skip
    assert "model.norm.weight (12,) is stored in 4 bits, which only a matrix can be" in refusal(quantized)


def test_quantized_weights_without_the_configuration_are_refused(quantized):
    change_json(quantized / "config.json", quantization_config=...)
    assert "bitsandbytes quantized 'model.layers.0.mlp.down_proj.weight' (there is its" in refusal(quantized)
    change_json(quantized / "config.json", quantization_config=None)
    assert "but the configuration has no quantization_config" in refusal(quantized)


@pytest.mark.parametrize("kinds, message", [
    (("nf4", "fp4"), "weights as nf4 and as fp4 in one model"),
    (("nf4", "q8_0"), "up_proj.weight is stored as q8_0, which Hugging Face's layout does not have"),
])  # fmt: skip
def test_a_model_that_the_layout_cannot_hold_leaves_nothing(tmp_path, saved, kinds, message):
    model, other = (Llama.from_pretrained(saved, storage=kind) for kind in kinds)
    model.model.layers[0].mlp.up_proj = other.model.layers[0].mlp.up_proj
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bfloat16_is_saved_as_plain_bfloat16(tmp_path, halves):
    model = Llama.from_pretrained(halves, storage="stored")
    out = model.save_pretrained(tmp_path / "out", dtype="bfloat16")
    assert (out / "model.safetensors").read_bytes() == (halves / "model.safetensors").read_bytes()
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


def test_the_parts_of_a_weight_stay_in_one_file(tmp_path, saved):
    model = Llama.from_pretrained(saved, storage="nf4")
    out = model.save_pretrained(tmp_path / "quantized", max_shard_size=3000)
    where = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(where.values())) > 5
    for name, _ in model.named_packed():
        assert len({file for part, file in where.items() if part.startswith(name)}) == 1
    assert_same(Llama.from_pretrained(out), model)


def test_training_does_not_start_from_frozen_weights(quantized, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("one two three\n" * 200)
    assert runs.train("run", **{"training__start_from": str(quantized), "data__tokenizer": "bytes"}) == 2
    assert "its weights are quantized (quantization_config in config.json)" in capsys.readouterr().err
    with pytest.raises(FormatError, match="there is nothing to train"):
        folders.read_config(quantized, trainable=True)


# From folder to folder


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("limit", [10**9, 3000])
def test_a_folder_is_quantized_like_the_model_in_it(tmp_path, kind, limit):
    source = small().save_pretrained(tmp_path / "source", dtype="bfloat16", max_shard_size=2000)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "README.md"):
        (source / name).write_text(name)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("tools")
    said, out = [], tmp_path / "out"
    quantize_folder(source, out, kind, max_shard_size=limit, progress=lambda *each: said.append(each))
    assert_same(Llama.from_pretrained(out), Llama.from_pretrained(source, storage=kind))
    names = {file.name for file in out.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"} <= names
    assert (out / "additional_chat_templates" / "tools.jinja").read_text() == "tools"
    assert "README.md" not in names and ("model.safetensors" in names) == (limit == 10**9)
    assert said[-1] == (small().config.parameter_count(),) * 2 and len(said) == 21
    values = json.loads((out / "config.json").read_text())
    assert values["quantization_config"]["bnb_4bit_compute_dtype"] == values["torch_dtype"] == "bfloat16"
    with SafeTensors(out / next(name for name in sorted(names) if name.endswith("safetensors"))) as file:
        states = [json.loads(file[name].tobytes()) for name in file if "quant_state" in name]
        assert {state["dtype"] for state in states} == {"bfloat16"}


def test_a_folder_that_cannot_be_quantized_leaves_nothing(tmp_path, saved, quantized):
    with pytest.raises(FormatError, match="quantized: is quantized already"):
        quantize_folder(quantized, tmp_path / "out")
    with pytest.raises(ValueError, match="kind = 'q8_0': wanted nf4 or fp4"):
        quantize_folder(saved, tmp_path / "out", "q8_0")
    with pytest.raises(FileExistsError, match="exists already and is not empty"):
        quantize_folder(saved, quantized)
    change_weights(saved, model__layers__1__mlp__down_proj__weight=np.full((12, 20), np.inf, np.float32))
    with pytest.raises(QuantizeError, match="layers.1.mlp.down_proj.weight: has values that are not finite"):
        quantize_folder(saved, tmp_path / "out")
    change_json(saved / "config.json", num_hidden_layers=10**12)
    with pytest.raises(FormatError, match="they do not belong together"):
        quantize_folder(saved, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "quantized"]


# Other formats


@pytest.mark.parametrize("storage", KINDS)
@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_an_exported_model_is_the_decoded_one(tmp_path, storage, kind):
    folder = small(rms_norm_eps=1e-5).save_pretrained(tmp_path / "model", dtype="bfloat16")
    model = Llama.from_pretrained(folder, storage=storage)
    tensors = []
    for each in (model, decoded(model)):
        with GGUF(export_gguf(each, None, tmp_path / "m.gguf", kind=kind, replace=True)) as file:
            tensors.append({name: file.raw(name).tobytes() for name in file.entries})
    assert tensors[0] == tensors[1] and len(tensors[0]) == 21
    files = [export_llama2c(each, tmp_path / f"{i}.bin").read_bytes() for i, each in enumerate((model, decoded(model)))]
    assert files[0] == files[1]


def test_weights_stored_as_q8_0_are_exported_as_they_are(tmp_path):
    """GGUF's bits are these already: rounding what they decode to gives them again."""
    config = LlamaConfig(vocab_size=19, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
                         num_attention_heads=2, max_position_embeddings=32)  # fmt: skip
    random.seed(2)
    folder = Llama(config).save_pretrained(tmp_path / "model")
    model = Llama.from_pretrained(folder, storage="q8_0")
    with GGUF(export_gguf(model, None, tmp_path / "m.gguf", kind="q8_0")) as file:
        raw = file.raw("blk.0.ffn_up.weight").reshape(-1, 34)
        w = model.model.layers[0].mlp.up_proj.weight
        np.testing.assert_array_equal(raw[:, 2:].reshape(-1).view(np.int8), w.codes)
        np.testing.assert_array_equal(raw[:, :2].copy().view("<f2")[:, 0].astype(np.float32), w.scales)


def test_floats_are_every_weight_decoded_when_asked_for(halves):
    model = Llama.from_pretrained(halves, storage="nf4")
    floats, state = Floats(model), decoded(model).state_dict()
    assert len(floats) == 21 and set(floats) == state.keys()
    for name in floats:
        assert floats.shape(name) == floats[name].shape
        np.testing.assert_array_equal(floats[name], state[name])


# Memory

WIDE = LlamaConfig(vocab_size=4000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=4,
                   num_attention_heads=16, max_position_embeddings=64)  # fmt: skip
ROOM = 20 * 2**20  # pieces of 4 MB, code that is imported on the way, files' headers


def wide_folder(path, config=WIDE):
    with nn.unfilled():
        model = Llama(config)
    for i, weight in enumerate(model.parameters()):  # one row, shown everywhere: a model without memory
        row = np.random.default_rng(i).standard_normal(weight.shape[-1]).astype(np.float32)
        weight.data = np.broadcast_to(row, weight.shape)
    return model.save_pretrained(path, dtype="bfloat16")


def peak_of(code: str) -> int:
    """Bytes by which `code`, in a process of its own, raises the most memory there was; the first print is ours."""
    before = """
import ml_dtypes
from entrenar import kernels
from entrenar.llama import Llama, pretrained, quantizing
from entrenar.training.machine import memory_peak
before = memory_peak()
"""
    command = [sys.executable, "-c", f"{before}\n{code}\nprint(memory_peak() - before)"]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=SAME_PACKAGE)
    return int(done.stdout)


@pytest.mark.parametrize("kind", KINDS)
def test_storing_takes_the_model_and_one_tensor(tmp_path, kind):
    folder = wide_folder(tmp_path / "model")
    model = Llama.from_pretrained(folder, storage=kind)
    size = sum(w.nbytes for _, w in model.named_packed()) + sum(x.nbytes for x in model.state_dict().values())
    largest = 2 * 4000 * 1024  # the embedding, as the file has it
    peak = peak_of(f"model = Llama.from_pretrained({str(folder)!r}, storage={kind!r})")
    assert size < peak + 2**20 and peak < size + largest + ROOM


def test_a_quantized_folder_is_read_in_the_memory_of_the_model(tmp_path):
    folder = quantize_folder(wide_folder(tmp_path / "model"), tmp_path / "quantized")
    model = Llama.from_pretrained(folder)
    size = sum(w.nbytes for _, w in model.named_packed()) + sum(x.nbytes for x in model.state_dict().values())
    assert peak_of(f"model = Llama.from_pretrained({str(folder)!r})") < size + 2 * 4000 * 1024 + ROOM


@pytest.mark.tier3
def test_a_model_of_hundreds_of_megabytes_is_quantized_in_the_memory_of_one_file(tmp_path):
    config = LlamaConfig(vocab_size=16000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=8,
                         num_attention_heads=32, max_position_embeddings=64)  # fmt: skip
    folder, limit = wide_folder(tmp_path / "model", config), 20 * 10**6
    assert (folder / "model.safetensors").stat().st_size > 900e6
    code = f"quantizing.quantize_folder({str(folder)!r}, {str(tmp_path / 'out')!r}, max_shard_size={limit})"
    largest = 2 * 16000 * 2048  # bytes of the embedding in the file
    assert peak_of(code) < limit + largest + ROOM
    assert sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")) > 300e6


# The containers below


def test_arrays_named_are_converted_and_the_others_stay(tmp_path):
    arrays = {"a": np.ones(3, np.float32), "b": np.ones(3, np.float32), "c": np.ones(3, np.uint8)}
    safetensors.save(tmp_path / "x", arrays, dtype={"a": "BF16"})
    with SafeTensors(tmp_path / "x") as file:
        assert {name: x.dtype for name, x in file.items()} == {"a": ml_dtypes.bfloat16, "b": "<f4", "c": "u1"}


def test_shards_without_a_weight_are_one_empty_file(tmp_path):
    folders.write_shards(tmp_path, [], 100)
    with SafeTensors(tmp_path / "model.safetensors") as file:
        assert not file.entries


def test_named_packed_is_what_the_state_has_not(saved):
    model = Llama.from_pretrained(saved, storage="nf4")
    names = dict(model.named_packed()).keys() | model.state_dict().keys()
    assert names == small().state_dict().keys() and all(isinstance(w, Packed) for _, w in model.named_packed())
