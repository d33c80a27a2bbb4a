"""Token files: what is written is read, and nothing else is."""

import hashlib
import mmap
import os
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from entrenar.data.tokenfile import HEADER, TokenWriter, forget, open_tokens, read_header
from entrenar.formats import FormatError

SOURCE, TOKENIZER = "0123456789abcdef" * 2, "fedcba9876543210" * 2


def write(path, ids, *, vocab_size=1000, dtype=np.uint16):
    writer = TokenWriter(path, np.dtype(dtype))
    writer.append(np.array(ids, dtype))
    return writer.finish(vocab_size=vocab_size, source=SOURCE, tokenizer=TOKENIZER)


def sealed(raw: bytes, **change) -> bytes:
    """The file with fields of its header changed, and the header's own hash made to fit again."""
    names = ("magic", "version", "width", "count", "vocab_size", "source", "tokenizer", "content", "seal")
    fields = dict(zip(names, HEADER.unpack(raw[: HEADER.size]), strict=True)) | change
    head = HEADER.pack(*fields.values())[:96]
    return head + hashlib.sha256(head).digest() + raw[HEADER.size :]


@pytest.mark.parametrize(("dtype", "vocab_size"), [(np.uint16, 65536), (np.uint32, 200_000)])
@pytest.mark.parametrize("count", [0, 1, 700_000])
def test_what_is_written_is_read(tmp_path, dtype, vocab_size, count):
    ids = (np.arange(count) * 7919 % vocab_size).astype(dtype)
    writer = TokenWriter(tmp_path / "t", np.dtype(dtype))
    for part in np.array_split(ids, 3):
        writer.append(part)
    counts = writer.finish(vocab_size=vocab_size, source=SOURCE, tokenizer=TOKENIZER)
    np.testing.assert_array_equal(counts, np.bincount(ids, minlength=vocab_size))
    read, header = open_tokens(tmp_path / "t"), read_header(tmp_path / "t")
    np.testing.assert_array_equal(read, ids)
    assert read.dtype == dtype and not read.flags.writeable
    assert (header.count, header.vocab_size, header.source, header.tokenizer) == (count, vocab_size, SOURCE, TOKENIZER)


def test_the_file_is_laid_out_as_its_documentation_says(tmp_path):
    write(tmp_path / "t", [1, 2, 999])
    raw = (tmp_path / "t").read_bytes()
    assert raw[:8] == b"\x89ENTOK\r\n" and len(raw) == 128 + 6
    assert struct.unpack_from("<IIQQ", raw, 8) == (1, 2, 3, 1000)
    assert raw[32:48].hex() == SOURCE and raw[48:64].hex() == TOKENIZER
    assert raw[64:96] == hashlib.sha256(raw[128:]).digest() and raw[96:128] == hashlib.sha256(raw[:96]).digest()
    assert struct.unpack_from("<3H", raw, 128) == (1, 2, 999)


def test_every_truncation_and_every_longer_file_is_refused(tmp_path):
    write(tmp_path / "whole", range(20))
    raw = (tmp_path / "whole").read_bytes()
    for size in (*range(len(raw)), len(raw) + 1, len(raw) + 2):
        (tmp_path / "t").write_bytes((raw + b"\0\0")[:size])
        for read in (open_tokens, read_header):
            with pytest.raises(FormatError, match="t: "):
                read(tmp_path / "t")


def test_every_changed_byte_is_noticed(tmp_path):
    write(tmp_path / "whole", range(20))
    raw = (tmp_path / "whole").read_bytes()
    for at in range(len(raw)):
        (tmp_path / "t").write_bytes(raw[:at] + bytes([raw[at] ^ 0x10]) + raw[at + 1 :])
        with pytest.raises(FormatError):
            open_tokens(tmp_path / "t")


@given(ids=st.lists(st.integers(0, 299), max_size=50), cut=st.integers(1, 400))
def test_any_file_reads_back_and_none_cut_short_does(ids, cut):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "t")
        write(path, ids, vocab_size=300)
        assert open_tokens(path).tolist() == ids
        raw = path.read_bytes()
        path.write_bytes(raw[: max(0, len(raw) - cut)])
        with pytest.raises(FormatError):
            open_tokens(path)


def test_an_id_outside_the_vocabulary_is_refused_when_written_and_when_read(tmp_path):
    with pytest.raises(FormatError, match="holds the id 1000; the vocabulary has 1,000"):
        write(tmp_path / "t", [5, 1000])
    with pytest.raises(FormatError, match="was never finished"):
        open_tokens(tmp_path / "t")
    write(tmp_path / "t", [5, 1000], vocab_size=1001)
    # with every hash as it should be
    (tmp_path / "t").write_bytes(sealed((tmp_path / "t").read_bytes(), vocab_size=1000))
    with pytest.raises(FormatError, match="token 1 \\(byte 130\\) is 1000; the vocabulary has 1,000 tokens"):
        open_tokens(tmp_path / "t")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2 of the token file format; this entrenar reads 1"),
        ({"width": 0}, "ids of 0 bytes; wanted 2 or 4"),
        ({"width": 2**31}, "ids of 2147483648 bytes"),
        ({"width": 4}, "has 168 bytes; 20 ids of 4 bytes"),
        ({"count": 2**64 - 1}, "the file was cut off, or has grown"),
        ({"count": 2**63}, "the file was cut off, or has grown"),
        ({"count": 0}, "the file was cut off, or has grown"),
        ({"vocab_size": 0}, "a vocabulary of 0"),
        ({"vocab_size": 65537}, "a vocabulary of 65,537 does not go with ids of 2 bytes"),
        ({"content": bytes(32)}, "do not match their hash"),
        ({"magic": b"\x89PNG\r\n\x1a\n"}, "does not begin with the magic"),
    ],
)
def test_a_header_that_cannot_be_is_refused_whatever_its_hash_says(tmp_path, change, message):
    write(tmp_path / "t", range(20))
    (tmp_path / "t").write_bytes(sealed((tmp_path / "t").read_bytes(), **change))
    with pytest.raises(FormatError, match=message) as error:
        open_tokens(tmp_path / "t")
    assert str(tmp_path / "t") in str(error.value)


def test_what_is_no_file_is_refused_and_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises((FormatError, OSError)):
            open_tokens(path)
    with pytest.raises(FileNotFoundError):
        open_tokens(tmp_path / "none")


def test_a_writer_goes_on_where_another_stopped_and_cuts_off_what_lies_behind(tmp_path):
    one = TokenWriter(tmp_path / "t", np.dtype(np.uint16))
    one.append(np.arange(10))
    one.sync()
    one.append(np.arange(500, 700))  # not in the journal
    one.close()
    two = TokenWriter(tmp_path / "t", np.dtype(np.uint16), count=10)
    two.append(np.arange(10, 20))
    two.finish(vocab_size=1000, source=SOURCE, tokenizer=TOKENIZER)
    assert open_tokens(tmp_path / "t").tolist() == list(range(20))
    with pytest.raises(FormatError, match="has fewer than the 21 tokens"):
        TokenWriter(tmp_path / "t", np.dtype(np.uint16), count=21)


def test_an_opened_file_is_a_map_whose_pages_can_be_given_back(tmp_path):
    write(tmp_path / "t", range(1000))
    tokens = open_tokens(tmp_path / "t")
    assert isinstance(tokens.base.obj, mmap.mmap)
    for array in (tokens, tokens[5:10], np.arange(3), np.arange(6).reshape(2, 3)[1]):
        forget(array)
    assert tokens.tolist() == list(range(1000))
