"""JSON from strangers: read with every limit checked, and every error with its line and column.

Refused beyond what the standard library refuses: files that are too big, more than VALUES values, a key twice in one
object, nesting deeper than DEPTH, NaN and Infinity (as words, or as numbers too big for a float), integers of more
than DIGITS digits, text that is not UTF-8, escapes that are no Unicode (half a surrogate pair).

The parser is the standard library's, in C. It only notices that something is to be refused; `_fault` then reads the
text again, slowly, to say where.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from entrenar.formats import FormatError, open_regular, short

LIMIT = 64 * 1000**2  # bytes of a tokenizer.json; the largest in use has some 35 MB
VALUES = 3_000_000  # in one; each takes 70 to 250 bytes of memory: "[[],[],[],..." is worth 20 times its size
USUAL_LIMIT, USUAL_VALUES = 16 * 1000**2, 400_000  # of any other file: it stays below 200 MB of memory
DEPTH = 100  # objects and arrays inside each other; real files stay below 10
DIGITS = 100  # of one integer; the state of a random generator has 39
LOOKED_THROUGH = 4 * 1000**2  # characters of a text that are read again, at 4 MB a second, to say where

TWICE = "the key {} is there twice in one object"
NO_NUMBER = "{} is no number; wanted a finite one, or null"
TOO_BIG = "the number {} is too big"
TOO_LONG = f"an integer of {{}} digits; at most {DIGITS} are read"
TOO_DEEP = f"nested more than {DEPTH} deep"

# Everything with a backslash, from left to right: a whole surrogate pair; half of one (the group); any other escape
ESCAPE = re.compile(r"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|(u[dD][89a-fA-F]..)|.)")
TOKEN = re.compile(
    r'(?P<text>"[^"\\]*(?:\\.[^"\\]*)*")(?P<key>\s*:)?|(?P<open>[\[{])|(?P<close>[\]}])|(?P<word>-?(?:NaN|Infinity))'
    r"|(?P<number>-?\d+(?P<real>\.\d+)?(?P<power>[eE][-+]?\d+)?)",
    re.DOTALL,
)


def read_json(path: str | Path, *, limit: int = USUAL_LIMIT) -> Any:
    """The value in a JSON file of at most `limit` bytes, and USUAL_VALUES values (VALUES from a limit of LIMIT on).

    Raises FormatError ("config.json line 3 column 7: ..."), OSError where the file is missing or cannot be read.
    """
    file, size = open_regular(path)
    with file:
        if size > limit:
            raise FormatError(f"{path}: has {size:,} bytes; a file like this has at most {limit:,}")
        raw = file.read(limit + 1)  # the file may have grown meanwhile
    if len(raw) > limit:
        raise FormatError(f"{path}: has more than the {limit:,} bytes a file like this has at most")
    return parse(raw, str(path), values=USUAL_VALUES if limit < LIMIT else VALUES)


def read_object(path: str | Path, *, limit: int = USUAL_LIMIT) -> dict[str, Any]:
    """Like `read_json`, for a file that must hold an object: `{"key": value, ...}`."""
    value = read_json(path, limit=limit)
    if not isinstance(value, dict):
        raise FormatError(f"{path}: holds {_kind(value)}, wanted an object: {{...}}")
    return value


def parse(text: str | bytes, where: str, *, first_line: int = 1, values: int = VALUES) -> Any:
    """The value of a JSON text.

    where        what the messages call it: the file's name
    first_line   the line of the file that the text begins on, for the messages: lines of JSONL are parsed one by one
    values       how many values the text may have, about
    Raises FormatError.
    """
    text = _decoded(text, where, first_line, values)
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_word, parse_int=_int, parse_float=_float)
        half = _half_pair(text)
        if half is None and not _deeper(value, DEPTH):
            return value
        at, why = half or _place(text, TOO_DEEP)
    except json.JSONDecodeError as error:
        at, why = error.pos, f"is not JSON: {error.msg[:1].lower()}{error.msg[1:]}"
    except _Refused as error:
        at, why = _place(text, str(error))
    except RecursionError:
        at, why = _place(text, TOO_DEEP)
    if at is None:
        raise FormatError(f"{_line(where, first_line)}: {why}")
    line, column = text.count("\n", 0, at), at - text.rfind("\n", 0, at)
    raise FormatError(f"{where} line {first_line + line} column {column}: {why}")


# What the parser notices on its way


class _Refused(Exception):
    """JSON by the letter, and something this module does not take."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise _Refused(TWICE.format(short(twice)))
    return made


def _word(word: str) -> NoReturn:
    raise _Refused(NO_NUMBER.format(word))


def _int(digits: str) -> int:
    if len(digits) > DIGITS:
        raise _Refused(TOO_LONG.format(len(digits)))
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise _Refused(TOO_BIG.format(digits[:60]))
    return value


def _deeper(value: Any, depth: int) -> bool:
    """Whether containers lie inside each other more than `depth` times."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(depth):
        if not level:
            return False
        inner = (item.values() if isinstance(item, dict) else item for item in level)
        level = [x for items in inner for x in items if isinstance(x, (dict, list))]
    return bool(level)


def _half_pair(text: str) -> tuple[int, str] | None:
    """Where an escape stands that is half of a surrogate pair, which no encoding can write."""
    if "\\ud" not in text and "\\uD" not in text:
        return None
    found = next((escape for escape in ESCAPE.finditer(text) if escape[1]), None)
    return found and (found.start(), f"{found[0]} is no Unicode: half of a surrogate pair")


# Where it is


def _place(text: str, why: str) -> tuple[int | None, str]:
    """Where what was noticed stands; nowhere in a text too long to be looked through."""
    found = _fault(text) if len(text) <= LOOKED_THROUGH else None
    return found or (None, why)


def _fault(text: str) -> tuple[int, str] | None:
    """Where in a text, which is JSON up to there, the first thing stands that is refused, and what it is."""
    keys: list[set[str]] = []  # of each object we are inside of
    for token in TOKEN.finditer(text):
        at, number = token.start(), token["number"]
        if token["open"]:
            keys.append(set())
            if len(keys) > DEPTH:
                return at, TOO_DEEP
        elif token["close"]:
            keys.pop()
        elif token["key"]:
            name = json.loads(token["text"])
            if name in keys[-1]:
                return at, TWICE.format(short(name))
            keys[-1].add(name)
        elif token["word"]:
            return at, NO_NUMBER.format(token["word"])
        elif token["real"] or token["power"]:
            if math.isinf(float(number)):
                return at, TOO_BIG.format(number[:60])
        elif number and len(number) > DIGITS:
            return at, TOO_LONG.format(len(number))
    return None


def _decoded(text: str | bytes, where: str, first_line: int, values: int) -> str:
    """The text; refused where it is no UTF-8, empty, or has too many values."""
    place = _line(where, first_line)
    try:
        text = text if isinstance(text, str) else text.decode()
    except UnicodeDecodeError as error:
        line, byte = first_line + error.object.count(b"\n", 0, error.start), error.object[error.start]
        raise FormatError(
            f"{where} line {line}: byte {error.start} (0x{byte:02x}) is not UTF-8; save the file as UTF-8"
        ) from None
    if text.startswith("\ufeff"):
        raise FormatError(f"{place}: begins with a byte order mark; save the file as UTF-8 without")
    if not text or text.isspace():
        raise FormatError(f"{place}: is empty, wanted JSON")
    if text.count(",") + text.count("[") + text.count("{") >= values:
        raise FormatError(f"{place}: has more than {values:,} values")
    return text


def _line(where: str, first_line: int) -> str:
    return where if first_line == 1 else f"{where} line {first_line}"


def _kind(value: Any) -> str:
    names = {list: "an array", str: "a text", bool: "a truth value", int: "a number", float: "a number"}
    return names.get(type(value), "null")
