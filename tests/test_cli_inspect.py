"""`entrenar inspect`: every kind of file and folder, statistics against NumPy's, and what is broken is said."""

import json
import math
import re
import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from entrenar.cli import main
from entrenar.cli.inspect_files import in_order
from entrenar.cli.tensors import BLOCK, Stats, Weight, blocks_of, grouped, ranges, stats_of, table
from entrenar.data import ByteTokenizer
from entrenar.formats import gguf, safetensors
from entrenar.llama import Llama, LlamaConfig
from entrenar.optim import AdamW
from entrenar.training.checkpoint import model_files, save_step

SHAPE = LlamaConfig(vocab_size=257, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
                    num_attention_heads=2, rms_norm_eps=1e-5, max_position_embeddings=32, tie_word_embeddings=True,
                    eos_token_id=256)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return Llama(SHAPE)


@pytest.fixture(scope="module")
def made(tmp_path_factory, model):
    """A run with two checkpoints, as training leaves it."""
    run = tmp_path_factory.mktemp("made") / "run"
    run.mkdir()
    optimizer = AdamW(list(model.named_parameters()), lr=0.01)
    parts = {"write": model_files(model, ByteTokenizer()), "optimizer": optimizer}
    for step in (4, 8):
        save_step(run, step, best=step == 4, state={"step": step}, **parts)
    events = [
        {"event": "start", "time": "2026-11-22T21:00:00+00:00", "config": {"data": {"source": "notes"}}},
        {"event": "step", "step": 8, "steps": 8, "loss": 2.5},
        {"event": "held_out", "step": 8, "bits_per_byte": 1.75},
        {"event": "end", "step": 8, "stopped": ""},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + '{"event": "st')
    return run


@pytest.fixture
def run(made, tmp_path):
    """A copy that a test may break."""
    import shutil

    return shutil.copytree(made, tmp_path / "run", symlinks=True)


def inspected(capsys, *words):
    """(exit code, text) of an inspection."""
    code = main(["inspect", *map(str, words)])
    said = capsys.readouterr()
    assert said.err == "", said.err
    return code, said.out


def as_json(capsys, *words):
    code, text = inspected(capsys, *words, "--json")
    return code, json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


def refused(capsys, *words):
    code = main(["inspect", *map(str, words)])
    said = capsys.readouterr()
    assert code == 2 and said.out == "" and said.err.count("\n") == 1
    return said.err


# Statistics

FLOATS = hnp.arrays(np.float32, hnp.array_shapes(max_dims=2, max_side=9), elements=st.floats(-1e6, 1e6, width=32))


@given(st.lists(FLOATS, min_size=1, max_size=4))
def test_statistics_of_blocks_together_are_those_of_the_whole(arrays):
    whole = np.concatenate([array.ravel() for array in arrays]).astype(np.float64)
    stats = sum(map(stats_of, arrays), Stats())
    assert (stats.count, stats.zeros, stats.finite) == (whole.size, np.sum(whole == 0), whole.size)
    assert (stats.low, stats.high) == (whole.min(), whole.max())
    spread = max(1e-30, np.abs(whole).max())
    assert math.isclose(stats.mean, whole.mean(), rel_tol=1e-9, abs_tol=1e-9 * spread)
    assert math.isclose(stats.std, whole.std(), rel_tol=1e-6, abs_tol=1e-7 * spread)


def test_what_is_not_finite_is_counted_and_kept_out_of_the_rest():
    stats = stats_of(np.array([1.0, np.nan, -3.0, np.inf, -np.inf, 0.0], np.float32))
    assert (stats.count, stats.nan, stats.inf, stats.zeros) == (6, 1, 2, 1)
    assert (stats.low, stats.high) == (-3.0, 1.0) and math.isclose(stats.mean, -2 / 3)
    nothing = stats_of(np.full(3, np.nan, np.float32))
    assert nothing.to_dict()["min"] is None and (nothing + stats).mean == stats.mean


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16, np.int8, np.uint32, bool])
def test_every_type_of_number_has_statistics(dtype):
    array = np.array([0, 1, 1, 0], dtype)
    assert stats_of(array).to_dict() == {"min": 0, "max": 1, "mean": 0.5, "std": 0.5, "zeros": 2, "nan": 0, "inf": 0}


def test_an_empty_tensor_is_no_trouble():
    empty = Weight("none", (0, 4), "F32", 0, lambda: blocks_of(np.empty((0, 4), np.float32))).measured()
    assert empty.stats == Stats() and "-" in table([empty])[1]


# Rows


def weight(name, shape=(2, 2), dtype="F32"):
    return Weight(name, shape, dtype, 4 * math.prod(shape)).measured()


def test_layers_that_are_alike_share_a_row_and_others_do_not():
    weights = [weight(f"model.layers.{i}.mlp.up_proj.weight") for i in (0, 1, 2, 5)]
    weights.append(weight("model.layers.3.mlp.up_proj.weight", dtype="F16"))
    weights.append(weight("model.layers.4.mlp.up_proj.weight", (9,)))
    rows = grouped([*weights, weight("model.norm.weight")])
    assert [row.name for row in rows] == [
        "model.layers.0-2,5.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight",
        "model.layers.4.mlp.up_proj.weight", "model.norm.weight",
    ]  # fmt: skip
    assert (rows[0].layers, rows[0].nbytes, rows[0].size) == (4, 64, 16)


def test_a_row_of_several_layers_has_the_statistics_of_all():
    arrays = [np.arange(i, i + 4.0) for i in (0, 10)]
    weights = [Weight(f"a.{i}.b", (4,), "F64", 32, lambda x=x: blocks_of(x)).measured() for i, x in enumerate(arrays)]
    (row,) = grouped(weights)
    assert math.isclose(row.stats.std, np.concatenate(arrays).std()) and row.stats.high == 13


def test_numbers_in_a_row_are_written_as_ranges():
    assert ranges([0, 1, 2, 3]) == "0-3" and ranges([7]) == "7" and ranges([0, 2, 3, 9]) == "0,2-3,9"


def test_layer_2_comes_before_layer_10():
    names = ["a.10.b", "a.2.b", "a.x", "a.2.a"]
    assert [w.name for w in in_order(weight(name) for name in names)] == ["a.2.a", "a.2.b", "a.10.b", "a.x"]


# Files


def test_a_safetensors_file_has_its_tensors_and_their_statistics(capsys, tmp_path):
    x = np.random.default_rng(0).standard_normal((3, 500)).astype(np.float32)
    x[1, :100] = 0
    safetensors.save(tmp_path / "a.safetensors", {"x": x, "half": x.astype(ml_dtypes.bfloat16)}, {"by": "me"})
    code, found = as_json(capsys, tmp_path / "a.safetensors")
    assert code == 0 and (found["kind"], found["numbers"]) == ("safetensors", 3000)
    assert found["facts"]["metadata by"] == "me"
    (mine,) = [tensor for tensor in found["tensors"] if tensor["name"] == "x"]
    assert (mine["shape"], mine["dtype"], mine["bytes"], mine["zeros"]) == ([3, 500], "F32", 6000, 100)
    for name, value in {"min": x.min(), "max": x.max(), "mean": x.mean(), "std": x.std()}.items():
        assert math.isclose(mine[name], value, rel_tol=1e-5, abs_tol=1e-7)
    code, text = inspected(capsys, tmp_path / "a.safetensors", "--no-stats")
    assert "3 x 500" in text and "BF16" in text and "mean" not in text


def test_weights_that_are_not_finite_are_said_loudly(capsys, tmp_path):
    x = np.zeros((4, 4), np.float32)
    x[0, :3] = np.nan, np.nan, np.inf
    safetensors.save(tmp_path / "a.safetensors", {"w": x, "fine": np.ones(3)})
    code, text = inspected(capsys, tmp_path / "a.safetensors")
    assert code == 2
    assert text.rstrip().endswith("NOT FINITE: w: 2 NaN and 1 infinite of 16 numbers")
    code, found = as_json(capsys, tmp_path / "a.safetensors")
    assert code == 2 and len(found["problems"]) == 1


def test_many_tensors_that_are_not_finite_do_not_fill_the_screen(capsys, tmp_path):
    arrays = {f"w{i}": np.full(2, np.nan, np.float32) for i in range(50)}
    safetensors.save(tmp_path / "a.safetensors", arrays)
    text = inspected(capsys, tmp_path / "a.safetensors")[1]
    assert text.count("NOT FINITE") == 21 and "30 more tensors" in text


def test_statistics_are_taken_in_little_memory(tmp_path, capsys):
    big = np.ones(16 * BLOCK, np.float32)
    safetensors.save(tmp_path / "a.safetensors", {"w": big})
    tracemalloc.start()
    try:
        assert main(["inspect", str(tmp_path / "a.safetensors")]) == 0
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < big.nbytes / 1.5 and peak < 8 * 8 * BLOCK


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_a_gguf_file_has_its_metadata_and_the_statistics_of_what_it_stands_for(capsys, tmp_path, model, kind):
    from entrenar.convert.gguf import export_gguf

    path = tmp_path / "m.gguf"
    export_gguf(model, None, path, kind=kind.lower())
    code, found = as_json(capsys, path)
    assert code == 0 and found["kind"] == "GGUF" and found["facts"]["general.architecture"] == "llama"
    with gguf.GGUF(path) as file:
        for tensor in found["tensors"]:
            values = np.asarray(file[tensor["name"]], np.float64)
            assert tensor["shape"] == list(values.shape)
            assert math.isclose(tensor["mean"], values.mean(), rel_tol=1e-9, abs_tol=1e-12)
            assert tensor["max"] == values.max()


@pytest.mark.parametrize("version", [0, 1])
def test_a_llama2c_file_has_its_header_and_tensors(capsys, tmp_path, model, version):
    from entrenar.convert.llama2c import export_llama2c

    path = export_llama2c(model, tmp_path / "m.bin", version=version)
    code, found = as_json(capsys, path)
    assert code == 0 and found["kind"] == "llama2.c"
    assert (found["facts"]["version"], found["facts"]["dim"]) == (version, 16)
    tensors = {tensor["name"]: tensor for tensor in found["tensors"]}
    up = model.state_dict()["model.layers.1.mlp.up_proj.weight"]
    assert math.isclose(tensors["layers.1.w3"]["std"], up.std(), rel_tol=1e-5)
    assert "layers.0-2.w3" in inspected(capsys, path)[1]


def test_int8_with_scales_becomes_the_numbers_it_stands_for():
    from entrenar.cli.inspect_files import llama2c_blocks

    q, scale = np.arange(-16, 16, dtype=np.int8), np.array([0.5, 2.0], "<f4")
    raw = np.frombuffer(q.tobytes() + scale.tobytes(), np.uint8)
    (block,) = llama2c_blocks(raw, 16)
    assert np.array_equal(block, np.stack([q[:16] * 0.5, q[16:] * 2.0]))


def test_a_token_file_is_checked_to_the_last_token(capsys, tmp_path):
    from entrenar.data.tokenfile import HEADER, TokenWriter

    writer = TokenWriter(tmp_path / "train.tokens", np.dtype(np.uint16))
    writer.append(np.arange(200))
    writer.finish(vocab_size=257, source="00" * 16, tokenizer="11" * 16)
    code, text = inspected(capsys, tmp_path / "train.tokens")
    assert code == 0 and "prepared tokens" in text and "uint16" in text and "all 200 tokens are right" in text
    raw = bytearray((tmp_path / "train.tokens").read_bytes())
    raw[HEADER.size + 30] ^= 1
    (tmp_path / "train.tokens").write_bytes(raw)
    assert inspected(capsys, tmp_path / "train.tokens")[0] == 2


def test_a_tokenizer_is_known_by_its_name(capsys, made):
    code, text = inspected(capsys, made / "step-000008" / "tokenizer.json")
    assert code == 0 and re.search(r"tokens +257\n", text) and "<|endoftext|>" in text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.safetensors", b"\x05", "has 1 bytes"),
        ("a.safetensors", (1 << 60).to_bytes(8, "little") + b"{}", "claims a header of"),
        ("a.gguf", b"GGUF\x03\0\0\0" + b"\xff" * 16, "a.gguf"),
        ("a.bin", struct.pack("<20i", 4, 4, 1, 2, 1, 4, 4, *range(13)), "has 80 bytes; a llama2.c file with this"),
        ("a.bin", b"PK\x03\x04archive/data.pkl", "looks like a pickle, which runs code when it is opened"),
        ("a.pt", b"\x80\x02}q\0.", "looks like a pickle"),
        ("a.json", b"[1, 2", "a.json"),
        ("a.json", b'{"a": 1}', "no tokenizer.json and no model's config.json"),
        ("tokenizer.json", b'{"model": 3}', "tokenizer"),
        ("model.safetensors.index.json", b'{"weight_map": {}}', "give the folder it lies in"),
        ("a.txt", b"hello", "begins with b'hello', which is none of"),
        ("a.txt", b"", "is empty"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else value,
)
def test_a_file_that_cannot_be_used_ends_with_2_and_one_line(capsys, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert message in refused(capsys, tmp_path / name)


def test_a_folder_that_holds_nothing_known_is_refused(capsys, tmp_path):
    assert "neither a run's folder (metrics.jsonl), nor a checkpoint" in refused(capsys, tmp_path)
    assert "there is no such file or folder" in refused(capsys, tmp_path / "missing")


# Folders


def test_a_run_has_its_story_and_its_newest_checkpoint(capsys, made):
    code, text = inspected(capsys, made)
    assert code == 0
    for expected in (
        r"run: run\ntext +notes\nbegun +2026-11-22",
        r"steps +8 of 8, the last with loss 2.5000",
        r"held out +1.7500 bits per byte at step 8",
        r"ended +done",
        r"step-000004 +\d+ kB, the best\nstep-000008 +\d+ kB\n",
        r"step-000008: checkpoint\nstep +8\n",
        r"model +LLaMA, 3 layers, 16 wide, 2 heads of 8, feed-forward 32\n",
        rf"parameters +{SHAPE.parameter_count():,}\n",
        r"hashes +all \d files are what was written",
        r"model.layers.0-2.mlp.up_proj.weight +3 x \(32 x 16\) +F32",
    ):
        assert re.search(expected, text), expected
    assert "exp_avg" not in text and "optimizer.safetensors: safetensors" in text


@pytest.mark.parametrize(
    ("last", "ended"),
    [
        ({"event": "end", "stopped": "SIGTERM"}, "stopped: SIGTERM"),
        ({"event": "error", "text": "step 9: the loss is nan"}, "failed: step 9: the loss is nan"),
        ({"event": "step", "step": 9, "steps": 20, "loss": 2}, "not yet, or killed: `entrenar resume` goes on with it"),
    ],
)
def test_how_a_run_ended_is_told(capsys, tmp_path, last, ended):
    lines = [{"event": "step", "step": 8, "steps": 20, "loss": 2.5}, last]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n[3]\nnull\n")
    code, found = as_json(capsys, tmp_path)
    assert code == 0 and found["facts"]["ended"] == ended and found["facts"]["checkpoints"] == "none"


def test_all_shows_every_tensor(capsys, made):
    text = inspected(capsys, made / "step-000008", "--all")[1]
    for layer in range(3):
        assert f"model.layers.{layer}.mlp.up_proj.weight" in text
    assert text.count("model.norm.weight") > 1  # the optimizer's too


def test_a_changed_or_missing_file_of_a_checkpoint_is_said(capsys, run):
    file = run / "step-000008" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    code, text = inspected(capsys, run)
    assert code == 2 and "model.safetensors is not what was written" in text.splitlines()[-1]
    (run / "step-000008" / "optimizer.safetensors").unlink()
    assert "optimizer.safetensors is missing" in inspected(capsys, run)[1]


def test_a_broken_file_in_a_folder_does_not_hide_the_others(capsys, run):
    file = run / "step-000008" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    code, text = inspected(capsys, run)
    last = text.splitlines()[-2:]
    assert code == 2 and any("model.safetensors: tensor" in line for line in last)
    assert any("model.safetensors is not what was written" in line for line in last)
    assert "optimizer.safetensors: safetensors" in text and "tokenizer.json: tokenizer" in text


def test_a_model_in_several_files_is_one_model(capsys, tmp_path, model):
    model.save_pretrained(tmp_path / "hf", max_shard_size=8000)
    code, found = as_json(capsys, tmp_path / "hf")
    shards = [part for part in found["contains"] if part["kind"] == "safetensors"]
    assert code == 0 and len(shards) > 1
    assert sum(part["numbers"] for part in shards) == found["facts"]["parameters"] == SHAPE.parameter_count()
    next((tmp_path / "hf").glob("model-00002*")).unlink()
    code, found = as_json(capsys, tmp_path / "hf")
    assert code == 2 and any("is missing, which model.safetensors.index.json names" in p for p in found["problems"])


def test_an_index_that_leads_out_of_the_folder_is_refused(capsys, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b.safetensors"}}')
    assert "wanted a file of this folder" in refused(capsys, tmp_path)


def test_a_tensor_that_is_not_where_the_index_says_is_a_problem(capsys, tmp_path):
    safetensors.save(tmp_path / "b.safetensors", {"b": np.ones(2, np.float32)})
    (tmp_path / "config.json").write_text(json.dumps(SHAPE.to_dict()))
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}')
    code, found = as_json(capsys, tmp_path)
    assert code == 2 and "a is not in b.safetensors, where model.safetensors.index.json says" in found["problems"]


def test_a_model_entrenar_cannot_train_is_shown_all_the_same(capsys, tmp_path):
    safetensors.save(tmp_path / "model.safetensors", {"w": np.ones(2, np.float32)})
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    code, text = inspected(capsys, tmp_path)
    assert code == 0 and "gpt2: not one entrenar trains" in text and re.search(r"^w +2 +F32", text, re.M)


def test_names_cannot_move_the_cursor(capsys, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"event": "error", "text": "\\u001b[2J"}\n')
    assert "\x1b" not in inspected(capsys, tmp_path)[1]


def test_a_file_does_not_choose_the_width_of_the_table_nor_the_length_of_the_list(capsys, tmp_path):
    arrays = {f"{'x' * 5000}{i}": np.ones(2, np.float32) for i in range(3)}
    arrays["a.%s.b" % ("9" * 5000)] = np.ones((1,) * 30)
    safetensors.save(tmp_path / "a.safetensors", arrays, {f"{'k' * 5000}{i}": "\x1b" * 5000 for i in range(300)})
    code, text = inspected(capsys, tmp_path / "a.safetensors")
    lines = text.splitlines()
    assert code == 0 and max(map(len, lines)) < 250 and len(lines) < 250 and "and 102 more" in text
    assert "\x1b" not in text


def test_numbers_too_big_to_square_are_still_json(capsys, tmp_path):
    safetensors.save(tmp_path / "a.safetensors", {"w": np.array([1e308, 1e308, -1e308])})
    code, found = as_json(capsys, tmp_path / "a.safetensors")
    assert code == 0 and found["tensors"][0]["max"] == 1e308 and found["tensors"][0]["std"] is None


def test_prepared_data_is_checked_as_a_whole(capsys, tmp_path):
    from entrenar.data import prepare

    (tmp_path / "text.txt").write_text("".join(f"{i} and {i * i}\n" for i in range(500)))
    data = prepare(str(tmp_path / "text.txt"), tokenizer="bytes", cache="off", into=tmp_path / "data")
    code, text = inspected(capsys, tmp_path / "data")
    assert code == 0 and f"train_tokens          {data.facts.train_tokens:,}\n" in text and data.identity in text
    file = tmp_path / "data" / "train.tokens"
    file.write_bytes(file.read_bytes()[:-2])
    assert "train.tokens" in refused(capsys, tmp_path / "data")


def test_colour_is_for_terminals_that_want_it(monkeypatch):
    import io

    from entrenar.cli.terminal import colours

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert colours(Terminal()) and not colours(io.StringIO())
    monkeypatch.setenv("TERM", "dumb")
    assert not colours(Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not colours(Terminal())
