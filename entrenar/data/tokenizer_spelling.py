"""What each token is in a text: its bytes. Decoding, and decoding one token after the other.

Most decoders of a tokenizer.json write one token after the other, and only the very first differently (LLaMA-2's
loses its space): two rows of bytes, `first` and `rest`, say all of it. A character may be spread over tokens; what
is no UTF-8 in the end becomes U+FFFD, one for each part that can be no character, as in the Unicode standard.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from entrenar.data.tokenizer_cuts import BYTE_LETTERS, steps
from entrenar.data.tokenizer_protocol import Decoder, refusal

if TYPE_CHECKING:
    import tokenizers

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_BYTES = {letter: bytes((byte,)) for byte, letter in enumerate(BYTE_LETTERS)}


@dataclass(frozen=True)
class Spelling:
    """Bytes of every token: at the start of a text, and further on. Ids without a token, or beyond, are nothing."""

    first: Sequence[bytes]
    rest: Sequence[bytes]

    def text(self, ids: Iterable[int]) -> str:
        row = [int(i) for i in ids]
        parts = [self.of(self.first, i) for i in row[:1]] + [self.of(self.rest, i) for i in row[1:]]
        return b"".join(parts).decode("utf-8", "replace")

    @staticmethod
    def of(table: Sequence[bytes], token: int) -> bytes:
        return table[token] if 0 <= token < len(table) else b""


class SpellingDecoder:
    """Text of tokens that come one by one: never half a character, and in the end what `Spelling.text` says."""

    def __init__(self, spelling: Spelling) -> None:
        self.spelling, self.begun = spelling, False
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Text that is certain now and was not before; "" in the middle of a character."""
        table = self.spelling.rest if self.begun else self.spelling.first
        self.begun = True
        return self.utf8.decode(Spelling.of(table, int(token)))

    def end(self) -> str:
        """What was held back: half a character, as U+FFFD."""
        return self.utf8.decode(b"", final=True)


class WholeDecoder:
    """For decoders that may change what was written when more comes: everything at the end."""

    def __init__(self, inner: tokenizers.Tokenizer, size: int) -> None:
        self.inner, self.size = inner, size
        self.ids: list[int] = []

    def push(self, token: int) -> str:
        if 0 <= token < self.size:
            self.ids.append(int(token))
        return ""

    def end(self) -> str:
        ids, self.ids = self.ids, []
        return _decode(self.inner, ids)


def spelling(inner: tokenizers.Tokenizer, size: int) -> Spelling | None:
    """The bytes of tokens 0 .. size - 1, or None where the decoder is not one that writes token after token."""
    tokens = [inner.id_to_token(i) for i in range(size)]
    back = steps(inner.decoder)
    kinds = [step["type"] for step in back]
    if kinds == ["ByteLevel"]:
        rest = [_byte_level(token or "") for token in tokens]
        return Spelling(rest, rest)
    if kinds == ["Metaspace"]:
        return _metaspace(back[0], tokens)
    if not kinds or kinds == ["WordPiece"]:
        return _by_trial(inner, tokens)
    return _replaced(back, tokens)


def _byte_level(token: str) -> bytes:
    """A letter for each byte; added tokens are written as they are where they have other letters."""
    found = [_BYTES.get(letter) for letter in token]
    return token.encode() if None in found else b"".join(filter(None, found))


def _metaspace(step: dict[str, Any], tokens: list[str | None]) -> Spelling:
    """The library leaves out every space of the first token."""
    mark = step["replacement"]
    rest = [(token or "").replace(mark, " ").encode() for token in tokens]
    if step.get("prepend_scheme", "always") == "never":
        return Spelling(rest, rest)
    return Spelling([(token or "").replace(mark, "").encode() for token in tokens], rest)


def _by_trial(inner: tokenizers.Tokenizer, tokens: list[str | None]) -> Spelling | None:
    """What the library writes for each token alone, and behind another."""
    known = [i for i, token in enumerate(tokens) if token]
    if not known:
        return None
    before = _decode(inner, known[:1])
    first, rest = [b""] * len(tokens), [b""] * len(tokens)
    for i in known:
        first[i] = _decode(inner, [i]).encode()
        rest[i] = _decode(inner, [known[0], i]).removeprefix(before).encode()
    return Spelling(first, rest)


def _replaced(back: list[dict[str, Any]], tokens: list[str | None]) -> Spelling | None:
    """LLaMA-2's: letters replaced, `<0x0A>` as bytes, all fused, and one space at the start stripped."""
    texts, left, fused, bytes_too = [token or "" for token in tokens], 0, False, False
    for step in back:
        match step:
            case {"type": "Replace", "pattern": {"String": old}, "content": new} if not (fused or bytes_too) and old:
                texts = [text.replace(old, new) for text in texts]
            case {"type": "ByteFallback"} if not fused:
                bytes_too = True
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Strip", "content": " ", "start": 0 | 1 as start, "stop": 0} if fused and not left:
                left = start
            case _:
                return None
    rest = [_fallback(text) if bytes_too else text.encode() for text in texts]
    return Spelling([part.removeprefix(b" ") for part in rest] if left else rest, rest)


def _fallback(token: str) -> bytes:
    found = _BYTE.fullmatch(token)
    return bytes((int(found[1], 16),)) if found else token.encode()


def _decode(inner: tokenizers.Tokenizer, ids: list[int]) -> str:
    try:
        return inner.decode(ids, skip_special_tokens=False)
    except BaseException as error:
        raise refusal(error, "tokenizer: cannot decode these tokens") from None


def started(decoder: Decoder, after: Iterable[int]) -> Decoder:
    """The decoder, having got these tokens."""
    for token in after:
        decoder.push(token)
    return decoder
