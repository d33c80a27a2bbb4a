"""What a run shows, on a terminal and elsewhere; and its picture."""

import dataclasses
import io
import re

import numpy as np
import pytest

from entrenar.observe.charts import apart, ticks
from entrenar.training.curve import Curve, render, smooth
from entrenar.training.display import (
    Heading,
    HeldOut,
    LivePanel,
    PlainLines,
    Report,
    clock,
    make_display,
    size,
    sparkline,
)

REPORT = Report(
    step=1,
    steps=100,
    loss=5.5,
    bits_per_byte=2.6,
    learning_rate=1e-3,
    grad_norm=1.25,
    tokens=4096,
    tokens_per_second=12345.6,
    peak_share=0.314,
    memory=10**8,
    memory_peak=2 * 10**8,
    seconds=61.0,
    seconds_left=3700.0,
)
SEEN = HeldOut(step=50, loss=3.0, bits_per_byte=1.6, tokens=1000, bytes=3000, seconds=1.0, whole=False)
HEADING = Heading("a LLaMA [of] sorts", ["line one"], gzip_bits=1.95, xz_bits=1.66)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def told(display, steps=(1, 2, 10, 11, 100)):
    display.doing("reading text")
    display.start(HEADING)
    for step in steps:
        display.step(dataclasses.replace(REPORT, step=step))
    display.held_out(SEEN)
    display.note("take care")
    display.close()
    display.close()


def test_elsewhere_than_on_a_terminal_every_report_is_one_parsable_line():
    out = io.StringIO()
    told(make_display(report_every=10, stream=out))
    lines = [line for line in out.getvalue().splitlines() if not line.startswith("#")]
    pairs = [dict(pair.split("=", 1) for pair in line.split(" ")) for line in lines]
    assert [p["step"] for p in pairs] == ["1/100", "10/100", "100/100", "50"]
    assert (pairs[0]["loss"], pairs[0]["tokens_per_second"], pairs[-1]["held_out_bits_per_byte"]) == (
        "5.5000", "12346", "1.6000")  # fmt: skip
    assert "\x1b" not in out.getvalue()


def test_what_takes_time_before_the_first_step_is_told_elsewhere_too():
    out = io.StringIO()
    told(make_display(report_every=10, stream=out))
    assert out.getvalue().startswith("# reading text\n")


@pytest.mark.parametrize("term", ["dumb", ""])
def test_a_dumb_terminal_gets_lines_too(monkeypatch, term):
    monkeypatch.setenv("TERM", term)
    assert isinstance(make_display(report_every=10, stream=Terminal()), PlainLines)


def test_a_terminal_gets_a_panel_with_everything(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = Terminal()
    display = make_display(report_every=10, stream=out)
    assert isinstance(display, LivePanel)
    told(display)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    for expected in (
        "a LLaMA [of] sorts",
        "step 100/100",
        "1:01 gone, 1:01:40 left",
        "5.5000",
        "3.0000",
        "1.600",
        "1.950 / 1.660",
        "12,346",
        "31%",
        "100 MB, 200 MB",
        "1.00e-03",
        "1.250",
        "take care",
    ):
        assert expected in text, expected


def test_no_color_is_respected(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    out = Terminal()
    told(make_display(report_every=10, stream=out))
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", out.getvalue())


@pytest.mark.parametrize("width", [20, 40, 200])
def test_a_panel_fits_any_width(width):
    out = Terminal()
    told(LivePanel(out, width=width))
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue()).replace("\r", "\n").splitlines()
    assert max(map(len, lines)) <= width


def test_on_eighty_columns_no_number_is_cut_off():
    out = Terminal()
    told(LivePanel(out, width=80))
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert "100 MB, 200 MB" in text and "…" not in text


def test_a_log_on_a_full_disk_does_not_end_the_run():
    told(PlainLines(open("/dev/full", "w"), report_every=1))


def test_what_is_done_without_a_name_is_not_told():
    out = io.StringIO()
    PlainLines(out, report_every=1).doing("", 1, 2)
    assert out.getvalue() == ""


def test_words_for_numbers():
    assert [clock(s) for s in (0, 75.4, 3700, 10**6)] == ["0:00", "1:15", "1:01:40", "11.6 days"]
    assert [size(n) for n in (999, 5_200_000, 123_000_000, 2 * 10**9)] == [
        "1 kB",
        "5.2 MB",
        "123 MB",
        "2.0 GB",
    ]
    assert sparkline([], 10) == "" and sparkline([8, 4, 2, 1], 4)[-1] == "▁"
    assert len(sparkline(range(1000), 50)) == 50


# --- the picture ----------------------------------------------------------------------------------------

POINTS = [(i + 1, 1.6 + 4 / (i + 1)) for i in range(300)]


def pixels(curve):
    from PIL import Image

    return Image.open(io.BytesIO(render(curve))).convert("RGB")


@pytest.mark.parametrize("count", [0, 1, 2, 300])
def test_a_picture_is_drawn_of_few_points_and_many(count):
    image = pixels(
        Curve("title", "subtitle", POINTS[:count], POINTS[:count:100], [("gzip -9", 1.9), ("xz -9", 1.7)])
    )
    assert image.size == (1200, 720)
    assert len(image.getcolors(1 << 20)) > 10


def test_lines_stay_inside_the_frame():
    image = pixels(Curve("t", "s", [(1, 50.0), *POINTS[1:], (301, 0.01)], [], []))
    y, _ = np.nonzero((np.asarray(image)[:, :1020] == (0, 0x72, 0xB2)).all(2))
    assert y.min() > 100 and y.max() <= 646


def test_ticks_are_round_and_cover_the_range():
    assert ticks(1.62, 3.9, 6) == [1.5, 2.0, 2.5, 3.0, 3.5, 4.0]
    for low, high in ((0, 1200), (0, 7), (3, 3), (0, 0), (1e-9, 1e9), (-5, 5)):
        t = ticks(low, high, 7)
        assert t[0] <= low and t[-1] >= high and 2 <= len(t) <= 12


def test_smoothing_keeps_lines_and_levels():
    flat = [(i, 2.0) for i in range(100)]
    assert smooth(flat) == flat
    rising = [(i, float(i)) for i in range(100)]
    assert [y for _, y in smooth(rising)][:90] == pytest.approx([float(i) for i in range(90)])


def test_labels_move_apart_and_keep_their_order():
    placed = apart([10, 11, 12, 200], 20, 0, 220)
    assert sorted(placed) == placed
    assert min(b - a for a, b in zip(placed, placed[1:], strict=False)) >= 19.9
    assert placed[0] >= 0 and placed[-1] <= 220


def test_a_fine_tuning_run_shows_perplexity_instead_of_bits():
    stream = io.StringIO()
    panel = LivePanel(stream, rate=1e9, width=110)
    panel.start(Heading("a model learns to answer", ["line one"]))
    for step, loss in ((0, 3.0), (50, 2.0)):
        panel.held_out(dataclasses.replace(SEEN, step=step, loss=loss, bits_per_byte=None, bytes=0))
    panel.step(dataclasses.replace(REPORT, bits_per_byte=None))
    panel.close()
    text = stream.getvalue()
    assert "perplexity, held out" in text and "7.389" in text and "3.0000" in text and "bits/byte" not in text

    lines = PlainLines(stream := io.StringIO(), report_every=1)
    lines.step(dataclasses.replace(REPORT, loss=0.0, bits_per_byte=None))
    lines.held_out(dataclasses.replace(SEEN, loss=0.0, bits_per_byte=None))
    assert " perplexity=1.0000 " in stream.getvalue() and "held_out_perplexity=1.0000" in stream.getvalue()
