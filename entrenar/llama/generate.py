"""Generation: one token at a time, each read once, its keys and values kept in a cache.

A `Reader` keeps them from one text to the next, too: of a conversation only what is new is read. Knows tokens only:
text, stop strings and streaming are cli/writing.py's.
"""

# V vocabulary

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from entrenar.llama.model import KVCache, Llama
from entrenar.tensor import no_grad


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from logits z (V,), in this order: transformers' (llama.cpp's temperature comes last).

    repetition_penalty  of tokens that are in the text already: z / r where z > 0, z * r elsewhere; 1: none
                        (Keskar et al. 2019, "CTRL")
    temperature         p = softmax(z / temperature); 0: the most probable token, always
    top_k               only the k most probable tokens; 0: all
    top_p               only the fewest that together have probability top_p (Holtzman et al. 2020, nucleus sampling)
    min_p               only those with p >= min_p * max p (Nguyen et al. 2024); 0: all

    Each filter sees what the ones before it left, as probabilities that sum to 1; the most probable token always
    stays, and of equally probable ones those of lower id come first.

    Raises ValueError with every field that is out of its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if wrong := list(self._problems()):
            raise ValueError("sampling: " + "; ".join(wrong))

    def _problems(self) -> Iterator[str]:
        if not 0 <= self.temperature < math.inf:
            yield f"temperature = {self.temperature!r}: wanted a finite number of at least 0"
        if not _is_whole(self.top_k) or self.top_k < 0:
            yield f"top_k = {self.top_k!r}: wanted a whole number of at least 0 (0: all tokens)"
        if not 0 < self.top_p <= 1:
            yield f"top_p = {self.top_p!r}: wanted a number above 0, at most 1"
        if not 0 <= self.min_p <= 1:
            yield f"min_p = {self.min_p!r}: wanted a number from 0 to 1"
        if not 0 < self.repetition_penalty < math.inf:
            yield f"repetition_penalty = {self.repetition_penalty!r}: wanted a finite number above 0 (1: none)"


def generate(model: Llama, ids: Sequence[int] | np.ndarray, *, max_new_tokens: int, temperature: float = 1.0,
             top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, repetition_penalty: float = 1.0,
             rng: np.random.Generator | None = None, stop: Collection[int] = (), use_cache: bool = True,
             reader: Reader | None = None) -> Iterator[int]:  # fmt: skip
    """Yield tokens that continue `ids`, one by one, each chosen from the model's prediction as `Sampling` says.

    Ends after `max_new_tokens`, after a token in `stop` (which is yielded), or when the model's context
    (max_position_embeddings) is full. `use_cache=False` reads everything again for each token: slower, same tokens.
    A `reader` of this model reads no more of `ids` than differs from what it read before.

    Raises ValueError, at once, for a setting out of its range and for a prompt that is empty, has an id that is not
    in the vocabulary, or leaves no room in the context.
    """
    how = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    text = [operator.index(i) for i in ids]
    _check_prompt(text, model.config.vocab_size, model.config.max_position_embeddings)
    if max_new_tokens < 0:
        raise ValueError(f"generate: max_new_tokens = {max_new_tokens}: wanted at least 0")
    rng = np.random.default_rng(0) if rng is None else rng
    room = min(max_new_tokens, model.config.max_position_embeddings - len(text))
    if use_cache:
        reader = reader or Reader(model, capacity=len(text) + room)
        return _continue(reader.last_logits, text, how, rng, room, stop)
    return _continue(lambda ids: _last_logits(model, ids, None), text, how, rng, room, stop)


def sample(logits: np.ndarray, rng: np.random.Generator, *, temperature: float = 1.0, top_k: int = 0,
           top_p: float = 1.0, min_p: float = 0.0, repetition_penalty: float = 1.0,
           seen: Sequence[int] = ()) -> int:  # fmt: skip
    """One token, drawn from the `candidates` of logits (V,); `seen` is the text so far, for the repetition penalty."""
    return _draw(logits, Sampling(temperature, top_k, top_p, min_p, repetition_penalty), seen, rng)


def candidates(logits: np.ndarray, how: Sampling, seen: Sequence[int] = ()) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that may come next, by id, and their probabilities: (n,) and (n,), 1 <= n <= V.

    Raises ValueError for logits that are NaN or +inf (weights that are no numbers any more).
    """
    if how.repetition_penalty != 1:
        logits = _penalized(logits.astype(np.float64), seen, how.repetition_penalty)
    best = int(np.argmax(logits))  # the first NaN, where there is one
    if not math.isfinite(logits[best]):
        raise ValueError(f"sampling: token {best} has logit {logits[best]}: the model's weights hold NaN or infinity")
    if how.temperature == 0:
        return np.array([best]), np.ones(1)
    z = logits.astype(np.float64)
    with np.errstate(over="ignore"):  # a tiny temperature: -inf, whose exp is 0
        p = np.exp((z - z[best]) / how.temperature)
    ids, p = np.arange(len(p)), p / p.sum()
    if how.top_k:
        ids, p = _only(_top_k(p, how.top_k), ids, p)
    if how.top_p < 1:
        ids, p = _only(_top_p(p, how.top_p), ids, p)
    if how.min_p:
        ids, p = _only(_min_p(p, how.min_p), ids, p)
    return ids, p


def _only(keep: np.ndarray, ids: np.ndarray, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return ids[keep], p[keep] / p[keep].sum()


# What a filter keeps: probabilities p (n,) that sum to 1 -> (n,) bool. Of equal ones those of lower id go first.


def _top_k(p: np.ndarray, k: int) -> np.ndarray:
    if k >= len(p):
        return np.ones(len(p), bool)
    return _largest(p, k, np.partition(p, -k)[-k])


def _top_p(p: np.ndarray, share: float) -> np.ndarray:
    # What has less than (1 - share) / n comes after the others have reached `share`: it need not be sorted. Values
    # alone are: sorting them with their ids takes ten times as long
    likely = np.sort(p[p >= min(p.max(), (1 - share) / len(p))])[::-1]
    before = np.cumsum(likely)[:-1]  # what those before the second, third, ... have together
    k = 1 + int(np.searchsorted(before, share))
    return _largest(p, k, likely[k - 1])


def _largest(p: np.ndarray, k: int, least: float) -> np.ndarray:
    """The k largest, of which `least` is the last."""
    keep = p > least
    keep[np.flatnonzero(p == least)[: k - np.count_nonzero(keep)]] = True
    return keep


def _min_p(p: np.ndarray, share: float) -> np.ndarray:
    return p >= share * p.max()


class Reader:
    """A model and the text it has read last, with its keys and values: the next text is read from where it differs.

    The weights must stay what they were: an adapter that is switched on or off asks for another reader.

    read   how many tokens were read so far, in all
    """

    def __init__(self, model: Llama, *, capacity: int = 0) -> None:
        self.model, self.ids, self.read = model, list[int](), 0
        self.cache = KVCache(model.config, capacity=capacity, dtype=model.head_weight.dtype)

    def last_logits(self, ids: Sequence[int]) -> np.ndarray:
        """The prediction (V,) of what follows ids (n,), n > 0."""
        known = min(_common(self.ids, ids), len(ids) - 1)  # the last is read again, if need be, for its logits
        if len(ids) > self.cache.capacity:
            most = self.model.config.max_position_embeddings
            self.cache = self.cache.grown(min(most, max(len(ids), 2 * self.cache.capacity, 256)))
        del self.ids[known:]
        self.cache.length = known  # here, not in the end: Ctrl-C may come at any time
        logits = _last_logits(self.model, ids[known:], self.cache)
        self.ids += ids[known:]
        self.read += len(ids) - known
        return logits


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts begin with in common."""
    if a == b[: len(a)]:
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _continue(read: Callable[[list[int]], np.ndarray], text: list[int], how: Sampling, rng: np.random.Generator,
              room: int, stop: Collection[int]) -> Iterator[int]:  # fmt: skip
    for _ in range(room):
        token = _draw(read(text), how, text, rng)
        yield token
        if token in stop:
            return
        text.append(token)


def _draw(logits: np.ndarray, how: Sampling, seen: Sequence[int], rng: np.random.Generator) -> int:
    ids, p = candidates(logits, how, seen)
    return int(ids[0] if how.temperature == 0 else ids[rng.choice(len(p), p=p)])


def _penalized(z: np.ndarray, seen: Sequence[int], penalty: float) -> np.ndarray:
    if len(seen):
        old = z[seen]
        z[seen] = np.where(old > 0, old / penalty, old * penalty)  # once, however often a token was seen
    return z


def _last_logits(model: Llama, ids: Sequence[int], cache: KVCache | None) -> np.ndarray:
    with no_grad():  # not around a yield: the caller's code is not ours to switch off
        last = model.hidden(np.array([ids]), cache)[0, -1:]  # (1, C): the head reads one row, not all
        return model.logits(last).data[0]


def _check_prompt(ids: Sequence[int], vocab_size: int, context: int) -> None:
    if not ids:
        raise ValueError("generate: the prompt is empty; give at least one token")
    for place, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            raise ValueError(f"generate: token {place} of the prompt is {token}: wanted 0 to {vocab_size - 1}")
    if len(ids) >= context:
        raise ValueError(f"generate: a prompt of {len(ids)} tokens leaves no room in a context of {context}")


def _is_whole(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
