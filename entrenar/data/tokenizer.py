"""Tokenizers: text to integers and back, without loss, for any text.

Two, with one interface: byte-level BPE, trained on the user's own corpus in seconds, and plain bytes. Both
are saved in the tokenizer.json of the `tokenizers` library, which transformers loads too (plain bytes are a
BPE without merges). Both have one special token, `<|endoftext|>`, that ends every document and begins every
sample.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    import tokenizers

END = "<|endoftext|>"
FILE = "tokenizer.json"
LEARN_FROM = 1 << 25  # characters, about: of a larger corpus the BPE is learned from every n-th piece
SLAB = 1 << 20  # characters encoded in one call of the library
PIECE = 1 << 16  # characters: long documents are encoded in pieces of about this size, in parallel
_CUT = re.compile(r"(?<=\S)\n(?=\S)")  # a line break between two unindented lines


class TokenizerError(ValueError):
    """There is no usable tokenizer; the message says where it was looked for, and what is wrong."""


class Tokenizer(Protocol):
    """What the rest of the project asks of a tokenizer."""

    kind: str
    vocab_size: int
    end_id: int

    def encode(self, text: str | bytes) -> np.ndarray: ...
    def encode_documents(self, documents: Sequence[str]) -> np.ndarray: ...
    def decode(self, ids: Iterable[int]) -> str: ...
    def byte_lengths(self) -> np.ndarray: ...
    def save(self, folder: str | Path) -> None: ...


class BPETokenizer:
    """Byte-level BPE (Sennrich et al. 2016; over bytes: Radford et al. 2019): nothing is unknown."""

    kind = "bpe"

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        end = inner.token_to_id(END)
        if end is None:
            raise TokenizerError(f"tokenizer: the vocabulary has no {END!r}")
        inner.encode_special_tokens = True  # the characters "<|endoftext|>" in a text are text
        self.inner, self.end_id, self.vocab_size = inner, end, inner.get_vocab_size()
        self.type = id_type(self.vocab_size)

    def encode(self, text: str | bytes) -> np.ndarray:
        """Token ids (n,) of one text; no end token is added."""
        return np.array(self.inner.encode(_text(text), add_special_tokens=False).ids, self.type)

    def encode_documents(self, documents: Sequence[str]) -> np.ndarray:
        """Token ids (n,) of all documents, an end token after each; on all cores."""
        end = np.array([self.end_id], self.type)
        parts = []
        for slab in _slabs(documents):
            encoded = self.inner.encode_batch_fast([text for text, _ in slab], add_special_tokens=False)
            for one, (_, last) in zip(encoded, slab, strict=True):
                parts += [np.array(one.ids, self.type), end] if last else [np.array(one.ids, self.type)]
        return np.concatenate(parts) if parts else np.empty(0, self.type)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of these tokens; bytes that are no UTF-8 (a cut character) become U+FFFD, end tokens show."""
        return self.inner.decode([int(i) for i in ids], skip_special_tokens=False)

    def byte_lengths(self) -> np.ndarray:
        """(V,) how many bytes of text each token stands for; 0 for the end token."""
        tokens = [self.inner.id_to_token(i) or "" for i in range(self.vocab_size)]
        return np.array([0 if token == END else len(token) for token in tokens])  # one letter, one byte

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json."""
        _save(self.inner, folder)


class ByteTokenizer:
    """One token per byte: id = the byte's value, and 256 ends a document."""

    kind, vocab_size, end_id, type = "bytes", 257, 256, np.dtype(np.uint16)

    def encode(self, text: str | bytes) -> np.ndarray:
        raw = text.encode() if isinstance(text, str) else text
        return np.frombuffer(raw, np.uint8).astype(self.type)

    def encode_documents(self, documents: Sequence[str]) -> np.ndarray:
        end = np.array([self.end_id], self.type)
        parts = [part for document in documents for part in (self.encode(document), end)]
        return np.concatenate(parts) if parts else np.empty(0, self.type)

    def decode(self, ids: Iterable[int]) -> str:
        pieces = (END.encode() if i == self.end_id else bytes((i,)) for i in map(int, ids))
        return b"".join(pieces).decode("utf-8", "replace")

    def byte_lengths(self) -> np.ndarray:
        return np.array([1] * 256 + [0])

    def save(self, folder: str | Path) -> None:
        from tokenizers import AddedToken, Tokenizer, models

        vocab = {letter: byte for byte, letter in enumerate(_byte_letters())}
        inner = _byte_level(Tokenizer(models.BPE(vocab=vocab, merges=[])), words=False)
        inner.add_special_tokens([AddedToken(END, special=True)])
        _save(inner, folder)


def train_bpe(documents: Sequence[str], *, vocab_size: int) -> BPETokenizer:
    """Learn `vocab_size` tokens from the documents; fewer where the text is too small to have as many.

    Raises ValueError for a size below 257 (the 256 bytes and the end token).
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise ValueError(f"train_bpe: vocab_size = {vocab_size}: wanted >= 257, the 256 bytes and {END}")
    inner = _byte_level(Tokenizer(models.BPE()), words=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    pieces = [piece for document in documents for piece in pieces_of(document)]
    step = -(-sum(map(len, pieces)) // LEARN_FROM)
    pieces = pieces[:: max(1, step)]
    inner.train_from_iterator(pieces, trainer, length=len(pieces))
    return BPETokenizer(inner)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Read back what `save` wrote, from the folder or from the tokenizer.json itself.

    Raises TokenizerError where there is none, or none with an end token.
    """
    from tokenizers import Tokenizer as Inner

    path = Path(folder)
    path = path / FILE if path.is_dir() else path
    try:
        text = path.read_text(encoding="utf-8")
        inner = Inner.from_str(text)
    except OSError as error:
        raise TokenizerError(f"tokenizer: cannot read {path}: {error.strerror}") from None
    except Exception as error:  # the library raises a bare Exception
        raise TokenizerError(f"tokenizer: {path} is no tokenizer.json: {error}") from None
    plain = inner.get_vocab_size() == 257 and not json.loads(text)["model"].get("merges")
    return ByteTokenizer() if plain and inner.token_to_id(END) == 256 else BPETokenizer(inner)


def id_type(vocab_size: int) -> np.dtype:
    """The smallest unsigned type that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def pieces_of(document: str) -> Iterator[str]:
    """The document in pieces of about PIECE characters, cut where no token can span the cut.

    The words of byte-level BPE never run over a line break between two unindented lines, so that the tokens
    of the pieces, joined, are exactly the tokens of the document.
    """
    start = 0
    while len(document) - start > PIECE:
        found = _CUT.search(document, start + PIECE)
        if found is None:
            break
        yield document[start : found.end()]
        start = found.end()
    if start < len(document):
        yield document[start:]


def _slabs(documents: Sequence[str]) -> Iterator[list[tuple[str, bool]]]:
    """All pieces as (text, whether it ends its document), about SLAB characters at a time.

    The library's encodings take some 100 bytes per token: all of a corpus at once would fill the memory.
    """
    slab: list[tuple[str, bool]] = []
    size = 0
    for document in documents:
        pieces = list(pieces_of(document)) or [""]
        for i, piece in enumerate(pieces, 1):
            slab.append((piece, i == len(pieces)))
            size += len(piece)
        if size >= SLAB:
            yield slab
            slab, size = [], 0
    if slab:
        yield slab


def _text(text: str | bytes) -> str:
    return text if isinstance(text, str) else text.decode("utf-8")


def _byte_level(inner: tokenizers.Tokenizer, *, words: bool) -> tokenizers.Tokenizer:
    from tokenizers import decoders, pre_tokenizers

    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    inner.decoder = decoders.ByteLevel()
    return inner


def _byte_letters() -> list[str]:
    """The letter that stands for each byte in tokenizer.json: itself, or one from U+0100 on (as in GPT-2)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _save(inner: tokenizers.Tokenizer, folder: str | Path) -> None:
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
    Path(folder, FILE).write_text(inner.to_str(pretty=False), encoding="utf-8")
    Path(folder, "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
