"""The command `entrenar`: its verbs, what it says of a command line that cannot be read, exit codes, completion."""

import argparse
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
from conftest import SAME_PACKAGE

from entrenar import cli
from entrenar.cli import completion, main
from entrenar.cli.configuration import take_overrides
from entrenar.cli.parser import CommandLineError, Parser, leaves, nearest, verb_parser
from entrenar.training.config import Config, FineTuning, options


def errors(capsys, *words):
    """(exit code, what was said on stderr) of a command that fails."""
    code = main(words)
    said = capsys.readouterr()
    assert said.out == ""
    return code, said.err


def command(*words, **settings):
    settings = {"capture_output": True, "text": True, "timeout": 60, "env": SAME_PACKAGE} | settings
    return subprocess.run([sys.executable, "-m", "entrenar", *words], **settings)


@pytest.fixture
def verb(monkeypatch):
    """A verb of the test's own, `entrenar try`: its `run` and its arguments are given, its words come back."""

    def make(run, add_arguments=lambda parser: None, configured=False):
        module = types.ModuleType("try")
        module.NAME, module.HELP, module.EXAMPLE = "try", "tries", "entrenar try"
        module.run, module.add_arguments = run, add_arguments
        monkeypatch.setitem(cli.VERBS, "try", "entrenar.cli.try")
        monkeypatch.setitem(sys.modules, "entrenar.cli.try", module)
        if configured:
            monkeypatch.setattr(cli, "CONFIGURED", ("try",))

    return make


# Help


def test_help_names_every_verb_in_order_and_the_exit_codes(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert re.findall(r"^  (\w+) {2,}\w", text, re.M) == [
        "train", "finetune", "resume", "plan", "profile", "generate", "chat", "eval", "data", "inspect", "merge",
        "quantize", "export", "doctor", "completion",
    ]  # fmt: skip
    for code in ("0", "1", "2", "130", "143", "141"):
        assert re.search(rf"\b{code}\b", text)


SCREENS = [[], *([name] for name in cli.VERBS), ["data", "show"], ["data", "prepare"], ["data", "chat"]]


@pytest.mark.parametrize("words", SCREENS, ids=" ".join)
def test_every_help_fits_one_screen_and_has_an_example(capsys, words):
    assert main([*words, "--help"]) == 0
    lines = capsys.readouterr().out.rstrip("\n").split("\n")
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    assert any(line.startswith("example") for line in lines) or len(words) == 2
    assert any(line.startswith("  entrenar ") for line in lines) or len(words) == 2


@pytest.mark.parametrize("name", cli.VERBS)
def test_every_verb_has_the_name_it_is_listed_under(name):
    module = cli.verb(name)
    assert module.NAME == name and module.HELP == module.HELP.strip() and "\n" not in module.HELP
    assert all(line.startswith("entrenar ") for line in module.EXAMPLE.strip().splitlines())


@pytest.mark.parametrize("name", cli.VERBS)
def test_every_example_can_be_parsed(name):
    module = cli.verb(name)
    for line in module.EXAMPLE.strip().splitlines():
        words = re.split(r" [|>] ", line)[0].split()  # a word in quotes may fall apart: options stay options
        unknown = [word.partition("=")[0] for word in words if re.match(r"--\w[\w-]*(=|$)", word)]
        parser = verb_parser(name, module)
        known = {option for leaf in (parser, *leaves(parser)) for a in leaf._actions for option in a.option_strings}
        assert set(unknown) <= known, line


def test_help_of_a_verb_can_be_asked_for_in_two_ways(capsys):
    assert main(["help", "doctor"]) == 0
    asked = capsys.readouterr().out
    assert main(["doctor", "--help"]) == 0
    assert capsys.readouterr().out == asked and "usage: entrenar doctor" in asked


def test_help_options_lists_every_option_of_the_configuration(capsys):
    assert main(["train", "--help-options"]) == 0
    text = capsys.readouterr().out
    assert all(f"--{option.full_name} " in text for option in options(Config))


def test_no_words_at_all_are_answered_with_the_help_and_exit_code_2(capsys):
    code, said = errors(capsys)
    assert code == 2 and "usage: entrenar COMMAND" in said


def test_help_comes_soon_and_imports_no_slow_library():
    code = (
        "import sys; from entrenar.cli import main; main(['--help']); "
        "slow = {'tokenizers', 'jinja2', 'rich', 'PIL', 'safetensors', 'ml_dtypes', 'shtab'}; "
        "sys.exit(bool(slow & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=SAME_PACKAGE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_only_the_verb_that_runs_is_imported():
    code = (
        "import sys; from entrenar.cli import main; main(['plan', 'no such.toml']); "
        "print(*sorted(m for m in sys.modules if m.startswith('entrenar.cli.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=SAME_PACKAGE, capture_output=True, text=True)
    verbs = {module.removeprefix("entrenar.cli.") for module in cli.VERBS.values()}
    assert verbs & {name.removeprefix("entrenar.cli.") for name in done.stdout.split()} == {"plan"}, done.stderr


def test_the_documentation_shows_the_help_as_it_is_and_has_every_verb():
    text = (Path(__file__).parent.parent / "docs" / "command.md").read_text()
    assert cli.overview() in text
    for name in cli.VERBS:
        assert re.search(rf"^## .*\b{name}\b", text, re.M), name
    codes = set(re.findall(r"^\| (\d+) \|", text, re.M))
    assert codes == {"0", "1", "2", "129", "130", "141", "143"}


# Words that cannot be read


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "entrenar: trian: no such command; did you mean train?; see entrenar --help"),
        (["evaluate"], "evaluate: no such command; did you mean eval?"),
        (["--training.steps", "3"], "--training.steps: no such command"),
        (["train", "--budgt", "20m"], "entrenar train: --budgt: no such option; did you mean --budget?"),
        (["train", "--steps=3"], "--steps: no such option; did you mean --training.steps?"),
        (["train", "--learning_rate", "3"], "did you mean --lr_schedule.learning_rate?"),
        (["train", "--out"], "--out: a value is missing"),
        (["train", "--forc"], "--forc: no such option; did you mean --force?"),
        (["train", "notes.txt"], "notes.txt: one word too many"),
        (["train", "-x", "1"], "-x: no such option"),
        (["train", "--training.steps"], "--training.steps: a value is missing"),
        (["train", "--training.steps", "--data.source", "x"], "--training.steps: a value is missing"),
        (["train", "--data.source", os.fsdecode(b"caf\xe9")], r"'caf\udce9': wanted UTF-8"),
        (["train", "--config", "no.toml"], "no.toml: cannot be read: No such file or directory"),
        (["resume"], "required: RUN"),
        (["plan", "a.toml", "--config", "b.toml"], "one configuration is wanted"),
        (["completion", "bsh"], "bsh: wanted one of bash, zsh, fish; did you mean bash?"),
        (["inspect", "nowhere"], "nowhere: there is no such file or folder"),
        (["chta", "model"], "chta: no such command; did you mean chat?"),
        (["chat"], "required: MODEL"),
        (["merge", "a", "b"], "required: --out"),
        (["merge", "nowhere", "--out", "m"], "nowhere: does not exist"),
    ],
)
def test_words_that_cannot_be_read_are_answered_in_one_line(capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, said = errors(capsys, *words)
    assert code == 2 and message in said
    assert "Traceback" not in said and (said.count("\n") == 1 or "configuration" in said)


def test_a_misspelt_and_a_misvalued_option_are_told_together(capsys):
    code, said = errors(capsys, "train", "--training.stepz", "3", "--data.vocab_size=x", "--training.seed", "-1")
    assert code == 2 and said.startswith("entrenar train: 3 problems with the configuration:")
    assert "--training.stepz 3: no such option; did you mean training.steps?" in said
    assert "--data.vocab_size x: wanted a whole number" in said
    assert "--training.seed -1: wanted a whole number at least 0" in said


def test_equals_signs_and_spaces_mean_the_same_and_values_may_begin_with_a_dash():
    words = ["--a.b=c=d", "--e.f", "-1e-5", "--out", "x.y", "--g.h=--i.j=k l"]
    assert take_overrides(words) == (
        [("a.b", "c=d"), ("e.f", "-1e-5"), ("g.h", "--i.j=k l")],
        ["--out", "x.y"],
    )
    assert take_overrides(["a", "--", "--b.c", "d"]) == ([], ["a", "--", "--b.c", "d"])


def test_all_names_without_a_value_are_told_at_once():
    words = r"--a.b: a value is missing \(.*--a.b=--...\); --c.d: a value is missing$"
    with pytest.raises(CommandLineError, match=words):
        take_overrides(["--a.b", "--c.d"])


def test_a_number_that_is_none_is_told_in_words():
    parser = Parser(prog="entrenar try")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--top-p", type=float)
    with pytest.raises(CommandLineError, match="--tokens: 'many': wanted a whole number; see entrenar try --help"):
        parser.read(["--tokens", "many"])
    with pytest.raises(CommandLineError, match="--top-p: 'x': wanted a number"):
        parser.read(["--top-p", "x"])


def test_an_unknown_option_below_a_verb_is_told_with_the_nearest_there():
    parser = Parser(prog="entrenar try")
    parser.add_subparsers().add_parser("show").add_argument("--batch")
    with pytest.raises(CommandLineError, match="--bach: no such option; did you mean --batch"):
        parser.read(["show", "--bach", "3"])


def test_what_is_far_from_everything_has_no_nearest():
    assert nearest("xyz", ["train", "resume"]) == ""
    assert nearest("--stepps", ["--training.steps", "--out"]) == "; did you mean --training.steps?"


# train, resume and plan pass on what they were told


def test_train_hands_its_options_to_the_job(monkeypatch):
    import entrenar.training.job as job

    started = []
    monkeypatch.setattr(job, "start", lambda config, *, force: started.append((config, force)) or 0)
    words = ["--out", "o", "--budget", "20m", "--skip-bad", "--force", "--training.seed", "7", "--model.hidden_size=64"]
    assert main(["train", *words]) == 0
    ((config, force),) = started
    assert (config.checkpointing.out, config.training.budget, config.data.skip_bad) == ("o", "20m", True)
    assert (config.training.seed, config.model["hidden_size"], force) == (7, 64, True)


def test_resume_hands_its_options_to_the_job(monkeypatch):
    import entrenar.training.job as job

    asked = []

    def resume(run, overrides, *, force):
        asked.append((str(run), overrides, force))
        return 143

    monkeypatch.setattr(job, "resume", resume)
    assert main(["resume", "runs/x", "--training.steps", "9"]) == 143
    assert asked == [("runs/x", [("training.steps", "9")], False)]


def test_plan_prints_a_table_or_json_and_starts_nothing(capsys, tmp_path, monkeypatch):
    import json

    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.toml").write_text("[training]\nsteps = 3\n")
    assert main(["plan", "my.toml", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] is True and plan["peak"] == plan["peak"] > 10**6 and plan["buffers"]
    assert main(["plan", "my.toml"]) == 0 and "peak" in capsys.readouterr().out
    assert main(["train", "--config", "my.toml", "--plan"]) == 0 and "peak" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["my.toml"]


# Exit codes


def unusable():
    from entrenar.convert import ConvertError
    from entrenar.data import CorpusError, TokenizerError
    from entrenar.formats import FormatError
    from entrenar.training.checkpoint import CheckpointError
    from entrenar.training.config import ConfigError

    return ConfigError, CorpusError, TokenizerError, CheckpointError, FormatError, ConvertError, CommandLineError


def failure():
    from entrenar.training.trainer import TrainingError

    return TrainingError


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        *((kind("bad thing"), 2, "entrenar try: bad thing\n") for kind in unusable()),
        (failure()("step 3: nan"), 1, "entrenar try: step 3: nan\n"),
        (OSError(28, "No space left on device", "a/b"), 1, "entrenar try: a/b: No space left on device\n"),
        (OSError("cannot write"), 1, "entrenar try: cannot write\n"),
        (MemoryError(), 1, "entrenar try: out of memory\n"),
        (MemoryError("cannot allocate 3 GB"), 1, "entrenar try: cannot allocate 3 GB\n"),
        (KeyboardInterrupt(), 130, "entrenar try: stopped\n"),
        (BrokenPipeError(), 141, ""),
        (TypeError("a\nb"), 1, "entrenar try: unexpected TypeError: a b: this is a defect of entrenar; "),
        (AssertionError(), 1, "entrenar try: unexpected AssertionError"),
        (BaseException("a library's panic"), 1, "unexpected BaseException: a library's panic"),
    ],
    ids=repr,
)
def test_every_kind_of_error_has_its_exit_code_and_one_line(capsys, verb, error, code, message):
    def run(args):
        raise error

    verb(run)
    got, said = errors(capsys, "try")
    assert got == code and message in said and said.count("\n") == (1 if message else 0)


def test_a_library_that_panics_and_a_memory_error_need_no_import_to_be_told(capsys, verb, monkeypatch):
    """Where importing fails too (no memory, no files), the first error is still the one that is told."""
    verb(lambda args: 1 / 0)
    upper = ("entrenar.training", "entrenar.data", "entrenar.formats")
    for name in [name for name in sys.modules if name.startswith(upper)]:
        monkeypatch.setitem(sys.modules, name, None)
    assert "ZeroDivisionError" in errors(capsys, "try")[1]


def test_a_traceback_is_shown_when_asked_for(capsys, verb, monkeypatch):
    verb(lambda args: 1 / 0)
    monkeypatch.setenv("ENTRENAR_TRACEBACK", "1")
    code, said = errors(capsys, "try")
    assert code == 1 and "Traceback" in said and "lambda" in said


def test_a_verbs_own_exit_code_is_the_commands(verb):
    verb(lambda args: 143)
    assert main(["try"]) == 143


def test_options_reach_a_verb_that_takes_configuration(verb):
    seen = []
    verb(lambda args: seen.append(args) or 0, lambda parser: parser.add_argument("--n", type=int), configured=True)
    assert main(["try", "--training.steps", "3", "--n", "2"]) == 0
    assert seen == [argparse.Namespace(n=2, overrides=[("training.steps", "3")])]


# Processes


def test_the_command_runs_as_a_module():
    done = command("--version")
    assert done.returncode == 0 and re.fullmatch(r"entrenar \d+\.\d+\.\d+\n", done.stdout) and done.stderr == ""


def test_a_reader_that_goes_away_is_met_with_silence_and_141():
    for words in (["train", "--help-options"], ["train", "--help"]):
        read, write = os.pipe()
        os.close(read)
        done = command(*words, capture_output=False, stdout=write, stderr=subprocess.PIPE)
        os.close(write)
        assert done.returncode == 141 and done.stderr == ""


def test_a_closed_output_is_no_trouble():
    done = command("--version", capture_output=False, preexec_fn=lambda: os.close(1), stderr=subprocess.PIPE)
    assert done.returncode == 0 and done.stderr == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="only Linux has a disk that is always full")
def test_a_full_disk_under_the_output_is_told():
    with open("/dev/full", "w") as full:
        done = command("--version", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1 and done.stderr == "entrenar: No space left on device\n"


def test_letters_the_terminal_lacks_end_nothing():
    done = command("trän", env=SAME_PACKAGE | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 2 and done.stderr.startswith("entrenar: tr?n: no such command; did you mean train?")


# Completion


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """The completion scripts, by shell."""
    import contextlib
    import io

    found = {}
    for shell in completion.SHELLS:
        text = io.StringIO()
        with contextlib.redirect_stdout(text):
            assert main(["completion", shell]) == 0
        found[shell] = text.getvalue()
    return found


def complete(scripts, folder, *words):
    """What bash offers for the last of the words."""
    (folder / "entrenar.bash").write_text(scripts["bash"])
    script = """source entrenar.bash; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
                _shtab_entrenar; printf '%s\\n' "${COMPREPLY[@]}" """
    command = ["bash", "-c", script, "bash", "entrenar", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout.split()


@pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash here")
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["tr"], ["train"]),
        ([""], [*(name for name in cli.VERBS)]),
        (["train", "--training.start"], ["--training.start_from"]),
        (["train", "--data.skip_bad", ""], ["true", "false"]),
        (["train", "--lr_schedule.schedule", "co"], ["cosine", "constant"]),
        (["train", "--out", "no"], ["notes"]),
        (["train", "--training.steps", "5", "--checkpointing.mi"], ["--checkpointing.minutes"]),
        (["plan", "my"], ["my.toml"]),
        (["resume", "notes", "--training.ste"], ["--training.steps"]),
        (["resume", "--data"], []),
        (["inspect", "no"], ["notes"]),
        (["generate", "notes", "--temp"], ["--temperature"]),
        (["generate", "notes", "--min"], ["--min-p"]),
        (["chat", "notes", "--storage", "nf"], ["nf4"]),
        (["chat", "no"], ["notes"]),
        (["merge", "notes", "--da"], ["--data"]),
        (["quantize", "notes", "--to", "b"], ["bfloat16"]),
        (["export", "notes", "--to", "gguf-"], ["gguf-lora"]),
        (["data", "sh"], ["show"]),
        (["data", "show", "--data.sou"], ["--data.source"]),
        (["completion", ""], ["bash", "zsh", "fish"]),
    ],
    ids=lambda words: " ".join(words),
)
def test_bash_completes_verbs_options_choices_and_files(scripts, tmp_path, words, offered):
    (tmp_path / "notes").mkdir()
    (tmp_path / "my.toml").touch()
    assert complete(scripts, tmp_path, *words) == offered


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_every_shells_script_knows_every_verb_and_option(scripts, shell):
    text = scripts[shell]
    for name in (*cli.VERBS, *(option.full_name for kind in (Config, FineTuning) for option in options(kind))):
        assert name in text, name


def test_every_option_a_verb_takes_is_known_to_the_whole_parser():
    verbs = next(a for a in completion.whole_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    assert list(verbs) == list(cli.VERBS)
    known = {name for leaf in leaves(verbs["train"]) for action in leaf._actions for name in action.option_strings}
    assert {f"--{option.full_name}" for option in options(Config)} | {"--out", "--budget", "--plan"} <= known
