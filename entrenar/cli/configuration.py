"""Options of the configuration on a command line: `--section.key VALUE`, for every verb that has them.

    entrenar train --config my.toml --training.steps 500 --data.source=notes

They are taken out of the words before argparse sees the rest: a value may then begin with a dash, and a misspelt name
comes to read_config, which tells every problem at once. `add_options` gives them to argparse nevertheless, for
completion.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from entrenar.cli.parser import CommandLineError

if TYPE_CHECKING:
    from entrenar.training.option import Option

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


def add_config(parser: argparse.ArgumentParser, verb: str = "train") -> None:
    """`--config FILE`, and the words of the help that stand for all the options, which `verb` lists."""
    parser.add_argument("--config", metavar="FILE", help="read options from a TOML file")
    parser.add_argument_group("configuration", WORDS.format(verb=verb))


WORDS = """--section.key VALUE   any option of the configuration; goes over the file
                      (entrenar {verb} --help-options lists them all)"""


def add_options(parser: argparse.ArgumentParser, verb: str) -> None:
    """Tell the parser the options of the configuration that a verb takes, for completion."""
    for option in options_of(verb):
        choices = ("true", "false") if option.kinds == (bool,) else option.limits.get("choices")
        parser.add_argument(f"--{option.full_name}", metavar="VALUE", choices=choices or None, help=option.help)


def options_of(verb: str) -> list[Option]:
    """The options a verb takes: of its own kind of run; `plan`, `profile`, `resume` take both, the last not all."""
    from entrenar.training import job
    from entrenar.training.config import KINDS, Config, options

    own = [kind for kind in KINDS if verb == kind.VERB] or [Config]
    kinds = KINDS if verb in ("plan", "profile", "resume") else own
    known = {option.full_name: option for kind in reversed(kinds) for option in options(kind)}
    return [option for name, option in known.items() if verb != "resume" or job.may_change(name)]


def option_names(verb: str) -> list[str]:
    """Every option of the configuration that a verb takes: "--training.steps"."""
    return [f"--{option.full_name}" for option in options_of(verb)]


def _is_unicode(word: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in word)
