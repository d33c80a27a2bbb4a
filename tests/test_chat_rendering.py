"""Which tokens of a conversation are trained: stored for each way of telling, and checked against what a whole is."""

import json

import chat_templates as chats
import numpy as np
import pytest
import tokenizer_kinds as kinds

from entrenar.data import END, ByteTokenizer, load_tokenizer
from entrenar.data.chat import ChatTemplate, load_template
from entrenar.data.chat.rendering import CLOSE, OPEN, example, marked, special_pattern, trained_tokens
from entrenar.data.chat.rows import BadRow, Keys, sniffed
from entrenar.data.chat.template import DEFAULT

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """LLaMA-2's, with the special tokens of all templates."""
    from tokenizers import Tokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    kinds.llama2_json(folder)
    inner = Tokenizer.from_file(str(folder / "tokenizer.json"))
    inner.add_special_tokens(list(chats.SPECIAL))
    inner.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


def trained_texts(tokenizer, source, value, train_on="assistant"):
    """The characters that are trained, piece by piece, and those of the tokens that are."""
    row = sniffed(value, Keys())
    text = marked(row, ChatTemplate({"default": source}, SPECIAL), special_pattern(tokenizer), train_on)
    return [text.text[a:b] for a, b in text.trained]


def chat(*turns, **more):
    return {"messages": chats.said(*turns), **more}


TURNS = (("user", "hi"), ("assistant", "hello"), ("user", "more"), ("assistant", "no"))
EXPECTED = {
    "chatml": ["hello<|im_end|>", "no<|im_end|>"],
    "llama2": [" hello </s>", " no </s>"],
    "llama3": ["hello<|eot_id|>", "no<|eot_id|>"],
    "llama31": ["hello<|eot_id|>", "no<|eot_id|>"],
    "zephyr": ["hello</s>", "no</s>"],
    "mistral": [" hello</s>", " no</s>"],
    "chatml, marked": ["hello<|im_end|>", "no<|im_end|>"],
    "tools, marked": ["hello</s>", "no</s>"],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_answers_and_their_end_tokens_are_trained(tokenizer, name):
    assert trained_texts(tokenizer, chats.ALL[name], chat(*TURNS)) == EXPECTED[name]
    assert trained_texts(tokenizer, chats.ALL[name], chat(*TURNS), "completion") == EXPECTED[name][-1:]
    (whole,) = trained_texts(tokenizer, chats.ALL[name], chat(*TURNS), "all")
    assert all(piece in whole for piece in EXPECTED[name])


def test_the_default_template_trains_the_answer_with_the_space_before_it(tokenizer):
    assert trained_texts(tokenizer, DEFAULT, chat(*TURNS)) == [" hello</s>", " no</s>"]


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("masked", [1, 3])
def test_an_answer_of_weight_0_is_not_trained(tokenizer, name, masked):
    value = chat(*TURNS)
    value["messages"][masked]["weight"] = 0
    kept = EXPECTED[name][: masked > 1] + EXPECTED[name][1 + (masked > 1) :]
    assert trained_texts(tokenizer, chats.ALL[name], value) == kept


def test_blocks_of_an_answer_go_with_it_when_there_are_several(tokenizer):
    value = {"messages": json.loads(json.dumps(chats.CALLING))}
    call = 'CALL 1: {"name": "weather", "arguments": {"city": "Köln"}}'
    assert trained_texts(tokenizer, chats.TOOLS_MARKED, value) == [call, "</s>", "Grey.</s>"]
    assert trained_texts(tokenizer, chats.TOOLS_MARKED, value, "completion") == ["Grey.</s>"]
    value["messages"][3]["weight"] = 0
    assert trained_texts(tokenizer, chats.TOOLS_MARKED, value) == [call, "</s>"]


def test_calls_are_trained_where_they_are_the_answer(tokenizer):
    value = {"messages": chats.CALLING, "tools": chats.TOOLS}
    call = '{"name": "weather", "parameters": {"city": "Köln"}}<|eot_id|>'
    assert trained_texts(tokenizer, chats.LLAMA31, value) == [call, "Grey.<|eot_id|>"]


def test_a_conversation_may_begin_with_the_assistant_and_end_with_the_user(tokenizer):
    value = chat(("assistant", "hello"), ("user", "hi"), ("assistant", "no"), ("user", "why?"))
    assert trained_texts(tokenizer, chats.LLAMA3, value)[-1] == "no<|eot_id|>"
    assert trained_texts(tokenizer, chats.CHATML, value) == ["hello<|im_end|>", "no<|im_end|>"]
    assert trained_texts(tokenizer, chats.CHATML, value, "completion") == ["no<|im_end|>"]
    assert trained_texts(tokenizer, chats.CHATML, chat(("user", "x"))) == []
    assert trained_texts(tokenizer, chats.CHATML, chat(("user", "x")), "completion") == []


def test_an_answer_that_later_turns_change_is_found_by_marks(tokenizer):
    """Templates of models that reason take the thoughts out of earlier answers."""
    value = chat(("user", "hi"), ("assistant", "  hello \n"), ("user", "more"), ("assistant", "no"))
    assert trained_texts(tokenizer, chats.FORGETS_THOUGHTS, value) == ["hello<|im_end|>", "no<|im_end|>"]


def test_where_nothing_leads_to_an_answer_the_ways_out_are_named(tokenizer):
    value = chat(("user", "hi"), ("assistant", "<think>hm</think>hello"), ("user", "more"), ("assistant", "no"))
    with pytest.raises(BadRow, match=r"answer messages\[1\] stands cannot be told.*train_on = completion"):
        trained_texts(tokenizer, chats.FORGETS_THOUGHTS, value)
    assert trained_texts(tokenizer, chats.FORGETS_THOUGHTS, value, "completion") == ["no<|im_end|>"]
    value["messages"][1]["content"] = f" hello{OPEN}{CLOSE} "
    with pytest.raises(BadRow):
        trained_texts(tokenizer, chats.FORGETS_THOUGHTS, value)


def test_marks_are_believed_only_where_the_text_stays_the_same(tokenizer):
    source = "{% for m in messages %}{{ m.content | length }}{{ m.content }}{{ messages | length }}{% endfor %}"
    with pytest.raises(BadRow, match="nor do marks"):
        trained_texts(tokenizer, source, chat(*TURNS))


def test_a_template_that_refuses_a_conversation_is_told_with_its_words(tokenizer):
    with pytest.raises(BadRow, match="cannot be written by the chat template: .*roles must alternate"):
        trained_texts(tokenizer, chats.LLAMA2, chat(("user", "a"), ("user", "b"), ("assistant", "c")))


def test_white_space_behind_the_end_token_is_not_trained_but_that_of_an_answer_without_one_is(tokenizer):
    source = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
    assert trained_texts(tokenizer, source, chat(*TURNS))[0].endswith("hello\n\n")
    assert trained_texts(tokenizer, source.replace("\n\n", "</s> \n "), chat(*TURNS))[0].endswith("hello</s>")


# --- tokens ----------------------------------------------------------------------------------------------


def made(tokenizer, value, source=DEFAULT, train_on="assistant"):
    text = marked(sniffed(value, Keys()), load_template(tokenizer, source), special_pattern(tokenizer), train_on)
    return text, example(text, tokenizer.encode_special([text.text])[0], tokenizer)


def trained_ids(one):
    return [int(i) for i in one.ids[one.trained]]


def test_a_text_gets_its_ends_once_and_all_but_the_first_token_is_trained(tokenizer):
    begin, end = tokenizer.begin_id, tokenizer.end_id
    _, one = made(tokenizer, {"text": "hello"})
    assert one.ids[0] == begin and one.ids[-1] == end and one.trained.tolist() == [False] + [True] * (len(one.ids) - 1)
    assert one.ids.dtype == np.int32 and one.trained.dtype == bool
    _, two = made(tokenizer, {"text": "<s>hello</s>"})
    assert two.ids.tolist().count(begin) == two.ids.tolist().count(end) == 1


def test_of_prompt_and_completion_the_completion_and_its_end_are_trained(tokenizer):
    _, one = made(tokenizer, {"prompt": "the quick", "completion": " brown fox"})
    assert tokenizer.decode(trained_ids(one)[:-1]).strip() == "brown fox" and trained_ids(one)[-1] == tokenizer.end_id
    _, every = made(tokenizer, {"prompt": "the quick", "completion": " brown fox"}, train_on="all")
    assert every.trained.tolist() == [False] + [True] * (len(every.ids) - 1)


@pytest.mark.parametrize("name", ["ours", "plain_bytes"])
def test_where_one_token_begins_and_ends_texts_it_stands_at_both_ends(name, tmp_path):
    kinds.KINDS[name](tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    for value in ({"text": "hello"}, {"text": f"{END}hello"}, {"text": f"hello{END}"}, {"text": ""}, {"text": END}):
        _, one = made(tokenizer, value)
        inner = tokenizer.encode(value["text"].replace(END, "")).tolist()
        assert one.ids.tolist() == [tokenizer.end_id, *inner, tokenizer.end_id], value
        assert one.trained[-1] and not one.trained[0]


def test_a_conversation_gets_nothing_that_the_template_does_not_write(tokenizer):
    _, one = made(tokenizer, chat(*TURNS), chats.CHATML)
    assert tokenizer.begin_id not in one.ids and tokenizer.end_id not in one.ids
    _, two = made(tokenizer, chat(*TURNS), chats.LLAMA2)
    assert two.ids.tolist().count(tokenizer.begin_id) == two.ids.tolist().count(tokenizer.end_id) == 2
    assert trained_ids(two).count(tokenizer.end_id) == 2 and tokenizer.begin_id not in trained_ids(two)


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_the_tokens_of_a_rendered_text_are_those_of_the_whole_and_their_places_are_right(kind, tmp_path):
    kinds.KINDS[kind](tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    end = next(text for text, i in tokenizer.special.items() if i == tokenizer.end_id)
    text = f"User: naïve 日本😀\n{end}{end} Assistant: the quick {end}\n"
    ids, spans = tokenizer.encode_special([text])[0]
    assert len(ids) == len(spans) and ids.tolist().count(tokenizer.end_id) == 3
    for i, (a, b) in zip(ids.tolist(), spans.tolist(), strict=True):
        assert 0 <= a <= b <= len(text) and (i != tokenizer.end_id or text[a:b] == end)
    assert (np.diff(spans[:, 0]) >= 0).all()
    if kind in kinds.BYTE_LEVEL:
        parts = [tokenizer.encode(part).tolist() for part in text.split(end)]
        joined = parts[0]
        for part in parts[1:]:
            joined = [*joined, tokenizer.end_id, *part]
        assert ids.tolist() == joined
        for i, (a, b) in zip(ids.tolist(), spans.tolist(), strict=True):
            assert tokenizer.decode([i]) in (text[a:b], " " + text[a:b]) or "\ufffd" in tokenizer.decode([i])


def test_a_text_elsewhere_is_still_only_text():
    tokenizer = ByteTokenizer()
    assert tokenizer.end_id not in tokenizer.encode(END) and tokenizer.end_id in tokenizer.encode_special([END])[0].ids


def test_a_token_is_trained_if_any_of_its_characters_is():
    spans = np.array([[0, 2], [2, 4], [4, 4], [4, 6], [6, 9]])
    assert trained_tokens([(3, 7)], spans).tolist() == [False, True, True, True, True]
    assert trained_tokens([(2, 4)], spans).tolist() == [False, True, False, False, False]
    assert trained_tokens([], spans).tolist() == [False] * 5
    assert trained_tokens([(0, 1), (8, 9)], spans).tolist() == [True, False, False, False, True]


def test_offsets_of_bytes_are_those_of_their_character():
    ids, spans = ByteTokenizer().encode_special([f"é{END}x"])[0]
    assert ids.tolist() == [0xC3, 0xA9, 256, ord("x")]
    assert spans.tolist() == [[0, 1], [0, 1], [1, 1 + len(END)], [1 + len(END), 2 + len(END)]]


def test_an_end_token_that_only_the_files_name_is_found_in_a_text(tmp_path):
    """In tokenizer.json it is a token like any other; transformers makes it a special one by the settings."""
    kinds.llama2_json(tmp_path)
    path = tmp_path / "tokenizer.json"
    inner = json.loads(path.read_text())
    path.write_text(json.dumps(inner | {"added_tokens": []}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode_special(["hello</s>"])[0].ids[-1] == tokenizer.end_id
    assert tokenizer.end_id not in tokenizer.encode("hello</s>")
