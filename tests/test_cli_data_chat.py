"""`entrenar data chat`: the examples of fine-tuning data, what is trained of them, and the facts."""

import json
import re

import chat_templates as chats
import fine_runs
import pytest
import tokenizer_kinds as kinds

from entrenar.cli import main
from entrenar.training import finetune
from entrenar.training.chat_task import ChatTask
from entrenar.training.config import FineTuning, read_config


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    (tmp_path / "model").mkdir()
    kinds.plain_bytes(tmp_path / "model")
    rows = [{"messages": chats.said(("user", "a[b]|"), ("assistant", "ok\n"))}, {"prompt": "1", "completion": "é"}]
    rows += [{"prompt": "2", "completion": "x"}, {"prompt": "3", "completion": "x"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def shown(capsys, here, *words):
    code = main(["data", "chat", str(here / "a.jsonl"), "--tokenizer", str(here / "model"), *words])
    said = capsys.readouterr()
    return code, said.out.splitlines(), said.err


def test_examples_are_shown_token_by_token_and_what_is_not_trained_in_brackets(capsys, here):
    code, lines, _ = shown(capsys, here, "-n", "9")
    at = next(i for i, line in enumerate(lines) if "a.jsonl line 1: " in line)
    assert code == 0 and re.fullmatch(r"# training example \d of \d: .*: 5 trained, 24 ignored", lines[at])
    assert lines[at + 1].startswith("[<\\|endoftext\\|>]|[U]|[s]|[e]|[r]|[:]|[ ]|[a]|[\\[]|[b]|[\\]]|[\\|]|[\\n]|[A]|")
    assert lines[at + 1].endswith("|[t]|[:]| |o|k|\\n|<\\|endoftext\\|>|[\\n]")
    facts = dict(line.split("  ", 1) for line in lines if "  " in line)
    assert facts["rows"].strip() == "1 of messages, 3 of prompt and completion"
    assert facts["template"].strip() == "entrenar's own" and "trained" in facts["training"]


def test_any_example_of_either_side_can_be_shown(capsys, here):
    _, lines, _ = shown(capsys, here, "--first", "2", "-n", "5")
    assert sum(line.startswith("# ") for line in lines) == 2
    _, lines, _ = shown(capsys, here, "--held-out")
    assert lines[0].startswith("# held-out example 1 of ")


def test_what_is_trained_and_the_template_can_be_chosen(capsys, here):
    (here / "mine.jinja").write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    _, lines, _ = shown(capsys, here, "--template", str(here / "mine.jinja"), "--train-on", "all", "--max-length", "9")
    assert "[<]|a|\\[|b|\\]|\\||>|<|o" in lines
    assert any(line.startswith("cut off") and "1 of the rows, behind 9 tokens" in line for line in lines)


def test_bad_rows_are_told_or_left_out(capsys, here):
    with open(here / "a.jsonl", "a") as file:
        file.write('{"nope": 1}\n')
    code, _, said = shown(capsys, here)
    assert code == 2 and 'line 5 has only the keys "nope"' in said
    code, lines, _ = shown(capsys, here, "--skip-bad")
    assert code == 0 and any(line.startswith("left out") and "1 of the rows" in line for line in lines)


@pytest.mark.parametrize("words, message", [
    (["--first", "0"], "--first 0: wanted 1 or more"),
    (["-n", "0"], "-n 0: wanted 1 or more"),
    (["--first", "99"], "--first 99: there are"),
    (["--max-length", "1"], "wanted 2 or more"),
    (["--train-on", "user"], "wanted one of assistant, completion, all"),
    (["--template", "nowhere"], "there is no such file"),
    (["--data.vocab_size", "300"], "no such option here"),
])  # fmt: skip
def test_what_cannot_be_shown_ends_with_2_and_a_sentence(capsys, here, words, message):
    code, _, said = shown(capsys, here, *words)
    assert code == 2 and message in said


# -- data show, of a run of finetune


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The words that describe a run, in a folder with its base and its rows."""
    monkeypatch.chdir(tmp_path)
    fine_runs.make_base(tmp_path / "base")
    fine_runs.write_rows(tmp_path / "chats.jsonl")
    return ["--base.model", "base", "--data.source", "chats.jsonl", "--training.batch_size", "2"]


def test_data_show_prints_the_batches_a_fine_tuning_run_takes(capsys, run):
    assert main(["data", "show", *run, "--batch", "2"]) == 0
    headings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("# batch")]
    config = read_config(None, list(zip((w[2:] for w in run[::2]), run[1::2], strict=True)), FineTuning).settled
    quiet = type("Quiet", (), {"doing": print, "note": print})()
    batches = ChatTask.check(config, data := finetune.examples(config, None, quiet))
    batches.next(), batches.next()
    wanted = [data.train.place(number) for row in batches.taken for number in row]
    assert len(headings) == len(wanted)
    for line, place in zip(headings, wanted, strict=True):
        assert line.startswith("# batch 2, row ") and f": {place}: " in line


def test_data_show_of_what_is_held_out_and_what_cannot_be(capsys, run):
    assert main(["data", "show", *run, "--held-out", "-n", "1"]) == 0
    assert sum(line.startswith("# batch 1, held out: ") for line in capsys.readouterr().out.splitlines()) == 1
    assert main(["data", "show", *run, "-n", "0"]) == 2
    assert "-n 0: wanted 1 or more" in capsys.readouterr().err
    assert main(["data", "prepare", *run]) == 2
    assert "reads its rows anew" in capsys.readouterr().err
