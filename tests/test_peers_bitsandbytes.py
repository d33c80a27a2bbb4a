"""Storage formats against bitsandbytes, transformers and PyTorch: the same bits, and folders that go both ways."""

import json

import numpy as np
import pytest
import quant_vectors

torch = pytest.importorskip("torch", reason="make test-peers installs PyTorch")
transformers = pytest.importorskip("transformers", reason="make test-peers installs transformers")
pytest.importorskip("bitsandbytes", reason="make test-peers installs bitsandbytes")
from bitsandbytes import functional, nn  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from entrenar import kernels, random  # noqa: E402
from entrenar.formats.safetensors import SafeTensors  # noqa: E402
from entrenar.kernels.packed import FP4, NF4  # noqa: E402
from entrenar.llama import Llama, LlamaConfig  # noqa: E402
from entrenar.llama.quantizing import quantize_folder  # noqa: E402
from entrenar.quant import bitsandbytes, quantize  # noqa: E402
from entrenar.quant.nested import dynamic_map, nest, torch_mean, torch_sum  # noqa: E402

pytestmark = pytest.mark.peers
F32 = np.float32
EPS = float(np.finfo(F32).eps)
MANY_PARTS = 32768  # numbers from which PyTorch sums in as many parts as it has threads


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def absmax_like(n, seed=0):
    """Numbers as scales are: the greatest of 64, around 0.05."""
    return np.abs(np.random.default_rng(seed).standard_normal(n) * 0.01 + 0.05).astype(F32)


# Bits


def test_tables_are_those_of_bitsandbytes():
    for kind, table in (("nf4", NF4), ("fp4", FP4)):
        assert functional.get_4bit_type(kind, device="cpu").numpy().tobytes() == table.tobytes()
    np.testing.assert_array_equal(functional.create_dynamic_map().numpy(), dynamic_map())


def test_the_stored_vectors_are_those_of_the_installed_bitsandbytes():
    for case in json.loads(quant_vectors.FILE.read_text())["cases"]:
        if tuple(case["shape"]) in quant_vectors.SMALL:
            arrays = quant_vectors.by_bitsandbytes(case, quant_vectors.matrix(*case["shape"]))
            assert {name: quant_vectors.told(array) for name, array in arrays.items()} == case["arrays"]


def same_bits(w, kind, nested, block):
    """Names of the arrays in which we differ from bitsandbytes."""
    case = {"kind": kind, "double_quant": nested, "block": block}
    theirs = quant_vectors.by_bitsandbytes(case, w)
    ours = bitsandbytes.parts("weight", quantize(w, kind, block=block, double_quant=nested))
    assert ours.keys() == theirs.keys()
    return [name for name in ours if quant_vectors.told(ours[name]) != quant_vectors.told(theirs[name])]


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_random_matrices_have_bitsandbytes_bits(kind, nested, one_thread):
    rng = np.random.default_rng(0)
    for O, I in ((1, 1), (2, 3), (1, 64), (7, 65), (33, 97), (100, 640), (257, 515), (768, 768), (2048, 2048)):
        w = (rng.standard_normal((O, I)) * np.exp(rng.standard_normal((O, 1)))).astype(F32)
        w[rng.random((O, I)) < 0.05] = 0
        for scale in (1, 1e-3, 1e-38, 1e30):
            for block in (64,) if O * I > 10**5 else (32, 64, 4096):
                assert same_bits(w * F32(scale), kind, nested, block) == []


def test_bfloat16_and_float16_are_quantized_as_their_float32(one_thread):
    w = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.bfloat16, torch.float16):
        codes, state = functional.quantize_4bit(w.to(dtype), quant_type="nf4", compress_statistics=True)
        ours = quantize(w.to(dtype).float().numpy(), "nf4")
        np.testing.assert_array_equal(ours.codes, codes.numpy()[:, 0])
        np.testing.assert_array_equal(ours.scales.codes, state.absmax.numpy())
        parts = bitsandbytes.parts("w", ours, dtype=str(dtype).removeprefix("torch."))
        theirs = state.as_dict(packed=True)["quant_state.bitsandbytes__nf4"].numpy()
        assert parts["w.quant_state.bitsandbytes__nf4"].tobytes() == theirs.tobytes()


def test_sums_and_means_have_pytorchs_bits(one_thread):
    """One thread of any processor: lengths around every boundary of its order, and those of real layers."""
    around = [n + d for n in (8, 32, 512, 8192, 131_072, 262_144) for d in (-1, 0, 1, 7, 33)]
    layers = [O * I // 64 for O, I in ((768, 768), (2048, 5632), (4096, 4096), (4096, 11008), (14336, 4096))]
    for n in (*range(1, 300), *around, *layers):
        x = absmax_like(n, n)
        assert torch.from_numpy(x).sum().item() == torch_sum(x), n
        assert torch.from_numpy(x).mean().item() == torch_mean(x), n


def test_short_sums_do_not_depend_on_pytorchs_threads():
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            for n in (100, 9216, MANY_PARTS - 1):
                assert torch.from_numpy(absmax_like(n)).sum().item() == torch_sum(absmax_like(n))
    finally:
        torch.set_num_threads(before)


def test_long_sums_of_several_threads_differ_in_the_last_bits_only():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for n in (MANY_PARTS, 176_128, 704_512):
            x = absmax_like(n)
            theirs = torch.from_numpy(x).mean().item()
            assert abs(theirs - torch_mean(x)) <= 4 * EPS * theirs
    finally:
        torch.set_num_threads(before)


def test_8_bit_codes_are_those_of_bitsandbytes_on_a_cpu(one_thread):
    for n in (1, 255, 256, 257, 5000, 200_000):
        scales = absmax_like(n)
        codes, state = functional.quantize_blockwise(torch.from_numpy(scales - torch_mean(scales)), blocksize=256)
        made = nest(scales)
        np.testing.assert_array_equal(made.codes, codes.numpy())
        np.testing.assert_array_equal(made.absmax, state.absmax.numpy())


def test_8_bit_codes_by_comparison_are_neighbours_and_hardly_worse(one_thread):
    """What bitsandbytes does on a GPU, and quant/nested.py says of it."""
    scales = absmax_like(500_000)
    made, table = nest(scales), dynamic_map()
    absmax = np.repeat(made.absmax, 256)[: scales.size]
    exact = np.searchsorted((table[:-1] + table[1:]) / 2, (scales - F32(made.offset)) * (1 / absmax), side="left")
    steps = np.abs(exact - made.codes.astype(int))
    assert (steps > 0).mean() < 0.003
    x = (scales - F32(made.offset)) / absmax
    further = np.abs(table[made.codes] - x) - np.abs(table[exact] - x)
    assert further.max() <= 3.1e-5, "the place looked up is at most half of 2/65535 away, from either side"


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_decoded_weights_have_bitsandbytes_bits(kind, nested, one_thread):
    """Rows that 16 divides and 64 does not are left out: bitsandbytes 0.50.2 gives them other blocks' scales on
    processors with AVX-512 (dequantizeBlockwise4bitCpu counts whole blocks to a row)."""
    for shape in ((64, 128), (768, 768), (3, 50), (33, 150)):
        w = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
        codes, state = functional.quantize_4bit(w, quant_type=kind, compress_statistics=nested)
        theirs = functional.dequantize_4bit(codes, state).numpy()
        ours = kernels.unpack(quantize(w.numpy(), kind, double_quant=nested))
        np.testing.assert_array_equal(ours, theirs)


# Folders


# Rows are whole blocks of 64: see above
SMALL = LlamaConfig(vocab_size=97, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
                    num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2)  # fmt: skip
IDS = np.random.default_rng(0).integers(0, 97, (2, 17))


def folder_of(path, **settings):
    random.seed(3)
    return Llama(SMALL).save_pretrained(path, **settings)


def theirs_of(folder, **settings):
    """The folder's model by transformers and bitsandbytes, computing in float32."""
    return transformers.LlamaForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float32, **settings)


def quantized_by_them(folder, out, kind, nested, **settings):
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.float32, **settings)  # fmt: skip
    model = theirs_of(folder, quantization_config=config)
    model.save_pretrained(out)
    return model


def close(ours, theirs):
    """Whether logits are the same but for rounding: K = 192 terms at most, 2 layers of 7 products and a head."""
    theirs = theirs(torch.from_numpy(IDS)).logits.detach().numpy()
    error = np.abs(ours(IDS).data - theirs).max() / np.abs(theirs).max()
    return error <= 15 * 2 * EPS * np.sqrt(192)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_transformers_loads_what_we_quantized(tmp_path, kind, nested):
    ours = Llama.from_pretrained(folder_of(tmp_path / "model"), storage=kind, double_quant=nested)
    out = ours.save_pretrained(tmp_path / "quantized")
    theirs = theirs_of(out)
    layer = theirs.model.layers[1].mlp.up_proj
    assert isinstance(layer, nn.Linear4bit) and layer.weight.quant_state.nested == nested
    assert type(theirs.lm_head) is torch.nn.Linear and close(ours, theirs)
    state = theirs.state_dict()
    for name, array in load_file(out / "model.safetensors").items():
        assert torch.equal(state[name], array) and state[name].dtype == array.dtype, name


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_we_load_what_transformers_quantized(tmp_path, kind, nested):
    folder = folder_of(tmp_path / "model")
    theirs = quantized_by_them(folder, tmp_path / "theirs", kind, nested)
    ours = Llama.from_pretrained(tmp_path / "theirs")
    assert ours.parameters() == [] and close(ours, theirs)
    # and it is what we make of the same model, to the byte, as both write it
    mine = Llama.from_pretrained(folder, storage=kind, double_quant=nested).save_pretrained(tmp_path / "mine")
    with SafeTensors(mine / "model.safetensors") as file, SafeTensors(tmp_path / "theirs/model.safetensors") as other:
        assert file.entries.keys() == other.entries.keys()
        for name in file:
            assert file.entries[name].dtype == other.entries[name].dtype and file[name].shape == other[name].shape
            assert file[name].tobytes() == other[name].tobytes(), name


@pytest.mark.parametrize("storage", ["bfloat16", "float32"])
def test_other_quant_storage_is_read(tmp_path, storage):
    folder, word = folder_of(tmp_path / "model"), {"bfloat16": "BF16", "float32": "F32"}[storage]
    theirs = quantized_by_them(folder, tmp_path / "theirs", "nf4", True,
                               bnb_4bit_quant_storage=getattr(torch, storage))  # fmt: skip
    with SafeTensors(tmp_path / "theirs/model.safetensors") as file:
        assert file.entries["model.layers.0.mlp.up_proj.weight"].dtype == word
    assert close(Llama.from_pretrained(tmp_path / "theirs"), theirs)


def test_layers_they_left_out_are_read_as_they_are(tmp_path):
    folder = folder_of(tmp_path / "model")
    theirs = quantized_by_them(folder, tmp_path / "theirs", "nf4", True,
                               llm_int8_skip_modules=["lm_head", "model.layers.1.mlp.down_proj"])  # fmt: skip
    ours = Llama.from_pretrained(tmp_path / "theirs")
    assert close(ours, theirs) and len(list(ours.named_packed())) == 13
    again = theirs_of(ours.save_pretrained(tmp_path / "again"))
    assert type(again.model.layers[1].mlp.down_proj) is torch.nn.Linear and close(ours, again)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_loads_a_folder_that_was_quantized_by_streaming(tmp_path, dtype):
    folder = folder_of(tmp_path / "model", dtype=dtype)
    out = quantize_folder(folder, tmp_path / "out", max_shard_size=20_000)
    theirs, ours = theirs_of(out), Llama.from_pretrained(out)
    assert isinstance(theirs.model.layers[1].mlp.up_proj, nn.Linear4bit)
    if dtype == "float32":
        assert close(ours, theirs)
    else:  # bitsandbytes rounds weights to the type they were stored as; we keep float32
        for name, layer in theirs.named_modules():
            if isinstance(layer, nn.Linear4bit):
                wanted = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float().numpy()
                got = kernels.unpack(dict(ours.named_packed())[f"{name}.weight"])
                np.testing.assert_array_equal(torch.from_numpy(got).to(torch.bfloat16).float().numpy(), wanted)


def test_a_state_dict_of_theirs_goes_through_us_byte_for_byte(tmp_path):
    """Read, kept, written: their tensors, dtype word in the JSON included."""
    theirs = quantized_by_them(folder_of(tmp_path / "model", dtype="bfloat16"), tmp_path / "theirs", "nf4", True)
    save_file({name: x.contiguous() for name, x in theirs.state_dict().items()}, tmp_path / "state.safetensors")
    with SafeTensors(tmp_path / "state.safetensors") as file:
        for name in bitsandbytes.parts_of(file):
            rows = json.loads(file[f"{name}.quant_state.bitsandbytes__nf4"].tobytes())["shape"]
            stored = bitsandbytes.read(name, file, tuple(rows), "state")
            for part, array in bitsandbytes.parts(name, stored.packed, dtype=stored.dtype).items():
                assert array.tobytes() == file[part].tobytes() and array.shape == file[part].shape, part
