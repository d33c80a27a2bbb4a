"""The jinja environment of chat templates: what transformers gives them, and bounds that it does not.

A chat template comes with a model, from strangers, and is a program. It runs in jinja's immutable sandbox: no
attributes that begin with an underscore, no change of what it is given, no files, no imports. To a template that does
what chat templates do this is transformers' environment to the letter: trimmed blocks, `break` and `continue`,
`{% generation %}`, a tojson that escapes nothing, raise_exception, strftime_now.

Bounds, beyond which it ends with an error: STEPS turns of loops and calls; SIZE, of what it writes and of any text or
list that it makes. They keep a mistake from hanging the machine or filling its memory; whoever is set on filling it
may still find a way.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

STEPS = 2_000_000  # turns of a loop; some two seconds
CALL = 10  # a call takes as long as so many
SIZE = 32 << 20  # characters
SOURCE = 1 << 20  # characters of a template; the longest in use have some 30,000
DIGITS = 10_000  # bits of a power


@dataclass
class Run:
    """One rendering: how far it is, and where `{% generation %}` blocks stand in what it wrote."""

    steps: int = 0
    written: int = 0
    generated: list[tuple[int, int]] = field(default_factory=list)

    def step(self, count: int = 1) -> None:
        self.steps += count
        if self.steps > STEPS:
            raise SecurityError(f"it takes more than {STEPS:,} steps: a loop without an end?")


_running: ContextVar[Run] = ContextVar("a chat template's run")


@functools.lru_cache(maxsize=32)
def compiled(source: str) -> jinja2.Template:
    """The template, ready to be run. Raises jinja's errors, and RecursionError."""
    if len(source) > SOURCE:
        raise SecurityError(f"it has {len(source):,} characters; a chat template has at most {SOURCE:,}")
    return _environment().from_string(source)


def run(template: jinja2.Template, variables: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
    """What the template writes, and where in it, start .. end, its `{% generation %}` blocks stand."""
    with _a_run() as run:
        parts = []
        for part in template.generate(**variables):
            run.written += len(part)
            if run.written > SIZE:
                raise SecurityError(f"it writes more than {SIZE:,} characters")
            parts.append(part)
        return "".join(parts), run.generated


@contextlib.contextmanager
def _a_run() -> Iterator[Run]:
    token = _running.set(run := Run())
    try:
        yield run
    finally:
        _running.reset(token)


def _environment() -> Environment:
    made = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
    made.filters["tojson"] = tojson
    made.filters = {name: _bounded(name, function) for name, function in made.filters.items()}
    made.filters |= {_COUNTED: _counted, _JOINED: _joined}
    made.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now,
                     "dict": TemplateDict(), "namespace": TemplateNamespace}  # fmt: skip
    return made


# --- what templates find there, as in transformers -------------------------------------------------------


class Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`: what the assistant says."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.CallBlock:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        block = nodes.CallBlock(self.call_method("_noted"), [], [], body)
        block.set_lineno(line)
        return block

    def _noted(self, caller: Callable[[], str]) -> str:
        text, run = caller(), _running.get()
        run.generated.append((run.written, run.written + len(text)))
        return text


def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None,
           sort_keys: bool = False) -> str:  # fmt: skip
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: Any) -> NoReturn:
    raise TemplateError(message)


def strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


class TemplateDict:
    """`dict` without what a class can do."""

    def __call__(self, *args: Any, **settings: Any) -> dict[Any, Any]:
        return dict(*args, **settings)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class TemplateNamespace(jinja2.utils.Namespace):
    """A namespace without names that begin with an underscore."""

    def __init__(*args: Any, **settings: Any) -> None:
        self, rest = args[0], args[1:]
        attributes = dict(*rest, **settings)
        for name in attributes:
            TemplateNamespace._check(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        TemplateNamespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace has no name that begins with an underscore: {name!r}")


# --- bounds ----------------------------------------------------------------------------------------------

_COUNTED, _JOINED = "entrenar counted", "entrenar joined"  # no template can spell names with a space


class Environment(ImmutableSandboxedEnvironment):
    """The sandbox, in which steps are counted and sizes looked at."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Watched().visit(super()._parse(source, name, filename))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        match operator:
            case "*":
                _check_size(_length(left) * _number(right) + _length(right) * _number(left))
            case "+":
                _check_size(_length(left) + _length(right))
            case "**":
                _check_size(_number(left).bit_length() * _number(right) if _number(left) > 1 else 0, DIGITS)
            case "%" if isinstance(left, str):
                _check_format(left)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **settings: Any) -> Any:  # noqa: N805 (jinja's names)
        _running.get().step(CALL)
        _check_numbers(args, settings)
        _check_method(__obj, args)
        return _small(super().call(__context, __obj, *args, **settings))


class _Watched(NodeTransformer):
    """Puts a counter into every loop, and a limit before every `~`."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filter(node.iter, _COUNTED)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), _JOINED)


def _filter(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


@jinja2.pass_context  # so that jinja does not work it out before the run
def _counted(context: Any, items: Iterable[Any]) -> Any:
    return _Counted(items)


class _Counted:
    """What a loop runs over: as long as that is, but every turn is counted."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        run = _running.get()
        for item in self.items:
            run.step()
            yield item

    def __len__(self) -> int:
        return len(self.items)


@jinja2.pass_context
def _joined(context: Any, parts: Sequence[Any]) -> str:
    texts = [str(part) for part in parts]
    _check_size(sum(map(len, texts)))
    return "".join(texts)


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def inner(*args: Any, **settings: Any) -> Any:
        _check_numbers(args, settings)
        given = [arg for arg in args if isinstance(arg, (str, list, tuple))]  # not what jinja puts before
        if len(given) > 1:
            _check_product(name, *given)
        return _small(function(*args, **settings))

    return inner


def _check_numbers(args: Sequence[Any], settings: dict[str, Any]) -> None:
    """No width, count or indentation that would make a text of any size."""
    for value in (*args, *settings.values()):
        if isinstance(value, int):
            _check_size(abs(value))


def _check_method(method: Any, args: Sequence[Any]) -> None:
    """Before `text.replace(...)` and other methods of a text that can make much of little."""
    method = getattr(method, "__wrapped__", method)  # the sandbox's own `format`
    owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
    if not isinstance(owner, str):
        return
    if name in ("format", "format_map"):
        _check_format(owner)
    elif name == "join" and args:
        _check_product(name, args[0], owner)
    elif name in ("replace", "translate", "expandtabs"):
        _check_product(name, owner, *args)


def _check_product(name: str, given: Any, *args: Any) -> None:
    """Before a replacement, or a joining, of `given`."""
    match name, args:
        case "replace", (str(old), str(new), *_) if isinstance(given, str):
            _check_size(given.count(old) * len(new))
        case "join", (str(between), *_):
            _check_size(len(between) * _length(given))
        case "translate", (dict(table),):
            _check_size(len(given) * max(map(_length, table.values()), default=0))
        case "expandtabs", (int(width),):
            _check_size(given.count("\t") * width)


def _check_format(text: str) -> None:
    """Before a format: widths are numbers in it ("%1000000000d"), or among the values ("%*d")."""
    if re.search(r"%[^%a-zA-Z]*(\*|\d{8})|\{[^{}]*\d{8}", text):
        raise SecurityError("it formats with a width that is not among its characters, or of more than 7 digits")


def _small(value: Any) -> Any:
    _check_size(_length(value))
    return value


def _check_size(size: int, limit: int = SIZE) -> None:
    if size > limit:
        raise SecurityError(f"it makes a text, list or number of size {size:,}; at most {limit:,} is allowed")


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (str, bytes, list, tuple, dict)) else 0


def _number(value: Any) -> int:
    return max(0, value) if isinstance(value, int) else 0
