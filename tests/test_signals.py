"""Signals: what the first does, what the second, and that they are given back."""

import os
import signal
import threading

import pytest

from entrenar.training.signals import ENDING, Requests, StopAtOnce, listening


@pytest.mark.parametrize(
    ("number", "why", "code"),
    [(signal.SIGINT, "Ctrl-C", 130), (signal.SIGTERM, "SIGTERM", 143), (signal.SIGHUP, "SIGHUP", 129)],
)
def test_the_first_asks_the_second_ends(capfd, number, why, code):
    requests = Requests()
    assert requests.exit_code == 0
    with listening(requests):
        os.kill(os.getpid(), number)
        assert requests.stop == why and requests.exit_code == code
        assert f"{why}: finishing this step, then saving" in capfd.readouterr().err
        with pytest.raises(StopAtOnce, match=f"{why} again") as second:
            os.kill(os.getpid(), number)
    assert second.value.code == code


def test_two_different_ones_are_two(capfd):
    with listening(Requests()), pytest.raises(StopAtOnce, match="SIGTERM again") as second:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
    assert second.value.code == 143


def test_sigusr1_asks_for_a_checkpoint_as_often_as_it_comes():
    requests = Requests()
    with listening(requests):
        for _ in range(3):
            requests.save = False
            os.kill(os.getpid(), signal.SIGUSR1)
            assert requests.save and not requests.stop


def test_handlers_are_given_back_even_after_an_error():
    before = [signal.getsignal(number) for number in (*ENDING, signal.SIGUSR1)]
    with pytest.raises(ZeroDivisionError), listening(Requests()):
        assert [signal.getsignal(number) for number in (*ENDING, signal.SIGUSR1)] != before
        raise ZeroDivisionError
    assert [signal.getsignal(number) for number in (*ENDING, signal.SIGUSR1)] == before


def test_a_terminal_that_is_gone_does_not_end_the_run(monkeypatch):
    def gone(number, text):
        raise OSError

    monkeypatch.setattr("os.write", gone)
    requests = Requests()
    with listening(requests):
        os.kill(os.getpid(), signal.SIGHUP)
    assert requests.stop == "SIGHUP"


def test_outside_the_main_thread_nothing_changes():
    before, inside = signal.getsignal(signal.SIGINT), []

    def work():
        with listening(Requests()):
            inside.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert inside == [before]


def test_under_nohup_a_closed_terminal_changes_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        requests = Requests()
        with listening(requests):
            os.kill(os.getpid(), signal.SIGHUP)
            assert not requests.stop
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
