"""The model behind a path on the command line, with its tokenizer: for generate, eval and export.

    runs/2026-11-22_18-00-00              a run: its newest checkpoint that is whole
    runs/2026-11-22_18-00-00/step-001200  a checkpoint (or a link to one: runs/.../best)
    SmolLM2-135M                          a folder in Hugging Face's layout: config.json, *.safetensors, a tokenizer
    stories15M.bin                        a llama2.c file, its tokenizer beside it
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from entrenar.data import Tokenizer, TokenizerError, load_tokenizer
from entrenar.formats import FormatError
from entrenar.formats.strict_json import read_object
from entrenar.llama import Llama
from entrenar.training.checkpoint import STATE, SUMS, newest, saved_steps, verify

WANTED = (
    "wanted a run's folder, a checkpoint, a folder in Hugging Face's layout (config.json, *.safetensors and a "
    "tokenizer), or a llama2.c .bin file"
)
NOT_READ = {  # what people have lying about, and what to do with it
    ".gguf": "a GGUF file, which entrenar writes but does not read; give the folder it was made from",
    ".safetensors": "weights alone; give the folder that has config.json and the tokenizer beside them",
    ".pt": "a pickle, which can run any code and is never opened; save the model as safetensors",
    ".pth": "a pickle, which can run any code and is never opened; save the model as safetensors",
}


@dataclass(frozen=True)
class Opened:
    """A model ready to be used.

    folder    where it was read from: of a run, the checkpoint; of a file, the folder it lies in
    stop      the tokens that end a text
    context   tokens per window it was trained with, where a checkpoint says so; else all that it can read
    """

    model: Llama
    tokenizer: Tokenizer
    folder: Path
    stop: frozenset[int]
    context: int

    @property
    def begin(self) -> list[int]:
        """What stands before the first token of a text: [begin_id], or nothing where there is no such token."""
        return [] if self.tokenizer.begin_id is None else [self.tokenizer.begin_id]


def open_model(path: str | Path, *, warn: Callable[[str], None] = lambda text: None) -> Opened:
    """Read model and tokenizer; a checkpoint's files are compared with their hashes first.

    warn   is told of each newer checkpoint of a run that is broken and was passed over

    Raises FormatError where there is no model, or one whose tokenizer has more tokens than it knows; CheckpointError
    for a broken checkpoint, TokenizerError for a missing or broken tokenizer.
    """
    path = Path(path).expanduser()
    if path.is_file():
        model, folder = _read_file(path), path.parent
        tokenizer = _tokenizer_beside(path)
        ends = [] if tokenizer.begin_id is None else [tokenizer.begin_id]  # llama2.c's texts end where the next begins
        context = model.config.max_position_embeddings
    else:
        folder = find_folder(path, warn=warn)
        model, tokenizer = Llama.from_pretrained(folder), load_tokenizer(folder)
        ends, context = [*model.config.stop_ids, *_generation_stops(folder)], _context(folder, model)
    _must_match(path, tokenizer, model)
    return Opened(model, tokenizer, folder, frozenset({tokenizer.end_id, *ends}), context)


def find_folder(path: Path, *, warn: Callable[[str], None] = lambda text: None) -> Path:
    """The folder in Hugging Face's layout behind a path: of a run, its newest whole checkpoint.

    Raises FormatError where it is none, CheckpointError where a hash says that a checkpoint is broken.
    """
    if not path.exists():
        hub = not path.is_absolute() and len(path.parts) == 2 and not path.parent.exists()  # meta-llama/Llama-3.2-1B
        way_out = f"entrenar downloads nothing: `hf download {path} --local-dir {path.name}` does" if hub else WANTED
        raise FormatError(f"{path}: does not exist, looked from {Path.cwd()}; {way_out}")
    if not path.is_dir():
        raise FormatError(f"{path}: is neither a folder nor a file; {WANTED}")
    if saved_steps(path):
        return newest(path, warn)
    if (path / SUMS).is_file():
        verify(path)
    elif not (path / "config.json").is_file():
        raise FormatError(f"{path}: {_what_is_missing(path)}; {WANTED}")
    return path


def _what_is_missing(folder: Path) -> str:
    if (folder / "metrics.jsonl").is_file():
        return "is a run without a checkpoint: it ended, or is still, before the first"
    if (folder / STATE).is_file():
        return f"is a checkpoint without {SUMS}: of an older entrenar, or copied in part"
    return "holds neither checkpoints (step-000400) nor a config.json"


def _read_file(path: Path) -> Llama:
    if why := NOT_READ.get(path.suffix.lower()):
        raise FormatError(f"{path}: is {why}")
    if path.name.startswith("pytorch_model"):
        raise FormatError(f"{path}: is {NOT_READ['.pt']}")
    if path.suffix != ".bin":
        raise FormatError(f"{path}: is a file entrenar knows no model in; {WANTED}")
    from entrenar.convert.llama2c import import_llama2c

    return import_llama2c(path)


def _tokenizer_beside(path: Path) -> Tokenizer:
    """Of a llama2.c file: tokenizer.json or tokenizer.model beside it; without them, tokenizer.bin.

    Raises TokenizerError where there is none of them.
    """
    folder = path.parent
    if any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        return load_tokenizer(folder)
    if not (folder / "tokenizer.bin").is_file():
        raise TokenizerError(
            f"{path}: has no tokenizer beside it; put the model's tokenizer.json, tokenizer.model or tokenizer.bin "
            f"into {folder.absolute()}"
        )
    from entrenar.convert.llama2c import import_tokenizer

    return import_tokenizer(folder / "tokenizer.bin")


def _must_match(path: Path, tokenizer: Tokenizer, model: Llama) -> None:
    """A model may know more tokens than its tokenizer (padding), but not fewer."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise FormatError(
            f"{path}: the tokenizer has {tokenizer.vocab_size:,} tokens, the model knows "
            f"{model.config.vocab_size:,}: they do not belong together; put the model's own tokenizer beside it"
        )


def _generation_stops(folder: Path) -> list[int]:
    """The tokens that end a text by generation_config.json, which may name more than config.json (Llama 3: two)."""
    file = folder / "generation_config.json"
    value = read_object(file).get("eos_token_id") if file.is_file() else None
    return [i for i in (value if isinstance(value, list) else [value]) if type(i) is int]


def _context(folder: Path, model: Llama) -> int:
    """training.context of the run that wrote this checkpoint; else max_position_embeddings."""
    limit = model.config.max_position_embeddings
    state: Any = read_object(folder / STATE) if (folder / STATE).is_file() else {}
    for key in ("config", "training", "context"):
        state = state.get(key) if isinstance(state, dict) else None
    return state if type(state) is int and 1 <= state <= limit else limit
