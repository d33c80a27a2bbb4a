"""What `entrenar inspect` says of adapters, as PEFT keeps them, and of 4-bit weights, as bitsandbytes does."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from entrenar.cli.adapters import base_of
from entrenar.cli.found import SHOWN, Found
from entrenar.cli.tensors import BLOCK, Weight
from entrenar.cli.terminal import clipped
from entrenar.formats import Entry, FormatError
from entrenar.formats.safetensors import SafeTensors
from entrenar.kernels.packed import Packed
from entrenar.quant import bitsandbytes

PART = re.compile(r"base_model\.model\.(.+)\.(lora_A\.weight|lora_embedding_A)")


def adapter_facts(path: Path) -> tuple[dict[str, Any], list[str]]:
    """(facts, problems) of an adapter's folder. Raises FormatError where its configuration cannot be read."""
    from entrenar.adapters.files import WEIGHTS, find_adapter, read_adapter_config

    folder = find_adapter(path)
    config = read_adapter_config(folder)
    name = "DoRA" if config.use_dora else "LoRA"
    facts: dict[str, Any] = {
        "adapter": f"{name} of rank {config.r}, alpha {config.lora_alpha:g}: scale "
        f"{config.scale(config.r, config.lora_alpha):g}" + (", rank-stabilized" if config.use_rslora else ""),
        "targets": config.target_modules or ["q_proj", "v_proj"],
    }
    for key in ("exclude_modules", "layers_to_transform", "modules_to_save", "rank_pattern", "alpha_pattern"):
        if value := getattr(config, key):
            facts[key.replace("_", " ")] = value
    if config.lora_dropout:
        facts["dropout"] = config.lora_dropout
    with SafeTensors(folder / WEIGHTS) as file:
        ranks = Counter(e.shape[0] for e in file.entries.values() if PART.fullmatch(e.name) and e.shape)
        facts["modules"] = sum(ranks.values())
        if len(ranks) > 1:
            facts["ranks"] = ", ".join(f"{rank} in {count}" for rank, count in sorted(ranks.items()))
        facts["parameters"] = sum(entry.size for entry in file.entries.values())
        problems = list(halves_missing(file.entries))
    named = config.base_model_name_or_path or "not told"
    try:
        base = base_of(folder)
    except FormatError:
        return {"for the model": f"{named} (not there)", **facts}, problems
    return {"for the model": str(base), **facts}, problems + misfits(folder, base)


def halves_missing(entries: Mapping[str, Entry]) -> Iterator[str]:
    """A (r, I) without its B (O, r), or one of another rank."""
    for name, entry in entries.items():
        if "lora_A" not in name and "lora_embedding_A" not in name:
            continue
        other = name.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")
        if other not in entries:
            yield f"{clipped(name, 100)} is there without lora_{clipped(other.rpartition('lora_')[2], 40)}"
        elif entry.shape[:1] != entries[other].shape[-1:]:
            yield f"{clipped(name, 100)} {entry.shape} does not fit its B {entries[other].shape}"


def misfits(folder: Path, base: Path) -> list[str]:
    """What of the adapter does not fit the model it is for, by their shapes alone."""
    from entrenar.adapters.files import PREFIX, WEIGHTS, read_adapter_config
    from entrenar.adapters.matching import plan, shapes
    from entrenar.llama import Llama
    from entrenar.llama.pretrained import read_config
    from entrenar.nn import unfilled

    try:
        with unfilled():
            model = Llama(read_config(base))
    except FormatError:
        return []  # a base that is another kind of folder: what is there of the adapter is shown all the same
    try:
        wanted = shapes(model, plan(model, read_adapter_config(folder), strict=False))
    except ValueError as error:
        return [f"does not fit {base}: {' '.join(str(error).split())}"]
    with SafeTensors(folder / WEIGHTS) as file:
        wrong = [f"{PREFIX}{key} {shape} is missing" for key, shape in wanted.items() if PREFIX + key not in file]
        wrong += [
            f"{PREFIX}{key} {file.entries[PREFIX + key].shape} does not fit {base}: wanted {shape}"
            for key, shape in wanted.items()
            if PREFIX + key in file and file.entries[PREFIX + key].shape != shape
        ]
    return wrong[:SHOWN] + ([f"... and {len(wrong) - SHOWN:,} more"] if len(wrong) > SHOWN else [])


# -- weights in 4 bits


def four_bits(file: SafeTensors) -> dict[str, tuple[Weight, set[str]]]:
    """(the weight as one row of the table, the names of its parts) by the name of each weight that can be read."""
    found = {}
    for name, parts in bitsandbytes.parts_of(file.entries).items():
        names = {f"{name}.{part}" for part in parts}
        if name not in file.entries:
            continue
        try:
            shape = bitsandbytes.shape_of(name, {each: file[each] for each in names}, str(file.path))
        except FormatError:
            continue  # its parts are shown one by one
        if file.entries[name].nbytes != -(-shape[0] * shape[1] // 2):
            continue
        kind = next(part for part in parts if part.startswith(bitsandbytes.STATE)).removeprefix(bitsandbytes.STATE)
        nbytes = sum(file.entries[each].nbytes for each in (name, *names))
        weight = Weight(name, shape, kind.upper(), nbytes, decoded(file, name, (name, *sorted(names)), shape))
        found[name] = (weight, names | {name})
    return found


def decoded(file: SafeTensors, name: str, names: Iterable[str],
            shape: tuple[int, int]) -> Callable[[], Iterator[np.ndarray]]:  # fmt: skip
    """What gives the numbers a weight stands for, some rows at a time."""

    def read() -> Iterator[np.ndarray]:
        packed = bitsandbytes.read(name, {each: file[each] for each in names}, shape, str(file.path)).packed
        for each in names:
            file.release(each)
        yield from blocks(packed)

    return read


def blocks(packed: Packed) -> Iterator[np.ndarray]:
    from entrenar import kernels

    rows, columns = packed.shape
    step = max(1, BLOCK // max(1, columns))
    for start in range(0, rows, step):
        yield kernels.unpack_rows(np.arange(start, min(rows, start + step)), packed)


def stored_in_four_bits(found: Found, quantization: Any) -> dict[str, Any]:
    """The facts of a model whose config.json has a quantization_config."""
    if not isinstance(quantization, dict):
        return {}
    if not bitsandbytes.is_config(quantization):
        return {"stored as": f"{quantization.get('quant_method', 'unknown')}: not one entrenar reads"}
    packed = [w for part in found.below for w in part.weights if w.dtype in ("NF4", "FP4")]
    nested = quantization.get("bnb_4bit_use_double_quant") is True
    told = f"{quantization.get('bnb_4bit_quant_type', 'fp4')}, as bitsandbytes has it"
    told += ", scales in 8 bits" if nested else ", scales as float32"
    facts: dict[str, Any] = {"stored as": told}
    if numbers := sum(w.size for w in packed):
        per = sum(w.nbytes for w in packed) / numbers
        facts["in 4 bits"] = f"{len(packed):,} matrices, {numbers:,} weights, {per:.4f} bytes each"
    return facts
