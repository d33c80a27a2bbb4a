"""A folder in Hugging Face's layout into one that bitsandbytes quantized, or one in bfloat16, weight by weight: neither
the model nor the result is ever in memory as a whole."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from entrenar.files import new_folder
from entrenar.formats import FormatError
from entrenar.formats.safetensors import SafeTensors
from entrenar.kernels.packed import TABLES, Packed
from entrenar.llama.config import LlamaConfig
from entrenar.llama.model import Llama
from entrenar.llama.packed import LAYER, STORED, Group, group_of
from entrenar.llama.pretrained import (
    CONFIG,
    GENERATION,
    check_new,
    check_size,
    check_tensors,
    config_values,
    open_weights,
    write_json,
    write_shards,
)
from entrenar.nn import unfilled
from entrenar.quant import bitsandbytes, quantize

BESIDE = ("*.jinja", "additional_chat_templates/*.jinja", "tokenizer*", "special_tokens_map.json",
          "added_tokens.json", "vocab.json", "merges.txt", "chat_template.json", GENERATION)  # fmt: skip
SHARD = 500 * 10**6  # bytes of a file of the result, which is in memory until it is written
Progress = Callable[[int, int], None]
Look = Callable[[str, np.ndarray, Packed], None]


def quantize_folder(folder: str | Path, out: str | Path, kind: str = "nf4", *, block: int = 64,
                    double_quant: bool = True, max_shard_size: int = SHARD,
                    progress: Progress = lambda done, total: None,
                    look: Look = lambda name, array, packed: None) -> Path:  # fmt: skip
    """Write the model in `folder` as `out`, the layers of its blocks in 4 bits; all of it, or nothing.

    kind             "nf4" or "fp4"; or "bfloat16": all of it, not the layers alone
    block            values that share a scale
    double_quant     the scales in 8 bits
    max_shard_size   bytes of one file of the result: so much is held in memory, and one weight
    progress         is told after each weight how many values are done, and how many there are
    look             is shown each weight that is packed, before and after

    Everything else stays as the file has it; configuration and tokenizer are copied. Raises FormatError for a model
    that cannot be read, or is quantized already, QuantizeError for weights that are not finite, FileExistsError where
    `out` is there and not empty, OSError where the disk refuses.
    """
    folder, out = Path(folder), Path(out)
    if kind not in (*TABLES, "bfloat16"):
        raise ValueError(f"quantize_folder: kind = {kind!r}: wanted {' or '.join((*TABLES, 'bfloat16'))}")
    check_new(out)
    values = config_values(folder)
    config = LlamaConfig.from_dict(values, where=str(folder / CONFIG))
    if "quantization_config" in values and values["quantization_config"] is not None:
        raise FormatError(f"{folder}: is quantized already (quantization_config in {CONFIG}); give the original")
    with contextlib.ExitStack() as opened:
        files = open_weights(folder, opened)
        check_size(folder, config, files)
        with unfilled():
            own = dict(Llama(config).named_parameters())
        check_tensors(folder, config, own, files, {})
        temporary = opened.enter_context(new_folder(out))
        groups = _groups({name: files[name] for name in own}, kind, block, double_quant, progress, look)
        write_shards(temporary, groups, max_shard_size)
        write_json(temporary / CONFIG, values | _said(values, kind, double_quant))
        for file in sorted({file for pattern in BESIDE for file in folder.glob(pattern) if file.is_file()}):
            target = temporary / file.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
    return out


def _groups(files: Mapping[str, SafeTensors], kind: str, block: int, double_quant: bool,
            progress: Progress, look: Look) -> Iterator[Group]:  # fmt: skip
    """Each weight as it is to be written. What was read of the files is let go again and again: what stays as it is
    will be read only when it is written."""
    total, done = sum(file.entries[name].size for name, file in files.items()), 0
    as_they_are: list[str] = []
    for name, file in files.items():
        array = file[name]
        if kind == "bfloat16" and array.ndim == 2:
            packed = quantize(array, kind, name=name)
            look(name, array, packed)
            file.release(name)
            yield group_of(name, packed, kind)
        elif kind == "bfloat16":
            yield Group({name: array}, {name: STORED[kind]})
            as_they_are.append(name)
        elif LAYER.fullmatch(name):
            packed = quantize(array, kind, block=block, double_quant=double_quant, name=name)
            look(name, array, packed)
            dtype = array.dtype.name if array.dtype.name in STORED else "float32"
            file.release(name)
            yield Group(bitsandbytes.parts(name, packed, dtype=dtype), {})
        else:
            yield Group({name: array}, {})
            as_they_are.append(name)
        for each in as_they_are:
            files[each].release(each)
        done += array.size
        progress(done, total)


def _said(values: Mapping[str, Any], kind: str, double_quant: bool) -> dict[str, Any]:
    """What config.json says of the weights."""
    if kind == "bfloat16":
        return {"torch_dtype": kind} | ({"dtype": kind} if "dtype" in values else {})
    return {"quantization_config": bitsandbytes.config(kind, double_quant=double_quant, dtype=_compute_dtype(values))}


def _compute_dtype(values: Mapping[str, Any]) -> str:
    """What the model was stored as, and so what bitsandbytes is to compute in."""
    word = values.get("torch_dtype", values.get("dtype"))
    return word if isinstance(word, str) and word in STORED else "float32"
