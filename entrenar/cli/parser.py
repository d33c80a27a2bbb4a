"""The parser of one verb: argparse, with help that fits a screen and errors that name the nearest thing there is.

Leaves out what the words mean: the verbs' own files, and configuration.py for `--section.key VALUE`.
"""

from __future__ import annotations

import argparse
import difflib
import re
import textwrap
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NoReturn

WIDTH = 80
KINDS = {"int": "a whole number", "float": "a number"}


class CommandLineError(ValueError):
    """The command line cannot be used; the message says which word, what was wanted, and where to look."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that abbreviates nothing and raises CommandLineError instead of ending the process."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("formatter_class", HelpFormatter)
        settings.setdefault("allow_abbrev", False)
        super().__init__(**settings)

    def read(self, words: Sequence[str], also: Callable[[], Iterable[str]] = tuple) -> argparse.Namespace:
        """The words as a Namespace. `also()`: further option names, for "did you mean"."""
        found, rest = self.parse_known_args(words)
        if not rest:
            return found
        unknown = next((word for word in rest if word.startswith("-") and word != "-"), None)
        if unknown is None:
            self.error(f"{rest[0]}: one word too many")
        name = unknown.partition("=")[0]
        self.error(f"{name}: no such option{nearest(name, [*option_names(self), *also()])}")

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ").replace("expected one argument", "a value is missing")
        message = message.replace("expected at least one argument", "a value is missing")
        message = re.sub(r"invalid (int|float) value: (.*)", lambda m: f"{m[2]}: wanted {KINDS[m[1]]}", message)
        raise CommandLineError(f"{message}; see {self.prog} --help")

    def print_help(self, file: Any = None) -> None:
        print(self.format_help(), end="", file=file)  # argparse's own hides a reader that went away

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            wanted = choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
            raise argparse.ArgumentError(action, f"{value}: wanted {wanted}{nearest(str(value), choices)}")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Help of 80 columns; descriptions and examples keep their lines."""

    def __init__(self, prog: str, **settings: Any) -> None:
        super().__init__(prog, **({"width": WIDTH, "max_help_position": 28} | settings))

    def add_argument(self, action: argparse.Action) -> None:
        if not getattr(action, "told_beside", False):
            super().add_argument(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        more = [super(HelpFormatter, self)._format_action_invocation(each) for each in getattr(action, "beside", ())]
        return ", ".join([super()._format_action_invocation(action), *more])

    def add_usage(self, usage: str | None, *rest: Any, **settings: Any) -> None:
        if usage is not None:
            whole = re.sub(r"\[[^\]]*\]", lambda found: found[0].replace(" ", "\0"), f"usage: {usage}")
            lines = textwrap.wrap(whole, WIDTH, subsequent_indent=" " * 7, break_on_hyphens=False)
            usage = "\n".join(lines).replace("\0", " ").removeprefix("usage: ")
        super().add_usage(usage, *rest, **settings)


def verb_parser(name: str, module: Any, make: Callable[..., Parser] = Parser) -> Parser:
    """The parser of a verb's module (NAME, HELP, EXAMPLE, add_arguments)."""
    parser = make(prog=f"entrenar {name}", description=module.HELP, epilog=examples(module.EXAMPLE))
    module.add_arguments(parser)
    return parser


def told_together(action: argparse.Action, *others: argparse.Action) -> None:
    """In the help, let the others stand on the first one's line; its own words are then for all."""
    action.beside = others  # type: ignore[attr-defined]
    for other in others:
        other.told_beside = True  # type: ignore[attr-defined]


def examples(lines: str) -> str:
    """The epilog that shows these command lines."""
    shown = [f"  {line.strip()}" for line in lines.strip().splitlines()]
    return "\n".join(["examples:" if len(shown) > 1 else "example:", *shown])


def leaves(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """The parsers below which there are no others: of `data` those of `show` and `prepare`."""
    below = [
        leaf
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
        for child in dict.fromkeys(action.choices.values())
        for leaf in leaves(child)
    ]
    return below or [parser]


def option_names(parser: argparse.ArgumentParser) -> list[str]:
    """Every option of a parser and of those below it: "--out", "-n"."""
    return [name for leaf in {parser, *leaves(parser)} for action in leaf._actions for name in action.option_strings]


def nearest(word: str, known: Collection[str]) -> str:
    """"; did you mean --budget?", or "" where nothing is near."""
    by_name = {name.rpartition(".")[2].lstrip("-"): name for name in known} | {name: name for name in known}
    asked = word.lstrip("-")
    found = by_name.get(asked) or next(iter(difflib.get_close_matches(word, by_name, 1, cutoff=0.6)), "")
    found = found or next(iter(difflib.get_close_matches(asked, by_name, 1, cutoff=0.6)), "")
    return f"; did you mean {by_name.get(found, found)}?" if found else ""
