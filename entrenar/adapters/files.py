"""Adapters as PEFT's files: adapter_config.json and adapter_model.safetensors, in and out.

What is written is the same bytes for the same adapter, on every machine. The base is never in them: PEFT writes the
matrix of an adapted embedding or head too, which is read past here where it is the base's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from entrenar.adapters.config import LoraConfig
from entrenar.adapters.matching import Plan, plain_modules, plan, shapes
from entrenar.adapters.model import adapter_config, adapter_tensors, check_name, compute_dtype, put
from entrenar.files import new_folder
from entrenar.formats import FormatError, safetensors, short
from entrenar.formats.safetensors import SafeTensors
from entrenar.formats.strict_json import read_object
from entrenar.kernels.packed import Packed
from entrenar.llama import Llama

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CONFIG_LIMIT = 1_000_000  # bytes
PREFIX = "base_model.model."
BASE = ".base_layer.weight"
SHOWN = 20  # problems listed in one message


# Writing


def save_adapter(model: Llama, folder: str | Path, name: str = "default", *, base: str | None = None,
                 dtype: str = "float32") -> Path:  # fmt: skip
    """Write an adapter as a folder that PEFT, and `load_adapter`, load; all of it, or nothing.

    base    the model it is for, as adapter_config.json names it; default: what its configuration says
    dtype   what the weights are stored as: float32, bfloat16 or float16

    Raises FileExistsError where the folder is there and not empty, OSError where the disk refuses, ValueError for an
    adapter the model does not have, or one whose weights are not finite; nothing is left behind then.
    """
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists already and is not empty")
    with new_folder(folder) as temporary:
        write_adapter(temporary, model, name, base=base, dtype=dtype)
    return folder


def write_adapter(folder: Path, model: Llama, name: str = "default", *, base: str | None = None,
                  dtype: str = "float32") -> None:  # fmt: skip
    """Write an adapter's two files into a folder that is there; for use inside `files.new_folder`."""
    stored = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
    if dtype not in stored:
        raise ValueError(f"save_adapter: dtype = {dtype!r}: wanted one of {', '.join(stored)}")
    config = adapter_config(model, name)
    arrays = {PREFIX + key: tensor.data for key, tensor in adapter_tensors(model, name).items()}
    if wrong := [key for key, array in arrays.items() if not np.isfinite(array).all()]:
        raise ValueError(f"save_adapter: {len(wrong)} of {len(arrays)} tensors are not finite: {wrong[0]}, ...")
    values = config.to_dict()
    if base is not None:
        values["base_model_name_or_path"] = base
    # Not sort_keys, as PEFT does: of the patterns the first that matches counts, so their order is to stay
    text = json.dumps(dict(sorted(values.items())), indent=2) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    safetensors.save(folder / WEIGHTS, arrays, {"format": "pt"}, dtype=stored[dtype])


# Reading


def load_adapter(model: Llama, folder: str | Path, name: str = "default", *, trainable: bool = False) -> None:
    """Put the adapter in a folder, which PEFT or `save_adapter` wrote, beside the model's layers, and make it active.

    name        what it is called here; PEFT puts all but "default" in a folder of that name inside `folder`
    trainable   whether its training goes on

    Weights become what the model computes in. Nothing in the files is executed.
    Raises FormatError with everything at once that is wrong with the configuration, then with the tensors; OSError
    where a file cannot be read. The model is then as it was.
    """
    check_name(model, name)
    folder = find_adapter(folder, name)
    config = read_adapter_config(folder)
    try:
        planned = plan(model, config, strict=False)
    except ValueError as error:
        raise FormatError(f"{folder / CONFIG}: {error}") from None
    with SafeTensors(folder / WEIGHTS) as file:
        values = _read(file, model, planned)
    put(model, config, planned, values, name, trainable=trainable)


def find_adapter(folder: str | Path, name: str = "default") -> Path:
    """The folder called `name` inside this one where it has an adapter's two files, else the folder itself.

    Raises FormatError that says what is missing.
    """
    folder = Path(folder)
    for place in (folder / name, folder):
        if (place / CONFIG).is_file() and (place / WEIGHTS).is_file():
            return place
    if not folder.is_dir():
        raise FormatError(f"{folder}: there is no such folder")
    if (folder / CONFIG).is_file() and (folder / "adapter_model.bin").exists():
        raise FormatError(
            f"{folder}: has adapter_model.bin, a pickle, which can run any code and is never opened here, but no "
            f"{WEIGHTS}; load it with PEFT where you trust it, and save_pretrained() writes safetensors"
        )
    inside = sorted(part.parent.name for part in folder.glob(f"*/{CONFIG}"))
    missing = [file for file in (CONFIG, WEIGHTS) if not (folder / file).is_file()]
    way_out = f"; inside it are adapters {', '.join(map(short, inside[:5]))}: give that folder" if inside else ""
    raise FormatError(f"{folder}: has no {' and no '.join(missing)}{way_out}")


def read_adapter_config(folder: str | Path) -> LoraConfig:
    """The configuration in an adapter's folder. Raises FormatError."""
    file = Path(folder) / CONFIG
    return LoraConfig.from_dict(read_object(file, limit=CONFIG_LIMIT), where=str(file))


def _read(file: SafeTensors, model: Llama, planned: Plan) -> dict[str, np.ndarray]:
    """Every tensor of the adapter, by its name without the prefix, as the model computes."""
    wanted = {PREFIX + key: shape for key, shape in shapes(model, planned).items()}
    wrong = [f"missing {key} {shape}" for key, shape in wanted.items() if key not in file.entries]
    for key, entry in file.entries.items():
        if key not in wanted:
            wrong += _unexpected(file, key, model)
        elif entry.shape != wanted[key]:
            wrong.append(f"{key} has shape {entry.shape}, wanted {wanted[key]}")
        elif entry.dtype not in safetensors.FLOATS:
            wrong.append(f"{key} has type {entry.dtype}, wanted one of {', '.join(safetensors.FLOATS)}")
    if wrong:
        raise _refusal(file, f"does not hold the {len(wanted)} tensors {CONFIG} describes", wrong)
    dtype = compute_dtype(model)
    values = {key[len(PREFIX) :]: _copied(file[key], dtype) for key in wanted}
    if lost := [PREFIX + key for key, array in values.items() if not np.isfinite(array).all()]:
        raise _refusal(file, f"not finite as {dtype}", lost)
    return values


def _copied(values: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    own = np.empty(values.shape, dtype)  # not np.array, which keeps the file's "<f4", a type the C kernels do not know
    with np.errstate(over="ignore"):
        own[...] = values
    return own


def _unexpected(file: SafeTensors, key: str, model: Llama) -> Iterator[str]:
    """What is wrong with a tensor that is no part of the adapter: nothing, where it is the base's own matrix."""
    path = key.removeprefix(PREFIX).removesuffix(BASE)
    if not (key.startswith(PREFIX) and key.endswith(BASE)) or path not in ("model.embed_tokens", "lm_head"):
        yield f"unexpected {short(key)} {file.entries[key].shape}"
        return
    modules = plain_modules(model)
    weight = getattr(modules.get(path), "weight", None)
    if weight is None and path == "lm_head":  # tied
        weight = getattr(modules["model.embed_tokens"], "weight")  # noqa: B009
    if isinstance(weight, Packed) or weight is None or file.entries[key].shape != weight.shape:
        yield f"{key} {file.entries[key].shape} is not the base's {getattr(weight, 'shape', '')}: another base?"
    elif not _same(file, key, weight.data):
        yield f"{key} differs from the base's own: PEFT changed it; merge with PEFT, and load the whole model"


def _same(file: SafeTensors, key: str, own: np.ndarray) -> bool:
    """Whether a matrix is the base's, as far as the fewer digits of the two say."""
    eps = {"F64": 2.0**-24, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}.get(file.entries[key].dtype)
    if eps is None:
        return False
    step = max(1, (1 << 20) // max(1, own.shape[1]))
    for at in range(0, len(own), step):
        theirs = file[key][at : at + step].astype(np.float32)
        if not np.allclose(theirs, own[at : at + step], rtol=2 * eps, atol=1e-6):
            return False
    return True


def _refusal(file: SafeTensors, what: str, wrong: list[str]) -> FormatError:
    more = [f"... and {len(wrong) - SHOWN:,} more"] if len(wrong) > SHOWN else []
    return FormatError("\n  ".join([f"{file.path}: {what}:", *wrong[:SHOWN], *more]))
