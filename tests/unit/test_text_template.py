"""Row templates: every name is a column, and what looks like a mistake is told."""

import datetime
import decimal
import json

import pytest

from batchllm.errors import UsageError
from batchllm.text.template import RowTemplate


@pytest.mark.parametrize(
    ("source", "columns", "expected"),
    [
        ("{{ title }}: {{ body }}", ("title", "body"), "T: B"),
        ('{{ row["Full Name"] }}', ("Full Name",), "N"),
        ("{% for x in tags %}{{ x }},{% endfor %}", ("tags",), "1,2,"),
        ("{% set x = title %}{{ x }}", ("title",), "T"),
        ("{{ range }}{{ dict }}", ("range", "dict"), "RD"),  # no globals in a column's way
        ('{"title": {{ title | tojson }}}', ("title",), '{"title": "T"}'),
        ("{{ missing or '-' }}", ("missing",), "-"),
        ("{% if missing is none %}x{% endif %}", ("missing",), "x"),
        ("constant {brace", (), "constant {brace"),
        ("{{ title }}\n", ("title",), "T"),  # a file's last newline is not part of the prompt
        ("{{ html }}", ("html",), "<b>&"),
    ],
)
def test_rendering(source, columns, expected):
    row = {"title": "T", "body": "B", "Full Name": "N", "tags": [1, 2], "missing": None}
    row |= {"range": "R", "dict": "D", "html": "<b>&"}
    template = RowTemplate(source)
    assert template.columns == columns
    assert template.render({name: row[name] for name in columns}) == expected


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("Title: {title}", r"write|written \{\{ title \}\}"),
        ("{{ title", "not valid Jinja"),
        ("a\n{% endif %}", "line 2"),
        ("{{ title | nofilter }}", "nofilter"),
        ("{{ row }}", "row"),
        ("{{ row.title }}", "row"),
        ("{{ row[title] }}", "row"),
        ('{{ row["a", title] | tojson }}', "row"),
        ('{{ row["a", "b"] }}', r"\| tojson"),
        ("{{ row | upper }}", r"\| tojson"),
        ('{{ row["a":"b"] | tojson }}', "row"),
        ("{% set row = title %}{{ row | tojson }}", "row"),
    ],
)
def test_mistakes(source, says):
    with pytest.raises(UsageError, match=says):
        RowTemplate(source)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{{ title }}", "null"),
        ("{{ number + 'x' }}", "unsupported"),
        ("{{ number.nothing }}", "nothing"),
        ("{{ number.__class__ }}", "unsafe"),
        ("{{ number // 0 }}", "zero"),
    ],
)
def test_a_row_that_fails_says_why(source, says):
    template = RowTemplate(source)
    with pytest.raises(ValueError, match=says):
        template.render({"title": None, "number": 1})


ROW = {
    "a": "é",
    "b": None,
    "day": datetime.date(2024, 2, 3),
    "at": datetime.datetime(2024, 2, 3, 4, 5),
    "price": decimal.Decimal("1.50"),
    "text": b"ok",
    "raw": b"\xff\x00",
    "tags": [1, 2.5, True],
    "items": {"x": 1},
}
PRINTED = {
    **{"a": "é", "b": None, "day": "2024-02-03", "at": "2024-02-03T04:05:00", "price": "1.50"},
    **{"text": "ok", "raw": "ff00", "tags": [1, 2.5, True], "items": {"x": 1}},
}


def test_an_object_has_all_columns_or_those_named_in_that_order():
    whole = RowTemplate("{{ row | tojson }}")
    assert whole.columns_of(list(ROW)) == whole.object_columns(list(ROW)) == tuple(ROW)
    assert whole.render(ROW) == json.dumps(PRINTED, ensure_ascii=False)
    some = RowTemplate('{{ a }}: {{ row["day", "a", "items"] | tojson }}')
    assert some.columns_of(list(ROW)) == ("a", "day", "items")
    assert some.object_columns(list(ROW)) == ("day", "a", "items")
    assert some.render(ROW) == 'é: {"day": "2024-02-03", "a": "é", "items": {"x": 1}}'
    assert RowTemplate("{{ lost }}{{ row | tojson }}").columns_of(["a"]) == ("a", "lost")


def test_objects_in_the_rows_own_order():
    row = {name: ROW[name] for name in ("tags", "b", "a", "day")}
    whole = RowTemplate("{{ row | tojson }}").render(row, own_order=True)
    assert whole.startswith('{"tags": ') and json.loads(whole) == {n: PRINTED[n] for n in row}
    some = RowTemplate('{{ row["a", "b", "tags"] | tojson }}')
    assert some.render(row, own_order=True) == '{"tags": [1, 2.5, true], "b": null, "a": "é"}'
    assert some.render(row) == '{"a": "é", "b": null, "tags": [1, 2.5, true]}'


@pytest.mark.parametrize(
    ("source", "columns", "prints_object"),
    [
        ('{{ row["a"] | tojson }}', (), False),
        ("{{ a | tojson }}", (), False),
        ('{{ a }} {{ row["c"] }} {{ row | tojson }} {{ d }}', ("a", "c"), True),
        ('{{ row["a", "b"] | tojson(indent=2) }}{{ c }}', (), True),
        ("{% for x in a %}{{ x }}{% endfor %}{{ row | tojson }}", ("a",), True),
    ],
)
def test_what_stands_before_an_object(source, columns, prints_object):
    template = RowTemplate(source)
    assert template.prints_object == prints_object
    if prints_object:
        assert set(template.columns_before_object) == set(columns)
