"""Prepared data: a corpus as tokens, and what is known of it. Reading; preparing.py makes it.

A folder of prepared data has

    facts.json                        what is known of it, for people too
    tokenizer/                        as the tokenizer's `save` wrote it
    train.tokens, held_out.tokens     the ids (tokenfile.py)
    places, names                     where they come from (places.py); the names of the source's files, NUL after each
"""

from __future__ import annotations

import functools
import hashlib
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from entrenar.data.corpus import CorpusError, printable
from entrenar.data.places import Places, open_places
from entrenar.data.tokenfile import open_tokens, read_header
from entrenar.data.tokenizer import Tokenizer, load_tokenizer
from entrenar.data.work import HELD_OUT, PLACES, TOKENIZER, TRAIN
from entrenar.formats import open_regular, short
from entrenar.formats.strict_json import read_object

FORMAT = 2  # of the folder; another number makes every old one stale
FACTS, NAMES = "facts.json", "names"
_NAMES_LIMIT = 1 << 30  # bytes
_MAY_BE_ZERO = ("skipped_documents", "held_out_token_bytes", "gzip_bits", "xz_bits")


@dataclass(frozen=True)
class Facts:
    """What is known of a prepared corpus beside its tokens. Bits are per byte of held-out text."""

    source: str
    train_documents: int
    train_bytes: int
    train_tokens: int
    held_out_documents: int
    held_out_bytes: int
    held_out_tokens: int
    gzip_bits: float
    xz_bits: float
    compared_bytes: int  # of held-out text that gzip and xz compressed
    exact_bytes: bool  # the tokens' byte lengths add up to the text's bytes: the tokenizer changes nothing in it
    held_out_token_bytes: int  # what the held-out tokens' byte lengths add up to
    skipped: tuple[str, ...] = ()  # the first few names of what was left out: binary files, and with skip_bad bad ones
    skipped_documents: int = 0  # how many were left out


@dataclass(frozen=True)
class Prepared:
    """Token ids to train on and held out (an end token closes each document), and the facts about them.

    train, held_out   (N,) uint16 or uint32, read-only maps of the token files
    cached            whether they were there already
    identity          a hash of the tokens and the tokenizer: equal identity, same bits of training
    """

    tokenizer: Tokenizer
    train: np.ndarray
    held_out: np.ndarray
    facts: Facts
    cached: bool
    folder: Path
    identity: str
    places: Places
    temporary: Any = field(default=None, repr=False)  # keeps a temporary folder until this is gone

    def place(self, offset: int) -> str:
        """Where the training token at `offset` comes from, for people: "notes/a.txt line 12"."""
        return self.places.of(offset, self.train, self.tokenizer)

    def bytes_of(self, tokens: np.ndarray) -> float:
        """How many bytes of held-out text these held-out tokens stand for.

        Exactly, for a tokenizer that changes nothing in the text (facts.exact_bytes). For others (LLaMA-2's puts a
        space before a text) the tokens' own lengths, scaled so that all held-out tokens together have exactly the
        true bytes of the held-out text.
        """
        told = int(self._lengths[tokens].sum())
        if self.facts.exact_bytes:
            return told
        if not self.facts.held_out_token_bytes:
            return len(tokens) * self.facts.held_out_bytes / max(1, self.facts.held_out_tokens)
        return told * self.facts.held_out_bytes / self.facts.held_out_token_bytes

    @functools.cached_property
    def _lengths(self) -> np.ndarray:
        return self.tokenizer.byte_lengths()


def load_prepared(folder: str | Path) -> Prepared:
    """What `prepare` made there, every file checked against its hash.

    Raises CorpusError where it is not whole.
    """
    return load_with_key(Path(folder))[0]


def bits_per_byte(nats: float, size: float) -> float:
    """A cost of `nats` in total over `size` bytes of text, as bits per byte."""
    return nats / np.log(2).item() / size


def load_with_key(folder: Path) -> tuple[Prepared, str]:
    """The prepared data of a folder, and its key. Raises CorpusError where it is not whole."""
    try:
        facts, key = _facts(folder / FACTS)
        tokenizer, kept = load_tokenizer(folder / TOKENIZER), tokenizer_hash(folder / TOKENIZER)
        identity = hashlib.blake2b(kept.encode(), digest_size=16)
        sides = []
        for name, count in ((TRAIN, facts.train_tokens), (HELD_OUT, facts.held_out_tokens)):
            header = read_header(folder / name)
            wanted = {"count": count, "vocab_size": tokenizer.vocab_size, "tokenizer": kept, "source": key}
            for what, value in wanted.items():
                if (came := getattr(header, what)) != value:
                    wanted_by = f"by {FACTS} and {TOKENIZER}/ {short(value)}"
                    raise CorpusError(f"{folder / name}: its {what} is {came}, {wanted_by}")
            sides.append(open_tokens(folder / name))
            identity.update(header.content.encode())
        places = open_places(folder / PLACES, _names(folder / NAMES))
    except CorpusError:
        raise
    except OSError as error:
        raise CorpusError(f"prepared data: cannot read {error.filename or folder}: {error.strerror or error}") from None
    except ValueError as error:  # FormatError, TokenizerError
        raise CorpusError(f"prepared data: {error}") from None
    train, held_out = sides
    return Prepared(tokenizer, train, held_out, facts, False, folder, identity.hexdigest(), places), key


def _facts(path: Path) -> tuple[Facts, str]:
    """Raises CorpusError for anything but what `_fill` wrote."""
    content = read_object(path)
    if content.get("format") != FORMAT:
        came = short(content.get("format"))
        raise CorpusError(f"{path}: format {came}; this entrenar reads {FORMAT}: prepare the text again")
    values, key = content.get("facts"), content.get("key")
    if not isinstance(values, dict) or not isinstance(key, str):
        raise CorpusError(f'{path}: has no "facts" or no "key"; prepare the text again')
    kinds: dict[str, Any] = {"int": int, "float": (int, float), "bool": bool, "str": str, "tuple[str, ...]": list}
    for one in fields(Facts):
        value, wanted = values.get(one.name), kinds[str(one.type)]
        if not isinstance(value, wanted) or isinstance(value, bool) != (wanted is bool):
            raise CorpusError(f'{path}: "{one.name}" is {str(value)[:40]!r}, wanted {one.type}')
        least = 0 if one.name in _MAY_BE_ZERO else 1
        if type(value) in (int, float) and value < least:
            raise CorpusError(f'{path}: "{one.name}" is {value}, wanted at least {least}')
    if unknown := set(values) - {one.name for one in fields(Facts)}:
        raise CorpusError(f"{path}: unknown facts: {printable(', '.join(sorted(unknown))[:200])}")
    if not all(isinstance(name, str) for name in values["skipped"]):
        raise CorpusError(f'{path}: "skipped" holds something else than names')
    return Facts(**values | {"skipped": tuple(values["skipped"])}), key


def _names(path: Path) -> list[str]:
    file, size = open_regular(path)
    with file:
        if size > _NAMES_LIMIT:
            raise CorpusError(f"{path}: has {size:,} bytes; wanted at most {_NAMES_LIMIT:,}")
        *names, rest = file.read().split(b"\0")
    if rest or not names:
        raise CorpusError(f"{path}: wanted names, a NUL after each; the file was cut off")
    return [os.fsdecode(name) for name in names]


def tokenizer_hash(folder: Path) -> str:
    """A hash, in hexadecimal, of every file of a saved tokenizer."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.iterdir()):
        hash_file(digest, path)
    return digest.hexdigest()


def hash_file(digest: Any, path: Path) -> None:
    """Name, size and content of a file to a hash. Raises FormatError for what is no regular file."""
    file, size = open_regular(path)
    with file:
        digest.update(f"{printable(path.name)}\0{size}\0".encode())
        while block := file.read(1 << 20):
            digest.update(block)
