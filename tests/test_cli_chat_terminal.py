"""`entrenar chat` at a terminal: commands, Ctrl-C, and answers side by side."""

import importlib
import io
import json
import re
import sys
import time

import pytest
import tuned
from hypothesis import given
from hypothesis import strategies as st
from tuned import conversation, said

from entrenar import cli
from entrenar.cli.side_by_side import NARROWEST, Column, letters, show, widths, wrapped

GREEDY = ("--temperature", "0", "--max-tokens", "12")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """base, run (of an adapter for it), other (an adapter)"""
    place = tmp_path_factory.mktemp("made")
    tuned.base(place / "base")
    tuned.run(place / "run", place / "base")
    tuned.adapter(place / "other", place / "base", seed=5)
    return place


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
    page = io.StringIO()
    page.isatty = lambda: True

    def script(model, ids, **settings):
        yield from b"\x1b[2Jgone"
        yield 256

    monkeypatch.setattr(importlib.import_module("entrenar.llama.generate"), "generate", script)
    monkeypatch.setattr(sys, "stdout", page)
    assert cli.main(["chat", str(made / "base"), "--prompt", "x"]) == 0
    assert "\x1b[2J" not in page.getvalue() and "[2Jgone" in page.getvalue()
