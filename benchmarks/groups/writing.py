"""Writing text, a token at a time or a prompt at once, as decode.py and generation.py time it: our model and
transformers', on the same prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from benchmarks.arrays import agree, fingerprint, integers
from benchmarks.driver import Times
from benchmarks.groups import bases
from benchmarks.protocol import Case

PROMPT = 16  # tokens before the first that is timed
LONGEST = 128  # tokens until the text begins anew: attention costs next to nothing all the way
FEW_ROUNDS = 3
TOLERANCE_BFLOAT16 = 0.1  # of the logits' length: bfloat16 has 8 binary digits, and errors add up over the layers


# -- contenders


def prompt_of(model: str, tokens: int) -> np.ndarray:
    """What comes before the text (tokens = 1), or is read at once (more)."""
    return integers(1, bases.MODELS[model]["vocab_size"], max(tokens, PROMPT))


def ours(llama: Any, prompt: np.ndarray, tokens: int) -> Case:
    """tokens = 1: the next token of a text; more: a prompt of so many."""
    from entrenar.llama import generate
    from entrenar.llama.model import KVCache
    from entrenar.tensor import no_grad

    def read() -> np.ndarray:
        with no_grad():
            cache = KVCache(llama.config, capacity=len(prompt))
            return llama.logits(llama.hidden(prompt[None], cache)[:, -1:]).data[0, -1]

    def texts() -> Iterator[int]:
        while True:
            yield from generate(llama, prompt, max_new_tokens=LONGEST, temperature=0)

    last, text = read(), texts()
    next(text)  # reads the prompt
    return Case(read if tokens > 1 else partial(next, text), fingerprint(last))


def of_torch(llama: Any, first: np.ndarray, tokens: int) -> Case:
    """What `generate` does for each token, without what it does around: the model, its cache, the best token."""
    import torch
    from transformers import DynamicCache

    prompt = torch.from_numpy(first)[None]
    cache, ids = DynamicCache(), prompt

    def read() -> torch.Tensor:
        with torch.inference_mode():
            return llama(prompt, past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1).logits[0, -1]

    def next_token() -> None:
        nonlocal cache, ids
        if cache.get_seq_length() > LONGEST:
            cache, ids = DynamicCache(), prompt
        with torch.inference_mode():
            logits = llama(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        ids = logits[:, -1:].argmax(-1)

    last = read().float().numpy()
    next_token()  # reads the prompt
    return Case(read if tokens > 1 else next_token, fingerprint(last))


# -- the driver's side


def within(tolerance: float, a: list[float], b: list[float]) -> bool:
    return agree(a, b, tolerance=tolerance)


def fastest(times: Times, names: Sequence[str]) -> str | None:
    return min((name for name in names if name in times.seconds), key=lambda name: times.of(name).median, default=None)
