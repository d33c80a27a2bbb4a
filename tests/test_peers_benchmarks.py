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
from benchmarks.groups import bases, decode, finetune, packed  # noqa: E402


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


@pytest.mark.parametrize("peer", [decode.PEER_FLOAT32, decode.PEER_BFLOAT16, decode.PEER_PORTABLE])
def test_decoding_has_the_logits_of_transformers_on_bitsandbytes(tmp_path, peer):
    paths = folders(tmp_path, "nf4")
    ours, theirs = (decode.CONTENDERS[name](model="tiny", tokens=1, **paths) for name in (decode.NF4, peer))
    assert decode.AGREE[peer](ours.check, theirs.check)
    theirs.run()
