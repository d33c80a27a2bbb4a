"""What a run wrote, for its report: the newest sample and earlier ones; of fine-tuning, answers before and after."""

from __future__ import annotations

from entrenar.observe.page import details, text
from entrenar.observe.record import NATS, Event, Record, whole


def samples(record: Record) -> str:
    """The newest sample, and behind a click the earlier ones, from the first; of fine-tuning, before and after."""
    if record.measure == NATS:
        return _answers(record)
    oldest, newest = record.samples.in_order()
    last = "".join(_sample_parts(newest[-1])).strip() if newest else ""
    shown = _sample(newest[-1]) if newest else ""
    if record.sample.strip() and record.sample.strip()[:1000] != last[:1000]:  # events are clipped, the file is not
        shown = f'<pre class="wrap">{text(record.sample, 8000)}</pre>' + (f"\n{shown}" if shown else "")
    earlier = [part for event in (*oldest, *newest[:-1]) if (part := _sample(event))]
    if record.samples.left_out:
        earlier.insert(len(oldest), f'<p class="small grey">{record.samples.left_out:,} more are in metrics.jsonl.</p>')
    return shown + (details("Earlier samples", "\n".join(earlier)) if earlier else "")


def _answers(record: Record) -> str:
    """Each prompt, with what was answered before the run, what after it, and what the data has."""
    oldest, newest = record.samples.in_order()
    by_prompt: dict[str, list[Event]] = {}
    for event in (*oldest, *newest):
        by_prompt.setdefault(_sample_parts(event)[0], []).append(event)
    parts = []
    for prompt, events in by_prompt.items():
        told = [(_when(event), _sample_parts(event)[1]) for event in (events if len(events) < 3 else
                                                                      (events[0], events[-1]))]  # fmt: skip
        if isinstance(wanted := events[-1].get("wanted"), str) and wanted:
            told.append(("In the data", wanted))
        rows = "".join(f"<dt>{when}</dt><dd>{text(words, 5000)}</dd>" for when, words in told)
        parts.append(f'<pre class="wrap"><span class="prompt">{text(prompt, 1500)}</span></pre>'
                     f'<dl class="answers">{rows}</dl>')  # fmt: skip
    return "\n".join(parts)


def _when(event: Event) -> str:
    step = whole(event.get("step"))
    return "Before" if step == 0 else "At some step" if step is None else f"After step {step:,}"


def _sample_parts(event: Event) -> tuple[str, str]:
    """Prompt and continuation."""
    prompt, written = event.get("prompt"), event.get("text")
    prompt = prompt if isinstance(prompt, str) else ""
    written = written if isinstance(written, str) else ""
    return prompt, written.removeprefix(prompt)


def _sample(event: Event) -> str:
    prompt, written = _sample_parts(event)
    if not prompt and not written:
        return ""
    head = _when(event)
    body = f'<span class="prompt">{text(prompt, 1500)}</span>{text(written, 5000)}'
    return f'<h3>{head}</h3>\n<pre class="wrap">{body}</pre>'
