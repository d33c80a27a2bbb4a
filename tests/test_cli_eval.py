"""`entrenar eval`, and the loop behind it that training uses too: every token predicted once, every number right."""

import gzip
import io
import json
import math
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from entrenar import cli, random
from entrenar.cli import evaluate as verb
from entrenar.cli.models import Opened
from entrenar.cli.parser import verb_parser
from entrenar.data import IGNORE, ByteTokenizer
from entrenar.llama import Llama, LlamaConfig
from entrenar.training.checkpoint import model_files, save_step
from entrenar.training.evaluate import Evaluation, evaluate, perplexity, stride_of

SMALL = LlamaConfig(vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
                    max_position_embeddings=64, initializer_range=0.3, bos_token_id=256, eos_token_id=256)  # fmt: skip
TEXT = "".join(f"line {i} of a text, naïve and – long\n" for i in range(12))
NUMBERS = {"source", "loss", "perplexity", "perplexity_per_word", "perplexity_per_byte", "bits_per_byte", "tokens",
           "bytes", "words", "documents", "seconds", "tokens_per_second"}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    random.seed(1)
    return Llama(SMALL)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    return model.save_pretrained(tmp_path_factory.mktemp("models") / "small", tokenizer=ByteTokenizer())


@pytest.fixture
def run(folder, capsys):
    """`entrenar eval` of that model: (exit code, standard output, standard error)."""

    def call(*words, where=folder):
        code = cli.main(["eval", str(where), *map(str, words)])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def by_hand(model, tokens, context, stride, first=256):
    """Nats of every token, each predicted once, window by window in plain NumPy over the logits."""
    row, nats, done = [first, *tokens], [], 0
    while done < len(tokens):
        start = 0 if not nats else done - (context - stride)
        stop = min(start + context, len(tokens))
        z = model(np.array([row[start:stop]])).data[0].astype(np.float64)
        p = z - np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True)) - z.max(1, keepdims=True)
        nats += [-p[i - start, tokens[i]] for i in range(done, stop)]
        done = stop
    return np.array(nats)


# -- the loop


@pytest.mark.parametrize(("context", "stride", "batch_size"), [(16, 8, 3), (64, 64, 1), (10, 1, 8), (64, 32, 99)])
def test_the_loss_is_that_of_every_token_predicted_once_by_hand(model, context, stride, batch_size):
    tokens = np.random.default_rng(0).integers(0, 257, 75).astype(np.uint16)
    seen = evaluate(model, tokens, first=256, context=context, stride=stride, batch_size=batch_size)
    nats = by_hand(model, tokens.tolist(), context, stride)
    assert seen.tokens == len(nats) == 75 and seen.complete and seen.bytes == 0
    assert seen.nats == pytest.approx(nats.sum(), rel=1e-5) and seen.loss == seen.nats / 75


def test_bytes_are_counted_by_the_lengths_of_the_predicted_tokens(model):
    tokens = np.array([65, 66, 256, 67, 256], np.uint16)
    lengths = ByteTokenizer().byte_lengths()
    seen = evaluate(model, tokens, first=256, context=8, stride=4, batch_size=2, lengths=lengths)
    assert seen.bytes == 3 and seen.bits_per_byte == pytest.approx(seen.nats / math.log(2) / 3)


def test_a_sample_predicts_a_part_of_the_same_windows(model):
    tokens = np.random.default_rng(0).integers(0, 257, 200)
    settings = dict(first=256, context=16, stride=8, batch_size=4)
    part = evaluate(model, tokens, every=5, **settings)
    assert 0 < part.tokens < 200 / 3 and part.loss == evaluate(model, tokens, every=5, **settings).loss


def test_progress_is_told_and_a_stop_ends_it_early(model):
    told, tokens = [], np.zeros(100, np.uint16)
    settings = dict(first=256, context=10, stride=10, batch_size=3)
    evaluate(model, tokens, progress=lambda done, total: told.append((done, total)), **settings)
    assert told == [(30, 100), (60, 100), (90, 100), (100, 100)]
    seen = evaluate(model, tokens, stop=lambda: True, **settings)
    assert (seen.tokens, seen.complete) == (30, False)


def test_the_model_is_afterwards_as_it_was_before(model):
    def fail(done, total):
        assert not model.training
        raise KeyError

    for mode in (True, False):
        model.train(mode)
        evaluate(model, np.zeros(5, int), first=0, context=4, stride=2, batch_size=1)
        assert model.training is mode
        with pytest.raises(KeyError):
            evaluate(model, np.zeros(5, int), first=0, context=4, stride=2, batch_size=1, progress=fail)
        assert model.training is mode
    model.train()
    assert all(p.grad is None for p in model.parameters())


def test_no_tokens_cost_nothing(model):
    seen = evaluate(model, np.zeros(0, np.uint16), first=256, context=4, stride=2, batch_size=1)
    assert (seen.nats, seen.tokens, seen.loss, seen.bits_per_byte) == (0, 0, 0, 0)


@given(st.integers(1, 4096), st.floats(0, 1, exclude_max=True))
def test_every_overlap_gives_a_stride_that_windows_can_move_by(context, overlap):
    assert 1 <= stride_of(context, overlap) <= context


def test_a_perplexity_no_float_holds_is_infinite():
    assert perplexity(0) == 1 and perplexity(math.log(257)) == pytest.approx(257) and perplexity(1e4) == math.inf
    assert Evaluation(math.log(2) * 8, 4, 2, 1.0).bits_per_byte == pytest.approx(4)


# -- the command


def numbers(out):
    """The pairs of one plain line."""
    assert out.count("\n") == 1
    return dict(pair.split("=", 1) for pair in out.split())


def test_the_line_elsewhere_than_on_a_terminal_has_every_number(run, model, text):
    code, out, err = run(text)
    n = numbers(out)
    assert (code, err) == (0, "") and n.keys() == NUMBERS
    raw = TEXT.encode()
    nats = by_hand(model, [*raw, 256], 64, 32).sum()
    assert (int(n["tokens"]), int(n["bytes"])) == (len(raw) + 1, len(raw)), "the end token is predicted too"
    assert (int(n["words"]), int(n["documents"])) == (len(TEXT.split()), 1)
    assert float(n["loss"]) == pytest.approx(nats / (len(raw) + 1), rel=1e-5)
    assert float(n["bits_per_byte"]) == pytest.approx(nats / math.log(2) / len(raw), rel=1e-5)
    assert float(n["perplexity"]) == pytest.approx(math.exp(nats / (len(raw) + 1)), rel=1e-4)
    assert float(n["perplexity_per_byte"]) == pytest.approx(math.exp(nats / len(raw)), rel=1e-4)
    assert float(n["perplexity_per_word"]) == pytest.approx(math.exp(nats / len(TEXT.split())), rel=1e-3)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary(run, tmp_path, text):
    blank = Llama(SMALL)
    blank.head_weight.data[:] = 0
    where = blank.save_pretrained(tmp_path / "blank", tokenizer=ByteTokenizer())
    n = json.loads(run(text, "--json", where=where)[1])
    assert n["loss"] == pytest.approx(math.log(257), rel=1e-6) and n["perplexity"] == pytest.approx(257, rel=1e-5)
    assert n["bits_per_byte"] == pytest.approx(math.log2(257) * n["tokens"] / n["bytes"], rel=1e-6)


def test_json_is_one_object_alone_with_each_file_and_all_together(run, tmp_path, text):
    (tmp_path / "two words.txt").write_text("some other text")
    code, out, err = run(text, tmp_path / "two words.txt", "--json", "--context", 16, "--overlap", 0.25)
    n = json.loads(out)
    assert (code, err) == (0, "") and (n["context"], n["overlap"]) == (16, 0.25)
    one, two = n["files"]
    assert one.keys() == two.keys() == NUMBERS and n["source"] == "together"
    for name in ("tokens", "bytes", "words", "documents"):
        assert n[name] == one[name] + two[name]
    cost = sum(f["loss"] * f["tokens"] for f in (one, two))
    assert n["loss"] == pytest.approx(cost / n["tokens"])
    assert n["bits_per_byte"] == pytest.approx(cost / math.log(2) / n["bytes"])
    assert json.loads(run(text, "--json")[1])["source"] == str(text)


def test_several_files_are_told_apart_and_then_together(run, tmp_path, text):
    (tmp_path / "two words.txt").write_text("some other text")
    lines = run(text, tmp_path / "two words.txt")[1].splitlines()
    assert [line.split(" loss=")[0] for line in lines] == [
        f"source={text}", f"source='{tmp_path / 'two words.txt'}'", "source=together"]  # fmt: skip


def test_any_source_is_read_whole_with_an_end_token_after_each_document(run, tmp_path, text):
    rows = ["first row", "second\nrow", "naïve"]
    jsonl = "".join(json.dumps({"text": row}) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(jsonl)
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.write(jsonl)
    n = json.loads(run(tmp_path / "rows.jsonl", tmp_path / "rows.jsonl.gz", "--json")[1])
    one, two = n["files"]
    size = sum(len(row.encode()) for row in rows)
    assert (one["documents"], one["bytes"], one["tokens"]) == (3, size, size + 3)
    assert one["loss"] == two["loss"]
    (tmp_path / "folder").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "folder" / name).write_text(TEXT)
    n = json.loads(run(tmp_path / "folder", "--json")[1])
    assert (n["documents"], n["bytes"]) == (2, 2 * len(TEXT.encode()))


def test_a_checkpoint_is_evaluated_as_it_was_trained_unless_told_otherwise(run, tmp_path, model, text):
    trained = tmp_path / "run"
    trained.mkdir()
    save_step(trained, 3, write=model_files(model, ByteTokenizer()), state={"config": {"training": {"context": 16}}})
    n = json.loads(run(text, "--json", where=trained)[1])
    assert n["context"] == 16 and n["model"] == str(trained / "step-000003")
    assert n["loss"] == json.loads(run(text, "--json", "--context", 16)[1])["loss"]
    assert n["loss"] != json.loads(run(text, "--json", "--context", 32, where=trained)[1])["loss"]
    nats = by_hand(model, [*TEXT.encode(), 256], 16, 8).sum()
    assert n["loss"] == pytest.approx(nats / n["tokens"], rel=1e-5)


def test_the_batch_size_changes_no_number(run, text):
    losses = [json.loads(run(text, "--json", "--batch-size", size)[1])["loss"] for size in (1, 3, 64)]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_table_and_a_bar_that_goes_away(run, text, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", out := Terminal())
    monkeypatch.setattr(sys, "stderr", err := Terminal())
    assert run(text, "--batch-size", 1)[0] == 0
    lines = out.getvalue().splitlines()
    assert lines[0].startswith(f"{text}  {len(TEXT.encode())} bytes in 1 document, {len(TEXT.encode()) + 1} tokens, ")
    assert [line.split("  ")[1] for line in lines[1:]] == [*verb.LABELS.values()]
    assert "100%" in err.getvalue(), "the bar was there"


def test_no_bar_is_drawn_where_there_is_no_terminal(run, text):
    assert run(text, "--json")[2] == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--context", "0"], "--context 0: wanted at least 1"), (["--overlap", "1"], "--overlap 1: wanted at least 0 and"),
     (["--overlap", "nan"], "--overlap nan"), (["--batch-size", "0", "--context", "-3"], "--context -3: .*; --batch-"),
     (["-", "-"], "standard input can be read once"), (["--conxt", "3"], "did you mean --context"),
     (["--context", "65"], "--context 65: this model reads at most 64 tokens at once")],
)  # fmt: skip
def test_a_wrong_setting_ends_with_2(run, text, words, message):
    code, out, err = run(text, *words)
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
    assert re.search(message, err), err


def test_text_that_cannot_be_used_ends_with_2_and_says_why(run, tmp_path):
    def refusal(name, content=None):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        code, out, err = run(tmp_path / name)
        assert (code, out) == (2, "") and len(err.splitlines()) == 1 and "data.source" not in err
        return err

    assert "does not exist" in refusal("missing.txt")
    assert "holds no text" in refusal("empty.txt", b"") and "holds no text" in refusal("blank.txt", b" \n")
    assert "not UTF-8" in refusal("latin.txt", b"line\nna\xefve")
    assert "line 2" in refusal("bad.jsonl", b'{"text": "x"}\n{"text": \n')
    assert json.loads(run(tmp_path / "bad.jsonl", "--skip-bad", "--json")[1])["documents"] == 1


def test_weights_that_are_no_numbers_end_with_2(run, text, monkeypatch):
    broken = Llama(SMALL)
    broken.model.norm.weight.data[:] = np.nan
    opened = Opened(broken, ByteTokenizer(), "there", frozenset({256}), 64)
    monkeypatch.setattr("entrenar.cli.models.open_model", lambda path, **settings: opened)
    code, out, err = run(text)
    assert (code, out) == (2, "") and "there: the loss is nan: the model's weights hold NaN or infinity" in err


def test_a_perplexity_beyond_any_float_is_null_in_json_and_inf_in_a_line():
    score = verb.Score("x", nats=1e6, tokens=1000, bytes=10, words=1, documents=1, seconds=1.0)
    n = score.numbers()
    assert n["perplexity_per_word"] is None and n["loss"] == 1000 and json.dumps(n, allow_nan=False)
    assert verb._plain(n["perplexity_per_word"]) == "inf" and verb._number(None) == "beyond any float"


def test_a_text_begins_with_the_end_token_where_no_token_begins_one(model, text):
    tokenizer = ByteTokenizer()
    nameless = SimpleNamespace(begin_id=None, end_id=256, encode_documents=tokenizer.encode_documents)
    opened = (Opened(model, kind, "there", frozenset(), 64) for kind in (tokenizer, nameless))
    one, two = (verb.score(o, str(text), context=16, overlap=0, batch_size=4) for o in opened)
    assert one.nats == two.nats == pytest.approx(by_hand(model, [*TEXT.encode(), 256], 16, 16).sum(), rel=1e-5)


def test_the_help_fits_a_screen_and_its_examples_are_understood():
    parser = verb_parser(verb.NAME, verb)
    lines = parser.format_help().splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    for line in verb.EXAMPLE.strip().splitlines():
        assert parser.read(line.split()[2:]).files


def test_windows_count_no_token_twice():
    """The oracle's own check: what is ignored in the windows is what an earlier one predicted."""
    from entrenar.data import evaluation_windows

    counted = [y[y != IGNORE] for _, y in evaluation_windows(np.arange(50), first=99, context=16, stride=5)]
    assert np.concatenate(counted).tolist() == list(range(50))


# -- conversations


def test_the_answers_of_conversations_are_what_counts_each_once(tmp_path, model, folder, capsys):
    rows = [
        {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]},
        {"messages": [{"role": "user", "content": "red?"}, {"role": "assistant", "content": "blue"}]},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli.main(["eval", str(folder), str(tmp_path / "a.jsonl"), "--chat", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    nats = count = 0
    for row in rows:
        question, answer = (message["content"] for message in row["messages"])
        before, after = f"User: {question}\nAssistant:".encode(), f" {answer}".encode()
        ids = [256, *before, *after, 256]
        z = model(np.array([ids])).data[0].astype(np.float64)
        p = z - np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True)) - z.max(1, keepdims=True)
        for at in range(1 + len(before), len(ids)):
            nats, count = nats - p[at - 1, ids[at]], count + 1
    assert (told["tokens"], told["rows"]) == (count, 2) and told["loss"] == pytest.approx(nats / count, rel=1e-5)
    assert told["perplexity"] == pytest.approx(math.exp(nats / count), rel=1e-4) and "bits_per_byte" not in told
    assert cli.main(["eval", str(folder), str(tmp_path / "a.jsonl"), str(tmp_path / "a.jsonl"), "--chat"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[2].startswith("source=together ") and f"rows={4}" in lines[2]


def test_rows_that_are_too_long_are_cut_and_rows_without_answers_are_refused(tmp_path, folder, capsys):
    row = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y" * 300}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    assert cli.main(["eval", str(folder), str(tmp_path / "a.jsonl"), "--chat"]) == 0
    said = capsys.readouterr()
    assert "rows longer than the context of 64 tokens are cut there: 1" in said.err and "tokens=46" in said.out
    row["messages"].pop()
    (tmp_path / "b.jsonl").write_text(json.dumps(row) + "\n")
    assert cli.main(["eval", str(folder), str(tmp_path / "b.jsonl"), "--chat"]) == 2
    assert "has nothing to train on" in capsys.readouterr().err


def test_a_folder_is_evaluated_on_what_it_holds_out(tmp_path, folder, capsys):
    def row(answer):
        messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}]
        return json.dumps({"messages": messages}) + "\n"

    (tmp_path / "train.jsonl").write_text(row("aa") * 3)
    (tmp_path / "valid.jsonl").write_text(row("b"))
    assert cli.main(["eval", str(folder), str(tmp_path), "--chat", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 1
