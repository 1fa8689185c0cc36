"""Random and hostile templates: over rows, and over conversations."""

import pyarrow as pa
from builders import CHATML, tiny_tokenizer

from batchllm.text import sandbox
from batchllm.text.prompts import PromptBuilder, PromptSpec
from batchllm.text.sandbox_work import MAX_WORK
from batchllm.text.template import RowTemplate
from fuzzing.mutate import TEXTS
from fuzzing.texts import check_rows, random_texts

_FILTERS = [
    *("abs", "batch({})", "capitalize", "center({})", "count", "default({})", "dictsort", "e"),
    *("escape", "filesizeformat", "first", "float", "forceescape", "format({}, {})", "indent({})"),
    *("groupby({})", "int", "int(base={})", "join({})", "last", "length", "list", "items", "lower"),
    *("map({})", "map('upper')", "map('replace', {}, {})", "map(attribute={})", "max", "min"),
    *("pprint", "reject", "replace({}, {})", "reverse", "round({})", "safe", "select", "slice({})"),
    *("selectattr({})", "sort", "string", "striptags", "sum", "sum(start={})", "title", "trim"),
    *("truncate({})", "unique", "upper", "urlencode", "urlize", "wordcount", "wordwrap({})"),
    *("xmlattr", "tojson", "tojson(indent={})", "attr({})", "nofilter", "map('batch', {})"),
    *("groupby({}, default={})", "map(attribute='x', default={})", "select('in', {})"),
]
_METHODS = [
    *("upper()", "replace({}, {})", "join({})", "split({})", "format({}, {})", "center({})"),
    *("zfill({})", "expandtabs({})", "encode()", "items()", "keys()", "get({}, {})", "strip({})"),
    *("append({})", "count({})", "index({})", "to_bytes({}, 'big')", "format_map({})", "title()"),
    *("__class__", "mro()", "copy()", "fromkeys({}, {})", "splitlines()", "translate({})"),
    *("rjust({}, '\t')", "partition({})", "real", "as_integer_ratio()", "pop()", "content", "role"),
]
_ATOMS = [
    *("a", "b", "t", "n", "row", 'row["a"]', 'row["a", "t"]', "messages", "messages[0].content"),
    *("messages[-1]", "bos_token", "tools", "x", "y", "ns", "ns.x", "loop", "loop.index", "m"),
    *("range({})", "namespace(x={}, y={})", "dict(a={}, b={})", "cycler({}, {}).next()", "caller"),
    *("joiner({})", "lipsum()", "raise_exception({})", "strftime_now({})", "self", "super()"),
    *("m({}, {})", "loop({})", "loop.changed({})", "self.b()", "varargs", "kwargs", "undefined"),
    *("0", "1", "2", "-1", "1000000000", "99999999999999999999", "0.5", "1e308", "true", "none"),
    *("'a'", "''", "'%1000000d'", "'%s%s'", "'{:1000000}'", "'{0}{0}'", "'\\n'", "'\\t'", "'user'"),
    *("[]", "{{}}", "[{}, {}]", "({}, {})", "{{'a': {}, 'b': {}}}", "{{{}: {}}}", "'é'", "'<b>'"),
]
_OPERATORS = [
    *("+", "-", "*", "/", "//", "%", "**", "~", "==", "!=", "<", ">=", "in", "not in", "and"),
    *("or", "is", "is not"),
]
_TESTS = ["defined", "none", "string", "mapping", "divisibleby({})", "sameas({})", "in({})", "even"]
_WHOLE = [
    CHATML,
    "Title: {{ t }}\n\n{{ a or '' }}",
    "{{ row | tojson }}",
    '{{ row["a", "t"] | tojson(indent=2) }}',
    "{% for x in messages %}{{ x.role ~ ': ' + x.content | trim }}{% endfor %}",
    "{% set x = [1] %}" + "{% set x = x + x %}" * 40 + "{{ x }}",
    "{% set x = 'a' %}" + "{% set x = [x, x] %}" * 40 + "{{ x }}",
]


def expression(rng, depth):
    if depth <= 0 or rng.random() < 0.2:
        return _filled(rng, rng.choice(_ATOMS), 0)
    inner = expression(rng, depth - 1)
    match rng.randrange(9):
        case 0 | 1 | 2:
            return f"{inner} | {_filled(rng, rng.choice(_FILTERS), depth - 1)}"
        case 3 | 4:
            return f"({inner}).{_filled(rng, rng.choice(_METHODS), depth - 1)}"
        case 5 | 6:
            operator = rng.choice(_OPERATORS)
            other = expression(rng, depth - 1)
            if operator.startswith("is"):
                other = _filled(rng, rng.choice(_TESTS), depth - 1)
            return f"({inner}) {operator} {other}"
        case 7:
            return f"({inner})[{rng.choice(['0', '::-1', '1:', ':1000', 'x', '(1, 2)', '-1'])}]"
        case _:
            return f"({inner} if {expression(rng, 0)} else {expression(rng, 0)})"


def _filled(rng, form, depth):
    parts = [expression(rng, depth - 1) for _ in range(form.count("{}"))]
    if form.startswith("'"):
        return form
    return form.format(*parts) if "{" in form else form


def statements(rng, depth):
    found = []
    for _ in range(rng.randint(1, 4)):
        value, body = expression(rng, 3), "text"
        if depth > 0:
            body = statements(rng, depth - 1)
        found.append(
            rng.choice(
                [
                    f"{{{{ {value} }}}}",
                    f"{{{{ {value} }}}}",
                    rng.choice(["{", "}}", "{%", "text", "\n", "{#", "#}", "{{ a }}"]),
                    f"{{% set x = {value} %}}",
                    f"{{% set ns.x = {value} %}}",
                    "{% set ns = namespace(x='a') %}",
                    f"{{% set y %}}{body}{{% endset %}}",
                    f"{{% if {value} %}}{body}{{% else %}}b{{% endif %}}",
                    f"{{% for x in {value} %}}{body}{{% endfor %}}",
                    f"{{% for x in {value} if {expression(rng, 1)} %}}{body}{{% endfor %}}",
                    f"{{% for x, y in {value} recursive %}}{body}{{{{ loop(x) }}}}{{% endfor %}}",
                    f"{{% for x in range(99999) %}}{body}{{% endfor %}}",
                    f"{{% macro m(a, b=1) %}}{body}{{{{ m(x) }}}}{{% endmacro %}}{{{{ m(a) }}}}",
                    f"{{% call m({value}) %}}{body}{{% endcall %}}",
                    f"{{% filter {rng.choice(_FILTERS)} %}}{body}{{% endfilter %}}".replace(
                        "{}", "1"
                    ),
                    f"{{% block b scoped %}}{body}{{% endblock %}}",
                    f"{{% with x = {value} %}}{body}{{% endwith %}}",
                    f"{{% include {value} %}}",
                    f"{{% import {value} as m %}}",
                    f"{{% autoescape {value} %}}{body}{{% endautoescape %}}",
                    f"{{% generation %}}{body}{{% endgeneration %}}",
                ]
            )
        )
    return "".join(found)


def source(rng):
    text = rng.choice(_WHOLE) if rng.random() < 0.15 else statements(rng, rng.randrange(4))
    if rng.random() < 0.2:
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(text) + 1)
            piece = rng.choice(["", "{", "}", "(", ")", "'", "\\", "\0", "|", "[", *TEXTS])
            text = text[:at] + piece + text[at + rng.randrange(4) :]
    if rng.random() < 0.01:
        text += "{{ " + rng.choice(["(", "-", "not ", "[", "a.", "{1:"]) * 10_000 + "1 }}"
    return text


class RowTemplates:
    """Templates by the user: a spec that has one, and rows through it."""

    def __init__(self, scratch):
        self._tokenizer = tiny_tokenizer()

    def run(self, rng):
        _choose_budget(rng)
        template = source(rng)
        spec = PromptSpec(template=template, chat=rng.choice([None, True, False]))
        rows = [
            {"a": text, "b": rng.choice([None, 1.5]), "t": ["a", text], "n": rng.choice([0, 3, -7])}
            for text in _encodable(random_texts(rng, 2))
        ]
        table = pa.Table.from_pylist(rows, pa.schema(_COLUMNS))
        for name in RowTemplate(template).columns_of(table.column_names):
            if name not in table.column_names:  # so that few are refused for want of one
                table = table.append_column(name, rng.choice([table["a"], table["t"]]))
        spec.check(table.schema)
        builder = PromptBuilder(spec, self._tokenizer, 300)
        check_rows(builder.build(table))
        builder.keys(table)


class ChatTemplates:
    """Templates by strangers: a tokenizer that has one, and conversations through it."""

    def __init__(self, scratch):
        self._spec = PromptSpec(messages_column="m")

    def run(self, rng):
        _choose_budget(rng)
        builder = PromptBuilder(self._spec, tiny_tokenizer(chat_template=source(rng)), 300)
        rows = [
            [{"role": rng.choice(["user", "system", text]), "content": text} for text in texts]
            for texts in (_encodable(random_texts(rng, 2)) for _ in range(2))
        ]
        check_rows(builder.build(pa.table({"m": rows})))


def _choose_budget(rng):
    """A hundredth of the work in most cases, as each would take seconds to be refused."""
    sandbox.MAX_WORK = MAX_WORK if rng.random() < 0.03 else MAX_WORK // 100


_COLUMNS = [
    ("a", pa.string()),
    ("b", pa.float64()),
    ("t", pa.list_(pa.string())),
    ("n", pa.int64()),
]


def _encodable(texts):
    return [text.encode("utf-8", "replace").decode() for text in texts]
