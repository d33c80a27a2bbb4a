"""The model behind a path on the command line, with its tokenizer: for every verb that uses one.

    runs/2026-11-22_18-00-00              a run: its newest checkpoint that is whole
    runs/2026-11-22_18-00-00/step-001200  a checkpoint (or a link to one: runs/.../best)
    SmolLM2-135M                          a folder in Hugging Face's layout: config.json, *.safetensors, a tokenizer
    stories15M.bin                        a llama2.c file, its tokenizer beside it
    an adapter                            of a fine-tuning run, or a folder as PEFT writes it: with the model it is for

Beside a model there may be adapters, each by a name: cli/adapters.py finds them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from entrenar.adapters import active_adapter, load_adapter, use_adapter
from entrenar.cli.adapters import Given, base_of, below, given, held_as, is_adapter, named_after, the_same
from entrenar.cli.parser import CommandLineError
from entrenar.data import Tokenizer, TokenizerError, load_tokenizer
from entrenar.formats import FormatError
from entrenar.formats.strict_json import read_object
from entrenar.kernels.packed import TABLES
from entrenar.llama import Llama
from entrenar.llama.pretrained import config_values
from entrenar.training.checkpoint import STATE, SUMS, newest, saved_steps, verify

WANTED = (
    "wanted a run's folder, a checkpoint, a folder in Hugging Face's layout (config.json, *.safetensors and a "
    "tokenizer), an adapter's (adapter_config.json), or a llama2.c .bin file"
)
NOT_READ = {  # what people have lying about, and what to do with it
    ".gguf": "a GGUF file, which entrenar writes but does not read; give the folder it was made from",
    ".safetensors": "weights alone; give the folder that has config.json and the tokenizer beside them",
    ".pt": "a pickle, which can run any code and is never opened; save the model as safetensors",
    ".pth": "a pickle, which can run any code and is never opened; save the model as safetensors",
}
ADAPTERS = "wanted an adapter as PEFT writes it (adapter_config.json, adapter_model.safetensors), or a fine-tuning run"
Warn = Callable[[str], None]


@dataclass(frozen=True)
class Opened:
    """A model ready to be used.

    folder     where it was read from: of a run, the checkpoint; of an adapter, the model it is for; of a file, the
               folder it lies in
    stop       the tokens that end a text
    context    tokens per window it was trained with, where a checkpoint says so; else all that it can read
    turns      what was asked for, to be used one after the other: names of adapters, None for the model alone
    tuned      the folder of an adapter by its name
    """

    model: Llama
    tokenizer: Tokenizer
    folder: Path
    stop: frozenset[int]
    context: int
    turns: tuple[str | None, ...] = (None,)
    tuned: dict[str, Path] = field(default_factory=dict)

    @property
    def begin(self) -> list[int]:
        """What stands before the first token of a text: [begin_id], or nothing where there is no such token."""
        return [] if self.tokenizer.begin_id is None else [self.tokenizer.begin_id]

    def use(self, name: str | None) -> None:
        """Let the model be what this adapter makes of it; None: what it is alone."""
        if self.tuned and name != active_adapter(self.model):
            use_adapter(self.model, name)


def open_model(path: str | Path, *, warn: Warn = lambda text: None, adapters: Sequence[str] = (),
               base: str | None = None, storage: str | None = None, compute: str | None = None,
               usual: str | None = None, writes: bool = False) -> Opened:  # fmt: skip
    """Read model, tokenizer and adapters; a checkpoint's files are compared with their hashes first.

    adapters   "FOLDER", "NAME=FOLDER", or "off" for the model alone; none: the model as `path` says
    base       where the model of the adapter `path` is
    storage    how to hold the weights; None: as the run of the first adapter held them, else as `usual` says (None: as
               float32)
    compute    the arithmetic of products with weights in a storage format; None: float32, or int16 where the model is
               to write a text (`writes`) with weights in 4 bits
    warn       is told of each newer checkpoint of a run that is broken and was passed over, and of a base that is
               another than the adapter was trained on

    Raises FormatError where there is no model, one whose tokenizer has more tokens than it knows, or an adapter that
    does not fit it; CheckpointError for a broken checkpoint, TokenizerError for a missing or broken tokenizer.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return _open_file(path, adapters, base, storage, compute)
    folder, own = find_folder(path, warn=warn), []
    if is_adapter(folder):
        own, folder = [Given(named_after(path), folder)], find_folder(base_of(folder, base), warn=warn)
        if is_adapter(folder):
            raise FormatError(f"{own[0].folder}: its base {folder} is an adapter itself; --base wants a whole model")
        the_same(own[0].folder, folder, warn)
    elif base is not None:
        raise CommandLineError(f"--base {base}: {path} is a whole model, not an adapter that needs one; leave it out")
    asked = given(adapters, own, lambda place: find_folder(place, warn=warn, wanted=ADAPTERS))
    for one in asked.adapters:
        if one not in own:
            the_same(one.folder, folder, warn)
    quantized = is_quantized(folder)
    how = {} if storage or quantized or not asked.adapters else held_as(asked.adapters[0].folder)
    how = {"storage": storage or usual, **how}
    usual_compute = "int16" if writes and (quantized or how["storage"] in TABLES) else "float32"
    model = Llama.from_pretrained(folder, compute=compute or usual_compute, **how)
    tokenizer = _tokenizer(folder, asked.adapters, model, warn)
    _must_match(path, tokenizer, model)
    for one in asked.adapters:
        load_adapter(model, one.folder, one.name)
    ends = [*model.config.stop_ids, *_generation_stops(folder)]
    context = _context(asked.adapters[0].folder if asked.adapters else folder, model)
    opened = Opened(model, tokenizer, folder, frozenset({tokenizer.end_id, *ends}), context, asked.turns,
                    {one.name: one.folder for one in asked.adapters})  # fmt: skip
    opened.use(opened.turns[0])
    return opened


def _open_file(path: Path, adapters: Sequence[str], base: str | None, storage: str | None,
               compute: str | None) -> Opened:  # fmt: skip
    """A llama2.c file; texts of its kind end where the next begins."""
    for option, value in (("--adapter", next(iter(adapters), None)), ("--base", base), ("--storage", storage),
                          ("--compute", compute)):  # fmt: skip
        if value is not None and path.suffix == ".bin":
            raise CommandLineError(
                f"{option} {value}: is for a model in Hugging Face's layout, not for the llama2.c file {path}; "
                "`entrenar export --to hf` makes one"
            )
    model, tokenizer = _read_file(path), _tokenizer_beside(path)
    _must_match(path, tokenizer, model)
    ends = [] if tokenizer.begin_id is None else [tokenizer.begin_id]
    stop = frozenset({tokenizer.end_id, *ends})
    return Opened(model, tokenizer, path.parent, stop, model.config.max_position_embeddings)


def is_quantized(folder: Path) -> bool:
    """Whether a model is stored in 4 bits, as bitsandbytes has them: it is read as it is."""
    return config_values(folder).get("quantization_config") is not None


def find_folder(path: Path, *, warn: Warn = lambda text: None, wanted: str = WANTED) -> Path:
    """The folder behind a path that has a model or an adapter: of a run, its newest whole checkpoint.

    Raises FormatError where it is none, CheckpointError where a hash says that a checkpoint is broken.
    """
    if not path.exists():
        hub = not path.is_absolute() and len(path.parts) == 2 and not path.parent.exists()  # meta-llama/Llama-3.2-1B
        way_out = f"entrenar downloads nothing: `hf download {path} --local-dir {path.name}` does" if hub else wanted
        raise FormatError(f"{path}: does not exist, looked from {Path.cwd()}; {way_out}")
    if not path.is_dir():
        raise FormatError(f"{path}: is neither a folder nor a file; {wanted}")
    if saved_steps(path):
        return newest(path, warn)
    if (path / SUMS).is_file():
        verify(path)
    elif not (path / "config.json").is_file() and not is_adapter(path):
        raise FormatError(f"{path}: {_what_is_missing(path)}; {wanted}")
    return path


def _what_is_missing(folder: Path) -> str:
    if (folder / "metrics.jsonl").is_file():
        return "is a run without a checkpoint: it ended, or is still, before the first"
    if (folder / STATE).is_file():
        return f"is a checkpoint without {SUMS}: of an older entrenar, or copied in part"
    if inside := sorted(part.parent.name for part in folder.glob("*/adapter_config.json")):
        return f"holds adapters ({', '.join(inside[:5])}): give the folder of one"
    return "holds neither checkpoints (step-000400) nor a config.json"


def _read_file(path: Path) -> Llama:
    if why := NOT_READ.get(path.suffix.lower()):
        raise FormatError(f"{path}: is {why}")
    if path.name.startswith("pytorch_model") or path.name == "adapter_model.bin":
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


def _tokenizer(folder: Path, adapters: Sequence[Given], model: Llama, warn: Warn) -> Tokenizer:
    """That of the first adapter which brings one that the model can have: it has the chat template that was trained
    with; else the model's own."""
    for one in adapters:
        if any((one.folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
            tokenizer = load_tokenizer(one.folder)
            if tokenizer.vocab_size <= model.config.vocab_size:
                return tokenizer
            warn(
                f"{one.folder}: its tokenizer has {tokenizer.vocab_size:,} tokens, the model knows "
                f"{model.config.vocab_size:,}; the model's own tokenizer is used"
            )
    return load_tokenizer(folder)


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
    """training.context of the run that wrote this checkpoint, or data.max_length; else max_position_embeddings."""
    limit = model.config.max_position_embeddings
    state = read_object(folder / STATE) if (folder / STATE).is_file() else {}
    for section, key in (("training", "context"), ("data", "max_length")):
        value = below(state, "config", section, key)
        if type(value) is int and 1 <= value <= limit:
            return value
    return limit
