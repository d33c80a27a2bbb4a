"""What bitsandbytes makes of some matrices, stored in quant_vectors.json: compared where it is not installed, too.

`python tests/quant_vectors.py`, where it is, writes that file. The matrices come out of integers alone: they are the
same with every NumPy. Long arrays are stored as the beginning of their SHA-256.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).with_suffix(".json")
SHORT = 200  # bytes up to which an array is stored itself
SMALL = [(1, 1), (3, 5), (3, 50), (5, 64), (300, 173), (768, 768)]
LARGE = [(4096, 4096), (4096, 11008)]  # of a LLaMA of 7 billion weights


def matrix(O: int, I: int) -> np.ndarray:
    """(O, I) float32: a bell of fixed, random-looking numbers, with some rows of zeros."""
    k = np.arange(1, O * I + 1, dtype=np.uint64) * np.uint64(6364136223846793005)
    k ^= k >> np.uint64(29)
    k *= np.uint64(0xBF58476D1CE4E5B9)
    k ^= k >> np.uint64(32)
    u = (k >> np.uint64(40)).astype(np.float64) / 2**24 - 0.5
    w = (u * u * u).astype(np.float32).reshape(O, I)
    w[7::50] = 0
    return w


def cases(shapes: list[tuple[int, int]]) -> list[dict[str, Any]]:
    blocks = {(300, 173): (32, 64, 256, 4096)}
    return [
        {"shape": list(shape), "kind": kind, "block": block, "double_quant": nested}
        for shape in shapes
        for kind in ("nf4", "fp4")
        for block in blocks.get(shape, (64,))
        for nested in (False, True)
    ]


def told(array: np.ndarray) -> str:
    """An array as the file has it: its type, its shape, and its bytes or their hash."""
    raw = np.ascontiguousarray(array).tobytes()
    content = raw.hex() if len(raw) <= SHORT else "sha256 " + hashlib.sha256(raw).hexdigest()[:32]
    return f"{array.dtype} {list(array.shape)} {content}"


def by_bitsandbytes(case: dict[str, Any], w: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint, by bitsandbytes itself, PyTorch adding on one thread."""
    import torch
    from bitsandbytes import functional

    torch.set_num_threads(1)
    codes, state = functional.quantize_4bit(torch.from_numpy(w), blocksize=case["block"], quant_type=case["kind"],
                                            compress_statistics=case["double_quant"])  # fmt: skip
    parts = {f"weight.{part}": array.numpy() for part, array in state.as_dict(packed=True).items()}
    return {"weight": codes.numpy()} | parts


def main() -> None:
    import bitsandbytes
    import torch

    found = []
    for case in cases(SMALL + LARGE):
        arrays = by_bitsandbytes(case, matrix(*case["shape"]))
        found.append(case | {"arrays": {name: told(array) for name, array in arrays.items()}})
    made_by = {"bitsandbytes": bitsandbytes.__version__, "torch": torch.__version__}
    FILE.write_text(json.dumps({"made by": made_by, "cases": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
