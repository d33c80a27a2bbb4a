"""GGUF: what is written reads back, what is malformed is refused, and a model's export holds what llama.cpp expects."""

import dataclasses
import io
import json
import random
import struct
import tracemalloc

import numpy as np
import pytest

from entrenar.convert import ConvertError, deinterleave, interleave
from entrenar.convert import gguf as convert
from entrenar.convert.gguf import export_gguf, rope_factors
from entrenar.convert.vocabulary import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED, read_vocabulary
from entrenar.data import ByteTokenizer, train_bpe
from entrenar.data.tokenizer_cuts import CL100K, GPT2, QWEN2
from entrenar.formats import FormatError, gguf_writer
from entrenar.formats.gguf import GGUF, dequantize_q8_0, quantize_q8_0, read_header
from entrenar.formats.gguf_writer import Tensor, write_gguf
from entrenar.llama import Llama, LlamaConfig
from entrenar.llama.model import rope_frequencies

RNG = np.random.default_rng(0)


def written(tmp_path, metadata, tensors=()):
    file = io.BytesIO()
    write_gguf(file, metadata, tensors)
    path = tmp_path / "file.gguf"
    path.write_bytes(file.getvalue())
    return path


def tensor(name, array, dtype):
    return Tensor(name, array.shape, dtype, lambda: array)


# The container


def test_every_type_of_value_reads_back_with_its_name(tmp_path):
    letters = {"uint8": "B", "int8": "b", "uint16": "H", "int16": "h", "uint32": "I", "int32": "i", "float32": "f",
               "uint64": "Q", "int64": "q", "float64": "d"}  # fmt: skip
    metadata = {name: np.dtype(letter).type(7) for name, letter in letters.items()}
    metadata |= {"truth": True, "text": "é日🙂", "empty": "", "whole": 5, "real": 0.5}
    metadata |= {"texts": ["a", "", "ü"], "none": []}
    metadata |= {f"{name}s": np.arange(5, dtype=letter) for name, letter in letters.items()}
    metadata |= {"truths": np.array([True, False])}
    header = read_header(written(tmp_path, metadata))
    for key, value in metadata.items():
        np.testing.assert_array_equal(header.metadata[key], value, err_msg=key)
    for name in letters:
        assert header.kinds[name] == name and header.kinds[f"{name}s"] == f"{name}[5]"
    named = {key: header.kinds[key] for key in ("truth", "text", "whole", "real", "texts", "none", "truths")}
    assert named == {"truth": "bool", "text": "string", "whole": "uint32", "real": "float32", "texts": "string[3]",
                     "none": "string[0]", "truths": "bool[2]"}  # fmt: skip
    assert type(header.metadata["whole"]) is int and type(header.metadata["truth"]) is bool


@pytest.mark.parametrize("key, value", [("a", 2**32), ("a", -1), ("a", 1e300), ("a", None), ("a", [1, 2]),
                                        ("a", np.zeros((2, 2)))])  # fmt: skip
def test_a_value_without_a_type_is_refused_by_name(key, value):
    with pytest.raises(ValueError, match="write_gguf: a = "):
        write_gguf(io.BytesIO(), {key: value}, [])


@pytest.mark.parametrize("chunk", [64, 1 << 20])
def test_tensors_read_back_at_aligned_places(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(gguf_writer, "CHUNK", chunk)
    arrays = {"a": (RNG.normal(size=(3, 5)), "F32"), "b": (RNG.normal(size=7), "F32"),
              "c": (RNG.normal(size=(9, 3)), "F16"), "d": (RNG.normal(size=(2, 2, 3)), "BF16"),
              "e": (RNG.normal(size=(5, 64)), "Q8_0"), "f": (np.zeros((0, 4)), "F32")}  # fmt: skip
    with GGUF(written(tmp_path, {}, [tensor(n, a.astype("f4"), t) for n, (a, t) in arrays.items()])) as file:
        assert list(file.entries) == list(arrays)
        tolerance = {"F32": 0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 1 / 127}
        for name, (array, dtype) in arrays.items():
            entry = file.entries[name]
            assert entry.start % 32 == 0 and entry.shape == array.shape and entry.dtype == dtype
            wanted = array.astype("f4")
            atol = tolerance[dtype] * np.abs(wanted).max(initial=0)
            np.testing.assert_allclose(file[name].astype("f4"), wanted, rtol=0, atol=atol)


def test_a_tensor_is_asked_for_only_when_its_turn_comes():
    file, order = io.BytesIO(), []

    def values(i):
        order.append((i, file.tell()))
        return np.zeros((4, 8), np.float32)

    write_gguf(file, {}, [Tensor(f"t{i}", (4, 8), "F32", lambda i=i: values(i)) for i in range(3)])
    starts = [at for _, at in order]
    assert [i for i, _ in order] == [0, 1, 2] and np.diff(starts).tolist() == [128, 128]


@pytest.mark.parametrize("bad, dtype, message", [
    (np.nan, "F32", "tensor t: has values that are not finite"),
    (np.inf, "Q8_0", "tensor t: has values that are not finite"),
    (65520, "F16", "tensor t: 65520 does not fit F16: float16 ends at 65504; write it as F32"),
    (3.4e38, "BF16", "does not fit BF16"),
    (9e6, "Q8_0", "does not fit Q8_0"),
])  # fmt: skip
def test_values_the_type_cannot_hold_are_refused_by_the_tensors_name(bad, dtype, message):
    array = np.ones((2, 32), np.float32)
    write_gguf(io.BytesIO(), {}, [tensor("t", array, dtype)])
    array[1, 3] = bad
    with pytest.raises(FormatError, match=message):
        write_gguf(io.BytesIO(), {}, [tensor("t", array, dtype)])


@pytest.mark.parametrize("largest, dtype", [(65504, "F16"), (65519, "F16"), (3.38e38, "BF16"), (127 * 65504, "Q8_0")])
def test_the_largest_values_stay_finite(tmp_path, largest, dtype):
    array = np.full((1, 32), largest, np.float32)
    got = GGUF(written(tmp_path, {}, [tensor("t", array, dtype)]))["t"].astype("f4")
    np.testing.assert_allclose(got, array, rtol=0.01)


# Q8_0


def test_q8_0_is_off_by_at_most_half_a_step_and_the_rounding_of_its_scale():
    x = RNG.normal(size=(50, 64)).astype(np.float32) * np.exp(RNG.normal(size=(50, 1)) * 3).astype(np.float32)
    error = np.abs(dequantize_q8_0(quantize_q8_0(x)) - x).reshape(-1, 32)
    step = np.abs(x).reshape(-1, 32).max(axis=1) / 127
    # d is rounded to float16: relative 2^-11, which 127 steps feel as 127 * 2^-11
    assert (error.max(axis=1) <= step * (0.5 + 127 * 2**-11) * 1.001).all()
    assert (error.max(axis=1) > step * 0.3).any()  # and it is no copy


def test_q8_0_rounds_halves_away_from_zero_and_keeps_zeros():
    x = np.zeros((1, 32), np.float32)
    x[0, :5] = [127, 0.5, -0.5, 2.5, -2.5]
    assert quantize_q8_0(x)[0, 2:7].view(np.int8).tolist() == [127, 1, -1, 3, -3]
    assert not quantize_q8_0(np.zeros((1, 32), np.float32)).any()
    assert not dequantize_q8_0(quantize_q8_0(np.full((1, 32), 1e-40, np.float32))).any()


# Hostile files


def string(text):
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def key(name, code, raw):
    return string(name) + struct.pack("<I", code) + raw


def info(name, dims, code, offset):
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, code, offset)


def file_of(keys=(), infos=(), data=b"", *, magic=b"GGUF", version=3, counts=None):
    tensors, values = counts or (len(infos), len(keys))
    head = magic + struct.pack("<IQQ", version, tensors, values) + b"".join(keys) + b"".join(infos)
    return head.ljust(-(-len(head) // 32) * 32, b"\0") + data


def nested(depth):
    return struct.pack("<IQ", 9, 1) * (depth - 1) + struct.pack("<IQI", 4, 1, 7)


HOSTILE = {
    "empty": (b"", "0 bytes are no GGUF file"),
    "other magic": (file_of(magic=b"GGML"), "begins with b'GGML'"),
    "version 1": (file_of(version=1), "GGUF version 1; versions 2 and 3 are read"),
    "big-endian": (file_of(version=3 << 24), "big-endian"),
    "more tensors than bytes": (file_of(counts=(2**60, 0)), "cannot lie in the"),
    "more keys than bytes": (file_of(counts=(0, 2**64 - 1)), "cannot lie in the"),
    "key longer than the file": (file_of([struct.pack("<Q", 60000) + bytes(9)]), "ends inside a key: 60,000 bytes"),
    "key longer than allowed": (file_of([struct.pack("<Q", 2**63) + bytes(99)]), "at most 65,535 are allowed"),
    "key is no text": (file_of([key(b"\xff\xfe", 4, bytes(4))]), "a key is not UTF-8"),
    "key twice": (file_of([key("a", 4, bytes(4))] * 2), "the key 'a' is there twice"),
    "unknown type of value": (file_of([key("a", 13, bytes(9))]), "the key 'a' has type 13"),
    "huge text": (file_of([key("a", 8, struct.pack("<Q", 2**62))]), "the file ends inside the key 'a'"),
    "array of unknown type": (file_of([key("a", 9, struct.pack("<IQ", 99, 1))]), "the key 'a' is an array of type 99"),
    "huge array": (file_of([key("a", 9, struct.pack("<IQ", 12, 2**61))]), "items of the key 'a' cannot lie"),
    "huge array of texts": (file_of([key("a", 9, struct.pack("<IQ", 8, 2**40))]), "items of the key 'a' cannot lie"),
    "many texts": (file_of([key("a", 9, struct.pack("<IQ", 8, 2**20 + 1) + bytes(2**23 + 8))]), "more than the 1,048"),
    "many arrays": (file_of([key("a", 9, struct.pack("<IQ", 9, 4097) + bytes(12 * 4097))]), "more than the 1,048,576"),
    "text in an array cut": (file_of([key("a", 9, struct.pack("<IQ2Q", 8, 2, 0, 99))]),
                             "ends inside the key 'a': 99 bytes wanted"),
    "text in an array is none": (file_of([key("a", 9, struct.pack("<IQ", 8, 1) + string(b"\xff"))]), "is not UTF-8"),
    "long key": (file_of([key("a" * 60000, 13, bytes(9))]), r"the key 'a{96}\.\.\. has type 13"),
    "deep nesting": (file_of([key("a", 9, nested(5))]), "more than 4 deep"),
    "truth value 2": (file_of([key("a", 7, b"\2")], data=bytes(8)), "the key 'a' is 2; wanted 0"),
    "truth value 2 in an array": (file_of([key("a", 9, struct.pack("<IQ", 7, 1) + b"\2")]), "neither 0 nor 1"),
    "alignment 0": (file_of([key("general.alignment", 4, struct.pack("<I", 0))]), "general.alignment = 0"),
    "alignment 48": (file_of([key("general.alignment", 4, struct.pack("<I", 48))]), "general.alignment = 48"),
    "alignment a text": (file_of([key("general.alignment", 8, string("32"))]), "general.alignment = '32' .string."),
    "name too long": (file_of(infos=[info("n" * 65, (4,), 0, 0)], data=bytes(16)), "at most 64 are allowed"),
    "five dimensions": (file_of(infos=[info("t", (1,) * 5, 0, 0)], data=bytes(4)), "5 dimensions; at most 4"),
    "dimensions overflow": (file_of(infos=[info("t", (2**63, 2**63, 4), 0, 0)], data=bytes(64)), "would end at byte"),
    "unknown tensor type": (file_of(infos=[info("t", (4,), 5, 0)], data=bytes(16)), "'t' has the unknown type 5"),
    "rows are no blocks": (file_of(infos=[info("t", (33,), 8, 0)], data=bytes(64)), "rows of 33; Q8_0 stores blocks"),
    "offset not aligned": (file_of(infos=[info("t", (4,), 0, 16)], data=bytes(64)), "offset 16, which 32 does not"),
    "beyond the end": (file_of(infos=[info("t", (4,), 0, 32)], data=bytes(32)), "would end at byte"),
    "offset overflows": (file_of(infos=[info("t", (4,), 0, 2**64 - 32)], data=bytes(32)), "would end at byte"),
    "tensor twice": (file_of(infos=[info("t", (4,), 0, 0)] * 2, data=bytes(32)), "tensor 't' is there twice"),
    "overlap": (file_of(infos=[info("t", (16,), 0, 0), info("u", (4,), 0, 32)], data=bytes(64)), "'t' and 'u' overlap"),
}  # fmt: skip


@pytest.mark.parametrize("raw, message", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_malformed_file_is_refused_with_its_name_and_place(tmp_path, raw, message):
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    with pytest.raises(FormatError, match=message) as refusal:
        GGUF(path)
    assert str(path) in str(refusal.value)


def test_the_pieces_of_the_hostile_files_make_a_good_one(tmp_path):
    path = tmp_path / "good.gguf"
    keys = [key("a", 9, nested(2)), key("general.alignment", 4, struct.pack("<I", 64)), key("b", 7, b"\1")]
    head = file_of(keys, [info("t", (4,), 0, 0)])
    path.write_bytes(head.ljust(-(-len(head) // 64) * 64, b"\0") + np.arange(4, dtype="<f4").tobytes())
    with GGUF(path) as file:
        assert file["t"].tolist() == [0, 1, 2, 3] and file.metadata["a"][0].tolist() == [7]
        assert file.header.kinds["a"] == "array[1]" and file.header.alignment == 64


def small_file(tmp_path):
    metadata = {"a": 1, "names": ["x", "yy"], "numbers": np.arange(3, dtype=np.float32), "text": "hello", "yes": True}
    tensors = [tensor("t", np.ones((2, 32), np.float32), "Q8_0"), tensor("u", np.ones(3), "F32")]
    return written(tmp_path, metadata, tensors)


def test_a_file_cut_at_any_byte_is_refused(tmp_path):
    path = small_file(tmp_path)
    raw = path.read_bytes()
    last = max(entry.end for entry in read_header(path).entries.values())
    for length in range(last):
        path.write_bytes(raw[:length])
        with pytest.raises(FormatError):
            GGUF(path)


def test_changed_bytes_give_a_refusal_or_another_file_but_nothing_else(tmp_path):
    path, dice = small_file(tmp_path), random.Random(0)
    raw, refused = path.read_bytes(), 0
    for _ in range(600):
        changed = bytearray(raw)
        for _ in range(dice.randint(1, 4)):
            changed[dice.randrange(len(raw))] = dice.choice([0, 1, 255, 127, 128, dice.randrange(256)])
        path.write_bytes(changed)
        try:
            with GGUF(path) as file:
                for name, entry in file.entries.items():
                    assert entry.end <= len(raw)
                    if entry.dtype in ("F32", "F16", "BF16", "Q8_0"):
                        assert file[name].shape == entry.shape
        except FormatError:
            refused += 1
    assert 100 < refused < 600


def test_values_of_other_block_types_are_refused_by_name(tmp_path):
    path = tmp_path / "k.gguf"
    path.write_bytes(file_of(infos=[info("t", (256,), 12, 0)], data=bytes(144)))
    with GGUF(path) as file:
        assert file.entries["t"].nbytes == 144
        with pytest.raises(FormatError, match="t is stored as Q4_K"):
            file["t"]


# A model


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
BASE = LlamaConfig(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                   num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5)  # fmt: skip


def model_of(**changes):
    return Llama(dataclasses.replace(BASE, **changes))


class Saved:
    """As much of a tokenizer as an export asks for: what `save` writes, and three numbers."""

    kind = "bpe"

    def __init__(self, values, *, begin_id=None, end_id=0, settings=None):
        self.values, self.settings = values, settings or {}
        self.begin_id, self.end_id = begin_id, end_id

    def save(self, folder):
        (folder / "tokenizer.json").write_text(json.dumps(self.values), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(self.settings), encoding="utf-8")


def test_interleave_puts_the_pairs_of_rope_side_by_side_and_deinterleave_undoes_it():
    w = np.arange(16)[:, None]  # two heads of 8: pairs (0, 4), (1, 5), ...
    assert interleave(w, 2)[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    np.testing.assert_array_equal(deinterleave(interleave(w, 2), 2), w)


@pytest.mark.parametrize("kind", convert.KINDS)
def test_every_weight_is_in_the_file_under_llama_cpps_name(tmp_path, kind):
    model = model_of(attention_bias=True, mlp_bias=True)
    for weight in model.state_dict().values():  # norms and biases too: nothing may hide behind ones and zeros
        weight += RNG.normal(size=weight.shape).astype("f4") * 0.1
    with GGUF(export_gguf(model, None, tmp_path / "m.gguf", kind=kind)) as file:
        assert len(file.entries) == len(model.state_dict())
        state, rest = model.state_dict(), "model.layers.1.self_attn."
        pairs = {"token_embd.weight": state["model.embed_tokens.weight"], "output.weight": state["lm_head.weight"],
                 "output_norm.weight": state["model.norm.weight"],
                 "blk.1.attn_q.weight": interleave(state[rest + "q_proj.weight"], 4),
                 "blk.1.attn_q.bias": interleave(state[rest + "q_proj.bias"], 4),
                 "blk.1.attn_k.weight": interleave(state[rest + "k_proj.weight"], 2),
                 "blk.1.attn_v.weight": state[rest + "v_proj.weight"],
                 "blk.1.attn_output.bias": state[rest + "o_proj.bias"],
                 "blk.0.ffn_down.weight": state["model.layers.0.mlp.down_proj.weight"],
                 "blk.0.ffn_norm.weight": state["model.layers.0.post_attention_layernorm.weight"]}  # fmt: skip
        for name, wanted in pairs.items():
            assert file.entries[name].dtype == ("F32" if wanted.ndim == 1 else convert.KINDS[kind][0])
            tolerance = 0 if wanted.ndim == 1 or kind == "f32" else np.abs(wanted).max() / 120
            np.testing.assert_allclose(file[name].astype("f4"), wanted, rtol=0, atol=tolerance, err_msg=name)
        assert file.metadata["general.file_type"] == convert.KINDS[kind][1]


def test_the_keys_say_what_the_model_is(tmp_path):
    keys = read_header(export_gguf(model_of(), None, tmp_path / "my model.gguf")).metadata
    wanted = {"general.architecture": "llama", "general.name": "my model", "llama.vocab_size": 300,
              "llama.context_length": 64, "llama.embedding_length": 64, "llama.block_count": 2,
              "llama.feed_forward_length": 96, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
              "llama.rope.dimension_count": 16, "llama.rope.freq_base": 10000.0}  # fmt: skip
    assert {key: keys[key] for key in wanted} == wanted
    assert keys["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert "llama.attention.key_length" not in keys and "tokenizer.ggml.model" not in keys


def test_a_head_dim_of_its_own_is_said(tmp_path):
    keys = read_header(export_gguf(model_of(head_dim=32), None, tmp_path / "m.gguf")).metadata
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        assert keys[f"llama.{key}"] == 32


def test_a_tied_head_is_left_out_and_llama3_rope_adds_its_factors(tmp_path):
    model = model_of(tie_word_embeddings=True, rope_scaling=LLAMA3)
    with GGUF(export_gguf(model, None, tmp_path / "m.gguf")) as file:
        assert "output.weight" not in file.entries
        assert file.entries["rope_freqs.weight"].dtype == "F32"
        factors = file["rope_freqs.weight"]
    plain = 10000.0 ** (-np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(plain / factors, rope_frequencies(model.config), rtol=1e-6)
    assert factors[0] == 1 and factors[-1] == 8


def test_rope_factors_are_those_of_the_published_formula():
    config = dataclasses.replace(BASE, head_dim=64, rope_theta=500000.0, rope_scaling=LLAMA3)
    for i, factor in enumerate(rope_factors(config)):
        wave = 2 * np.pi * 500000.0 ** (2 * i / 64)
        smooth = (64 / wave - 1) / (4 - 1)
        wanted = 1 if wave < 64 / 4 else 8 if wave > 64 / 1 else 1 / ((1 - smooth) / 8 + smooth)
        assert factor == pytest.approx(wanted, rel=1e-6)


def test_rows_that_are_no_whole_blocks_stay_f16_and_that_is_said(tmp_path):
    said = []
    path = export_gguf(model_of(intermediate_size=100), None, tmp_path / "m.gguf", kind="q8_0", say=said.append)
    kinds = {name: entry.dtype for name, entry in read_header(path).entries.items()}
    assert kinds["blk.0.ffn_down.weight"] == "F16" and kinds["blk.0.ffn_up.weight"] == "Q8_0"
    assert len(said) == 1 and "blk.0.ffn_down.weight" in said[0] and said[0].startswith("2 matrices stay F16")


def test_an_export_needs_no_second_copy_of_the_model(tmp_path):
    model = model_of(vocab_size=20_000, num_hidden_layers=6, hidden_size=128)
    size = sum(weight.nbytes for weight in model.state_dict().values())
    tracemalloc.start()
    export_gguf(model, None, tmp_path / "m.gguf", kind="q8_0")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size > 20e6 and peak < 8 * 4 * gguf_writer.CHUNK  # some copies of one chunk of 1 MB


def test_an_export_that_fails_leaves_nothing_and_an_older_file_alone(tmp_path):
    model = model_of()
    path = export_gguf(model, None, tmp_path / "m.gguf")
    before = path.read_bytes()
    with pytest.raises(FileExistsError):
        export_gguf(model, None, path)
    model.state_dict()["model.norm.weight"][3] = np.nan
    with pytest.raises(FormatError, match="output_norm.weight: has values that are not finite"):
        export_gguf(model, None, path, replace=True)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_an_unknown_kind_is_refused_with_those_there_are(tmp_path):
    with pytest.raises(ConvertError, match="kind = 'q4_k_m': wanted f32, f16, bf16, q8_0"):
        export_gguf(model_of(), None, tmp_path / "m.gguf", kind="q4_k_m")


# Its tokenizer


def test_our_bpe_is_gpt2s_with_its_merges(tmp_path):
    tokenizer = train_bpe(["the cat sat on the mat, the cat sat"] * 20, vocab_size=270)
    keys = read_header(export_gguf(model_of(), tokenizer, tmp_path / "m.gguf")).metadata
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    values = json.loads(tokenizer.inner.to_str())
    tokens = keys["tokenizer.ggml.tokens"]
    assert all(tokens[i] == token for token, i in values["model"]["vocab"].items())
    assert keys["tokenizer.ggml.merges"] == [" ".join(pair) for pair in values["model"]["merges"]]
    types = keys["tokenizer.ggml.token_type"]
    assert types[tokenizer.end_id] == CONTROL and (types == NORMAL).sum() == tokenizer.vocab_size - 1
    assert len(tokens) == 300 and tokens[-1] == "[PAD299]" and types[-1] == UNUSED  # the model has more
    assert keys["tokenizer.ggml.bos_token_id"] == keys["tokenizer.ggml.eos_token_id"] == tokenizer.end_id
    assert keys["tokenizer.ggml.add_bos_token"] is True and keys["tokenizer.ggml.add_eos_token"] is False


def test_bytes_are_a_bpe_without_merges(tmp_path):
    keys = read_header(export_gguf(model_of(vocab_size=257), ByteTokenizer(), tmp_path / "m.gguf")).metadata
    assert keys["tokenizer.ggml.merges"] == [] and keys["tokenizer.ggml.tokens"][256] == "<|endoftext|>"
    assert (keys["tokenizer.ggml.pre"], keys["tokenizer.ggml.eos_token_id"]) == ("gpt-2", 256)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    with pytest.raises(ConvertError, match="has 257 tokens, the model knows 256"):
        export_gguf(model_of(vocab_size=256), ByteTokenizer(), tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def byte_level(pre_tokenizer, **model):
    vocab = {"a": 0, "b": 1, "ab": 2}
    end, yes = {"id": 3, "content": "<|end|>", "special": True}, {"id": 4, "content": "yes", "special": False}
    return Saved({
        "added_tokens": [end, yes], "normalizer": None, "pre_tokenizer": pre_tokenizer,
        "model": {"type": "BPE", "vocab": vocab, "merges": [["a", "b"]]} | model,
    }, end_id=3)  # fmt: skip


def level(use_regex):
    return {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}


def split(regex, **changes):
    step = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False} | changes
    return {"type": "Sequence", "pretokenizers": [step, level(False)]}


DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, level(True)]}


@pytest.mark.parametrize("pre_tokenizer, ignore_merges, wanted", [
    (level(True), False, "gpt-2"), (split(GPT2), False, "gpt-2"), (split(CL100K), True, "llama-bpe"),
    (split(CL100K), False, "smaug-bpe"), (split(QWEN2), False, "qwen2"), (DIGITS, False, "smollm"),
])  # fmt: skip
def test_the_way_text_is_split_gets_llama_cpps_name(pre_tokenizer, ignore_merges, wanted):
    table = read_vocabulary(byte_level(pre_tokenizer, ignore_merges=ignore_merges))
    assert (table.family, table.splitter) == ("gpt2", wanted)
    assert table.types.tolist() == [NORMAL] * 3 + [CONTROL, USER_DEFINED] and table.begin_id is None


@pytest.mark.parametrize("pre_tokenizer, model, message", [
    (split(r"\w+"), {}, r"no name for here \(Split \{'Regex': '\\\\w\+'\}"),
    (split(CL100K, behavior="MergedWithNext"), {}, "no name for"),
    (level(False), {}, "no name for"),
    (level(True), {"ignore_merges": True}, "no name for"),
    (level(True) | {"add_prefix_space": True}, {}, "add_prefix_space"),
    (level(True), {"dropout": 0.1}, "dropout = 0.1"),
    (level(True), {"type": "Unigram"}, "a Unigram model; only BPE"),
])  # fmt: skip
def test_a_byte_level_tokenizer_without_a_name_there_is_refused(pre_tokenizer, model, message):
    with pytest.raises(ConvertError, match=message):
        read_vocabulary(byte_level(pre_tokenizer, **model))


def sentencepiece(**changes):
    """LLaMA 2's layout, with a few merges: ▁ t h e, th, he, ▁t, the, ▁the."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "th", "▁t", "the", "▁the", *"▁the"]
    merges = [["t", "h"], ["▁", "t"], ["th", "e"], ["▁t", "he"], ["▁", "the"]]
    added = [{"id": i, "content": tokens[i], "special": True} for i in range(3)]
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "byte_fallback": True,
             "unk_token": "<unk>", "merges": [pair for pair in merges if "he" not in pair]}  # fmt: skip
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, replace]}
    values = {"added_tokens": added, "normalizer": normalizer, "pre_tokenizer": None, "model": model | changes}
    return Saved(values, begin_id=1, end_id=2, settings={"chat_template": "{{ messages }}", "pad_token": "</s>"})


def test_sentencepieces_bpe_gets_scores_in_the_order_of_its_merges(tmp_path):
    keys = read_header(export_gguf(model_of(), sentencepiece(), tmp_path / "m.gguf")).metadata
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.pre"]) == ("llama", "default")
    tokens, scores, types = (keys[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type"))
    assert [scores[tokens.index(token)] for token in ("th", "▁t", "the", "▁the")] == [0, -1, -2, -3]
    assert (scores[tokens.index("e")] < -1e5) and scores.dtype == np.float32
    assert types[:4].tolist() == [UNKNOWN, CONTROL, CONTROL, BYTE] and types[tokens.index("th")] == NORMAL
    wanted = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "padding_token_id": 2, "add_bos_token": True,
              "add_space_prefix": True}  # fmt: skip
    assert {key: keys[f"tokenizer.ggml.{key}"] for key in wanted} == wanted
    assert keys["tokenizer.chat_template"] == "{{ messages }}"


@pytest.mark.parametrize("changes, message", [
    ({"merges": [["t", "h"], ["th", "e"], ["▁", "t"]]}, "'▁' . 'the' is no merge"),
    ({"merges": [["▁", "the"], ["t", "h"], ["▁", "t"], ["th", "e"], ["▁t", "he"]]}, "'▁the' stand apart"),
    ({"byte_fallback": False}, "neither byte-level nor with bytes"),
])  # fmt: skip
def test_merges_that_scores_cannot_say_are_refused(changes, message):
    read_vocabulary(sentencepiece())
    with pytest.raises(ConvertError, match=message):
        read_vocabulary(sentencepiece(**changes))


def test_a_normalizer_that_does_more_is_refused():
    tokenizer = sentencepiece()
    tokenizer.values["normalizer"]["normalizers"].append({"type": "NFKC"})
    with pytest.raises(ConvertError, match="the normalizer NFKC cannot be said"):
        read_vocabulary(tokenizer)


def test_gaps_between_ids_are_filled_and_no_special_token_is_found_in_them(tmp_path):
    tokenizer = byte_level(level(True))
    tokenizer.values["added_tokens"][1]["id"] = 7
    keys = read_header(export_gguf(model_of(vocab_size=8), tokenizer, tmp_path / "m.gguf")).metadata
    assert keys["tokenizer.ggml.tokens"] == ["a", "b", "ab", "<|end|>", "[PAD4]", "[PAD5]", "[PAD6]", "yes"]
    assert keys["tokenizer.ggml.token_type"].tolist() == [NORMAL] * 3 + [CONTROL] + [UNUSED] * 3 + [USER_DEFINED]
    assert not {"tokenizer.ggml.padding_token_id", "tokenizer.ggml.unknown_token_id"} & keys.keys()


@pytest.mark.parametrize("settings, wanted", [
    ({"chat_template": "one"}, "one"),
    ({"chat_template": [{"name": "tool_use", "template": "two"}, {"name": "default", "template": "three"}]}, "three"),
    ({}, None),
])  # fmt: skip
def test_the_default_chat_template_is_the_one_that_travels(settings, wanted):
    tokenizer = byte_level(level(True))
    tokenizer.settings = settings
    assert read_vocabulary(tokenizer).chat_template == wanted
