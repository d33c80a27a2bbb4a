"""Adapters on the command line: `--adapter NAME=FOLDER`, and which model the adapter of a fine-tuning run is for.

An adapter is a folder as PEFT writes it, or a fine-tuning run (its newest checkpoint). Leaves out reading them:
models.py, entrenar/adapters.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entrenar.adapters.config import LoraConfig
from entrenar.adapters.files import CONFIG, find_adapter, read_adapter_config
from entrenar.cli.model_options import BASE, OFF, STORAGES
from entrenar.cli.parser import CommandLineError
from entrenar.formats import FormatError
from entrenar.formats.strict_json import read_object
from entrenar.llama.pretrained import INDEX
from entrenar.training.base import differences, identity_of
from entrenar.training.checkpoint import BEST, MODEL, NEWEST, STATE, STEP

NAMED = re.compile(r"([A-Za-z0-9_-]{1,64})=(.+)", re.DOTALL)


@dataclass(frozen=True)
class Given:
    """An adapter, and what it is called."""

    name: str
    folder: Path


@dataclass(frozen=True)
class Asked:
    """The adapters that are wanted beside the model, and which of them to use, one after the other (None: none)."""

    adapters: list[Given]
    turns: tuple[str | None, ...]


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and no model of its own."""
    return (folder / CONFIG).is_file() and not any((folder / name).is_file() for name in (MODEL, INDEX))


def given(words: Sequence[str], own: list[Given], find: Callable[[Path], Path]) -> Asked:
    """What the --adapter options say; `own`, of a fine-tuning run as the model, is there in any case.

    find   gives the folder behind a path
    Raises CommandLineError for a name that is taken, FormatError where there is no adapter.
    """
    adapters, turns = list(own), list[str | None]()
    for word in words:
        if word == OFF or word in {one.name for one in adapters}:
            turns.append(None if word == OFF else word)
            continue
        one = _one(word, {one.name for one in adapters}, find)
        adapters.append(one)
        turns.append(one.name)
    return Asked(adapters, tuple(turns or [one.name for one in own] or [None]))


def _one(word: str, taken: set[str], find: Callable[[Path], Path]) -> Given:
    match = None if Path(word).expanduser().exists() else NAMED.fullmatch(word)
    name, path = (match[1], Path(match[2]).expanduser()) if match else (None, Path(word).expanduser())
    if name in (OFF, BASE) or name in taken:
        why = "is taken" if name in taken else "stands for the model alone"
        raise CommandLineError(f"--adapter {word}: the name {name} {why}; give another")
    folder = find(path)
    if not is_adapter(folder):
        raise FormatError(f"{path}: is a whole model, not an adapter; give it as MODEL")
    return Given(name or _free(named_after(path), taken), find_adapter(folder))


def named_after(path: Path) -> str:
    """What an adapter is called that was given no name: after its folder; a checkpoint after its run."""
    path = path.absolute()
    if STEP.fullmatch(path.name) or path.name in (NEWEST, BEST):
        path = path.parent
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", path.name).strip("-")[:60]
    return name if name and name not in (OFF, BASE) else "adapter"


def _free(name: str, taken: set[str]) -> str:
    """The name, or the first of name-2, name-3, ... that is free."""
    return next(new for number in range(1, 1000) if (new := f"{name}-{number}" if number > 1 else name) not in taken)


def base_of(folder: Path, asked: str | None = None) -> Path:
    """The model an adapter is for: `asked`, or what its checkpoint says, or its configuration.

    Raises FormatError where that is not there.
    """
    if asked is not None:
        return Path(asked).expanduser()
    named = below(state_of(folder), "base", "folder")
    named = named if isinstance(named, str) and named else config_of(folder).base_model_name_or_path
    if not named:
        raise FormatError(f"{folder}: is an adapter, and does not say for which model; --base FOLDER says it")
    for place in (Path(os.path.expanduser(named)), folder / named):
        if place.is_dir():
            return place
    raise FormatError(
        f"{folder}: is an adapter for {named}, which is not there; where that model is, --base FOLDER says"
    )


def the_same(folder: Path, base: Path, warn: Callable[[str], None]) -> None:
    """Warn of a base whose weights are not those that a run's adapter was trained beside."""
    wanted = below(state_of(folder), "base", "identity")
    if not isinstance(wanted, dict):
        return
    if changed := differences(wanted, identity_of(base)):
        warn(
            f"{folder}: was trained beside other weights than those in {base} ({', '.join(changed[:3])}): the same "
            "model in another storage format does, another model writes nonsense"
        )


def held_as(folder: Path) -> dict[str, Any]:
    """How a fine-tuning run held its base's weights: `storage` and `double_quant` of from_pretrained."""
    base = below(state_of(folder), "config", "base")
    held = base.get("storage") if isinstance(base, dict) else None
    storage = "stored" if held == "auto" else held
    if storage not in STORAGES:
        return {}
    return {"storage": storage, "double_quant": base.get("double_quant") is not False}


def state_of(folder: Path) -> dict[str, Any]:
    """The state.json of a checkpoint; nothing where there is none."""
    return read_object(folder / STATE) if (folder / STATE).is_file() else {}


def config_of(folder: Path) -> LoraConfig:
    return read_adapter_config(find_adapter(folder))


def below(value: Any, *keys: str) -> Any:
    """What is at value[key][key]...; None where nothing is."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value
