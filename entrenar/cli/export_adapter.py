"""An adapter alone, for other programs: a folder as PEFT has it, or a GGUF file that llama.cpp puts on a model."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from entrenar.cli.parser import CommandLineError

if TYPE_CHECKING:
    from entrenar.cli.models import Opened

# The model card, as PEFT writes it: for the page of a model on a hub, and for people
CARD = """---
base_model: {base}
library_name: peft
pipeline_tag: text-generation
tags:
- base_model:adapter:{base}
- {kind}
- transformers
---

# {title}

A {name} adapter of rank {r} (alpha {alpha:g}) on {targets}, for {base}.
{facts}
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = {base_text}
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), "path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained({tokenizer})
```
"""


def write_peft(args: argparse.Namespace, source: Path, out: Path) -> None:
    """The adapter's folder, out of its checkpoint: two files, the tokenizer where one is there, a model card."""
    from entrenar.adapters.files import CONFIG, WEIGHTS, find_adapter, read_adapter_config
    from entrenar.cli.adapters import is_adapter, named_after, state_of
    from entrenar.cli.export import replacing, size_of
    from entrenar.cli.models import ADAPTERS, find_folder
    from entrenar.files import new_folder
    from entrenar.formats.safetensors import SafeTensors
    from entrenar.llama.quantizing import BESIDE

    folder = find_folder(source, warn=lambda text: print(text, file=sys.stderr), wanted=ADAPTERS)
    if not is_adapter(folder):
        raise _no_adapter(source, "peft")
    folder = find_adapter(folder)
    _refuse_itself(out, folder)
    config = read_adapter_config(folder)
    values = config.to_dict() | {"base_model_name_or_path": args.base_name or config.base_model_name_or_path}
    beside = sorted({file for pattern in BESIDE for file in folder.glob(pattern) if file.is_file()})
    with SafeTensors(folder / WEIGHTS) as weights:  # read as if by an enemy: it goes on to others
        count = sum(entry.size for entry in weights.entries.values())
    with replacing(out) as fresh, new_folder(fresh) as temporary:
        (temporary / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for file in (folder / WEIGHTS, *beside):
            shutil.copyfile(file, temporary / file.name)
        card = model_card(values, named_after(source), state_of(folder), tokenizer=bool(beside))
        (temporary / "README.md").write_text(card, encoding="utf-8")
    files = sorted(out.iterdir())
    print(f"wrote {out}: {size_of(sum(file.stat().st_size for file in files))}, {count:,} parameters")
    print(f"  {', '.join(file.name for file in files)}")
    base = values["base_model_name_or_path"]
    if not args.base_name:
        print(f"  for the model {base}; --base-name meta-llama/... writes another name")
    print("try it in Python:")
    print("  from peft import PeftModel")
    print("  from transformers import AutoModelForCausalLM")
    print(f"  model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {str(out)!r})")


def model_card(values: dict[str, Any], title: str, state: dict[str, Any], *, tokenizer: bool) -> str:
    """README.md: what the adapter is and how it is used."""
    base = str(values["base_model_name_or_path"] or "its base model")
    targets = values["target_modules"]
    steps, tokens = state.get("step"), state.get("tokens")
    facts = "Trained with entrenar" if state else ""
    if type(steps) is int and type(tokens) is int:
        facts += f": {steps:,} steps, {tokens:,} tokens"
    return CARD.format(
        base=base,
        base_text=json.dumps(base, ensure_ascii=False),
        kind="dora" if values["use_dora"] else "lora",
        name="DoRA" if values["use_dora"] else "LoRA",
        title=title,
        r=values["r"],
        alpha=values["lora_alpha"],
        targets=targets if isinstance(targets, str) else ", ".join(targets or ("q_proj", "v_proj")),
        facts=f"{facts}.\n" if facts else "",
        tokenizer='"path/to/this/folder"' if tokenizer else "base",
    )


def write_gguf_lora(args: argparse.Namespace, opened: Opened, out: Path) -> None:
    """One file, which is put on the model's own GGUF at run time."""
    from entrenar.cli.export import size_of
    from entrenar.convert.gguf_adapter import export_gguf_adapter

    name = opened.turns[0]
    if name is None:
        raise _no_adapter(Path(args.model), "gguf-lora")
    export_gguf_adapter(opened.model, out, adapter=name, kind=args.type, name=name, replace=args.force)
    print(f"wrote {out}: {size_of(out.stat().st_size)}, {args.type.upper()}")
    print("try it, on the model's own GGUF:")
    print(f"  entrenar export {quote(str(opened.folder))} --to gguf --out base.gguf")
    print(f'  llama-completion -m base.gguf --lora {quote(str(out))} -no-cnv -p "Once upon a time"')


def _refuse_itself(out: Path, folder: Path) -> None:
    if out.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise CommandLineError(f"--out {out}: holds the adapter itself; give another place")


def _no_adapter(source: Path, to: str) -> CommandLineError:
    return CommandLineError(
        f"{source}: is a whole model, and --to {to} is for an adapter; give a fine-tuning run, or the adapter's folder"
    )
