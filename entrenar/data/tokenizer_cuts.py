"""Where a long text may be cut so that the tokens of its parts, joined, are the tokens of the whole.

A tokenizer of the `tokenizers` library works in steps - normalizer, pre-tokenizer, model - and a cut is safe where
none of them looks across it. Which places those are follows from the steps:

    the pre-tokenizer splits into words    between two lines: no word of the known ones runs on after a line break
    it splits before every space           before a space
    there is none, and the model is BPE    between two characters that stand side by side in no token: a merge that
                                           spans them would make a token that holds both
    anything else                          nowhere: cut() is None, and the text stays in one piece

A step that puts a space before a text (LLaMA-2's) does so for every part: all parts but a document's first are
encoded by `without_prefix(inner)`.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import unicodedata
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

Cut = Callable[[str, int], "int | None"]

LINE = re.compile(r"(?<=\S)\n(?=\S)")  # a line break between two unindented lines
SPACE = re.compile(r"(?<=\S)(?= )")

SLASHES = re.compile(r"(?<=\S)\n(?=[^\s/])")  # the same, for words like "}\n//"

# Regular expressions that split text into words, none of which runs on after `\S\n` into `\S`: the line break ends
# `\s+`, `\s*[\r\n]+` or `[^\s\p{L}\p{N}]+[\r\n]*`, and nothing before it looks further ahead. Only where slashes
# belong to the last, `[\r\n/]*`, they go on.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K = (  # GPT-4's, and Llama 3's
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = CL100K.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN35 = QWEN2.replace(r"]?\p{L}+", r"]?[\p{L}\p{M}]+").replace(r"| ?[^\s\p{L}\p{N}]+", r"| ?[^\s\p{L}\p{M}\p{N}]+")
O200K = (  # GPT-4o's; Mistral's tekken takes one digit at a time and knows no 's
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = O200K.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "").replace(r"\p{N}{1,3}", r"\p{N}")
KNOWN = {GPT2: LINE, CL100K: LINE, QWEN2: LINE, QWEN35: LINE, O200K: SLASHES, TEKKEN: SLASHES}

SPLITS_WORDS = frozenset({"BertPreTokenizer", "Whitespace", "WhitespaceSplit"})  # they drop the space between
SPLITS_FINER = frozenset({"Digits", "Punctuation"})  # by single characters, whatever stands beside them
KEEPS_LINES = frozenset({"NFC", "NFD", "NFKC", "NFKD", "Lowercase"})  # a line break is a line break to them


def cut_rule(inner: tokenizers.Tokenizer) -> Cut:
    """The rule for this tokenizer: cut(text, at) is a safe place, at <= place and 0 < place < len(text), or None."""
    normal, words = steps(inner.normalizer), steps(inner.pre_tokenizer)
    added = [token for token in inner.get_added_tokens_decoder().values() if not token.special]
    prefixed = any(has_prefix(step) for step in (*normal, *words))
    if prefixed and added or any(t.lstrip or t.rstrip or t.single_word or _SPACES.search(t.content) for t in added):
        return _nowhere  # the prefix comes again after each of them; or they reach over their own borders
    if any(has_prefix(step) for step in words) and len(words) > 1:
        return _nowhere  # the prefix comes before every word
    if not all(step["type"] in {"Prepend", *KEEPS_LINES} or swap(step) for step in normal):
        return _nowhere
    plain = not any(step["type"] in KEEPS_LINES for step in normal)
    words = [step for step in words if step["type"] not in SPLITS_FINER] or words
    if (line := _line_break(words)) is not None:
        return functools.partial(_between_lines if plain else _between_stable_lines, line)
    if not plain or len(words) > 1:
        return _nowhere
    kind = words[0]["type"] if words else ""
    if kind == "Metaspace" and words[0].get("split", True):
        return _before_space
    if kind in {"", "ByteLevel", "Metaspace"} and type(inner.model).__name__ == "BPE":
        return _Strangers(inner, [token.content for token in added])
    return _nowhere


def without_prefix(inner: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer for text that goes on, where no space is put before it; itself where none ever is."""
    from tokenizers import Tokenizer

    normal, words = steps(inner.normalizer), steps(inner.pre_tokenizer)
    if not any(has_prefix(step) for step in (*normal, *words)):
        return inner
    made = json.loads(inner.to_str())
    normal = [step for step in normal if not has_prefix(step)]
    words = [step | _NO_PREFIX.get(step["type"], {}) for step in words]
    made["normalizer"] = {"type": "Sequence", "normalizers": normal} if normal else None
    made["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": words} if words else None
    other = Tokenizer.from_str(json.dumps(made))
    other.encode_special_tokens = inner.encode_special_tokens
    return other


def steps(component: Any) -> list[dict[str, Any]]:
    """What a normalizer, pre-tokenizer or decoder does, one step after the other, each as in tokenizer.json."""
    return _flat(json.loads(component.__getstate__())) if component is not None else []


def has_prefix(step: dict[str, Any]) -> bool:
    """Whether this step puts a space (or what stands for it) before a text."""
    if step["type"] == "Metaspace":
        return step.get("prepend_scheme", "always") != "never"
    return step["type"] == "Prepend" or step["type"] == "ByteLevel" and bool(step.get("add_prefix_space", False))


def swap(step: dict[str, Any]) -> tuple[str, str] | None:
    """(from, to) of a step that replaces one character by another, as LLaMA-2's " " by "\u2581"; else None."""
    if step["type"] == "Metaspace":
        return " ", step["replacement"]
    old = step.get("pattern", {}).get("String", "") if step["type"] == "Replace" else ""
    new = step.get("content", "")
    return (old, new) if len(old) == len(new) == 1 and old != "\n" and not new.isspace() else None


_SPACES = re.compile(r"\s")
_NO_PREFIX: dict[str, dict[str, Any]] = {
    "Metaspace": {"prepend_scheme": "never"},
    "ByteLevel": {"add_prefix_space": False},
}


def _flat(step: dict[str, Any]) -> list[dict[str, Any]]:
    if step["type"] != "Sequence":
        return [step]
    (parts,) = (value for value in step.values() if isinstance(value, list))
    return [one for part in parts for one in _flat(part)]


def _line_break(words: list[dict[str, Any]]) -> re.Pattern[str] | None:
    """The line breaks after which these steps, together, always split; None where there are none."""
    match words:
        case [{"type": kind}] if kind in SPLITS_WORDS:
            return LINE
        case [{"type": "ByteLevel", "use_regex": True}]:
            return LINE
        case [{"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}, *rest]:
            return KNOWN.get(regex) if rest in ([], [_BYTES_ONLY], [_BYTES_ONLY | {"trim_offsets": False}]) else None
    return None


_BYTES_ONLY = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def _nowhere(text: str, at: int) -> int | None:
    return None


def _between_lines(line: re.Pattern[str], text: str, at: int) -> int | None:
    found = line.search(text, max(0, at - 1))
    return found.end() if found else None


def _between_stable_lines(line: re.Pattern[str], text: str, at: int) -> int | None:
    """As _between_lines, where no normalizer makes other characters of those around the line break."""
    for found in line.finditer(text, max(0, at - 1)):
        around = text[found.start() - 1 : found.end() + 1]
        if unicodedata.is_normalized("NFKC", around) and unicodedata.is_normalized("NFKD", around):
            return found.end()
    return None


def _before_space(text: str, at: int) -> int | None:
    found = SPACE.search(text, max(1, at))
    return found.start() if found else None


class _Strangers:
    """Cuts between two characters that stand side by side in no token of a BPE that does not split into words."""

    def __init__(self, inner: tokenizers.Tokenizer, added: list[str]) -> None:
        words = steps(inner.pre_tokenizer)
        self.letters = BYTE_LETTERS if words and words[0]["type"] == "ByteLevel" else None
        self.swaps = str.maketrans(dict(filter(None, map(swap, (*steps(inner.normalizer), *words)))))
        vocabulary = inner.get_vocab(with_added_tokens=False)
        self.pairs = {a + b for token in vocabulary for a, b in itertools.pairwise(token)}
        self.pairs |= {self._last(a) + self._first(b) for token in added for a, b in itertools.pairwise(token)}
        # unknown characters side by side become one token, unless each falls back to its bytes
        bytes_known = all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
        self.single = None if self.letters or bytes_known and inner.model.byte_fallback else set(vocabulary)

    def __call__(self, text: str, at: int) -> int | None:
        for place in range(max(1, at), len(text)):
            a, b = self._last(text[place - 1]), self._first(text[place])
            known = self.single is None or a in self.single or b in self.single
            if known and a + b not in self.pairs:
                return place
        return None

    def _first(self, character: str) -> str:
        return self.letters[character.encode()[0]] if self.letters else character.translate(self.swaps)

    def _last(self, character: str) -> str:
        return self.letters[character.encode()[-1]] if self.letters else character.translate(self.swaps)


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in tokenizer.json: itself, or one from U+0100 on (as in GPT-2)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


BYTE_LETTERS = _byte_letters()
