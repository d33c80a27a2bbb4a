"""Preparing a corpus: once, in bounded memory, on all cores; killed at any moment, the next one goes on.

What is made is kept in a cache folder ($XDG_CACHE_HOME/entrenar, or ~/.cache/entrenar) under a key made of the files
(name, size, time of change) and of every setting that matters. Another file, another setting, another version: another
key.

The work: read everything once (scan.py), learn a tokenizer from a sample (pieces.py), encode piece by piece
(encoding.py), all in a folder that the next preparation goes on with if this one is killed (work.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from entrenar.data.corpus import CorpusError, Sources, find_sources, printable
from entrenar.data.encoding import Writer, encode_slabs
from entrenar.data.pieces import BEGINNING, LEARN_FROM, Position, pieces, sample
from entrenar.data.prepared import FACTS, FORMAT, NAMES, Facts, Prepared, hash_file, load_with_key, tokenizer_hash
from entrenar.data.scan import Progress, Scan, scan
from entrenar.data.tokenizer import FILE, ByteTokenizer, Tokenizer, TokenizerError, load_tokenizer, train_bpe
from entrenar.data.work import TOKENIZER, Work
from entrenar.files import new_folder, write_file

_STALE = 7 * 86400  # seconds after which an unfinished preparation is no longer waited for

Say = Callable[..., None]


def prepare(source: str, *, tokenizer: str = "bpe", vocab_size: int = 2048, held_out: float = 0.05, cache: str = "",
            skip_bad: bool = False, into: str | Path | None = None,
            say: Say = lambda text, done=0, total=0: None) -> Prepared:  # fmt: skip
    """Read, split, tokenize; or take all of it from the cache; or go on where an earlier preparation was killed.

    source      see corpus.py
    tokenizer   "bpe" (trained on the training side), "bytes", or a folder or file with a tokenizer saved before
    vocab_size  of the BPE to be trained
    held_out    share of the text that is never trained on
    cache       a folder; "" the user's cache folder; "off" none
    skip_bad    leave out files and rows that cannot be used, rather than refuse them
    into        without a cache: the folder to be made; None: a temporary one, gone with the Prepared
    say         called as say(text, done, total), in bytes, twice a second at most; total = 0: no telling how long

    Raises CorpusError where the text cannot be used, TokenizerError for a bad tokenizer, OSError for a full disk.
    """
    sources = find_sources(source)
    if tokenizer not in ("bpe", "bytes"):
        tokenizer = os.path.expanduser(tokenizer)
        if not os.path.exists(tokenizer):
            raise TokenizerError(
                f"data.tokenizer: {tokenizer!r} does not exist; wanted 'bpe', 'bytes', or a folder with a {FILE}"
            )
    fingerprint = sources.fingerprint()
    key = _key(fingerprint, tokenizer, vocab_size, held_out, skip_bad)
    job = _Job(sources, fingerprint, key, tokenizer, vocab_size, held_out, skip_bad, say)
    if (entries := _cache_folder(cache)) is not None:
        try:
            made = _prepared_in(entries / key, job)
            _sweep(entries)
            return made
        except _Unwritable as error:
            say(f"prepared data is not kept for the next run: {error.strerror}", 0, 0)
    if into is not None:
        return _prepared_in(Path(into), job)
    temporary = tempfile.TemporaryDirectory(prefix="entrenar-")
    return replace(_prepared_in(Path(temporary.name, "data"), job), temporary=temporary)


class _Unwritable(OSError):
    """The folder cannot be made; nothing was done yet."""


@dataclass(frozen=True)
class _Job:
    """What is to be prepared, and how."""

    sources: Sources
    fingerprint: str
    key: str
    tokenizer: str
    vocab_size: int
    held_out: float
    skip_bad: bool
    say: Say


def _prepared_in(folder: Path, job: _Job) -> Prepared:
    """What the folder holds, if it is what was asked for; else made there."""
    if (found := _there(folder, job)) is not None:
        return found
    try:
        work = Work(folder, job.key, job.say)
    except OSError as error:
        raise _Unwritable(error.errno, f"cannot write {folder}: {error.strerror}") from None
    with work:
        if (found := _there(folder, job)) is not None:  # another run was faster
            return found
        _fill(work, job)
        work.finish()
    return load_with_key(folder)[0]


def _there(folder: Path, job: _Job) -> Prepared | None:
    """The prepared data in the folder; None where there is none. Stale and damaged data is told and removed.

    Raises CorpusError rather than remove what is no prepared data.
    """
    if not folder.exists() or folder.is_dir() and not any(folder.iterdir()):
        return None
    try:
        prepared, key = load_with_key(folder)
        if key == job.key:
            return replace(prepared, cached=True)
        why = "it was made from another text, or with other settings"
    except CorpusError as error:
        why = str(error)
    if folder.name != job.key and not (folder / FACTS).is_file():
        raise CorpusError(f"{folder} is in the way: it holds something else than prepared data; move it elsewhere")
    job.say(f"prepared data in {folder} cannot be used ({why}): preparing again", 0, 0)
    shutil.rmtree(folder, ignore_errors=True)
    return None


def _fill(work: Work, job: _Job) -> None:
    """All of the work, from wherever an earlier preparation left it."""
    sources, progress = job.sources, Progress(job.sources, job.say)
    found = work.scan(len(sources.files))
    if found is None:
        progress.begin(f"reading {sources.source}")
        found = scan(sources, held_out=job.held_out, skip_bad=job.skip_bad, progress=progress)
        work.keep_scan(found)
    tokenizer = _tokenizer(work, found, job, progress)
    writer = _writer(work, tokenizer)
    try:
        start = writer.journal.position
        progress.begin("encoding" if start == BEGINNING else "encoding, from where an earlier run was stopped")
        encoded = encode_slabs(tokenizer, pieces(sources, found, tokenizer.cut, held_out=job.held_out, start=start,
                                                 progress=progress))  # fmt: skip
        for slab, ids in encoded:
            writer.append(slab, ids)
        writer.journal.position = Position(len(sources.files))
        writer.keep()
        if sources.fingerprint() != job.fingerprint:
            raise CorpusError(f"data.source: {sources.source!r} changed while it was being prepared; run it again")
        facts = _finish_files(work, writer, tokenizer, found, job)
    finally:
        writer.close()
    write_file(work.path(NAMES), b"".join(os.fsencode(file.name) + b"\0" for file in sources.files))
    write_file(work.path(FACTS), json.dumps({"format": FORMAT, "key": job.key, "facts": asdict(facts)}, indent=2))


def _tokenizer(work: Work, found: Scan, job: _Job, progress: Progress) -> Tokenizer:
    """The tokenizer, made or loaded, and kept with the work; as it was kept there, the second time."""
    folder = work.path(TOKENIZER)
    with contextlib.suppress(TokenizerError):
        return load_tokenizer(folder)
    work.forget_journal()
    shutil.rmtree(folder, ignore_errors=True)
    made = _new_tokenizer(found, job, progress)
    with new_folder(folder) as temporary:
        made.save(temporary)
    return load_tokenizer(folder)


def _new_tokenizer(found: Scan, job: _Job, progress: Progress) -> Tokenizer:
    if job.tokenizer == "bytes":
        return ByteTokenizer()
    if job.tokenizer != "bpe":
        return load_tokenizer(job.tokenizer)
    if found.train_chars > LEARN_FROM:
        progress.begin("choosing text for a tokenizer")
    chosen = sample(job.sources, found, held_out=job.held_out, progress=progress)
    job.say(f"training a tokenizer of {job.vocab_size:,} tokens", 0, 0)
    return train_bpe(chosen, vocab_size=job.vocab_size)


def _writer(work: Work, tokenizer: Tokenizer) -> Writer:
    try:
        return Writer(work, tokenizer)
    except (ValueError, FileNotFoundError):  # the journal says more than is there
        work.forget_journal()
        return Writer(work, tokenizer)


def _finish_files(work: Work, writer: Writer, tokenizer: Tokenizer, found: Scan, job: _Job) -> Facts:
    """The token files' headers, and the facts."""
    source, kept = job.key, tokenizer_hash(work.path(TOKENIZER))
    lengths = tokenizer.byte_lengths()
    made, told = writer.journal, []
    for side in writer.sides:
        counts = side.finish(vocab_size=tokenizer.vocab_size, source=source, tokenizer=kept)
        told.append(int(counts @ lengths))
    compared, gzip_bits, xz_bits = writer.compressed()
    return Facts(
        source=printable(job.sources.source),
        train_documents=made.documents[0],
        train_bytes=made.bytes[0],
        train_tokens=made.tokens[0],
        held_out_documents=made.documents[1],
        held_out_bytes=made.bytes[1],
        held_out_tokens=made.tokens[1],
        gzip_bits=gzip_bits,
        xz_bits=xz_bits,
        compared_bytes=compared,
        exact_bytes=told == made.bytes,
        held_out_token_bytes=told[1],
        skipped=tuple(found.skipped),
        skipped_documents=found.skipped_documents,
    )


# --- the cache --------------------------------------------------------------------------------------------


def _cache_folder(cache: str) -> Path | None:
    """None for "off", and where the user has no home."""
    user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if cache == "off" or not cache and user.startswith("~"):
        return None
    return Path(os.path.expanduser(cache) or os.path.join(user, "entrenar"))


def _key(fingerprint: str, tokenizer: str, vocab_size: int, held_out: float, skip_bad: bool) -> str:
    import tokenizers

    kept = _content_hash(Path(tokenizer)) if tokenizer not in ("bpe", "bytes") else ""
    size = vocab_size if tokenizer == "bpe" else 0
    settings = [FORMAT, fingerprint, tokenizer, kept, size, held_out, skip_bad, tokenizers.__version__]
    return hashlib.blake2b(json.dumps(settings).encode(), digest_size=16).hexdigest()


def _content_hash(tokenizer: Path) -> str:
    """Changes with the tokenizer's file, and with those beside it that name its end token."""
    folder = tokenizer if tokenizer.is_dir() else tokenizer.parent
    beside = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
              "added_tokens.json", "config.json", "generation_config.json")  # fmt: skip
    digest = hashlib.blake2b()
    for path in dict.fromkeys((tokenizer, *(folder / name for name in beside))):
        if path.is_file():
            hash_file(digest, path)
    return digest.hexdigest()


def _sweep(entries: Path) -> None:
    """Remove from the cache what was begun and left alone for a week."""
    for path in entries.glob("*.partial"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE:  # each entry of its journal renews it
                shutil.rmtree(path, ignore_errors=True)
