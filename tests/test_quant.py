"""Weights into storage formats and back: bitsandbytes' bits, the half step for every value, bitsandbytes' layout."""

import json
import re
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import quant_vectors
from hypothesis import given
from hypothesis import strategies as st

from entrenar import kernels
from entrenar.formats import FormatError
from entrenar.formats.gguf import dequantize_q8_0, quantize_q8_0
from entrenar.kernels.packed import KINDS, TABLES, Nested, Packed
from entrenar.quant import QuantizeError, bitsandbytes, half_step, output_error, quantize
from entrenar.quant.nested import dynamic_map, nest, torch_mean

F32 = np.float32
FORMS = [(kind, {"double_quant": nested}) for kind in ("nf4", "fp4") for nested in (True, False)]
FORMS += [("q8_0", {}), ("bfloat16", {})]
every_form = pytest.mark.parametrize("kind, settings", FORMS, ids=[f"{k} {s or ''}" for k, s in FORMS])
VECTORS = json.loads(quant_vectors.FILE.read_text())["cases"]


def normal(*shape, seed=0, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(F32)


def bits(w: Packed) -> list:
    """Everything a Packed consists of."""
    scales = w.scales
    if isinstance(scales, Nested):
        parts = [scales.codes.tobytes(), scales.table.tobytes(), scales.absmax.tobytes(), scales.offset, scales.block]
    else:
        parts = [None if scales is None else scales.tobytes()]
    return [w.kind, w.shape, w.block, w.codes.tobytes(), *parts]


# bitsandbytes' bits


def differing(case):
    """Which arrays of a checkpoint are not those that bitsandbytes wrote."""
    w = quant_vectors.matrix(*case["shape"])
    packed = quantize(w, case["kind"], block=case["block"], double_quant=case["double_quant"])
    arrays = bitsandbytes.parts("weight", packed)
    assert arrays.keys() == case["arrays"].keys()
    return [name for name, array in arrays.items() if quant_vectors.told(array) != case["arrays"][name]]


def test_codes_scales_and_everything_else_are_bitsandbytes_bits():
    small = [case for case in VECTORS if tuple(case["shape"]) in quant_vectors.SMALL]
    assert len(small) == len(quant_vectors.cases(quant_vectors.SMALL)) == 36
    assert not [(case, names) for case in small if (names := differing(case))]


@pytest.mark.tier3
def test_the_layers_of_a_model_of_7_billion_are_bitsandbytes_bits():
    large = [case for case in VECTORS if tuple(case["shape"]) in quant_vectors.LARGE]
    assert len(large) == 8
    assert not [(case, names) for case in large if (names := differing(case))]


def test_a_wrong_bit_would_be_found(monkeypatch):
    case = VECTORS[-1] if VECTORS[-1]["shape"] == [768, 768] else next(c for c in VECTORS if c["shape"] == [768, 768])
    matrix = quant_vectors.matrix
    monkeypatch.setattr(quant_vectors, "matrix", lambda O, I: matrix(O, I) * F32(1.0000001))
    assert differing(case)


def test_the_bits_are_the_references_without_c(monkeypatch):
    w = normal(37, 129)
    made = [bits(quantize(w, kind, **settings)) for kind, settings in FORMS]
    for name in ("quantize_4bit", "quantize_q8_0", "round_bfloat16"):
        monkeypatch.setattr(kernels, name, getattr(kernels.reference, name))
    assert [bits(quantize(w, kind, **settings)) for kind, settings in FORMS] == made


def test_the_dynamic_map_is_sorted_with_zero_one_and_no_twins():
    table = dynamic_map()
    assert table.shape == (256,) and table.dtype == F32 and (np.diff(table) > 0).all()
    assert table[127] == 0 and table[255] == 1 and table[0] == F32(-0.99296874)
    np.testing.assert_array_equal(table[:127], -table[128:255][::-1])


def test_the_mean_is_near_the_exact_one_for_every_length():
    for n in (*range(1, 300), 4095, 4096, 65_537, 200_000):
        x = np.abs(normal(n))
        exact = x.astype(np.float64).mean()
        assert abs(torch_mean(x) - exact) <= 8 * np.finfo(F32).eps * exact, n
    assert torch_mean(np.zeros(0, F32)) == 0


def test_nested_scales_keep_blocks_without_deviation():
    for scales in (np.zeros(0, F32), np.full(300, 0.5, F32), np.zeros(3, F32)):
        made = nest(scales)
        back = made.table[made.codes] * np.repeat(made.absmax, made.block)[: made.size] + F32(made.offset)
        np.testing.assert_array_equal(back, scales)


# Round trips


def excess(x, packed):
    """By how much the farthest value is farther off than its half step."""
    return (np.abs(kernels.unpack(packed).astype(np.float64) - x) - half_step(packed)).max(initial=-np.inf)


@every_form
@given(data=st.data())
def test_every_value_comes_back_within_half_a_step(kind, settings, data):
    O, I = data.draw(st.integers(0, 9)), data.draw(st.integers(0, 300))
    seed, power = data.draw(st.integers(0, 2**32 - 1)), data.draw(st.integers(-12, 5))
    block = data.draw(st.sampled_from([32, 64, 128]))
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((O, I)) * np.exp(rng.standard_normal((O, 1))) * 10.0**power).astype(F32)
    x[rng.random((O, I)) < data.draw(st.sampled_from([0, 0.5]))] = 0
    packed = quantize(x, kind, block=block, **settings)
    assert packed.shape == x.shape and excess(x, packed) <= 0


@every_form
def test_the_half_step_is_no_more_than_what_happens(kind, settings):
    """On many values some come near their bound: a larger one would be no promise."""
    x = normal(400, 512)
    packed = quantize(x, kind, **settings)
    share = np.abs(kernels.unpack(packed).astype(np.float64) - x) / half_step(packed)
    assert 0.9 < share.max() <= 1


@every_form
def test_a_value_farther_off_than_half_a_step_is_found(kind, settings):
    x = normal(40, 64)
    packed = quantize(x, kind, **settings)
    off = kernels.unpack(packed).astype(np.float64)
    off[3, 7] += 1.01 * half_step(packed)[3, 7]
    assert excess(off, packed) > 0


@pytest.mark.parametrize("kind, error", [("nf4", 0.072798), ("fp4", 0.096543)])
def test_the_mean_error_of_a_normal_distribution_is_the_known_one(kind, error):
    """Block 64, of N(0, 1): what bitsandbytes' own tests hold it to."""
    x = normal(2048, 2048)
    mean = np.abs(kernels.unpack(quantize(x, kind, double_quant=False)) - x).mean()
    assert abs(mean - error) < 0.00015


def test_the_table_in_the_docs_is_what_is_measured():
    """Every figure, to its last digit (one more or less: another seed)."""
    page = (Path(__file__).parent.parent / "docs/quantization.md").read_text()
    rows = re.findall(r"^\| `(\w+)`(, plain scales)? \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) % \|", page, re.M)
    assert len(rows) == 5
    x, w = normal(256, 2048, seed=1), normal(2048, 2048)
    for kind, plain, *figures in rows:
        packed = quantize(w, kind, double_quant=not plain)
        off = np.abs(kernels.unpack(packed) - w)
        measured = packed.nbytes / packed.size, off.mean(), off.max(), 100 * output_error(x, w, packed)
        for figure, value in zip(figures, measured, strict=True):
            digit = 10.0 ** -len(figure.partition(".")[2])
            assert abs(float(figure) - value) < 1.01 * digit, (kind, plain, figure, value)


def test_a_layers_output_error_is_that_of_its_weights():
    """Of independent weights: the error of a sum of K terms is, relative to the sum, what the terms' is."""
    x, w = normal(64, 1024, seed=1), normal(512, 1024, scale=0.02)
    for kind, settings in FORMS:
        packed = quantize(w, kind, **settings)
        off = kernels.unpack(packed) - w
        of_the_weights = np.linalg.norm(off) / np.linalg.norm(w)
        assert abs(output_error(x, w, packed) / of_the_weights - 1) < 0.05
    assert output_error(x, w, quantize(w, "bfloat16")) < 2.0**-8


# Formats of others


def test_q8_0_is_ggufs_where_rows_are_whole_blocks():
    w = normal(30, 96) * F32(10) ** np.random.default_rng(1).integers(-6, 4, (30, 1)).astype(F32)
    np.testing.assert_array_equal(kernels.unpack(quantize(w, "q8_0")), dequantize_q8_0(quantize_q8_0(w)))


def test_bfloat16_that_was_bfloat16_is_the_same():
    w = normal(17, 23).astype(ml_dtypes.bfloat16)
    packed = quantize(w, "bfloat16")
    np.testing.assert_array_equal(packed.codes, w.reshape(-1).view(np.uint16))
    np.testing.assert_array_equal(kernels.unpack(packed), w.astype(F32))


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16, ">f4"])
def test_any_float_type_and_layout_is_quantized_as_its_float32(dtype):
    w = normal(40, 60).astype(dtype)
    for view in (w, w.T, w[::2, 1::3], w[:, ::-1]):
        for kind, settings in FORMS:
            assert bits(quantize(view, kind, **settings)) == bits(quantize(np.array(view, F32), kind, **settings))


# Refused


@every_form
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_by_name(kind, settings, value):
    w = normal(3, 70)
    w[2, 69] = value
    with pytest.raises(QuantizeError, match=f"up_proj: has values that are not finite; {kind} cannot hold them"):
        quantize(w, kind, name="up_proj", **settings)


def test_what_a_kind_cannot_hold_is_refused():
    w = np.full((1, 4), 8.4e6, F32)
    with pytest.raises(QuantizeError, match=r"has 8.4e\+06; q8_0 ends at 8.31901e\+06"):
        quantize(w, "q8_0")
    with pytest.raises(QuantizeError, match=r"has 3.4e\+38; bfloat16 ends at"):
        quantize(np.full((1, 4), 3.4e38, F32), "bfloat16")
    quantize(np.full((1, 4), 3.4e38, F32), "nf4")
    with pytest.raises(QuantizeError, match=r"w: 2 scales up to 3.4e\+38 add up to more than float32 holds; double_"):
        quantize(np.full((2, 64), 3.4e38, F32), "nf4", name="w")
    quantize(np.full((2, 64), 3.4e38, F32), "nf4", double_quant=False)


@pytest.mark.parametrize("w, kind, settings, message", [
    (np.ones((2, 2), F32), "nf3", {}, "kind = 'nf3': wanted one of nf4, fp4, q8_0, bfloat16"),
    (np.ones((2, 2), F32), "nf4", {"block": 48}, "block = 48: wanted one of 32, 64"),
    (np.ones((2, 2), np.int8), "nf4", {}, r"wanted floats of shape \(O, I\), got int8 \(2, 2\)"),
    (np.ones(4, F32), "nf4", {}, r"got float32 \(4,\)"),
])  # fmt: skip
def test_what_cannot_be_quantized_is_refused(w, kind, settings, message):
    with pytest.raises(ValueError, match=message):
        quantize(w, kind, **settings)


# Memory


@every_form
def test_quantizing_takes_the_result_and_a_piece(kind, settings):
    w = normal(1000, 8000).astype(ml_dtypes.bfloat16)  # 16 MB; 32 as float32
    quantize(w[:1], kind, **settings)
    tracemalloc.start()
    packed = quantize(w, kind, **settings)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < packed.nbytes + 4 * 2**20 * 3, "a piece is 4 MB of float32: read, checked, and its codes"


# bitsandbytes' layout


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("settings", [{"double_quant": False}, {}, {"block": 4096}])
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (64, 300)])
def test_what_is_written_in_bitsandbytes_layout_is_read_byte_for_byte(kind, settings, shape):
    packed = quantize(normal(*shape), kind, **settings)
    for dtype in ("float32", "bfloat16", "float16"):
        arrays = bitsandbytes.parts("a.weight", packed, dtype=dtype)
        stored = bitsandbytes.read("a.weight", arrays, shape, "file")
        assert bits(stored.packed) == bits(packed) and stored.dtype == dtype
        again = bitsandbytes.parts("a.weight", stored.packed, dtype=stored.dtype)
        assert {name: x.tobytes() for name, x in again.items()} == {name: x.tobytes() for name, x in arrays.items()}
        assert not any(np.shares_memory(x, y) for x, y in zip(arrays.values(), again.values(), strict=True)
                       if x is not TABLES[kind])  # fmt: skip


@pytest.mark.parametrize("dtype", [np.int8, np.uint16, np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_bytes_stored_as_another_type_are_the_same_bytes(dtype):
    packed = quantize(normal(4, 64), "nf4")
    arrays = bitsandbytes.parts("a.weight", packed)
    arrays["a.weight"] = arrays["a.weight"].reshape(-1).view(dtype)[:, None]
    assert bits(bitsandbytes.read("a.weight", arrays, (4, 64), "file").packed) == bits(packed)


def test_the_parts_of_a_checkpoint_are_found_by_name():
    names = [*bitsandbytes.parts("a.b.weight", quantize(normal(2, 64), "fp4")), "a.b.bias", "absmax", "x.absmax",
             "c.weight", "c.weight.quant_state.bitsandbytes__nf5"]  # fmt: skip
    found = bitsandbytes.parts_of(names)
    assert found.keys() == {"a.b.weight"}
    assert sorted(found["a.b.weight"]) == ["absmax", "nested_absmax", "nested_quant_map", "quant_map",
                                           "quant_state.bitsandbytes__fp4"]  # fmt: skip


def broken(changes=(), state=None, raw=None):
    """The message about a weight with some parts changed (None: taken away), or keys of its JSON."""
    arrays = bitsandbytes.parts("a.weight", quantize(normal(4, 64), "nf4"))
    key = "a.weight.quant_state.bitsandbytes__nf4"
    if state is not None:
        values = json.loads(arrays[key].tobytes()) | state
        raw = json.dumps({name: value for name, value in values.items() if value is not ...}).encode()
    if raw is not None:
        arrays[key] = np.frombuffer(raw, np.uint8)
    arrays |= {f"a.weight{name}": x for name, x in dict(changes).items()}
    arrays = {name: x for name, x in arrays.items() if x is not None}
    with pytest.raises(FormatError) as error:
        bitsandbytes.read("a.weight", arrays, (4, 64), "model")
    message = str(error.value)
    assert message.startswith("model: a.weight: as bitsandbytes stores it: ")
    return message


@pytest.mark.parametrize("changes, message", [
    ({".absmax": None}, "absmax is missing"),
    ({".nested_quant_map": None, ".quant_map": None}, "quant_map is missing; nested_quant_map is missing"),
    ({".absmax": np.zeros(5, np.uint8)}, r"absmax is uint8 (5,), wanted uint8 (4,)"),
    ({".absmax": np.zeros(4, F32)}, r"absmax is float32 (4,), wanted uint8 (4,)"),
    ({".nested_absmax": np.full(1, np.nan, F32)}, "nested_absmax has values that are not finite"),
    ({".nested_quant_map": np.zeros(255, F32)}, "nested_quant_map is float32 (255,), wanted float32 (256,)"),
    ({".quant_map": TABLES["fp4"]}, "quant_map is not the table of nf4"),
    ({"": np.zeros((127, 1), np.uint8)}, "the weight has 127 bytes, (4, 64) in 4 bits has 128"),
    ({".quant_state.bitsandbytes__fp4": np.zeros(3, np.uint8)}, "has 2 quant_states, wanted one"),
    ({".quant_state.bitsandbytes__nf4": None}, "has 0 quant_states, wanted one"),
    ({".quant_state.bitsandbytes__nf4": np.zeros(3, F32)}, "wanted bytes of JSON"),
    ({".quant_state.bitsandbytes__nf4": np.full(10_001, 32, np.uint8)}, "at most 10,000"),
])  # fmt: skip
def test_wrong_parts_are_named(changes, message):
    assert message in broken(changes)


@pytest.mark.parametrize("state, message", [
    ({"quant_type": "fp4"}, "quant_type = 'fp4', wanted nf4"),
    ({"blocksize": 63}, "blocksize = 63, wanted 32 or 64"),
    ({"blocksize": 64.0}, "blocksize = 64.0"),
    ({"blocksize": True}, "blocksize = True"),
    ({"blocksize": 32}, "absmax is uint8 (4,), wanted uint8 (8,)"),
    ({"dtype": "float64"}, "dtype = 'float64', wanted float32 or bfloat16 or float16"),
    ({"shape": [64, 4]}, "shape = [64, 4], wanted [4, 64]"),
    ({"shape": [4.0, 64]}, "shape = [4.0, 64]"),
    ({"shape": None}, "shape = None"),
    ({"nested_blocksize": 0}, "nested_blocksize = 0"),
    ({"nested_dtype": "float16"}, "nested_dtype = 'float16', wanted float32"),
    ({"nested_offset": "0"}, "nested_offset = '0'"),
    ({"nested_offset": 1e300}, "nested_offset = 1e+300, wanted a number that float32 holds"),
    ({"nested_offset": ...}, "quant_state has the keys"),
    ({"nested_offset": ..., "nested_dtype": ..., "nested_blocksize": ...}, "nested_absmax is there, though"),
    ({"x": 1}, "quant_state has the keys"),
])  # fmt: skip
def test_wrong_keys_of_the_json_are_named(state, message):
    assert message in broken(state=state)


@pytest.mark.parametrize("raw", [b"[]", b"nothing", b"\xff", b"{", b'{"blocksize": NaN}', b'{"a": 1, "a": 1}'])
def test_what_is_no_json_is_refused(raw):
    assert "quant_state.bitsandbytes__nf4" in broken(raw=raw)


def test_every_problem_is_told_at_once():
    message = broken({".absmax": None}, {"blocksize": 1, "dtype": "int8"})
    assert "blocksize = 1" in message and "dtype = 'int8'" in message


def test_only_four_bits_of_bitsandbytes_are_a_known_quantization():
    good = bitsandbytes.config("nf4", double_quant=True, dtype="bfloat16")
    assert bitsandbytes.is_config(good) and bitsandbytes.kind_of(good, "config") == "nf4"
    for change in ({"load_in_4bit": False}, {"load_in_8bit": True}, {"quant_method": "gptq"}, {"quant_method": None}):
        assert not bitsandbytes.is_config(good | change)
    assert not bitsandbytes.is_config(None) and not bitsandbytes.is_config([])
    assert bitsandbytes.kind_of({}, "config") == "fp4", "transformers' own default"
    with pytest.raises(FormatError, match="config: bnb_4bit_quant_type = 'int4': wanted nf4 or fp4"):
        bitsandbytes.kind_of({"bnb_4bit_quant_type": "int4"}, "config")


def test_the_kinds_are_those_of_the_kernels():
    assert {kind for kind, _ in FORMS} == set(KINDS)
