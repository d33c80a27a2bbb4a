"""Reading and writing the configuration of a run: TOML files, overrides, and what is said about bad ones.

Which options there are, each kind of run declares (options.py, finetune_options.py): a subclass of `Sections`.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, overload

from entrenar.formats import FormatError, open_regular
from entrenar.training.finetune_options import FineTuning as FineTuning
from entrenar.training.option import ConfigError as ConfigError
from entrenar.training.option import Option as Option
from entrenar.training.option import Places, Sections
from entrenar.training.option import options as options
from entrenar.training.options import Config as Config

Run = Config | FineTuning  # a run's options
KINDS: tuple[type[Run], ...] = (Config, FineTuning)

LIMIT = 1_000_000  # bytes of a file; all options together have some 3,000
SHOWN = 20  # problems in one message
LONGEST = 100  # characters of a name or value in a message
DOTTED = re.compile(r"(?<![\w\"'-])(?:[\w\"'-]++\s*+\.\s*+){64}")  # tomllib takes their number squared in memory


@dataclass(frozen=True)
class Setting:
    """One `key = value` as it came, and where: "run.toml line 3", or "--training.steps"."""

    where: str
    section: str
    name: str
    value: Any
    is_text: bool = False  # from the command line: still to be parsed


S = TypeVar("S", bound=Run)


@overload
def read_config(file: str | Path | None = None, overrides: Iterable[tuple[str, str]] = ()) -> Config: ...
@overload
def read_config(file: str | Path | None, overrides: Iterable[tuple[str, str]], kind: type[S]) -> S: ...
def read_config(file: str | Path | None = None, overrides: Iterable[tuple[str, str]] = (),
                kind: Any = Config) -> Any:  # fmt: skip
    """The defaults of a `kind` of run, then the TOML file, then overrides ("section.key", "value"), checked together.

    Raises ConfigError with every problem found, not only the first.
    """
    problems: list[str] = []
    settings = _from_file(Path(file), kind, problems) if file is not None else []
    for name, value in overrides:
        section, _, key = name.partition(".") if "." in name else ("", "", name)
        settings.append(Setting(f"--{name} {value}", section, key, value, is_text=True))

    config, places, known = kind(), {}, {o.full_name: o for o in options(kind)}
    for s in settings:
        option = known.get(f"{s.section}.{s.name}")
        if option is None:
            way_out = f"; {_nearest(s, known, kind)}" if len(problems) < SHOWN else ""
            problems.append(f"{s.where}: no such option{way_out}")
            continue
        try:
            config.set(option, option.parse(s.value) if s.is_text else option.check(s.value))
            places[option.full_name] = s.where
        except ValueError as error:
            problems.append(f"{s.where}: wanted {error}")
    if not problems:
        at = Places(config, places, f"{file}: " if file is not None else "")
        problems = [_cut(problem, 10 * LONGEST) for problem in config.contradictions(at)]
    if problems:
        count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
        more = [f"... and {len(problems) - SHOWN:,} more"] if len(problems) > SHOWN else []
        raise ConfigError("\n  ".join([f"{count} with the configuration:", *problems[:SHOWN], *more]))
    return config


def kind_of(file: str | Path | None, overrides: Iterable[tuple[str, str]] = ()) -> type[Run]:
    """Whose options a file and overrides are: those of the first kind of run that has a section of theirs to itself.

    A file that cannot be read is of the first kind: `read_config` says what is wrong with it.
    """
    sections = {name.partition(".")[0] for name, _ in overrides}
    if file is not None:
        settings = _from_file(Path(file), Config, problems=[])
        sections |= {setting.section for setting in settings}
    return next((kind for kind in KINDS if sections & _own(kind)), Config)


def _own(kind: type[Sections]) -> set[str]:
    """The sections that no other kind of run has."""
    return set(kind.SECTIONS).difference(*(other.SECTIONS for other in KINDS if other is not kind))


def _from_file(path: Path, kind: type[Sections], problems: list[str]) -> list[Setting]:
    try:
        text = _text(path)
        content = tomllib.loads(text)
    except (FormatError, OSError) as error:
        problems.append(f"{path}: cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error))
        return []
    except tomllib.TOMLDecodeError as error:
        problems.append(f"{path}: not TOML: {_cut(str(error), 3 * LONGEST)}")
        return []
    except (ValueError, RecursionError) as error:
        what = "is nested too deeply" if isinstance(error, RecursionError) else "has a number of thousands of digits"
        problems.append(f"{path}: {what}")
        return []
    lines, settings = _line_numbers(text), []
    for section, values in content.items():
        if not isinstance(values, dict):
            settings.append(Setting(_place(path, lines, "", section, values), "", section, values))
            continue
        if section not in kind.SECTIONS and not values:
            line = lines.get((section, ""), "?")
            settings.append(Setting(f"{path} line {line}: [{_cut(section)}]", section, "", None))
        for name, value in values.items():
            settings.append(Setting(_place(path, lines, section, name, value), section, name, value))
    return settings


def _text(path: Path) -> str:
    """Raises FormatError for what is no text of a configuration's size, OSError where it cannot be read."""
    file, size = open_regular(path)
    with file:
        if size > LIMIT:
            raise FormatError(f"{path}: has {size:,} bytes; a configuration has at most {LIMIT:,}")
        raw = file.read(LIMIT)
    try:
        text = raw.decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = 1 + raw.count(b"\n", 0, error.start)
        raise FormatError(
            f"{path} line {line}: not TOML: byte {error.start} (0x{raw[error.start]:02x}) is not UTF-8"
        ) from None
    if found := DOTTED.search(text):
        line = 1 + text.count("\n", 0, found.start())
        raise FormatError(f"{path} line {line}: a name with more than 64 dots")
    return text


def _place(path: Path, lines: Mapping[tuple[str, str], int], section: str, name: str, value: Any) -> str:
    line = lines.get((section, name))
    at = f"{path} line {line}" if line else f"{path}"
    return f"{at}: [{_cut(section)}] {_cut(name)} = {_quoted(value)}".replace(": [] ", ": ", 1)


def _quoted(value: Any) -> str:
    """The value as a message has it."""
    try:
        return _cut(_toml(value))
    except (ValueError, RecursionError):  # of thousands of digits, or hundreds of brackets
        return "a value too long to be shown"


def _cut(text: str, longest: int = LONGEST) -> str:
    """Printable, whatever it is, and not too long."""
    text = text[: longest + 1]
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= longest else text[: longest - 3] + "..."


def _line_numbers(text: str) -> dict[tuple[str, str], int]:
    """(section, key) -> line, of `[section]` headers and `key =` below them: tomllib keeps no places."""
    found: dict[tuple[str, str], int] = {}
    section = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[\s*([\w.-]+)\s*\]", line):
            section = header[1]
            found.setdefault((section, ""), number)
        elif key := re.match(r"\s*[\"']?([\w.-]+)[\"']?\s*=", line):
            name = f"{section}.{key[1]}".lstrip(".")
            found.setdefault((section, key[1]), number)
            found.setdefault(tuple(name.split(".", 1)) if "." in name else ("", name), number)  # type: ignore[arg-type]
    return found


def _nearest(s: Setting, known: Mapping[str, Option], kind: type[Sections]) -> str:
    """A way out for an unknown name: its other section, the nearest name, or where to look."""
    for other in KINDS:
        if s.section in _own(other) and other is not kind:
            return f"that is an option of `entrenar {other.VERB}`"
    asked = f"{s.section}.{s.name}".strip(".")
    own = [o.name for o in known.values() if o.section == s.section]
    elsewhere = [o for o in known.values() if o.name == s.name]
    if elsewhere:
        return f"did you mean {elsewhere[0].full_name}?"
    if close := difflib.get_close_matches(s.name, own, 1, cutoff=0.6):
        return f"did you mean {s.section}.{close[0]}?"
    by_name = {o.name: o.full_name for o in known.values()}
    if s.section not in kind.SECTIONS and (close := difflib.get_close_matches(asked, known, 1, cutoff=0.6)):
        return f"did you mean {close[0]}?"
    if close := difflib.get_close_matches(s.name, by_name, 1, cutoff=0.75):
        return f"did you mean {by_name[close[0]]}?"
    if s.section not in kind.SECTIONS:
        close = difflib.get_close_matches(s.section or s.name, kind.SECTIONS, 1, cutoff=0.5)
        return f"did you mean [{close[0]}]?" if close else f"the sections are {', '.join(kind.SECTIONS)}"
    return f"[{s.section}] has {', '.join(own)}"


def to_toml(config: Sections) -> str:
    """The whole configuration as a TOML file that reads back as the same."""
    parts = []
    for section, values in config.sections().items():
        parts.append(
            "\n".join([f"[{section}]", *(f"{name} = {_toml(value)}" for name, value in values.items())])
        )
    return "\n\n".join(parts) + "\n"


def _toml(value: Any) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else str(value)


def help_text(kind: type[Sections] = Config, width: int = 100) -> str:
    """Every option with its default and its meaning, for `--help`."""
    import textwrap

    lines = []
    for section, declaring in kind.SECTIONS.items():
        lines += ["", f"[{section}]  {kind.TITLES.get(section, declaring.__doc__)}"]
        for o in options(kind, section):
            head = f"  --{o.full_name} "
            kinds = f"{o.wanted()}; " if o.limits.get("choices") else ""
            text = f"{o.help} ({kinds}default {_toml(o.default)})"
            lines += textwrap.wrap(text, width, initial_indent=head.ljust(40), subsequent_indent=" " * 40)
    return "\n".join(lines)
