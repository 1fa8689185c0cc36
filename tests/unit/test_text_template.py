"""Row templates: every name is a column, and what looks like a mistake is told."""

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
