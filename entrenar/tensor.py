"""The engine: Tensor, Op, backward(). Knows NumPy, knows nothing of networks.

An expression on tensors leaves behind a graph of `Op` objects, one per operation, and `backward()` walks it
from the newest op to the oldest, handing each op the gradient of its output and collecting the gradients of its
inputs. Three decisions shape the file:

- **The op is the node.** An op keeps what its own backward needs (`save`), next to the formulas that use it.
- **Edges lead from op to op, or to a leaf, never to an intermediate tensor.** Only `saved` keeps activations
  alive, and each op drops its own as soon as its backward has run: memory falls during the walk by reference
  count alone, without the cyclic collector. The output of an op that is `cheap` is not kept at all: whoever saved
  it holds the op instead, which makes it again.
- **Ops are numbered at birth.** An op is younger than everything it reads, so the youngest op with a pending
  gradient has all its consumers behind it: a heap of numbers replaces the topological sort, and no recursion limits
  the depth of a graph.

`Op.apply` and the walk of `Tensor.backward` (`_Walk.step`) are the only two doors through which computation passes:
whoever wants to see all of it stands there (`watched`), and costs one `if` per operation while nobody does.

What a Tensor can do (`+`, `@`, `.sum()`, ...) is written in `entrenar/ops`, one class per operation, and attached
to Tensor by the table in `entrenar/ops/__init__.py`.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from entrenar.recording import Watcher, current_watcher, is_recording, no_grad, recorded, recording, watched  # noqa: F401

births = itertools.count()  # every recorded op takes the next number


class Tensor:
    """An array of floats, and the op that made it.

    data            the NumPy array itself; any NumPy float type (lists, Python numbers, ints and bools become float32)
    requires_grad   whether backward() reaches it
    grad            after backward(), the sum of the gradients that reached this leaf: an array like `data`, or None
    op              the recorded operation that made it; None for a leaf

    Raises TypeError for data that is not real numbers.
    """

    __slots__ = ("data", "grad", "requires_grad", "op", "__weakref__")
    __array_ufunc__ = None  # so that `array * tensor` asks Tensor.__rmul__, instead of looping over the array

    def __init__(self, data: Any, requires_grad: bool = False) -> None:
        if type(data) is not np.ndarray or data.dtype.kind != "f":
            data = _as_floats(data)
        self.data: np.ndarray = data
        self.grad: np.ndarray | None = None
        self.requires_grad = requires_grad
        self.op: Op | None = None

    shape = property(lambda self: self.data.shape)
    dtype = property(lambda self: self.data.dtype)
    ndim = property(lambda self: self.data.ndim)
    size = property(lambda self: self.data.size)

    def numpy(self) -> np.ndarray:
        """The array itself, not a copy."""
        return self.data

    def item(self) -> float:
        """The value of a tensor of one element, as a Python float."""
        return self.data.item()

    def detach(self) -> Tensor:
        """The same data as a new leaf: no gradient flows through it."""
        return Tensor(self.data)

    def __len__(self) -> int:
        return len(self.data)

    def __float__(self) -> float:
        return float(self.data)

    def __repr__(self) -> str:
        body = np.array2string(self.data, separator=", ", prefix="Tensor(", threshold=20, precision=4)
        made = f", op={self.op.name}" if self.op else ", requires_grad=True" if self.requires_grad else ""
        kind = "" if self.dtype == np.float32 else f", dtype={self.dtype}"
        return f"Tensor({body}{kind}{made})"

    def backward(self, dout: Any = None) -> None:
        """Add d(self)/d(leaf), weighted by `dout`, to the `grad` of every leaf that requires one; free the graph.

        dout   the gradient of the final result with respect to this tensor, of this tensor's shape;
               may be left out for a single element, where it is 1

        Raises RuntimeError where nothing was recorded or the graph has been freed by an earlier backward(),
        ValueError for a `dout` (or an op's gradient) of the wrong shape, TypeError for one that is not of floats.
        """
        if not self.requires_grad:
            raise RuntimeError(
                "backward: nothing was recorded for this tensor: none of its inputs has requires_grad=True, "
                "or it was computed under no_grad()"
            )
        walk = _Walk()
        walk.push(self.op or self, _first_gradient(self, dout), fresh=dout is None)
        while walk.heap:
            walk.step()

    if TYPE_CHECKING:  # attached by entrenar/ops/__init__.py; written here for type checkers and readers
        T: Tensor

        def __add__(self, other: Any) -> Tensor: ...
        def __radd__(self, other: Any) -> Tensor: ...
        def __sub__(self, other: Any) -> Tensor: ...
        def __rsub__(self, other: Any) -> Tensor: ...
        def __mul__(self, other: Any) -> Tensor: ...
        def __rmul__(self, other: Any) -> Tensor: ...
        def __truediv__(self, other: Any) -> Tensor: ...
        def __rtruediv__(self, other: Any) -> Tensor: ...
        def __pow__(self, other: Any) -> Tensor: ...
        def __rpow__(self, other: Any) -> Tensor: ...
        def __matmul__(self, other: Any) -> Tensor: ...
        def __rmatmul__(self, other: Any) -> Tensor: ...
        def __neg__(self) -> Tensor: ...
        def __getitem__(self, index: Any) -> Tensor: ...
        def __iter__(self) -> Iterator[Tensor]: ...
        def __gt__(self, other: Any) -> np.ndarray: ...
        def __ge__(self, other: Any) -> np.ndarray: ...
        def __lt__(self, other: Any) -> np.ndarray: ...
        def __le__(self, other: Any) -> np.ndarray: ...
        def exp(self) -> Tensor: ...
        def log(self) -> Tensor: ...
        def sqrt(self) -> Tensor: ...
        def tanh(self) -> Tensor: ...
        def sigmoid(self) -> Tensor: ...
        def relu(self) -> Tensor: ...
        def silu(self) -> Tensor: ...
        def gelu(self) -> Tensor: ...
        def sum(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor: ...
        def mean(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor: ...
        def max(self, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor: ...
        def reshape(self, *shape: Any) -> Tensor: ...
        def transpose(self, *axes: Any) -> Tensor: ...


class Op:
    """One recorded operation: a node of the graph, and the two formulas that define it.

        forward(*arrays, **constants) -> array     may call self.save(...)
        backward(dout) -> one gradient per positional input, None where not self.needs[i]
                          (the gradient alone where there is one input)

    Tensors come positionally and reach `forward` as their arrays; whatever else comes positionally (indices, Python
    numbers) is passed through and gets no gradient; constants come by keyword. An op never changes its inputs,
    `dout` or what it saved, for others may hold the same array; `so_far` lends what a backward may add to.

        class Square(Op):
            "y = x^2"
            def forward(self, x):
                self.save(x)
                return x * x

            def backward(self, dy):       # dx = 2 x dy
                (x,) = self.saved
                return 2 * x * dy

        y = Square.apply(Tensor([1.0, 2.0], requires_grad=True))

    An op whose output costs no more than a pass over memory may say `cheap = True` and define again(), which makes it
    once more, bit for bit, from what is saved: then no other op keeps that output.
    """

    needs: list[bool]  # which positional inputs want a gradient
    saved: Any = ()
    born = -1
    edges: list[Op | Tensor | None] | None = None
    cheap = False
    remade: np.ndarray | None = None  # the output of a cheap op, from its first reader's backward to its own
    borrows = False  # whether `saved` holds cheap ops in place of their outputs
    walk: _Walk | None = None  # while backward runs
    shape: tuple[int, ...] = ()
    dtype: np.dtype = np.dtype(np.float32)

    @property
    def name(self) -> str:
        return type(self).__name__

    def forward(self, *arrays: Any, **constants: Any) -> np.ndarray:
        raise TypeError(f"{self.name} must define forward(self, *arrays, **constants)")

    def backward(self, dout: np.ndarray) -> Any:
        raise TypeError(f"{self.name} must define backward(self, dout)")

    def again(self) -> np.ndarray:
        raise TypeError(f"{self.name} is cheap and must define again(self)")

    def input_shape(self, i: int) -> tuple[int, ...]:
        """In a backward: of an input that wants a gradient."""
        edge = self.edges[i] if self.edges else None
        assert edge is not None, f"{self.name}: input {i} wants no gradient"
        return edge.shape

    def so_far(self, i: int) -> np.ndarray | None:
        """In a backward: the sum of the gradients of input i that came before, if there is one to be added to in place.

        Whoever adds its own part and returns this very array saves the walk an array and an addition.
        """
        return self.walk.lend(i, self.edges[i]) if self.walk and self.edges else None

    def save(self, *values: Any) -> None:
        """Keep for backward. Save only what it reads, and None for what `needs` shows it will not."""
        self.saved = values

    @classmethod
    def apply(cls, *inputs: Any, **constants: Any) -> Tensor:
        """Compute, and record if any input requires a gradient; otherwise the op dies here and saves nothing."""
        op, on = cls(), recording.on
        arrays, needs = [], []
        for x in inputs:
            is_tensor = isinstance(x, Tensor)
            arrays.append(x.data if is_tensor else x)
            needs.append(on and is_tensor and x.requires_grad)
        op.needs = needs
        out = Tensor(op.forward(*arrays, **constants))
        if True in needs:
            op.record(inputs, out)
        if recording.watcher is not None:
            recording.watcher.forward(op, inputs, out)
        return out

    def record(self, inputs: Iterable[Any], out: Tensor) -> None:
        """Make `out` the output of this op, with an edge to whatever made each input (or to the leaf itself)."""
        self.born, self.shape, self.dtype = next(births), out.data.shape, out.data.dtype
        self.edges = []
        for x, need in zip(inputs, self.needs, strict=True):
            maker = x.op if need else None
            self.edges.append(maker or (x if need else None))
            if maker is not None and maker.cheap and not maker.borrows:
                self.saved, self.borrows = tuple(maker if kept is x.data else kept for kept in self.saved), True
        out.op, out.requires_grad = self, True

    def output(self) -> np.ndarray:
        """What a cheap op made, for those that hold the op in its place."""
        if self.edges is None:
            raise self.freed()
        if self.remade is None:
            self.remade = self.again()
        return self.remade

    def freed(self) -> RuntimeError:
        return RuntimeError(
            f"backward: the graph was already freed by an earlier backward() (at {self.name}); "
            "compute the result again, or sum the results and call backward() once"
        )

    def run_backward(self, dout: np.ndarray, walk: _Walk) -> Any:
        if self.edges is None:
            raise self.freed()
        self.walk, self.remade = walk, None
        if self.borrows:
            self.saved = tuple(kept.output() if isinstance(kept, Op) else kept for kept in self.saved)
        result = self.backward(dout)
        if len(self.needs) == 1 and not isinstance(result, (tuple, list, Tensor)):
            result = (result,)
        if not isinstance(result, Tensor) and len(result) != len(self.needs):
            raise ValueError(
                f"{self.name}.backward returned {len(result)} gradients for {len(self.needs)} inputs; "
                "return one per positional input, None where it needs none"
            )
        return result

    def free(self) -> None:
        self.saved = self.edges = self.walk = None


class _Walk:
    """The gradients still to be handed on: per op the sum so far, and a heap that yields the youngest op."""

    def __init__(self) -> None:
        self.heap: list[tuple[int, Op]] = []
        self.pending: dict[int, tuple[np.ndarray, bool]] = {}  # born -> (gradient, whether we may add in place)
        self.lent: dict[int, np.ndarray] = {}  # input -> the sum of its gradients, which the running op may add to

    def push(self, target: Op | Tensor, grad: np.ndarray, *, fresh: bool) -> None:
        if isinstance(target, Tensor):
            _accumulate(target, grad, fresh)
        elif target.born in self.pending:
            self.pending[target.born] = _add(*self.pending[target.born], grad, fresh), True
        else:
            self.pending[target.born] = (grad, fresh)
            heapq.heappush(self.heap, (-target.born, target))

    def lend(self, i: int, edge: Op | Tensor | None) -> np.ndarray | None:
        """The sum behind an edge, if it is in one piece and nobody else holds it."""
        if isinstance(edge, Op):
            total, ours = self.pending.get(edge.born, (None, False))
        else:
            total, ours = edge.grad if edge is not None else None, True
        if total is None or not ours or not total.flags.carray:
            return None
        self.lent[i] = total
        return total

    def step(self) -> None:
        """Take the youngest op, run its backward, drop what it saved, and hand its gradients on."""
        _, op = heapq.heappop(self.heap)
        dout, _ = self.pending.pop(op.born)
        result = op.run_backward(dout, self)
        if recording.watcher is not None:
            recording.watcher.backward(op, dout, result)
        edges, saved = op.edges or (), op.saved
        op.free()
        if isinstance(result, Tensor):  # a checkpoint, recomputed: go on through the graph it stands for
            self.push(result.op or result, dout, fresh=False)
            return
        lent, self.lent = self.lent, {}
        for i, edge in enumerate(edges):
            if edge is not None and not (lent and result[i] is lent.get(i)):
                dx = _checked(result[i], edge, op, i)  # of one without axes a copy costs less than the question
                self.push(edge, dx, fresh=dx.ndim > 0 and _is_ours(dx, i, result, dout, saved))


def _accumulate(leaf: Tensor, grad: np.ndarray, fresh: bool) -> None:
    # A leaf owns its gradient: clipping one in place must not change another that came from the same array.
    if leaf.grad is None:
        leaf.grad = grad if fresh else grad.copy()
    else:
        leaf.grad = _add(leaf.grad, True, grad, fresh)


def _add(total: np.ndarray, ours: bool, grad: np.ndarray, fresh: bool) -> np.ndarray:
    # 0-d sums come out of NumPy as scalars, hence asarray.
    if not total.ndim:
        return np.asarray(total + grad)
    return np.add(total, grad, out=total if ours else grad if fresh else None)


def _is_ours(dx: np.ndarray, i: int, result: Any, dout: np.ndarray, saved: Any) -> bool:
    """Whether nobody else can hold the memory of `dx`: only then may later gradients be added to it in place."""
    memory = _memory(dx)
    return (
        dx.flags.writeable
        and memory is not _memory(dout)
        and not any(_memory(other) is memory for j, other in enumerate(result) if j != i)
        and not any(_memory(kept) is memory for kept in saved or ())
    )


def _memory(array: Any) -> Any:
    """Of a view, the array it looks into; of anything else, itself."""
    while isinstance(array, np.ndarray) and array.base is not None:
        array = array.base
    return array


def _checked(dx: Any, edge: Op | Tensor, op: Op, i: int) -> np.ndarray:
    """The gradient of input i in the input's own shape and type; or an error that names the op."""
    if dx is None:
        raise ValueError(f"{op.name}.backward returned None for input {i}, which needs a gradient")
    if type(dx) is not np.ndarray:
        dx = np.asarray(dx)
    if dx.shape != edge.shape:
        raise ValueError(
            f"{op.name}.backward returned a gradient of shape {dx.shape} for input {i} of shape {edge.shape}"
        )
    if dx.dtype != edge.dtype:
        if dx.dtype.kind != "f":
            raise TypeError(f"{op.name}.backward returned a gradient of {dx.dtype} for input {i} of {edge.dtype}")
        dx = dx.astype(edge.dtype)
    return dx


def _first_gradient(out: Tensor, dout: Any) -> np.ndarray:
    if dout is None:
        if out.size != 1:
            raise ValueError(
                f"backward: a tensor of shape {out.shape} needs the gradient of its output: backward(dout) "
                "with dout of that shape, or reduce it first, with .sum() for instance"
            )
        return np.ones(out.shape, out.dtype)
    dout = np.asarray(dout.data if isinstance(dout, Tensor) else dout)
    if dout.shape != out.shape:
        raise ValueError(f"backward: dout has shape {dout.shape}, the tensor {out.shape}")
    if dout.dtype.kind not in "fiub":
        raise TypeError(f"backward: dout must hold real numbers, got {dout.dtype}")
    return dout.astype(out.dtype, copy=False)


def _as_floats(data: Any) -> np.ndarray:
    if isinstance(data, np.floating):  # what NumPy makes of arrays without axes
        return np.asarray(data)
    if isinstance(data, Tensor):
        raise TypeError("Tensor(tensor): it is one already; use .detach() for a new leaf on the same data")
    array = np.asarray(data)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"Tensor holds real numbers, got {array.dtype} from {type(data).__name__}")
    if array.dtype.kind == "f" and isinstance(data, np.ndarray):
        return array
    return array.astype(np.float32)
