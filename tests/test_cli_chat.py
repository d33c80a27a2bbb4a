"""`entrenar chat`: what the model reads of a conversation, when an answer ends, commands, columns, pipes, terminals."""

import io
import json
import re
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import tuned
from hypothesis import given
from hypothesis import strategies as st

from entrenar import cli
from entrenar.cli import chat as verb
from entrenar.cli.conversation import ContextFull, Conversation, Manner, encoded, turn_ends
from entrenar.cli.models import Opened, open_model
from entrenar.cli.side_by_side import NARROWEST, Column, letters, show, widths, wrapped
from entrenar.data import ByteTokenizer
from entrenar.data.chat import ChatTemplate, load_template
from entrenar.llama.generate import Sampling, generate

GREEDY = ("--temperature", "0", "--max-tokens", "12")
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|h|>{{ m.role }}<|/h|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|h|>assistant<|/h|>\n\n{% endif %}"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """base, run (of an adapter), other (an adapter), chatml (a base with a template)"""
    place = tmp_path_factory.mktemp("made")
    tuned.base(place / "base")
    tuned.base(place / "chatml", template=tuned.CHATML)
    tuned.run(place / "run", place / "base")
    tuned.adapter(place / "other", place / "base", seed=5)
    return place


@pytest.fixture
def command(made, capsys, monkeypatch):
    """`entrenar chat`: (exit code, standard output, standard error)."""

    def call(*words, where="run", typed=None):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((typed or "").encode())))
        code = cli.main(["chat", str(made / where), *map(str, words)])
        return code, *capsys.readouterr()

    return call


def conversation(folder, *, max_tokens=12, **settings):
    opened = open_model(folder, **settings)
    template = load_template(opened.tokenizer)
    return Conversation(opened, template, Manner(Sampling(temperature=0), max_tokens), by=opened.turns[0])


def said(talk, prompt):
    """Ask, keep the answer, and give it back."""
    answer = talk.ask(prompt)
    text = "".join(answer)
    talk.keep(answer)
    return text


# What is read


def test_an_answer_follows_from_the_whole_conversation_as_the_template_writes_it(made):
    talk = conversation(made / "chatml")
    first, second = said(talk, "hello"), said(talk, "again")
    opened = open_model(made / "chatml")
    text = f"<|im_start|>user\nhello<|endoftext|>\n<|im_start|>assistant\n{first}<|endoftext|>\n"
    text += "<|im_start|>user\nagain<|endoftext|>\n<|im_start|>assistant\n"
    ids = encoded(text, opened.tokenizer)
    wanted = list(generate(opened.model, ids, max_new_tokens=12, temperature=0, stop=opened.stop, use_cache=False))
    assert second == ByteTokenizer().decode(i for i in wanted if i not in opened.stop)
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2


def scripted(talk, monkeypatch, text, end=256):
    """Let the model write this text whatever it reads, and really read all of it."""
    import importlib

    module = importlib.import_module("entrenar.llama.generate")

    def script(model, ids, *, max_new_tokens, reader, **settings):
        tokens = [*text.encode(), *([end] if end is not None else [])][:max_new_tokens]
        for number in range(len(tokens)):
            reader.last_logits([*ids, *tokens[:number]])
            yield tokens[number]

    monkeypatch.setattr(module, "generate", script)


@pytest.mark.parametrize("folder", ["base", "chatml"])
def test_of_a_conversation_only_what_is_new_is_read(made, monkeypatch, folder):
    talk = conversation(made / folder, max_tokens=100)
    read = []
    for number in range(3):
        scripted(talk, monkeypatch, f"answer {number}" if folder == "chatml" else f" answer {number}")
        answer = talk.ask(f"question {number}")
        before = talk.readers[None].read if number else 0
        assert "".join(answer) == f"answer {number}"
        talk.keep(answer)
        read.append((talk.readers[None].read - before, len(answer.writing.ids)))
    written = len("answer 0") + (folder == "base")
    ids = [whole for _, whole in read]
    assert read[0][0] == ids[0] + written  # each token of the answer but the end
    for number in (1, 2):
        question = ids[number] - ids[number - 1] - written  # and what the template puts around it and the answer before
        assert read[number][0] == question + written < ids[number] / 1.5, number


def test_an_answer_that_the_template_writes_another_way_is_read_again(made, monkeypatch):
    template = ChatTemplate({"default": LLAMA3})
    opened = open_model(made / "base")
    talk = Conversation(opened, template, Manner(Sampling(temperature=0), 50))
    scripted(talk, monkeypatch, "\n  spaced  ")
    said(talk, "hello")
    assert talk.messages[-1]["content"] == "spaced"
    answer = talk.ask("again")
    text = template.render([*talk.messages, {"role": "user", "content": "again"}], add_generation_prompt=True).text
    assert answer.writing.ids == encoded(text, opened.tokenizer)


def test_the_space_that_a_template_puts_before_an_answer_is_not_the_answers(made, monkeypatch):
    talk = conversation(made / "base", max_tokens=50)
    scripted(talk, monkeypatch, "  4 is it ")
    assert said(talk, "2 + 2?") == "4 is it "
    assert talk.messages[-1]["content"] == " 4 is it "  # of two spaces one is the template's


def test_every_adapter_keeps_what_it_has_read_itself(made):
    talk = conversation(made / "base", adapters=[str(made / "run"), str(made / "other"), "off"])
    answers = {}
    for _ in range(2):
        for by in (None, "run", "other"):
            talk.by = by
            talk.reset()
            answers.setdefault(by, []).append(said(talk, "hello"))
    assert len({texts[0] for texts in answers.values()}) == 3, "the adapters change what is said"
    assert all(one == two for one, two in answers.values())
    for by in (None, "run", "other"):  # the second time the prompt's last token alone was read again for its logits
        alone = conversation(made / "base", adapters=[str(made / "run"), str(made / "other"), "off"])
        alone.by = by
        assert said(alone, "hello") == answers[by][0]
        assert talk.readers[by].read <= 2 * alone.readers[by].read - 10


def test_answers_side_by_side_are_what_each_says_alone(made):
    talk = conversation(made / "run")
    messages = talk.with_prompt("hello")
    alone = {by: "".join(talk.answer(messages, by)) for by in (None, "run")}
    together = conversation(made / "run")
    pair = [(by, iter(together.answer(messages, by))) for by in (None, "run")]
    texts = {None: "", "run": ""}
    for _ in range(30):
        for by, pieces in pair:
            texts[by] += next(pieces, "")
    assert texts == alone and alone[None] != alone["run"]


# How an answer ends


def ends(template):
    special = {"<|endoftext|>": 256, "<|eot|>": 7, "<|h|>": 8, "<|im_start|>": 5, "<|im_end|>": 9}
    tokenizer = SimpleNamespace(special=special)
    return turn_ends(ChatTemplate({"default": template}, {"eos_token": "<|endoftext|>", "bos_token": ""}), tokenizer)


def test_the_token_behind_an_answer_is_seen_in_the_template():
    assert ends(tuned.CHATML) == ({256}, ())
    assert ends(tuned.CHATML.replace("<|endoftext|>", "<|im_end|>")) == ({9}, ())
    assert ends(LLAMA3) == ({7}, ())


def test_a_template_of_text_alone_ends_an_answer_where_the_next_question_would_begin(made):
    plain = "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
    assert ends(plain) == (set(), ("\n\n### user:",))
    opened = open_model(made / "base")
    assert turn_ends(load_template(opened.tokenizer), opened.tokenizer) == ({256}, ("\nUser:",))


def test_a_template_that_cannot_be_asked_ends_nothing():
    assert ends("{{ raise_exception('no') }}") == (frozenset(), ())


def test_a_model_that_was_never_tuned_stops_before_it_asks_itself(made, monkeypatch):
    talk = conversation(made / "base", max_tokens=100)
    scripted(talk, monkeypatch, " Four.\nUser: and 3 + 3?\nAssistant: six", end=None)
    assert said(talk, "2 + 2?") == "Four."


def test_a_full_context_is_told_and_the_conversation_can_go_on_anew(made):
    talk = conversation(made / "base")
    said(talk, "x" * 180)
    before = list(talk.messages)
    with pytest.raises(ContextFull, match=r"has 3\d\d tokens, and this model reads at most 256"):
        talk.ask("y" * 80)
    assert talk.messages == before
    talk.reset()
    assert said(talk, "y" * 80) and len(talk.messages) == 2


def test_an_answer_that_fills_the_context_says_so(made, monkeypatch):
    talk = conversation(made / "base", max_tokens=500)
    talk.ends = frozenset()
    talk.stop = ()
    answer = talk.ask("x" * 200)
    "".join(answer)
    assert answer.writing.ended == "the full context of 256 tokens"


def test_the_system_text_comes_first_stays_and_goes(made):
    talk = conversation(made / "chatml")
    talk.system = "be brief"
    said(talk, "hello")
    assert talk.messages[0] == {"role": "system", "content": "be brief"} and len(talk.messages) == 3
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "be brief"}]
    talk.system = ""
    assert talk.messages == []


def test_a_system_text_that_the_template_refuses_changes_nothing(made):
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + tuned.CHATML
    talk = Conversation(open_model(made / "base"), ChatTemplate({"default": refuses}), Manner(Sampling()))
    with pytest.raises(ValueError, match="no system"):
        talk.system = "be brief"
    assert talk.messages == [] and talk.system == ""


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
    import importlib

    def script(model, ids, **settings):
        yield from b" half"
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("entrenar.llama.generate"), "generate", script)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello\nagain\n")))
    assert cli.main(["chat", str(made / "base")]) == 130
    assert capsys.readouterr().out.strip() == "half"
    assert cli.main(["chat", str(made / "base"), "--prompt", "x"]) == 130


# Side by side


def test_columns_show_both_texts_whole_row_by_row():
    out = []
    left, right = "one two three four five six seven", "a\nlong second answer that takes more rows than the first"
    show([("base", left.split(" ")), ("tuned", [right])], 12, out.append)
    assert out[0] == "base         | tuned\n" and out[1] == "----         | -----\n"
    cells = [line.rstrip("\n").partition(" | ") for line in out[2:]]
    assert "".join(cell[0].strip() for cell in cells) == left.replace(" ", "")
    assert " ".join(cell[2].strip() for cell in cells) == right.replace("\n", " ")
    assert all(len(line) <= 12 + 3 + 12 + 1 for line in out)


def test_a_row_is_shown_as_soon_as_both_columns_have_it():
    seen, log = [], []

    def pieces(name, count):
        for number in range(count):
            log.append((name, len(seen)))
            yield f"{name}{number}\n"

    show([("a", pieces("a", 6)), ("b", pieces("b", 6))], 10, seen.append)
    assert max(rows for _, rows in log) > 5, "rows came while the texts were written"
    assert [line.split() for line in seen[2:8]] == [[f"a{i}", "|", f"b{i}"] for i in range(6)]


@given(st.text("ab  \n\t漢é", max_size=60), st.integers(2, 9))
def test_wrapping_loses_nothing_and_changes_only_the_last_line_when_more_comes(text, width):
    lines = wrapped(text, width)
    assert all(letters(line) <= width for line in lines)
    squeezed = re.sub(r"\s", "", text)
    assert re.sub(r"\s", "", "".join(lines)) == squeezed
    for cut in range(len(text)):
        if "\t" not in text:
            before = wrapped(text[:cut], width)
            assert lines[: len(before) - 1] == before[:-1]


def test_wrapping_breaks_at_spaces_and_keeps_an_indent():
    assert wrapped("    x = one two", 9) == ["    x =", "one two"]
    assert wrapped("averylongword", 5) == ["avery", "longw", "ord"]
    assert wrapped("漢字漢字", 4) == ["漢字", "漢字"] and wrapped("", 4) == [""]


def test_columns_need_a_wide_terminal():
    assert widths(2, 2 * NARROWEST + 4) == NARROWEST and widths(2, 2 * NARROWEST + 3) == 0
    assert widths(3, 120) == 37


def test_a_column_that_ended_has_every_row():
    column = Column("x", iter([]), 10)
    assert not column.has(0)
    column.go_on()
    assert column.has(99) and column.row(99) == ""


# At a terminal


@pytest.fixture
def terminal(made):
    opened = []

    def open_it(*words, where="run", **settings):
        opened.append(tuned.Terminal("chat", made / where, *words, **settings))
        return opened[-1]

    yield open_it
    for one in opened:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()


def test_a_conversation_at_a_terminal(terminal, made, tmp_path):
    seat = terminal("--adapter", "run", "--adapter", made / "other", *GREEDY)
    told = seat.until("\n> ")
    assert "base, adapters run, other; run answers; chat template: entrenar's own" in told and "/help" in told
    talk = conversation(made / "run", adapters=["run", str(made / "other")])
    assert "(cut after 12 tokens" in seat.say("hello")
    assert "other answers now" in seat.say("/adapter other")
    assert "there is none of this name; did you mean other?" in seat.say("/adapter othr")
    assert "the model alone answers now" in seat.say("/adapter off")
    assert "in use: base; adapters: run, other" in seat.say("/adapter")
    assert "no such command; did you mean /adapter?" in seat.say("/adaptr")
    assert all(name in seat.say("/help") for name in ("/reset",))
    assert "the system's text is what you gave" in seat.say("/system be brief")
    assert "the system's text is: be brief" in seat.say("/system")
    assert "is a row of" in seat.say(f"/save {tmp_path / 'a.jsonl'}")
    assert "a new conversation, with the same system text" in seat.say("/reset")
    assert "nothing was said yet" in seat.say(f"/save {tmp_path / 'b.jsonl'}")
    row = json.loads((tmp_path / "a.jsonl").read_text())["messages"]
    assert [m["role"] for m in row] == ["system", "user", "assistant"]
    assert row[2]["content"].strip() == said(talk, "hello").strip()
    seat.type("/exit\n")
    assert seat.end() == 0


def test_base_and_tuned_stand_in_columns_on_a_wide_terminal_and_below_each_other_on_a_narrow(terminal):
    wide = terminal(*GREEDY, columns=100)
    wide.until("\n> ")
    told = wide.say("/compare hello")
    assert re.search(r"\nbase +\| run\n-+ +\| ---\n", told)
    assert "base and run answer from now on, side by side" in wide.say("/compare")
    assert "base  " in wide.say("hello") and "run answers alone" in wide.say("/compare")
    wide.type("\x04")
    assert wide.end() == 0
    narrow = terminal(*GREEDY, columns=60)
    narrow.until("\n> ")
    told = narrow.say("/compare hello")
    assert "-- base\n" in told and "\n-- run\n" in told and " | " not in told
    narrow.type("\x04")
    assert narrow.end() == 0


SLOW = """
import importlib, time
module = importlib.import_module("entrenar.llama.generate")
def script(model, ids, *, reader, **settings):
    for number in range(1000):
        time.sleep(0.02)
        yield 97
module.generate = script
"""


def test_ctrl_c_stops_the_answer_and_not_the_program_and_ctrl_d_ends_it(terminal, tmp_path):
    seat = terminal(before=SLOW)
    seat.until("\n> ")
    seat.type("hello\n")
    seat.until("aaaa")
    seat.type("\x03")
    seat.until("\n> ")
    assert "is a row of" in seat.say(f"/save {tmp_path / 'a.jsonl'}"), "the answer is kept as far as it came"
    content = json.loads((tmp_path / "a.jsonl").read_text())["messages"][1]["content"]
    assert 4 <= len(content) < 1000 and set(content) == {"a"}
    seat.type("half a line")
    seat.until("half a line")
    time.sleep(0.3)  # Python's readline, woken by a letter, misses a signal until it waits again
    seat.type("\x03")
    assert "Ctrl-D or /exit ends the conversation" in seat.until("\n> ")
    seat.type("\x04")
    assert seat.end() == 0


def test_a_question_that_is_stopped_before_the_answer_begins_is_forgotten(terminal, tmp_path):
    waits = "print('[reading]', flush=True)\n    time.sleep(30)\n    for number in"
    seat = terminal(before=SLOW.replace("for number in", waits))
    seat.until("\n> ")
    seat.type("hello\n")
    seat.until("[reading]\n")
    seat.type("\x03")
    assert "the question is forgotten" in seat.until("\n> ")
    assert "nothing was said yet" in seat.say(f"/save {tmp_path / 'a.jsonl'}")
    seat.type("\x04")
    assert seat.end() == 0


def test_a_full_context_is_told_at_the_terminal_with_the_way_out(terminal):
    seat = terminal(*GREEDY)
    seat.until("\n> ")
    told = seat.say("x" * 230)
    assert "reads at most 256; /reset begins a new one" in told.replace("\n", "") or "/reset begins" in told
    assert "Traceback" not in told
    assert seat.say("/reset") and "(cut after" in seat.say("hello")
    seat.type("\x04")
    assert seat.end() == 0


def test_what_a_model_writes_cannot_move_the_cursor(made, monkeypatch):
    import importlib

    page = io.StringIO()
    page.isatty = lambda: True

    def script(model, ids, **settings):
        yield from b"\x1b[2Jgone"
        yield 256

    monkeypatch.setattr(importlib.import_module("entrenar.llama.generate"), "generate", script)
    monkeypatch.setattr(sys, "stdout", page)
    assert cli.main(["chat", str(made / "base"), "--prompt", "x"]) == 0
    assert "\x1b[2J" not in page.getvalue() and "[2Jgone" in page.getvalue()


def test_the_help_fits_a_screen():
    from entrenar.cli.parser import verb_parser

    lines = verb_parser(verb.NAME, verb).format_help().splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
