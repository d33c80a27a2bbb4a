"""`entrenar completion`: a script for the shell that completes verbs, options, choices and files.

The script is made by the library shtab from the real parsers, so that no list is kept by hand. Leaves out installing
it: docs/command.md says how.
"""

from __future__ import annotations

import argparse

NAME = "completion"
HELP = "print a script that completes this command in bash, zsh or fish"
EXAMPLE = """
entrenar completion bash > ~/.local/share/bash-completion/completions/entrenar
"""
SHELLS = ("bash", "zsh", "fish")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="which shell's")


def run(args: argparse.Namespace) -> int:
    import shtab

    print(shtab.complete(whole_parser(), args.shell))
    return 0


def whole_parser() -> argparse.ArgumentParser:
    """All verbs in one parser, with every option of the configuration where a verb takes them."""
    from entrenar import cli
    from entrenar.cli.configuration import add_options
    from entrenar.cli.parser import Parser, leaves, verb_parser

    parser = Parser(prog="entrenar", description="Trains LLaMA-family models on ordinary CPUs.")
    parser.add_argument("--version", action="store_true", help="which one this is")
    verbs = parser.add_subparsers(metavar="COMMAND")
    for name in cli.VERBS:
        module = cli.verb(name)
        below = verb_parser(name, module, lambda name=name, help=module.HELP, **settings: (
            verbs.add_parser(name, help=help, **settings)))  # fmt: skip
        for leaf in leaves(below):
            if name in cli.CONFIGURED:
                add_options(leaf, name)
            complete_files(leaf)
    return parser


def complete_files(parser: argparse.ArgumentParser) -> None:
    """Where an argument is neither a number nor one of a few words, offer the names of files."""
    import shtab

    for action in parser._actions:
        takes_word = action.nargs != 0 and action.choices is None and action.type in (None, str)
        if takes_word and not isinstance(action, argparse._SubParsersAction):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
