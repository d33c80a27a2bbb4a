"""Tokenizers: text to integers and back.

Four sources, one interface: plain bytes; byte-level BPE, trained on the user's own corpus in seconds; any
tokenizer.json of the `tokenizers` library; LLaMA-2's tokenizer.model (sentencepiece.py). Each is saved so that
transformers loads it and gives the same ids. Text is only text: what spells a special token (`<|endoftext|>`,
`</s>`) is encoded like any other characters, and no special token is ever added; whoever joins documents puts the
end token between them.

Bytes and byte-level BPE without a normalizer lose nothing: decode(encode(text)) == text. What others lose:

    LLaMA-2 and its like     nothing, but that the character U+2581 comes back as a space. The space that is put
                             before a text is taken away again from the first token, and so is that of any row of
                             tokens decode() gets: decode a whole text, or `decoder(after=...)` what goes before
    with a normalizer        what it changes: NFC composes accents, others lower the case or join spaces
    without bytes            characters that the vocabulary does not have
    WordPiece                spaces and line breaks: it only knows where words end
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from entrenar.data import sentencepiece
from entrenar.data.tokenizer_cuts import BYTE_LETTERS, LINE
from entrenar.data.tokenizer_files import ENDS, FILE, GENERATION, SETTINGS, Companions, as_json
from entrenar.data.tokenizer_protocol import (
    PIECE,
    Decoder,
    Spans,
    Tokenizer,
    TokenizerError,
    encode_documents,
    id_type,
    refusal,
    utf8,
)
from entrenar.data.tokenizer_spelling import Spelling, SpellingDecoder, started
from entrenar.data.tokenizer_subword import SubwordTokenizer, ends
from entrenar.files import write_file
from entrenar.formats import FormatError, open_regular
from entrenar.formats.strict_json import parse

if TYPE_CHECKING:
    import tokenizers

__all__ = ["END", "FILE", "BPETokenizer", "ByteTokenizer", "SubwordTokenizer", "Tokenizer", "TokenizerError",
           "id_type", "load_tokenizer", "pieces_of", "train_bpe"]  # fmt: skip

END = "<|endoftext|>"
LEARN_FROM = 1 << 25  # characters, about: of a larger corpus the BPE is learned from every n-th piece
LIMIT = 40 * 1000**2  # bytes of a tokenizer.json; Gemma's, the largest in use, has 33 million


class ByteTokenizer:
    """One token per byte: id = the byte's value, and 256 ends a document."""

    kind, vocab_size, end_id, type = "bytes", 257, 256, np.dtype(np.uint16)
    begin_id: int | None = 256
    special: Mapping[str, int] = {END: 256}

    def __init__(self, files: Mapping[str, bytes] | None = None) -> None:
        self.files = dict(files or {})

    def encode(self, text: str | bytes) -> np.ndarray:
        """Token ids (n,) of one text, or of any bytes; no end token is added."""
        raw = utf8(text) if isinstance(text, str) else text
        return np.frombuffer(raw, np.uint8).astype(self.type)

    def encode_batch(self, texts: Sequence[str], *, continued: Sequence[bool] | None = None) -> list[np.ndarray]:
        """Token ids (n,) of each text."""
        return [self.encode(text) for text in texts]

    def encode_special(self, texts: Sequence[str]) -> list[Spans]:
        """Each text as a chat template writes one: what spells the end token is that token."""
        return [self._with_ends(text) for text in texts]

    def _with_ends(self, text: str) -> Spans:
        """A byte's span is that of its character."""
        ids, spans, at = [np.zeros(0, self.type)], [np.zeros((0, 2), np.int64)], 0
        for part in re.split(f"({re.escape(END)})", text):
            if part == END:
                ids.append(np.array([self.end_id], self.type))
                spans.append(np.array([[at, at + len(END)]]))
            else:
                ids.append(raw := self.encode(part))
                # all but the bytes 10xxxxxx begin a character
                character = at + np.cumsum((raw & 0xC0) != 0x80) - 1
                spans.append(np.stack([character, character + 1], axis=1))
            at += len(part)
        return Spans(np.concatenate(ids), np.concatenate(spans))

    def cut(self, text: str, at: int) -> int | None:
        """Anywhere."""
        return max(1, at) if max(1, at) < len(text) else None

    def encode_documents(self, documents: Sequence[str]) -> np.ndarray:
        """Token ids (n,) of all documents, an end token after each."""
        return encode_documents(self, documents)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of these tokens; bytes that are no UTF-8 (a cut character) become U+FFFD, end tokens show."""
        return _BYTES.text(ids)

    def decoder(self, after: Iterable[int] = ()) -> Decoder:
        """Decodes token by token; see SubwordTokenizer.decoder."""
        return started(SpellingDecoder(_BYTES), after)

    def byte_lengths(self) -> np.ndarray:
        return np.array([1] * 256 + [0])

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json (a BPE without merges), tokenizer_config.json, and what came with this tokenizer."""
        from tokenizers import AddedToken, Tokenizer, models

        vocab = {letter: byte for byte, letter in enumerate(BYTE_LETTERS)}
        inner = _byte_level(Tokenizer(models.BPE(vocab=vocab, merges=[])), words=False)
        inner.add_special_tokens([AddedToken(END, special=True)])
        for name, raw in ({FILE: inner.to_str().encode(), SETTINGS: as_json(_OWN_SETTINGS)} | self.files).items():
            write_file(Path(folder, name), raw)


class BPETokenizer(SubwordTokenizer):
    """Byte-level BPE (Sennrich et al. 2016; over bytes: Radford et al. 2019), our own: nothing is unknown."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        end = inner.token_to_id(END)
        if end is None:
            raise TokenizerError(f"tokenizer: the vocabulary has no {END!r}")
        super().__init__(inner, end_id=end, begin_id=end)


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


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a folder (tokenizer.json, else tokenizer.model), or in such a file itself.

    The folder may be one that `save` wrote, or a model's in Hugging Face's layout. The files beside it say which
    tokens begin and end a text (tokenizer_files.py).
    Raises TokenizerError where there is none, none with an end token, or a broken one.
    """
    file = _file(Path(path))
    try:
        beside = Companions.beside(file.parent)
        if file.suffix == ".model":
            return _from_model(file, beside)
        return _from_json(file, beside)
    except FormatError as error:
        raise TokenizerError(f"tokenizer: {error}") from None
    except OSError as error:
        raise TokenizerError(f"tokenizer: cannot read {error.filename or file}: {error.strerror}") from None


def pieces_of(document: str) -> Iterator[str]:
    """The document in pieces of about PIECE characters, cut where no word of our own BPE can span the cut.

    Its words never run over a line break between two unindented lines, so that the tokens of the pieces, joined,
    are exactly the tokens of the document.
    """
    start = 0
    while len(document) - start > PIECE:
        found = LINE.search(document, start + PIECE)
        if found is None:
            break
        yield document[start : found.end()]
        start = found.end()
    if start < len(document):
        yield document[start:]


def _file(path: Path) -> Path:
    """The file that `path` means, a tokenizer.json rather than a tokenizer.model."""
    if not path.is_dir():
        return path
    for name in (FILE, sentencepiece.FILE):
        if (path / name).exists():
            return path / name
    raise TokenizerError(f"tokenizer: cannot read {path}: it holds neither a {FILE} nor a {sentencepiece.FILE}")


def _from_json(file: Path, beside: Companions) -> Tokenizer:
    from tokenizers import Tokenizer as Inner

    opened, size = open_regular(file)
    with opened:
        if size > LIMIT:
            raise FormatError(f"{file}: has {size:,} bytes; a {FILE} has at most {LIMIT:,}")
        raw = opened.read(LIMIT)
    made = parse(raw, str(file))
    if not isinstance(made, dict) or not isinstance(made.get("model"), dict):
        raise FormatError(f"{file} is no {FILE}: wanted an object with a 'model'")
    try:
        inner = Inner.from_str(raw.decode())
    except BaseException as error:
        raise refusal(error, f"tokenizer: {file} is no {FILE} of the tokenizers library") from None
    if _is_bytes(inner, made["model"]):
        return ByteTokenizer(beside.kept)
    end, begin = _found(file, inner, beside)
    return SubwordTokenizer(inner, end_id=end, begin_id=begin, unknown=_unknown(made["model"]),
                            files=beside.kept | {FILE: raw})  # fmt: skip


def _from_model(file: Path, beside: Companions) -> Tokenizer:
    model = sentencepiece.read_model(file)
    try:
        inner = model.tokenizer()
    except FormatError:
        raise
    except BaseException as error:
        raise refusal(error, f"tokenizer: {file} cannot be used") from None
    end, begin = _found(file, inner, beside, model)
    return SubwordTokenizer(inner, end_id=end, begin_id=begin, unknown=model.pieces[model.unk_id].text,
                            files=beside.kept | {sentencepiece.FILE: file.read_bytes()})  # fmt: skip


def _found(file: Path, inner: tokenizers.Tokenizer, beside: Companions,
           model: sentencepiece.SentencePiece | None = None) -> tuple[int, int | None]:  # fmt: skip
    """The tokens that end and begin a text; an end token there must be."""
    end, begin = ends(inner, beside, model)
    if end is None:
        raise TokenizerError(
            f"tokenizer: {file} has no token that ends a text: no file in {file.parent} names one that it has "
            f"(eos_token_id in {GENERATION} or config.json, eos_token in {SETTINGS} or special_tokens_map.json), and "
            f"it has none of {', '.join(ENDS)}; name it as eos_token in {SETTINGS}"
        )
    return end, begin


def _is_bytes(inner: tokenizers.Tokenizer, model: dict[str, Any]) -> bool:
    """Whether this is what ByteTokenizer.save writes."""
    letters = {letter: byte for byte, letter in enumerate(BYTE_LETTERS)}
    return inner.get_vocab() == letters | {END: 256} and not model.get("merges")


def _unknown(model: dict[str, Any]) -> str | None:
    """The text of the token for unknown characters, in a tokenizer.json's model that the library has read."""
    if model.get("unk_id") is not None:
        return model["vocab"][model["unk_id"]][0]
    return model.get("unk_token")


def _byte_level(inner: tokenizers.Tokenizer, *, words: bool) -> tokenizers.Tokenizer:
    from tokenizers import decoders, pre_tokenizers

    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    inner.decoder = decoders.ByteLevel()
    return inner


_OWN_SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": END,
    "eos_token": END,
    "clean_up_tokenization_spaces": False,
    "add_prefix_space": False,
}
_SPELLED = [bytes((byte,)) for byte in range(256)] + [END.encode()]
_BYTES = Spelling(_SPELLED, _SPELLED)
