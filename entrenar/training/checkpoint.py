"""Checkpoints: all that a run is, in a folder that other tools read too.

    model.safetensors  config.json         as Hugging Face's loaders
    tokenizer.json  tokenizer_config.json  expect them
    optimizer.safetensors                  both moments of every weight
    state.json                             step, random state, place in the data, configuration, hashes

A checkpoint is written under another name, synced to the disk and renamed: a folder with the right name is
whole. In a run's folder they are named step-000400; the links `checkpoint` and `best` lead to the newest and
to the one with the lowest held-out loss. Leaves out resuming a run from one: everything it needs is here.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from entrenar.data import Tokenizer, load_tokenizer
from entrenar.files import new_folder, point_link
from entrenar.llama import Llama, LlamaConfig
from entrenar.optim import AdamW

NEWEST, BEST, STATE = "checkpoint", "best", "state.json"
FORMAT = 1


class CheckpointError(ValueError):
    """The folder is no whole checkpoint; the message says what is missing or broken."""


@dataclass(frozen=True)
class Checkpoint:
    """What `load_checkpoint` found."""

    folder: Path
    config: LlamaConfig
    weights: dict[str, np.ndarray]
    optimizer: dict[str, np.ndarray]
    state: dict[str, Any]
    tokenizer: Tokenizer

    def model(self, *, dtype: Any = np.float32) -> Llama:
        """A model with these weights."""
        model = Llama(self.config, dtype=dtype)
        model.load_state_dict(self.weights)
        return model


def save_checkpoint(folder: str | Path, *, model: Llama, tokenizer: Tokenizer, state: dict[str, Any],
                    optimizer: AdamW | None = None) -> Path:  # fmt: skip
    """Write a whole checkpoint as `folder`, which must not hold one yet; `state` is anything JSON can say.

    Raises FileExistsError where the folder is there and not empty, OSError where the disk refuses; in both
    cases nothing is left behind.
    """
    with new_folder(folder) as temporary:
        _save(model.state_dict(), temporary / "model.safetensors", metadata={"format": "pt"})
        if optimizer is not None:
            _save(optimizer.state_dict(), temporary / "optimizer.safetensors")
        (temporary / "config.json").write_text(_json(model.config.to_dict()), encoding="utf-8")
        tokenizer.save(temporary)
        files = {file.name: _hash(file) for file in sorted(temporary.iterdir())}
        whole = {"format": FORMAT, **state, "blake2b": files}
        (temporary / STATE).write_text(_json(whole), encoding="utf-8")
    return Path(folder)


def load_checkpoint(folder: str | Path, *, check: bool = True) -> Checkpoint:
    """Read a checkpoint, or the newest one of a run's folder.

    check   compare every file with the hash that was kept of it
    Raises CheckpointError where files are missing, changed or unreadable.
    """
    from safetensors.numpy import load_file

    folder = Path(folder)
    if not (folder / STATE).is_file() and (folder / NEWEST / STATE).is_file():
        folder = folder / NEWEST
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        wrong = [n for n, h in state["blake2b"].items() if check and _hash(folder / n) != h]
        if wrong:
            raise CheckpointError(f"checkpoint {folder}: not what was written: {', '.join(wrong)}")
        config = LlamaConfig.from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        weights = load_file(folder / "model.safetensors")
        moments = folder / "optimizer.safetensors"
        optimizer = load_file(moments) if moments.is_file() else {}
        return Checkpoint(folder, config, weights, optimizer, state, load_tokenizer(folder))
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(
            f"checkpoint {folder}: {Path(error.filename or STATE).name} is missing"
        ) from None
    except Exception as error:  # JSON, safetensors and tokenizers have an exception each
        raise CheckpointError(f"checkpoint {folder}: cannot be read: {error}") from error


def save_step(run: Path, step: int, *, best: bool = False, keep: int = 2, **parts: Any) -> Path:
    """Write the checkpoint step-<step> of a run (`parts`: see save_checkpoint) and move the links to it.

    Then delete those that are neither among the newest `keep` nor the best.
    """
    folder = run / f"step-{step:06d}"
    if not folder.exists():
        save_checkpoint(folder, **parts)
    point_link(run / NEWEST, folder.name)
    if best:
        point_link(run / BEST, folder.name)
    kept = {(run / BEST).resolve(), *saved_steps(run)[-keep:]}
    for old in saved_steps(run):
        if old.resolve() not in kept and old not in kept:
            shutil.rmtree(old, ignore_errors=True)
    return folder


def saved_steps(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    found = [path for path in run.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def _save(arrays: dict[str, np.ndarray], file: Path, metadata: dict[str, str] | None = None) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    # save_file writes the memory as it lies: a transposed view would be stored scrambled
    whole = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in arrays.items()}
    try:
        save_file(whole, file, metadata=metadata)
    except SafetensorError as error:  # what it makes of a full disk
        raise OSError(f"cannot write {file.name}: {error}") from error


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"
