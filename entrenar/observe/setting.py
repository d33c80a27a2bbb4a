"""What a run was given, as parts of its report: the options, the machine and software, the data."""

from __future__ import annotations

from typing import Any

from entrenar.observe.page import details, facts, size, table, text
from entrenar.observe.record import BITS, Event, Record, finite, whole
from entrenar.observe.record import table as as_table

MOST_OPTIONS = 200  # rows shown of what a file may have any number of


def configuration(record: Record) -> str:
    every = [
        (f"{part}.{name}", value, as_table(record.defaults.get(part)).get(name, value))
        for part, options in record.config.items()
        for name, value in as_table(options).items()
    ]
    if not every:
        return ""
    changed = [entry for entry in every if text(entry[1]) != text(entry[2])]
    same = [entry for entry in every if text(entry[1]) == text(entry[2])]
    shown = ""
    if changed:
        rows = [(_code(name), _code(value), _code(default)) for name, value, default in changed[:MOST_OPTIONS]]
        shown = table("Options that differ from the defaults", ["option", "value", "default"], rows)
    elif record.defaults:
        shown = "<p>Every option has its default.</p>"
    pairs = [(_code(name), _code(value)) for name, value, _ in same[: MOST_OPTIONS - len(changed[:MOST_OPTIONS])]]
    more = f"<p>{len(every) - MOST_OPTIONS:,} more.</p>" if len(every) > MOST_OPTIONS else ""
    title = f"{len(same):,} options with their defaults" if record.defaults else f"All {len(same):,} options"
    return shown + (details(title, table("Options", ["option", "value"], pairs, caption=False) + more) if pairs else "")


def _code(value: Any) -> str:
    return f"<code>{text(value, 160) or '&quot;&quot;'}</code>"


def environment(record: Record) -> str:
    machine = as_table(record.start.get("machine"))
    versions = as_table(record.start.get("versions"))
    rows = _machine(machine)
    rows += [(text(name, 40), text(value, 40)) for name, value in list(versions.items())[:20]]
    now = as_table(record.resumed.get("machine"))
    before, step = _machine(machine), whole(record.resumed.get("step"))
    later = f"after step {step:,}" if step is not None else "later"
    rows += [(f"{name}, {later}", value) for name, value in _machine(now) if (name, value) not in before]
    return facts(rows) if rows else ""


def _machine(machine: Event) -> list[tuple[str, str]]:
    peak, limit = finite(machine.get("peak_flops")), finite(machine.get("memory_limit"))
    threads = whole(machine.get("threads"))
    rows = [
        ("Processor", text(machine["cpu"], 80) if "cpu" in machine else ""),
        ("Threads", f"{threads:,}" if threads is not None else ""),
        ("Kernels", text(machine["kernels"], 40) if "kernels" in machine else ""),
        ("Measured peak", f"{peak / 1e9:,.0f} GFLOP/s" if peak else ""),
        ("Memory limit", size(limit) if limit else ""),
    ]
    return [row for row in rows if row[1]]


DATA = (
    ("train", "For training"),
    ("held_out", "Held out"),
)


def data(record: Record) -> str:
    told = as_table(record.start.get("data"))
    if not told:
        return ""
    rows = [("Source", text(told.get("source", ""), 300))]
    for side, name in DATA:
        parts = []
        for what in ("documents", "bytes", "tokens"):
            if (count := whole(told.get(f"{side}_{what}"))) is not None:
                parts.append(f"{count:,} {what.removesuffix('s') if count == 1 else what}")
        rows.append((name, ", ".join(parts)))
    size_read, tokens = finite(told.get("train_bytes")), finite(told.get("train_tokens"))
    rows.append(("Bytes per token", f"{size_read / tokens:.2f}" if size_read and tokens else ""))
    levels = record.levels() if record.measure == BITS else []
    rows += [(name, f"{bits:.3f} bits per held-out byte") for name, bits in levels]
    known = {"source", "gzip_bits", "xz_bits", "skipped"}
    known |= {f"{side}_{what}" for side, _ in DATA for what in ("documents", "bytes", "tokens")}
    others = [(name, value) for name, value in told.items() if name not in known and value not in ("", None, [], {})]
    rows += [(text(name.replace("_", " ").capitalize(), 40), _value(value)) for name, value in others[:20]]
    return facts(rows) + _skipped(told.get("skipped"))


def _value(value: Any) -> str:
    return text(f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value, 200)


def _skipped(value: Any) -> str:
    """What was left out of the training text."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return facts([("Skipped", _value(value))])
    if not isinstance(value, list) or not value:
        return ""
    names = "".join(f"<li>{text(name, 200)}</li>" for name in value[:20])
    more = f"<p>{len(value) - 20:,} more.</p>" if len(value) > 20 else ""
    return details(f"{len(value):,} skipped", f"<ul>{names}</ul>{more}")
