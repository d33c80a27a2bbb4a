"""PyTorch as an independent oracle: every case of the table, forward and backward, in float64 and float32."""

from __future__ import annotations

import numpy as np
import pytest
from cases import CASES

pytestmark = pytest.mark.peers
torch = pytest.importorskip("torch")

# float64: the formulas agree up to rounding. float32: both sides round, over sums of up to 33 terms, and what
# cancels keeps its error, so errors are measured against 1 where all is smaller.
TOLERANCE = {np.float64: 1e-10, np.float32: 2e-6}


def assert_near(found, wanted, rtol: float) -> None:
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    assert np.abs(found - wanted).max(initial=0) <= rtol * np.abs(wanted).max(initial=1)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_op_agrees_with_torch(case, dtype):
    ours = case.tensors(dtype)
    theirs = [torch.tensor(x, requires_grad=True) for x in case.arrays(dtype)]
    y, y_torch = case.fn(*ours), case.torch(torch, *theirs)
    assert_near(y.data, y_torch.detach().numpy(), TOLERANCE[dtype])

    dout = np.asarray(np.random.default_rng(5).normal(size=y.shape), dtype)
    y.backward(dout)
    y_torch.backward(torch.from_numpy(dout))
    for x, x_torch in zip(ours, theirs, strict=True):
        wanted = np.zeros(x.shape, dtype) if x_torch.grad is None else x_torch.grad.numpy()
        assert_near(x.grad, wanted, TOLERANCE[dtype])


def test_the_oracle_rejects_a_gradient_wrong_by_a_millionth():
    wanted = np.ones(3)
    with pytest.raises(AssertionError):
        assert_near(wanted * (1 + 1e-6), wanted, TOLERANCE[np.float64])
