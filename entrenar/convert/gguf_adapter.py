"""A LoRA adapter as a GGUF file, which llama.cpp puts on a model at run time: `llama-cli -m base.gguf --lora it.gguf`.

Only low-rank updates fit: DoRA and modules trained as a whole are refused; merged into the base they are a plain model.
"""

# r rank, I in, O out, V vocabulary, C hidden size

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np

from entrenar.adapters import adapter_config, adapter_tensors
from entrenar.adapters.layers import EMBEDDING_A, LowRank
from entrenar.adapters.model import adapted
from entrenar.convert import ConvertError
from entrenar.convert.gguf import gguf_name, turned
from entrenar.files import new_file
from entrenar.formats.gguf_writer import Tensor, write_gguf
from entrenar.llama import Llama, LlamaConfig

KINDS = {"f32": ("F32", 0), "f16": ("F16", 1)}


def export_gguf_adapter(model: Llama, path: str | Path, *, adapter: str = "default", kind: str = "f32",
                        name: str = "", replace: bool = False) -> Path:  # fmt: skip
    """Write an adapter of `model` as a GGUF file, which appears whole or not at all.

    kind   "f32" or "f16": the matrices' type
    name   general.name; default: the file's

    llama.cpp multiplies B A by alpha / r, with one alpha for the file: a layer's other scale (rsLoRA, alpha_pattern) is
    folded into its B. Raises ConvertError for what a GGUF adapter cannot hold, ValueError for an adapter the model does
    not have, FormatError for weights that are not finite or too large for the type, FileExistsError unless the file may
    be replaced, OSError where the disk refuses.
    """
    path = Path(path)
    if kind not in KINDS:
        raise ConvertError(f"export_gguf_adapter: kind = {kind!r}: wanted {', '.join(KINDS)}")
    config = adapter_config(model, adapter)
    _refuse_what_does_not_fit(model, adapter)
    alpha = config.scale(config.r, config.lora_alpha) * config.r  # alpha, or alpha sqrt(r)
    tensors = [t for path_, layer in adapted(model) for t in _pair(path_, layer, adapter, alpha, model.config, kind)]
    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "general.type": "adapter",
        "general.name": name or path.stem,
        "general.file_type": KINDS[kind][1],
        "adapter.type": "lora",
        "adapter.lora.alpha": float(alpha),
    }
    with new_file(path, replace=replace) as file:
        write_gguf(file, metadata, tensors)
    return path


def _refuse_what_does_not_fit(model: Llama, adapter: str) -> None:
    wrong = []
    if adapter_config(model, adapter).use_dora:
        wrong.append("it is DoRA, whose magnitudes have no place there")
    whole = sorted({key.rpartition(".")[0] for key in adapter_tensors(model, adapter) if "lora_" not in key})
    if whole:
        wrong.append(f"{', '.join(whole[:3])} {'is' if len(whole) == 1 else 'are'} trained as a whole")
    if wrong:
        raise ConvertError(
            f"adapter {adapter}: does not fit a GGUF adapter: {'; '.join(wrong)}; "
            "merge it into the base and export the merged model"
        )


def _pair(path: str, layer: Any, adapter: str, alpha: float, config: LlamaConfig, kind: str) -> list[Tensor]:
    """The two tensors of a layer; none where the adapter leaves it alone."""
    if not isinstance(layer, LowRank) or adapter not in layer.settings:
        return []
    (a, b), how = (factor.data for factor in layer.factors(adapter)), layer.settings[adapter]
    a = a.T if EMBEDDING_A in dict(layer.tensors(adapter)) else a  # (V, r): rows are looked up
    ratio = how.scale * how.r / alpha
    stem = f"{gguf_name(path)}.weight"
    return [
        Tensor(f"{stem}.lora_a", a.shape, KINDS[kind][0], functools.partial(np.asarray, a)),
        Tensor(f"{stem}.lora_b", b.shape, KINDS[kind][0], functools.partial(_folded, b, path, config, ratio)),
    ]


def _folded(b: np.ndarray, path: str, config: LlamaConfig, ratio: float) -> np.ndarray:
    b = turned(b, path, config)
    return b if abs(ratio - 1) < 1e-12 else b * ratio
