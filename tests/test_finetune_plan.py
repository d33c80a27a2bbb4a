"""The plan of a fine-tuning run: rehearsed arrays against those of real steps; the peak of real runs; refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import SAME_PACKAGE
from fine_runs import finetune, make_base, words, write_rows
from held import BATCH, CONTEXT, Forgetful, most_held, two_steps

from entrenar import kernels
from entrenar.adapters import adapt
from entrenar.llama import Llama, LlamaConfig
from entrenar.training import machine
from entrenar.training.adapter import lora_config, trial
from entrenar.training.config import FineTuning, read_config
from entrenar.training.finetune_plan import make_plan
from entrenar.training.finetune_rehearsal import FineRehearsal, held_bytes
from entrenar.training.rehearsal import Rehearsal

TOLERANCE = 0.05  # of the measured peak
SHAPES = {
    "tiny": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4},
    "middle": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8},
}  # fmt: skip
LONG = [
    {"messages": [{"role": "user", "content": f"{i} " + "red green " * 20},
                  {"role": "assistant", "content": "cat nine " * (30 + i % 7)}]}
    for i in range(60)
]  # fmt: skip


def config(*changes: tuple[str, str]) -> FineTuning:
    return read_config(None, [("base.model", "base"), ("data.source", "x.jsonl"), *changes], FineTuning)


def measured_run(folder: Path, shape: str, **changes: object) -> tuple[dict, int]:
    """A run in a process of its own: its plan, as it wrote it down, and its peak."""
    make_base(folder / "base", max_position_embeddings=512, **SHAPES[shape])
    write_rows(folder / "long.jsonl", LONG)
    options = words(base__model=folder / "base", data__source=folder / "long.jsonl", data__max_length=256,
                    adapter__r=16, training__steps=3, training__batch_size=4, lr_schedule__warmup_steps=0,
                    training__eval_every=2,
                    checkpointing__every=0, **changes)  # fmt: skip
    measure = [sys.executable, Path(__file__).with_name("plan_measure.py"), folder / "peak"]
    command = [*measure, "finetune", "--out", folder / "run", *options]
    done = subprocess.run(command, env=SAME_PACKAGE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with open(folder / "run" / "metrics.jsonl", encoding="utf-8") as lines:
        return json.loads(lines.readline())["plan"], int((folder / "peak").read_text())


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ("tiny", {}),
        ("tiny", {"base__storage": "nf4"}),
        *(
            pytest.param("middle", changes, marks=pytest.mark.tier3)
            for changes in ({}, {"base__storage": "nf4"}, {"base__storage": "q8_0"}, {"adapter__kind": "dora"},
                            {"adapter__dropout": 0.1}, {"training__activation_checkpointing": "true"},
                            {"adapter__kind": "full"}, {"training__accumulation": 3})
        ),
    ],
    ids=str,
)  # fmt: skip
def test_a_real_run_takes_what_the_plan_said(tmp_path, shape, changes):
    said, peak = measured_run(tmp_path, shape, **changes)
    assert abs(said["peak"] / peak - 1) <= TOLERANCE, (said, peak)


# ---- the arrays of a step

SHAPE = LlamaConfig(vocab_size=900, hidden_size=128, intermediate_size=352, num_hidden_layers=3,
                    num_attention_heads=4, max_position_embeddings=256)  # fmt: skip


class ForgetfulRehearsal(Forgetful, FineRehearsal):
    pass


def traced_peak(c: FineTuning) -> int:
    """The most bytes that NumPy held at once while a model was adapted, trained for two steps, and looked at."""

    def job() -> None:
        model = Llama(SHAPE, checkpointing=c.training.activation_checkpointing)
        adapt(model, lora_config(c))
        two_steps(model)

    return most_held(job)


def rehearsed(c: FineTuning, kind: type[FineRehearsal] = FineRehearsal) -> int:
    tried = trial(c, SHAPE)
    shapes = Rehearsal(SHAPE, 1, 1).parameters()
    held = {name: held_bytes(shape, None, double_quant=True) for name, shape in shapes.items()}
    rehearsal = kind(SHAPE, batch=BATCH, context=CONTEXT, checkpointing=c.training.activation_checkpointing,
                     threads=kernels.get_num_threads(), low_rank=tried.low_rank, whole=tried.whole,
                     held=held)  # fmt: skip
    rehearsal.draw = lambda: None
    return rehearsal.run().most


CHANGES = {
    "all": (),
    "recomputed": (("training.activation_checkpointing", "true"),),
    "q and v": (("adapter.targets", "q_proj,v_proj"),),
    "upper layers": (("adapter.layers", "1,2"),),
    "dora": (("adapter.kind", "dora"),),
    "dropout": (("adapter.dropout", "0.1"),),
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_rehearsal_holds_what_a_real_step_holds(native, name):
    c = config(*CHANGES[name])
    assert rehearsed(c) == pytest.approx(traced_peak(c), rel=0.02)


def test_the_comparison_finds_a_rehearsal_that_forgets_an_array(native):
    assert abs(rehearsed(config(), ForgetfulRehearsal) / traced_peak(config()) - 1) > 0.04


@pytest.mark.parametrize("kind", [None, "bfloat16", "q8_0", "nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_what_is_held_of_a_frozen_weight_is_what_a_packed_has(kind, double_quant):
    from entrenar.quant import quantize

    w = np.ones((48, 100), np.float32)
    real = w.nbytes if kind is None else quantize(w, kind, double_quant=double_quant).nbytes
    assert held_bytes(w.shape, kind, double_quant=double_quant) == real


# ---- the plan


@pytest.fixture
def base(tmp_path, monkeypatch):
    make_base(tmp_path / "base", max_position_embeddings=512, **SHAPES["middle"])
    write_rows(tmp_path / "chats.jsonl", LONG)
    monkeypatch.chdir(tmp_path)
    return Llama.from_pretrained("base").config


def test_a_smaller_storage_and_fewer_targets_need_less(base):
    kinds = [make_plan(config(("base.storage", kind)), base).peak for kind in ("float32", "bfloat16", "q8_0", "nf4")]
    assert kinds == sorted(kinds, reverse=True) and kinds[0] - kinds[-1] > 60 * 10**6
    assert make_plan(config(("adapter.kind", "full")), base).peak > kinds[0] + 150 * 10**6


def test_adapters_have_gradients_and_moments_and_frozen_weights_have_none(base):
    sizes = {buffer.name: buffer.bytes for buffer in make_plan(config(), base).buffers}
    assert sizes["AdamW's two moments"] == pytest.approx(2 * sizes["adapters"], rel=0.01)
    assert sizes["gradients"] <= sizes["adapters"] * 1.01 < sizes["weights"] / 10


def test_what_does_not_fit_is_refused_with_ways_out(base, capsys, monkeypatch):
    need = make_plan(config(("training.batch_size", "16")), base).needed
    monkeypatch.setattr(machine, "memory_limit", lambda: int(0.93 * need))
    assert finetune("run", training__batch_size=16, data__max_length=512) == 2
    told = capsys.readouterr().err
    assert "would need" in told and "base.storage = nf4" in told and "fits" in told
    assert "activation_checkpointing" in told and not Path("run").exists()


def test_plan_and_help_of_a_fine_tuning_run_start_nothing(base, capsys):
    from entrenar.cli import main

    assert main(["plan", *words()]) == 0
    assert "adapters" in (told := capsys.readouterr().out) and "parameters, as stored" in told
    assert main(["finetune", "--plan", *words()]) == 0
    assert main(["finetune", "--help-options"]) == 0
    assert "--adapter.r " in capsys.readouterr().out and not Path("runs").exists()
