"""Sources and documents: what is read, from which kinds of file, which side it goes to, and what is refused."""

import errno
import gzip
import io
import json
import os
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from preparing import LINES, write_documents

from entrenar.data import CorpusError, find_sources, read_documents
from entrenar.data import corpus as corpus_module
from entrenar.data import pieces as pieces_module
from entrenar.data import rows as rows_module
from entrenar.data import scan as scan_module
from entrenar.data import streams as streams_module
from entrenar.data.corpus import is_held_out, source_file
from entrenar.data.documents import Row, Unusable, rows, text_slabs
from entrenar.data.pieces import Position, cut_pieces, pieces, sample
from entrenar.data.scan import Progress, scan
from entrenar.data.tokenizer import ByteTokenizer

try:
    from compression import zstd  # since Python 3.14
except ImportError:
    from backports import zstd


def scanned(source, *, held_out=0.05, skip_bad=False):
    sources = find_sources(str(source))
    progress = Progress(sources, lambda text, done=0, total=0: None)
    return sources, scan(sources, held_out=held_out, skip_bad=skip_bad, progress=progress)


def corpus(source, *, held_out=0.05, skip_bad=False):
    """(training documents, held-out documents), joined again from their pieces."""
    sources, found = scanned(source, held_out=held_out, skip_bad=skip_bad)
    sides = [], []
    for piece in pieces(sources, found, ByteTokenizer().cut, held_out=held_out):
        side = sides[piece.held_out]
        if not piece.continued:
            side.append("")
        side[-1] += piece.text
    return sides


def jsonl(*texts, **more):
    return "".join(json.dumps({"text": text} | more) + "\n" for text in texts)


def bad_rows(path):
    return [str(row) for row in rows(source_file(path.name, path)) if isinstance(row, Unusable)]


@pytest.fixture
def folder(tmp_path):
    return write_documents(tmp_path / "text")


# --- which side -------------------------------------------------------------------------------------------


def test_a_file_is_cut_at_the_start_of_a_line_and_loses_nothing(tmp_path):
    (tmp_path / "a.txt").write_text(LINES)
    (train,), (held,) = corpus(tmp_path / "a.txt", held_out=0.1)
    assert train + held == LINES
    assert train.endswith("\n")
    assert 0.05 < len(held) / len(LINES) <= 0.1


def test_a_file_of_one_line_is_cut_inside_it(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 1000)
    (train,), (held,) = corpus(tmp_path / "a.txt")
    assert (len(train), len(held)) == (950, 50)


def test_a_last_line_of_any_length_leaves_a_part_to_hold_out(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 990 + "\n" + "end of it")
    assert len(corpus(tmp_path / "a.txt", held_out=0.1)[1][0]) == 100


@given(text=st.text("ab\né😀", min_size=2, max_size=200), held_out=st.floats(0.01, 0.99), block=st.integers(1, 40))
def test_the_cut_does_not_depend_on_how_the_text_comes(text, held_out, block):
    slabs = [text[i : i + block] for i in range(0, len(text), block)]
    cut = scan_module._cut(iter(slabs), len(text), held_out)
    assert cut == scan_module.cut_of(text, held_out)
    size = max(1, int(len(text) * held_out))  # the rule, as it always was
    line = text.find("\n", len(text) - size) + 1
    assert cut == (line if 0 < line <= len(text) - size / 2 else len(text) - size)


def test_line_ends_are_kept_as_they_are(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\rthree\n" * 20)
    (train,), (held,) = corpus(tmp_path / "a.txt")
    assert (train + held).encode() == b"one\r\ntwo\rthree\n" * 20


def test_files_of_a_folder_keep_their_side_when_others_come(folder):
    train, held = corpus(folder)
    assert train and held and len(train) + len(held) == 60
    (folder / "new.txt").write_text("one more\n")
    train_after, held_after = corpus(folder)
    assert set(held) <= set(held_after) and set(train) <= set(train_after)


def test_rows_go_by_what_they_say_so_that_copies_stay_together(tmp_path):
    texts = [f"document number {i}" for i in range(300)]
    (tmp_path / "a.jsonl").write_text(jsonl(*texts, *texts[::-1]))
    train, held = corpus(tmp_path / "a.jsonl", held_out=0.1)
    assert held == [t for t in texts + texts[::-1] if is_held_out(t, 0.1)] and 15 < len(set(held)) < 50
    assert not set(train) & set(held) and len(train) + len(held) == 600


def test_the_hash_chooses_about_the_asked_share():
    held = sum(is_held_out(f"some/file_{i}.py", 0.05) for i in range(4000))
    assert 150 < held < 250


@pytest.mark.parametrize("held_out", [0.05, 0.999])
def test_of_few_files_where_the_hash_leaves_a_side_empty_the_last_part_of_each_is_held_out(tmp_path, held_out):
    texts = {"a.txt": "short\n" * 5, "z.txt": LINES}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        assert is_held_out(name, held_out) == (held_out > 0.5)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0")
    train, held = corpus(tmp_path, held_out=held_out)
    assert [a + b for a, b in zip(train, held, strict=True)] == list(texts.values())


def test_of_few_rows_too_and_one_of_a_single_letter_is_not_lost(tmp_path):
    texts = ["a few words", "b", LINES]
    assert not any(is_held_out(text, 0.05) for text in texts)
    (tmp_path / "a.jsonl").write_text(jsonl(*texts))
    train, held = corpus(tmp_path / "a.jsonl")
    assert train[0] + held[0] == texts[0] and train[1] == "b" and train[2] + held[1] == LINES


# --- sources ----------------------------------------------------------------------------------------------


def test_binary_and_hidden_files_of_a_folder_are_left_out_and_told(folder):
    (folder / "picture.png").write_bytes(b"\x89PNG\0\0\0")
    (folder / "late.bin").write_bytes(b"\xff" * 9000 + b"\0")  # known by a NUL anywhere
    (folder / ".hidden").write_bytes(b"\xff")
    (folder / "empty.txt").write_text("")
    _, found = scanned(folder)
    assert (found.skipped, found.skipped_documents) == (["late.bin", "picture.png"], 2)
    assert sum(map(len, corpus(folder))) == 60


def test_a_glob_pattern_finds_files_below(folder):
    (folder / "below").mkdir()
    (folder / "below" / "a.md").write_text(LINES)
    assert corpus(folder / "**" / "*.md")[0][0].startswith("line 0")


def test_a_pipe_is_told_to_be_no_file_and_an_unknown_home_no_place(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CorpusError, match="is neither a file nor a folder"):
        find_sources(str(tmp_path / "pipe"))
    with pytest.raises(CorpusError, match="'~nobody.knows/x' does not exist"):
        find_sources("~nobody.knows/x")


@pytest.fixture
def standard_input(monkeypatch):
    def feed(raw):
        corpus_module._spooled.cache_clear()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw)))

    yield feed
    corpus_module._spooled.cache_clear()


def test_standard_input_is_one_text_and_can_be_asked_for_again(standard_input):
    standard_input(LINES.encode())
    for _ in range(2):
        (train,), (held,) = corpus("-")
        assert train + held == LINES
    first = find_sources("-").fingerprint()
    standard_input(LINES.encode())
    assert find_sources("-").fingerprint() == first
    standard_input(LINES.encode() + b"\n")
    assert find_sources("-").fingerprint() != first


def test_standard_input_may_be_jsonl_and_its_faults_are_named(standard_input, monkeypatch):
    texts = [f"text {i}" for i in range(100)]
    standard_input(jsonl(*texts).encode())
    train, held = corpus("jsonl:-")
    assert sorted(train + held) == sorted(texts)
    standard_input(b'{"text": "fine"}\n{"txt": 1}\n')
    with pytest.raises(CorpusError, match='standard input line 2 \\(byte 17\\) has no "text", only "txt"'):
        corpus("jsonl:-")
    standard_input(b"")
    with pytest.raises(CorpusError, match="standard input is empty"):
        corpus("-")
    corpus_module._spooled.cache_clear()
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(CorpusError, match="standard input, which is closed"):
        find_sources("-")


def test_the_standard_library_is_there_without_its_tests_and_packages():
    names = {file.name for file in find_sources("stdlib:").files}
    assert "ast.py" in names and "json/decoder.py" in names
    assert not [n for n in names if {"test", "tests", "site-packages", "__pycache__"} & set(n.split("/"))]


@pytest.mark.parametrize(
    ("name", "kind", "packing"),
    [
        ("a.txt", "text", ""), ("a.jsonl", "jsonl", ""), ("a.NDJSON", "jsonl", ""), ("a.jsonl.gz", "jsonl", "gzip"),
        ("a.txt.zst", "text", "zstd"), ("a.parquet", "parquet", ""), ("a.json", "text", ""), ("gz", "text", ""),
    ],
)  # fmt: skip
def test_the_name_says_what_a_file_is(name, kind, packing):
    file = source_file(name, Path(name))
    assert (file.kind, file.packing) == (kind, packing)


def test_a_missing_source_says_what_would_be_one(tmp_path):
    with pytest.raises(CorpusError, match="does not exist.*wanted a text file, a folder, a glob pattern, '-'"):
        find_sources(str(tmp_path / "nothing.txt"))
    with pytest.raises(CorpusError, match="holds no files"):
        find_sources(str(tmp_path / "*.txt"))
    with pytest.raises(CorpusError, match="holds no files"):
        find_sources(str(tmp_path))


# --- kinds of files ---------------------------------------------------------------------------------------


def parquet(path, texts, **options):
    pyarrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"id": list(range(len(texts))), "text": pyarrow.array(texts, options.pop("type", None))})
    writer.write_table(table, path, **options)


def test_one_folder_may_mix_kinds_and_packings(tmp_path):
    texts = {f"{i}.txt": f"text file {i}\n" for i in range(30)}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"packed by gzip"))
    (tmp_path / "b.txt.zst").write_bytes(zstd.compress(b"packed by ") + zstd.compress(b"zstd"))  # two frames
    (tmp_path / "c.jsonl").write_text("\ufeff" + jsonl("a row", "another") + "\n\n" + jsonl(" ", "third"))
    (tmp_path / "d.ndjson.gz").write_bytes(gzip.compress(jsonl("packed row").encode()))
    (tmp_path / "e.jsonl.zst").write_bytes(zstd.compress(jsonl("zstd row").encode()))
    parquet(tmp_path / "f.parquet", ["row of parquet", "second"])
    train, held = corpus(tmp_path, held_out=0.3)
    others = ["packed by gzip", "packed by zstd", "a row", "another", "third", "packed row", "zstd row"]
    assert sorted(train + held) == sorted([*texts.values(), *others, "row of parquet", "second"])
    assert sorted(text for _, text in read_documents(find_sources(str(tmp_path)))) == sorted(train + held)


@given(text=st.text(max_size=300), block=st.integers(1, 20))
def test_text_is_decoded_across_blocks_of_any_size(tmp_path_factory, text, block):
    path = tmp_path_factory.mktemp("t") / "a.txt"
    raw = text.replace("\0", "").encode()
    path.write_bytes(raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams_module, "BLOCK", block)
        assert "".join(text_slabs(source_file("a.txt", path))).encode() == raw
        packed = path.with_name("a.txt.gz")
        packed.write_bytes(gzip.compress(raw))
        assert "".join(text_slabs(source_file("a.txt.gz", packed))).encode() == raw


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_rows_can_be_read_on_from_any_of_them(tmp_path, name, monkeypatch):
    monkeypatch.setattr(rows_module, "PARQUET_BATCH", 3)
    texts = [f"row {i} é" for i in range(40)]
    raw = jsonl(*texts).encode()
    pack = {"gz": gzip.compress, "zst": zstd.compress}.get(name.rpartition(".")[2], bytes)
    if name.endswith("parquet"):
        parquet(tmp_path / name, texts, row_group_size=7)
    else:
        (tmp_path / name).write_bytes(pack(raw))
    file = source_file(name, tmp_path / name)
    every = list(rows(file))
    assert [row.text for row in every] == texts and [row.number for row in every] == list(range(1, 41))
    for row in every[::3]:
        assert list(rows(file, row.after, row.number)) == every[row.number :]


def test_parquet_of_every_kind_of_string_is_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())):
        parquet(tmp_path / "a.parquet", texts := ["eins", "zwei é", "eins"], type=kind)
        assert [row.text for row in rows(source_file("a.parquet", tmp_path / "a.parquet"))] == texts


def test_without_pyarrow_the_extra_to_install_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(CorpusError, match="a.parquet is Parquet, .* pip install 'entrenar\\[parquet\\]'"):
        corpus(tmp_path / "a.parquet")


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; wanted UTF-8 text"),
        (b" \n\n", "is empty; wanted UTF-8 text"),
        (b"a", "has 1 characters: too short to hold a part out"),
        (b"text\0more", "is binary, not text: byte 4 is NUL"),
        (b"fine\nfine\ncaf\xe9 au lait\n", "is not UTF-8: line 3, byte 13 is 0xe9"),
        (b"fine\ncut off \xe6\x97", "is not UTF-8: line 2, byte 13 is 0xe6 (unexpected end of data)"),
    ],
)
def test_a_text_that_cannot_be_used_is_named_with_its_fault(tmp_path, content, message):
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(CorpusError, match=re.escape(message)) as error:
        corpus(tmp_path / "bad.txt")
    assert str(tmp_path / "bad.txt") in str(error.value)
    with pytest.raises(CorpusError, match="bad.txt"):
        corpus(tmp_path / "bad.txt", skip_bad=True)  # then there is nothing left


def test_the_place_of_a_bad_byte_is_right_far_into_a_packed_file(tmp_path, monkeypatch):
    monkeypatch.setattr(streams_module, "BLOCK", 100)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(LINES.encode() + b"caf\xe9"))
    with pytest.raises(CorpusError, match=f"line 201, byte {len(LINES) + 3:,} is 0xe9"):
        corpus(tmp_path / "a.txt.gz")


def test_a_folder_with_one_bad_file_names_it(folder):
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(CorpusError, match="latin.txt is not UTF-8: line 1, byte 3.*--skip-bad .* leaves out") as error:
        corpus(folder)
    assert "more" not in str(error.value)
    _, found = scanned(folder, skip_bad=True)
    assert (found.skipped, found.skipped_documents) == (["latin.txt"], 1)
    assert sum(map(len, corpus(folder, skip_bad=True))) == 60


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', 'is not JSON: expecting \',\' delimiter at column 13; wanted {"text": "..."}'),
        (b'{"text": "a"} x', "is not JSON: extra data at column 15"),
        (b"plain words", "is not JSON: expecting value at column 1"),
        (b'{"text": "a\0"}', "is not JSON: invalid control character at"),
        (b'{"text": "caf\xe9"}', "is not UTF-8: its byte 13 is 0xe9"),
        (b"[1, 2]", "is a list; wanted"),
        (b'"text"', "is a text; wanted"),
        (b"null", "is null; wanted"),
        (b'{"body": "a", "id": 1}', 'has no "text", only "body", "id"; wanted'),
        (b"{}", 'has no "text"; wanted'),
        (b'{"text": 3}', 'has a number as "text"; wanted'),
        (b'{"text": null}', 'has null as "text"; wanted'),
        (b'{"text": {}}', 'has an object as "text"; wanted'),
        (b'{"text": "a \\ud83d b"}', 'has half a surrogate pair in "text" (\\ud83d), which is no Unicode'),
        (b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "is nested too deeply"),
        (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "4300 digits"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_with_file_line_byte_and_fault(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_bytes(jsonl("fine").encode() + line + b"\n" + jsonl("fine, too").encode())
    with pytest.raises(CorpusError, match=re.escape(message)) as error:
        corpus(tmp_path / "a.jsonl")
    assert f"{tmp_path / 'a.jsonl'} line 2 (byte 17) " in str(error.value)
    _, found = scanned(tmp_path / "a.jsonl", skip_bad=True)
    assert found.skipped_documents == 1 and "line 2" in found.skipped[0]
    assert [text for _, text in read_documents(find_sources(str(tmp_path)), skip_bad=True)] == ["fine", "fine, too"]


def test_an_overlong_row_is_never_read_whole_and_the_next_one_is_fine(tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "LONGEST_ROW", 1000)
    monkeypatch.setattr(streams_module, "BLOCK", 64)
    (tmp_path / "a.jsonl").write_text(jsonl("x" * 5000, "fine"))
    bad, fine = rows(source_file("a.jsonl", tmp_path / "a.jsonl"))
    assert "line 1 has 5,013 bytes, the longest row may have 1,000" in str(bad)
    assert isinstance(fine, Row) and (fine.text, fine.number) == ("fine", 2)


def test_the_error_counts_what_more_is_bad_and_in_how_many_files(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.jsonl").write_text(jsonl("fine") + "bad\n" * 4 + jsonl("fine"))
    (tmp_path / "d.txt").write_bytes(b"caf\xe9")
    with pytest.raises(CorpusError, match="a.jsonl line 2 .*; and 12 more cannot be used in 4 files; --skip-bad"):
        corpus(tmp_path)
    _, found = scanned(tmp_path, skip_bad=True)
    assert found.skipped_documents == 13 and len(found.skipped) == scan_module.NAMED


def test_looking_for_more_ends_after_a_while_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(scan_module, "PATIENCE", 0.0)
    (tmp_path / "a.jsonl").write_text("bad\n" * 4)
    with pytest.raises(CorpusError, match="at least .* more cannot be used \\(not read to the end: 0 seconds"):
        corpus(tmp_path / "a.jsonl")


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
@pytest.mark.parametrize(("pack", "ending"), [(gzip.compress, "gz"), (zstd.compress, "zst")])
def test_packed_files_cut_off_anywhere_are_named_and_never_half_read(tmp_path, kind, pack, ending):
    raw = os.urandom(600).hex()
    packed = pack((raw if kind == "txt" else jsonl(raw)).encode())
    path = tmp_path / f"a.{kind}.{ending}"
    for size in (*range(0, 40), len(packed) // 2, *range(len(packed) - 12, len(packed))):
        path.write_bytes(packed[:size])
        if not size:
            with pytest.raises(CorpusError, match="empty|cut off"):
                corpus(path)
            continue
        with pytest.raises(CorpusError, match=f"a.{kind}.{ending}.* is (cut off|damaged)"):
            corpus(path)
    path.write_bytes(b"this is plain text, not packed at all")
    with pytest.raises(CorpusError, match="is damaged, or no (gzip|zstd) file"):
        corpus(path)


def test_rows_before_a_packed_file_ends_too_early_are_kept_with_skip_bad(tmp_path):
    texts = [os.urandom(50).hex() for _ in range(200)]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl(*texts).encode())[:-2000])
    with pytest.raises(CorpusError, match="a.jsonl.gz after line [0-9]+ is cut off"):
        corpus(tmp_path / "a.jsonl.gz")
    train, held = corpus(tmp_path / "a.jsonl.gz", skip_bad=True)
    assert 100 < len(train) + len(held) < 200 and set(train + held) <= set(texts)


def test_parquet_that_cannot_be_used_is_named_with_its_fault(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    parquet(path, ["fine", None, "fine, too"])
    assert bad_rows(path) == [f'{path} row 2 has null as "text"']
    parquet(path, [1, 2])
    assert 'has a column "text" of type int64; wanted strings' in bad_rows(path)[0]
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "id": [1]}), path)
    assert "has no column \"text\", but 'body', 'id'" in bad_rows(path)[0]
    raw = pyarrow.py_buffer(b"caf\xe9fine")
    offsets = pyarrow.py_buffer(b"\0\0\0\0\4\0\0\0\10\0\0\0")
    broken = pyarrow.Array.from_buffers(pyarrow.string(), 2, [None, offsets, raw])
    pyarrow.parquet.write_table(pyarrow.table({"text": broken}), path)
    assert len(found := bad_rows(path)) == 1 and "row 1 is not UTF-8: its byte 3" in found[0]
    whole = path.read_bytes()
    for size in (0, 3, 20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert "cannot be read as Parquet" in bad_rows(path)[0]


def test_an_unreadable_file_is_named(folder, monkeypatch):
    (folder / "zz.txt").symlink_to("/proc/self/mem" if sys.platform == "linux" else "/dev/null")
    if sys.platform != "linux":
        pytest.skip("wants a file whose reading fails")
    with pytest.raises(CorpusError, match="zz.txt cannot be read"):
        corpus(folder)


# --- pieces -----------------------------------------------------------------------------------------------


def lines_cut(text, at):
    place = text.find("\n", max(0, at - 1)) + 1
    return place if 0 < place < len(text) else None


@given(text=st.text("ab \n", max_size=400), block=st.integers(1, 50), longest=st.integers(8, 30))
def test_pieces_are_the_text_and_none_is_too_long_or_cut_in_the_wrong_place(text, block, longest):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces_module, "PIECE", 8)
        patch.setattr(pieces_module, "LONGEST", longest)
        found = list(cut_pieces((text[i : i + block] for i in range(0, len(text), block)), lines_cut))
        again = list(cut_pieces([text], lines_cut))
    assert "".join(found) == text and found == again, "however the text comes"
    assert all(0 < len(piece) <= longest for piece in found)
    for piece in found[:-1]:
        assert piece.endswith("\n") or "\n" not in piece[8:]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
def test_reading_goes_on_from_the_end_of_any_piece(tmp_path, name, monkeypatch):
    monkeypatch.setattr(pieces_module, "PIECE", 50)
    monkeypatch.setattr(streams_module, "BLOCK", 333)
    pack = {"gz": gzip.compress, "zst": zstd.compress}.get(name.rpartition(".")[2], bytes)
    (tmp_path / name).write_bytes(pack(LINES.replace("fox", "füchse").encode()))
    (tmp_path / "b.jsonl").write_text(jsonl("a row", LINES, "b row"))
    (tmp_path / "c.txt").write_text(LINES)
    for source in (tmp_path / name, tmp_path):
        sources, found = scanned(source, held_out=0.2)
        every = list(pieces(sources, found, lines_cut, held_out=0.2))
        assert len(every) > 100
        for i, piece in enumerate(every):
            if piece.after is not None and i % 5 < 2:
                assert list(pieces(sources, found, lines_cut, held_out=0.2, start=piece.after)) == every[i + 1 :]
        assert every[-1].after == Position(len(sources.files))


def test_a_file_that_changes_between_two_readings_is_refused(tmp_path):
    for content in (LINES + "more", LINES[:-5], LINES[:-9] + "caf\xe9\n", LINES[:100] + "\0"):
        (tmp_path / "a.txt").write_text(LINES)
        sources, found = scanned(tmp_path / "a.txt")
        (tmp_path / "a.txt").write_bytes(content.encode("latin1"))
        with pytest.raises(CorpusError, match="a.txt changed while it was being prepared"):
            list(pieces(sources, found, lines_cut, held_out=0.05))


def test_a_tokenizer_learns_from_all_of_a_small_text_and_a_share_of_a_large_one(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(LINES)
    sources, found = scanned(tmp_path / "a.txt")
    whole = "".join(sample(sources, found, held_out=0.05))
    assert len(whole) == found.train_chars and LINES.startswith(whole)
    for name, value in {"LEARN_FROM": 5000, "LEARN_FROM_MANY": 2000, "PIECE": 100}.items():
        monkeypatch.setattr(pieces_module, name, value)
    chosen = sample(sources, found, held_out=0.05)
    assert 1000 < sum(map(len, chosen)) <= 2000
    assert all(piece in whole for piece in chosen) and "line 180" in "".join(chosen), "from all over the text"


def test_no_source_at_all_is_not_this_folder():
    with pytest.raises(CorpusError, match="data.source is empty"):
        find_sources("")


def test_a_folder_inside_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    """Root may read everything: the refusal is planted."""
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "a.txt").write_text("text\n")
    (tmp_path / "shut").mkdir()
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "shut":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(CorpusError, match="cannot read the folder .*shut: Permission denied; what is in it"):
        find_sources(str(tmp_path))
