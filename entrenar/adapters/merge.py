"""A base and its adapter made one plain model: W' = W + scale B A, written as a folder in Hugging Face's layout.

One matrix at a time: the base may be in any storage format, and neither it nor the result is ever whole as floats.
Storing W' rounds it. Where that would round the update away - to the code of four bits, say, that W had - merging is
refused with the numbers; and what is written is read again and compared with base and adapter on held-out text.
"""

# T tokens, V vocabulary, O out, I in

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from entrenar import kernels
from entrenar.adapters.files import load_adapter
from entrenar.adapters.layers import Adapted, LoRAEmbedding, LowRank
from entrenar.adapters.matching import walk
from entrenar.adapters.model import active_adapter, adapter_config, adapter_names, remove_adapter, use_adapter
from entrenar.files import new_folder
from entrenar.formats import safetensors
from entrenar.kernels.packed import TABLES, Packed
from entrenar.llama import Llama, LlamaConfig
from entrenar.llama.packed import HEAD, LAYER, STORED, Group, group_of
from entrenar.llama.pretrained import CONFIG, GENERATION, check_new, write_json, write_shards
from entrenar.llama.quantizing import BESIDE, SHARD
from entrenar.ops.low_rank import row_squares
from entrenar.quant import bitsandbytes, quantize
from entrenar.tensor import Tensor, no_grad

KEPT = 0.5  # of the update: less, and it counts as erased
BLOCK = 1 << 20  # elements of a matrix that are compared at a time
TOKENS = 512  # of the held-out text that are compared
WORST = 5  # matrices named where merging is refused


Rows = Callable[[slice], np.ndarray]


class Erased(ValueError):
    """Storing the merged weights this way would round the update away; `force` does it all the same."""


@dataclass(frozen=True)
class Proof:
    """What a merged model is, against base + adapter, over some tokens of held-out text.

    max_logit_difference   the greatest |difference| of two logits
    kl                     mean KL(base + adapter || merged) of a token, in nats
    kept                   how much of the update is left after rounding to the stored type: 1 all, 0 nothing
    """

    max_logit_difference: float
    kl: float
    tokens: int
    kept: float

    def __str__(self) -> str:
        return (
            f"merged against base + adapter over {self.tokens:,} held-out tokens: "
            f"max |logit difference| {self.max_logit_difference:.2e}, KL {self.kl:.2e} nats a token, "
            f"{100 * self.kept:.1f} % of the update kept"
        )


@dataclass
class _Rounding:
    """What rounding leaves of the update D of each matrix: the part of Q(W + D) - Q(W) that goes along D."""

    along: float = 0.0
    whole: float = 0.0
    worst: list[tuple[float, float, str]] = dataclasses.field(default_factory=list)

    def add(self, name: str, w: np.ndarray, merged: np.ndarray, q_w: Rows, q_merged: Rows) -> None:
        """w W, merged W + D, both (O, I); q_w and q_merged give rows of what is read again of each: Q(W), Q(W + D)"""
        whole = along = length = 0.0
        step = max(1, BLOCK // max(1, w.shape[1]))
        for at in range(0, len(w), step):
            rows = slice(at, min(at + step, len(w)))
            update, moved = merged[rows] - w[rows], q_merged(rows) - q_w(rows)
            whole += float(np.vdot(update, update))
            along += float(np.vdot(moved, update))
            length += float(np.vdot(moved, moved))
        if whole:
            cosine = along / math.sqrt(length * whole) if length else 0.0
            self.worst = sorted([*self.worst, (along / whole, cosine, name)])[:WORST]
        self.along, self.whole = self.along + along, self.whole + whole

    @property
    def kept(self) -> float:
        return self.along / self.whole if self.whole else 1.0


def merge_adapter(base: Llama | str | Path, adapter: str | Path, out: str | Path, *, held_out: np.ndarray,
                  dtype: str | None = None, storage: str | None = None, force: bool = False,
                  beside: str | Path | None = None, max_shard_size: int = SHARD,
                  report: Callable[[str], None] = lambda text: None) -> Proof:  # fmt: skip
    """Write base and adapter as one plain model, all of it or nothing, and prove that it is the same.

    base       a model, or the folder of one (read as it is stored)
    adapter    the name of one the model has, or an adapter's folder
    held_out   tokens (N,) or (B, T) that neither was trained on, the first 512 of which are compared
    dtype      float32, bfloat16 or float16; None: as the base is stored, bfloat16 for one in 4 or 8 bits
    storage    "nf4" or "fp4": the layers of the blocks in 4 bits again, as bitsandbytes stores them
    force      write it even where rounding erases the update
    beside     the folder whose tokenizer is copied; the base's, where that is one
    report     is told what is being done

    The model stays as it is, with its adapters. Besides it, the merged one is in memory while they are compared.
    Raises Erased (a ValueError) where less than half of the update would be left; FileExistsError, FormatError, OSError
    and ValueError as `load_adapter` and `save_pretrained` do.
    """
    out, source = Path(out), Path(base) if not isinstance(base, Llama) else None
    check_new(out)
    if storage is not None and storage not in TABLES:
        raise ValueError(f"merge_adapter: storage = {storage!r}: wanted {' or '.join(TABLES)}, or None")
    if dtype is not None and dtype not in STORED:
        raise ValueError(f"merge_adapter: dtype = {dtype!r}: wanted one of {', '.join(STORED)}, or None")
    if isinstance(base, Llama):
        model = base
    else:
        report(f"reading {base}")
        model = Llama.from_pretrained(base, storage="stored")
    rows = _rows(held_out, model.config.max_position_embeddings)
    dtype = dtype or _usual_dtype(model)
    with _in_use(model, adapter) as name:
        report(f"merging {adapter} as {storage or dtype}")
        rounding = _write(model, name, out, dtype, storage, force, beside or source, max_shard_size)
        report(f"comparing over {sum(map(len, rows)):,} tokens")
        difference, kl, tokens = compare(model, Llama.from_pretrained(out, storage="stored"), rows)
    proof = Proof(difference, kl, tokens, rounding.kept)
    report(str(proof))
    return proof


def merged(model: Llama, name: str = "default") -> Iterator[tuple[str, np.ndarray | Packed]]:
    """(Hugging Face's name, values) of the plain model that base and adapter make, one tensor after the other.

    What the adapter leaves alone is the base's own array, in its storage format; all else is new, float.
    A tied head comes as a matrix of its own where the embedding is adapted: it is the base's (see `merged_config`).
    """
    adapter_config(model, name)
    for path, module in walk(model):
        base: Any = module.base_layer if isinstance(module, Adapted) else module
        if isinstance(module, Adapted) and name in module.modules_to_save:
            base = module.modules_to_save[name]
        for key, value in vars(base).items():
            if not isinstance(value, (Tensor, Packed)):
                continue
            if key == "weight" and isinstance(module, LowRank) and name in module.settings:
                yield f"{path}.{key}", merged_weight(module, name)
            else:
                yield f"{path}.{key}", value if isinstance(value, Packed) else value.data
    if model.config.tie_word_embeddings and not merged_config(model, name).tie_word_embeddings:
        head = model.head_weight
        yield HEAD, head if isinstance(head, Packed) else head.data


def merged_config(model: Llama, name: str = "default") -> LlamaConfig:
    """The configuration of the merged model: an adapted embedding is no longer the head too."""
    layer = model.model.embed_tokens
    apart = isinstance(layer, Adapted) and name in layer.names()
    return dataclasses.replace(model.config, tie_word_embeddings=False) if apart else model.config


def merged_weight(layer: LowRank, name: str) -> np.ndarray:
    """W + scale B A, or m (W + scale B A) / ||W + scale B A||, as new floats."""
    w, scale = _floats(layer.base_layer.weight), layer.settings[name].scale
    a, b = (factor.data for factor in layer.factors(name))
    on_its_side = isinstance(layer, LoRAEmbedding)  # W (V, C), A (r, V), B (C, r)
    if on_its_side:
        kernels.matmul_add(w, a.T, (b * scale).T)
    else:
        kernels.matmul_add(w, b * scale, a)
    if layer.settings[name].dora:
        norm = np.sqrt(np.maximum(row_squares(w, axis=0 if on_its_side else 1), np.finfo(np.float32).tiny))
        g = (layer.lora_magnitude_vector[name].weight.data / norm).astype(w.dtype)
        w *= g if on_its_side else g[:, None]
    return w


def compare(model: Llama, other: Llama, rows: list[np.ndarray]) -> tuple[float, float, int]:
    """(greatest |difference| of two logits, mean KL(model || other) in nats, number of tokens), in float64."""
    greatest = total = 0.0
    for ids in rows:
        with no_grad():
            ours, theirs = (m(ids[None]).data[0].astype(np.float64) for m in (model, other))  # (T, V)
        greatest = max(greatest, float(np.abs(ours - theirs).max()))
        p, q = (z - _log_sum_exp(z) for z in (ours, theirs))
        total += float((np.exp(p) * (p - q)).sum())
    tokens = sum(map(len, rows))
    return greatest, max(total, 0.0) / tokens, tokens


def _log_sum_exp(z: np.ndarray) -> np.ndarray:
    top = z.max(axis=1, keepdims=True)
    return top + np.log(np.exp(z - top).sum(axis=1, keepdims=True))


def _write(model: Llama, name: str, out: Path, dtype: str, storage: str | None, force: bool, beside: str | Path | None,
           max_shard_size: int) -> _Rounding:  # fmt: skip
    rounding, config = _Rounding(), merged_config(model, name)
    values = config.to_dict(dtype=dtype)
    if storage is not None:
        values["quantization_config"] = bitsandbytes.config(storage, double_quant=True, dtype=dtype)
    with new_folder(out) as folder:
        write_json(folder / CONFIG, values)
        ids = {key: values[key] for key in ("bos_token_id", "eos_token_id") if values[key] is not None}
        write_json(folder / GENERATION, ids)
        write_shards(folder, _groups(model, name, dtype, storage, rounding), max_shard_size)
        if rounding.kept < KEPT and not force:
            raise Erased(_refusal(rounding, storage or dtype))
        if beside is not None:
            for file in sorted({file for pattern in BESIDE for file in Path(beside).glob(pattern) if file.is_file()}):
                shutil.copyfile(file, folder / file.name)
    return rounding


def _groups(model: Llama, name: str, dtype: str, storage: str | None, rounding: _Rounding) -> Iterator[Group]:
    """Each weight as it is to be written; `rounding` learns what becomes of the update of each matrix."""
    own = {f"{path}.weight": layer.base_layer.weight for path, layer in walk(model) if isinstance(layer, Adapted)
           and name in layer.names()}  # fmt: skip
    for key, array in merged(model, name):
        kind = storage if storage is not None and LAYER.fullmatch(key) else None
        stored, rounded = _stored(key, array, kind, dtype)
        if key in own and isinstance(array, np.ndarray) and not np.isfinite(array).all():
            raise ValueError(f"merge: {key}: base and adapter make values that are not finite; nothing is written")
        if key in own and own[key].ndim == 2 and isinstance(array, np.ndarray):
            before = _floats(own[key])
            rounding.add(key, before, array, _stored(key, before, kind, dtype)[1], rounded)
        yield group_of(key, stored, dtype)


def _stored(key: str, array: np.ndarray | Packed, kind: str | None, dtype: str) -> tuple[Tensor | Packed, Rows]:
    """(what is written of a weight, and rows of what it is when it is read again)"""
    if kind is not None:
        packed = array if isinstance(array, Packed) and array.kind == kind else quantize(_floats(array), kind, name=key)
        return packed, lambda rows: kernels.unpack_rows(np.arange(rows.start, rows.stop), packed)
    values = _floats(array) if isinstance(array, Packed) else array
    word = safetensors.numpy_dtype(STORED[dtype])
    return Tensor(values), lambda rows: _rounded(values[rows], word)


def _rounded(values: np.ndarray, word: np.dtype[Any]) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):  # too big for it: the writer says so
        return np.nan_to_num(values.astype(word).astype(values.dtype))


def _floats(weight: Any) -> np.ndarray:
    """A weight as floats of its own."""
    if isinstance(weight, Packed):
        return kernels.unpack(weight)
    return np.array(weight.data if isinstance(weight, Tensor) else weight)


def _refusal(rounding: _Rounding, stored: str) -> str:
    lines = [f"{name}: {100 * share:.0f} % (cosine {cosine:.2f})" for share, cosine, name in rounding.worst]
    better = "dtype='float32', or bfloat16" if stored in TABLES else "dtype='float32'"
    return "\n  ".join([
        f"merge: stored as {stored}, {100 * rounding.kept:.0f} % of the update would be left, the rest rounded away "
        f"(at least {100 * KEPT:.0f} % are wanted). Store it as {better}, or keep the adapter beside the base; "
        "force=True writes it all the same. The worst:",
        *lines,
    ])  # fmt: skip


def _usual_dtype(model: Llama) -> str:
    """float32 for a base that is; bfloat16 for one in any storage format."""
    return "bfloat16" if any(True for _ in model.named_packed()) else "float32"


@contextlib.contextmanager
def _in_use(model: Llama, adapter: str | Path) -> Iterator[str]:
    """Inside, the adapter is the model's active one: one it has, or a folder's for as long; its name there."""
    known, before = adapter_names(model), active_adapter(model)
    name = str(adapter)
    if name not in known:
        name = next(free for i in range(len(known) + 1) if (free := f"merge-{i}") not in known)
        load_adapter(model, adapter, name)
    use_adapter(model, name)
    try:
        yield name
    finally:
        if name not in known:
            remove_adapter(model, name)
        use_adapter(model, before)


def _rows(held_out: np.ndarray, context: int) -> list[np.ndarray]:
    """Rows of at most `context` tokens, and of at most TOKENS in all."""
    ids = np.asarray(held_out)
    if ids.ndim not in (1, 2) or ids.dtype.kind not in "iu" or not ids.size:
        raise ValueError(f"merge_adapter: held_out: wanted tokens (N,) or (B, T), got {ids.dtype} {ids.shape}")
    rows, left = [], TOKENS
    for row in ids[None] if ids.ndim == 1 else ids:
        if left > 0:
            rows.append(row[: min(left, context)])
            left -= len(rows[-1])
    return rows
