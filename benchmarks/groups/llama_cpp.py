"""llama.cpp, through the bindings of llama-cpp-python: model files, and a case of writing text.

No rows: generation.py has them. `make bench` builds it into folders of their own within the peers' environment: once
for AVX2, once for the processor at hand, for what a build may use is fixed when it is compiled.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.arrays import fingerprint
from benchmarks.protocol import Case

CONTEXT = 512  # tokens there is room for
AT_ONCE = 512  # tokens, of a prompt: llama.cpp's own default
FORMATS = {"f16": "LLAMA_FTYPE_MOSTLY_F16", "q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0"}


def library() -> Any:
    """The bindings; ImportError where they are not built."""
    folder = Path(sys.prefix, "llama.cpp", build())
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    try:
        import llama_cpp
    except ImportError as error:
        raise ImportError(f"llama-cpp-python: {error} in {folder}; make bench builds it") from error
    return llama_cpp


def build() -> str:
    """The processor's own where it is built, and --isa does not ask for less."""
    own = "native" if Path(sys.prefix, "llama.cpp", "native").exists() else "avx2"
    return "avx2" if "ATEN_CPU_CAPABILITY" in os.environ else own


def version() -> str:
    return f"llama-cpp-python {library().__version__}, built for {build()}"


# -- model files


def write_gguf(base: str, path: str) -> None:
    """entrenar's export of a folder, in bfloat16. (A tokenizer has to be in it; no text is tokenized.)"""
    from entrenar.convert.gguf import export_gguf
    from entrenar.data import ByteTokenizer
    from entrenar.llama import Llama

    export_gguf(Llama.from_pretrained(base, storage="stored"), ByteTokenizer(), path, kind="bf16")


def quantize(source: str, path: str, kind: str, threads: int) -> None:
    """The same in another of its formats, by llama.cpp's own program."""
    lib = library()
    how = lib.llama_model_quantize_default_params()
    how.ftype, how.nthread = getattr(lib, FORMATS[kind]), threads
    if lib.llama_model_quantize(source.encode(), path.encode(), how):
        raise RuntimeError(f"llama_model_quantize failed: {source} to {kind}")


# -- the contender


class Text:
    """A model in memory and the tokens it has read."""

    def __init__(self, path: str, context: int, threads: int) -> None:
        self.lib = lib = library()
        lib.llama_backend_init()
        loading = lib.llama_model_default_params()
        loading.use_mmap, loading.n_gpu_layers = False, 0  # as everybody's weights: in the process' own memory
        self.model = lib.llama_model_load_from_file(path.encode(), loading)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        how = lib.llama_context_default_params()
        how.n_ctx, how.n_batch, how.n_ubatch = context, AT_ONCE, AT_ONCE
        how.n_threads = how.n_threads_batch = threads
        self.context = lib.llama_init_from_model(self.model, how)
        if not self.context:
            raise RuntimeError(f"llama.cpp cannot make a context of {context} tokens for {path}")
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))
        self.length = 0

    def read(self, tokens: np.ndarray) -> np.ndarray:
        """Logits (V,) after these tokens, which continue those before: a view of llama.cpp's own memory."""
        lib = self.lib
        ids = np.ascontiguousarray(tokens, np.int32)
        batch = lib.llama_batch_get_one(ids.ctypes.data_as(ctypes.POINTER(lib.llama_token)), len(ids))
        if status := lib.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode returned {status}")
        self.length += len(ids)
        return np.ctypeslib.as_array(lib.llama_get_logits_ith(self.context, -1), (self.vocabulary,))

    def forget(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        self.length = 0


@cache  # a model is loaded once, for writing and for reading, and stays
def text_of(path: str) -> Text:
    return Text(path, CONTEXT, int(os.environ["OMP_NUM_THREADS"]))


def writing(path: str, prompt: np.ndarray, tokens: int, longest: int) -> Case:
    """tokens = 1: the next token of a text, greedily; more: a prompt of so many."""
    text, ids = text_of(path), prompt
    assert len(prompt) + longest < CONTEXT

    def read() -> np.ndarray:
        text.forget()
        return text.read(prompt)

    def next_token() -> None:
        nonlocal ids
        if text.length > longest:
            text.forget()
            ids = prompt
        ids = text.read(ids).argmax(keepdims=True)

    last = fingerprint(read())
    text.forget()
    next_token()  # reads the prompt
    return Case(read if tokens > 1 else next_token, last)
