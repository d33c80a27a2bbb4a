"""Chat templates: a conversation as the one text a model was trained to read, to the letter as transformers writes it.

A tokenizer's files may bring templates, by the rules of transformers: chat_template.jinja and the folder
additional_chat_templates/ go before `chat_template` in tokenizer_config.json, which is one text, or a list of
{"name", "template"}. Of several, the one called "tool_use" serves conversations with tools, "default" all others.

A model without one gets DEFAULT. It needs no special tokens but the end token, and is plain enough for any base model:

    User: What is 2 + 2?
    Assistant: 4</s>
    User: ...
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from entrenar.data.tokenizer import SETTINGS, Tokenizer, TokenizerError
from entrenar.data.tokenizer_files import TEMPLATES
from entrenar.formats import FormatError, open_regular, short
from entrenar.formats.strict_json import USUAL_VALUES, parse

FILE = "chat_template.jinja"
DEFAULT = """\
{{- bos_token }}
{%- if tools %}{{ 'Tools: ' ~ (tools | tojson) ~ '\\n\\n' }}{% endif %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {{- message['content'] ~ '\\n\\n' }}
    {%- else %}
        {{- message['role'] | capitalize ~ ':' }}
        {%- if message['content'] %}{{ ' ' ~ message['content'] }}{% endif %}
        {%- if message['tool_calls'] %}{{ ' ' ~ (message['tool_calls'] | tojson) }}{% endif %}
        {%- if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}
        {{- '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}
"""
OWN = "entrenar's own"  # the origin of DEFAULT
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
GENERATION = re.compile(r"\{\%-?\s*generation\s*-?\%\}")
REASONING = ("reasoning_content", "thinking", "reasoning")  # what templates and files call it


class TemplateError(TokenizerError):
    """A chat template cannot be used, or not for this conversation; the message says which, where and why."""


class Rendered(NamedTuple):
    """A conversation as text, and where in it, start .. end, the template says that the assistant speaks."""

    text: str
    generated: list[tuple[int, int]]


@dataclass(frozen=True)
class ChatTemplate:
    """The chat templates of a model.

    templates   their sources by name; one alone is called "default"
    special     what `bos_token` and so on are in them
    origin      which file they come from, for messages
    """

    templates: Mapping[str, str]
    special: Mapping[str, str] = field(default_factory=dict)
    origin: str = "chat template"

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Any = None,
        documents: Any = None,
        add_generation_prompt: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> Rendered:
        """The conversation as text. `variables`: what the template may ask for beyond (enable_thinking, ...).

        Raises TemplateError.
        """
        source = self.source(tools)
        given = {"messages": [_message(one) for one in messages], "tools": tools, "documents": documents,
                 "add_generation_prompt": add_generation_prompt}  # fmt: skip
        try:
            from entrenar.data.chat.sandbox import compiled, run

            return Rendered(*run(compiled(source), {**self.special, **(variables or {}), **given}))
        except Exception as error:  # a template is a program: it may fail in any way
            raise TemplateError(f"{self.origin}{_line(error)}: {_why(error)}") from None

    def source(self, tools: Any = None) -> str:
        """The template for a conversation with these tools."""
        if tools is not None and "tool_use" in self.templates:
            return self.templates["tool_use"]
        if "default" not in self.templates:
            raise TemplateError(
                f"{self.origin}: none of its chat templates is called 'default': choose one of "
                f"{', '.join(map(short, sorted(self.templates)))}"
            )
        return self.templates["default"]

    def marks_turns(self, tools: Any = None) -> bool:
        """Whether the template itself says, by {% generation %}, what the assistant speaks."""
        return GENERATION.search(self.source(tools)) is not None

    def check(self) -> ChatTemplate:
        """Itself, where all of its templates can be compiled. Raises TemplateError."""
        from entrenar.data.chat.sandbox import compiled

        for name, source in self.templates.items():
            try:
                compiled(source)
            except Exception as error:
                line = getattr(error, "lineno", None)
                which = f" ({name})" if len(self.templates) > 1 else ""
                raise TemplateError(
                    f"{self.origin}{which}{f' line {line}' if line else ''}: is no template: {_why(error)}"
                ) from None
        return self


def load_template(tokenizer: Tokenizer, choice: str | None = None) -> ChatTemplate:
    """The chat template of a tokenizer; where it has none, DEFAULT.

    choice   the name of one of its templates, a file with one, or a template itself
    Raises TemplateError; OSError where a file cannot be read.
    """
    special, found = special_texts(tokenizer), _from_files(tokenizer.files)
    if choice is None:
        return replace(found or ChatTemplate({"default": DEFAULT}, origin=OWN), special=special).check()
    if found is not None and choice in found.templates:
        return ChatTemplate({"default": found.templates[choice]}, special, f"{found.origin} ({choice})").check()
    if "{" in choice:
        return ChatTemplate({"default": choice}, special, "the chat template given").check()
    if not Path(choice).is_file():
        names = f"; this tokenizer's are called {', '.join(sorted(found.templates))}" if found else ""
        raise TemplateError(f"chat template {short(choice)}: there is no such file{names}")
    return ChatTemplate({"default": _read(Path(choice))}, special, choice).check()


def keep_template(tokenizer: Tokenizer, template: ChatTemplate) -> None:
    """Let the tokenizer's files have this template: whoever loads what `save` writes renders chats the same way."""
    for name in [name for name in tokenizer.files if name == FILE or name.startswith(f"{TEMPLATES}/")]:
        del tokenizer.files[name]
    for name, source in template.templates.items():
        tokenizer.files[FILE if name == "default" else f"{TEMPLATES}/{name}.jinja"] = source.encode()


def special_texts(tokenizer: Tokenizer) -> dict[str, str]:
    """bos_token, eos_token, ...: as transformers reads them from the files; else the tokenizer's own."""
    settings, special = (_object(tokenizer.files, name) for name in (SETTINGS, "special_tokens_map.json"))
    both = (special, settings) if "added_tokens_decoder" in settings else (settings, special)  # the latter wins
    texts = {name: text for values in both for name in NAMES if (text := _text(values.get(name))) is not None}
    spelled = {i: text for text, i in tokenizer.special.items()}
    own = {"eos_token": spelled.get(tokenizer.end_id)}
    if tokenizer.begin_id is not None:
        own["bos_token"] = spelled.get(tokenizer.begin_id)
    return {name: text for name, text in own.items() if text is not None} | texts


def _from_files(files: Mapping[str, bytes]) -> ChatTemplate | None:
    folder = f"{TEMPLATES}/"
    templates = {"default": _decoded(files[FILE], FILE)} if FILE in files else {}
    for name in files:
        if name.startswith(folder):
            templates[name.removeprefix(folder).removesuffix(".jinja")] = _decoded(files[name], name)
    if templates:
        return ChatTemplate(templates, origin=FILE if FILE in files else TEMPLATES)
    value = _object(files, SETTINGS).get("chat_template")
    return None if value is None else ChatTemplate(_named(value), origin=SETTINGS)


def _named(value: Any) -> dict[str, str]:
    """`chat_template` of a tokenizer_config.json: a text, or a list of {name, template}."""
    if isinstance(value, str):
        return {"default": value}
    right = isinstance(value, list) and value and all(
        isinstance(one, dict) and isinstance(one.get("name"), str) and isinstance(one.get("template"), str)
        for one in value
    )  # fmt: skip
    if not right:
        raise TemplateError(
            f"{SETTINGS}: chat_template = {short(value)}: wanted a text, or a list of "
            '{"name": a text, "template": a text}'
        )
    return {one["name"]: one["template"] for one in value}


def _object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    try:
        value = parse(files[name], name, values=USUAL_VALUES) if name in files else {}
    except FormatError as error:
        raise TemplateError(str(error)) from None
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str | None:
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _read(path: Path) -> str:
    try:
        file, _ = open_regular(path)
    except FormatError as error:
        raise TemplateError(str(error)) from None
    with file:
        return _decoded(file.read(8 << 20), str(path))


def _decoded(raw: bytes, name: str) -> str:
    try:
        return raw.decode().replace("\r\n", "\n").replace("\r", "\n")  # as files of text are read
    except UnicodeDecodeError as error:
        raise TemplateError(f"{name}: its byte {error.start} is not UTF-8; save the template as UTF-8") from None


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as transformers hands it on: without null, the reasoning under each name templates know."""
    kept = {key: value for key, value in message.items() if value is not None}
    reasoning = next((kept[key] for key in REASONING if key in kept), None)
    if reasoning is None:
        return kept
    return {"thinking": reasoning, **kept, "reasoning_content": reasoning}


def _line(error: BaseException) -> str:
    """ " line 12", where the traceback leads into the template."""
    found, trace = "", error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            found = f" line {trace.tb_lineno}"
        trace = trace.tb_next
    return found


def _why(error: BaseException) -> str:
    """The error in words: what raise_exception says as it is, other errors with their kind."""
    if isinstance(error, ImportError):
        return f"chat templates need jinja2: pip install jinja2 ({error})"
    if isinstance(error, RecursionError):
        return "it calls itself without an end, or is nested too deeply"
    if isinstance(error, MemoryError):
        return "it takes all the memory"
    text = str(error)[:500] or type(error).__name__
    text = text if text.isprintable() else repr(text)[1:-1]
    return _plain(text) if type(error).__module__ != "builtins" else f"it cannot be run: {_plain(text)}"


@functools.cache
def _pythons() -> re.Pattern[str]:
    return re.compile(r"^(?P<what>.*) object' has no attribute (?P<name>.*)$")


def _plain(text: str) -> str:
    """jinja's "'dict object' has no attribute 'content'", for people who write no Python."""
    found = _pythons().match(text)
    return f"something it reads has no {found['name']}" if found else text
