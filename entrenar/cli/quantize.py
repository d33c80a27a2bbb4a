"""`entrenar quantize`: a model's folder into one of a quarter of its size, weight by weight, and how far off it is.

The bytes are bitsandbytes' own, which transformers reads too; the work is entrenar/llama/quantizing.py's.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from shlex import quote

import numpy as np

from entrenar.cli.bar import Progress
from entrenar.cli.parser import CommandLineError
from entrenar.cli.tensors import LAYER
from entrenar.cli.terminal import columns, paint
from entrenar.kernels.packed import Packed

NAME = "quantize"
HELP = "store a model in 4 bits or bfloat16: weight by weight, with the errors"
EXAMPLE = """
entrenar quantize Llama-3.2-1B --to nf4 --out Llama-3.2-1B-nf4
"""
KINDS = ("nf4", "fp4", "bfloat16")
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NOT_HERE = {
    "q8_0": "q8_0: Hugging Face's layout does not have it; `entrenar export MODEL --to gguf --type q8_0` writes a file "
    "for llama.cpp, and --storage q8_0 holds a model so while it is used",
    "float32": "float32: is no smaller; `entrenar export MODEL --to hf --dtype float32` writes it",
    "float16": "float16: `entrenar export MODEL --to hf --dtype float16` writes it",
}  # fmt: skip
ROWS = 1 << 20  # numbers compared at a time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "entrenar quantize MODEL --to nf4|fp4|bfloat16 --out FOLDER [OPTIONS]"
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder in Hugging Face's layout, or a run")
    add("--to", metavar="TYPE", required=True, choices=(*KINDS, *NOT_HERE),
        help="nf4: 4 bits, for weights as they are; fp4; bfloat16")  # fmt: skip
    add("--out", metavar="FOLDER", required=True, help="the folder to write, new or empty")
    add("--block", metavar="N", type=int, choices=BLOCKS, default=64, help="weights that share a scale (default 64)")
    add("--no-double-quant", action="store_true", help="keep the scales as float32, not in 8 bits")
    parser.add_argument_group("what is stored so", "the layers of the blocks; for bfloat16, all weights")


def run(args: argparse.Namespace) -> int:
    """Write the folder; returns 0."""
    if args.to in NOT_HERE:
        raise CommandLineError(f"--to {NOT_HERE[args.to]}")
    out = Path(args.out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CommandLineError(f"--out {out}: exists already; choose another name")
    from entrenar.cli.adapters import is_adapter
    from entrenar.cli.models import find_folder
    from entrenar.llama.quantizing import quantize_folder

    source = Path(args.model).expanduser()
    folder = find_folder(source, warn=lambda text: print(f"entrenar quantize: {text}", file=sys.stderr))
    if is_adapter(folder):
        raise CommandLineError(
            f"{source}: is an adapter; `entrenar merge {quote(str(source))} --storage nf4 --out FOLDER` makes it one "
            "with its model"
        )
    began, errors = time.perf_counter(), Errors()
    with Progress(str(source), 1) as bar:
        try:
            quantize_folder(folder, out, args.to, block=args.block, double_quant=not args.no_double_quant,
                            progress=bar, look=errors.look)  # fmt: skip
        except FileExistsError as error:  # since we looked
            raise CommandLineError(f"--out {error}") from None
    tell(folder, out, args.to, errors, time.perf_counter() - began)
    return 0


class Errors:
    """How far stored weights are from what they were: |W - stored W| / |W|, root mean squares, by kind of layer."""

    def __init__(self) -> None:
        self.off: dict[str, list[tuple[float, float, str]]] = {}  # kind of layer -> (squares off, squares, name)
        self.before = self.after = 0

    def look(self, name: str, array: np.ndarray, packed: Packed) -> None:
        off, whole = squares(array, packed)
        self.off.setdefault(LAYER.sub("*", name, count=1), []).append((off, whole, name))
        self.before, self.after = self.before + array.nbytes, self.after + packed.nbytes

    def lines(self) -> list[str]:
        """A row for each kind of layer: its error, and the worst of its layers."""
        rows = [["weight", "error", "worst"]]
        for kind, parts in self.off.items():
            worst = max(parts, key=lambda part: share(part[0], part[1]))
            total = share(sum(part[0] for part in parts), sum(part[1] for part in parts))
            found = LAYER.search(worst[2])
            where = f" in layer {found[0]}" if found and len(parts) > 1 else ""
            rows.append([f"{len(parts)} x {kind}" if len(parts) > 1 else worst[2], f"{total:.2%}",
                         f"{share(worst[0], worst[1]):.2%}{where}"])  # fmt: skip
        return columns(rows, left=1)


def squares(array: np.ndarray, packed: Packed) -> tuple[float, float]:
    """(sum of squares of the difference, sum of squares), a few rows at a time."""
    from entrenar import kernels
    from entrenar.quant.blockwise import as_float32

    off = whole = 0.0
    step = max(1, ROWS // max(1, packed.shape[1]))
    for start in range(0, packed.shape[0], step):
        rows = array[start : start + step]
        before = as_float32(rows.reshape(-1)).reshape(rows.shape)
        after = kernels.unpack_rows(np.arange(start, start + len(rows)), packed)
        difference = (after - before).ravel()
        off += float(np.vdot(difference, difference))
        whole += float(np.vdot(before, before))
    return off, whole


def share(off: float, whole: float) -> float:
    return math.sqrt(off / whole) if whole else 0.0


def tell(folder: Path, out: Path, kind: str, errors: Errors, seconds: float) -> None:
    from entrenar.training.display import size

    before, after = (sum(file.stat().st_size for file in path.glob("*.safetensors")) for path in (folder, out))
    head, *rows = errors.lines()
    print(paint(head, "dim"), *rows, sep="\n")
    print(f"{kind}: these weights had {size(errors.before)} and have {size(errors.after)} now")
    print(f"wrote {out}: {size(after)} of weights, where {size(before)} were, in {seconds:,.1f} s")
    print(f"try it:\n  entrenar chat {quote(str(out))}")
