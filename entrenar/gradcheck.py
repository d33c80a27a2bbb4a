"""gradcheck: the proof of a gradient, by finite differences. For whoever adds an op, a layer or a model.

    gradcheck(lambda x, w: ops.rms_norm(x, w), x, w)               # float64 tensors with requires_grad=True
    gradcheck(lambda *_: model.loss(ids), *model.parameters(), samples=10)

What fn returns is folded into one number by fixed random weights (the cotangent), backward() gives that
number's gradient, and the number is computed again with each element of each input moved a little. The error
is measured against the largest gradient of the input, not as an absolute number: then a backward of zeros
cannot pass, however small the gradients are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from entrenar.tensor import Tensor, no_grad

TOLERANCE = {np.dtype(np.float64): 1e-6, np.dtype(np.float32): 1e-2}
Found = tuple[tuple[int, ...] | str, float, float]  # an element or a direction, analytic, numeric
DIRECTIONS = 4  # how many random directions make up for elements not sampled


class GradcheckError(AssertionError):
    """A gradient is wrong, or the check could not have told."""


@dataclass(frozen=True)
class InputReport:
    """What was found for one input: error = max|analytic - numeric| / max|numeric|, and where it is worst."""

    input: int
    shape: tuple[int, ...]
    checked: int  # elements moved one by one
    error: float
    scale: float  # max|numeric|
    worst: tuple[int, ...] | str  # an index, or the name of a random direction
    analytic: float
    numeric: float


@dataclass(frozen=True)
class GradcheckReport:
    """What was found for each input that requires a gradient. `error` is the greatest of theirs."""

    inputs: tuple[InputReport, ...]
    tolerance: float

    @property
    def error(self) -> float:
        return max((report.error for report in self.inputs), default=0.0)


def gradcheck(
    fn: Callable[..., Tensor],
    *inputs: Any,
    eps: float = 1e-3,
    rtol: float | None = None,
    stencil: int = 3,
    samples: int | None = None,
    seed: int = 0,
    allow_zero: bool = False,
) -> GradcheckReport:
    """Compare the gradients of fn(*inputs) with finite differences; raise GradcheckError where they differ.

    fn          makes a tensor of any shape from the inputs, as arguments or because it holds them itself
    inputs      those that are tensors with requires_grad=True are checked: moved in place, and put back
    eps         how far each element is moved, to either side
    rtol        the greatest error allowed, max|analytic - numeric| / max|numeric| per input; by default
                1e-6 if all is float64, 1e-2 if some is float32
    stencil     3: (f(x + e) - f(x - e)) / 2e, whose error is of order e^2; 5: extrapolated from e and 2e, e^4
    samples     of each input, move at most so many elements (chosen by `seed`), and the whole input along
                random directions besides, so that no element goes unseen
    allow_zero  accept an input whose gradient is zero everywhere; otherwise a check that saw nothing fails

    Raises ValueError for inputs it cannot check, GradcheckError for a gradient that is wrong, with the input,
    the element, both values, the error and the tolerance.
    """
    checked = [(i, x) for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.requires_grad]
    _refuse_what_cannot_be_checked(checked, eps, stencil)
    before = [x.grad for _, x in checked]
    try:
        for _, x in checked:
            x.grad = None
        probe = _Probe(fn, inputs, [x for _, x in checked], seed)
        tolerance = rtol if rtol is not None else TOLERANCE[probe.dtype]
        reports = []
        for i, x in checked:
            reports.append(_check_input(probe, i, x, eps, stencil, samples, seed))
            _judge(reports[-1], tolerance, 4 * probe.rounding / eps, allow_zero)
    finally:
        for (_, x), grad in zip(checked, before, strict=True):
            x.grad = grad
    if not allow_zero and not any(report.checked for report in reports):
        raise GradcheckError("gradcheck: vacuous: every input is empty; allow_zero=True if that is meant")
    return GradcheckReport(tuple(reports), tolerance)


def _refuse_what_cannot_be_checked(checked: list[tuple[int, Tensor]], eps: float, stencil: int) -> None:
    if not checked:
        raise ValueError("gradcheck: no input is a tensor with requires_grad=True: nothing to check")
    if stencil not in (3, 5) or not eps > 0:
        raise ValueError(f"gradcheck: wants stencil 3 or 5 and eps > 0, got stencil={stencil}, eps={eps}")
    for i, x in checked:
        if x.dtype not in TOLERANCE:
            raise ValueError(f"gradcheck: input {i} is {x.dtype}, too coarse: use float64 or float32")
        if x.op is not None:
            raise ValueError(f"gradcheck: input {i} is the result of {x.op.name}, not a leaf: detach() it")
        if not x.data.flags.writeable:
            raise ValueError(f"gradcheck: input {i} is read-only, but is moved in place: copy it")


class _Probe:
    """f() = sum(fn(*inputs) * cotangent) in float64, and the gradients that backward() claims for it."""

    def __init__(self, fn: Callable[..., Tensor], inputs: Any, checked: list[Tensor], seed: int) -> None:
        self.fn, self.inputs = fn, inputs
        out = fn(*inputs)
        self.dtype = min([out.dtype, *(x.dtype for x in checked)], key=lambda dtype: dtype.itemsize)

        # Of size 0.5 to 1.5 and either sign: none so small that it would hide an element of the output.
        rng = np.random.default_rng(seed)
        weights = rng.uniform(0.5, 1.5, out.shape) * rng.choice([-1.0, 1.0], out.shape)
        self.cotangent = weights.astype(out.dtype).astype(np.float64)
        self.value = self.f()
        if self.value != self.f() and np.isfinite(self.value):
            raise GradcheckError("gradcheck: fn gives another value when called again: seed what it draws")
        terms = out.data * self.cotangent
        self.rounding = float(np.finfo(self.dtype).eps * np.sqrt(np.square(terms).sum()))  # of one value of f
        if out.requires_grad:
            out.backward(self.cotangent)

    def f(self) -> float:
        with no_grad():
            return float(np.sum(self.fn(*self.inputs).data.astype(np.float64) * self.cotangent))

    def difference(self, x: Tensor, at: Any, step: Any, stencil: int) -> tuple[float, np.ndarray]:
        """(f(x + step) - f(x - step)) / 2, the step taken at x.data[at]; and what rounding left of it."""
        if stencil == 5:  # the error of order e^2 is 4 times larger at 2e: this combination cancels it
            near, moved = self.difference(x, at, step, 3)
            far, _ = self.difference(x, at, 2 * step, 3)
            return (4 * near - far / 2) / 3, moved
        kept = x.data[at].copy()
        try:
            x.data[at] = kept + step
            above, f_above = x.data[at].astype(np.float64), self.f()
            x.data[at] = kept - step
            below, f_below = x.data[at].astype(np.float64), self.f()
        finally:
            x.data[at] = kept
        return (f_above - f_below) / 2, (above - below) / 2


def _check_input(
    probe: _Probe, i: int, x: Tensor, eps: float, stencil: int, samples: int | None, seed: int
) -> InputReport:
    """Both derivatives, element by element; and along whole directions where elements were left out."""
    gradient = np.zeros(x.shape) if x.grad is None else x.grad.astype(np.float64)
    rng = np.random.default_rng([seed, i])
    found: list[Found] = []

    chosen = np.arange(x.size)
    if samples is not None and samples < x.size:
        chosen = np.sort(rng.choice(x.size, samples, replace=False))
    for j in chosen:
        place = tuple(int(n) for n in np.unravel_index(j, x.shape))
        difference, moved = probe.difference(x, place, eps, stencil)
        found.append((place, float(gradient[place]), difference / float(moved)))

    for n in range(DIRECTIONS if len(found) < x.size else 0):
        # Of length 1, every element taking equal part: then the derivative is of the size of one element's.
        direction = rng.choice([-1.0, 1.0], x.shape) / np.sqrt(x.size)
        difference, moved = probe.difference(x, ..., (eps * direction).astype(x.dtype), stencil)
        found.append((f"random direction {n}", float(np.sum(gradient * moved)) / eps, difference / eps))
    return _summary(i, x, len(chosen), found)


def _summary(i: int, x: Tensor, checked: int, found: list[Found]) -> InputReport:
    if not found:  # an empty input
        return InputReport(i, x.shape, 0, 0.0, 0.0, (), 0.0, 0.0)
    analytic, numeric = np.array([a for _, a, _ in found]), np.array([n for _, _, n in found])
    difference = np.abs(analytic - numeric)
    worst = int(np.argmax(np.where(np.isnan(difference), np.inf, difference)))
    scale = float(np.abs(numeric).max())
    error = float(difference[worst] / scale) if scale else float(np.inf if difference[worst] else 0)
    return InputReport(i, x.shape, checked, error, scale, *found[worst])


def _judge(report: InputReport, tolerance: float, noise: float, allow_zero: bool) -> None:
    """Raise unless the error is within the tolerance; below `noise` a difference says nothing."""
    r = report
    if r.shape and 0 in r.shape:
        return
    if r.scale <= noise and abs(r.analytic) <= noise:
        if allow_zero:
            return
        raise GradcheckError(
            f"gradcheck: vacuous: the gradient of input {r.input} {r.shape} is zero everywhere (or below "
            f"rounding, {noise:.1e}): a backward of zeros would pass; choose other inputs, or allow_zero=True"
            " if zero is meant"
        )
    if not r.error <= tolerance:
        raise GradcheckError(
            f"gradcheck: input {r.input} {r.shape} at {r.worst}: backward() gives {r.analytic:.9g}, "
            f"differences give {r.numeric:.9g}: error {r.error:.2e} of max|gradient| {r.scale:.3g}, "
            f"tolerance {tolerance:.0e}"
        )
