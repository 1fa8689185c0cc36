"""The sandbox: a template reaches nothing outside, and a render ends soon, whatever it is."""

import resource
import time

import pytest

from batchllm.errors import UsageError
from batchllm.text.chat import ChatTemplate
from batchllm.text.template import RowTemplate

USER = [{"role": "user", "content": "hi"}]
DOUBLED = "{% set x = [1, 1] %}" + "{% set x = [x, x] %}" * 60


def render(source, content="hi"):
    return ChatTemplate(source, "<s>", "</s>").render([{"role": "user", "content": content}])


@pytest.fixture
def little_memory(monkeypatch):
    """More than 2 GiB of addresses beyond those in use cannot be had; less work, to be quick."""
    monkeypatch.setattr("batchllm.text.sandbox.MAX_WORK", 400_000)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:  # noqa: PTH123
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
        "{% for a in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) ~ m(n - 1) }}{% endif %}{% endmacro %}{{ m(90) }}",
        "{% block b %}{% for i in range(9) %}{{ self.b() }}{% endfor %}{% endblock %}",
        "{{ range(99999) | map('string') | list | map('replace', '', 'x' * 9999) | list }}",
        "{% for a in range(99999) %}{{ range(99999) | sum }}{% endfor %}",
        "{{ 'a' * 10**10 }}",
        "{{ 10**10 * 'a' }}",
        "{{ [0] * 10**10 }}",
        "{{ 9**(9**9) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ '%.1000000000f' % 1 }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '{:{}}'.format(1, 1000000000) }}",
        "{{ 'x'.center(10**9) }}",
        "{{ 'x'.ljust(width=10**9) }}",
        "{{ '\t'.expandtabs(10**9) }}",
        "{{ (1).to_bytes(10**9, 'little') }}",
        "{{ 'x' | center(10**9) }}",
        "{{ 'x\nx' | indent(10**9) }}",
        "{{ 1 | round(-10**9) }}",
        "{{ [1] | batch(10**9, 0) | list }}",
        "{{ [1] | slice(10**9) | list }}",
        "{{ [[1]] | tojson(indent=10**9) }}",
        "{{ ('a' * 10**6).replace('a', 'a' * 10**6) }}",
        "{{ ('a' * 10**6) | replace('a', 'a' * 10**6) }}",
        "{{ ('a' * 10**5).join(['a'] * 10**5) }}",
        "{{ ['a'] * 10**5 | join('a' * 10**5) }}",
        "{{ ('{0}' * 10**5).format('a' * 10**6) }}",
        "{% set ns = namespace(x='a') %}{% for i in range(99) %}"
        "{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x='a') %}{% for i in range(99) %}"
        "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}"
        "{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x=1) %}{% for i in range(99999) %}"
        "{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
        "{% macro m() %}{% set ns.x = varargs %}{% endmacro %}{% set ns = namespace(x=1) %}"
        "{% for i in range(99) %}{{ m(ns.x, ns.x) }}{% endfor %}{{ ns.x }}",
        DOUBLED + "{{ x }}",
        DOUBLED + "{{ x == [x, x] }}",
        DOUBLED + "{{ x | tojson }}",
        DOUBLED.replace("[x, x]", "dict(a=x, b=x)") + "{{ x }}",
        DOUBLED.replace("[x, x]", "[1, 2] | batch(9, x) | list") + "{{ x }}",
        "{% set x %}{{ 'a' * 10**6 }}{% endset %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 40,
        "{% for i in range(99999) %}{{ messages[0].content * 999 }}{% endfor %}",
        "{{ {}.fromkeys(range(99999), range(99999) | list) }}",
        "{{ ('f' * 10**6) | int(base=16) }}",
    ],
)
def test_work_without_end_is_refused(source, little_memory):
    started = time.monotonic()
    with pytest.raises(
        ValueError, match=r"work|up to|at most|bits|width|not for|recursion|iterable"
    ):
        render(source)
    assert time.monotonic() - started < 10


def test_what_is_refused_does_not_depend_on_the_clock(monkeypatch):
    monkeypatch.setattr("batchllm.text.sandbox.MAX_WORK", 1000)
    loop = "{% for i in range(NUMBER) %}{{ i }}{% endfor %}"
    assert render(loop.replace("NUMBER", "90")).startswith("0123")
    with pytest.raises(ValueError, match="too much work"):
        render(loop.replace("NUMBER", "400"))


def test_long_rows_are_no_excess():
    content = "some words, and more of them\n" * 40_000  # over a megabyte
    source = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content | trim + '<|end|>' }}"
        "{% if '</think>' in m.content %}{{ m.content.split('</think>')[-1] }}{% endif %}"
        "{{ m.content | replace('\n', '\n\n') | length }}{% endfor %}"
    )
    assert len(render(source, content)) > len(content)
    row = {"text": content, "items": [{"k": i} for i in range(10_000)]}
    assert len(RowTemplate("{{ text }}{{ row | tojson(indent=2) }}").render(row)) > 2 * len(content)


@pytest.mark.parametrize(
    "source",
    [
        "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
        "{{ " + "-" * 100_000 + "1 }}",
        "{{ 1" + " + 1" * 10_000 + " }}",
        "{{ a" + ".a" * 10_000 + " }}",
        "{% for a in b %}" * 30 + "{% endfor %}" * 30,
        "{% if a %}" * 200 + "{% endif %}" * 200,
        "{{ a }}" * 25_000,
        "{{ " + "9" * 5000 + " }}",
        "{{ 0x" + "f" * 100_000 + " }}",
        "{{ 'a' | nofilter }}",
        "{% extends messages %}{% extends messages %}",
        "{{ 1 }",
        "{{ (1)[(1, 2)] }}",
        "\0{{ '\ud800' }}",
    ],
)
def test_sources_that_cannot_be_compiled_are_refused_in_a_line(source):
    for make in (RowTemplate, lambda text: ChatTemplate(text, None, None)):
        try:
            make(source)
        except ValueError as error:  # UsageError is one too
            assert "\n" not in str(error) and len(str(error)) < 500


def test_a_constant_is_not_worked_out_when_a_template_is_compiled(little_memory):
    for source in ("{{ 'a' * 10**10 }}", "{{ 'x' | center(10**10) }}", "{{ 9**9**9 }}"):
        assert RowTemplate(source).columns == ()


@pytest.mark.parametrize(
    "expression",
    [
        "''.__class__.__mro__[1].__subclasses__()",
        "''['__class__']",
        "messages.__init__.__globals__",
        "namespace.__init__.__globals__['os'].popen('id').read()",
        "cycler.__init__.__globals__",
        "('{0.__class__}' | format(1)) ~ '{0.__class__.__mro__}'.format(1)",
        "'{0.__class__}'.format_map(messages[0])",
        "messages | attr('__class__')",
        "messages | map(attribute='__class__') | list",
        "self._TemplateReference__context",
        "raise_exception.__globals__",
        "strftime_now.__code__",
        "(messages | map('upper')).gi_frame",
        "messages.append(1)",
        "messages[0].update({'role': 'x'})",
        "messages[0].pop('role')",
    ],
)
def test_nothing_outside_is_reached(expression):
    try:
        text = render("{{ " + expression + " }}")
    except ValueError:
        return
    assert "class" not in text.replace("{0.__class__}", "") and "<" not in text


@pytest.mark.parametrize(
    "source",
    [
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os }}",
        "{% extends '/etc/passwd' %}",
    ],
)
def test_templates_read_no_files(source):
    with pytest.raises(ValueError, match="no loader"):
        render(source)


def test_what_the_limits_leave_as_it_was():
    for source, text in [
        ("{{ 1 + 2 * 3 ** 2 % 7 // 2 / 4 }}", "1.5"),
        ("{{ [1] + [2] }}{{ 1.5 + 1 }}{{ 'a' ~ 1 ~ none }}", "[1, 2]2.5a1None"),
        ("{{ '%s-%5.2f' % ('a', 1) }}{{ '{:>4}'.format(3) }}", "a- 1.00   3"),
        ("{{ 'a,b'.split(',') }}{{ 'xax'.strip('x') }}", "['a', 'b']a"),
        ("{{ [3, 1, 2] | sort | join(', ') }}{{ {'b': 1}.items() | list }}", "1, 2, 3[('b', 1)]"),
        ("{% for a, b in [(1, 2), (3, 4)] if a > 1 %}{{ b }}{% endfor %}", "4"),
        (
            "{% macro m(a, b=2) %}{{ a }}{{ b }}{{ varargs }}{% endmacro %}{{ m(1, 3, 4) }}",
            "13(4,)",
        ),
        (
            "{{ messages | selectattr('role', 'eq', 'user') | map(attribute='content') | list }}",
            "['hi']",
        ),
        ("{{ messages[0].items() | list | length }}{{ messages[::-1] | length }}", "21"),
        ("{% set ns = namespace(a=1) %}{% set ns.a = ns.a + 1 %}{{ ns.a }}", "2"),
        ("{{ '<' | safe + '<' }}{{ ('<' | safe) ~ '<' }}", "<&lt;<<"),
        ("{% filter upper %}a{{ 'b' }}{% endfilter %}{{ undefined_name }}", "AB"),
        ("{{ 'a\nb' | indent(2) }}|{{ 'abc def' | wordwrap(3) }}", "a\n  b|abc\ndef"),
        ("{% for i in range(3) recursive %}{{ i }}{% endfor %}{{ (1, 2)[0] }}", "0121"),
    ]:
        assert render(source) == text, source


def test_a_row_s_template_that_is_no_jinja_is_wrong_usage():
    with pytest.raises(UsageError, match=r"not valid Jinja: .*nested too deeply"):
        RowTemplate("{{ " + "(" * 100_000 + " }}")


def test_a_template_that_python_would_warn_of_compiles_in_silence(recwarn):
    assert RowTemplate("{{ (1)[n:] }}").columns == ("n",)
    assert not recwarn
