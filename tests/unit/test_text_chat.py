"""Chat templates: Hugging Face's extras are there, and the sandbox holds."""

import datetime

import pytest
from builders import CHATML

from batchllm.text.chat import ChatTemplate

USER = [{"role": "user", "content": "hi"}]


def render(source, messages=USER, **options):
    return ChatTemplate(source, "<s>", "</s>").render(messages, **options)


def test_a_whole_conversation():
    assert render(CHATML) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert render(CHATML, add_generation_prompt=False) == "<|im_start|>user\nhi<|im_end|>\n"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}x{{ eos_token }}", "<s>x</s>"),
        ("{% if true %}\n  {% if true %}\nx\n  {% endif %}\n{% endif %}\n", "x\n"),  # trim, lstrip
        ("{{ {'a': '<ü>'} | tojson }}", '{"a": "<ü>"}'),  # not escaped for HTML
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "1"),
        ("{% generation %}a{{ messages[0].content }}{% endgeneration %}b", "ahib"),
        ("{% if tools is none and documents is none %}x{% endif %}", "x"),
        ("{{ unknown_token }}x", "x"),
        ("{{ strftime_now('%Y') }}", str(datetime.datetime.now().year)),
    ],
)
def test_what_templates_rely_on(source, expected):
    assert render(source) == expected


def test_a_token_the_model_lacks_tests_as_false():
    template = ChatTemplate("{{ bos_token }}{% if eos_token %}y{% endif %}", None, None)
    assert template.render(USER) == ""


def test_a_null_field_is_as_if_absent():
    source = "{% if 'name' in messages[0] %}{{ messages[0].name }}{% else %}-{% endif %}"
    assert render(source, [{"role": "user", "content": "x", "name": None}]) == "-"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ raise_exception('roles must alternate') }}", "^roles must alternate$"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ messages.append(1) }}", "append"),
        ("{{ ''.__class__.__mro__ }}", "unsafe|undefined"),
        ("{% for i in range(1000000) %}{% endfor %}", "[Rr]ange"),
    ],
)
def test_a_failure_is_a_value_error_with_the_reason(source, says):
    with pytest.raises(ValueError, match=says):
        render(source)


def test_a_template_that_is_no_jinja():
    with pytest.raises(ValueError, match=r"not valid.*line 2"):
        ChatTemplate("\n{% if %}", None, None)
