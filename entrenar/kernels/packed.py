"""A frozen matrix as its storage format has it: what the kernels read instead of floats.

    nf4, fp4    16 values of a table, a nibble each, times a scale for each block of the flat matrix
    q8_0        an int8, times a scale for each block
    bfloat16    the upper half of a float32; no scales

Scales may be stored in 8 bits themselves (double quantization): `Nested`. The bytes are those of bitsandbytes (nf4,
fp4) and of GGUF (q8_0), so files go in and out unchanged. Says what the formats are; `entrenar/quant` makes them.

W (O, I) is stored flat, row by row; blocks run over the flat matrix, across the ends of rows.
"""

# O features out (rows), I features in (columns)

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

# The 16 values of a nibble. NF4: quantiles of a normal distribution, 0 exact (Dettmers et al. 2023, "QLoRA"); the
# figures are those of bitsandbytes' get_4bit_type, as its C code has them.
NF4 = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0], np.float32)  # fmt: skip
# FP4: sign, two bits of exponent, one of mantissa; divided by 12, so that the greatest is 1.
_FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float64) / 12
FP4 = np.concatenate([_FP4, 0.0 - _FP4]).astype(np.float32)  # code 8 is +0
TABLES = {"nf4": NF4, "fp4": FP4}
KINDS = ("nf4", "fp4", "q8_0", "bfloat16")
COMPUTES = ("float32", "int16", "bfloat16")
# compute = "int16": what a table is multiplied by before it is rounded. Up to here eight products with 2^14 fit into 32
# bits; of all such numbers NF4's values are nearest to whole ones at 15684 (7e-6 off, root mean square; 1.4e-5 at
# 16383), and FP4's, which are 192nds, are whole at 85 * 192.
INTEGER_SCALES = {"nf4": 15684, "fp4": 16320}
INTEGERS = {kind: np.rint(TABLES[kind].astype(np.float64) * n).astype(np.int16) for kind, n in INTEGER_SCALES.items()}
GROUP = 64  # values of x that share a scale, there; blocks of W are the same
FEW_ROWS = 8  # products of so many rows wait for memory whatever the arithmetic: they stay float32


@dataclass(frozen=True, eq=False)
class Nested:
    """Scales in 8 bits: scale[i] = table[codes[i]] * absmax[i // block] + offset, in float32.

    codes (n,) uint8   table (256,) float32   absmax (ceil(n / block),) float32
    """

    codes: np.ndarray
    table: np.ndarray
    absmax: np.ndarray
    offset: float
    block: int = 256

    @property
    def size(self) -> int:
        return self.codes.size

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.table.nbytes + self.absmax.nbytes


@dataclass(frozen=True, eq=False)
class Packed:
    """A frozen matrix W (O, I) in a storage format.

    kind     one of KINDS
    codes    nf4, fp4: uint8 (ceil(O I / 2),), the first value in the high nibble; q8_0: int8 (O I,);
             bfloat16: uint16 (O I,)
    scales   float32 (ceil(O I / block),), or Nested with as many; none for bfloat16
    block    values to a scale, a multiple of 2
    compute  the arithmetic of its products, whose results are float32 always:
             float32
             int16     x W^T of up to FEW_ROWS rows rounds both to whole numbers of 15 bits, where `in_integers`
             bfloat16  products of more than FEW_ROWS rows round both operands to bfloat16, and add in float32

    Raises ValueError for arrays that do not fit the shape: kernels trust a Packed that exists.
    """

    kind: str
    shape: tuple[int, int]
    codes: np.ndarray
    scales: np.ndarray | Nested | None = None
    block: int = 64
    compute: str = "float32"

    def __post_init__(self) -> None:
        if wrong := self._problems():
            raise ValueError(f"Packed {self.kind} {self.shape}: " + "; ".join(wrong))

    dtype = np.dtype(np.float32)
    ndim = 2
    requires_grad = False

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.codes.nbytes + (0 if self.scales is None else self.scales.nbytes)

    @property
    def in_integers(self) -> bool:
        """Whether products of few rows are of whole numbers: asked for, of 4-bit tables, in rows of whole groups."""
        whole_groups = self.block == GROUP and self.shape[1] % GROUP == 0
        return self.compute == "int16" and self.kind in TABLES and whole_groups

    @cached_property
    def smooth(self) -> Packed:
        """This matrix without int16: its product is then no step function of x, and a gradient fits it."""
        return replace(self, compute="float32") if self.compute == "int16" else self

    def _problems(self) -> list[str]:
        if self.kind not in KINDS:
            return [f"wanted one of the kinds {', '.join(KINDS)}"]
        if len(self.shape) != 2 or min(self.shape) < 0:
            return ["wanted a shape (O, I)"]
        if self.compute not in COMPUTES:
            return [f"compute = {self.compute!r}: wanted one of {', '.join(COMPUTES)}"]
        wanted = {"nf4": np.uint8, "fp4": np.uint8, "q8_0": np.int8, "bfloat16": np.uint16}[self.kind]
        count = -(-self.size // 2) if self.kind in TABLES else self.size
        wrong = _array_problems("codes", self.codes, wanted, count)
        if self.kind == "bfloat16":
            return wrong + (["bfloat16 has no scales"] if self.scales is not None else [])
        if not (2 <= self.block <= 1 << 20 and self.block % 2 == 0):
            return [*wrong, f"block = {self.block}: wanted an even number from 2 to 1,048,576"]
        blocks = -(-self.size // self.block)
        if isinstance(self.scales, Nested):
            n = self.scales
            if not (1 <= n.block <= 1 << 20 and math.isfinite(n.offset)):
                wrong.append(f"nested block = {n.block}, offset = {n.offset}")
                return wrong
            wrong += _array_problems("nested codes", n.codes, np.uint8, blocks)
            wrong += _array_problems("nested table", n.table, np.float32, 256)
            return wrong + _array_problems("nested absmax", n.absmax, np.float32, -(-blocks // n.block))
        return wrong + _array_problems("scales", self.scales, np.float32, blocks)


def _array_problems(name: str, array: object, dtype: type, count: int) -> list[str]:
    if not isinstance(array, np.ndarray):
        return [f"{name}: wanted an array, got {type(array).__name__}"]
    if array.dtype != dtype or array.shape != (count,) or not array.flags.c_contiguous or not array.flags.aligned:
        return [f"{name}: wanted {np.dtype(dtype)} ({count},), contiguous, got {array.dtype} {array.shape}"]
    return []
