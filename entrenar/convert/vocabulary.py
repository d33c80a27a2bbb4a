"""A tokenizer as tables - tokens, types, merges, scores - the way GGUF and llama2.c want it.

Read from the tokenizer.json that every tokenizer here saves, whatever class it is. Two families can be said in those
files: byte-level BPE (GPT-2, Llama 3, our own) and SentencePiece's BPE with bytes to fall back on (LLaMA 2). A
tokenizer that another program would not split into the same tokens is refused.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from entrenar.convert import ConvertError
from entrenar.data import Tokenizer
from entrenar.data.tokenizer_cuts import CL100K, GPT2, QWEN2
from entrenar.formats.strict_json import LIMIT, read_object

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # GGUF's types of a token
BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
SPACE = "▁"  # what stands for a space in SentencePiece's tokens

# How text is split into words, by regular expression: llama.cpp's name for it, (merges first, whole words first)
SPLITTERS = {GPT2: ("gpt-2", ""), CL100K: ("smaug-bpe", "llama-bpe"), QWEN2: ("qwen2", "")}


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer.json says.

    family        "gpt2" (byte-level BPE) or "llama" (SentencePiece's), llama.cpp's names
    splitter      llama.cpp's name for how text becomes words before merging; "default" for SentencePiece's
    tokens        text by id: letters that stand for bytes, or with ▁ for spaces; added tokens as they are
    types         (V,) NORMAL, CONTROL, ...
    merges        pairs, most important first
    scores        (V,) for SentencePiece's: a pair merges into the token with the highest score
    prefix_space  whether a space is put before a text
    begin_id, end_id, pad_id, unknown_id   None: there is none
    """

    family: str
    splitter: str
    tokens: list[str]
    types: np.ndarray
    merges: list[tuple[str, str]]
    scores: np.ndarray | None
    prefix_space: bool
    begin_id: int | None
    end_id: int
    pad_id: int | None
    unknown_id: int | None
    chat_template: str | None


def read_vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """The tables of a tokenizer. Raises ConvertError where they cannot say all that it does."""
    with tempfile.TemporaryDirectory(prefix="entrenar-") as name:
        folder = Path(name)
        tokenizer.save(folder)
        values = read_object(folder / "tokenizer.json", limit=LIMIT)
        settings = folder / "tokenizer_config.json"
        config = read_object(settings) if settings.is_file() else {}
        chat = _chat_template(folder / "chat_template.jinja", config)
    model, added = values["model"], values.get("added_tokens") or []
    _check_model(model)
    merges = [_pair(merge) for merge in model["merges"]]
    tokens = _tokens(model["vocab"], added)
    level = _byte_level(values)
    if level is not None:
        family, splitter, prefix = "gpt2", _splitter(level, model, values), False
    else:
        family, splitter, prefix = "llama", "default", _prefix_space(model, values)
    types = _types(tokens, added, model, family)
    if family == "llama":  # added tokens are looked for in the text as it came
        tokens = [token.replace(SPACE, " ") if types[i] == USER_DEFINED else token for i, token in enumerate(tokens)]
    ids = {token: i for i, token in enumerate(tokens) if token}
    return Vocabulary(
        family, splitter, tokens, types, merges,
        scores=_scores(tokens, types, merges) if family == "llama" else None,
        prefix_space=prefix,
        begin_id=tokenizer.begin_id, end_id=tokenizer.end_id,
        pad_id=ids.get(_content(config.get("pad_token"))), unknown_id=ids.get(model.get("unk_token") or ""),
        chat_template=chat,
    )  # fmt: skip


def _check_model(model: Mapping[str, Any]) -> None:
    kind = model.get("type", "BPE" if "merges" in model else "unknown")
    if kind != "BPE":
        raise ConvertError(f"tokenizer: a {kind} model; only BPE can be written (byte-level, or LLaMA 2's)")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ConvertError(f"tokenizer: {key} = {model[key]!r} cannot be said in these files")


def _pair(merge: Any) -> tuple[str, str]:
    """Old files have "a b", new ones ["a", "b"]."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


def _content(token: Any) -> str:
    """The text of a special token in tokenizer_config.json: itself, or {"content": ...}; "" for none."""
    return (token.get("content") if isinstance(token, dict) else token) or ""


def _chat_template(file: Path, config: Mapping[str, Any]) -> str | None:
    """The file's text, which goes over the configuration's; of several named ones the default."""
    if file.is_file():
        return file.read_text(encoding="utf-8", errors="replace")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = next((one["template"] for one in template if one.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _tokens(vocab: Mapping[str, int], added: Iterable[Mapping[str, Any]]) -> list[str]:
    by_id = {i: token for token, i in vocab.items()} | {one["id"]: one["content"] for one in added}
    size = max(by_id) + 1
    if size > 4 * len(by_id) + 1024:
        raise ConvertError(f"tokenizer: {len(by_id):,} tokens with ids up to {size - 1:,}; wanted no large gaps")
    return [by_id.get(i, "") for i in range(size)]


def _types(tokens: list[str], added: Iterable[Mapping[str, Any]], model: Mapping[str, Any], family: str) -> np.ndarray:
    types = np.array([NORMAL if token else UNUSED for token in tokens], np.int32)
    if family == "llama":
        types[[i for i, token in enumerate(tokens) if token in BYTES]] = BYTE
    for one in added:
        types[one["id"]] = CONTROL if one.get("special") else USER_DEFINED
    if family == "llama" and model.get("unk_token") in tokens:
        types[tokens.index(model["unk_token"])] = UNKNOWN
    return types


# Byte-level BPE


def _steps(values: Mapping[str, Any], kind: str) -> list[dict[str, Any]]:
    """The steps of the normalizer or pre-tokenizer, taken out of the sequence they may be in."""
    step = values.get(kind)
    if step is None:
        return []
    inner = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers"}[kind]
    return step[inner] if step["type"] == "Sequence" else [step]


def _byte_level(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """The step that turns text into letters for bytes, if there is one."""
    return next((step for step in _steps(values, "pre_tokenizer") if step["type"] == "ByteLevel"), None)


def _splitter(level: Mapping[str, Any], model: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    """llama.cpp's name for what happens to a text before its bytes are merged."""
    if normalizers := _steps(values, "normalizer"):
        raise ConvertError(f"tokenizer: the normalizer {_said(normalizers[0])} cannot be said in these files")
    if level.get("add_prefix_space"):
        raise ConvertError("tokenizer: ByteLevel with add_prefix_space cannot be said in these files")
    if not model["merges"]:
        return "gpt-2"  # one token per byte, however the text is split
    before = [step for step in _steps(values, "pre_tokenizer") if step["type"] != "ByteLevel"]
    words = level.get("use_regex", True)
    whole_first = bool(model.get("ignore_merges"))
    if words and [step["type"] for step in before] == ["Digits"] and before[0]["individual_digits"] and not whole_first:
        return "smollm"
    pattern = GPT2 if words and not before else _pattern(before) if not words else ""
    name = SPLITTERS.get(pattern, ("", ""))[whole_first]
    if not name:
        raise ConvertError(
            f"tokenizer: splits text into words in a way llama.cpp has no name for here ({_described(before, words)}); "
            "known are GPT-2's, Llama 3's, Qwen 2's and SmolLM's"
        )
    return name


def _pattern(before: list[dict[str, Any]]) -> str:
    """The regular expression, where splitting by it, each match a word, is all that is done."""
    if len(before) != 1 or before[0]["type"] != "Split":
        return ""
    step = before[0]
    plain = step["behavior"] in ("Isolated", "Removed" if step["invert"] else "Isolated")
    return step["pattern"].get("Regex", "") if plain else ""


def _described(before: list[dict[str, Any]], words: bool) -> str:
    return ", ".join([*map(_said, before), "GPT-2's words" if words else "no words"])[:200]


def _said(step: Mapping[str, Any]) -> str:
    """A step for a message: its type, and the pattern it looks for."""
    return step["type"] + (f" {step['pattern']}" if "pattern" in step else "")


# SentencePiece's BPE


def _prefix_space(model: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    """Whether a space is put before a text; refuses what else may be done to it."""
    if not model.get("byte_fallback"):
        raise ConvertError("tokenizer: neither byte-level nor with bytes to fall back on; other programs cannot use it")
    prefix = False
    for step in _steps(values, "normalizer"):
        if step["type"] == "Prepend" and step["prepend"] == SPACE:
            prefix = True
        elif step["type"] != "Replace" or step["pattern"] != {"String": " "} or step["content"] != SPACE:
            raise ConvertError(f"tokenizer: the normalizer {_said(step)} cannot be said in these files")
    for step in _steps(values, "pre_tokenizer"):
        if step["type"] != "Metaspace" or step.get("split", True) or step.get("replacement") != SPACE:
            raise ConvertError(f"tokenizer: the pre-tokenizer {_said(step)} cannot be said in these files")
        prefix = prefix or step.get("prepend_scheme", "always") in ("always", "first")
    return prefix


def _scores(tokens: list[str], types: np.ndarray, merges: list[tuple[str, str]]) -> np.ndarray:
    """Scores that merge as the list does: 0 for what is merged first, -1 for the next, and so on.

    SentencePiece joins whatever two neighbours make the token with the highest score. That is what the list says
    where all pairs that make a token stand together in it, and none is left out: checked here.
    """
    ids = {token: i for i, token in enumerate(tokens) if types[i] == NORMAL}
    scores = np.full(len(tokens), -1e6, np.float32)  # single characters: nothing is merged into them
    scores[types != NORMAL] = 0
    seen: set[str] = set()
    for rank, (made, _) in enumerate(itertools.groupby(left + right for left, right in merges)):
        if made in seen:
            raise ConvertError(f"tokenizer: its merges have no order of tokens (those of {made!r} stand apart)")
        seen.add(made)
        if made in ids:
            scores[ids[made]] = -rank
    pairs = set(merges)
    for token in ids:
        for i in range(1, len(token)):
            pair = (token[:i], token[i:])
            if pair[0] in ids and pair[1] in ids and pair not in pairs:
                raise ConvertError(f"tokenizer: {pair[0]!r} + {pair[1]!r} is no merge; by scores they would be merged")
    return scores
