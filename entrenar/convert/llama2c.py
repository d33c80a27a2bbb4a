"""llama2.c's model.bin and tokenizer.bin, out and in.

    version 0     7 x int32: dim hidden_dim layers heads kv_heads vocab seq_len (vocab negative: a head of its own);
                  float32: embedding, att norms, wq, wk, wv, wo, ffn norms, w1 gate, w2 down, w3 up, norm, cos, sin,
                  (head)
    version 1, 2  "ak42" as uint32, int32 version, the 7 (vocab positive), uint8 shared, (2: int32 group), zeros up to
                  byte 256; float32 att norms, ffn norms, norm; float32 (1) or int8 with scales (2) embedding, wq, wk,
                  wv, wo, w1, w2, w3, (head); each name stands for all layers, one after the other
    tokenizer.bin uint32 longest token; then float32 score, int32 length, bytes of every token

All little-endian. run.c reads version 0, runq.c version 2; 1 is nobody's, export.py writes it. Both programs have
eps 1e-5, theta 10000 and LLaMA 2's special tokens built in. wq and wk are in Meta's order: pairs side by side.
Source: karpathy/llama2.c, export.py, run.c, runq.c.
"""

# C hidden size, H heads, KH key/value heads, D head dim, F feed-forward dim, V vocabulary, L layers, T context

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from entrenar.convert import ConvertError, deinterleave, interleave
from entrenar.convert.vocabulary import BYTES, SPACE, read_vocabulary
from entrenar.data import Tokenizer, sentencepiece
from entrenar.data.tokenizer_subword import SubwordTokenizer
from entrenar.files import new_file
from entrenar.formats import FormatError, open_regular, short
from entrenar.llama import Llama, LlamaConfig
from entrenar.llama.model import rope_tables
from entrenar.llama.packed import Floats
from entrenar.nn import unfilled

MAGIC, HEADER = 0x616B3432, 256
EPS, THETA = 1e-5, 10000.0
NEVER = -1e11  # a score below what run.c merges
LAYERS = 1024  # more are not believed; the deepest LLaMA has 126

# llama2.c's name -> ours, `{}` for the layer
NAMES = {
    "embedding": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight",
    "att_norm": "model.layers.{}.input_layernorm.weight", "ffn_norm": "model.layers.{}.post_attention_layernorm.weight",
    "wq": "model.layers.{}.self_attn.q_proj.weight", "wk": "model.layers.{}.self_attn.k_proj.weight",
    "wv": "model.layers.{}.self_attn.v_proj.weight", "wo": "model.layers.{}.self_attn.o_proj.weight",
    "w1": "model.layers.{}.mlp.gate_proj.weight", "w2": "model.layers.{}.mlp.down_proj.weight",
    "w3": "model.layers.{}.mlp.up_proj.weight",
}  # fmt: skip
MATRICES = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
ORDER = {
    0: ("embedding", "att_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w1", "w2", "w3", "norm", "cos", "sin", "head"),
    1: ("att_norm", "ffn_norm", "norm", "embedding", *MATRICES, "head"),
    2: ("att_norm", "ffn_norm", "norm", "embedding", *MATRICES, "head"),
}


@dataclass(frozen=True)
class Header:
    """What a model.bin says of itself, and the byte its weights begin at."""

    version: int
    dim: int
    hidden_dim: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    seq_len: int
    shared: bool
    start: int
    group: int = 0

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...], int]]:
        """(name, shape of one layer's array, how many layers have one), in the file's order."""
        C, F, V, D = self.dim, self.hidden_dim, self.vocab, self.dim // self.heads
        shape = {
            "embedding": (V, C), "head": (V, C), "norm": (C,), "att_norm": (C,), "ffn_norm": (C,),
            "wq": (C, C), "wk": (self.kv_heads * D, C), "wv": (self.kv_heads * D, C), "wo": (C, C),
            "w1": (F, C), "w2": (C, F), "w3": (F, C), "cos": (self.seq_len, D // 2), "sin": (self.seq_len, D // 2),
        }  # fmt: skip
        for name in ORDER[self.version]:
            if name != "head" or not self.shared:
                yield name, shape[name], self.layers if "{}" in NAMES.get(name, "") else 1

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of one array: float32, or int8 and a float32 per group."""
        size = math.prod(shape)
        return size + 4 * (size // self.group) if self.version == 2 and len(shape) == 2 else 4 * size


# Out


def export_llama2c(model: Llama, path: str | Path, *, version: int = 0, replace: bool = False) -> Path:
    """Write `model` as a model.bin of version 0 (for run.c) or 1; the file appears whole or not at all.

    Raises ConvertError with everything about the model that run.c cannot compute, FileExistsError unless the file may
    be replaced, OSError where the disk refuses.
    """
    model.refuse_adapters("export_llama2c")
    config, state = model.config, Floats(model)
    if wrong := list(_cannot(config, version)):
        raise ConvertError("llama2.c cannot run this model: " + "; ".join(wrong))
    H, KH, _ = config.heads
    shared = config.tie_word_embeddings
    sizes = (config.hidden_size, config.intermediate_size, config.num_hidden_layers, H, KH)
    cos, sin = rope_tables(config, config.max_position_embeddings)
    turned = {"wq": H, "wk": KH}
    with new_file(path, replace=replace) as file:
        if version == 0:
            vocab = config.vocab_size if shared else -config.vocab_size
            file.write(struct.pack("<7i", *sizes, vocab, config.max_position_embeddings))
        else:
            numbers = (MAGIC, version, *sizes, config.vocab_size, config.max_position_embeddings, shared)
            file.write(struct.pack("<I8iB", *numbers).ljust(HEADER, b"\0"))
        header = Header(version, *sizes, config.vocab_size, config.max_position_embeddings, shared, 0)
        for name, _, layers in header.shapes():
            for layer in range(layers):
                w = cos if name == "cos" else sin if name == "sin" else state[NAMES[name].format(layer)]
                w = interleave(w, turned[name]) if name in turned else w
                file.write(np.ascontiguousarray(w, "<f4").data)
    return Path(path)


def _cannot(config: LlamaConfig, version: int) -> Iterator[str]:
    if version not in (0, 1):
        yield f"version = {version}: wanted 0 (what run.c reads) or 1"
    if not math.isclose(config.rms_norm_eps, EPS, rel_tol=1e-6):
        yield f"rms_norm_eps = {config.rms_norm_eps}: it has {EPS} built in (train with --model.rms_norm_eps 1e-5)"
    if config.rope_theta != THETA:
        yield f"rope_theta = {config.rope_theta}: it has {THETA} built in"
    if config.rope_scaling is not None:
        yield "rope_scaling: it has none"
    H, _, D = config.heads
    if H * D != config.hidden_size:
        yield f"head_dim = {D}: it has hidden_size / num_attention_heads = {config.hidden_size / H:g} built in"
    for name in ("attention_bias", "mlp_bias"):
        if getattr(config, name):
            yield f"{name}: it has no biases"


def export_tokenizer(tokenizer: Tokenizer, path: str | Path, *, vocab_size: int, replace: bool = False) -> Path:
    """Write a tokenizer.bin for a model of `vocab_size` tokens.

    run.c begins every text with token 1, stops at it, and takes byte b as token b + 3 where it knows no better: that is
    LLaMA 2's layout, and only such a tokenizer is written.

    Raises ConvertError for any other.
    """
    table = read_vocabulary(tokenizer)
    if table.scores is None or table.begin_id != 1 or not BYTES <= set(table.tokens[3:259]):
        raise ConvertError(
            "llama2.c's programs can only use a tokenizer laid out as LLaMA 2's (SentencePiece, <s> is token 1, bytes "
            "from token 3 on); this one is not, so there is no tokenizer.bin for it"
        )
    if len(table.tokens) > vocab_size:
        raise ConvertError(f"tokenizer: has {len(table.tokens):,} tokens, the model knows {vocab_size:,}")
    missing = vocab_size - len(table.tokens)
    pieces = [_piece(token, i) for i, token in enumerate(table.tokens + [""] * missing)]
    scores = table.scores.tolist() + [NEVER] * missing
    with new_file(path, replace=replace) as file:
        file.write(struct.pack("<I", max(map(len, pieces))))
        for piece, score in zip(pieces, scores, strict=True):
            file.write(struct.pack("<fi", score, len(piece)) + piece)
    return Path(path)


def import_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a tokenizer.bin: LLaMA 2's, or one of its layout.

    Raises FormatError where the file is not exactly that.
    """
    pieces = [_back(path, i, text, score) for i, (text, score) in enumerate(_read_pieces(path))]
    # what tokenizer.bin does not say is built into run.c
    table = sentencepiece.SentencePiece(str(path), pieces, model_type=sentencepiece.BPE, byte_fallback=True,
                                        add_dummy_prefix=True, remove_extra_whitespaces=False)  # fmt: skip
    return SubwordTokenizer(table.tokenizer(), begin_id=1, end_id=2, unknown=pieces[0].text)


def _read_pieces(path: str | Path) -> list[tuple[str, float]]:
    """(text, score) of every token, but those at the end which only fill up the model's vocabulary."""
    file, size = open_regular(path)
    with file:
        if size > sentencepiece.LIMIT:
            raise FormatError(f"{path}: has {size:,} bytes; a tokenizer.bin has at most {sentencepiece.LIMIT:,}")
        raw = file.read()
    found: list[tuple[str, float]] = []
    at = 4
    while at < len(raw):
        score, length = struct.unpack_from("<fi", raw, at) if at + 8 <= len(raw) else (0.0, -1)
        if not 0 <= length <= len(raw) - at - 8:
            raise FormatError(f"{path}: byte {at}: token {len(found)} does not lie in the file: is no tokenizer.bin")
        try:
            found.append((raw[at + 8 : at + 8 + length].decode(), score))
        except UnicodeDecodeError:
            raise FormatError(f"{path}: byte {at + 8}: token {len(found)} is not UTF-8") from None
        at += 8 + length
    while found and found[-1][0] == f"\n<pad{len(found) - 1}>\n":
        found.pop()
    if len(found) < 259:
        raise FormatError(f"{path}: {len(found)} tokens; LLaMA 2's layout has at least 259")
    return found


def _back(path: str | Path, i: int, text: str, score: float) -> sentencepiece.Piece:
    """The inverse of `_piece`."""
    if i < 3:
        return sentencepiece.Piece(text.strip("\n"), 0.0, sentencepiece.CONTROL if i else sentencepiece.UNKNOWN)
    if i < 259:
        if text != f"<0x{i - 3:02X}>":
            raise FormatError(f"{path}: token {i} is {text!r}; LLaMA 2's layout has <0x{i - 3:02X}> there")
        return sentencepiece.Piece(text, 0.0, sentencepiece.BYTE)
    if not 0 < len(text) <= sentencepiece.LONGEST or not math.isfinite(score):
        raise FormatError(
            f"{path}: token {i} is {short(text)} with score {score}; wanted a text of 1 to {sentencepiece.LONGEST} "
            "characters and a finite number"
        )
    return sentencepiece.Piece(text.replace(" ", SPACE), score)


def _piece(token: str, i: int) -> bytes:
    """A token's text as llama2.c's tokenizer.py writes it: <s> and </s> must never be found in a text."""
    if i in (1, 2):
        return f"\n{token}\n".encode()
    if not token:  # fills up the model's vocabulary; run.c reads no empty ones
        return f"\n<pad{i}>\n".encode()
    return token.replace(SPACE, " ").encode()


# In


def read_header(path: str | Path) -> Header:
    """What a model.bin says of itself, once the file is known to be exactly as long as that takes.

    Raises FormatError where it is no such file.
    """
    file, size = open_regular(path)
    with file:
        raw = file.read(HEADER)
    if len(raw) < 28:
        raise FormatError(f"{path}: {size} bytes are no llama2.c file; its header alone has 28")
    header = _parse(path, raw)
    bad = [f"{name} = {value}" for name, value in list(vars(header).items())[1:8] if value < 1]
    if bad:
        raise FormatError(f"{path}: is no llama2.c file: {', '.join(bad)}; wanted whole numbers above 0")
    if header.layers > LAYERS:
        raise FormatError(f"{path}: is no llama2.c file: {header.layers:,} layers; at most {LAYERS:,} are read")
    if header.dim % header.heads or header.dim // header.heads % 2 or header.heads % header.kv_heads:
        raise FormatError(
            f"{path}: dim = {header.dim}, heads = {header.heads}, kv_heads = {header.kv_heads}; wanted heads that "
            "divide dim into even parts, and kv_heads that divide heads"
        )
    for name, shape, _ in header.shapes() if header.version == 2 else ():
        if len(shape) == 2 and math.prod(shape) % header.group:
            raise FormatError(f"{path}: groups of {header.group} do not divide {name} {list(shape)}")
    wanted = header.start + sum(layers * header.nbytes(shape) for _, shape, layers in header.shapes())
    if size != wanted:
        raise FormatError(f"{path}: has {size:,} bytes; a llama2.c file with this header has {wanted:,}")
    return header


def _parse(path: str | Path, raw: bytes) -> Header:
    if struct.unpack_from("<I", raw)[0] != MAGIC:
        dim, hidden_dim, layers, heads, kv_heads, vocab, seq_len = struct.unpack_from("<7i", raw)
        return Header(0, dim, hidden_dim, layers, heads, kv_heads, abs(vocab), seq_len, vocab > 0, 28)
    if len(raw) < HEADER:
        raise FormatError(f"{path}: ends inside its header of {HEADER} bytes")
    numbers = struct.unpack_from("<8iBi", raw, 4)
    version, dim, hidden_dim, layers, heads, kv_heads, vocab, seq_len, shared, group = numbers
    if version not in (1, 2):
        raise FormatError(f"{path}: llama2.c version {version}; 0, 1 and 2 are read")
    if shared > 1:
        raise FormatError(f"{path}: byte 40: the flag for a shared head is {shared}; wanted 0 or 1")
    if version == 2 and group < 1:
        raise FormatError(f"{path}: byte 41: groups of {group} values; wanted at least 1")
    group = group if version == 2 else 0
    return Header(version, dim, hidden_dim, layers, heads, kv_heads, vocab, seq_len, shared == 1, HEADER, group)


def import_llama2c(path: str | Path) -> Llama:
    """The model in a model.bin of version 0, 1 or 2 (whose int8 weights become float32).

    Raises FormatError where the file is not exactly what its header says, or has weights that are not finite.
    """
    header = read_header(path)
    config = LlamaConfig(
        vocab_size=header.vocab, hidden_size=header.dim, intermediate_size=header.hidden_dim,
        num_hidden_layers=header.layers, num_attention_heads=header.heads, num_key_value_heads=header.kv_heads,
        max_position_embeddings=header.seq_len, rms_norm_eps=EPS, rope_theta=THETA,
        tie_word_embeddings=header.shared, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with unfilled():
        model = Llama(config)
    parameters = dict(model.named_parameters())
    data = np.memmap(path, np.uint8, "r")
    turned = {"wq": header.heads, "wk": header.kv_heads}
    at = header.start
    for name, shape, layers in header.shapes():
        for layer in range(layers):
            raw, at = data[at : at + header.nbytes(shape)], at + header.nbytes(shape)
            if name in ("cos", "sin"):  # made anew from theta
                continue
            w = _values(raw, shape, header)
            if not np.isfinite(w).all():
                raise FormatError(f"{path}: {name} of layer {layer} has values that are not finite")
            w = deinterleave(w, turned[name]) if name in turned else w
            parameters[NAMES[name].format(layer)].data = np.array(w, np.float32)
    return model


def _values(raw: np.ndarray, shape: tuple[int, ...], header: Header) -> np.ndarray:
    if header.version != 2 or len(shape) == 1:
        return raw.view("<f4").reshape(shape)
    size = math.prod(shape)
    q = raw[:size].view(np.int8).reshape(-1, header.group)
    scale = np.frombuffer(raw[size:].tobytes(), "<f4")[:, None]
    return (q * scale).reshape(shape)
