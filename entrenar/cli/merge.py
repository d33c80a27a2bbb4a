"""`entrenar merge`: a model and its adapter made one plain model, with the proof that it is the same.

The merging, and what is compared, is entrenar/adapters/merge.py.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

import numpy as np

from entrenar.cli.parser import CommandLineError

if TYPE_CHECKING:
    from entrenar.cli.models import Opened

NAME = "merge"
HELP = "make a model and its adapter one: with the proof that it is the same"
EXAMPLE = """
entrenar merge runs/tuned --out tuned
entrenar merge Llama-3.2-1B adapter/ --out tuned --data held-out.txt
"""
DTYPES = ("float32", "bfloat16", "float16")
STORAGES = ("nf4", "fp4")
TOKENS = 512  # of the text, that are compared

# What is compared over where no text is given: kinds of text that models are used for
TEXT = """The harbour was quiet that morning. Two boats lay at the long pier, and a man in a grey coat counted crates.
"Forty-one," he said to nobody. "There should have been forty-three." He looked at his list again, then at the sky.

User: What is the capital of France, and how many people live there?
Assistant: The capital of France is Paris. About 2.1 million people live in the city itself.

def mean(values: list[float]) -> float:
    \"\"\"The arithmetic mean. Raises ValueError where there is none.\"\"\"
    if not values:
        raise ValueError("mean of nothing")
    return sum(values) / len(values)

Water boils at 100 degrees Celsius at sea level; in La Paz, 3,600 metres higher, at about 88. Therefore pasta takes
longer there. {"city": "La Paz", "height": 3600, "boils_at": 88.0}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "entrenar merge MODEL [ADAPTER] --out FOLDER [OPTIONS]"
    add = parser.add_argument
    add("model", metavar="MODEL", help="a fine-tuning run, an adapter, or a model")
    add("adapter", metavar="ADAPTER", nargs="?", help="for a model: a run, or a folder as PEFT has it")
    add("--out", metavar="FOLDER", required=True, help="the folder to write, new or empty")
    add("--base", metavar="DIR", help="where the model of an adapter is now")
    add("--dtype", choices=DTYPES, metavar="TYPE", help="float32, bfloat16, float16 (default: as the model is stored)")
    add("--storage", choices=STORAGES, metavar="TYPE", help="nf4, fp4: the layers in 4 bits again")
    add("--data", metavar="FILE", help="text that neither was trained on, for the proof (default: a short one)")
    add("--force", action="store_true", help="write it although rounding erases the update")


def run(args: argparse.Namespace) -> int:
    """Merge, and print the proof; returns 0. Raises CommandLineError where rounding would erase the update."""
    out = Path(args.out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CommandLineError(f"--out {out}: exists already; choose another name")
    from entrenar.adapters.merge import Erased, merge_adapter
    from entrenar.cli.models import open_model

    opened = open_model(args.model, adapters=[args.adapter] if args.adapter else [], base=args.base, usual="stored",
                        warn=lambda text: print(f"entrenar merge: {text}", file=sys.stderr))  # fmt: skip
    name = opened.turns[0]
    if name is None:
        raise CommandLineError(f"{args.model}: is a whole model; name the adapter to merge behind it")
    ids = held_out(opened, args.data)
    try:
        proof = merge_adapter(opened.model, name, out, held_out=ids, dtype=args.dtype, storage=args.storage,
                              force=args.force, beside=tokenizer_folder(opened, name),
                              report=report)  # fmt: skip
    except Erased as error:
        raise CommandLineError(in_options(str(error))) from None
    except FileExistsError as error:  # since we looked
        raise CommandLineError(f"--out {error}") from None
    keep_generation(opened, out)
    tell(out, opened, str(proof))
    return 0


def report(text: str) -> None:
    """What is being done; the proof comes in the end."""
    if not text.startswith("merged"):
        print(text, file=sys.stderr)


def held_out(opened: Opened, source: str | None) -> np.ndarray:
    """Tokens (n,) to compare over. Raises CorpusError where the file cannot be read, or holds no text."""
    limit = min(TOKENS, opened.model.config.max_position_embeddings)
    if source is None:
        ids = opened.tokenizer.encode(TEXT)
    else:
        from entrenar.cli.evaluate import whole_text

        ids = whole_text(opened, source).tokens
    return np.array([*opened.begin, *ids[: limit - len(opened.begin)].tolist()])


def tokenizer_folder(opened: Opened, name: str) -> Path:
    """Where the tokenizer lies: beside the adapter, with the template it was trained with, or the model."""
    tuned = opened.tuned[name]
    return tuned if any((tuned / file).exists() for file in ("tokenizer.json", "tokenizer.model")) else opened.folder


def keep_generation(opened: Opened, out: Path) -> None:
    """What ends a text may be said in the model's generation_config.json alone."""
    if (opened.folder / "generation_config.json").is_file():
        shutil.copyfile(opened.folder / "generation_config.json", out / "generation_config.json")


def in_options(text: str) -> str:
    """The words of a refusal as they are typed here."""
    text = text.removeprefix("merge: ")
    for python, option in (("force=True", "--force"), ("dtype='float32'", "--dtype float32")):
        text = text.replace(python, option)
    return text.replace("or bfloat16", "or --dtype bfloat16")


def tell(out: Path, opened: Opened, proof: str) -> None:
    from entrenar.training.display import size

    files = sorted(file for file in out.iterdir())
    print(f"wrote {out}: {size(sum(file.stat().st_size for file in files))} in {', '.join(f.name for f in files)}")
    print(proof)
    print(f"try it:\n  entrenar chat {quote(str(out))}")
