"""GGUF against the gguf package and transformers: same bits of every type, every key read back, the same model."""

import itertools

import numpy as np
import pytest

gguf = pytest.importorskip("gguf", reason="make test-peers installs gguf")
torch = pytest.importorskip("torch", reason="make test-peers installs PyTorch")
transformers = pytest.importorskip("transformers", reason="make test-peers installs transformers")

from entrenar import random  # noqa: E402
from entrenar.convert import interleave  # noqa: E402
from entrenar.convert.gguf import KINDS, export_gguf  # noqa: E402
from entrenar.convert.vocabulary import NORMAL, read_vocabulary  # noqa: E402
from entrenar.data import load_tokenizer, train_bpe  # noqa: E402
from entrenar.formats.gguf import GGUF, SCALARS, TYPES, dequantize_q8_0, quantize_q8_0  # noqa: E402
from entrenar.llama import Llama, LlamaConfig, generate  # noqa: E402

pytestmark = pytest.mark.peers

BASE = dict(vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=128, rms_norm_eps=1e-5, initializer_range=0.15)  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
MODELS = {
    "multi-head": {},
    "grouped": {"num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "own head_dim": {"head_dim": 32, "num_key_value_heads": 1},
    "llama3 rope": {"rope_scaling": LLAMA3, "rope_theta": 500000.0},
    "biases": {"attention_bias": True, "mlp_bias": True},
}


def model_of(changes):
    random.seed(3)
    model, rng = Llama(LlamaConfig(**(BASE | changes))), np.random.default_rng(0)
    for weight in model.state_dict().values():  # norms and biases too: nothing may hide behind ones and zeros
        weight += (0.05 * rng.normal(size=weight.shape)).astype(np.float32)
    return model


# The format


def test_every_type_has_the_name_and_size_it_has_there():
    theirs = {kind.value: (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    ours = {code: (kind.name, kind.block, kind.nbytes) for code, kind in TYPES.items()}
    assert {code: theirs[code] for code in ours if code in theirs} == ours
    values = {kind.value: kind.name.lower() for kind in gguf.GGUFValueType} | {8: "", 9: ""}
    assert {code: name for code, (name, _) in SCALARS.items()} == {c: n for c, n in values.items() if n}


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e4])
def test_q8_0_has_the_bits_of_the_gguf_package(scale):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(257, 96)) * scale * np.exp(rng.normal(size=(257, 1)))).astype(np.float32)
    x[3] = 0
    x[4, :32] = np.arange(-16, 16) * np.float32(scale)  # exact halves among the quotients
    kind = gguf.GGMLQuantizationType.Q8_0
    ours, theirs = quantize_q8_0(x), gguf.quants.quantize(x, kind)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(dequantize_q8_0(ours), gguf.quants.dequantize(theirs, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_has_the_bits_of_the_gguf_package(tmp_path, kind):
    model = model_of({"num_key_value_heads": 2, "intermediate_size": 100})
    state = model.state_dict()
    reader = gguf.GGUFReader(export_gguf(model, None, tmp_path / "m.gguf", kind=kind))
    assert len(reader.tensors) == len(state)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)  # theirs, not ours
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for key, weight in state.items():
        tensor = tensors[names.get_name(key, try_suffixes=(".weight", ".bias"))]
        assert tensor.shape.tolist() == list(reversed(weight.shape)) and tensor.data_offset % 32 == 0
        weight = interleave(weight, 4 if "q_proj" in key else 2) if "q_proj" in key or "k_proj" in key else weight
        whole = weight.shape[-1] % 32 == 0
        wanted = "F32" if weight.ndim == 1 else "F16" if kind == "q8_0" and not whole else kind.upper()
        assert tensor.tensor_type.name == wanted
        raw = gguf.quants.quantize(np.ascontiguousarray(weight), tensor.tensor_type)
        assert tensor.data.tobytes() == raw.tobytes(), key


def test_every_key_reads_back_there_with_its_type(tmp_path):
    tokenizer = train_bpe(["the cat sat on the mat, the cat sat"] * 20, vocab_size=270)
    path = export_gguf(model_of({"head_dim": 32}), tokenizer, tmp_path / "m.gguf")
    reader, ours = gguf.GGUFReader(path), GGUF(path)
    theirs = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert theirs.keys() == ours.metadata.keys() and len(theirs) > 25
    for name, field in theirs.items():
        wanted = ours.metadata[name]
        assert field.contents() == (wanted.tolist() if isinstance(wanted, np.ndarray) else wanted), name
        assert field.types[-1].name.lower() == ours.header.kinds[name].partition("[")[0] or not field.contents()
    groups = (group for group in vars(gguf.Keys).values() if isinstance(group, type))
    known = set(itertools.chain(*(vars(group).values() for group in groups)))
    for name in theirs:
        assert name in known or name.replace("llama.", "{arch}.", 1) in known, f"{name}: no key of GGUF's"


def test_a_file_the_gguf_package_writes_is_read(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "llama")
    x = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    writer.add_custom_alignment(64)
    writer.add_block_count(7)
    writer.add_token_list(["a", "日"])
    writer.add_array("nested.list", [1, 2, 3])
    writer.add_tensor("plain", x)
    writer.add_tensor("half", x.astype(np.float16))
    for kind in ("BF16", "Q8_0", "Q4_0"):
        code = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(kind, gguf.quants.quantize(x, code), raw_dtype=code)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUF(tmp_path / "theirs.gguf") as file:
        assert file.header.alignment == 64 and file.metadata["llama.block_count"] == 7
        assert file.metadata["tokenizer.ggml.tokens"] == ["a", "日"]
        assert list(file.metadata["nested.list"]) == [1, 2, 3]
        assert file.entries["Q4_0"].shape == (3, 64) and file.entries["Q4_0"].nbytes == 3 * 36
        np.testing.assert_array_equal(file["plain"], x)
        np.testing.assert_array_equal(file["half"], x.astype(np.float16))
        for kind in ("BF16", "Q8_0"):
            code = gguf.GGMLQuantizationType[kind]
            wanted = gguf.quants.dequantize(gguf.quants.quantize(x, code), code)
            np.testing.assert_array_equal(file[kind].astype(np.float32), wanted)


# The model: transformers reads a configuration and weights out of a GGUF file, and turns q and k back itself


def loaded_by_transformers(path):
    """Through the part of transformers that reads GGUF; its from_pretrained(gguf_file=...) wants accelerate as well."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = transformers.LlamaConfig(**load_gguf_checkpoint(path)["config"], attn_implementation="eager")
    model = transformers.LlamaForCausalLM(config)
    tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected and missing == (["lm_head.weight"] if config.tie_word_embeddings else [])
    return model


@pytest.mark.parametrize("name", ["multi-head", "grouped", "tied"])
def test_transformers_computes_the_same_logits_from_the_file(tmp_path, name):
    model = model_of(MODELS[name])
    tokenizer = train_bpe(["the cat sat on the mat, the cat sat"] * 20, vocab_size=270)
    theirs = loaded_by_transformers(export_gguf(model, tokenizer, tmp_path / "m.gguf", kind="f32"))
    ids = np.random.default_rng(0).integers(0, 320, (2, 40))
    with torch.no_grad():
        wanted = theirs(torch.tensor(ids)).logits.numpy()
    np.testing.assert_allclose(model(ids).data, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
    settings = dict(max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    tokens = theirs.generate(torch.tensor([[5, 17, 42]]), **settings)[0, 3:].tolist()
    assert list(generate(model, [5, 17, 42], max_new_tokens=20, temperature=0)) == tokens


# The tokenizer

TEXTS = ["the cat  sat", " on\n\n the mat!", "don't 12345 naïve 日本 🙂", "", "\t\tif x == 3:\r\n"]
CORPUS = ["the cat sat on the mat, don't 123", "naïve café 日本", "    if x == 3:", "return self.value  # text"] * 20


def tokens_of_transformers(path, texts):
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def test_transformers_makes_the_same_tokens_with_our_bpe_from_the_file(tmp_path):
    tokenizer = train_bpe(CORPUS, vocab_size=320)
    path = export_gguf(model_of({}), tokenizer, tmp_path / "m.gguf")
    assert tokens_of_transformers(path, TEXTS) == [tokenizer.encode(text).tolist() for text in TEXTS]


@pytest.fixture(scope="module")
def spm(tmp_path_factory):
    sentencepiece = pytest.importorskip("sentencepiece", reason="make test-peers installs sentencepiece")
    folder = tmp_path_factory.mktemp("spm")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(folder / "tokenizer"), vocab_size=320, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")), folder / "tokenizer.model"


def test_sentencepieces_scores_order_the_tokens_as_its_own_do(spm):
    theirs, file = spm
    ours = read_vocabulary(load_tokenizer(file))
    ids = [i for i in range(len(theirs)) if ours.types[i] == NORMAL and len(theirs.IdToPiece(i)) > 1]
    assert len(ids) > 15 and ours.tokens == [theirs.IdToPiece(i) for i in range(len(theirs))]
    scores = [theirs.GetScore(i) for i in ids]
    assert np.argsort(ours.scores[ids]).tolist() == np.argsort(scores).tolist()
    kinds = [theirs.IsUnknown, theirs.IsControl, theirs.IsByte]
    for i, kind in enumerate(ours.types):
        assert [check(i) for check in kinds] == [kind == code for code in (2, 3, 6)]


def test_merging_by_the_files_scores_gives_sentencepieces_tokens(spm, tmp_path):
    theirs, file = spm
    table = GGUF(export_gguf(model_of({}), load_tokenizer(file), tmp_path / "m.gguf")).metadata
    tokens, scores = table["tokenizer.ggml.tokens"], table["tokenizer.ggml.scores"]
    ids = {token: i for i, token in enumerate(tokens) if table["tokenizer.ggml.token_type"][i] == NORMAL}
    for text in TEXTS:
        parts = list(("\u2581" + text.replace(" ", "\u2581")) if text else "")
        while True:  # as llama.cpp: the best pair first, of equals the leftmost
            pairs = [(-scores[ids[a + b]], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ids]
            if not pairs:
                break
            _, i = min(pairs)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        found = [[ids[p]] if p in ids else [tokens.index(f"<0x{byte:02X}>") for byte in p.encode()] for p in parts]
        assert list(itertools.chain(*found)) == theirs.Encode(text)
