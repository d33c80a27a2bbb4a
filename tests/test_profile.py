"""The profiler: what a call computes and moves, where a step's time goes, the table, the picture."""

import io
import json
import time

import numpy as np
import pytest
from fine_runs import make_base, write_rows
from PIL import Image

from entrenar import Tensor, kernels, ops
from entrenar.cli import main
from entrenar.observe.costs import EXP, OPERATIONS, cost, seen
from entrenar.observe.profile import Line, Profile
from entrenar.quant import quantize
from entrenar.tensor import Op
from entrenar.training.roofline import Roofline, render

TINY = ["--model.hidden_size", "64", "--model.intermediate_size", "128", "--model.num_hidden_layers", "2",
        "--model.num_attention_heads", "4", "--training.context", "32", "--training.batch_size", "2",
        "--data.tokenizer", "bytes"]  # fmt: skip


def floats(*shape):
    return np.ones(shape, np.float32)


# What a call costs


def test_a_product_counts_two_operations_for_each_multiply_add_and_its_three_matrices():
    a, b = floats(3, 5, 7), floats(7, 11)
    c = kernels.matmul(a, b)
    each = cost("matmul", (a, b), {}, c)
    assert each.flops == 2 * 3 * 5 * 7 * 11 and each.sizes == "5 x 7 x 11"
    assert each.bytes == 4 * (3 * 5 * 7 + 7 * 11 + 3 * 5 * 11)


def test_a_packed_matrix_counts_with_the_bytes_it_is_held_in():
    x, w = floats(6, 128), quantize(floats(64, 128), "nf4")
    each = cost("packed_linear", (x, w), {}, kernels.packed_linear(x, w))
    assert each.flops == 2 * 6 * 128 * 64 and each.bytes == x.nbytes + w.nbytes + 6 * 64 * 4


@pytest.mark.parametrize("T, S", [(5, 5), (2, 7), (1, 9)])
def test_attention_counts_the_keys_that_each_query_sees(T, S):
    q, k = floats(2, T, 3, 8), floats(2, S, 3, 8)
    pairs = 2 * sum(s <= t + S - T for t in range(T) for s in range(S))
    assert seen(q, k) == pairs
    assert cost("attention_forward", (q, k, k), {"scale": 1.0}, ()).flops == pairs * 3 * (4 * 8 + EXP + 4)


def test_documents_that_do_not_see_each_other_are_not_counted_together():
    q = floats(1, 6, 1, 8)
    assert seen(q, q, np.array([[0, 0, 0, 3, 3, 3]])) == 2 * seen(q[:, :3], q[:, :3])


def test_targets_that_are_ignored_cost_nothing():
    x, w, targets = floats(4, 8), floats(16, 8), np.array([1, -100, 2, -100])
    options = {"ignore_index": -100, "scale": 1.0, "need_dx": True, "need_dw": False}
    assert cost("linear_cross_entropy", (x, w, targets), options, ()).flops == 2 * 16 * (2 * 8 * 2 + EXP + 4)


def test_every_kernel_of_a_training_step_has_its_operations_counted():
    uncounted = {"fma_peak", "unpack", "unpack_rows", "quantize_4bit", "quantize_q8_0", "round_bfloat16"}
    assert set(kernels.KERNELS) - set(OPERATIONS) <= uncounted, "add the formula's operations to observe/costs.py"


# Where the time goes


class Slow(Op):
    """Takes 50 ms beside all kernels."""

    def forward(self, x):
        time.sleep(0.05)
        return x

    def backward(self, dy):
        return dy


def test_time_in_kernels_and_time_beside_them_are_told_apart():
    x, w = Tensor(floats(64, 64), requires_grad=True), Tensor(floats(64, 64), requires_grad=True)
    ops.linear(x, w).sum().backward()  # warm
    x.grad = w.grad = None
    with Profile() as quick:
        ops.linear(x, w).sum().backward()
    with Profile() as slow:
        Slow.apply(ops.linear(x, w)).sum().backward()
    assert {line.kernel: line.calls for line in quick.table()} == {"matmul": 3}
    assert quick.outside + quick.inside == pytest.approx(quick.seconds)
    assert slow.outside > 0.05 > quick.outside


def test_lines_add_up_calls_and_come_longest_first():
    profile = Profile()
    a, b, c = floats(8, 8), floats(8, 16), floats(8, 8)
    for seconds, args in ((0.5, (a, b)), (1.0, (a, c)), (2.0, (a, c))):
        profile.calls.append(("matmul", seconds, cost("matmul", args, {}, ())))
    profile.calls.append(("sum_of_squares", 9.0, cost("sum_of_squares", (a,), {}, 1.0)))
    assert [(line.kernel, line.calls, line.seconds) for line in profile.table()] == [
        ("sum_of_squares", 1, 9.0), ("matmul", 3, 3.5)]  # fmt: skip
    sized = profile.table(by_size=True)
    assert [(line.sizes, line.calls) for line in sized[1:]] == [("8 x 8 x 8", 2), ("8 x 8 x 16", 1)]
    assert sized[1].flops == 2 * 2 * 8**3


def test_an_error_inside_leaves_the_kernels_as_they_were():
    before = {name: getattr(kernels, name) for name in kernels.KERNELS}
    with pytest.raises(ValueError, match="matmul"), Profile():
        assert kernels.matmul is not before["matmul"]
        kernels.matmul(floats(2, 3), floats(4, 5))
    assert {name: getattr(kernels, name) for name in kernels.KERNELS} == before


def test_a_profiled_step_computes_the_same_bits():
    x, w = Tensor(floats(9, 32) / 3, requires_grad=True), Tensor(floats(33, 32) / 7, requires_grad=True)
    ops.softmax(ops.linear(x, w)).sum().backward()
    plain, x.grad = x.grad, None
    with Profile():
        ops.softmax(ops.linear(x, w)).sum().backward()
    assert np.array_equal(x.grad, plain)


# The command


def test_the_command_tells_a_table_and_draws_a_picture(tmp_path, capsys):
    picture = tmp_path / "roofline.png"
    assert main(["profile", *TINY, "--steps", "1", "--picture", str(picture)]) == 0
    said = capsys.readouterr()
    for word in ("linear_cross_entropy", "attention_backward", "adamw_step", "outside kernels", "the step", "tokens/s"):
        assert word in said.out
    assert "step 1 of 2" in said.err and "step 2 of 2" in said.err
    assert Image.open(picture).size == (1200, 720)


def test_the_shares_of_the_json_add_up_to_the_step(capsys):
    assert main(["profile", *TINY, "--steps", "2", "--json", "--training.accumulation", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    inside = sum(line["seconds"] for line in found["kernels"])
    assert inside + found["outside"] == pytest.approx(found["seconds"], rel=1e-6)
    assert found["tokens"] == 2 * 2 * 32
    calls = {line["kernel"]: line["calls"] for line in found["kernels"]}
    assert calls["linear_cross_entropy"] == 2 and calls["attention_forward"] == 2 * 2


def test_a_step_of_fine_tuning_is_one_as_well_learning_rate_and_length_left_to_their_defaults(tmp_path, capsys):
    make_base(tmp_path / "base")
    write_rows(tmp_path / "rows.jsonl")
    of_base = ["--base.model", str(tmp_path / "base"), "--data.source", str(tmp_path / "rows.jsonl")]
    small = ["--training.batch_size", "2", "--training.accumulation", "1", "--steps", "1"]
    assert main(["profile", *of_base, *small, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"] == 2 * 128  # as long as the base has positions
    assert {"linear_cross_entropy", "adamw_steps"} <= {line["kernel"] for line in found["kernels"]}


@pytest.mark.parametrize(
    "words, told",
    [
        (["--steps", "0"], "--steps 0: wanted 1 or more"),
        (["a.toml", "--config", "b.toml"], "one configuration is wanted"),
        (["nowhere.toml"], "nowhere.toml"),
        (["--model.hiden_size", "3"], "hidden_size"),
    ],
)
def test_what_cannot_be_profiled_is_one_clear_line(words, told, capsys):
    assert main(["profile", *words]) == 2
    assert told in capsys.readouterr().err


def test_a_model_that_memory_will_not_hold_is_refused_before_it_is_made(capsys):
    assert main(["profile", "--model.hidden_size", "65536", "--model.num_hidden_layers", "900"]) == 2
    assert "would need" in capsys.readouterr().err


# The picture


def test_a_dot_lies_under_the_roof_and_moves_with_its_speed():
    def picture(seconds):
        line = Line("matmul", "", 1, seconds, flops=1e11, bytes=1e8)
        image = Image.open(io.BytesIO(render(Roofline("", "", 2e11, 3e10, [line])))).convert("RGB")
        return np.argwhere((np.asarray(image) == (0, 114, 178)).all(axis=-1))[:, 0].mean()

    assert picture(0.6) < picture(5.0)  # the faster one is higher up


def test_lines_that_compute_nothing_are_not_drawn_and_none_at_all_is_fine():
    nothing = [Line("unpack_rows", "", 3, 0.1, flops=0, bytes=100)]
    assert render(Roofline("", "", 1e11, 1e10, nothing)) == render(Roofline("", "", 1e11, 1e10, []))
