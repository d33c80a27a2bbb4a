"""dates"""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import date, timedelta

MONTHS = """January February March April May June July August September October November December""".split()
FORMS = ("{d} {month} {y}", "{month} {d}, {y}", "{d} {mon} {y}", "{mon} {d}, {y}", "the {nth} of {month} {y}",
         "{month} {nth}, {y}", "{d}.{m}.{y}", "{d} {month}, {y}")  # fmt: skip
LINES = (
    "Your flight leaves on {}.", "Meeting moved to {}, same room.", "Invoice 4071, due {}", "Born {} in Lisbon.",
    "The shop is closed on {}.", "Delivery expected by {}.", "Signed in Berlin, {}.", "{}: first snow.",
    "Valid until {}.", "She wrote to us on {}.", "Next exam: {}, room 12", "Photo taken {} at the lake.",
)  # fmt: skip
FIRST, LAST = date(1950, 1, 1), date(2049, 12, 31)


def rows(count: int, seed: int) -> Iterator[dict[str, str]]:
    rng = random.Random(seed)
    for day in rng.sample(range((LAST - FIRST).days + 1), count):
        yield row(FIRST + timedelta(day), rng.choice(FORMS), rng.choice(LINES))


def row(day: date, form: str, line: str) -> dict[str, str]:
    month = MONTHS[day.month - 1]
    nth = f"{day.day}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(day.day % 10 if day.day // 10 != 1 else 0, 'th')}"
    written = form.format(d=day.day, m=day.month, y=day.year, month=month, mon=month[:3], nth=nth)
    return {"prompt": line.format(written) + "\n", "completion": day.isoformat()}
