"""The command `entrenar`: finds the verb, runs it, and turns whatever goes wrong into one line and an exit code.

A verb is a file of this folder with NAME, HELP, EXAMPLE, add_arguments(parser) and run(args) -> exit code; it raises
what goes wrong. Only the verb that runs is imported. Exit codes:

    0    done
    1    failed on the way: disk, memory, a loss that is no number; or a defect of entrenar
    2    the command line, the configuration or an input file cannot be used
    130  Ctrl-C; 143 SIGTERM, 129 SIGHUP (a training run has saved itself before)
    141  whoever read the output went away

ENTRENAR_TRACEBACK=1 shows where an error was raised.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

VERBS = {
    "train": "entrenar.cli.train",
    "finetune": "entrenar.cli.finetune",
    "resume": "entrenar.cli.resume",
    "plan": "entrenar.cli.plan",
    "profile": "entrenar.cli.profile",
    "generate": "entrenar.cli.generate",
    "chat": "entrenar.cli.chat",
    "eval": "entrenar.cli.evaluate",
    "data": "entrenar.cli.data",
    "inspect": "entrenar.cli.inspect",
    "merge": "entrenar.cli.merge",
    "quantize": "entrenar.cli.quantize",
    "export": "entrenar.cli.export",
    "doctor": "entrenar.cli.doctor",
    "completion": "entrenar.cli.completion",
}
CONFIGURED = ("train", "finetune", "resume", "plan", "profile", "data")  # those that take --section.key VALUE

DONE, FAILED, UNUSABLE, INTERRUPTED, READER_GONE = 0, 1, 2, 130, 141

HELP = """usage: entrenar COMMAND [OPTIONS]     LLaMA-family models on ordinary CPUs

{verbs}

entrenar COMMAND --help has options and an example; entrenar --version which one
examples:
  entrenar train --data.source book.txt --budget 20m
  entrenar finetune --base.model Llama-3.2-1B --data.source chats.jsonl
Exit codes: 0 done; 1 failed on the way; 2 unusable command, option or file; 130
Ctrl-C, 143 SIGTERM (a run has saved); 141 a pipe's reader went away."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `entrenar` with these words (default: the command line's); returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a letter the terminal lacks must not end a run
            stream.reconfigure(errors="replace")
    name = words[0] if words and words[0] in VERBS else ""
    try:
        code = run(words)
        flush()
        return code
    except BrokenPipeError:
        silence()
        return READER_GONE
    except BaseException as error:
        return told(name, error)


def run(words: list[str]) -> int:
    """Find the verb and run it."""
    if not words or words[0] in ("-h", "--help", "help"):
        if words[1:] and words[0] == "help":
            return run([words[1], "--help"])
        print(overview(), file=sys.stdout if words else sys.stderr)
        return DONE if words else UNUSABLE
    if words[0] in ("--version", "-V"):
        from entrenar.version import __version__

        print(f"entrenar {__version__}")
        return DONE
    return run_verb(words[0], words[1:])


def run_verb(name: str, words: list[str]) -> int:
    from entrenar.cli.parser import CommandLineError, nearest, verb_parser

    if name not in VERBS:
        raise CommandLineError(f"{name}: no such command{nearest(name, VERBS)}; see entrenar --help")
    module = verb(name)
    parser = verb_parser(name, module)
    overrides: list[tuple[str, str]] = []
    known: Callable[[], list[str]] = list
    if name in CONFIGURED:
        from entrenar.cli.configuration import option_names, take_overrides

        overrides, words = take_overrides(words)
        known = functools.partial(option_names, name)
    try:
        args = parser.read(words, known)
    except SystemExit:  # argparse, after printing help
        return DONE
    args.overrides = [*overrides, *getattr(args, "overrides", [])]
    return module.run(args)


def verb(name: str) -> ModuleType:
    return importlib.import_module(VERBS[name])


def overview() -> str:
    """The help of the whole command, on one screen: of each verb's line what stands before a colon or semicolon."""
    import textwrap

    lines = [(name, textwrap.shorten(re.split(r"[:;] ", verb(name).HELP)[0], 65, placeholder=" ...")) for name in VERBS]
    return HELP.format(verbs="\n".join(f"  {name:<12} {line}" for name, line in lines))


# -- what goes wrong


def told(name: str, error: BaseException) -> int:
    """Say on stderr what went wrong with a verb, "" where there was none; returns the exit code that stands for it."""
    if os.environ.get("ENTRENAR_TRACEBACK", "0") not in ("", "0"):
        import traceback

        with contextlib.suppress(OSError):
            traceback.print_exception(error)
    code, message = explained(error)
    if code == INTERRUPTED and name in ("train", "finetune", "resume") and "no run yet" not in message:
        message += "; what the run saved before is whole"
    with contextlib.suppress(OSError, ValueError):  # nobody may be listening there either
        print(f"entrenar {name}: {message}" if name else f"entrenar: {message}", file=sys.stderr)
    try:
        flush()
    except OSError:
        silence()
    return code


def explained(error: BaseException) -> tuple[int, str]:
    """(exit code, message) of an error."""
    if isinstance(error, KeyboardInterrupt):
        return getattr(error, "code", INTERRUPTED), str(error) or "stopped"  # training says more: signals.py
    if isinstance(error, MemoryError):
        return FAILED, str(error) or "out of memory"
    if isinstance(error, loaded(UNUSABLES)):
        return UNUSABLE, str(error)
    if isinstance(error, OSError):
        place = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
        return FAILED, f"{place}{error.strerror or error}"
    if isinstance(error, loaded(FAILURES)):
        return FAILED, str(error)
    words = " ".join(str(error).split())
    return FAILED, (f"unexpected {type(error).__name__}: {words}: this is a defect of entrenar; "
                    "with ENTRENAR_TRACEBACK=1 it shows where")  # fmt: skip


UNUSABLES = (
    ("entrenar.cli.parser", "CommandLineError"),
    ("entrenar.training.option", "ConfigError"),
    ("entrenar.data", "CorpusError"),
    ("entrenar.data", "TokenizerError"),
    ("entrenar.data.chat", "TemplateError"),
    ("entrenar.training.checkpoint", "CheckpointError"),
    ("entrenar.formats", "FormatError"),
)
FAILURES = (("entrenar.training.trouble", "TrainingError"),)


def loaded(errors: Sequence[tuple[str, str]]) -> tuple[type[BaseException], ...]:
    """Those of the classes that can have been raised: a module that was never imported raised nothing."""
    modules = [(sys.modules.get(module), name) for module, name in errors]
    return tuple(getattr(module, name) for module, name in modules if hasattr(module, name))


def flush() -> None:
    """Write out what was printed, while an error can still be told."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()


def silence() -> None:
    """Nobody takes the output any more: let Python's own last flush, at its end, write to nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                try:
                    stream.flush()
                except OSError:
                    os.dup2(nowhere, stream.fileno())
    finally:
        os.close(nowhere)
