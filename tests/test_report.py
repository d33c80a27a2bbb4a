"""report.html: one page per run that anyone can open, whatever state the run's files are in."""

import json
import math
import os
import random
import re
import subprocess
import sys
import tracemalloc
from html.parser import HTMLParser

import pytest
from conftest import SAME_PACKAGE

from entrenar.observe.charts import apart, even, plain, scale_for, step_ticks, ticks
from entrenar.observe.page import SCRIPT, STYLE, document, duration, large, moment, size, text, visible
from entrenar.observe.record import Ends, Record, lines_backward
from entrenar.observe.report import render_report, write_report
from entrenar.observe.series import Column, Series, column_of, smooth

LIMIT = 300_000  # bytes of a report
CONFIG = {
    "model": {"hidden_size": 128, "num_hidden_layers": 4, "vocab_size": None},
    "training": {"steps": 100, "clip_norm": 1.0, "start_from": ""},
    "data": {"source": "notes/stories.txt"},
}
FACTS = {
    "source": "notes/stories.txt", "train_documents": 9, "train_bytes": 90_000, "train_tokens": 30_000,
    "held_out_documents": 1, "held_out_bytes": 5_000, "held_out_tokens": 1_700,
    "gzip_bits": 1.95, "xz_bits": 1.66, "skipped": ["notes/picture.png"],
}  # fmt: skip
MACHINE = {"cpu": "A Processor", "threads": 2, "kernels": "avx2 C", "memory_limit": 8e9, "peak_flops": 2e11}
START = {
    "event": "start", "time": "2026-11-22T21:00:00+00:00", "config": CONFIG, "data": FACTS, "machine": MACHINE,
    "defaults": {"training": {"steps": 1600}},
    "plan": {"peak": 2e8, "limit": 8e9, "buffers": [["weights", 5_600_000], ["logits chunk", 16_000_000]]},
    "model": {"parameters": 1_377_408, "vocab_size": 2048, "hidden_size": 128, "num_hidden_layers": 4},
    "versions": {"entrenar": "0.1.0", "python": "3.11.7"},
}  # fmt: skip
SHORT_START = {name: START[name] for name in ("event", "config", "data", "machine")}  # as runs had it at first
END = {
    "event": "end", "time": "2026-11-22T21:02:00+00:00", "step": 100, "stopped": "", "seconds": 120.0,
    "memory_peak": 190_000_000, "held_out_bits_per_byte": 1.5,
}  # fmt: skip


def step(number, bits=None, steps=100, **others):
    bits = 1.5 + 3 / number if bits is None else bits
    return {
        "event": "step", "step": number, "steps": steps, "loss": 2.1 * bits, "bits_per_byte": bits,
        "learning_rate": 1e-3, "grad_norm": 1.1, "tokens": 1024 * number, "tokens_per_second": 9000.0,
        "peak_share": 0.5, "memory": 150_000_000, "memory_peak": 160_000_000, "seconds": 0.1 * number,
        "seconds_left": 1.0,
    } | others  # fmt: skip


def look(number, bits, *, whole=False):
    return {
        "event": "held_out", "step": number, "loss": 3.0, "bits_per_byte": bits, "tokens": 1700, "bytes": 5000,
        "seconds": 1.0, "whole": whole,
    }  # fmt: skip


def a_run(folder, events, *, tail="", sample="Once upon a time there was a step.\n", config=None):
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(event) + "\n" for event in events)
    (folder / "metrics.jsonl").write_text(lines + tail, encoding="utf-8", errors="surrogatepass")
    (folder / "sample.txt").write_text(sample, encoding="utf-8")
    if config is not None:
        (folder / "config.toml").write_bytes(config)
    return folder


def whole_run(**changes):
    return [
        START | changes,
        *(step(n) for n in range(1, 51)),
        look(50, 1.6),
        {"event": "checkpoint", "step": 50, "folder": "step-000050", "bytes": 1, "seconds": 0.1},
        {"event": "sample", "step": 50, "prompt": "Once", "text": " there was a cat."},
        {"event": "warning", "step": 60, "text": "a spike"},
        *(step(n) for n in range(51, 71)),
        {"event": "resume", "time": "2026-11-22T21:01:00+00:00", "step": 50, "checkpoint": "step-000050",
         "machine": MACHINE | {"threads": 4}},
        *(step(n) for n in range(51, 101)),
        look(100, 1.5, whole=True),
        END,
    ]  # fmt: skip


# --- a reader of pages --------------------------------------------------------------------------------------

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """A page taken apart; `wrong` says what no report may have."""

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.open, self.wrong, self.ids, self.wanted, self.headings, self.tags = [], [], [], [], [], []
        self.words = ""
        self.feed(source)
        self.close()
        self.wrong += [f"{tag} is not closed" for tag in self.open]
        self.wrong += [f"id {name} twice" for name in set(self.ids) if self.ids.count(name) > 1]
        self.wrong += [f"no element has the id {name}" for name in self.wanted if name not in self.ids]
        levels = [int(tag[1]) for tag in self.headings]
        self.wrong += ["a heading is skipped" for a, b in zip([0, *levels], levels, strict=False) if b > a + 1]
        self.wrong += ["wanted one h1"] if levels.count(1) != 1 else []

    def handle_starttag(self, tag, attrs):
        self._look(tag, dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self._look(tag, dict(attrs))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}> closes nothing")

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.words += data
        elif re.search(r"https?:|//[a-z]|@import|url\(|\bfetch\b|XMLHttp|innerHTML|\beval\b", data):
            self.wrong.append(f"<{self.open[-1]}> reaches out")

    def _look(self, tag, attrs):
        self.tags.append((tag, attrs))
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.wanted += attrs.get("aria-labelledby", "").split()
        self.headings += [tag] if re.fullmatch("h[1-6]", tag) else []
        if tag in ("iframe", "object", "embed", "base", "form", "img"):
            self.wrong.append(f"<{tag}> has no place here")
        for name, value in attrs.items():
            if name in ("src", "srcset", "action", "xlink:href") or name.startswith("on"):
                self.wrong.append(f"{name} of <{tag}>")
            if name == "href" and value != "data:,":
                self.wrong.append(f"a link to {value}")


def read(run):
    """The report of a run, taken apart and found sound."""
    source = render_report(run)
    assert len(source.encode()) < LIMIT
    page = Page(source)
    assert not page.wrong, page.wrong
    return page


@pytest.mark.parametrize(
    "wrong",
    [
        "<h1>a</h1><div>",
        "<h1>a</h1></p>",
        "<h1>a</h1><script src='x.js'></script>",
        "<h1>a</h1><a href='https://example.org'>x</a>",
        "<h1>a</h1><img>",
        "<h1>a</h1><p onclick='x()'></p>",
        "<h1>a</h1><p id='x'></p><p id='x'></p>",
        "<h1>a</h1><p aria-labelledby='nobody'></p>",
        "<h1>a</h1><h3>b</h3>",
        "<h1>a</h1><style>@import 'x'</style>",
        "<h1>a</h1><script>fetch('x')</script>",
        "<p>no heading</p>",
    ],
)
def test_the_reader_of_pages_finds_what_is_wrong(wrong):
    assert Page(wrong).wrong


# --- a whole run --------------------------------------------------------------------------------------------


def test_a_whole_run_has_every_part_in_its_order(tmp_path):
    source = render_report(a_run(tmp_path / "run", whole_run()))
    assert re.findall(r"<h2[^>]*>([^<]+)", source) == [
        "Curves", "What it wrote", "Memory: plan and measurement", "Configuration", "Machine and software", "Data",
        "Events", "How to go on",
    ]  # fmt: skip


def test_the_page_is_balanced_and_reaches_out_to_nothing(tmp_path):
    page = read(a_run(tmp_path / "run", whole_run()))
    scripts = [attrs for tag, attrs in page.tags if tag == "script"]
    assert scripts == [{}], "one script, inline"


def test_the_outcome_is_said_in_words(tmp_path):
    words = read(a_run(tmp_path / "run", whole_run())).words
    assert "A LLaMA learns stories.txt" in words and "1.4 million parameters" in words
    assert "1.50 bits per byte on text it never saw (xz 1.66, gzip 1.95)." in words
    assert "10\u00a0s of training on 2 threads" in words


def test_the_defaults_own_source_has_its_name_and_a_continued_model_is_said_to_go_on(tmp_path):
    config = CONFIG | {"training": {"start_from": "models/old"}}
    words = read(a_run(tmp_path / "run", [START | {"data": FACTS | {"source": "stdlib:"}, "config": config}])).words
    assert "A LLaMA goes on to learn Python’s standard library" in words


def test_options_that_differ_come_first_with_their_defaults(tmp_path):
    source = render_report(a_run(tmp_path / "run", whole_run()))
    before, after = source.split("options with their defaults")
    assert "<code>training.steps</code></td><td><code>100</code></td><td><code>1600</code>" in before
    assert "training.clip_norm" not in before and "training.clip_norm" in after


def test_the_plan_stands_beside_the_measured_peak(tmp_path):
    page = read(a_run(tmp_path / "run", whole_run()))
    for words in ("weights", "5.6 MB", "Planned peak", "200 MB", "Measured peak", "190 MB", "−5.0%"):
        assert words in page.words, words


def test_a_resume_on_another_machine_is_told(tmp_path):
    assert "Threads, after step 50" in read(a_run(tmp_path / "run", whole_run())).words


def test_the_newest_plan_counts(tmp_path):
    resume = {"event": "resume", "step": 1, "plan": {"peak": 3e8, "limit": 8e9, "buffers": []}}
    assert "300 MB planned" in read(a_run(tmp_path / "run", [START, step(1), resume, step(2)])).words


def test_every_drawing_has_a_title_and_says_what_it_shows(tmp_path):
    source = render_report(a_run(tmp_path / "run", whole_run()))
    drawings = re.findall(r'<svg role="img".*?<title id="(.*?)">(.*?)</title><desc id="(.*?)">(.*?)</desc>', source)
    assert [title for _, title, _, _ in drawings] == [
        "Bits per byte", "Learning rate", "Gradient norm", "Tokens per second", "Memory"
    ]  # fmt: skip
    assert "held-out text: from 1.600 at step 50 to 1.500 at step 100" in drawings[0][3]
    assert "xz reaches 1.660" in drawings[0][3]


def test_resumes_warnings_and_checkpoints_are_marked_at_their_steps(tmp_path):
    source = render_report(a_run(tmp_path / "run", whole_run()))
    assert '<path class="mark resume" d="M500 1000h0"/>' in source
    assert '<path class="mark warning" d="M600 1000h0"/>' in source
    assert '<path class="mark checkpoint" d="M500 1000h0"/>' in source
    assert '<path class="across resume" d="M500 0V1000"/>' in source


def test_samples_stand_with_their_prompt_and_the_file_beside_them(tmp_path):
    source = render_report(a_run(tmp_path / "run", whole_run()))
    assert '<span class="prompt">Once</span> there was a cat.' in source
    assert "Once upon a time there was a step." in source
    once = render_report(a_run(tmp_path / "same", whole_run(), sample="Once there was a cat.\n"))
    assert once.count("there was a cat") == 1, "the last sample and sample.txt are the same text"


def test_the_commands_name_this_run_and_quote_it(tmp_path):
    words = read(a_run(tmp_path / "my run", whole_run())).words
    assert f"entrenar generate '{tmp_path / 'my run'}' --prompt" in words
    assert "--training.steps 200" in words, "a finished run can go on for longer"


def test_the_same_run_gives_the_same_bytes(tmp_path):
    run = a_run(tmp_path / "run", whole_run())
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    assert (run / "report.html").read_bytes() == render_report(str(run)).encode()
    command = [sys.executable, "-c", f"from entrenar.observe.report import *; write_report({str(run)!r})"]
    subprocess.run(command, env=SAME_PACKAGE | {"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"}, check=True)
    assert (run / "report.html").read_bytes() == first


def test_no_folder_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder of a run"):
        write_report(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="no folder of a run"):
        write_report(tmp_path / "file")


# --- hostile words ------------------------------------------------------------------------------------------

ATTACK = "</pre></title><script>alert('x')</script><img src=x onerror=alert(1)>\" onload='x' \x1b[2J\u202eabc\ud800&lt;"


def everywhere(value, words):
    """The value with `words` in place of every text, names of tables' keys included where they are free."""
    if isinstance(value, dict):
        return {k: everywhere(v, words) for k, v in value.items()} | {words: words}
    if isinstance(value, list):
        return [everywhere(v, words) for v in value]
    return words if isinstance(value, str) else value


def test_nothing_that_a_file_says_becomes_markup(tmp_path):
    events = [everywhere(event, ATTACK) | {"event": event["event"]} for event in whole_run()]
    events.append({"event": "error", "step": 101, "text": ATTACK})
    folder = tmp_path / "<script>alert(2)<" / 'a"onload=x b\n\x1b'
    sample = ATTACK.replace("\ud800", "")
    page = read(a_run(folder, events, sample=sample))
    assert [attrs for tag, attrs in page.tags if tag == "script"] == [{}]
    assert "alert('x')" in page.words, "it is shown as the text that it is"
    source = render_report(folder)
    assert "\x1b" not in source and "\u202e" not in source and "␛[2J⟨U+202E⟩abc⟨U+D800⟩" in source


@pytest.mark.parametrize(
    "attack",
    [ATTACK, "&" * 50_000, "\u202e" * 50_000, "x" * 200_000, "\U0001f600" * 20_000],
    ids=["markup", "ampersands", "overrides", "letters", "faces"],
)
def test_endless_texts_are_cut(tmp_path, attack):
    many = [{"event": "warning", "step": n, "text": attack[:3000]} for n in range(1, 300)]
    samples = [{"event": "sample", "step": n, "prompt": attack, "text": attack} for n in range(1, 12)]
    start = START | {"config": {"data": {f"{attack[:50]}{n}": attack[:500] for n in range(400)}}}
    start |= {"plan": {"peak": 1, "limit": 1, "buffers": [[attack[:300], 5, attack[:300]]] * 400}}
    read(a_run(tmp_path / "run", [start, step(1), *many, *samples], sample=attack.replace("\ud800", "")))


def test_what_cannot_be_seen_is_shown_and_letters_are_left_alone():
    assert visible("a\x00\x1b\x7f\r\n\tb") == "a␀␛␡␍\n\tb"
    assert visible("\u202e\x9b\u2028\ud800") == "⟨U+202E⟩⟨U+009B⟩⟨U+2028⟩⟨U+D800⟩"
    for kept in ("naïve 你好　全角", "नमस्ते", "👩‍🔬", "می‌خواهم", "a\u00a0b"):
        assert visible(kept) == kept
    assert visible("x" * 50, 10) == "xxxxxxxxxx… (40 more characters)"
    assert text({"a": "<"}) == "{&quot;a&quot;: &quot;&lt;&quot;}" and text(None) == "none" and text(True) == "true"


def test_the_pages_policy_names_the_one_script_and_refuses_all_else():
    import base64
    import hashlib

    page = document("t", "")
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1]
    script = re.search("<script>(.*?)</script>", page, re.S)[1]
    assert script == SCRIPT and base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
    assert "default-src 'none'" in policy and "unsafe-eval" not in policy
    assert "script-src 'sha256-" in policy and "script-src 'unsafe-inline'" not in policy


# --- any state of the files ---------------------------------------------------------------------------------


def test_a_folder_without_metrics_says_so(tmp_path):
    (tmp_path / "run").mkdir()
    words = read(tmp_path / "run").words
    assert "no metrics.jsonl" in words and "No step of this run is recorded yet" in words


def test_an_empty_file_and_a_start_alone_say_that_nothing_was_trained(tmp_path):
    assert "no start event" in read(a_run(tmp_path / "empty", [])).words
    words = read(a_run(tmp_path / "start", [START])).words
    assert "No step of this run is recorded yet" in words and "Curves" not in words


def test_the_start_event_of_earlier_runs_is_enough(tmp_path):
    words = read(a_run(tmp_path / "run", [SHORT_START, step(1), step(2)])).words
    assert "4 layers" in words and "No plan was recorded" in words and "All 7 options" in words


def test_without_a_start_event_the_configuration_comes_from_its_file(tmp_path):
    toml = b'[data]\nsource = "a/book.txt"\n[training]\nsteps = 50\nwhen = 2026-11-22\n'
    words = read(a_run(tmp_path / "run", [step(1, steps=50)], config=toml)).words
    assert "A LLaMA learns book.txt" in words and "no start event" in words and "2026-11-22" in words


@pytest.mark.parametrize("toml", [b"[data\n", b"\xff\xfe", b"a = " + b"[" * 5000])
def test_a_broken_configuration_is_said(tmp_path, toml):
    assert "config.toml cannot be read" in read(a_run(tmp_path / "run", [step(1)], config=toml)).words


def test_a_cut_last_line_is_said_and_all_before_it_counts(tmp_path):
    words = read(a_run(tmp_path / "run", [START, step(1), step(2)], tail='{"event": "step", "ste')).words
    assert "The last line of metrics.jsonl is cut off" in words
    assert "After 2 of 100 steps this run goes on, or was killed" in words
    assert "cut off" not in read(a_run(tmp_path / "whole", [START, step(1), step(2)])).words


def test_a_file_cut_at_any_byte_gives_a_report(tmp_path):
    content = "".join(json.dumps(e) + "\n" for e in (START, step(1), look(1, 2.0), END)).encode()
    run = a_run(tmp_path / "run", [])
    for length in range(0, len(content), 29):
        (run / "metrics.jsonl").write_bytes(content[:length])
        assert not Page(render_report(run)).wrong


def test_lines_that_are_no_events_are_counted_and_unknown_events_passed_over(tmp_path):
    endless = '{"event": "step", "step": 1' + "0" * 5000 + "}"
    bad = ["nonsense", "[1]", '{"step": 1}', '{"event": 5}', "[" * 100_000, endless]
    run = a_run(tmp_path / "run", [START])
    with open(run / "metrics.jsonl", "ab") as file:
        file.write("\n".join([*bad, '{"event": "eclipse", "step": 3}', ""]).encode() + b"\xff\xfe\n\n")
        file.write(json.dumps(step(1)).encode() + b"\n")
    words = read(run).words
    assert "7 lines of metrics.jsonl could not be read" in words and "eclipse" not in words


def test_values_that_are_not_finite_are_counted_not_drawn(tmp_path):
    events = [START, step(1), step(2, math.nan), step(3, math.inf, grad_norm=-math.inf, memory=10**400), step(4)]
    source = render_report(a_run(tmp_path / "run", events))
    assert "4 values of metrics.jsonl: not finite" in source
    assert not re.search(r'd="[^"]*(nan|inf)', source)


@pytest.mark.parametrize(
    "value",
    [None, "word", True, [], {}, [[[]]], -1, 1.5, 10**18, 10**400, math.nan, math.inf, -math.inf, 1e308, 5e-324],
)
def test_no_value_of_any_field_stops_a_report(tmp_path, value):
    rng = random.Random(repr(value))
    for trial in range(6):
        events = [dict(event) for event in whole_run()[::7] + [START, step(1), look(1, 2.0), END]]
        for event in events:
            for name in rng.sample(sorted(event), min(len(event), 3)):
                if name != "event" or trial == 0:
                    event[name] = value
        start = {name: value for name in START} | {"event": "start"} if trial % 2 else START
        inner = {
            name: {key: value for key in old} if isinstance(old, dict) else old for name, old in START.items()
        }  # fmt: skip
        read(a_run(tmp_path / "run", [start if trial % 3 else inner, *events]))


def test_deep_nesting_stops_nothing(tmp_path):
    for depth in (50, 400, 900, 990, 5000):
        deep = "[" * depth + "]" * depth
        table = f'{{"a": {{"b": {deep}}}}}'
        line = f'{{"event": "start", "config": {table}, "defaults": {table}, "plan": {deep}, "data": {table}}}\n'
        read(a_run(tmp_path / "run", [], tail=line))


def test_a_run_that_failed_says_where(tmp_path):
    error = {"event": "error", "step": 3, "text": "the loss is nan: layers.2.mlp, position 8"}
    words = read(a_run(tmp_path / "run", [START, step(1), step(2), error])).words
    assert "Training failed after 2 of 100 steps" in words
    assert "Step 3: the loss is nan: layers.2.mlp, position 8" in words and "entrenar resume" in words
    old = {"event": "error", "step": 3, "loss": "nan", "grad_norm": "inf"}
    assert "Step 3: loss nan, grad_norm inf" in read(a_run(tmp_path / "old", [START, step(1), old])).words


def test_a_run_that_was_stopped_says_by_what_and_one_that_was_resumed_has_not_ended(tmp_path):
    stopped = [START, step(1), END | {"step": 1, "stopped": "Ctrl-C"}]
    assert "Ctrl-C ended it after 1 of 100 steps" in read(a_run(tmp_path / "a", stopped)).words
    on = [*stopped, {"event": "resume", "step": 1, "checkpoint": "step-000001"}, step(2)]
    words = read(a_run(tmp_path / "b", on)).words
    assert "After 2 of 100 steps this run goes on, or was killed" in words and "Ctrl-C" in words, "in the events"


def test_without_a_look_at_held_out_text_the_training_speaks(tmp_path):
    words = read(a_run(tmp_path / "run", [START, step(1, 2.5)])).words
    assert "2.50 bits per byte on its training text; held-out text was not read yet" in words


def test_a_pipe_in_place_of_the_metrics_is_not_waited_for(tmp_path):
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run" / "metrics.jsonl")
    assert "no metrics.jsonl" in read(tmp_path / "run").words


# --- reading backwards --------------------------------------------------------------------------------------


def test_lines_come_from_the_last_to_the_first_whatever_the_block(tmp_path):
    path = tmp_path / "lines"
    for content in (b"", b"a", b"a\n", b"\n\n", b"first\nsecond\n\nfourth", b"x" * 50 + b"\n" + b"y" * 3):
        path.write_bytes(content)
        wanted = content.split(b"\n")[::-1] if content else [b""]
        for block in (1, 2, 3, 7, 1000):
            assert list(lines_backward(path, len(content), block=block)) == wanted


def test_of_a_line_without_end_only_its_end_is_kept(tmp_path):
    path = tmp_path / "lines"
    path.write_bytes(b"a" * 1000 + b"z\nlast")
    lines = list(lines_backward(path, 1006, block=10, longest=20))
    assert lines[0] == b"last" and lines[1].endswith(b"az") and max(map(len, lines)) <= 30


def test_what_a_run_writes_while_its_report_is_made_does_not_count(tmp_path, monkeypatch):
    run = a_run(tmp_path / "run", [START, step(1), step(2)])
    before = Record._last_step

    def and_meanwhile(record):
        last = before(record)
        with open(run / "metrics.jsonl", "a") as file:
            file.write("".join(json.dumps(event) + "\n" for event in (step(3), look(3, 2.0), step(4))))
        return last

    monkeypatch.setattr(Record, "_last_step", and_meanwhile)
    assert Record(run).last["step"] == 2
    monkeypatch.undo()
    assert Record(run).last["step"] == 4


def test_a_look_without_its_step_is_passed_over(tmp_path):
    assert Record(a_run(tmp_path / "run", [START, step(1), look(900, 2.0)])).look == {}


def test_of_a_step_told_twice_the_later_line_counts_and_abandoned_steps_do_not(tmp_path):
    events = [START, *(step(n, 3.0, memory_peak=0) for n in range(1, 91)), look(90, 9.0)]
    events += [{"event": "resume", "step": 40, "checkpoint": "step-000040"}, *(step(n, 2.0) for n in range(41, 61))]
    record = Record(a_run(tmp_path / "run", events))
    columns = record.series["bits_per_byte"].columns()
    assert record.last_step == 60 and [c.step for c in columns] == list(range(1, 61))
    assert [c.mean for c in columns] == [3.0] * 40 + [2.0] * 20
    assert record.held_out.count == 0, "a look at weights that were given up"
    assert record.steps_again == 50 and "50 recorded steps" in read(tmp_path / "run").words


def test_a_resume_without_a_step_after_it_still_gives_up_what_came_later(tmp_path):
    record = Record(a_run(tmp_path / "run", [START, *(step(n) for n in range(1, 11)), {"event": "resume", "step": 4}]))
    assert record.last_step == 4 and record.last["step"] == 4


def test_steps_that_begin_again_without_a_word_count_once(tmp_path):
    record = Record(a_run(tmp_path / "run", [step(1, 5.0), step(2, 5.0), step(1, 2.0), step(2, 2.0)]))
    assert [c.mean for c in record.series["bits_per_byte"].columns()] == [2.0, 2.0]


def test_of_an_earlier_run_in_the_same_file_nothing_is_told(tmp_path):
    record = Record(a_run(tmp_path / "run", [START, step(1, 9.0), step(2, 9.0), END, START, step(1, 2.0)]))
    assert record.last_step == 1 and record.end is None and record.events.count == 1


def test_time_in_training_adds_up_over_resumes_whether_or_not_the_clock_began_again(tmp_path):
    resume = {"event": "resume", "step": 10}
    one = [START, *(step(n) for n in range(1, 11)), resume]
    again = [step(n, seconds=0.1 * (n - 10)) for n in range(11, 21)]
    goes_on = [step(n) for n in range(11, 21)]
    assert Record(a_run(tmp_path / "a", [*one, *again])).seconds == pytest.approx(2.0)
    assert Record(a_run(tmp_path / "b", [*one, *goes_on])).seconds == pytest.approx(2.0)


def test_the_ends_of_many_things_are_kept_in_order():
    ends = Ends(3, 2)
    for number in range(10, 0, -1):
        ends.add(number)
    assert ends.in_order() == ([1, 2], [8, 9, 10]) and ends.left_out == 5
    few = Ends(3, 2)
    few.add(1)
    assert few.in_order() == ([], [1]) and few.left_out == 0


def test_a_checkpoint_that_is_also_the_best_counts_once(tmp_path):
    saved = [{"event": "checkpoint", "step": n, "folder": "step"} for n in (1, 1, 2, 2, 2)]
    assert Record(a_run(tmp_path / "run", [START, step(1), step(2), *saved])).kinds["checkpoint"] == 2


def test_many_warnings_are_listed_at_both_ends_and_counted(tmp_path):
    events = [START, *({"event": "warning", "step": 1, "text": f"no. {n}"} for n in range(500)), step(1)]
    words = read(a_run(tmp_path / "run", events)).words
    assert "no. 0" in words and "no. 499" in words and "no. 250" not in words
    assert "401 more, in metrics.jsonl" in words and "500 warnings" in words


# --- long runs ----------------------------------------------------------------------------------------------


def test_columns_keep_the_extremes_of_every_step():
    rng = random.Random(0)
    last, values = 30_000, {}
    series = Series(last)
    for number in range(last, 0, -1):
        values[number] = rng.gauss(0, 1)
    values[17_777], values[12_345] = 50.0, -50.0
    for number, value in values.items():
        series.add(number, value)
    columns = series.columns()
    assert len(columns) == 600 and series.count == last
    assert max(c.high for c in columns) == 50 and min(c.low for c in columns) == -50
    highest = max(columns, key=lambda c: c.high)
    assert abs(highest.step - 17_777) <= last / 600
    inside = [v for n, v in values.items() if column_of(n, last) == 0]
    assert columns[0].mean == pytest.approx(sum(inside) / len(inside)) and columns[0].low == min(inside)


def test_every_step_has_its_own_column_where_there_is_room():
    series = Series(300)
    for number in range(1, 301):
        series.add(number, number / 2)
    assert series.columns() == [Column(n, n / 2, n / 2, n / 2) for n in range(1, 301)]


def test_a_spike_of_one_step_in_a_long_run_is_drawn(tmp_path):
    events = [START, *(step(n, 2.0, steps=6000) for n in range(1, 6001))]
    events[5000] = step(5000, 1.9, steps=6000, grad_norm=80.0)
    source = render_report(a_run(tmp_path / "run", events))
    assert re.search(r"its highest is 80 near step (4,99|5,00)\d", source) and "highest <b>80</b>" in source
    chart = source[source.index('id="chart-norm-title"') :]
    raw = re.search(r'class="raw train" d="([^"]+)"', chart)[1]
    assert min(float(pair.split()[1]) for pair in raw[1:].split("L")) < 100, "near the top"


def test_a_million_steps_fit_into_300_kilobytes(tmp_path):
    rng = random.Random(0)
    events = [START]
    for n in range(250, 1_000_001, 250):
        noise = {name: rng.random() * 10**6 for name in ("grad_norm", "tokens_per_second", "memory")}
        events += [step(n, rng.random(), steps=10**6, learning_rate=rng.random(), **noise), look(n, rng.random())]
        events += [{"event": kind, "step": n, "text": "x" * 99} for kind in ("checkpoint", "warning")]
    read(a_run(tmp_path / "run", events))


def test_memory_does_not_grow_with_the_file(tmp_path):
    def peak(lines):
        run = a_run(tmp_path / str(lines), [START, *(step(n) for n in range(1, lines))])
        tracemalloc.start()
        Record(run)  # of which the page is made; its size has a test of its own
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    small, large_one = peak(700), peak(2100)
    assert large_one < 1.1 * small + 200_000, f"{large_one} bytes for three times the lines of {small}"


@pytest.mark.tier3
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="peak memory is read from /proc")
def test_two_hundred_thousand_lines_are_read_in_less_than_100_megabytes(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with open(run / "metrics.jsonl", "w") as file:
        file.write(json.dumps(START) + "\n")
        for number in range(1, 200_001):
            file.write(json.dumps(step(number, steps=200_000)) + "\n")
    assert (run / "metrics.jsonl").stat().st_size > 50e6
    code = (
        "import sys; from entrenar.observe.report import write_report; write_report(sys.argv[1]);"
        "print(open('/proc/self/status').read())"  # getrusage would tell the parent's peak where that was higher
    )
    command = [sys.executable, "-c", code, str(run)]
    done = subprocess.run(command, env=SAME_PACKAGE, capture_output=True, text=True, check=True)
    assert int(re.search(r"VmHWM:\s+(\d+) kB", done.stdout)[1]) * 1024 < 100e6


# --- scales, words, colours ---------------------------------------------------------------------------------


def test_ticks_are_round_and_cover_the_range():
    assert ticks(0, 1, 5) == [0, 0.25, 0.5, 0.75, 1.0]
    for low, high in ((0, 0), (1.2, 1.2), (-3, 5), (1e-12, 3e-12), (0, 1e30), (-1e30, 1e30)):
        marks = ticks(low, high, 5)
        assert marks[0] <= low and marks[-1] >= high and 2 <= len(marks) <= 8
    assert step_ticks(0) == [0, 1] and step_ticks(3) == [0, 1, 2, 3] and step_ticks(1600)[-1] <= 1600


def test_a_scale_leaves_out_a_steep_beginning_and_takes_powers_of_ten_where_values_differ_much():
    steep = [Column(n, 9.0 if n < 2 else 1.5, 1.4, 9.0) for n in range(100)]
    assert scale_for(steep, [1.95], cut=0.05).high < 3
    wide = [Column(n, 1.0, 0.9, 5000.0 if n == 7 else 1.1) for n in range(100)]
    scale = scale_for(wide, zero=True, log=True)
    assert scale.log and scale.low <= 0.9 and scale.high >= 5000 and 0 < scale.up(1.0) < scale.up(10.0) < 1
    assert not scale_for(wide, zero=True).log
    assert scale_for([]).high > scale_for([]).low


def test_labels_are_short_and_alike():
    assert [plain(v) for v in (0, 0.25, 1500, 15_000, 2.5e6, 0.00002)] == ["0", "0.25", "1,500", "15k", "2.5M", "2e-5"]
    assert [even([1, 1.25, 1.5])(v) for v in (1, 1.25)] == ["1.00", "1.25"]
    assert [even([0, 0.00025, 0.0005])(v) for v in (0, 0.00025)] == ["0", "2.5e-4"]


def test_names_at_the_ends_of_lines_keep_apart():
    places = apart([10, 11, 12, 90], 18, 0, 100)
    assert all(b - a >= 17.9 for a, b in zip(places, places[1:], strict=False)) and places[-1] == 90
    assert apart([0, 50], 18, 8, 92) == [8, 50], "moving one leaves the others alone"
    assert apart([], 18, 8, 92) == []


def test_smoothing_keeps_a_constant_and_the_place_of_every_column():
    columns = [Column(n, 2.0, 1.0, 3.0) for n in range(50)]
    assert [(c.step, round(c.mean, 12)) for c in smooth(columns)] == [(n, 2.0) for n in range(50)]
    assert smooth([]) == []


def test_numbers_become_words():
    assert [size(v) for v in (0, 999, 1e3, 60_766_208, 999_999_999, 1.18e9, 25e9)] == [
        "0 bytes", "999 bytes", "1 kB", "60.8 MB", "1 GB", "1.18 GB", "25 GB"
    ]  # fmt: skip
    spoken = [duration(v).replace("\u00a0", " ") for v in (4, 59.4, 59.6, 94, 3599.9, 11_520, 1e6)]
    assert spoken == ["4.0 s", "59 s", "1 min 0 s", "1 min 34 s", "1 h 0 min", "3 h 12 min", "11.6 days"]
    assert [large(v) for v in (512, 1_377_408, 6_738_415_616)] == ["512", "1.4 million", "6.7 billion"]
    assert moment("2026-11-22T21:00:00+00:00") == "2026-11-22 21:00:00 UTC"
    assert moment("<now>") == "&lt;now&gt;" and moment(7) == ""


def colours(style):
    return dict(re.findall(r"--(\w+):(#[0-9a-f]{3,6})", style))


def contrast(a, b):
    """WCAG 2's ratio of two colours' luminances."""

    def luminance(colour):
        digits = colour[1:] if len(colour) == 7 else "".join(2 * d for d in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_words_stand_out_from_the_paper_in_light_in_dark_and_in_print():
    assert contrast("#000", "#ffffff") == pytest.approx(21)
    light, dark, paper = (colours(part) for part in re.findall(r":root\{(.*?)\}", STYLE, re.S))
    for theme in (light, dark, paper):
        for words in ("ink", "grey", "blue", "bad"):
            assert contrast(theme[words], theme["paper"]) >= 4.5, words
        assert contrast(theme["grey"], theme["box"]) >= 4.5
        for line in ("orange", "green"):
            assert contrast(theme[line], theme["paper"]) >= 3, line
