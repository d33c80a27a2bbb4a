"""PyTorch's side of the kernels' benchmarks computes what ours does, in every way it is asked to."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # behind everything: an installed entrenar stays the one that is imported

pytestmark = pytest.mark.peers
pytest.importorskip("torch")
if not (ROOT / "benchmarks" / "driver.py").exists():
    pytest.skip("benchmarks/ is not part of an installation", allow_module_level=True)

from benchmarks.driver import agreeing  # noqa: E402
from benchmarks.groups import attention, gemm, ops, optimizer  # noqa: E402


@pytest.mark.parametrize("form", gemm.FORMS)
def test_products_agree_in_every_form(form):
    products = [vars(gemm.Product("15m", "q_proj", form, *sides)) for sides in ((7, 12, 20), (5, 9, 3))]
    ours, theirs = gemm.with_entrenar(products), gemm.with_torch(products)
    assert agreeing(ours.check, theirs.check) and len(theirs.runs) == 2
    assert not agreeing(ours.check, gemm.with_torch(products[::-1]).check)


@pytest.mark.parametrize("heads", [4, 2])
def test_attention_agrees_and_grouped_heads_both_ways(heads):
    sizes = vars(attention.Shape(2, 33, 4, heads, 16))
    ours = attention.with_entrenar(**sizes)
    for theirs in (attention.with_torch, attention.with_torch_repeated):
        assert agreeing(ours.check, theirs(**sizes).check)


@pytest.mark.parametrize("operation", [
    ops.rms_norm(7, 24), ops.swiglu(7, 24), ops.rope(2, 9, 3, 8), ops.softmax(7, 24), ops.cross_entropy(7, 24),
    ops.linear_cross_entropy(7, 24, 40)])  # fmt: skip
def test_operations_agree(operation):
    ours, theirs = ops.entrenar_case(operation), ops.torch_case(operation)
    assert agreeing(ours.check, theirs.check)
    assert not agreeing(ours.check, [1.01 * x for x in theirs.check])


def test_the_optimizers_agree_after_some_steps(monkeypatch):
    monkeypatch.setattr(optimizer, "parameter_shapes", lambda model: [(8, 4), (4,)])
    ours, theirs = optimizer.with_entrenar("15m"), optimizer.with_torch("15m")
    assert agreeing(ours.check, theirs.check)
    theirs.run()
