"""Bad checkpoints. Every file has its hash in SHA256SUMS: most cases come twice, with the old hash and a new one."""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from entrenar import optim, random
from entrenar.data import ByteTokenizer
from entrenar.formats import FormatError
from entrenar.llama import Llama, LlamaConfig
from entrenar.training.checkpoint import CheckpointError, load_checkpoint, model_files, newest, save_checkpoint
from hostile.case import Case, Family, bad_json, bytes_at, cuts, flips, not_files, others

SHAPE = LlamaConfig(
    vocab_size=257,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=16,
    tie_word_embeddings=True,
)
SUMS, STATE, MODEL, OPTIMIZER = "SHA256SUMS", "state.json", "model.safetensors", "optimizer.safetensors"
NAME = "step-000400"


def errors() -> tuple[type[BaseException], ...]:
    return (CheckpointError, FormatError)  # the latter where the weights are taken


def digest_of(path: Path) -> str:
    saved = load_checkpoint(path)
    digest = hashlib.sha256(json.dumps(saved.state).encode())
    for arrays in (saved.weights, saved.optimizer, saved.model().state_dict()):
        for name, array in sorted(arrays.items()):
            digest.update(f"{name} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest() + f" {saved.tokenizer.vocab_size}"


def newest_of(path: Path) -> str:
    return newest(path).name


@functools.cache
def good() -> dict[str, bytes]:
    random.seed(6)
    model = Llama(SHAPE)
    optimizer = optim.AdamW(model.named_parameters())
    for p in model.parameters():
        p.grad = np.ones_like(p.data)
    optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        path = save_checkpoint(
            Path(folder, "c"),
            write=model_files(model, ByteTokenizer()),
            optimizer=optimizer,
            state={"step": 400, "config": {}, "random": [1, 2]},
        )
        return {file.name: file.read_bytes() for file in path.iterdir()}


@functools.cache
def whole() -> str:
    with tempfile.TemporaryDirectory() as folder:
        return digest_of(folder_of(good())(Path(folder)))


def summed(files: dict[str, bytes]) -> dict[str, bytes]:
    """The files with hashes that are right."""
    lines = [f"{hashlib.sha256(raw).hexdigest()}  {name}\n" for name, raw in sorted(files.items()) if name != SUMS]
    return files | {SUMS: "".join(lines).encode()}


def folder_of(
    files: dict[str, bytes], after: Callable[[Path], Any] = lambda folder: None, name: str = NAME
) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).mkdir()
        for file, raw in files.items():
            bytes_at(file, raw)(folder / name)
        after(folder / name)
        return folder / name

    return write


def case(name: str, changes: dict[str, Any], *, names: str = "", **more: Any) -> Case:
    files = {file: raw for file, raw in (good() | changes).items() if raw is not None}
    return Case(name, folder_of(files), digest_of, names=names or next(iter(changes)), **more)


def case_summed(name: str, file: str, raw: bytes | Callable[[], bytes], **more: Any) -> Case:
    """One file changed, and its hash with it."""

    def write(folder: Path) -> Path:
        return folder_of(summed(good() | {file: raw if isinstance(raw, bytes) else raw()}))(folder)

    return Case(name, write, digest_of, **({"names": file} | more))


def damaged() -> Iterator[Case]:
    """Any change of any file but SHA256SUMS."""
    for file, raw in good().items():
        if file == SUMS:
            continue
        yield case(f"{file} missing", {file: None}, says="missing")
        for name, part in cuts(raw, 20):
            yield case(f"{file} cut {name}", {file: part}, says="not what was written")
        for name, part in flips(raw, 20, 11):
            if part != raw:
                yield case(f"{file} changed, {name}", {file: part}, says="not what was written")
        yield case(f"{file} longer", {file: raw + b"\0"}, says="not what was written")
    files = dict(good())
    files[MODEL], files[OPTIMIZER] = files[OPTIMIZER], files[MODEL]
    yield case("two files changed places", {MODEL: files[MODEL], OPTIMIZER: files[OPTIMIZER]})


def sums() -> Iterator[Case]:
    raw = good()[SUMS]
    for name, part in cuts(raw):
        yield case(
            name, {SUMS: part}, names=NAME, equals=whole() if len(raw) - len(part) == 1 else None
        )  # the line's end
    first = raw.decode().splitlines()[0]
    for name, text in {
        "another file": raw + b"0" * 64 + b"  ../../etc/passwd\n",
        "a hidden file": raw + b"0" * 64 + b"  .hidden\n",
        "an absolute path": raw + b"0" * 64 + b"  /dev/zero\n",
        "a folder": raw + b"0" * 64 + b"  ..\n",
        "no file": raw + b"0" * 64 + b"  nowhere\n",
        "in capitals": raw.upper(),
        "NUL": raw + b"\0",
        "FFs": b"\xff" * 100,
        "blank": b"\n\n",
        "UTF-16": raw.decode().encode("utf-16"),
        "one space": raw.replace(b"  ", b" "),
        "binary marks": raw.replace(b"  ", b" *"),
        "hashes of zeros": b"".join(b"0" * 64 + line[64:] + b"\n" for line in raw.splitlines()),
        "the first line alone": first.encode(),
        "an escape code": raw + b"0" * 64 + b"  \x1b[2J\n",
        "a long name": raw + b"0" * 64 + b"  " + b"x" * 5000 + b"\n",
        "itself": raw + b"0" * 64 + b"  SHA256SUMS\n",
    }.items():
        yield case(name, {SUMS: text}, names=NAME)
    for name, make in {
        "20 MB of lines": lambda: raw * 20_000,
        "60 MB of text": lambda: b"x" * 60_000_000,
        "1,000 files": lambda: raw + b"".join(b"0" * 64 + b"  f%d\n" % i for i in range(1000)),
    }.items():
        yield Case(name, functools.partial(_with_sums, make), digest_of, may_load="lines" in name)


def _with_sums(make: Callable[[], bytes], folder: Path) -> Path:
    return folder_of(good() | {SUMS: make()})(folder)


def state_texts() -> Iterator[Case]:
    for name, raw in bad_json(good()[STATE].decode()):
        yield case_summed(name, STATE, raw)
    for name, raw in cuts(good()[STATE]):
        yield case_summed(f"cut {name}", STATE, raw, equals=whole() if len(raw) == len(good()[STATE]) - 1 else None)
    for what, value in others(2, 0, 1, 3, -1, 2**64, 2.0, "2", None, [], {}, True, [2], "\x1b[2J", "x" * 100_000):
        state = json.loads(good()[STATE]) | {"format": value}
        yield case_summed(f"format {what}", STATE, json.dumps(state).encode(), may_load=value == 2)


def weights_summed() -> Iterator[Case]:
    for file in (MODEL, OPTIMIZER):
        for name, raw in cuts(good()[file], 60):
            yield case_summed(f"{file} cut {name}", file, raw)
        for name, raw in flips(good()[file], 60, 12, 400):
            yield case_summed(f"{file} changed, {name}", file, raw, names=NAME, may_load=True)
        for name, raw in {"empty": b"", "text": b"hello " * 50, "NULs": bytes(500)}.items():
            yield case_summed(f"{file}: {name}", file, raw)
    nan = good()[MODEL][:-4] + np.float32(np.nan).tobytes()
    yield case_summed("NaN in the weights", MODEL, nan, names=NAME, says="finite")
    yield case_summed("the optimizer's file as weights", MODEL, good()[OPTIMIZER], names=NAME)


def config_and_tokenizer_summed() -> Iterator[Case]:
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        for name, raw in bad_json(good()[file].decode(), big=False):
            free = file == "tokenizer_config.json" and name == "an empty object"
            yield case_summed(f"{file}: {name}", file, raw, may_load=free)
    for file in ("config.json", "tokenizer.json"):
        raw = good()[file]
        for name, part in cuts(raw, 60):
            yield case_summed(f"{file} cut {name}", file, part, may_load=part == raw.rstrip())


def other_things() -> Iterator[Case]:
    for file in good():
        rest = {name: raw for name, raw in good().items() if name != file}
        for what, write, _ in not_files(file):
            names = NAME if file == STATE else file
            yield Case(f"{file}: {what}", folder_of(rest, write), digest_of, names=names)
    for what, write, _ in not_files(NAME):
        yield Case(f"{what} as the folder", write, digest_of)


def runs() -> Iterator[Case]:
    """Folders of runs: the newest whole checkpoint is found, whatever lies around it."""
    bad = dict(good()) | {MODEL: b"x"}

    def run(
        *steps: tuple[str, dict[str, bytes]], after: Callable[[Path], Any] = lambda folder: None
    ) -> Callable[[Path], Path]:
        def write(folder: Path) -> Path:
            (folder / "run").mkdir()
            for name, files in steps:
                folder_of(files, name=name)(folder / "run")
            after(folder / "run")
            return folder / "run"

        return write

    found = [("step-000100", dict(good()))]
    yield Case("the newest broken", run(*found, ("step-000200", bad)), newest_of, equals="step-000100")
    yield Case("the newest empty", run(*found, ("step-000200", {})), newest_of, equals="step-000100")
    yield Case("all broken", run(("step-000100", bad), ("step-000200", bad)), newest_of, says="no whole checkpoint")
    yield Case("none", run(), newest_of, says="no whole checkpoint")
    yield Case("names that are none", run(("step-1", dict(good())), ("step-abc", {}), ("step--00001", {})), newest_of)
    yield Case("a step of 60 digits", run(*found, ("step-" + "9" * 60, bad)), newest_of, equals="step-000100")
    for what, write, _ in not_files("step-000200"):
        yield Case(f"{what} beside it", run(*found, after=write), newest_of, equals="step-000100")
    for what, write, _ in not_files(SUMS):
        rest = {name: raw for name, raw in good().items() if name != SUMS}
        after = functools.partial(_inside, write)
        yield Case(
            f"{what} as {SUMS}", run(*found, ("step-000200", rest), after=after), newest_of, equals="step-000100"
        )


def _inside(write: Callable[[Path], Path], run: Path) -> None:
    write(run / "step-000200")


def harmless() -> Iterator[Case]:
    yield case("as it is", {STATE: good()[STATE]}, equals=whole())
    yield case("another file", {"notes.txt": b"hello"}, equals=whole())
    yield Case("the same hashes", folder_of(summed(good())), digest_of, equals=whole())


FAMILIES: dict[str, Family] = {
    "damaged": damaged,
    "sums": sums,
    "state: texts": state_texts,
    "weights, with a new hash": weights_summed,
    "config and tokenizer, with a new hash": config_and_tokenizer_summed,
    "other things": other_things,
    "runs": runs,
    "harmless": harmless,
}
