"""Chat templates and masks, against transformers: the same text to the letter, the same tokens, the same mask."""

import json

import chat_templates as chats
import pytest
import tokenizer_kinds as kinds

from entrenar.data import load_tokenizer
from entrenar.data.chat import ChatTemplate, TemplateError, load_template
from entrenar.data.chat.rendering import example, marked, special_pattern
from entrenar.data.chat.rows import ChatRow
from entrenar.data.chat.template import DEFAULT, special_texts

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.peers


@pytest.fixture(scope="module", params=["smollm", "llama2_json", "ours"])
def folder(request, tmp_path_factory):
    """A tokenizer that has the special tokens of all templates."""
    from tokenizers import AddedToken, Tokenizer

    made = tmp_path_factory.mktemp(request.param)
    kinds.KINDS[request.param](made)
    inner = Tokenizer.from_file(str(made / "tokenizer.json"))
    inner.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in chats.SPECIAL])
    inner.save(str(made / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
                "unk_token": {"content": "<unk>", "__type": "AddedToken"}}  # fmt: skip
    (made / "tokenizer_config.json").write_text(json.dumps(settings))
    return made


def both(folder, template):
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    theirs.chat_template = template
    mine = load_tokenizer(folder)
    return theirs, mine, load_template(mine, template)


CASES = [(name, source, messages, tools)
         for name, source in (chats.ALL | {"ours": DEFAULT}).items()
         for messages in (*chats.CONVERSATIONS.values(), chats.CALLING)
         for tools in (None, chats.TOOLS)]  # fmt: skip


def theirs_says(tokenizer, messages, **more):
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **more)
    except Exception as error:
        return type(error)


def mine_says(template, messages, **more):
    try:
        return template.render(messages, **more).text
    except TemplateError as error:
        return error


@pytest.mark.parametrize("prompt", [False, True])
def test_every_template_writes_every_conversation_as_transformers_does(folder, prompt):
    written = 0
    for name, source, messages, tools in CASES:
        theirs, mine, template = both(folder, source)
        said = theirs_says(theirs, messages, tools=tools, add_generation_prompt=prompt)
        own = mine_says(template, messages, tools=tools, add_generation_prompt=prompt)
        if isinstance(said, str):
            assert own == said, (name, messages)
            assert mine.encode_special([own])[0].ids.tolist() == theirs(said, add_special_tokens=False)["input_ids"]
            written += 1
        else:
            assert isinstance(own, TemplateError), (name, said)
    assert written >= 50


def test_the_special_tokens_of_a_template_are_those_of_transformers(folder):
    theirs, mine, _ = both(folder, chats.CHATML)
    assert special_texts(mine) == {name: text for name, text in theirs.special_tokens_map.items() if text is not None}


@pytest.mark.parametrize("name", chats.MARKED)
@pytest.mark.parametrize("tools", [None, chats.TOOLS], ids=["", "tools"])
def test_what_is_trained_is_what_transformers_masks_where_a_template_marks_it(folder, name, tools):
    theirs, mine, template = both(folder, chats.MARKED[name])
    for messages in (*chats.CONVERSATIONS.values(), *([chats.CALLING] if name.startswith("tools") else [])):
        made = theirs.apply_chat_template(messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True)
        row = ChatRow(messages, [one["role"] == "assistant" for one in messages], tools)
        text = marked(row, template, special_pattern(mine))
        one = example(text, mine.encode_special([text.text])[0], mine)
        assert one.ids.tolist() == made["input_ids"]
        assert one.trained[1:].tolist() == [bool(x) for x in made["assistant_masks"][1:]]
        assert 0 < one.trained.sum() < len(one.ids)


def test_a_template_file_goes_before_the_one_in_the_settings_as_in_transformers(folder, tmp_path):
    import shutil

    for files, name in (({}, "settings"), ({"chat_template.jinja": "file"}, "file"),
                        ({"chat_template.jinja": "file", "additional_chat_templates/tool_use.jinja": "{{ tools }}"},
                         "file")):  # fmt: skip
        copy = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(folder, copy)
        settings = json.loads((copy / "tokenizer_config.json").read_text())
        (copy / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "settings"}))
        for path, source in files.items():
            (copy / path).parent.mkdir(exist_ok=True)
            (copy / path).write_text(source)
        theirs, template = transformers.AutoTokenizer.from_pretrained(copy), load_template(load_tokenizer(copy))
        for tools in (None, chats.TOOLS):
            said = theirs.apply_chat_template(chats.SHORT, tools=tools, tokenize=False)
            assert template.render(chats.SHORT, tools=tools).text == said
            assert said == name or tools


HARD = {
    "loops": "{% for m in messages recursive %}{{ loop.index }}{{ loop.length }}{{ loop.revindex }}{{ loop.last }}"
             "{{ loop.previtem is defined }}{{ (loop.nextitem or m).role }}"
             "{{ loop.cycle('a', 'b') }}{{ loop.depth }}{% endfor %}",
    "nothing to loop over": "{% for m in nothing %}x{% else %}none{% endfor %}{% for k, v in {'b': 1}.items() %}"
                            "{{ k }}{{ v }}{% endfor %}{% for c in 'abc' if c != 'b' %}{{ loop.length }}{{ c }}"
                            "{% endfor %}",
    "breaks": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "joining": "{{ 1 ~ none ~ nothing ~ 'x' ~ true ~ 1.5 ~ [1] ~ {'a': none} }}",
    "white space": "  {% if true %}  \n a {% endif %}  \n\n {#- x -#} \n b {{- 'c' -}} \n\n",
    "json": "{{ {'a': '<é>&\\'', 'b': [1, none, true, 1e10]} | tojson }}{{ [1] | tojson(indent=2) }}"
            "{{ {'b': 1, 'a': 2} | tojson(sort_keys=true, separators=(',', ':')) }}"
            "{{ 'é' | tojson(ensure_ascii=true) }}",
    "arithmetic": "{{ 3 * 'ab' }}{{ [1] * 2 }}{{ 2 ** 10 }}{{ 7 % 4 }}{{ '%s-%d' % ('a', 3) }}{{ 7 // 2 }}"
                  "{{ 'a' + 'b' }}{{ '12345678 %s' % 'x' }}",
    "namespaces": "{% set ns = namespace(x=0, y='') %}{% for m in messages %}{% set ns.x = ns.x + 1 %}"
                  "{% set ns.y = ns.y ~ m.role[0] %}{% endfor %}{{ ns.x }}{{ ns.y }}{{ dict(a=1) }}",
    "macros": "{% macro f(x, y='d') %}[{{ x }}{{ y }}{{ caller() if caller else '' }}]{% endmacro %}{{ f(1) }}"
              "{% call f(2, y=3) %}inner{% endcall %}{{ f(messages[0].content) }}",
    "filters": "{{ messages | map(attribute='role') | join(', ') }}{{ messages | selectattr('role', 'equalto', 'user') "
               "| list | length }}{{ ' x ' | trim }}{{ 'a-b' | replace('-', '+') | upper }}{{ messages | first }}"
               "{{ 'x\\ny' | indent(4, true) }}{{ [3, 1, 2] | sort | last }}{{ 'x' | center(9) }}"
               "{{ {'a': 1} | items | list }}",
    "methods": "{{ 'a,b'.split(',') }}{{ 'x'.replace('x', 'yy') }}{{ '{:>5}|{}'.format(1, 'a') }}"
               "{{ ','.join(['a', 'b']) }}"
               "{{ messages[-1].get('content', 'none') }}{{ 'Ab'.startswith('A') }}{{ 'x'.zfill(4) }}",
    "tests": "{{ nothing is defined }}{{ messages is sequence }}{{ messages[0] is mapping }}{{ tools is none }}"
             "{{ 3 is odd }}{{ 'user' in messages | map(attribute='role') }}{{ messages[::-1] | length }}",
    "null": "{{ messages[0].nothing }}{{ messages[0]['name'] }}{% if documents is none %}no documents{% endif %}",
    "reasoning": "{% for m in messages %}{{ m.reasoning_content }}{{ m.thinking }}{{ 'name' in m }}{% endfor %}",
    "marks in odd places": "{% set x %}{% generation %}in{% endgeneration %}{% endset %}{{ x }}{% for m in messages %}"
                           "{{ m.role }}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
}  # fmt: skip


@pytest.mark.parametrize("name", HARD)
def test_the_environment_of_templates_is_that_of_transformers(folder, name):
    theirs, _, template = both(folder, HARD[name])
    messages = [*chats.WITH_SYSTEM[:-1], chats.WITH_SYSTEM[-1] | {"name": None, "reasoning": "hm"}]
    made = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    rendered = template.render(messages)
    assert rendered.text == theirs.apply_chat_template(messages, tokenize=False)
    if rendered.generated:
        from entrenar.data.chat.rendering import trained_tokens

        spans = load_tokenizer(folder).encode_special([rendered.text])[0].spans
        assert trained_tokens(rendered.generated, spans).tolist() == [bool(x) for x in made["assistant_masks"]]


def test_a_template_of_ours_is_one_for_transformers(folder):
    theirs, mine, _ = both(folder, DEFAULT)
    own = ChatTemplate({"default": DEFAULT}, special_texts(mine)).render(chats.WITH_SYSTEM).text
    assert own == theirs.apply_chat_template(chats.WITH_SYSTEM, tokenize=False)
    assert own == ("<s>Be nice.\n\nUser: hi\nAssistant: hello</s>\nUser: more\nAssistant: no</s>\n")
