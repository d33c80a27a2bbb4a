"""What an adapter is: PEFT's LoraConfig, its names and its defaults, checked field by field.

`from_dict` reads an adapter_config.json. What entrenar does not do (biases, PiSSA, LoRA on single tokens, ...) is
accepted with the value that switches it off and refused by name with any other.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from entrenar.adapters.patterns import Pattern, PatternError
from entrenar.formats import FormatError, short

ALL_LINEAR = "all-linear"
TARGETS = ("q_proj", "v_proj")  # where nothing is said: PEFT's for LLaMA
RANK, ALPHA, ENTRIES, NAME = 1 << 16, 1e6, 2048, 200  # the most; of entries in a list, of characters in a name
CHARACTERS = 100_000  # of all patterns in a table
SHOWN = 20  # problems listed in one message

# Keys PEFT writes that are no fields here -> the values with which they change nothing; anything else is refused
# by name. A null changes nothing either; () stands for "whatever it is": how it was made, or for whom.
FOREIGN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "task_type": ("CAUSAL_LM",), "fan_in_fan_out": (False,), "lora_bias": (False,),
    "megatron_config": (None,), "trainable_token_indices": (None,), "loftq_config": ({},), "eva_config": (None,),
    "corda_config": (None,), "lora_ga_config": (None,), "velora_config": (None,), "alora_invocation_tokens": (None,),
    "use_qalora": (False,), "monteclora_config": (None,), "layer_replication": (None,), "target_parameters": (None,),
    "use_bdlora": (None,), "arrow_config": (None,), "kasa_config": (None,), "ensure_weight_tying": (False,),
}  # fmt: skip
ANY = ("auto_mapping", "inference_mode", "megatron_core", "peft_version", "qalora_group_size", "revision",
       "runtime_config")  # fmt: skip


@dataclass(frozen=True)
class LoraConfig:
    """W' = W + scale B A on the chosen layers of a frozen model.

    r, lora_alpha, use_rslora   the rank; scale = lora_alpha / r, or lora_alpha / sqrt(r)
    use_dora                    W' = m (W + scale B A) / ||W + scale B A||, row by row
    lora_dropout                probability, on the way into A, in training
    target_modules      names ("q_proj": every module whose name is that, or ends in a dot and that), or a regular
                        expression for whole names, or "all-linear": all but the head; None: q_proj and v_proj
    exclude_modules     names, or a regular expression: of those, none
    layers_to_transform number of a layer, or a list: of these layers alone; only with a list of names
    layers_pattern      what the list of layers is called ("layers"), where that is not clear
    rank_pattern, alpha_pattern   {name or regular expression for the end of a name: another r, or lora_alpha}
    modules_to_save     modules (by the end of their name) that are trained as a whole, a copy for each adapter
    init_lora_weights   True: A uniform, B zero; "gaussian": A from N(0, 1/r^2), B zero; False: both uniform
    bias                "none"
    base_model_name_or_path   what it is for, written into adapter_config.json

    Raises ValueError with every bad field at once: its name, what came, what was wanted.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    bias: str = "none"
    base_model_name_or_path: str | None = None

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, (set, frozenset)):
                value = sorted(value, key=str)
            object.__setattr__(self, name, list(value) if isinstance(value, tuple) else value)
        if wrong := list(self._problems()):
            raise _Impossible(wrong)

    def _problems(self) -> Iterator[str]:
        if not _is_rank(self.r):
            yield f"r = {short(self.r)}: wanted a whole number from 1 to {RANK:,}"
        if not _is_alpha(self.lora_alpha):
            yield f"lora_alpha = {short(self.lora_alpha)}: wanted a number above 0, at most {ALPHA:,.0f}"
        if not _is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            yield f"lora_dropout = {short(self.lora_dropout)}: wanted a probability, 0 <= p < 1"
        for name in ("use_rslora", "use_dora"):
            if not isinstance(getattr(self, name), bool):
                yield f"{name} = {short(getattr(self, name))}: wanted true or false"
        yield from _choice_problems("target_modules", self.target_modules, empty=False)
        yield from _choice_problems("exclude_modules", self.exclude_modules, empty=True)
        yield from self._layer_problems()
        for name, fits, wanted in (
            ("rank_pattern", _is_rank, f"a whole number from 1 to {RANK:,}"),
            ("alpha_pattern", _is_alpha, f"a number above 0, at most {ALPHA:,.0f}"),
        ):
            yield from _table_problems(name, getattr(self, name), fits, wanted)
        if self.modules_to_save is not None:
            if not _are_names(self.modules_to_save) or not self.modules_to_save:
                yield f"modules_to_save = {short(self.modules_to_save)}: wanted a list of names, or nothing"
        if not (isinstance(self.init_lora_weights, bool) or self.init_lora_weights == "gaussian"):
            yield (
                f"init_lora_weights = {short(self.init_lora_weights)}: wanted true, false or 'gaussian'; "
                "other kinds change the base, or need data"
            )
        if self.bias != "none":
            yield f"bias = {short(self.bias)}: wanted 'none': biases stay as they are"
        base = self.base_model_name_or_path
        if base is not None and not (isinstance(base, str) and len(base) <= 4096 and base.isprintable()):
            yield f"base_model_name_or_path = {short(base)}: wanted a name or path, or nothing"

    def _layer_problems(self) -> Iterator[str]:
        layers, pattern = self.layers_to_transform, self.layers_pattern
        listed = layers if isinstance(layers, list) else [] if layers is None else [layers]
        if len(listed) > ENTRIES or not all(_is_whole(i) and 0 <= i < 1 << 20 for i in listed):
            yield f"layers_to_transform = {short(layers)}: wanted the number of a layer, a list of them, or nothing"
        words = pattern if isinstance(pattern, list) else [] if pattern is None else [pattern]
        if not _are_names(words) or not all(word.isidentifier() for word in words if isinstance(word, str)):
            yield f"layers_pattern = {short(pattern)}: wanted a plain word like 'layers', a list of them, or nothing"
        for name, value in (("layers_to_transform", layers), ("layers_pattern", pattern)):
            if value is not None and isinstance(self.target_modules, str):
                targets = short(self.target_modules)
                yield f"{name} = {short(value)}: only with a list of target_modules, which is {targets}"
        if words and layers is None:
            yield f"layers_pattern = {short(pattern)}: means nothing without layers_to_transform"

    def scale(self, r: int, alpha: float) -> float:
        """What B A is multiplied by, for a layer of this rank and alpha."""
        return alpha / (math.sqrt(r) if self.use_rslora else r)

    def to_dict(self) -> dict[str, Any]:
        """The fields as PEFT's adapter_config.json has them, with the keys its loader asks for."""
        fixed = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "fan_in_fan_out": False, "inference_mode": True,
                 "lora_bias": False, "revision": None}  # fmt: skip
        return fixed | dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, where: str = "LoraConfig.from_dict") -> LoraConfig:
        """The configuration in an adapter_config.json, as PEFT wrote it, or `to_dict`.

        where   what messages call it: the file's name
        Raises FormatError with everything at once that is wrong, or that would make it another kind of adapter.
        """
        if not isinstance(values, Mapping):
            raise FormatError(f"{where}: holds {short(values)}, wanted an object: {{...}}")
        fields = {f.name: values[f.name] for f in dataclasses.fields(cls) if f.name in values}
        for name in ("rank_pattern", "alpha_pattern"):
            if fields.get(name, 0) is None:  # PEFT's Optional
                fields[name] = {}
        wrong = list(_foreign_problems(values, {f.name for f in dataclasses.fields(cls)}))
        try:
            config = cls(**fields)
        except _Impossible as error:
            wrong += error.problems
        if wrong:
            raise FormatError(f"{where}: {_listed(wrong)}")
        return config


class _Impossible(ValueError):
    """The fields that cannot be; `problems` one by one."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("LoraConfig: " + _listed(problems))
        self.problems = problems


def _listed(problems: list[str]) -> str:
    more = [f"and {len(problems) - SHOWN:,} more"] if len(problems) > SHOWN else []
    return "; ".join([*problems[:SHOWN], *more])


def _foreign_problems(values: Mapping[str, Any], known: set[str]) -> Iterator[str]:
    if "peft_type" not in values:
        yield "peft_type is missing: wanted 'LORA'"
    for key, value in values.items():
        if key in FOREIGN:
            usual = FOREIGN[key]
            if value is not None and not any(type(value) is type(u) and value == u for u in usual):
                yield f"{short(key)} = {short(value)}: wanted {short(usual[0])}, entrenar does nothing else"
        elif key not in known and key not in ANY and not _is_nothing(value):
            yield f"{short(key)} = {short(value)}: an unknown key, which may make it another adapter"


def _is_nothing(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, (list, dict)) and not value)


def _choice_problems(name: str, value: Any, *, empty: bool) -> Iterator[str]:
    """target_modules and exclude_modules: names, or a pattern."""
    if isinstance(value, str) and value:
        if value.lower() != ALL_LINEAR or name != "target_modules":
            yield from _pattern_problems(name, value)
    elif value is not None and not (_are_names(value) and (value or empty)):
        yield f"{name} = {short(value)}: wanted a list of names, a regular expression, or nothing"


def _table_problems(name: str, table: Any, fits: Any, wanted: str) -> Iterator[str]:
    if not isinstance(table, dict) or len(table) > ENTRIES or not all(isinstance(key, str) for key in table):
        yield f"{name} = {short(table)}: wanted a table of patterns"
        return
    if sum(map(len, table)) > CHARACTERS:
        yield f"{name}: patterns of more than {CHARACTERS:,} characters in all"
        return
    for key, value in table.items():
        if not fits(value):
            yield f"{name}: {short(key)} = {short(value)}: wanted {wanted}"
        yield from _pattern_problems(name, key)


def _pattern_problems(name: str, pattern: str) -> Iterator[str]:
    try:
        Pattern(pattern)
    except PatternError as error:
        yield f"{name}: {error}"


def _are_names(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= ENTRIES
        and all(isinstance(name, str) and 0 < len(name) <= NAME and name.isprintable() for name in value)
    )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_rank(value: Any) -> bool:
    return _is_whole(value) and 1 <= value <= RANK


def _is_alpha(value: Any) -> bool:
    return _is_number(value) and 0 < value <= ALPHA
