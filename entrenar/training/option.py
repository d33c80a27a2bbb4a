"""What an option is: a field of a dataclass, with its default, type, bounds and help; and sections of them.

TOML files, command lines, `--help` and error messages are all made from these fields (config.py). Which options there
are: options.py (`entrenar train`) and finetune_options.py.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
    choices: Sequence[str] = (),
) -> Any:
    """A dataclass field that is an option: low <= value <= high, above < value < below, one of `choices`."""
    bounds = {"low": low, "above": above, "high": high, "below": below, "choices": tuple(choices)}
    metadata = {"help": help} | bounds
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


class ConfigError(ValueError):
    """The configuration cannot be used; the message names every problem, its place, and what was wanted."""


@dataclass(frozen=True)
class Option:
    """One option: what `--help` shows and what a value must be."""

    section: str
    name: str
    type: Any
    default: Any
    limits: Mapping[str, Any]

    @property
    def full_name(self) -> str:
        return f"{self.section}.{self.name}"

    @property
    def kinds(self) -> tuple[type, ...]:
        """The Python types a value may have; NoneType among them where "none" is an answer."""
        parts = typing.get_args(self.type) if isinstance(self.type, types.UnionType) else (self.type,)
        kinds = tuple(typing.get_origin(part) or part for part in parts)
        return tuple(dict.fromkeys(kinds if self.default is not None else (*kinds, types.NoneType)))

    @property
    def help(self) -> str:
        return self.limits["help"]

    @property
    def items(self) -> type | None:
        """The type of what is in a list or a table; None where the option is neither, or holds anything."""
        parts = typing.get_args(self.type) if isinstance(self.type, types.UnionType) else (self.type,)
        inside = [args[-1] for part in parts if (args := typing.get_args(part)) and args[-1] in (int, float, str)]
        return inside[0] if inside else int if list in parts else None

    def wanted(self) -> str:
        """What a value must be, in words."""
        words = {
            int: "a whole number",
            float: "a number",
            bool: "true or false",
            str: "text",
            dict: {int: "a table of whole numbers", float: "a table of numbers", str: "a table of names"}.get(
                self.items or object, "a table"
            ),
            list: "a list of names" if self.items is str else "a list of whole numbers",
            types.NoneType: '"none"',
        }
        if choices := self.limits.get("choices"):
            return "one of " + ", ".join(choices)
        phrases = {"low": "at least", "above": "above", "high": "at most", "below": "below"}
        bounds = [f"{p} {self.limits[b]:g}" for b, p in phrases.items() if self.limits.get(b) is not None]
        return " or ".join(words[kind] for kind in self.kinds) + (
            " " + " and ".join(bounds) if bounds else ""
        )

    def check(self, value: Any) -> Any:
        """The value as this option's type. Raises ValueError where it is not one."""
        if types.NoneType in self.kinds and value in ("none", None):
            return None
        if float in self.kinds and type(value) is int:
            value = float(value) if abs(value) < 1 << 1000 else math.inf
        if type(value) not in self.kinds or (type(value) is float and not math.isfinite(value)):
            raise ValueError(self.wanted())
        get = self.limits.get
        if choices := get("choices"):
            fits = value in choices
        elif type(value) in (int, float):
            fits = (get("low") is None or value >= get("low")) and (
                get("above") is None or value > get("above")
            )
            fits = fits and (get("high") is None or value <= get("high"))
            fits = fits and (get("below") is None or value < get("below"))
        elif type(value) in (list, dict) and self.items is not None:
            inside = value.values() if isinstance(value, dict) else value
            fits = all(type(item) is self.items or (self.items is float and type(item) is int) for item in inside)
        else:
            fits = True
        if not fits:
            raise ValueError(self.wanted())
        return value

    def parse(self, text: str) -> Any:
        """The value of a command line's word. Raises ValueError where it is not this option's type."""
        if str in self.kinds:
            return self.check(text)
        if self.items is not None and text != "none" and not text.lstrip().startswith(("[", "{")):
            return self.check(self._listed([part.strip() for part in text.split(",") if part.strip()]))
        number = text.replace("_", "")
        for kind in (int, float):
            if kind in self.kinds and number == number.strip():
                try:
                    return self.check(kind(number))
                except ValueError:
                    pass
        try:
            return self.check(tomllib.loads(f"x = {text}")["x"])
        except tomllib.TOMLDecodeError:
            return self.check(text)

    def _listed(self, parts: Sequence[str]) -> list[Any] | dict[str, Any]:
        """`q_proj,v_proj` or `prompt=question,completion=answer`, as a list or table."""
        kind = self.items or str
        if list in self.kinds:
            return [_made(kind, part) for part in parts]
        pairs = [part.partition("=") for part in parts]
        if not all(equals for _, equals, _ in pairs):
            raise ValueError(f"{self.wanted()}, as name=value,name=value")
        return {name.strip(): _made(kind, value.strip()) for name, _, value in pairs}


def _made(kind: type, text: str) -> Any:
    """The number of a text; the text itself where it is none, for `check` to refuse."""
    try:
        return kind(text)
    except ValueError:
        return text


@dataclass(frozen=True)
class Places:
    """Where each value came from, in words: `at("training.steps")`.

    given   what a file or the command line has: "section.name" -> "run.toml line 3: [training] steps = 0"
    file    what goes before what has no place of its own: "run.toml: "
    """

    config: Sections
    given: Mapping[str, str]
    file: str = ""

    def __call__(self, name: str) -> str:
        section, _, key = name.partition(".")
        return self.given.get(name) or f"{self.file}{name} = {self.config.section(section)[key]} (the default)"


@dataclass
class Sections:
    """The options of one kind of run: a dataclass per section, the attribute of the section's name."""

    SECTIONS: ClassVar[Mapping[str, type]] = {}
    TITLES: ClassVar[Mapping[str, str]] = {}  # what `--help` says of a section, where that is not its docstring
    VERB: ClassVar[str] = ""  # `entrenar VERB` runs it

    @classmethod
    def declared(cls, section: str, one: dataclasses.Field) -> tuple[Any, Mapping[str, Any]]:
        """Default and limits of a section's field."""
        made = one.default_factory
        return (one.default if made is dataclasses.MISSING else made()), one.metadata

    def section(self, name: str) -> dict[str, Any]:
        """A section's options by name."""
        return dataclasses.asdict(getattr(self, name))

    def sections(self) -> dict[str, dict[str, Any]]:
        """All options by section and name, as in a TOML file."""
        return {name: self.section(name) for name in self.SECTIONS}

    def set(self, option: Option, value: Any) -> None:
        setattr(getattr(self, option.section), option.name, value)

    @property
    def settled(self) -> Any:
        """These options, where one waits for another: with that one's consequence."""
        return self

    def contradictions(self, at: Places) -> list[str]:
        """What each value allows, but not all of them together."""
        return []


def options(kind: type[Sections], section: str | None = None) -> list[Option]:
    """Every option of a kind of run, or those of one section, in order."""
    found = []
    for name in kind.SECTIONS if section is None else [section]:
        declaring = kind.SECTIONS[name]
        hints = typing.get_type_hints(declaring)
        for one in dataclasses.fields(declaring):
            default, limits = kind.declared(name, one)
            found.append(Option(name, one.name, hints[one.name], default, limits))
    return found
