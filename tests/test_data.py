"""Corpora, tokenizers, the cache of prepared data, batches and evaluation windows."""

import io
import json
import os
import re
import time

import numpy as np
import pytest

from entrenar.data import (
    END,
    IGNORE,
    Batches,
    ByteTokenizer,
    CorpusError,
    TokenizerError,
    batched,
    bits_per_byte,
    evaluation_windows,
    find_sources,
    load_tokenizer,
    prepare,
    read_corpus,
    train_bpe,
)
from entrenar.data import corpus as corpus_module
from entrenar.data import tokenizer as tokenizer_module
from entrenar.data.corpus import is_held_out
from entrenar.files import new_folder, write_file

LINES = "".join(f"line {i}: the quick brown fox jumps over {i * i} lazy dogs\n" for i in range(200))


def corpus(source, **options):
    return read_corpus(find_sources(str(source)), **options)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "text").mkdir()
    for i in range(60):
        (tmp_path / "text" / f"{i:02d}.txt").write_text(f"document {i}\n" + LINES[: 100 * i + 10])
    return tmp_path / "text"


# --- corpora --------------------------------------------------------------------------------------------


def test_a_file_is_cut_at_the_start_of_a_line_and_loses_nothing(tmp_path):
    (tmp_path / "a.txt").write_text(LINES)
    c = corpus(tmp_path / "a.txt", held_out=0.1)
    assert c.train[0] + c.held_out[0] == LINES
    assert c.train[0].endswith("\n")
    assert 0.05 < len(c.held_out[0]) / len(LINES) <= 0.1


def test_a_file_of_one_line_is_cut_inside_it(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 1000)
    c = corpus(tmp_path / "a.txt")
    assert (len(c.train[0]), len(c.held_out[0])) == (950, 50)


def test_line_ends_are_kept_as_they_are(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\rthree\n" * 20)
    c = corpus(tmp_path / "a.txt")
    assert (c.train[0] + c.held_out[0]).encode() == b"one\r\ntwo\rthree\n" * 20


def test_files_of_a_folder_keep_their_side_when_others_come(folder):
    before = corpus(folder)
    assert before.held_out and before.train and len(before.train) + len(before.held_out) == 60
    (folder / "new.txt").write_text("one more\n")
    after = corpus(folder)
    assert set(before.held_out) <= set(after.held_out) and set(before.train) <= set(after.train)


def test_the_hash_chooses_about_the_asked_share():
    held = sum(is_held_out(f"some/file_{i}.py", 0.05) for i in range(4000))
    assert 150 < held < 250


def test_binary_and_hidden_files_of_a_folder_are_left_out_and_told(folder):
    (folder / "picture.png").write_bytes(b"\x89PNG\0\0\0")
    (folder / ".hidden").write_bytes(b"\xff")
    c = corpus(folder)
    assert c.skipped == ("picture.png",)


def test_a_glob_pattern_finds_files_below(folder):
    (folder / "below").mkdir()
    (folder / "below" / "a.md").write_text(LINES)
    assert corpus(folder / "**" / "*.md").train[0].startswith("line 0")


@pytest.mark.parametrize("held_out", [0.05, 0.999])
def test_of_few_files_where_the_hash_leaves_a_side_empty_the_last_part_of_each_is_held_out(tmp_path, held_out):
    texts = {"a.txt": "short\n" * 5, "z.txt": LINES}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        assert is_held_out(name, held_out) == (held_out > 0.5)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0")
    c = corpus(tmp_path, held_out=held_out)
    assert [a + b for a, b in zip(c.train, c.held_out, strict=True)] == list(texts.values())
    assert c.skipped == ("picture.png",)


def test_a_last_line_of_any_length_leaves_a_part_to_hold_out(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 990 + "\n" + "end of it")
    assert len(corpus(tmp_path / "a.txt", held_out=0.1).held_out[0]) == 100


def test_names_that_are_no_utf8_are_names_too(folder, tmp_path):
    (tmp_path / "text" / os.fsdecode(b"caf\xe9.txt")).write_text(LINES)
    assert prepare(str(folder), tokenizer="bytes", cache=str(tmp_path / "cache")).facts.train_documents > 1


def test_a_binary_file_is_known_by_a_nul_anywhere(folder):
    (folder / "late.bin").write_bytes(b"\xff" * 9000 + b"\0")
    assert corpus(folder).skipped == ("late.bin",)


def test_a_pipe_is_told_to_be_no_file_and_an_unknown_home_no_place(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CorpusError, match="is neither a file nor a folder"):
        find_sources(str(tmp_path / "pipe"))
    with pytest.raises(CorpusError, match="'~nobody.knows/x' does not exist"):
        find_sources("~nobody.knows/x")


def test_standard_input_is_one_text(monkeypatch):
    corpus_module._stdin_bytes.cache_clear()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(LINES.encode())))
    c = corpus("-")
    assert c.train[0] + c.held_out[0] == LINES
    corpus_module._stdin_bytes.cache_clear()


def test_the_standard_library_is_there_without_its_tests_and_packages():
    files = dict(find_sources("stdlib:").files)
    assert "ast.py" in files and "json/decoder.py" in files
    assert not [n for n in files if {"test", "tests", "site-packages", "__pycache__"} & set(n.split("/"))]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; wanted UTF-8 text"),
        (b" \n\n", "is empty; wanted UTF-8 text"),
        (b"a", "has 1 characters: too short to hold a part out"),
        (b"text\0more", "is binary, not text: byte 4 is NUL"),
        (b"fine\nfine\ncaf\xe9 au lait\n", "is not UTF-8: line 3, byte 13 is 0xe9"),
    ],
)
def test_a_text_that_cannot_be_used_is_named_with_its_fault(tmp_path, content, message):
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(CorpusError, match=re.escape(message)) as error:
        corpus(tmp_path / "bad.txt")
    assert "bad.txt" in str(error.value)


def test_a_missing_source_says_what_would_be_one(tmp_path):
    with pytest.raises(
        CorpusError, match="does not exist.*wanted a text file, a folder, a glob pattern, '-'"
    ):
        find_sources(str(tmp_path / "nothing.txt"))
    with pytest.raises(CorpusError, match="holds no files"):
        find_sources(str(tmp_path / "*.txt"))
    with pytest.raises(CorpusError, match="holds no files"):
        find_sources(str(tmp_path))


def test_a_folder_with_one_bad_file_names_it(folder):
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(CorpusError, match="latin.txt is not UTF-8: line 1, byte 3"):
        corpus(folder)


# --- tokenizers -----------------------------------------------------------------------------------------

TEXTS = [
    "",
    "plain",
    "  four\n    spaces\t\tend ",
    "naïve café 😀 日本語\r\n",
    f"a {END} in a text",
    "\x00\x1b\x7f",
]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe([LINES, "def f(x):\n    return x\n" * 20], vocab_size=400)


@pytest.mark.parametrize("text", TEXTS)
def test_decode_undoes_encode(bpe, text):
    for tokenizer in (bpe, ByteTokenizer()):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.end_id not in ids  # not even where the text spells it
        assert tokenizer.byte_lengths()[ids].sum() == len(text.encode())


def test_documents_end_with_the_end_token(bpe):
    for tokenizer in (bpe, ByteTokenizer()):
        ids = tokenizer.encode_documents(["one", "", "two"])
        assert tokenizer.decode(ids) == f"one{END}{END}two{END}"
        assert ids.dtype == np.uint16


def test_pieces_of_a_long_document_give_the_tokens_of_the_whole(bpe, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "PIECE", 50)
    text = LINES + "\n\n  indented\n\nnot\n" * 40 + LINES
    assert len(list(tokenizer_module.pieces_of(text))) > 20
    assert "".join(tokenizer_module.pieces_of(text)) == text
    np.testing.assert_array_equal(bpe.encode_documents([text])[:-1], bpe.encode(text))


def test_a_saved_tokenizer_reads_back_the_same(bpe, tmp_path):
    for tokenizer in (bpe, ByteTokenizer()):
        tokenizer.save(tmp_path)
        again = load_tokenizer(tmp_path)
        assert (again.kind, again.vocab_size, again.end_id) == (
            tokenizer.kind,
            tokenizer.vocab_size,
            tokenizer.end_id,
        )
        for text in TEXTS:
            np.testing.assert_array_equal(again.encode(text), tokenizer.encode(text))


def test_plain_bytes_saved_mean_the_same_to_the_tokenizers_library(tmp_path):
    from tokenizers import Tokenizer

    ByteTokenizer().save(tmp_path)
    other = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    every = "".join(map(chr, range(0x250))) + "日本😀"
    assert other.encode(every).ids == list(every.encode())
    assert other.decode(list(every.encode())) == every
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == END


def test_training_a_tokenizer_is_repeatable(bpe):
    again = train_bpe([LINES, "def f(x):\n    return x\n" * 20], vocab_size=400)
    assert again.inner.to_str() == bpe.inner.to_str()
    assert bpe.vocab_size <= 400


def test_bad_tokenizers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="vocab_size = 256: wanted >= 257"):
        train_bpe(["x"], vocab_size=256)
    with pytest.raises(TokenizerError, match="cannot read"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="is no tokenizer.json"):
        load_tokenizer(tmp_path)


# --- prepared data --------------------------------------------------------------------------------------


def test_the_second_preparation_comes_from_the_cache(folder, tmp_path):
    said = []
    options = {"vocab_size": 300, "cache": str(tmp_path / "cache"), "say": said.append}
    first, second = prepare(str(folder), **options), prepare(str(folder), **options)
    assert not first.cached and second.cached
    assert first.facts == second.facts
    np.testing.assert_array_equal(first.train, second.train)
    np.testing.assert_array_equal(first.held_out, second.held_out)
    assert sum("training a tokenizer" in line for line in said) == 1


def test_the_cache_notices_another_setting_and_a_changed_file(folder, tmp_path):
    options = {"vocab_size": 300, "cache": str(tmp_path / "cache")}
    prepare(str(folder), **options)
    assert not prepare(str(folder), **options | {"vocab_size": 301}).cached
    assert not prepare(str(folder), tokenizer="bytes", **options).cached
    os.utime(folder / "07.txt", ns=(time.time_ns(), time.time_ns() + 10**9))
    assert not prepare(str(folder), **options).cached


@pytest.mark.parametrize("left", [b"", b"garbage"])
def test_a_damaged_cache_is_prepared_again(folder, tmp_path, left):
    options = {"tokenizer": "bytes", "cache": str(tmp_path / "cache")}
    first = prepare(str(folder), **options)
    (entry,) = (tmp_path / "cache").iterdir()
    (entry / "train.npy").write_bytes(left)
    said = []
    again = prepare(str(folder), **options, say=said.append)
    assert not again.cached and "cannot be read" in said[0]
    np.testing.assert_array_equal(first.train, again.train)


def test_an_unwritable_cache_is_told_and_does_no_harm(folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    said = []
    prepared = prepare(
        str(folder), tokenizer="bytes", cache=str(tmp_path / "file" / "below"), say=said.append
    )
    assert not prepared.cached and "not kept for the next run" in said[-1]


def test_who_has_no_home_has_no_cache(folder, monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # what it does then
    monkeypatch.chdir(tmp_path)
    assert not prepare(str(folder), tokenizer="bytes").cached
    assert [p.name for p in tmp_path.iterdir()] == ["text"]


def test_a_tokenizer_that_does_not_keep_every_byte_is_refused(folder, tmp_path):
    from tokenizers import normalizers

    made = train_bpe([LINES], vocab_size=300)
    made.inner.normalizer = normalizers.Replace("e", "")
    made.save(tmp_path)
    with pytest.raises(TokenizerError, match="held-out bytes, so bits per byte would be wrong"):
        prepare(str(folder), tokenizer=str(tmp_path), cache="off")
    with pytest.raises(TokenizerError, match="'bep' does not exist; wanted 'bpe', 'bytes', or a folder"):
        prepare(str(folder), tokenizer="bep", cache="off")


def test_facts_count_every_byte_of_text(folder, tmp_path):
    prepared = prepare(str(folder), vocab_size=300, cache="off")
    lengths = prepared.tokenizer.byte_lengths()
    assert lengths[prepared.train].sum() == prepared.facts.train_bytes
    assert lengths[prepared.held_out].sum() == prepared.facts.held_out_bytes
    assert prepared.facts.train_bytes + prepared.facts.held_out_bytes == sum(
        p.stat().st_size for p in folder.iterdir()
    )
    assert 0 < prepared.facts.gzip_bits < 8 and 0 < prepared.facts.xz_bits < 8


def test_one_bit_per_byte_is_one_bit_per_byte():
    assert bits_per_byte(np.log(2) * 100, 100) == pytest.approx(1)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    write_file(tmp_path / "a", "old")
    with pytest.raises(RuntimeError), new_folder(tmp_path / "b") as temporary:
        (temporary / "x").write_text("half")
        raise RuntimeError
    with pytest.raises(TypeError):
        write_file(tmp_path / "a", 3)  # type: ignore[arg-type]
    assert (tmp_path / "a").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_new_folder_never_replaces_one_that_holds_something(tmp_path):
    for content in ("first", "second"):
        try:
            with new_folder(tmp_path / "a") as temporary:
                (temporary / "x").write_text(content)
        except FileExistsError:
            assert content == "second"
    assert (tmp_path / "a" / "x").read_text() == "first"


# --- batches --------------------------------------------------------------------------------------------


def test_targets_are_the_next_tokens():
    ids, targets = Batches(np.arange(1000), batch_size=3, context=10).next()
    assert ids.shape == targets.shape == (3, 10) and ids.dtype == np.int64
    np.testing.assert_array_equal(ids + 1, targets)


def test_an_epoch_takes_every_window_once_and_the_next_takes_others():
    batches = Batches(np.arange(10_001), batch_size=7, context=100, seed=3)
    size = len(batches.starts)
    starts = [int(row[0]) for _ in range(-(-2 * size // 7)) for row in batches.next()[0]]
    first, second = starts[:size], starts[size : 2 * size - 2]
    assert size in (99, 100) and len(set(first)) == size and first != sorted(first)
    assert {s % 100 for s in first} == {min(first)} and not set(first) & set(second)


def test_batches_go_on_where_their_state_was_taken():
    one = Batches(np.arange(500), batch_size=4, context=8, seed=1)
    for _ in range(20):
        one.next()
    two = Batches(np.arange(500), batch_size=4, context=8, seed=9)
    two.load_state(json.loads(json.dumps(one.state())))
    for _ in range(40):
        np.testing.assert_array_equal(one.next()[0], two.next()[0])


def test_other_seeds_give_other_batches():
    a, b = (Batches(np.arange(500), batch_size=4, context=8, seed=s).next()[0] for s in (1, 2))
    assert (a != b).any()


def test_the_shortest_text_is_one_window_and_less_is_an_error():
    ids, _ = Batches(np.arange(9), batch_size=2, context=8).next()
    np.testing.assert_array_equal(ids, [range(8)] * 2)
    with pytest.raises(
        CorpusError, match="has 8 tokens, too short for one window of context 8 \\+ 1.*at most 7"
    ):
        Batches(np.arange(8), batch_size=1, context=8)


@pytest.mark.parametrize(
    ("length", "context", "stride"), [(100, 8, 8), (100, 8, 4), (101, 8, 3), (5, 8, 1), (8, 8, 8)]
)
def test_evaluation_predicts_every_token_once_from_those_before(length, context, stride):
    tokens = np.arange(1, length + 1)  # token t follows token t - 1; 0 begins
    predicted = []
    for x, y in evaluation_windows(tokens, first=0, context=context, stride=stride):
        counts = y != IGNORE
        np.testing.assert_array_equal(y[counts], x[counts] + 1)
        at = np.flatnonzero(counts)
        assert predicted == [] or at[0] >= context - stride
        np.testing.assert_array_equal(x[: at[-1] + 1], np.arange(x[0], x[0] + at[-1] + 1))
        predicted += y[counts].tolist()
    assert predicted == tokens.tolist()


def test_a_sample_of_evaluation_windows_is_some_of_them():
    tokens = np.arange(1, 200)
    options = {"first": 0, "context": 16, "stride": 8}
    every = [y.tolist() for _, y in evaluation_windows(tokens, **options)]
    third = [y.tolist() for _, y in evaluation_windows(tokens, **options, every=3)]
    assert third == every[::3]
    shapes = [x.shape for x, _ in batched(evaluation_windows(tokens, **options), 4)]
    assert sum(s[0] for s in shapes) == len(every) and set(shapes[:-1]) == {(4, 16)}
