"""From a row to an example: its tokens, and which of them are trained.

    assistant     the answers: every turn of the assistant, with the token that ends it (the default)
    completion    the last answer only
    all           everything

Where the template marks the assistant's words by {% generation %}, these are trained, exactly. Otherwise a turn is
what the template writes for the conversation up to and with it beyond what it writes up to it, with the prompt for an
answer: both must be how the whole begins. A template that writes an earlier turn differently once others follow it
fails that test; then the answers are found by marks put around them. White space behind the token that ends an answer
is not trained: nobody waits for it.

The whole text is tokenized at once, as it will be when the model is used, and special tokens in it are special tokens
(transformers with add_special_tokens=False). A token is trained if any of its characters is, as transformers does
it. A text, or a prompt and its completion, gets the token a text begins with, and the end token, unless they are
spelled in it. The first token of an example is never trained: nothing goes before it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from entrenar.data.chat.rows import BadRow, ChatRow, PromptRow, Row
from entrenar.data.chat.template import ChatTemplate, TemplateError
from entrenar.data.tokenizer import Tokenizer
from entrenar.data.tokenizer_protocol import Spans

TRAIN_ON = ("assistant", "completion", "all")
OPEN, CLOSE = "\U000f5a01", "\U000f5a02"  # marks, of an area where no characters are

Characters = list[tuple[int, int]]  # start .. end


class Example(NamedTuple):
    """Tokens, ids (n,) int32, and which of them the model is trained to say, trained (n,) bool."""

    ids: np.ndarray
    trained: np.ndarray


class Marked(NamedTuple):
    """A row as text: the characters that are trained, and whether it is text as such, to be given its ends."""

    text: str
    trained: Characters
    bare: bool


def marked(row: Row, template: ChatTemplate, special: re.Pattern[str], train_on: str = "assistant") -> Marked:
    """The row as text. Raises BadRow where the template fails, or hides where the answers are."""
    if isinstance(row, ChatRow):
        try:
            return Marked(*_chat(row, template, special, train_on), bare=False)
        except TemplateError as error:
            raise BadRow(f"cannot be written by the chat template: {error}") from None
    if isinstance(row, PromptRow):
        text = row.prompt + row.completion
        return Marked(text, [(0 if train_on == "all" else len(row.prompt), len(text))], bare=True)
    return Marked(row.text, [(0, len(row.text))], bare=True)


def example(row: Marked, spans: Spans, tokenizer: Tokenizer) -> Example:
    """The tokens of a marked row, `spans` being those of its text."""
    ids, trained = spans.ids.astype(np.int32), trained_tokens(row.trained, spans.spans)
    begin, end = tokenizer.begin_id, tokenizer.end_id
    if row.bare:
        if begin is not None and (len(ids) == 0 or ids[0] != begin):
            ids, trained = np.append(np.int32(begin), ids), np.append(False, trained)
        if ids[-1:] != [end] or (len(ids) == 1 and begin == end):
            ids, trained = np.append(ids, np.int32(end)), np.append(trained, True)
    trained[:1] = False
    return Example(ids, trained)


def trained_tokens(characters: Characters, spans: np.ndarray) -> np.ndarray:
    """(n,) bool: which tokens, characters spans (n, 2), have a character of these in them."""
    trained = np.zeros(len(spans), bool)
    for start, end in characters:
        trained |= (spans[:, 1] > start) & (spans[:, 0] < end)
    return trained


def special_pattern(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Finds a special token in a text."""
    texts = sorted(filter(None, tokenizer.special), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts)) or "(?!)")


# --- conversations ---------------------------------------------------------------------------------------


def _chat(row: ChatRow, template: ChatTemplate, special: re.Pattern[str], train_on: str) -> tuple[str, Characters]:
    """The conversation as text, and which characters of it are trained."""
    answers = [number for number, trained in enumerate(row.trained) if trained]
    if train_on == "completion" and answers:
        answers = answers[-1:]
        row = _first(row, answers[0] + 1)
    text, generated = _render(row, template)
    if train_on == "all":
        return text, [(0, len(text))]
    if not answers:
        return text, []
    if template.marks_turns(row.tools):
        return text, _generated(row, template, answers, generated)
    try:
        return text, _by_prefixes(row, template, answers, text, special)
    except TemplateError as error:
        found = _by_marks(row, template, answers, text, special)
        if found is None:
            raise TemplateError(
                f"{error}; nor do marks around its content lead to the answer. Train on the last answer only "
                "(train_on = completion), on all, or give a template with {% generation %} around what the "
                "assistant says"
            ) from None
        return text, found


def _first(row: ChatRow, count: int) -> ChatRow:
    """The conversation's first messages."""
    return ChatRow(row.messages[:count], row.trained[:count], row.tools, row.documents, row.variables, row.shape)


def _render(row: ChatRow, template: ChatTemplate, *, prompt: bool = False) -> tuple[str, Characters]:
    return template.render(row.messages, tools=row.tools, documents=row.documents,
                           add_generation_prompt=prompt, variables=row.variables)  # fmt: skip


def _generated(row: ChatRow, template: ChatTemplate, answers: Sequence[int], generated: Characters) -> Characters:
    """The {% generation %} blocks of these answers."""
    turns = [number for number, message in enumerate(row.messages) if message["role"] == "assistant"]
    if len(turns) == len(answers):
        return generated
    if len(turns) == len(generated):
        return [span for turn, span in zip(turns, generated, strict=True) if turn in answers]
    # a turn may have several blocks (a call, an answer), or none
    before = [len(_render(_first(row, turn), template)[1]) if turn else 0 for turn in turns]
    blocks = zip(turns, before, [*before[1:], len(generated)], strict=True)
    return [span for turn, a, b in blocks if turn in answers for span in generated[a:b]]


def _by_prefixes(row: ChatRow, template: ChatTemplate, answers: Sequence[int], text: str,
                 special: re.Pattern[str]) -> Characters:  # fmt: skip
    found = []
    for turn in answers:
        before = _render(_first(row, turn), template, prompt=True)[0]
        until = text if turn + 1 == len(row.messages) else _render(_first(row, turn + 1), template)[0]
        if not until.startswith(before) or not text.startswith(until):
            raise TemplateError(
                f"{template.origin}: where the answer messages[{turn}] stands cannot be told: the template writes "
                "what goes before it in another way when it is there, or when others follow it"
            )
        found.append((len(before), _to_end(text, len(before), len(until), special)))
    return found


def _to_end(text: str, start: int, end: int, special: re.Pattern[str]) -> int:
    """The end of an answer: behind its last special token, if only white space follows."""
    ends = [found.end() for found in special.finditer(text, start, end)]
    return ends[-1] if ends and not text[ends[-1] : end].strip() else end


def _by_marks(row: ChatRow, template: ChatTemplate, answers: Sequence[int], text: str,
              special: re.Pattern[str]) -> Characters | None:  # fmt: skip
    """The answers between marks, each with the special token behind it; None where the marks change the text."""
    messages = list(row.messages)
    for turn in answers:
        content = messages[turn].get("content") or ""
        inner = content.strip()
        if not inner or messages[turn].get("tool_calls") or OPEN in text or CLOSE in text:
            return None
        lead, trail = content[: content.index(inner)], content[content.index(inner) + len(inner) :]
        messages[turn] = {**messages[turn], "content": f"{lead}{OPEN}{inner}{CLOSE}{trail}"}
    with_marks = _render(ChatRow(messages, row.trained, row.tools, row.documents, row.variables), template)[0]
    if re.sub(f"[{OPEN}{CLOSE}]", "", with_marks) != text:
        return None
    if re.sub(f"[^{OPEN}{CLOSE}]", "", with_marks) != (OPEN + CLOSE) * len(answers):
        return None
    found, at = [], 0
    for piece in re.finditer(f"{OPEN}([^{CLOSE}]*){CLOSE}", with_marks):
        start = piece.start() - 2 * at
        end = start + len(piece[1])
        at += 1
        behind = re.compile(rf"\s*(?:{special.pattern})").match(text, end)
        found.append((start, behind.end() if behind else end))
    return found
