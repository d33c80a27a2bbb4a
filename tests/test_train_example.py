"""The main job as a user runs it: `python -m entrenar.examples.train`, small."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from entrenar.data import train_bpe
from entrenar.examples.train import main
from entrenar.training.checkpoint import load_checkpoint
from entrenar.training.config import read_config
from entrenar.training.summary import command_name, visible
from entrenar.training.trainer import Trainer

ROOT = Path(__file__).parent.parent
TEXT = "".join(f"{i} times {i} is {i * i}, and that is true.\n" for i in range(400))
SMALL = """
[model]
hidden_size = 16
intermediate_size = 32
num_hidden_layers = 1
num_attention_heads = 2
[training]
steps = 8
batch_size = 2
context = 16
eval_every = 4
eval_tokens = 64
report_every = 3
sample_tokens = 12
[lr_schedule]
warmup_steps = 2
[data]
tokenizer = "bytes"
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a text and a configuration, and a cache of its own; also for runs in this process."""
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "small.toml").write_text(SMALL)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr("entrenar.kernels.fma_peak", lambda seconds: 1e11)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*words):
    return [
        sys.executable,
        "-m",
        "entrenar.examples.train",
        "--config",
        "small.toml",
        "--data.source",
        "text.txt",
        *words,
    ]


def run(*words):
    return subprocess.run(command(*words), capture_output=True, text=True, timeout=120)


def here(capsys, *words):
    """The same job in this process: (exit code, output, errors)."""
    code = main(command(*words)[3:])
    return (code, *capsys.readouterr())


def test_a_small_run_from_text_to_picture(place):
    done = run("--out", "run")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    steps = [line for line in lines if re.fullmatch(r"step=\d+/8 loss=\d+\.\d+ .*seconds_left=\d+", line)]
    assert [line.split("/")[0] for line in steps] == ["step=1", "step=3", "step=6", "step=8"]
    for expected in (
        "gzip -9",
        "xz -9",
        "this model",
        "a sample it wrote:",
        "run/curve.png",
        "next",
        "--data.source",
        "run/report.html",
    ):
        assert expected in done.stdout, expected
    assert done.stderr == "" and "\x1b" not in done.stdout

    out = place / "run"
    assert (out / "curve.png").read_bytes()[:4] == b"\x89PNG"
    events = [json.loads(line)["event"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert (
        events[0] == "start"
        and events.count("step") == 8
        and events.count("held_out") == 3
        and events[-1] == "end"
    )
    assert load_checkpoint(out).state["step"] == 8
    assert (out / "best").exists() and (out / "sample.txt").exists()


@pytest.mark.tier3
def test_the_second_run_takes_prepared_data_and_the_saved_configuration(place, capsys):
    code, output, _ = here(capsys, "--out", "one", "--data.tokenizer", "bpe", "--data.vocab_size", "300")
    assert code == 0
    (cached,) = (place / "cache" / "entrenar").iterdir()
    before = (cached / "facts.json").stat().st_mtime_ns
    assert main(["--config", "one/config.toml", "--out", "two"]) == 0
    assert (cached / "facts.json").stat().st_mtime_ns == before
    last = [re.search(r"this model +(\S+)", text)[1] for text in (output, capsys.readouterr().out)]
    assert last[0] == last[1]


@pytest.mark.tier3
def test_with_no_out_a_run_is_named_by_date_and_time(place, capsys):
    assert here(capsys, "--training.steps", "2")[0] == 0
    (made,) = (place / "runs").iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", made.name)


def test_a_folder_that_holds_something_is_left_alone(place, capsys):
    (place / "run").mkdir()
    (place / "run" / "thesis.txt").write_text("mine")
    code, _, errors = here(capsys, "--out", "run")
    assert code == 2 and "exists and is not an empty folder" in errors
    assert [p.name for p in (place / "run").iterdir()] == ["thesis.txt"]


def test_a_typo_is_told_by_file_line_key_and_nearest_name(place):
    (place / "small.toml").write_text(SMALL.replace("batch_size", "batchsize"))
    done = run("--training.stepz", "3")
    assert done.returncode == 2 and done.stdout == ""
    assert (
        "small.toml line 9: [training] batchsize = 2: no such option; did you mean training.batch_size?"
        in done.stderr
    )
    assert "--training.stepz 3: no such option; did you mean training.steps?" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "'bad.txt' does not exist"),
        (b"", "bad.txt is empty"),
        (b"\x7fELF\0\0", "bad.txt is binary"),
        (b"ol\xe9", "bad.txt is not UTF-8: line 1, byte 2"),
        (b"short text", "tokens, too short for one window of context 16"),
    ],
)
def test_a_text_that_cannot_be_used_ends_with_2_and_leaves_no_run(place, capsys, content, message):
    if content is not None:
        (place / "bad.txt").write_bytes(content)
    code, _, errors = here(capsys, "--data.source", "bad.txt", "--out", "run")
    assert code == 2 and message in errors and errors.count("\n") == 1
    assert not (place / "run").exists()


@pytest.mark.parametrize("out", ["text.txt/run", "text.txt", "locked/run"])
def test_a_place_that_cannot_be_written_to_is_told_before_the_text_is_read(place, capsys, monkeypatch, out):
    (place / "locked").mkdir()
    monkeypatch.setattr("os.access", lambda folder, mode: Path(folder).name != "locked")  # root may all
    code, output, errors = here(capsys, "--out", out)
    assert code == 2 and f"--out {out}: " in errors and output == ""


@pytest.mark.tier3
def test_letters_the_terminal_lacks_do_not_end_a_run(place, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    (place / "é.txt").write_text("çà et là\n" * 50)
    done = run("--data.source", "é.txt", "--training.sample_prompt", "là", "--training.steps", "2")
    assert done.returncode == 0 and done.stderr == ""


def test_ctrl_c_during_the_last_look_makes_do_with_the_sample_of_it(place, capsys, monkeypatch):
    looked = Trainer.look

    def interrupted(self, *, whole=False):
        if whole:
            os.kill(os.getpid(), signal.SIGINT)
        return looked(self, whole=whole)

    monkeypatch.setattr(Trainer, "look", interrupted)
    code, output, _ = here(capsys, "--out", "run")
    assert code == 130 and "a sample of" in output and (place / "run" / "curve.png").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.tier3)])
def test_ctrl_c_is_answered_at_once_saves_draws_and_says_how_to_go_on(place, number):
    words = command("--out", "run", "--training.steps", "1000000", "--training.report_every", "1")
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("step=3/"):
                break
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "finishing this step, then saving; once more stops at once" in errors and errors.count("\n") == 2
    assert "nothing is lost" in output and "resume run" in output
    step = load_checkpoint(place / "run").state["step"]
    assert 3 <= step < 1000000 and (place / "run" / "curve.png").exists()


def test_help_and_plan_start_no_run(place, capsys):
    assert main(["--help"]) == 0
    assert "--training.steps" in capsys.readouterr().out
    code, output, _ = here(capsys, "--plan")
    assert code == 0 and "parameters" in output and not (place / "runs").exists()


def test_the_7b_configuration_is_refused_where_it_cannot_fit(place, capsys, monkeypatch):
    monkeypatch.setattr("entrenar.training.machine.memory_limit", lambda: 16 * 10**9)
    words = [
        w
        for c in ("hidden_size=4096", "intermediate_size=11008", "num_hidden_layers=32")
        for w in ("--model." + c,)
    ]
    code, _, errors = here(capsys, *words)
    assert code == 2 and re.search(
        r"would need \d+(\.\d)? GB of memory, this machine or container has 16.0 GB", errors
    )


def test_a_batch_that_cannot_fit_is_refused_before_the_text_is_read(place, capsys):
    code, output, errors = here(capsys, "--training.batch_size", "1000000000")
    assert code == 2 and "batch_size" in errors and output == ""


@pytest.mark.tier3
def test_the_next_commands_can_be_typed(place, capsys, monkeypatch):
    assert here(capsys, "--out", "my run", "--training.steps", "2")[0] == 0  # a space to be quoted
    monkeypatch.setattr("sys.executable", str(place / ".venv/bin/python"))
    assert here(capsys, "--out", "two", "--training.steps", "2")[0] == 0
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert command_name() == ".venv/bin/python -m entrenar"
    monkeypatch.setattr("shutil.which", lambda name: sys.executable if name == "python" else None)
    assert command_name() == "python -m entrenar"
    monkeypatch.setattr("shutil.which", lambda name: str(Path(sys.executable).parent / name))
    assert command_name() == "entrenar"


def test_plan_knows_the_size_of_a_saved_tokenizer(place, capsys):
    train_bpe([TEXT], vocab_size=300).save(place)
    code, output, _ = here(capsys, "--plan", "--data.tokenizer", ".")
    wanted = read_config("small.toml").llama(300).parameter_count()
    assert code == 0 and f"{wanted:,} parameters" in output


def test_a_loss_that_is_no_number_ends_with_1(place, capsys):
    code, _, errors = here(
        capsys, "--out", "run", "--lr_schedule.learning_rate", "1e30", "--training.clip_norm", "0"
    )
    assert code == 1 and re.search(r"step \d: the (loss|gradient's norm) is (nan|inf)", errors)
    assert "learning_rate" in errors


def test_a_sample_cannot_move_the_cursor():
    assert visible("a\x1b[2Jb\r\n\tcé") == "a\ufffd[2Jb\ufffd\n\tcé"
    assert os.linesep in visible("a\n")
