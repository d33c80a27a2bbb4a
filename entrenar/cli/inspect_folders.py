"""The kinds of folders `entrenar inspect` knows, by the files in them: models, adapters, checkpoints, runs, prepared
data."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from entrenar.cli.adapters import below, is_adapter
from entrenar.cli.found import SHOWN, Found
from entrenar.cli.inspect_adapters import adapter_facts, stored_in_four_bits
from entrenar.cli.inspect_files import look_at_file
from entrenar.cli.terminal import clipped
from entrenar.formats import FormatError


def look(path: Path) -> Found:
    """What is at `path`. Raises FormatError where it is nothing that is known here, or not whole."""
    from entrenar.training.checkpoint import STATE, saved_steps

    if not path.exists():
        raise FormatError(f"{path}: there is no such file or folder")
    if not path.is_dir():
        return look_at_file(path)
    if (path / STATE).is_file():
        return checkpoint(path)
    if (path / "metrics.jsonl").is_file() or saved_steps(path):
        return run_folder(path)
    if (path / "facts.json").is_file():
        return prepared(path)
    if is_adapter(path):
        return adapter_folder(path)
    if (path / "config.json").is_file() or any(path.glob("*.safetensors")):
        return model_folder(path)
    raise FormatError(f"{path}: neither a run's folder (metrics.jsonl), nor a checkpoint ({STATE}), nor a model's "
                      "folder (config.json, model.safetensors), nor an adapter's (adapter_config.json)")  # fmt: skip


def model_folder(path: Path) -> Found:
    """A model as Hugging Face keeps it, in one file or several."""
    found = Found("model in Hugging Face's layout", path)
    if (path / "config.json").is_file():
        found.facts |= shape_of(path / "config.json")
    else:
        found.problems.append("config.json is missing")
    look_inside(found, weight_files(path, found.problems))
    if (path / "config.json").is_file():
        from entrenar.formats.strict_json import read_object

        found.facts |= stored_in_four_bits(found, read_object(path / "config.json").get("quantization_config"))
    return found


def adapter_folder(path: Path) -> Found:
    """An adapter as PEFT keeps it. Raises FormatError where it is none that can be read."""
    facts, problems = adapter_facts(path)
    found = Found("adapter", path, facts, problems=problems)
    look_inside(found, sorted(path.glob("*.safetensors")))
    return found


def look_inside(found: Found, files: Iterable[Path]) -> None:
    """These files, and the tokenizer beside them."""
    from entrenar.data import TokenizerError

    tokenizers = [file for name in ("tokenizer.json", "tokenizer.model") if (file := found.path / name).is_file()]
    for file in (*files, *tokenizers[:1]):
        try:
            found.below.append(look_at_file(file))
        except (FormatError, TokenizerError) as error:  # the others are shown all the same
            found.problems.append(str(error).removeprefix(f"{found.path}/"))


def weight_files(path: Path, problems: list[str]) -> list[Path]:
    """The files that hold the weights; what does not agree with the index becomes a problem."""
    from entrenar.formats.safetensors import read_header
    from entrenar.formats.strict_json import read_object

    index = path / "model.safetensors.index.json"
    if not index.is_file():
        files = sorted(path.glob("*.safetensors"))
        problems += [] if files else ["there are no *.safetensors"]
        return files
    places = read_object(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise FormatError(f"{index}: weight_map: wanted the name of a file for each tensor")
    names = sorted(set(places.values()))
    if odd := [name for name in names if Path(name).name != name]:
        raise FormatError(f"{index}: weight_map names {odd[0]!r}: wanted a file of this folder")
    files = [path / name for name in names if (path / name).is_file()]
    gone = [name for name in names if path / name not in files]
    problems += [f"{clipped(name, 100)} is missing, which {index.name} names" for name in gone[:SHOWN]]
    held = {tensor: file.name for file in files for tensor in read_header(file).entries}
    here = {file.name for file in files}
    lost = [tensor for tensor, name in places.items() if name in here and held.get(tensor) != name]
    problems += [f"{clipped(name, 100)} is not in {places[name]}, where {index.name} says" for name in lost[:SHOWN]]
    return files


def shape_of(config: Path) -> dict[str, Any]:
    """The model's shape in words, by its config.json; or why entrenar cannot have it."""
    from entrenar.formats.strict_json import read_object
    from entrenar.llama import LlamaConfig

    content = read_object(config)
    try:
        shape = LlamaConfig.from_dict(content)
    except (ValueError, TypeError) as error:
        return {"model": f"{content.get('model_type', 'unknown')}: not one entrenar trains: {error}"}
    heads, key_heads, width = shape.heads
    return {
        "model": f"LLaMA, {shape.num_hidden_layers} layers, {shape.hidden_size} wide, {heads} heads of {width}"
        + (f" on {key_heads} key/value heads" if key_heads != heads else "")
        + f", feed-forward {shape.intermediate_size}",
        "vocabulary": shape.vocab_size,
        "context": shape.max_position_embeddings,
        "parameters": shape.parameter_count(),
    }


def checkpoint(path: Path) -> Found:
    """A checkpoint of ours: a model's folder with the state of its run, and the hash of every file."""
    from entrenar.formats.strict_json import read_object
    from entrenar.training.checkpoint import OPTIMIZER, CheckpointError, read_sums, verify

    found = adapter_folder(path) if is_adapter(path) else model_folder(path)
    found.kind = f"checkpoint of an {found.kind}" if is_adapter(path) else "checkpoint"
    for part in found.below:
        part.aside = part.path.name == OPTIMIZER
    state = read_object(path / "state.json")
    told = {name: state[name] for name in ("step", "steps", "tokens", "seconds") if name in state}
    storage = below(state, "config", "base", "storage")
    held = {"held as": storage} if isinstance(storage, str) and storage != "auto" else {}
    found.facts = told | found.facts | held
    try:
        verify(path)
        found.facts["hashes"] = f"all {len(read_sums(path))} files are what was written"
    except CheckpointError as error:
        found.problems.append(str(error).removeprefix(f"checkpoint {path}: "))
    return found


def run_folder(path: Path) -> Found:
    """A run: how far it came, and its newest checkpoint."""
    from entrenar.training.checkpoint import BEST, saved_steps
    from entrenar.training.display import size

    found, best = Found("run", path, story(path / "metrics.jsonl")), (path / BEST).resolve()
    saved = saved_steps(path)
    for folder in saved:
        nbytes = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
        found.facts[folder.name] = size(nbytes) + (", the best" if folder.resolve() == best else "")
    if saved:
        found.below.append(checkpoint(saved[-1]))
    else:
        found.facts["checkpoints"] = "none"
    return found


LINE = 1 << 20  # bytes of a line of metrics; no event of ours is longer


def story(metrics: Path) -> dict[str, Any]:
    """How a run went, from its metrics; a last line that was cut short does not count."""
    last: dict[str, Mapping[str, Any]] = {}
    if metrics.is_file():
        with open(metrics, encoding="utf-8", errors="replace") as file:
            while line := file.readline(LINE):
                try:
                    event = json.loads(line)
                    last[event["event"]] = event
                except (ValueError, TypeError, KeyError, RecursionError):
                    continue
    told: dict[str, Any] = {}
    start, step, seen = (last.get(name, {}) for name in ("start", "step", "held_out"))
    config = start.get("config")
    if isinstance(config, dict) and isinstance(config.get("data"), dict):
        told["text"] = str(config["data"].get("source", "not told"))
    if start.get("time"):
        told["begun"] = str(start["time"])
    if step:
        told["steps"] = f"{step.get('step')} of {step.get('steps')}, the last with loss {rounded(step.get('loss'))}"
    if seen:
        bits = seen.get("bits_per_byte")
        told["held out"] = (
            f"{rounded(seen.get('loss'))} nats per trained token" if bits is None else f"{rounded(bits)} bits per byte"
        ) + f" at step {seen.get('step')}"
    if "end" in last:
        told["ended"] = f"stopped: {last['end']['stopped']}" if last["end"].get("stopped") else "done"
    elif "error" in last:
        told["ended"] = f"failed: {last['error'].get('text')}"
    elif step:
        told["ended"] = "not yet, or killed: `entrenar resume` goes on with it"
    return told


def rounded(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, (int, float)) else "not told"


def prepared(path: Path) -> Found:
    """Prepared data: what was counted while it was made. Raises CorpusError where it is not whole."""
    from entrenar.data import load_prepared

    data = load_prepared(path)
    found = Found("prepared data", path, asdict(data.facts))
    found.facts |= {"tokenizer": data.tokenizer.kind, "vocabulary": data.tokenizer.vocab_size}
    found.facts |= {"check": "hashes and all tokens are right", "identity": data.identity}
    return found
