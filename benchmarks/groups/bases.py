"""What fine-tuning and decoding start from, on either side: a base in Hugging Face's layout, an adapter in PEFT's.

Written once, by entrenar, into a folder that every contender reads: the same bits. "bfloat16" is a base as people
download it: who wants it in 4 bits quantizes it while loading, as they do. "nf4" is one in bitsandbytes' files, the
layers of the blocks NF4 with scales in 8 bits, embedding and head bfloat16: no memory bears the marks of quantizing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.arrays import normal
from benchmarks.driver import Bench
from benchmarks.groups import step

# Like step.MODELS. The first is for trying the benchmarks out, the last is TinyLlama's shape.
MODELS: dict[str, dict[str, Any]] = {
    "tiny": step.MODELS["15m"]
    | dict(hidden_size=256, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512, vocab_size=512),
    "124m": step.MODELS["124m"],
    "1.1b": dict(
        hidden_size=2048,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        intermediate_size=5632,
        vocab_size=32000,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    ),
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
RANK = 16


@contextmanager
def written(bench: Bench, model: str, kind: str) -> Iterator[dict[str, str]]:
    """A temporary folder's base, "bfloat16" or "nf4", and adapter, as arguments for a case.

    Needs room on the disk: 0.8 GB for 1.1b in nf4, 2.2 GB in bfloat16.
    """
    with TemporaryDirectory() as folder:
        paths = {name: str(Path(folder, name)) for name in ("base", "adapter")}
        worker = bench.start("entrenar")
        try:
            worker.call("bases", "write", model=model, kind=kind, **paths)
        finally:
            worker.close()
        yield paths


# -- in entrenar's processes


def write(model: str, base: str, adapter: str, kind: str) -> None:
    """Draw weights, a matrix at a time; put them into folders, and an adapter of fresh weights beside them."""
    from entrenar.adapters import LoraConfig, adapt, save_adapter
    from entrenar.llama import Llama, LlamaConfig
    from entrenar.llama.packed import LAYER, place
    from entrenar.nn import unfilled
    from entrenar.quant import quantize
    from entrenar.tensor import Tensor

    with unfilled():
        llama = Llama(LlamaConfig(**MODELS[model]))
    for i, (name, tensor) in enumerate(list(llama.named_parameters())):
        if tensor.ndim == 1:
            place(llama, name, Tensor(np.ones(tensor.shape, np.float32)))
        else:
            weight = normal(i, *tensor.shape, scale=0.02)
            place(llama, name, quantize(weight, kind if LAYER.fullmatch(name) else "bfloat16"))
    llama.save_pretrained(base)
    adapt(llama, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS))
    save_adapter(llama, adapter)


def to_float32(llama: Any) -> None:
    """What is packed becomes the floats it stands for; frozen still."""
    from entrenar import kernels
    from entrenar.llama.packed import place
    from entrenar.tensor import Tensor

    for name, packed in list(llama.named_packed()):
        place(llama, name, Tensor(kernels.unpack(packed)))


def trainable(llama: Any) -> Any:
    """A model of the same floats, all of which are trained."""
    from entrenar.llama import Llama
    from entrenar.nn import unfilled

    with unfilled():
        made = Llama(llama.config)
    arrays = llama.state_dict()
    for name, tensor in made.named_parameters():
        tensor.data = arrays[name]
    return made


# -- in the peers' processes


def torch_model(base: str, compute: str, others: str, *, quantized: bool = False, portable: bool = False) -> Any:
    """transformers' model of the folder: layers in 4 bits compute as `compute`, the others are and compute `others`.

    quantized  a base of floats is to be in 4 bits, as ours would be
    portable   without the kernel that bitsandbytes has for processors with AVX-512 and bfloat16
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = {}
    if quantized:
        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, compute))  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(base, attn_implementation="sdpa", dtype=getattr(torch, others), **how)
    portable = portable or "ATEN_CPU_CAPABILITY" in os.environ  # --isa
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.compute_dtype = module.weight.quant_state.dtype = getattr(torch, compute)
            module.support_avx512bf16_for_cpu &= not portable
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(getattr(torch, others))
    return model
