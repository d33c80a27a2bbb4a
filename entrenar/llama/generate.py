"""Generation: one token at a time, each read once, its keys and values kept in a cache."""

# V vocabulary

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np

from entrenar import kernels
from entrenar.llama.model import KVCache, Llama
from entrenar.tensor import no_grad


def generate(model: Llama, ids: Sequence[int] | np.ndarray, *, max_new_tokens: int, temperature: float = 1.0,
             top_k: int = 0, top_p: float = 1.0, rng: np.random.Generator | None = None,
             stop: Collection[int] = (), use_cache: bool = True) -> Iterator[int]:  # fmt: skip
    """Yield tokens that continue `ids`, one by one, each drawn by `sample` from the model's prediction.

    Ends after `max_new_tokens`, after a token in `stop` (which is yielded), or when the model's context
    (max_position_embeddings) is full. `use_cache=False` reads everything again for each token: slower, same tokens.

    Raises ValueError for an empty prompt, or one that leaves no room in the context.
    """
    ids, limit = [int(i) for i in ids], model.config.max_position_embeddings
    if not ids:
        raise ValueError("generate: the prompt is empty; give at least one token")
    if len(ids) >= limit:
        raise ValueError(f"generate: a prompt of {len(ids)} tokens leaves no room in a context of {limit}")
    rng = np.random.default_rng(0) if rng is None else rng
    capacity = min(limit, len(ids) + max_new_tokens)
    cache = KVCache(model.config, capacity=capacity, dtype=model.head_weight.dtype) if use_cache else None
    unread = ids
    for _ in range(min(max_new_tokens, limit - len(ids))):
        with no_grad():  # not around the yield: the caller's code is not ours to switch off
            logits = _last_logits(model, unread, cache)
        token = sample(logits, rng, temperature=temperature, top_k=top_k, top_p=top_p)
        yield token
        if token in stop:
            return
        ids = [*ids, token]
        unread = [token] if use_cache else ids


def _last_logits(model: Llama, ids: Sequence[int], cache: KVCache | None) -> np.ndarray:
    last = model.hidden(np.array([ids]), cache).data[0, -1:]  # (1, C): the head reads one row, not all
    return kernels.matmul(last, model.head_weight.data.T)[0]


def sample(logits: np.ndarray, rng: np.random.Generator, *, temperature: float = 1.0, top_k: int = 0,
           top_p: float = 1.0) -> int:  # fmt: skip
    """One token from softmax(logits / temperature), logits (V,).

    temperature   0: the most probable token, always
    top_k         only the k most probable tokens; 0: all
    top_p         only the fewest tokens that together have probability top_p (Holtzman et al. 2020, nucleus sampling)

    Raises ValueError for a constant out of its range.
    """
    if not (temperature >= 0 and top_k >= 0 and 0 < top_p <= 1):
        raise ValueError(
            f"sample: temperature = {temperature}, top_k = {top_k}, top_p = {top_p}: "
            "wanted temperature >= 0, top_k >= 0, 0 < top_p <= 1"
        )
    if temperature == 0:
        return int(np.argmax(logits))
    order = np.argsort(-logits, kind="stable")  # most probable first
    scaled = logits[order].astype(np.float64) / temperature
    p = np.exp(scaled - scaled[0])
    p /= p.sum()
    if top_k:
        p[top_k:] = 0
    if top_p < 1:
        p[1:][np.cumsum(p)[:-1] >= top_p * p.sum()] = 0
    return int(order[rng.choice(len(p), p=p / p.sum())])
