"""An adapter as PEFT's two files: the same bytes each time, and everything that is wrong with them said at once."""

from __future__ import annotations

import json

import numpy as np
import pytest
from test_adapters import every_kind, llama, trained

from entrenar.adapters import adapter_config, adapter_names, adapter_tensors, load_adapter, save_adapter
from entrenar.formats import FormatError, safetensors


@every_kind
def test_files_are_the_same_bytes_each_time(fields, tmp_path):
    model = trained(fields)
    save_adapter(model, tmp_path / "a", base="them/base")
    save_adapter(model, tmp_path / "b", base="them/base")
    again = llama()
    load_adapter(again, tmp_path / "a", "another")
    save_adapter(again, tmp_path / "c", "another", base="them/base")
    files = [{f.name: f.read_bytes() for f in (tmp_path / x).iterdir()} for x in "abc"]
    assert files[0] == files[1] == files[2] and set(files[0]) == {"adapter_config.json", "adapter_model.safetensors"}
    config = json.loads(files[0]["adapter_config.json"])
    assert config["base_model_name_or_path"] == "them/base" and config["task_type"] == "CAUSAL_LM"


def test_loading_may_go_on_training(tmp_path):
    save_adapter(trained(dict(r=2)), tmp_path / "a")
    model = llama()
    load_adapter(model, tmp_path / "a")
    assert not model.parameters()
    load_adapter(model, tmp_path / "a", "more", trainable=True)
    assert model.parameters() and adapter_config(model, "more") == adapter_config(model)


def test_everything_wrong_with_the_tensors_is_said_at_once(tmp_path):
    save_adapter(trained(dict(r=2, target_modules=["q_proj"])), tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    with safetensors.SafeTensors(file) as old:
        arrays = {name: np.array(old[name]) for name in old}
    names = list(arrays)
    del arrays[names[0]]
    arrays[names[1]] = arrays[names[1]][:, :1].copy()
    arrays["base_model.model.lm_head.lora_A.weight"] = np.ones((2, 24), np.float32)
    safetensors.save(file, arrays, {"format": "pt"})
    with pytest.raises(FormatError) as error:
        load_adapter(llama(), tmp_path / "a")
    for word in (
        f"missing {names[0]} ",
        f"{names[1]} has shape",
        "unexpected 'base_model.model.lm_head.lora_A.weight'",
    ):
        assert word in str(error.value)


def test_weights_that_are_not_finite_are_neither_read_nor_written(tmp_path):
    model = trained(dict(r=2, target_modules=["q_proj"]))
    save_adapter(model, tmp_path / "a")
    name, tensor = next(iter(adapter_tensors(model).items()))
    tensor.data[0, 0] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        save_adapter(model, tmp_path / "b")
    assert not (tmp_path / "b").exists()
    file = tmp_path / "a" / "adapter_model.safetensors"
    safetensors.save(file, {f"base_model.model.{n}": t.data for n, t in adapter_tensors(model).items()})
    with pytest.raises(FormatError, match=f"not finite.*\n.*{name}"):
        load_adapter(llama(), tmp_path / "a")


def test_another_base_s_embedding_is_refused(tmp_path):
    model = trained(dict(r=2, target_modules=["embed_tokens"]))
    save_adapter(model, tmp_path / "a")
    arrays = {f"base_model.model.{n}": t.data for n, t in adapter_tensors(model).items()}
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    own = model.model.embed_tokens.base_layer.weight.data
    for matrix, says in ((own, None), (own + 0.01, "differs from the base"), (own[:-1], "another base")):
        safetensors.save(tmp_path / "a" / "adapter_model.safetensors", arrays | {key: matrix})
        fresh = llama()
        if says is None:
            load_adapter(fresh, tmp_path / "a")
        else:
            with pytest.raises(FormatError, match=says):
                load_adapter(fresh, tmp_path / "a")


def test_a_folder_without_an_adapter_says_what_is_missing(tmp_path):
    with pytest.raises(FormatError, match="there is no such folder"):
        load_adapter(llama(), tmp_path / "nowhere")
    with pytest.raises(FormatError, match=r"has no adapter_config.json and no adapter_model.safetensors"):
        load_adapter(llama(), tmp_path)
    save_adapter(trained(dict(r=2)), tmp_path / "inner")
    with pytest.raises(FormatError, match="inside it are adapters 'inner': give that folder"):
        load_adapter(llama(), tmp_path)
    model = llama()
    load_adapter(model, tmp_path, "inner")
    assert adapter_names(model) == ["inner"]
    (tmp_path / "inner" / "adapter_model.safetensors").rename(tmp_path / "inner" / "adapter_model.bin")
    with pytest.raises(FormatError, match="a pickle, which can run any code"):
        load_adapter(llama(), tmp_path / "inner")
