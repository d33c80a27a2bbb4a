"""memory_benchmarks: the arithmetic against arrays that are really held, the claims, and that a false one is found."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import tracemalloc

import numpy as np
import pytest
from held import most_held

from entrenar import kernels
from entrenar.adapters import LoraConfig, adapt, count
from entrenar.examples import memory_arithmetic, memory_measure
from entrenar.examples import memory_benchmarks as command
from entrenar.examples.memory_arithmetic import PARTS, PROGRAM, TARGETS, Case, arithmetic, nf4_bytes
from entrenar.examples.memory_measure import Measurement
from entrenar.examples.memory_picture import Bar, picture, table
from entrenar.llama import Llama, LlamaConfig
from entrenar.nn import unfilled
from entrenar.quant import bitsandbytes, blockwise, quantize
from entrenar.training import machine

SHAPE = LlamaConfig(vocab_size=1100, hidden_size=192, intermediate_size=448, num_hidden_layers=4,
                    num_attention_heads=6, num_key_value_heads=2)  # fmt: skip


# ---- counts, of shapes alone


@pytest.mark.parametrize("model, r, percent", [("124m", 16, 99.28), ("7b", 16, 99.75), ("7b", 64, 99.01)])
def test_adapters_train_so_many_percent_fewer_weights(model, r, percent):
    assert round(memory_arithmetic.reduction(Case(model, "qlora", 1, 256, r)), 2) == percent


def test_adapters_are_counted_as_a_model_counts_its_own():
    case = Case("124m", "lora", 2, 512, 16)
    with unfilled():
        model = Llama(case.shape)
    adapt(model, LoraConfig(r=16, target_modules=list(TARGETS)))
    counted = count(model)
    assert counted.trainable == memory_arithmetic.trained(case) == 1_179_648
    assert counted.total == case.shape.parameter_count() + 1_179_648
    assert counted.reduction == memory_arithmetic.reduction(case)


def test_weights_of_7b_take_at_least_85_percent_less_in_nf4():
    case = Case("7b", "qlora", 1, 256, 16)
    assert 85 <= memory_arithmetic.saved(case) < 87.5  # an eighth of the bytes, were there no scales and no embedding
    assert memory_arithmetic.weight_bytes(dataclasses.replace(case, method="lora")) == 4 * 6_738_415_616


@pytest.mark.parametrize("rows, columns", [(64, 64), (3, 5), (100, 200), (257, 64)])
def test_bytes_of_nf4_are_those_of_a_quantized_matrix(rows, columns):
    w = np.random.default_rng(0).standard_normal((rows, columns), np.float32)
    assert nf4_bytes(rows, columns) == quantize(w, "nf4").nbytes


def test_a_step_of_qlora_on_7b_stays_below_6_gb_by_arithmetic():
    peaks = [sum(command.by_arithmetic(case).values()) for case in command.LARGE]
    assert peaks[0] < peaks[1] < 6e9
    assert sum(command.by_arithmetic(command.TOO_LARGE[0]).values()) > 16 * 6_738_415_616  # full fine-tuning


def test_a_case_that_cannot_be_is_refused():
    for wrong in ({"model": "2b"}, {"method": "dora"}, {"r": 0}):
        with pytest.raises(ValueError, match="wanted a model of 124m, 1.1b, 7b"):
            Case(**{"model": "7b", "method": "lora", "batch": 1, "context": 8, "r": 4} | wrong)


# ---- arithmetic and arrays that are held


def traced(case: Case) -> int:
    """The most bytes that NumPy held at once in two steps."""

    def job() -> None:
        model, _ = memory_measure.prepared(case, case.shape)
        tracemalloc.reset_peak()
        for _ in itertools.islice(memory_measure.steps(case, case.shape, model), 2):
            pass

    return most_held(job)


def said(case: Case) -> int:
    """Of the arrays: tracemalloc sees no gaps between them."""
    parts = arithmetic(case, threads=kernels.get_num_threads())
    return sum(parts.values()) - parts[memory_arithmetic.GAPS]


@pytest.fixture
def small(monkeypatch):
    """124m is something small for once. Codes lie alone, not in a piece of which a part is free: tracemalloc sees not
    what is touched."""
    monkeypatch.setitem(memory_arithmetic.SHAPES, "124m", SHAPE)
    for module in (blockwise, bitsandbytes):
        monkeypatch.setattr(module, "lasting", np.empty)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("method, r", [("full", 0), ("lora", 8), ("qlora", 8), ("qlora", 64)])
def test_the_arithmetic_is_what_a_step_holds(native, small, method, r, checkpointing):
    case = Case("124m", method, 4, 128, r, checkpointing)
    assert said(case) == pytest.approx(traced(case), rel=0.02)


def test_the_comparison_finds_arithmetic_that_forgets_an_array(native, small, monkeypatch):
    case = Case("124m", "qlora", 4, 128, 8)
    kept = memory_arithmetic.kept
    monkeypatch.setattr(memory_arithmetic, "kept", lambda c: kept(c) - c.batch * c.context * c.shape.intermediate_size)
    assert abs(said(case) / traced(case) - 1) > 0.05


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_base_holds_the_bytes_that_were_counted(small, method):
    case = Case("124m", method, 1, 32, 8)
    _, bytes_ = memory_measure.prepared(case, case.shape)
    assert bytes_ == memory_arithmetic.weight_bytes(case)


def test_the_parts_are_all_of_it_and_the_program_is_as_measured():
    parts = arithmetic(Case("7b", "qlora", 1, 256, 64, True), threads=2, program=77)
    assert set(parts) == set(PARTS) and parts[PROGRAM] == 77
    assert all(bytes_ >= 0 for bytes_ in parts.values())


def test_generated_matrices_differ_and_repeat_no_row():
    drawn = np.random.default_rng(0).standard_normal(memory_measure.DRAWN, np.float32)
    first, second = (memory_measure.generated(i, (1500, 1000), drawn) for i in (1, 2))
    assert len(np.unique(first[:, 0])) == 1500 and not (first == second).any(axis=1).any()
    assert first.std() == pytest.approx(memory_measure.STD, rel=0.01) and first.base is not drawn


# ---- claims


def measurement(case: Case, **changes) -> Measurement:
    """As if a process had measured just what arithmetic says."""
    parts, base = command.by_arithmetic(case), case.shape.parameter_count()
    adapters = memory_arithmetic.trained(case) if case.r else 0
    found = Measurement(case, sum(parts.values()), parts, memory_arithmetic.weight_bytes(case),
                        memory_arithmetic.trained(case), base + adapters, [10.0], [3.0 if case.r else 4.5])  # fmt: skip
    return dataclasses.replace(found, **changes)


def failing(cases, case, **changes) -> list[str]:
    """What fails where the measurement of `case` is changed."""
    measured = [measurement(c, **(changes if c == case else {})) for c in cases]
    return [claim.what for claim in command.claims(measured) if not claim.holds]


EVERYTHING = command.SMALL + command.MIDDLE + command.LARGE
QLORA_7B, QLORA_7B_64 = command.LARGE


def test_all_claims_hold_where_arithmetic_is_right():
    assert failing(EVERYTHING, None) == []


@pytest.mark.parametrize("case, changes, broken", [
    (command.SMALL[2], {"trained": 1_500_000}, ["124m, r = 16: fewer weights trained by"]),
    (QLORA_7B, {"trained": 18_000_000}, ["7b, r = 16: fewer weights trained by"]),
    (QLORA_7B_64, {"trained": 16_000_000}, ["7b, r = 64: fewer weights trained by"]),
    (QLORA_7B, {"weights": 4 * 10**9 + 10**8},
     ["7b in NF4: memory of weights saved", f"{QLORA_7B.name}: bytes of weights"]),
    (QLORA_7B_64, {"peak": 6 * 10**9}, [f"{QLORA_7B_64.name}: peak", f"{QLORA_7B_64.name}: arithmetic of the peak"]),
    (command.SMALL[0], {"peak": 10**9}, [f"{command.SMALL[0].name}: arithmetic of the peak"]),
    (command.MIDDLE[2], {"weights": 1}, [f"{command.MIDDLE[2].name}: bytes of weights"]),
])  # fmt: skip
def test_a_claim_that_does_not_hold_is_found(case, changes, broken):
    assert failing(EVERYTHING, case, **changes) == broken


def test_a_peak_that_nobody_measured_is_no_proof():
    assert failing(command.SMALL, None) == [f"{case.name}: peak" for case in command.LARGE]
    assert all(claim.holds for claim in command.claims([measurement(c) for c in command.SMALL], quick=True))


# ---- the command


def test_a_false_claim_makes_the_exit_code_1(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "measure", measurement)
    assert command.main(["--quick", "--out", str(tmp_path)]) == 0
    assert "holds" in capsys.readouterr().out
    monkeypatch.setattr(command, "measure", lambda case: measurement(case, weights=1))
    assert command.main(["--quick", "--out", str(tmp_path)]) == 1
    assert "FAILS" in capsys.readouterr().out
    found = json.loads((tmp_path / "memory.json").read_text())
    assert len(found["measured"]) == 3 and not all(claim["holds"] for claim in found["claims"])
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_a_process_that_would_not_fit_is_not_started(monkeypatch):
    monkeypatch.setattr(machine, "memory_available", lambda: 10**9)
    assert command.measure(command.SMALL[0]) == "not measured: needs 2.8 GB, 1.0 GB are free"


def test_a_process_that_fails_is_told_of(monkeypatch):
    monkeypatch.setattr(command, "STEPS", {"124m": "none"})
    assert command.measure(command.SMALL[2]).startswith("not measured: the process ended with status 1")


def test_times_are_set_against_full_fine_tuning():
    lines = command.times([measurement(case) for case in command.SMALL])
    assert lines[0].endswith("4.50 s a step") and lines[2].endswith("3.00 s a step, 1.50 times as fast as full")


def test_the_first_step_counts_only_where_it_is_the_only_one():
    assert command.step_seconds(measurement(command.SMALL[0], seconds=[9.0, 1.0, 3.0])) == 2.0
    assert command.step_seconds(measurement(command.SMALL[0], seconds=[9.0])) == 9.0


def test_bars_tell_every_case_and_why_one_was_not_measured():
    from rich.console import Console

    bars = [Bar(case, command.by_arithmetic(case), 10**9 * i or None, "not measured: no room")
            for i, case in enumerate(EVERYTHING)]  # fmt: skip
    text = io.StringIO()
    Console(file=text, width=80).print(table(bars))
    assert all(case.title in text.getvalue() and case.detail in text.getvalue() for case in EVERYTHING)
    assert "not measured: no room" in text.getvalue() and "5.0 GB measured" in text.getvalue()
    assert picture(bars).startswith(b"\x89PNG")


# ---- real processes


@pytest.mark.tier3
def test_a_real_step_of_qlora_at_124m_takes_what_was_said(native, monkeypatch):
    monkeypatch.setitem(command.STEPS, "124m", 1)
    found = command.measure(command.SMALL[2])
    assert isinstance(found, Measurement)
    assert all(claim.holds for claim in command.claims([found], quick=True))
    assert found.peak < 10**9 and found.losses[0] == pytest.approx(np.log(32000), rel=0.05)
