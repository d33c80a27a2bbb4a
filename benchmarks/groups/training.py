"""A step of training - forward, backward, clip, AdamW - by entrenar, and by PyTorch on a model of transformers'.

No rows: it is what step.py, checkpointing.py and finetune.py time, on models that each makes its own way.
"""

# B batch, T time, V vocabulary

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.protocol import Case

MAX_NORM = 1.0


def case(step: Callable[[], float], first: int) -> Case:
    """A step to be timed, after the `first` ones, whose losses tell whether contenders train the same."""
    losses = [step() for _ in range(first - 1)]
    started = time.perf_counter()
    losses.append(step())
    return Case(step, losses, time.perf_counter() - started)


def batches(batch: int, context: int, vocabulary: int) -> list[np.ndarray]:
    """A few batches of tokens (B, T), more often small than large, as in text; taken in turn."""
    draws = np.random.default_rng(0).random((4, batch, context))
    return list((draws**3 * vocabulary).astype(np.int64))


def entrenar_step(llama: Any, adamw: dict[str, Any], data: Sequence[np.ndarray]) -> Callable[[], float]:
    from entrenar import kernels
    from entrenar.optim import AdamW, clip_scale, global_norm

    kernels.keep_freed_memory()  # as the training job does
    parameters = llama.parameters()
    optimizer = AdamW(llama.named_parameters(), **adamw)
    batch = cycle(data)

    def step() -> float:
        ids = next(batch)
        targets = np.full_like(ids, -100)  # the last token of a row has no successor, as in transformers
        targets[:, :-1] = ids[:, 1:]
        loss = llama.loss(ids, targets, reduction="mean")
        loss.backward()
        optimizer.step(grad_scale=clip_scale(global_norm(parameters), MAX_NORM))
        optimizer.zero_grad()
        return loss.item()

    return step


def torch_step(
    llama: Any, adamw: dict[str, Any], data: Sequence[np.ndarray], *, autocast: bool = False
) -> Callable[[], float]:
    """autocast  compute in bfloat16, as transformers' Trainer does when asked to"""
    import torch

    llama.train()
    parameters = [p for p in llama.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": adamw["weight_decay"]},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, **adamw | {"fused": True})
    batch = cycle([torch.from_numpy(ids) for ids in data])

    def step() -> float:
        ids = next(batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = llama(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def cycle(items: Sequence[Any]) -> Iterator[Any]:
    while True:
        yield from items


# -- the driver's side


def same_losses(tolerance: float, a: list[float], b: list[float]) -> bool:
    """To so many nats."""
    return len(a) == len(b) and all(abs(x - y) <= tolerance for x, y in zip(a, b, strict=True))
