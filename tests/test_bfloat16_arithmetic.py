"""compute = "bfloat16": what the products are, on every instruction set; that a model learns with them what it
learns in float32; and where the switch may stand.

A rounding to bfloat16 is off by 2^-9 at most, relatively: that is HALF_STEP, and where tolerances below come from.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from conftest import ISAS
from kernel_cases import EPS, PACKED, TINY, mismatch, normal, random_packed
from small_base import SHAPE, write_base

from entrenar import kernels, optim, random
from entrenar.adapters import LoraConfig, adapt
from entrenar.cli import doctor
from entrenar.formats import FormatError
from entrenar.kernels import reference
from entrenar.kernels.packed import FEW_ROWS, Packed
from entrenar.kernels.reference_packed import operands, rounded
from entrenar.llama import Llama
from entrenar.training.config import ConfigError, FineTuning, read_config

HALF_STEP = 2.0**-9
# Tiles and panels not full, k odd, blocks across rows, more than one strip of k, more than one panel, one column
SHAPES = ((9, 9, 9), (40, 70, 100), (33, 65, 520), (100, 2100, 65), (14, 33, 1601), (200, 300, 1001), (20, 1, 1))


def in_bfloat16(w: Packed) -> Packed:
    return dataclasses.replace(w, compute="bfloat16")


def product(backend, direction: str):
    return getattr(backend, "packed_linear" if direction == "forward" else "packed_linear_backward")


def exact(direction: str, x, w: Packed):
    """The reference in float64, and what float32's sums may add: as kernel_cases.py has it, of the rounded numbers."""
    x, W = operands(x.astype(np.float64), w)
    k, W = x.shape[1], W.T if direction == "forward" else W
    return x @ W, 2 * EPS * np.sqrt(k) * (np.abs(x) @ np.abs(W)) + TINY


def inputs(rng, direction: str, N: int, w: Packed):
    return normal(rng, N, w.shape[1 if direction == "forward" else 0])


# -- the kernels


@pytest.mark.tier1
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("kind", PACKED)
def test_products_are_those_of_rounded_numbers(kind, direction, isa, native):
    rng = np.random.default_rng(0)
    for N, O, I in SHAPES:
        w = in_bfloat16(random_packed(rng, kind, O, I))
        x = inputs(rng, direction, N, w)
        want, bound = exact(direction, x, w)
        np.testing.assert_allclose(product(reference, direction)(x.astype(np.float64), w), want, rtol=1e-13, atol=1e-13)
        assert not mismatch(product(native, direction)(x, w), want, bound), (N, O, I)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_products_of_numbers_not_rounded_are_told_apart(direction, native):
    """The check above, of the float32 product: it must fail."""
    rng = np.random.default_rng(1)
    w = random_packed(rng, "nf4", 70, 100)
    x = inputs(rng, direction, 40, w)
    want, bound = exact(direction, x, in_bfloat16(w))
    assert mismatch(product(native, direction)(x, w), want, bound)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_whole_numbers_are_multiplied_exactly(direction, isa, native):
    """Every number goes to its place: a pair in the wrong order would be another sum."""
    rng = np.random.default_rng(2)
    for N, O, I in SHAPES:
        W = rng.integers(-8, 9, (O, I)).astype(np.float32)
        w = Packed("bfloat16", (O, I), (W.view(np.uint32) >> 16).astype(np.uint16).reshape(-1), compute="bfloat16")
        x = rng.integers(-8, 9, (N, I if direction == "forward" else O)).astype(np.float32)
        np.testing.assert_array_equal(product(native, direction)(x, w), x @ (W.T if direction == "forward" else W))


@pytest.mark.parametrize("kind", PACKED)
def test_few_rows_stay_float32(kind, isa, native):
    rng = np.random.default_rng(3)
    w = random_packed(rng, kind, 70, 130)
    for direction in ("forward", "backward"):
        for N in (1, FEW_ROWS, FEW_ROWS + 1):
            x = inputs(rng, direction, N, w)
            got, plain = (product(native, direction)(x, each).tobytes() for each in (in_bfloat16(w), w))
            assert (got == plain) == (N <= FEW_ROWS)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_any_number_of_threads_gives_the_same_bits(direction, isa, native):
    rng, before = np.random.default_rng(4), native.get_num_threads()
    w = in_bfloat16(random_packed(rng, "nf4 nested", 321, 259))
    for N in (9, 33, 160):
        x = inputs(rng, direction, N, w)
        found = set()
        for threads in (1, 2, 3, 4, 8):
            native.set_num_threads(threads)
            found.add(product(native, direction)(x, w).tobytes())
        native.set_num_threads(before)
        assert len(found) == 1


def test_nan_and_infinity_go_where_they_go_in_float32(isa, native):
    rng = np.random.default_rng(5)
    w, x = random_packed(rng, "bfloat16", 40, 64), normal(rng, 20, 64)
    x[3, 5], x[7, 63], x[9, 0] = np.nan, np.inf, np.frombuffer(b"\xff\xff\xff\x7f", np.float32)[0]  # a nan all ones
    got, plain = native.packed_linear(x, in_bfloat16(w)), native.packed_linear(x, w)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(plain))
    np.testing.assert_array_equal(np.isinf(got), np.isinf(plain))
    assert np.isnan(got).any(axis=1).nonzero()[0].tolist() == [3, 9]


def test_rounding_is_to_the_nearest_and_halves_to_even():
    x = np.array([1, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-9], np.float32)
    np.testing.assert_array_equal(rounded(x), np.array([1, 1, 1 + 4 * 2**-8, 1 + 2 * 2**-8, -1], np.float32))
    assert rounded(x.reshape(5, 1).astype(np.float64)).dtype == np.float64


def test_the_head_and_its_loss_in_bfloat16(isa, native):
    """The twin in float64 says what it is; and it is float32's loss to 1e-3, its gradient to 1e-2."""
    rng = np.random.default_rng(6)
    x, w, targets = normal(rng, 60, 96), random_packed(rng, "bfloat16", 200, 96), rng.integers(0, 200, 60)
    x *= 0.1
    constants = {"ignore_index": -100, "scale": 0.5, "need_dx": True, "need_dw": False}
    losses, dx, _ = native.linear_cross_entropy(x, in_bfloat16(w), targets, **constants)
    want, want_dx, _ = reference.linear_cross_entropy(x.astype(np.float64), in_bfloat16(w), targets, **constants)
    plain, plain_dx, _ = native.linear_cross_entropy(x, w, targets, **constants)
    np.testing.assert_allclose(losses, want, rtol=2e-5)
    assert far(dx, want_dx) < 2 * HALF_STEP  # a dlogit at the middle of two bfloat16 falls to either side
    assert abs(losses.mean() - plain.mean()) < 1e-3 * plain.mean() and losses.tobytes() != plain.tobytes()
    assert far(dx, plain_dx) < 1e-2


def far(got, want) -> float:
    """The distance of two arrays, relative to the second's length."""
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def test_an_arithmetic_that_is_none_is_refused():
    with pytest.raises(ValueError, match="compute = 'float16': wanted one of float32, int16, bfloat16"):
        dataclasses.replace(random_packed(np.random.default_rng(7), "nf4", 4, 64), compute="float16")


# -- learning


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("models") / "base")


def adapted(base, compute: str, storage: str = "nf4") -> Llama:
    model = Llama.from_pretrained(base, storage=storage, compute=compute)
    random.seed(1)
    adapt(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    return model


def learned(model: Llama, steps: int) -> list[float]:
    """The losses of a run over sequences that each count on by a step of their own."""
    rng, optimizer, losses = np.random.default_rng(8), optim.AdamW(model.named_parameters(), lr=5e-3), []
    for _ in range(steps):
        ids = (rng.integers(0, 64, (4, 1)) + rng.integers(1, 4, (4, 1)) * np.arange(33)) % 64
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_qlora_learns_in_bfloat16_what_it_learns_in_float32(base):
    """Over 50 steps, in which the loss falls by more than a nat, no loss is further off than 2 hundredths of a nat."""
    plain, got = (np.array(learned(adapted(base, compute), 50)) for compute in ("float32", "bfloat16"))
    assert plain[:3].mean() - plain[-3:].mean() > 1
    assert 0 < np.abs(got - plain).max() < 0.02


@pytest.mark.parametrize("storage", ["nf4", "q8_0", "bfloat16"])
def test_gradients_of_adapters_are_float32s_to_a_hundredth(base, storage):
    ids = np.random.default_rng(9).integers(0, 64, (4, 33))
    found = []
    for compute in ("float32", "bfloat16"):
        model = adapted(base, compute, storage)
        for name, p in model.named_parameters():  # B is 0 at first, and A then has no gradient
            if "lora_B" in name:
                p.data[...] = 0.02 * np.random.default_rng(p.size).normal(size=p.shape)
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
        found.append(dict(model.named_parameters()))
    assert found[0].keys() == found[1].keys()
    distances = [far(found[1][name].grad, p.grad) for name, p in found[0].items()]
    assert 0 < max(distances) < 2e-2 and np.median(distances) < 1e-2


# -- the switch


def test_every_packed_weight_of_a_model_gets_it_and_files_stay_as_they_are(base, tmp_path):
    model = Llama.from_pretrained(base, storage="nf4", compute="bfloat16")
    assert {w.compute for _, w in model.named_packed()} == {"bfloat16"}
    assert {w.compute for _, w in Llama.from_pretrained(base, storage="nf4").named_packed()} == {"float32"}
    model.save_pretrained(tmp_path / "one")
    Llama.from_pretrained(base, storage="nf4").save_pretrained(tmp_path / "other")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()


def test_weights_that_are_floats_refuse_it(base, tmp_path):
    with pytest.raises(ValueError, match="compute = 'int8': wanted one of"):
        Llama.from_pretrained(base, storage="nf4", compute="int8")
    for storage in (None, "float32"):
        with pytest.raises(ValueError, match="is for frozen weights in a storage format; give storage too"):
            Llama.from_pretrained(base, storage=storage, compute="bfloat16")
    Llama(SHAPE).save_pretrained(tmp_path / "floats")
    with pytest.raises(FormatError, match="storage = bfloat16 keeps them so"):
        Llama.from_pretrained(tmp_path / "floats", storage="stored", compute="bfloat16")


def test_a_run_that_trains_the_weights_themselves_refuses_it():
    rest = [("base.model", "base"), ("data.source", "rows.jsonl"), ("base.compute", "bfloat16")]
    for name, value in (("adapter.kind", "full"), ("base.storage", "float32")):
        with pytest.raises(ConfigError, match=r"base\.compute.*is for frozen weights in a storage format"):
            read_config(None, [*rest, (name, value)], FineTuning)
    assert read_config(None, [*rest, ("base.storage", "nf4")], FineTuning).base.compute == "bfloat16"


def test_doctor_says_whether_the_processor_has_instructions_for_it(monkeypatch):
    info = kernels.info()
    for has, words in ((True, "twice as fast"), (False, "no faster")):
        monkeypatch.setattr(kernels, "info", lambda has=has: dataclasses.replace(info, bfloat16=has))
        (fact,) = [fact for fact in doctor.kernels_in_use().facts if fact[0] == "bfloat16 products"]
        assert fact[1] is has and words in fact[2]


def test_only_avx512_multiplies_pairs(native):
    before = native.isa()
    try:
        for name in set(native.available_isas()) & set(ISAS) - {"avx512"}:
            native.use_isa(name)
            assert not kernels.info().bfloat16
    finally:
        native.use_isa(before)
