"""Fine-tuning runs: what they write, that they go on to the same bits, what they refuse, and how that is said."""

import errno
import io
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from fine_runs import ROWS, bits, finetune, make_base, process, resume, words, write_rows

from entrenar.adapters import load_adapter
from entrenar.formats import safetensors
from entrenar.llama import Llama
from entrenar.training.checkpoint import load_saved, saved_steps
from entrenar.training.config import FineTuning, kind_of, options, read_config, to_toml
from entrenar.training.job import start
from entrenar.training.trainer import Trainer


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty folder with a base and conversations."""
    make_base(tmp_path / "base")
    write_rows(tmp_path / "chats.jsonl")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("entrenar.kernels.fma_peak", lambda seconds: 1e11)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def events(run, kind=None):
    lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if kind in (None, e["event"])]


def stopped_at(run, step, how=signal.SIGINT, **changes):
    """Let the run stop itself after a step: what a signal does, at a known place."""
    with pytest.MonkeyPatch.context() as patch:
        report = Trainer._report

        def then_signal(self, *args):
            report(self, *args)
            if self.step == step:
                os.kill(os.getpid(), how)

        patch.setattr(Trainer, "_report", then_signal)
        return finetune(run, **changes)


# What a run does


def test_a_small_run_from_rows_to_an_adapter_and_a_report(capsys):
    assert finetune("run", training__steps=30, lr_schedule__learning_rate=0.02) == 0
    told = capsys.readouterr().out
    for expected in ("adapter  LoRA of rank 4", "held_out_perplexity=", "[before]", "[after]", "[wanted]",
                     "nats per trained token of held-out conversations", "chat base --adapter run"):  # fmt: skip
        assert expected in told, expected
    looks = events("run", "held_out")
    assert looks[0]["step"] == 0 and looks[0]["whole"] and looks[-1]["whole"]
    assert looks[-1]["loss"] < looks[0]["loss"] and looks[0]["bits_per_byte"] is None
    steps = {e["step"] for e in events("run", "sample")}
    assert steps == {0, 30}
    files = {path.name for path in Path("run/checkpoint").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors", "state.json", "SHA256SUMS",
            "tokenizer.json"} <= files and "model.safetensors" not in files  # fmt: skip
    page = Path("run/report.html").read_text()
    assert "base learns to answer from chats.jsonl" in page and "nats per trained token" in page
    assert "perplexity" in page and "bits per byte" not in page and "Before" in page


def test_the_adapter_alone_makes_the_base_what_the_run_ended_with(capsys):
    assert finetune("run", training__steps=8) == 0
    (end,) = events("run", "end")
    base = Llama.from_pretrained("base")
    ids = np.arange(12).reshape(1, 12)
    before = base(ids).data.copy()
    load_adapter(base, "run/checkpoint")
    assert np.abs(base(ids).data - before).max() > 1e-4
    assert end["held_out_loss"] == events("run", "held_out")[-1]["loss"]


def test_the_loss_counts_trained_tokens_alone(capsys):
    assert finetune("run", training__steps=1, lr_schedule__warmup_steps=0) == 0
    (step,) = events("run", "step")
    data = events("run", "start")[0]["data"]
    assert 0 < step["tokens"] < data["train_trained"] and data["train_trained"] < data["train_tokens"]


def test_micro_batches_equal_one_big_batch(capsys):
    for run, batch, accumulation in (("one", 4, 1), ("two", 1, 4)):
        assert finetune(run, training__steps=3, training__batch_size=batch, training__accumulation=accumulation,
                        training__eval_every=0) == 0  # fmt: skip
    one, two = ([e["loss"] for e in events(run, "step")] for run in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-5)


def test_epochs_say_how_long_a_run_is_where_steps_do_not(capsys):
    assert finetune("run", training__steps="none", training__epochs=2, training__eval_every=0) == 0
    rows = load_saved("run").state["batches"]
    assert rows["epoch"] in (1, 2) and bits("run")["step"] != "step-000001"
    assert "each row 2" in capsys.readouterr().out


@pytest.mark.parametrize("storage", ["bfloat16", "q8_0", "nf4", "fp4"])
def test_a_base_in_any_storage_is_trained_beside(capsys, storage):
    assert finetune("run", base__storage=storage, training__steps=30, lr_schedule__learning_rate=0.02) == 0
    looks = events("run", "held_out")
    assert looks[-1]["loss"] < looks[0]["loss"]
    assert f"held as {storage}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter__kind": "dora"},
        {"adapter__dropout": 0.1},
        {"training__activation_checkpointing": "true", "adapter__layers": "1"},
        {"data__packing": "false", "data__train_on": "all"},
        {"adapter__targets": "q_proj,v_proj", "adapter__modules_to_save": "lm_head"},
    ],
    ids=lambda changes: " ".join(map(str, changes.values())),
)
def test_other_adapters_and_data_learn_too(capsys, changes):
    assert finetune("run", training__steps=30, lr_schedule__learning_rate=0.02, **changes) == 0
    looks = events("run", "held_out")
    assert looks[-1]["loss"] < looks[0]["loss"]


def test_full_fine_tuning_writes_a_whole_model(capsys):
    assert finetune("run", adapter__kind="full", training__steps=20, lr_schedule__learning_rate=0.005) == 0
    looks = events("run", "held_out")
    assert looks[-1]["loss"] < looks[0]["loss"] - 0.3
    model = Llama.from_pretrained("run/checkpoint")
    assert model.config == Llama.from_pretrained("base").config
    assert "entrenar chat run  #" in capsys.readouterr().out.replace("python -m ", "")


def test_recomputing_activations_changes_no_bit(capsys):
    assert finetune("kept") == 0
    assert finetune("again", training__activation_checkpointing="true") == 0
    assert bits("kept") == bits("again")


def test_a_run_can_be_started_from_python(capsys):
    config = read_config(None, [(w[2:].partition("=")[0], w.partition("=")[2]) for w in words(training__steps=2)],
                         FineTuning)  # fmt: skip
    config.checkpointing.out = "run"
    config.lr_schedule.warmup_steps = 0
    assert start(config) == 0 and bits("run")["step"] == "step-000002"


def test_a_question_of_ones_own_is_asked_before_and_after(capsys):
    assert finetune("run", training__steps=2, lr_schedule__warmup_steps=0, training__sample_prompt="say cat") == 0
    samples = events("run", "sample")
    assert [e["step"] for e in samples] == [0, 2] and all("say cat" in e["prompt"] for e in samples)
    assert samples[0]["wanted"] == ""


def test_rows_on_standard_input_are_kept_for_going_on(place, capsys):
    rows = (place / "chats.jsonl").read_bytes()
    text = f"import io, sys; sys.stdin = io.TextIOWrapper(io.BytesIO({rows!r}))"
    one = process("finetune", "--out", "run", *words(data__source="-", training__steps=3), before=text)
    assert one.communicate(timeout=60)[1] == "" and one.returncode == 0
    assert resume("run", "--training.steps", "4") == 0
    assert bits("run")["step"] == "step-000004"


def test_bad_rows_on_standard_input_leave_no_folder(place, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"{broken\n")))
    assert finetune("run", data__source="-") == 2
    assert "line 1" in capsys.readouterr().err and not Path("run").exists()


@pytest.mark.tier3
def test_a_run_of_train_can_be_the_base(place, capsys):
    from runs import train

    (place / "text.txt").write_text("red green blue seven nine cat say and. " * 200)
    assert train("first", training__context=64, model__max_position_embeddings=64) == 0
    assert finetune("run", base__model="first") == 0
    base = json.loads((place / "run/checkpoint/adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(place / "first/step-000012")


# Going on


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter__dropout": 0.2},
        {"base__storage": "nf4"},
        pytest.param({"adapter__kind": "full"}, marks=pytest.mark.tier3),
        pytest.param({"adapter__kind": "dora"}, marks=pytest.mark.tier3),
    ],
    ids=lambda changes: " ".join(map(str, changes.values())),
)
def test_a_stopped_run_goes_on_to_the_same_bits(capsys, changes):
    assert finetune("whole", **changes) == 0
    assert stopped_at("run", 5, **changes) == 130
    assert resume("run") == 0
    assert bits("run") == bits("whole")
    assert [e["step"] for e in events("run", "step")] == list(range(1, 13))
    assert "[before]" in Path("run/sample.txt").read_text(), "what it answered before is remembered"


def kill_often(kills: int, seed: int) -> int:
    """Begin a run and kill it again and again, at random moments and in the middle of writes; how many kills hit."""
    rng, hit = random.Random(seed), 0
    one = process("finetune", "--out", "run", *words(training__steps=60, checkpointing__every=1))
    while hit < kills:
        there = (lambda: list(Path("run").glob(".step-*"))) if hit % 2 else Path("run/config.toml").exists
        while one.poll() is None and not there():
            time.sleep(0.0005)
        time.sleep(0 if hit % 2 else rng.uniform(0, 0.25))
        one.kill()
        one.communicate()
        if one.returncode == 0:
            return hit
        hit += 1
        if hit < kills:
            one = process("resume", "run")
    return hit


@pytest.mark.parametrize(("kills", "seed"), [(3, 0), *(pytest.param(8, s, marks=pytest.mark.tier3) for s in (1, 2, 3))])
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(capsys, kills, seed):
    assert finetune("whole", training__steps=60, checkpointing__every=1) == 0
    assert kill_often(kills, seed) == kills, "the run was over before it could be killed so often"
    assert resume("run") == 0
    assert bits("run") == bits("whole")


def test_another_base_is_refused_by_name_and_a_moved_one_found(place, capsys):
    assert stopped_at("run", 3) == 130
    shutil.move("base", "elsewhere")
    assert resume("run") == 2
    assert "base.model: base: there is no such folder" in (told := capsys.readouterr().err) and "--base.model" in told
    make_base(place / "base", seed=2)
    assert resume("run") == 2
    told = capsys.readouterr().err
    assert "base is not the model this run began from (model.safetensors is another)" in told
    shutil.rmtree("base")
    assert resume("run", "--base.model", "elsewhere") == 0


def test_other_rows_are_refused(place, capsys):
    assert stopped_at("run", 3) == 130
    write_rows(place / "chats.jsonl", ROWS[:-1])
    assert resume("run") == 2
    assert "no longer gives the tokens this run was trained on" in capsys.readouterr().err


def test_what_makes_it_another_run_cannot_change_on_the_way(capsys):
    assert stopped_at("run", 3) == 130
    assert resume("run", "--adapter.r", "8") == 2
    assert "adapter.r: cannot change while a run goes on" in capsys.readouterr().err
    assert resume("run", "--training.steps", "14") == 0
    assert bits("run")["step"] == "step-000014"


def test_two_runs_have_the_same_bits_and_another_seed_has_others(capsys):
    assert finetune("one") == finetune("two") == finetune("other", training__seed=2) == 0
    assert bits("one") == bits("two") != bits("other")


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base__model": "nowhere"}, "nowhere: there is no such folder"),
        ({"base__model": "."}, ".: has no config.json; wanted a folder with a model"),
        ({"data__source": "nothing.jsonl"}, "'nothing.jsonl' does not exist"),
        ({"adapter__r": 33}, "r = 33 for model.layers.0.self_attn.q_proj, which is 32 x 32: wanted at most 32"),
        ({"adapter__targets": "q_prj"}, "q_proj"),
        ({"data__max_length": 512}, "data.max_length = 512: the model in base has positions for 128"),
        ({"adapter__kind": "full", "base__storage": "nf4"}, "weights that are trained are float32"),
        ({"base__model": ""}, "base.model : wanted the folder of a model"),
        ({"adapter__alfa": 3}, "no such option; did you mean adapter.alpha?"),
        ({"lr_schedule__warmup_steps": 100}, "wanted at most training.steps = 12"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_sentence_and_leaves_no_run(capsys, changes, message):
    assert finetune("run", **changes) == 2
    told = capsys.readouterr().err
    assert message in told and "defect" not in told, told
    assert not Path("run").exists()


def test_rows_without_a_trained_token_are_refused(place, capsys):
    write_rows(place / "chats.jsonl", [{"messages": [{"role": "user", "content": "hello"}]}] * 4)
    assert finetune("run") == 2
    assert "has nothing to train on" in capsys.readouterr().err and not Path("run").exists()


def test_a_single_row_cannot_be_held_out(place, capsys):
    write_rows(place / "chats.jsonl", ROWS[:1])
    assert finetune("run") == 2
    assert "nothing can be held out of 1 rows" in capsys.readouterr().err


def test_bad_rows_are_named_by_file_and_line(place, capsys):
    with open("chats.jsonl", "a") as file:
        file.write("{broken\n")
    assert finetune("run") == 2
    assert f"chats.jsonl line {len(ROWS) + 1}" in capsys.readouterr().err
    assert finetune("run", data__skip_bad="true") == 0
    assert "skipped  1 rows" in capsys.readouterr().out


def test_a_loss_that_is_no_number_names_op_layer_and_row(capsys):
    assert finetune("run", lr_schedule__learning_rate=1e30, training__clip_norm=0, checkpointing__every=1) == 1
    told = capsys.readouterr().err
    assert "not finite" in told and "learning_rate" in told


def test_a_row_that_overflows_is_named_by_file_and_line(place, capsys):
    tensors = {name: array.copy() for name, array in safetensors.SafeTensors(place / "base/model.safetensors").items()}
    tensors["model.norm.weight"][:] = 1e19
    tensors["lm_head.weight"][:] = 1e30
    safetensors.save(place / "base/model.safetensors", tensors, {"format": "pt"})
    assert finetune("run", training__eval_every=0) == 1
    assert "loss is" in capsys.readouterr().err


def test_a_full_disk_is_told_with_place_and_way_out(monkeypatch, capsys):
    from entrenar.training import trainer

    def refuse(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(trainer, "save_step", refuse)
    assert finetune("run") == 1
    assert "No space left on device" in (told := capsys.readouterr().err) and "entrenar resume run" in told


def test_ctrl_c_saves_and_says_how_to_go_on(capsys):
    assert stopped_at("run", 2, signal.SIGTERM) == 143
    assert [p.name for p in saved_steps(Path("run"))][-1] == "step-000002"
    assert "resume run  # goes on as if nothing had happened" in capsys.readouterr().out


# Options


def test_every_option_has_a_type_a_default_of_it_and_a_help():
    for option in options(FineTuning):
        assert option.help, option.full_name
        assert option.check(option.default) == option.default, option.full_name


def test_a_configuration_written_reads_back_the_same(place):
    config = read_config(None, [("base.model", "base"), ("data.source", "x"), ("adapter.targets", "q_proj,v_proj"),
                                ("adapter.rank_pattern", "q_proj=8"), ("data.keys", "prompt=question,completion=a"),
                                ("adapter.layers", "0,1")], FineTuning)  # fmt: skip
    assert config.adapter.rank_pattern == {"q_proj": 8} and config.adapter.layers == [0, 1]
    (place / "run.toml").write_text(to_toml(config))
    assert kind_of(place / "run.toml") is FineTuning
    assert read_config(place / "run.toml", (), FineTuning) == config


def test_a_configuration_of_the_other_kind_is_told_so(place, capsys):
    (place / "fine.toml").write_text('[base]\nmodel = "base"\n')
    from entrenar.cli import main

    assert main(["train", "--config", "fine.toml"]) == 2
    assert "that is an option of `entrenar finetune`" in capsys.readouterr().err


def test_a_row_that_makes_a_value_that_is_no_number_is_named_by_file_and_line(place, capsys, monkeypatch):
    from entrenar.data import load_tokenizer
    from entrenar.training import finetune as kind

    rows = [*ROWS[:-1], {"messages": [{"role": "user", "content": "§"}, {"role": "assistant", "content": "red cat"}]}]
    write_rows(place / "chats.jsonl", rows)
    real, only_there = kind.base_model, load_tokenizer("base").encode("§").tolist()[-1]

    def poisoned(config):
        model = real(config)
        model.model.embed_tokens.weight.data[only_there] = np.nan
        return model

    monkeypatch.setattr(kind, "base_model", poisoned)
    monkeypatch.setattr(Trainer, "look_before", lambda self: None)
    assert finetune("run", training__eval_every=0, training__steps=60, data__held_out=0.02) == 1
    told = capsys.readouterr().err
    assert f"chats.jsonl line {len(rows)}." in told and "made by Embedding" in told, told
    assert f"(id {only_there})" in told


def test_rows_are_as_long_as_the_base_takes_unless_said():
    """The base of these runs has positions for 128 tokens; the default of 512 would not fit."""
    config = read_config(None, [("base.model", "base"), ("data.source", "chats.jsonl")], FineTuning)
    assert config.data.max_length is None and config.settled.data.max_length == 128
    config.data.max_length = 64
    assert config.settled.data.max_length == 64
