"""`entrenar chat` in a pipe: one prompt, many, or a conversation line by line; words that cannot be meant."""

import importlib
import io
import json
import re
import sys

import numpy as np
import pytest
import tuned
from tuned import conversation, said

from entrenar import cli
from entrenar.cli import chat as verb
from entrenar.cli.models import Opened, open_model
from entrenar.cli.parser import verb_parser
from entrenar.data import ByteTokenizer

GREEDY = ("--temperature", "0", "--max-tokens", "12")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """base, run (of an adapter for it)"""
    place = tmp_path_factory.mktemp("made")
    tuned.base(place / "base")
    tuned.run(place / "run", place / "base")
    return place


@pytest.fixture
def command(made, capsys, monkeypatch):
    """`entrenar chat`: (exit code, standard output, standard error)."""

    def call(*words, where="run", typed=None):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((typed or "").encode())))
        code = cli.main(["chat", str(made / where), *map(str, words)])
        return code, *capsys.readouterr()

    return call


# One prompt, or many


def test_a_prompt_is_answered_and_nothing_else_is_written(command, made):
    code, out, err = command("--prompt", "hello", *GREEDY)
    assert (code, err) == (0, "") and out == said(conversation(made / "run"), "hello") + "\n"
    assert command("--prompt", "-", *GREEDY, typed="hello")[1] == out
    assert command("--prompt", "hello", "--adapter", "off", *GREEDY)[1] == said(
        conversation(made / "base"), "hello"
    ) + "\n"  # fmt: skip


def test_sampled_answers_depend_on_the_seed_alone(command):
    words = ("--prompt", "hello", "--temperature", "1.5", "--max-tokens", "12", "--seed")
    one, again, other = (command(*words, seed)[1] for seed in (1, 1, 2))
    assert one == again != other


def test_base_and_tuned_answer_the_same_prompt_one_after_the_other_in_a_pipe(command, made):
    code, out, _ = command("--compare", "--prompt", "hello", *GREEDY)
    alone = said(conversation(made / "base"), "hello")
    assert (code, out) == (0, f"-- base\n{alone}\n-- run\n{said(conversation(made / 'run'), 'hello')}\n")


def test_a_file_of_prompts_becomes_a_file_of_answers(command, made, tmp_path):
    rows = tuned.jsonl(
        tmp_path / "ask.jsonl",
        {"prompt": "hello"},
        {"prompt": "hello", "completion": "good day"},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"},
                      {"role": "assistant", "content": "yes"}]},
        {"instruction": "hello", "output": "x"},
    )  # fmt: skip
    code, out, _ = command("--prompts", rows, "--compare", "--json", *GREEDY)
    told = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [set(row) for row in told] == [
        {"prompt", "base", "run"}, {"prompt", "base", "run", "wanted"}, {"prompt", "base", "run", "wanted"},
        {"prompt", "base", "run", "wanted"},
    ]  # fmt: skip
    assert told[0]["base"] == told[1]["base"] == told[3]["base"] != told[0]["run"]
    assert told[0]["run"] == said(conversation(made / "run"), "hello") and told[1]["wanted"] == "good day"
    talk = conversation(made / "run")
    talk.system = "s"
    assert told[2]["run"] == said(talk, "hi") and told[2]["prompt"] == "hi"
    blocks = command("--prompts", rows, *GREEDY)[1].split("\n---\n")
    assert len(blocks) == 4 and blocks[0].strip("\n") == told[0]["run"].strip("\n")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "ask.jsonl line 2"),
        ('{"text": "x"}', 'ask.jsonl line 2: asks nothing; wanted "prompt" or "messages"'),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', 'line 2: has no message of the role "user"'),
        ('{"messages": [{"role": "boss", "content": "x"}]}', "line 2: has 'boss' as"),
        ("[]", "line 2: is a list, wanted an object"),
    ],
)
def test_a_row_that_asks_nothing_is_refused_before_the_model_is_read(command, tmp_path, monkeypatch, row, message):
    (tmp_path / "ask.jsonl").write_text(f'{{"prompt": "x"}}\n{row}\n')
    monkeypatch.setattr("entrenar.cli.models.open_model", lambda *words, **settings: pytest.fail("was read"))
    code, out, err = command("--prompts", tmp_path / "ask.jsonl")
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--prompt", "a", "--prompts", "b"), "--prompt and --prompts: one of them is wanted"),
        (("--prompt", " "), "--prompt: is empty"),
        (("--prompts", "none.jsonl"), "--prompts none.jsonl: there is no such file"),
        (("--max-tokens", "0"), "--max-tokens 0: wanted at least 1"),
        (("--temperature", "-1"), "temperature = -1.0"),
        (("--promt", "x"), "--promt: no such option; did you mean --prompt?"),
        (("--template", "none.jinja", "--prompt", "x"), "chat template 'none.jinja': there is no such file"),
        (("--adapter", "nowhere", "--prompt", "x"), "nowhere: does not exist, looked from"),
    ],
)
def test_words_that_cannot_be_meant_are_refused_in_one_line(command, words, message):
    code, out, err = command(*words)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1


def test_without_an_adapter_there_is_nothing_to_compare(command):
    code, _, err = command("--compare", "--prompt", "x", where="base")
    assert code == 2 and "there is no adapter to compare the model with; give one with --adapter FOLDER" in err


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(command):
    code, _, err = command("--prompt", "x" * 400)
    assert code == 2 and "tokens, and this model reads at most 256" in err


def test_the_speed_is_told_on_stderr_when_asked_for(command):
    code, _, err = command("--tokens-per-second", *GREEDY, typed="hello\nagain\n")
    first, second = err.splitlines()
    assert code == 0 and re.match(r"prompt \d+ tokens, .*; written 12 tokens, .*/s; ended by --max-tokens$", first)
    assert re.search(r"prompt \d+ tokens, [\d,]+/s \(\d+ more were read before\)", second)


def test_weights_that_are_no_numbers_end_with_2(made, monkeypatch, capsys):
    opened = open_model(made / "base")
    opened.model.model.norm.weight.data[:] = np.nan
    broken = Opened(opened.model, ByteTokenizer(), made / "base", frozenset({256}), 64)
    monkeypatch.setattr("entrenar.cli.models.open_model", lambda path, **settings: broken)
    assert cli.main(["chat", "there", "--prompt", "x"]) == 2
    assert "the model's weights hold NaN or infinity" in capsys.readouterr().err


# Lines from a pipe


def test_every_line_of_a_pipe_is_a_prompt_of_one_conversation(command, made):
    talk = conversation(made / "run")
    wanted = "".join(said(talk, prompt) + "\n" for prompt in ("hello", "and now\nthis", "/usr/bin"))
    code, out, err = command(*GREEDY, typed="hello\n\nand now\\\nthis\n//usr/bin\n")
    assert (code, out, err) == (0, wanted, "")


def test_lines_may_be_answered_as_json(command):
    code, out, _ = command(*GREEDY, "--json", typed="hello\nagain")
    assert code == 0 and [json.loads(line)["prompt"] for line in out.splitlines()] == ["hello", "again"]


def test_commands_work_in_a_pipe_too_and_a_wrong_one_ends_it(command, made, tmp_path):
    alone = conversation(made / "base")
    typed = f"/adapter off\nhello\n/save {tmp_path}/row.jsonl\n/exit\nnever\n"
    code, out, err = command(*GREEDY, typed=typed)
    assert (code, out) == (0, said(alone, "hello") + "\n") and "the model alone answers now" in err
    row = json.loads((tmp_path / "row.jsonl").read_text())
    assert row == {"messages": alone.messages}
    code, _, err = command(*GREEDY, typed="/adaptr off\nhello\n")
    assert code == 2 and "/adaptr: no such command; did you mean /adapter?; /help lists them" in err


def test_what_is_saved_is_data_for_fine_tuning(command, tmp_path):
    from entrenar.data.chat import read_examples

    file = tmp_path / "rows.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}')  # no \n
    typed = f"hello\n/save {file}\n/reset\nother\nmore\n/save {file}\n"
    assert command(*GREEDY, "--system", "be brief", typed=typed)[0] == 0
    assert len(file.read_text().splitlines()) == 3
    data = read_examples(str(file), ByteTokenizer(), held_out=0.4)
    assert data.facts.shapes == {"messages": 3}


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("/save", "/save FILE.jsonl: the file's name is missing"),
        ("/save x.jsonl", "/save: nothing was said yet"),
        ("hello\n/save .", ".: is no file"),
        ("/adapter tow", "/adapter tow: there is none of this name; wanted one of run, off"),
    ],
)
def test_commands_that_cannot_be_done_say_why(command, typed, message):
    code, _, err = command(*GREEDY, typed=typed)
    assert code == 2 and message in err


def test_bytes_that_are_no_text_are_refused_with_their_line(made, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"/help\nna\xefve\n")))
    assert cli.main(["chat", str(made / "base"), *GREEDY]) == 2
    assert "standard input, line 2: is not UTF-8: byte 2" in capsys.readouterr().err


def test_ctrl_c_ends_a_pipe_and_keeps_what_was_written(made, monkeypatch, capsys):
    def script(model, ids, **settings):
        yield from b" half"
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("entrenar.llama.generate"), "generate", script)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello\nagain\n")))
    assert cli.main(["chat", str(made / "base")]) == 130
    assert capsys.readouterr().out.strip() == "half"
    assert cli.main(["chat", str(made / "base"), "--prompt", "x"]) == 130


def test_tools_of_a_row_reach_the_template(command, made, tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text("{% if tools %}{{ tools[0].name }}{% endif %}" + tuned.CHATML)
    message = {"messages": [{"role": "user", "content": "hello"}]}
    rows = tuned.jsonl(tmp_path / "a.jsonl", message, {**message, "tools": [{"name": "clock"}]}, message)
    out = command("--prompts", rows, "--template", template, "--json", *GREEDY)[1]
    one, tools, again = (json.loads(line)["answer"] for line in out.splitlines())
    assert one == again != tools


def test_words_that_are_no_text_are_refused(command):
    code, _, err = command("--system", "caf\udce9", "--prompt", "x")
    assert code == 2 and "--system: is not UTF-8" in err
    code, _, err = command("--prompt", "caf\udce9")
    assert code == 2 and "is not UTF-8" in err


def test_the_help_fits_a_screen():
    lines = verb_parser(verb.NAME, verb).format_help().splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
