"""A conversation: what the model reads of it, by whom it is answered, and how an answer ends."""

import importlib
from types import SimpleNamespace

import pytest
import tuned
from tuned import conversation, said

from entrenar.cli.conversation import ContextFull, Conversation, Manner, encoded, turn_ends
from entrenar.cli.models import open_model
from entrenar.data import ByteTokenizer
from entrenar.data.chat import ChatTemplate, load_template
from entrenar.llama.generate import Sampling, generate

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|h|>{{ m.role }}<|/h|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|h|>assistant<|/h|>\n\n{% endif %}"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """base, run (of an adapter for it), other (an adapter), chatml (a base with a template)"""
    place = tmp_path_factory.mktemp("made")
    tuned.base(place / "base")
    tuned.base(place / "chatml", template=tuned.CHATML)
    tuned.run(place / "run", place / "base")
    tuned.adapter(place / "other", place / "base", seed=5)
    return place


# What is read


def test_an_answer_follows_from_the_whole_conversation_as_the_template_writes_it(made):
    talk = conversation(made / "chatml")
    first, second = said(talk, "hello"), said(talk, "again")
    opened = open_model(made / "chatml")
    text = f"<|im_start|>user\nhello<|endoftext|>\n<|im_start|>assistant\n{first}<|endoftext|>\n"
    text += "<|im_start|>user\nagain<|endoftext|>\n<|im_start|>assistant\n"
    ids = encoded(text, opened.tokenizer)
    wanted = list(generate(opened.model, ids, max_new_tokens=12, temperature=0, stop=opened.stop, use_cache=False))
    assert second == ByteTokenizer().decode(i for i in wanted if i not in opened.stop)
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2


def scripted(talk, monkeypatch, text, end=256):
    """Let the model write this text whatever it reads, and really read all of it."""
    module = importlib.import_module("entrenar.llama.generate")

    def script(model, ids, *, max_new_tokens, reader, **settings):
        tokens = [*text.encode(), *([end] if end is not None else [])][:max_new_tokens]
        for number in range(len(tokens)):
            reader.last_logits([*ids, *tokens[:number]])
            yield tokens[number]

    monkeypatch.setattr(module, "generate", script)


@pytest.mark.parametrize("folder", ["base", "chatml"])
def test_of_a_conversation_only_what_is_new_is_read(made, monkeypatch, folder):
    talk = conversation(made / folder, max_tokens=100)
    read = []
    for number in range(3):
        scripted(talk, monkeypatch, f"answer {number}" if folder == "chatml" else f" answer {number}")
        answer = talk.ask(f"question {number}")
        before = talk.readers[None].read if number else 0
        assert "".join(answer) == f"answer {number}"
        talk.keep(answer)
        read.append((talk.readers[None].read - before, len(answer.writing.ids)))
    written = len("answer 0") + (folder == "base")
    ids = [whole for _, whole in read]
    assert read[0][0] == ids[0] + written  # each token of the answer but the end
    for number in (1, 2):
        question = ids[number] - ids[number - 1] - written  # and what the template puts around it and the answer before
        assert read[number][0] == question + written < ids[number] / 1.5, number


def test_an_answer_that_the_template_writes_another_way_is_read_again(made, monkeypatch):
    template = ChatTemplate({"default": LLAMA3})
    opened = open_model(made / "base")
    talk = Conversation(opened, template, Manner(Sampling(temperature=0), 50))
    scripted(talk, monkeypatch, "\n  spaced  ")
    said(talk, "hello")
    assert talk.messages[-1]["content"] == "spaced"
    answer = talk.ask("again")
    text = template.render([*talk.messages, {"role": "user", "content": "again"}], add_generation_prompt=True).text
    assert answer.writing.ids == encoded(text, opened.tokenizer)


def test_the_space_that_a_template_puts_before_an_answer_is_not_the_answers(made, monkeypatch):
    talk = conversation(made / "base", max_tokens=50)
    scripted(talk, monkeypatch, "  4 is it ")
    assert said(talk, "2 + 2?") == "4 is it "
    assert talk.messages[-1]["content"] == " 4 is it "  # of two spaces one is the template's


def test_every_adapter_keeps_what_it_has_read_itself(made):
    talk = conversation(made / "base", adapters=[str(made / "run"), str(made / "other"), "off"])
    answers = {}
    for _ in range(2):
        for by in (None, "run", "other"):
            talk.by = by
            talk.reset()
            answers.setdefault(by, []).append(said(talk, "hello"))
    assert len({texts[0] for texts in answers.values()}) == 3, "the adapters change what is said"
    assert all(one == two for one, two in answers.values())
    for by in (None, "run", "other"):  # the second time the prompt's last token alone was read again for its logits
        alone = conversation(made / "base", adapters=[str(made / "run"), str(made / "other"), "off"])
        alone.by = by
        assert said(alone, "hello") == answers[by][0]
        assert talk.readers[by].read <= 2 * alone.readers[by].read - 10


def test_answers_side_by_side_are_what_each_says_alone(made):
    talk = conversation(made / "run")
    messages = talk.with_prompt("hello")
    alone = {by: "".join(talk.answer(messages, by)) for by in (None, "run")}
    together = conversation(made / "run")
    pair = [(by, iter(together.answer(messages, by))) for by in (None, "run")]
    texts = {None: "", "run": ""}
    for _ in range(30):
        for by, pieces in pair:
            texts[by] += next(pieces, "")
    assert texts == alone and alone[None] != alone["run"]


# How an answer ends


def ends(template):
    special = {"<|endoftext|>": 256, "<|eot|>": 7, "<|h|>": 8, "<|im_start|>": 5, "<|im_end|>": 9}
    tokenizer = SimpleNamespace(special=special)
    return turn_ends(ChatTemplate({"default": template}, {"eos_token": "<|endoftext|>", "bos_token": ""}), tokenizer)


def test_the_token_behind_an_answer_is_seen_in_the_template():
    assert ends(tuned.CHATML) == ({256}, ())
    assert ends(tuned.CHATML.replace("<|endoftext|>", "<|im_end|>")) == ({9}, ())
    assert ends(LLAMA3) == ({7}, ())


def test_a_template_of_text_alone_ends_an_answer_where_the_next_question_would_begin(made):
    plain = "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
    assert ends(plain) == (set(), ("\n\n### user:",))
    opened = open_model(made / "base")
    assert turn_ends(load_template(opened.tokenizer), opened.tokenizer) == ({256}, ("\nUser:",))


def test_a_template_that_cannot_be_asked_ends_nothing():
    assert ends("{{ raise_exception('no') }}") == (frozenset(), ())


def test_a_model_that_was_never_tuned_stops_before_it_asks_itself(made, monkeypatch):
    talk = conversation(made / "base", max_tokens=100)
    scripted(talk, monkeypatch, " Four.\nUser: and 3 + 3?\nAssistant: six", end=None)
    assert said(talk, "2 + 2?") == "Four."


def test_a_full_context_is_told_and_the_conversation_can_go_on_anew(made):
    talk = conversation(made / "base")
    said(talk, "x" * 180)
    before = list(talk.messages)
    with pytest.raises(ContextFull, match=r"has 3\d\d tokens, and this model reads at most 256"):
        talk.ask("y" * 80)
    assert talk.messages == before
    talk.reset()
    assert said(talk, "y" * 80) and len(talk.messages) == 2


def test_an_answer_that_fills_the_context_says_so(made, monkeypatch):
    talk = conversation(made / "base", max_tokens=500)
    talk.ends = frozenset()
    talk.stop = ()
    answer = talk.ask("x" * 200)
    "".join(answer)
    assert answer.writing.ended == "the full context of 256 tokens"


def test_the_system_text_comes_first_stays_and_goes(made):
    talk = conversation(made / "chatml")
    talk.system = "be brief"
    said(talk, "hello")
    assert talk.messages[0] == {"role": "system", "content": "be brief"} and len(talk.messages) == 3
    talk.reset()
    assert talk.messages == [{"role": "system", "content": "be brief"}]
    talk.system = ""
    assert talk.messages == []


def test_a_system_text_that_the_template_refuses_changes_nothing(made):
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + tuned.CHATML
    talk = Conversation(open_model(made / "base"), ChatTemplate({"default": refuses}), Manner(Sampling()))
    with pytest.raises(ValueError, match="no system"):
        talk.system = "be brief"
    assert talk.messages == [] and talk.system == ""
