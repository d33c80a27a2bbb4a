"""`entrenar generate`, and the models a command line can name."""

import argparse
import contextlib
import functools
import importlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import SAME_PACKAGE

from entrenar import cli, random
from entrenar.cli import generate as verb
from entrenar.cli.models import Opened, open_model
from entrenar.cli.parser import verb_parser
from entrenar.cli.writing import BETWEEN
from entrenar.convert.llama2c import export_llama2c
from entrenar.data import ByteTokenizer, TokenizerError, train_bpe
from entrenar.formats import FormatError
from entrenar.llama import Llama, LlamaConfig, generate
from entrenar.training.checkpoint import CheckpointError, model_files, save_step

SMALL = LlamaConfig(vocab_size=257, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
                    max_position_embeddings=64, initializer_range=0.3, rms_norm_eps=1e-5, bos_token_id=256,
                    eos_token_id=256)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    random.seed(1)
    return Llama(SMALL)


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """A model of bytes in Hugging Face's layout."""
    return model.save_pretrained(tmp_path_factory.mktemp("models") / "small", tokenizer=ByteTokenizer())


@pytest.fixture
def run(folder, capsys):
    """`entrenar generate` of that model: (exit code, standard output, standard error)."""

    def call(*words, where=folder, to=None):
        with contextlib.redirect_stdout(to or sys.stdout):
            code = cli.main(["generate", str(where), *map(str, words)])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def scripted(monkeypatch):
    """Let the model write exactly these tokens (bytes, or ids)."""

    def script(tokens, then=None):
        def generate(model, ids, *, max_new_tokens, **settings):
            yield from list(tokens)[:max_new_tokens]
            if then is not None:
                raise then

        monkeypatch.setattr(importlib.import_module("entrenar.llama.generate"), "generate", generate)

    return script


class Terminal(io.StringIO):
    """A terminal, which remembers every write."""

    def __init__(self):
        super().__init__()
        self.writes = []

    def isatty(self):
        return True

    def write(self, text):
        self.writes.append(text)
        return super().write(text)


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    return Terminal()


# -- the text


def test_a_pipe_gets_the_text_and_nothing_else(run, model):
    prompt = [256, *b"to be"]
    tokens = list(generate(model, prompt, max_new_tokens=40, temperature=0.7, top_p=0.95,
                           rng=np.random.default_rng([0, 0]), stop=[256]))  # fmt: skip
    wanted = ByteTokenizer().decode(t for t in tokens if t != 256)
    assert run("--prompt", "to be", "--max-tokens", 40) == (0, wanted, "")


def test_the_same_seed_writes_the_same_text_and_another_another(run):
    texts = [run("--seed", seed, "--temperature", 1.5)[1] for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_of_several_texts_each_is_the_same_however_many_there_are(run):
    three = run("-n", 3, "--max-tokens", 20, "--temperature", 1.5)[1].split(BETWEEN)
    two = run("-n", 2, "--max-tokens", 20, "--temperature", 1.5)[1].split(BETWEEN)
    assert len(set(three)) == 3 and two == three[:2]


def test_settings_reach_the_sampling(run, model):
    tokens = list(generate(model, [256, 65], max_new_tokens=9, temperature=0, repetition_penalty=1.5))
    wanted = ByteTokenizer().decode(tokens)
    settings = ("--temperature", 0, "--repetition-penalty", 1.5, "--ignore-eos", "--max-tokens", 9)
    assert run("--prompt", "A", *settings)[1] == wanted
    assert run("--prompt", "A", "--temperature", 9, "--top-k", 1)[1] == run("--prompt", "A", "--temperature", 0)[1]
    assert run("--temperature", 9, "--min-p", 1)[1] == run("--temperature", 9, "--top-p", 1e-9)[1]


@pytest.mark.parametrize("many", [False, True])
def test_a_stop_text_ends_it_across_tokens_and_is_never_partly_written(run, scripted, terminal, many):
    scripted(b"one en enough END two")
    run("--stop", "END", *(["--stop", "not there"] if many else []), to=terminal)
    assert terminal.getvalue() == "one en enough \n"
    assert all("E" not in text for text in terminal.writes)


def test_what_only_began_like_a_stop_text_is_written_in_the_end(run, scripted):
    scripted(b"it is the EN")
    assert run("--stop", "END")[1] == "it is the EN"


def test_letters_of_several_tokens_are_written_whole(run, scripted, terminal):
    text = "naïve – 日本 🙂 e\u0301"
    scripted(text.encode())
    run(to=terminal)
    assert terminal.getvalue() == text + "\n" and "\ufffd" not in terminal.getvalue()
    assert len(terminal.writes) > len(text) / 2, "the control: it came piece by piece"


def test_a_letter_that_never_became_whole_shows_as_such(run, scripted):
    scripted("e🙂".encode()[:-1])
    assert run()[1] == "e\ufffd"


def test_the_end_token_ends_the_text_unless_it_is_ignored(run, scripted):
    scripted([*b"one", 256, *b"two"])
    assert run()[1] == "one"
    assert run("--ignore-eos")[1] == "one<|endoftext|>two"


def test_no_stream_writes_once(run, scripted, terminal):
    scripted(b"many tokens")
    run("--no-stream", to=terminal)
    assert terminal.writes == ["many tokens", "\n"]


def test_the_space_before_a_word_stays_where_a_tokenizer_drops_that_of_the_first(run, scripted, tmp_path):
    """LLaMA-2's tokenizer: "▁cat" is "cat" where a text begins, " cat" where one goes on."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {name: i for i, name in enumerate(["<unk>", "<s>", "</s>", "▁", "c", "a", "t", "ca", "cat", "▁cat"])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[("c", "a"), ("ca", "t"), ("▁", "cat")], unk_token="<unk>"))
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                       decoders.Strip(" ", 1, 0)])  # fmt: skip
    random.seed(0)
    shape = vars(SMALL) | {"vocab_size": 10, "bos_token_id": 1, "eos_token_id": 2}
    where = Llama(LlamaConfig(**shape)).save_pretrained(tmp_path / "llama2")
    (where / "tokenizer.json").write_text(inner.to_str())
    (where / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true}')
    scripted([9, 7, 6, 2, 9])
    assert run("--prompt", "cat", where=where)[:2] == (0, " catcat")
    assert run(where=where)[:2] == (0, "catcat"), "without a prompt the text begins here"


# -- on a terminal


def test_a_terminal_shows_the_prompt_dim_and_control_characters_visibly(run, scripted, terminal, monkeypatch):
    scripted(b"a\x1b[2Jb\r\tc\n")
    run("--prompt", "say\x07", to=terminal)
    assert terminal.getvalue() == "\x1b[2msay\ufffd\x1b[0ma\ufffd[2Jb\ufffd\tc\n\n"
    monkeypatch.setenv("NO_COLOR", "1")
    run("--prompt", "say", to=terminal)
    assert terminal.getvalue().endswith("\nsaya\ufffd[2Jb\ufffd\tc\n\n")


def test_a_pipe_gets_control_characters_as_they_are_and_the_prompt_when_asked(run, scripted):
    scripted(b"a\x1b[2Jb\r\n")
    assert run("--prompt", "say ")[1] == "a\x1b[2Jb\r\n"
    assert run("--prompt", "say ", "--echo")[1] == "say a\x1b[2Jb\r\n"


def test_several_texts_are_numbered_on_a_terminal(run, scripted, terminal):
    scripted(b"x")
    run("-n", 2, "--prompt", "p", to=terminal)
    assert [line for line in terminal.getvalue().splitlines() if "of" in line] == [
        "\x1b[2m-- 1 of 2\x1b[0m", "\x1b[2m-- 2 of 2\x1b[0m"]  # fmt: skip


def test_the_speed_comes_on_stderr_when_asked_for(run):
    out, err = run("--prompt", "abc", "--max-tokens", 5, "--ignore-eos", "--tokens-per-second")[1:]
    assert "tokens" not in out
    assert err.startswith("prompt 4 tokens, ") and "; written 5 tokens, " in err and err.endswith("by --max-tokens\n")
    err = run("--prompt", "abc", "--ignore-eos", "--tokens-per-second")[2]
    assert "written 60 tokens" in err and err.endswith("ended by the full context of 64 tokens\n")


# -- the prompt


def stdin(monkeypatch, raw):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(raw), isatty=lambda: False))


def test_the_prompt_may_come_from_standard_input_to_the_byte(run, monkeypatch):
    stdin(monkeypatch, "naïve\n".encode())
    assert run("--prompt", "-", "--max-tokens", 9, "--echo") == run("--prompt", "naïve\n", "--max-tokens", 9, "--echo")
    stdin(monkeypatch, b"abc\xff")
    code, out, err = run("--prompt", "-")
    assert (code, out) == (2, "") and "standard input: byte 3 (0xff) is not UTF-8" in err


def test_without_a_prompt_a_text_begins(run, model):
    first = next(generate(model, [256], max_new_tokens=1, temperature=0))
    assert run("--temperature", 0, "--max-tokens", 1)[1] == ByteTokenizer().decode([first])


def test_a_prompt_too_long_is_refused_with_numbers_or_its_end_is_kept(run, model):
    long = "".join(chr(97 + i % 26) for i in range(70))
    code, out, err = run("--prompt", long)
    assert (code, out) == (2, "")
    assert "--prompt: has 71 tokens, the model's context holds 64" in err and "--truncate-prompt" in err
    assert run("--prompt", long[:63])[0] == 2 and run("--prompt", long[:62], "--max-tokens", 9)[0] == 0
    tokens = generate(model, [256, *long[-53:].encode()], max_new_tokens=10, temperature=0)
    wanted = ByteTokenizer().decode(tokens)
    settings = ("--temperature", 0, "--max-tokens", 10, "--ignore-eos")
    assert run("--prompt", long, "--truncate-prompt", *settings)[1] == wanted
    assert run("--prompt", "ab", "--truncate-prompt", *settings) == run("--prompt", "ab", *settings)


def test_a_truncated_prompt_leaves_half_the_context_at_most():
    tokenizer = SimpleNamespace(encode=lambda text: np.arange(len(text)), begin_id=999)
    opened = Opened(SimpleNamespace(config=SMALL), tokenizer, None, frozenset(), 64)
    for length in (5, 31, 32, 63, 64, 500):
        ids = verb.prompt_ids(opened, "x" * length, 10_000, truncate=True)
        kept = min(length, 31)
        assert ids == [999, *range(length - kept, length)]


def test_an_empty_prompt_needs_a_token_that_begins_a_text():
    tokenizer = SimpleNamespace(encode=lambda text: np.arange(len(text)), begin_id=None)
    opened = Opened(SimpleNamespace(config=SMALL), tokenizer, None, frozenset(), 64)
    assert verb.prompt_ids(opened, "ab", 9) == [0, 1]
    with pytest.raises(ValueError, match="no token that begins a text; give some text"):
        verb.prompt_ids(opened, "", 9)


# -- what goes wrong


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--top-p", "0"], "top_p = 0.0: wanted a number above 0, at most 1"),
     (["--temperature", "-1", "--min-p", "2"], "temperature = -1.0: .*; min_p = 2.0: "),
     (["--max-tokens", "0", "--seed", "-1", "-n", "0"], "--max-tokens 0: .*; -n 0: .*; --seed -1: wanted at least 0"),
     (["--stop", ""], "--stop: the text is empty"), (["--top-k", "x"], "--top-k: .*x.*: wanted a whole number"),
     (["--prompt", "\udcff"], r"--prompt: byte 0 \(0xff\) is not UTF-8")],
)  # fmt: skip
def test_a_wrong_setting_ends_with_2_before_the_model_is_read(run, words, message, tmp_path):
    code, out, err = run(*words, where=tmp_path / "not even there")
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
    assert re.search(message, err), err


def test_ctrl_c_keeps_what_was_written_and_ends_with_130(run, scripted, terminal):
    scripted(b"so far", then=KeyboardInterrupt())
    assert run("-n", 5, to=terminal)[0] == 130
    assert terminal.getvalue().endswith("so far\n") and terminal.getvalue().count("so far") == 1
    terminal.writes.clear()
    assert run("--no-stream", to=terminal)[0] == 130 and terminal.writes == ["so far", "\n"]


def test_weights_that_are_no_numbers_end_with_2(run, monkeypatch, model):
    broken = Llama(SMALL)
    broken.head_weight.data[65] = np.nan
    opened = Opened(broken, ByteTokenizer(), "there", frozenset({256}), 64)
    monkeypatch.setattr("entrenar.cli.models.open_model", lambda path, **settings: opened)
    code, out, err = run()
    assert (code, out) == (2, "")
    assert "there: sampling: token 65 has logit nan: the model's weights hold NaN or infinity" in err


def test_tokens_that_the_tokenizer_does_not_have_stand_for_nothing(run, tmp_path, scripted):
    random.seed(0)
    padded = Llama(LlamaConfig(**{**vars(SMALL), "vocab_size": 264}))
    where = padded.save_pretrained(tmp_path / "padded", tokenizer=ByteTokenizer())
    scripted([65, 260, 66, 263])
    assert run(where=where)[:2] == (0, "AB")


def test_the_help_fits_a_screen_and_its_example_is_understood():
    parser = verb_parser(verb.NAME, verb)
    lines = parser.format_help().splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    assert any("MODEL" in line for line in lines[1:])
    assert parser.read(["runs/mine", "--prompt", "def main", "--stop", "\n\n"]).stop == ["\n\n"]
    assert isinstance(parser.read(["m"]), argparse.Namespace)


# -- as a process


def start(folder, *words):
    command = [sys.executable, "-m", "entrenar", "generate", str(folder), *words]
    # a shell's background job ignores Ctrl-C, and so would everything started from it
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, env=SAME_PACKAGE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
                            preexec_fn=heed)  # fmt: skip


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """A model that can write for a long time."""
    random.seed(1)
    model = Llama(LlamaConfig(**{**vars(SMALL), "max_position_embeddings": 1 << 17}))
    return model.save_pretrained(tmp_path_factory.mktemp("models") / "endless", tokenizer=ByteTokenizer())


def test_a_reader_that_goes_away_ends_it_quietly_with_141(endless):
    process = start(endless, "--max-tokens", "100000", "--ignore-eos")
    assert process.stdout.read(5)
    process.stdout.close()
    assert process.wait(20) == 141 and process.stderr.read() == b""


def test_a_real_ctrl_c_ends_a_process_with_130_and_no_traceback(endless):
    process = start(endless, "--max-tokens", "100000", "--ignore-eos")
    assert process.stdout.read(5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and not err


# -- the models a path can name


def run_folder(tmp_path, model, steps=(2, 4), **changes):
    """A run's folder with checkpoints, as the trainer leaves it."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("")
    state = {"config": {"training": {"context": 16}}} | changes
    for step in steps:
        model.head_weight.data[0, 0] = step
        save_step(run, step, best=step == 2, keep_last_n=9, write=model_files(model, ByteTokenizer()), state=state)
    return run


@pytest.fixture
def own(model):
    """A model of one's own to write on."""
    random.seed(1)
    return Llama(SMALL)


def test_a_run_a_checkpoint_a_link_a_folder_and_a_file_can_be_opened(tmp_path, own):
    run = run_folder(tmp_path, own)
    for path, step in ((run, 4), (run / "best", 2), (run / "checkpoint", 4), (run / "step-000002", 2)):
        opened = open_model(path)
        assert opened.model.head_weight.data[0, 0] == step and opened.context == 16
        assert opened.stop == {256} and opened.begin == [256] and opened.tokenizer.kind == "bytes"
    assert open_model(run).folder == run / "step-000004"
    plain = own.save_pretrained(tmp_path / "plain", tokenizer=ByteTokenizer())
    assert open_model(str(plain)).context == 64

    export_llama2c(own, tmp_path / "plain" / "small.bin")
    opened = open_model(tmp_path / "plain" / "small.bin")
    assert opened.folder == tmp_path / "plain" and opened.stop == {256}
    ids = np.array([[256, 65, 66]])
    np.testing.assert_allclose(opened.model(ids).data, own(ids).data, rtol=1e-5, atol=1e-5)


def test_every_token_that_ends_a_text_by_generation_config_is_one(tmp_path, own):
    where = own.save_pretrained(tmp_path / "m", tokenizer=ByteTokenizer())
    (where / "generation_config.json").write_text(json.dumps({"eos_token_id": [10, 13]}))
    assert open_model(where).stop == {10, 13, 256}


def test_a_broken_newest_checkpoint_is_passed_over_with_a_warning(tmp_path, own, capsys):
    run = run_folder(tmp_path, own)
    with open(run / "step-000004" / "model.safetensors", "r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"\xff")
    warnings = []
    opened = open_model(run, warn=warnings.append)
    assert opened.folder == run / "step-000002" and "model.safetensors" in warnings[0]
    assert cli.main(["generate", str(run), "--max-tokens", "2"]) == 0
    assert "falling back to step-000002" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="model.safetensors is not what was written"):
        open_model(run / "step-000004")


def test_what_is_no_model_is_refused_with_what_was_looked_for(tmp_path, own, monkeypatch):
    def refusal(path, kind=FormatError):
        with pytest.raises(kind) as caught:
            open_model(path)
        return str(caught.value)

    (tmp_path / "empty").mkdir()
    told = refusal(tmp_path / "empty")
    assert "holds neither checkpoints (step-000400) nor a config.json; wanted a run's folder" in told
    assert "does not exist, looked from " in refusal(tmp_path / "missing")
    monkeypatch.chdir(tmp_path)
    assert "downloads nothing: `hf download meta-llama/Llama-3 --local-dir Llama-3`" in refusal("meta-llama/Llama-3")
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    assert "is a run without a checkpoint" in refusal(tmp_path / "empty")
    for name, why in (("a.gguf", "GGUF"), ("pytorch_model.bin", "pickle"), ("a.pth", "pickle"),
                      ("model.safetensors", "weights alone"), ("a.txt", "wanted a run's folder")):  # fmt: skip
        (tmp_path / name).write_bytes(b"")
        assert why in refusal(tmp_path / name)
    (tmp_path / "a.bin").write_bytes(b"nothing")
    assert "a.bin" in refusal(tmp_path / "a.bin")
    os.mkfifo(tmp_path / "pipe")
    assert "neither a folder nor a file" in refusal(tmp_path / "pipe")
    where = own.save_pretrained(tmp_path / "untold")
    assert "tokenizer" in refusal(where, TokenizerError)
    run = run_folder(tmp_path, own, steps=(3,))
    (run / "step-000003" / "SHA256SUMS").unlink()
    shutil.copytree(run / "step-000003", tmp_path / "copied")
    assert open_model(tmp_path / "copied").context == 16, "a checkpoint without hashes is still a model"


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused_with_both_numbers(tmp_path, own):
    where = own.save_pretrained(tmp_path / "m", tokenizer=train_bpe(["the cat sat on the mat " * 50], vocab_size=270))
    with pytest.raises(FormatError, match=r"m: the tokenizer has 26\d tokens, the model knows 257: they do not belong"):
        open_model(where)
