"""Bad configurations of a run: TOML."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from entrenar.training.config import Config, ConfigError, options, read_config, to_toml
from hostile.case import MIB, Case, Family, bytes_at, cuts, flips, not_files

NAME = "run.toml"
GOOD = """# a small run
[model]
hidden_size = 64
rope_scaling = {rope_type = "llama3", factor = 8.0, low_freq_factor = 1.0, high_freq_factor = 4.0, \
original_max_position_embeddings = 8192}

[training]
steps = 100
budget = "20m"

[data]
source = "a \\u00e9.txt"
"""


def errors() -> tuple[type[BaseException], ...]:
    return (ConfigError,)


def digest_of(path: Path) -> str:
    return to_toml(read_config(path))


def case(name: str, text: str | bytes, **more: object) -> Case:
    raw = text.encode() if isinstance(text, str) else text
    return Case(name, bytes_at(NAME, raw), digest_of, **more)  # type: ignore[arg-type]


def cut_short() -> Iterator[Case]:
    for name, raw in cuts(GOOD.encode()):
        yield case(name, raw, may_load=True)  # many beginnings are whole files


# What no option takes; a text is one only where it is read from the command line
VALUES = {
    "a date": "2026-11-22",
    "a time": "07:32:00",
    "a date and time": "2026-11-22T07:32:00Z",
    "nan": "nan",
    "inf": "inf",
    "-inf": "-inf",
    "a list of tables": "[{}, {}]",
    "a list of lists": "[[[]]]",
    "a list of texts": '["a"]',
    "a huge list": f"[{'1,' * 10_000}]",
    "a list of a date": "[2026-11-22]",
    "a list of nan": "[nan]",
}
NUMBERS = {
    "-1": "-1",
    "2^63": str(2**63),
    "2^64": str(2**64),
    "10^400": str(10**400),
    "-10^400": str(-(10**400)),
    "1e999": "1e999",
    "-1e999": "-1e999",
    "0x": hex(2**70),
    "5,000 digits": "9" * 5000,
    "1.5": "1.5",
    "1e308": "1e308",
    "true": "true",
    "an empty text": '""',
    "a text": '"x"',
    "a text of a number": '"1"',
    "NUL": '"\\u0000"',
    "an escape code": '"\\u001b[2J"',
    "a long text": f'"{"x" * 100_000}"',
    "a table": "{a = 1}",
    "an empty list": "[]",
    "a list": "[1, 2]",
    "0": "0",
    "-0.0": "-0.0",
    "none": '"none"',
    "2^31": str(2**31),
}


def wrong_types() -> Iterator[Case]:
    for option in options(Config):
        for what, text in VALUES.items():
            ids = option.name == "eos_token_id" and what == "a huge list"
            yield case(
                f"{option.full_name} = {what}",
                f"[{option.section}]\n{option.name} = {text}",
                says=option.name,
                may_load=ids,
            )


def any_values() -> Iterator[Case]:
    """Some are right for some options."""
    for option in options(Config):
        for what, text in NUMBERS.items():
            yield case(f"{option.full_name} = {what}", f"[{option.section}]\n{option.name} = {text}", may_load=True)


def wrong_tables() -> Iterator[Case]:
    for section in Config.SECTIONS:
        for what, text in {
            "a number": "{} = 1",
            "a text": '{} = "x"',
            "a list": "{} = []",
            "a list of tables": "[[{}]]",
            "a date": "{} = 2026-11-22",
            "twice": "[{0}]\n[{0}]",
            "twice, dotted": "[{0}]\n[{0}.a]\n[{0}.a]",
            "nan": "{} = nan",
            "a list of many tables": "[[{0}]]\n" * 1000,
            "a table in it": "[{}.hello]\nx = 1",
            "nested": "[{}.a.b.c.d]",
            "a list in it": "[[{}.hello]]",
            "a table and a value": "{0} = 1\n[{0}]",
            "dotted and a table": "{0}.x = 1\n[{0}]",
            "unknown": "[{}]\nhello = 1",
            "unknown, quoted": '[{}]\n"" = 1',
            "in capitals": "[{0}]\nSteps = 1",
        }.items():
            yield case(f"{section}: {what}", text.format(section))
    for name in (
        "",
        "hello",
        "Training",
        "training ",
        " training",
        "trainin",
        "\\u0000",
        "\\u001b[2J",
        "a.b",
        "x" * 10_000,
    ):
        yield case(f"[{name[:20]}]", f'["{name}"]\nx = 1')
        yield case(f"{name[:20]} = 1", f'"{name}" = 1')
        yield case(f"training.{name[:20]} = 1", f'[training]\n"{name}" = 1')
    for text in (
        "training.steps = 1\ntraining.steps = 2",
        "steps = 1",
        "[training]\nsteps = 1\nsteps = 2",
        "[]",
        "[[]]",
        "[training",
        "[[training]",
        "= 1",
        "x =",
        "x = ]",
        "x = {",
        "x = [",
        '"',
        "'",
        '"""',
        "'''" + "x" * 1000,
        "[training]\nsteps = 1 2",
        "[training] steps = 1",
        "x = 01",
        "x = 1__0",
        "x = _1",
        "x = 1.",
        "x = .1",
        "x = 0b2",
        "x = 2026-13-45",
        "x = 25:00",
        'x = "\\x"',
        'x = "\\ud800"',
        'x = "\\uFFFFFFFF"',
        "x = {a=1,}",
        "x = {a=1\n}",
        "x = {a=1, a=2}",
        "a.b = 1\na.b.c = 2",
        "\\",
        "x = tru",
        "x = +inf2",
        "\t= 1",
    ):
        yield case(f"{text[:40]!r}", text)


def encodings() -> Iterator[Case]:
    for name, raw in {
        "a byte order mark": b"\xef\xbb\xbf" + GOOD.encode(),
        "UTF-16": GOOD.encode("utf-16"),
        "UTF-32": GOOD.encode("utf-32"),
        "Latin-1": GOOD.replace("\\u00e9", "é").encode("latin1"),
        "NUL first": b"\0" + GOOD.encode(),
        "NULs": bytes(1000),
        "NUL in a comment": b"# \0\n",
        "NUL in a text": b'[data]\nsource = "\0"',
        "FFs": b"\xff" * 100,
        "DEL": b"# \x7f",
        "an escape code in a comment": b"# \x1b[2J\n",
        "an escape code in a text": b'x = "\x1b[2J"',
        "CR alone": b"# a\rx = 1",
        "overlong": b"# \xc0\x80",
        "half a surrogate pair": b"# \xed\xa0\x80",
        "a form feed": b"\x0c[training]",
        "a no-break space": b"[training]\n\xc2\xa0steps = 1",
        "a key in full width": "ｓteps = 1".encode(),
        "an escape code as a key": b'[training]\n"\\u001b[2J" = 1',
        "a zero-width key": '[training]\n"\u200bsteps" = 1'.encode(),
        "right to left": '[training]\n"\u202esteps" = 1'.encode(),
    }.items():
        yield case(name, raw)


def deep() -> Iterator[Case]:
    for depth in (100, 1000, 10_000, 100_000):
        many = f"{depth:,} deep"
        yield case(f"lists, {many}", "x = " + "[" * depth + "]" * depth)
        yield case(f"lists, {many}, not closed", "x = " + "[" * depth)
        yield case(f"tables, {many}", "x = " + "{a = " * depth + "1" + "}" * depth)
        yield case(f"both, {many}", "x = " + "[{a = " * depth + "1" + "}]" * depth)
        yield case(f"a key, {many}", ".".join("a" * depth) + " = 1")
        yield case(f"a header, {many}", "[" + ".".join("a" * depth) + "]")
        yield case(f"in an option, {many}", "[model]\nrope_scaling = " + "{a = " * depth + "1" + "}" * depth)
        yield case(f"in a list option, {many}", "[model]\neos_token_id = " + "[" * depth + "]" * depth)


def large() -> Iterator[Case]:
    """Five megabytes and more of this or that."""
    for name, make in {
        "of spaces": lambda: " " * 5 * MIB,
        "of a comment": lambda: "#" + "x" * 5 * MIB,
        "of lines": lambda: "\n" * 5 * MIB,
        "of comments": lambda: "#\n" * (5 * MIB // 2),
        "of a text": lambda: f'[data]\nsource = "{"x" * 5 * MIB}"',
        "of a key": lambda: "x" * 5 * MIB + " = 1",
        "of digits": lambda: "x = " + "9" * 5 * MIB,
        "of a list": lambda: f"x = [{'1,' * (5 * MIB // 2)}]",
        "of keys": lambda: "".join(f"x{i} = 1\n" for i in range(500_000)),
        "of keys in a section": lambda: "[training]\n" + "".join(f"steps{i} = 1\n" for i in range(400_000)),
        "of tables": lambda: "".join(f"[x{i}]\n" for i in range(600_000)),
        "of lists of tables": lambda: "[[x]]\n" * 900_000,
        "of a dotted key": lambda: ".".join("a" * (5 * MIB // 2)) + " = 1",
        "of brackets": lambda: "[" * 5 * MIB,
        "of quotes": lambda: '"' * 5 * MIB,
        "of escapes": lambda: 'x = "' + "\\t" * (5 * MIB // 2) + '"',
        "of an inline table": lambda: "x = {" + ",".join(f"a{i} = 1" for i in range(400_000)) + "}",
        "of NULs": lambda: "\0" * 5 * MIB,
        "times twenty, of a comment": lambda: "#" + "x" * 100 * MIB,
    }.items():
        yield Case(
            f"5 MB {name}",
            bytes_at(NAME, partial(_encoded, make)),
            digest_of,
            may_load="spaces" in name or "comment" in name or "lines" in name or "text" in name,
        )
    for count in (100, 1000, 10_000):
        keys = "".join(f"stepz{i} = 1\n" for i in range(count))
        yield case(f"{count:,} unknown keys", f"[training]\n{keys}")
        yield case(f"{count:,} unknown sections", "".join(f"[trainin{i}]\nx = 1\n" for i in range(count)))


def _encoded(make: Callable[[], str]) -> bytes:
    return make().encode()


def contradictions() -> Iterator[Case]:
    for text in (
        "[training]\ncontext = 100000",
        "[model]\nhidden_size = 65",
        "[model]\nnum_attention_heads = 3",
        "[model]\nnum_key_value_heads = 3",
        "[model]\nvocab_size = 0",
        "[training]\nbudget = 'soon'",
        "[training]\nbudget = '-5m'",
        "[training]\nbudget = '99999999999999999999h'",
        "[training]\nbudget = '1e9s'",
        "[lr_schedule]\nwarmup_steps = 100000",
        "[lr_schedule]\nschedule = 'wsd'\ndecay_steps = 100000",
        "[model]\nrope_scaling = {}",
        "[model]\nrope_scaling = {rope_type = 'yarn'}",
        "[model]\nhead_dim = 3",
    ):
        yield case(repr(text), text)
    yield case("numbers of 4,000 digits", f"[model]\nhidden_size = {10**4000}\nnum_attention_heads = {10**4000 - 1}")


def changed_bytes() -> Iterator[Case]:
    for name, raw in flips(GOOD.encode(), 400, 6):
        yield case(name, raw, may_load=True)


def other_things() -> Iterator[Case]:
    for name, write, _ in not_files(NAME):
        yield Case(name, write, digest_of, may_load=name == "an empty file")
    for name, raw in {
        "JSON": b'{"training": {"steps": 1}}',
        "YAML": b"training:\n  steps: 1\n",
        "INI": b"[training]\nsteps: 1",
        "XML": b"<training/>",
        "Python": b"import os\n",
        "GGUF": b"GGUF" + bytes(100),
    }.items():
        yield case(name, raw)


def harmless() -> Iterator[Case]:
    default = to_toml(Config())
    yield case("everything, as it is", default, equals=default)
    yield case("nothing but a comment", "# hello", equals=default)
    yield case("CR LF", default.replace("\n", "\r\n"), equals=default)


FAMILIES: dict[str, Family] = {
    "cut short": cut_short,
    "wrong types": wrong_types,
    "any values": any_values,
    "wrong tables": wrong_tables,
    "encodings": encodings,
    "deep": deep,
    "large": large,
    "contradictions": contradictions,
    "changed bytes": changed_bytes,
    "other things": other_things,
    "harmless": harmless,
}
