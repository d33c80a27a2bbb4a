"""The options of a run: defaults, files, overrides, and what is said about bad ones."""

import dataclasses
import re
from pathlib import Path

import pytest

from entrenar.llama import LlamaConfig
from entrenar.training.config import Config, ConfigError, help_text, options, read_config, to_toml

CONFIGS = Path(__file__).parent.parent / "examples" / "llama2" / "configs"


def written(tmp_path, text):
    (tmp_path / "run.toml").write_text(text)
    return tmp_path / "run.toml"


def problems(file=None, *overrides):
    with pytest.raises(ConfigError) as error:
        read_config(file, overrides)
    return str(error.value)


def test_tiny_toml_is_the_default_run():
    assert read_config(CONFIGS / "tiny.toml") == Config() == read_config()


def test_tiny_toml_names_every_option():
    text = (CONFIGS / "tiny.toml").read_text()
    assert [o.name for o in options(Config) if not re.search(rf"^{o.name} = ", text, re.M)] == []


@pytest.mark.parametrize(
    ("name", "shape", "parameters"),
    [
        ("15m", (288, 6, 6, 768, 256, True), 15_191_712),
        ("124m", (768, 12, 12, 3072, 2048, True), 137_841_408),
        ("7b", (4096, 32, 32, 11008, 4096, False), 6_738_415_616),
    ],
)
def test_the_other_configurations_have_their_shapes(name, shape, parameters):
    config = read_config(CONFIGS / f"{name}.toml")
    c = config.llama(config.data.vocab_size)
    assert c.vocab_size == 32000
    assert shape == (c.hidden_size, c.num_hidden_layers, c.num_attention_heads, c.intermediate_size,
                     c.max_position_embeddings, c.tie_word_embeddings)  # fmt: skip
    assert c.parameter_count() == parameters


def test_a_configuration_written_reads_back_the_same(tmp_path):
    config = read_config(
        None,
        [
            ("training.sample_prompt", 'a "b" \\ é\n#'),
            ("lr_schedule.learning_rate", "1e-5"),
            ("model.num_key_value_heads", "2"),
            ("model.vocab_size", "none"),
        ],
    )
    assert read_config(written(tmp_path, to_toml(config))) == config


def test_overrides_go_over_the_file_and_the_last_one_counts(tmp_path):
    file = written(tmp_path, "[training]\nsteps = 500\nseed = 3\n")
    config = read_config(file, [("training.steps", "700"), ("training.steps", "1_000")])
    assert (config.training.steps, config.training.seed) == (1000, 3)


def test_every_option_has_a_type_a_default_of_it_and_a_help():
    for o in options(Config):
        assert o.help, o.full_name
        assert o.check(o.default) == o.default, o.full_name
    model = {o.name for o in options(Config, "model")}
    assert model == {f.name for f in dataclasses.fields(LlamaConfig)}


def test_help_lists_every_option_with_its_default():
    text = re.sub(r"\s+", " ", help_text())
    for o in options(Config):
        assert f"--{o.full_name} " in text
    assert f"windows per micro-batch (default {Config().training.batch_size})" in text
    assert "(one of cosine, linear, constant, wsd; default " in text


def test_all_problems_come_at_once_with_file_line_key_and_the_nearest_name(tmp_path):
    file = written(tmp_path, """
[model]
hiden_size = 5
[training]
learning_rate = 3
steps = true
beta1 = 1.0
[lr_schedul]
schedule = "cosine"
[lr_schedule]
schedule = "cosin"
""")  # fmt: skip
    text = problems(file, ("training.stps", "3"), ("steps", "3"), ("data.vocab_size", "many"), ("training.seed", "-1"))
    for expected in (
        f"{file} line 3: [model] hiden_size = 5: no such option; did you mean model.hidden_size?",
        f"{file} line 5: [training] learning_rate = 3: no such option; "
        "did you mean lr_schedule.learning_rate?",
        f"{file} line 6: [training] steps = true: wanted a whole number at least 1",
        f"{file} line 7: [training] beta1 = 1.0: wanted a number at least 0 and below 1",
        f'{file} line 9: [lr_schedul] schedule = "cosine": no such option; '
        "did you mean lr_schedule.schedule?",
        f'{file} line 11: [lr_schedule] schedule = "cosin": wanted one of cosine, linear, constant, wsd',
        "--training.stps 3: no such option; did you mean training.steps?",
        "--steps 3: no such option; did you mean training.steps?",
        "--data.vocab_size many: wanted a whole number at least 257",
        "--training.seed -1: wanted a whole number at least 0",
    ):
        assert expected in text
    assert text.startswith("10 problems")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[training\nsteps = 3", "not TOML: .*line 1"),
        ("[training]\nsteps = 1\nsteps = 2", "not TOML: Cannot overwrite"),
        ("steps = 3", "line 1: steps = 3: no such option; did you mean training.steps"),
        ("[modle]\n", r"line 1: \[modle\]: no such option; did you mean \[model\]"),
        ("[training.deep]\nsteps = 1", "no such option"),
        ("training = 3", "line 1: training = 3: no such option"),
        ("[data]\nsource = 3", "line 2: .data. source = 3: wanted text"),
        ("[training]\nclip_norm = nan", "wanted a number at least 0"),
        ("[model]\nhidden_size = 0", r"run.toml line 2: \[model\] hidden_size = 0: hidden_size = 0: wanted"),
        ("[model]\nhidden_size = 190", "not divisible by num_attention_heads"),
        ("[training]\ncontext = 1024", r"line 2: .*wanted at most model.max_position_embeddings = 256"),
        ("[lr_schedule]\nwarmup_steps = 9999", "line 2: .*wanted at most training.steps"),
        ('[lr_schedule]\nschedule = "wsd"\ndecay_steps = 9999', "line 3: .*the steps after the warmup"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, message):
    assert re.search(message, problems(written(tmp_path, text)), re.S)


def test_a_missing_file_is_named(tmp_path):
    assert f"{tmp_path / 'no.toml'}: cannot be read: No such file" in problems(tmp_path / "no.toml")


def test_whole_numbers_are_numbers_but_fractions_and_switches_are_no_whole_numbers(tmp_path):
    assert read_config(None, [("training.weight_decay", "1")]).training.weight_decay == 1.0
    assert "wanted a whole number" in problems(None, ("training.steps", "1.5"))
    assert "wanted true or false" in problems(None, ("training.activation_checkpointing", "1"))
    assert read_config(
        None, [("training.activation_checkpointing", "true")]
    ).training.activation_checkpointing


def test_the_vocabulary_is_the_tokenizers_and_another_is_an_error():
    assert read_config().llama(300, end_id=7).eos_token_id == 7
    config = read_config(None, [("model.vocab_size", "1000")])
    assert config.llama(1000).vocab_size == 1000
    with pytest.raises(ConfigError, match="vocab_size = 1000, but the tokenizer has 300 tokens"):
        config.llama(300)


def test_a_table_can_be_given_on_the_command_line():
    table = '{rope_type = "llama3", factor = 8.0, low_freq_factor = 1.0, high_freq_factor = 4.0, ' \
            "original_max_position_embeddings = 8192}"  # fmt: skip
    assert read_config(None, [("model.rope_scaling", table)]).model["rope_scaling"]["factor"] == 8.0


def test_no_two_options_share_a_name_but_the_two_vocabularies():
    names = [o.name for o in options(Config)]
    assert {name for name in names if names.count(name) > 1} == {"vocab_size"}
    assert set(Config.SECTIONS) == {"model", "training", "lr_schedule", "data", "checkpointing"}


def test_warmup_and_decay_follow_the_number_of_steps_unless_given():
    short, long = read_config(None, [("training.steps", "50")]), read_config(None, [("training.steps", "5000")])
    for config in (short, long):
        steps = config.training.steps
        shares = [config.lr_schedule.share(step, steps) for step in range(steps)]
        assert shares[steps // 25 - 1] == 1 and max(shares) == 1 and shares[0] == 1 / (steps // 25)
    wsd = read_config(None, [("lr_schedule.schedule", "wsd"), ("training.steps", "100")]).lr_schedule
    assert wsd.share(79, 100) == 1 > wsd.share(80, 100)
    with pytest.raises(ConfigError, match="wanted at most training.steps = 50"):
        read_config(None, [("training.steps", "50"), ("lr_schedule.warmup_steps", "51")])
