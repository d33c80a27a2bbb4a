"""LLaMA-2's tokenizer.model, the file of the sentencepiece library: read by hand, made into a `tokenizers` tokenizer.

The file is one protocol buffer: a row of fields, each a varint `number << 3 | wire type` and a value (0: a varint,
1: eight bytes, 2: a length and as many bytes, 5: four bytes). Of sentencepiece_model.proto this is what decides
about tokens; all else is skipped:

    1 pieces, repeated     1 piece (text), 2 score (float), 3 type
    2 trainer_spec         3 model_type, 24 treat_whitespace_as_suffix, 35 byte_fallback, 40-42 unk_id, bos_id, eos_id
    3 normalizer_spec      2 precompiled_charsmap, 3 add_dummy_prefix, 4 remove_extra_whitespaces, 5 escape_whitespaces

A BPE here has scores and no merges: of all neighbours that together are a piece, those of the highest score merge
first. So every way to split a piece into two pieces is a merge, and the scores are their order: the same tokens for
every text. A unigram model takes the pieces whose scores sum up highest; where two ways sum up to the same, as with
long runs of spaces, rounding decides, here and in sentencepiece. What a tokenizer.json cannot say is refused by name.
"""

from __future__ import annotations

import collections
import functools
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from entrenar.formats import FormatError, open_regular, short

if TYPE_CHECKING:
    import tokenizers

FILE = "tokenizer.model"
LIMIT = 8 * 1000**2  # bytes; LLaMA-2's has half a million, Gemma's, the largest in use, 4.7
PIECES = 300_000  # Gemma's has 262,144
FIELDS = 10_000  # of one message, beside the pieces; a trainer_spec has some 50
LONGEST = 128  # characters of a piece; sentencepiece's own limit is 16 unless it is told otherwise
SPACE = "\u2581"  # stands for a space in pieces

UNIGRAM, BPE, WORD, CHAR = 1, 2, 3, 4
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
TYPES = {NORMAL: "normal", UNKNOWN: "unknown", CONTROL: "control", USER_DEFINED: "user-defined", UNUSED: "unused",
         BYTE: "byte"}  # fmt: skip
OTHERWISE = "convert it with transformers, which writes a tokenizer.json, and give that"


@dataclass(frozen=True)
class Piece:
    """A token: its text (a space is U+2581), its score (the higher the earlier it is chosen), its type."""

    text: str
    score: float
    type: int = NORMAL


@dataclass(frozen=True)
class SentencePiece:
    """What a tokenizer.model says; a piece's place in the row is its id. An id of -1: there is no such token."""

    name: str
    pieces: list[Piece]
    model_type: int = UNIGRAM
    byte_fallback: bool = False
    unk_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    unusual: list[str] = field(default_factory=list)  # options that a tokenizer.json cannot say

    def tokenizer(self) -> tokenizers.Tokenizer:
        """The same tokenizer for the `tokenizers` library: the same ids for every text.

        Raises FormatError, naming what this file asks for and a tokenizer.json cannot say.
        """
        self._check()
        return _tokenizer(self)

    @functools.cached_property
    def merges(self) -> list[tuple[float, str, str]]:
        """(score, left, right) of every way to make a piece of two others, the highest score first."""
        scores = {piece.text: piece.score for piece in self.pieces if piece.type == NORMAL}
        made = [
            (score, text[:i], text[i:])
            for text, score in scores.items()
            for i in range(1, len(text))
            if text[:i] in scores and text[i:] in scores
        ]
        return sorted(made, key=lambda merge: (-merge[0], len(merge[1])))

    def control_tokens(self) -> list[str]:
        """Pieces that no text can be: `<unk>`, `<s>`, `</s>` and the like."""
        return [piece.text for piece in self.pieces if piece.type in (UNKNOWN, CONTROL)]

    def bytes_known(self) -> set[str]:
        return {piece.text for piece in self.pieces if piece.type == BYTE}

    def _check(self) -> None:
        """Collect all that is wrong, then say it in one message."""
        wrong = list(self.unusual)
        names = {WORD: "words", CHAR: "characters"}
        if self.model_type not in (UNIGRAM, BPE):
            wrong.append(f"its model is of type {names.get(self.model_type, self.model_type)}; wanted BPE or unigram")
        twice = [text for text, count in collections.Counter(p.text for p in self.pieces).items() if count > 1]
        if twice:
            wrong.append(f"the piece {short(twice[0])} is there twice")
        for kind in (USER_DEFINED, UNUSED):
            found = [piece.text for piece in self.pieces if piece.type == kind]
            if found:
                wrong.append(f"{len(found)} pieces are {TYPES[kind]}, {short(found[0])} the first")
        for name in ("unk_id", "bos_id", "eos_id"):
            value = getattr(self, name)
            wanted = UNKNOWN if name == "unk_id" else CONTROL
            if value >= len(self.pieces) or value >= 0 and self.pieces[value].type != wanted:
                wrong.append(f"{name} = {value} is no {TYPES[wanted]} piece among its {len(self.pieces)}")
        if self.unk_id < 0:
            wrong.append("it has no unknown token")
        if self.byte_fallback and (missing := {f"<0x{byte:02X}>" for byte in range(256)} - self.bytes_known()):
            wrong.append(f"{len(missing)} of the 256 byte pieces are missing, {min(missing)} for one")
        if self.model_type == BPE and not wrong:
            wrong += _ties(self)
        if wrong:
            raise FormatError(f"{self.name}: cannot be used: {'; '.join(wrong)}; {OTHERWISE}")


def read_model(path: str | Path) -> SentencePiece:
    """Read a tokenizer.model.

    Raises FormatError naming the file and the byte, OSError where it cannot be read.
    """
    file, size = open_regular(path)
    with file:
        if size > LIMIT:
            raise FormatError(f"{path}: has {size:,} bytes; a {FILE} has at most {LIMIT:,}")
        raw = file.read(LIMIT + 1)
    return parse_model(raw, str(path))


def parse_model(raw: bytes, name: str) -> SentencePiece:
    """The SentencePiece in these bytes; `name` is what messages call them. Raises FormatError."""
    if not raw:
        raise FormatError(f"{name}: is empty, wanted a sentencepiece model")
    if re.match(rb"[A-Za-z0-9+/]+=* \d+\n", raw):
        raise FormatError(f"{name}: looks like a tiktoken file (Llama 3's original); give its tokenizer.json instead")
    spans = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    whole = _Message(raw, 0, len(raw), name)
    for i, (number, value) in enumerate(whole.fields()):
        if number == 1:
            spans.append(value)  # looked into when it is known how many there are
        elif number in (2, 3):
            (trainer if number == 2 else normalizer).update(_few(whole.inside(value, "specification")))
        if len(spans) > PIECES or i - len(spans) > FIELDS:
            raise FormatError(f"{name}: has more than {PIECES:,} pieces, or {FIELDS:,} other fields")
    pieces = [_piece(whole.inside(span, "piece")) for span in spans]
    if not pieces or not trainer:
        raise FormatError(f"{name}: is no sentencepiece model: it has {len(pieces)} pieces and "
                          f"{'a' if trainer else 'no'} trainer_spec")  # fmt: skip
    return SentencePiece(
        name,
        pieces,
        model_type=_number(trainer, 3, UNIGRAM, name),
        byte_fallback=bool(_number(trainer, 35, 0, name)),
        unk_id=_number(trainer, 40, 0, name),
        bos_id=_number(trainer, 41, 1, name),
        eos_id=_number(trainer, 42, 2, name),
        add_dummy_prefix=bool(_number(normalizer, 3, 1, name)),
        remove_extra_whitespaces=bool(_number(normalizer, 4, 1, name)),
        unusual=[
            text
            for text, is_so in (
                ("it writes spaces behind words (treat_whitespace_as_suffix)", _number(trainer, 24, 0, name)),
                ("it does not escape spaces (escape_whitespaces)", not _number(normalizer, 5, 1, name)),
                ("it normalises text by a table (precompiled_charsmap, such as nmt_nfkc; LLaMA's is identity)",
                 _length(normalizer.get(2))),
            )
            if is_so
        ],
    )  # fmt: skip


class _Message:
    """Part of a protocol buffer, raw[start:stop]; every length is checked before it is followed."""

    def __init__(self, raw: bytes, start: int, stop: int, name: str) -> None:
        self.raw, self.start, self.stop, self.name = raw, start, stop, name

    def fields(self) -> Iterator[tuple[int, Any]]:
        """(number, value) of each field: an int, four or eight bytes, or (start, stop) of a length-delimited one."""
        at = self.start
        while at < self.stop:
            begun = at
            key, at = self._varint(at)
            number, wire = key >> 3, key & 7
            if number == 0:
                self._fail(begun, "has the field number 0")
            if wire == 0:
                value, at = self._varint(at)
                yield number, value
            elif wire in (1, 2, 5):
                size, at = self._varint(at) if wire == 2 else (8 if wire == 1 else 4, at)
                if size > self.stop - at:
                    self._fail(begun, f"field {number} has {size:,} bytes where {self.stop - at:,} are left")
                yield number, (at, at + size) if wire == 2 else self.raw[at : at + size]
                at += size
            else:
                self._fail(begun, f"field {number} is of wire type {wire}, which sentencepiece never writes")

    def inside(self, value: Any, what: str) -> _Message:
        """The message in a field of this one."""
        if not isinstance(value, tuple):
            self._fail(self.start, f"a {what} is no message")
        return _Message(self.raw, value[0], value[1], self.name)

    def _varint(self, at: int) -> tuple[int, int]:
        value = 0
        for i in range(10):
            if at + i >= self.stop:
                self._fail(at, "a number runs over the end")
            byte = self.raw[at + i]
            value |= (byte & 0x7F) << 7 * i
            if byte < 0x80:
                return value, at + i + 1
        self._fail(at, "a number has more than 10 bytes")

    def _fail(self, at: int, why: str) -> NoReturn:
        raise FormatError(f"{self.name}: is no sentencepiece model, or a broken one: byte {at:,}: {why}")


def _few(message: _Message) -> Iterator[tuple[int, Any]]:
    """The fields of a message, none of which has many."""
    for i, pair in enumerate(message.fields()):
        if i == FIELDS:
            message._fail(message.start, f"a message has more than {FIELDS:,} fields")
        yield pair


def _piece(message: _Message) -> Piece:
    text, score, kind = b"", 0.0, NORMAL
    for number, value in _few(message):
        if number == 1 and isinstance(value, tuple):
            text = message.raw[slice(*value)]
        elif number == 2 and isinstance(value, bytes) and len(value) == 4:
            (score,) = struct.unpack("<f", value)
        elif number == 3 and isinstance(value, int):
            kind = value
        elif number in (1, 2, 3):
            message._fail(message.start, f"field {number} of a piece is of the wrong type")
    try:
        decoded = text.decode()
    except UnicodeDecodeError:
        message._fail(message.start, f"the piece {short(text)} is not UTF-8")
    if not 0 < len(decoded) <= LONGEST:
        message._fail(message.start, f"a piece has {len(decoded):,} characters, wanted 1 to {LONGEST}")
    if kind not in TYPES:
        message._fail(message.start, f"the piece {short(decoded)} is of type {kind}, wanted 1 to 6")
    if not abs(score) < float("inf"):
        message._fail(message.start, f"the piece {short(decoded)} has the score {score}")
    return Piece(decoded, score, kind)


def _number(fields: dict[int, Any], number: int, default: int, name: str) -> int:
    """A field that is an int32, an enum or a bool."""
    value = fields.get(number, default)
    if not isinstance(value, int):
        raise FormatError(f"{name}: field {number} of its trainer_spec or normalizer_spec is no number")
    return value - (1 << 64) if value >= 1 << 63 else value


def _length(span: Any) -> int:
    return span[1] - span[0] if isinstance(span, tuple) else 0


def _ties(model: SentencePiece) -> list[str]:
    """sentencepiece merges the leftmost of two equal scores; a tokenizer.json cannot say so for different pieces."""
    seen: dict[float, str] = {}
    for score, left, right in model.merges:
        if seen.setdefault(score, left + right) != left + right:
            return [f"the pieces {short(seen[score])} and {short(left + right)} have the same score, {score:g}, "
                    "so that neither merges before the other"]  # fmt: skip
    return []


def _tokenizer(model: SentencePiece) -> tokenizers.Tokenizer:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors

    ids = {piece.text: i for i, piece in enumerate(model.pieces)}
    unknown = model.pieces[model.unk_id].text
    if model.model_type == BPE:
        merges = [(left, right) for _, left, right in model.merges]
        inner = Tokenizer(models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=model.byte_fallback))
    else:
        scores = [(piece.text, piece.score) for piece in model.pieces]
        inner = Tokenizer(models.Unigram(scores, unk_id=model.unk_id, byte_fallback=model.byte_fallback))
    inner.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in model.control_tokens()])
    steps: list[Any] = []
    if model.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(rf"\A +|[ {SPACE}]+\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if model.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    inner.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    back: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence(back + [decoders.Strip(" ", 1, 0)] * model.add_dummy_prefix)
    if model.bos_id >= 0:
        begin = model.pieces[model.bos_id].text
        inner.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A {begin}:1 $B:1", special_tokens=[(begin, model.bos_id)]
        )
    return inner
