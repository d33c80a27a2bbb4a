"""entrenar trains LLaMA-family models on ordinary CPUs: an autograd engine on NumPy, with kernels in C.

    from entrenar import Tensor

    x = Tensor([1.0, 2.0, 3.0], requires_grad=True)
    (x * x).sum().backward()
    x.grad                                        # [2, 4, 6]

In reading order: tensor.py (the engine), ops/ (every differentiable operation), gradcheck.py (the proof of a
gradient), nn.py and optim.py, llama/, data/, training/.
"""

from entrenar import kernels, nn, ops, optim, random
from entrenar.gradcheck import GradcheckError, gradcheck
from entrenar.ops import checkpoint
from entrenar.tensor import Op, Tensor, no_grad
from entrenar.version import __version__ as __version__

__all__ = [
    "GradcheckError", "Op", "Tensor", "checkpoint", "gradcheck", "kernels", "nn", "no_grad", "ops", "optim", "random",
]  # fmt: skip
