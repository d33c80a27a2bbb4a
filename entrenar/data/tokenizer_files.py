"""The files around a tokenizer: which tokens begin and end a text, and what is passed on unchanged.

Next to tokenizer.json (or tokenizer.model) a model of Hugging Face's layout has small JSON files that name its
special tokens, by id or by text, and not always the same ones. The first of these that knows decides:

    generation_config.json  config.json               eos_token_id, bos_token_id: an id, or a list with one in front
    tokenizer_config.json   special_tokens_map.json   eos_token, bos_token: a text, or {"content": text}
    the tokenizer.model itself; then the usual names

An id counts where it is a special token of this tokenizer: a config.json may be another one's.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from entrenar.formats import FormatError, open_regular, short
from entrenar.formats.strict_json import USUAL_VALUES, parse

FILE = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
GENERATION = "generation_config.json"
BY_ID = (GENERATION, "config.json")
BY_TEXT = (SETTINGS, "special_tokens_map.json")
ENDS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<|eot_id|>")
BEGINS = ("<s>", "<|begin_of_text|>")
KEPT = (SETTINGS, "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "chat_template.jinja",
        "vocab.json", "merges.txt")  # fmt: skip
TEMPLATES = "additional_chat_templates"  # a folder: NAME.jinja
MOST_TEMPLATES = 64
LIMIT = 40 * 1000**2  # bytes of one file


@dataclass
class Companions:
    """What lies beside a tokenizer: parsed JSON by file name, and the bytes of files to pass on."""

    READ = (*BY_ID, *BY_TEXT)
    folder: Path | None = None
    parsed: dict[str, dict[str, Any]] = field(default_factory=dict)
    kept: dict[str, bytes] = field(default_factory=dict)

    @staticmethod
    def beside(folder: Path) -> Companions:
        """Raises FormatError for JSON that is none, OSError where a file cannot be read."""
        kept = {name: raw for name in (*KEPT, *_templates(folder)) if (raw := _read(folder / name)) is not None}
        parsed = {}
        for name in Companions.READ:
            raw = kept.get(name) if name in kept else _read(folder / name)
            if raw is not None:
                parsed[name] = parse(raw, str(folder / name), values=USUAL_VALUES)
                if not isinstance(parsed[name], dict):
                    raise FormatError(f"{folder / name}: wanted an object: {{...}}")
        return Companions(folder, parsed, kept)

    def token(self, which: str, vocabulary: Mapping[str, int], special: set[int]) -> int | None:
        """The id of "eos" or "bos", from the first file that names one this tokenizer has."""
        by_id = (self._id(name, f"{which}_token_id") for name in BY_ID)
        by_text = (vocabulary.get(text) for text in self.texts(which))
        return next((i for i in (*(i for i in by_id if i in special), *by_text) if i is not None), None)

    def texts(self, which: str) -> list[str]:
        """What the files call the "eos", "bos" or "unk" token."""
        named = (self._text(name, f"{which}_token") for name in BY_TEXT)
        return [text for text in named if text]

    def _id(self, name: str, key: str) -> int | None:
        value = self.parsed.get(name, {}).get(key)
        first = value[0] if isinstance(value, list) and value else value
        if first is None or first == []:
            return None
        if not isinstance(first, int) or isinstance(first, bool):
            raise FormatError(f"{self._path(name)}: {key} = {short(value)}: wanted a token's id, or a list of ids")
        return first

    def _text(self, name: str, key: str) -> str | None:
        value = self.parsed.get(name, {}).get(key)
        text = value.get("content") if isinstance(value, dict) else value
        if text is not None and not isinstance(text, str):
            raise FormatError(f"{self._path(name)}: {key} = {short(value)}: wanted a text, or {{'content': a text}}")
        return text

    def setting(self, key: str) -> bool | None:
        """A switch of tokenizer_config.json, None where it is not there."""
        value = self.parsed.get(SETTINGS, {}).get(key)
        if value is not None and not isinstance(value, bool):
            raise FormatError(f"{self._path(SETTINGS)}: {key} = {short(value)}: wanted true or false")
        return value

    def _path(self, name: str) -> str:
        return str(self.folder / name) if self.folder else name


def as_json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _templates(folder: Path) -> list[str]:
    """Names of the chat templates in the folder for them."""
    found = sorted(path.name for path in itertools.islice((folder / TEMPLATES).glob("*.jinja"), MOST_TEMPLATES + 1))
    if len(found) > MOST_TEMPLATES:
        raise FormatError(f"{folder / TEMPLATES}: has more than {MOST_TEMPLATES} chat templates")
    return [f"{TEMPLATES}/{name}" for name in found]


def _read(path: Path) -> bytes | None:
    """The file's bytes, None where there is none."""
    try:
        file, size = open_regular(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    with file:
        if size > LIMIT:
            raise FormatError(f"{path}: has {size:,} bytes; a file like this has at most {LIMIT:,}")
        return file.read(LIMIT)
