"""Bad tokenizers: tokenizer.json, tokenizer.model, and the small files beside them."""

from __future__ import annotations

import functools
import json
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tokenizer_kinds import BYTES, field, llama2_pieces, model_file, piece, varint

from entrenar.data import END, TokenizerError, load_tokenizer
from hostile.case import WHOLE, Case, Family, bad_json, bytes_at, cuts, flips, not_files, others, tree_mutations

JSON, MODEL, SETTINGS, CONFIG, GENERATION = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "config.json",
    "generation_config.json",
)
TEXT = f"hello world\n  ünïcode 日本 <s> {END} \0 aab"
UNKNOWN, CONTROL, NORMAL, BYTE = 2, 3, 1, 6


def errors() -> tuple[type[BaseException], ...]:
    return (TokenizerError,)


def digest_of(path: Path) -> str:
    """Read, and everything a run does with it."""
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode(TEXT)
    told = [tokenizer.kind, tokenizer.vocab_size, tokenizer.end_id, tokenizer.begin_id, ids.tolist()]
    told += [tokenizer.decode(ids), tokenizer.byte_lengths().tolist()]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
    return repr(told)


def folder_of(files: dict[str, Any], after: Callable[[Path], Any] = lambda folder: None) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "tokenizer").mkdir()
        for name, raw in files.items():
            bytes_at(name, raw)(folder / "tokenizer")
        after(folder / "tokenizer")
        return folder / "tokenizer"

    return write


def case(name: str, files: dict[str, Any], *, names: str = "", **more: Any) -> Case:
    return Case(name, folder_of(files), digest_of, names=names or next(iter(files)), **more)


# tokenizer.json


@functools.cache
def small() -> dict[str, Any]:
    """A small byte-level BPE."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    vocab = {letter: i for i, letter in enumerate("helowrdab")} | {"he": 9, "aa": 10}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[("h", "e"), ("a", "a")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([END])
    inner.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 11)])
    return json.loads(inner.to_str())


@functools.cache
def others_small() -> dict[str, dict[str, Any]]:
    """One of each other kind."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    vocab = {"[UNK]": 0, "h": 1, "##e": 2, "he": 3, "a": 4}
    makers = {
        "wordpiece": models.WordPiece(vocab, unk_token="[UNK]"),
        "wordlevel": models.WordLevel(vocab, unk_token="[UNK]"),
        "unigram": models.Unigram([("<unk>", 0.0), ("▁", -1.0), ("h", -2.0), ("e", -2.5), ("he", -3.0)], 0, False),
    }
    found = {}
    for name, model in makers.items():
        inner = Tokenizer(model)
        inner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
        inner.pre_tokenizer = pre_tokenizers.Metaspace() if name == "unigram" else pre_tokenizers.Whitespace()
        inner.decoder = decoders.Metaspace() if name == "unigram" else decoders.WordPiece()
        inner.add_special_tokens([END])
        found[name] = json.loads(inner.to_str())
    return found


def json_texts() -> Iterator[Case]:
    for name, raw in bad_json(
        json.dumps(small()), big=False
    ):  # real ones are as big as the big ones, and take as much
        yield case(name, {JSON: raw})
    for size in (64 * 10**6 + 1, 1 << 40):
        yield Case(
            f"{size:,} bytes that are not there",
            folder_of({}, functools.partial(sparse, JSON, size)),
            digest_of,
            names=JSON,
        )


def sparse(name: str, size: int, folder: Path) -> None:
    with open(folder / name, "wb") as file:
        file.truncate(size)


def json_cut_short() -> Iterator[Case]:
    for name, raw in cuts(json.dumps(small()).encode()):
        yield case(name, {JSON: raw})


REPLACED = (None, -1, 2**31, 2**64, 1.5, "", "x", True, [], {}, [None], {"a": {}})


def json_mutations() -> Iterator[Case]:
    """Every value in turn taken away, and of every other type: refused, or read where it does not matter."""
    for name, tree in tree_mutations(small(), REPLACED):
        yield case(name, {JSON: json.dumps(tree).encode()}, names="tokenizer", may_load=True)


def json_mutations_of_others() -> Iterator[Case]:
    for kind, made in others_small().items():
        for name, tree in tree_mutations(made, (None, -1, "", [], {}, 2**32)):
            yield case(f"{kind}: {name}", {JSON: json.dumps(tree).encode()}, names="tokenizer", may_load=True)


def json_content() -> Iterator[Case]:
    """Whole files that cannot be used."""

    def with_vocab(vocab: dict[str, Any], merges: list[Any] | None = None) -> bytes:
        made = json.loads(json.dumps(small()))
        made["model"]["vocab"], made["model"]["merges"] = vocab, merges or []
        return json.dumps(made).encode()

    plain = small()["model"]["vocab"]
    for value in (2**31, 2**32 - 1, 100_000_000, 2**32, -1, 1.5, "1", None, [], True):
        yield case(f"an id {value!r}", {JSON: with_vocab(plain | {"zz": value})}, names="tokenizer")
    for merge in (
        ["h", "zz"],
        ["zz", "h"],
        ["h"],
        ["h", "e", "l"],
        "h",
        "h e l",
        "",
        [],
        None,
        1,
        [1, 2],
        ["h", None],
    ):
        yield case(f"a merge {merge!r}", {JSON: with_vocab(plain, [merge])}, names="tokenizer")
    yield case("no vocabulary", {JSON: with_vocab({})}, names="tokenizer", may_load=True)
    yield case(
        "100,000 merges of one", {JSON: with_vocab(plain, [["h", "e"]] * 100_000)}, names="tokenizer", may_load=True
    )
    without = json.loads(json.dumps(small()))
    without["added_tokens"] = []
    without["post_processor"] = None
    yield case(
        "no end token", {JSON: json.dumps(without).encode()}, names="tokenizer", says="no token that ends a text"
    )
    kinds: list[Any] = ["Nothing", "", None, 1, [], "bpe", {"type": "BPE"}]
    for kind in kinds:
        made = json.loads(json.dumps(small()))
        made["model"]["type"] = kind
        yield case(f"type {kind!r}", {JSON: json.dumps(made).encode()}, names="tokenizer", may_load=kind is None)
    steps: dict[str, Any] = {
        "a regular expression without an end": {
            "type": "Split",
            "pattern": {"Regex": "(a"},
            "behavior": "Isolated",
            "invert": False,
        },
        "a regular expression that explodes": {
            "type": "Split",
            "pattern": {"Regex": "(a|a)*$"},
            "behavior": "Isolated",
            "invert": False,
        },
        "an unknown step": {"type": "Python", "code": "import os"},
        "a step of nothing": {"type": "Sequence", "pretokenizers": [None]},
    }
    for name, step in steps.items():
        made = json.loads(json.dumps(small()))
        made["pre_tokenizer"] = step
        yield case(name, {JSON: json.dumps(made).encode()}, names="tokenizer", may_load="explodes" in name)
    deep: Any = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    for _ in range(45):
        deep = {"type": "Sequence", "pretokenizers": [deep]}
    made = json.loads(json.dumps(small()))
    made["pre_tokenizer"] = deep
    yield case("steps in steps", {JSON: json.dumps(made).encode()}, names="tokenizer", may_load=True)


# The files beside it


def companions_texts() -> Iterator[Case]:
    for file in (SETTINGS, GENERATION, CONFIG, "special_tokens_map.json"):
        for name, raw in bad_json('{"a": 1}', big=file == GENERATION):
            if name != "an empty object":
                yield case(f"{file}: {name}", {file: raw, JSON: json.dumps(small()).encode()})


def companions_values() -> Iterator[Case]:
    for file, key in (
        (GENERATION, "eos_token_id"),
        (CONFIG, "eos_token_id"),
        (CONFIG, "bos_token_id"),
        (SETTINGS, "eos_token"),
        (SETTINGS, "bos_token"),
        (SETTINGS, "add_bos_token"),
        ("special_tokens_map.json", "eos_token"),
    ):
        for what, value in others(
            0,
            *WHOLE,
            True,
            1.5,
            "",
            END,
            "\x1b[2J",
            "x" * 10_000,
            [],
            {},
            [None],
            ["x"],
            [[11]],
            {"content": 1},
            {"content": []},
            [2**70],
        ):
            yield case(
                f"{file}: {key} = {what}",
                {file: json.dumps({key: value}).encode(), JSON: json.dumps(small()).encode()},
                may_load=True,
            )


def companions_not_files() -> Iterator[Case]:
    for file in (SETTINGS, GENERATION, "chat_template.jinja", "vocab.json"):
        for what, write, _ in not_files(file):
            free = (
                what in ("nothing", "a link to nowhere")
                or what == "an empty file"
                and not file.endswith("config.json")
            )
            yield Case(
                f"{file}: {what}",
                folder_of({JSON: json.dumps(small()).encode()}, write),
                digest_of,
                names=file,
                may_load=free,
            )


# tokenizer.model


def unigram_pieces() -> list[tuple[str, float, int]]:
    return [
        ("<unk>", 0, UNKNOWN),
        ("<s>", 0, CONTROL),
        ("</s>", 0, CONTROL),
        ("▁", -1, 1),
        ("h", -2, 1),
        ("he", -3, 1),
    ]


def unigram(**more: Any) -> bytes:
    return model_file(unigram_pieces(), model_type=1, byte_fallback=False, **more)


def model(name: str, raw: bytes | Callable[[], bytes], **more: Any) -> Case:
    return case(name, {MODEL: raw}, **more)


def model_cut_short() -> Iterator[Case]:
    raw = unigram()
    free = {len(raw) - len(field(3, field(1, "identity") + field(3, 1) + field(4, 0)))}  # without a normalizer_spec
    for name, part in cuts(raw):
        yield model(name, part, may_load=len(part) in free)
    large = model_file(llama2_pieces(300))
    for name, part in cuts(large, 200):
        yield model(f"LLaMA-2's, {name}", part, may_load=len(large) - len(part) in (len(raw) - min(free), 0))


def model_fields() -> Iterator[Case]:
    raw = unigram()
    for what, extra in {
        "field 0": varint(0) + b"\1",
        "a group": varint(9 << 3 | 3),
        "a group's end": varint(9 << 3 | 4),
        "wire type 6": varint(9 << 3 | 6),
        "wire type 7": varint(9 << 3 | 7),
        "a varint without an end": b"\xff" * 9,
        "a varint of 11 bytes": varint(9 << 3) + b"\xff" * 10 + b"\1",
        "a piece that is a number": varint(1 << 3) + b"\1",
        "a trainer that is a number": varint(2 << 3) + b"\1",
        "a trainer that is a float": varint(2 << 3 | 5) + b"abcd",
        "an empty piece": field(1, b""),
        **{
            f"a length of {n}": varint(9 << 3 | 2) + varint(n)
            for n in (1, 1000, 2**31, 2**32, 2**63, 2**64 - 1, 2**69)
        },
        **{f"a piece of {n}": varint(1 << 3 | 2) + varint(n) for n in (1, 1000, 2**31, 2**32, 2**63, 2**64 - 1)},
    }.items():
        yield model(what, raw + extra)
    for number in (3, 24, 35, 40, 41, 42):
        for what, extra in {"bytes": field(number, b"x"), "a float": field(number, 1.5)}.items():
            yield model(f"field {number} of the trainer is {what}", unigram(trainer=extra))
    for number in (3, 4, 5):
        yield model(f"field {number} of the normalizer is bytes", unigram(normalizer=field(number, b"x")))


def model_values() -> Iterator[Case]:
    for value in (0, 3, 4, 5, 255, 2**31, 2**63, 2**64 - 1):
        yield model(f"a model of type {value}", model_file(unigram_pieces(), model_type=value, byte_fallback=False))
    for name, number in (("unk_id", 40), ("bos_id", 41), ("eos_id", 42)):
        for value in (1, 3, 6, 2**31, 2**32 - 1, 2**63, 2**64 - 1, 2**64 - 5):
            free = value >= 2**63 and number != 40  # -1 and below: there is none
            free |= number == 42 and value == 1 or number == 41 and value == 2
            yield model(
                f"{name} = {value}",
                unigram(trainer=field(number, value)),
                may_load=bool(free or (number, value) == (41, 1)),
            )
    yield model("spaces behind words", unigram(trainer=field(24, 1)), says="treat_whitespace_as_suffix")
    yield model("spaces not escaped", unigram(normalizer=field(5, 0)), says="escape_whitespaces")
    yield model("a table of characters", unigram(normalizer=field(2, b"abc")), says="precompiled_charsmap")
    yield model("bytes missing", model_file(unigram_pieces(), byte_fallback=True), says="byte pieces are missing")


def model_pieces() -> Iterator[Case]:
    for what, one in {
        "an empty text": ("", 0, 1),
        "a long text": ("x" * 129, 0, 1),
        "an endless text": ("x" * 100_000, 0, 1),
        "twice": ("he", -9, 1),
        "of type 0": ("z", 0, 0),
        "of type 7": ("z", 0, 7),
        "of type 2^63": ("z", 0, 2**63),
        "user-defined": ("z", 0, 4),
        "unused": ("z", 0, 5),
        "NaN": ("z", float("nan"), 1),
        "inf": ("z", float("inf"), 1),
        "-inf": ("z", float("-inf"), 1),
        "an escape code twice": ("\x1b[2J", 0, 4),
        "an unknown byte": ("<0x00>", 0, 9),
    }.items():
        yield model(what, model_file([*unigram_pieces(), one], model_type=1, byte_fallback=False))
    for what, part in {
        "no UTF-8": field(1, b"\xff\xfe"),
        "overlong": field(1, b"\xc0\x80"),
        "half a pair": field(1, b"\xed\xa0\x80"),
        "a text as a number": varint(1 << 3) + b"\1",
        "a score as a number": field(1, "z") + varint(2 << 3) + b"\1",
        "a score of eight bytes": field(1, "z") + varint(2 << 3 | 1) + bytes(8),
        "a type as a text": field(1, "z") + field(3, b"x"),
        "nothing": b"",
        "a score alone": field(2, 1.0),
    }.items():
        yield model(what, unigram() + field(1, part))
    yield model("no pieces", model_file([], model_type=1, byte_fallback=False), says="0 pieces")
    yield model("no trainer", b"".join(piece(*p) for p in unigram_pieces()), says="no trainer_spec")
    pieces = llama2_pieces(300)
    same = pieces[:-40] + [(text, -1, kind) for text, _, kind in pieces[-40:]]
    yield model("scores that tie", model_file(same), may_load=True)
    yield model("bytes alone", model_file(pieces[:259]), may_load=True)
    assert len(BYTES) == 256


def model_large() -> Iterator[Case]:
    yield model("a million pieces and more", lambda: unigram() + field(1, field(1, "z")) * 1_200_000)
    yield model("5 MB of empty fields", lambda: unigram() + field(9, b"") * 2_500_000, may_load=True)
    yield model("5 MB of varints", lambda: unigram() + field(9, 1) * 2_500_000, may_load=True)
    yield model("5 MB in a trainer", lambda: unigram(trainer=field(9, 1) * 2_500_000), may_load=True)
    yield model("trainers one after the other", lambda: unigram() + field(2, field(9, 1)) * 1_000_000, may_load=True)
    yield model(
        "long pieces that can be split everywhere",
        lambda: model_file([*llama2_pieces(300)[:259], *(("a" * n, -n, 1) for n in range(1, 129))]),
        may_load=True,
    )
    yield model(
        "5,000 long pieces",
        lambda: model_file([*llama2_pieces(300)[:259], *(("ab" * 60 + f"{n:x}", -n, 1) for n in range(5000))]),
        may_load=True,
    )
    for size in (16 * 10**6 + 1, 1 << 40):
        yield Case(
            f"{size:,} bytes that are not there",
            folder_of({}, functools.partial(sparse, MODEL, size)),
            digest_of,
            names=MODEL,
        )
    yield model("15 MB of NULs", lambda: bytes(15 * 10**6))


def changed_bytes() -> Iterator[Case]:
    for name, raw in flips(unigram(), 300, 7):
        yield model(name, raw, names="tokenizer", may_load=True)
    for name, raw in flips(model_file(llama2_pieces(300)), 150, 8):
        yield model(f"LLaMA-2's, {name}", raw, names="tokenizer", may_load=True)
    for name, raw in flips(json.dumps(small()).encode(), 300, 9):
        yield case(f"JSON, {name}", {JSON: raw}, names="tokenizer", may_load=True)


def other_things() -> Iterator[Case]:
    for file in (JSON, MODEL):
        for what, write, _ in not_files(file):
            yield Case(f"{file}: {what}", folder_of({}, write), digest_of, names="tokenizer")
            yield Case(f"{file} itself: {what}", write, digest_of)
    tiktoken = b"".join(b"IQ== %d\n" % i for i in range(1000))
    for name, raw in {
        "text": b"hello " * 100,
        "tiktoken": tiktoken,
        "FFs": b"\xff" * 1000,
        "JSON": b'{"model": {}}',
        "a pickle": b"\x80\x02}q\x00.",
        "GGUF": b"GGUF" + struct.pack("<IQQ", 3, 0, 0),
    }.items():
        yield model(f"{name} as {MODEL}", raw)
        yield case(f"{name} as {JSON}", {JSON: raw})


def harmless() -> Iterator[Case]:
    raw = json.dumps(small()).encode()
    yield case("as it is", {JSON: raw}, may_load=True)
    yield case("indented", {JSON: json.dumps(small(), indent=3).encode()}, may_load=True)
    yield model("a unigram model", unigram(), may_load=True)
    yield model("unknown fields", unigram() + field(200, b"hello") + field(201, 7), may_load=True)
    yield model("LLaMA-2's", model_file(llama2_pieces(300)), may_load=True)
    made = replaced_vocab()
    yield case("a gap in the ids", {JSON: made}, may_load=True)


def replaced_vocab() -> bytes:
    made = json.loads(json.dumps(small()))
    made["model"]["vocab"]["zz"] = 40
    return json.dumps(made).encode()


FAMILIES: dict[str, Family] = {
    "JSON: texts": json_texts,
    "JSON: cut short": json_cut_short,
    "JSON: mutations": json_mutations,
    "JSON: mutations of other kinds": json_mutations_of_others,
    "JSON: content": json_content,
    "companions: texts": companions_texts,
    "companions: values": companions_values,
    "companions: no files": companions_not_files,
    "model: cut short": model_cut_short,
    "model: fields": model_fields,
    "model: values": model_values,
    "model: pieces": model_pieces,
    "model: large": model_large,
    "changed bytes": changed_bytes,
    "other things": other_things,
    "harmless": harmless,
}
