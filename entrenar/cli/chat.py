"""`entrenar chat`: a conversation with a model, or the answers to a list of prompts; by it, an adapter, or both.

At a terminal it is a conversation with /commands (chat_terminal.py). Without one, every line of standard input is a
prompt of one conversation, and the answers are the output. `--prompt` and `--prompts` ask without any memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from entrenar.cli.generate import add_sampling, read_prompt, sampling
from entrenar.cli.model_options import BASE, add_model_options, opened
from entrenar.cli.parser import CommandLineError, told_together
from entrenar.cli.terminal import paint
from entrenar.cli.writing import BETWEEN, Page

if TYPE_CHECKING:
    from entrenar.cli.conversation import Answer, Conversation, Message

NAME = "chat"
HELP = "talk with a model: adapters on and off, base and tuned side by side"
EXAMPLE = """
entrenar chat Llama-3.2-1B --adapter runs/tuned --compare
"""
MAX_TOKENS = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "entrenar chat MODEL [options]"
    parser._actions[0].help = argparse.SUPPRESS  # -h, and two headings, would be more than a screen
    add = parser._optionals.add_argument
    add("model", metavar="MODEL", help="a run, checkpoint, adapter, or Hugging Face folder")
    add_model_options(add)
    add("--prompt", metavar="TEXT", help="ask this, and end; -: all of standard input")
    add("--prompts", metavar="FILE", help='JSONL with "prompt" or "messages": ask each')
    told_together(
        add("--compare", action="store_true", help="the model's own answers too; all as lines of JSON"),
        add("--json", action="store_true", help="answers as lines of JSON"),
    )
    add("--system", metavar="TEXT", default="", help="what the model is told before the conversation")
    add("--template", metavar="NAME", help="another chat template: its name, or a file")
    add_sampling(add, MAX_TOKENS)
    add("--seed", metavar="N", type=int, default=0, help="same seed, same answers (default 0)")
    add("--tokens-per-second", action="store_true", help="tell the speed on stderr")


def run(args: argparse.Namespace) -> int:
    """Talk; returns 0, or 130 after Ctrl-C. Raises CommandLineError before the model takes its time."""
    how = sampling(args)
    _check(args)
    prompt = None if args.prompt is None else read_prompt(args.prompt)
    asked = None if args.prompts is None else list(questions(Path(args.prompts).expanduser()))
    from entrenar.cli.conversation import Conversation, Manner, compared
    from entrenar.data.chat import load_template

    found = opened(args, NAME, writes=True)
    conversation = Conversation(found, load_template(found.tokenizer, args.template),
                                Manner(how, args.max_tokens, args.seed), by=found.turns[0])  # fmt: skip
    conversation.system = args.system
    if args.compare:
        compared(conversation)
    if prompt is not None:
        asked = [Question(prompt, conversation.with_prompt(prompt))]
    if asked is not None:
        return ask_all(conversation, asked, args)
    from entrenar.cli.chat_terminal import talk

    return talk(conversation, args)


def _check(args: argparse.Namespace) -> None:
    wrong = [
        f"{name} {value}: wanted at least {low}"
        for name, value, low in (("--max-tokens", args.max_tokens, 1), ("--seed", args.seed, 0))
        if value < low
    ]
    if args.prompt is not None and args.prompts is not None:
        wrong.append("--prompt and --prompts: one of them is wanted")
    if args.prompt is not None and not args.prompt.strip():
        wrong.append("--prompt: is empty; give some text")
    if not encodable(args.system):
        wrong.append("--system: is not UTF-8")
    if args.json and args.prompt is None and args.prompts is None and sys.stdin is not None and sys.stdin.isatty():
        wrong.append("--json: is for --prompt, --prompts or prompts from a pipe, not for a terminal")
    if wrong:
        raise CommandLineError("; ".join(wrong))


def encodable(text: str) -> bool:
    """Whether it is text: a terminal in another encoding than UTF-8, or a broken word, gives something else."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


@dataclass(frozen=True)
class Question:
    """A prompt, the messages that end with it, and what an answer should be where that is known."""

    prompt: str
    messages: list[Message]
    wanted: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)  # tools and such, for the template


def questions(path: Path) -> Iterator[Question]:
    """The rows of a JSONL file, each up to its last question.

    Raises CommandLineError where there is no such file, CorpusError for a row that asks nothing, with its line.
    """
    from entrenar.data import CorpusError
    from entrenar.data.chat.rows import BadRow
    from entrenar.formats import FormatError
    from entrenar.formats.strict_json import USUAL_VALUES, parse

    if not path.is_file():
        raise CommandLineError(f"--prompts {path}: there is no such file; wanted JSONL, a row for each prompt")
    count = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield question(parse(line.rstrip(), str(path), first_line=number, values=USUAL_VALUES))
            except BadRow as error:
                raise CorpusError(f"{path} line {number:,}: {error}") from None
            except FormatError as error:
                raise CorpusError(str(error)) from None
            count += 1
    if not count:
        raise CorpusError(f"{path}: holds no prompts; wanted a row for each")


def question(row: Any) -> Question:
    """A row of a file of prompts. Raises BadRow."""
    from entrenar.data.chat.rows import BadRow, ChatRow, Keys, sniffed

    if isinstance(row, dict) and isinstance(row.get("prompt"), str):
        wanted = row.get("completion")
        return Question(row["prompt"], [{"role": "user", "content": row["prompt"]}],
                        wanted if isinstance(wanted, str) else "")  # fmt: skip
    chat = sniffed(row, Keys())
    if not isinstance(chat, ChatRow):
        raise BadRow('asks nothing; wanted "prompt" or "messages"')
    last = max((i for i, message in enumerate(chat.messages) if message["role"] == "user"), default=None)
    if last is None:
        raise BadRow('has no message of the role "user"')
    following = chat.messages[last + 1 : last + 2]
    wanted = following[0].get("content", "") if following and following[0]["role"] == "assistant" else ""
    settings = {"tools": chat.tools, "documents": chat.documents, "variables": chat.variables}
    return Question(chat.messages[last]["content"], chat.messages[: last + 1], wanted, settings)


def ask_all(conversation: Conversation, asked: list[Question], args: argparse.Namespace) -> int:
    """Each question for itself, by everyone whose answer is wanted."""
    from entrenar.cli.conversation import compared

    turns = compared(conversation) if args.compare else list(conversation.opened.turns)
    shown = Shown(args)
    for number, one in enumerate(asked):
        messages = one.messages
        if conversation.system and messages[0]["role"] != "system":
            messages = [conversation.messages[0], *messages]
        if number and not args.json:
            shown.page.put("\n" if shown.page.terminal else BETWEEN)
        if shown.page.terminal:
            shown.page.put(paint(shown.page.readable(one.prompt), "dim") + "\n")
        answers = {by: conversation.answer(messages, by, **one.settings) for by in turns}
        if shown.all(answers, prompt=one.prompt, beside={"wanted": one.wanted} if one.wanted else {}):
            return 130
    return 0


class Shown:
    """How answers are shown: streamed, side by side, or as JSON."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.page = args, Page(sys.stdout)

    def all(self, answers: Mapping[str | None, Answer], *, prompt: str, beside: Mapping[str, str]) -> bool:
        """Show the answers to a prompt, one or several; whether Ctrl-C stopped them."""
        stopped = False
        try:
            if self.args.json:
                for answer in answers.values():
                    for _ in answer:
                        pass
            elif len(answers) == 1:
                self.one(*answers.values())
            else:
                self.several(answers)
        except KeyboardInterrupt:
            stopped = True
            self.page.end()
        if self.args.json and not stopped:
            texts = {name_of(by): answer.text.strip(" ") for by, answer in answers.items()}
            texts = texts if len(answers) > 1 else {"answer": texts.popitem()[1]}
            self.page.put(json.dumps({"prompt": prompt, **texts, **beside}, ensure_ascii=False) + "\n")
        for by, answer in answers.items():
            self.speed(answer, f"{name_of(by)}: " if len(answers) > 1 else "")
        return stopped

    def one(self, answer: Answer) -> None:
        """Stream it."""
        self.page.write_all(answer, at_once=False)
        self.page.put("\n")

    def several(self, answers: Mapping[str | None, Answer]) -> None:
        """In columns on a wide terminal, else one after the other."""
        from entrenar.cli.side_by_side import show, widths

        named = [(name_of(by), answer) for by, answer in answers.items()]
        width = widths(len(named), shutil.get_terminal_size().columns) if self.page.terminal else 0
        if width:
            readable = [(name, (self.page.readable(piece) for piece in answer)) for name, answer in named]
            show(readable, width, self.page.put)
            return
        for name, answer in named:
            self.page.put(paint(f"-- {name}", "bold") + "\n")
            self.one(answer)

    def speed(self, answer: Answer, who: str) -> None:
        if self.args.tokens_per_second and answer.writing.tokens:
            told = who + answer.writing.summary()
            print(paint(told, "dim") if sys.stderr.isatty() else told, file=sys.stderr)


def name_of(by: str | None) -> str:
    return by or BASE


def save(path: Path, messages: list[Message]) -> int:
    """Add the conversation as a row to a JSONL file, for `entrenar finetune`; returns how many bytes it has then."""
    from entrenar.files import write_file

    if path.exists() and not path.is_file():
        raise CommandLineError(f"{path}: is no file; give the name of one, as chats.jsonl")
    before = path.read_bytes() if path.exists() else b""
    row = json.dumps({"messages": messages}, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
    write_file(path, before + (b"\n" if before and not before.endswith(b"\n") else b"") + row)
    return os.path.getsize(path)
