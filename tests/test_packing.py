"""Rows of several documents: a model makes of them what it makes of each document alone, in loss and gradients."""

from __future__ import annotations

import numpy as np
import pytest
from test_llama import SHAPES, small

from entrenar.gradcheck import gradcheck
from entrenar.llama import KVCache
from entrenar.nn import Module

# Lengths of the documents in each of two rows
SHORT = [[3, 1, 9, 5, 2], [1, 1, 18]]
LONG = [[100, 1, 120], [96, 97, 28]]  # across the blocks of 96 queries and keys in the kernel
IGNORED = -100


def packed(lengths: list[list[int]], vocab: int = 19) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids, targets, starts (B, T): random tokens; the last of each document has no target, nor have a few others."""
    rng, shape = np.random.default_rng(3), (len(lengths), sum(lengths[0]))
    ids, targets = rng.integers(0, vocab, shape), rng.integers(0, vocab, shape)
    targets[rng.random(shape) < 0.1] = IGNORED
    starts = np.stack([np.repeat(np.cumsum(row) - row, row) for row in lengths])
    targets[np.diff(starts, axis=1, append=shape[1]) > 0] = IGNORED
    return ids, targets, starts


def results(model: Module, *calls: tuple) -> dict[str, np.ndarray]:
    """The sum of the calls' losses, and every parameter's gradient of it."""
    for parameter in model.parameters():
        parameter.grad = None
    total = 0.0
    for ids, targets, starts in calls:
        loss = model.loss(ids, targets, starts=starts, reduction="sum")
        loss.backward()
        total += loss.item()
    return {"loss": np.array(total)} | {name: p.grad for name, p in model.named_parameters()}


def one_by_one(ids: np.ndarray, targets: np.ndarray, starts: np.ndarray) -> list[tuple]:
    """Each document as a batch of its own."""
    documents = [(b, starts[b] == first) for b in range(len(ids)) for first in np.unique(starts[b])]
    return [(ids[b][its][None], targets[b][its][None], None) for b, its in documents]


def assert_packed_equals_alone(model: Module, batch: tuple, starts: np.ndarray | None, tolerance: float) -> None:
    """What the model makes of the batch when told `starts`, against each document alone: every array within the
    tolerance, relative to its largest element.
    """
    ids, targets, _ = batch
    whole, alone = results(model, (ids, targets, starts)), results(model, *one_by_one(*batch))
    for name, want in alone.items():
        np.testing.assert_allclose(
            whole[name], want, rtol=0, atol=tolerance * np.abs(want).max(), err_msg=name, strict=True
        )


def rounding(dtype: type, tokens: int) -> float:
    """What rounding may add up to in the chain from embedding to loss and back: about 40 operations of two layers, of
    which each sums up to so many tokens.
    """
    return 1e-12 if dtype is np.float64 else 40 * float(np.finfo(dtype).eps) * (4 + 2 * np.sqrt(tokens))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
def test_a_packed_batch_trains_as_its_documents_do_one_by_one(changes, checkpointing, dtype):
    for lengths in (SHORT, LONG):
        batch = packed(lengths)
        model = small(dtype, checkpointing, max_position_embeddings=256, **changes)
        assert_packed_equals_alone(model, batch, batch[2], rounding(dtype, batch[0].size))


@pytest.mark.parametrize("lengths", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_document_that_sees_one_token_too_many_is_found(dtype, lengths):
    batch = packed(lengths)
    leaking, third = batch[2].copy(), sum(lengths[0][:2])
    leaking[0, leaking[0] == third] -= 1  # the third document of the first row sees the last token of the second
    assert np.count_nonzero(leaking != batch[2]) == lengths[0][2]
    model = small(dtype, max_position_embeddings=256)
    for starts in (leaking, None):
        with pytest.raises(AssertionError, match="Not equal to tolerance"):
            assert_packed_equals_alone(model, batch, starts, rounding(dtype, batch[0].size))


def test_the_mean_is_over_the_targets_of_all_documents():
    ids, targets, starts = packed(SHORT)
    model = small()
    total = sum(model.loss(*call[:2], reduction="sum").item() for call in one_by_one(ids, targets, starts))
    mean = model.loss(ids, targets, starts=starts).item()
    assert mean == pytest.approx(total / np.count_nonzero(targets != IGNORED), rel=1e-12)


@pytest.mark.tier1
def test_every_gradient_of_a_packed_batch():
    ids, targets, starts = packed([[3, 1, 2], [6]])
    model = small(attention_bias=True)
    gradcheck(lambda *_: model.loss(ids, targets, starts=starts), *model.parameters(), samples=2, stencil=5)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_checkpointing_changes_no_bit_of_a_packed_batch(dtype):
    plain, again = (results(small(dtype, checkpointing), packed(SHORT)) for checkpointing in (False, True))
    for name in plain:
        np.testing.assert_array_equal(plain[name], again[name], err_msg=name)


def test_starts_of_zero_are_no_starts():
    ids, targets, _ = packed(SHORT)
    model = small(np.float32)
    zero, none = (results(model, (ids, targets, starts)) for starts in (np.zeros_like(ids), None))
    for name in zero:
        np.testing.assert_array_equal(zero[name], none[name], err_msg=name)


def test_wrong_starts_are_refused():
    ids, targets, starts = packed(SHORT)
    model = small()
    with pytest.raises(ValueError, match=r"q \(2, 20, 2, 6\) wants starts of shape \(2, 20\), got \(2, 19\)"):
        model.loss(ids, targets, starts=starts[:, 1:])
    with pytest.raises(IndexError, match=r"attention: starts\[0, 0\] is 1, wanted 0 <= start <= 0, the query itself"):
        model.hidden(ids, starts=starts + 1)
    with pytest.raises(ValueError, match=r"attention: starts\[0, 3\] is 0 after 2, wanted starts that do not decrease"):
        model.hidden(ids, starts=np.where(np.arange(20) == 2, 2, 0) + np.zeros_like(ids))
    with pytest.raises(ValueError, match="a cache continues one document per row and takes no starts"):
        model.hidden(ids, KVCache(model.config, batch=2, dtype=np.float64), starts)
