"""Prepared data: what the tokens are and where they come from, the cache, damage."""

import gzip
import hashlib
import json
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from preparing import LINES, Said, write_documents
from tokenizer_kinds import KINDS, TEXT

from entrenar.data import (
    CorpusError,
    TokenizerError,
    bits_per_byte,
    load_prepared,
    load_tokenizer,
    prepare,
    train_bpe,
)
from entrenar.data import encoding as encoding_module
from entrenar.data import pieces as pieces_module
from entrenar.data import yardsticks as yardsticks_module
from entrenar.data.corpus import is_held_out
from entrenar.data.scan import cut_of


@pytest.fixture
def folder(tmp_path):
    return write_documents(tmp_path / "text")


@pytest.fixture
def small(monkeypatch):
    """Everything in small steps, and the journal after each."""
    monkeypatch.setattr(pieces_module, "PIECE", 100)
    monkeypatch.setattr(encoding_module, "SLAB", 1500)
    monkeypatch.setattr(encoding_module, "JOURNAL_EVERY", 0.0)


def jsonl(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def documents(tokenizer, ids):
    ends = np.flatnonzero(ids == tokenizer.end_id)
    assert len(ids) == 0 or ends[-1] == len(ids) - 1
    return [tokenizer.decode(part[:-1].tolist()) for part in np.split(ids, ends + 1)[:-1]]


def contents(folder):
    """Hashes of all files below."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*")) if path.is_file()
    }  # fmt: skip


# --- what the tokens are ----------------------------------------------------------------------------------


@given(texts=st.lists(st.text().filter(str.strip), min_size=1, max_size=8), held_out=st.sampled_from([0.05, 0.5]))
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_documents_of_any_unicode_come_back_from_the_tokens(tmp_path_factory, tokenizer, texts, held_out):
    path = tmp_path_factory.mktemp("t") / "a.jsonl"
    path.write_text(jsonl(texts))
    if max(map(len, texts)) < 2 and len({is_held_out(text, held_out) for text in texts}) < 2:
        with pytest.raises(CorpusError, match="too short|too little"):
            prepare(str(path), tokenizer=tokenizer, cache="off", held_out=held_out)
        return
    made = prepare(str(path), tokenizer=tokenizer, vocab_size=260, cache="off", held_out=held_out)
    train, held = documents(made.tokenizer, made.train), documents(made.tokenizer, made.held_out)
    sides = [is_held_out(text, held_out) for text in texts]
    if len(set(sides)) == 2:
        assert train == [t for t, side in zip(texts, sides, strict=True) if not side]
        assert held == [t for t, side in zip(texts, sides, strict=True) if side]
    else:
        rest = iter(held)
        assert [part + (next(rest) if len(text) > 1 else "") for part, text in zip(train, texts, strict=True)] == texts
    assert made.facts.train_bytes + made.facts.held_out_bytes == len("".join(texts).encode())
    assert made.facts.exact_bytes and made.bytes_of(made.held_out) == made.facts.held_out_bytes


@pytest.fixture(scope="module")
def bpe():
    return train_bpe([LINES, "def f(x):\n    return x\n" * 20], vocab_size=400)


@given(text=st.text(st.sampled_from("ab 1.\n\t é😀"), min_size=2, max_size=600), slab=st.integers(50, 300))
def test_how_a_text_is_cut_into_pieces_and_slabs_changes_no_token(tmp_path_factory, bpe, text, slab):
    if not text.strip():
        return
    folder = tmp_path_factory.mktemp("t")
    bpe.save(folder)
    (folder / "a.txt").write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces_module, "PIECE", 20)
        patch.setattr(encoding_module, "SLAB", slab)
        made = prepare(str(folder / "a.txt"), tokenizer=str(folder), cache="off")
    (train,), (held,) = documents(bpe, made.train), documents(bpe, made.held_out)
    assert train + held == text
    assert made.train[:-1].tolist() == bpe.encode(train).tolist()
    assert made.held_out[:-1].tolist() == bpe.encode(held).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_long_texts_have_the_tokens_of_the_whole_whatever_the_tokenizer(tmp_path, kind, small):
    KINDS[kind](tmp_path)
    text = "".join(TEXT) * 2
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.jsonl").write_text(jsonl([text, "  two words"]))
    tokenizer = load_tokenizer(tmp_path)
    (tmp_path / "source").mkdir()
    for name in ("a.txt", "b.jsonl"):
        (tmp_path / name).rename(tmp_path / "source" / name)
    made = prepare(str(tmp_path / "source"), tokenizer=str(tmp_path), cache="off", held_out=0.01)
    cut = cut_of(text, 0.01)
    wanted = [text[:cut], text[:cut], "  two word"], [text[cut:], text[cut:], "s"]
    for ids, texts in zip((made.train, made.held_out), wanted, strict=True):
        assert ids.tolist() == tokenizer.encode_documents(texts).tolist()
        np.testing.assert_array_equal(
            ids, np.concatenate([part for one in texts for part in (tokenizer.encode(one), [tokenizer.end_id])])
        )


def test_token_ids_of_a_large_vocabulary_take_four_bytes(tmp_path, folder):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(letters)} | {f"{i:06d}": i for i in range(256, 65_700)}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<|endoftext|>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    made = prepare(str(folder), tokenizer=str(tmp_path), cache="off")
    assert made.train.dtype == made.held_out.dtype == np.uint32
    assert made.train.max() == 65_700 == made.tokenizer.end_id


def test_facts_count_every_byte_of_text(folder):
    made = prepare(str(folder), vocab_size=300, cache="off")
    lengths, facts = made.tokenizer.byte_lengths(), made.facts
    assert lengths[made.train].sum() == facts.train_bytes
    assert lengths[made.held_out].sum() == facts.held_out_bytes == facts.held_out_token_bytes
    assert facts.train_bytes + facts.held_out_bytes == sum(p.stat().st_size for p in folder.iterdir())
    assert facts.train_documents + facts.held_out_documents == 60
    assert 0 < facts.gzip_bits < 8 and 0 < facts.xz_bits < 8 and facts.compared_bytes == facts.held_out_bytes


def test_gzip_and_xz_compress_the_held_out_text_or_its_beginning(tmp_path, monkeypatch):
    import lzma

    (tmp_path / "a.txt").write_text(LINES)
    made = prepare(str(tmp_path / "a.txt"), tokenizer="bytes", cache="off")
    raw = made.tokenizer.decode(made.held_out[:-1].tolist()).encode()
    assert made.facts.gzip_bits == 8 * len(gzip.compress(raw, 9, mtime=0)) / len(raw)
    assert made.facts.xz_bits == 8 * len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)) / len(raw)
    for module in (yardsticks_module, encoding_module):
        monkeypatch.setattr(module, "LIMIT", 100)
    made = prepare(str(tmp_path / "a.txt"), tokenizer="bytes", cache="off")
    assert made.facts.compared_bytes == 100
    assert made.facts.gzip_bits == 8 * len(gzip.compress(raw[:100], 9, mtime=0)) / 100


def test_bits_per_byte_of_a_tokenizer_that_changes_text_are_of_the_true_bytes(folder, tmp_path):
    from tokenizers import normalizers

    made = train_bpe([LINES], vocab_size=300)
    made.inner.normalizer = normalizers.Replace("e", "")
    made.save(tmp_path)
    prepared = prepare(str(folder), tokenizer=str(tmp_path), cache="off")
    facts = prepared.facts
    assert not facts.exact_bytes and facts.held_out_token_bytes < facts.held_out_bytes
    assert prepared.bytes_of(prepared.held_out) == pytest.approx(facts.held_out_bytes)
    part = prepared.held_out[:50]
    told = prepared.tokenizer.byte_lengths()[part].sum()
    assert prepared.bytes_of(part) == pytest.approx(told * facts.held_out_bytes / facts.held_out_token_bytes)


def test_one_bit_per_byte_is_one_bit_per_byte():
    assert bits_per_byte(np.log(2) * 100, 100) == pytest.approx(1)


def test_a_tokenizer_that_is_not_there_is_named(folder):
    with pytest.raises(TokenizerError, match="'bep' does not exist; wanted 'bpe', 'bytes', or a folder"):
        prepare(str(folder), tokenizer="bep", cache="off")


def test_names_that_are_no_utf8_are_names_too(folder, tmp_path):
    (folder / os.fsdecode(b"caf\xe9.txt")).write_text(LINES)
    made = prepare(str(folder), tokenizer="bytes", cache=str(tmp_path / "cache"))
    assert made.facts.train_documents > 1
    assert os.fsdecode(b"caf\xe9.txt") in load_prepared(made.folder).places.names


def test_bad_rows_are_left_out_counted_and_named_if_asked_for(tmp_path):
    (tmp_path / "a.jsonl").write_text(jsonl([f"text {i}" for i in range(50)]) + "bad\n" * 30)
    with pytest.raises(CorpusError, match="line 51 .* and 29 more cannot be used; --skip-bad"):
        prepare(str(tmp_path / "a.jsonl"), tokenizer="bytes", cache=str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()
    facts = prepare(str(tmp_path / "a.jsonl"), tokenizer="bytes", cache="off", skip_bad=True).facts
    assert facts.skipped_documents == 30 and len(facts.skipped) == 10
    assert facts.skipped[0].endswith("a.jsonl line 51 (byte 990)")


# --- where they come from ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_the_place_of_a_token_is_its_file_and_line(tmp_path, tokenizer, small):
    (tmp_path / "notes").mkdir()
    lines = [f"word{i} " * 5 for i in range(300)]  # one token may hold a word, or a letter
    (tmp_path / "notes" / "a.txt").write_text("\n".join(lines))
    (tmp_path / "rows.jsonl").write_text(jsonl(["one\ntwo", "x " * 200, "three"]))
    made = prepare(str(tmp_path), tokenizer=tokenizer, vocab_size=300, cache="off")
    (border,) = np.flatnonzero(made.train == made.tokenizer.end_id)[:1]
    for offset in range(0, border + 1, 37):
        before = made.tokenizer.decode(made.train[:offset].tolist())
        assert made.place(offset) == f"notes/a.txt line {1 + before.count(chr(10)):,}"
    assert before.count("\n") > 250
    ends = np.flatnonzero(made.train == made.tokenizer.end_id)
    assert [made.place(int(end)) for end in ends[1:]] == [f"rows.jsonl line {i}" for i in (1, 2, 3)]
    assert made.place(int(ends[1]) + 1) == "rows.jsonl line 2"
    with pytest.raises(IndexError, match=f"token {len(made.train)}: wanted 0 to {len(made.train) - 1}"):
        made.place(len(made.train))


def test_the_place_in_a_parquet_file_is_a_row(tmp_path):
    pyarrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    writer.write_table(pyarrow.table({"text": ["first text", "second"]}), tmp_path / "a.parquet")
    made = prepare(str(tmp_path / "a.parquet"), tokenizer="bytes", cache="off")
    assert {made.place(0), made.place(len(made.train) - 1)} <= {"a.parquet row 1", "a.parquet row 2"}


# --- the cache --------------------------------------------------------------------------------------------


def test_the_second_preparation_comes_from_the_cache(folder, tmp_path):
    said = Said()
    options = {"vocab_size": 300, "cache": str(tmp_path / "cache"), "say": said}
    first, second = prepare(str(folder), **options), prepare(str(folder), **options)
    assert not first.cached and second.cached
    assert first.facts == second.facts and first.identity == second.identity
    np.testing.assert_array_equal(first.train, second.train)
    np.testing.assert_array_equal(first.held_out, second.held_out)
    assert sum("training a tokenizer" in text for text in said.texts()) == 1
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [first.folder.name]
    assert load_prepared(first.folder).identity == first.identity


def test_the_cache_notices_another_setting_and_a_changed_file(folder, tmp_path):
    options = {"vocab_size": 300, "cache": str(tmp_path / "cache")}
    prepare(str(folder), **options)
    for change in ({"vocab_size": 301}, {"tokenizer": "bytes"}, {"held_out": 0.1}, {"skip_bad": True}):
        assert not prepare(str(folder), **options | change).cached, change
    os.utime(folder / "07.txt", ns=(time.time_ns(), time.time_ns() + 10**9))
    assert not prepare(str(folder), **options).cached


def test_the_cache_notices_a_changed_tokenizer(folder, tmp_path, bpe):
    bpe.save(tmp_path)
    options = {"tokenizer": str(tmp_path), "cache": str(tmp_path / "cache")}
    first = prepare(str(folder), **options)
    assert prepare(str(folder), **options).cached
    train_bpe([LINES], vocab_size=300).save(tmp_path)
    other = prepare(str(folder), **options)
    assert not other.cached and other.identity != first.identity


def test_the_identity_is_the_same_wherever_it_is_prepared_and_another_for_other_tokens(folder, tmp_path):
    made = [prepare(str(folder), vocab_size=300, cache=str(tmp_path / name)) for name in "ab"]
    assert made[0].identity == made[1].identity
    assert prepare(str(folder), vocab_size=301, cache="off").identity != made[0].identity
    (folder / "07.txt").write_text("document 7, changed\n")
    assert prepare(str(folder), vocab_size=300, cache="off").identity != made[0].identity


DAMAGES = {
    "train.tokens": [b"", b"garbage", "cut", "flip"],
    "held_out.tokens": ["cut", "flip"],
    "facts.json": [b"", b"[]", b"{}", "cut", b'{"format": 1}', b"[" * 100_000],
    "names": [b"", "cut"],
    "places": ["cut"],
    "tokenizer/tokenizer.json": [b"{}", "cut"],
}


@pytest.mark.parametrize(("name", "damage"), [(name, one) for name, many in DAMAGES.items() for one in many])
def test_damaged_data_is_refused_by_name_and_prepared_again(folder, tmp_path, name, damage):
    options = {"tokenizer": "bytes", "cache": str(tmp_path / "cache")}
    first = prepare(str(folder), **options)
    before = contents(first.folder)
    raw = (first.folder / name).read_bytes()
    flipped = raw[: len(raw) // 2] + bytes([raw[len(raw) // 2] ^ 1]) + raw[len(raw) // 2 + 1 :]
    (first.folder / name).write_bytes({"cut": raw[:-1], "flip": flipped}.get(damage, damage))
    with pytest.raises(CorpusError, match=re.escape(name.split("/")[-1])):
        load_prepared(first.folder)
    said = Said()
    again = prepare(str(folder), **options, say=said)
    assert not again.cached and "cannot be used" in said[0][0]
    assert contents(again.folder) == before


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("train_tokens", 5, "its count is"),
        ("train_tokens", "5", '"train_tokens" is \'5\', wanted int'),
        ("train_tokens", True, '"train_tokens" is \'True\', wanted int'),
        ("train_bytes", 0, '"train_bytes" is 0, wanted at least 1'),
        ("xz_bits", -0.5, '"xz_bits" is -0.5, wanted at least 0'),
        ("exact_bytes", 1, '"exact_bytes" is \'1\', wanted bool'),
        ("gzip_bits", None, '"gzip_bits" is \'None\', wanted float'),
        ("skipped", [1], '"skipped" holds something else than names'),
        ("source", [], '"source" is'),
        ("more", 1, "unknown facts: more"),
    ],
)
def test_facts_that_cannot_be_are_named(folder, tmp_path, name, value, message):
    made = prepare(str(folder), tokenizer="bytes", cache=str(tmp_path / "cache"))
    content = json.loads((made.folder / "facts.json").read_text())
    content["facts"][name] = value
    (made.folder / "facts.json").write_text(json.dumps(content))
    with pytest.raises(CorpusError, match=re.escape(message)):
        load_prepared(made.folder)


def test_token_files_of_another_tokenizer_or_source_do_not_pass(folder, tmp_path):
    made = prepare(str(folder), tokenizer="bytes", cache=str(tmp_path / "cache"))
    other = prepare(str(folder), tokenizer="bytes", held_out=0.1, cache=str(tmp_path / "cache"))
    (made.folder / "train.tokens").write_bytes((other.folder / "train.tokens").read_bytes())
    with pytest.raises(CorpusError, match="train.tokens: its (count|source) is"):
        load_prepared(made.folder)
    with pytest.raises(CorpusError, match="cannot read .*nothing/facts.json: No such file"):
        load_prepared(tmp_path / "nothing")


def test_an_unwritable_cache_is_told_and_does_no_harm(folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    said = Said()
    options = {"tokenizer": "bytes", "cache": str(tmp_path / "file" / "below"), "say": said}
    made = prepare(str(folder), **options)
    assert not made.cached and any("not kept for the next run: " in text for text in said.texts())
    assert prepare(str(folder), **options, into=tmp_path / "run" / "data").folder == tmp_path / "run" / "data"


def test_who_has_no_home_has_no_cache(folder, monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # what it does then
    monkeypatch.chdir(tmp_path)
    assert not prepare(str(folder), tokenizer="bytes").cached
    assert [p.name for p in tmp_path.iterdir()] == ["text"]


def test_without_a_cache_the_tokens_go_where_they_are_wanted_and_are_found_there_again(folder, tmp_path):
    into = tmp_path / "run" / "data"
    first = prepare(str(folder), tokenizer="bytes", cache="off", into=into)
    second = prepare(str(folder), tokenizer="bytes", cache="off", into=into)
    assert first.folder == into and second.cached and [path.name for path in into.parent.iterdir()] == ["data"]
    assert not prepare(str(folder), tokenizer="bytes", cache="off", into=into, held_out=0.1).cached
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(CorpusError, match="mine is in the way: it holds something else"):
        prepare(str(folder), tokenizer="bytes", cache="off", into=tmp_path / "mine")
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"


def test_a_temporary_folder_goes_with_the_data(folder):
    made = prepare(str(folder), tokenizer="bytes", cache="off")
    tokens, where = made.train, made.folder
    assert where.is_dir()
    del made
    import gc

    gc.collect()
    assert not where.parent.exists() and tokens[0] < 257, "the map stays readable"


def test_text_that_cannot_be_used_leaves_no_folder_behind(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9")
    with pytest.raises(CorpusError):
        prepare(str(tmp_path / "bad.txt"), cache="off", into=tmp_path / "run" / "data")
    with pytest.raises(CorpusError):
        prepare(str(tmp_path / "bad.txt"), cache=str(tmp_path / "cache"))
    assert [path.name for path in tmp_path.iterdir()] == ["bad.txt"]


def test_progress_is_told_in_bytes_and_not_too_often(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(LINES * 100)
    size = (tmp_path / "a.txt").stat().st_size
    said = Said()
    clock = [0.0]
    monkeypatch.setattr("entrenar.data.streams.BLOCK", 10_000)
    monkeypatch.setattr("entrenar.data.scan.time.monotonic", lambda: clock.__setitem__(0, clock[0] + 0.1) or clock[0])
    prepare(str(tmp_path / "a.txt"), tokenizer="bytes", cache="off", say=said)
    encoding = [(done, total) for text, done, total in said if text == "encoding"]
    assert all(total == size for _, total in encoding)
    assert encoding[0][0] == 0 and [done for done, _ in encoding] == sorted(done for done, _ in encoding)
    assert 5 < len(encoding) < size / 10_000 / 2


def test_what_was_begun_and_left_alone_for_a_week_goes(folder, tmp_path):
    for name, age in (("old", 8 * 86400), ("young", 86400)):
        (tmp_path / "cache" / f"{name}.partial").mkdir(parents=True)
        os.utime(tmp_path / "cache" / f"{name}.partial", (time.time() - age,) * 2)
    made = prepare(str(folder), tokenizer="bytes", cache=str(tmp_path / "cache"))
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {made.folder.name, "young.partial"}


def test_a_pipe_among_prepared_files_is_refused_and_does_not_hang(folder, tmp_path):
    made = prepare(str(folder), tokenizer="bytes", cache=str(tmp_path / "cache"))
    for name in ("train.tokens", "facts.json", "names", "places", "tokenizer/tokenizer.json", "tokenizer/more"):
        path = made.folder / name
        raw = path.read_bytes() if path.exists() else None
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        with pytest.raises(CorpusError, match=path.name):
            load_prepared(made.folder)
        path.unlink()
        if raw is not None:
            path.write_bytes(raw)
    assert load_prepared(made.folder).identity == made.identity
