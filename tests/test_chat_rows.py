"""Rows of fine-tuning data: every shape, every error, and the files they stand in."""

import gzip
import io
import json

import pytest

from entrenar.data.chat.rows import ROLES, BadRow, ChatRow, Keys, PromptRow, TextRow, sniffed
from entrenar.data.chat.sources import Found, find_files, rows
from entrenar.data.corpus import CorpusError
from entrenar.data.documents import Unusable

HI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
SHARED = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]


def row(value, **keys):
    return sniffed(value, Keys(**keys))


# --- shapes ----------------------------------------------------------------------------------------------


def test_a_text_is_a_text():
    assert row({"text": "hello", "id": 7}) == TextRow("hello")


def test_prompt_and_completion_are_two_texts_or_two_lists_of_messages():
    assert row({"prompt": "a", "completion": "b"}) == PromptRow("a", "b")
    both = row({"prompt": HI, "completion": [{"role": "assistant", "content": "c"}]})
    assert both.messages == [*HI, {"role": "assistant", "content": "c"}] and both.trained == [False, False, True]


def test_messages_are_kept_as_they_are_and_only_answers_can_be_trained():
    messages = [{"role": "system", "content": "s"}, *HI, {"role": "tool", "content": "t", "tool_call_id": "1"}]
    found = row({"messages": messages, "tools": [{"type": "function"}], "documents": [{"title": "d"}],
                 "chat_template_kwargs": {"enable_thinking": False}})  # fmt: skip
    assert found.messages == messages and found.trained == [False, False, True, False]
    assert (found.tools, found.documents) == ([{"type": "function"}], [{"title": "d"}])
    assert found.variables == {"enable_thinking": False}


def test_a_weight_of_0_takes_an_answer_out_and_is_not_shown_to_the_template():
    found = row({"messages": [*HI, {"role": "assistant", "content": "x", "weight": 0}, HI[1] | {"weight": 1}]})
    assert found.trained == [False, True, False, True]
    assert all("weight" not in message for message in found.messages)


def test_alpaca_is_a_question_and_an_answer():
    found = row({"instruction": "Add", "input": "1 2", "output": "3", "text": "all of it"})
    assert found.messages == [{"role": "user", "content": "Add\n\n1 2"}, {"role": "assistant", "content": "3"}]
    assert found.trained == [False, True]
    for blank in ({}, {"input": ""}, {"input": None}, {"input": " \n"}):
        assert row({"instruction": "Add", "output": "3"} | blank).messages[0]["content"] == "Add"
    assert row({"instruction": "Add", "output": "3", "system": "s"}).messages[0] == {"role": "system", "content": "s"}


def test_sharegpt_is_a_conversation():
    turns = [{"from": "system", "value": "s"}, *SHARED, {"from": "tool", "value": "t"}]
    found = row({"conversations": turns})
    assert [m["role"] for m in found.messages] == ["system", "user", "assistant", "tool"]
    assert found.trained == [False, False, True, False]
    assert row({"conversations": HI}).messages == HI and row({"messages": SHARED}).messages == HI
    assert row({"conversations": SHARED, "system": "s"}).messages == [{"role": "system", "content": "s"}, *HI]
    assert row({"conversations": SHARED, "tools": '[{"name": "f"}]'}).tools == [{"name": "f"}]


def test_of_several_shapes_in_one_row_the_conversation_counts_and_null_counts_for_nothing():
    assert row({"text": "x", "messages": HI}).shape == "messages"
    assert row({"text": "x", "prompt": "a", "completion": "b"}).shape == "prompt and completion"
    assert row({"text": "x", "messages": None, "chosen": None}) == TextRow("x")


def test_keys_may_have_other_names():
    assert row({"q": "a", "a": "b"}, prompt="q", completion="a") == PromptRow("a", "b")
    assert row({"body": "x"}, text="body") == TextRow("x")
    assert row({"dialog": HI}, messages="dialog").messages == HI


@pytest.mark.parametrize("arguments", [{"x": 1}, '{"x": 1}'])
@pytest.mark.parametrize("inside", [True, False])
def test_arguments_of_a_call_may_be_an_object_or_its_json(arguments, inside):
    function = {"name": "f", "arguments": arguments}
    call = {"id": "1", "type": "function", "function": function} if inside else function
    made = row({"messages": [HI[0], {"role": "assistant", "content": None, "tool_calls": [call]}]})
    found = made.messages[1]["tool_calls"][0]
    assert (found["function"] if inside else found)["arguments"] == {"x": 1}
    assert "content" not in made.messages[1] and function["arguments"] == arguments


def test_content_in_parts_of_text_is_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert row({"messages": [{"role": "user", "content": parts}, HI[1]]}).messages[0]["content"] == "ab"


# --- errors ----------------------------------------------------------------------------------------------


def said(value="x", **message):
    return {"messages": [{"role": "user", "content": value} | message]}


BAD = [
    ([1], "is a list, wanted an object"),
    ("x", "is a text, wanted an object"),
    (None, "is null"),
    ({}, "is empty; wanted \"messages\""),
    ({"a": 1, "b": 2}, 'has only the keys "a", "b"; wanted "messages"'),
    ({"prompt": "x", "chosen": "a", "rejected": "b"}, '"completion": the chosen answer'),
    ({"text": 1}, 'has a number as "text", wanted a text'),
    ({"prompt": "x"}, 'has "prompt", but no "completion"'),
    ({"completion": "x"}, 'has "completion", but no "prompt"'),
    ({"prompt": "x", "completion": HI}, "two texts, or two lists of messages"),
    ({"prompt": 1, "completion": 2}, "has a number as \"prompt\""),
    ({"instruction": "x"}, 'has no "output"'),
    ({"output": "x"}, 'has no "instruction"'),
    ({"instruction": 1, "output": "x"}, 'a number as "instruction"'),
    ({"instruction": "x", "output": "y", "input": []}, 'a list as "input"'),
    ({"instruction": "x", "output": "y", "history": [["a", "b"]]}, "as \"messages\""),
    ({"messages": "hi"}, 'has a text as "messages", wanted a list'),
    ({"messages": []}, "has an empty list"),
    ({"messages": ["hi"]}, 'a text as "messages[0]"'),
    ({"messages": [{"content": "x"}]}, 'has no "messages[0].role"'),
    ({"messages": [{"role": "user"}]}, 'has no "messages[0].content"'),
    ({"messages": [{"role": "assistant"}]}, 'has no "messages[0].content"'),
    (said(role="bot"), '\'bot\' as "messages[0].role", wanted one of ' + ", ".join(ROLES)),
    (said(role=3), 'a number as "messages[0].role"'),
    (said({"a": 1}), 'an object as "messages[0].content"'),
    (said(weight=2), '2 as "messages[0].weight", wanted 0 or 1'),
    (said(weight=True), 'True as "messages[0].weight"'),
    (said([{"type": "image_url", "image_url": "x"}]), "a part of type 'image_url' as \"messages[0].content[0]\""),
    (said(["x"]), "a part a text"),
    (said(tool_calls={}), 'an object as "messages[0].tool_calls"'),
    (said(tool_calls=[{}]), 'has no "messages[0].tool_calls[0].name"'),
    (said(tool_calls=[{"function": 1}]), 'a number as "messages[0].tool_calls[0].function"'),
    (said(tool_calls=[{"function": {"name": "f", "arguments": "{"}}]), "no JSON of an object"),
    (said(tool_calls=[{"function": {"name": "f", "arguments": "[1]"}}]), "a list as"),
    ({"conversations": [{"from": "alien", "value": "x"}]}, "'alien' as \"conversations[0].from\", wanted one of human"),
    ({"conversations": [{"from": "human"}]}, 'has no "conversations[0].value"'),
    ({"messages": HI, "tools": "x"}, "no JSON of a list of objects"),
    ({"messages": HI, "tools": ["x"]}, 'a list as "tools", wanted a list of objects'),
    ({"messages": HI, "chat_template_kwargs": 1}, 'a number as "chat_template_kwargs"'),
]  # fmt: skip


@pytest.mark.parametrize("value, message", BAD, ids=[message for _, message in BAD])
def test_what_a_row_cannot_mean_is_said_with_the_key_and_what_was_wanted(value, message):
    with pytest.raises(BadRow) as error:
        row(value)
    assert message in str(error.value)


# --- files -----------------------------------------------------------------------------------------------


def read(path):
    (file,) = find_files(str(path)).train
    return list(rows(file, Keys()))


LINES = [{"text": "one"}, {"messages": HI}, {"prompt": "é", "completion": "日本"}]
JSONL = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in LINES)


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json", "a.txt", "a.jsonl.gz", "a.json.zst"])
@pytest.mark.parametrize("array", [False, True])
def test_rows_stand_on_lines_or_in_an_array_packed_or_not(tmp_path, name, array):
    raw = (json.dumps(LINES, indent=1) if array else JSONL).encode()
    if name.endswith(".gz"):
        raw = gzip.compress(raw)
    if name.endswith(".zst"):
        try:
            from compression import zstd
        except ImportError:
            from backports import zstd
        raw = zstd.compress(raw)
    (tmp_path / name).write_bytes(raw)
    found = read(tmp_path / name)
    assert [one.row for one in found] == [row(value) for value in LINES]
    assert [one.number for one in found] == ([2, 5, 17] if array else [1, 2, 3])


def test_blank_lines_and_a_byte_order_mark_are_passed_over(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf\n\n" + b'{"text": "x"}\r\n \n{"text": "y"}')
    assert read(tmp_path / "a.jsonl") == [Found(TextRow("x"), 3), Found(TextRow("y"), 5)]
    (tmp_path / "b.json").write_bytes(b'\xef\xbb\xbf \n [\n{"text": "x"}\n]\n')
    assert read(tmp_path / "b.json") == [Found(TextRow("x"), 3)]
    (tmp_path / "c.json").write_text("[]")
    assert read(tmp_path / "c.json") == []


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"text": "x"', "line 2 column"),
        ('{"text": NaN}', "line 2 column 10: NaN is no number"),
        ('{"text": "x", "text": "y"}', "'text' is there twice"),
        ('{"text": ' + "[" * 200 + "]" * 200 + "}", "nested more than 100 deep"),
        ('{"text": 1' + "0" * 5000 + "}", "line 2"),
        ('{"text": "\\ud800"}', "half of a surrogate pair"),
        ('{"text": "x"} {"text": "y"}', "line 2 column 15"),
        ('{"nope": 1}', 'line 2 has only the keys "nope"'),
    ],
)
@pytest.mark.parametrize("array", [False, True])
def test_a_bad_row_is_told_with_file_and_line(tmp_path, text, message, array):
    good = '{"text": "good"}'
    whole = f"[{good},\n{text}, \n{good}]" if array else f"{good}\n{text}\n{good}\n"
    (tmp_path / "a.jsonl").write_text(whole)
    found = read(tmp_path / "a.jsonl")
    bad = [one for one in found if isinstance(one, Unusable)]
    assert len(bad) == 1
    if array and text == '{"text": "x"':  # which goes on into the next line
        assert str(bad[0]).startswith(f"{tmp_path}/a.jsonl line 3 is not JSON")
        return
    assert str(bad[0]).startswith(f"{tmp_path}/a.jsonl line 2") and (array or message in str(bad[0]))
    assert isinstance(found[0], Found) and (array or isinstance(found[-1], Found))


def test_bytes_that_are_no_utf8_are_told_with_their_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n{"text": "b"}\n')
    assert "a.jsonl line 2: byte 10 (0xff) is not UTF-8" in str(read(tmp_path / "a.jsonl")[1])
    (tmp_path / "b.json").write_bytes(b'[{"text": "a"},\n{"text": "\xff"}]')
    assert "b.json line 2 is not UTF-8: its byte 26 is 0xff" in str(read(tmp_path / "b.json")[0])


@pytest.mark.parametrize("rest, message", [("", "is cut off"), ("] x", "goes on after"), (",]", "comma after the last"),
                                           (' {"text": "y"}]', "wanted a comma"), (",", "is cut off")])  # fmt: skip
def test_an_array_has_to_end(tmp_path, rest, message):
    (tmp_path / "a.json").write_text('[{"text": "x"}' + rest)
    found = read(tmp_path / "a.json")
    assert found[0] == Found(TextRow("x"), 1) and message in str(found[1]) and len(found) == 2


def test_a_damaged_gzip_is_told_after_the_rows_before_it(tmp_path):
    raw = gzip.compress("".join(f'{{"text": "{i}{"x" * 100}"}}\n' for i in range(5000)).encode())
    (tmp_path / "a.jsonl.gz").write_bytes(raw[: len(raw) // 2])
    found = read(tmp_path / "a.jsonl.gz")
    assert len(found) > 10 and "is cut off" in str(found[-1]) and isinstance(found[0], Found)


@pytest.mark.parametrize("name", ["valid.jsonl", "val.json", "validation.jsonl.gz"])
def test_a_folder_has_its_own_held_out_file(tmp_path, name):
    for one in ("train.jsonl", "test.jsonl", name, "README.md"):
        (tmp_path / one).write_text("")
    found = find_files(str(tmp_path))
    assert [file.name for file in found.train] == ["train.jsonl"]
    assert [file.name for file in found.held_out] == [name]


@pytest.mark.parametrize(
    "names, message",
    [([], "has no train.jsonl"), (["a.jsonl"], "has no train.jsonl"), (["train.jsonl", "train.json"], "are there both"),
     (["train.jsonl", "val.jsonl", "valid.jsonl"], "are there both")],
)  # fmt: skip
def test_a_folder_that_is_not_clear_is_refused(tmp_path, names, message):
    for name in names:
        (tmp_path / name).write_text("")
    with pytest.raises(CorpusError, match=message):
        find_files(str(tmp_path))


def test_a_pattern_finds_files_and_what_is_not_there_is_told(tmp_path):
    (tmp_path / "a.jsonl").write_text(""), (tmp_path / "b.jsonl").write_text("")
    assert len(find_files(str(tmp_path / "*.jsonl")).train) == 2
    for source in ("nowhere.jsonl", "", str(tmp_path / "*.json")):
        with pytest.raises(CorpusError):
            find_files(source)
    (tmp_path / "a.parquet").write_text("")
    with pytest.raises(CorpusError, match="to_json"):
        find_files(str(tmp_path / "a.parquet"))


def test_standard_input_has_a_row_per_line(monkeypatch):
    from entrenar.data import corpus

    corpus._spooled.cache_clear()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(JSONL.encode())))
    try:
        assert [one.row for one in read("-")] == [row(value) for value in LINES]
    finally:
        corpus._spooled.cache_clear()


def test_rows_of_one_kind_are_equal_whatever_their_shape():
    assert isinstance(row({"messages": HI}), ChatRow) and row({"messages": HI}) == row({"messages": SHARED})
