"""report.html: one run on one page, made of the run's own files, complete in itself: it opens from a disk, offline.

`write_report(run)` may be called at any time and as often as wanted, of a run that goes on, ended, or crashed. The same
files give the same bytes.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from entrenar.files import write_file
from entrenar.observe.figures import HELD_OUT, UNITS, curves
from entrenar.observe.page import document, duration, facts, large, moment, section, size, table, text
from entrenar.observe.record import NATS, Event, Record, finite, whole
from entrenar.observe.record import table as as_table
from entrenar.observe.samples import samples
from entrenar.observe.series import smooth
from entrenar.observe.setting import configuration, data, environment

FILE = "report.html"
WERE = {"text": "was", "conversations": "were"}
MOST_BUFFERS = 60  # rows shown of what a file may have any number of


def write_report(run: str | Path) -> Path:
    """Make RUN/report.html of the run's files, and return its path.

    Raises FileNotFoundError or NotADirectoryError where there is no such folder, OSError where it cannot be written.
    """
    path = Path(run) / FILE
    write_file(path, render_report(run))
    return path


def render_report(run: str | Path) -> str:
    """The page, as the text of an HTML file. Raises as `write_report` does."""
    run = Path(run)
    if not run.is_dir():
        wrong = NotADirectoryError if run.exists() else FileNotFoundError
        raise wrong(f"{run}: no folder of a run; wanted the folder that `entrenar train` made")
    record = Record(run)
    content = (
        _top(record)
        + section("curves", "Curves", curves(record))
        + section("samples", "What it wrote", samples(record))
        + section("memory-plan", "Memory: plan and measurement", _plan(record))
        + section("configuration", "Configuration", configuration(record))
        + section("environment", "Machine and software", environment(record))
        + section("data", "Data", data(record))
        + section("events", "Events", _events(record))
        + section("next", "How to go on", _next(record))
        + "<footer>Written by entrenar from this run’s metrics.jsonl, config.toml and sample.txt.</footer>\n"
    )
    return document(_title(record), content)


# --- in words -----------------------------------------------------------------------------------------------


def _title(record: Record) -> str:
    if record.measure == NATS:
        return f"{text(_base(record), 100)} learns to answer from {text(_subject(record), 100)}"
    begun = record.option("training", "start_from")
    verb = "goes on to learn" if isinstance(begun, str) and begun else "learns"
    return f"A LLaMA {verb} {text(_subject(record), 100)}"


def _base(record: Record) -> str:
    """The model that was fine-tuned, by the name people give it."""
    name = record.option("base", "model")
    return (name.rstrip("/").rpartition("/")[2] or name) if isinstance(name, str) and name else "A LLaMA"


def _subject(record: Record) -> str:
    """What is learned, by the name people give it."""
    source = as_table(record.start.get("data")).get("source") or record.option("data", "source")
    if not isinstance(source, str) or not source:
        return "a text of which no name is known"
    if source == "stdlib:":
        return "Python’s standard library"
    return "standard input" if source == "-" else source.rstrip("/").rpartition("/")[2] or source


def _top(record: Record) -> str:
    under = [part for part in (_shape(record), text(str(record.run), 200)) if part]
    notes = "".join(f'<p class="note">{text(note)}</p>\n' for note in record.notes)
    if record.error is not None:
        notes = f'<p class="note failed">{_error(record.error)}</p>\n' + notes
    return (
        f'<header>\n<h1>{_title(record)}</h1>\n<p class="under">{" · ".join(under)}</p>\n'
        f'<p class="lede">{_outcome(record)}</p>\n</header>\n{notes}{_tiles(record)}'
    )


def _shape(record: Record) -> str:
    model = as_table(record.start.get("model"))
    parameters = whole(model.get("parameters"))
    trained = whole(model.get("trained"))
    share = f", {large(trained)} of them trained" if trained and parameters and trained != parameters else ""
    words = [f"{large(parameters)} parameters{share}" if parameters else ""]
    shape = as_table(record.config.get("model")) | model
    for name, form in (("num_hidden_layers", "{:,} layers"), ("hidden_size", "{:,} wide"),
                       ("vocab_size", "vocabulary {:,}")):  # fmt: skip
        if (value := whole(shape.get(name))) is not None:
            words.append(form.format(value))
    return ", ".join(word for word in words if word)


def _outcome(record: Record) -> str:
    """What came out, and how the run ended, in sentences."""
    return " ".join(sentence for sentence in (_state(record), _reached(record), _took(record)) if sentence)


def _state(record: Record) -> str:
    step, steps = record.last_step, _steps(record)
    of = f"{step:,} of {steps:,} steps" if steps and steps > step else f"{step:,} {'step' if step == 1 else 'steps'}"
    stopped = (record.end or {}).get("stopped")
    if record.error is not None:
        return f'<span class="state failed">failed</span> Training failed after {of}.'
    if record.end is not None and stopped:
        return f'<span class="state stopped">stopped</span> {text(stopped, 80)} ended it after {of}.'
    if record.end is not None:
        return '<span class="state finished">finished</span>'
    if not record.last:
        return '<span class="state">no steps</span> No step of this run is recorded yet.'
    return f'<span class="state">not ended</span> After {of} this run goes on, or was killed: its end is not recorded.'


def _steps(record: Record) -> int | None:
    """How many the run was to make."""
    planned = whole(record.last.get("steps"))
    return planned if planned is not None else whole(record.option("training", "steps"))


def _reached(record: Record) -> str:
    height, unit, what = finite(record.look.get(record.measure)), UNITS[record.measure], HELD_OUT[record.measure]
    levels = [f"{name} {value:.2f}" for name, value in record.levels()]
    beside = f" ({', '.join(reversed(levels))})" if levels else ""
    if height:
        part = f"{what} it never saw" if record.look.get("whole") else f"a sample of {what} it never saw"
        return f"<b>{height:.2f} {unit}</b> on {part}{beside}."
    train = record.course.columns()
    if train:
        height = smooth(train)[-1].mean
        return f"<b>{height:.2f} {unit}</b> on its training {what}; held-out {what} {WERE[what]} not read yet{beside}."
    return ""


def _took(record: Record) -> str:
    if not record.seconds:
        return ""
    threads = whole(as_table(record.start.get("machine")).get("threads"))
    on = f" on {threads} {'thread' if threads == 1 else 'threads'}" if threads else ""
    return f"{duration(record.seconds)} of training{on}."


def _error(event: Event) -> str:
    """The error, and after which step, unless it says so itself."""
    told, step = _told(event), whole(event.get("step"))
    return text(told, 600) if step is None or told.startswith("step") else f"Step {step:,}: {text(told, 600)}"


def _told(event: Event) -> str:
    """What an event says in words; of an error without words, its numbers."""
    if isinstance(event.get("text"), str):
        return event["text"]
    return ", ".join(f"{name} {event[name]}" for name in ("loss", "grad_norm") if name in event)


# --- key numbers --------------------------------------------------------------------------------------------


def _tiles(record: Record) -> str:
    made = [tile for tile in (_tile_held_out(record), _tile_training(record), _tile_steps(record), _tile_tokens(record),
                              _tile_speed(record), _tile_memory(record)) if tile]  # fmt: skip
    tiles = "".join(
        f'<div><dt>{name}</dt><dd class="value">{value}</dd><dd class="more">{more}</dd></div>'
        for name, value, more in made
    )
    return f'<dl class="tiles">{tiles}</dl>\n' if tiles else ""


Tile = tuple[str, str, str] | None


def _tile_held_out(record: Record) -> Tile:
    if not (height := finite(record.look.get(record.measure))):
        return None
    if record.measure == NATS:
        before = f"; {_perplexity(finite(record.before.get(NATS)))} before" if record.before else ""
        return "Held out", f"{height:.3f} <small>nats/token</small>", f"perplexity {_perplexity(height)}{before}"
    size_read = whole(record.look.get("bytes"))
    part = "all" if record.look.get("whole") else "a sample of"
    more = f"{part} {size_read:,} bytes" if size_read is not None else ""
    return "Held out", f"{height:.3f} <small>bits/byte</small>", more


def _tile_training(record: Record) -> Tile:
    columns = record.course.columns()
    if not columns:
        return None
    if record.measure == NATS:
        mean = smooth(columns)[-1].mean
        return "Training", f"{mean:.3f} <small>nats/token</small>", f"perplexity {_perplexity(mean)}"
    bits, loss = smooth(columns)[-1].mean, finite(record.last.get("loss"))
    return "Training", f"{bits:.3f} <small>bits/byte</small>", f"last loss {loss:.3f} nats" if loss else ""


def _perplexity(loss: float) -> str:
    """Among how many equally likely tokens the model wavers."""
    return f"{math.exp(min(loss, 700)):.4g}"


def _tile_steps(record: Record) -> Tile:
    if not record.last:
        return None
    steps = _steps(record)
    more = "all of them" if steps == record.last_step else f"of {steps:,}" if steps else ""
    return "Steps", f"{record.last_step:,}", more


def _tile_tokens(record: Record) -> Tile:
    tokens = finite(record.last.get("tokens"))
    told = as_table(record.start.get("data"))
    whole_text = finite(told.get("train_trained")) or finite(told.get("train_tokens"))
    what = "trained tokens of the data" if "train_trained" in told else "training text"
    if not tokens:
        return None
    times = tokens / whole_text if whole_text else 0
    more = f"{times:.2f} times the {what}" if 0 < times < 10 else f"{times:,.0f} times the {what}"
    return "Tokens", large(tokens), more if times else ""


def _tile_speed(record: Record) -> Tile:
    if not record.tokens_per_second:
        return None
    share = finite(record.last.get("peak_share"))
    last = finite(record.last.get("tokens_per_second"))
    if share and last:  # of the newest step; the mean speed has the same share of the same peak
        share *= record.tokens_per_second / last
    more = f"mean; {share:.0%} of the machine’s peak" if share else "mean"
    return "Speed", f"{record.tokens_per_second:,.0f} <small>tokens/s</small>", more


def _tile_memory(record: Record) -> Tile:
    measured, planned = record.peak, finite(record.plan.get("peak"))
    if not measured:
        return None
    more = f"{size(planned)} planned, {_difference(measured, planned)}" if planned else ""
    return "Memory, peak", size(measured), more


def _difference(measured: float, planned: float) -> str:
    return f"{measured / planned - 1:+.1%}".replace("-", "−")


# --- memory -------------------------------------------------------------------------------------------------


def _plan(record: Record) -> str:
    plan, measured = record.plan, record.peak
    planned, limit = finite(plan.get("peak")), finite(plan.get("limit"))
    buffers = _buffers(plan.get("buffers"))
    if not planned and not buffers:
        return f"<p>No plan was recorded. At most {size(measured)} were resident.</p>" if measured else ""
    most = max([count for _, count, _ in buffers] or [1]) or 1
    rows = [
        (name, size(count), f'<i style="width:{100 * count / most:.1f}%"></i>' if count > 0 else "", note)
        for name, count, note in buffers[:MOST_BUFFERS]
    ]
    noted = any(note for *_, note in rows)
    head = ["buffer", "planned", "", *(["note"] if noted else [])]
    body = table("What the plan counts", head, [row[: len(head)] for row in rows], numbers=[1], bar=2)
    peak = [
        ("Planned peak", size(planned) if planned else ""),
        ("Measured peak", size(measured) if measured else "not known"),
        ("Difference", _difference(measured, planned) if measured and planned else ""),
        ("Limit", f"{size(limit)}, of which {max(measured, planned) / limit:.1%} were needed" if limit else ""),
    ]
    return facts(peak) + (f'<div class="gap">{body}</div>' if rows else "")


def _buffers(value: Any) -> list[tuple[str, float, str]]:
    """[name, bytes] or [name, bytes, note] rows of the plan, largest first where the file has them in no order."""
    rows = []
    for entry in value if isinstance(value, list) else []:
        if isinstance(entry, list) and len(entry) >= 2 and isinstance(entry[0], str):
            note = entry[2] if len(entry) > 2 and isinstance(entry[2], str) else ""
            rows.append((text(entry[0], 80), finite(entry[1]), text(note, 160)))
    return rows


# --- events, commands ---------------------------------------------------------------------------------------


def _events(record: Record) -> str:
    oldest, newest = record.events.in_order()
    rows = [_event(event) for event in oldest]
    if record.events.left_out:
        rows.append(("", "", "", f"… {record.events.left_out:,} more, in metrics.jsonl"))
    rows += [_event(event) for event in newest]
    return table("Events", ["event", "step", "time", "told"], rows, numbers=[1], caption=False) if rows else ""


def _event(event: Event) -> Sequence[str]:
    kind, step = event["event"], whole(event.get("step"))
    if kind == "end":
        words = _end(event)
    elif kind == "resume":
        words = f"from {text(event['checkpoint'], 80)}" if event.get("checkpoint") else ""
    else:
        words = text(_told(event), 600)
    style = "kind failed" if kind == "error" else "kind"
    time = f'<span class="kind">{moment(event.get("time"))}</span>'
    return f'<span class="{style}">{kind}</span>', f"{step:,}" if step is not None else "", time, words


def _end(event: Event) -> str:
    seconds, bits = finite(event.get("seconds")), finite(event.get("held_out_bits_per_byte"))
    loss = finite(event.get("held_out_loss"))
    parts = [
        f"stopped by {text(event['stopped'], 80)}" if event.get("stopped") else "all steps done",
        f"{duration(seconds)} in all" if seconds else "",
        f"{bits:.4f} bits per held-out byte" if bits else f"held-out loss {loss:.4f}" if loss else "",
    ]
    return ", ".join(part for part in parts if part)


def _next(record: Record) -> str:
    run = shlex.quote(str(record.run))
    config = shlex.quote(str(record.run / "config.toml"))
    steps = _steps(record) or record.last_step
    finished = record.end is not None and not record.end.get("stopped") and record.error is None
    if record.measure == NATS:
        base = record.option("base", "model")
        full = record.option("adapter", "kind") == "full"
        again = f"entrenar finetune --config {config}"
        talking = [("talk to it", f"entrenar chat {run}")]
        if isinstance(base, str) and not full:
            talking = [
                ("talk to it and its base", f"entrenar chat {shlex.quote(base)} --adapter {run} --compare"),
                ("base and adapter as one plain model", f"entrenar merge {run} --out tuned"),
            ]
    else:
        again = f"entrenar train --config {config}"
        talking = [
            ("let it write", f"entrenar generate {run} --prompt 'Once upon a time'"),
            ("bits per byte on another text", f"entrenar eval {run} book.txt"),
            ("a file for llama.cpp", f"entrenar export {run} --to gguf --out model.gguf"),
        ]
    commands = [
        ("train on, for longer", f"entrenar resume {run} --training.steps {2 * max(1, steps)}")
        if finished
        else ("go on from the newest whole checkpoint", f"entrenar resume {run}"),
        *talking,
        ("look at the weights", f"entrenar inspect {run}"),
        ("the same configuration again", again),
    ]
    rows = [f"<div><dt>{about}</dt><dd><code>{text(line, 1500)}</code></dd></div>" for about, line in commands]
    return f'<dl class="commands">{"".join(rows)}</dl>'
