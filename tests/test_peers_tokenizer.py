"""Tokenizers against transformers, which loads what we save, and LLaMA-2's against the sentencepiece library."""

import io
import json
import random
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers", reason="make test-peers installs transformers")
spm = pytest.importorskip("sentencepiece", reason="make test-peers installs sentencepiece")

import tokenizer_kinds as kinds  # noqa: E402

from entrenar.data import load_tokenizer  # noqa: E402
from entrenar.data.sentencepiece import parse_model  # noqa: E402
from entrenar.llama import LlamaConfig  # noqa: E402

pytestmark = pytest.mark.peers

ALPHABET = [*" \n\t\rab1!'s.éE日😀\u0301\u200d\x00\x85\u3000<>/|", "  ", "the quick", " brown", "line 12: ",
            "don't", "\r\n", "本日は", "naïve ", "    return", *kinds.LINES[:300].split(" ")]  # fmt: skip


def fuzzed(count, seed=0):
    """Texts: pieces of what the tokenizers were made from, and any Unicode."""
    draw = random.Random(seed)
    for i in range(count):
        if i % 4:
            yield "".join(draw.choice(ALPHABET) + draw.choice(["", " "]) for _ in range(draw.randrange(1, 30)))
        else:
            points = [draw.choice([draw.randrange(0xD800), draw.randrange(0xE000, 0x110000)]) for _ in range(9)]
            yield "".join(map(chr, points))


@pytest.mark.parametrize("kind", sorted(set(kinds.KINDS)))
@pytest.mark.parametrize("beside_a_model", [False, True])
def test_transformers_loads_what_is_saved_and_gives_the_same_ids(kind, beside_a_model, tmp_path):
    (tmp_path / "from").mkdir()
    (tmp_path / "to").mkdir()
    kinds.KINDS[kind](tmp_path / "from")
    mine = load_tokenizer(tmp_path / "from")
    mine.save(tmp_path / "to")
    if beside_a_model:
        config = LlamaConfig(vocab_size=mine.vocab_size, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                             num_attention_heads=1, eos_token_id=mine.end_id).to_dict()  # fmt: skip
        (tmp_path / "to" / "config.json").write_text(json.dumps(config))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "to")
    for text in fuzzed(300):
        if kind == "llama2" and text.startswith((" ", "▁")):
            continue  # its own settings ask for LlamaTokenizer: see the last test
        ids = mine.encode(text).tolist()
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids, (text, type(theirs))
        if kind in kinds.KEEPS_TEXT and "▁" not in text:
            assert theirs.decode(ids, clean_up_tokenization_spaces=False) == text
    begins = theirs("text")["input_ids"][:1] == [mine.begin_id]
    assert begins == (mine.begin_id is not None and mine.begin_id != mine.end_id)
    if kind != "wordpiece":
        assert theirs.eos_token_id in (mine.end_id, mine.end_id + 1)  # Llama 3 instruct has two


def sentencepiece_model(**options):
    """A tokenizer.model trained by the library itself."""
    out = io.BytesIO()
    options = {"model_type": "bpe", "vocab_size": 700, "byte_fallback": True, "character_coverage": 0.99} | options
    lines = [line for text in kinds.TEXT for line in text.splitlines()]
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, minloglevel=9, hard_vocab_limit=False,
        **{"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "split_digits": True,
           "allow_whitespace_only_pieces": True} | options,
    )  # fmt: skip
    return out.getvalue()


@pytest.mark.parametrize(
    "options",
    [{}, {"add_dummy_prefix": False}, {"remove_extra_whitespaces": True}, {"byte_fallback": False},
     {"vocab_size": 1200, "allow_whitespace_only_pieces": False}],
    ids=lambda options: ",".join(options) or "LLaMA-2's",
)  # fmt: skip
def test_a_bpe_tokenizer_model_gives_the_ids_of_sentencepiece(options):
    raw = sentencepiece_model(**options)
    theirs = spm.SentencePieceProcessor(model_proto=raw)
    mine = parse_model(raw, "tokenizer.model").tokenizer()
    mine.encode_special_tokens = True
    for text in [*fuzzed(3000, seed=1), "", " ", "▁", "a ▁ b▁ ", "<s>", "<0x0A>", "<unk></s>"]:
        assert mine.encode(text, add_special_tokens=False).ids == theirs.encode(text), text


def test_the_other_libraries_text_of_ids_is_ours(tmp_path):
    raw = sentencepiece_model()
    Path(tmp_path, "tokenizer.model").write_bytes(raw)
    theirs, mine = spm.SentencePieceProcessor(model_proto=raw), load_tokenizer(tmp_path)
    for text in fuzzed(2000, seed=2):
        ids = theirs.encode(text)
        assert mine.encode(text).tolist() == ids and mine.decode(ids) == theirs.decode(ids) == text


def test_a_unigram_model_finds_pieces_of_the_same_total_score():
    """Not always the same pieces: where two ways have the same sum, rounding decides in each library."""
    raw = sentencepiece_model(model_type="unigram", vocab_size=450)
    theirs, model = spm.SentencePieceProcessor(model_proto=raw), parse_model(raw, "tokenizer.model")
    mine = model.tokenizer()
    mine.encode_special_tokens = True
    same = 0
    for text in fuzzed(2000, seed=3):
        a, b = theirs.encode(text), mine.encode(text, add_special_tokens=False).ids
        same += a == b
        assert sum(theirs.get_score(i) for i in a) == pytest.approx(sum(theirs.get_score(i) for i in b), rel=1e-5)
    assert same > 1980


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, "normalises text by a table"),
        ({"user_defined_symbols": ["<tool>"]}, "1 pieces are user-defined, '<tool>' the first"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix"),
        ({"model_type": "char", "byte_fallback": False}, "its model is of type characters"),
    ],
)
def test_what_a_tokenizer_json_cannot_say_is_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        parse_model(sentencepiece_model(**options), "tokenizer.model").tokenizer()


def test_llama_tokenizer_of_transformers_agrees_on_texts_that_do_not_begin_with_a_space(tmp_path):
    """Of one that does, transformers 5 takes the first space for the one LLaMA-2 puts before every text."""
    kinds.llama2(tmp_path)
    mine = load_tokenizer(tmp_path)
    theirs = transformers.LlamaTokenizer.from_pretrained(tmp_path)
    for text in fuzzed(500, seed=4):
        if not text.startswith((" ", "▁")):
            assert theirs(text, add_special_tokens=False)["input_ids"] == mine.encode(text).tolist(), text
    assert theirs("text")["input_ids"][0] == mine.begin_id
