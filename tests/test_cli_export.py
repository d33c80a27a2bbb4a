"""`entrenar export`: every format from one model, nothing overwritten unasked, each refusal with its way out."""

import json

import numpy as np
import pytest
import tuned

from entrenar import random
from entrenar.cli import main
from entrenar.cli.models import open_model
from entrenar.convert.llama2c import import_llama2c
from entrenar.data import train_bpe
from entrenar.data.sentencepiece import BPE, BYTE, CONTROL, UNKNOWN, Piece, SentencePiece
from entrenar.data.tokenizer_subword import SubwordTokenizer
from entrenar.formats.gguf import read_header
from entrenar.llama import Llama, LlamaConfig

IDS = np.arange(40, 80)[None]
CONFIG = dict(vocab_size=280, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
              max_position_embeddings=32, rms_norm_eps=1e-5)  # fmt: skip


def folder_of(path, **changes):
    random.seed(0)
    tokenizer = train_bpe(["the cat sat on the mat"] * 9, vocab_size=270)
    return Llama(LlamaConfig(**(CONFIG | changes))).save_pretrained(path, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("source") / "model")


def export(source, *words):
    return main(["export", str(source), *map(str, words)])


def test_a_gguf_file_is_written_with_its_tokenizer_and_the_next_command(source, tmp_path, capsys):
    out = tmp_path / "m.gguf"
    assert export(source, "--to", "gguf", "--out", out) == 0
    header, said = read_header(out), capsys.readouterr().out
    assert header.metadata["general.file_type"] == 1 and header.metadata["tokenizer.ggml.model"] == "gpt2"
    assert header.entries["blk.0.ffn_up.weight"].dtype == "F16"
    assert f"wrote {out}: 0.1 MB, F16" in said and "parameters" in said and f"llama-completion -m {out}" in said


@pytest.mark.parametrize("kind, dtype", [("f32", "F32"), ("bf16", "BF16"), ("q8_0", "Q8_0")])
def test_the_type_of_a_gguf_files_matrices_can_be_chosen(source, tmp_path, kind, dtype):
    assert export(source, "--to", "gguf", "--type", kind, "--out", tmp_path / "m.gguf") == 0
    assert read_header(tmp_path / "m.gguf").entries["token_embd.weight"].dtype == dtype


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_hugging_face_folder_opens_again(source, tmp_path, capsys, dtype):
    out = tmp_path / "copy"
    assert export(source, "--to", "hf", "--dtype", dtype, "--out", out) == 0
    opened, before = open_model(out), open_model(source)
    assert opened.model.config == before.model.config
    assert opened.tokenizer.encode("the cat").tolist() == before.tokenizer.encode("the cat").tolist()
    said = capsys.readouterr().out
    assert f"wrote {out}" in said and dtype in said and "model.safetensors" in said and "AutoModelForCausalLM" in said


@pytest.mark.parametrize("version", ["v0", "v1"])
def test_a_llama2c_file_is_written_and_a_tokenizer_it_cannot_use_is_said(source, tmp_path, capsys, version):
    out = tmp_path / "m.bin"
    assert export(source, "--to", "llama2c", "--type", version, "--out", out) == 0
    weight = "model.layers.0.self_attn.q_proj.weight"
    model = open_model(source).model
    assert (import_llama2c(out).state_dict()[weight] == model.state_dict()[weight]).all()
    assert "no tokenizer.bin: llama2.c's programs can only use" in capsys.readouterr().out
    assert not (tmp_path / "tokenizer.bin").exists()
    assert main(["generate", str(out), "--prompt", "x"]) == 2
    told = capsys.readouterr().err
    assert f"{out}: has no tokenizer beside it; put the model's tokenizer.json" in told and str(tmp_path) in told


def test_a_tokenizer_of_llama2s_layout_is_written_beside_the_llama2c_file(tmp_path, capsys):
    pieces = [Piece("<unk>", 0.0, UNKNOWN), Piece("<s>", 0.0, CONTROL), Piece("</s>", 0.0, CONTROL)]
    pieces += [Piece(f"<0x{i:02X}>", 0.0, BYTE) for i in range(256)] + [Piece("▁", -1.0), Piece("a", -2.0)]
    table = SentencePiece("test", pieces, model_type=BPE, byte_fallback=True, remove_extra_whitespaces=False)
    tokenizer = SubwordTokenizer(table.tokenizer(), begin_id=1, end_id=2, unknown="<unk>")
    source = Llama(LlamaConfig(**CONFIG)).save_pretrained(tmp_path / "model", tokenizer=tokenizer)
    assert export(source, "--to", "llama2c", "--out", tmp_path / "m.bin") == 0
    said = capsys.readouterr().out
    assert (tmp_path / "tokenizer.bin").is_file() and f"./run {tmp_path / 'm.bin'} -z" in said
    (tmp_path / "m.bin").unlink()
    assert export(source, "--to", "llama2c", "--out", tmp_path / "m.bin") == 2
    assert "tokenizer.bin: exists already" in capsys.readouterr().err and not (tmp_path / "m.bin").exists()


def test_a_model_run_c_cannot_compute_is_refused_with_exit_code_2(tmp_path, capsys):
    source = folder_of(tmp_path / "model", rms_norm_eps=1e-6, rope_theta=5e5)
    assert export(source, "--to", "llama2c", "--out", tmp_path / "m.bin") == 2
    said = capsys.readouterr().err
    assert said.startswith("entrenar export: llama2.c cannot run this model: rms_norm_eps = 1e-06")
    assert "rope_theta = 500000.0" in said
    assert not (tmp_path / "m.bin").exists()


@pytest.mark.parametrize("to, name", [("gguf", "m.gguf"), ("llama2c", "m.bin"), ("hf", "copy")])
def test_what_is_there_is_replaced_only_when_forced(source, tmp_path, capsys, to, name):
    out = tmp_path / name
    assert export(source, "--to", to, "--out", out) == 0

    def content():
        return (out / "model.safetensors" if to == "hf" else out).read_bytes()

    before = content()
    (out / "model.safetensors" if to == "hf" else out).write_bytes(b"precious")
    assert export(source, "--to", to, "--out", out) == 2
    assert "exists already; choose another name, or replace it with --force" in capsys.readouterr().err
    assert content() == b"precious"
    assert export(source, "--to", to, "--out", out, "--force") == 0
    assert content() == before and [path.name for path in tmp_path.iterdir()] == [name]


def test_a_folder_that_holds_more_than_a_model_is_never_replaced(source, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    assert export(source, "--to", "hf", "--out", tmp_path, "--force") == 2
    assert "holds more than a model (thesis.txt), and is not replaced even with --force" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_the_model_itself_is_never_replaced(source, capsys):
    assert export(source, "--to", "hf", "--out", source, "--force") == 2
    assert "holds the model itself; give another place" in capsys.readouterr().err
    open_model(source)


@pytest.mark.parametrize("words, message", [
    (("--to", "gguf", "--dtype", "float16", "--out", "m"), "--dtype float16: is for hf; for gguf give --type f16, f32"),
    (("--to", "hf", "--type", "f16", "--out", "m"), "--type f16: is for gguf and llama2c; for hf give --dtype float32"),
    (("--to", "llama2c", "--type", "q8_0", "--out", "m"), "--type q8_0: for llama2c wanted one of v0, v1"),
    (("--to", "gguf", "--type", "q4_k_m", "--out", "m"), "q4_k_m"),
    (("--to", "onnx", "--out", "m"), "onnx"),
    (("--to", "gguf", "--out", "."), "--out .: is a folder; give the file's name too, as model.gguf"),
    (("--to", "gguf", "--best", "--out", "m"), "--best wants a run's folder"),
    (("--to", "gguf"), "--out"),
])  # fmt: skip
def test_a_command_line_that_cannot_be_meant_is_refused_with_the_way_out(source, tmp_path, monkeypatch, capsys, words,
                                                                         message):  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert export(source, *words) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_best_is_the_checkpoint_of_that_name(tmp_path):
    folder_of(tmp_path / "run" / "step-000007", num_hidden_layers=3)
    (tmp_path / "run" / "best").symlink_to("step-000007")
    assert export(tmp_path / "run", "--to", "gguf", "--best", "--out", tmp_path / "m.gguf") == 0
    assert read_header(tmp_path / "m.gguf").metadata["llama.block_count"] == 3


def test_weights_too_large_for_the_type_are_refused_by_name(tmp_path, capsys):
    model = Llama(LlamaConfig(**CONFIG))
    model.state_dict()["lm_head.weight"][3, 3] = 1e6
    tokenizer = train_bpe(["the cat sat on the mat"] * 9, vocab_size=270)
    source = model.save_pretrained(tmp_path / "model", tokenizer=tokenizer)
    for to, name, out in (("gguf", "output.weight", "m.gguf"), ("hf", "lm_head.weight", "copy")):
        assert export(source, "--to", to, "--out", tmp_path / out, *(["--dtype", "float16"] if to == "hf" else [])) == 2
        assert name in capsys.readouterr().err and not (tmp_path / out).exists()


# Adapters


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """base, run and one: adapters for it"""
    place = tmp_path_factory.mktemp("made")
    tuned.base(place / "base", template=tuned.CHATML)
    tuned.run(place / "run", place / "base", steps=(2, 4))
    tuned.adapter(place / "one", place / "base", seed=3, target_modules=["q_proj", "v_proj"])
    return place


def test_a_run_becomes_a_folder_of_peft_with_a_model_card(made, tmp_path, capsys):
    out = tmp_path / "adapter"
    assert export(made / "run", "--to", "peft", "--out", out, "--base-name", "meta-llama/Llama-3.2-1B") == 0
    said = capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "meta-llama/Llama-3.2-1B" and config["peft_type"] == "LORA"
    weights = "adapter_model.safetensors"
    assert (out / weights).read_bytes() == (made / "run" / "checkpoint" / weights).read_bytes()
    head, card = (out / "README.md").read_text().removeprefix("---\n").split("---\n", 1)
    assert "base_model: meta-llama/Llama-3.2-1B\n" in head and "library_name: peft\n" in head and "- lora\n" in head
    assert "A LoRA adapter of rank 4 (alpha 8) on down_proj, gate_proj" in card and "# run" in card
    assert "Trained with entrenar." in card
    assert f"wrote {out}" in said and "PeftModel.from_pretrained" in said
    opened, before = open_model(out, base=str(made / "base")), open_model(made / "run")
    assert np.array_equal(opened.model(IDS).data, before.model(IDS).data)


def test_a_folder_of_peft_can_be_written_again_and_names_its_base_where_it_is(made, tmp_path, capsys):
    assert export(made / "one", "--to", "peft", "--out", tmp_path / "copy") == 0
    assert f"for the model {made / 'base'}; --base-name" in capsys.readouterr().out
    config = json.loads((tmp_path / "copy" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(made / "base")
    assert export(made / "one", "--to", "peft", "--out", tmp_path / "copy") == 2
    assert "exists already" in capsys.readouterr().err
    assert export(made / "run", "--to", "peft", "--out", tmp_path / "copy", "--force") == 0
    assert (tmp_path / "copy" / "tokenizer.json").is_file()


def test_best_is_the_best_adapter(made, tmp_path):
    weights = "adapter_model.safetensors"
    assert export(made / "run", "--to", "peft", "--best", "--out", tmp_path / "best") == 0
    assert (tmp_path / "best" / weights).read_bytes() == (made / "run" / "step-000002" / weights).read_bytes()


@pytest.mark.parametrize("kind, dtype", [(None, "F32"), ("f16", "F16")])
def test_an_adapter_becomes_a_file_for_llama_cpp(made, tmp_path, capsys, kind, dtype):
    out = tmp_path / "one.gguf"
    assert export(made / "one", "--to", "gguf-lora", "--out", out, *(["--type", kind] if kind else [])) == 0
    header, said = read_header(out), capsys.readouterr().out
    assert (header.metadata["general.type"], header.metadata["adapter.type"]) == ("adapter", "lora")
    assert len(header.entries) == 8 and {entry.dtype for entry in header.entries.values()} == {dtype}
    assert f"--lora {out}" in said and f"entrenar export {made / 'base'} --to gguf" in said


@pytest.mark.parametrize("adapter", ["run", "one"])
def test_a_model_with_an_adapter_is_written_merged(made, tmp_path, adapter):
    for to, out in (("hf", "folder"), ("gguf", "m.gguf"), ("llama2c", "m.bin")):
        assert export(made / adapter, "--to", to, "--out", tmp_path / out) == 0
    wanted = open_model(made / adapter).model(IDS).data
    np.testing.assert_allclose(open_model(tmp_path / "folder").model(IDS).data, wanted, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(import_llama2c(tmp_path / "m.bin")(IDS).data, wanted, rtol=1e-4, atol=1e-3)
    assert "blk.0.attn_q.weight" in read_header(tmp_path / "m.gguf").entries


def test_a_model_in_4_bits_is_written_as_the_floats_it_stands_for(made, tmp_path):
    assert main(["quantize", str(made / "base"), "--to", "nf4", "--out", str(tmp_path / "small")]) == 0
    assert export(tmp_path / "small", "--to", "hf", "--out", tmp_path / "plain") == 0
    opened = open_model(tmp_path / "plain")
    assert not list(opened.model.named_packed())
    wanted = open_model(tmp_path / "small").model(IDS).data
    np.testing.assert_allclose(opened.model(IDS).data, wanted, rtol=1e-4, atol=1e-3)


def test_what_a_gguf_adapter_cannot_hold_is_refused_with_the_way_out(made, tmp_path, capsys):
    tuned.adapter(tmp_path / "dora", made / "base", use_dora=True)
    assert export(tmp_path / "dora", "--to", "gguf-lora", "--out", tmp_path / "x.gguf") == 2
    assert "it is DoRA" in capsys.readouterr().err and not (tmp_path / "x.gguf").exists()
    assert export(tmp_path / "dora", "--to", "peft", "--out", tmp_path / "copy") == 0
    assert "A DoRA adapter" in (tmp_path / "copy" / "README.md").read_text()


@pytest.mark.parametrize("words, message", [
    (("base", "--to", "peft", "--out", "x"), "base: is a whole model, and --to peft is for an adapter"),
    (("base", "--to", "gguf-lora", "--out", "x"), "base: is a whole model, and --to gguf-lora is for an adapter"),
    (("one", "--to", "peft", "--out", "one", "--force"), "holds the adapter itself; give another place"),
    (("one", "--to", "peft", "--dtype", "float16", "--out", "x"), "--dtype float16: peft gets the adapter as it is"),
    (("one", "--to", "gguf-lora", "--type", "q8_0", "--out", "x"), "--type q8_0: for gguf-lora wanted one of f32, f16"),
    (("one", "--to", "gguf", "--base-name", "a/b", "--out", "x"), "--base-name a/b: is for --to peft"),
    (("none", "--to", "peft", "--out", "x"), "none: does not exist"),
    (("one", "--to", "gguf-lora", "--out", "."), "give the file's name too, as adapter.gguf"),
    (("one", "--to", "gguf_lora", "--out", "x"), "did you mean gguf-lora?"),
])  # fmt: skip
def test_an_adapter_that_cannot_be_exported_so_is_refused(made, tmp_path, monkeypatch, capsys, words, message):
    for name in ("base", "one"):
        (tmp_path / name).symlink_to(made / name)
    monkeypatch.chdir(tmp_path)
    assert main(["export", *words]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and not (tmp_path / "x").exists()
