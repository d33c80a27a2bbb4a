"""Layers with adapters beside them: the frozen base, and for each adapter its own few weights.

One adapter is active, or none, and then a layer is its base and nothing else. The names of the weights are PEFT's:
`q_proj.base_layer.weight`, `q_proj.lora_A.default.weight`, `embed_tokens.lora_embedding_A.default`.
"""

# N rows (tokens), I in, O out, r rank, V vocabulary, C channels

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from entrenar import ops
from entrenar.kernels.packed import Packed
from entrenar.nn import Embedding, Linear, Module
from entrenar.ops.linear import times, times_transposed
from entrenar.ops.loss import Reduction
from entrenar.ops.low_rank import row_squares, update_norm
from entrenar.tensor import Tensor, is_recording

A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"  # as PEFT's files name them
EMBEDDING_A, EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"
HEAD_ROWS = 256  # tokens whose logits an adapted head has at a time


@dataclass(frozen=True)
class Settings:
    """What an adapter is in one layer: rank r, what B A is multiplied by, dropout into A, and whether it is DoRA."""

    r: int
    scale: float
    dropout: float = 0.0
    dora: bool = False


class Weight(Module):
    """One tensor, called weight."""

    def __init__(self, values: np.ndarray) -> None:
        self.weight = Tensor(values)


class Adapted(Module):
    """A module, and for some adapters a copy of it that is trained as a whole (PEFT's modules_to_save)."""

    def __init__(self, base_layer: Any) -> None:
        self.base_layer = base_layer
        self.modules_to_save: dict[str, Any] = {}
        self.active: str | None = None
        self.training = base_layer.training

    @property
    def weight(self) -> Tensor | Packed:
        """The base's weight, whichever adapter is active: a head tied to an adapted embedding stays what it was."""
        return self.base_layer.weight

    @property
    def module(self) -> Any:
        """The base, or the active adapter's own copy of it."""
        return self.modules_to_save.get(self.active or "", self.base_layer)

    def forward(self, x: Any) -> Tensor:
        return self.module(x)

    def cross_entropy(self, x: Tensor, targets: np.ndarray, *, reduction: Reduction = "mean") -> Tensor:
        return self.module.cross_entropy(x, targets, reduction=reduction)

    def add_copy(self, name: str, values: Mapping[str, np.ndarray]) -> None:
        """Give an adapter its own copy of the module, with these values for its tensors ("weight", "bias")."""
        base = self.base_layer
        copy = Module.__new__(type(base))
        vars(copy).update(vars(base))  # eps and the like
        for key, array in values.items():
            setattr(copy, key, Tensor(array))
        self.modules_to_save[name] = copy

    def tensors(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """(name in PEFT's files, tensor) of what belongs to an adapter here."""
        if name in self.modules_to_save:
            yield from self.modules_to_save[name]._named_tensors()

    def remove(self, name: str) -> None:
        for value in vars(self).values():
            if isinstance(value, dict):
                value.pop(name, None)

    def names(self) -> set[str]:
        """The adapters that have anything here."""
        return set(self.modules_to_save)


class LowRank(Adapted):
    """What linear layers and embeddings have in common: settings, the magnitudes of DoRA, and their norm."""

    def __init__(self, base_layer: Any) -> None:
        super().__init__(base_layer)
        self.settings: dict[str, Settings] = {}
        self.lora_magnitude_vector: dict[str, Weight] = {}
        self._squares: np.ndarray | None = None
        self._norms: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}  # A, B, and their norm

    def names(self) -> set[str]:
        return super().names() | set(self.settings)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """(A, B) of an adapter."""
        raise TypeError(f"{type(self).__name__} must define factors()")

    def norm(self, name: str) -> np.ndarray:
        """||W + scale B A||, float64: of each row of a linear layer, of each column of an embedding.

        Where nothing is recorded it is kept, and taken again while A and B are the same: reading W for a token costs
        less than its norm.
        """
        a, b = (factor.data for factor in self.factors(name))
        kept = self._norms.get(name)
        if kept is not None and np.array_equal(kept[0], a) and np.array_equal(kept[1], b):
            return kept[2]
        norm = base_norm(self.base_layer, self.squares(), a, b, self.settings[name].scale)
        if is_recording():
            self._norms.pop(name, None)
        else:
            self._norms[name] = a.copy(), b.copy(), norm
        return norm

    def squares(self) -> np.ndarray:
        """||W||^2 along what `norm` is of; computed once, as the base never changes."""
        if self._squares is None:
            self._squares = base_squares(self.base_layer)
        return self._squares

    def _add_magnitude(self, name: str, values: Mapping[str, np.ndarray], settings: Settings) -> None:
        self.settings[name] = settings
        if settings.dora:
            self.lora_magnitude_vector[name] = Weight(values[MAGNITUDE])

    def _magnitude(self, name: str) -> Iterator[tuple[str, Tensor]]:
        if name in self.lora_magnitude_vector:
            yield MAGNITUDE, self.lora_magnitude_vector[name].weight


class LoRALinear(LowRank):
    """y = x W^T + b + scale (dropout(x) A^T) B^T;  DoRA: m / ||W + scale B A|| times all but b"""

    def __init__(self, base_layer: Linear) -> None:
        super().__init__(base_layer)
        self.lora_A: dict[str, Weight] = {}
        self.lora_B: dict[str, Weight] = {}

    def add(self, name: str, values: Mapping[str, np.ndarray], settings: Settings) -> None:
        """Give the layer an adapter: A (r, I), B (O, r) and DoRA's magnitudes (O,), by their names in PEFT's files."""
        self.lora_A[name], self.lora_B[name] = Weight(values[A]), Weight(values[B])
        self._add_magnitude(name, values, settings)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        return self.lora_A[name].weight, self.lora_B[name].weight

    def tensors(self, name: str) -> Iterator[tuple[str, Tensor]]:
        yield from super().tensors(name)
        if name in self.settings:
            yield from zip((A, B), self.factors(name), strict=True)
            yield from self._magnitude(name)

    def forward(self, x: Tensor) -> Tensor:
        name = self.active
        if name is None or name not in self.settings:
            return self.module(x)
        base, how, (a, b) = self.base_layer, self.settings[name], self.factors(name)
        # Nobody trains under no_grad: evaluation is without dropout even where eval() was forgotten
        dropped = ops.dropout(x, how.dropout) if how.dropout and self.training and is_recording() else None
        if not how.dora:
            return ops.lora_linear(x, base.weight, base.bias, a, b, scale=how.scale, dropped=dropped)
        m = self.lora_magnitude_vector[name].weight
        return ops.dora_linear(
            x, base.weight, base.bias, a, b, m, norm=self.norm(name), scale=how.scale, dropped=dropped
        )

    def cross_entropy(self, x: Tensor, targets: np.ndarray, *, reduction: Reduction = "mean") -> Tensor:
        if self.active is None or self.active not in self.settings:
            return super().cross_entropy(x, targets, reduction=reduction)
        total = Tensor(np.zeros((), x.dtype))
        for at in range(0, len(targets), HEAD_ROWS):  # each chunk's logits are forgotten, and made again in backward
            total = total + ops.checkpoint(self._loss, x[at : at + HEAD_ROWS], targets[at : at + HEAD_ROWS])
        count = 1 if reduction == "sum" else max(int(np.count_nonzero(targets != -100)), 1)
        return total * (1 / count)

    def _loss(self, x: Tensor, targets: np.ndarray) -> Tensor:
        return ops.cross_entropy(self(x), targets, reduction="sum")


class LoRAEmbedding(LowRank):
    """y = W[ids] + scale (A^T)[ids] B^T;  DoRA: m / ||column of W + scale A^T B^T|| times all of it

    W (V, C)   A (r, V)   B (C, r)   m (C,). Without dropout, as in PEFT.
    """

    def __init__(self, base_layer: Embedding) -> None:
        super().__init__(base_layer)
        self.lora_embedding_A: dict[str, Tensor] = {}
        self.lora_embedding_B: dict[str, Tensor] = {}

    def add(self, name: str, values: Mapping[str, np.ndarray], settings: Settings) -> None:
        """Give the layer an adapter: A (r, V), B (C, r) and DoRA's magnitudes (C,), by their names in PEFT's files."""
        self.lora_embedding_A[name] = Tensor(values[EMBEDDING_A])
        self.lora_embedding_B[name] = Tensor(values[EMBEDDING_B])
        self._add_magnitude(name, values, settings)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        return self.lora_embedding_A[name], self.lora_embedding_B[name]

    def tensors(self, name: str) -> Iterator[tuple[str, Tensor]]:
        yield from super().tensors(name)
        if name in self.settings:
            yield from zip((EMBEDDING_A, EMBEDDING_B), self.factors(name), strict=True)
            yield from self._magnitude(name)

    def forward(self, ids: np.ndarray) -> Tensor:
        name = self.active
        if name is None or name not in self.settings:
            return self.module(ids)
        how, (a, b) = self.settings[name], self.factors(name)
        y = ops.lora_embedding(ids, self.base_layer.weight, a, b, scale=how.scale)
        if not how.dora:
            return y
        m = self.lora_magnitude_vector[name].weight
        return y * (m * (1 / self.norm(name)).astype(m.dtype))


def base_array(weight: Tensor | Packed) -> np.ndarray | Packed:
    return weight if isinstance(weight, Packed) else weight.data


def base_squares(base: Linear | Embedding) -> np.ndarray:
    return row_squares(base_array(base.weight), axis=0 if isinstance(base, Embedding) else 1)


def base_norm(base: Linear | Embedding, squares: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """||W + scale B A||; an embedding's W is on its side: (V, C), where A (r, V) and B (C, r)."""
    w = base_array(base.weight)
    aw = times(a, w) if isinstance(base, Embedding) else times_transposed(a, w)  # (r, C) or (r, O)
    return update_norm(squares, aw, a, b, scale=scale)
