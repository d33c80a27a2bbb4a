"""The training loop: what it computes, what it writes, and how it ends."""

import dataclasses
import json
import math
import os
import signal

import numpy as np
import pytest

from entrenar import optim, random
from entrenar.data import IGNORE, Batch, prepare
from entrenar.llama import Llama
from entrenar.training.checkpoint import load_checkpoint
from entrenar.training.config import read_config
from entrenar.training.display import HeldOut, PlainLines
from entrenar.training.signals import StopAtOnce, listening
from entrenar.training.text_task import TextTask
from entrenar.training.trainer import Trainer, TrainingError, accumulate_gradients

SMALL = {
    "data.tokenizer": "bytes", "data.cache": "off",
    "model.hidden_size": "16", "model.intermediate_size": "32", "model.num_hidden_layers": "1",
    "model.num_attention_heads": "2", "model.max_position_embeddings": "32",
    "training.steps": "6", "training.batch_size": "2", "training.context": "16", "training.eval_every": "3",
    "training.eval_tokens": "64", "training.sample_tokens": "8", "lr_schedule.warmup_steps": "2",
}  # fmt: skip


@pytest.fixture
def make(tmp_path):
    """A small trainer over a small text; options by keyword, "__" for the dot."""
    (tmp_path / "text.txt").write_text("".join(f"{i} is followed by {i + 1}.\n" for i in range(300)))
    made = []

    def trainer(**changes):
        over = SMALL | {"data.source": str(tmp_path / "text.txt")}
        over |= {name.replace("__", "."): str(value) for name, value in changes.items()}
        config = read_config(None, over.items())
        data = prepare(config.data.source, tokenizer="bytes", cache="off")
        random.seed(config.training.seed)
        run = tmp_path / f"run{len(made)}"
        run.mkdir()
        lines = open(run / "lines.txt", "w")
        made.append(
            Trainer(
                config,
                TextTask(config, data, Llama(config.llama(257, 256))),
                run,
                PlainLines(lines, report_every=2),
                1e9,
            )
        )
        return made[-1]

    yield trainer
    for one in made:
        one.close()
        one.display.stream.close()


def events(trainer, kind=None):
    every = [json.loads(line) for line in (trainer.run / "metrics.jsonl").read_text().splitlines()]
    return [e for e in every if kind in (None, e["event"])]


def weights(trainer):
    return {name: p.data for name, p in trainer.model.named_parameters()}


def test_micro_batches_equal_one_big_batch_by_tokens(make):
    model = make().model
    rng = np.random.default_rng(0)
    ids, targets = rng.integers(0, 257, (2, 6, 16))
    targets[rng.random(targets.shape) < 0.4] = IGNORE
    targets[:2] = IGNORE  # the first micro-batch counts for nothing, others for what they have
    loss, tokens = accumulate_gradients(model, [Batch(ids, targets)])
    whole = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    parts = [Batch(ids[a:b], targets[a:b]) for a, b in ((0, 2), (2, 3), (3, 6))]
    loss_parts, tokens_parts = accumulate_gradients(model, parts)
    assert tokens == tokens_parts == (targets != IGNORE).sum()
    assert loss == pytest.approx(loss_parts, rel=1e-6)
    for name, p in model.named_parameters():
        np.testing.assert_allclose(
            p.grad, whole[name], rtol=0, atol=1e-5 * np.abs(whole[name]).max(), err_msg=name
        )


def test_a_mean_of_means_would_not_pass_for_it(make):
    model = make().model
    rng = np.random.default_rng(0)
    ids, targets = rng.integers(0, 257, (2, 2, 16))
    targets[0, 4:] = IGNORE
    whole, _ = accumulate_gradients(model, [Batch(ids, targets)])
    means = [accumulate_gradients(model, [Batch(ids[i : i + 1], targets[i : i + 1])])[0] for i in (0, 1)]
    assert abs(np.mean(means) - whole) > 1e-4


def test_the_loss_falls(make):
    t = make(training__steps=40, training__eval_every=0, lr_schedule__learning_rate=0.01)
    t.train()
    assert t.reports[0].loss == pytest.approx(math.log(257), rel=0.05)
    assert t.reports[-1].loss < t.reports[0].loss - 1.5


def test_a_run_repeats_itself_bit_for_bit(make):
    one, two, other = make(), make(), make(training__seed=2)
    for t in (one, two, other):
        t.train()
    assert all((weights(one)[n] == weights(two)[n]).all() for n in weights(one))
    assert any((weights(one)[n] != weights(other)[n]).any() for n in weights(one))


def test_looking_and_saving_change_nothing_of_the_training(make):
    plain = make(training__eval_every=0)
    busy = make(training__eval_every=1, checkpointing__every=1)
    plain.train(), busy.train()
    assert all((weights(plain)[n] == weights(busy)[n]).all() for n in weights(plain))


def test_the_first_step_is_clipped_adamw_by_hand(make):
    t = make(training__steps=1, training__eval_every=0, training__clip_norm=0.1, lr_schedule__warmup_steps=1)
    before = {n: w.copy() for n, w in weights(t).items()}
    accumulate_gradients(t.model, [t.task.next()[0]])
    grads = {n: p.grad.astype(np.float64) for n, p in t.model.named_parameters()}
    norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
    t.model.zero_grad()
    t.task.batches.load_state({"seed": t.config.training.seed, "epoch": 0, "position": 0})
    t.train()
    assert t.reports[0].grad_norm == pytest.approx(norm, rel=1e-5) and norm > 0.1
    lr, c = t.reports[0].learning_rate, t.config.training
    for n, w in before.items():
        g = grads[n] * 0.1 / norm
        decay = c.weight_decay if w.ndim >= 2 else 0.0
        wanted = w * (1 - lr * decay) - lr * g / (np.abs(g) + c.eps)
        np.testing.assert_allclose(weights(t)[n], wanted, rtol=0, atol=2e-3 * lr, err_msg=n)


def test_every_step_and_look_is_in_metrics(make):
    t = make()
    t.train()
    steps = events(t, "step")
    assert [e["step"] for e in steps] == [1, 2, 3, 4, 5, 6]
    assert [e["step"] for e in events(t, "held_out")] == [3, 6]
    assert {
        "loss",
        "bits_per_byte",
        "learning_rate",
        "grad_norm",
        "tokens_per_second",
        "peak_share",
        "memory",
        "memory_peak",
        "seconds",
        "seconds_left",
    } <= steps[0].keys()
    lr = t.config.lr_schedule
    shares = [
        optim.schedule(lr.schedule, s, total_steps=6, warmup_steps=2, min_ratio=lr.min_ratio) for s in range(6)
    ]  # fmt: skip
    rates = [lr.learning_rate * share for share in shares]
    assert [e["learning_rate"] for e in steps] == pytest.approx(rates)
    assert steps[-1]["tokens"] == 6 * 2 * 16


def test_bits_per_byte_count_every_held_out_byte_and_end_token(make):
    t = make()
    seen = t.look(whole=True)
    facts = t.task.data.facts
    assert (seen.bytes, seen.tokens) == (facts.held_out_bytes, facts.held_out_tokens)
    # by hand: the whole row in windows that do not overlap
    t = make(training__eval_overlap=0.0)
    row = np.concatenate([[256], t.task.data.held_out]).astype(np.int64)
    nats = sum(t.model.loss(row[None, s : s + 16], row[None, s + 1 : s + 17][:, : len(row[s : s + 16])],
                            reduction="sum").item()
               for s in range(0, len(row) - 1, 16) if len(row[s + 1 : s + 17]) == 16)  # fmt: skip
    rest = (len(row) - 1) % 16
    if rest:
        nats += t.model.loss(row[None, -rest - 1 : -1], row[None, -rest:], reduction="sum").item()
    assert t.look(whole=True).bits_per_byte == pytest.approx(
        nats / math.log(2) / facts.held_out_bytes, rel=1e-5
    )


def test_the_sample_of_held_out_text_is_smaller_and_always_the_same(make):
    t = make()
    one, two = t.look(), t.look()
    assert one.bits_per_byte == two.bits_per_byte
    assert 0 < one.tokens < t.task.data.facts.held_out_tokens


def test_a_stop_while_all_held_out_text_is_read_makes_do_with_the_sample(make):
    t = make()
    doing = t.display.doing
    t.display.doing = lambda *what: (doing(*what), t.stop("Ctrl-C"))
    seen = t.look(whole=True)
    assert not seen.whole and t.looks == [seen] and t.model.training
    assert seen.tokens == make().look().tokens


def test_weights_whose_held_out_loss_is_no_number_end_the_run_and_are_not_kept(make):
    t = make(training__eval_every=2, checkpointing__every=1)
    update = t.optimizer.step

    def too_far(**how):
        update(**how)
        if t.step == 1:
            t.model.model.norm.weight.data[:] = 3e38

    t.optimizer.step = too_far
    told = r"step 2: the held-out loss is (nan|inf).*; the last checkpoint is step-000001 in .*learning_rate"
    with pytest.raises(TrainingError, match=told):
        t.train()
    assert load_checkpoint(t.run).state["step"] == 1 and t.best is None and not t.looks
    assert "NaN" not in (t.run / "metrics.jsonl").read_text() and len(events(t, "error")) == 1


def test_without_looks_the_time_of_one_is_measured_once(make, monkeypatch):
    t = make(training__budget="1h", training__eval_every=0)
    looks, measure = [], t._measure
    monkeypatch.setattr(t, "_measure", lambda *, whole: looks.append(whole) or measure(whole=whole))
    t.plan_steps()
    t.step = 1
    t.plan_steps()
    assert looks == [False] and t.looks == []


def test_the_time_left_counts_the_looks_to_come_and_the_last_at_everything(make):
    t = make(training__steps=12, training__eval_every=4)
    t.step, t.busy = 3, 2.0
    assert t._seconds_left() == 9 * 2.0
    facts = t.task.data.facts
    t.looks = [HeldOut(0, 0.0, 0.0, facts.held_out_tokens // 10, 0, seconds=1.0, whole=False)]
    assert t._seconds_left() == pytest.approx(9 * 2.0 + 3 + 10, rel=0.05)


def test_a_checkpoint_holds_all_the_next_step_depends_on(make):
    t = make(checkpointing__every=4)
    t.train()
    saved = load_checkpoint(t.run / "step-000004")
    state = saved.state
    assert (state["step"], state["tokens"]) == (4, 4 * 2 * 16)
    assert state["config"]["training"]["steps"] == 6 and state["best"]["step"] == 3

    again = make(checkpointing__every=0)  # by hand what a later `resume` will do
    again.model.load_state_dict(saved.weights)
    again.optimizer.load_state_dict(saved.optimizer)
    again.task.batches.load_state(state["batches"])
    random.set_state(state["random"])
    again.step = state["step"]
    again.train()
    assert all((weights(t)[n] == weights(again)[n]).all() for n in weights(t))


def test_the_best_checkpoint_is_the_lowest_look(make):
    t = make(training__steps=9, training__eval_every=3)
    t.train()
    best = min((s for s in t.looks), key=lambda s: s.bits_per_byte)
    assert load_checkpoint(t.run / "best").state["step"] == best.step


def test_no_number_for_a_loss_stops_the_run_and_keeps_the_checkpoint(make):
    t = make(checkpointing__every=2, training__eval_every=0)
    accumulate = t.task.batches.next

    def poisoned():
        if t.step == 3:
            t.model.model.norm.weight.data[:] = np.nan
        return accumulate()

    t.task.batches.next = poisoned
    with pytest.raises(TrainingError, match=r"step 4: the loss is nan; .*last checkpoint is .*learning_rate"):
        t.train()
    assert t.step == 3 and load_checkpoint(t.run).state["step"] == 2
    assert events(t, "error")[0]["step"] == 4


def test_weights_that_are_not_finite_are_never_saved(make):
    t = make(checkpointing__every=2, training__eval_every=0, training__steps=4)
    report = t._report

    def poisoned(*args):
        report(*args)
        if t.step == 4:
            t.model.model.norm.weight.data[3] = np.inf

    t._report = poisoned
    with pytest.raises(TrainingError, match=r"step 4: the update made model.norm.weight infinite or not a number"):
        t.train()
    assert load_checkpoint(t.run).state["step"] == 2


def test_a_full_disk_names_the_file(make):
    t = make()
    t.metrics.close()
    t.metrics.file = open("/dev/full", "a")
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        t.log("step")
    t.close()


def test_a_sample_is_text_and_repeatable(make):
    t = make(training__sample_prompt="12 is")
    (one,) = t.samples()
    assert one.prompt == "12 is" and one.text and [one] == t.samples()
    assert dataclasses.asdict(t.config.training)["sample_tokens"] == 8


def test_ctrl_c_finishes_the_step_and_a_second_one_ends_at_once(make):
    t = make(training__steps=1000, training__eval_every=0)
    original = t.task.batches.next

    def interrupted():
        if t.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return original()

    t.task.batches.next = interrupted
    handler = signal.getsignal(signal.SIGINT)
    with listening(t.requests):
        t.train()
        assert t.step == 3 and t.stopping == "Ctrl-C"
        with pytest.raises(StopAtOnce, match="SIGTERM again: stopped at once"):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is handler
