"""A conversation line by line: prompts, /commands, answers. At a terminal, and from a pipe.

At a terminal what cannot be done is said, and the conversation goes on; in a pipe it ends the program. Ctrl-C stops an
answer, which is kept as far as it came; Ctrl-D ends. The library readline, where Python has it, brings history (arrow
up) and completes commands (tab).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from entrenar.cli.chat import Shown, encodable, name_of, save
from entrenar.cli.conversation import Answer, ContextFull, Conversation, compared
from entrenar.cli.model_options import BASE, OFF
from entrenar.cli.parser import CommandLineError, nearest
from entrenar.cli.terminal import paint
from entrenar.data.chat import TemplateError
from entrenar.training.summary import visible

PROMPT = "> "
GO_ON = "/reset begins a new one, the system's text stays; /save FILE.jsonl keeps this one"


def talk(conversation: Conversation, args: argparse.Namespace) -> int:
    """Answer line after line, until there is none or /exit; returns 0."""
    return Talk(conversation, args).run()


class Talk:
    """The loop, and the commands: methods by their name in COMMANDS."""

    def __init__(self, conversation: Conversation, args: argparse.Namespace) -> None:
        self.conversation, self.args = conversation, args
        self.comparing: bool = args.compare
        self.over = False
        self.terminal = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
        self.piped = piped()

    def run(self) -> int:
        if self.terminal:
            self.say(self.introduction())
            self.complete()
        while not self.over:
            try:
                if (line := self.read()) is None:
                    break
                self.line(line)
            except (CommandLineError, TemplateError, OSError) as error:
                if not self.terminal:
                    raise
                way_out = f"; {GO_ON}" if isinstance(error, ContextFull) else ""
                print(f"{error}{way_out}", file=sys.stderr)
            except KeyboardInterrupt:
                if not self.terminal:
                    raise
                print()
                self.say("Ctrl-D or /exit ends the conversation")
        return 0

    def introduction(self) -> str:
        found = self.conversation.opened
        adapters = f", adapters {', '.join(found.tuned)}" if found.tuned else ""
        who = f"; {name_of(self.conversation.by)} answers" if found.tuned else ""
        return (
            f"{found.folder.resolve().name}{adapters}{who}; chat template: {self.conversation.template.origin}\n"
            "/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends"
        )

    def say(self, text: str) -> None:
        """What the program says, not the model: dim, and on stderr where the output is not for people."""
        print(paint(visible(text), "dim") if self.terminal else visible(text),
              file=sys.stdout if self.terminal else sys.stderr, flush=True)  # fmt: skip

    # -- lines

    def read(self) -> str | None:
        """What was typed or piped next, None at the end: a line, with the next where it ends with a backslash."""
        lines = []
        while (line := self.next_line()) is not None:
            lines.append(line.removesuffix("\\"))
            if not line.endswith("\\"):
                break
        return "\n".join(lines) if lines else None

    def next_line(self) -> str | None:
        if not self.terminal:
            return next(self.piped, None)
        try:
            return input(PROMPT)
        except EOFError:
            print()
            return None
        except UnicodeDecodeError:
            raise CommandLineError("what was typed is not UTF-8") from None

    def complete(self) -> None:
        """Let tab complete commands and adapters, where there is readline (importing it brings the history)."""
        try:
            import readline
        except ImportError:
            return
        words = [*COMMANDS, *(f"/adapter {name}" for name in (*self.conversation.opened.tuned, OFF))]

        def completer(text: str, state: int) -> str | None:
            return dict(enumerate(word for word in words if text.startswith("/") and word.startswith(text))).get(state)

        readline.set_completer(completer)
        readline.set_completer_delims("")
        readline.parse_and_bind("bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete")

    def line(self, line: str) -> None:
        """A prompt, or a command; // at the beginning is a prompt's slash."""
        if not encodable(line):
            raise CommandLineError("what was typed is not UTF-8")
        if line.startswith("/") and not line.startswith("//"):
            name, _, rest = line.partition(" ")
            if name not in COMMANDS:
                raise CommandLineError(
                    f"{name}: no such command{nearest(name, COMMANDS)}; /help lists them, // begins a prompt with /"
                )
            COMMANDS[name][0](self, rest.strip())
        elif line.strip():
            self.answer(line.removeprefix("/") if line.startswith("//") else line)

    def answer(self, prompt: str) -> None:
        """Answer as whose turn it is, and go on from there; when comparing, show the others' answers too."""
        talk = self.conversation
        messages = talk.with_prompt(prompt)
        turns = compared(talk) if self.comparing else [talk.by]
        answers = {by: talk.answer(messages, by) for by in turns}
        self.show(answers, prompt)
        kept = answers[talk.by if talk.by in answers else turns[-1]]
        if not kept.text and not kept.writing.ended:
            self.say("(stopped before anything was said; the question is forgotten)")
            return
        talk.keep(kept)
        if kept.writing.ended.startswith("the full context"):
            self.say(f"{kept.writing.ended} ended the answer; {GO_ON}")
        elif kept.writing.ended == "--max-tokens" and self.terminal:
            self.say(f"(cut after {kept.writing.tokens:,} tokens: --max-tokens)")

    def show(self, answers: Mapping[str | None, Answer], prompt: str) -> None:
        stopped = Shown(self.args).all(answers, prompt=prompt, beside={})
        if stopped and not self.terminal:
            raise KeyboardInterrupt  # nobody is there to go on

    # -- commands

    def help(self, rest: str) -> None:
        width = max(len(f"{name} {words}") for name, (_, words, _) in COMMANDS.items())
        lines = [f"{f'{name} {words}':<{width}}  {about}" for name, (_, words, about) in COMMANDS.items()]
        self.say("\n".join([*lines, "A line that ends with \\ goes on with the next; // begins a prompt with /."]))

    def reset(self, rest: str) -> None:
        self.conversation.reset()
        self.say("a new conversation" + (", with the same system text" if self.conversation.system else ""))

    def system(self, rest: str) -> None:
        before = self.conversation.system
        if not rest and before:
            self.say(f"the system's text is: {before} (/system {OFF} takes it away)")
        elif not rest:
            self.say("there is no system's text; /system TEXT gives one")
        else:
            self.conversation.system = "" if rest == OFF else rest
            self.say("the system's text is " + ("gone" if rest == OFF else "what you gave"))

    def adapter(self, rest: str) -> None:
        """Switch, or say what there is."""
        names = list(self.conversation.opened.tuned)
        if not rest:
            there = ", ".join(names) or "none; start with --adapter FOLDER"
            self.say(f"in use: {name_of(self.conversation.by)}; adapters: {there}")
            return
        if rest not in (*names, OFF, BASE):
            raise CommandLineError(f"/adapter {rest}: there is none of this name{nearest(rest, [*names, OFF])}; "
                                   f"wanted one of {', '.join([*names, OFF])}")  # fmt: skip
        self.conversation.by = None if rest in (OFF, BASE) else rest
        self.say("the model alone answers now" if rest in (OFF, BASE) else f"{rest} answers now")

    def compare(self, rest: str) -> None:
        """A prompt beside the conversation; or from now on every prompt, or none any more."""
        talk = self.conversation
        turns = compared(talk)
        if rest:
            messages = talk.with_prompt(rest)
            answers = {by: talk.answer(messages, by) for by in turns}
            self.show(answers, rest)
            return
        self.comparing = not self.comparing
        both = " and ".join(map(name_of, turns))
        self.say(f"{both} answer from now on, side by side" if self.comparing else f"{name_of(talk.by)} answers alone")

    def save(self, rest: str) -> None:
        if not rest:
            raise CommandLineError("/save FILE.jsonl: the file's name is missing")
        if not any(message["role"] == "assistant" for message in self.conversation.messages):
            raise CommandLineError("/save: nothing was said yet")
        path = Path(rest).expanduser()
        nbytes = save(path, self.conversation.messages)
        self.say(f"the conversation is a row of {path} now, which has {nbytes:,} bytes")

    def exit(self, rest: str) -> None:
        self.over = True


Command = tuple[Callable[[Talk, str], None], str, str]
COMMANDS: dict[str, Command] = {
    "/help": (Talk.help, "", "this list"),
    "/reset": (Talk.reset, "", "begin a new conversation"),
    "/system": (Talk.system, "TEXT", f"tell the model something before the conversation; {OFF}: nothing"),
    "/adapter": (Talk.adapter, f"NAME|{OFF}", f"who answers from here on; {OFF}: the model alone"),
    "/compare": (Talk.compare, "[TEXT]", "the model's own answer beside the adapter's: once, or on and off"),
    "/save": (Talk.save, "FILE.jsonl", "add this conversation to a file, as a row for entrenar finetune"),
    "/exit": (Talk.exit, "", "end, as Ctrl-D"),
}


def piped() -> Iterator[str]:
    """The lines of standard input. Raises CommandLineError for bytes that are no UTF-8."""
    if sys.stdin is None:
        raise CommandLineError("standard input is closed; give a prompt with --prompt TEXT")
    for number, raw in enumerate(sys.stdin.buffer, 1):
        try:
            yield raw.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise CommandLineError(f"standard input, line {number:,}: is not UTF-8: byte {error.start}") from None
