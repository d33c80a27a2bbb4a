"""Tokenizers of every kind, made here: small, quick to make, and built like the ones in use."""

import json
import struct
from pathlib import Path

from preparing import LINES

from entrenar.data import END, ByteTokenizer, load_tokenizer, train_bpe
from entrenar.data.tokenizer_cuts import CL100K

TEXT = [LINES, "def f(x):\n    return x\n" * 20, "naïve café, 日本語 and Москва: it's the    end\r\n" * 20]

UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 2, 3, 4, 5, 6
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


# --- protocol buffers, just enough to write a tokenizer.model -------------------------------------------


def varint(value):
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number, value):
    """An int as a varint, a float as four bytes, bytes and texts with their length."""
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value & (1 << 64) - 1)
    raw = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(raw)) + raw


def piece(text, score=0.0, kind=1):
    return field(1, field(1, text) + field(2, float(score)) + (field(3, kind) if kind != 1 else b""))


def model_file(pieces, *, model_type=2, byte_fallback=True, trainer=b"", dummy_prefix=True, extra=False,
               normalizer=b""):  # fmt: skip
    """The bytes of a tokenizer.model: `pieces` are (text, score, type)."""
    trainer = field(3, model_type) + field(35, int(byte_fallback)) + trainer
    normalizer = field(1, "identity") + field(3, int(dummy_prefix)) + field(4, int(extra)) + normalizer
    return b"".join(piece(*p) for p in pieces) + field(2, trainer) + field(3, normalizer)


def llama2_pieces(vocab_size=500):
    """As LLaMA-2's: control tokens, the bytes, merged pieces with falling scores, single characters."""
    from tokenizers import Tokenizer, models, trainers

    learned = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 259, show_progress=False, max_token_length=16)
    words = [w for text in TEXT for line in text.split("\n") for w in f"▁{line}".replace(" ", " ▁").split(" ")]
    learned.train_from_iterator([word for word in words if "日" not in word] + ["▁▁"] * 9 + ["▁▁▁▁"] * 9, trainer)
    vocab = sorted(learned.get_vocab().items(), key=lambda item: item[1])
    merged = [text for text, _ in vocab if len(text) > 1] + [text for text, _ in vocab if len(text) == 1]
    begin = [("<unk>", 0, UNKNOWN), ("<s>", 0, CONTROL), ("</s>", 0, CONTROL)] + [(name, 0, BYTE) for name in BYTES]
    return begin + [(text, -i, 1) for i, text in enumerate(merged)]


# --- folders ---------------------------------------------------------------------------------------------


def ours(folder):
    train_bpe(TEXT, vocab_size=400).save(folder)


def plain_bytes(folder):
    ByteTokenizer().save(folder)


def llama3(folder):
    """Byte-level BPE, words by Llama 3's regular expression, whole words first, special tokens behind the rest."""
    from tokenizers import Regex, decoders, pre_tokenizers

    inner = _byte_bpe(
        pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(CL100K), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])
    )  # fmt: skip
    inner.model.ignore_merges = True
    inner.decoder = decoders.ByteLevel()
    size = inner.get_vocab_size()
    _begin(inner, ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    _write(folder, inner, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"})
    Path(folder, "generation_config.json").write_text(json.dumps({"eos_token_id": [size + 1, size + 2]}))
    Path(folder, "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}\r\n")


def smollm(folder):
    """Digits one by one, then GPT-2's words."""
    from tokenizers import decoders, pre_tokenizers

    inner = _byte_bpe(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    )
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([END, "<|im_start|>"])
    _write(folder, inner, {"bos_token": "<|im_start|>", "eos_token": END})


def qwen(folder):
    """As smollm, and text is normalised first."""
    from tokenizers import Tokenizer, normalizers

    smollm(folder)
    inner = Tokenizer.from_file(str(Path(folder, "tokenizer.json")))
    inner.normalizer = normalizers.NFC()
    inner.save(str(Path(folder, "tokenizer.json")))


def llama2(folder):
    Path(folder, "tokenizer.model").write_bytes(model_file(llama2_pieces()))
    tokens = {f"{name}_token": {"__type": "AddedToken", "content": text, "lstrip": False, "normalized": True,
                                "rstrip": False, "single_word": False}
              for name, text in (("bos", "<s>"), ("eos", "</s>"), ("unk", "<unk>"))}  # fmt: skip
    settings = {"add_bos_token": True, "add_eos_token": False, "tokenizer_class": "LlamaTokenizer"} | tokens
    Path(folder, "tokenizer_config.json").write_text(json.dumps(settings))


def llama2_bare(folder):
    """Nothing but the tokenizer.model."""
    llama2(folder)
    Path(folder, "tokenizer_config.json").unlink()


def llama2_json(folder):
    """The same tokenizer as transformers 5 writes it: a Metaspace that splits nothing."""
    from tokenizers import Tokenizer, pre_tokenizers

    llama2(folder)
    load_tokenizer(folder).save(folder)
    inner = Tokenizer.from_file(str(Path(folder, "tokenizer.json")))
    inner.normalizer = None
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.save(str(Path(folder, "tokenizer.json")))
    Path(folder, "tokenizer.model").unlink()


def unigram(folder):
    """Words that begin with a space, pieces with scores, bytes to fall back on, as T5's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    scores = [(text, -3 - 0.37 * i**0.5) for i, (text, _, kind) in enumerate(llama2_pieces()) if kind == 1]
    vocab = [("<unk>", 0.0), ("</s>", 0.0), *((name, 0.0) for name in BYTES), *scores]
    inner = Tokenizer(models.Unigram(vocab, unk_id=0, byte_fallback=True))
    inner.add_special_tokens(["<unk>", "</s>"])
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    _write(folder, inner, {"eos_token": "</s>", "unk_token": "<unk>"})


def wordpiece(folder):
    """BERT's, which keeps words and loses the space between them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted({c for text in TEXT for c in text if not c.isspace()})
    vocab = ["[UNK]", "[SEP]", *letters, *(f"##{c}" for c in letters), "the", "quick", "##own"]
    inner = Tokenizer(models.WordPiece({text: i for i, text in enumerate(vocab)}, unk_token="[UNK]"))
    inner.add_special_tokens(["[UNK]", "[SEP]"])
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    _write(folder, inner, {"eos_token": "[SEP]"})


MAKERS = (ours, plain_bytes, llama3, smollm, qwen, llama2, llama2_bare, llama2_json, unigram, wordpiece)
KINDS = {make.__name__: make for make in MAKERS}
BYTE_LEVEL = ("ours", "plain_bytes", "llama3", "smollm")
KEEPS_TEXT = (*BYTE_LEVEL, "llama2", "llama2_bare")


def _byte_bpe(words):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = words
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False))
    return inner


def _begin(inner, special):
    from tokenizers import processors

    inner.add_special_tokens(special)
    first = special[0]
    inner.post_processor = processors.TemplateProcessing(
        single=f"{first} $A", pair=f"{first} $A {first}:1 $B:1", special_tokens=[(first, inner.token_to_id(first))]
    )


def _write(folder, inner, settings):
    inner.save(str(Path(folder, "tokenizer.json")))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | settings
    Path(folder, "tokenizer_config.json").write_text(json.dumps(settings))
