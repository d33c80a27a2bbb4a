"""Operations on each element alone: arithmetic with broadcasting, functions of one argument, choices.

A constant beside a tensor (a number, a list, an array) takes the tensor's float type, so float32 stays
float32; two tensors promote as in NumPy. Errors about shapes that do not broadcast are NumPy's own.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from entrenar.kernels.reference import erf
from entrenar.kernels.reference import sigmoid as _sigmoid
from entrenar.tensor import Op, Tensor


def unbroadcast(dx: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The gradient of broadcasting `shape` to dx.shape: the sum over the axes along which it was repeated."""
    if dx.shape == shape:
        return dx
    new = dx.ndim - len(shape)
    stretched = [new + i for i, n in enumerate(shape) if n == 1 and dx.shape[new + i] != 1]
    return dx.sum(axis=(*range(new), *stretched)).reshape(shape)


def constant(value: Any, dtype: np.dtype) -> Any:
    """A constant operand that will leave a tensor of `dtype` in its type: a Python number stays raw (it
    promotes nothing), anything else becomes an array of `dtype`."""
    if isinstance(value, np.generic):  # np.float64(2), from np.sqrt say, would turn float32 into float64
        value = value.item()
    return value if type(value) in (int, float) else np.asarray(value, dtype)


def operands(x: Any, y: Any) -> tuple[Any, Any]:
    """Two operands as Op.apply wants them: at least one tensor, a constant in the other's float type."""
    if isinstance(x, Tensor):
        return x, y if isinstance(y, Tensor) else constant(y, x.dtype)
    if isinstance(y, Tensor):
        return constant(x, y.dtype), y
    return Tensor(x), Tensor(y)


def tensor(x: Any) -> Tensor:
    return x if isinstance(x, Tensor) else Tensor(x)


# -- arithmetic: z = x . y, broadcast


class Add(Op):
    """z = x + y          x, y broadcast to z"""

    def forward(self, x, y):
        return np.add(x, y)

    def backward(self, dz):
        dx = unbroadcast(dz, self.input_shape(0)) if self.needs[0] else None
        dy = unbroadcast(dz, self.input_shape(1)) if self.needs[1] else None
        return dx, dy


class Sub(Op):
    """z = x - y          x, y broadcast to z"""

    def forward(self, x, y):
        return np.subtract(x, y)

    def backward(self, dz):
        dx = unbroadcast(dz, self.input_shape(0)) if self.needs[0] else None
        dy = -unbroadcast(dz, self.input_shape(1)) if self.needs[1] else None
        return dx, dy


class Mul(Op):
    """z = x y          x, y broadcast to z"""

    def forward(self, x, y):
        self.save(x if self.needs[1] else None, y if self.needs[0] else None)
        return np.multiply(x, y)

    def backward(self, dz):
        # dx = y dz, dy = x dz
        x, y = self.saved
        dx = unbroadcast(dz * y, self.input_shape(0)) if self.needs[0] else None
        dy = unbroadcast(dz * x, self.input_shape(1)) if self.needs[1] else None
        return dx, dy


class Div(Op):
    """z = x / y          x, y broadcast to z"""

    def forward(self, x, y):
        self.save(x if self.needs[1] else None, y)
        return np.true_divide(x, y)

    def backward(self, dz):
        # dx = dz / y, dy = -x / y^2 dz
        x, y = self.saved
        dx = unbroadcast(dz / y, self.input_shape(0)) if self.needs[0] else None
        dy = unbroadcast(-dz * x / y / y, self.input_shape(1)) if self.needs[1] else None
        return dx, dy


class Pow(Op):
    """z = x ^ y          x, y broadcast to z; the gradient of y wants x > 0 (at x = 0 it is taken as 0)"""

    def forward(self, x, y):
        z = x**y
        self.save(x, y, z if self.needs[1] else None)
        return z

    def backward(self, dz):
        # dx = y x^(y-1) dz, and 0 where y is 0 (there x^-1 may be infinite); dy = log(x) z dz
        x, y, z = self.saved
        dx = dy = None
        if self.needs[0]:
            slope = y * x ** np.where(np.equal(y, 0), 1, np.subtract(y, 1, dtype=x.dtype))
            dx = unbroadcast(dz * slope, x.shape)
        if self.needs[1]:
            dy = unbroadcast(dz * z * np.log(np.where(np.equal(x, 0), 1, x)), y.shape)
        return dx, dy


class Neg(Op):
    """y = -x          any shape"""

    def forward(self, x):
        return -x

    def backward(self, dy):
        return -dy


def add(x: Any, y: Any) -> Tensor:
    """x + y, broadcast"""
    return Add.apply(*operands(x, y))


def sub(x: Any, y: Any) -> Tensor:
    """x - y, broadcast"""
    return Sub.apply(*operands(x, y))


def mul(x: Any, y: Any) -> Tensor:
    """x y, element by element, broadcast"""
    return Mul.apply(*operands(x, y))


def div(x: Any, y: Any) -> Tensor:
    """x / y, broadcast"""
    return Div.apply(*operands(x, y))


def pow(x: Any, y: Any) -> Tensor:
    """x ^ y, broadcast; the gradient of y wants x > 0"""
    return Pow.apply(*operands(x, y))


def neg(x: Any) -> Tensor:
    """-x"""
    return Neg.apply(tensor(x))


# -- functions of one argument: y = f(x), any shape


class Exp(Op):
    """y = exp(x)"""

    def forward(self, x):
        y = np.exp(x)
        self.save(y)
        return y

    def backward(self, dy):
        # dx = exp(x) dy
        (y,) = self.saved
        return dy * y


class Log(Op):
    """y = log(x), x > 0"""

    def forward(self, x):
        self.save(x)
        return np.log(x)

    def backward(self, dy):
        (x,) = self.saved
        return dy / x


class Sqrt(Op):
    """y = sqrt(x), x >= 0; the gradient at 0 is infinite"""

    def forward(self, x):
        y = np.sqrt(x)
        self.save(y)
        return y

    def backward(self, dy):
        # dx = dy / (2 sqrt(x))
        (y,) = self.saved
        return dy / (2 * y)


class Tanh(Op):
    """y = tanh(x)"""

    def forward(self, x):
        y = np.tanh(x)
        self.save(y)
        return y

    def backward(self, dy):
        # dx = (1 - tanh(x)^2) dy
        (y,) = self.saved
        return dy * (1 - y * y)


class Sigmoid(Op):
    """y = 1 / (1 + exp(-x))"""

    def forward(self, x):
        y = _sigmoid(x)
        self.save(y)
        return y

    def backward(self, dy):
        # dx = s (1 - s) dy
        (y,) = self.saved
        return dy * y * (1 - y)


class Relu(Op):
    """y = max(x, 0); the gradient at 0 is 0"""

    def forward(self, x):
        y = np.maximum(x, 0)
        self.save(y)
        return y

    def backward(self, dy):
        (y,) = self.saved
        return np.where(y <= 0, 0, dy)


class Silu(Op):
    """y = x sigmoid(x)"""

    def forward(self, x):
        self.save(x)
        return x * _sigmoid(x)

    def backward(self, dy):
        # s' = s (1 - s): dx = s (1 + x (1 - s)) dy
        (x,) = self.saved
        s = _sigmoid(x)
        return dy * s * (1 + x * (1 - s))


class Gelu(Op):
    """y = x P(x),   P(x) = (1 + erf(x / sqrt 2)) / 2, the normal distribution (exact, not by tanh)"""

    def forward(self, x):
        below = 0.5 * (1 + erf(x / math.sqrt(2)))
        self.save(x, below)
        return x * below

    def backward(self, dy):
        # P' is the normal density: dx = (P + x exp(-x^2 / 2) / sqrt(2 pi)) dy
        x, below = self.saved
        return dy * (below + x * np.exp(-0.5 * x * x) / math.sqrt(2 * math.pi))


def exp(x: Any) -> Tensor:
    """e^x"""
    return Exp.apply(tensor(x))


def log(x: Any) -> Tensor:
    """The natural logarithm"""
    return Log.apply(tensor(x))


def sqrt(x: Any) -> Tensor:
    """The square root"""
    return Sqrt.apply(tensor(x))


def tanh(x: Any) -> Tensor:
    """The hyperbolic tangent"""
    return Tanh.apply(tensor(x))


def sigmoid(x: Any) -> Tensor:
    """1 / (1 + exp(-x))"""
    return Sigmoid.apply(tensor(x))


def relu(x: Any) -> Tensor:
    """max(x, 0)"""
    return Relu.apply(tensor(x))


def silu(x: Any) -> Tensor:
    """x sigmoid(x)"""
    return Silu.apply(tensor(x))


def gelu(x: Any) -> Tensor:
    """x P(x), P the normal distribution; exact, by erf"""
    return Gelu.apply(tensor(x))


# -- choices


class Maximum(Op):
    """z = max(x, y)          x, y broadcast to z; where they are equal each gets half of the gradient"""

    def forward(self, x, y):
        z = np.maximum(x, y)
        self.save(_share(z, np.greater(x, y), np.equal(x, y)), np.shape(x), np.shape(y))
        return z

    def backward(self, dz):
        share, x_shape, y_shape = self.saved
        dx = unbroadcast(dz * share, x_shape) if self.needs[0] else None
        dy = unbroadcast(dz * (1 - share), y_shape) if self.needs[1] else None
        return dx, dy


class Minimum(Maximum):
    """z = min(x, y)          x, y broadcast to z; where they are equal each gets half of the gradient"""

    def forward(self, x, y):
        z = np.minimum(x, y)
        self.save(_share(z, np.less(x, y), np.equal(x, y)), np.shape(x), np.shape(y))
        return z


def _share(z, wins, ties):
    """x's part in the choice: 1, 0, or 1/2 for a tie"""
    return np.where(ties, 0.5, wins).astype(z.dtype)


class Where(Op):
    """z = x where condition else y          condition, x, y broadcast to z"""

    def forward(self, condition, x, y):
        self.save(condition, np.shape(x), np.shape(y))
        return np.where(condition, x, y)

    def backward(self, dz):
        condition, x_shape, y_shape = self.saved
        dx = unbroadcast(np.where(condition, dz, 0), x_shape) if self.needs[1] else None
        dy = unbroadcast(np.where(condition, 0, dz), y_shape) if self.needs[2] else None
        return None, dx, dy


def maximum(x: Any, y: Any) -> Tensor:
    """The greater of x and y, element by element; equal elements share the gradient"""
    return Maximum.apply(*operands(x, y))


def minimum(x: Any, y: Any) -> Tensor:
    """The smaller of x and y, element by element; equal elements share the gradient"""
    return Minimum.apply(*operands(x, y))


def where(condition: Any, x: Any, y: Any) -> Tensor:
    """x where the condition (an array of bools, which gets no gradient) holds, else y"""
    condition = condition.data != 0 if isinstance(condition, Tensor) else np.asarray(condition, bool)
    return Where.apply(condition, *operands(x, y))
