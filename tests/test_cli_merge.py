"""`entrenar merge` and `entrenar quantize`: what is written is what it says; what would lose a tuning is refused."""

import json
import re
import shutil

import numpy as np
import pytest
import tuned
from fine_runs import ROWS, finetune, make_base, write_rows

from entrenar import cli, kernels
from entrenar.adapters import load_adapter
from entrenar.cli.models import open_model
from entrenar.cli.quantize import Errors, squares
from entrenar.formats.gguf import read_header
from entrenar.llama import Llama
from entrenar.llama.pretrained import config_values
from entrenar.quant import quantize

IDS = np.arange(40, 80)[None]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """base, run, one (adapters for it), dora"""
    place = tmp_path_factory.mktemp("made")
    tuned.base(place / "base", template=tuned.CHATML)
    tuned.run(place / "run", place / "base")
    tuned.adapter(place / "one", place / "base", seed=3)
    tuned.adapter(place / "dora", place / "base", seed=4, use_dora=True)
    return place


def command(capsys, *words):
    code = cli.main([str(word) for word in words])
    return code, *capsys.readouterr()


def logits(folder, adapter=None, **settings):
    model = Llama.from_pretrained(folder, **settings)
    if adapter is not None:
        load_adapter(model, adapter)
    return model(IDS).data


# merge


@pytest.mark.parametrize("adapter", ["run", "one", "dora"])
def test_a_merged_model_says_what_base_and_adapter_say_and_proves_it(made, tmp_path, capsys, adapter):
    out = tmp_path / "merged"
    words = [made / "run"] if adapter == "run" else [made / "base", made / adapter]
    code, told, err = command(capsys, "merge", *words, "--out", out)
    assert code == 0 and f"merging {adapter} as float32" in err and "comparing over" in err
    proof = r"over (\d+) held-out tokens: max \|logit difference\| (\S+), KL (\S+) nats a token, 100.0 %"
    found = re.search(proof, told)
    assert found and int(found[1]) > 100 and float(found[2]) < 1e-3 and float(found[3]) < 1e-6
    folder = made / "run" / "checkpoint" if adapter == "run" else made / adapter
    np.testing.assert_allclose(logits(out), logits(made / "base", folder), rtol=1e-4, atol=1e-3)
    assert f"wrote {out}" in told and f"entrenar chat {out}" in told
    opened = open_model(out)
    assert opened.tokenizer.vocab_size == 257 and not opened.tuned
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 256


def test_the_template_the_adapter_was_trained_with_goes_along_else_the_models(made, tmp_path, capsys):
    one = shutil.copytree(made / "one", tmp_path / "one")
    shutil.copy(made / "base" / "tokenizer.json", one)
    (one / "chat_template.jinja").write_text("{{ messages[0].content }}")
    for adapter, wanted in ((one, "{{ messages[0].content }}"), (made / "one", tuned.CHATML)):
        out = tmp_path / f"merged-{adapter.parent.name}"
        assert command(capsys, "merge", made / "base", adapter, "--out", out)[0] == 0
        assert (out / "chat_template.jinja").read_text() == wanted


def test_the_type_is_that_of_the_stored_model_or_as_asked_for(made, tmp_path, capsys):
    half = tmp_path / "half"
    assert command(capsys, "quantize", made / "base", "--to", "bfloat16", "--out", half)[0] == 0
    for words, wanted in (([half], "bfloat16"), ([half, "--dtype", "float32"], "float32"),
                          ([made / "base", "--dtype", "float16"], "float16")):  # fmt: skip
        out = tmp_path / f"merged-{wanted}"
        base, *options = words
        assert command(capsys, "merge", base, made / "one", "--out", out, *options)[0] == 0
        assert config_values(out)["torch_dtype"] == wanted
    out = tmp_path / "four"
    assert command(capsys, "merge", made / "base", made / "one", "--out", out, "--storage", "nf4")[0] == 0
    assert {matrix.kind for _, matrix in Llama.from_pretrained(out).named_packed()} == {"nf4"}


def test_the_base_of_a_qlora_run_is_merged_as_it_was_held(made, tmp_path, capsys):
    run = tuned.run(tmp_path / "run", made / "base", storage="nf4")
    assert command(capsys, "merge", run, "--out", tmp_path / "merged", "--dtype", "float32")[0] == 0
    held = logits(made / "base", run / "checkpoint", storage="nf4")
    np.testing.assert_allclose(logits(tmp_path / "merged"), held, rtol=1e-4, atol=1e-3)
    assert np.abs(logits(made / "base", run / "checkpoint") - held).max() > 0.1, "which is another model"


def test_the_text_of_the_proof_can_be_given(made, tmp_path, capsys):
    text = tmp_path / "held-out.txt"
    text.write_text("twenty-one bytes here")
    code, told, _ = command(capsys, "merge", made / "run", "--out", tmp_path / "m", "--data", text)
    assert code == 0 and "over 23 held-out tokens" in told  # the tokens that begin and end the text
    code, _, err = command(capsys, "merge", made / "run", "--out", tmp_path / "n", "--data", tmp_path / "none.txt")
    assert code == 2 and "none.txt" in err and not (tmp_path / "n").exists()


def test_rounding_that_erases_the_update_is_refused_with_numbers_and_the_options_typed_here(made, tmp_path, capsys):
    small = tuned.adapter(tmp_path / "small", made / "base", size=1e-5)
    words = ("merge", made / "base", small, "--out", tmp_path / "m", "--storage", "nf4")
    code, out, err = command(capsys, *words)
    assert (code, out) == (2, "") and not (tmp_path / "m").exists()
    assert re.search(r"entrenar merge: stored as nf4, \d+ % of the update would be left", err)
    assert "--dtype float32, or --dtype bfloat16" in err and "--force writes it all the same" in err
    assert "_proj.weight: " in err and "force=True" not in err and "dtype='" not in err
    assert command(capsys, *words, "--force")[0] == 0 and (tmp_path / "m" / "config.json").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["base"], "base: is a whole model; name the adapter to merge behind it"),
        (["base", "base"], "is a whole model, not an adapter"),
        (["base", "nowhere"], "nowhere: does not exist"),
        (["run", "--storage", "q8_0"], "--storage: q8_0: wanted one of nf4, fp4"),
        (["run", "--dtype", "float8"], "--dtype: float8: wanted one of float32, bfloat16, float16"),
        (["run", "--out", "full"], "--out full: exists already; choose another name"),
    ],
)
def test_what_cannot_be_merged_is_refused_in_one_line(made, tmp_path, monkeypatch, capsys, words, message):
    for name in ("base", "run"):
        (tmp_path / name).symlink_to(made / name)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years")
    monkeypatch.chdir(tmp_path)
    code, out, err = command(capsys, "merge", *words, *([] if "--out" in words else ["--out", "new"]))
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1 and not (tmp_path / "new").exists()


# quantize


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_quantized_folder_is_read_as_it_is_and_its_errors_are_told(made, tmp_path, capsys, kind):
    out = tmp_path / "small"
    code, told, _ = command(capsys, "quantize", made / "base", "--to", kind, "--out", out)
    assert code == 0 and config_values(out)["quantization_config"]["bnb_4bit_quant_type"] == kind
    assert np.array_equal(logits(out), logits(made / "base", storage=kind))
    for name in ("q_proj", "down_proj"):
        (row,) = re.findall(rf"2 x model\.layers\.\*\.\w+\.{name}\.weight +([\d.]+)% +([\d.]+)% in layer [01]\n", told)
        assert 5 < float(row[0]) <= float(row[1]) < 20
    assert re.search(rf"{kind}: these weights had \d+ kB and have \d+ kB now", told)
    assert (out / "chat_template.jinja").read_text() == tuned.CHATML and f"entrenar chat {out}" in told


def test_the_errors_are_those_of_the_decoded_weights():
    rng = np.random.default_rng(0)
    w = rng.standard_normal((300, 64)).astype(np.float32)
    packed = quantize(w, "nf4")
    off, whole = squares(w, packed)
    assert off == pytest.approx(float(np.square(w - kernels.unpack(packed), dtype=np.float64).sum()), rel=1e-5)
    assert whole == pytest.approx(float(np.square(w, dtype=np.float64).sum()), rel=1e-5)
    errors = Errors()
    for layer, scale in ((0, 1), (1, 3)):
        errors.look(f"a.{layer}.b", w * scale, packed)  # three times as much is stored wrongly: 2/3 of it is off
    assert errors.lines()[1].split()[:3] == ["2", "x", "a.*.b"] and "in layer 1" in errors.lines()[1]


def test_bfloat16_is_of_all_weights(made, tmp_path, capsys):
    code, told, _ = command(capsys, "quantize", made / "base", "--to", "bfloat16", "--out", tmp_path / "half")
    assert code == 0 and config_values(tmp_path / "half")["torch_dtype"] == "bfloat16"
    code, text, _ = command(capsys, "inspect", tmp_path / "half", "--json")
    (file,) = [part for part in json.loads(text)["contains"] if part["kind"] == "safetensors"]
    assert {tensor["dtype"] for tensor in file["tensors"]} == {"BF16"}
    own = Llama.from_pretrained(made / "base").state_dict()
    for name, array in Llama.from_pretrained(tmp_path / "half").state_dict().items():
        np.testing.assert_allclose(array, own[name], rtol=2**-8)
    assert "model.embed_tokens.weight" in told


def test_block_and_scales_can_be_chosen(made, tmp_path, capsys):
    options = ("--block", "128", "--no-double-quant")
    assert command(capsys, "quantize", made / "base", "--to", "nf4", "--out", tmp_path / "q", *options)[0] == 0
    packed = [matrix for _, matrix in Llama.from_pretrained(tmp_path / "q").named_packed()]
    assert {matrix.block for matrix in packed} == {128} and all(isinstance(m.scales, np.ndarray) for m in packed)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["base", "--to", "q8_0"], "export MODEL --to gguf --type q8_0"),
        (["base", "--to", "float16"], "export MODEL --to hf --dtype float16"),
        (["base", "--to", "nf5"], "--to: nf5: wanted one of nf4, fp4, bfloat16, .*; did you mean nf4?"),
        (["base", "--to", "nf4", "--block", "48"], "--block: 48: wanted one of 32, 64, 128"),
        (["run", "--to", "nf4"], "is an adapter; `entrenar merge run --storage nf4 --out FOLDER`"),
        (["none", "--to", "nf4"], "none: does not exist"),
        (["small", "--to", "fp4"], "small: is quantized already"),
        (["base"], "required: --to"),
    ],
)
def test_what_cannot_be_quantized_is_refused_in_one_line(made, tmp_path, monkeypatch, capsys, words, message):
    for name in ("base", "run"):
        (tmp_path / name).symlink_to(made / name)
    monkeypatch.chdir(tmp_path)
    if "small" in words:
        assert command(capsys, "quantize", "base", "--to", "nf4", "--out", "small")[0] == 0
    code, out, err = command(capsys, "quantize", *words, "--out", "new")
    assert (code, out) == (2, "") and re.search(message.replace("?", r"\?"), err) and err.count("\n") == 1
    assert not (tmp_path / "new").exists()


# All of it, after a real run


def test_a_real_run_is_talked_to_compared_merged_and_exported(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("entrenar.kernels.fma_peak", lambda seconds: 1e11)
    monkeypatch.chdir(tmp_path)
    make_base(tmp_path / "base")
    (tmp_path / "chats").mkdir()
    write_rows(tmp_path / "chats" / "train.jsonl", ROWS[4:])
    write_rows(tmp_path / "chats" / "valid.jsonl", ROWS[:4])
    assert finetune("run", data__source="chats", training__steps=40, lr_schedule__learning_rate=0.02,
                    base__storage="nf4") == 0  # fmt: skip
    capsys.readouterr()
    ask = ("--prompt", "say red and blue", "--temperature", 0, "--max-tokens", 8)
    code, tuned_says, _ = command(capsys, "chat", "run", *ask)
    assert code == 0 and command(capsys, "chat", "base", "--adapter", "run", *ask)[1] == tuned_says
    base_says = command(capsys, "chat", "run", "--adapter", "off", *ask)[1]
    assert command(capsys, "chat", "run", "--compare", *ask)[1] == f"-- base\n{base_says}-- run\n{tuned_says}"
    assert base_says != tuned_says
    assert command(capsys, "merge", "run", "--out", "merged", "--dtype", "float32")[0] == 0
    assert command(capsys, "chat", "merged", *ask)[1] == tuned_says
    for to, out in (("hf", "plain"), ("peft", "adapter"), ("gguf-lora", "adapter.gguf"), ("gguf", "model.gguf")):
        assert command(capsys, "export", "run", "--to", to, "--out", out)[0] == 0, to
    assert command(capsys, "chat", "plain", *ask)[1] == tuned_says
    assert command(capsys, "chat", "adapter", "--storage", "nf4", *ask)[1] == tuned_says
    assert "Assistant:" in read_header(tmp_path / "model.gguf").metadata["tokenizer.chat_template"]
    for path in ("run", "run/best", "adapter", "merged", "adapter.gguf"):
        assert command(capsys, "inspect", path)[0] == 0, path
    text = command(capsys, "inspect", "run")[1]
    assert "checkpoint of an adapter" in text and "LoRA of rank 4" in text and "nats per trained token" in text
    assert re.search(r"held as +nf4\n", text)
    end = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()][-1]
    words = ("eval", "run", "chats", "--chat", "--adapter", "off", "--adapter", "run", "--json")
    alone, better = json.loads(command(capsys, *words)[1])["adapters"]
    assert better["loss"] == pytest.approx(end["held_out_loss"], rel=1e-5) and better["rows"] == 4
    assert better["loss"] < alone["loss"] - 0.5
    assert command(capsys, "eval", "run", "chats/train.jsonl")[0] == 2, "rows of messages are no text"
