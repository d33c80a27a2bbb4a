"""A model as a folder in Hugging Face's layout, in and out.

    config.json  generation_config.json
    model.safetensors                                                       one file, or
    model-00001-of-00003.safetensors  ...  model.safetensors.index.json     several, and what is in which
    a tokenizer's files (entrenar/data), which are written here when one is given

Only safetensors are read: a pytorch_model.bin is a pickle, which can run any code. Nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from entrenar.files import new_folder
from entrenar.formats import Entry, FormatError, safetensors, short
from entrenar.formats.safetensors import SafeTensors
from entrenar.formats.strict_json import read_object
from entrenar.llama.config import LlamaConfig
from entrenar.llama.model import Llama
from entrenar.llama.packed import (
    EMBEDDING,
    HEAD,
    STORED,
    Group,
    check_compute,
    fill_frozen,
    groups_of,
    quantization_of,
    states_of,
    storage_of,
)
from entrenar.nn import unfilled
from entrenar.tensor import Tensor

CONFIG, GENERATION = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG_LIMIT, INDEX_LIMIT = 1_000_000, 16_000_000  # bytes; a LLaMA of 405 billion weights has an index of 100,000
BLOCK = 1 << 18  # elements converted and checked at a time: they stay in the cache
COMPUTED = re.compile(r".*\.rotary_emb\.inv_freq")  # in old files: RoPE's frequencies, which follow from the config
SHARD = re.compile(r"[\w.-]{1,200}\.safetensors")
SHOWN = 20  # problems listed in one message


class Saveable(Protocol):
    """A tokenizer, as far as this file is concerned."""

    def save(self, folder: Path) -> Any: ...


# Reading


def read_config(folder: str | Path, *, trainable: bool = False) -> LlamaConfig:
    """The shape of the model in a folder. Raises FormatError where there is none, or one entrenar does not know.

    trainable   refuse a model that bitsandbytes quantized, too: its weights are frozen
    """
    values = config_values(folder)
    config = LlamaConfig.from_dict(values, where=str(Path(folder) / CONFIG))
    if trainable and values.get("quantization_config") is not None:
        raise FormatError(
            f"{folder}: its weights are quantized (quantization_config in {CONFIG}), and so frozen: there is nothing "
            "to train; take the model before it was quantized"
        )
    return config


def config_values(folder: str | Path) -> dict[str, Any]:
    """What the config.json of a folder holds."""
    file = _existing(Path(folder)) / CONFIG
    if not file.is_file():
        raise FormatError(f"{folder}: has no {CONFIG}; wanted a folder with a model in Hugging Face's layout")
    return read_object(file, limit=CONFIG_LIMIT)


def from_pretrained(folder: str | Path, *, storage: str | None = None, double_quant: bool = True,
                    compute: str = "float32", dtype: Any = np.float32, checkpointing: bool = False,
                    allow_nonfinite: bool = False) -> Llama:  # fmt: skip
    """The model in a folder, its weights converted to `dtype`; or frozen, in a storage format.

    The files are mapped, and each weight is copied once, straight to where it stays: beside the model itself, at most
    one tensor as the file has it is in memory.

    storage           None, "float32": floats, which can be trained. Else everything is frozen, and the layers of the
                      blocks are kept as "nf4", "fp4", "q8_0", "bfloat16", or "stored": as the file has them (float32
                      where that is not bfloat16). A folder that bitsandbytes quantized is read as it is, frozen.
    double_quant      nf4, fp4: the scales in 8 bits
    compute           the arithmetic of products with weights in a storage format: "float32"; "int16" for writing text
                      with weights in 4 bits: products of a few rows, of which no gradient is wanted, in whole numbers
                      of 15 bits, up to twice as fast; or "bfloat16", which rounds the operands of more rows and adds
                      in float32: twice as fast where the processor has AVX512_BF16
    allow_nonfinite   read weights that hold NaN or infinity too (to look for where they came from); not in a format
    Raises FormatError: with everything in the configuration that makes it another model; with every tensor that is
    missing, unexpected or misshapen; with every one that is not finite.
    """
    folder, values = Path(folder), config_values(folder)
    config = LlamaConfig.from_dict(values, where=str(folder / CONFIG))
    frozen = storage_of(values, storage, str(folder / CONFIG))
    check_compute(compute, frozen)
    if frozen is not None and np.dtype(dtype) != np.float32:
        raise ValueError(f"from_pretrained: weights stored as {storage or frozen} compute as float32, not {dtype}")
    with contextlib.ExitStack() as opened:
        files = open_weights(folder, opened)
        check_size(folder, config, files)
        with unfilled():
            model = Llama(config, checkpointing=checkpointing, dtype=dtype)
        own = dict(model.named_parameters())
        states = states_of(values, files, str(folder))
        check_tensors(folder, config, own, files, states)
        if frozen is None:
            wrong = list(_fill(own, files))
        elif wrong := list(fill_frozen(model, own, files, states, storage=frozen, double_quant=double_quant,
                                       compute=compute, where=str(folder))):  # fmt: skip
            raise _refusal(folder, f"cannot be kept as {frozen}", wrong)
    if wrong and not allow_nonfinite:
        raise _refusal(folder, f"not finite as {np.dtype(dtype)} (allow_nonfinite=True reads them)", wrong)
    return model


def _existing(folder: Path) -> Path:
    if folder.is_dir():
        return folder
    if folder.exists():
        raise FormatError(f"{folder}: is a file; give the folder that has {CONFIG} and {WEIGHTS}")
    way_out = ""
    if not folder.is_absolute() and len(folder.parts) == 2:  # "meta-llama/Llama-3.2-1B"
        way_out = f", and entrenar downloads nothing: `hf download {folder} --local-dir {folder.name}` makes one"
    raise FormatError(f"{folder}: there is no such folder{way_out}")


def open_weights(folder: Path, opened: contextlib.ExitStack) -> dict[str, SafeTensors]:
    """Every tensor's name, with the file it is in; the files are closed with `opened`."""
    if (folder / WEIGHTS).is_file():
        file = opened.enter_context(SafeTensors(folder / WEIGHTS))
        return dict.fromkeys(file, file)
    if (folder / INDEX).is_file():
        return _open_shards(folder, opened)
    pickles = sorted(file.name for pattern in ("*.bin", "*.pth", "*.pt") for file in folder.glob(pattern))
    if pickles:
        raise FormatError(
            f"{folder}: has {pickles[0]}, a pickle, which can run any code and is never opened here, but no {WEIGHTS}; "
            "load it with transformers where you trust it, and save_pretrained() writes safetensors"
        )
    raise FormatError(f"{folder}: has neither {WEIGHTS} nor {INDEX}")


def _open_shards(folder: Path, opened: contextlib.ExitStack) -> dict[str, SafeTensors]:
    where = _read_index(folder / INDEX)
    names = sorted(set(where.values()))
    if missing := [f"{name} is missing" for name in names if not (folder / name).is_file()]:
        raise _refusal(folder, f"of {len(names)} files of weights", missing)
    files = {name: opened.enter_context(SafeTensors(folder / name)) for name in names}
    wrong = [f"{_shown(tensor)} is not in {file}" for tensor, file in where.items() if tensor not in files[file]]
    for name, file in files.items():
        extra = (tensor for tensor in file if where.get(tensor) != name and not COMPUTED.fullmatch(tensor))
        wrong += [
            f"{name} has {_shown(tensor)}, which the index puts in {where.get(tensor, 'no file')}" for tensor in extra
        ]
    if wrong:
        raise _refusal(folder / INDEX, "does not say what the files hold", wrong)
    return {tensor: files[file] for tensor, file in where.items()}


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name. (metadata.total_size is not compared: converters of tied models wrote wrong ones.)"""
    where = read_object(path, limit=INDEX_LIMIT).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise FormatError(f"{path}: weight_map = {short(where)}: wanted file names by tensor name")
    for tensor, file in where.items():
        if not isinstance(file, str) or Path(file).name != file or not SHARD.fullmatch(file):
            raise FormatError(
                f"{path}: weight_map puts {short(tensor)} in {short(file)}: wanted the plain name of a .safetensors "
                "file beside it"
            )
    return where


def check_size(folder: Path, config: LlamaConfig, files: Mapping[str, SafeTensors]) -> None:
    """Raise FormatError for a configuration far from the files' size, before anything of that size is made."""
    have = sum(file.entries[name].size for name, file in files.items())
    want = config.parameter_count()
    if config.num_hidden_layers > len(files) or want > 10 * have:
        raise FormatError(
            f"{folder}: {CONFIG} describes {config.num_hidden_layers:,} layers with {want:,} weights in all, the files "
            f"have {len(files):,} tensors with {have:,}: they do not belong together"
        )


def check_tensors(folder: Path, config: LlamaConfig, own: Mapping[str, Tensor], files: Mapping[str, SafeTensors],
                  states: Mapping[str, list[str]]) -> None:  # fmt: skip
    """Raise FormatError unless the files hold what the model has; what bitsandbytes stored in `states` is checked
    when it is read."""
    wrong = [f"missing {name} {own[name].shape}" for name in own if name not in files]
    read_later = {f"{name}.{part}" for name in states.keys() & own.keys() for part in states[name]} | states.keys()
    for name, file in files.items():
        entry = file.entries[name]
        if name in read_later:
            if name in own and len(own[name].shape) != 2:
                wrong.append(f"{name} {own[name].shape} is stored in 4 bits, which only a matrix can be")
        elif name not in own:
            wrong += _unexpected(entry, config, files)
        elif entry.shape != own[name].shape:
            wrong.append(f"{name} has shape {entry.shape}, wanted {own[name].shape}")
        elif entry.dtype not in safetensors.FLOATS:
            wrong.append(f"{name} has type {entry.dtype}, wanted one of {', '.join(safetensors.FLOATS)}")
    if wrong:
        raise _refusal(folder, f"the files do not hold the {len(own)} tensors {CONFIG} describes", wrong)


def _unexpected(entry: Entry, config: LlamaConfig, files: Mapping[str, SafeTensors]) -> list[str]:
    """What is wrong with a tensor the model does not have: nothing, where it says what is known anyway."""
    if COMPUTED.fullmatch(entry.name):
        return []
    if entry.name == HEAD and config.tie_word_embeddings and EMBEDDING in files:
        if np.array_equal(files[HEAD][HEAD], files[EMBEDDING][EMBEDDING], equal_nan=True):
            return []
        return [f"{HEAD} is not {EMBEDDING}, though {CONFIG} ties them; set tie_word_embeddings to false"]
    return [f"unexpected {_shown(entry.name)} {entry.shape}"]


def _fill(own: Mapping[str, Tensor], files: Mapping[str, SafeTensors]) -> Iterator[str]:
    """Give every parameter its values; yield those that are not all finite."""
    for name, tensor in own.items():
        tensor.data = np.empty(tensor.shape, tensor.dtype)
        lost = _copy(tensor.data.reshape(-1), files[name][name].reshape(-1))
        files[name].release(name)
        if lost:
            yield f"{name} in {lost:,} of its {tensor.size:,} values"


def _copy(out: np.ndarray, values: np.ndarray) -> int:
    """Convert `values` into `out`, both (N,); how many are not finite."""
    lost = 0
    for at in range(0, out.size, BLOCK):
        part, block = out[at : at + BLOCK], values[at : at + BLOCK]
        if part.dtype == np.float32 and block.dtype.name == "bfloat16":
            # The upper half of a float32; twenty times as fast as ml_dtypes' conversion
            np.left_shift(block.view(np.uint16), 16, out=part.view(np.uint32), dtype=np.uint32)
        else:
            with np.errstate(over="ignore", invalid="ignore"):  # counted below
                part[...] = block
        finite = np.isfinite(part)
        lost += 0 if finite.all() else int(part.size - np.count_nonzero(finite))
    return lost


def _shown(name: str) -> str:
    """A tensor's name as messages have it: an index may have any."""
    return name if name.isprintable() and len(name) <= 100 else short(name)


def _refusal(where: Path, what: str, wrong: list[str]) -> FormatError:
    more = [f"... and {len(wrong) - SHOWN:,} more"] if len(wrong) > SHOWN else []
    return FormatError("\n  ".join([f"{where}: {what}:", *wrong[:SHOWN], *more]))


# Writing


def save_pretrained(model: Llama, folder: str | Path, *, dtype: str = "float32", max_shard_size: int = 5 * 10**9,
                    tokenizer: Saveable | None = None) -> Path:  # fmt: skip
    """Write a model as a folder that transformers, and `from_pretrained`, load; all of it, or nothing.

    dtype            what the weights are stored as: float32, bfloat16 or float16. Those in a storage format stay in it:
                     nf4 and fp4 as bitsandbytes writes them, and `dtype` is what it is to compute them as
    max_shard_size   bytes of one file; a model with more is written as several, and an index
    tokenizer        its files are written too

    Raises FileExistsError where the folder is there and not empty, OSError where the disk refuses, ValueError for a
    weight too big for `dtype`; nothing is left behind then.
    """
    folder = Path(folder)
    check_new(folder)
    with new_folder(folder) as temporary:
        write_model(temporary, model, dtype=dtype, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save(temporary)
    return folder


def check_new(folder: Path) -> None:
    """Raise FileExistsError where a folder is not empty: before hours of writing."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists already and is not empty")


def write_model(folder: Path, model: Llama, *, dtype: str = "float32", max_shard_size: int = 5 * 10**9) -> None:
    """Write configuration and weights into a folder that is there; for use inside `files.new_folder`."""
    if dtype not in STORED:
        raise ValueError(f"save_pretrained: dtype = {dtype!r}: wanted one of {', '.join(STORED)}")
    if max_shard_size < 1:
        raise ValueError(f"save_pretrained: max_shard_size = {max_shard_size}: wanted at least 1 byte")
    model.refuse_adapters("save_pretrained")
    config = model.config.to_dict(dtype=dtype) | quantization_of(model, dtype)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id") if config[key] is not None}
    write_json(folder / CONFIG, config)
    write_json(folder / GENERATION, ids)
    write_shards(folder, groups_of(model, dtype), max_shard_size)


def write_shards(folder: Path, groups: Iterable[Group], limit: int) -> None:
    """Write weights as they come: a new file whenever the next would make one larger than `limit` bytes; an index
    where there are several."""
    parts: list[list[str]] = []  # the names in each file
    group, filled, size = Group({}, {}), 0, 0

    def write() -> None:
        safetensors.save(folder / f"{len(parts)}", group.arrays, {"format": "pt"}, dtype=group.words)
        parts.append(list(group.arrays))

    for each in groups:
        if group.arrays and filled + each.nbytes > limit:
            write()
            group, filled = Group({}, {}), 0
        group = Group(group.arrays | each.arrays, group.words | each.words)
        filled, size = filled + each.nbytes, size + each.nbytes
    write()
    if len(parts) == 1:
        (folder / "0").rename(folder / WEIGHTS)
        return
    files = [f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
    for i, file in enumerate(files):
        (folder / f"{i}").rename(folder / file)
    where = {name: file for file, names in zip(files, parts, strict=True) for name in names}
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))})


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
