"""`entrenar export`: a model into the files of other programs - transformers, llama.cpp, llama2.c, PEFT.

A model with an adapter, as fine-tuning leaves it, is written merged; or its adapter alone, for PEFT or llama.cpp
(export_adapter.py).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from entrenar.cli.parser import CommandLineError

if TYPE_CHECKING:
    from entrenar.cli.models import Opened

NAME = "export"
HELP = "write a model or adapter for transformers, PEFT or llama.cpp; llama2.c too"
EXAMPLE = """
entrenar export runs/mine --to gguf --out mine.gguf
entrenar export runs/tuned --best --to peft --out adapter
"""

DTYPES = ("float32", "bfloat16", "float16")
TYPES = {"gguf": ("f16", "f32", "bf16", "q8_0"), "gguf-lora": ("f32", "f16"), "llama2c": ("v0", "v1")}  # first: default
ADAPTERS = ("gguf-lora", "peft")  # what is of an adapter alone
FOLDERS = ("hf", "peft")

# What a folder may hold that --force replaces: a model's files, and nothing a person would miss
MODEL_FILES = (
    "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "vocab.json", "merges.txt",
    "adapter_config.json", "README.md",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "entrenar export MODEL --to FORMAT --out PATH [OPTIONS]"
    parser.add_argument("model", metavar="MODEL", help="a run, checkpoint, adapter, Hugging Face folder, llama2.c file")
    parser.add_argument("--to", choices=("hf", "peft", *TYPES), required=True, metavar="FORMAT",
                        help="hf, gguf, llama2c; an adapter alone: peft, gguf-lora")  # fmt: skip
    parser.add_argument("--out", metavar="PATH", required=True, help="the file to write; for hf and peft the folder")
    parser.add_argument("--dtype", choices=DTYPES, metavar="TYPE", help="hf: float32 (default), bfloat16, float16")
    parser.add_argument("--type", choices=sum(TYPES.values(), ()), metavar="TYPE",
                        help="gguf: f16 (default), f32, bf16, q8_0; gguf-lora: f32, f16; llama2c: v0, v1")  # fmt: skip
    parser.add_argument("--base", metavar="DIR", help="where the model of an adapter is now")
    parser.add_argument("--base-name", metavar="NAME", help="peft: what others call that model: meta-llama/...")
    parser.add_argument("--best", action="store_true", help="of a run, the checkpoint with the lowest held-out loss")
    parser.add_argument("--force", action="store_true", help="replace what PATH holds")


def run(args: argparse.Namespace) -> int:
    source, out = Path(args.model).expanduser(), Path(args.out).expanduser()
    _check_options(args)
    _check_out(args, out)
    if args.best:
        source = _best(source)

    from entrenar.cli.models import open_model

    if args.to == "peft":
        from entrenar.cli.export_adapter import write_peft

        write_peft(args, source, out)
        return 0
    adapter = args.to == "gguf-lora"
    opened = open_model(source, base=args.base, usual="stored" if adapter else None,
                        warn=lambda text: print(text, file=sys.stderr))  # fmt: skip
    if adapter:
        from entrenar.cli.export_adapter import write_gguf_lora

        write_gguf_lora(args, opened, out)
        return 0
    from entrenar.cli.plain import plain

    opened = replace(opened, model=plain(opened.model, opened.turns[0]))
    if out.resolve() in (opened.folder.resolve(), *opened.folder.resolve().parents):
        raise CommandLineError(f"--out {out}: holds the model itself; give another place")
    WRITERS[args.to](args, opened, out)
    return 0


def _check_options(args: argparse.Namespace) -> None:
    if args.to == "hf" and args.type:
        raise CommandLineError(f"--type {args.type}: is for gguf and llama2c; for hf give --dtype {', '.join(DTYPES)}")
    if args.to == "peft" and (args.type or args.dtype):
        option = f"--type {args.type}" if args.type else f"--dtype {args.dtype}"
        raise CommandLineError(f"{option}: peft gets the adapter as it is; leave it out")
    if args.to != "hf" and args.dtype:
        types = ", ".join(TYPES[args.to])
        raise CommandLineError(f"--dtype {args.dtype}: is for hf; for {args.to} give --type {types}")
    if args.base_name and args.to != "peft":
        raise CommandLineError(f"--base-name {args.base_name}: is for --to peft")
    if args.to not in FOLDERS:
        args.type = args.type or TYPES[args.to][0]
        if args.type not in TYPES[args.to]:
            raise CommandLineError(f"--type {args.type}: for {args.to} wanted one of {', '.join(TYPES[args.to])}")


def _check_out(args: argparse.Namespace, out: Path) -> None:
    """Refuse before anything is read what would lose a file, or cannot be written."""
    if args.to in FOLDERS:
        if out.is_file():
            raise CommandLineError(f"--out {out}: is a file; --to {args.to} writes a folder")
        if out.is_dir() and any(out.iterdir()):
            _check_replaceable(args, out)
    elif out.is_dir():
        name = {"gguf": "model.gguf", "gguf-lora": "adapter.gguf", "llama2c": "model.bin"}[args.to]
        raise CommandLineError(f"--out {out}: is a folder; give the file's name too, as {out / name}")
    elif out.exists() and not args.force:
        raise CommandLineError(f"--out {out}: exists already; choose another name, or replace it with --force")


def _check_replaceable(args: argparse.Namespace, out: Path) -> None:
    if not args.force:
        raise CommandLineError(f"--out {out}: exists already; choose another name, or replace it with --force")
    foreign = [p.name for p in out.iterdir() if p.is_dir() or not any(p.match(known) for known in MODEL_FILES)]
    if foreign:
        raise CommandLineError(
            f"--out {out}: holds more than a model ({', '.join(sorted(foreign)[:3])}), and is not replaced even with "
            "--force; choose another name"
        )


def _best(source: Path) -> Path:
    if not (source / "best").is_dir():
        raise CommandLineError(f"{source}: --best wants a run's folder that has a checkpoint named best")
    return source / "best"


# One writer per format: writes, and says what it wrote and what to try next


def _write_hf(args: argparse.Namespace, opened: Opened, out: Path) -> None:
    from entrenar.convert import ConvertError
    from entrenar.formats import FormatError

    dtype = args.dtype or "float32"
    with replacing(out) as fresh:
        try:
            opened.model.save_pretrained(fresh, dtype=dtype, tokenizer=opened.tokenizer)
        except FormatError:
            raise
        except ValueError as error:  # a weight too big for the type
            raise ConvertError(str(error)) from error
    files = sorted(out.iterdir())
    print(f"wrote {out}: {size_of(sum(file.stat().st_size for file in files))}, {dtype}, {_model(opened)}")
    print(f"  {', '.join(file.name for file in files)}")
    print("try it in Python:")
    print("  from transformers import AutoModelForCausalLM, AutoTokenizer")
    print(f"  model, tokenizer = (c.from_pretrained({str(out)!r}) for c in (AutoModelForCausalLM, AutoTokenizer))")


@contextlib.contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """Where to write a folder: `out`, or beside it, so that what is there stays until the new one is whole."""
    fresh = out.with_name(f".{out.name}.{os.getpid()}.new") if out.is_dir() and any(out.iterdir()) else out
    yield fresh
    if fresh != out:
        _swap(fresh, out)


def _swap(fresh: Path, out: Path) -> None:
    """Put the folder `fresh` where `out` is, and delete what was there."""
    from entrenar.files import sync

    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    os.rename(out, old)
    os.rename(fresh, out)
    sync(out.parent)
    shutil.rmtree(old)


def _write_gguf(args: argparse.Namespace, opened: Opened, out: Path) -> None:
    from entrenar.convert.gguf import export_gguf

    export_gguf(opened.model, opened.tokenizer, out, kind=args.type, replace=args.force, say=print)
    print(f"wrote {out}: {size_of(out.stat().st_size)}, {args.type.upper()}, {_model(opened)}, tokenizer inside")
    print("try it:")
    print(f'  llama-completion -m {quote(str(out))} -no-cnv -p "Once upon a time"')  # llama-cli only chats by now
    if args.type != "q8_0" and opened.model.config.hidden_size % 256 == 0:  # the small types' blocks
        print(f"  llama-quantize {quote(str(out))} {quote(str(out.with_suffix('')) + '-q4_k_m.gguf')} Q4_K_M")


def _write_llama2c(args: argparse.Namespace, opened: Opened, out: Path) -> None:
    from entrenar.convert import ConvertError
    from entrenar.convert.llama2c import export_llama2c, export_tokenizer

    beside = out.with_name("tokenizer.bin")
    if beside.exists() and not args.force:
        raise CommandLineError(f"{beside}: exists already and would be written too; choose another folder, or --force")
    export_llama2c(opened.model, out, version=int(args.type[1:]), replace=args.force)
    print(f"wrote {out}: {size_of(out.stat().st_size)}, version {args.type[1:]}, {_model(opened)}")
    try:
        export_tokenizer(opened.tokenizer, beside, vocab_size=opened.model.config.vocab_size, replace=args.force)
    except ConvertError as why:
        print(f"no tokenizer.bin: {why}")
        return
    print(f"wrote {beside}: {size_of(beside.stat().st_size)}")
    if args.type == "v0":
        print("try it:")
        print(f'  ./run {quote(str(out))} -z {quote(str(beside))} -i "Once upon a time"')


WRITERS: dict[str, Callable[..., None]] = {"hf": _write_hf, "gguf": _write_gguf, "llama2c": _write_llama2c}


def _model(opened: Opened) -> str:
    return f"{opened.model.config.parameter_count():,} parameters"


def size_of(number: int) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"
