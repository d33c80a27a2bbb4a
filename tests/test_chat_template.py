"""Chat templates: which one a model has, what it writes (stored), and what it may not do."""

import json

import chat_templates as chats
import pytest
import tokenizer_kinds as kinds

from entrenar.data import ByteTokenizer, load_tokenizer
from entrenar.data.chat import ChatTemplate, TemplateError, keep_template, load_template
from entrenar.data.chat import template as module
from entrenar.data.chat.template import DEFAULT, OWN

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def template(source, **special):
    return ChatTemplate({"default": source}, SPECIAL | special)


def written(source, messages=chats.SHORT, **more):
    return template(source).render(messages, **more).text


# --- what they write -------------------------------------------------------------------------------------

STORED = {
    "chatml": "<|im_start|>system\nBe nice.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello"
              "<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\nno<|im_end|>\n",
    "llama2": "<s>[INST] <<SYS>>\nBe nice.\n<</SYS>>\n\nhi [/INST] hello </s><s>[INST] more [/INST] no </s>",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe nice.<|eot_id|><|start_header_id|>user"
              "<|end_header_id|>\n\nhi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nhello<|eot_id|>"
              "<|start_header_id|>user<|end_header_id|>\n\nmore<|eot_id|><|start_header_id|>assistant"
              "<|end_header_id|>\n\nno<|eot_id|>",
    "zephyr": "<|system|>\nBe nice.</s>\n<|user|>\nhi</s>\n<|assistant|>\nhello</s>\n<|user|>\nmore</s>\n"
              "<|assistant|>\nno</s>\n",
    "mistral": "<s>[INST] hi[/INST] hello</s>[INST] more[/INST] no</s>",
}  # fmt: skip


@pytest.mark.parametrize("name", STORED)
def test_templates_write_what_is_stored_here(name):
    assert written(chats.ALL[name], chats.WITH_SYSTEM) == STORED[name]


def test_tools_are_written_as_json_that_escapes_nothing():
    text = written(chats.LLAMA31, chats.CALLING, tools=chats.TOOLS)
    assert json.dumps(chats.TOOLS[0], indent=4, ensure_ascii=False) in text and "<now> &" in text
    assert '{"name": "weather", "parameters": {"city": "Köln"}}<|eot_id|>' in text


def test_generation_blocks_are_found_where_they_stand():
    text, spans = template(chats.TOOLS_MARKED).render(chats.CALLING)
    assert [text[a:b] for a, b in spans] == [
        'CALL 1: {"name": "weather", "arguments": {"city": "Köln"}}', "</s>", "Grey.</s>",
    ]  # fmt: skip


def test_the_default_template_needs_no_special_tokens_but_the_end():
    assert written(DEFAULT, chats.WITH_SYSTEM) == (
        "<s>Be nice.\n\nUser: hi\nAssistant: hello</s>\nUser: more\nAssistant: no</s>\n"
    )
    assert written(DEFAULT, chats.SHORT[:1], add_generation_prompt=True) == "<s>User: Hello, who are you?\nAssistant:"
    called = written(DEFAULT, chats.CALLING, tools=chats.TOOLS)
    assert called.startswith('<s>Tools: [{"type": "function"') and 'Assistant: [{"id": "abcdef123"' in called


def test_null_is_as_if_it_were_not_there_and_variables_come_through():
    assert written("{{ 'name' in messages[0] }}", [{"role": "user", "content": "x", "name": None}]) == "False"
    assert written("{{ thinking }}{{ bos_token }}", variables={"thinking": "yes", "bos_token": "B"}) == "yesB"
    messages = [{"role": "assistant", "content": "x", "reasoning": "hm"}]
    assert written("{{ messages[0].thinking }}{{ messages[0].reasoning_content }}", messages) == "hmhm"


# --- which one -------------------------------------------------------------------------------------------


def folder(tmp_path, settings=None, **files):
    kinds.llama2_json(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (settings or {})))
    for name, source in files.items():
        path = tmp_path / (f"additional_chat_templates/{name}.jinja" if name != "own" else "chat_template.jinja")
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
    return load_tokenizer(tmp_path)


def says(tokenizer, choice=None, tools=None):
    return load_template(tokenizer, choice).render(chats.SHORT, tools=tools).text


def test_a_template_comes_from_the_settings_or_from_a_file_which_wins(tmp_path):
    assert says(folder(tmp_path, {"chat_template": "settings"})) == "settings"
    assert says(folder(tmp_path, {"chat_template": "settings"}, own="file")) == "file"
    both = folder(tmp_path, {"chat_template": "settings"}, own="file", tool_use="tools", rag="rag")
    assert (says(both), says(both, tools=[{}]), says(both, "rag")) == ("file", "tools", "rag")


def test_settings_may_list_templates_by_name(tmp_path):
    listed = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]
    tokenizer = folder(tmp_path, {"chat_template": listed})
    assert (says(tokenizer), says(tokenizer, tools=[{}]), says(tokenizer, "tool_use")) == ("one", "two", "two")
    with pytest.raises(TemplateError, match="none of its chat templates is called 'default': choose one of 'rag'"):
        says(folder(tmp_path, {"chat_template": [{"name": "rag", "template": "x"}]}))
    for wrong in (3, [], [{"name": "x"}], ["x"]):
        with pytest.raises(TemplateError, match="wanted a text, or a list"):
            load_template(folder(tmp_path, {"chat_template": wrong}))


def test_a_template_may_be_given_as_a_file_or_as_itself(tmp_path):
    tokenizer = folder(tmp_path)
    assert load_template(tokenizer).origin == OWN
    (tmp_path / "mine.txt").write_text("{{ eos_token }}\r\nx")
    assert says(tokenizer, str(tmp_path / "mine.txt")) == "</s>\nx" and says(tokenizer, "{{ bos_token }}") == "<s>"
    for wrong, message in (("nowhere.jinja", "there is no such file"), ("{% if %}", "is no template")):
        with pytest.raises(TemplateError, match=message):
            load_template(tokenizer, wrong)


def test_a_template_that_was_used_goes_on_with_the_tokenizer(tmp_path):
    for made in (folder(tmp_path / "a" if (tmp_path / "a").mkdir() is None else tmp_path), ByteTokenizer()):
        keep_template(made, ChatTemplate({"default": "{{ messages[0].content }}!", "tool_use": "tools"}))
        made.save(tmp_path / "b")
        again = load_tokenizer(tmp_path / "b")
        assert says(again) == "Hello, who are you?!" and says(again, tools=[{}]) == "tools"
        keep_template(again, load_template(again, "{{ 1 }}"))
        assert says(again) == "1" and says(again, tools=[{}]) == "1"


# --- what they may not do --------------------------------------------------------------------------------

ESCAPES = ["{{ ''.__class__.__mro__ }}", "{{ messages.__class__.__base__.__subclasses__() }}",
           "{{ namespace.__init__.__globals__ }}", "{{ cycler.__init__.__globals__.os.system('true') }}",
           "{{ messages.append(1) }}", "{{ messages[0].update(a=1) }}", "{{ messages[0].pop('role') }}",
           "{{ '{0.__class__.__mro__}'.format_map({'0': 1}) }}", "{% include '/etc/passwd' %}",
           "{% import 'os' as os %}", "{% set ns = namespace(__x=1) %}",
           "{% set ns = namespace() %}{% set ns._x = 1 %}", "{{ (messages | attr('append'))(1) }}"]  # fmt: skip


@pytest.mark.parametrize("source", ESCAPES)
def test_a_template_gets_out_of_its_sandbox_nowhere(source):
    with pytest.raises(TemplateError):
        written(source)
    assert chats.SHORT[0]["content"] == "Hello, who are you?"


NOTHING = ["{{ ''['__class__'] }}", "{{ raise_exception.__globals__ }}", "{{ dict.__init__ }}", "{{ self.__init__ }}",
           "{{ '{0.__class__}'.format(1) }}", "{{ lipsum.__globals__ }}", "{{ '' | attr('__class__') }}",
           "{{ strftime_now.__code__ }}"]  # fmt: skip


@pytest.mark.parametrize("source", NOTHING)
def test_what_begins_with_underscores_is_not_there(source):
    assert written(source) == ""


ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a range": "{% for i in range(10 ** 9) %}{% endfor %}",
    "calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "brackets": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "a product": "{{ 'x' * 10 ** 9 }}",
    "a list": "{{ [1] * 10 ** 9 }}",
    "a power": "{{ 2 ** (2 ** 40) }}",
    "doubling": "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "adding": "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "output": "{% set s = 'x' * 10 ** 6 %}{% for i in range(99999) %}{{ s }}{% endfor %}",
    "a width": "{{ 'x'.ljust(10 ** 10) }}",
    "a filter's width": "{{ 'x' | center(10 ** 10) }}",
    "a format": "{{ '%10000000000d' % 1 }}",
    "a format's width": "{{ '%*d' % (10 ** 10, 1) }}",
    "another format": "{{ '{:10000000000d}'.format(1) }}",
    "an indent": "{{ [1] | tojson(indent=10 ** 10) }}",
    "a replacement": "{% set s = 'x' * 10 ** 6 %}{{ s.replace('x', s) }}",
    "a filter's": "{% set s = 'x' * 10 ** 6 %}{{ s | replace('x', s) }}",
    "joining": "{% set s = 'x' * 10 ** 7 %}{{ s.join(['a'] * 10 ** 6) }}",
    "a filter's joining": "{% set s = 'x' * 10 ** 7 %}{{ (['a'] * 10 ** 6) | join(s) }}",
    "translating": "{{ ('x' * 10 ** 5).translate({120: 'y' * 10 ** 5}) }}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_without_an_end_is_stopped(name):
    with pytest.raises(TemplateError, match="steps|size|width|writes more|calls itself"):
        written(ENDLESS[name])


def test_a_template_for_ten_thousand_messages_is_not_stopped():
    messages = [{"role": "user", "content": "x" * 100}, {"role": "assistant", "content": "y"}] * 5000
    assert written(chats.LLAMA3, messages).count("<|eot_id|>") == 10_000


@pytest.mark.parametrize("source, message", [
    ("\n\n{{ raise_exception('roles must alternate') }}", "chat template line 3: roles must alternate"),
    ("{{ messages[0].x.y }}", "line 1: something it reads has no 'x'"),
    ("{{ nope() }}", "line 1: 'nope' is undefined"),
    ("{{ 'a' + 1 }}", "line 1: it cannot be run: can only concatenate"),
    ("{{ 1 / 0 }}", "division by zero"),
    ("{{ raise_exception('\x1b[2J') }}", r"\\x1b\[2J"),
    ("{% bogus %}", "unknown tag 'bogus'"),
    ("x" * (1 << 21), "a chat template has at most"),
])  # fmt: skip
def test_a_template_that_fails_says_where_and_why(source, message):
    with pytest.raises(TemplateError, match=message) as error:
        written(source)
    assert str(error.value).isprintable()


def test_without_jinja_the_way_out_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "entrenar.data.chat.sandbox", None)
    with pytest.raises(TemplateError, match="pip install jinja2"):
        written("x")
    assert module.load_template is load_template
