"""Fine-tuning data from files to examples: what is held out, what is counted, what is refused."""

import json
import subprocess
import sys

import chat_templates as chats
import numpy as np
import pytest
import tokenizer_kinds as kinds
from conftest import SAME_PACKAGE

from entrenar.data import ByteTokenizer, CorpusError, load_tokenizer
from entrenar.data.chat import ChatTemplate, ExampleBatches, Keys, TemplateError, read_examples
from entrenar.data.chat.dataset import MOST_PROBLEMS

BYTES = ByteTokenizer()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(count, first=0):
    return [{"prompt": f"question {i}", "completion": f" answer {i}"} for i in range(first, first + count)]


def decoded(examples):
    return {BYTES.decode(examples[i].ids) for i in range(len(examples))}


def same(a, b):
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("ids", "trained", "offsets"))


def test_a_share_of_the_rows_is_held_out_by_seed_and_row(tmp_path):
    source = write(tmp_path / "a.jsonl", texts(200))
    one, again = read_examples(source, BYTES), read_examples(source, BYTES)
    assert len(one.held_out) == 10 and len(one.train) == 190 and not decoded(one.train) & decoded(one.held_out)
    assert same(one.train, again.train) and one.identity == again.identity
    other = read_examples(source, BYTES, seed=1)
    assert decoded(other.held_out) != decoded(one.held_out) and other.identity != one.identity
    assert len(read_examples(source, BYTES, held_out=0.5).train) == 100
    assert len(read_examples(source, BYTES, held_out=0).held_out) == 0
    reordered = read_examples(write(tmp_path / "b.jsonl", texts(200)[::-1]), BYTES)
    assert decoded(reordered.held_out) == decoded(one.held_out)


def test_equal_rows_are_never_on_both_sides(tmp_path):
    source = write(tmp_path / "a.jsonl", texts(20) * 5)
    data = read_examples(source, BYTES, held_out=0.13)
    assert not decoded(data.train) & decoded(data.held_out) and data.facts.duplicates == 0
    assert len(data.held_out) == 15
    alone = read_examples(write(tmp_path / "b.jsonl", texts(1) * 5), BYTES)
    assert len(alone.held_out) == 0 and len(alone.train) == 5


def test_a_folder_holds_out_its_own_file_and_what_is_in_both_is_counted(tmp_path):
    write(tmp_path / "train.jsonl", texts(10) + texts(2))
    write(tmp_path / "valid.jsonl", texts(3, first=1))
    write(tmp_path / "test.jsonl", [{"nonsense": 1}])
    data = read_examples(str(tmp_path), BYTES)
    assert (len(data.train), len(data.held_out), data.facts.duplicates) == (12, 3, 4)
    assert data.train.place(11) == f"{tmp_path}/train.jsonl line 12"
    assert data.held_out.place(0) == f"{tmp_path}/valid.jsonl line 1"


def test_rows_of_all_shapes_may_stand_in_one_file_and_the_facts_count_them(tmp_path):
    rows = [{"text": "x"}, *texts(2), {"messages": chats.SHORT}, {"instruction": "a", "output": "b"},
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}]  # fmt: skip
    f = read_examples(write(tmp_path / "a.jsonl", rows), BYTES, held_out=0).facts
    assert f.shapes == {"text": 1, "prompt and completion": 2, "messages": 1, "instruction and output": 1,
                        "conversations": 1}  # fmt: skip
    assert f.train_examples == 6 and 0 < f.train_trained < f.train_tokens and f.unended == 0
    assert any("entrenar's own" in note for note in f.notes)


def test_what_is_too_long_is_cut_off_at_the_end_and_what_is_left_without_an_answer_is_dropped(tmp_path):
    rows = [{"prompt": "x" * 50, "completion": "y"}, {"prompt": "x" * 5, "completion": "y" * 50},
            {"prompt": "x", "completion": "y"}]  # fmt: skip
    data = read_examples(write(tmp_path / "a.jsonl", rows), BYTES, max_length=20, held_out=0)
    f = data.facts
    assert (f.truncated, f.dropped, f.train_examples, f.longest, f.unended) == (2, 1, 2, 20, 1)
    assert BYTES.decode(data.train[0].ids) == "<|endoftext|>" + "x" * 5 + "y" * 14
    ExampleBatches(data.train, batch_size=1, context=19).next()


def test_rows_without_an_answer_are_dropped_and_nothing_else_is_refused(tmp_path):
    rows = [{"messages": chats.said(("user", "x"))}, *texts(3)]
    f = read_examples(write(tmp_path / "a.jsonl", rows), BYTES, held_out=0).facts
    assert f.dropped == 1 and f.train_examples == 3
    with pytest.raises(CorpusError, match="nothing to train on: 1 rows, 1 of them without a token to train"):
        read_examples(write(tmp_path / "b.jsonl", rows[:1]), BYTES)
    with pytest.raises(CorpusError, match="nothing to train on: 0 rows"):
        read_examples(write(tmp_path / "c.jsonl", []), BYTES)


def test_all_bad_rows_are_told_at_once_or_left_out(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"a": 1}, *texts(3), {"messages": [{"role": "x"}]}])
    with pytest.raises(CorpusError) as error:
        read_examples(source, BYTES)
    told = str(error.value).splitlines()
    assert told[0] == "data.source: 2 rows cannot be used (skip_bad leaves them out):" and len(told) == 3
    assert told[1].startswith(f"{source} line 1 has only the keys") and told[2].startswith(f"{source} line 5 has 'x'")
    data = read_examples(source, BYTES, skip_bad=True, held_out=0)
    assert (data.facts.skipped_rows, len(data.facts.skipped), len(data.train)) == (2, 2, 3)


def test_reading_ends_when_enough_is_wrong(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"a": 1}] * 1000)
    with pytest.raises(CorpusError) as error:
        read_examples(source, BYTES)
    told = str(error.value).splitlines()
    assert len(told) == MOST_PROBLEMS + 2 and told[-1] == "and maybe more: reading ended there"
    data = read_examples(write(tmp_path / "b.jsonl", [{"a": 1}] * 1000 + texts(2)), BYTES, skip_bad=True)
    assert data.facts.skipped_rows == 1000 and len(data.facts.skipped) == 5


def test_a_template_that_cannot_write_a_row_makes_it_a_bad_one_with_its_line(tmp_path):
    rows = [{"messages": chats.SHORT}, {"messages": chats.said(("user", "a"), ("user", "b"))}]
    with pytest.raises(CorpusError, match="a.jsonl line 2 cannot be written by the chat template: .*must alternate"):
        read_examples(write(tmp_path / "a.jsonl", rows), BYTES, template=chats.LLAMA2)


def test_a_template_that_cannot_be_read_is_refused_before_any_row(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"a": 1}])
    with pytest.raises(TemplateError, match="is no template"):
        read_examples(source, BYTES, template="{% if %}")


def test_two_beginnings_are_warned_of_once(tmp_path):
    kinds.llama2(tmp_path)
    source = write(tmp_path / "a.jsonl", [{"messages": chats.SHORT}] * 5)
    twice = "{{ bos_token }}" + chats.LLAMA2
    with pytest.warns(UserWarning, match="begins with twice") as warned:
        data = read_examples(source, load_tokenizer(tmp_path), template=twice)
    assert len(warned) == 1 and any("twice" in note for note in data.facts.notes)


def test_a_template_with_todays_date_is_noted(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"messages": chats.SHORT}])
    data = read_examples(source, BYTES, template="{{ strftime_now('%Y') }}" + chats.CHATML)
    assert any("today's date" in note for note in data.facts.notes)


def test_special_tokens_that_somebody_spells_are_noted(tmp_path):
    rows = [{"messages": chats.said(("user", "x<|endoftext|>"), ("assistant", "y"))}, {"messages": chats.SHORT}]
    data = read_examples(write(tmp_path / "a.jsonl", rows), BYTES, held_out=0)
    assert any("spells a special token: 1;" in note for note in data.facts.notes)
    assert data.train[0].ids.tolist().count(BYTES.end_id) == 3


def test_tools_that_the_template_does_not_write_are_noted(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"messages": chats.SHORT, "tools": chats.TOOLS}] * 2)
    for template, noted in ((chats.CHATML, True), (chats.TOOLS_MARKED, False)):
        notes = read_examples(source, BYTES, template=template).facts.notes
        assert any("tools, which this template does not tell the model of: 2" in note for note in notes) == noted


def test_identity_tells_tokens_and_what_is_trained(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"messages": chats.LONG}] * 3 + texts(3))
    identities = {
        read_examples(source, BYTES, train_on=on, template=template, max_length=length).identity
        for on in ("assistant", "completion", "all")
        for template in (None, chats.CHATML)
        for length in (None, 120)
    }
    assert len(identities) == 11  # the last answers lie behind 120 tokens, with either template


def test_other_keys_and_a_template_made_elsewhere_can_be_given(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"q": "x", "a": "y"}, {"chat": chats.SHORT}])
    data = read_examples(source, BYTES, keys=Keys(prompt="q", completion="a", messages="chat"), held_out=0,
                         template=ChatTemplate({"default": chats.CHATML}))  # fmt: skip
    assert "<|im_start|>user\nHello" in BYTES.decode(data.train[1].ids)


@pytest.mark.parametrize("wrong", [{"train_on": "user"}, {"max_length": 1}, {"held_out": 1.0}, {"held_out": -0.1}])
def test_what_cannot_be_meant_is_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match=f"read_examples: {next(iter(wrong))}"):
        read_examples(write(tmp_path / "a.jsonl", texts(2)), BYTES, **wrong)


def test_many_slabs_give_the_same_examples_as_one(tmp_path, monkeypatch):
    from entrenar.data.chat import dataset

    source = write(tmp_path / "a.jsonl", texts(50))
    whole = read_examples(source, BYTES)
    monkeypatch.setattr(dataset, "SLAB", 40)
    assert read_examples(source, BYTES).identity == whole.identity


def test_examples_take_five_bytes_a_token(tmp_path):
    data = read_examples(write(tmp_path / "a.jsonl", texts(300)), BYTES)
    assert data.train.ids.nbytes + data.train.trained.nbytes == 5 * data.train.tokens


def test_the_same_data_on_two_machines_have_the_same_identity(tmp_path):
    """Hashes of Python's own, which differ from process to process, have no part in it."""
    source = write(tmp_path / "a.jsonl", texts(30))
    code = ("import sys; from entrenar.data import ByteTokenizer; from entrenar.data.chat import read_examples; "
            "print(read_examples(sys.argv[1], ByteTokenizer()).identity)")  # fmt: skip
    found = {subprocess.run([sys.executable, "-c", code, source], env=SAME_PACKAGE | {"PYTHONHASHSEED": str(i)},
                            capture_output=True, text=True, check=True).stdout for i in (1, 2)}  # fmt: skip
    assert found == {read_examples(source, BYTES).identity + "\n"}
