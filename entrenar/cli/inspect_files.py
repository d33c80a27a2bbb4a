"""The kinds of files `entrenar inspect` knows, by their first bytes: each read by the reader of its format."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from entrenar.cli.found import Found
from entrenar.cli.tensors import BLOCK, Weight, blocks_of
from entrenar.formats import FormatError, open_regular

PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # torch.save's, new and old


def look_at_file(path: Path) -> Found:
    from entrenar.data import tokenfile
    from entrenar.formats.gguf import MAGIC

    file, size = open_regular(path)
    with file:
        first = file.read(16)
    if not first:
        raise FormatError(f"{path}: is empty")
    kinds: list[tuple[bool, Callable[[Path], Found]]] = [
        (first.startswith(MAGIC), gguf_file),
        (first.startswith(tokenfile.MAGIC), token_file),
        (path.suffix == ".safetensors" or first[8:9] == b"{", safetensors_file),
        (path.suffix == ".model", tokenizer_file),
        (path.suffix == ".json", json_file),
        (path.suffix == ".bin" and not first.startswith(PICKLES), llama2c_file),
    ]
    for fits, reader in kinds:
        if fits:
            found = reader(path)
            found.facts = {"bytes": size, **found.facts}
            return found
    if first.startswith(PICKLES):
        raise FormatError(f"{path}: looks like a pickle, which runs code when it is opened; entrenar reads none: "
                          "let the program that wrote it save safetensors")  # fmt: skip
    raise FormatError(f"{path}: begins with {first[:8]!r}, which is none of: safetensors, GGUF, a token file, "
                      "llama2.c's .bin, tokenizer.json, tokenizer.model")  # fmt: skip


def safetensors_file(path: Path) -> Found:
    from entrenar.cli.inspect_adapters import four_bits
    from entrenar.formats.safetensors import SafeTensors

    file = SafeTensors(path)

    def blocks(name: str) -> Callable[[], Iterator[np.ndarray]]:
        def read() -> Iterator[np.ndarray]:
            yield from blocks_of(file[name])
            file.release(name)

        return read

    packed = four_bits(file)
    parts = {part: name for name, (_, names) in packed.items() for part in names}
    weights = [
        packed[e.name][0] if e.name in packed else Weight(e.name, e.shape, e.dtype, e.nbytes, blocks(e.name))
        for e in in_order(file.entries.values())
        if parts.get(e.name, e.name) == e.name
    ]
    return Found("safetensors", path, {f"metadata {name}": text for name, text in file.metadata.items()}, weights)


def in_order(entries: Iterable[Any]) -> list[Any]:
    """By name, layer 2 before layer 10."""

    def key(entry: Any) -> list[tuple[int, int, str]]:
        parts = entry.name.split(".")
        return [(0, int(part), "") if part.isdecimal() and len(part) < 10 else (1, 0, part) for part in parts]

    return sorted(entries, key=key)


def gguf_file(path: Path) -> Found:
    from entrenar.formats.gguf import GGUF, PLAIN, dequantize_q8_0

    file = GGUF(path)
    block, nbytes = 32, 34  # of Q8_0: numbers, and the bytes they take

    def quantized(name: str) -> Iterator[np.ndarray]:
        raw, step = file.raw(name), BLOCK // block * nbytes
        for start in range(0, len(raw), step):
            yield dequantize_q8_0(raw[start : start + step])

    def reader(name: str, dtype: str) -> Callable[[], Iterator[np.ndarray]] | None:
        if dtype == "Q8_0":
            return lambda: quantized(name)
        return (lambda: blocks_of(file[name])) if dtype in PLAIN or dtype == "BF16" else None

    weights = [Weight(e.name, e.shape, e.dtype, e.nbytes, reader(e.name, e.dtype)) for e in file.entries.values()]
    about = {"version": file.header.version, "alignment": file.header.alignment}
    return Found("GGUF", path, about | {key: plain(value) for key, value in file.metadata.items()}, weights)


def plain(value: Any) -> Any:
    """A value as JSON has it; of long lists the beginning."""
    if isinstance(value, (list, np.ndarray)):
        first = [plain(x) for x in list(value[:4])]
        shown = json.dumps(first, ensure_ascii=False)[1:-1]
        return first if len(value) <= 4 else f"{len(value):,} entries: {shown}, ..."
    value = value.item() if isinstance(value, np.generic) else value
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def llama2c_file(path: Path) -> Found:
    from entrenar.convert.llama2c import read_header

    header, data = read_header(path), np.memmap(path, np.uint8, "r")
    weights, at = [], header.start
    for name, shape, layers in header.shapes():
        for layer in range(layers):
            raw = data[at : at + header.nbytes(shape)]
            at += len(raw)
            group = header.group if len(shape) == 2 else 0
            weights.append(Weight(f"layers.{layer}.{name}" if layers > 1 else name, shape, "Q8" if group else "F32",
                                  len(raw), partial(llama2c_blocks, raw, group)))  # fmt: skip
    return Found("llama2.c", path, dict(vars(header)), weights)


def llama2c_blocks(raw: np.ndarray, group: int) -> Iterator[np.ndarray]:
    """Numbers of a llama2.c array: float32; or, where there are groups, int8 and then a float32 scale per group."""
    if not group:
        yield from blocks_of(raw.view("<f4"))
        return
    size = len(raw) // (group + 4) * group
    q, scales, step = raw[:size].view(np.int8).reshape(-1, group), raw[size:], max(1, BLOCK // group)
    for start in range(0, len(q), step):
        scale = np.frombuffer(scales[4 * start : 4 * (start + step)].tobytes(), "<f4")
        yield q[start : start + step] * scale[:, None]


def token_file(path: Path) -> Found:
    from entrenar.data import tokenfile

    header = tokenfile.read_header(path)
    found = Found("prepared tokens", path, {**vars(header), "dtype": header.dtype.name})
    try:
        tokenfile.open_tokens(path)
        found.facts["check"] = f"hash and all {header.count:,} tokens are right"
    except FormatError as error:
        found.problems.append(str(error).removeprefix(f"{path}: "))
    return found


def tokenizer_file(path: Path) -> Found:
    from entrenar.data import load_tokenizer

    tokenizer = load_tokenizer(path)
    end = tokenizer.decode([tokenizer.end_id])
    about = {"kind": tokenizer.kind, "tokens": tokenizer.vocab_size, "end token": f"{tokenizer.end_id} {end!r}"}
    return Found("tokenizer", path, about)


def json_file(path: Path) -> Found:
    from entrenar.formats.strict_json import read_object

    if path.name == "tokenizer.json":
        return tokenizer_file(path)
    content = read_object(path)
    if isinstance(content.get("weight_map"), dict):
        raise FormatError(f"{path}: the index of a model in several files; give the folder it lies in")
    if "peft_type" in content:
        raise FormatError(f"{path}: the configuration of an adapter; give the folder it lies in")
    if "model_type" in content:
        return Found("model configuration", path, content)
    raise FormatError(f"{path}: JSON, but no tokenizer.json and no model's config.json")
