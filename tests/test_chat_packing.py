"""Batches of examples: nothing is lost, nothing is seen that should not be, and a resumed run goes on exactly."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from entrenar.data import IGNORE, CorpusError
from entrenar.data.chat import Example, ExampleBatches, Examples, evaluation_batches
from entrenar.data.chat.packing import PADDING, packed, places_needed

TOKENS = st.lists(st.tuples(st.integers(0, 500), st.booleans()), min_size=1, max_size=12)
ROWS = st.lists(TOKENS, min_size=1, max_size=30)


def examples_of(rows):
    made = [Example(np.array([i for i, _ in row], np.int32), np.array([t for _, t in row])) for row in rows]
    for one in made:
        one.trained[0] = False
    return Examples.of(made)


def random_examples(count, longest, seed=0):
    random = np.random.Generator(np.random.PCG64(seed))
    lengths = random.integers(2, longest + 1, count)
    return examples_of([[(int(i), bool(t)) for i, t in zip(random.integers(1, 999, n), [1] * n, strict=True)]
                        for n in lengths])  # fmt: skip


def expected(examples):
    """Every trained token with all the tokens before it, as often as it is there."""
    return Counter(tuple(ids[: t + 1].tolist()) for ids, trained in map(examples.__getitem__, range(len(examples)))
                   for t in np.flatnonzero(trained))  # fmt: skip


def learned(batches):
    """Every target with all the tokens that are seen where it is predicted."""
    found = Counter()
    for ids, targets, starts in batches:
        for b, t in zip(*np.nonzero(targets != IGNORE), strict=True):
            found[(*ids[b, starts[b, t] : t + 1].tolist(), int(targets[b, t]))] += 1
    return found


def epoch(batches):
    """The batches of one epoch; of their rows none that belongs to the next."""
    rows = len(batches.order)
    for taken in range(0, rows, batches.batch_size):
        one = batches.next()
        yield [part[: rows - taken] for part in one]


def check_shapes(batch, context):
    ids, targets, starts = batch
    assert ids.shape == targets.shape == starts.shape and ids.dtype == targets.dtype == starts.dtype == np.int64
    assert ids.shape[1] <= context and (ids.shape[1] % 16 == 0 or ids.shape[1] == context)
    places = np.arange(ids.shape[1])
    assert (starts <= places).all() and (starts >= 0).all() and (np.diff(starts, axis=1) >= 0).all()
    begins = np.take_along_axis(starts, starts, axis=1)
    assert (begins == starts).all()  # the first token of an example is where it says it is


@given(ROWS, st.integers(12, 40), st.integers(1, 5), st.booleans(), st.integers(0, 3))
def test_every_trained_token_is_a_target_once_and_sees_its_own_example_only(rows, context, size, packing, seed):
    examples = examples_of(rows)
    if not examples.trained.any():
        with pytest.raises(CorpusError, match="no examples with trained tokens"):
            ExampleBatches(examples, batch_size=size, context=context)
        return
    batches = ExampleBatches(examples, batch_size=size, context=context, seed=seed, packing=packing)
    first = list(epoch(batches))
    assert learned(first) == expected(examples)
    others = evaluation_batches(examples, batch_size=size, context=context, packing=packing)
    assert learned(others) == expected(examples)
    for batch in first:
        check_shapes(batch, context)


@given(ROWS, st.integers(12, 40), st.integers(1, 4), st.booleans(), st.integers(0, 12))
def test_a_run_that_is_stopped_goes_on_with_the_same_batches(rows, context, size, packing, steps):
    examples = examples_of([[(1, False), (2, True)], *rows])
    one = ExampleBatches(examples, batch_size=size, context=context, seed=3, packing=packing)
    for _ in range(steps):
        one.next()
    other = ExampleBatches(examples, batch_size=size, context=context, seed=9, packing=packing)
    other.load_state(one.state())
    for _ in range(8):
        assert all(np.array_equal(a, b) for a, b in zip(one.next(), other.next(), strict=True))
        assert one.taken == other.taken and one.state() == other.state()


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200), st.integers(50, 64))
def test_packing_loses_nothing_and_fits_and_leaves_at_most_one_row_half_empty(needs, context):
    needs = np.array(needs)
    rows = packed(needs, context, np.arange(len(needs)))
    assert sorted(itertools.chain(*rows)) == list(range(len(needs)))
    sums = [int(needs[row].sum()) for row in rows]
    assert max(sums) <= context
    assert sum(1 for total in sums if 2 * total <= context) <= 1  # else two of them would have fitted into one


def test_padding_sees_itself_and_counts_for_nothing_and_the_end_token_counts():
    examples = examples_of([[(5, False), (6, True), (PADDING, True)], [(7, False), (8, True)]])
    (batch,) = evaluation_batches(examples, batch_size=4, context=40, packing=False)
    assert batch.ids[:, :3].tolist() == [[5, 6, 0], [7, 0, 0]] and batch.ids.shape == (2, 16)
    assert batch.targets[:, :3].tolist() == [[6, PADDING, IGNORE], [8, IGNORE, IGNORE]]
    assert batch.starts[:, :4].tolist() == [[0, 0, 2, 3], [0, 1, 2, 3]]
    (packed_batch,) = evaluation_batches(examples, batch_size=4, context=40)
    assert packed_batch.ids[0, :4].tolist() == [5, 6, 7, 0] and packed_batch.starts[0, :4].tolist() == [0, 0, 2, 3]


def test_what_comes_after_the_last_trained_token_is_not_read():
    examples = examples_of([[(1, False), (2, True), (3, False), (4, False)], [(1, False), (2, False)]])
    assert places_needed(examples).tolist() == [1, 0]


def test_epochs_differ_and_each_takes_every_example():
    examples = random_examples(200, 40)
    batches = ExampleBatches(examples, batch_size=4, context=64, seed=1)
    orders = []
    for _ in range(3):
        rows = [sorted(row) for row in batches.order]
        assert sorted(itertools.chain(*rows)) == list(range(200))
        orders.append(rows)
        list(epoch(batches))
        batches.epoch, batches.position = batches.epoch + 1, 0
        batches.order = batches._order(1, batches.epoch)
    assert orders[0] != orders[1] != orders[2]
    assert ExampleBatches(examples, batch_size=4, context=64, seed=2).order != ExampleBatches(
        examples, batch_size=4, context=64, seed=1).order  # fmt: skip


def test_rows_of_many_short_examples_are_nearly_full():
    filling = ExampleBatches(random_examples(2000, 60), batch_size=4, context=256).filling()
    assert filling.examples == 2000 and filling.share > 0.99
    alone = ExampleBatches(random_examples(2000, 60), batch_size=4, context=256, packing=False).filling()
    assert alone.rows == 2000 and alone.share < 0.2


def test_an_example_longer_than_the_context_is_refused_with_its_place():
    examples = examples_of([[(1, True)] * 5, [(2, True)] * 18])
    with pytest.raises(CorpusError, match=r"example 1 has 18 tokens, a window of context 16 takes 17.*max_length"):
        ExampleBatches(examples, batch_size=1, context=16)
    ExampleBatches(examples, batch_size=1, context=17)


@pytest.mark.parametrize("state", [{}, {"seed": 0, "epoch": -1, "position": 0}, {"seed": 0, "epoch": 0, "position": 99},
                                   {"seed": True, "epoch": 0, "position": 0}])  # fmt: skip
def test_a_state_of_other_batches_is_refused_and_changes_nothing(state):
    batches = ExampleBatches(random_examples(9, 8), batch_size=2, context=16)
    batches.next()
    before = batches.state()
    with pytest.raises(ValueError, match="Batches: the state's"):
        batches.load_state(state)
    assert batches.state() == before


def test_the_checks_of_this_file_notice_a_leak():
    examples = random_examples(12, 6)
    batches = [list(one) for one in epoch(ExampleBatches(examples, batch_size=2, context=32))]
    batches[0][2][:] = 0
    assert learned(batches) != expected(examples)


def test_a_model_reads_packed_examples_as_if_each_stood_alone(native):
    """The sum of nats over packed rows is that over one example in a row: attention looks no further than `starts`."""
    from entrenar import random
    from entrenar.llama import Llama, LlamaConfig

    random.seed(0)
    config = LlamaConfig(vocab_size=1000, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)  # fmt: skip
    model, examples = Llama(config), random_examples(20, 30)

    for weight in model.parameters():
        weight.data *= 3  # so that it matters what is seen

    def loss(packing, seen=1):
        batches = evaluation_batches(examples, batch_size=3, context=64, packing=packing)
        nats = [model.loss(b.ids, b.targets, starts=b.starts * seen, reduction="sum").data for b in batches]
        return float(sum(nats)) / examples.trained_tokens

    assert loss(True) == pytest.approx(loss(False), rel=1e-5)
    assert loss(True, seen=0) != pytest.approx(loss(False), rel=1e-3)
