"""The plan: rehearsed arrays against those of real steps, the heap, limits, advice; and the peak of real runs."""

from __future__ import annotations

import dataclasses
import json
import resource
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import SAME_PACKAGE
from held import BATCH, CONTEXT, Forgetful, most_held, two_steps
from hypothesis import given
from hypothesis import strategies as st

from entrenar import kernels, random
from entrenar.data import prepare
from entrenar.llama import Llama, LlamaConfig
from entrenar.training import machine, plan, pretrain_plan
from entrenar.training.config import read_config
from entrenar.training.display import size
from entrenar.training.heap import Heap
from entrenar.training.plan import render
from entrenar.training.pretrain_plan import make_plan
from entrenar.training.rehearsal import WEIGHTS, Rehearsal

CONFIGS = Path(__file__).parent.parent / "examples" / "llama2" / "configs"
TOLERANCE = 0.05  # of the measured peak


def config(name="tiny", **changes):
    """A shipped configuration, with changes by keyword, "__" for the dot."""
    return read_config(CONFIGS / f"{name}.toml", [(k.replace("__", "."), str(v)) for k, v in changes.items()])


# ---- the peak of real runs


def corpus(folder: Path, length: int) -> Path:
    """Text of so many bytes, about, in which a BPE finds 32,000 tokens, from 4 MB on."""
    rng = np.random.default_rng(1)
    letters = rng.choice(np.frombuffer(b"etaoinshrdlucmfwypvbgkjqxz", np.uint8), 9 * 30_000).tobytes()
    words = [letters[9 * i : 9 * i + n] for i, n in enumerate(rng.integers(3, 10, 30_000))]
    lines = (b" ".join(words[i] for i in row) + b".\n" for row in rng.integers(0, len(words), (length // 84, 12)))
    (folder / "words.txt").write_bytes(b"".join(lines))
    return folder / "words.txt"


def measured_run(folder: Path, name: str, text: Path, run: str, **changes) -> tuple[dict, int]:
    """A run of a shipped configuration on prepared text: its plan, as it wrote it down, and its peak."""
    settings = {
        "data.source": text, "data.held_out": 0.002, "data.cache": folder / "cache", "lr_schedule.warmup_steps": 0,
        "training.eval_every": 2, "training.eval_tokens": 2000, "training.sample_tokens": 8,
    } | {k.replace("__", "."): v for k, v in changes.items()}  # fmt: skip
    values = {k.partition(".")[2]: v for k, v in settings.items() if k.startswith("data.")}
    vocab_size = config(name).data.vocab_size
    prepare(str(text), vocab_size=vocab_size, held_out=values["held_out"], cache=str(values["cache"]))
    out = folder / run
    words = [f"--{key}={value}" for key, value in settings.items()]
    command = [sys.executable, Path(__file__).with_name("plan_measure.py"), folder / f"{run}.peak", "train"]
    command += ["--config", CONFIGS / f"{name}.toml", "--out", out, *words]
    done = subprocess.run(command, env=SAME_PACKAGE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with open(out / "metrics.jsonl", encoding="utf-8") as lines:
        start = json.loads(lines.readline())
    return start["plan"], int((folder / f"{run}.peak").read_text())


def off(said: dict, peak: int) -> float:
    """How far the plan is from the measured peak, as a share of it."""
    return said["peak"] / peak - 1


def test_a_real_run_of_tiny_takes_what_the_plan_said(tmp_path):
    said, peak = measured_run(tmp_path, "tiny", corpus(tmp_path, 300_000), "run", training__steps=2)
    assert abs(off(said, peak)) <= TOLERANCE, (said, peak)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A folder with a text that has 32,000 tokens."""
    folder = tmp_path_factory.mktemp("plan")
    return folder, corpus(folder, 4_000_000)


@pytest.mark.tier3
def test_real_runs_of_15m_take_what_the_plan_said_whatever_the_accumulation(large):
    folder, text = large
    runs = [measured_run(folder, "15m", text, f"15m-{n}", training__steps=2, training__accumulation=n) for n in (2, 4)]
    assert all(abs(off(*run)) <= TOLERANCE for run in runs), runs
    (_, two), (_, four) = runs
    assert four == pytest.approx(two, rel=0.01)  # why two are enough for the larger models below


@pytest.mark.tier3
@pytest.mark.parametrize("name", ["42m", "124m"])
def test_real_runs_of_larger_models_take_what_the_plan_said(large, name):
    said, peak = measured_run(*large[:1], name, large[1], name, training__steps=2, training__accumulation=2)
    assert abs(off(said, peak)) <= TOLERANCE, (said, peak)


# ---- the arrays of a step


SHAPES = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "grouped": {"num_key_value_heads": 2, "head_dim": 64},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "wide": {"intermediate_size": 1024, "num_hidden_layers": 2},
}


def shape_of(**changes) -> LlamaConfig:
    return LlamaConfig(**{"vocab_size": 900, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3,
                          "num_attention_heads": 4, "max_position_embeddings": 256, **changes})  # fmt: skip


def traced_peak(shape: LlamaConfig, *, micro_batches: int, checkpointing: bool) -> int:
    """The most bytes that NumPy held at once while a model was built, trained for two steps, and looked at."""
    return most_held(lambda: two_steps(Llama(shape, checkpointing=checkpointing), micro_batches))


class ForgetfulRehearsal(Forgetful, Rehearsal):
    pass


def rehearsed(shape: LlamaConfig, *, micro_batches: int, checkpointing: bool, kind=Rehearsal) -> int:
    rehearsal = kind(shape, batch=BATCH, context=CONTEXT, micro_batches=micro_batches, checkpointing=checkpointing,
                     threads=kernels.get_num_threads())  # fmt: skip
    rehearsal.draw = lambda: None
    return rehearsal.run().most


@pytest.mark.parametrize("checkpointing, micro_batches", [(False, 1), (True, 2)], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", SHAPES)
def test_the_rehearsal_holds_what_a_real_step_holds(native, name, micro_batches, checkpointing):
    shape = shape_of(**SHAPES[name])
    how = {"micro_batches": micro_batches, "checkpointing": checkpointing}
    assert rehearsed(shape, **how) == pytest.approx(traced_peak(shape, **how), rel=0.01)


def test_the_comparison_finds_a_rehearsal_that_forgets_an_array(native):
    how = {"micro_batches": 1, "checkpointing": False}
    true = traced_peak(shape_of(), **how)
    assert abs(rehearsed(shape_of(), **how, kind=ForgetfulRehearsal) / true - 1) > 0.03


def test_every_array_but_weights_moments_tables_and_scratch_is_dropped_in_the_end():
    for checkpointing in (False, True):
        rehearsal = Rehearsal(shape_of(), batch=2, context=32, micro_batches=2, checkpointing=checkpointing)
        rehearsal.run()
        lasting = {name for name, count in rehearsal.heap.living.items() if count}
        assert lasting <= {WEIGHTS, "AdamW's two moments", "rotary tables", "kernels' scratch"}


def test_micro_batches_after_the_third_change_nothing():
    peaks = {Rehearsal(shape_of(), batch=2, context=32, micro_batches=n).run().peak for n in (3, 4, 100)}
    assert len(peaks) == 1


def test_layers_beyond_those_that_are_rehearsed_count_as_if_they_were(monkeypatch):
    monkeypatch.setattr(Rehearsal, "draw", lambda self: None)  # beside so few layers the picture would count
    c, shape = config(), shape_of(num_hidden_layers=60)
    for checkpointing in (False, True):
        c.training.activation_checkpointing = checkpointing
        whole = pretrain_plan.predicted(c, shape)
        with monkeypatch.context() as patch:
            patch.setattr(plan, "MOST_LAYERS", 20)
            told = pretrain_plan.predicted(c, shape)
        assert told.bytes == pytest.approx(whole.bytes, rel=0.01)
        assert told.parts[WEIGHTS] == pytest.approx(whole.parts[WEIGHTS], rel=1e-6)


# ---- the heap


@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 20)), max_size=80))
def test_arrays_in_the_heap_never_overlap_and_gaps_are_all_the_rest(events):
    heap, living = Heap(own_mapping=16_000), []
    for floats, which in events:
        if living and which > 8:
            heap.drop(living.pop(which % len(living)))
        else:
            living.append(heap.take("x", floats))
        parts = sorted([(a.start, a.size) for a in living if a.start >= 0] + [(s, n) for n, s in heap.gaps])
        assert all(a + size == b for (a, size), (b, _) in pairwise(parts))  # side by side, nothing between
        assert not parts or (parts[0][0] == 0 and sum(parts[-1]) == heap.top)
        assert heap.living["x"] == sum(a.size for a in living) <= heap.peak
    heap.drop(*living)
    assert heap.at_peak["x"] <= heap.peak and heap.at_peak["x"] <= heap.most and heap.now == heap.mapped == 0


def test_the_heap_takes_the_smallest_gap_that_holds_an_array():
    heap = Heap()
    arrays = [heap.take("x", floats) for floats in (1000, 8, 300, 8, 200, 8)]
    heap.drop(arrays[0], arrays[2], arrays[4])
    assert heap.take("x", 200).start == arrays[4].start
    assert heap.take("x", 250).start == arrays[2].start
    assert heap.take("x", 900).start == arrays[0].start
    assert heap.take("x", 900).start >= arrays[5].start + arrays[5].size


def test_arrays_with_a_mapping_of_their_own_go_back_and_leave_no_gap():
    heap = Heap(own_mapping=4096)
    first = heap.take("x", 5000)
    heap.drop(first)
    heap.take("x", 6000)
    assert first.start == -1 and heap.top == 0 and heap.peak == heap.most == heap.now


def test_what_is_there_for_a_moment_lies_beside_what_lives_not_beside_the_gaps():
    heap = Heap()
    first, second = heap.take("x", 10_000), heap.take("x", 1000)
    heap.drop(first)
    before = heap.peak
    heap.add_alone("picture", before - second.size)
    assert heap.peak == before and not heap.at_peak["picture"]
    heap.add_alone("picture", before)
    assert heap.peak == heap.most == before + second.size
    assert heap.at_peak == {"picture": before, "x": second.size}


# ---- the plan


def test_the_buffers_add_up_to_the_fullest_moment():
    for name in ("tiny", "15m", "124m", "7b"):
        p = make_plan(config(name))
        assert sum(buffer.bytes for buffer in p.buffers) == p.training <= p.peak
        assert all(buffer.bytes >= 0 for buffer in p.buffers)
        assert p.summary()["buffers"] == [[buffer.name, buffer.bytes] for buffer in p.buffers]
        assert json.loads(json.dumps(p.summary()))["peak"] == p.peak == max(p.training, p.preparing)


def test_weights_gradients_and_moments_are_sixteen_bytes_for_each_parameter():
    p = make_plan(config("124m"))
    sizes = {buffer.name: buffer.bytes for buffer in p.buffers}
    fixed = sizes["weights"] + sizes["gradients"] + sizes["AdamW's two moments"]
    assert fixed == pytest.approx(16 * p.parameters, rel=1e-4)
    assert p.parameters == 137_841_408


def test_planning_leaves_no_trace(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    random.seed(3)
    before = random.get_state()
    make_plan(config())
    assert random.get_state() == before
    assert not list(tmp_path.iterdir())


@pytest.fixture
def tight(monkeypatch):
    """Makes a plan where this process may hold no more than 300 MB beside what it holds."""

    def make(**changes):
        limit = pretrain_plan.measured_program() + 300 * 10**6
        monkeypatch.setattr(machine, "memory_limit", lambda: limit)
        return make_plan(config(**{"training__batch_size": 128} | changes))

    return make


def test_a_plan_that_does_not_fit_is_refused_with_numbers_and_ways_out(tight):
    p = tight()
    message = p.refusal()
    assert not p.fits
    assert message.startswith("this run would need ")
    assert f"this machine or container has {size(p.limit)}; what would need less:" in message
    assert "training.batch_size = 32, training.accumulation = 4: " in message
    assert "training.activation_checkpointing = true" in message and ", fits" in message
    assert message.endswith("--force starts all the same")


def test_what_advice_promises_is_what_the_changed_configuration_needs(tight):
    advice = tight().advice
    assert len(advice) >= 3
    for line in advice:
        changes, _, promise = line.rpartition(": ")
        settings = dict(part.split(" = ") for part in changes.split(", "))
        changed = tight(**{name.replace(".", "__"): value for name, value in settings.items()})
        assert changed.fits and promise.endswith(" MB, fits")
        assert changed.needed / 1e6 == pytest.approx(float(promise.split()[0]), rel=0.03)  # measured again


def test_a_model_that_no_batch_makes_small_enough_is_told_so(monkeypatch):
    monkeypatch.setattr(machine, "memory_limit", lambda: 16 * 10**9)
    p = make_plan(config("7b"))
    assert not p.fits
    assert p.advice[-1] == "a smaller [model]: weights, gradients and moments of this one alone are 108 GB"


def test_the_shipped_configurations_fit_a_machine_of_4_GB_and_7b_does_not(monkeypatch):
    monkeypatch.setattr(machine, "memory_limit", lambda: 4 * 10**9)
    fits = {name: make_plan(config(name)).fits for name in ("tiny", "15m", "42m", "124m", "7b")}
    assert fits == {"tiny": True, "15m": True, "42m": True, "124m": True, "7b": False}


def test_a_run_that_fits_but_not_beside_others_is_warned_of(monkeypatch):
    def with_free(megabytes, name):
        free = pretrain_plan.measured_program() + megabytes * 10**6
        monkeypatch.setattr(machine, "memory_available", lambda: free)
        return make_plan(config(name)), size(free)

    p, free = with_free(350, "15m")
    assert p.fits and p.advice
    assert p.warning().startswith("this run will need ") and f"{free} are free now" in p.warning()
    p, free = with_free(150, "tiny")
    assert p.fits and p.warning().startswith("preparing the text may need ")
    p, free = with_free(350, "tiny")
    assert p.fits and not p.advice and p.warning() == ""


def test_pages_of_the_token_file_do_not_have_to_fit(tmp_path):
    data = prepare(str(corpus(tmp_path, 100_000)), tokenizer="bytes", cache=str(tmp_path / "cache"))
    c = config(data__tokenizer="bytes")
    p = make_plan(c, data=data)
    assert 0 < p.reclaimable <= data.train.nbytes + data.held_out.nbytes
    assert p.needed == p.training - p.reclaimable
    assert dataclasses.replace(p, limit=p.needed).fits and not dataclasses.replace(p, limit=p.needed - 1).fits
    few = make_plan(config(data__tokenizer="bytes", training__steps=1, lr_schedule__warmup_steps=0), data=data)
    assert few.reclaimable < p.reclaimable


def test_a_plan_is_shown_on_one_screen(monkeypatch):
    for name in ("tiny", "7b"):
        lines = render(make_plan(config(name)), peak_flops=1e11).splitlines()
        assert len(lines) <= 30 and max(map(len, lines)) <= 120
    text = "\n".join(lines)
    assert "32 layers x " in text and "does not fit the " in text and "parameters" in text
    assert "at half of the 100 GFLOP/s" in text


def test_an_absurd_configuration_is_planned_at_once(monkeypatch):
    monkeypatch.setattr(plan, "MOST_LAYERS", 16)
    start = time.process_time()
    p = make_plan(config(training__batch_size=2**40, model__num_hidden_layers=10**6, model__hidden_size=2**16))
    assert not p.fits and p.peak > 1 << 70
    assert time.process_time() - start < 2


@pytest.mark.tier3
def test_the_numpy_reference_takes_about_what_the_plan_said(tmp_path, monkeypatch):
    monkeypatch.setitem(SAME_PACKAGE, "ENTRENAR_KERNELS", "reference")
    said, peak = measured_run(tmp_path, "tiny", corpus(tmp_path, 300_000), "run", training__steps=2)
    assert abs(off(said, peak)) <= 2 * TOLERANCE, (said, peak)


# ---- the machine


def group(folder: Path, **files) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def test_memory_groups_of_v2_count_from_the_own_one_up(tmp_path):
    own = tmp_path / "own"
    own.write_text("0::/a/b\n")
    root = tmp_path / "cgroup"
    group(root / "a", memory__max=2 << 30, memory__current=1 << 30, memory__stat="anon 5\ninactive_file 1024")
    group(root / "a" / "b", memory__max="max", memory__current=7)
    group(root / "other", memory__max=1)
    found = machine.memory_groups(root, own)
    assert [(g.folder, g.limit, g.used) for g in found] == [(root / "a", 2 << 30, (1 << 30) - 1024)]
    group(root / "a" / "b", memory__max=1 << 20)
    assert min(g.limit for g in machine.memory_groups(root, own)) == 1 << 20


def test_memory_groups_of_v1_and_of_a_container_are_found(tmp_path):
    own = tmp_path / "own"
    own.write_text("4:memory:/docker/1234\n3:cpu:/docker/1234\n0::/\n")
    unlimited = 9223372036854771712
    root = tmp_path / "host"
    group(root / "memory" / "docker" / "1234", memory__limit_in_bytes=3 << 30, memory__usage_in_bytes=9,
          memory__stat="inactive_file 1\ntotal_inactive_file 4")  # fmt: skip
    group(root / "memory", memory__limit_in_bytes=unlimited, memory__usage_in_bytes=9)
    assert [(g.limit, g.used) for g in machine.memory_groups(root, own)] == [(3 << 30, 5)]

    inside = tmp_path / "container"  # its own group is mounted as the root, the path names the host's
    group(inside / "memory", memory__limit_in_bytes=1 << 30, memory__usage_in_bytes=9)
    assert [g.limit for g in machine.memory_groups(inside, own)] == [1 << 30]


def test_broken_group_files_limit_nothing(tmp_path):
    own = tmp_path / "own"
    own.write_text("0::/../x\nnonsense\n")
    group(tmp_path / "cgroup" / "x", memory__max="-5", memory__current="many")
    assert machine.memory_groups(tmp_path / "cgroup", own) == []
    assert machine.memory_groups(tmp_path / "nowhere", tmp_path / "nothing") == []


def test_limits_of_groups_and_of_address_space_bind(monkeypatch):
    assert machine.memory_limit() <= machine.physical_memory()
    tight = machine.MemoryGroup(Path("x"), 1 << 30, 900 << 20)
    with monkeypatch.context() as patch:
        patch.setattr(machine, "memory_groups", lambda: [tight])
        assert machine.memory_limit() == 1 << 30
        free = machine.memory_available()
        assert free <= (124 << 20) + machine.memory_used() + (1 << 20)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (2 << 30, 2 << 30))
    assert machine.memory_limit() <= 2 << 30


def test_the_memory_that_could_be_had_now_is_at_most_the_limit():
    assert 0 < machine.memory_available() <= machine.memory_limit()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status tells it on Linux alone")
def test_the_peak_of_a_process_is_not_that_of_the_one_that_started_it():
    ballast = np.ones(15_000_000)
    code = "from entrenar.training import machine; print(machine.memory_peak())"
    said = subprocess.run([sys.executable, "-c", code], env=SAME_PACKAGE, capture_output=True, text=True, check=True)
    assert int(said.stdout) < ballast.nbytes / 2
    assert machine.memory_peak() > ballast.nbytes
