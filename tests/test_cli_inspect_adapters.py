"""`entrenar inspect` of what fine-tuning leaves: adapters, their checkpoints, weights in 4 bits."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import tuned

from entrenar import kernels
from entrenar.cli import main
from entrenar.formats import safetensors
from entrenar.llama import Llama


def inspected(capsys, *words):
    """(exit code, text) of an inspection."""
    code = main(["inspect", *map(str, words)])
    said = capsys.readouterr()
    assert said.err == "", said.err
    return code, said.out


def as_json(capsys, *words):
    code, text = inspected(capsys, *words, "--json")
    return code, json.loads(text)


def refused(capsys, *words):
    code = main(["inspect", *map(str, words)])
    said = capsys.readouterr()
    assert code == 2 and said.out == "" and said.err.count("\n") == 1
    return said.err


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """base, run and one: adapters for it; small: it in 4 bits"""
    from entrenar.llama.quantizing import quantize_folder

    place = tmp_path_factory.mktemp("adapters")
    tuned.base(place / "base")
    tuned.run(place / "run", place / "base", storage="nf4")
    tuned.adapter(place / "one", place / "base", rank_pattern={"q_proj": 2}, modules_to_save=["lm_head"])
    quantize_folder(place / "base", place / "small", "nf4")
    return place


def test_an_adapter_has_its_settings_its_base_and_its_tensors_layers_together(capsys, adapters):
    code, text = inspected(capsys, adapters / "one")
    assert code == 0
    for expected in (
        rf"one: adapter\nfor the model +{adapters / 'base'}\nadapter +LoRA of rank 4, alpha 8: scale 2\n",
        r"targets +down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj\n",
        r"modules to save +lm_head\n",
        r"modules +14\nranks +2 in 2, 4 in 12\n",
        r"model\.layers\.0-1\.self_attn\.q_proj\.lora_A\.weight +2 x \(2 x 32\) ",
    ):
        assert re.search(expected, text), expected
    code, found = as_json(capsys, adapters / "one")
    (file,) = [part for part in found["contains"] if part["kind"] == "safetensors"]
    assert found["facts"]["parameters"] == file["numbers"]


def test_the_checkpoint_of_an_adapter_has_its_step_and_how_its_base_was_held(capsys, adapters):
    code, text = inspected(capsys, adapters / "run")
    assert code == 0 and "checkpoint of an adapter" in text and re.search(r"step +4\nfor the model ", text)
    assert re.search(r"held as +nf4\n", text) and "files are what was written" in text
    assert "config.json is missing" not in text


def test_an_adapter_without_its_base_is_shown_all_the_same(capsys, adapters, tmp_path):
    one = shutil.copytree(adapters / "one", tmp_path / "one")
    config = one / "adapter_config.json"
    config.write_text(config.read_text().replace(str(adapters / "base"), "meta-llama/Llama-9"))
    code, text = inspected(capsys, one)
    assert code == 0 and re.search(r"for the model +meta-llama/Llama-9 \(not there\)", text)


def test_an_adapter_that_does_not_fit_its_base_is_broken_and_each_tensor_is_named(capsys, adapters, tmp_path):
    one = shutil.copytree(adapters / "one", tmp_path / "one")
    narrow = tuned.base(tmp_path / "narrow", hidden_size=16, intermediate_size=32)
    config = one / "adapter_config.json"
    before = config.read_text()
    config.write_text(before.replace(str(adapters / "base"), str(narrow)))
    code, text = inspected(capsys, one)
    assert code == 2 and "q_proj.lora_A.weight (2, 32) does not fit" in text and "wanted (2, 16)" in text
    config.write_text(before.replace(str(adapters / "base"), str(tmp_path / "one")))
    assert inspected(capsys, one)[0] == 0, "a base that is no model says nothing against the adapter"


def test_an_adapter_with_halves_that_do_not_belong_together_is_broken(capsys, adapters, tmp_path):
    one = shutil.copytree(adapters / "one", tmp_path / "one")
    config = one / "adapter_config.json"
    config.write_text(config.read_text().replace(str(adapters / "base"), "gone"))
    with safetensors.SafeTensors(one / "adapter_model.safetensors") as file:
        arrays = {name: np.array(file[name]) for name in file}
    a, b = (sorted(name for name in arrays if half in name) for half in ("lora_A", "lora_B"))
    del arrays[b[0]]
    arrays[b[1]] = arrays[b[1]][:, :1].copy()
    safetensors.save(one / "adapter_model.safetensors", arrays, {"format": "pt"})
    code, text = inspected(capsys, one)
    assert code == 2 and f"{a[0]} is there without lora_B.weight" in text
    assert f"{a[1]} (4, " in text and "does not fit its B" in text


def test_a_pickled_adapter_is_refused_by_name(capsys, adapters, tmp_path):
    shutil.copy(adapters / "one" / "adapter_config.json", tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x02")
    assert "adapter_model.bin, a pickle, which can run any code and is never opened" in refused(capsys, tmp_path)
    assert "looks like a pickle" in refused(capsys, tmp_path / "adapter_model.bin")
    assert "give the folder it lies in" in refused(capsys, tmp_path / "adapter_config.json")


def test_weights_in_4_bits_are_rows_of_what_they_stand_for(capsys, adapters):
    code, found = as_json(capsys, adapters / "small")
    (file,) = [part for part in found["contains"] if part["kind"] == "safetensors"]
    tensors = {tensor["name"]: tensor for tensor in file["tensors"]}
    assert code == 0 and not any("absmax" in name or "quant" in name for name in tensors)
    packed = dict(Llama.from_pretrained(adapters / "small").named_packed())
    assert len(packed) == 14
    for name, matrix in packed.items():
        values, told = kernels.unpack(matrix).astype(np.float64), tensors[name]
        assert (told["dtype"], told["shape"]) == ("NF4", list(matrix.shape))
        assert told["max"] == values.max() and math.isclose(told["std"], values.std(), rel_tol=1e-9)
    size, nbytes = (sum(tensors[name][key] if key == "bytes" else math.prod(tensors[name]["shape"]) for name in packed)
                    for key in ("shape", "bytes"))  # fmt: skip
    assert found["facts"]["stored as"] == "nf4, as bitsandbytes has it, scales in 8 bits"
    assert found["facts"]["in 4 bits"] == f"14 matrices, {size:,} weights, {nbytes / size:.4f} bytes each"


def test_parts_of_a_weight_that_cannot_be_read_are_shown_one_by_one(capsys, adapters, tmp_path):
    small = shutil.copytree(adapters / "small", tmp_path / "small")
    with safetensors.SafeTensors(small / "model.safetensors") as file:
        arrays = {name: np.array(file[name]) for name in file}
    state = next(name for name in arrays if name.endswith("q_proj.weight.quant_state.bitsandbytes__nf4"))
    arrays[state] = np.frombuffer(b"{}", np.uint8)
    safetensors.save(small / "model.safetensors", arrays, {"format": "pt"})
    code, found = as_json(capsys, small)
    (file,) = [part for part in found["contains"] if part["kind"] == "safetensors"]
    assert state in {tensor["name"] for tensor in file["tensors"]}
