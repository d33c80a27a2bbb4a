"""Bad folders of prepared data: facts.json, the names and places of the source, a tokenizer and token files."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from entrenar.data import CorpusError, load_prepared, prepare
from hostile.case import (
    GONE,
    WHOLE,
    WORDS,
    Case,
    Family,
    bad_json,
    bytes_at,
    cuts,
    flips,
    nodes,
    not_files,
    others,
    replaced,
)

FACTS, NAMES, PLACES, TOKENIZER = "facts.json", "names", "places", "tokenizer/tokenizer.json"
TRAIN, HELD_OUT = "train.tokens", "held_out.tokens"
NAME = "prepared"


def errors() -> tuple[type[BaseException], ...]:
    return (CorpusError,)


def digest_of(path: Path) -> str:
    """Read, and what a run asks of it: the tokens, and where the first, middle and last one come from."""
    data = load_prepared(path)
    count = len(data.train)
    places = [data.place(offset) for offset in sorted({0, count // 2, count - 1}) if count]
    assert "".join(places).isprintable(), f"places for people: {places}"
    return f"{data.identity} {data.facts} {places} {data.bytes_of(data.held_out[:3]):.6g}"


@functools.cache
def good() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for i in range(3):
            text = "".join(f"line {i} of {n}: the quick brown fox\n" for n in range(40))
            bytes_at(f"{i}.txt", text.encode())(folder)
        made = prepare(f"{folder}/*.txt", tokenizer="bytes", held_out=0.3, cache="off", into=folder / "into").folder
        return {str(file.relative_to(made)): file.read_bytes() for file in made.rglob("*") if file.is_file()}


@functools.cache
def whole() -> str:
    with tempfile.TemporaryDirectory() as folder:
        return digest_of(folder_of(good())(Path(folder)))


def folder_of(files: dict[str, bytes], after: Callable[[Path], Any] = lambda folder: None) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / NAME / "tokenizer").mkdir(parents=True)
        for name, raw in files.items():
            bytes_at(name, raw)(folder / NAME)
        after(folder / NAME)
        return folder / NAME

    return write


def case(name: str, changes: dict[str, Any], *, names: str = "", **more: Any) -> Case:
    files = {file: raw for file, raw in (good() | changes).items() if raw is not None}
    return Case(name, folder_of(files), digest_of, names=names or Path(next(iter(changes))).name, **more)


def facts() -> Any:
    return json.loads(good()[FACTS])


def facts_texts() -> Iterator[Case]:
    for name, raw in bad_json(good()[FACTS].decode()):
        yield case(name, {FACTS: raw})
    for name, part in cuts(good()[FACTS]):
        yield case(f"cut {name}", {FACTS: part}, equals=whole() if part == good()[FACTS].rstrip() else None)


def facts_values() -> Iterator[Case]:
    """Every fact gone and of every other type. Counts that no file confirms may be any."""
    for path in nodes(facts()):
        true = functools.reduce(lambda inner, key: inner[key], path, facts())
        for what, value in others(true, GONE, *WHOLE, *WORDS, "\x1b[2J", "x" * 100_000, [1], [None]):
            text = json.dumps(replaced(facts(), path, value)).encode()
            yield case(f"{'.'.join(map(str, path))} = {what}", {FACTS: text}, names=NAME, may_load=True)
    for key in facts()["facts"]:
        for what, value in others(0, GONE, None, {}, [None], [[]], -(10**30)):
            text = json.dumps(replaced(facts(), ("facts", key), value)).encode()
            yield case(
                f"{key} must not be {what}", {FACTS: text}, may_load=value is GONE and key.startswith("skipped")
            )
    yield case(
        "an unknown fact", {FACTS: json.dumps(replaced(facts(), ("facts", "hello"), 1)).encode()}, says="unknown"
    )


def names_and_places() -> Iterator[Case]:
    """They serve messages only; where the index is damaged, a place is unknown."""
    for name, part in cuts(good()[NAMES], 60):
        yield case(f"names cut {name}", {NAMES: part}, names=NAME, may_load=True)
    for what, names in {
        "one name too many": good()[NAMES] + b"a\0",
        "text": b"hello",
        "NULs": bytes(1000),
        "FFs": b"\xff\0" * 3,
        "an escape code": b"\x1b[2J\0" * 3,
        "../": b"../../etc/passwd\0" * 3,
        "long": (b"x" * 10_000 + b"\0") * 3,
    }.items():
        yield case(f"names are {what}", {NAMES: names}, names=NAME, may_load=True)
    raw = good()[PLACES]
    for name, part in cuts(raw, 60):
        yield case(f"places cut {name}", {PLACES: part}, names=NAME, may_load=len(part) % 24 == 0)
    for name, part in flips(raw, 200, 13):
        yield case(f"places changed, {name}", {PLACES: part}, names=NAME, may_load=True)
    for name, part in {"NULs": bytes(2400), "FFs": b"\xff" * 2400, "one byte more": raw + b"\0"}.items():
        yield case(f"places: {name}", {PLACES: part}, names=NAME, may_load=len(part) % 24 == 0)


def tokens() -> Iterator[Case]:
    for file in (TRAIN, HELD_OUT):
        raw = good()[file]
        for name, part in cuts(raw, 60):
            yield case(f"{file} cut {name}", {file: part})
        for name, part in flips(raw, 60, 14):
            yield case(f"{file} changed, {name}", {file: part})
        yield case(f"{file} longer", {file: raw + b"\0\0"})
    yield case("the sides changed places", {TRAIN: good()[HELD_OUT], HELD_OUT: good()[TRAIN]})
    yield case("the same side twice", {HELD_OUT: good()[TRAIN]})


def tokenizers() -> Iterator[Case]:
    for name, raw in bad_json(good()[TOKENIZER].decode(), big=False):
        yield case(name, {TOKENIZER: raw}, names=NAME)
    for name, part in cuts(good()[TOKENIZER], 60):
        yield case(f"cut {name}", {TOKENIZER: part}, names=NAME)
    for file, raw in {"vocab.json": b"{}", "hello": b"x", "tokenizer.model": b"x"}.items():
        yield case(f"with {file}", {f"tokenizer/{file}": raw}, names=NAME)
    yield case("in other words", {TOKENIZER: good()[TOKENIZER] + b"\n"}, names=NAME, says="tokenizer is")


def other_things() -> Iterator[Case]:
    for file in good():
        rest = {name: raw for name, raw in good().items() if name != file}
        yield case(f"{file} missing", {file: None}, names=NAME)
        for what, write, _ in not_files(file):
            free = what == "an empty file" and file in (NAMES, PLACES)
            yield Case(f"{file}: {what}", folder_of(rest, write), digest_of, names=NAME, may_load=free)
    for what, write, _ in not_files(NAME):
        yield Case(f"{what} as the folder", write, digest_of)


def harmless() -> Iterator[Case]:
    yield case("as it is", {FACTS: good()[FACTS]}, equals=whole())
    yield case("another file", {"notes.txt": b"hello"}, equals=whole())


FAMILIES: dict[str, Family] = {
    "facts: texts": facts_texts,
    "facts: values": facts_values,
    "names and places": names_and_places,
    "tokens": tokens,
    "tokenizer": tokenizers,
    "other things": other_things,
    "harmless": harmless,
}
