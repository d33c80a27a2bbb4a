"""The benchmarks' machinery: statistics, the protocol (with contenders made up here), refusals, tables."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "benchmarks" / "driver.py").exists():
    pytest.skip("benchmarks/ is not part of an installation", allow_module_level=True)
sys.path.append(str(ROOT))  # behind everything: an installed entrenar stays the one that is imported

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import report  # noqa: E402
from benchmarks.arrays import agree, fingerprint, normal  # noqa: E402
from benchmarks.driver import ISAS, Bench, Times, WrongResult, agreeing  # noqa: E402
from benchmarks.groups import (  # noqa: E402
    GROUPS,
    attention,
    bases,
    checkpointing,
    decode,
    default_run,
    finetune,
    gemm,
    generation,
    growth,
    llama_cpp,
    machine,
    ops,
    optimizer,
    packed,
    startup,
    step,
    threads,
    training,
    writing,
)
from benchmarks.protocol import Case, Server, Worker, WorkerError, peak_memory  # noqa: E402
from benchmarks.report import Report, Row, Target  # noqa: E402
from benchmarks.spread import Spread, geometric_mean, ratios  # noqa: E402

# Contenders whose case is a sleep; `wrong` and `nan` compute something else, `broken` raises, `dying` dies.
CONTENDERS = """
import os, sys, time
sys.path.append({root!r})
from benchmarks.protocol import Case, Server

def sleeper(seconds, check):
    return lambda scale=1.0: Case(lambda: time.sleep(seconds * scale), [check, 1.0])

def both(**args):
    return Case([lambda: time.sleep(0.002), lambda: time.sleep(0.008)], [5.0, 1.0])

def broken(**args):
    raise ValueError("no such matrix")

def dying(**args):
    print("out of memory", file=sys.stderr)
    os._exit(3)

class Group:
    CONTENDERS = dict(quick=sleeper(0.003, 5.0), slow=sleeper(0.006, 5.0), wrong=sleeper(0.003, 5.1),
                      nan=sleeper(0.003, float("nan")), broken=broken, dying=dying,
                      both=both, quick_and_slow=both)
    @staticmethod
    def twice(x):
        return 2 * x

Server(sys.argv[1], lambda group: Group).serve(sys.stdin, sys.stdout)
"""

MACHINE = {"cpu": "a CPU", "cores": 2, "threads": 2, "isa": "avx2", "backend": "native", "fma_peak": 1e11,
           "bandwidth": 2e10, "reading": 1e10, "python": "3.11", "peers": "numpy 2", "busy": 0.0}  # fmt: skip


@pytest.fixture
def bench(tmp_path):
    script = tmp_path / "contender.py"
    script.write_text(CONTENDERS.format(root=str(ROOT)))

    class Fake(Bench):
        def start(self, contender):
            return Worker([sys.executable, str(script), contender])

    bench = Fake(rounds=3, say=lambda line: None)
    yield bench
    bench.close()


# -- statistics


def test_a_ratio_is_the_peers_time_over_ours_round_by_round():
    assert ratios([1.0, 2.0, 4.0], [2.0, 2.0, 12.0]) == Spread(2.0, 1.0, 3.0)
    with pytest.raises(ValueError, match="zip"):
        ratios([1.0], [1.0, 2.0])


def test_geometric_mean_of_twice_and_half_is_one():
    assert math.isclose(geometric_mean([2.0, 0.5]), 1.0)
    with pytest.raises(ValueError, match="no values"):
        geometric_mean([])


def test_the_better_peer_is_chosen_by_its_median():
    times = Times({"entrenar": [1.0, 1.0, 1.0], "numpy": [0.1, 3.0, 3.0], "torch": [2.0, 2.0, 2.0]})
    assert times.best_peer() == "torch"
    assert times.speedup(over="torch").median == 2.0


def test_a_target_is_met_on_its_own_side_only():
    assert Target(">=", 0.9).met(0.9) and not Target(">=", 0.9).met(0.899)
    assert Target("<=", 0.6).met(0.6) and not Target("<", 0.6).met(0.6)
    assert Target(">", 1.0).met(1.001) and not Target(">", 1.0).met(1.0)


# -- comparing results


@pytest.mark.parametrize("change", ["one element", "all, a little", "sign", "order", "nan", "all zero"])
def test_fingerprints_tell_wrong_arrays_from_right_ones(change):
    right, wrong = normal(0, 40, 50), normal(0, 40, 50)
    if change == "one element":
        wrong[17, 3] += 1
    elif change == "all, a little":
        wrong *= np.float32(1.001)
    elif change == "sign":
        wrong = -wrong
    elif change == "order":
        wrong = wrong[::-1]
    elif change == "nan":
        wrong[0, 0] = np.nan
    else:
        wrong[:] = 0
    assert not agree(fingerprint(right), fingerprint(wrong), tolerance=1e-4)


def test_fingerprints_forgive_rounding_and_layout():
    a = normal(0, 40, 50)
    nearly = (a.astype(np.float64) * (1 + 1e-7 * np.arange(50))).astype(np.float32)
    assert agree(fingerprint(a, a), fingerprint(np.asfortranarray(a), nearly), tolerance=1e-4)
    assert not agree(fingerprint(a), fingerprint(a, a), tolerance=1e-4)


# -- contenders in processes of their own


@pytest.mark.tier3
def test_contenders_take_turns_and_the_slower_one_is_found(bench):
    times = bench.race("group", ["quick", "slow"], seconds=0.01)
    assert [len(times.seconds[name]) for name in ("quick", "slow")] == [3, 3]
    assert times.speedup(of="quick", over="slow").median > 1.2


def test_several_runs_of_a_case_are_timed_each_by_itself(bench):
    one, two = bench.races("group", ["both", "quick_and_slow"], seconds=0.001, rounds=2)
    for times in (one, two):
        assert [len(seconds) for seconds in times.seconds.values()] == [2, 2]
    assert one.of("both").median < two.of("both").median
    with pytest.raises(ValueError, match="too many"):
        bench.race("group", ["both"], seconds=0.001)


@pytest.mark.parametrize("contender", ["wrong", "nan"])
def test_a_contender_that_computes_something_else_is_refused_before_timing(bench, contender):
    with pytest.raises(WrongResult, match=f"quick computed .*, {contender} "):
        bench.race("group", ["quick", contender])


def test_a_contender_with_nothing_to_check_takes_part_and_one_with_something_wrong_does_not():
    assert agreeing([1.0, 2.0], []) and agreeing([1.0, 2.0], [1.0, 2.0])
    assert not agreeing([1.0, 2.0], [1.0, 2.1]) and not agreeing([], [1.0, 2.0])


def test_each_contender_may_be_compared_in_its_own_way(bench):
    forgiving = {"wrong": lambda a, b: True}
    assert list(bench.race("group", ["quick", "wrong"], seconds=0.001, agree=forgiving).seconds) == ["quick", "wrong"]
    with pytest.raises(WrongResult, match="nan"):
        bench.race("group", ["quick", "wrong", "nan"], agree=forgiving)


def test_a_step_with_a_wrong_loss_is_refused(bench):
    assert step.same_losses([10.3735, 9.9], [10.37355, 9.9])
    assert not step.same_losses([10.3735, 9.9], [10.3735, 9.9002])
    assert not step.same_losses([10.0], [10.0, 9.0])
    with pytest.raises(WrongResult):
        bench.race("group", ["quick", "wrong"], agree=step.same_losses)


def test_a_contender_that_raises_says_why_and_goes_on(bench):
    worker = bench.worker("broken")
    with pytest.raises(WorkerError, match="ValueError: no such matrix"):
        worker.prepare("group")
    with pytest.raises(WorkerError, match="nothing is prepared"):
        worker.time(0.0)
    assert worker.call("group", "twice", x=21) == 42
    assert worker.peak() > 1 << 20


def test_a_contender_that_dies_leaves_its_last_words_and_is_started_again(bench):
    with pytest.raises(WorkerError, match=r"ended \(status 3\): out of memory"):
        bench.worker("dying").prepare("group")
    assert bench.worker("dying").call("group", "twice", x=1) == 2


def test_a_peer_that_is_not_installed_is_left_out(tmp_path):
    bench = Bench(peers_python=str(tmp_path / "python"))
    assert bench.present(("entrenar", "numpy", "torch")) == ["entrenar", "numpy"]
    assert bench.present(("entrenar-nf4", "torch-bfloat16", "llama-bf16")) == ["entrenar-nf4"]
    assert bench.llama_missing == bench.missing("torch-compile") == bench.torch_missing
    assert bench.python("llama-bf16") == bench.peers_python
    assert bench.python("torch-bfloat16") == bench.peers_python and bench.python("entrenar-nf4") == sys.executable
    assert "peer not installed" in bench.torch_missing


def test_peak_memory_sees_a_large_array():
    before = peak_memory()
    np.ones(50 << 20, np.uint8)
    assert peak_memory() >= before


# -- the run


def group_of(*rows):
    class Group:
        @staticmethod
        def rows(bench):
            for row in rows:
                if isinstance(row, BaseException):
                    raise row
                yield row

    return Group


@pytest.fixture
def no_machine(monkeypatch):
    monkeypatch.setattr(command.machine, "facts", lambda bench: dict(MACHINE))
    monkeypatch.setattr(command.machine, "look_again", lambda bench: None)


def row(group="gemm", name="a product", median=0.95, **more):
    return Row(group, name, "x", Spread(median, 0.9, 1.0), **more)


def test_ctrl_c_keeps_what_was_measured(monkeypatch, no_machine):
    monkeypatch.setitem(GROUPS, "gemm", group_of(row(), KeyboardInterrupt()))
    monkeypatch.setitem(GROUPS, "step", group_of(row("step")))
    result, fine = command.run(Bench(say=print), ["gemm", "step"], say=lambda line: None)
    assert [r.group for r in result.rows] == ["gemm"] and not fine


def test_a_refused_result_makes_the_run_fail_and_stands_in_the_table(monkeypatch, no_machine):
    monkeypatch.setitem(GROUPS, "gemm", group_of(row(), WrongResult("entrenar computed [1], numpy [2]")))
    monkeypatch.setitem(GROUPS, "step", group_of(row("step")))
    result, fine = command.run(Bench(say=lambda line: None), ["gemm", "step"], say=lambda line: None)
    assert not fine and [r.failed for r in result.rows] == [False, True, False]
    assert "not measured: entrenar computed [1], numpy [2]" in result.markdown()


def test_groups_are_chosen_by_name_and_slow_ones_only_when_asked_for():
    def names(*arguments):
        return command.chosen(command.parser().parse_args(arguments))

    assert names() == [name for name in GROUPS if name not in ("install", "default_run")]
    assert names("--only", "step,gemm") == ["gemm", "step"]
    assert names("--full", "--default-run") == list(GROUPS)
    assert names("--only", "default-run") == ["default_run"]
    with pytest.raises(SystemExit, match="unknown group speed: wanted some of gemm"):
        names("--only", "speed")


# -- the report


def test_rows_survive_json_and_a_partial_run_keeps_the_other_groups(tmp_path):
    first = Report(MACHINE, "2026-11-20T10:00:00", 5)
    first.add(row("step", "a step", target=Target(">=", 1.2)))
    first.add(row("gemm", "an old product"))
    first.write_latest(tmp_path, ["gemm", "step"])
    second = Report(MACHINE, "2026-11-21T10:00:00", 5)
    second.add(row("gemm", "a new product"))
    second.write_latest(tmp_path, ["gemm", "step"])
    merged = Report.read(tmp_path / "latest.json")
    assert [(r.name, r.date[:10]) for r in merged.rows] == [
        ("a new product", "2026-11-21"),
        ("a step", "2026-11-20"),
    ]
    assert merged.rows[1].met is False
    assert "measured 2026-11-20" in merged.markdown()
    third = Report(MACHINE | {"cpu": "another"}, "2026-11-22T10:00:00", 5, [row("gemm")])
    third.write_latest(tmp_path, ["gemm", "step"])
    assert len(third.rows) == 1, "rows of another machine must not be mixed in"


def test_a_trial_is_not_written_down_and_an_unusual_run_only_into_the_history(tmp_path, monkeypatch):
    docs = tmp_path / "benchmarks.md"
    marked = [f"{begin}\nold{isa}\n{end}\n" for isa in ("", "avx2") for begin, end in [report.markers(isa)]]
    docs.write_text("".join(marked))
    monkeypatch.delenv("ENTRENAR_ISA", raising=False)

    def written(*arguments):
        result = Report(MACHINE, "2026-11-20T10:00:00", 5)
        result.add(row())
        where = ["--results", str(tmp_path), "--docs", str(docs)]
        return [
            path.name for path in command.record(result, command.parser().parse_args([*arguments, *where]))
        ]

    assert written("--rounds", "1") == []
    assert written("--threads", "7") == ["2026-11-20T100000.json"]
    assert docs.read_text() == "".join(marked)
    names = ["2026-11-20T100000-avx2.json", "latest-avx2.json", "benchmarks.md"]
    assert written("--isa", "avx2") == names
    assert "old\n" in docs.read_text() and "oldavx2" not in docs.read_text()
    assert written() == ["2026-11-20T100000.json", "latest.json", "benchmarks.md"]
    assert docs.read_text().count("a product") == 2 and "old" not in docs.read_text()
    monkeypatch.setenv("ENTRENAR_ISA", "avx2")
    assert written() == ["2026-11-20T100000.json"], "entrenar alone held back is no comparison"
    assert json.loads((tmp_path / "latest.json").read_text())["rows"][0]["measured"]["median"] == 0.95


def test_the_table_says_target_measured_and_whether_it_is_met():
    rows = [row(target=Target(">=", 0.9)), row(median=0.5, target=Target(">=", 0.9)), row(name="x | y")]
    result = Report(MACHINE, "2026-11-20T10:00:00", 5)
    for each in rows:
        result.add(each)
    lines = result.markdown().splitlines()
    assert "| a product | >= 0.9x | 0.950x (0.900-1.00) | yes |  |  |" in lines
    assert "| a product | >= 0.9x | 0.500x (0.900-1.00) | **no** |  |  |" in lines
    assert r"| x \| y |  | 0.950x (0.900-1.00) |  |  |  |" in lines


def test_a_machine_that_is_not_quiet_is_said_to_be_so():
    assert "QUIET" not in Report(MACHINE, "2026-11-20T10:00:00", 5).markdown()
    assert (
        "others took up to 50% of the" in Report(MACHINE | {"busy": 0.5}, "2026-11-20T10:00:00", 5).markdown()
    )
    assert 0 <= machine.busy(0.02) <= 1


def test_large_inputs_repeat_no_row():
    large = normal(3, 1500, 1000)
    assert len(np.unique(large[:, 0])) == 1500 and large.dtype == np.float32 and abs(large.std() - 1) < 0.01


def test_only_the_text_between_the_markers_is_replaced():
    (begin, end), (begin2, end2) = report.markers(), report.markers("avx2")
    other = f"{begin2}\nheld\n{end2}\n"
    text = f"before\n{begin}\nold\n{end}\nafter\n{other}"
    assert report.between(text, "new", "x.md") == f"before\n{begin}\nnew\n{end}\nafter\n{other}"
    assert report.between(text, "new", "x.md", "avx2") == text.replace("held", "new")
    with pytest.raises(ValueError, match="x.md: wanted the markers"):
        report.between("no markers", "new", "x.md")


def test_the_documentation_has_the_markers():
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    for isa in ISAS:
        report.between(text, "", "docs/benchmarks.md", isa)


@pytest.mark.parametrize("value, unit, text", [
    (0.18312, "s", "0.183 s"), (1.234, "x", "1.23x"), (142.3, "GFLOP/s", "142 GFLOP/s"),
    (12.0, "ms", "12.0 ms"), (0.0, "s", "0 s"), (100.4, "", "100"), (99.96, "ms", "100 ms"),
])  # fmt: skip
def test_numbers_have_three_digits_and_a_unit(value, unit, text):
    assert report.number(value, unit) == text


# -- the cases


def test_gemm_covers_three_models_and_all_forms():
    products = [p for suite in gemm.suites(gemm.TOKENS) for p in suite]
    assert {p.model for p in products} == {"15m", "124m", "1b"} and {p.form for p in products} == set(gemm.FORMS)
    assert min(p.tokens for p in products) == 64 and max(p.tokens for p in products) == 4096
    assert {p.layer for p in products if p.model == "1b" and p.tokens == 4096} == {"q_proj"}
    assert len(set(products)) == len(products)
    for form in gemm.FORMS:
        a, b = gemm.operands(form, 5, 3, 4)
        assert {a.shape[0], a.shape[1], b.shape[1]} == {3, 4, 5} and a.shape[1] == b.shape[0]


def product(tokens=64, sides=512):
    return gemm.Product("124m", "q_proj", "x W^T", tokens, sides, sides)


def test_a_shape_under_the_floor_is_measured_again_and_that_counts(monkeypatch, bench):
    bench.machine = dict(MACHINE)
    results = {product(64): Times({"entrenar": [1.0], "numpy": [0.5]}),
               product(65): Times({"entrenar": [1.0], "numpy": [1.2]})}  # fmt: skip
    asked = []

    def again(ratio):
        def measured(bench, suites, rounds):
            asked.extend(suites)
            assert rounds == gemm.AGAIN * bench.rounds
            return {product(64): Times({"entrenar": [1.0], "numpy": [ratio]})}

        return measured

    monkeypatch.setattr(gemm, "measured", again(1.1))
    noisy = gemm.slowest(bench, "slowest", results)
    assert noisy.met and noisy.measured.median == 1.1 and asked == [[product(64)]]
    assert noisy.note.endswith("1 under 0.93x were measured again, 9 rounds each: 0 still are")
    monkeypatch.setattr(gemm, "measured", again(0.8))
    slow = gemm.slowest(bench, "slowest", results)
    assert not slow.met and slow.measured.median == 0.8 and slow.note.endswith("1 still are")


def test_near_the_peak_are_only_products_large_in_every_direction(bench):
    bench.machine = dict(MACHINE)
    second = {"entrenar": [1e-2], "numpy": [1.0]}
    results = {product(64): Times(second), product(512): Times(second), product(1024): Times(second)}
    median, lowest = gemm.near_the_peak(bench, results)
    assert lowest.measured.median == pytest.approx(100 * 2 * 512**3 / 1e-2 / MACHINE["fma_peak"])
    assert median.measured.median == pytest.approx(1.5 * lowest.measured.median) and not lowest.met


def test_every_case_of_gemm_agrees_with_numpy():
    products = [vars(p) for form in gemm.FORMS for p in [gemm.Product("15m", "q_proj", form, 7, 12, 20)]]
    ours, theirs = gemm.with_entrenar(products), gemm.with_numpy(products)
    assert step_like(ours.check, theirs.check) and len(ours.runs) == 3
    assert [run().shape for run in theirs.runs] == [(7, 20), (7, 12), (20, 12)]


@pytest.mark.parametrize("name", ops.OPERATIONS)
def test_every_operation_has_an_amount(name):
    for from_memory in (False, True):
        operation = ops.chosen(name, from_memory)
        assert bool(operation.floats) != bool(operation.flops)
    assert operation.rate(2.0) == (operation.flops or 4 * operation.floats) / 2.0


def test_arrays_from_memory_are_larger_than_those_of_a_model():
    def size(operation):
        return sum(math.prod(shape) for shape in operation.shapes)

    for name, measured in ops.OPERATIONS.items():
        if measured.from_memory:
            assert size(ops.chosen(name, True)) * 4 > 32 << 20 and size(measured.from_memory) > size(measured.usual)


def test_attention_has_fewer_heads_where_it_would_take_minutes_and_the_same_groups():
    assert attention.shape(256, 12, 12, 64) == attention.Shape(4, 256, 12, 12, 64)
    long = attention.shape(4096, 32, 4, 64)
    assert long == attention.Shape(1, 4096, 8, 1, 64) and attention.shape(2048, 32, 4, 64).H == 32
    assert attention.Shape(2, 3, 4, 4, 5).flops == 7 * 2 * 4 * 9 * 5


def test_memory_of_attention_grows_with_the_arrays_it_is_given():
    sizes = attention.Shape(1, 32, 4, 2, 16)
    case = attention.with_entrenar(**vars(sizes))
    assert len(case.check) == 2 * 4  # y, dq, dk, dv
    grown = attention.growth_of_memory(512)
    assert grown < 1 << 28 and isinstance(grown, int)


def test_the_optimizer_is_measured_on_all_parameters_of_a_model():
    from entrenar.llama import LlamaConfig

    for model in optimizer.TARGETS:
        assert optimizer.count(model) == LlamaConfig(**step.MODELS[model]).parameter_count()
    assert optimizer.bytes_moved("15m") == 4 * 8 * optimizer.count("15m")


def test_a_share_of_the_bandwidth_is_taken_round_by_round():
    times = Times({"entrenar": [1.0, 2.0, 1.0], "copy": [1.0, 1.0, 4.0]})
    assert machine.shares(times, machine.COPIED / 2) == Spread(50.0, 25.0, 200.0)


def test_an_optimizer_step_moves_the_parameters_and_drops_the_gradients(monkeypatch):
    monkeypatch.setattr(optimizer, "parameter_shapes", lambda model: [(8, 4), (4,)])
    case = optimizer.with_entrenar("15m")
    before = optimizer.fingerprint(*(p for p, _ in optimizer.parameters_and_gradients("15m")))
    assert not step_like(case.check, before)
    case.run()


def test_a_curve_is_as_flat_as_its_lowest_point_is_near_its_highest():
    row = growth.flatness("a step", "share of FMA peak", {"64 tokens": 60.0, "512": 80.0, "4096": 72.0}, None)
    assert row.measured.median == 0.75 and row.note.startswith("64 tokens 60, 512 80, 4096 72")
    assert row.details["table"][2] == ["512", "80", "#" * 40] and row.details["curve"]["4096"] == 72.0
    # Where only what falls counts, a start that is slow is no fault.
    assert growth.flatness("data", "MB/s", {"1": 2.0, "4": 3.0}, None, falls=True).measured.median == 1.0
    assert growth.flatness("data", "MB/s", {"1": 4.0, "4": 5.0, "16": 3.0}, None, falls=True).measured.median == 0.75


def test_sizes_grow_from_two_million_parameters_to_more_than_a_billion():
    from entrenar.llama import LlamaConfig

    counts = [LlamaConfig(**shape).parameter_count() for shape in growth.SIZES.values()]
    whole = growth.SIZES["1.1b, 4 of its 22 layers"] | {"num_hidden_layers": 22}
    assert 1.5e6 < counts[0] < 2.5e6 and 3.2e8 < counts[3] < 3.7e8
    assert LlamaConfig(**whole).parameter_count() == 1_100_048_384


def test_curves_are_measured_from_the_small_end_on(monkeypatch):
    tiny = growth.SIZES["2m"] | {"vocab_size": 64, "num_hidden_layers": 1}
    monkeypatch.setitem(step.MODELS, "15m", tiny)
    monkeypatch.setitem(growth.TOKENS, "15m", (16, 512))
    monkeypatch.setattr(growth, "SIZES", {"tiny": tiny})
    monkeypatch.setattr(growth, "SECONDS", 0.0)
    small, large = growth.by_tokens("15m")
    assert (small["tokens"], large["tokens"]) == (16, 512) and small["forward and backward"] < small["step"]
    assert large["flops"] > 32 * small["flops"]
    (point,) = growth.by_size()
    assert point["model"] == "tiny" and point["seconds"] > 0


def test_a_busy_neighbour_is_gone_afterwards():
    with threads.busy_neighbour() as process:
        assert process.poll() is None
    assert process.poll() is not None


def test_the_first_loss_is_found_in_the_plain_report_and_nowhere_else():
    assert startup.LOSS.search("step=1/1200 loss=7.6123 bits_per_byte=3.1")
    assert not startup.LOSS.search("step=0 held_out_loss=7.6")


def test_the_outcome_of_a_run_is_read_from_its_metrics():
    events = [{"event": "step", "step": 1, "seconds": 0.5},
              {"event": "held_out", "bits_per_byte": 3.0, "whole": False},
              {"event": "step", "step": 2, "seconds": 1.0},
              {"event": "held_out", "bits_per_byte": 1.6, "whole": True}]  # fmt: skip
    assert default_run.outcome("\n".join(map(json.dumps, events))) == (1.0, 1.6, 2)


# -- packed layers, fine-tuning, decoding


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base and an adapter of the tiny model, as contenders are given them."""
    folder = tmp_path_factory.mktemp("base")
    paths = {"base": str(folder / "base"), "adapter": str(folder / "adapter")}
    bases.write("tiny", kind="nf4", **paths)
    return paths


@pytest.mark.parametrize("rows", [64, 1])
def test_packed_layers_agree_with_the_floats_they_stand_for(rows, monkeypatch):
    monkeypatch.setattr(packed, "BEYOND_CACHES", 1 << 20)
    shape = {"outputs": 128, "inputs": 192, "rows": rows}
    kinds = (packed.NF4, packed.FLOAT32) if rows > 1 else (packed.NF4, packed.BFLOAT16)
    first, second = (packed.CONTENDERS[kind](**shape) for kind in kinds)
    assert (packed.roughly if rows == 1 else step_like)(first.check, second.check)
    assert not packed.roughly(first.check, [2 * x for x in second.check])
    first.run()


def step_like(a, b):
    return agree(a, b, tolerance=1e-4)


def test_copies_of_a_matrix_are_more_than_a_cache_and_lie_apart():
    from entrenar.quant import quantize

    weight = quantize(normal(0, 64, 64), "nf4")
    assert packed.how_many(weight.nbytes) * weight.nbytes >= packed.BEYOND_CACHES
    other = packed.another(weight)
    assert not np.shares_memory(weight.codes, other.codes) and (weight.codes == other.codes).all()


def test_methods_of_fine_tuning_start_from_the_same_loss(folders):
    case = {"model": "tiny", "batch": 2, "context": 16, **folders}
    full, lora, qlora = (finetune.CONTENDERS[name](**case).check for name in
                         (finetune.FULL, finetune.LORA_FLOAT32, finetune.QLORA))  # fmt: skip
    assert finetune.AGREE[finetune.QLORA](lora, qlora) and finetune.AGREE[finetune.FULL](lora, full)
    assert not finetune.AGREE[finetune.QLORA](lora, full)  # after one step they are different models


def test_losses_that_differ_are_refused_whatever_the_peer_computes_in():
    assert finetune.AGREE[finetune.PEFT]([10.0, 9.0, 8.0], [10.0001, 9.0, 8.0])
    assert not finetune.AGREE[finetune.PEFT]([10.0, 9.0, 8.0], [10.0, 9.001, 8.0])
    assert finetune.AGREE[finetune.PEFT_BFLOAT16]([10.0], [10.02])
    assert not finetune.AGREE[finetune.PEFT_BFLOAT16]([10.0, 9.0], [10.0, 9.1])


def measured_steps(bench, seconds):
    """Of the 124m model, 1,024 tokens a step; memory in whole MB, in the order of the contenders."""
    peaks = {name: (i + 1) << 20 for i, name in enumerate(seconds)}
    return finetune.Measured(bench, finetune.SHAPES[0], Times(seconds), peaks, flops=0)


def test_the_faster_peer_counts_and_the_slower_is_told(bench):
    seconds = {finetune.QLORA: [1.024], finetune.PEFT_FLOAT32: [4.096], finetune.PEFT_BFLOAT16: [2.048]}
    peers = (finetune.PEFT_FLOAT32, finetune.PEFT_BFLOAT16)
    how = ("QLoRA", finetune.QLORA, peers, Target(">=", 1.5), Target("<=", 0.3))
    speed, memory = finetune.against_peft(measured_steps(bench, seconds), *how)
    assert speed.measured.median == 2.0 and speed.met
    assert speed.note == "1000 tokens/s to 500 of PEFT, computing in bfloat16, 250 of PEFT, computing in float32"
    assert memory.measured.median == pytest.approx(1 / 3) and not memory.met


def test_a_method_without_its_peer_gives_its_own_speed(tmp_path):
    alone = Bench(peers_python=str(tmp_path / "python"))
    measured = measured_steps(alone, {finetune.LORA: [1.024]})
    (row,) = finetune.against_peft(measured, "LoRA", finetune.LORA, (finetune.PEFT,), Target(">=", 1.5), None)
    assert row.measured.median == 1000 and row.target is None and "peer not installed" in row.note


def test_frozen_weights_cost_a_forward_pass_less(bench):
    wanted = 2 / 3 * step.flops_per_token("124m", 0)
    assert finetune.flops_per_token("124m", 0) == pytest.approx(wanted)


def test_decoding_agrees_between_formats_and_goes_on_beyond_its_longest_text(folders, monkeypatch):
    monkeypatch.setattr(writing, "LONGEST", 3)
    nf4, bfloat16 = (decode.CONTENDERS[name](model="tiny", tokens=1, **folders) for name in
                     (decode.NF4, decode.BFLOAT16))  # fmt: skip
    assert decode.AGREE[decode.BFLOAT16](nf4.check, bfloat16.check)
    assert not decode.AGREE[decode.BFLOAT16](nf4.check, [-x for x in bfloat16.check])
    assert all(isinstance(nf4.run(), int) for _ in range(8))
    decode.CONTENDERS[decode.NF4](model="tiny", tokens=32, **folders).run()


def test_models_of_the_benchmarks_are_the_shapes_they_are_named_after():
    from entrenar.llama import LlamaConfig

    counts = {name: LlamaConfig(**model).parameter_count() for name, model in bases.MODELS.items()}
    assert counts["124m"] == 137_841_408 and counts["1.1b"] == 1_100_048_384


# -- whole steps, checkpointing, generation


def test_a_step_that_has_run_warm_is_not_run_again_before_it_is_timed():
    losses = iter([3.0, 2.0, 1.0, 0.5])

    class Group:
        CONTENDERS = {"entrenar": lambda: training.case(lambda: next(losses), first=3)}

    server = Server("entrenar", lambda group: Group)
    assert server.answer({"do": "prepare", "group": "step", "args": {}}) == {"check": [3.0, 2.0, 1.0]}
    assert 0 <= server.last[0] < 1 and next(losses) == 0.5
    Group.CONTENDERS["entrenar"] = lambda: Case(lambda: next(losses), [], None)
    with pytest.raises(StopIteration):
        server.answer({"do": "prepare", "group": "step", "args": {}})


def test_checkpointing_changes_no_loss(tmp_path, monkeypatch):
    monkeypatch.setitem(step.MODELS, "tiny", bases.MODELS["tiny"])
    weights = str(tmp_path / "weights.safetensors")
    step.write_own_weights("tiny", weights)
    case = {"model": "tiny", "batch": 1, "context": 32, "weights": weights, "first": 2}
    plain, ours = (checkpointing.CONTENDERS[name](**case).check for name in (checkpointing.PLAIN, checkpointing.OURS))
    assert step.same_losses(plain, ours)
    assert checkpointing.parameter_bytes("tiny") == 4 * parameters_of("tiny")


def parameters_of(model):
    from entrenar.llama import LlamaConfig

    return LlamaConfig(**bases.MODELS[model]).parameter_count()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bfloat16")
    bases.write("tiny", str(folder / "base"), str(folder / "adapter"), "bfloat16")
    return str(folder / "base")


def test_a_text_begins_alike_in_bfloat16_and_in_4_bits(base):
    case = {"model": "tiny", "tokens": 1, "base": base, "files": {}}
    bfloat16, nf4 = (generation.CONTENDERS[name](**case).check for name in (generation.BFLOAT16, generation.NF4))
    agree_in_4_bits = generation.AGREE[generation.NF4]
    assert agree_in_4_bits(bfloat16, nf4) and not agree_in_4_bits(bfloat16, [1.1 * x for x in nf4])
    assert not generation.AGREE[generation.LLAMA_BF16](bfloat16, nf4)  # which is told apart from 16 bits


def test_logits_in_int16_are_compared_with_those_in_float32(base, monkeypatch):
    case = {"model": "tiny", "tokens": 1, "base": base, "files": {}}
    generation.CONTENDERS[generation.INT16](**case)
    monkeypatch.setattr(generation, "TOLERANCE_INT16", 1e-8)
    with pytest.raises(ValueError, match="int16 are not those of float32"):
        generation.CONTENDERS[generation.INT16](**case)


def test_a_token_reads_every_weight_once_but_of_an_embedding_a_row(base, monkeypatch):
    from entrenar.llama import Llama, LlamaConfig
    from entrenar.nn import unfilled

    assert generation.bytes_a_token(generation.BFLOAT16, base) == pytest.approx(2 * parameters_of("tiny"), rel=0.01)
    untied = LlamaConfig(**bases.MODELS["tiny"] | {"tie_word_embeddings": False})
    with unfilled():
        llama = Llama(untied)
    monkeypatch.setattr(generation, "our_model", lambda contender, base: llama)
    embedding = untied.vocab_size * untied.hidden_size
    assert generation.bytes_a_token(generation.BFLOAT16, "") == 4 * (untied.parameter_count() - embedding)


def generated(bench):
    """A model of 1 GB that is read at 20 GB/s, and what its contenders took."""
    seconds = {generation.BFLOAT16: [0.0625], generation.NF4: [0.05], generation.INT16: [0.025],
               generation.TORCH_FLOAT32: [0.5],
               generation.TORCH_BFLOAT16: [0.25], generation.LLAMA_BF16: [0.125], generation.LLAMA_F16: [0.1],
               generation.LLAMA_Q4_0: [0.05]}  # fmt: skip
    peaks = dict.fromkeys(seconds, 10**9)
    writing = seconds | {generation.MEMORY: [machine.READ / 20e9]}
    bench.machine["fma_peak"] = 1e12
    weights = {generation.BFLOAT16: 10**9, generation.NF4: 3 * 10**8, generation.INT16: 3 * 10**8}
    return generation.Measured(bench, "1.1b", Times(writing), Times(seconds), peaks, weights, flops=10**9)


def test_rows_of_generation_take_the_best_of_the_peers(bench):
    bench.torch_missing = bench.llama_missing = None
    measured = generated(bench)
    prompt, decoding = generation.against_transformers(measured)
    assert prompt.measured.median == decoding.measured.median == 4.0 and prompt.met and decoding.met
    assert decoding.share == "80% of reading 20.0 GB/s" and "4 of transformers in bfloat16" in decoding.note
    bandwidth = generation.row_of_bandwidth(measured)
    assert bandwidth.measured.median == pytest.approx(0.8) and bandwidth.met
    bf16, int16, four_bits, reading, memory = generation.against_llama_cpp(measured)
    assert [row.measured.median for row in (bf16, int16, four_bits, reading)] == [2.0, 2.0, 1.0, 1.0]
    assert memory.measured.median == 1.0


def test_without_llama_cpp_its_rows_say_so(bench):
    bench.torch_missing, bench.llama_missing = None, "peer not installed (llama-cpp-python)"
    measured = generated(bench)
    for name in generation.LLAMA:
        del measured.writing.seconds[name], measured.reading.seconds[name]
    rows = list(generation.against_llama_cpp(measured))
    assert all(row.measured is None and "peer not installed" in row.note for row in rows[:4])


def test_llama_cpp_says_where_it_was_looked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(ImportError, match=r"llama\.cpp.avx2; make bench builds it"):
        llama_cpp.library()
    (tmp_path / "llama.cpp" / "native").mkdir(parents=True)
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    assert llama_cpp.build() == "native"
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert llama_cpp.build() == "avx2"


def test_reading_is_measured(monkeypatch):
    monkeypatch.setattr(machine, "READ", 4 << 20)
    assert machine.reading() > 1e8
