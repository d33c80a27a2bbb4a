"""A corpus made ready: tokenizer, token ids of both sides, and what gzip and xz make of the held-out bytes.

Preparing takes seconds, so the result is kept in a cache folder ($XDG_CACHE_HOME/entrenar, or
~/.cache/entrenar) under a key made of the files (name, size, time of change) and of every setting that
matters. Another file, another setting, another version: another key.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from entrenar.data.corpus import Sources, find_sources, read_corpus
from entrenar.files import new_folder
from entrenar.data.tokenizer import (
    FILE,
    ByteTokenizer,
    Tokenizer,
    TokenizerError,
    load_tokenizer,
    train_bpe,
)

FORMAT = 1  # of the cache; another number makes every old entry stale


@dataclass(frozen=True)
class Facts:
    """What is known of a prepared corpus beside its tokens. Bits are per byte of held-out text."""

    source: str
    train_documents: int
    train_bytes: int
    train_tokens: int
    held_out_documents: int
    held_out_bytes: int
    held_out_tokens: int
    gzip_bits: float
    xz_bits: float
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prepared:
    """Token ids to train on and held out (an end token closes each document), and the facts about them."""

    tokenizer: Tokenizer
    train: np.ndarray
    held_out: np.ndarray
    facts: Facts
    cached: bool


def prepare(source: str, *, tokenizer: str = "bpe", vocab_size: int = 2048, held_out: float = 0.05,
            cache: str = "", say: Callable[[str], None] = lambda text: None) -> Prepared:  # fmt: skip
    """Read, split, tokenize; or take all of it from the cache.

    source      see corpus.py
    tokenizer   "bpe" (trained on the training side), "bytes", or a folder with a tokenizer.json saved before
    vocab_size  of the BPE to be trained
    held_out    share of the text that is never trained on
    cache       a folder; "" the user's cache folder; "off" none
    say         called with a line of text when something takes time, or goes wrong without harm

    Raises CorpusError where the text cannot be used, TokenizerError for a bad tokenizer.
    """
    sources = find_sources(source)
    if tokenizer not in ("bpe", "bytes"):
        tokenizer = os.path.expanduser(tokenizer)
        if not os.path.exists(tokenizer):
            raise TokenizerError(
                f"data.tokenizer: {tokenizer!r} does not exist; wanted 'bpe', 'bytes', or a folder with a {FILE}"
            )
    if (entries := _cache_folder(cache)) is None:
        return _prepare(sources, tokenizer, vocab_size, held_out, say)
    folder = entries / _key(sources.fingerprint(), tokenizer, vocab_size, held_out)
    if folder.is_dir():
        try:
            return _load(folder)
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            say(f"cached data in {folder} cannot be read ({error}): preparing again")
            shutil.rmtree(folder, ignore_errors=True)
    prepared = _prepare(sources, tokenizer, vocab_size, held_out, say)
    try:
        _save(prepared, folder)
    except FileExistsError:
        pass  # another run was faster
    except OSError as error:
        say(f"prepared data is not kept for the next run: cannot write {folder}: {error.strerror}")
    return prepared


def bits_per_byte(nats: float, size: int) -> float:
    """A cost of `nats` in total over `size` bytes of text, as bits per byte."""
    return nats / np.log(2).item() / size


def _prepare(sources: Sources, tokenizer: str, vocab_size: int, held_out: float,
             say: Callable[[str], None]) -> Prepared:  # fmt: skip
    say(f"reading {sources.source}")
    corpus = read_corpus(sources, held_out=held_out)
    raw = "".join(corpus.held_out).encode()
    with ThreadPoolExecutor(2) as pool:  # both compressors release the GIL: the tokenizer works meanwhile
        gzipped = pool.submit(lambda: len(gzip.compress(raw, 9, mtime=0)))
        xzipped = pool.submit(lambda: len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)))
        made = _tokenizer(tokenizer, corpus.train, vocab_size, say)
        say("encoding")
        train, held = made.encode_documents(corpus.train), made.encode_documents(corpus.held_out)
        if (told := int(made.byte_lengths()[held].sum())) != len(raw):
            raise TokenizerError(
                f"data.tokenizer: {tokenizer}: its tokens stand for {told:,} of {len(raw):,} held-out bytes, so "
                "bits per byte would be wrong; wanted a byte-level BPE that changes nothing in the text"
            )
        facts = Facts(
            source=corpus.source,
            train_documents=len(corpus.train),
            train_bytes=sum(len(text.encode()) for text in corpus.train),
            train_tokens=len(train),
            held_out_documents=len(corpus.held_out),
            held_out_bytes=len(raw),
            held_out_tokens=len(held),
            gzip_bits=8 * gzipped.result() / len(raw),
            xz_bits=8 * xzipped.result() / len(raw),
            skipped=corpus.skipped,
        )
    return Prepared(made, train, held, facts, cached=False)


def _tokenizer(name: str, documents: list[str], vocab_size: int, say: Callable[[str], None]) -> Tokenizer:
    if name == "bytes":
        return ByteTokenizer()
    if name != "bpe":
        return load_tokenizer(name)
    say(f"training a tokenizer of {vocab_size:,} tokens")
    return train_bpe(documents, vocab_size=vocab_size)


def _cache_folder(cache: str) -> Path | None:
    """None for "off", and where the user has no home."""
    user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if cache == "off" or not cache and user.startswith("~"):
        return None
    return Path(os.path.expanduser(cache) or os.path.join(user, "entrenar"))


def _key(fingerprint: str, tokenizer: str, vocab_size: int, held_out: float) -> str:
    import tokenizers

    kept = ""
    if tokenizer not in ("bpe", "bytes"):
        path = Path(tokenizer)
        path = path / FILE if path.is_dir() else path
        kept = hashlib.blake2b(path.read_bytes()).hexdigest() if path.is_file() else ""
    size = vocab_size if tokenizer == "bpe" else 0
    settings = [FORMAT, fingerprint, tokenizer, kept, size, held_out, tokenizers.__version__]
    return hashlib.blake2b(json.dumps(settings).encode(), digest_size=16).hexdigest()


def _save(prepared: Prepared, folder: Path) -> None:
    with new_folder(folder) as temporary:
        prepared.tokenizer.save(temporary)
        np.save(temporary / "train.npy", prepared.train)
        np.save(temporary / "held_out.npy", prepared.held_out)
        (temporary / "facts.json").write_text(json.dumps(asdict(prepared.facts), indent=2), encoding="utf-8")


def _load(folder: Path) -> Prepared:
    values = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    facts = Facts(**values | {"skipped": tuple(values["skipped"])})
    train = np.load(folder / "train.npy", mmap_mode="r")
    held_out = np.load(folder / "held_out.npy", mmap_mode="r")
    if (len(train), len(held_out)) != (facts.train_tokens, facts.held_out_tokens):
        raise ValueError("token counts do not match")
    return Prepared(load_tokenizer(folder), train, held_out, facts, cached=True)
