"""The fine-tuning demonstrations: their task and how it is scored, the base they ship, and both as users run them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

import numpy as np
import pytest
from conftest import SAME_PACKAGE

from entrenar.data import load_tokenizer
from entrenar.examples import demo_task, finetune_lora, train_base
from entrenar.examples.demo_task import FORMS, HELD_OUT, MONTHS, TRAIN, answers, exact_match, make_row, write_rows
from entrenar.examples.demonstration import Outcome, demonstrate
from entrenar.examples.train_base import BASE, SHARD
from entrenar.llama import Llama, generate
from entrenar.llama.pretrained import read_config as read_shape
from entrenar.training.config import read_config

# The task

SHA256 = "5a7d1f43e4792d09bb72791ef20965e02141b3958d3b3564273fa054ca89c13e"  # of all prompts and completions


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> tuple[list[dict], list[dict]]:
    """(trained, held out), as the files have them."""
    folder = tmp_path_factory.mktemp("rows")
    held_out = write_rows(folder)
    read = [[json.loads(line) for line in open(folder / f"{name}.jsonl")] for name in ("train", "valid")]
    assert read[1] == held_out
    return read[0], read[1]


def test_no_day_that_is_held_out_is_trained_however_it_is_written(rows):
    trained, held_out = rows
    assert (len(trained), len(held_out)) == (TRAIN, HELD_OUT)
    days = [row["completion"] for row in trained + held_out]
    assert len(set(days)) == len(days)
    assert not {row["prompt"] for row in trained} & {row["prompt"] for row in held_out}


def test_rows_are_the_same_on_every_machine(rows):
    text = "".join(row["prompt"] + row["completion"] for part in rows for row in part)
    assert hashlib.sha256(text.encode()).hexdigest() == SHA256


def read_by_people(line: str) -> str:
    """The date in a line, found in another way than it was written."""
    numbers = [int(n) for n in re.findall(r"\d+", line)]
    names = [i for i, month in enumerate(MONTHS, 1) if re.search(rf"\b{month[:3]}", line)]
    day, month, year = numbers if len(numbers) == 3 else (numbers[0], names[0], numbers[1])
    return date(year, month, day).isoformat()


def test_every_completion_is_the_date_of_its_line(rows):
    assert [row["completion"] for part in rows for row in part] == [
        read_by_people(row["prompt"]) for part in rows for row in part
    ]


def test_every_form_is_written_as_people_write_it():
    days = [date(2024, 3, day) for day in range(1, 8)]
    written = [make_row(day, form, "Due {}")["prompt"] for day, form in zip(days, FORMS, strict=True)]
    assert written == ["Due 1 March 2024\n", "Due 2 Mar 2024\n", "Due March 3, 2024\n", "Due Mar 4, 2024\n",
                       "Due March 5th, 2024\n", "Due the 6th of March 2024\n", "Due 7.3.2024\n"]  # fmt: skip


@pytest.mark.parametrize(
    ("day", "nth"),
    [(1, "1st"), (2, "2nd"), (3, "3rd"), (4, "4th"), (11, "11th"), (12, "12th"), (13, "13th"), (21, "21st"),
     (22, "22nd"), (23, "23rd"), (30, "30th"), (31, "31st")],
)  # fmt: skip
def test_days_are_counted_as_in_english(day, nth):
    assert make_row(date(2024, 1, day), "{nth}", "{}")["prompt"] == f"{nth}\n"


# The score


def test_exact_match_counts_the_very_text_and_nothing_else():
    rows = [{"prompt": "", "completion": "2024-03-05"}] * 4
    assert exact_match(["2024-03-05"] * 4, rows) == 1
    wrong = ["2024-03-06", " 2024-03-05", "2024-03-05\n", "", "2024-03-05 and so on", "2024-05-03", "2024-3-5"]
    for answer in wrong:
        assert exact_match(["2024-03-05"] * 3 + [answer], rows) == 0.75
    with pytest.raises(ValueError):
        exact_match(["2024-03-05"], rows)


def test_answers_side_by_side_are_those_of_one_after_the_other(rows):
    """Of prompts of many lengths; in float64, where no rounding decides."""
    model, tokenizer = Llama.from_pretrained(BASE, dtype=np.float64), load_tokenizer(BASE)
    prompts = [row["prompt"] for row in rows[1][:10]]
    assert len(set(map(len, prompts))) > 3
    one_by_one = []
    for prompt in prompts:
        ids = [tokenizer.begin_id, *tokenizer.encode(prompt).tolist()]
        new = list(generate(model, ids, max_new_tokens=demo_task.LONGEST, temperature=0, stop=(tokenizer.end_id,)))
        one_by_one.append(tokenizer.decode([token for token in new if token != tokenizer.end_id]))
    assert answers(model, tokenizer, prompts) == one_by_one
    assert answers(model, tokenizer, prompts[::-1]) == one_by_one[::-1]


class Scripted:
    """A model that writes what it is told to: the next token depends on the last one alone."""

    def __init__(self, model: Llama, following: dict[int, int]) -> None:
        self.config, self.following = model.config, following

    def hidden(self, ids, cache):
        return np.array([[self.following.get(int(t), 0) for t in row] for row in ids])

    def logits(self, following):
        class Logits:
            data = np.eye(self.config.vocab_size)[following]

        return Logits


def test_an_answer_ends_before_the_end_token_whatever_others_beside_it_do():
    model, tokenizer = Llama.from_pretrained(BASE), load_tokenizer(BASE)
    end = tokenizer.end_id
    scripted = Scripted(model, {ord("a"): ord("b"), ord("b"): end, end: ord("x"), ord("x"): ord("x"), ord("q"): end})
    assert answers(scripted, tokenizer, ["a", "x", "q", "aa"]) == ["b", "x" * demo_task.LONGEST, "", "b"]


# The base


def test_the_base_is_small_files_that_load_and_their_recipe():
    files = {file.name: file.stat().st_size for file in BASE.iterdir()}
    assert max(files.values()) < SHARD + 5000 and sum(files.values()) < 3_000_000
    assert {"config.json", "model.safetensors.index.json", "tokenizer.json", "train.toml"} <= set(files)
    recipe = read_config(BASE / "train.toml")
    tokenizer = load_tokenizer(BASE)
    assert recipe.llama(tokenizer.vocab_size, tokenizer.end_id) == read_shape(BASE)


def test_the_base_has_learned_python():
    model, tokenizer = Llama.from_pretrained(BASE, storage="stored"), load_tokenizer(BASE)
    text = "    def __init__(self, name, value=None):\n        self.name = name\n        if value is not None:\n"
    ids = np.array([[tokenizer.begin_id, *tokenizer.encode(text).tolist()]])
    nats = model.loss(ids[:, :-1], ids[:, 1:]).item()
    assert nats / np.log(2) < 1.5, "bits per byte; of bytes that say nothing of each other: 8"


@pytest.mark.tier3
def test_the_base_can_be_trained_again(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(2000)))
    new = tmp_path / "base"
    assert train_base.main([str(new), "--training.steps", "2", "--data.source", str(tmp_path / "text.txt")]) == 0
    assert {file.name for file in new.iterdir()} == {file.name for file in BASE.iterdir()} - {"train.toml"}
    assert read_shape(new) == read_shape(BASE)
    assert Llama.from_pretrained(new, storage="stored").model.layers[0].mlp.up_proj.weight.kind == "bfloat16"


# The demonstrations


def test_a_folder_that_holds_something_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit) as error:
        finetune_lora.main(["--out", str(tmp_path)])
    assert error.value.code == 2 and "is not an empty folder" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_place_that_cannot_be_written_to_is_told_in_one_line(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    assert finetune_lora.main(["--out", str(tmp_path / "thesis.txt" / "run")]) == 1
    errors = capsys.readouterr().err
    assert "thesis.txt" in errors and errors.count("\n") == 1


def test_options_are_those_of_entrenar_finetune_and_its_refusal_is_the_exit_code(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("entrenar.examples.demonstration.write_rows", few)
    outcome = demonstrate("finetune_lora", "bfloat16", ["--out", str(tmp_path / "x"), "--training.stepz", "3"])
    assert outcome.code == 2 and outcome.before == 0
    assert "--training.stepz 3: no such option; did you mean training.steps?" in capsys.readouterr().err


def few(folder: Path) -> list[dict[str, str]]:
    return write_rows(folder, train=40, held_out=6)


SHORT = """
import sys
from entrenar.examples import demonstration
from test_finetune_demo import few
demonstration.write_rows = few
sys.exit(demonstration.demonstrate("finetune_qlora", "nf4", sys.argv[1:]).code)
"""


def adapter_of(out: Path, threads: int) -> str:
    """SHA-256 of the adapter after a few steps with so many threads."""
    paths = os.pathsep.join([SAME_PACKAGE["PYTHONPATH"], str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", SHORT, "--out", str(out), "--training.steps", "3"], capture_output=True, text=True,
        env=SAME_PACKAGE | {"ENTRENAR_NUM_THREADS": str(threads), "PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return hashlib.sha256((out / "run" / "checkpoint" / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.mark.tier3
def test_a_demonstration_gives_the_same_bits_each_time_on_any_number_of_threads(tmp_path):
    assert len({adapter_of(tmp_path / "a", 1), adapter_of(tmp_path / "b", 2), adapter_of(tmp_path / "c", 2)}) == 1


WHOLE = """
import dataclasses, json, sys, time
from entrenar.examples.demonstration import demonstrate
name, storage, out = sys.argv[1:]
outcome = demonstrate(name, storage, ["--out", out])
print(json.dumps(dataclasses.asdict(outcome) | {"seconds": time.process_time()}))
"""


@pytest.mark.tier3
def test_lora_and_qlora_learn_what_the_base_cannot_do_equally_well(tmp_path, capsys):
    """At the same time, each on a thread of its own: the same bits come out as on two threads one after the other."""
    storages, started, found = {"finetune_lora": "bfloat16", "finetune_qlora": "nf4"}, {}, {}
    for name, storage in storages.items():
        with open(tmp_path / f"{name}.txt", "w") as file:
            started[name] = subprocess.Popen([sys.executable, "-c", WHOLE, name, storage, str(tmp_path / name)],
                                             stdout=file, env=SAME_PACKAGE | {"ENTRENAR_NUM_THREADS": "1"})  # fmt: skip
    for name, process in started.items():
        assert process.wait() == 0
        output, _, last = (tmp_path / f"{name}.txt").read_text().rstrip().rpartition("\n")
        told = json.loads(last)
        seconds, found[name] = told.pop("seconds"), Outcome(**told)
        assert found[name].code == 0
        assert f"exact match on {HELD_OUT} held-out lines: before {found[name].before:.1%}, after" in output
        with capsys.disabled():
            print(f"\n{name}: {found[name].after:.1%} after {seconds:.0f} s of processor time")
    lora, qlora = found.values()
    assert max(lora.before, qlora.before) < 0.05 and min(lora.after, qlora.after) > 0.95, found
    assert round(abs(lora.after - qlora.after), 6) <= 0.01, found
