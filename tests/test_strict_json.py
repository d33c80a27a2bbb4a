"""JSON read strictly: what is taken, what is refused, and that each refusal says where."""

import json
import os
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entrenar.formats import FormatError
from entrenar.formats.strict_json import DEPTH, parse, read_json, read_object

REFUSED = {
    "a key twice": ('{"a": 1,\n "b": {"c": 1, "c": 2}}', "f.json line 2 column 16: the key 'c' is there twice"),
    "a key twice, spelled differently": (r'{"a": 1, "\u0061": 2}', "column 10: the key 'a' is there twice"),
    "NaN": ('{"a":\n NaN}', "f.json line 2 column 2: NaN is no number"),
    "Infinity": ("[1, -Infinity]", "column 5: -Infinity is no number"),
    "a float that becomes infinite": ("[1e999]", "column 2: the number 1e999 is too big"),
    "an integer without end": ("[" + "7" * 101 + "]", "column 2: an integer of 101 digits"),
    "nesting": ("[" * (DEPTH + 1) + "]" * (DEPTH + 1), f"column {DEPTH + 1}: nested more than {DEPTH} deep"),
    "nesting without end": ('{"a":' * 200_000, "column 501: nested more than 100 deep"),
    "half a surrogate pair": (r'{"a": "x\ud83d"}', r"column 9: \ud83d is no Unicode"),
    "the other half": (r'["\ude00"]', r"column 3: \ude00 is no Unicode"),
    "the other half behind what only looks like one": (r'["\\ud83d\ude00"]', r"column 10: \ude00 is no Unicode"),
    "half a pair as a key": (r'{"\ud83d": 1}', r"column 3: \ud83d is no Unicode"),
    "more values than memory is given to": ("[" + "[]," * 3_000_000, "f.json: has more than 3,000,000 values"),
    "not JSON": ('{"a": 1,\n}', "f.json line 2 column 1: is not JSON"),
    "two values": ("{} {}", "column 4: is not JSON: extra data"),
    "a line end in a text": ('["a\nb"]', "column 4: is not JSON: invalid control character"),
    "a NUL": ("{}\0", "column 3: is not JSON"),
    "single quotes": ("{'a': 1}", "column 2: is not JSON"),
    "nothing": (" \n", "f.json: is empty"),
    "a byte order mark": ("\ufeff{}", "f.json: begins with a byte order mark"),
    "no UTF-8": (b'{"a":\n "\xff"}', "f.json line 2: byte 8 (0xff) is not UTF-8"),
    "UTF-16": ('{"a": 1}'.encode("utf-16-le"), "column 2: is not JSON"),
}


@pytest.mark.parametrize("text, message", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused_is_refused_with_its_place(text, message):
    with pytest.raises(FormatError) as error:
        parse(text, "f.json")
    assert message in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        "null",
        "-1.5e-3", '"\\ud83d\\ude00"', '"\\\\ud83d"', '{"a": {"a": 1}, "b": {"a": 1}}', "[" * DEPTH + "]" * DEPTH,
        '"NaN, \\"a\\": Infinity"', "123456789012345678901234567890123456789", "1e-999",
    ],
)  # fmt: skip
def test_what_only_looks_like_it_is_read(text):
    assert parse(text, "f.json") == json.loads(text)


WORDS = st.text(st.characters(codec="utf-8"))
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(st.none() | st.booleans() | NUMBERS | WORDS,
                      lambda inner: st.lists(inner) | st.dictionaries(WORDS, inner), max_leaves=20)  # fmt: skip


@given(VALUES, st.booleans())
def test_every_value_survives(value, ascii_only):
    assert parse(json.dumps(value, ensure_ascii=ascii_only), "f.json") == value


@settings(max_examples=100)
@given(st.text(alphabet='{}[]",:\\ud83NaInfty-0.1e9 \n', max_size=40))
def test_scrambled_text_is_read_as_the_standard_library_does_or_refused(text):
    try:
        value = parse(text, "f.json")
    except FormatError as error:
        assert str(error).startswith("f.json")
    else:
        assert value == json.loads(text)


DEEP = "[" * 101 + "]" * 101


@pytest.mark.parametrize("bad", ['"a":1,"a":2', '"a":NaN', '"a":1e999', f'"a":{DEEP}', r'"a":"\ud83d"'])
def test_in_a_long_text_no_time_is_lost_on_saying_where(bad):
    text = '{"filler":[' + "1234567," * 600_000 + "0]," + bad + "}"
    began = time.process_time()
    with pytest.raises(FormatError, match="^f.json.*: (the key 'a'|NaN is|the number|nested|.ud83d is)"):
        parse(text, "f.json")
    assert time.process_time() - began < 2  # a third of a second, alone on a machine


def test_a_line_of_jsonl_is_named_by_its_number():
    with pytest.raises(FormatError, match="^rows.jsonl line 17 column 6: is not JSON"):
        parse(b'{"a":}', "rows.jsonl", first_line=17)
    with pytest.raises(FormatError, match="^rows.jsonl line 17: is empty"):
        parse("", "rows.jsonl", first_line=17)
    with pytest.raises(FormatError, match="^rows.jsonl line 17: byte 1 "):
        parse(b'"\xff"', "rows.jsonl", first_line=17)


def test_a_file_is_read_and_named(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"a": [1, 2]}')
    assert read_json(file) == read_object(file) == {"a": [1, 2]}
    file.write_text("[1]")
    with pytest.raises(FormatError, match="config.json: holds an array, wanted an object"):
        read_object(file)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")


def test_a_file_too_big_is_refused_before_it_is_read(tmp_path):
    file = tmp_path / "huge.json"
    with open(file, "wb") as sparse:
        sparse.truncate(10**12)
    began = time.process_time()
    with pytest.raises(FormatError, match="has 1,000,000,000,000 bytes; a file like this has at most 16,000,000"):
        read_json(file)
    assert time.process_time() - began < 0.5


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(FormatError, match="is no regular file"):
            read_json(path)


def test_a_large_tokenizer_takes_little_longer_than_the_parser_alone():
    vocab = {f"token {i} é": i for i in range(128_000)}
    text = json.dumps({"vocab": vocab, "merges": [[f"a{i}", f"b{i}"] for i in range(100_000)]}, ensure_ascii=False)
    seconds = []
    for read in (json.loads, lambda text: parse(text, "tokenizer.json")):
        began = time.process_time()
        assert len(read(text)["vocab"]) == 128_000
        seconds.append(time.process_time() - began)
    assert seconds[1] < 4 * seconds[0] + 0.2
