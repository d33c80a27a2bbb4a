"""Which modules an adapter is for, by PEFT's rules: from a configuration to a list of layers and their settings."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from entrenar.adapters.config import ALL_LINEAR, TARGETS, LoraConfig
from entrenar.adapters.layers import (
    EMBEDDING_A,
    EMBEDDING_B,
    MAGNITUDE,
    A,
    Adapted,
    B,
    Settings,
)
from entrenar.adapters.patterns import Budget, Pattern
from entrenar.formats import short
from entrenar.llama import Llama
from entrenar.nn import Embedding, Linear, Module, RMSNorm

HEAD = "lm_head"
SHOWN = 10  # problems listed in one message
FIRST_NUMBER = re.compile(r".*?\.[^.]*\.(\d+)\.")  # of a name: the number of its layer


@dataclass(frozen=True)
class Plan:
    """Where an adapter goes: settings by the name of each adapted module, and the modules trained as a whole."""

    low_rank: dict[str, Settings]
    whole: list[str]


def plain_modules(model: Llama) -> dict[str, Module]:
    """Every module of the model by its name without adapters; in place of an adapted one, its base."""
    return {name: module.base_layer if isinstance(module, Adapted) else module for name, module in walk(model)}


def walk(module: Module, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """As `named_modules`, but an adapted module counts as one."""
    for name, child in module.children():
        yield prefix + name, child
        if not isinstance(child, Adapted):
            yield from walk(child, f"{prefix}{name}.")


def plan(model: Llama, config: LoraConfig, *, strict: bool = True) -> Plan:
    """Which modules `config` means.

    strict   refuse a name, a layer or a pattern that is for none of them. (PEFT's files may have some, written for
             several kinds of models; what their tensors must be is known all the same.)
    Raises ValueError with everything at once that matches nothing, or what cannot be adapted.
    """
    modules = plain_modules(model)
    config = resolved(model, config)
    budget = Budget()
    ranks = {Pattern(key, budget): value for key, value in config.rank_pattern.items()}
    alphas = {Pattern(key, budget): value for key, value in config.alpha_pattern.items()}
    low_rank, wrong = {}, []
    choose = _Chooser(config, budget)
    for name, module in modules.items():
        if not choose(name):
            continue
        if not isinstance(module, (Linear, Embedding)):
            wrong.append(f"{name} is a {type(module).__name__}: wanted a linear layer or an embedding")
            continue
        r, alpha = _first(ranks, name, config.r), _first(alphas, name, config.lora_alpha)
        low_rank[name] = Settings(int(r), config.scale(int(r), alpha), config.lora_dropout, config.use_dora)
    whole = [name for name in modules if any(name.endswith(end) for end in config.modules_to_save or ())]
    if strict or not low_rank:
        wrong += itertools.islice(_unmatched(model, config, modules), 10 * SHOWN)
    if strict:
        wrong += [f"rank_pattern: {short(p.text)} is for none of them" for p in ranks if not _used(p, low_rank)]
        wrong += [f"alpha_pattern: {short(p.text)} is for none of them" for p in alphas if not _used(p, low_rank)]
    wrong += _problems(config, modules, low_rank, whole)
    if wrong:
        more = [f"... and {len(wrong) - SHOWN:,} more"] if len(wrong) > SHOWN else []
        raise ValueError("\n  ".join(["LoraConfig does not fit this model:", *wrong[:SHOWN], *more]))
    return Plan(low_rank, whole)


def resolved(model: Llama, config: LoraConfig) -> LoraConfig:
    """The same configuration with its target_modules named: "all-linear" is the last part of their names."""
    targets = config.target_modules
    if targets is None:
        return dataclasses.replace(config, target_modules=sorted(TARGETS))
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        linear = {name.rpartition(".")[2] for name, m in plain_modules(model).items() if isinstance(m, Linear)}
        return dataclasses.replace(config, target_modules=sorted(linear - {HEAD}))
    return config


class _Chooser:
    """Whether a module is adapted, by its name."""

    def __init__(self, config: LoraConfig, budget: Budget) -> None:
        self.targets, self.excluded = _Names(config.target_modules, budget), _Names(config.exclude_modules, budget)
        self.whole = [f".{name}." for name in config.modules_to_save or ()]
        layers = config.layers_to_transform
        self.layers = layers if isinstance(layers, list) else None if layers is None else [layers]
        words = config.layers_pattern if isinstance(config.layers_pattern, list) else [config.layers_pattern or ""]
        self.numbers = [re.compile(rf"(?:^|.*?\.){word}\.(\d+)\.") for word in words if word] or [FIRST_NUMBER]

    def __call__(self, name: str) -> bool:
        if self.excluded(name) or any(whole in f".{name}." for whole in self.whole) or not self.targets(name):
            return False
        if not self.layers or self.targets.exactly(name):
            return True
        found = next((match for number in self.numbers if (match := number.match(name))), None)
        return found is not None and int(found[1]) in self.layers


class _Names:
    """A list of names, each of a whole module name or its end after a dot; or a regular expression for whole names."""

    def __init__(self, names: list[str] | str | None, budget: Budget) -> None:
        self.pattern = Pattern(names, budget) if isinstance(names, str) and names else None
        self.names = set(names) if isinstance(names, list) else set()

    def __call__(self, name: str) -> bool:
        if self.pattern is not None:
            return self.pattern.fullmatch(name)
        return not self.names.isdisjoint(_ends(name))

    def exactly(self, name: str) -> bool:
        return name in self.names or self.pattern is not None


def _ends(name: str) -> list[str]:
    """The name, and what follows each of its dots."""
    return [name, *(name[i + 1 :] for i, c in enumerate(name) if c == ".")]


def _first(table: dict[Pattern, Any], name: str, otherwise: Any) -> Any:
    return next((value for pattern, value in table.items() if pattern.matches_end(name)), otherwise)


def _used(pattern: Pattern, low_rank: dict[str, Settings]) -> bool:
    return any(pattern.matches_end(name) for name in low_rank)


def _unmatched(model: Llama, config: LoraConfig, modules: dict[str, Module]) -> Iterator[str]:
    """What of the configuration is for no module at all."""
    known = {end for name in modules for end in _ends(name)}
    for field in ("target_modules", "exclude_modules"):
        names = getattr(config, field)
        for end in names if isinstance(names, list) else ():
            if end not in known:
                yield f"{field}: {_unknown(end, model, modules)}"
    for end in config.modules_to_save or ():
        if not any(name.endswith(end) for name in modules):
            yield f"modules_to_save: {_unknown(end, model, modules)}"
    layers = config.layers_to_transform
    last = model.config.num_hidden_layers - 1
    for number in layers if isinstance(layers, list) else [] if layers is None else [layers]:
        if number > last:
            yield f"layers_to_transform: {number}: the model has layers 0 to {last}"


def _problems(config: LoraConfig, modules: dict[str, Module], low_rank: dict[str, Settings],
              whole: list[str]) -> Iterator[str]:  # fmt: skip
    for name in whole:
        if not isinstance(modules[name], (Linear, Embedding, RMSNorm)):
            yield f"modules_to_save: {name} is a {type(modules[name]).__name__}: name the layers inside it"
    if not low_rank and not whole:
        yield f"target_modules = {short(config.target_modules)}: nothing is left to adapt"
    elif not low_rank:
        yield f"target_modules = {short(config.target_modules)}: matches no module that may be adapted"


def _unknown(end: str, model: Llama, modules: dict[str, Module]) -> str:
    if end == HEAD and model.config.tie_word_embeddings:
        return (
            f"{HEAD} is the embedding's own matrix here (tie_word_embeddings); adapt embed_tokens, or untie the model"
        )
    known = {name.rpartition(".")[2] for name in modules if not name.rpartition(".")[2].isdigit()}
    near = difflib.get_close_matches(end, sorted(known), cutoff=0.4) or sorted(known)
    return f"no module is called {short(end)}; near: {', '.join(near)}"


def shapes(model: Llama, planned: Plan) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of the adapter, by PEFT's name for it without the prefix."""
    modules = plain_modules(model)
    made: dict[str, tuple[int, ...]] = {}
    for name, settings in planned.low_rank.items():
        weight: Any = modules[name].weight  # type: ignore[attr-defined]
        rows, columns = weight.shape
        if isinstance(modules[name], Embedding):
            made |= {f"{name}.{EMBEDDING_A}": (settings.r, rows), f"{name}.{EMBEDDING_B}": (columns, settings.r)}
        else:
            made |= {f"{name}.{A}": (settings.r, columns), f"{name}.{B}": (rows, settings.r)}
        if settings.dora:
            made[f"{name}.{MAGNITUDE}"] = (columns if isinstance(modules[name], Embedding) else rows,)
    for name in planned.whole:
        for key in ("weight", "bias"):
            if (tensor := getattr(modules[name], key, None)) is not None:
                made[f"{name}.{key}"] = tensor.shape
    return made
