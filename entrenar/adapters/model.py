"""Adapters on a model: put there, switched, taken away, counted. The base is frozen and the same for all of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from entrenar import kernels, random
from entrenar.adapters.config import LoraConfig
from entrenar.adapters.layers import (
    EMBEDDING_A,
    EMBEDDING_B,
    MAGNITUDE,
    A,
    Adapted,
    B,
    LoRAEmbedding,
    LoRALinear,
    Settings,
    base_norm,
    base_squares,
)
from entrenar.adapters.matching import Plan, plain_modules, plan, resolved, shapes, walk
from entrenar.kernels.packed import Packed
from entrenar.llama import Llama
from entrenar.nn import Embedding, Linear
from entrenar.tensor import Tensor

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass
class Adapters:
    """What a model knows of its adapters, under the attribute `adapters`."""

    configs: dict[str, LoraConfig] = field(default_factory=dict)
    trainable: dict[str, bool] = field(default_factory=dict)
    active: str | None = None


@dataclass(frozen=True)
class Counts:
    """How many weights are trained, of how many in all."""

    trainable: int
    total: int

    @property
    def reduction(self) -> float:
        """By how many percent fewer are trained than in training all."""
        return 100 * (1 - self.trainable / self.total)

    def __str__(self) -> str:
        return f"{self.trainable:,} of {self.total:,} weights are trained, {self.reduction:.3f} % fewer"


def adapt(model: Llama, config: LoraConfig, name: str = "default") -> None:
    """Freeze the model, and put a new adapter beside its layers: the active one, and what `named_parameters` yields.

    Its weights are drawn from `entrenar.random`, in the order of the layers.
    Raises ValueError, and changes nothing, for a configuration that does not fit the model or a name that is taken.
    """
    planned = plan(model, config)
    check_name(model, name)
    values = first_values(model, config, planned)
    put(model, config, planned, values, name, trainable=True)


def put(model: Llama, config: LoraConfig, planned: Plan, values: Mapping[str, np.ndarray], name: str, *,
        trainable: bool) -> None:  # fmt: skip
    """Put an adapter with these values, by PEFT's names for them, beside the model's layers, and make it the active."""
    model.freeze()
    places = dict(walk(model))
    for path, settings in planned.low_rank.items():
        layer = _wrapped(model, path, places[path])
        layer.add(name, _below(values, path), settings)
    for path in planned.whole:
        _wrapped(model, path, places[path]).add_copy(name, _below(values, path))
    known = adapters(model)
    known.configs[name], known.trainable[name] = resolved(model, config), trainable
    use_adapter(model, name)


def use_adapter(model: Llama, name: str | None) -> None:
    """Make this adapter the active one; None: the base alone. Raises ValueError for one the model does not have."""
    known = adapters(model)
    if name is not None and name not in known.configs:
        raise ValueError(f"use_adapter: no adapter is called {name!r}; there are: {_listed(model)}")
    known.active = name
    for _, layer in adapted(model):
        layer.active = name
        for other in layer.names():
            for _, tensor in layer.tensors(other):
                tensor.requires_grad = other == name and known.trainable[other]
                tensor.grad = tensor.grad if tensor.requires_grad else None


def adapter_names(model: Llama) -> list[str]:
    """The model's adapters, in the order they came."""
    return list(adapters(model).configs)


def active_adapter(model: Llama) -> str | None:
    """The adapter in use; None: the base alone."""
    return adapters(model).active


def adapter_config(model: Llama, name: str = "default") -> LoraConfig:
    """What an adapter was made from, its target_modules named. Raises ValueError for one the model does not have."""
    known = adapters(model).configs
    if name not in known:
        raise ValueError(f"adapter_config: no adapter is called {name!r}; there are: {_listed(model)}")
    return known[name]


def remove_adapter(model: Llama, name: str) -> None:
    """Take an adapter away; layers that none is left for are the base's own again. The base stays frozen.

    Raises ValueError for one the model does not have.
    """
    adapter_config(model, name)
    known = adapters(model)
    if known.active == name:
        use_adapter(model, None)
    del known.configs[name], known.trainable[name]
    for path, layer in adapted(model):
        layer.remove(name)
        if not layer.names():
            _replace(model, path, layer.base_layer)


def adapters(model: Llama) -> Adapters:
    """What the model knows of its adapters."""
    return vars(model).setdefault("adapters", Adapters())


def adapted(model: Llama) -> list[tuple[str, Adapted]]:
    """(name, layer) of every layer that has adapters beside it."""
    return [(name, module) for name, module in walk(model) if isinstance(module, Adapted)]


def adapter_tensors(model: Llama, name: str = "default") -> dict[str, Tensor]:
    """An adapter's tensors by PEFT's names without their prefix: "model.layers.0.self_attn.q_proj.lora_A.weight"."""
    adapter_config(model, name)
    return {f"{path}.{key}": tensor for path, layer in adapted(model) for key, tensor in layer.tensors(name)}


def count(model: Llama) -> Counts:
    """Weights that are trained, and all: of the base, in whatever format, and of every adapter."""
    tensors = {id(tensor): tensor for _, tensor in model._named_tensors()}.values()
    packed = {id(matrix): matrix for _, matrix in model.named_packed()}.values()
    trained = sum(tensor.size for tensor in model.parameters())
    return Counts(trained, sum(tensor.size for tensor in tensors) + sum(matrix.size for matrix in packed))


def check_name(model: Llama, name: str) -> None:
    """Raise ValueError for a name that no new adapter can have."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(f"adapter {name!r}: wanted a name of 1 to 64 letters, digits, - and _")
    if name in adapters(model).configs:
        raise ValueError(f"adapter {name!r}: there is one of this name; remove_adapter() it, or give another name")


def compute_dtype(model: Llama) -> np.dtype[Any]:
    """The type the model computes in, which adapters have: that of its last norm, which is never packed."""
    norm: Any = plain_modules(model)["model.norm"]
    return norm.weight.dtype


def first_values(model: Llama, config: LoraConfig, planned: Plan) -> dict[str, np.ndarray]:
    """What a new adapter starts from: its update is zero, unless init_lora_weights is False."""
    modules, sizes, dtype = plain_modules(model), shapes(model, planned), compute_dtype(model)
    values: dict[str, np.ndarray] = {}
    for path, settings in planned.low_rank.items():
        embedding = isinstance(modules[path], Embedding)
        names = (EMBEDDING_A, EMBEDDING_B) if embedding else (A, B)
        a_shape, b_shape = (sizes[f"{path}.{key}"] for key in names)
        draw = _first_of_embedding if embedding else _first_of_linear
        a, b = (x.astype(dtype, copy=False) for x in draw(a_shape, b_shape, config.init_lora_weights))
        values |= {f"{path}.{names[0]}": a, f"{path}.{names[1]}": b}
        if settings.dora:
            values[f"{path}.{MAGNITUDE}"] = _first_magnitude(modules[path], a, b, settings).astype(dtype)
    for key in sizes.keys() - values.keys():
        values[key] = _copy_of(modules[key.rpartition(".")[0]], key.rpartition(".")[2], dtype)
    return values


# PEFT's distributions: of a linear layer torch's default for both, B replaced by zeros; of an embedding normal ones


def _first_of_linear(a: tuple[int, ...], b: tuple[int, ...], kind: bool | str) -> tuple[np.ndarray, np.ndarray]:
    r, inputs = a
    rng = random.generator()
    if kind == "gaussian":
        return rng.standard_normal(a, np.float32) * np.float32(1 / r), np.zeros(b, np.float32)
    first = _uniform(a, inputs**-0.5)
    return first, np.zeros(b, np.float32) if kind else _uniform(b, r**-0.5)


def _first_of_embedding(a: tuple[int, ...], b: tuple[int, ...], kind: bool | str) -> tuple[np.ndarray, np.ndarray]:
    rng = random.generator()
    first = np.zeros(a, np.float32) if kind else rng.standard_normal(a, np.float32)
    return first, rng.standard_normal(b, np.float32)


def _uniform(shape: tuple[int, ...], bound: float) -> np.ndarray:
    """U(-bound, bound); torch's kaiming_uniform with a = sqrt 5 has bound = 1 / sqrt(inputs)."""
    return (random.generator().random(shape, np.float32) * 2 - 1) * np.float32(bound)


def _first_magnitude(module: Any, a: np.ndarray, b: np.ndarray, settings: Settings) -> np.ndarray:
    return base_norm(module, base_squares(module), a, b, settings.scale)


def _copy_of(module: Any, key: str, dtype: Any) -> np.ndarray:
    tensor = getattr(module, key)
    return kernels.unpack(tensor).astype(dtype, copy=False) if isinstance(tensor, Packed) else tensor.data.astype(dtype)


# The tree


def _below(values: Mapping[str, np.ndarray], path: str) -> dict[str, np.ndarray]:
    return {key[len(path) + 1 :]: value for key, value in values.items() if key.startswith(f"{path}.")}


def _wrapped(model: Llama, path: str, module: Any) -> Any:
    """The module at `path` with room for adapters, put there if it had none."""
    if isinstance(module, Adapted):
        return module
    kind = LoRALinear if isinstance(module, Linear) else LoRAEmbedding if isinstance(module, Embedding) else Adapted
    made = kind(module)
    _replace(model, path, made)
    return made


def _replace(model: Llama, path: str, module: Any) -> None:
    parent, _, name = path.rpartition(".")
    owner: Any = model
    for part in parent.split(".") if parent else ():
        owner = owner[int(part)] if isinstance(owner, list) else getattr(owner, part)
    setattr(owner, name, module)


def _listed(model: Llama) -> str:
    return ", ".join(adapter_names(model)) or "none"
