"""Checkpoints: all that a run is, in a folder that other tools read too.

    model.safetensors  config.json         as Hugging Face's loaders
    tokenizer.json  tokenizer_config.json  expect them
    optimizer.safetensors                  both moments of every weight
    state.json                             step, random state, place in the data, configuration
                                           (a fine-tuning run has, instead of a model, an adapter as PEFT writes it:
                                           adapter_model.safetensors  adapter_config.json)
    SHA256SUMS                             the hash of every other file: `sha256sum -c SHA256SUMS` checks them too

A checkpoint is written under another name, synced to the disk and renamed: a folder with the right name is
whole. In a run's folder they are named step-000400; the links `checkpoint` and `best` lead to the newest and
to the one with the lowest held-out loss.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from entrenar.data import Tokenizer, TokenizerError, load_tokenizer
from entrenar.files import new_folder, point_link
from entrenar.formats import FormatError, open_regular, safetensors, short
from entrenar.formats.strict_json import read_object
from entrenar.llama import Llama, LlamaConfig
from entrenar.llama.pretrained import read_config
from entrenar.optim import AdamW

NEWEST, BEST, STATE, SUMS = "checkpoint", "best", "state.json", "SHA256SUMS"
MODEL, ADAPTER, OPTIMIZER = "model.safetensors", "adapter_model.safetensors", "optimizer.safetensors"
TRAINED = (MODEL, ADAPTER)  # a checkpoint has one of them
FORMAT = 2
Write = Callable[[Path], None]
STEP = re.compile(r"step-(\d{6,})")
# Temporary names of files.py: `.<name>.<something>`
LEFT = re.compile(r"\.(step-\d{6,}|checkpoint|best|config\.toml|sample\.txt|curve\.png|report\.html)\.")


class CheckpointError(ValueError):
    """The folder is no whole checkpoint; the message says what is missing or broken."""


@dataclass(frozen=True)
class Saved:
    """Where a run was: all but what it trained. The arrays are views of a mapped file: nothing is in memory yet."""

    folder: Path
    optimizer: Mapping[str, np.ndarray]
    state: dict[str, Any]


@dataclass(frozen=True)
class Checkpoint(Saved):
    """A whole model, and where its run was."""

    config: LlamaConfig
    weights: Mapping[str, np.ndarray]
    tokenizer: Tokenizer

    def model(self, *, dtype: Any = np.float32, checkpointing: bool = False) -> Llama:
        """A model with these weights."""
        return Llama.from_pretrained(self.folder, dtype=dtype, checkpointing=checkpointing)


class OneByOne(Mapping[str, np.ndarray]):
    """A file's arrays by name, of which only the last one asked for stays in memory: what copies them one after the
    other never holds the file as well."""

    def __init__(self, file: safetensors.SafeTensors) -> None:
        self.file, self.last = file, ""

    def __getitem__(self, name: str) -> np.ndarray:
        if self.last:
            self.file.release(self.last)
        self.last = name
        return self.file[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.file)

    def __len__(self) -> int:
        return len(self.file)


def model_files(model: Llama, tokenizer: Tokenizer) -> Write:
    """What writes a whole model, as Hugging Face's loaders expect it."""

    def write(folder: Path) -> None:
        safetensors.save(folder / MODEL, model.state_dict(), metadata={"format": "pt"})
        _write(folder / "config.json", model.config.to_dict())
        tokenizer.save(folder)

    return write


def save_checkpoint(folder: str | Path, *, write: Write, state: dict[str, Any],
                    optimizer: AdamW | None = None) -> Path:  # fmt: skip
    """Write a whole checkpoint as `folder`, which must not hold one yet.

    write   puts what was trained into the folder it is given
    state   anything JSON can say

    Raises FileExistsError where the folder is there and not empty, OSError where the disk refuses; in both
    cases nothing is left behind.
    """
    with new_folder(folder) as temporary:
        write(temporary)
        if optimizer is not None:
            safetensors.save(temporary / OPTIMIZER, optimizer.state_dict())
        _write(temporary / STATE, {"format": FORMAT, **state})
        sums = {file.name: _hash(file) for file in sorted(temporary.iterdir())}
        lines = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
        (temporary / SUMS).write_text(lines, encoding="utf-8")
    return Path(folder)


def load_checkpoint(folder: str | Path, *, check: bool = True) -> Checkpoint:
    """Read the checkpoint of a model, or the newest whole one of a run's folder.

    check   compare every file with the hash that was kept of it
    Raises CheckpointError where files are missing, changed or unreadable.
    """
    saved = load_saved(folder, check=check)
    with readable(saved.folder):
        config = read_config(saved.folder)
        weights = safetensors.SafeTensors(saved.folder / MODEL)
        return Checkpoint(saved.folder, saved.optimizer, saved.state, config, weights, load_tokenizer(saved.folder))


def load_saved(folder: str | Path, *, check: bool = True) -> Saved:
    """The same of a checkpoint of anything, without what was trained."""
    folder = Path(folder)
    if not (folder / STATE).is_file() and saved_steps(folder):
        folder = newest(folder)
    if check:
        verify(folder)
    with readable(folder):
        state = read_object(folder / STATE)
        if state.get("format") != FORMAT:
            found = short(state.get("format"))
            raise CheckpointError(f"checkpoint {folder}: {STATE} has format {found}, this version reads {FORMAT}")
        moments = folder / OPTIMIZER
        optimizer = OneByOne(safetensors.SafeTensors(moments)) if moments.is_file() else {}
        return Saved(folder, optimizer, state)


@contextlib.contextmanager
def readable(folder: Path) -> Iterator[None]:
    """What cannot be read inside is the CheckpointError of a checkpoint in `folder`."""
    try:
        yield
    except FileNotFoundError as error:
        missing = Path(error.filename or STATE).name
        raise CheckpointError(f"checkpoint {folder}: {missing} is missing") from None
    except (FormatError, TokenizerError, OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"checkpoint {folder}: cannot be read: {error}") from error


def verify(folder: Path) -> None:
    """Compare every file with its hash. Raises CheckpointError naming those that are missing or changed."""
    sums = read_sums(folder)
    wrong = []
    for name, digest in sums.items():
        try:
            wrong += [f"{name} is not what was written"] if _hash(folder / name) != digest else []
        except FileNotFoundError:
            wrong.append(f"{name} is missing")
        except OSError as error:
            wrong.append(f"{name} cannot be read ({error.strerror})")
        except FormatError:  # a folder, a pipe
            wrong.append(f"{name} is no file")
    if wrong:
        more = [f"{len(wrong) - 10} more"] if len(wrong) > 10 else []
        raise CheckpointError(f"checkpoint {folder}: {', '.join(wrong[:10] + more)}")


def read_sums(folder: Path) -> dict[str, str]:
    """File name -> SHA-256, as SHA256SUMS has them. Raises CheckpointError where it cannot be."""
    try:
        file, _ = open_regular(folder / SUMS)
        with file:
            text = file.read(1 << 20).decode("latin1")  # other bytes than ASCII match no line
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {folder}: {SUMS} is missing") from None
    except FormatError:
        raise CheckpointError(f"checkpoint {folder}: {SUMS} is no file") from None
    except OSError as error:
        raise CheckpointError(f"checkpoint {folder}: {SUMS} cannot be read: {error.strerror}") from None
    found = [re.fullmatch(r"([0-9a-f]{64})  ([A-Za-z0-9_-][A-Za-z0-9_.-]{,99})", line) for line in text.splitlines()]
    sums = {match[2]: match[1] for match in found if match}
    # what is there and has no hash could be anything: a SHA256SUMS that was cut at the end of a line
    own = (*TRAINED, OPTIMIZER, "config.json", "adapter_config.json", "tokenizer.json", "tokenizer_config.json")
    unlisted = [name for name in own if name not in sums and (folder / name).exists()]
    if None in found or STATE not in sums or not any(name in sums for name in TRAINED) or unlisted:
        raise CheckpointError(f"checkpoint {folder}: {SUMS} is not what was written")
    return sums


def newest(run: Path, warn: Callable[[str], None] = lambda text: None) -> Path:
    """The newest checkpoint of a run whose files are what was written; each newer one that is broken is told to `warn`.

    Raises CheckpointError where there is none.
    """
    broken = []
    for folder in reversed(saved_steps(run)):
        try:
            verify(folder)
        except CheckpointError as error:
            broken.append(str(error))
            continue
        for text in broken:
            warn(f"{text}; falling back to {folder.name}")
        return folder
    raise CheckpointError(f"{run}: no whole checkpoint" + "".join(f"; {text}" for text in broken))


def save_step(run: Path, step: int, *, best: bool = False, keep_last_n: int = 2, **parts: Any) -> Path:
    """Write the checkpoint step-<step> of a run (`parts`: see save_checkpoint) and move the links to it.

    Then delete those that are neither among the newest `keep_last_n` nor the best.
    """
    folder = run / f"step-{step:06d}"
    if not folder.exists():
        save_checkpoint(folder, **parts)
    point_link(run / NEWEST, folder.name)
    if best:
        point_link(run / BEST, folder.name)
    kept = {(run / BEST).resolve(), *(kept.resolve() for kept in saved_steps(run)[-keep_last_n:])}
    for old in saved_steps(run):
        if old.resolve() not in kept:
            _delete(old)
    return folder


def saved_steps(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    found = [path for path in run.glob("step-*") if STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def clean(run: Path, step: int) -> list[str]:
    """Make a run's folder fit to go on from `step`: sweep up what a killed write left, and set newer checkpoints aside,
    which are broken (or the run would go on from them).

    Returns the names set aside; they keep their content under `<name>.broken`.
    """
    for left in run.glob(".*"):
        if LEFT.match(left.name):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() and not left.is_symlink() else left.unlink()
    aside = [folder for folder in saved_steps(run) if int(folder.name[5:]) > step]
    for folder in aside:
        target = folder.with_name(f"{folder.name}.broken")
        shutil.rmtree(target, ignore_errors=True)
        folder.rename(target)
    for link in (run / NEWEST, run / BEST):
        if link.is_symlink() and not link.exists():
            link.unlink()
    return [folder.name for folder in aside]


def _delete(folder: Path) -> None:
    """Under another name first: killed half way, nothing half deleted looks like a checkpoint."""
    doomed = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _hash(path: Path) -> str:
    file, _ = open_regular(path)
    digest = hashlib.sha256()
    with file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")  # a NaN could not be read
