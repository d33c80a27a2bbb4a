"""Tokenizers: every kind reads, cuts, decodes and saves text without loss, and refuses what it cannot."""

import json
import re
import time
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import tokenizer_kinds as kinds
from hypothesis import strategies as st
from tokenizer_kinds import BYTES, CONTROL, LINES, UNKNOWN, UNUSED, USER_DEFINED, field, model_file

from entrenar.data import END, ByteTokenizer, TokenizerError, load_tokenizer, tokenizer_cuts, train_bpe
from entrenar.data import tokenizer as tokenizer_module
from entrenar.data import tokenizer_protocol as protocol_module
from entrenar.data.sentencepiece import parse_model

TEXTS = [
    "",
    "plain",
    "  four\n    spaces\t\tend ",
    "naïve café 😀 日本語\r\n",
    f"a {END} in a text</s><s><unk><|eot_id|><0x0A><|begin_of_text|>",
    "\x00\x1b\x7f",
    "שלום עולם: مرحبا 👩‍👩‍👧‍👦",
    " " * 100 + "\n" * 30,
]
WORDS = [*" \n\t\rab1!'s.é日😀\u0301\u200d\x00\x85\u3000<>/|", "  ", "\r\n", "the quick", " brown", "</s>", END,
         "<0x0A>", "<|eot_id|>", "<unk>", "don't", *LINES[:200].split(" ")]  # fmt: skip
any_text = st.text(max_size=40) | st.lists(st.sampled_from(WORDS), max_size=25).map("".join)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with each kind of tokenizer, by name."""
    folders = {}
    for name, make in kinds.KINDS.items():
        folders[name] = tmp_path_factory.mktemp(name)
        make(folders[name])
    return folders


@pytest.fixture(scope="module")
def every(made):
    return {name: load_tokenizer(folder) for name, folder in made.items()}


@pytest.fixture(scope="module")
def bpe():
    return train_bpe([LINES, "def f(x):\n    return x\n" * 20], vocab_size=400)


# --- text and back ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_decode_undoes_encode(bpe, text):
    for tokenizer in (bpe, ByteTokenizer()):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.end_id not in ids  # not even where the text spells it
        assert tokenizer.byte_lengths()[ids].sum() == len(text.encode())


@pytest.mark.parametrize("name", kinds.KEEPS_TEXT)
@hypothesis.given(text=any_text)
@hypothesis.example(text=TEXTS[4])
@hypothesis.example(text=TEXTS[6])
def test_any_text_comes_back(every, name, text):
    text = text.replace("\u2581", " ") if name.startswith("llama2") else text  # which is what it stands for there
    tokenizer = every[name]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text.encode())) == text


@pytest.mark.parametrize("name", kinds.KINDS)
@hypothesis.given(text=any_text)
@hypothesis.example(text=TEXTS[4])
def test_text_that_spells_a_special_token_stays_text(every, name, text):
    tokenizer = every[name]
    ids = tokenizer.encode(text)
    assert ids.dtype == np.uint16
    assert not {tokenizer.end_id, tokenizer.begin_id} & set(ids.tolist())
    if name in kinds.BYTE_LEVEL:
        assert tokenizer.byte_lengths()[ids].sum() == len(text.encode())


def test_what_spells_a_special_token_gets_the_tokens_of_any_other_text():
    from tokenizers import Tokenizer

    tokenizer = train_bpe(["f <| g |> h\n" * 50], vocab_size=300)
    plain = Tokenizer.from_str(json.dumps(json.loads(tokenizer.inner.to_str()) | {"added_tokens": []}))
    ids = tokenizer.encode(f"x {END}").tolist()
    assert ids == plain.encode(f"x {END}").ids
    assert plain.token_to_id("Ġ<|") in ids


def test_a_unigram_model_does_not_take_the_names_of_its_tokens_for_them(every):
    """Its vocabulary is searched for anything a text may hold, `<0x0A>` and `<unk>` too."""
    tokenizer = every["unigram"]
    for text in ("a <0x0A> b", "<unk>", "a</s>", "<0x0A<0x0A>>"):
        ids = tokenizer.encode(text).tolist()
        assert tokenizer.decode(ids) == text
        assert not {0, 1, tokenizer.inner.token_to_id("<0x0A>")} & set(ids)


def test_the_first_space_of_llama2_is_added_and_taken_away(every):
    tokenizer = every["llama2"]
    ids = tokenizer.encode("the end")
    assert tokenizer.inner.id_to_token(int(ids[0])).startswith("▁")
    assert tokenizer.decode(ids) == "the end"
    assert tokenizer.decode([*ids, tokenizer.end_id, *ids]) == "the end</s> the end"
    assert tokenizer.decode(tokenizer.encode("  two spaces")) == "  two spaces"


def test_byte_lengths_count_what_a_token_writes(every):
    tokenizer = every["llama2"]
    lengths = tokenizer.byte_lengths()
    by_text = {text: lengths[tokenizer.inner.token_to_id(text)] for text in ("<s>", "</s>", "<0x0A>", "▁", "▁the", "é")}
    assert by_text == {"<s>": 0, "</s>": 0, "<0x0A>": 1, "▁": 1, "▁the": 4, "é": 2}


@pytest.mark.parametrize("name", kinds.KINDS)
def test_what_is_no_unicode_is_refused_with_its_place(every, name):
    with pytest.raises(TokenizerError, match=r"character 2 of the text is U\+D800, half of a surrogate pair"):
        every[name].encode("ab\ud800c")
    if name != "plain_bytes":
        with pytest.raises(TokenizerError, match="byte 2 of the text is 0xff, not UTF-8"):
            every[name].encode(b"ab\xffc")
    else:
        assert every[name].encode(b"ab\xffc").tolist() == [97, 98, 255, 99]


# --- token by token --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", kinds.KINDS)
@hypothesis.given(data=st.data())
def test_text_pushed_token_by_token_is_the_text_of_all(every, name, data):
    tokenizer = every[name]
    any_ids = st.lists(st.integers(0, tokenizer.vocab_size + 5), max_size=20)
    ids = data.draw(any_ids | any_text.map(lambda text: tokenizer.encode(text).tolist()))
    decoder = tokenizer.decoder()
    assert "".join(map(decoder.push, ids)) + decoder.end() == tokenizer.decode(ids)


def test_no_half_character_is_ever_pushed():
    decoder, tokenizer = ByteTokenizer().decoder(), ByteTokenizer()
    assert [decoder.push(i) for i in tokenizer.encode("é日!")] == ["", "é", "", "", "日", "!"]
    assert (decoder.push(0xE6), decoder.end()) == ("", "\ufffd")


def test_what_goes_on_after_a_prompt_keeps_its_space(every):
    tokenizer = every["llama2"]
    prompt, more = tokenizer.encode("the"), tokenizer.encode("quick")
    decoder = tokenizer.decoder(after=[tokenizer.begin_id, *prompt])
    assert "".join(map(decoder.push, more)) == " quick"


@pytest.mark.parametrize("name", ["ours", "llama3", "smollm"])
@hypothesis.given(ids=st.lists(st.integers(0, 345), max_size=20))
def test_decoding_agrees_with_the_tokenizers_library(every, name, ids):
    tokenizer = every[name]
    assert tokenizer.decode(ids) == tokenizer.inner.decode(ids, skip_special_tokens=False)


# --- documents and cuts ----------------------------------------------------------------------------------


def test_documents_end_with_the_end_token(bpe):
    for tokenizer in (bpe, ByteTokenizer()):
        ids = tokenizer.encode_documents(["one", "", "two"])
        assert tokenizer.decode(ids) == f"one{END}{END}two{END}"
        assert ids.dtype == np.uint16
        assert len(tokenizer.encode_documents([])) == 0


@pytest.mark.parametrize("name", kinds.KINDS)
@hypothesis.given(text=any_text, at=st.integers(-1, 60))
def test_a_cut_changes_no_token(every, name, text, at):
    tokenizer = every[name]
    place = tokenizer.cut(text, at)
    if place is not None:
        assert max(1, at) <= place < len(text)
        parts = tokenizer.encode_batch([text[:place], text[place:]], continued=[False, True])
        assert np.concatenate(parts).tolist() == tokenizer.encode(text).tolist()


@pytest.mark.parametrize("regex", tokenizer_cuts.KNOWN)
@hypothesis.given(text=st.text("\n\n\n\r /!a'sA1.\u0301日 ", max_size=30) | any_text)
@hypothesis.example(text="}\n// words\n")
def test_no_word_of_the_known_regular_expressions_runs_over_a_cut(regex, text):
    from tokenizers import Regex, pre_tokenizers

    def words(part):
        return [word for word, _ in splitter.pre_tokenize_str(part)]

    splitter, line = pre_tokenizers.Split(Regex(regex), "isolated"), tokenizer_cuts.KNOWN[regex]
    for found in line.finditer(text):
        assert words(text[: found.end()]) + words(text[found.end() :]) == words(text)


def test_where_slashes_belong_to_the_word_before_a_line_of_them_is_no_cut():
    text = "}\n// words\nmore"
    assert [m.end() for m in tokenizer_cuts.KNOWN[tokenizer_cuts.CL100K].finditer(text)] == [2, 11]
    assert [m.end() for m in tokenizer_cuts.KNOWN[tokenizer_cuts.O200K].finditer(text)] == [11]


def test_elsewhere_a_cut_would_change_tokens(every):
    """So that the test above can fail at all."""
    for name in set(kinds.KINDS) - {"plain_bytes", "wordpiece"}:
        parts = every[name].encode_batch(["the qui", "ck"], continued=[False, True])
        assert np.concatenate(parts).tolist() != every[name].encode("the quick").tolist(), name


def test_where_texts_may_be_cut(every):
    text = "the quick\nbrown fox"
    places = {name: tokenizer.cut(text, 4) for name, tokenizer in every.items()}
    lines = dict.fromkeys(("ours", "llama3", "smollm", "qwen", "wordpiece"), 10)
    assert places == lines | {"plain_bytes": 4, "llama2": 9, "llama2_bare": 9, "llama2_json": 9, "unigram": 15}
    assert every["ours"].cut("two\n  indented", 1) is None


SPLIT = {"type": "Split", "pattern": {"Regex": "[^!]+"}, "behavior": "Isolated", "invert": False}
PREFIXED = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("ours", {"pre_tokenizer": SPLIT}),
        ("ours", {"pre_tokenizer": PREFIXED, "added_tokens": [{"id": 5, "content": "x", "special": False}]}),
        ("llama2_json", {"added_tokens": [{"id": 300, "content": "brown", "special": False}]}),
        ("llama2_json", {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}}),
        ("unigram", {"pre_tokenizer": None}),
    ],
)  # fmt: skip
def test_what_is_not_known_to_be_safe_is_cut_nowhere(made, tmp_path, name, changes):
    values = json.loads((made[name] / "tokenizer.json").read_text())
    end = [token for token in values["added_tokens"] if token["special"]]
    for token in (added := changes.get("added_tokens", [])):
        token |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    (tmp_path / "tokenizer.json").write_text(json.dumps(values | changes | {"added_tokens": end + added}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.cut("the quick\nbrown fox\nand more " * 5, 3) is None
    assert tokenizer.encode_documents(["the quick\nbrown"])[-1] == tokenizer.end_id


def test_pieces_of_a_long_document_give_the_tokens_of_the_whole(every, bpe, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "PIECE", 50)
    monkeypatch.setattr(protocol_module, "PIECE", 50)
    monkeypatch.setattr(protocol_module, "SLAB", 400)
    text = LINES + "\n\n  indented\n\nnot\n" * 40 + LINES
    assert len(list(tokenizer_module.pieces_of(text))) > 20
    assert "".join(tokenizer_module.pieces_of(text)) == text
    np.testing.assert_array_equal(bpe.encode_documents([text])[:-1], bpe.encode(text))
    for tokenizer in every.values():
        whole = [*tokenizer.encode(text), tokenizer.end_id]
        np.testing.assert_array_equal(tokenizer.encode_documents([text, "", text]), [*whole, tokenizer.end_id, *whole])


# --- saving and loading ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", kinds.KINDS)
def test_a_saved_tokenizer_reads_back_the_same(every, made, name, tmp_path):
    tokenizer = every[name]
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    for fact in ("kind", "vocab_size", "end_id", "begin_id"):
        assert getattr(again, fact) == getattr(tokenizer, fact), fact
    for text in TEXTS:
        np.testing.assert_array_equal(again.encode(text), tokenizer.encode(text))
    for file in made[name].iterdir():
        if file.name == "generation_config.json":
            continue  # the model's, of which only the ids are kept
        assert name == "plain_bytes" or (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_end_tokens_that_only_the_models_files_name_are_kept(tmp_path):
    (tmp_path / "a").mkdir()
    kinds.llama3(tmp_path / "a")
    (tmp_path / "a" / "generation_config.json").unlink()
    size = load_tokenizer(tmp_path / "a").vocab_size
    (tmp_path / "a" / "config.json").write_text(json.dumps({"eos_token_id": [size - 2, size - 1]}))
    (tmp_path / "b").mkdir()
    load_tokenizer(tmp_path / "a").save(tmp_path / "b")
    assert load_tokenizer(tmp_path / "b").end_id == size - 2
    assert json.loads((tmp_path / "b" / "generation_config.json").read_text())["eos_token_id"] == size - 2


@pytest.mark.parametrize(
    ("files", "end"),
    [
        ({}, "<|end_of_text|>"),
        ({"special_tokens_map.json": {"eos_token": {"content": "<|eot_id|>"}}}, "<|eot_id|>"),
        ({"special_tokens_map.json": {"eos_token": "x"}, "tokenizer_config.json": {"eos_token": "<|eot_id|>"}},
         "<|eot_id|>"),
        ({"tokenizer_config.json": {"eos_token": "<|end_of_text|>"}, "config.json": {"eos_token_id": 502}},
         "<|eot_id|>"),
        ({"config.json": {"eos_token_id": 501}, "generation_config.json": {"eos_token_id": [502, 501]}}, "<|eot_id|>"),
        ({"config.json": {"eos_token_id": 2}}, "<|end_of_text|>"),  # an ordinary token: the config of another tokenizer
        ({"config.json": {"eos_token_id": None}, "generation_config.json": {"eos_token_id": []}}, "<|end_of_text|>"),
    ],
)  # fmt: skip
def test_the_end_token_is_looked_for_in_order(made, tmp_path, files, end):
    (tmp_path / "tokenizer.json").write_bytes((made["llama3"] / "tokenizer.json").read_bytes())
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.inner.id_to_token(tokenizer.end_id) == end
    assert load_tokenizer(tmp_path / "tokenizer.json").end_id == tokenizer.end_id


def test_who_has_no_end_token_is_told_where_it_was_looked_for(made, tmp_path):
    values = json.loads((made["ours"] / "tokenizer.json").read_text().replace(END, "<|unusual|>"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(TokenizerError, match="has no token that ends a text.*name it as eos_token"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|unusual|>"}')
    assert load_tokenizer(tmp_path).end_id == 0


def test_texts_begin_with_a_token_where_the_files_say_so(every, made, tmp_path):
    begins = {name: t.begin_id for name, t in every.items()}
    assert begins == {"ours": 0, "plain_bytes": 256, "llama3": 500, "smollm": None, "qwen": None, "llama2": 1,
                      "llama2_bare": 1, "llama2_json": 1, "unigram": None, "wordpiece": None}  # fmt: skip
    (tmp_path / "tokenizer.json").write_bytes((made["llama3"] / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert load_tokenizer(tmp_path).begin_id is None


def test_plain_bytes_saved_mean_the_same_to_the_tokenizers_library(tmp_path):
    from tokenizers import Tokenizer

    ByteTokenizer().save(tmp_path)
    other = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    every = "".join(map(chr, range(0x250))) + "日本😀"
    assert other.encode(every).ids == list(every.encode())
    assert other.decode(list(every.encode())) == every
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == END


def test_what_makes_tokens_depend_on_chance_or_length_is_taken_away(made, tmp_path):
    values = json.loads((made["ours"] / "tokenizer.json").read_text())
    values["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    values["padding"] = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
                         "pad_type_id": 0, "pad_token": END}  # fmt: skip
    values["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    np.testing.assert_array_equal(load_tokenizer(tmp_path).encode(LINES), load_tokenizer(made["ours"]).encode(LINES))


def test_training_a_tokenizer_is_repeatable(bpe):
    again = train_bpe([LINES, "def f(x):\n    return x\n" * 20], vocab_size=400)
    assert again.inner.to_str() == bpe.inner.to_str()
    assert bpe.vocab_size <= 400


# --- LLaMA-2's tokenizer.model ---------------------------------------------------------------------------


BEGIN = [("<unk>", 0, UNKNOWN), ("<s>", 0, CONTROL), ("</s>", 0, CONTROL), *((name, 0, kinds.BYTE) for name in BYTES)]


def ids_of(text, pieces, **options):
    inner = parse_model(model_file(BEGIN + pieces, **options), "tokenizer.model").tokenizer()
    return [inner.id_to_token(i) for i in inner.encode(text, add_special_tokens=False).ids]


def test_the_highest_score_merges_first():
    pieces = [("▁", -8), ("a", -9), ("b", -9), ("c", -9), ("ab", -3), ("bc", -2), ("abc", -5)]
    assert ids_of("abc", pieces) == ["▁", "abc"]
    assert ids_of("abc", [*pieces[:-1]]) == ["▁", "a", "bc"]
    assert ids_of("abc", [*pieces[:-1]], dummy_prefix=False) == ["a", "bc"]
    assert ids_of("abé", [*pieces[:-1]]) == ["▁", "ab", "<0xC3>", "<0xA9>"]


def test_extra_spaces_go_where_the_file_says_so():
    pieces = [("▁", -8), ("a", -9), ("▁a", -3)]
    assert ids_of("  a  a ", pieces, extra=True) == ["▁a", "▁a"]
    assert ids_of("  a  a ", pieces) == ["▁", "▁", "▁a", "▁", "▁a", "▁"]


@pytest.mark.parametrize(
    ("pieces", "options", "message"),
    [
        ([("x", 0, USER_DEFINED)], {}, "1 pieces are user-defined, 'x' the first; convert it with transformers"),
        ([("x", 0, UNUSED)], {}, "1 pieces are unused, 'x' the first"),
        ([("x", 0), ("x", 1)], {}, "the piece 'x' is there twice"),
        ([], {"model_type": 3}, "its model is of type words; wanted BPE or unigram"),
        ([], {"model_type": 77}, "its model is of type 77"),
        ([], {"trainer": field(42, 9999)}, "eos_id = 9999 is no control piece among its 259"),
        ([], {"trainer": field(40, -1)}, "it has no unknown token"),
        ([], {"trainer": field(41, 5)}, "bos_id = 5 is no control piece"),
        ([], {"trainer": field(24, 1)}, "treat_whitespace_as_suffix"),
        ([], {"normalizer": field(5, 0)}, "escape_whitespaces"),
        ([], {"normalizer": field(2, b"table")}, "precompiled_charsmap"),
        ([("a", 0), ("b", 0), ("ab", -1), ("ba", -1)], {}, "the pieces 'ab' and 'ba' have the same score, -1"),
    ],
)
def test_what_a_tokenizer_json_cannot_say_is_refused_by_name(tmp_path, pieces, options, message):
    (tmp_path / "tokenizer.model").write_bytes(model_file(BEGIN + pieces, **options))
    with pytest.raises(TokenizerError, match=re.escape(message)) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path / "tokenizer.model") in str(error.value)


def test_missing_bytes_are_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(model_file([piece for piece in BEGIN if piece[0] != "<0x41>"]))
    with pytest.raises(TokenizerError, match="1 of the 256 byte pieces are missing, <0x41> for one"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "is empty"),
        (b"IQ== 0\nIg== 1\n", "looks like a tiktoken file"),
        (b"\x00\x00", "byte 0: has the field number 0"),
        (b"\x0b\x00", "byte 0: field 1 is of wire type 3, which sentencepiece never writes"),
        (b"\xff" * 20, "byte 0: a number has more than 10 bytes"),
        (b"\x0a" + b"\xff" * 8 + b"\x7f", "byte 0: field 1 has 9,223,372,036,854,775,807 bytes where 0 are left"),
        (b"\x08\x01", "a piece is no message"),
        (field(1, field(1, 5)), "byte 2: field 1 of a piece is of the wrong type"),
        (field(1, field(1, b"\xff")), "the piece b'\\xff' is not UTF-8"),
        (field(1, field(1, "x" * 129)), "a piece has 129 characters, wanted 1 to 128"),
        (field(1, field(1, "x") + field(3, 9)), "the piece 'x' is of type 9, wanted 1 to 6"),
        (field(1, field(1, "x") + field(2, float("nan"))), "the piece 'x' has the score nan"),
        (field(1, field(1, "x")), "it has 1 pieces and no trainer_spec"),
        (field(1, field(1, "x")) + field(2, field(3, "x")), "field 3 of its trainer_spec or normalizer_spec"),
    ],
)
def test_a_broken_tokenizer_model_is_refused_with_its_place(tmp_path, raw, message):
    (tmp_path / "tokenizer.model").write_bytes(raw)
    with pytest.raises(TokenizerError, match=re.escape(message)):
        load_tokenizer(tmp_path)


def test_a_tokenizer_model_cut_off_anywhere_is_refused():
    raw = model_file(BEGIN[:3] + [("▁", -1), ("a", -2), ("▁a", -1)], byte_fallback=False)
    whole, start = parse_model(raw, "x"), time.process_time()
    assert len(whole.pieces) == 6
    for length in range(len(raw)):
        # what ends between two specifications is whole by its own account: how to treat spaces has a default
        try:
            assert parse_model(raw[:length], "x").pieces == whole.pieces
        except ValueError as error:
            assert re.match("x: (is no sentencepiece model|is empty)", str(error)), length
        else:
            assert raw[length:].startswith(field(3, field(1, "identity") + field(3, 1) + field(4, 0)))
    assert time.process_time() - start < 1


# --- broken files ----------------------------------------------------------------------------------------


def test_bad_tokenizers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="vocab_size = 256: wanted >= 257"):
        train_bpe(["x"], vocab_size=256)
    with pytest.raises(TokenizerError, match="cannot read.*holds neither a tokenizer.json nor a tokenizer.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match="cannot read .*nothing.json: No such file"):
        load_tokenizer(tmp_path / "nothing.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "is no tokenizer.json: wanted an object with a 'model'"),
        ("", "is empty"),
        ('{"model": {}, "model": {}}', "the key 'model' is there twice"),
        ("[" * 100_000, "line 1 column"),
        ('{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}', "no tokenizer.json of the"),
        ('{"model": {"type": "BPE", "vocab": [1], "merges": []}}', "no tokenizer.json of the tokenizers library"),
        ('{"version":"1.0","added_tokens":[],"model":{"type":"BPE","vocab":{"</s>":0,"a":4000000000},"merges":[]}}',
         "2 tokens with ids up to 4,000,000,000: wanted ids in a row"),
        ('{"version":"1.0","added_tokens":[],"model":{"type":"BPE","vocab":{},"merges":[]}}', "has no token that ends"),
        ('{"version":"1.0","added_tokens":[],"normalizer":{"type":"Precompiled","precompiled_charsmap":"AAAA"},'
         '"model":{"type":"BPE","vocab":{"</s>":0},"merges":[]}}', "no tokenizer.json of the tokenizers library"),
        ('{"version":"1.0","added_tokens":[],"post_processor":{"type":"TemplateProcessing","single":[{"SpecialToken":'
         '{"id":"x","type_id":0}}],"pair":[],"special_tokens":{}},"model":{"type":"BPE","vocab":{"</s>":0,"<s>":1},'
         '"merges":[]}}', "its post-processor fails"),  # Rust panics here
    ],
    ids=range(10),
)  # fmt: skip
def test_a_broken_tokenizer_json_is_refused_at_once(tmp_path, content, message):
    (tmp_path / "tokenizer.json").write_text(content)
    start = time.process_time()
    with pytest.raises(TokenizerError, match=re.escape(message)) as error:
        load_tokenizer(tmp_path)
    assert time.process_time() - start < 1 and len(str(error.value)) < 800


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", "{", "config.json line 1"),
        ("config.json", '{"eos_token_id": "x"}', "config.json: eos_token_id = 'x': wanted a token's id"),
        ("generation_config.json", '{"eos_token_id": true}', "generation_config.json: eos_token_id = True"),
        ("generation_config.json", '{"bos_token_id": [1.5]}', "bos_token_id = [1.5]"),
        ("tokenizer_config.json", '{"eos_token": 3}', "tokenizer_config.json: eos_token = 3: wanted a text"),
        ("tokenizer_config.json", '{"add_bos_token": "yes"}', "add_bos_token = 'yes': wanted true or false"),
        ("special_tokens_map.json", "[]", "special_tokens_map.json: wanted an object"),
    ],
)
def test_broken_files_beside_a_tokenizer_are_named(made, tmp_path, name, content, message):
    (tmp_path / "tokenizer.json").write_bytes((made["llama3"] / "tokenizer.json").read_bytes())
    (tmp_path / name).write_text(content)
    with pytest.raises(TokenizerError, match=re.escape(message)):
        load_tokenizer(tmp_path)


def test_a_tokenizer_json_cut_off_anywhere_is_refused(made, tmp_path):
    raw = (made["llama3"] / "tokenizer.json").read_bytes().rstrip()
    for length in range(0, len(raw), len(raw) // 60):
        (tmp_path / "tokenizer.json").write_bytes(raw[:length])
        with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
            load_tokenizer(tmp_path)


def test_a_token_that_no_text_can_avoid_is_refused(made, tmp_path):
    """A special token of one letter: a text with that letter cannot be told from it."""
    values = json.loads((made["llama2_json"] / "tokenizer.json").read_text())
    letter = next(text for text in values["model"]["vocab"] if text == "q")
    added = {"id": values["model"]["vocab"][letter], "content": letter, "special": True}
    added |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    values["added_tokens"].append(added)
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("a word")) == "a word"
    with pytest.raises(TokenizerError, match="cannot keep a text that spells 'q' apart from that token"):
        tokenizer.encode("q!")


def test_a_folder_in_place_of_a_file_is_told(tmp_path):
    Path(tmp_path, "tokenizer.json").mkdir()
    with pytest.raises(TokenizerError, match="is no regular file"):
        load_tokenizer(tmp_path)
