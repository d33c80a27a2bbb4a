"""The benchmarks' contenders in the peers' environment: they compute what entrenar's do, or nothing would be timed."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # behind everything: an installed entrenar stays the one that is imported

pytestmark = pytest.mark.peers
pytest.importorskip("bitsandbytes")
pytest.importorskip("peft")
if not (ROOT / "benchmarks" / "driver.py").exists():
    pytest.skip("benchmarks/ is not part of an installation", allow_module_level=True)

from benchmarks.arrays import agree  # noqa: E402
from benchmarks.groups import bases, checkpointing, decode, finetune, generation, llama_cpp, packed, step  # noqa: E402


def folders(place, kind):
    paths = {"base": str(place / "base"), "adapter": str(place / "adapter")}
    bases.write("tiny", kind=kind, **paths)
    return paths


@pytest.mark.parametrize("peer, rows", [(packed.PEER, 64), (packed.PEER, 1), (packed.PEER_INFERENCE, 1)])
def test_bitsandbytes_layer_computes_what_ours_does(peer, rows, monkeypatch):
    monkeypatch.setattr(packed, "BEYOND_CACHES", 1 << 20)
    shape = {"outputs": 128, "inputs": 192, "rows": rows}
    ours, theirs = (packed.CONTENDERS[name](**shape) for name in (packed.NF4, peer))
    tolerance = packed.TOLERANCE_BFLOAT16 if peer == packed.PEER_INFERENCE else 1e-4
    assert agree(ours.check, theirs.check, tolerance=tolerance)
    theirs.run()


def test_lora_steps_have_the_losses_of_peft(tmp_path):
    case = {"model": "tiny", "batch": 2, "context": 32, **folders(tmp_path, "bfloat16")}
    ours, theirs = (finetune.CONTENDERS[name](**case).check for name in (finetune.LORA, finetune.PEFT))
    assert finetune.AGREE[finetune.PEFT](ours, theirs)


@pytest.mark.parametrize("peer", [finetune.PEFT_FLOAT32, finetune.PEFT_BFLOAT16])
def test_qlora_steps_have_the_losses_of_peft_on_bitsandbytes(tmp_path, peer):
    case = {"model": "tiny", "batch": 2, "context": 32, **folders(tmp_path, "bfloat16")}
    ours, theirs = (finetune.CONTENDERS[name](**case).check for name in (finetune.QLORA, peer))
    assert finetune.AGREE[peer](ours, theirs)


def test_lora_steps_in_bfloat16_have_about_the_losses_of_float32(tmp_path):
    case = {"model": "tiny", "batch": 2, "context": 32, **folders(tmp_path, "bfloat16")}
    ours, theirs = (finetune.CONTENDERS[name](**case).check for name in (finetune.LORA, finetune.PEFT_LORA_BFLOAT16))
    assert finetune.AGREE[finetune.PEFT_LORA_BFLOAT16](ours, theirs)


@pytest.fixture
def weights(tmp_path, monkeypatch):
    monkeypatch.setitem(step.MODELS, "tiny", bases.MODELS["tiny"])
    path = str(tmp_path / "weights.safetensors")
    step.write_weights("tiny", path)
    return path


@pytest.mark.parametrize("peer", [
    (step.CONTENDERS, step.EAGER), (checkpointing.CONTENDERS, checkpointing.PEER),
    pytest.param((step.CONTENDERS, step.COMPILED), marks=pytest.mark.tier3),
], ids=lambda peer: peer[1])  # fmt: skip
def test_whole_steps_have_the_losses_of_transformers(weights, peer):
    contenders, name = peer
    if name == step.COMPILED and (why := step.compiler_missing()):
        pytest.skip(why)
    case = {"model": "tiny", "batch": 2, "context": 32, "weights": weights}
    assert step.same_losses(step.with_entrenar(**case).check, contenders[name](**case).check)


@pytest.mark.parametrize("peer", generation.TORCH)
@pytest.mark.parametrize("tokens", [1, 32])
def test_generation_has_the_logits_of_transformers(tmp_path, peer, tokens):
    case = {"model": "tiny", "tokens": tokens, "base": folders(tmp_path, "bfloat16")["base"], "files": {}}
    ours, theirs = (generation.CONTENDERS[name](**case) for name in (generation.BFLOAT16, peer))
    assert generation.AGREE[peer](ours.check, theirs.check)
    theirs.run()


def test_generation_has_the_logits_of_llama_cpp(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as the driver does
    try:
        llama_cpp.library()
    except ImportError as error:
        pytest.skip(str(error))
    base = folders(tmp_path, "bfloat16")["base"]
    files = {name: str(tmp_path / f"{name}.gguf") for name in generation.LLAMA}
    llama_cpp.write_gguf(base, files[generation.LLAMA_BF16])
    for name, kind in ((generation.LLAMA_F16, "f16"), (generation.LLAMA_Q4_0, "q4_0")):
        llama_cpp.quantize(files[generation.LLAMA_BF16], files[name], kind, threads=1)
    for tokens in (1, 32):
        case = {"model": "tiny", "tokens": tokens, "base": base, "files": files}
        ours = generation.CONTENDERS[generation.BFLOAT16](**case).check
        for name in generation.LLAMA:
            theirs = generation.CONTENDERS[name](**case)
            assert generation.AGREE[name](ours, theirs.check), name
            for _ in range(3):
                theirs.run()


@pytest.mark.parametrize("peer", [decode.PEER_FLOAT32, decode.PEER_BFLOAT16, decode.PEER_PORTABLE])
def test_decoding_has_the_logits_of_transformers_on_bitsandbytes(tmp_path, peer):
    paths = folders(tmp_path, "nf4")
    ours, theirs = (decode.CONTENDERS[name](model="tiny", tokens=1, **paths) for name in (decode.NF4, peer))
    assert decode.AGREE[peer](ours.check, theirs.check)
    theirs.run()
