"""A whole run: plan, task, training, last look, picture and report; begun anew, or taken up where it was left.

    start(config)       from nothing, into a new folder
    resume(run, ...)    from a run's last whole checkpoint, to the same bits as if nothing had happened

Both return the exit code: 0 done; 130, 143, 129 stopped by Ctrl-C, SIGTERM, SIGHUP after saving. Everything else that
ends a run is an exception: ConfigError, CorpusError, TokenizerError, FormatError, CheckpointError (what was asked for
cannot be done), TrainingError, OSError, MemoryError (it failed on the way).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from entrenar.files import write_file
from entrenar.observe.report import write_report
from entrenar.training import finetune, machine, pretrain, summary
from entrenar.training.checkpoint import CheckpointError, Saved, clean, load_saved, newest, saved_steps
from entrenar.training.config import ConfigError, FineTuning, Run, kind_of, options, read_config, to_toml
from entrenar.training.curve import render
from entrenar.training.display import Display, HeldOut, make_display
from entrenar.training.metrics import METRICS
from entrenar.training.plan import Plan
from entrenar.training.pretrain import DATA
from entrenar.training.signals import listening
from entrenar.training.task import Sample
from entrenar.training.trainer import Trainer
from entrenar.version import __version__

CONFIG, LOCK = "config.toml", ".lock"

# What a resumed run may change: nothing that decides what a weight or a batch is.
CHANGEABLE = {"lr_schedule", "checkpointing", "training.steps", "training.epochs", "training.clip_norm",
              "training.on_spike", "training.spike_sigma", "training.activation_checkpointing",
              "training.samples", "base.model"}  # fmt: skip
CHANGEABLE_BEGINNINGS = ("training.eval_", "training.sample_", "training.report_")


def kind(config: Run) -> Any:
    """The file with `plan`, `begin` and `go_on` of this kind of run."""
    return finetune if isinstance(config, FineTuning) else pretrain


def plan_of(config: Run) -> Plan:
    """What a run would need."""
    return kind(config).plan(config)


def start(config: Run, *, force: bool = False) -> int:
    """Train from nothing, with `config`, in a new folder. `force` goes over a plan that does not fit.

    Raises before there is a folder where the configuration, the text or the model to start from cannot be used.
    """
    began, config = time.perf_counter(), config.settled
    run = run_folder(config)
    display = make_display(report_every=config.training.report_every)
    try:
        with contextlib.ExitStack() as stack:
            return _begin(config, run, display, began, stack, force=force)
    except KeyboardInterrupt as error:
        if str(error) or (run / CONFIG).exists():
            raise
        raise KeyboardInterrupt(
            "stopped before the first step: there is no run yet; the same command "
            + ("begins it" if isinstance(config, FineTuning) else "goes on where preparing the text was")
        ) from None
    finally:
        display.close()


def resume(run: str | Path, overrides: Sequence[tuple[str, str]] = (), *, force: bool = False) -> int:
    """Go on with a run from its newest whole checkpoint; from its beginning where it was killed before the first one.

    overrides   options to change from here on, as ("section.key", "value"): see CHANGEABLE
    Raises CheckpointError where `run` is no run, ConfigError for an option that cannot change on the way, CorpusError
    where the text is no longer what the run was trained on.
    """
    began, run = time.perf_counter(), Path(os.path.expanduser(run))
    if not (run / CONFIG).is_file():
        inside = (run.parent / CONFIG).is_file()
        raise CheckpointError(
            f"{run}: no {CONFIG}: this is no run's folder; "
            + (f"the run is {run.parent}" if inside else "name one, or begin one with `entrenar train` or `finetune`")
        )
    config = changed(run, overrides).settled
    config = replace(config, checkpointing=replace(config.checkpointing, out=str(run)))
    display = make_display(report_every=config.training.report_every)
    try:
        with contextlib.ExitStack() as stack:
            if not saved_steps(run):
                display.note(f"{run} was ended before its first checkpoint: beginning again")
                return _begin(config, run, display, began, stack, force=force, again=True)
            stack.enter_context(locked(run))
            saved = load_saved(newest(run, display.note), check=False)  # newest has checked it
            must_be_the_same_run(config, saved, run)
            return _go_on(config, run, saved, display, stack, force=force)
    finally:
        display.close()


def _begin(config: Run, run: Path, display: Display, began: float, stack: contextlib.ExitStack, *,
           force: bool, again: bool = False) -> int:  # fmt: skip
    task, plan = kind(config).begin(config, run, display, force=force)
    here = machine.look()
    run.mkdir(parents=True, exist_ok=True)
    stack.enter_context(locked(run))
    if not again:
        run_folder(config, among=(LOCK, DATA))  # preparing may have taken hours: is the folder still ours to fill?
    clean(run, 0)
    (run / METRICS).unlink(missing_ok=True)  # of a run that was killed before its first checkpoint
    keep_config(config, run)
    trainer = Trainer(config, task, run, display, here.peak_flops, began=began)
    stack.callback(trainer.close)
    trainer.log(
        "start",
        time=now(),
        config=config.sections(),
        defaults=type(config)().sections(),
        machine=asdict(here),
        plan=plan,
        versions={"entrenar": __version__, "python": platform.python_version(), "numpy": np.__version__},
        **task.facts(),
    )
    return _train(trainer, here)


def _go_on(config: Run, run: Path, saved: Saved, display: Display, stack: contextlib.ExitStack, *,
           force: bool) -> int:  # fmt: skip
    task, plan = kind(config).go_on(config, run, saved, display, force=force)
    here = machine.look()
    trainer = Trainer(config, task, run, display, here.peak_flops)
    stack.callback(trainer.close)
    try:
        trainer.load_state(saved)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint {saved.folder}: its state cannot be used: {error!r}") from error
    keep_config(config, run)  # what was changed on the way holds for the next resume too
    for name in clean(run, trainer.step):
        trainer.warn(f"{name} is not whole; it was set aside as {name}.broken")
    trainer.log("resume", time=now(), step=trainer.step, checkpoint=saved.folder.name, config=config.sections(),
                machine=asdict(here), plan=plan)  # fmt: skip
    display.note(f"resuming {run} after step {trainer.step:,}")
    if trainer.step >= trainer.steps:
        display.note(f"all {trainer.steps:,} steps are done; --training.steps makes it longer")
    return _train(trainer, here)


def _train(trainer: Trainer, here: machine.Machine) -> int:
    with listening(trainer.requests):
        trainer.display.start(trainer.task.heading(trainer, here))
        try:
            if trainer.task.knows_something and not trainer.step:
                trainer.look_before()
            trainer.plan_steps()
            trainer.train()
            last, samples = finish(trainer, here)
        except BaseException as error:
            with contextlib.suppress(Exception):  # the error itself matters more than the picture of it
                pictures(trainer, here)
            if isinstance(error, OSError):
                raise refused(error, trainer) from error
            raise
        # to whom it stopped, nobody may listen any more: the terminal went away
        with contextlib.suppress(OSError) if trainer.stopping else contextlib.nullcontext():
            summary.summarize(trainer, last, samples)
        return trainer.requests.exit_code


def finish(trainer: Trainer, here: machine.Machine) -> tuple[HeldOut | None, list[Sample]]:
    """Checkpoint, last look at what is held out, samples, picture, report; where a signal stopped it, no look and no
    samples: whoever stops a run does not want to wait. Returns the look and the samples."""
    stopped, last, samples = trainer.stopping, None, []
    if trainer.step:
        trainer.save()
    if not stopped:
        last = trainer.look(whole=True)
        if trainer.config.training.sample_tokens:
            samples = trainer.samples()
            earlier = trainer.before.samples if trainer.before else []
            pairs = zip_longest(samples, earlier[: len(samples)])
            write_file(trainer.run / "sample.txt", "\n".join(summary.written(*pair) + "\n" for pair in pairs))
    stopped = trainer.stopping
    trainer.log(
        "end",
        time=now(),
        step=trainer.step,
        stopped=stopped,
        seconds=trainer.seconds,
        memory_peak=machine.memory_peak(),
        held_out_bits_per_byte=last.bits_per_byte if last else None,
        held_out_loss=last.loss if last else None,
    )
    pictures(trainer, here)
    trainer.display.doing("done")
    trainer.display.close()
    return last, samples


def refused(error: OSError, trainer: Trainer) -> OSError:
    """What the disk refused, with where, what is whole, and the way out."""
    run, place = trainer.run, error.filename if error.filename is not None else str(trainer.run)
    kept = [folder.name for folder in saved_steps(run)]
    whole = f"the last checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
    way_out = f"`entrenar resume {run}` goes on" if (run / CONFIG).exists() else "begin again"
    return OSError(error.errno, f"{error.strerror or error}; {whole}; with the disk in order again, {way_out}", place)


def pictures(trainer: Trainer, here: machine.Machine) -> None:
    """curve.png and report.html of everything so far; what the steps no longer hold need not be there beside them."""
    machine.give_back_memory()
    write_file(trainer.run / "curve.png", render(trainer.task.curve(trainer, here)))
    write_report(trainer.run)


# -- what a run is made of


def run_folder(config: Run, among: Sequence[str] = ()) -> Path:
    """Where the run goes. Raises ConfigError rather than write into a folder that holds something; the names in
    `among` are nothing."""
    if config.checkpointing.out:
        run = Path(os.path.expanduser(config.checkpointing.out))
        if (run / CONFIG).is_file():
            raise ConfigError(
                f"--out {run}: holds a run already; `entrenar resume {run}` goes on with it, or name a new folder"
            )
        if run.exists() and (not run.is_dir() or any(path.name not in among for path in run.iterdir())):
            raise ConfigError(
                f"--out {run}: exists and is not an empty folder; name a new one, or move it away"
            )
    else:
        stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
        names = [stamp, *(f"{stamp}-{n}" for n in range(2, 1000))]
        run = next(run for name in names if not (run := Path("runs", name)).exists())
    there = next(folder for folder in (run, *run.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"--out {run}: cannot be made: {there} is no folder you can write into")
    return run


def changed(run: Path, overrides: Sequence[tuple[str, str]]) -> Run:
    """The run's configuration with what may be changed on the way. Raises ConfigError, naming every problem."""
    its = kind_of(run / CONFIG)
    known = {option.full_name for option in options(its)}
    fixed = [name for name, _ in overrides if name in known and not may_change(name)]
    if fixed:
        raise ConfigError(
            f"{', '.join(fixed)}: cannot change while a run goes on: it would be another run; what can: lr_schedule.*, "
            "checkpointing.*, base.model where it was moved, training.steps, epochs, clip_norm, on_spike, spike_sigma, "
            "activation_checkpointing, eval_*, sample_*, report_every"
        )
    config = read_config(run / CONFIG, overrides, its)
    if any(name == "training.steps" for name, _ in overrides):
        config.training.budget = ""  # the clock chose until now
    return config


def must_be_the_same_run(config: Run, saved: Saved, run: Path) -> None:
    """Raises ConfigError where the run's config.toml was edited in what cannot change on the way."""
    current = config.sections()
    edited = [
        f"{section}.{name} = {current[section][name]} (was {value})"
        for section, values in saved.state.get("config", {}).items()
        for name, value in values.items()
        if not may_change(f"{section}.{name}") and f"{section}.{name}" != "training.budget"
        and current.get(section, {}).get(name, value) != value
    ]  # fmt: skip
    if edited:
        told = ", ".join(edited[:3]) + (f" and {len(edited) - 3} more" if len(edited) > 3 else "")
        raise ConfigError(
            f"{run / CONFIG}: {told}: cannot change while a run goes on: it would be another run; put it "
            f"back, or begin one with `entrenar {config.VERB} --config {run / CONFIG} --out NEW`"
        )


def keep_config(config: Run, run: Path) -> None:
    """config.toml: where the run is, is not in it, for a run may be moved."""
    write_file(run / CONFIG, to_toml(replace(config, checkpointing=replace(config.checkpointing, out=""))))


def may_change(name: str) -> bool:
    """Whether a run that goes on may be given another value of the option `section.key`."""
    return name in CHANGEABLE or name.partition(".")[0] in CHANGEABLE or name.startswith(CHANGEABLE_BEGINNINGS)


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Nobody else trains in this folder meanwhile. Raises ConfigError where somebody does."""
    lock = os.open(run / LOCK, os.O_RDONLY | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{run}: another process is training in this folder") from None
        yield
    finally:
        os.close(lock)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
