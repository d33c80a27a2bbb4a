"""Any tokenizer of the `tokenizers` library, made to encode text and nothing but text."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from entrenar.data.sentencepiece import SentencePiece
from entrenar.data.tokenizer_cuts import cut_rule, steps, without_prefix
from entrenar.data.tokenizer_files import BEGINS, ENDS, FILE, GENERATION, SETTINGS, Companions, as_json
from entrenar.data.tokenizer_protocol import (
    Decoder,
    Spans,
    TokenizerError,
    encode_documents,
    from_utf8,
    id_type,
    refusal,
    utf8,
)
from entrenar.data.tokenizer_spelling import Spelling, SpellingDecoder, WholeDecoder, spelling, started
from entrenar.files import write_file
from entrenar.formats import short

if TYPE_CHECKING:
    import tokenizers


class SubwordTokenizer:
    """A tokenizer of the `tokenizers` library.

    end_id, begin_id   see Tokenizer
    unknown            the token that stands for characters the vocabulary does not have
    files              what else `save` writes, as it was found, by name
    """

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        *,
        end_id: int,
        begin_id: int | None,
        unknown: str | None = None,
        files: dict[str, bytes] | None = None,
    ) -> None:
        self.inner, self.end_id, self.begin_id, self.files = inner, end_id, begin_id, dict(files or {})
        _always_the_same(inner)
        self.kind = _kind(inner)
        self.vocab_size = _size(inner)
        self.type = id_type(self.vocab_size)
        self.cut = cut_rule(inner)
        self._special = _special(inner) | {end_id} | ({begin_id} if begin_id is not None else set())
        self._is_special = np.zeros(self.vocab_size, bool)
        self._is_special[list(self._special)] = True
        # in a text "<unk>" and real unknown characters have the same id: only the former could be told
        self._may_not_appear = self._is_special.copy()
        if unknown is not None and (found := inner.token_to_id(unknown)) is not None:
            self._may_not_appear[found] = False
        self._names = _names(inner, self._special, bytes_too=self.kind == "unigram")

    def encode(self, text: str | bytes) -> np.ndarray:
        """Token ids (n,) of one text; no special token is added. Bytes must be UTF-8."""
        return self.encode_batch([text if isinstance(text, str) else from_utf8(text)])[0]

    def encode_batch(self, texts: Sequence[str], *, continued: Sequence[bool] | None = None) -> list[np.ndarray]:
        """Token ids (n,) of each text, on all cores.

        continued   of each text whether it goes on where `cut` cut its document; none: every text is one of its own
        Raises TokenizerError for what is no Unicode text.
        """
        going_on = [False] * len(texts) if continued is None else continued
        made: list[np.ndarray | None] = [None] * len(texts)
        for on in (False, True):
            chosen = [i for i, other in enumerate(going_on) if bool(other) == on]
            if chosen:
                inner = self._without_prefix if on else self.inner
                for i, ids in zip(chosen, self._ids(inner, [texts[i] for i in chosen]), strict=True):
                    made[i] = self._text_only(ids, texts[i], on)
        return [ids for ids in made if ids is not None]

    def encode_special(self, texts: Sequence[str]) -> list[Spans]:
        """Each text as a chat template writes one: what spells a special token is that token. On all cores."""
        for text in texts:
            utf8(text)
        try:
            encoded = self._with_special.encode_batch(list(texts), add_special_tokens=False)
        except BaseException as error:
            raise refusal(error, "tokenizer: cannot encode this text") from None
        return [Spans(np.array(one.ids, self.type), np.array(one.offsets, np.int64).reshape(-1, 2)) for one in encoded]

    @functools.cached_property
    def special(self) -> Mapping[str, int]:
        return {text: i for i in sorted(self._special) if (text := self.inner.id_to_token(i))}

    def encode_documents(self, documents: Sequence[str]) -> np.ndarray:
        """Token ids (n,) of all documents, an end token after each; on all cores."""
        return encode_documents(self, documents)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of these tokens; bytes that are no UTF-8 (a cut character) become U+FFFD, special tokens show."""
        if self._spelling is not None:
            return self._spelling.text(ids)
        return started(WholeDecoder(self.inner, self.vocab_size), ids).end()

    def decoder(self, after: Iterable[int] = ()) -> Decoder:
        """Decodes token by token: what push() gives, and end() in the end, joined, is decode() of all tokens.

        after   tokens that went before, a prompt: their text is not given again
        """
        new = WholeDecoder(self.inner, self.vocab_size) if self._spelling is None else SpellingDecoder(self._spelling)
        return started(new, after)

    def byte_lengths(self) -> np.ndarray:
        """(V,) how many bytes of text each token stands for; 0 for special tokens."""
        if self._spelling is not None:
            sizes = np.array([len(part) for part in self._spelling.rest])
        else:
            sizes = np.array([len(self.decode([i]).encode()) for i in range(self.vocab_size)])
        return np.where(self._is_special, 0, sizes)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json, and what else came with this tokenizer, byte for byte."""
        folder = Path(folder)
        files = {FILE: self.inner.to_str().encode(), SETTINGS: self._settings()} | self.files
        for name, raw in files.items():
            write_file(folder / name, raw)
        # ids that only the model's own files gave, which are not passed on: the tokenizer must read back the same
        if not (folder / GENERATION).exists() and ends(self.inner, Companions.beside(folder)) != self._ends:
            write_file(folder / GENERATION, as_json({"bos_token_id": self.begin_id, "eos_token_id": self.end_id}))

    @property
    def _ends(self) -> tuple[int | None, int | None]:
        return self.end_id, self.begin_id

    @functools.cached_property
    def _spelling(self) -> Spelling | None:
        return spelling(self.inner, self.vocab_size)

    @functools.cached_property
    def _without_prefix(self) -> tokenizers.Tokenizer:
        return without_prefix(self.inner)

    @functools.cached_property
    def _with_special(self) -> tokenizers.Tokenizer:
        """The same tokenizer, in whose texts special tokens are special tokens."""
        from tokenizers import AddedToken

        other = type(self.inner).from_str(self.inner.to_str())
        other.encode_special_tokens = False
        # as transformers does with those that only the files beside it name
        other.add_special_tokens([AddedToken(text, normalized=False) for text in self.special])
        return other

    def _ids(self, inner: tokenizers.Tokenizer, texts: list[str]) -> list[np.ndarray]:
        try:
            encoded = inner.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError:  # what the library says to half of a surrogate pair
            for text in texts:
                utf8(text)
            raise
        except BaseException as error:
            raise refusal(error, "tokenizer: cannot encode this text") from None
        return [np.array(one.ids, self.type) for one in encoded]

    def _text_only(self, ids: np.ndarray, text: str, on: bool) -> np.ndarray:
        """`ids`, or where the text spells a special token, the ids of the text in parts that do not."""
        if self.kind != "unigram" and not self._may_not_appear[ids].any():
            return ids
        cuts = [match.start() + 1 for match in self._names.finditer(text)]
        if cuts:
            edges = [0, *cuts, len(text)]
            parts = [text[a:b] for a, b in zip(edges, edges[1:], strict=False)]
            first = self._ids(self._without_prefix if on else self.inner, parts[:1])
            ids = np.concatenate(first + self._ids(self._without_prefix, parts[1:]))
        if self._may_not_appear[ids].any():
            found = self.inner.id_to_token(int(ids[self._may_not_appear[ids]][0]))
            raise TokenizerError(f"tokenizer: cannot keep a text that spells {short(found)} apart from that token")
        return ids

    def _settings(self) -> bytes:
        """A tokenizer_config.json that makes transformers give the same ids."""
        name = self.inner.id_to_token
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
        if self.begin_id is not None:
            settings["bos_token"] = name(self.begin_id)
        settings["eos_token"] = name(self.end_id)
        settings["clean_up_tokenization_spaces"] = False
        if self.begin_id == self.end_id:
            settings["add_prefix_space"] = False
        else:
            settings["add_bos_token"] = self.begin_id is not None
        return as_json(settings)


def ends(inner: tokenizers.Tokenizer, beside: Companions,
          model: SentencePiece | None = None) -> tuple[int | None, int | None]:  # fmt: skip
    vocabulary = inner.get_vocab()
    named = {*beside.texts("eos"), *beside.texts("bos"), *ENDS, *BEGINS}
    special = _special(inner) | {vocabulary[text] for text in named if text in vocabulary}
    end, begin = (beside.token(which, vocabulary, special) for which in ("eos", "bos"))
    if model is not None:
        end = model.eos_id if end is None and model.eos_id >= 0 else end
        begin = model.bos_id if begin is None and model.bos_id >= 0 else begin
    end = next((vocabulary[text] for text in ENDS if text in vocabulary), None) if end is None else end
    begin = next((vocabulary[text] for text in BEGINS if text in vocabulary), None) if begin is None else begin
    return end, begin if begin == end or _is_added(inner, beside, begin) else None


def _is_added(inner: tokenizers.Tokenizer, beside: Companions, begin: int | None) -> bool:
    """Whether texts begin with this token: as tokenizer_config.json says, else as the post-processor does."""
    asked = beside.setting("add_bos_token")
    if asked is not None or begin is None:
        return bool(asked) and begin is not None
    try:
        return inner.encode("", add_special_tokens=True).ids[:1] == [begin]
    except BaseException as error:
        raise refusal(error, "tokenizer: its post-processor fails") from None


def _always_the_same(inner: tokenizers.Tokenizer) -> None:
    """Take away what makes tokens of a text depend on chance, on its length or on what it spells."""
    inner.no_truncation()
    inner.no_padding()
    inner.encode_special_tokens = True  # the characters "<|endoftext|>" in a text are text
    if type(inner.model).__name__ == "BPE":
        inner.model.dropout = None


def _kind(inner: tokenizers.Tokenizer) -> str:
    model = type(inner.model).__name__
    if model != "BPE":
        return model.lower()
    byte_level = any(step["type"] == "ByteLevel" for step in (*steps(inner.pre_tokenizer), *steps(inner.normalizer)))
    return "bpe" if byte_level or not inner.model.byte_fallback else "sentencepiece"


def _size(inner: tokenizers.Tokenizer) -> int:
    """One more than the highest id; ids may have gaps, but not out of all proportion."""
    ids = inner.get_vocab().values()
    if not ids or max(ids) > 2 * len(ids) + 1024:
        top = max(ids, default=0)
        raise TokenizerError(f"tokenizer: {len(ids):,} tokens with ids up to {top:,}: wanted ids in a row")
    return max(ids) + 1


def _special(inner: tokenizers.Tokenizer) -> set[int]:
    return {i for i, token in inner.get_added_tokens_decoder().items() if token.special}


def _names(inner: tokenizers.Tokenizer, special: set[int], *, bytes_too: bool) -> re.Pattern[str]:
    """Finds where a text spells a special token, overlapping ones too. Of a unigram model any token may be found
    in a text, those for bytes and for the unknown as well."""
    names = [re.escape(name) for i in sorted(special) if (name := inner.id_to_token(i))]
    names += ["<0x[0-9A-F]{2}>"] * bytes_too
    return re.compile(f"(?=(?:{'|'.join(names) or '(?!)'}))")
