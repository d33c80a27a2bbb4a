"""bitsandbytes' 4-bit weights as they lie in a checkpoint, in and out, byte for byte.

    P.weight                                U8 ((O I + 1) // 2, 1)   or the same bytes as another type (quant_storage)
    P.weight.absmax                         F32 (blocks,), or U8 with double quantization
    P.weight.quant_map                      F32 (16,): the table of nf4 or fp4
    P.weight.nested_absmax                  F32 (blocks / 256,)      with double quantization, as the next
    P.weight.nested_quant_map               F32 (256,)
    P.weight.quant_state.bitsandbytes__nf4  U8: JSON with the rest (or ...__fp4)

and quantization_config in config.json. The `dtype` in that JSON is what bitsandbytes makes of a weight when it
computes; entrenar computes in float32, and only passes it on. What is read is checked as if an enemy had written it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from entrenar.formats import FormatError, short, strict_json
from entrenar.kernels.memory import lasting
from entrenar.kernels.packed import TABLES, Nested, Packed
from entrenar.quant.blockwise import BLOCKS

STATE = "quant_state.bitsandbytes__"
PLAIN, NESTED = ("absmax", "quant_map"), ("nested_absmax", "nested_quant_map")
PART = re.compile(rf"(.+\.weight)\.({'|'.join(PLAIN + NESTED)}|{re.escape(STATE)}(?:{'|'.join(TABLES)}))")
DTYPES = ("float32", "bfloat16", "float16")
STATE_LIMIT = 10_000  # bytes of the JSON; real ones have some 200
FIELDS = {"quant_type", "blocksize", "dtype", "shape"}
NESTED_FIELDS = {"nested_blocksize", "nested_dtype", "nested_offset"}
NESTED_BLOCKS = (64, 128, 256, 512, 1024, 2048, 4096)
FINITE = float(np.finfo(np.float32).max)
CLOSE = 1e-6  # how far a table may be from the known one: it is not read, the kernels have their own

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Stored:
    """A weight as a checkpoint has it, and the type bitsandbytes would compute it as."""

    packed: Packed
    dtype: str


# Reading


def parts_of(names: Iterable[str]) -> dict[str, list[str]]:
    """For every quantized weight among the names of a checkpoint, the names of its parts without the weight's own."""
    found: dict[str, list[str]] = {}
    for name in names:
        if match := PART.fullmatch(name):
            found.setdefault(match[1], []).append(match[2])
    return found


def read(name: str, arrays: Arrays, shape: tuple[int, int], where: str) -> Stored:
    """The weight `name`, which should have this shape, out of a checkpoint's arrays (all of them, or its parts).

    Raises FormatError with everything that is missing or wrong.
    """
    parts = {part: arrays[f"{name}.{part}"] for part in parts_of(arrays).get(name, [])}
    try:
        return _read(arrays[name], parts, shape)
    except _Wrong as error:
        raise FormatError(f"{where}: {name}: as bitsandbytes stores it: {'; '.join(error.problems)}") from None


def shape_of(name: str, arrays: Arrays, where: str) -> tuple[int, int]:
    """What the parts of the weight `name` say its shape (O, I) is. Raises FormatError where they say none."""
    try:
        shape = _state({key.removeprefix(f"{name}."): array for key, array in arrays.items()})[1].get("shape")
    except _Wrong as error:
        raise FormatError(f"{where}: {name}: as bitsandbytes stores it: {'; '.join(error.problems)}") from None
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and 0 < n < 1 << 31 for n in shape)):
        raise FormatError(f"{where}: {name}: shape = {short(shape)}, wanted two numbers")
    return shape[0], shape[1]


class _Wrong(Exception):
    def __init__(self, *problems: str) -> None:
        self.problems = problems


def _read(weight: np.ndarray, parts: Arrays, shape: tuple[int, int]) -> Stored:
    kind, state = _state(parts)
    if wrong := _state_problems(kind, state, shape):
        raise _Wrong(*wrong)
    block, size, nested = state["blocksize"], shape[0] * shape[1], NESTED_FIELDS <= state.keys()
    blocks = -(-size // block)
    groups = -(-blocks // state.get("nested_blocksize", 1))
    wrong = _part_problems(parts, {
        "quant_map": ("float32", 16),
        "absmax": ("uint8" if nested else "float32", blocks),
        **({"nested_absmax": ("float32", groups), "nested_quant_map": ("float32", 256)} if nested else {}),
    })  # fmt: skip
    if weight.nbytes != -(-size // 2):
        wrong.append(f"the weight has {weight.nbytes:,} bytes, {shape} in 4 bits has {-(-size // 2):,}")
    if not wrong and np.abs(parts["quant_map"] - TABLES[kind]).max() > CLOSE:
        wrong.append(f"quant_map is not the table of {kind}")
    if wrong:
        raise _Wrong(*wrong)
    codes = lasting(weight.nbytes, np.uint8)
    codes[:] = np.ascontiguousarray(weight).reshape(-1).view(np.uint8)
    if not nested:
        return Stored(Packed(kind, shape, codes, _copy(parts["absmax"]), block), state["dtype"])
    scales = Nested(_copy(parts["absmax"]), _copy(parts["nested_quant_map"]), _copy(parts["nested_absmax"]),
                    float(state["nested_offset"]), state["nested_blocksize"])  # fmt: skip
    return Stored(Packed(kind, shape, codes, scales, block), state["dtype"])


def _copy(x: np.ndarray) -> np.ndarray:
    """x in memory of its own, of this machine's byte order: the file is let go of."""
    return np.array(x, x.dtype.newbyteorder("="), order="C")


def _state(parts: Arrays) -> tuple[str, dict[str, Any]]:
    """(kind, the JSON) of the one part that says how the others are to be read."""
    states = [part for part in parts if part.startswith(STATE)]
    if len(states) != 1:
        raise _Wrong(f"has {len(states)} quant_states, wanted one")
    raw = parts[states[0]]
    if raw.dtype != np.uint8 or raw.ndim != 1 or not 0 < raw.size <= STATE_LIMIT:
        raise _Wrong(f"{states[0]} is {raw.dtype} {raw.shape}, wanted bytes of JSON, at most {STATE_LIMIT:,}")
    try:
        state = strict_json.parse(raw.tobytes(), states[0], values=100)
    except FormatError as error:
        raise _Wrong(str(error)) from None
    if not isinstance(state, dict):
        raise _Wrong(f"{states[0]} holds {short(state)}, wanted an object")
    return states[0].removeprefix(STATE), state


def _state_problems(kind: str, state: dict[str, Any], shape: tuple[int, int]) -> list[str]:
    keys = state.keys()
    if keys not in (FIELDS, FIELDS | NESTED_FIELDS):
        return [f"quant_state has the keys {short(sorted(keys))}, wanted {', '.join(sorted(FIELDS))} "
                f"and all or none of {', '.join(sorted(NESTED_FIELDS))}"]  # fmt: skip
    wanted: list[tuple[str, tuple[Any, ...]]] = [("quant_type", (kind,)), ("blocksize", BLOCKS), ("dtype", DTYPES)]
    if NESTED_FIELDS <= keys:
        wanted += [("nested_blocksize", NESTED_BLOCKS), ("nested_dtype", ("float32",))]
    wrong = [f"{key} = {short(state[key])}, wanted {' or '.join(map(str, values))}" for key, values in wanted
             if not any(type(state[key]) is type(value) and state[key] == value for value in values)]  # fmt: skip
    if not _is_shape(state["shape"], shape):
        wrong.append(f"shape = {short(state['shape'])}, wanted {list(shape)}")
    offset = state.get("nested_offset", 0.0)
    if not isinstance(offset, (int, float)) or isinstance(offset, bool) or not abs(offset) <= FINITE:
        wrong.append(f"nested_offset = {short(offset)}, wanted a number that float32 holds")
    return wrong


def _is_shape(value: Any, shape: tuple[int, int]) -> bool:
    return isinstance(value, list) and all(type(n) is int for n in value) and tuple(value) == shape


def _part_problems(parts: Arrays, wanted: Mapping[str, tuple[str, int]]) -> list[str]:
    known = {part for part in parts if not part.startswith(STATE)}
    wrong = [f"{part} is missing" for part in wanted if part not in known]
    wrong += [f"{part} is there, though quant_state names no offset" for part in sorted(known - wanted.keys())]
    for part in known & wanted.keys():
        x, (dtype, count) = parts[part], wanted[part]
        if x.dtype.name != dtype or x.shape != (count,):
            wrong.append(f"{part} is {x.dtype} {x.shape}, wanted {dtype} ({count},)")
        elif dtype == "float32" and not np.isfinite(x).all():
            wrong.append(f"{part} has values that are not finite")
    return wrong


# Writing


def parts(name: str, w: Packed, *, dtype: str = "float32") -> dict[str, np.ndarray]:
    """The arrays that stand for the weight `name` in a checkpoint: views of what `w` has.

    dtype   what bitsandbytes is to make of it when it computes
    """
    assert w.kind in TABLES and w.scales is not None and dtype in DTYPES
    state: dict[str, Any] = {"quant_type": w.kind, "blocksize": w.block, "dtype": dtype, "shape": list(w.shape)}
    found = {"quant_map": TABLES[w.kind]}
    if isinstance(w.scales, Nested):
        n = w.scales
        found |= {"absmax": n.codes, "nested_absmax": n.absmax, "nested_quant_map": n.table}
        state |= {"nested_blocksize": n.block, "nested_dtype": "float32",
                  "nested_offset": float(np.float32(n.offset))}  # fmt: skip
    else:
        found |= {"absmax": w.scales}
    found[STATE + w.kind] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return {name: w.codes[:, None]} | {f"{name}.{part}": array for part, array in found.items()}


# config.json


def config(kind: str, *, double_quant: bool, dtype: str) -> dict[str, Any]:
    """quantization_config, as transformers writes it (its own default would be fp4: everything is said)."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0,
    }


def is_config(value: Any) -> bool:
    """Whether a quantization_config says that the weights are bitsandbytes' in 4 bits."""
    return (
        isinstance(value, dict)
        and value.get("quant_method") == "bitsandbytes"
        and value.get("load_in_4bit") is True
        and value.get("load_in_8bit") in (None, False)
    )


def kind_of(value: dict[str, Any], where: str) -> str:
    """nf4 or fp4: what a quantization_config says the weights are (fp4 where it says nothing)."""
    kind = value.get("bnb_4bit_quant_type", "fp4")
    if not isinstance(kind, str) or kind not in TABLES:
        raise FormatError(f"{where}: bnb_4bit_quant_type = {short(kind)}: wanted {' or '.join(TABLES)}")
    return kind
