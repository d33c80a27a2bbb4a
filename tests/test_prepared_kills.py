"""Preparing text, killed at any moment, on a full disk, twice at once: the next one goes on and ends the same."""

import contextlib
import gzip
import hashlib
import json
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import SAME_PACKAGE
from preparing import LINES, Said, write_documents

from entrenar.data import CorpusError, find_sources, prepare
from entrenar.data import encoding as encoding_module
from entrenar.data import pieces as pieces_module
from entrenar.data import preparing as preparing_module
from entrenar.data.tokenfile import TokenWriter
from entrenar.data.work import Work


@pytest.fixture
def folder(tmp_path):
    return write_documents(tmp_path / "text")


@pytest.fixture
def small(monkeypatch):
    """Everything in small steps, and the journal after each."""
    monkeypatch.setattr(pieces_module, "PIECE", 100)
    monkeypatch.setattr(encoding_module, "SLAB", 1500)
    monkeypatch.setattr(encoding_module, "JOURNAL_EVERY", 0.0)


def jsonl(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def contents(folder):
    """Hashes of all files below."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(Path(folder).rglob("*")) if path.is_file()
    }  # fmt: skip


class Stop(BaseException):
    """Ends a preparation at some point, as Ctrl-C would."""


def stopped_after(monkeypatch, calls):
    """Let Writer.append work `calls` times, then end; returns the list of what was appended."""
    appended, original = [], encoding_module.Writer.append

    def append(self, pieces, encoded):
        if len(appended) == calls:
            raise Stop
        appended.append(pieces)
        original(self, pieces, encoded)

    monkeypatch.setattr(encoding_module.Writer, "append", append)
    return appended


@pytest.mark.parametrize("kind", ["txt", "jsonl", "jsonl.gz"])
def test_a_stopped_preparation_goes_on_where_it_was_and_ends_the_same(tmp_path, kind, small, monkeypatch):
    path = tmp_path / f"a.{kind}"
    text = LINES * 3 if kind == "txt" else jsonl([LINES[i * 50 : i * 50 + 300 * (i % 3) + 5] for i in range(100)])
    path.write_bytes(gzip.compress(text.encode()) if kind.endswith("gz") else text.encode())
    options = {"vocab_size": 300, "cache": str(tmp_path / "cache"), "held_out": 0.3}
    whole = prepare(str(path), **options | {"cache": str(tmp_path / "other")})
    counts = []
    for _ in range(4):
        with monkeypatch.context() as patch, contextlib.suppress(Stop):
            counts.append(stopped_after(patch, 4))
            prepare(str(path), **options)
            pytest.fail("was not stopped")
    said = Said()
    with monkeypatch.context() as patch:
        rest = stopped_after(patch, 10_000)
        made = prepare(str(path), **options, say=said)
    assert "encoding, from where an earlier run was stopped" in said.texts()
    assert not any("training a tokenizer" in text or "reading" in text for text in said.texts())
    seen = [piece for run in (*counts, rest) for slab in run for piece in slab]
    twice = len(seen) - len(set(seen))
    assert twice == 0 if kind == "txt" else twice < 4 * 1500 / 50, "but a row that was not at its end, and a slab"
    assert contents(made.folder) == contents(whole.folder)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [made.folder.name]


@pytest.mark.parametrize("calls", [1, 2, 3, 4, 5, 7, 9])
def test_a_full_disk_stops_a_preparation_and_loses_nothing(tmp_path, small, monkeypatch, calls):
    (tmp_path / "a.txt").write_text(LINES)
    options = {"tokenizer": "bytes", "cache": str(tmp_path / "cache")}
    whole = prepare(str(tmp_path / "a.txt"), **options | {"cache": str(tmp_path / "other")})
    with monkeypatch.context() as patch:
        left = [calls]
        for name in ("append", "sync", "finish"):
            original = getattr(TokenWriter, name)

            def failing(self, *args, original=original, **options):
                left[0] -= 1
                if not left[0]:
                    raise OSError(28, "No space left on device", str(self.path))
                return original(self, *args, **options)

            patch.setattr(TokenWriter, name, failing)
        with pytest.raises(OSError, match="No space left"):
            prepare(str(tmp_path / "a.txt"), **options)
    assert contents(prepare(str(tmp_path / "a.txt"), **options).folder) == contents(whole.folder)


@pytest.mark.parametrize("name", ["journal.json", "scan.json", "train.tokens", "places", "tokenizer"])
@pytest.mark.parametrize("damage", ["gone", "cut", "garbage"])
def test_a_damaged_unfinished_preparation_begins_again(tmp_path, small, monkeypatch, name, damage):
    (tmp_path / "a.txt").write_text(LINES)
    options = {"vocab_size": 300, "cache": str(tmp_path / "cache")}
    whole = prepare(str(tmp_path / "a.txt"), **options | {"cache": str(tmp_path / "other")})
    with monkeypatch.context() as patch, contextlib.suppress(Stop):
        stopped_after(patch, 4)
        prepare(str(tmp_path / "a.txt"), **options)
    (partial,) = (tmp_path / "cache").iterdir()
    path = partial / name / "tokenizer.json" if name == "tokenizer" else partial / name
    (partial / ".journal.json.123").write_text("what a killed write left behind")
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-30] if damage == "cut" else b"[" * 1000)
    assert contents(prepare(str(tmp_path / "a.txt"), **options).folder) == contents(whole.folder)


def test_a_source_that_grows_meanwhile_is_refused(folder, tmp_path, monkeypatch):
    original = preparing_module.scan

    def scan_then_grow(sources, **options):
        found = original(sources, **options)
        (folder / "00.txt").write_text("document 0\nanother\n")
        return found

    monkeypatch.setattr(preparing_module, "scan", scan_then_grow)
    with pytest.raises(CorpusError, match="changed while it was being prepared"):
        prepare(str(folder), tokenizer="bytes", cache=str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_a_second_run_waits_for_the_first_and_takes_what_it_made(folder, tmp_path):
    options = {"tokenizer": "bytes", "cache": str(tmp_path / "cache")}
    key = prepare(str(folder), **options | {"cache": str(tmp_path / "other")}).folder.name
    said, made = Said(), []
    with Work(tmp_path / "cache" / key, key, lambda *words: None) as work:
        thread = threading.Thread(target=lambda: made.append(prepare(str(folder), **options, say=said)))
        thread.start()
        deadline = time.monotonic() + 10
        while not said and time.monotonic() < deadline:
            time.sleep(0.01)
        assert said.texts() == ["another run is preparing this text: waiting for it"] and not made
        job = preparing_module._Job(find_sources(str(folder)), find_sources(str(folder)).fingerprint(), key, "bytes",
                                   2048, 0.05, False, lambda *words: None)  # fmt: skip
        preparing_module._fill(work, job)
        work.finish()
    thread.join(10)
    assert made[0].cached and [path.name for path in (tmp_path / "cache").iterdir()] == [key]


CHILD = """
import sys
from entrenar.data import encoding, pieces, prepare
encoding.JOURNAL_EVERY, encoding.SLAB, pieces.PIECE = 0.0, 20_000, 5_000
print("ready", flush=True)
prepare(sys.argv[1], vocab_size=400, cache=sys.argv[2])
"""


def child(path, cache):
    command = [sys.executable, "-c", CHILD, str(path), str(cache)]
    process = subprocess.Popen(command, env=SAME_PACKAGE, stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    return process


def killed_until_done(path, cache, kills, longest, rng):
    """SIGKILL at random moments; how many preparations were killed before one ended."""
    for count in range(kills):
        process = child(path, cache)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0, longest))
        process.send_signal(signal.SIGKILL)
        process.stdout.close()
        if process.wait() == 0:
            return count
    process = child(path, cache)
    process.stdout.close()
    assert process.wait(60) == 0
    return kills


@pytest.mark.parametrize("kills", [2, pytest.param(40, marks=pytest.mark.tier3)])
def test_killed_at_random_moments_a_preparation_ends_the_same(tmp_path, kills):
    rng = random.Random(kills)
    texts = [LINES[rng.randrange(5000) :][: rng.randrange(20, 9000)] for _ in range(120)]
    (tmp_path / "a.jsonl").write_text(jsonl(texts))
    process = child(tmp_path / "a.jsonl", tmp_path / "whole")
    start = time.monotonic()
    process.stdout.close()
    assert process.wait(60) == 0
    longest = time.monotonic() - start
    done = 0
    for attempt in range(kills):
        done += killed_until_done(tmp_path / "a.jsonl", tmp_path / "killed" / str(attempt), kills - done, longest, rng)
        (one,), (other,) = (tmp_path / "whole").iterdir(), (tmp_path / "killed" / str(attempt)).iterdir()
        left = {"key", "scan.json", "journal.json", "held_out.head"}  # by a kill right after the end
        found = {name: content for name, content in contents(other).items() if name not in left}
        assert one.name == other.name and found == contents(one)
        if done >= kills:
            return


def test_a_child_that_is_left_alone_or_given_another_text_ends_otherwise(tmp_path):
    """The control of the test above: its comparison sees a difference."""
    made = []
    for i in range(2):
        (tmp_path / "a.jsonl").write_text(jsonl([LINES, f"one more {i}"]))
        made.append(contents(prepare(str(tmp_path / "a.jsonl"), tokenizer="bytes", cache=str(tmp_path / "c")).folder))
    assert made[0] != made[1]
