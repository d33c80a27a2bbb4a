"""Loss spikes, and what they are not."""

import json

import numpy as np
import pytest

from entrenar.training.spikes import WARMUP, SpikeWatch


def falling(steps, seed=0, noise=0.05):
    rng = np.random.default_rng(seed)
    return 2 + 4 * np.exp(-np.arange(steps) / 60) + noise * rng.standard_normal(steps)


@pytest.mark.parametrize("seed", range(5))
def test_a_course_that_falls_has_no_spikes(seed):
    watch = SpikeWatch(6.0)
    assert [watch.see(loss) for loss in falling(2000, seed)] == [0.0] * 2000


def test_a_spike_is_seen_and_does_not_hide_the_next():
    watch = SpikeWatch(6.0)
    for loss in falling(500):
        watch.see(loss)
    first, second = watch.see(6.0), watch.see(6.0)
    assert first > 20 and second > 20
    assert abs(watch.mean - 2) < 0.2


def test_nothing_is_a_spike_before_there_is_a_course():
    watch = SpikeWatch(6.0)
    rng = np.random.default_rng(0)
    assert all(watch.see(float(loss)) == 0 for loss in rng.uniform(0, 100, WARMUP))


def test_a_course_that_does_not_move_has_no_spikes():
    watch = SpikeWatch(6.0)
    assert all(watch.see(3.0) == 0 for _ in range(200))


def test_state_goes_through_json_and_back_bit_for_bit():
    one, losses = SpikeWatch(6.0), falling(300)
    for loss in losses[:150]:
        one.see(loss)
    two = SpikeWatch(4.0)
    two.load_state(json.loads(json.dumps(one.state())))
    assert (two.mean, two.variance, two.steps, two.sigma) == (one.mean, one.variance, one.steps, 4.0)
