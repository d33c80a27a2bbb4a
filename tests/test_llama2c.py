"""llama2.c's files: out and in again the same model, computed the same by its definition, malformed ones refused."""

import dataclasses
import random
import struct

import numpy as np
import pytest

from entrenar.convert import ConvertError, interleave
from entrenar.convert.llama2c import export_llama2c, export_tokenizer, import_llama2c, import_tokenizer, read_header
from entrenar.data import ByteTokenizer, sentencepiece
from entrenar.data.sentencepiece import Piece, SentencePiece
from entrenar.data.tokenizer_subword import SubwordTokenizer
from entrenar.formats import FormatError
from entrenar.llama import Llama, LlamaConfig, generate

RNG = np.random.default_rng(0)
BASE = LlamaConfig(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                   num_key_value_heads=2, max_position_embeddings=24, rms_norm_eps=1e-5,
                   initializer_range=0.15)  # fmt: skip
VERSIONS = [(version, tied) for version in (0, 1) for tied in (False, True)]


def model_of(**changes):
    model = Llama(dataclasses.replace(BASE, **changes))
    for weight in model.state_dict().values():  # norms too: nothing may hide behind ones
        weight += (0.05 * RNG.normal(size=weight.shape)).astype("f4")
    return model


def forward(path, tokens):
    """Logits (T, V) of a version 0 file, as llama2.c computes them: one token after the other, RoPE on (2i, 2i + 1).

    Written from the format's definition alone; float64.
    """
    raw = path.read_bytes()
    C, F, L, H, KH, V, T = struct.unpack_from("<7i", raw)
    shared, V, D = V > 0, abs(V), C // H
    floats = iter(np.split(np.frombuffer(raw, "<f4", offset=28).astype(float), np.cumsum([
        V * C, L * C, L * C * C, L * C * KH * D, L * C * KH * D, L * C * C, L * C, L * F * C, L * F * C, L * F * C, C,
        T * D // 2, T * D // 2])))  # fmt: skip
    shapes = [(V, C), (L, C), (L, C, C), (L, KH * D, C), (L, KH * D, C), (L, C, C), (L, C), (L, F, C), (L, C, F),
              (L, F, C), (C,), (T, D // 2), (T, D // 2)]  # fmt: skip
    emb, att, wq, wk, wv, wo, ffn, w1, w2, w3, last, cos, sin = (next(floats).reshape(shape) for shape in shapes)
    head = emb if shared else next(floats).reshape(V, C)

    def norm(x, weight):
        return weight * x / np.sqrt(np.mean(x * x) + 1e-5)

    def turn(x, t):  # (heads, D)
        a, b = x[:, 0::2], x[:, 1::2]
        return np.stack([a * cos[t] - b * sin[t], a * sin[t] + b * cos[t]], axis=-1).reshape(x.shape)

    keys, values, out = [[] for _ in range(L)], [[] for _ in range(L)], []
    for t, token in enumerate(tokens):
        x = emb[token].copy()
        for i in range(L):
            y = norm(x, att[i])
            q, k = turn((wq[i] @ y).reshape(H, D), t), turn((wk[i] @ y).reshape(KH, D), t)
            keys[i].append(k)
            values[i].append((wv[i] @ y).reshape(KH, D))
            heads = []
            for h in range(H):
                scores = np.array([q[h] @ k[h // (H // KH)] for k in keys[i]]) / np.sqrt(D)
                weights = np.exp(scores - scores.max())
                seen = np.array([v[h // (H // KH)] for v in values[i]])
                heads.append(weights @ seen / weights.sum())
            x += wo[i] @ np.concatenate(heads)
            y = norm(x, ffn[i])
            gate = w1[i] @ y
            x += w2[i] @ (gate / (1 + np.exp(-gate)) * (w3[i] @ y))
        out.append(head @ norm(x, last))
    return np.array(out)


# Out


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4}, {"tie_word_embeddings": True}],
                         ids=["grouped", "multi-head", "tied"])  # fmt: skip
def test_the_file_computes_the_models_logits_by_llama2cs_definition(tmp_path, changes):
    model = model_of(**changes)
    tokens = [1, 7, 33, 2, 59, 7, 7, 12]
    wanted = forward(export_llama2c(model, tmp_path / "m.bin"), tokens)
    np.testing.assert_allclose(model(np.array([tokens])).data[0], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_that_check_notices_rows_left_in_our_order(tmp_path, monkeypatch):
    model, tokens = model_of(), [1, 7, 33, 2]
    monkeypatch.setattr("entrenar.convert.llama2c.interleave", lambda w, heads: w)
    wrong = forward(export_llama2c(model, tmp_path / "m.bin"), tokens)
    assert np.abs(model(np.array([tokens])).data[0] - wrong).max() > 1e-2 * np.abs(wrong).max()


def test_the_header_and_the_first_weights_are_where_run_c_looks(tmp_path):
    model = model_of()
    raw = export_llama2c(model, tmp_path / "m.bin").read_bytes()
    assert struct.unpack_from("<7i", raw) == (32, 48, 2, 4, 2, -60, 24)  # -60: a head of its own
    state = model.state_dict()
    np.testing.assert_array_equal(np.frombuffer(raw, "<f4", 32, 28), state["model.embed_tokens.weight"][0])
    np.testing.assert_array_equal(np.frombuffer(raw, "<f4")[-32:], state["lm_head.weight"][-1])
    raw = export_llama2c(model, tmp_path / "m1.bin", version=1).read_bytes()
    assert raw[:4] == b"24ka" and struct.unpack_from("<8iB", raw, 4) == (1, 32, 48, 2, 4, 2, 60, 24, 0)
    np.testing.assert_array_equal(
        np.frombuffer(raw, "<f4", 32, 256), state["model.layers.0.input_layernorm.weight"]
    )


@pytest.mark.parametrize("changes, message", [
    ({"rms_norm_eps": 1e-6}, "rms_norm_eps = 1e-06: it has 1e-05 built in .train with --model.rms_norm_eps 1e-5"),
    ({"rope_theta": 5e5}, "rope_theta = 500000.0: it has 10000.0 built in"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                       "original_max_position_embeddings": 16}}, "rope_scaling: it has none"),
    ({"head_dim": 16}, "head_dim = 16: it has hidden_size / num_attention_heads = 8 built in"),
    ({"attention_bias": True}, "attention_bias: it has no biases"),
    ({"mlp_bias": True}, "mlp_bias: it has no biases"),
])  # fmt: skip
def test_what_run_c_cannot_compute_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ConvertError, match=message):
        export_llama2c(model_of(**changes), tmp_path / "m.bin")
    assert not list(tmp_path.iterdir())


def test_all_that_run_c_cannot_compute_is_said_at_once(tmp_path):
    with pytest.raises(ConvertError, match="version = 2.*rms_norm_eps.*rope_theta.*mlp_bias"):
        export_llama2c(model_of(rms_norm_eps=1e-6, rope_theta=5e5, mlp_bias=True), tmp_path / "m.bin", version=2)


# Out and in


@pytest.mark.parametrize("version, tied", VERSIONS)
def test_a_model_comes_back_the_same(tmp_path, version, tied):
    model = model_of(tie_word_embeddings=tied)
    back = import_llama2c(export_llama2c(model, tmp_path / "m.bin", version=version))
    assert dataclasses.replace(back.config, initializer_range=0.15) == model.config
    for name, weight in model.state_dict().items():
        np.testing.assert_array_equal(back.state_dict()[name], weight, err_msg=name)
    assert list(generate(back, [1, 2], max_new_tokens=5, temperature=0)) == list(
        generate(model, [1, 2], max_new_tokens=5, temperature=0)
    )
    back.loss(np.array([[1, 2]]), np.array([[2, 3]])).backward()  # and it can be trained
    assert all(parameter.grad is not None for parameter in back.parameters())


def quantized(model, group):
    """A version 2 file, as export.py writes it: int8 and then scales, tensor by tensor."""
    state, config = model.state_dict(), model.config
    H, KH, _ = config.heads
    sizes = (config.hidden_size, config.intermediate_size, config.num_hidden_layers, H, KH, config.vocab_size)
    head = struct.pack("<I8iBi", 0x616B3432, 2, *sizes, config.max_position_embeddings, 0, group).ljust(256, b"\0")
    layers = range(config.num_hidden_layers)
    both = ("input_layernorm", "post_attention_layernorm")
    norms = [state[f"model.layers.{i}.{name}.weight"] for name in both for i in layers]
    parts = [norm.tobytes() for norm in [*norms, state["model.norm.weight"]]]
    names = ["model.embed_tokens.weight"]
    for part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
                 "mlp.down_proj", "mlp.up_proj"):  # fmt: skip
        names += [f"model.layers.{i}.{part}.weight" for i in layers]
    for name in [*names, "lm_head.weight"]:
        w = state[name]
        w = interleave(w, H if "q_proj" in name else KH) if "q_proj" in name or "k_proj" in name else w
        scale = np.abs(w.reshape(-1, group)).max(axis=1, keepdims=True) / np.float32(127)
        parts += [np.round(w.reshape(-1, group) / scale).astype(np.int8).tobytes(), scale.tobytes()]
    return head + b"".join(parts)


def test_int8_weights_come_back_within_half_a_step(tmp_path):
    model, path = model_of(), tmp_path / "m.bin"
    path.write_bytes(quantized(model, 16))
    back = import_llama2c(path).state_dict()
    for name, weight in model.state_dict().items():
        step = 0 if weight.ndim == 1 else np.abs(weight).max() / 127
        np.testing.assert_allclose(back[name], weight, rtol=0, atol=0.51 * step, err_msg=name)


# Hostile files


def changed(raw, at, value):
    return raw[:at] + struct.pack("<i", value) + raw[at + 4 :]


def hostile(raw, v1, v2):
    return {
        "empty": (b"", "0 bytes are no llama2.c file"),
        "header alone": (raw[:28], "a llama2.c file with this header has"),
        "one byte less": (raw[:-1], "a llama2.c file with this header has"),
        "one byte more": (raw + b"\0", "a llama2.c file with this header has"),
        "huge dim": (changed(raw, 0, 2**30), "a llama2.c file with this header has"),
        "negative layers": (changed(raw, 8, -1), "layers = -1"),
        "zero heads": (changed(raw, 12, 0), "heads = 0"),
        "zero vocab": (changed(raw, 20, 0), "vocab = 0"),
        "many layers": (changed(raw, 8, 2**31 - 1), "2,147,483,647 layers; at most 1,024"),
        "heads do not divide": (changed(raw, 12, 5), "heads that divide dim"),
        "kv_heads do not divide": (changed(raw, 16, 3), "kv_heads that divide heads"),
        "a text": (b"hello, this is some text that goes on for a while" * 9, "is no llama2.c file|at most 1,024"),
        "version 3": (changed(v1, 4, 3), "llama2.c version 3; 0, 1 and 2 are read"),
        "cut header": (v1[:200], "ends inside its header of 256 bytes"),
        "shared 7": (v1[:36] + b"\7" + v1[37:], "the flag for a shared head is 7"),
        "group 0": (changed(v2, 37, 0), "groups of 0 values"),
        "group 7": (changed(v2, 37, 7), "groups of 7 do not divide"),
        "not finite": (raw[:28] + struct.pack("<f", np.nan) + raw[32:], "embedding of layer 0 has values that are not"),
    }


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("good"), model_of()
    raw, v1 = (export_llama2c(model, folder / f"{v}.bin", version=v).read_bytes() for v in (0, 1))
    return raw, v1, quantized(model, 16)


@pytest.mark.parametrize("name", hostile(bytes(300), bytes(300), bytes(300)))
def test_a_malformed_file_is_refused_with_its_name(tmp_path, good, name):
    raw, message = hostile(*good)[name]
    path = tmp_path / "bad.bin"
    path.write_bytes(raw)
    with pytest.raises(FormatError, match=message) as refusal:
        import_llama2c(path)
    assert str(path) in str(refusal.value)


def test_changed_header_bytes_give_a_refusal_or_a_model(tmp_path, good):
    path, dice = tmp_path / "m.bin", random.Random(0)
    for _ in range(150):
        raw = bytearray(dice.choice(good))
        raw[dice.randrange(48)] = dice.choice([0, 1, 2, 127, 128, 255])
        path.write_bytes(raw)
        try:
            read_header(path)
        except FormatError:
            pass


# tokenizer.bin


def like_llama2():
    """LLaMA 2's layout, with a handful of merges."""
    pieces = [Piece("<unk>", 0.0, sentencepiece.UNKNOWN)]
    pieces += [Piece(text, 0.0, sentencepiece.CONTROL) for text in ("<s>", "</s>")]
    pieces += [Piece(f"<0x{i:02X}>", 0.0, sentencepiece.BYTE) for i in range(256)]
    texts = ["th", "▁th", "▁▁", "he", "▁the", "▁", "t", "h", "e", "é"]
    pieces += [Piece(text, -float(i)) for i, text in enumerate(texts)]
    table = SentencePiece("test", pieces, model_type=sentencepiece.BPE, byte_fallback=True,
                          remove_extra_whitespaces=False)  # fmt: skip
    return SubwordTokenizer(table.tokenizer(), begin_id=1, end_id=2, unknown="<unk>")


def test_llama2s_tokenizer_is_written_as_tokenizer_bin(tmp_path):
    raw = export_tokenizer(like_llama2(), tmp_path / "tokenizer.bin", vocab_size=270).read_bytes()
    longest, at, pieces, scores = struct.unpack_from("<I", raw)[0], 4, [], []
    while at < len(raw):
        score, length = struct.unpack_from("<fi", raw, at)
        pieces.append(raw[at + 8 : at + 8 + length])
        scores.append(score)
        at += 8 + length
    assert len(pieces) == 270 and longest == max(map(len, pieces))
    assert pieces[:4] == [b"<unk>", b"\n<s>\n", b"\n</s>\n", b"<0x00>"]
    assert pieces[259:-1] == [b"th", b" th", b"  ", b"he", b" the", b" ", b"t", b"h", b"e", "é".encode()]
    assert all(pieces)  # run.c reads no empty ones
    assert scores[259] > scores[260] > scores[261] > scores[262] > -1e10 > scores[269]  # run.c merges above it


def test_a_tokenizer_comes_back_with_the_same_tokens(tmp_path):
    tokenizer = like_llama2()
    back = import_tokenizer(export_tokenizer(tokenizer, tmp_path / "tokenizer.bin", vocab_size=300))
    assert (back.begin_id, back.end_id, back.vocab_size) == (1, 2, tokenizer.vocab_size)
    for text in ("the  the é日\n", "thethehe", " t", "", "<s></s><0x0A>"):
        assert back.encode(text).tolist() == tokenizer.encode(text).tolist()
        assert back.decode(back.encode(text)) == text


def test_a_tokenizer_run_c_cannot_use_is_refused(tmp_path):
    with pytest.raises(ConvertError, match="only use a tokenizer laid out as LLaMA 2's"):
        export_tokenizer(ByteTokenizer(), tmp_path / "tokenizer.bin", vocab_size=257)
    with pytest.raises(ConvertError, match="has 269 tokens, the model knows 260"):
        export_tokenizer(like_llama2(), tmp_path / "tokenizer.bin", vocab_size=260)
    assert not list(tmp_path.iterdir())


def test_a_malformed_tokenizer_bin_is_refused(tmp_path):
    path = export_tokenizer(like_llama2(), tmp_path / "tokenizer.bin", vocab_size=269)
    raw, e = path.read_bytes(), "é".encode()
    cases = [(raw[:length], "does not lie in the file|LLaMA 2's layout") for length in range(0, 3000, 41)]
    cases += [(raw[:-1], "token 268 does not lie in the file"), (raw + b"\0", "token 269 does not lie in the file")]
    cases += [(raw.replace(b"<0x07>", b"<0x08>", 1), "token 10 is '<0x08>'")]
    cases += [(raw.replace(e, b"\xff\xfe"), "token 268 is not UTF-8")]
    cases += [(raw.replace(struct.pack("<fi", -1, 3), struct.pack("<fi", np.nan, 3)), "with score nan")]
    cases += [(raw.replace(struct.pack("<fi", -1, 3), struct.pack("<fi", -1, 2**31 - 1)), "does not lie in the file")]
    for broken, message in cases:
        path.write_bytes(broken)
        with pytest.raises(FormatError, match=message):
            import_tokenizer(path)
