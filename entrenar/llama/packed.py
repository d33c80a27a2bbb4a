"""Frozen weights of a LLaMA in storage formats: which weight becomes what, and what each is in a folder.

The layers of the blocks are stored as asked for; embedding and head stay as the file has them (bitsandbytes and
transformers leave them alone too), norms and biases are float32.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from entrenar import kernels
from entrenar.formats import FormatError, safetensors, short
from entrenar.formats.safetensors import SafeTensors
from entrenar.kernels.packed import COMPUTES, KINDS, TABLES, Nested, Packed
from entrenar.llama.model import Llama
from entrenar.nn import Module
from entrenar.quant import QuantizeError, bitsandbytes, quantize
from entrenar.tensor import Tensor

STORAGES = ("float32", "stored", *KINDS)
STORED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAYER = re.compile(r"model\.layers\.\d+\.(?:self_attn|mlp)\.[a-z]+_proj\.weight")


# Reading


def storage_of(values: Mapping[str, Any], storage: str | None, where: str) -> str | None:
    """How the weights are to be kept: `storage`, checked against the config.json; None: trainable floats."""
    if storage is not None and storage not in STORAGES:
        raise ValueError(f"from_pretrained: storage = {storage!r}: wanted one of {', '.join(STORAGES)}, or None")
    if (quantization := values.get("quantization_config")) is None:
        return None if storage == "float32" else storage
    kind = bitsandbytes.kind_of(quantization, f"{where}: quantization_config")
    if storage not in (None, "stored", kind):
        raise FormatError(
            f"{where}: the weights are stored as {kind} (quantization_config), asked for was storage = {storage!r}; "
            "leave storage out, or get the model before it was quantized"
        )
    return "stored"


def check_compute(compute: str, storage: str | None) -> None:
    """Raise ValueError for an arithmetic that is none, or not one of weights kept so."""
    if compute not in COMPUTES:
        raise ValueError(f"from_pretrained: compute = {compute!r}: wanted one of {', '.join(COMPUTES)}")
    if compute != "float32" and storage in (None, "float32"):
        raise ValueError(
            f"from_pretrained: compute = {compute!r} is for frozen weights in a storage format; give storage too: "
            f"stored, {', '.join(KINDS)}"
        )


def states_of(values: Mapping[str, Any], files: Mapping[str, SafeTensors], where: str) -> dict[str, list[str]]:
    """The weights that bitsandbytes quantized, with the parts of each."""
    states = bitsandbytes.parts_of(files)
    if states and values.get("quantization_config") is None:
        name = min(states)
        raise FormatError(
            f"{where}: bitsandbytes quantized {short(name)} (there is its {states[name][0]}), but the configuration "
            "has no quantization_config; take the config.json that belongs to these files"
        )
    return states


def fill_frozen(model: Llama, own: Mapping[str, Tensor], files: Mapping[str, SafeTensors], states: Mapping[str, Any], *,
                storage: str, double_quant: bool, compute: str, where: str) -> Iterator[str]:  # fmt: skip
    """Give every weight its place, those of `states` as bitsandbytes has them; yield what cannot be. Freezes all."""
    kinds = set()
    for name, tensor in own.items():
        assert len(tensor.shape) <= 2
        used = [name, *(f"{name}.{part}" for part in states.get(name, ()))]
        arrays = {each: files[each][each] for each in used}
        try:
            weight = _frozen(name, tensor, arrays, storage, double_quant, where)
        except QuantizeError as error:
            yield str(error)
            continue
        finally:
            for each in used:
                files[each].release(each)
        if isinstance(weight, Packed):
            weight = dataclasses.replace(weight, compute=compute)
            kinds.add(weight.kind)
        place(model, name, weight)
    model.freeze()
    if compute == "int16" and kinds.isdisjoint(TABLES):
        yield "none of its weights are in 4 bits, which int16 is for; storage = nf4 keeps them so"
    elif compute != "float32" and not kinds:
        yield f"its files hold floats, whose products are float32, not {compute}; storage = bfloat16 keeps them so"


def _frozen(name: str, tensor: Tensor, arrays: Mapping[str, np.ndarray], storage: str, double_quant: bool,
            where: str) -> Tensor | Packed:  # fmt: skip
    if len(arrays) > 1:
        rows, columns = tensor.shape
        return bitsandbytes.read(name, arrays, (rows, columns), where).packed
    array = arrays[name]
    if kind := kind_of(name, array, storage):
        return quantize(array, kind, double_quant=double_quant, name=name)
    with np.errstate(over="ignore", invalid="ignore"):
        values = array.astype(np.float32)
    if not np.isfinite(values).all():
        raise QuantizeError(f"{name}: has values that are not finite")
    return Tensor(values)


def kind_of(name: str, array: np.ndarray, storage: str) -> str | None:
    """The kind of Packed that a weight of a file becomes; None: floats."""
    as_it_is = "bfloat16" if array.dtype.name == "bfloat16" else None
    if LAYER.fullmatch(name):
        return as_it_is if storage == "stored" else storage
    return as_it_is if name in (EMBEDDING, HEAD) else None


def place(model: Module, name: str, weight: Tensor | Packed) -> None:
    """Put a weight where `name` says."""
    path, _, attribute = name.rpartition(".")
    setattr(dict(model.named_modules())[path], attribute, weight)


# Writing


class Floats(Mapping[str, np.ndarray]):
    """Every weight of a model as floats, by name: those in a storage format are decoded when they are asked for."""

    def __init__(self, model: Llama) -> None:
        self._state, self._packed = model.state_dict(), dict(model.named_packed())

    def __getitem__(self, name: str) -> np.ndarray:
        return kernels.unpack(self._packed[name]) if name in self._packed else self._state[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._state
        yield from self._packed

    def __len__(self) -> int:
        return len(self._state) + len(self._packed)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._packed[name].shape if name in self._packed else self._state[name].shape


class Group(NamedTuple):
    """What one weight is in a folder.

    arrays   by name; those of a bitsandbytes weight belong together
    words    safetensors' type for those that are converted on the way
    """

    arrays: dict[str, np.ndarray]
    words: dict[str, str]

    @property
    def nbytes(self) -> int:
        words = self.words
        return sum(
            x.size * safetensors.numpy_dtype(words[name]).itemsize if name in words else x.nbytes
            for name, x in self.arrays.items()
        )


def group_of(name: str, weight: Tensor | Packed, dtype: str) -> Group:
    """A weight as `save_pretrained(dtype=...)` writes it: what is in a storage format stays in it."""
    if isinstance(weight, Tensor):
        return Group({name: weight.data}, {name: STORED[dtype]})
    if weight.kind == "bfloat16":
        return Group({name: weight.codes.view(safetensors.numpy_dtype("BF16")).reshape(weight.shape)}, {})
    if weight.kind in TABLES:
        return Group(bitsandbytes.parts(name, weight, dtype=dtype), {})
    raise ValueError(
        f"save_pretrained: {name} is stored as {weight.kind}, which Hugging Face's layout does not have: "
        "load the model with storage = nf4, fp4 or bfloat16"
    )


def groups_of(model: Llama, dtype: str) -> Iterator[Group]:
    """All weights of a model, in its order."""
    for path, module in model.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, (Tensor, Packed)):
                yield group_of(f"{path}.{attribute}", value, dtype)


def quantization_of(model: Llama, dtype: str) -> dict[str, Any]:
    """What config.json says of weights in 4 bits: nothing where there are none."""
    packed = {name: w for name, w in model.named_packed() if w.kind in TABLES}
    kinds = sorted({w.kind for w in packed.values()})
    if not kinds:
        return {}
    if len(kinds) > 1:
        raise ValueError("save_pretrained: weights as nf4 and as fp4 in one model: bitsandbytes wants one kind")
    nested = any(isinstance(w.scales, Nested) for w in packed.values())
    config = bitsandbytes.config(kinds[0], double_quant=nested, dtype=dtype)
    layers = {f"{path}.weight" for path, _ in model.named_modules() if LAYER.fullmatch(f"{path}.weight")}
    if layers - packed.keys() or HEAD in packed:  # else transformers knows by itself: all layers but the head
        skipped = sorted({*layers, HEAD} - packed.keys())
        config["llm_int8_skip_modules"] = [name.removesuffix(".weight") for name in skipped]
    return {"quantization_config": config}
