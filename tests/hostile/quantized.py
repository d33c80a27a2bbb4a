"""Bad folders of bitsandbytes' 4-bit weights: the JSON in a tensor, the parts of a weight, quantization_config."""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from entrenar import random
from entrenar.formats import FormatError, safetensors
from entrenar.llama import Llama
from entrenar.llama.packed import place
from entrenar.llama.pretrained import CONFIG, WEIGHTS, save_pretrained
from entrenar.quant import quantize
from hostile.case import GONE, WHOLE, WORDS, Case, Family, bad_json, bytes_at, cuts, flips, replaced, short
from hostile.pretrained import SHAPE, Files, folder_of

WEIGHT = "model.layers.1.mlp.up_proj.weight"
STATE = f"{WEIGHT}.quant_state.bitsandbytes__nf4"
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def errors() -> tuple[type[BaseException], ...]:
    return (FormatError,)


def digest_of(path: Path) -> str:
    model = Llama.from_pretrained(path)
    digest = hashlib.sha256(repr(model.config).encode())
    for name, array in sorted(model.state_dict().items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    for name, w in sorted(model.named_packed()):
        digest.update(f"{name} {w.kind} {w.shape} {w.block}".encode() + w.codes.tobytes())
        digest.update(w.scales.codes.tobytes() + w.scales.table.tobytes() + w.scales.absmax.tobytes())
        digest.update(repr(w.scales.offset).encode())
    return digest.hexdigest()


@functools.cache
def good() -> Files:
    """The files of a small model whose layers are nf4 with double quantization, by name."""
    random.seed(5)
    model = Llama(SHAPE)
    for name, tensor in list(model.named_parameters()):
        if "_proj" in name:
            place(model, name, quantize(tensor.data, "nf4"))
    with tempfile.TemporaryDirectory() as folder:
        return {file.name: file.read_bytes() for file in save_pretrained(model, Path(folder, "m")).iterdir()}


@functools.cache
def whole() -> str:
    with tempfile.TemporaryDirectory() as folder:
        return digest_of(folder_of(good())(Path(folder)))


@functools.cache
def arrays() -> dict[str, np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        with safetensors.SafeTensors(bytes_at(WEIGHTS, good()[WEIGHTS])(Path(folder))) as file:
            return {name: np.array(array) for name, array in file.items()}


def weights_of(changes: dict[str, np.ndarray | None]) -> bytes:
    """model.safetensors with some arrays changed (None: taken away)."""
    kept = {name: array for name, array in (arrays() | changes).items() if array is not None}
    with tempfile.TemporaryDirectory() as folder:
        safetensors.save(Path(folder, WEIGHTS), kept, {"format": "pt"})
        return Path(folder, WEIGHTS).read_bytes()


def case(name: str, changes: dict[str, Any], **more: Any) -> Case:
    return Case(name, folder_of(good() | changes), digest_of, names="model", **more)


def with_arrays(name: str, changes: dict[str, np.ndarray | None], **more: Any) -> Case:
    return case(name, {WEIGHTS: functools.partial(weights_of, changes)}, **more)


def with_state(name: str, raw: bytes, **more: Any) -> Case:
    return with_arrays(name, {STATE: np.frombuffer(raw, np.uint8)}, **more)


def state() -> str:
    return arrays()[STATE].tobytes().decode()


# The JSON


def state_texts() -> Iterator[Case]:
    for name, raw in bad_json(state(), big=False):
        content = raw if isinstance(raw, bytes) else raw()
        yield with_state(name, content)


def state_cut_short() -> Iterator[Case]:
    for name, part in cuts(state().encode()):
        yield with_state(name, part, says=WEIGHT)


def state_flips() -> Iterator[Case]:
    for name, raw in flips(state().encode(), 100, 7):  # digits of the offset may be others: another model, but a model
        yield with_state(name, raw, may_load=True)


def state_values() -> Iterator[Case]:
    """Every key away, and every value another."""
    tree = json.loads(state())
    free = ("dtype", "nested_offset", "nested_blocksize")  # others are as good: one block of 8-bit scales is one still
    for key, true in tree.items():
        for value in (GONE, *WHOLE, *WORDS, "nf4", "fp4", "int8", 64.0, 63, 32, 4096, [8, 12], [12, 8, 1], [96],
                      [12.0, 8], 1e39, -1e308, "float16", "float64", "float32"):  # fmt: skip
            if value is not GONE and (type(value), value) == (type(true), true):
                continue
            content = json.dumps(replaced(tree, (key,), value)).encode()
            what = "gone" if value is GONE else short(value)
            yield with_state(f"{key} = {what}", content, says=WEIGHT, may_load=key in free and value is not GONE)
    yield with_state("a key more", json.dumps(tree | {"x": 1}).encode(), says="keys")


# The parts


def parts_of_another_kind() -> Iterator[Case]:
    for part in (*PARTS, ""):
        name = f"{WEIGHT}.{part}".rstrip(".")
        true = arrays()[name]
        yield with_arrays(f"without {part or 'the weight'}", {name: None}, says=name if part == "" else part)
        others = {
            "one more": np.concatenate([true, true[:1]]),
            "one less": true[:-1],
            "a dimension more": true[None],
            "none": true[:0],
            "one number": true.reshape(-1)[:1].reshape(()),
            "doubles": true.astype(np.float64),
            "halves": true.astype(np.float16),
            "integers": true.astype(np.int32),
            "bytes": true.astype(np.int8),
        }
        for what, other in others.items():
            as_good = part == "" and what in ("a dimension more", "bytes")  # its bytes are all that counts
            yield with_arrays(f"{part or 'weight'}: {what}", {name: other}, may_load=as_good, says=WEIGHT)
    for part in ("quant_map", "nested_absmax", "nested_quant_map"):
        for value in (np.nan, np.inf, -np.inf):
            changed = arrays()[f"{WEIGHT}.{part}"].copy()
            changed[-1] = value
            yield with_arrays(f"{part}: {value}", {f"{WEIGHT}.{part}": changed}, says="not finite")
    table = arrays()[f"{WEIGHT}.quant_map"]
    yield with_arrays("another table", {f"{WEIGHT}.quant_map": table[::-1].copy()}, says="not the table")


def states_that_do_not_fit() -> Iterator[Case]:
    two = {f"{WEIGHT}.quant_state.bitsandbytes__fp4": arrays()[STATE]}
    yield with_arrays("two states", two, says="2 quant_states")
    yield with_arrays("no state", {STATE: None}, says="0 quant_states")
    yield with_arrays("another's state", two | {STATE: None}, says="quant_type")
    yield with_arrays("of an unknown kind", {STATE: None, f"{WEIGHT}.quant_state.bitsandbytes__nf5": arrays()[STATE]})
    for kind in (np.int8, np.float32, bool):
        yield with_arrays(f"of {np.dtype(kind)}", {STATE: arrays()[STATE].astype(kind)}, says="bytes of JSON")
    yield with_arrays("of 1 MB", {STATE: np.full(10**6, 32, np.uint8)}, says="at most")
    yield with_arrays("of two dimensions", {STATE: arrays()[STATE][None]}, says="bytes of JSON")
    for extra in ("model.norm.weight", "x.weight", "model.layers.7.mlp.up_proj.weight"):
        changes = {f"{extra}.{part}": arrays()[f"{WEIGHT}.{part}"] for part in PARTS}
        yield with_arrays(f"parts of {extra}", changes, says=extra)
    yield with_arrays("parts of a long name", {f"{'x' * 10_000}.weight.absmax": np.zeros(1, np.uint8)})


# quantization_config


def configurations() -> Iterator[Case]:
    values = json.loads(good()[CONFIG])
    known = values["quantization_config"]

    def of(value: Any) -> bytes:
        return json.dumps(replaced(values, ("quantization_config",), value)).encode()

    for value in (GONE, None, *WORDS[1:]):
        what = "gone" if value is GONE else short(value)
        yield case(f"quantization_config = {what}", {CONFIG: of(value)}, says="quantization_config")
    for key in ("quant_method", "load_in_4bit"):
        for value in (GONE, *WORDS, 4, "gptq", "bitsandbytes ", False):
            if value is not True or key != "load_in_4bit":
                what = "gone" if value is GONE else short(value)
                yield case(f"{key} = {what}", {CONFIG: of(replaced(known, (key,), value))}, says="quantization_config")
    for value in (True, 1, "x", [], {}):
        yield case(f"load_in_8bit = {short(value)}", {CONFIG: of(known | {"load_in_8bit": value})})
    for value in (*WORDS, "int4", "NF4"):
        yield case(f"bnb_4bit_quant_type = {short(value)}", {CONFIG: of(known | {"bnb_4bit_quant_type": value})},
                   says="bnb_4bit_quant_type")  # fmt: skip


def weights_cut_short() -> Iterator[Case]:
    for name, part in cuts(good()[WEIGHTS], 60):
        yield case(name, {WEIGHTS: part})


def harmless() -> Iterator[Case]:
    yield case("as it is", {}, equals=whole())
    yield with_state("spaces", json.dumps(json.loads(state()), indent=3).encode(), equals=whole())
    yield with_state("another type to compute in", state().replace("float32", "bfloat16", 1).encode(), equals=whole())
    stored = {WEIGHT: arrays()[WEIGHT].reshape(-1).view(np.float16)[:, None]}
    yield with_arrays("stored as another type", stored, equals=whole())


FAMILIES: dict[str, Family] = {
    "the JSON in a tensor": state_texts,
    "that JSON cut at every length": state_cut_short,
    "that JSON with bits flipped": state_flips,
    "its keys and values": state_values,
    "the parts of a weight": parts_of_another_kind,
    "parts without their state": states_that_do_not_fit,
    "quantization_config": configurations,
    "the file cut short": weights_cut_short,
    "harmless": harmless,
}
