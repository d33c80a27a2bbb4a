"""Bad folders in Hugging Face's layout: config.json, the index, and weights that are not the model's."""

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
from entrenar.formats import FormatError, safetensors
from entrenar.llama import Llama, LlamaConfig
from entrenar.llama.pretrained import CONFIG, INDEX, WEIGHTS, save_pretrained
from hostile.case import (
    GONE,
    WHOLE,
    WORDS,
    Case,
    Family,
    bad_json,
    bytes_at,
    cuts,
    not_files,
    others,
    replaced,
    short,
)

SHAPE = LlamaConfig(
    vocab_size=11,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=16,
    bos_token_id=None,
    eos_token_id=None,
)
Files = dict[str, bytes]


def errors() -> tuple[type[BaseException], ...]:
    return (FormatError,)


def digest_of(path: Path) -> str:
    model = Llama.from_pretrained(path)
    digest = hashlib.sha256(repr(model.config).encode())
    for name, array in sorted(model.state_dict().items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()


@functools.cache
def good(shards: bool = False) -> Files:
    """The files of a small model, by name."""
    random.seed(5)
    with tempfile.TemporaryDirectory() as folder:
        path = save_pretrained(Llama(SHAPE), Path(folder, "m"), max_shard_size=2000 if shards else 10**9)
        return {file.name: file.read_bytes() for file in path.iterdir()}


@functools.cache
def whole() -> str:
    with tempfile.TemporaryDirectory() as folder:
        return digest_of(folder_of(good())(Path(folder)))


def folder_of(files: Files, after: Callable[[Path], Any] = lambda folder: None) -> Callable[[Path], Path]:
    """Writes a folder of these files, and does something to it."""

    def write(folder: Path) -> Path:
        (folder / "model").mkdir()
        for name, raw in files.items():
            bytes_at(name, raw)(folder / "model")
        after(folder / "model")
        return folder / "model"

    return write


def case(name: str, changes: dict[str, Any], *, shards: bool = False, names: str = "", **more: Any) -> Case:
    """The good folder with some files changed (None: taken away)."""
    files = {file: raw for file, raw in (good(shards) | changes).items() if raw is not None}
    return Case(name, folder_of(files), digest_of, names=names or next(iter(changes)), **more)


def config_of(**changes: Any) -> bytes:
    return json.dumps(json.loads(good()[CONFIG]) | changes).encode()


# config.json


def config_texts() -> Iterator[Case]:
    for name, raw in bad_json(good()[CONFIG].decode()):
        yield case(name, {CONFIG: raw})


def config_cut_short() -> Iterator[Case]:
    raw = good()[CONFIG]
    for name, part in cuts(raw):
        yield case(name, {CONFIG: part}, equals=whole() if len(part) == len(raw) - 1 else None)  # the line's end


SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
REALS = ("initializer_range", "rms_norm_eps", "rope_theta")
TRUTHS = ("tie_word_embeddings", "attention_bias", "mlp_bias")


def config_sizes() -> Iterator[Case]:
    """Sizes that are no sizes, or another model's; the longest context is only a limit, and may be any."""
    for key in SIZES:
        true = getattr(SHAPE, key)
        limit = key == "max_position_embeddings"
        for what, value in others(true, *WHOLE, true - 1, true + 1, 10 * true, *WORDS, float(true), str(true), 1e300):
            free = value is None or limit and type(value) is int and value > 0
            yield case(f"{key} = {what}", {CONFIG: config_of(**{key: value})}, may_load=free)
    for key in SIZES[:5]:
        yield case(f"{key} gone", {CONFIG: json.dumps(replaced(json.loads(config_of()), (key,), GONE)).encode()})


def config_values() -> Iterator[Case]:
    for key in REALS:
        for what, value in others(None, 0, -1, -1e-6, *WORDS[1:2], *WORDS[4:]):
            yield case(f"{key} = {what}", {CONFIG: config_of(**{key: value})}, says=key)
        yield case(
            f"{key} = 10^400", {CONFIG: config_of().replace(b"{", f'{{"{key}": {10**90}, "k": 1,'.encode(), 1)}
        )
        yield case(f"{key} = 10^99", {CONFIG: config_of(**{key: 10**99})}, may_load=True)
    for key in TRUTHS:
        for what, value in others(False, 0, 1, "false", "true", [], {}, 0.0):
            yield case(f"{key} = {what}", {CONFIG: config_of(**{key: value})}, says=key)
        yield case(f"{key} = true", {CONFIG: config_of(**{key: True})})
    for key in ("bos_token_id", "eos_token_id"):
        for what, value in others(
            None, -1, -(2**63), True, 1.5, "", "</s>", {}, {"a": 1}, [-1], [1.5], ["</s>"], [[1]]
        ):
            yield case(f"{key} = {what}", {CONFIG: config_of(**{key: value})}, says=key)


def config_rope() -> Iterator[Case]:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    for key in ("rope_scaling", "rope_parameters"):
        for what, value in others(None, True, 1, 1.5, "llama3", [0], [scaling], {"a": 1}, {"factor": 8.0}):
            yield case(f"{key} = {what}", {CONFIG: _rope(key, value)}, says="rope")
        for name in scaling:
            wrong = (
                (None, 0, -1, True, "", "x", [], {}, [1]) if name != "rope_type" else (True, 1, "yarn", [], {}, "")
            )
            for what, value in others(GONE, *wrong):
                yield case(
                    f"{key}.{name} = {what}",
                    {CONFIG: _rope(key, scaling | {name: value})},
                    says="rope",
                    may_load=value is None and name.startswith("original"),
                )
        yield case(f"{key}: low above high", {CONFIG: _rope(key, scaling | {"low_freq_factor": 9})}, says="low_freq")
        yield case(f"{key}: unknown key", {CONFIG: _rope(key, scaling | {"beta_fast": 1})}, says="beta_fast")
        yield case(f"{key}: theta", {CONFIG: _rope(key, scaling | {"rope_theta": -1})}, says="rope_theta")


def _rope(key: str, value: Any) -> bytes:
    content = json.loads(config_of())
    del content["rope_scaling"]
    return json.dumps(content | {key: value}).encode()


def config_of_others() -> Iterator[Case]:
    kinds = (
        "gpt2",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "phi",
        "phi3",
        "mixtral",
        "t5",
        "bert",
        "llama4",
        "mllama",
        "deepseek_v3",
        "opt",
        "bloom",
        "mamba",
        "Llama",
        "llama ",
        "",
        None,
        1,
        ["llama"],
        {},
    )
    for what, value in others("llama", *kinds, GONE):
        content = replaced(json.loads(config_of()), ("model_type",), value)
        yield case(f"model_type = {what}", {CONFIG: json.dumps(content).encode()}, says="model_type")
    for what, value in others(
        None,
        "LlamaForCausalLM",
        [],
        ["MistralForCausalLM"],
        [None],
        {},
        1,
        ["LlamaForCausalLM", "X"],
        ["LlamaForSequenceClassification"],
    ):
        yield case(f"architectures = {what}", {CONFIG: config_of(architectures=value)}, says="architectures")
    foreign = {
        "pretraining_tp": 2,
        "sliding_window": 4096,
        "partial_rotary_factor": 0.5,
        "rope_interleaved": True,
        "quantization_config": {"load_in_4bit": True},
        "compression_config": {},
        "num_local_experts": 8,
        "is_encoder_decoder": True,
        "add_cross_attention": 1.5,
        "hidden_act": "gelu",
        "layer_types": ["sliding_attention"],
    }
    for key, value in foreign.items():
        yield case(f"{key} = {short(value)}", {CONFIG: config_of(**{key: value})}, says=key)


# model.safetensors.index.json


def index_of(**changes: Any) -> bytes:
    return json.dumps(json.loads(good(True)[INDEX]) | changes).encode()


def index_texts() -> Iterator[Case]:
    for name, raw in bad_json(good(True)[INDEX].decode()):
        yield case(name, {INDEX: raw}, shards=True)


def index_cut_short() -> Iterator[Case]:
    raw = good(True)[INDEX]
    for name, part in cuts(raw, 150):
        yield case(name, {INDEX: part}, shards=True, equals=whole() if len(part) == len(raw) - 1 else None)


def index_places() -> Iterator[Case]:
    """Names of files that lead elsewhere, or are none."""
    where = json.loads(good(True)[INDEX])["weight_map"]
    first = next(iter(where))
    names = (
        "",
        ".",
        "..",
        "/",
        "../model.safetensors",
        "../../etc/passwd",
        "/etc/passwd",
        "/dev/zero",
        "a/b.safetensors",
        "..\\m.safetensors",
        "\0.safetensors",
        "m\0.safetensors",
        "~/m.safetensors",
        "m.bin",
        "pytorch_model.bin",
        "M.SAFETENSORS",
        "\x1b[2J.safetensors",
        "m.safetensors\n",
        "*.safetensors",
        "$HOME.safetensors",
        "m safetensors",
        "x" * 5000 + ".safetensors",
        "none.safetensors",
        "C:\\m.safetensors",
        CONFIG,
        *WORDS,
    )
    for what, name in others(where[first], *names):
        yield case(what, {INDEX: index_of(weight_map=where | {first: name})}, shards=True, names="model")
    for what, value in others(0, *WORDS, "model.safetensors", [list(where)]):
        yield case(f"weight_map = {what}", {INDEX: index_of(weight_map=value)}, shards=True)


def index_content() -> Iterator[Case]:
    where = json.loads(good(True)[INDEX])["weight_map"]
    first, files = next(iter(where)), sorted(set(where.values()))
    other = next(file for file in files if file != where[first])
    wrong = {
        "a tensor in another file": where | {first: other},
        "a tensor too many": where | {"x": other},
        "a tensor too few": {name: file for name, file in where.items() if name != first},
        "a name with an escape code": where | {"\x1b[2J": other},
        "a long name": where | {"x" * 50_000: other},
        "100,000 tensors too many": where | {f"x{i}": other for i in range(100_000)},
    }
    for name, places in wrong.items():
        yield case(name, {INDEX: index_of(weight_map=places)}, shards=True, names="model")
    for file in files:
        yield case(f"without {file}", {file: None}, shards=True, says="missing")
        yield case(f"empty {file}", {file: b""}, shards=True)
        yield case(f"half of {file}", {file: good(True)[file][: len(good(True)[file]) // 2]}, shards=True)
    yield case("another file's content", {files[0]: good(True)[files[1]]}, shards=True)
    yield case("no files at all", dict.fromkeys(files), shards=True, says="missing")


# The weights


def weights_of(changes: dict[str, np.ndarray | None]) -> bytes:
    """model.safetensors with some arrays changed (None: taken away)."""
    arrays = {name: array for name, array in (_arrays() | changes).items() if array is not None}
    with tempfile.TemporaryDirectory() as folder:
        safetensors.save(Path(folder, WEIGHTS), arrays, {"format": "pt"})
        return Path(folder, WEIGHTS).read_bytes()


@functools.cache
def _arrays() -> dict[str, np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        with safetensors.SafeTensors(bytes_at(WEIGHTS, good()[WEIGHTS])(Path(folder))) as file:
            return {name: np.array(array) for name, array in file.items()}


def weights_not_finite() -> Iterator[Case]:
    for name, array in _arrays().items():
        for value in (np.nan, np.inf, -np.inf):
            changed = array.copy()
            changed.flat[-1] = value
            yield case(
                f"{name}: {value}",
                {WEIGHTS: functools.partial(weights_of, {name: changed})},
                names="model",
                says=name,
            )
    for kind, value in (
        (ml_dtypes.bfloat16, np.nan),
        (np.float16, np.inf),
        (np.float64, 1e300),
        (np.float64, np.nan),
    ):
        name = "model.norm.weight"
        with np.errstate(all="ignore"):
            changed = np.full(8, value, kind)
        yield case(
            f"{np.dtype(kind).name}: {value}",
            {WEIGHTS: functools.partial(weights_of, {name: changed})},
            names="model",
            says=name,
        )


def weights_of_another_model() -> Iterator[Case]:
    arrays = _arrays()
    for name, array in arrays.items():
        yield case(
            f"without {name}",
            {WEIGHTS: functools.partial(weights_of, {name: None})},
            names="model",
            says=f"missing {name}",
        )
        for what, other in {
            "one row more": np.concatenate([array, array[:1]]),
            "one row less": array[:-1],
            "one dimension more": array[None],
            "empty": array[:0],
            "one number": np.float32(1).reshape(()),
        }.items():
            yield case(
                f"{name}: {what}", {WEIGHTS: functools.partial(weights_of, {name: other})}, names="model", says=name
            )
        for kind in (np.int32, np.uint8, bool, np.int64, ml_dtypes.float8_e4m3fn):
            other = np.ones(array.shape, kind)
            yield case(
                f"{name}: {np.dtype(kind)}",
                {WEIGHTS: functools.partial(weights_of, {name: other})},
                names="model",
                says="type",
            )
    for extra in ("x", "model.layers.2.mlp.up_proj.weight", "../x", "x" * 10_000, "model.norm.bias"):
        yield case(
            f"with {short(extra)}",
            {WEIGHTS: functools.partial(weights_of, {extra: np.ones(8, np.float32)})},
            names="model",
            says="unexpected",
        )
    many = {f"x{i}": np.ones(1, np.float32) for i in range(20_000)}
    yield case("with 20,000 more", {WEIGHTS: functools.partial(weights_of, many)}, names="model")
    tied = {CONFIG: config_of(tie_word_embeddings=True)}
    yield case("tied, with another head", tied, names="model", says="lm_head.weight is not")


def other_things() -> Iterator[Case]:
    for file in (CONFIG, WEIGHTS):
        rest = {name: raw for name, raw in good().items() if name != file}
        for what, write, _ in not_files(file):
            yield Case(f"{what} as {file}", folder_of(rest, write), digest_of, names="model")
    rest = {name: raw for name, raw in good(True).items() if name != INDEX}
    shard = next(name for name in rest if name.endswith(".safetensors"))
    for what, write, _ in not_files(INDEX):
        yield Case(f"{what} as the index", folder_of(rest, write), digest_of, names="model")
    rest = {name: raw for name, raw in good(True).items() if name != shard}
    for what, write, _ in not_files(shard):
        yield Case(f"{what} as a shard", folder_of(rest, write), digest_of, names="model")
    pickle = good() | {"pytorch_model.bin": b"\x80\x02}q\x00."}
    del pickle[WEIGHTS]
    yield Case("a pickle alone", folder_of(pickle), digest_of, says="pickle")
    for what, write, _ in not_files("model"):
        yield Case(f"{what} as the folder", write, digest_of)
    yield Case("a file in the folder's place", bytes_at("model", b"x"), digest_of, says="is a file")


def harmless() -> Iterator[Case]:
    yield case("as it is", {CONFIG: good()[CONFIG]}, equals=whole())
    yield case("in several files", {INDEX: good(True)[INDEX]}, shards=True, equals=whole())
    yield case("unknown keys", {CONFIG: config_of(use_cache=True, hello=[1, 2])}, equals=whole())
    yield case("a wrong total_size", {INDEX: index_of(metadata={"total_size": -1})}, shards=True, equals=whole())
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(1, np.float32)}
    yield case("old files' frequencies", {WEIGHTS: functools.partial(weights_of, frequencies)}, equals=whole())


FAMILIES: dict[str, Family] = {
    "config.json: texts": config_texts,
    "config.json: cut short": config_cut_short,
    "config.json: sizes": config_sizes,
    "config.json: values": config_values,
    "config.json: rope": config_rope,
    "config.json: others": config_of_others,
    "index: texts": index_texts,
    "index: cut short": index_cut_short,
    "index: places": index_places,
    "index: content": index_content,
    "weights: not finite": weights_not_finite,
    "weights: another model's": weights_of_another_model,
    "other things": other_things,
    "harmless": harmless,
}
