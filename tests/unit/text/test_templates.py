"""Real chat templates of many families render as transformers renders them."""

import copy
from typing import Any

import pytest
from conversations import CONVERSATIONS, NAMES, TEMPLATES
from transformers.utils.chat_template_utils import render_jinja_template

from ftkit._core import ChatTemplate
from ftkit.errors import InputError

pytestmark = pytest.mark.unit


def theirs(source: str, messages: Any, tools: Any, prompt: bool, extra: dict[str, Any]) -> str | None:
    """transformers' text, or None where the template raises."""
    try:
        texts, _ = render_jinja_template(
            [copy.deepcopy(messages)],
            tools=tools,
            chat_template=source,
            add_generation_prompt=prompt,
            bos_token="<s>",
            eos_token="</s>",
            **extra,
        )
    except Exception:
        return None
    return texts[0]


def test_there_are_enough_families() -> None:
    assert len(NAMES) >= 30


@pytest.mark.parametrize("name", NAMES)
def test_renders_as_transformers_does(name: str) -> None:
    source = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    template = ChatTemplate.from_source(source, "<s>", "</s>")
    rendered, located = 0, True
    for title, (messages, tools) in CONVERSATIONS.items():
        for prompt in (False, True):
            for extra in ({}, {"enable_thinking": False}):
                expected = theirs(source, messages, tools, prompt, extra)
                try:
                    got = template.render(messages, tools, prompt, **extra)
                except InputError as error:
                    got = None
                    located &= str(error).startswith("chat template, line ")
                assert got == expected, (title, prompt, extra)
                rendered += got is not None
    assert rendered >= 20
    assert located, "every error names its line"


SNIPPETS = """
{{ [1, 'a', None, True, 1.0, {'k': [none]}] }}
{{ 1e16 }} {{ 0.1 + 0.2 }} {{ 3.0 }} {{ 7 // 2 }} {{ 7 / 2 }} {{ -7 % 3 }} {{ 2 ** 10 }} {{ 1e20 | string }}
{% for v in ['a', {}, [], 1, none, true, nothing] %}{{ v is sequence }} {{ v is iterable }} |{% endfor %}
{% for v in ['a', {}, 1, none, nothing] %}{{ v is mapping }} {{ v is string }}|{% endfor %}
{% for v in [1, 1.5, true, none, 'x'] %}{{ v is number }} {{ v is integer }} |{% endfor %}
{% for v in [1, 1.5, true, none, 'x'] %}{{ v is float }} {{ v is boolean }}|{% endfor %}
{{ nothing is defined }} {{ nothing is none }} {{ nothing }} {{ nothing or 'x' }} {{ none or 0 or 'y' }}
{{ 'a-b-c'.split('-') }} {{ 'a-b-c'.split('-', 1) }} {{ ' a  b '.split() }}
{{ ' a  b c'.split(none, 1) }} {{ 'a\nb'.splitlines() }}
{{ 'a-b-c'.rsplit('-', 1) }} {{ 'a-b'.partition('-') }} {{ 'a-b-c'.rpartition('-') }} {{ 'ab'.removeprefix('a') }}
{{ '  x '.strip() }}|{{ 'xxaxx'.strip('x') }}|{{ 'xxa'.lstrip('x') }}|{{ 'axx'.rstrip('x') }}|{{ '-7'.zfill(4) }}
{{ 'abc'[::-1] }} {{ 'abc'[-1] }} {{ 'abc'[1:] }} {{ 'abc'[:-1] }} {{ [1, 2, 3][::-1] }} {{ [1, 2, 3][-2:] }}
{{ 'abc'.find('c') }} {{ 'abc'.startswith(('a', 'x')) }} {{ 'abc'.endswith('c') }}
{{ 'Ab'.upper() }} {{ 'aXb'.title() }}
{{ {'a': 1, 'b': {'c': 'é"<'}} | tojson }} {{ {'b': 1, 'a': 2} | tojson(sort_keys=true) }} {{ 'é' | tojson(true) }}
{{ {'a': [1, {}], 'b': []} | tojson(indent=2) }} {{ [1, 2] | tojson(separators=(',', ':')) }}
{{ '\x7f\x01\u2028' | tojson }}
{{ {'a': 1}.items() | list }} {{ {'a': 1} | items | list }} {{ {'a': 1}.get('b', 2) }} {{ {'a': 1}.keys() | list }}
{% set d = {'items': [1], 'keys': 2} %}{% for k, v in d.items() %}{{ k }}={{ v }} {% endfor %}{{ d['items'] }}
{% set ns = namespace(a=1) %}{% for i in range(3) %}{% set ns.a = ns.a + i %}{% endfor %}{{ ns.a }}
{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i == 5 %}{% break %}{% endif %}{{ i }}{% endfor %}
{% for i in [] %}{{ i }}{% else %}none{% endfor %}
{% for m in messages if m.role == 'user' %}{{ loop.index }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{% endfor %}
{% macro f(a, b='x') %}{{ a }}{{ b }}{% endmacro %}{{ f(1) }}{{ f(1, b=2) }}
{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join('|') }} {{ messages | length }}
{{ ['b', 'a'] | sort | first }} {{ [3, 1] | max }} {{ 'a' if false }} {{ 'ab' | replace('a', 'c') }} {{ ' x ' | trim }}
{{ 'x' ~ 1 ~ none ~ true }} {{ 'x' * 3 }} {{ 'a' in 'abc' }} {{ 'z' not in {'z': 1} }} {{ not 1 == 2 }} {{ 1 < 2 < 3 }}
{{ messages[0].content | upper | capitalize }} {{ "it's" }} {{ ["it's", 'a"b', "a\\n"] }}
{%- if messages -%}   x   {%- endif -%}
   {% if true %}
   indented
   {% endif %}
{# a comment with {% raw %} #}{% raw %}{{ raw }}{% endraw %}
{% generation %}{% set inner = 1 %}said{% endgeneration %}{{ inner }}
{{ strftime_now('%Y') | length }} {{ strftime_now('%%|%d') | length }}
{{ 'a' 'b' }} {{ (1, 2) }} {{ [[1, 2], [3]] | sum(start=[]) }} {{ '{} {}'.format(1, 'x') }} {{ 5 | string + 'x' }}
""".strip("\n")


@pytest.mark.parametrize("snippet", [*SNIPPETS.split("\n"), SNIPPETS])
def test_the_language_is_pythons(snippet: str) -> None:
    messages = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "x"}]
    expected = theirs(snippet, messages, None, False, {})
    if expected is None:
        with pytest.raises(InputError):
            ChatTemplate.from_source(snippet, "<s>", "</s>").render(messages)
    else:
        assert ChatTemplate.from_source(snippet, "<s>", "</s>").render(messages) == expected
