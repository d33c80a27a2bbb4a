"""What a tokenizer is to the rest of the project, and what all of them share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

SLAB = 1 << 20  # characters encoded in one call
PIECE = 1 << 16  # characters: long documents are encoded in pieces of about this size, in parallel


class TokenizerError(ValueError):
    """There is no usable tokenizer, or no text; the message says where it was looked for, and what is wrong."""


def refusal(error: BaseException, what: str) -> BaseException:
    """The library raises bare Exceptions, and where its Rust panics a PanicException, which is none."""
    if isinstance(error, Exception) or type(error).__name__ == "PanicException":
        return TokenizerError(f"{what}: {str(error)[:300]}")
    return error


class Spans(NamedTuple):
    """Tokens of a text and where they stand in it: ids (n,), and of each the characters start .. end, spans (n, 2)."""

    ids: np.ndarray
    spans: np.ndarray


class Decoder(Protocol):
    """Tokens in, text out, as soon as it is certain."""

    def push(self, token: int) -> str: ...
    def end(self) -> str: ...


class Tokenizer(Protocol):
    """What the rest of the project asks of a tokenizer.

    kind         "bytes", "bpe" (byte-level), "sentencepiece", "unigram", "wordpiece" or "wordlevel"
    vocab_size   every id is below it
    end_id       the token that ends a document
    begin_id     the token a text begins with, None where it begins with none
    special      the special tokens, which `encode_special` finds in a text, by how they are spelled
    files        what lay beside the tokenizer, by name: settings, chat templates (data/chat); `save` writes it too

    cut(text, at) is a place, at <= place < len(text), where a text may be cut: the tokens of both parts, joined, are
    those of the whole, if encode_batch is told that the second one is `continued`. It stays one when more text
    follows. None: there is no such place in this text.
    """

    kind: str
    vocab_size: int
    end_id: int
    begin_id: int | None

    @property
    def special(self) -> Mapping[str, int]: ...
    @property
    def files(self) -> dict[str, bytes]: ...
    def encode(self, text: str | bytes) -> np.ndarray: ...
    def encode_batch(self, texts: Sequence[str], *, continued: Sequence[bool] | None = None) -> list[np.ndarray]: ...
    def encode_special(self, texts: Sequence[str]) -> list[Spans]: ...
    def cut(self, text: str, at: int) -> int | None: ...
    def encode_documents(self, documents: Sequence[str]) -> np.ndarray: ...
    def decode(self, ids: Iterable[int]) -> str: ...
    def decoder(self, after: Iterable[int] = ()) -> Decoder: ...
    def byte_lengths(self) -> np.ndarray: ...
    def save(self, folder: str | Path) -> None: ...


def id_type(vocab_size: int) -> np.dtype:
    """The smallest unsigned type that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def encode_documents(tokenizer: Tokenizer, documents: Sequence[str]) -> np.ndarray:
    end = np.array([tokenizer.end_id], id_type(tokenizer.vocab_size))
    parts = [end[:0]]
    for slab in _slabs(documents, tokenizer):
        encoded = tokenizer.encode_batch([s.text for s in slab], continued=[s.continued for s in slab])
        for ids, piece in zip(encoded, slab, strict=True):
            parts += [ids, end] if piece.last else [ids]
    return np.concatenate(parts)


class _Piece(NamedTuple):
    """Part of a document; whether it is not its first, and whether it is its last."""

    text: str
    continued: bool
    last: bool


def _slabs(documents: Sequence[str], tokenizer: Tokenizer) -> Iterator[list[_Piece]]:
    """All documents in pieces, about SLAB characters at a time.

    The library's encodings take some 100 bytes per token: all of a corpus at once would fill the memory.
    """
    slab: list[_Piece] = []
    size = 0
    for document in documents:
        for piece in _pieces(document, tokenizer):
            slab.append(piece)
            size += len(piece.text)
            if size >= SLAB:
                yield slab
                slab, size = [], 0
    if slab:
        yield slab


def _pieces(document: str, tokenizer: Tokenizer) -> Iterator[_Piece]:
    start = 0
    while len(document) - start > PIECE:
        place = tokenizer.cut(document, start + PIECE)
        if place is None:
            break
        yield _Piece(document[start:place], start > 0, False)
        start = place
    yield _Piece(document[start:], start > 0, True)


def utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(
            f"tokenizer: character {error.start:,} of the text is U+{ord(text[error.start]):04X}, half of a surrogate "
            "pair: no Unicode text, it was decoded wrongly"
        ) from None


def from_utf8(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise TokenizerError(
            f"tokenizer: byte {error.start:,} of the text is 0x{raw[error.start]:02x}, not UTF-8; wanted UTF-8, or the "
            "tokenizer 'bytes', which takes any"
        ) from None
