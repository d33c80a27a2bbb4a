"""Bad fine-tuning data: rows of JSONL, arrays of rows, and the chat templates beside a tokenizer."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from entrenar.data import ByteTokenizer, CorpusError, TokenizerError, load_tokenizer
from entrenar.data.chat import load_template, read_examples
from hostile.case import MIB, WHOLE, WORDS, Case, Family, bad_json, bytes_at, cuts, flips, not_files, tree_mutations

NAME = "chats.jsonl"
CALL = {"id": "abcdef123", "type": "function", "function": {"name": "f", "arguments": {"x": [1, None]}}}
CHAT = {
    "messages": [
        {"role": "system", "content": "Be nice."},
        {"role": "user", "content": [{"type": "text", "text": "hi"}], "name": "ada"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "weight": 0},
        {"role": "tool", "content": "1", "tool_call_id": "abcdef123"},
        {"role": "assistant", "content": "h\u00e9llo"},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
}
SHARED = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"}
PROMPT = {"prompt": "q", "completion": "a"}
ALPACA = {"instruction": "i", "input": "n", "output": "o"}
ROWS = (CHAT, SHARED, PROMPT, ALPACA, {"text": "t"})
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
ARRAY = json.dumps(ROWS, indent=1).encode()
BYTES = ByteTokenizer()


def errors() -> tuple[type[BaseException], ...]:
    return (CorpusError, TokenizerError)


def digest_of(path: Path) -> str:
    return read_examples(str(path), BYTES, held_out=0).identity


def case(name: str, raw: bytes | Callable[[], bytes], **more: Any) -> Case:
    return Case(name, bytes_at(more.pop("file", NAME), raw), digest_of, **more)


def cut_short() -> Iterator[Case]:
    """Cut between two rows the file is as good as before."""
    for name, raw in cuts(LINES, 200):
        yield case(name, raw, may_load=True)
    for name, raw in cuts(LINES[: LINES.index(b"\n")], 60):
        yield case(f"the first row, {name}", raw)


def arrays_cut_short() -> Iterator[Case]:
    for name, raw in cuts(ARRAY, 200):
        yield case(name, raw)


def packed_files() -> Iterator[Case]:
    packed = gzip.compress(LINES, mtime=0)
    for name, raw in cuts(packed, 60):
        yield case(f"cut {name}", raw, file="chats.jsonl.gz", says="cut off|nothing to train on|no gzip file")
    for name, raw in flips(packed, 60, 4):
        yield case(f"changed {name}", raw, file="chats.jsonl.gz", may_load=True)
    yield case("text", LINES, file="chats.jsonl.gz", says="no gzip file")
    yield case("a bomb", lambda: gzip.compress(bytes(300 * MIB), 1), file="chats.jsonl.gz", says="longest row")
    bomb = gzip.compress(b'{"text": "' + b"x" * (60 * MIB) + b'"}\n', 1)
    yield case("a long row", bomb, file="chats.jsonl.gz", says="longest row may have")


def rows_that_are_no_json() -> Iterator[Case]:
    """Each as the second row, which the message has to say, and as an element of an array."""
    good = json.dumps(CHAT).encode()
    for name, raw in bad_json(json.dumps(CHAT), big=False):
        made = raw if isinstance(raw, bytes) else raw()
        if b"\n" in made.strip() or not made.strip() or b"\0\0" in made:
            continue
        # a byte order mark is passed over, and only there, at the start of a file
        yield case(name, good + b"\n" + made + b"\n" + good, says="line 2")
        yield case(f"{name}, in an array", b"[" + good + b",\n" + made + b"]")


def shapes() -> Iterator[Case]:
    """Every value of a row in turn taken away, and put to something else; some are as good."""
    for number, row in enumerate(ROWS):
        for name, tree in tree_mutations(row, [*WORDS, WHOLE[-1], "x" * 1000, {"role": "user"}]):
            yield case(f"{number}: {name}", json.dumps(tree).encode(), may_load=True)


def wrong_shapes() -> Iterator[Case]:
    for name, row in {
        "a preference": {"prompt": "x", "chosen": "a", "rejected": "b"},
        "an unknown role": {"messages": [{"role": "\x1b[2J", "content": "x"}]},
        "a long role": {"messages": [{"role": "x" * 100_000, "content": "x"}]},
        "long keys": {"x" * 100_000: 1, "\x1b[2J": 2},
        "many keys": {str(i): i for i in range(10_000)},
        "arguments that are no JSON": {"messages": [{"role": "assistant", "tool_calls": [
            {"function": {"name": "f", "arguments": "[" * 100_000}}]}]},
        "tools that are no JSON": {"messages": CHAT["messages"], "tools": '{"a": 1, "a": 2}'},
        "an image": {"messages": [{"role": "user", "content": [{"type": "image_url\x1b", "image_url": "x"}]}]},
    }.items():  # fmt: skip
        yield case(name, json.dumps(row).encode(), says="line 1 ")


def changed_bytes() -> Iterator[Case]:
    for name, raw in flips(LINES, 200, 5):
        yield case(name, raw, may_load=True)
    for name, raw in flips(ARRAY, 100, 6):
        yield case(f"array {name}", raw, may_load=True)


def other_things() -> Iterator[Case]:
    for name, write, system in not_files(NAME):
        yield Case(name, write, digest_of, system=system)
    yield case("NULs", bytes(1000))
    yield case("FFs", b"\xff" * 1000)
    yield case("UTF-16", LINES.decode().encode("utf-16"))
    yield case("a row of 20 MB", lambda: b'{"text": "' + b"x" * (20 * MIB) + b'"}')
    yield case("brackets", b"[" * 1_000_000)
    yield case("brackets of an array", lambda: b"[" + b"[" * 1_000_000 + b"]" * 1_000_001)
    yield case("many bad rows", b'{"a": 1}\n' * 100_000, says="reading ended there")
    yield case("a name that a terminal acts on", b"{", file="a\x1b[2Jb.jsonl", names=r"a\x1b[2Jb.jsonl")


# --- templates -------------------------------------------------------------------------------------------


def template_of(path: Path) -> str:
    tokenizer = load_tokenizer(path)
    return load_template(tokenizer).render([{"role": "user", "content": "x"}]).text


def beside(name: str, files: dict[str, bytes], *, names: str, **more: Any) -> Case:
    def write(folder: Path) -> Path:
        (folder / "tokenizer").mkdir()
        BYTES.save(folder / "tokenizer")
        for file, raw in files.items():
            (folder / "tokenizer" / file).parent.mkdir(exist_ok=True)
            (folder / "tokenizer" / file).write_bytes(raw)
        return folder / "tokenizer"

    return Case(name, write, template_of, names=names, **more)


BAD_TEMPLATES = {
    "no template": b"{% if %}",
    "not closed": b"{% for m in messages %}",
    "no UTF-8": b"\xff{{ 1 }}",
    "an exception": b"{{ raise_exception('\x1b[2J') }}",
    "something missing": b"{{ messages[9].content.x }}",
    "an escape": b"{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a file": b"{% include '/etc/passwd' %}",
    "a change": b"{{ messages.append(1) }}",
    "endless loops": b"{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "itself": b"{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a product": b"{{ 'x' * 10 ** 10 }}",
    "a power": b"{{ 2 ** (2 ** 40) }}",
    "doubling": b"{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "output": b"{% set s = 'x' * 10 ** 6 %}{% for i in range(99999) %}{{ s }}{% endfor %}",
    "a width": b"{{ 'x'.ljust(10 ** 10) }}",
    "brackets": b"{{ " + b"(" * 100_000 + b" }}",
    "blocks": b"{% if true %}" * 5000,
    "two million letters": b"x" * 2_000_000,
}


def templates() -> Iterator[Case]:
    for name, raw in BAD_TEMPLATES.items():
        yield beside(name, {"chat_template.jinja": raw}, names="chat_template.jinja")
    for name in ("an exception", "no UTF-8", "no template"):
        files = {"additional_chat_templates/default.jinja": BAD_TEMPLATES[name]}
        yield beside(f"{name}, in the folder", files, names="additional_chat_templates")
    many = {f"additional_chat_templates/{i}.jinja": b"x" for i in range(100)}
    yield beside("a hundred", many, names="additional_chat_templates", says="more than 64")


def templates_in_the_settings() -> Iterator[Case]:
    end = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    lists = [{"name": "default"}], [{"name": 1, "template": "x"}], [{"name": "a", "template": "x"}]
    for value in (*WORDS[1:], 3, *lists):
        if value in ("", "1"):
            continue
        settings = json.dumps(end | {"chat_template": value}).encode()
        yield beside(f"{json.dumps(value)}", {"tokenizer_config.json": settings}, names="tokenizer_config.json")


def harmless() -> Iterator[Case]:
    same = read_here(LINES)
    yield case("as it is", LINES, equals=same)
    yield case("an array", ARRAY, equals=same)
    yield case("an array in one line", json.dumps(ROWS).encode(), equals=same)
    yield case("blank lines", LINES.replace(b"\n", b"\n\n \n"), equals=same)
    yield case("a byte order mark", b"\xef\xbb\xbf" + LINES, equals=same)
    yield case("line ends of Windows", LINES.replace(b"\n", b"\r\n"), equals=same)
    yield case("more keys", LINES.replace(b'{"text"', b'{"id": [1, {"a": null}], "text"'), equals=same)
    yield case("packed", gzip.compress(LINES), file="chats.jsonl.gz", equals=same)


def read_here(raw: bytes) -> str:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return digest_of(bytes_at(NAME, raw)(Path(folder)))


FAMILIES: dict[str, Family] = {
    "cut short": cut_short,
    "arrays cut short": arrays_cut_short,
    "packed files": packed_files,
    "rows that are no JSON": rows_that_are_no_json,
    "shapes": shapes,
    "wrong shapes": wrong_shapes,
    "changed bytes": changed_bytes,
    "other things": other_things,
    "templates": templates,
    "templates in the settings": templates_in_the_settings,
    "harmless": harmless,
}
