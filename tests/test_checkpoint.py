"""Checkpoints: whole or not there, readable by others, and complete."""

import json
import resource
import shutil
import subprocess

import numpy as np
import pytest

from entrenar import optim, random
from entrenar.data import ByteTokenizer
from entrenar.llama import Llama, LlamaConfig
from entrenar.training.checkpoint import (
    CheckpointError,
    clean,
    load_checkpoint,
    model_files,
    newest,
    save_checkpoint,
    save_step,
    saved_steps,
)

SHAPE = LlamaConfig(
    vocab_size=257,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=16,
    tie_word_embeddings=True,
)


@pytest.fixture
def model():
    random.seed(3)
    return Llama(SHAPE)


@pytest.fixture
def parts(model):
    optimizer = optim.AdamW(model.named_parameters())
    for p in model.parameters():
        p.grad = np.ones_like(p.data)
    optimizer.step()
    return {"write": model_files(model, ByteTokenizer()), "optimizer": optimizer, "state": {"step": 1}}


def test_what_is_saved_is_loaded(model, parts, tmp_path):
    save_checkpoint(tmp_path / "c", **parts)
    loaded = load_checkpoint(tmp_path / "c")
    assert loaded.config == SHAPE and loaded.state["step"] == 1 and loaded.tokenizer.kind == "bytes"
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(loaded.model().state_dict()[name], array)
    other = optim.AdamW(loaded.model().named_parameters())
    other.load_state_dict(loaded.optimizer)
    assert other.steps == 1
    for name, m in parts["optimizer"].m.items():
        np.testing.assert_array_equal(other.m[name], m)


def test_the_files_are_those_of_hugging_face(parts, tmp_path):
    from safetensors import safe_open

    save_checkpoint(tmp_path / "c", **parts)
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    with safe_open(tmp_path / "c" / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert "model.layers.0.self_attn.q_proj.weight" in file.keys()
        assert "lm_head.weight" not in file.keys()  # tied
    names = {p.name for p in (tmp_path / "c").iterdir()}
    assert names >= {"tokenizer.json", "tokenizer_config.json", "optimizer.safetensors", "state.json"}


def test_an_existing_checkpoint_is_never_overwritten(parts, tmp_path):
    save_checkpoint(tmp_path / "c", **parts)
    with pytest.raises(FileExistsError):
        save_checkpoint(tmp_path / "c", **parts | {"state": {"step": 2}})
    assert load_checkpoint(tmp_path / "c").state["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_a_failure_on_the_way_leaves_nothing(parts, tmp_path):
    with pytest.raises(TypeError):
        save_checkpoint(tmp_path / "c", **parts | {"state": {"step": object()}})
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_takes_no_more_is_an_oserror_and_leaves_nothing(parts, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # bytes of a file: the write call itself fails
    try:
        with pytest.raises(OSError, match="File too large"):
            save_checkpoint(tmp_path / "c", **parts)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_changed_missing_and_absent_files_are_told(parts, tmp_path):
    save_checkpoint(tmp_path / "c", **parts)
    weights = tmp_path / "c" / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(CheckpointError, match="model.safetensors is not what was written"):
        load_checkpoint(tmp_path / "c")
    assert load_checkpoint(tmp_path / "c", check=False).state["step"] == 1
    weights.unlink()
    with pytest.raises(CheckpointError, match="model.safetensors is missing"):
        load_checkpoint(tmp_path / "c")
    with pytest.raises(CheckpointError, match="SHA256SUMS is missing"):
        load_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 1}', '{"format": 99}', '{"step": 3}'])
def test_a_state_this_version_does_not_read_is_told(parts, tmp_path, content):
    save_checkpoint(tmp_path / "c", **parts)
    (tmp_path / "c" / "state.json").write_text(content)
    with pytest.raises(CheckpointError, match="state.json"):
        load_checkpoint(tmp_path / "c", check=False)


def test_a_state_that_could_not_be_read_again_is_not_written(parts, tmp_path):
    with pytest.raises(ValueError, match="Out of range float"):
        save_checkpoint(tmp_path / "c", **parts | {"state": {"loss": float("nan")}})
    assert list(tmp_path.iterdir()) == []


HASH = "0" * 64


@pytest.mark.parametrize("content", ["", "nonsense", f"{HASH}  ../../etc/passwd\n", f"{HASH}  state.json\n", "é"])
def test_sums_that_are_none_are_told(parts, tmp_path, content):
    save_checkpoint(tmp_path / "c", **parts)
    (tmp_path / "c" / "SHA256SUMS").write_text(content)
    with pytest.raises(CheckpointError, match="SHA256SUMS"):
        load_checkpoint(tmp_path / "c")


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="this system has no sha256sum")
def test_the_sums_are_those_of_sha256sum(parts, tmp_path):
    save_checkpoint(tmp_path / "c", **parts)
    done = subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=tmp_path / "c", capture_output=True)
    assert done.returncode == 0, done.stderr
    listed = {line.split()[1] for line in (tmp_path / "c" / "SHA256SUMS").read_text().splitlines()}
    assert listed == {p.name for p in (tmp_path / "c").iterdir()} - {"SHA256SUMS"}


def test_the_newest_whole_checkpoint_is_found_and_broken_ones_are_told(parts, tmp_path):
    for step in (10, 20, 30):
        save_step(tmp_path, step, keep_last_n=3, **parts | {"state": {"step": step}})
    (tmp_path / "step-000030" / "state.json").unlink()
    (tmp_path / "step-000020" / "optimizer.safetensors").write_bytes(b"")
    told = []
    assert newest(tmp_path, told.append).name == "step-000010"
    assert "step-000030" in told[0] and "state.json is missing; falling back to step-000010" in told[0]
    assert load_checkpoint(tmp_path).state["step"] == 10
    (tmp_path / "step-000010" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no whole checkpoint; .*step-000030.*step-000020.*step-000010"):
        newest(tmp_path)


def test_cleaning_sweeps_up_and_sets_aside_but_destroys_no_checkpoint(parts, tmp_path):
    for step in (10, 20):
        save_step(tmp_path, step, best=step == 20, **parts | {"state": {"step": step}})
    (tmp_path / ".step-000030.x7").mkdir()
    (tmp_path / ".step-000005.old").mkdir()
    (tmp_path / ".checkpoint.77").symlink_to("nowhere")
    for name in (".config.toml.77", ".report.html.77"):
        (tmp_path / name).write_text("half")
    (tmp_path / ".mine").write_text("kept")
    assert clean(tmp_path, 10) == ["step-000020"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".mine", "step-000010", "step-000020.broken"]


def test_a_run_keeps_the_newest_and_the_best(parts, tmp_path):
    for step in (10, 20, 30, 40):
        save_step(tmp_path, step, best=step == 20, keep_last_n=1, **parts | {"state": {"step": step}})
    assert [p.name for p in saved_steps(tmp_path)] == ["step-000020", "step-000040"]
    assert load_checkpoint(tmp_path).state["step"] == 40
    assert load_checkpoint(tmp_path / "best").state["step"] == 20
    assert (tmp_path / "checkpoint").is_symlink()
