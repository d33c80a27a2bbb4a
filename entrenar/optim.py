"""How parameters move: SGD, AdamW, clipping by the global norm, learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from entrenar import kernels
from entrenar.state import check_fits
from entrenar.tensor import Tensor

SCHEDULES = ("cosine", "linear", "constant", "wsd")


def global_norm(parameters: Iterable[Tensor]) -> float:
    """sqrt(sum of g^2 over all gradients): the length of the whole gradient as one vector."""
    return math.sqrt(kernels.sum_of_squares(*(p.grad for p in parameters if p.grad is not None)))


def clip_scale(norm: float, max_norm: float) -> float:
    """The factor that brings a gradient of this norm to at most `max_norm`; 1 where it fits, or max_norm is 0."""
    return max_norm / norm if 0 < max_norm < norm else 1.0


def clip_by_global_norm(parameters: Iterable[Tensor], max_norm: float) -> float:
    """Scale all gradients in place so that their global norm is at most `max_norm`; returns the norm before."""
    parameters = list(parameters)
    norm = global_norm(parameters)
    scale = clip_scale(norm, max_norm)
    if scale != 1.0:
        for p in parameters:
            if p.grad is not None:
                p.grad *= p.grad.dtype.type(scale)
    return norm


def schedule(name: str, step: int, *, total_steps: int, warmup_steps: int = 0, min_ratio: float = 0.0,
             decay_steps: int = 0) -> float:  # fmt: skip
    """The learning rate at `step` (0-based) as a share of its peak.

    Every schedule rises linearly over `warmup_steps`, then
        constant   stays
        linear     falls in a line to min_ratio at the last step
        cosine     falls along half a cosine to min_ratio at the last step (Loshchilov and Hutter 2017)
        wsd        stays, and falls in a line to min_ratio over the last `decay_steps` (warmup-stable-decay,
                   Hu et al. 2024)

    Raises ValueError for an unknown name.
    """
    if name not in SCHEDULES:
        raise ValueError(f"schedule: unknown name {name!r}; one of {', '.join(SCHEDULES)}")
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if name == "constant":
        return 1.0
    start = max(warmup_steps, total_steps - decay_steps) if name == "wsd" else warmup_steps
    done = min(1.0, max(0, step - start + 1) / max(1, total_steps - start))
    fall = (1 - math.cos(math.pi * done)) / 2 if name == "cosine" else done
    return 1 - (1 - min_ratio) * fall


class SGD:
    """v = momentum v + g;  p = p - lr v          (Polyak's heavy ball; plain gradient descent at momentum 0)"""

    def __init__(self, parameters: Iterable[Tensor], *, lr: float, momentum: float = 0.0) -> None:
        self.parameters, self.lr, self.momentum = list(parameters), lr, momentum
        self.velocity = [np.zeros_like(p.data) for p in self.parameters] if momentum else []

    def step(self) -> None:
        for i, p in enumerate(self.parameters):
            if p.grad is None:
                continue
            move = p.grad
            if self.momentum:
                self.velocity[i] *= self.momentum
                self.velocity[i] += move
                move = self.velocity[i]
            p.data -= p.dtype.type(self.lr) * move

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None


class AdamW:
    """Adam with decoupled weight decay, in one fused pass over all parameters.

        m = b1 m + (1 - b1) g          v = b2 v + (1 - b2) g^2
        p = p - lr wd p - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    Decay applies to matrices alone: the weights of norms and the biases (1-d tensors) are not shrunk.
    Parameters without a gradient stay as they are.
    Source: Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization".

    Raises ValueError where a constant is out of its range, naming it.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, Tensor]], *, lr: float = 1e-3,
                 betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0.01) -> None:  # fmt: skip
        wrong = [f"lr = {lr}: wanted >= 0"] if not lr >= 0 else []
        wrong += [f"betas = {betas}: wanted 0 <= beta < 1"] if not all(0 <= b < 1 for b in betas) else []
        wrong += [f"eps = {eps}: wanted > 0"] if not eps > 0 else []
        wrong += [f"weight_decay = {weight_decay}: wanted >= 0"] if not weight_decay >= 0 else []
        if wrong:
            raise ValueError("AdamW: " + "; ".join(wrong))
        self.parameters = dict(named_parameters)
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.steps = 0
        self.m = {name: np.zeros_like(p.data) for name, p in self.parameters.items()}
        self.v = {name: np.zeros_like(p.data) for name, p in self.parameters.items()}

    def step(self, *, lr: float | None = None, grad_scale: float = 1.0) -> None:
        """One update. `lr` overrides the learning rate; gradients count `grad_scale` times (see `clip_scale`)."""
        self.steps += 1
        kernels.adamw_steps(
            [
                (p.data, p.grad, self.m[name], self.v[name], self.weight_decay if p.ndim >= 2 else 0.0)
                for name, p in self.parameters.items()
                if p.grad is not None
            ],
            lr=self.lr if lr is None else lr, beta1=self.betas[0], beta2=self.betas[1], eps=self.eps,
            step=self.steps, grad_scale=grad_scale,
        )  # fmt: skip

    def zero_grad(self) -> None:
        for p in self.parameters.values():
            p.grad = None

    def state_dict(self) -> dict[str, np.ndarray]:
        """Both moments of every parameter and the number of steps, by name."""
        moments = {f"m.{name}": m for name, m in self.m.items()} | {f"v.{name}": v for name, v in self.v.items()}
        return moments | {"steps": np.array(self.steps, np.int64)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over moments and step count. Raises ValueError, before any change, naming all that does not fit."""
        check_fits("AdamW.load_state_dict", state, self.state_dict())
        self.steps = int(state["steps"])
        for name in self.parameters:
            self.m[name][...] = state[f"m.{name}"]
            self.v[name][...] = state[f"v.{name}"]
