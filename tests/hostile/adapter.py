"""Bad folders with an adapter: adapter_config.json, and tensors that are not the adapter's."""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from entrenar import random
from entrenar.adapters import LoraConfig, adapt, adapter_config, adapter_tensors, load_adapter, save_adapter
from entrenar.adapters.files import CONFIG, WEIGHTS
from entrenar.adapters.model import Settings, adapted
from entrenar.formats import FormatError, safetensors
from entrenar.llama import Llama
from hostile.case import GONE, WHOLE, WORDS, Case, Family, bad_json, bytes_at, cuts, flips, not_files, others, short
from hostile.pretrained import SHAPE

FIELDS: dict[str, Any] = dict(
    r=2,
    lora_alpha=3,
    target_modules=["q_proj", "embed_tokens"],
    modules_to_save=["norm"],
    use_dora=True,
    rank_pattern={"q_proj": 3},
    alpha_pattern={"embed_tokens": 5},
)
PATTERNS = (
    "(",
    ")",
    "[",
    "*",
    "+",
    "?",
    "a**",
    "a+?+",
    "(?=a)",
    "(?!a)",
    "(?<=a)",
    "(?i)a",
    "(?P=a)",
    "\\1",
    "(a)\\1",
    "\\",
    "(?#a)",
    "a{2,1}",
    "[b-a]",
    "[[:alpha:]]{2,1}",
    "(?>a)",
    "a++",
    "\\p{L}",
    "\\N{x}",
    "x" * 1001,
    "(" * 500,
    "(" * 30 + ")" * 30,
    "(?P<0>a)",
    "\\x41",
    "\\u0041",
    "(?",
    "^*",
    "\x1b[2J(",
)
SLOW = (
    "(a+)+$",
    "(.*)*x",
    "((((.*)*)*)*)*x",
    "(.|.)*x",
    "(.|.|.|.)*(.|.|.)*(.|..|...)*x",
    "(.?){50}x",
    ".*" * 200 + "x",
    "(((.{0,99}){0,99}){0,99}){0,99}x",
    "(()*)*" * 100,
    "((){999999999}){999999999}",
    "(.(?:(.|.|.|.|.|.|.)*x)?)*",
)
Files = dict[str, bytes]


def errors() -> tuple[type[BaseException], ...]:
    return (FormatError,)


@functools.cache
def base() -> Llama:
    random.seed(5)
    return Llama(SHAPE)


def digest_of(path: Path) -> str:
    model = Llama(SHAPE)
    model.load_state_dict(base().state_dict())
    load_adapter(model, path)
    digest = hashlib.sha256()
    for name, tensor in sorted(adapter_tensors(model).items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode() + tensor.data.tobytes())
    settings = [layer.settings["default"] for _, layer in adapted(model) if hasattr(layer, "settings")]
    assert all(isinstance(how, Settings) for how in settings)
    digest.update(repr(settings).encode())
    return digest.hexdigest()


@functools.cache
def good() -> Files:
    """The files of a small adapter, by name."""
    model = Llama(SHAPE)
    model.load_state_dict(base().state_dict())
    adapt(model, LoraConfig(**FIELDS, init_lora_weights=False))
    assert adapter_config(model).r == 2
    with tempfile.TemporaryDirectory() as folder:
        path = save_adapter(model, Path(folder, "a"))
        return {file.name: file.read_bytes() for file in path.iterdir()}


@functools.cache
def whole() -> str:
    with tempfile.TemporaryDirectory() as folder:
        return digest_of(folder_of(good())(Path(folder)))


def folder_of(files: Files, after: Callable[[Path], Any] = lambda folder: None) -> Callable[[Path], Path]:
    """Writes a folder of these files, and does something to it."""

    def write(folder: Path) -> Path:
        (folder / "adapter").mkdir()
        for name, raw in files.items():
            bytes_at(name, raw)(folder / "adapter")
        after(folder / "adapter")
        return folder / "adapter"

    return write


def case(name: str, changes: dict[str, Any], *, names: str = "", **more: Any) -> Case:
    """The good folder with some files changed (None: taken away)."""
    files = {file: raw for file, raw in (good() | changes).items() if raw is not None}
    return Case(name, folder_of(files), digest_of, names=names or next(iter(changes)), **more)


def config_of(**changes: Any) -> bytes:
    values = json.loads(good()[CONFIG]) | changes
    return json.dumps({key: value for key, value in values.items() if value is not GONE}).encode()


# adapter_config.json


def config_texts() -> Iterator[Case]:
    for name, raw in bad_json(good()[CONFIG].decode()):
        yield case(name, {CONFIG: raw})


def config_cut_short() -> Iterator[Case]:
    raw = good()[CONFIG]
    for name, part in cuts(raw):
        yield case(name, {CONFIG: part}, equals=whole() if len(part) == len(raw) - 1 else None)  # the line's end


def config_numbers() -> Iterator[Case]:
    for key, harmless in (("r", ()), ("lora_alpha", (1, 1.5)), ("lora_dropout", (0, -0.0))):
        for what, value in others(
            FIELDS.get(key, 0.0), *WHOLE, 1e300, -1e-6, 1 << 16, *WORDS[:3], *WORDS[4:], [2], "2"
        ):
            free = type(value) in (int, float) and (value in harmless or key == "lora_alpha" and 0 < value <= 1e6)
            yield case(
                f"{key} = {what}",
                {CONFIG: config_of(**{key: value})},
                says=f"{key}|shape",
                may_load=free,
                names="adapter",
            )
    for key in ("use_rslora", "use_dora"):
        for what, value in others(json.loads(good()[CONFIG])[key], 0, 1, 1.0, "true", "", None, [], {}):
            yield case(f"{key} = {what}", {CONFIG: config_of(**{key: value})}, says=key)


def config_names() -> Iterator[Case]:
    wrong = (
        True,
        1,
        1.5,
        "",
        {},
        {"a": 1},
        [1],
        [None],
        [""],
        [["q_proj"]],
        ["x" * 5000],
        ["\x1b[2J"],
        ["q"] * 3000,
        [{}],
        ["nothing"],
        ["q_proj."],
        [".q_proj"],
        ["q_proj", "nothing"],
        ["layers"],
        ["mlp"],
        ["lm_head\n"],
    )
    harmless: tuple[Any, ...] = ("q_proj", ["layers"], ["mlp"], ["nothing"], ["q_proj."], [".q_proj"])
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        for what, value in others(FIELDS.get(key), *wrong, "q_proj", "(", GONE if key == "modules_to_save" else 0):
            free = key == "exclude_modules" and value in harmless
            yield case(f"{key} = {what}", {CONFIG: config_of(**{key: value})}, names="adapter", may_load=free)
    for what, value in others(None, True, -1, 2, [2], [-1], [0.5], ["0"], "0", {}, 1 << 70, list(range(5000)), [[0]]):
        yield case(f"layers_to_transform = {what}", {CONFIG: config_of(layers_to_transform=value)}, names="adapter")
    for what, value in others(None, "layers", 1, [1], {}, "a.b", ["(a+)+"], "(", ["layers"] * 3000):
        yield case(f"layers_pattern = {what}", {CONFIG: config_of(layers_pattern=value)}, says="layers_pattern")
        yield case(
            f"layers_pattern = {what}, with layers",
            names="adapter",
            may_load=value in ("layers", ["layers"]),
            changes={CONFIG: config_of(layers_pattern=value, layers_to_transform=[0, 1])},
        )


def config_patterns() -> Iterator[Case]:
    for key in ("rank_pattern", "alpha_pattern"):
        for what, value in others(
            FIELDS[key],
            True,
            1,
            "",
            "q_proj",
            [],
            ["q_proj"],
            {"q_proj": None},
            {"q_proj": 0},
            {"q_proj": "3"},
            {"q_proj": 3.5},
            {"q_proj": 1 << 40},
            {"q_proj": [3]},
            {"": 7},
        ):
            free = value in ({"q_proj": 3.5}, {"": 7}) and key == "alpha_pattern"
            yield case(f"{key} = {what}", {CONFIG: config_of(**{key: value})}, names="adapter", may_load=free)
        for pattern in PATTERNS:
            yield case(f"{key}: {short(pattern)}", {CONFIG: config_of(**{key: {pattern: 3}})}, says=key)
        for pattern in SLOW:
            yield case(
                f"{key}: {short(pattern)}", {CONFIG: config_of(**{key: {pattern: 3}})}, names="adapter", may_load=True
            )
        many = {f"{'(.|.)*' * 15}{i}": 3 for i in range(1000)}
        yield case(f"{key}: 1,000 slow ones", {CONFIG: config_of(**{key: many})}, names="adapter", may_load=True)
        long = {f"{'x' * 900}{i}": 3 for i in range(900)}
        yield case(f"{key}: 900,000 characters", {CONFIG: config_of(**{key: long})}, says="characters in all")
    for key in ("target_modules", "exclude_modules"):
        for pattern in PATTERNS:
            yield case(f"{key}: {short(pattern)}", {CONFIG: config_of(**{key: pattern})}, says=key)
        for pattern in SLOW:
            yield case(
                f"{key}: {short(pattern)}",
                {CONFIG: config_of(**{key: pattern})},
                names="adapter",
                may_load=key == "exclude_modules",
            )


def config_of_others() -> Iterator[Case]:
    """Adapters that are none of ours."""
    foreign = {
        "peft_type": ("lora", "IA3", "ADALORA", "LOHA", "", 1, [], {}, GONE),
        "task_type": ("SEQ_CLS", "", 1, []),
        "fan_in_fan_out": (True, 1),
        "lora_bias": (True, "all"),
        "bias": ("all", "lora_only", "", None, 1),
        "init_lora_weights": ("pissa", "olora", "loftq", "corda", "", None, 1, [], {}),
        "megatron_config": ({"a": 1}, []),
        "trainable_token_indices": ([1], {}),
        "loftq_config": ({"loftq_bits": 4}, []),
        "use_qalora": (True,),
        "layer_replication": ([[0, 1]],),
        "target_parameters": (["x"],),
        "use_bdlora": ({},),
        "arrow_config": ({},),
        "alora_invocation_tokens": ([1],),
        "eva_config": ({"rho": 2},),
        "kasa_config": ({},),
        "ensure_weight_tying": (True,),
        "base_model_name_or_path": (1, [], "x" * 5000, "\x1b[2J"),
        "something_new": (True, 1, "x", [0], {"a": 1}),
        "\x1b[2J": (True,),
        "x" * 5000: ("y" * 5000,),
    }
    for key, values in foreign.items():
        for what, value in others("?", *values):
            yield case(
                f"{short(key)} = {what}",
                {CONFIG: config_of(**{key: value})},
                says="" if len(key) > 40 else key if key.isidentifier() else "x1b",
            )
    for key in ("something_new", "runtime_config", "peft_version"):
        yield case(f"{key} that says nothing", {CONFIG: config_of(**{key: None})}, equals=whole())


# adapter_model.safetensors


def tensors() -> dict[str, np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        bytes_at(WEIGHTS, good()[WEIGHTS])(Path(folder))
        with safetensors.SafeTensors(Path(folder, WEIGHTS)) as file:
            return {name: np.array(array) for name, array in file.items()}


def weights_of(arrays: dict[str, np.ndarray]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        safetensors.save(Path(folder, WEIGHTS), arrays)
        return Path(folder, WEIGHTS).read_bytes()


def weights_files() -> Iterator[Case]:
    for name in (CONFIG, WEIGHTS):
        for what, write, system in not_files(name):
            files = {file: raw for file, raw in good().items() if file != name}
            yield Case(f"{name}: {what}", folder_of(files, write), digest_of, names="adapter", system=system)
    yield case("no weights", {WEIGHTS: None})
    yield case("no config", {CONFIG: None})
    yield case("nothing", {CONFIG: None, WEIGHTS: None})
    yield case("a pickle", {WEIGHTS: None, "adapter_model.bin": b"\x80\x04."}, says="pickle")


def weights_cut_short() -> Iterator[Case]:
    for name, part in cuts(good()[WEIGHTS], 60):
        yield case(name, {WEIGHTS: part})


def weights_flipped() -> Iterator[Case]:
    raw = good()[WEIGHTS]
    stop = 8 + int.from_bytes(raw[:8], "little")
    for name, changed in flips(raw, 60, seed=3, stop=stop):
        yield case(name, {WEIGHTS: changed}, may_load=True)


def weights_content() -> Iterator[Case]:
    arrays = tensors()
    for name, array in arrays.items():
        last = name.rpartition("model.model.")[2]
        yield case(
            f"without {last}", {WEIGHTS: weights_of({n: x for n, x in arrays.items() if n != name})}, says="missing"
        )
        for what, other in {
            "transposed": np.ascontiguousarray(array.T) if array.ndim == 2 else array[None],
            "of one row": array[:1],
            "empty": array[:0],
            "a number": np.zeros((), np.float32),
            "of integers": array.astype(np.int32),
            "of bytes": array.astype(np.uint8),
            "NaN": np.full_like(array, np.nan),
            "infinite": np.full_like(array, -np.inf),
            "too big for float32": np.full(array.shape, 1e300),
        }.items():
            yield case(f"{last} {what}", {WEIGHTS: weights_of(arrays | {name: other})})
        for word in (np.float64, np.float16, ml_dtypes.bfloat16):
            yield case(
                f"{last} as {np.dtype(word)}", {WEIGHTS: weights_of(arrays | {name: array.astype(word)})}, may_load=True
            )
    extra = np.ones((3, 8), np.float32)
    for name in (
        "x",
        "base_model.model.x",
        "q_proj.lora_A.weight",
        "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight",
        "base_model.model.lm_head.lora_A.weight",
        "base_model.model.model.embed_tokens.base_layer.weight",
        "base_model.model.lm_head.base_layer.weight",
        "x" * 5000,
        "base_model.model..lora_A.weight",
    ):
        yield case(f"with {short(name)}", {WEIGHTS: weights_of(arrays | {name: extra})})
    renamed = {name.removeprefix("base_model.model."): array for name, array in arrays.items()}
    yield case("names without the prefix", {WEIGHTS: weights_of(renamed)}, says="missing")
    many = {f"base_model.model.{i}": np.zeros(1, np.float32) for i in range(20_000)}
    yield case("20,000 tensors too many", {WEIGHTS: weights_of(arrays | many)}, says="more")
    yield case("none at all", {WEIGHTS: weights_of({})}, names="adapter")


FAMILIES: dict[str, Family] = {
    "adapter: JSON texts": config_texts,
    "adapter: config cut short": config_cut_short,
    "adapter: numbers": config_numbers,
    "adapter: names": config_names,
    "adapter: patterns": config_patterns,
    "adapter: other kinds": config_of_others,
    "adapter: files": weights_files,
    "adapter: weights cut short": weights_cut_short,
    "adapter: flipped bits": weights_flipped,
    "adapter: tensors": weights_content,
}
