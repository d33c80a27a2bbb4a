"""Whole training runs, through the job that `entrenar train` and `entrenar finetune` start: the same bits of weights,
of the optimizer's moments and of every reported loss, whatever the number of threads.
"""

from __future__ import annotations

import json
from pathlib import Path

import fine_runs
import numpy as np
import pytest
import runs

from entrenar import kernels, optim

THREADS = (1, 2, 3, 4, 8)
STEPS = {"training.steps": 20, "training.report_every": 1, "training.eval_every": 10, "checkpointing.every": 20}
# Large enough that products, rows and elements are divided among threads
PRETRAINED = runs.SMALL | STEPS | {
    "model.hidden_size": 96, "model.intermediate_size": 256, "model.num_hidden_layers": 2,
    "model.num_attention_heads": 4, "model.num_key_value_heads": 2, "training.batch_size": 3, "training.context": 80,
    "training.accumulation": 2,
}  # fmt: skip
TUNED = fine_runs.SMALL | STEPS | {
    "base.storage": "nf4", "training.batch_size": 4, "training.accumulation": 2, "adapter.r": 8,
}  # fmt: skip
SHAPE = {"hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture
def folder(native, tmp_path, monkeypatch):
    """An empty folder to run in; as many threads as there were, afterwards."""
    before = kernels.get_num_threads()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("entrenar.kernels.fma_peak", lambda seconds: 1e11)  # the peak only labels a run's speed
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    kernels.set_num_threads(before)


def outcome(verb: str, settings: dict[str, object], run: str, threads: int) -> dict[str, object]:
    """What a run left behind: hashes of weights and moments, and the losses it reported."""
    kernels.set_num_threads(threads)
    assert runs.main([verb, "--out", run, *(f"--{name}={value}" for name, value in settings.items())]) == 0
    lines = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    losses = [(line["loss"], line["grad_norm"]) for line in lines if "loss" in line and "grad_norm" in line]
    assert len(losses) == settings["training.steps"]
    return {"losses": losses} | (runs if verb == "train" else fine_runs).bits(run)


def differing(verb: str, settings: dict[str, object]) -> list[int]:
    """The numbers of threads whose outcome is not that of one."""
    alone = outcome(verb, settings, "run-1", 1)
    return [n for n in THREADS[1:] if outcome(verb, settings, f"run-{n}", n) != alone]


@pytest.mark.parametrize("checkpointing", ["false", "true"], ids=["kept", "recomputed"])
def test_a_training_run_has_the_same_bits_for_any_number_of_threads(folder, checkpointing):
    Path("text.txt").write_text(runs.TEXT)
    assert differing("train", PRETRAINED | {"training.activation_checkpointing": checkpointing}) == []


def test_activation_checkpointing_does_not_change_a_bit_of_a_run(folder):
    Path("text.txt").write_text(runs.TEXT)
    kept, again = (
        outcome("train", PRETRAINED | {"training.activation_checkpointing": how}, f"run-{how}", 2)
        for how in ("false", "true")
    )
    assert kept == again


def test_a_qlora_run_has_the_same_bits_for_any_number_of_threads(folder):
    fine_runs.make_base(Path("base"), **SHAPE)
    fine_runs.write_rows(Path("chats.jsonl"))
    assert differing("finetune", TUNED) == []


def test_the_comparison_notices_one_bit_of_one_weight(folder, monkeypatch):
    Path("text.txt").write_text(runs.TEXT)
    true = outcome("train", PRETRAINED, "true", 2)

    class Flipped(optim.AdamW):
        def step(self, **how):
            super().step(**how)
            if self.steps == PRETRAINED["training.steps"]:
                next(iter(self.parameters.values())).data.reshape(-1)[:1].view(np.uint32)[...] ^= 1

    monkeypatch.setattr(optim, "AdamW", Flipped)
    flipped = outcome("train", PRETRAINED, "flipped", 2)
    assert flipped["losses"] == true["losses"] and flipped[runs.OPTIMIZER] == true[runs.OPTIMIZER]
    assert flipped[runs.MODEL] != true[runs.MODEL]
