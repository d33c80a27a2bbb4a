"""Adapters on a command line: found with their base, named, switched; the ones that do not fit refused in one line."""

import json
import shutil

import numpy as np
import pytest
import tuned

from entrenar import cli
from entrenar.adapters import active_adapter, adapter_names, load_adapter
from entrenar.cli.adapters import named_after
from entrenar.cli.model_options import STORAGES
from entrenar.cli.models import open_model
from entrenar.cli.parser import CommandLineError
from entrenar.data import train_bpe
from entrenar.formats import FormatError
from entrenar.llama import Llama
from entrenar.llama import packed as llama_packed
from entrenar.training.checkpoint import CheckpointError

IDS = np.arange(40, 80)[None]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """base, run (of an adapter for it), one, two (adapters for it)"""
    place = tmp_path_factory.mktemp("made")
    tuned.base(place / "base")
    tuned.run(place / "run", place / "base", steps=(2, 4))
    for number, name in enumerate(("one", "two"), 3):
        tuned.adapter(place / name, place / "base", seed=number)
    return place


def logits(model):
    return model(IDS).data


def with_adapter(base, folder):
    model = Llama.from_pretrained(base)
    load_adapter(model, folder)
    return logits(model)


def command(capsys, *words):
    code = cli.main([str(word) for word in words])
    return code, *capsys.readouterr()


# Finding


@pytest.mark.parametrize("path", ["run", "run/step-000002", "run/best", "run/checkpoint", "one"])
def test_a_run_a_checkpoint_and_a_folder_of_peft_are_a_model_with_their_base(made, path):
    opened = open_model(made / path)
    folder = made / {"run": "run/step-000004"}.get(path, path)
    assert np.array_equal(logits(opened.model), with_adapter(made / "base", folder))
    assert opened.folder == made / "base" and opened.turns == ("run" if "run" in path else "one",)
    assert opened.context == (64 if "run" in path else 256)


def test_several_adapters_are_there_by_name_and_switched_on_one_base(made):
    words = [str(made / "one"), f"mine={made / 'two'}", "off"]
    opened = open_model(made / "base", adapters=words)
    assert adapter_names(opened.model) == ["one", "mine"] and opened.turns == ("one", "mine", None)
    assert active_adapter(opened.model) == "one"
    for name, wanted in (("mine", with_adapter(made / "base", made / "two")),
                         ("one", with_adapter(made / "base", made / "one")),
                         (None, logits(Llama.from_pretrained(made / "base")))):  # fmt: skip
        opened.use(name)
        assert np.array_equal(logits(opened.model), wanted)


def test_the_adapter_of_a_run_is_there_beside_others_and_can_be_off(made):
    assert open_model(made / "run", adapters=["off"]).turns == (None,)
    opened = open_model(made / "run", adapters=[str(made / "one"), "run"])
    assert opened.turns == ("one", "run") and set(opened.tuned) == {"run", "one"}


def test_two_adapters_of_one_name_are_told_apart(made, tmp_path):
    shutil.copytree(made / "two", tmp_path / "one")
    assert open_model(made / "base", adapters=[str(made / "one"), str(tmp_path / "one")]).turns == ("one", "one-2")


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("runs/mine/step-000400", "mine"), ("runs/mine/best", "mine"), ("runs/mine", "mine"), ("a/my lora!", "my-lora"),
        ("a/off", "adapter"), ("a/base", "adapter"), ("a/ü", "adapter"), ("a/" + "x" * 99, "x" * 60),
    ],
)  # fmt: skip
def test_an_adapter_without_a_name_is_called_after_its_folder(tmp_path, path, name):
    assert named_after(tmp_path / path) == name


def test_a_folder_whose_name_has_an_equals_sign_is_a_folder(made, tmp_path, monkeypatch):
    shutil.copytree(made / "one", tmp_path / "r=8")
    monkeypatch.chdir(tmp_path)
    assert open_model(made / "base", adapters=["r=8"]).turns == ("r-8",)


def test_a_base_that_moved_is_told_with_base(made, tmp_path):
    shutil.copytree(made / "run", tmp_path / "run", symlinks=True)
    base = shutil.copytree(made / "base", tmp_path / "moved")
    state = tmp_path / "run" / "step-000004" / "adapter_config.json"
    for folder in (tmp_path / "run").glob("step-*"):
        (folder / "SHA256SUMS").unlink()
        (folder / "state.json").unlink()
    state.write_text(state.read_text().replace(str(made / "base"), "meta-llama/Llama-9"))
    words = "is an adapter for meta-llama/Llama-9, which is not there; where that model is, --base FOLDER says"
    with pytest.raises(FormatError, match=words):
        open_model(tmp_path / "run" / "step-000004")
    opened = open_model(tmp_path / "run" / "step-000004", base=str(base))
    assert np.array_equal(logits(opened.model), with_adapter(base, made / "run" / "checkpoint"))


def test_another_base_than_the_one_trained_on_is_warned_of(made, tmp_path, capsys):
    other = tuned.base(tmp_path / "other", seed=9)
    warnings = []
    open_model(made / "run", base=str(other), warn=warnings.append)
    open_model(other, adapters=[str(made / "run")], warn=warnings.append)
    assert len(warnings) == 2 and all("was trained beside other weights than those in" in text for text in warnings)
    assert "model.safetensors is another" in warnings[0]
    open_model(made / "run", base=str(made / "base"), warn=pytest.fail)


def test_a_broken_newest_checkpoint_of_an_adapter_is_passed_over(made, tmp_path):
    run = shutil.copytree(made / "run", tmp_path / "run", symlinks=True)
    (run / "step-000004" / "adapter_model.safetensors").write_bytes(b"x")
    warnings = []
    opened = open_model(run, warn=warnings.append)
    assert opened.tuned == {"run": run / "step-000002"} and "falling back to step-000002" in warnings[0]
    with pytest.raises(CheckpointError, match="adapter_model.safetensors is not what was written"):
        open_model(made / "base", adapters=[str(run / "step-000004")])


# How weights are held


def test_weights_are_held_as_asked_for_and_by_a_run_as_it_held_them(made, tmp_path):
    assert not list(open_model(made / "base").model.named_packed())
    asked = {m.kind for _, m in open_model(made / "base", storage="q8_0").model.named_packed()}
    run = tuned.run(tmp_path / "run", made / "base", storage="nf4")
    held = {m.kind for _, m in open_model(run).model.named_packed()}
    other = {m.kind for _, m in open_model(run, storage="bfloat16").model.named_packed()}
    beside = {m.kind for _, m in open_model(made / "base", adapters=[str(run), str(made / "one")]).model.named_packed()}
    assert (asked, held, other, beside) == ({"q8_0"}, {"nf4"}, {"bfloat16"}, {"nf4"})


def test_a_checkpoint_that_says_nonsense_of_its_base_is_read_as_far_as_it_makes_sense(made, tmp_path):
    folder = shutil.copytree(made / "run" / "step-000004", tmp_path / "x")
    (folder / "SHA256SUMS").unlink()
    nonsense = {"base": {"storage": ["nf4"]}, "data": {"max_length": "x"}}
    for state in ({"config": {"base": {"storage": "nf9"}}}, {"config": {"base": 3}, "base": ["x"]},
                  {"base": {"folder": 1}}, {"config": nonsense}):  # fmt: skip
        (folder / "state.json").write_text(json.dumps(state))
        opened = open_model(folder)
        assert not list(opened.model.named_packed()) and opened.context == 256
    (folder / "state.json").write_text(json.dumps({"base": {"folder": "~nobody-of-this-name/x"}}))
    with pytest.raises(FormatError, match="is an adapter for ~nobody-of-this-name/x, which is not there"):
        open_model(folder)


def test_every_way_to_hold_weights_can_be_asked_for():
    assert sorted(STORAGES) == sorted(llama_packed.STORAGES)


# Which tokenizer


def test_the_tokenizer_beside_an_adapter_has_the_template_it_was_trained_with(made, tmp_path):
    one = shutil.copytree(made / "one", tmp_path / "one")
    shutil.copy(made / "base" / "tokenizer.json", one)
    (one / "chat_template.jinja").write_text(tuned.CHATML)
    assert open_model(made / "base", adapters=[str(one)]).tokenizer.files == {
        "chat_template.jinja": tuned.CHATML.encode()
    }


def test_a_tokenizer_beside_an_adapter_that_the_model_cannot_have_is_passed_over(made, tmp_path):
    one = shutil.copytree(made / "one", tmp_path / "one")
    train_bpe(["the cat sat on the mat " * 50], vocab_size=270).save(one)
    warnings = []
    assert open_model(made / "base", adapters=[str(one)], warn=warnings.append).tokenizer.vocab_size == 257
    assert "the model's own tokenizer is used" in warnings[0]


# Refusals


def test_what_is_no_adapter_is_refused_by_what_it_is(made, tmp_path):
    def refusal(*adapters, kind=FormatError, where=made / "base", **settings):
        with pytest.raises(kind) as caught:
            open_model(where, adapters=list(map(str, adapters)), **settings)
        return str(caught.value)

    told = refusal(tmp_path / "none")
    assert "none: does not exist, looked from" in told and "wanted an adapter as PEFT writes it" in told
    assert "base: is a whole model, not an adapter; give it as MODEL" in refusal(made / "base")
    assert "holds neither checkpoints" in refusal(tmp_path)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(made / "one" / "adapter_config.json", pickled)
    (pickled / "adapter_model.bin").write_bytes(b"\x80\x02")
    assert "has adapter_model.bin, a pickle, which can run any code and is never opened here" in refusal(pickled)
    assert "adapter_model.bin: is a pickle, which can run" in refusal(where=pickled / "adapter_model.bin")
    several = tmp_path / "several"
    shutil.copytree(made / "one", several / "one")
    assert "holds adapters (one): give the folder of one" in refusal(several)
    assert "the name off stands for the model alone" in refusal(f"off={made / 'one'}", kind=CommandLineError)
    assert "the name a is taken" in refusal(f"a={made / 'one'}", f"a={made / 'two'}", kind=CommandLineError)
    assert "is a whole model, not an adapter that needs one" in refusal(base=str(made), kind=CommandLineError)
    assert "its base" in refusal(where=made / "one", base=str(made / "two"))
    assert "is an adapter itself" in refusal(where=made / "one", base=str(made / "two"))


def test_an_adapter_of_another_shape_is_refused_with_every_tensor_that_does_not_fit(made, tmp_path, capsys):
    narrow = tuned.base(tmp_path / "narrow", hidden_size=16, intermediate_size=32)
    code, out, err = command(capsys, "generate", narrow, "--adapter", made / "one", "--prompt", "x")
    assert (code, out) == (2, "") and err.startswith("entrenar generate: ")
    assert "q_proj.lora_A.weight has shape (4, 32), wanted (4, 16)" in err and "Traceback" not in err


def test_a_llama2c_file_has_no_adapters(made, tmp_path, capsys):
    from entrenar.convert.llama2c import export_llama2c

    export_llama2c(Llama.from_pretrained(made / "base"), tmp_path / "m.bin")
    code, _, err = command(capsys, "generate", tmp_path / "m.bin", "--adapter", made / "one")
    assert code == 2 and "is for a model in Hugging Face's layout, not for the llama2.c file" in err


def test_a_storage_that_is_none_is_told_with_the_nearest(made, capsys):
    code, _, err = command(capsys, "generate", made / "base", "--storage", "nf5")
    assert code == 2 and "--storage: nf5: wanted one of" in err and "did you mean nf4?" in err


def test_text_is_written_in_int16_with_weights_in_4_bits_unless_something_else_is_asked_for(made, tmp_path):
    def computes(path, **how):
        return {m.compute for _, m in open_model(path, **how).model.named_packed()}

    run = tuned.run(tmp_path / "run", made / "base", storage="nf4")
    Llama.from_pretrained(made / "base", storage="fp4").save_pretrained(tmp_path / "fp4")
    shutil.copy(made / "base" / "tokenizer.json", tmp_path / "fp4")
    for path, how in ((made / "base", {"storage": "nf4"}), (run, {}), (tmp_path / "fp4", {"usual": "stored"})):
        assert computes(path, writes=True, **how) == {"int16"}
        assert computes(path, **how) == {"float32"}
        assert computes(path, writes=True, compute="float32", **how) == {"float32"}
    assert computes(made / "base", writes=True, storage="q8_0") == {"float32"}
    assert computes(made / "base", writes=True, usual="stored") == set()


# generate and eval


def test_generate_writes_a_text_by_each_that_is_asked_for(made, capsys):
    words = ["--prompt", "to be", "--max-tokens", 20, "--temperature", 0, "--ignore-eos"]
    alone = command(capsys, "generate", made / "base", *words)[1]
    one, two = (command(capsys, "generate", made / name, *words)[1] for name in ("one", "two"))
    assert len({alone, one, two}) == 3
    both = ["--adapter", made / "two", "--adapter", "off", "--adapter", made / "one"]
    assert command(capsys, "generate", made / "base", *both, *words) == (0, f"{two}\n---\n{alone}\n---\n{one}", "")
    assert command(capsys, "generate", made / "one", "--adapter", "off", *words) == (0, alone, "")


def test_eval_says_whose_numbers_they_are(made, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("some text to predict, byte by byte")
    words = [tmp_path / "a.txt", "--context", 32]
    alone = json.loads(command(capsys, "eval", made / "base", *words, "--json")[1])
    code, out, _ = command(capsys, "eval", made / "run", "--adapter", "off", "--adapter", "run", *words, "--json")
    told = json.loads(out)
    assert code == 0 and [one["adapter"] for one in told["adapters"]] == ["off", "run"]
    assert told["adapters"][0]["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    assert told["adapters"][1]["loss"] != pytest.approx(alone["loss"], rel=1e-3)
    lines = command(capsys, "eval", made / "run", "--adapter", "off", "--adapter", "run", *words)[1].splitlines()
    assert [line.split()[0] for line in lines] == ["adapter=off", "adapter=run"]
    code, _, err = command(capsys, "eval", made / "run", "--adapter", "off", "--adapter", "run", "-")
    assert code == 2 and "standard input can be read once only" in err


def test_what_is_stored_in_bfloat16_is_used_so_and_says_the_same(made, tmp_path, capsys):
    """In half the memory; the weights are the same numbers."""
    assert cli.main(["quantize", str(made / "base"), "--to", "bfloat16", "--out", str(tmp_path / "half")]) == 0
    (tmp_path / "a.txt").write_text("some text to predict")
    capsys.readouterr()
    losses = [
        json.loads(command(capsys, "eval", tmp_path / "half", tmp_path / "a.txt", "--json", *words)[1])["loss"]
        for words in ((), ("--storage", "stored"), ("--storage", "float32"))
    ]
    assert losses[0] == losses[1] == pytest.approx(losses[2], rel=1e-5)
    assert {m.kind for _, m in open_model(tmp_path / "half", usual="stored").model.named_packed()} == {"bfloat16"}


def test_adapters_go_beside_a_model_that_is_stored_in_4_bits(made, tmp_path):
    assert cli.main(["quantize", str(made / "base"), "--to", "nf4", "--out", str(tmp_path / "small")]) == 0
    warnings = []
    opened = open_model(tmp_path / "small", adapters=[str(made / "one"), str(made / "run")], warn=warnings.append)
    model = Llama.from_pretrained(made / "base", storage="nf4")
    load_adapter(model, made / "one")
    assert np.array_equal(logits(opened.model), logits(model))
    assert len(warnings) == 1 and "the same model in another storage format does" in warnings[0]
    assert open_model(made / "run", base=str(tmp_path / "small")).turns == ("run",)
