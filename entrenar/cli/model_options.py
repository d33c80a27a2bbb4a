"""The options of every verb that uses a model: adapters beside it, where their base is, how its weights are held."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from entrenar.cli.parser import told_together
from entrenar.kernels.packed import COMPUTES, KINDS

if TYPE_CHECKING:
    from entrenar.cli.models import Opened

OFF, BASE = "off", "base"  # what the model alone is called: to switch to, and beside others
STORAGES = ("stored", "float32", *KINDS)


def add_model_options(add: Callable[..., Any]) -> None:
    """`add`: a parser's add_argument, or that of one of its groups."""
    add("--adapter", metavar="[NAME=]DIR", action="append", default=[],
        help="an adapter to use, or off; may come again")  # fmt: skip
    add("--base", metavar="DIR", help="where the model of an adapter is now")
    told_together(
        add("--storage", metavar="T", choices=STORAGES, help="weights: nf4, stored, ...; products: int16, float32"),
        add("--compute", metavar="T", choices=COMPUTES, help="products with such weights: float32, int16, ..."),
    )


def opened(args: argparse.Namespace, verb: str, *, writes: bool = False) -> Opened:
    """The model that was asked for, with its adapters; what is to be known of it is said on stderr.

    writes   it is for writing text: with weights in 4 bits, in int16 where nothing else is asked for
    """
    from entrenar import kernels
    from entrenar.cli.models import open_model

    found = open_model(args.model, adapters=args.adapter, base=args.base, storage=args.storage, compute=args.compute,
                       usual="stored", writes=writes,
                       warn=lambda text: print(f"entrenar {verb}: {text}", file=sys.stderr))  # fmt: skip
    kernels.keep_freed_memory()  # not before: what making weights freed is given back
    return found
