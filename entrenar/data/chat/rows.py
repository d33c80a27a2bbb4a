"""Rows of fine-tuning data: what a line of JSONL says, whichever of the common shapes it has.

    {"messages": [{"role": ..., "content": ...}, ...], "tools": [...]}     a conversation
    {"conversations": [{"from": "human", "value": ...}, ...]}              the same (ShareGPT)
    {"prompt": ..., "completion": ...}                                     two texts, or two lists of messages
    {"instruction": ..., "input": ..., "output": ...}                      a question and its answer (Alpaca)
    {"text": ...}                                                          a text

Each row is looked at by itself; one with the keys of several shapes has the first of them. Keys beyond are left
alone; a value of null is as good as none. Strict: what cannot be meant is an error with the key, what came and what
was wanted. Leaves out files (sources.py) and what becomes of a conversation (rendering.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from entrenar.formats import FormatError, short
from entrenar.formats.strict_json import parse

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system",
            "tool": "tool", "observation": "tool"}  # fmt: skip
WANTED = 'wanted "messages", "conversations", "prompt" with "completion", "instruction" with "output", or "text"'


class BadRow(ValueError):
    """A row that cannot be used; the message says which key, what came and what was wanted."""


@dataclass(frozen=True)
class Keys:
    """What the keys are called, where they are not called as usual."""

    text: str = "text"
    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"


@dataclass(frozen=True)
class TextRow:
    """A text, all of which is trained."""

    text: str
    shape = "text"


@dataclass(frozen=True)
class PromptRow:
    """Two texts, of which the second is trained."""

    prompt: str
    completion: str
    shape = "prompt and completion"


@dataclass(frozen=True)
class ChatRow:
    """A conversation.

    messages    as the template gets them
    trained     of each whether it is an answer that may be trained: by the assistant, and not of weight 0
    variables   what the template may ask for beyond
    """

    messages: list[dict[str, Any]]
    trained: list[bool]
    tools: list[Any] | None = None
    documents: list[Any] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    shape: str = "messages"


Row = TextRow | PromptRow | ChatRow


def sniffed(value: Any, keys: Keys) -> Row:
    """The row that a JSON value is. Raises BadRow."""
    if not isinstance(value, dict):
        raise BadRow(f"is {kind(value)}, wanted an object; {WANTED}")
    row = {key: inner for key, inner in value.items() if inner is not None}
    if "chosen" in row or "rejected" in row:
        raise BadRow(
            'is a preference row ("chosen", "rejected"), and nothing here compares answers; to train on the good ones '
            'make them {"prompt": ..., "completion": the chosen answer}'
        )
    if keys.messages in row:
        return _conversation(row, keys.messages, "messages")
    if "conversations" in row:
        return _conversation(row, "conversations", "conversations")
    if keys.prompt in row or keys.completion in row:
        return _prompted(row, keys)
    if "instruction" in row or "output" in row:
        return _alpaca(row)
    if keys.text in row:
        return TextRow(_text(row, keys.text))
    found = ", ".join(json.dumps(key)[:40] for key in list(row)[:6])
    raise BadRow(f"has only the keys {found}; {WANTED}" if row else f"is empty; {WANTED}")


def kind(value: Any) -> str:
    """What a JSON value is, for people."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list"}
    return names.get(type(value), "an object" if isinstance(value, dict) else "null")


def _text(row: Mapping[str, Any], key: str, place: str = "") -> str:
    if key not in row:
        raise BadRow(f'has no "{place or key}"')
    if not isinstance(row[key], str):
        raise BadRow(f'has {kind(row[key])} as "{place or key}", wanted a text')
    return row[key]


def _prompted(row: Mapping[str, Any], keys: Keys) -> Row:
    for key, other in ((keys.prompt, keys.completion), (keys.completion, keys.prompt)):
        if key not in row:
            raise BadRow(f'has "{other}", but no "{key}"')
    prompt, completion = row[keys.prompt], row[keys.completion]
    if isinstance(prompt, str) and isinstance(completion, str):
        return PromptRow(prompt, completion)
    if isinstance(prompt, list) and isinstance(completion, list):
        before, after = _messages(prompt, keys.prompt), _messages(completion, keys.completion)
        trained = [False] * len(before[0]) + after[1]
        return ChatRow(before[0] + after[0], trained, *_beside(row), shape="prompt and completion of messages")
    raise BadRow(
        f'has {kind(prompt)} as "{keys.prompt}" and {kind(completion)} as "{keys.completion}", '
        "wanted two texts, or two lists of messages"
    )


def _alpaca(row: Mapping[str, Any]) -> ChatRow:
    if row.get("history"):
        raise BadRow('has a "history" beside "instruction"; write such a conversation as "messages"')
    question, answer = _text(row, "instruction"), _text(row, "output")
    more = _text(row, "input") if "input" in row else ""
    messages = [{"role": "system", "content": _text(row, "system")}] if row.get("system") else []
    messages.append({"role": "user", "content": f"{question}\n\n{more}" if more.strip() else question})
    messages.append({"role": "assistant", "content": answer})
    return ChatRow(messages, [False] * (len(messages) - 1) + [True], shape="instruction and output")


def _conversation(row: Mapping[str, Any], key: str, shape: str) -> ChatRow:
    if not isinstance(row[key], list):
        raise BadRow(f'has {kind(row[key])} as "{key}", wanted a list of messages')
    messages, trained = _messages(row[key], key)
    if isinstance(row.get("system"), str) and messages[0]["role"] != "system":
        messages, trained = [{"role": "system", "content": row["system"]}, *messages], [False, *trained]
    return ChatRow(messages, trained, *_beside(row), shape=shape)


def _beside(row: Mapping[str, Any]) -> tuple[list[Any] | None, list[Any] | None, dict[str, Any]]:
    """Tools, documents and variables for the template."""
    tools, variables = _list(row, "tools"), row.get("chat_template_kwargs", {})
    if not isinstance(variables, dict):
        raise BadRow(f'has {kind(variables)} as "chat_template_kwargs", wanted an object')
    return tools or None, _list(row, "documents"), variables


def _list(row: Mapping[str, Any], key: str) -> list[Any] | None:
    """A list of objects, or a text that is JSON of one."""
    value = _parsed(row[key], key, "a list of objects") if isinstance(row.get(key), str) else row.get(key)
    if value is not None and not (isinstance(value, list) and all(isinstance(one, dict) for one in value)):
        raise BadRow(f'has {kind(value)} as "{key}", wanted a list of objects')
    return value


# --- messages --------------------------------------------------------------------------------------------


def _messages(values: list[Any], key: str) -> tuple[list[dict[str, Any]], list[bool]]:
    """The messages, and which of them may be trained."""
    if not values:
        raise BadRow(f'has an empty list as "{key}", wanted messages')
    made = [_message(value, f"{key}[{number}]") for number, value in enumerate(values)]
    return [message for message, _ in made], [trained for _, trained in made]


def _message(value: Any, place: str) -> tuple[dict[str, Any], bool]:
    if not isinstance(value, dict):
        raise BadRow(f'has {kind(value)} as "{place}", wanted an object with "role" and "content"')
    message = {key: inner for key, inner in value.items() if inner is not None}
    if "role" not in message and "from" in message:
        message = _sharegpt(message, place)
    role = _text(message, "role", f"{place}.role")
    if role not in ROLES:
        raise BadRow(f'has {short(role)} as "{place}.role", wanted one of {", ".join(ROLES)}')
    weight = message.pop("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise BadRow(f'has {short(weight)} as "{place}.weight", wanted 0 or 1')
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(message["tool_calls"], f"{place}.tool_calls")
    if isinstance(message.get("content"), list):
        message["content"] = _joined(message["content"], f"{place}.content")
    if "content" in message or not (role == "assistant" and message.get("tool_calls")):
        _text(message, "content", f"{place}.content")
    return message, role == "assistant" and weight == 1


def _sharegpt(message: dict[str, Any], place: str) -> dict[str, Any]:
    speaker, text = _text(message, "from", f"{place}.from"), _text(message, "value", f"{place}.value")
    if speaker not in SPEAKERS:
        raise BadRow(f'has {short(speaker)} as "{place}.from", wanted one of {", ".join(SPEAKERS)}')
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    return {"role": SPEAKERS[speaker], "content": text, **rest}


def _joined(parts: list[Any], place: str) -> str:
    """OpenAI's content in parts: only those of text."""
    for number, part in enumerate(parts):
        if not isinstance(part, dict) or not isinstance(part.get("text"), str) or part.get("type", "text") != "text":
            what = f"of type {short(part['type'])}" if isinstance(part, dict) and "type" in part else kind(part)
            raise BadRow(f'has a part {what} as "{place}[{number}]", wanted {{"type": "text", "text": ...}}')
    return "".join(part["text"] for part in parts)


def _tool_calls(calls: Any, place: str) -> list[dict[str, Any]]:
    """The calls, their arguments as objects, which is what templates take."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise BadRow(f'has {kind(calls)} as "{place}", wanted a list of objects')
    made = []
    for number, call in enumerate(calls):
        inside = "function" in call
        function, where = (call["function"], f"{place}[{number}].function") if inside else (call, f"{place}[{number}]")
        if not isinstance(function, dict):
            raise BadRow(f'has {kind(function)} as "{where}", wanted an object with "name" and "arguments"')
        _text(function, "name", f"{where}.name")
        function = {**function, "arguments": _arguments(function.get("arguments"), f"{where}.arguments")}
        made.append({**call, "function": function} if inside else function)
    return made


def _arguments(value: Any, place: str) -> dict[str, Any]:
    """An object, or a text that is JSON of one; none where the call has none."""
    value = _parsed(value, place, "an object") if isinstance(value, str) and value.strip() else value or {}
    if not isinstance(value, dict):
        raise BadRow(f'has {kind(value)} as "{place}", wanted an object, or a text that is JSON of one')
    return value


def _parsed(text: str, place: str, wanted: str) -> Any:
    try:
        return parse(text, place)
    except FormatError as error:
        raise BadRow(f'has a text as "{place}" that is no JSON of {wanted}: {error}') from None
