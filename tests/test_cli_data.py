"""`entrenar data show` and `entrenar data prepare`: what they print is what a run takes."""

import io
import re
from argparse import Namespace

import numpy as np
import pytest

from entrenar.cli import data as verb
from entrenar.cli import main
from entrenar.cli import tokens as shown_tokens
from entrenar.data import IGNORE, Batches, evaluation_windows, prepare
from entrenar.training import progress
from entrenar.training.config import read_config
from entrenar.training.evaluate import stride_of

LINES = "".join(f"line {i}: the quick [brown] fox\t| naïve 日本😀 \x1b[31m {i * i}\r\n" for i in range(400))


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_COLOR", "1")
    (tmp_path / "a.txt").write_text(LINES, newline="")
    return tmp_path / "a.txt"


def options(text, **more):
    values = {"data.source": text, "data.vocab_size": 300, "training.context": 24, "training.batch_size": 3} | more
    return [(name, str(value)) for name, value in values.items()]


def shown(capsys, text, *words, **more):
    """(headings, rows of (token text, trained)) that `data show` prints."""
    args = [word for name, value in options(text, **more) for word in (f"--{name}", value)]
    assert main(["data", "show", *words, *args]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [re.findall(r"(?:\\.|[^|\\])+", line) for line in lines if not line.startswith("# ")]
    return [line for line in lines if line.startswith("# ")], rows


def plain(cells):
    """The text of the tokens, brackets and escapes taken away."""
    whole = "".join(re.sub(r"^\[(.*)\]$", r"\1", cell, flags=re.S) for cell in cells)
    return re.sub(r"\\(.)", lambda m: {"n": "\n", "r": "\r", "t": "\t"}.get(m[1], m[1]), whole)


def test_the_batches_shown_are_those_a_run_takes(capsys, text):
    headings, rows = shown(capsys, text, "-n", "5")
    data = prepare(str(text), vocab_size=300)
    batches = Batches(data.train, batch_size=3, context=24, seed=read_config().training.seed)
    taken = [(start, row) for _ in range(2) for row, start in zip(batches.next()[0], batches.taken, strict=True)][:5]
    assert len(rows) == 5 and len(headings) == 6
    for number, ((start, tokens), row, heading) in enumerate(zip(taken, rows, headings, strict=False), 1):
        batch = (number + 2) // 3
        assert heading.startswith(f"# window {number}, batch {batch}: token {start:,} of {len(data.train):,}, ")
        assert data.place(start) in heading and "24 trained, 1 ignored" in heading
        assert len(row) == 25 and [bool(re.fullmatch(r"\[.*\]", cell)) for cell in row] == [True] + [False] * 24
        decoded = data.tokenizer.decode(tokens).replace("\x1b", "\ufffd")
        assert plain(row[:-1]).replace(shown_tokens.PENDING, "").strip("\ufffd") == decoded.strip("\ufffd")
    assert headings[-1].startswith("# 5 windows: 120 of 125 tokens trained, ")


def test_any_batch_can_be_shown(capsys, text):
    _, first = shown(capsys, text, "-n", "6")
    headings, second = shown(capsys, text, "--batch", "2")
    assert second == first[3:] and "window 1, batch 2" in headings[0]


def test_held_out_windows_ignore_what_was_predicted_before(capsys, text):
    headings, rows = shown(capsys, text, "--held-out", "-n", "1000")
    data = prepare(str(text), vocab_size=300)
    windows = evaluation_windows(data.held_out, first=data.tokenizer.end_id, context=24, stride=stride_of(24, 0.5))
    targets = [y for _, y in windows]
    trained = [[not re.fullmatch(r"\[.*\]", cell) for cell in row] for row in rows]
    assert [sum(row) for row in trained] == [int((y != IGNORE).sum()) for y in targets]
    assert sum(map(sum, trained)) == len(data.held_out)  # each token is predicted once
    assert main(["data", "show", "--held-out", "--batch", str(-(-len(rows) // 3) + 1),
                 *[word for name, value in options(text) for word in (f"--{name}", value)]]) == 2  # fmt: skip
    assert f"only {-(-len(rows) // 3)} batches" in capsys.readouterr().err
    assert trained[1] == [False] * 13 + [True] * 12
    assert f"# {len(rows)} windows: {len(data.held_out):,} of" in headings[-1]


def test_words_that_could_be_mistaken_are_escaped(capsys, text):
    _, rows = shown(capsys, text, "-n", "8")
    cells = [cell for row in rows for cell in row[1:]]
    assert {" \\[", "\\]", "\\n", "\\t", "\\|"} & set(cells)
    assert not any(re.search(r"(?<!\\)[\[\]\t\x1b]", cell) for cell in cells)


def test_a_character_over_several_tokens_stands_at_its_last(capsys, text):
    _, rows = shown(capsys, text, "-n", "9", **{"data.tokenizer": "bytes", "training.context": 60})
    whole = "|".join("|".join(row) for row in rows)
    assert f"{shown_tokens.PENDING}|ï" in whole and f"{shown_tokens.PENDING}|{shown_tokens.PENDING}|日" in whole


def test_on_a_terminal_the_borders_and_the_ignored_are_seen_by_colour(text, monkeypatch):
    stream = io.StringIO()
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdout", stream)
    writer = shown_tokens._Coloured()
    writer.heading("window [bold]1")
    writer.tokens(["ign", "a", "", "b\n", "\x1b["], np.array([False, True, True, True, True]))
    text = stream.getvalue()
    assert "window [bold]1" in text
    ends = re.escape("\x1b[0m")
    assert re.search(rf"\x1b\[90m.*ign{ends}\x1b\[30;\d+ma{ends}\x1b\[30;\d+m·{ends}\x1b\[30;\d+mb↵{ends}\n", text)
    assert "\x1b[\x1b" not in text and "\ufffd[" in text
    shades = re.findall(r"\x1b\[30;(\d+)m", text)
    assert shades[0] == shades[2] != shades[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "-n", "0", "--batch", "-2"], "--batch -2: wanted 1 or more; -n 0: wanted 1 or more"),
        (["show", "--batch", "1601"], "--batch 1601: this run takes 1,600 batches"),
        (["show", "--held-out", "--batch", "1000"], "--batch 1000: the held-out text has only "),
        (["show", "--data.source", "/nowhere/at/all"], "does not exist"),
        (["show", "--training.context", "1"], "--training.context 1"),
        (["prepare", "--data.cache", "off"], "nothing would be kept"),
        ([], "required: {show,prepare,chat}"),
        (["shov"], "did you mean show?"),
    ],
)
def test_what_cannot_be_shown_ends_with_2_and_a_sentence(capsys, text, words, message):
    args = [word for name, value in options(text) for word in (f"--{name}", value)] if "-" in "".join(words) else []
    assert main(["data", *words[:1], *args, *words[1:]]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("#")]
    assert message in " ".join(said) and said[0].startswith("entrenar data: ")


def test_prepare_tells_the_facts_and_the_second_time_takes_the_cache(capsys, text):
    args = Namespace(what="prepare", config=None, overrides=options(text))
    assert verb.run(args) == 0
    captured = capsys.readouterr()
    facts = prepare(str(text), vocab_size=300).facts
    assert f"{facts.train_tokens:,} tokens" in captured.out and "bpe, 300 tokens" in captured.out
    assert re.search(r"prepared +\d+\.\d s, \d+\.\d MB/s", captured.out) and str(text.parent / "cache") in captured.out
    assert "# encoding" in captured.err and "left out" not in captured.out
    assert verb.run(args) == 0
    assert "kept from before" in capsys.readouterr().out


def test_what_was_left_out_is_told(capsys, text):
    (text.parent / "texts").mkdir()
    for i in range(30):
        (text.parent / "texts" / f"{i}.txt").write_text(LINES[: 500 + i])
    (text.parent / "texts" / "bad.txt").write_bytes(b"caf\xe9")
    words = ["prepare", "--data.source", str(text.parent / "texts"), "--data.vocab_size", "300"]
    assert main(["data", *words]) == 2
    assert "bad.txt" in capsys.readouterr().err
    assert main(["data", *words, "--skip-bad"]) == 0
    assert re.search(r"left out +1: .*bad\.txt", capsys.readouterr().out)


def test_without_a_cache_show_leaves_nothing_behind(capsys, text, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    shown(capsys, text, "-n", "1", **{"data.cache": "off"})
    assert not list((tmp_path / "temporary").iterdir()) and not (tmp_path / "cache").exists()


def test_progress_is_a_line_per_task_and_every_five_seconds(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    lines = progress.Progress(stream := io.StringIO())
    for done in range(0, 22):
        lines.doing("encoding", done * 10**6, 21 * 10**6)
        now[0] += 1
    assert stream.getvalue().splitlines() == [
        "# encoding",
        *(f"# encoding: {n}.0 of 21.0 MB, {n / 21:.0%}" for n in (5, 10, 15, 20)),
    ]


def test_on_a_terminal_progress_is_a_bar_that_goes(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress.Bars(stream := io.StringIO()) as bars:
        bars.doing("waiting for [another] run")
        bars.doing("encoding", 0, 10**6)
        bars.doing("encoding", 500_000, 10**6)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    assert "waiting for [another] run" in text and "encoding" in text and "0.5/1.0 MB" in text
