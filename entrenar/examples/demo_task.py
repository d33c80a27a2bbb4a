"""The task of the fine-tuning demonstrations: find the date in a line of text, and write it as ISO 8601 has it.

    Meeting: the 5th of March 2024   ->   2024-03-05
    Valid until Oct 31, 1987         ->   1987-10-31

Rows are made from a seed, the same on every machine. Each has a day of its own: no day of a held-out row, however it is
written, is in a row that is trained. An answer is right if it is the very text, to the last character.
"""

# B rows side by side, T tokens

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from datetime import date, timedelta
from itertools import takewhile
from pathlib import Path

import numpy as np

from entrenar.data import Tokenizer
from entrenar.files import write_file
from entrenar.llama import KVCache, Llama
from entrenar.tensor import no_grad

TRAIN, HELD_OUT = 12000, 500  # rows
LONGEST = 16  # tokens of an answer; a right one has ten characters

MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
          "November", "December")  # fmt: skip
FORMS = ("{d} {month} {y}", "{d} {mon} {y}", "{month} {d}, {y}", "{mon} {d}, {y}", "{month} {nth}, {y}",
         "the {nth} of {month} {y}", "{d}.{m}.{y}")  # fmt: skip
LINES = ("Arrived {}", "Born {}", "Due {}", "Invoice of {}", "Lisbon, {}", "Meeting: {}", "Signed {}", "Valid until {}")
FIRST, LAST = date(1950, 1, 1), date(2049, 12, 31)


def make_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Rows as fine-tuning data has them, {"prompt": ..., "completion": ...}, no day in two of them."""
    rng = random.Random(seed)
    days = rng.sample(range((LAST - FIRST).days + 1), count)
    return [make_row(FIRST + timedelta(day), rng.choice(FORMS), rng.choice(LINES)) for day in days]


def make_row(day: date, form: str, line: str) -> dict[str, str]:
    month = MONTHS[day.month - 1]
    ending = "th" if day.day in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(day.day % 10, "th")
    written = form.format(d=day.day, m=day.month, y=day.year, month=month, mon=month[:3], nth=f"{day.day}{ending}")
    return {"prompt": line.format(written) + "\n", "completion": day.isoformat()}


def write_rows(folder: Path, *, train: int = TRAIN, held_out: int = HELD_OUT, seed: int = 1) -> list[dict[str, str]]:
    """Make `folder` a source of fine-tuning data, train.jsonl and valid.jsonl; the rows that are held out."""
    rows = make_rows(train + held_out, seed)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", rows[:train]), ("valid", rows[train:])):
        write_file(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in part))
    return rows[train:]


def answers(model: Llama, tokenizer: Tokenizer, prompts: Sequence[str]) -> list[str]:
    """The most probable continuation of each prompt, up to the token that ends it: equally long ones side by side."""
    begin = [] if tokenizer.begin_id is None else [tokenizer.begin_id]
    ids = [[*begin, *tokenizer.encode(prompt).tolist()] for prompt in prompts]
    found = [""] * len(prompts)
    for length in sorted(set(map(len, ids))):
        numbers = [number for number, row in enumerate(ids) if len(row) == length]
        written = _greedy(model, np.array([ids[number] for number in numbers]), tokenizer.end_id)
        for number, row in zip(numbers, written.tolist(), strict=True):
            found[number] = tokenizer.decode(takewhile(lambda token: token != tokenizer.end_id, row))
    return found


def _greedy(model: Llama, ids: np.ndarray, end: int) -> np.ndarray:
    """ids (B, T) -> what follows, (B, up to LONGEST); behind its end token a row goes on with anything."""
    cache = KVCache(model.config, batch=len(ids), capacity=ids.shape[1] + LONGEST)
    written = np.zeros((len(ids), 0), ids.dtype)
    with no_grad():
        while written.shape[1] < LONGEST and not (written == end).any(axis=1).all():
            ids = model.logits(model.hidden(ids, cache)[:, -1:]).data.argmax(axis=-1)  # (B, 1): read next
            written = np.concatenate([written, ids], axis=1)
    return written


def exact_match(said: Sequence[str], rows: Sequence[dict[str, str]]) -> float:
    """The share of answers that are the row's completion, character by character."""
    return sum(a == row["completion"] for a, row in zip(said, rows, strict=True)) / len(rows)
