"""Folders in Hugging Face's layout, written and read: round trips, everything refused by name, and memory."""

import dataclasses
import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from conftest import SAME_PACKAGE

from entrenar import nn, random
from entrenar.formats import FormatError, safetensors
from entrenar.formats.safetensors import SafeTensors
from entrenar.llama import Llama, LlamaConfig
from entrenar.llama.pretrained import read_config

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
SMALL = LlamaConfig(
    vocab_size=19, hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=32, initializer_range=0.3,
)  # fmt: skip
SHAPES = {
    "grouped heads": {},
    "tied": {"tie_word_embeddings": True},
    "own head_dim": {"num_key_value_heads": 2, "head_dim": 4},
    "biases, llama3 rope, three ends": {"attention_bias": True, "mlp_bias": True, "rope_scaling": LLAMA3,
                                        "eos_token_id": [2, 5, 7]},
}  # fmt: skip
IDS = np.random.default_rng(0).integers(0, 19, (2, 9))


def small(dtype=np.float32, **changes):
    random.seed(1)
    model = Llama(dataclasses.replace(SMALL, **{"head_dim": None} | changes), dtype=dtype)
    for tensor in model.parameters():  # norms and biases too: nothing may hide behind ones and zeros
        tensor.data += 0.05 * np.arange(tensor.size, dtype=dtype).reshape(tensor.shape) / tensor.size
    return model


@pytest.fixture
def saved(tmp_path):
    """A folder with a small model, to be damaged."""
    return small().save_pretrained(tmp_path / "model")


def change_json(path, **changes):
    """Set keys of a JSON file; `...` takes one out."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def change_weights(folder, **changes):
    """Set tensors of model.safetensors, "." spelled "__"; None takes one out."""
    with SafeTensors(folder / "model.safetensors") as file:
        arrays = {name: array.copy() for name, array in file.items()}
    arrays |= {name.replace("__", "."): array for name, array in changes.items()}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    safetensors.save(folder / "model.safetensors", arrays, {"format": "pt"})


def refusal(folder, **settings):
    with pytest.raises(FormatError) as error:
        Llama.from_pretrained(folder, **settings)
    return str(error.value)


# Round trips


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
def test_what_is_saved_is_loaded_bit_for_bit(tmp_path, changes):
    model = small(**changes)
    folder = model.save_pretrained(tmp_path / "model")
    loaded = Llama.from_pretrained(folder)
    assert loaded.config == model.config == read_config(folder)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(loaded.state_dict()[name], array, err_msg=name)
    np.testing.assert_array_equal(loaded(IDS).data, model(IDS).data)


@pytest.mark.parametrize("word", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_weights_are_rounded_once_to_what_they_are_stored_as(tmp_path, word, dtype):
    model, kind = small(dtype), {"bfloat16": ml_dtypes.bfloat16}.get(word, word)
    folder = model.save_pretrained(tmp_path / "model", dtype=word)
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == word
    loaded = Llama.from_pretrained(folder, dtype=dtype)
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(loaded.state_dict()[name], array.astype(kind).astype(dtype), err_msg=name)
        assert loaded.state_dict()[name].dtype == dtype


@pytest.mark.parametrize("word, size", [("float32", 4), ("bfloat16", 2)])
def test_a_large_model_is_written_as_several_files_and_an_index(tmp_path, word, size):
    model = small()
    folder = model.save_pretrained(tmp_path / "model", dtype=word, max_shard_size=300 * size)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors" and len(files) > 5
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == model.config.parameter_count() * size
    for name in files:
        with SafeTensors(folder / name) as file:
            assert sum(entry.nbytes for entry in file.entries.values()) <= 300 * size or len(file) == 1
            assert file.metadata == {"format": "pt"}
    np.testing.assert_allclose(Llama.from_pretrained(folder)(IDS).data, model(IDS).data, rtol=0, atol=0.1 * (size == 2))


def test_the_files_beside_the_weights_are_those_of_hugging_face(tmp_path):
    class Tokenizer:
        def save(self, folder):
            (folder / "tokenizer.json").write_text("{}")

    folder = small(eos_token_id=[2, 5], bos_token_id=None).save_pretrained(tmp_path / "model", tokenizer=Tokenizer())
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]  # fmt: skip
    assert json.loads((folder / "generation_config.json").read_text()) == {"eos_token_id": [2, 5]}
    values = json.loads((folder / "config.json").read_text())
    assert values["model_type"] == "llama" and values["architectures"] == ["LlamaForCausalLM"]
    assert values["rope_theta"] == 10000.0 and values["num_key_value_heads"] == 1 and values["head_dim"] == 6


def test_a_loaded_model_trains_like_the_one_that_was_saved(tmp_path):
    model = small(tie_word_embeddings=True)
    loaded = Llama.from_pretrained(model.save_pretrained(tmp_path / "model"), checkpointing=True)
    assert loaded.checkpointing
    for each in (model, loaded):
        each.loss(IDS[:, :-1], IDS[:, 1:]).backward()
    for (name, ours), (_, theirs) in zip(model.named_parameters(), loaded.named_parameters(), strict=True):
        np.testing.assert_array_equal(ours.grad, theirs.grad, err_msg=name)
        assert theirs.data.flags.writeable and theirs.data.flags.aligned


def test_loading_draws_no_random_numbers(saved):
    before = random.get_state()
    Llama.from_pretrained(saved)
    assert random.get_state() == before


def test_a_folder_with_something_in_it_is_left_alone(tmp_path, saved):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(FileExistsError, match="exists already and is not empty"):
        small().save_pretrained(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    (tmp_path / "empty").mkdir()
    assert Llama.from_pretrained(small().save_pretrained(tmp_path / "empty")).config == read_config(saved)


def test_a_model_that_cannot_be_saved_leaves_nothing(tmp_path):
    model = small()
    model.model.norm.weight.data[3] = 1e6
    with pytest.raises(ValueError, match="model.norm.weight has 1e\\+06, too big for float16"):
        model.save_pretrained(tmp_path / "model", dtype="float16")
    with pytest.raises(ValueError, match="dtype = 'int8': wanted one of float32, bfloat16, float16"):
        model.save_pretrained(tmp_path / "model", dtype="int8")
    with pytest.raises(ValueError, match="max_shard_size = 0: wanted at least 1"):
        model.save_pretrained(tmp_path / "model", max_shard_size=0)
    assert list(tmp_path.iterdir()) == []


# What is tolerated


def test_old_files_frequencies_are_ignored(saved):
    change_weights(saved, model__layers__0__self_attn__rotary_emb__inv_freq=np.ones(3, np.float32))
    Llama.from_pretrained(saved)


def test_a_tied_head_may_be_there_when_it_is_the_embedding(tmp_path):
    folder = small(tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    with SafeTensors(folder / "model.safetensors") as file:
        embedding = file["model.embed_tokens.weight"].copy()
    change_weights(folder, lm_head__weight=embedding)
    Llama.from_pretrained(folder)
    embedding[3, 4] += 1
    change_weights(folder, lm_head__weight=embedding)
    assert "lm_head.weight is not model.embed_tokens.weight, though config.json ties them" in refusal(folder)


# What is refused

HUGE = {"num_hidden_layers": 10**12, "vocab_size": 10**15, "head_dim": 10**14, "hidden_size": 2**70}


def test_missing_unexpected_and_misshapen_tensors_are_named_at_once(saved):
    change_weights(saved, model__norm__weight=None, lm_head__weight=np.ones((19, 11), np.float32),
                   model__layers__2__bias=np.ones(3), model__embed_tokens__weight=np.ones((19, 12), np.int8))
    message = refusal(saved)
    assert "model: the files do not hold the 21 tensors config.json describes" in message
    for part in ("missing model.norm.weight (12,)", "lm_head.weight has shape (19, 11), wanted (19, 12)",
                 "unexpected model.layers.2.bias (3,)", "model.embed_tokens.weight has type I8, wanted one of F64"):
        assert part in message


def test_a_long_list_of_problems_is_cut(saved):
    change_weights(saved, **{f"x{i}": np.ones(1) for i in range(1000)})
    assert refusal(saved).endswith("... and 980 more")


def test_weights_that_are_not_finite_are_refused_unless_asked_for(saved):
    bad = np.ones((12, 20), np.float32)
    bad[3, 4], bad[5, :] = np.nan, -np.inf
    change_weights(saved, model__layers__1__mlp__down_proj__weight=bad, model__norm__weight=np.full(12, 1e300))
    message = refusal(saved)
    assert "not finite as float32 (allow_nonfinite=True reads them)" in message
    assert "model.layers.1.mlp.down_proj.weight in 21 of its 240 values" in message
    assert "model.norm.weight in 12 of its 12 values" in message
    loaded = Llama.from_pretrained(saved, allow_nonfinite=True)
    np.testing.assert_array_equal(loaded.model.layers[1].mlp.down_proj.weight.data, bad)


def test_a_configuration_far_from_the_files_is_refused_before_anything_is_made(saved):
    before = (saved / "config.json").read_text()
    for name, value in HUGE.items():
        change_json(saved / "config.json", **{name: value})
        assert "they do not belong together" in refusal(saved)
        (saved / "config.json").write_text(before)


def test_folders_without_a_model_are_refused_with_the_way_out(tmp_path, saved, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refusal("meta-llama/Llama-3.2-1B")
    assert message.startswith("meta-llama/Llama-3.2-1B: there is no such folder, and entrenar downloads nothing")
    assert "hf download meta-llama/Llama-3.2-1B --local-dir Llama-3.2-1B" in message
    assert refusal(tmp_path / "none").endswith("none: there is no such folder")
    assert "is a file; give the folder" in refusal(saved / "model.safetensors")
    (tmp_path / "empty").mkdir()
    assert "empty: has no config.json" in refusal(tmp_path / "empty")
    (saved / "model.safetensors").unlink()
    assert "model: has neither model.safetensors nor model.safetensors.index.json" in refusal(saved)
    (saved / "pytorch_model.bin").write_bytes(b"\x80\x02c")
    assert "has pytorch_model.bin, a pickle, which can run any code and is never opened" in refusal(saved)


@pytest.fixture
def sharded(tmp_path):
    return small().save_pretrained(tmp_path / "sharded", max_shard_size=4000)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "", "..", 3, None,
                                  "model.bin", "a\\b.safetensors", "a\0.safetensors", ["x"]])  # fmt: skip
def test_an_index_leads_nowhere_but_beside_itself(sharded, file):
    index = sharded / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    change_json(index, weight_map=where | {"model.norm.weight": file})
    assert "model.safetensors.index.json: weight_map puts 'model.norm.weight' in" in refusal(sharded)


def test_an_index_must_say_what_the_files_hold(sharded):
    index = sharded / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    first, other = where["model.embed_tokens.weight"], where["lm_head.weight"]
    change_json(index, weight_map=where | {"model.embed_tokens.weight": other})
    message = refusal(sharded)
    assert f"model.embed_tokens.weight is not in {other}" in message
    assert f"{first} has model.embed_tokens.weight, which the index puts in {other}" in message
    change_json(index, weight_map={name: file for name, file in where.items() if name != "model.norm.weight"})
    assert "has model.norm.weight, which the index puts in no file" in refusal(sharded)
    change_json(index, weight_map=where | {"model.norm.weight": "gone.safetensors", "x": "lost.safetensors"})
    assert "gone.safetensors is missing\n  lost.safetensors is missing" in refusal(sharded)
    for wrong in ({}, [], "x", ...):
        change_json(index, weight_map=wrong)
        assert "wanted file names by tensor name" in refusal(sharded)


def test_a_broken_file_is_named(saved):
    weights = saved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert f"{weights}: tensor " in refusal(saved)
    (saved / "config.json").write_text('{"vocab_size": 1,\n')
    assert f"{saved / 'config.json'} line 2 column 1: is not JSON" in refusal(saved)
    (saved / "config.json").write_text("[]")
    assert "config.json: holds an array, wanted an object" in refusal(saved)


# config.json

BASE = {"model_type": "llama", "vocab_size": 19, "hidden_size": 12, "num_attention_heads": 2}


def test_rope_is_read_from_where_either_version_of_transformers_puts_it():
    plain = {key: value for key, value in LLAMA3.items() if key != "rope_type"}
    for values in (
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_theta": 5e5, "rope_scaling": plain | {"type": "llama3"}},
        {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
        {"rope_parameters": LLAMA3, "rope_theta": 5e5},
        {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}, "rope_scaling": None, "rope_theta": 1e4},
    ):
        config = LlamaConfig.from_dict(BASE | values)
        assert config.rope_theta == 5e5
        assert {key: config.rope_scaling[key] for key in plain} == plain
    for values in ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"rope_theta": 5e5},
                   {"rope_theta": 5e5, "rope_scaling": {"type": "default"}}, {"rope_theta": 5e5, "rope_scaling": {}}):
        config = LlamaConfig.from_dict(BASE | values)  # fmt: skip
        assert config.rope_theta == 5e5 and config.rope_scaling is None
    assert LlamaConfig.from_dict(BASE).rope_theta == 10000.0


def test_the_original_context_of_llama3_is_the_model_s_own_where_it_is_not_said():
    short = {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}
    config = LlamaConfig.from_dict(BASE | {"rope_scaling": short, "max_position_embeddings": 99})
    assert config.rope_scaling["original_max_position_embeddings"] == 99


def test_what_is_not_said_is_as_in_transformers():
    config = LlamaConfig.from_dict(BASE | {"num_key_value_heads": None, "head_dim": None})
    assert config == LlamaConfig(vocab_size=19, hidden_size=12, num_attention_heads=2)
    assert (config.num_key_value_heads, config.head_dim, config.tie_word_embeddings) == (2, 6, False)


def test_keys_that_change_nothing_are_left_out():
    harmless = {"use_cache": True, "transformers_version": "5.23.0", "dtype": "bfloat16", "attention_dropout": 0.1,
                "pad_token_id": None, "pretraining_tp": 1, "sliding_window": None, "quantization_config": None,
                "architectures": ["LlamaForCausalLM"], "_name_or_path": "x", "layer_types": ["full_attention"]}
    assert LlamaConfig.from_dict(BASE | harmless) == LlamaConfig.from_dict(BASE)


COMMON = {"architectures": ["LlamaForCausalLM"], "attention_bias": False, "hidden_act": "silu", "model_type": "llama",
          "initializer_range": 0.02, "rms_norm_eps": 1e-05, "torch_dtype": "bfloat16", "use_cache": True}  # fmt: skip
PUBLISHED = {
    "LLaMA 2 7B": (6_738_415_616, {
        "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 4096, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1, "rope_scaling": None,
        "tie_word_embeddings": False, "vocab_size": 32000, "eos_token_id": 2, "bos_token_id": 1}),
    "Llama 3.2 1B Instruct": (1_235_814_400, {
        "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 64,
        "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
        "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 500000.0, "tie_word_embeddings": True, "vocab_size": 128256}),
    "SmolLM2 135M": (134_515_008, {
        "bos_token_id": 0, "eos_token_id": 0, "hidden_size": 576, "intermediate_size": 1536, "is_llama_config": True,
        "max_position_embeddings": 8192, "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
        "pretraining_tp": 1, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000,
        "tie_word_embeddings": True, "vocab_size": 49152}),
}  # fmt: skip


@pytest.mark.parametrize("size, values", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_published_configurations_are_read(size, values):
    assert LlamaConfig.from_dict(COMMON | values).parameter_count() == size


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "mistral"}, "model_type = 'mistral': wanted 'llama'"),
        ({"model_type": None}, "model_type = None: wanted 'llama'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "wanted ['LlamaForCausalLM']"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu': wanted 'silu'"),
        ({"pretraining_tp": 2}, "pretraining_tp = 2: wanted 1"),
        ({"sliding_window": 4096}, "sliding_window = 4096: wanted null"),
        ({"layer_types": ["sliding_attention"]}, "layer_types = ['sliding_attention']: wanted 'full_attention'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised weights are not read"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5: wanted 1"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "partial_rotary_factor = 0.25"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type = 'linear': wanted 'llama3'"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type = 'dynamic'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type = 'yarn'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type = 'longrope'"),
        ({"rope_scaling": 7}, "rope_scaling = 7: wanted a table"),
        ({"rope_parameters": {"full_attention": {"rope_type": "llama3"}}}, "'full_attention' = {'rope_type': 'll"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling: 'factor' = 2.0: means nothing"),
        ({"rope_theta": None}, "rope_theta = None: wanted a finite number"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings = 'no': wanted true or false"),
        ({"eos_token_id": "2"}, "eos_token_id = '2': wanted a whole number"),
        ({"eos_token_id": [2, -1]}, "eos_token_id = [2, -1]: wanted a whole number"),
        ({"bos_token_id": [1]}, "bos_token_id = [1]: wanted a whole number"),
        ({"hidden_size": "12" * 1000}, "hidden_size = '1212"),
    ],
)
def test_another_model_is_refused_by_name(changes, message):
    with pytest.raises(FormatError) as error:
        LlamaConfig.from_dict(BASE | changes, where="config.json")
    assert str(error.value).startswith("config.json: ") and message in str(error.value)
    assert len(str(error.value)) < 1000


def test_everything_that_makes_it_another_model_is_named_at_once():
    with pytest.raises(FormatError, match="config.json: model_type.*sliding_window.*vocab_size = 0.*hidden_act"):
        LlamaConfig.from_dict({"model_type": "x", "sliding_window": 9, "vocab_size": 0, "hidden_act": "relu"},
                              where="config.json")  # fmt: skip


def test_a_configuration_that_is_no_object_is_refused():
    with pytest.raises(FormatError, match=r"config.json: holds \[1, 2\], wanted an object"):
        LlamaConfig.from_dict([1, 2], where="config.json")


def test_the_tokens_that_end_a_text_are_always_a_tuple():
    for ids, wanted in ((None, ()), (7, (7,)), ([7, 8], (7, 8)), ([], ())):
        assert dataclasses.replace(SMALL, eos_token_id=ids).stop_ids == wanted


# Parameters without values, and memory


def test_unfilled_parameters_have_shape_and_type_and_no_memory():
    huge = LlamaConfig()
    with nn.unfilled():
        model = Llama(huge)
        with nn.unfilled():
            pass
        assert nn.normal(2, std=1).data.strides == (0,)
    assert sum(p.size for p in model.parameters()) == huge.parameter_count() == 6_738_415_616
    assert all(p.requires_grad and p.dtype == np.float32 and not p.data.flags.writeable for p in model.parameters())
    assert nn.normal(2, std=1).data.flags.writeable


@pytest.mark.parametrize("word", ["float32", "bfloat16"])
def test_loading_never_holds_the_model_twice(tmp_path, word):
    config = LlamaConfig(vocab_size=4000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=2,
                         num_attention_heads=16)  # fmt: skip
    with nn.unfilled():
        model = Llama(config)
    folder = model.save_pretrained(tmp_path / "model", dtype=word)
    code = f"""
import ml_dtypes
from entrenar.llama import Llama, pretrained
from entrenar.training.machine import memory_peak
before = memory_peak()
model = Llama.from_pretrained({str(folder)!r})
print(memory_peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=SAME_PACKAGE)
    size, largest = 4 * config.parameter_count(), 4 * 4000 * 1024
    assert size < int(done.stdout) < size + largest + 5 * 2**20
