"""Runs that are killed, stopped, or run out of disk: they go on to the very same bits, and lose nothing."""

import contextlib
import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from runs import SMALL, TEXT, bits, process, resume, train, words

from entrenar.data import prepare
from entrenar.training.checkpoint import MODEL, OPTIMIZER, STATE, SUMS, load_checkpoint, saved_steps


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty folder with a text, and a cache of its own."""
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("entrenar.kernels.fma_peak", lambda seconds: 1e11)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def bits_of_a_whole_run(place: Path, **changes):
    (place / "text.txt").write_text(TEXT)
    with contextlib.chdir(place), pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        assert train("run", **changes) == 0
        return bits("run")


@pytest.fixture(scope="module")
def wanted(tmp_path_factory):
    """The bits of the run that nobody interrupts."""
    return bits_of_a_whole_run(tmp_path_factory.mktemp("whole"))


def events(run, kind=None):
    lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if kind in (None, e["event"])]


def stopped_at(run, step, how=signal.SIGINT):
    """Let the run stop itself after a step: what a signal does, at a known place."""
    with pytest.MonkeyPatch.context() as patch:
        from entrenar.training.trainer import Trainer

        report = Trainer._report

        def then_signal(self, *args):
            report(self, *args)
            if self.step == step:
                os.kill(os.getpid(), how)

        patch.setattr(Trainer, "_report", then_signal)
        return train(run)


# Kills


def kill_often(kills: int, seed: int) -> int:
    """Begin a run and kill it again and again; returns how many kills hit a run that was under way.

    Every second kill waits for a checkpoint that is half written, the others come at a random moment.
    """
    rng, hit = random.Random(seed), 0
    one = process("train", "--out", "run", *words(training__steps=100, checkpointing__every=1))
    while True:
        if hit % 2:
            halfway = wait_until(one, lambda: list(Path("run").glob(".step-*")))
        else:
            halfway = wait_until(one, Path("run/config.toml").exists)
            time.sleep(rng.uniform(0, 0.25))
        one.kill()
        one.communicate()
        if one.returncode == 0:
            return hit  # it was faster
        assert one.returncode == -signal.SIGKILL and halfway
        hit += 1
        if hit == kills:
            return hit
        one = process("resume", "run")


def wait_until(one: subprocess.Popen, there) -> bool:
    while one.poll() is None:
        if there():
            return True
        time.sleep(0.0005)
    return bool(there())


@pytest.fixture(scope="module")
def hundred_steps(tmp_path_factory):
    return bits_of_a_whole_run(tmp_path_factory.mktemp("hundred"), training__steps=100, checkpointing__every=1)


@pytest.mark.parametrize(
    ("kills", "seed"), [(3, 0), *(pytest.param(10, seed, marks=pytest.mark.tier3) for seed in range(1, 6))]
)
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(hundred_steps, capsys, kills, seed):
    survived = kill_often(kills, seed)
    assert resume("run") == 0
    assert bits("run") == hundred_steps
    assert survived == kills, "the run was over before it could be killed so often"
    assert [e["step"] for e in events("run", "step")] == list(range(1, 101)), "no step missing, none twice"
    left = [p.name for p in Path("run").iterdir() if p.name.startswith(".")]
    assert left == [".lock"]


DIE_AT = """
import os, signal
count, real = 0, {point}
def {name}(*args, **kwargs):
    global count
    count += 1
    if count == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
{point} = {name}
"""


@pytest.mark.parametrize(
    ("point", "number"),
    [("os.fsync", 12)]
    + [pytest.param(p, n, marks=pytest.mark.tier3) for p, ns in
       (("os.fsync", range(1, 40, 3)), ("os.rename", range(1, 7)), ("os.replace", range(1, 7)),
        ("os.symlink", range(1, 5)))
       for n in ns],
)  # fmt: skip
def test_a_kill_at_any_step_of_a_write_loses_nothing(wanted, capsys, point, number):
    dead = process("train", "--out", "run", *words(), before=DIE_AT.format(point=point, name="dying", number=number))
    dead.communicate(timeout=60)
    assert dead.returncode == -signal.SIGKILL
    assert (resume("run") if Path("run/config.toml").exists() else train("run2")) == 0
    assert bits("run" if Path("run/config.toml").exists() else "run2") == wanted


# Resuming


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.tier3)])
def test_a_stopped_run_goes_on_to_the_same_bits(wanted, capsys, step):
    assert stopped_at("run", step) == 130
    assert [p.name for p in saved_steps(Path("run"))][-1] == f"step-{step:06d}"
    assert "entrenar resume run  # goes on as if nothing had happened" in capsys.readouterr().out
    assert resume("run") == 0
    assert bits("run") == wanted
    kinds = [e["event"] for e in events("run")]
    assert kinds[0] == "start" and kinds.count("resume") == 1 and kinds[-1] == "end"
    assert [e["step"] for e in events("run", "step")] == list(range(1, 13))


@pytest.mark.tier3
def test_sigterm_and_sighup_have_exit_codes_of_their_own(capsys):
    assert stopped_at("run", 2, signal.SIGTERM) == 143
    assert stopped_at("run2", 2, signal.SIGHUP) == 129


def test_sigusr1_saves_and_goes_on(capsys):
    with pytest.MonkeyPatch.context() as patch:
        from entrenar.training.trainer import Trainer

        between = Trainer._between_steps

        def asked(self):
            if self.step == 3:
                os.kill(os.getpid(), signal.SIGUSR1)
            between(self)

        patch.setattr(Trainer, "_between_steps", asked)
        assert train("run", checkpointing__every=0, training__eval_every=0, checkpointing__keep_last_n=9) == 0
    assert [p.name for p in saved_steps(Path("run"))] == ["step-000003", "step-000012"]


@pytest.mark.tier3
def test_a_finished_run_resumed_says_so_and_changes_nothing(wanted, capsys):
    assert train("run") == 0
    assert resume("run") == 0
    assert "all 12 steps are done" in capsys.readouterr().out
    assert bits("run") == wanted


def test_a_run_can_be_made_longer_but_not_another(capsys):
    assert train("run") == 0
    assert resume("run", "--training.steps", "14") == 0
    assert bits("run")["step"] == "step-000014"
    capsys.readouterr()
    assert resume("run", "--training.batch_size", "4") == 2
    assert "training.batch_size: cannot change while a run goes on" in capsys.readouterr().err
    assert resume("run", "--training.stepz", "4") == 2
    assert "did you mean training.steps?" in capsys.readouterr().err


def test_no_run_and_an_empty_folder_are_told(capsys):
    Path("empty").mkdir()
    for name in ("nowhere", "empty", "text.txt"):
        assert resume(name) == 2
        assert f"{name}: no config.toml: this is no run's folder" in capsys.readouterr().err


def test_two_processes_do_not_train_in_one_folder(capsys):
    import fcntl

    assert stopped_at("run", 2) == 130
    with open("run/.lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert resume("run") == 2
    assert "another process is training in this folder" in capsys.readouterr().err


def test_another_text_is_refused_when_its_tokens_are_gone(place, capsys):
    assert stopped_at("run", 2) == 130
    (place / "text.txt").write_text(TEXT.upper())
    assert resume("run") == 0, "the prepared tokens are still there: the same run goes on"
    assert stopped_at("run2", 2) == 130
    (place / "text.txt").write_text(TEXT.lower() + "more\n" * 50)
    shutil.rmtree(place / "cache")
    capsys.readouterr()
    assert resume("run2") == 2
    assert "is no longer the text this run was trained on" in capsys.readouterr().err


@pytest.mark.tier3
def test_standard_input_can_be_resumed(wanted, capsys):
    """Its tokens are kept, in the cache or with the run; nobody has to pipe the text in again."""
    for cache in ("", "off"):
        run = f"run{cache}"
        text = f"import io, sys; sys.stdin = io.TextIOWrapper(io.BytesIO({TEXT.encode()!r}))"
        short = words(data__source="-", data__cache=cache, training__steps=3)
        one = process("train", "--out", run, *short, before=text)
        assert one.communicate(timeout=60)[1] == "" and one.returncode == 0
        assert resume(run, "--training.steps", "4") == 0
        assert bits(run)["step"] == "step-000004"


# Broken checkpoints


EVERYDAY = {(MODEL, "flipped"), (STATE, "short"), (SUMS, "gone")}
BROKEN = [
    pytest.param(file, fault, marks=[] if (file, fault) in EVERYDAY else pytest.mark.tier3)
    for file in (MODEL, OPTIMIZER, STATE, "config.json", "tokenizer.json", SUMS)
    for fault in ("flipped", "short", "gone")
]  # fmt: skip


@pytest.mark.parametrize(("file", "fault"), BROKEN)
def test_a_broken_checkpoint_is_told_and_the_one_before_it_taken(wanted, capsys, file, fault):
    assert stopped_at("run", 7) == 130
    folder = Path("run/step-000007")
    broken = bytearray((folder / file).read_bytes())
    if fault == "gone":
        (folder / file).unlink()
    else:
        broken[len(broken) // 2] ^= 0x10
        (folder / file).write_bytes(bytes(broken) if fault == "flipped" else bytes(broken[: len(broken) // 2]))
    assert resume("run") == 0
    told = capsys.readouterr().out
    assert "step-000007" in told and "falling back to step-000006" in told
    assert bits("run") == wanted
    assert Path("run/step-000007.broken").is_dir(), "what was broken is kept aside"


@pytest.mark.tier3
def test_where_every_checkpoint_is_broken_that_is_said(capsys):
    assert stopped_at("run", 3) == 130
    for folder in saved_steps(Path("run")):
        (folder / MODEL).unlink()
    assert resume("run") == 2
    assert "no whole checkpoint" in capsys.readouterr().err


# Disks


@pytest.fixture
def tokens_are_there():
    """Prepared before the disk fails: what is tested is the run."""
    prepare("text.txt", tokenizer="bytes")


def failing(name, at, error):
    """The n-th call of os.`name` fails with this error, and so do all later ones."""
    real, count = getattr(os, name), [0]

    def fail(*args, **kwargs):
        count[0] += 1
        if count[0] >= at:
            raise OSError(error, os.strerror(error))
        return real(*args, **kwargs)

    return fail


@pytest.mark.parametrize(
    ("name", "at"),
    [("fsync", 14)]
    + [pytest.param(name, at, marks=pytest.mark.tier3) for name, last in (("fsync", 40), ("rename", 4), ("replace", 8))
       for at in range(2, last + 1, max(1, last // 8))],
)  # fmt: skip
@pytest.mark.parametrize(
    "error", [errno.ENOSPC, *(pytest.param(error, marks=pytest.mark.tier3) for error in (errno.EIO, errno.EROFS))]
)
def test_a_disk_that_fails_stops_the_run_and_the_last_checkpoint_is_whole(
    wanted, tokens_are_there, capsys, name, at, error
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, name, failing(name, at, error))
        assert train("run") == 1
    assert os.strerror(error) in capsys.readouterr().err
    for folder in saved_steps(Path("run")):
        load_checkpoint(folder)
    assert resume("run") == 0
    assert bits("run") == wanted


def test_a_file_that_may_not_grow_stops_the_run_with_its_name(wanted, tokens_are_there, capsys):
    """A limit at the write call itself, as a quota has it."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (60000, resource.RLIM_INFINITY))"
    one = process("train", "--out", "run", *words(), before=limit)
    _, errors = one.communicate(timeout=60)
    assert one.returncode == 1 and "File too large" in errors and "Traceback" not in errors
    assert not saved_steps(Path("run")) or load_checkpoint("run")
    assert resume("run") == 0
    assert bits("run") == wanted


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB; only root may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", folder], capture_output=True)
    if done.returncode:
        pytest.skip("a small file system cannot be mounted here: root alone may")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_stops_the_run_and_room_lets_it_go_on(wanted, small_disk, capsys):
    with open(small_disk / "ballast", "wb") as file:
        file.write(bytes(1_900_000))
    code = train(str(small_disk / "run"))
    assert code == 1 and "No space left on device" in capsys.readouterr().err
    (small_disk / "ballast").unlink()
    assert resume(str(small_disk / "run")) == 0
    assert bits(small_disk / "run") == wanted


def test_a_disk_that_becomes_read_only_stops_the_run(small_disk, capsys):
    run = small_disk / "run"
    with pytest.MonkeyPatch.context() as patch:
        from entrenar.training.trainer import Trainer

        between = Trainer._between_steps

        def remount(self):
            if self.step == 6:
                self.metrics.close()
                subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
                self.metrics.file = open("elsewhere.jsonl", "a")
            between(self)

        patch.setattr(Trainer, "_between_steps", remount)
        assert train(str(run)) == 1
    assert "Read-only file system" in capsys.readouterr().err
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    assert load_checkpoint(run).state["step"] == 4


def test_a_run_whose_folder_is_removed_says_so(capsys):
    with pytest.MonkeyPatch.context() as patch:
        from entrenar.training.trainer import Trainer

        between = Trainer._between_steps

        def remove(self):
            if self.step == 6:
                shutil.rmtree("run")
            between(self)

        patch.setattr(Trainer, "_between_steps", remove)
        assert train("run") == 1
    assert "the run's folder was removed while it trained" in capsys.readouterr().err


# Numbers that are none


def test_a_run_that_ends_in_nan_names_op_layer_and_place_and_keeps_its_checkpoint(capsys):
    assert train("run", lr_schedule__learning_rate=1e30, training__clip_norm=0, lr_schedule__warmup_steps=4) == 1
    told = capsys.readouterr().err
    assert "is not finite" in told or "are not finite" in told
    (error,) = events("run", "error")
    assert error["text"] and Path("run/report.html").exists()


def test_a_spike_warns_or_stops(capsys, monkeypatch):
    from entrenar.training import trainer

    real = trainer.accumulate_gradients
    monkeypatch.setattr("entrenar.training.spikes.WARMUP", 5)

    def jumping(model, batches):
        loss, tokens = real(model, batches)
        jumping.calls += 1
        return loss + (50 if jumping.calls == 9 else 0), tokens

    monkeypatch.setattr(trainer, "accumulate_gradients", jumping)
    jumping.calls = 0
    assert train("warned") == 0
    assert "standard deviations above its recent mean" in capsys.readouterr().out
    assert len(events("warned", "warning")) == 1
    jumping.calls = 0
    assert train("stopped", training__on_spike="stop") == 1
    assert "step 9: the loss is" in (told := capsys.readouterr().err) and "entrenar resume stopped" in told
    jumping.calls = 100
    assert resume("stopped", "--training.on_spike", "warn") == 0


def test_a_reader_that_goes_away_does_not_end_the_run(wanted, capsys):
    one = process("train", "--out", "run", *words(training__report_every=1))
    one.stdout.readline()
    one.stdout.close()
    one.wait(timeout=60)
    assert one.returncode == 141 and one.stderr.read() == ""
    assert bits("run") == wanted and events("run")[-1]["event"] == "end"


# Budgets


@pytest.fixture
def clock(monkeypatch):
    """A clock on which a step takes 20 ms, half as long again after the 60th, and everything else next to nothing."""
    from entrenar.training import trainer

    now, real = [0.0], trainer.accumulate_gradients

    def slow(model, batches):
        now[0] += 0.02 if events_so_far() < 60 else 0.03
        return real(model, batches)

    def events_so_far():
        return len(events("run", "step")) if Path("run/metrics.jsonl").exists() else 0

    def read():
        now[0] += 1e-5
        return now[0]

    monkeypatch.setattr(trainer, "accumulate_gradients", slow)
    monkeypatch.setattr("time.perf_counter", read)
    return now


@pytest.mark.parametrize("eval_every", [0, 10])
def test_a_run_with_a_budget_ends_on_time_even_where_the_machine_slows_down(capsys, clock, eval_every):
    assert train("run", training__budget="4s", training__eval_every=eval_every, checkpointing__every=0) == 0
    (end,) = events("run", "end")
    plans = [e["steps"] for e in events("run", "plan")]
    assert 190 <= plans[0] <= 200 and plans[-1] < 0.85 * plans[0], "planned, and planned again"
    assert end["step"] == plans[-1]
    assert 3.6 < end["seconds"] <= 4.0
    rates = [e["learning_rate"] for e in events("run", "step")]
    assert rates[-1] < 0.2 * max(rates), "the schedule ended where the run did"


def test_rehearsing_for_a_budget_changes_no_bit(capsys, monkeypatch, wanted):
    from entrenar.training.trainer import Trainer

    monkeypatch.setattr(Trainer, "plan_steps", lambda self: self._rehearse() if self.step == 0 else None)
    assert train("run") == 0
    assert bits("run") == wanted


def test_every_option_of_the_small_run_exists():
    from entrenar.training.config import Config, options

    assert set(SMALL) <= {o.full_name for o in options(Config)}


def test_memory_limits_do_not_leak_between_tests():
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


# What was changed on the way


def test_a_run_made_longer_and_stopped_again_remembers_how_long_it_is(wanted, capsys):
    assert train("run", training__steps=6, lr_schedule__schedule="constant") == 0
    assert train("whole", training__steps=6, lr_schedule__schedule="constant") == 0
    assert resume("whole", "--training.steps=12") == 0
    with pytest.MonkeyPatch.context() as patch:
        from entrenar.training.trainer import Trainer

        between = Trainer._between_steps

        def then_stop(self):
            between(self)
            if self.step == 8:
                self.requests.stop = "Ctrl-C"

        patch.setattr(Trainer, "_between_steps", then_stop)
        assert resume("run", "--training.steps=12") == 130
    assert resume("run") == 0
    assert bits("run") == bits("whole") and bits("run")["step"] == "step-000012"
    assert [e["config"]["training"]["steps"] for e in events("run", "resume")] == [12, 12], "as the report shows it"


def test_a_run_whose_clock_chose_the_steps_can_be_made_longer(capsys, clock):
    assert train("run", training__budget="1s", checkpointing__every=0) == 0
    (end,) = events("run", "end")
    assert end["step"] != 12
    longer = end["step"] + 3
    assert resume("run", f"--training.steps={longer}") == 0
    assert events("run", "end")[-1]["step"] == longer
    assert resume("run") == 0, "and it stays so"
    assert f"all {longer} steps are done" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line, told",
    [("batch_size = 4", "training.batch_size = 4 (was 2)"), ("hidden_size = 32", "model.hidden_size = 32 (was 16)")],
)
def test_a_run_whose_configuration_was_edited_into_another_is_refused(capsys, line, told):
    assert stopped_at("run", 4) == 130
    name, config = line.split(" ")[0], Path("run/config.toml")
    whole = config.read_text()
    config.write_text(re.sub(rf"^{name} = .*$", line, whole, flags=re.MULTILINE))
    assert resume("run") == 2
    said = capsys.readouterr().err
    assert told in said and "it would be another run; put it back" in said and said.count("\n") == 1
    config.write_text(re.sub("^steps = 12$", "steps = 6", whole, flags=re.MULTILINE))
    assert resume("run") == 0, "what may change on the way may be edited too"
    assert bits("run")["step"] == "step-000006"


def test_a_checkpoint_given_for_its_run_is_told_the_run(capsys):
    assert stopped_at("run", 4) == 130
    assert resume("run/checkpoint") == 2
    assert "run/checkpoint: no config.toml: this is no run's folder; the run is run\n" in capsys.readouterr().err


def test_a_folder_filled_while_the_text_was_prepared_is_left_alone(monkeypatch, capsys):
    from entrenar.training import pretrain

    def slow(*args, prepare=pretrain.prepare, **kwargs):
        if not Path("run").exists():
            Path("run").mkdir()  # so that the other one comes here only once
            assert train("run") == 0, "another one trains there meanwhile"
        return prepare(*args, **kwargs)

    monkeypatch.setattr(pretrain, "prepare", slow)
    assert train("run") == 2
    assert "--out run: holds a run already" in capsys.readouterr().err
    assert [path.name for path in saved_steps(Path("run"))][-1] == "step-000012"


def test_a_disk_that_refuses_is_told_with_place_and_way_out(monkeypatch, capsys):
    from entrenar.training import trainer

    def refuse(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(trainer, "save_step", refuse)
    assert train("run") == 1
    assert capsys.readouterr().err == (
        "entrenar train: run: No space left on device; there is no checkpoint yet; with the disk in order again, "
        "`entrenar resume run` goes on\n"
    )


def test_a_disk_that_refuses_prepared_data_is_told_with_another_folder_as_the_way_out(monkeypatch, capsys):
    from entrenar.training import pretrain

    def refuse(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pretrain, "prepare", refuse)
    assert train("run", data__cache="kept") == 1
    told = capsys.readouterr().err
    assert "data.cache = 'kept': No space left on device, while the text was prepared" in told
    assert "another folder with --data.cache" in told and not Path("run").exists()


def test_ctrl_c_while_the_text_is_prepared_says_that_there_is_no_run_yet(monkeypatch, capsys):
    from entrenar.training import pretrain

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain, "prepare", stop)
    assert train("run") == 130
    told = capsys.readouterr().err
    assert "stopped before the first step: there is no run yet" in told and "is whole" not in told


def test_standard_input_whose_tokens_are_gone_is_told_so():
    def piped(text, *command):
        one = process(*command, before=f"import io, sys; sys.stdin = io.TextIOWrapper(io.BytesIO({text!r}))")
        return one.communicate(timeout=60)[1], one.returncode

    assert piped(TEXT.encode(), "train", "--out", "run", *words(data__source="-", training__steps=3)) == ("", 0)
    shutil.rmtree("cache")
    told, code = piped(b"", "resume", "run")
    assert code == 2 and "standard input is empty" in told and told.count("\n") == 1
    assert "the tokens that were prepared of it" in told and told.endswith("are gone\n")
