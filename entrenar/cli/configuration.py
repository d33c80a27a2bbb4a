"""Options of the configuration on a command line: `--section.key VALUE`, for every verb that has them.

    entrenar train --config my.toml --training.steps 500 --data.source=notes

They are taken out of the words before argparse sees the rest: a value may then begin with a dash, and a misspelt name
comes to read_config, which tells every problem at once. `add_options` gives them to argparse nevertheless, for
completion.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection, Sequence
from typing import Any

from entrenar.cli.parser import CommandLineError

OPTION = re.compile(r"--[^=\s]*\.")  # the dot tells them from a verb's own options


def take_overrides(words: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """(overrides, the other words) of a command line, both in order; what follows a bare `--` is left alone.

    An override is ("section.key", "value"). Raises CommandLineError for a name without a value, and for bytes that
    are no UTF-8.
    """
    overrides, others, problems, rest = [], [], [], list(words)
    problems += [f"{word!r}: wanted UTF-8" for word in words if not _is_unicode(word)]
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if word == "--":
            others += [word, *rest]
            break
        if not OPTION.match(name):
            others.append(word)
        elif not equals and (not rest or rest[0].startswith("--")):
            hint = f" (one that begins with -- is written {word}=--...)" if rest else ""
            problems.append(f"{word}: a value is missing{hint}")
        else:
            overrides.append((name[2:], value if equals else rest.pop(0)))
    if problems:
        raise CommandLineError("; ".join(problems))
    return overrides, others


class Override(argparse.Action):
    """A short name of one option: `--out DIR` appends ("checkpointing.out", "DIR") to args.overrides.

    The option's name stands in `dest`; one that takes no value (nargs=0) says "true".
    """

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        value = "true" if self.nargs == 0 else values
        namespace.overrides = [*getattr(namespace, "overrides", []), (self.dest, value)]


def add_config(parser: argparse.ArgumentParser) -> None:
    """`--config FILE`, and the words of the help that stand for all the options."""
    parser.add_argument("--config", metavar="FILE", help="read options from a TOML file")
    parser.add_argument_group("configuration", WORDS)


WORDS = """--section.key VALUE   any option of the configuration; goes over the file
                      (entrenar train --help-options lists them all)"""


def add_options(parser: argparse.ArgumentParser, names: Collection[str] | None = None) -> None:
    """Tell the parser the configuration's options (all, or those in `names`), for completion."""
    from entrenar.training.config import options

    for option in options():
        if names is None or option.full_name in names:
            choices = ("true", "false") if option.kinds == (bool,) else option.limits.get("choices")
            parser.add_argument(f"--{option.full_name}", metavar="VALUE", choices=choices or None, help=option.help)


def option_names() -> list[str]:
    """Every option of the configuration: "--training.steps"."""
    from entrenar.training.config import options

    return [f"--{option.full_name}" for option in options()]


def _is_unicode(word: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in word)
