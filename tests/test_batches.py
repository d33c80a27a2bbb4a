"""Batches and evaluation windows."""

import json
import mmap

import numpy as np
import pytest

from entrenar.data import IGNORE, Batches, CorpusError, batched, evaluation_windows
from entrenar.data import batches as batches_module
from entrenar.data.tokenfile import TokenWriter, open_tokens


def test_targets_are_the_next_tokens():
    ids, targets = Batches(np.arange(1000), batch_size=3, context=10).next()
    assert ids.shape == targets.shape == (3, 10) and ids.dtype == np.int64
    np.testing.assert_array_equal(ids + 1, targets)


def test_an_epoch_takes_every_window_once_and_the_next_takes_others():
    batches = Batches(np.arange(10_001), batch_size=7, context=100, seed=3)
    size = len(batches.order)
    starts = [int(row[0]) for _ in range(-(-2 * size // 7)) for row in batches.next()[0]]
    first, second = starts[:size], starts[size : 2 * size - 2]
    assert size in (99, 100) and len(set(first)) == size and first != sorted(first)
    assert {s % 100 for s in first} == {min(first)} and not set(first) & set(second)


def test_the_order_of_windows_is_what_it_always_was():
    """By NumPy's definition, and by numbers written down: a run's data must not change with this code."""
    random = np.random.Generator(np.random.PCG64([3, 0]))
    offset = int(random.integers(0, 10))
    wanted = random.permutation(np.arange(offset, 1000 - 10, 10))
    batches = Batches(np.arange(1000), batch_size=4, context=10, seed=3)
    np.testing.assert_array_equal(batches.order, wanted)
    batches.next()
    assert batches.taken == wanted[:4].tolist() == [838, 458, 228, 18]


def test_taken_are_the_places_of_the_last_batch():
    batches = Batches(np.arange(300) * 2, batch_size=5, context=8)
    assert batches.taken == []
    for _ in range(30):  # over the end of an epoch
        ids, _ = batches.next()
        assert (ids[:, 0] // 2).tolist() == batches.taken and all(type(start) is int for start in batches.taken)


def test_batches_go_on_where_their_state_was_taken():
    one = Batches(np.arange(500), batch_size=4, context=8, seed=1)
    for _ in range(20):
        one.next()
    two = Batches(np.arange(500), batch_size=4, context=8, seed=9)
    two.load_state(json.loads(json.dumps(one.state())))
    for _ in range(40):
        np.testing.assert_array_equal(one.next()[0], two.next()[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position": 63}, "position is 63, but an epoch has 62 windows of context 8"),
        ({"position": -1}, "position is -1, wanted a whole number"),
        ({"position": 3.0}, "position is 3.0"),
        ({"epoch": True}, "epoch is True"),
        ({"epoch": 2**70}, "epoch is 1180591620717411303424"),
        ({"seed": "1"}, "seed is 1"),
        ({"seed": None}, "seed is None"),
    ],
)
def test_a_state_that_cannot_be_is_refused_and_changes_nothing(change, message):
    batches = Batches(np.arange(500), batch_size=4, context=8, seed=1)
    batches.next()
    before = batches.state()
    with pytest.raises(ValueError, match=message):
        batches.load_state(before | change)
    with pytest.raises(ValueError, match="position is None"):
        batches.load_state({name: before[name] for name in ("seed", "epoch")})
    assert batches.state() == before


def test_other_seeds_give_other_batches():
    a, b = (Batches(np.arange(500), batch_size=4, context=8, seed=s).next()[0] for s in (1, 2))
    assert (a != b).any()


def test_the_shortest_text_is_one_window_and_less_is_an_error():
    ids, _ = Batches(np.arange(9), batch_size=2, context=8).next()
    np.testing.assert_array_equal(ids, [range(8)] * 2)
    with pytest.raises(CorpusError, match="has 8 tokens, too short for one window of context 8 \\+ 1.*at most 7"):
        Batches(np.arange(8), batch_size=1, context=8)


def resident(mapped: int) -> int:
    """Bytes of the mapping at this address that count as this process's memory."""
    found = False
    for line in open("/proc/self/smaps"):
        if "-" in (first := line.split()[0]) and not first.endswith(":"):
            low, high = (int(word, 16) for word in first.split("-"))
            found = low <= mapped < high
        elif found and first == "Rss:":
            return int(line.split()[1]) * 1024
    raise AssertionError("no such mapping")


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED"), reason="this system gives no pages back")
def test_reading_windows_of_a_mapped_file_does_not_fill_the_memory(tmp_path, monkeypatch):
    try:
        open("/proc/self/smaps").close()
    except OSError:
        pytest.skip("no /proc/self/smaps")
    monkeypatch.setattr(batches_module, "FORGET_AFTER", 32)
    writer = TokenWriter(tmp_path / "t", np.dtype(np.uint16))
    writer.append(np.arange(8_000_000, dtype=np.uint16))
    writer.finish(vocab_size=65536, source="00" * 16, tokenizer="00" * 16)
    tokens = open_tokens(tmp_path / "t")
    address = tokens.__array_interface__["data"][0]
    batches = Batches(tokens, batch_size=32, context=100)
    most = 0
    for _ in range(50):
        ids, targets = batches.next()
        assert ids.base is not tokens and (ids[:, 1:] == targets[:, :-1]).all()
        most = max(most, resident(address))
    assert most <= 32 * 2 * 64 * 1024, "of 16 MB"
    before = tokens[:1000].copy()
    monkeypatch.setattr(batches_module, "forget", lambda tokens: None)
    for _ in range(50):
        batches.next()
    assert resident(address) > 8e6, "the control: without giving pages back all of it becomes resident"
    np.testing.assert_array_equal(tokens[:1000], before)


@pytest.mark.parametrize(
    ("length", "context", "stride"), [(100, 8, 8), (100, 8, 4), (101, 8, 3), (5, 8, 1), (8, 8, 8)]
)
def test_evaluation_predicts_every_token_once_from_those_before(length, context, stride):
    tokens = np.arange(1, length + 1)  # token t follows token t - 1; 0 begins
    predicted = []
    for x, y in evaluation_windows(tokens, first=0, context=context, stride=stride):
        counts = y != IGNORE
        np.testing.assert_array_equal(y[counts], x[counts] + 1)
        at = np.flatnonzero(counts)
        assert predicted == [] or at[0] >= context - stride
        np.testing.assert_array_equal(x[: at[-1] + 1], np.arange(x[0], x[0] + at[-1] + 1))
        predicted += y[counts].tolist()
    assert predicted == tokens.tolist()


def test_a_sample_of_evaluation_windows_is_some_of_them():
    tokens = np.arange(1, 200)
    options = {"first": 0, "context": 16, "stride": 8}
    every = [y.tolist() for _, y in evaluation_windows(tokens, **options)]
    third = [y.tolist() for _, y in evaluation_windows(tokens, **options, every=3)]
    assert third == every[::3]
    shapes = [x.shape for x, _ in batched(evaluation_windows(tokens, **options), 4)]
    assert sum(s[0] for s in shapes) == len(every) and set(shapes[:-1]) == {(4, 16)}
