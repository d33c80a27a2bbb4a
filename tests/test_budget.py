"""How many steps fit into a time."""

import pytest

from entrenar.training.budget import replanned, seconds_of, steps_that_fit


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("20m", 1200), ("1h30m", 5400), ("2h", 7200), ("20", 1200), ("1.5", 90), ("1h0m5.5s", 3605.5)],
)
def test_times_as_people_write_them(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "soon", "-5m", "5 m", "m", "1d", "20m1h", "nan", "1e99"])
def test_what_is_no_time_is_said(text):
    with pytest.raises(ValueError, match="wanted a time such as 90s, 20m or 1h30m"):
        seconds_of(text)


def test_steps_looks_and_the_last_look_fill_the_time():
    steps = steps_that_fit(1000, step=0.5, look=10, every=100, last=40)
    assert steps * 0.5 + steps // 100 * 10 + 40 <= 1000 < (steps + 2) * 0.6 + 40
    assert steps_that_fit(10, step=1, look=0, every=0, last=20) == 0


def test_a_plan_that_hardly_changes_is_left_alone():
    assert replanned(1000, 1009, 10) == 1000
    assert replanned(1000, 1020, 10) == 1020 and replanned(1000, 900, 10) == 900


def test_a_plan_never_undoes_steps():
    assert replanned(1000, 300, 400) == 400
