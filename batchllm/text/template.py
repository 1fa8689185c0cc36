"""A prompt template over a row's columns: sandboxed Jinja2, in which every name is a column."""

import re
from collections.abc import Mapping
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from batchllm.errors import UsageError
from batchllm.text.chat import to_json

_SINGLE_BRACES = re.compile(r"\{\s*([A-Za-z_]\w*)\s*\}")
_ROW = "row"


class RowTemplate:
    """A compiled template such as `Title: {{ title }}`.

    A column whose name is no Python identifier is reached as `{{ row["Full Name"] }}`. Jinja's
    global functions are absent, so that a column may have any name. A null value is an error where
    it would be printed (`{{ subtitle or "" }}` prints nothing for it), and so is an undefined name.

    `columns` are the columns the template reads, in the order in which it does first.

    Raises:
        UsageError: not valid Jinja, or single braces meant as variables.
    """

    def __init__(self, source: str) -> None:
        _refuse_single_braces(source)
        try:
            tree = _ENVIRONMENT.parse(source)
            self._template = _ENVIRONMENT.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UsageError(
                f"the template is not valid Jinja: {error.message} (line {error.lineno})"
            ) from None
        names = (meta.find_undeclared_variables(tree) - {_ROW}) | _row_keys(tree)
        places = _first_places(tree)
        self.columns = tuple(sorted(names, key=lambda name: (places.get(name, len(places)), name)))

    def render(self, row: Mapping[str, Any]) -> str:
        """Render one row, given as column name → value.

        Raises:
            ValueError: the template fails on this row; the message says why.
        """
        try:
            return self._template.render({**row, _ROW: row})
        except Exception as error:  # a template can fail in any way that Python can
            raise ValueError(str(error) or type(error).__name__) from None


def _refuse_single_braces(source: str) -> None:
    if "{{" in source or "{%" in source:
        return
    if match := _SINGLE_BRACES.search(source):
        raise UsageError(
            f"the template has {match[0]} but no Jinja expression; "
            f"a column is written {{{{ {match[1]} }}}}"
        )


def _row_keys(tree: nodes.Template) -> set[str]:
    """The columns read through `row`; each must be spelled out, so that only they are loaded."""
    reads = [
        node.arg.value
        for node in tree.find_all(nodes.Getitem)
        if _is_row(node.node) and isinstance(node.arg, nodes.Const)
    ]
    # `row.name` is refused too: Jinja would find a mapping's own `items` before a column's.
    if sum(map(_is_row, tree.find_all(nodes.Name))) > len(reads):
        raise UsageError('the template uses `row` without a column: write {{ row["name"] }}')
    return {str(name) for name in reads}


def _first_places(tree: nodes.Template) -> dict[str, int]:
    """In which order names, and what is read through `row`, come in the template."""
    places: dict[str, int] = {}
    for node in tree.find_all((nodes.Name, nodes.Getitem)):
        if isinstance(node, nodes.Name):
            places.setdefault(node.name, len(places))
        elif (
            isinstance(node, nodes.Getitem)
            and _is_row(node.node)
            and isinstance(node.arg, nodes.Const)
        ):
            places.setdefault(str(node.arg.value), len(places))
    return places


def _is_row(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Name) and node.name == _ROW


def _refuse_null(value: object) -> object:
    if value is None:
        raise ValueError('a value is null; write {{ column or "" }} where that may be')
    return value


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, finalize=_refuse_null
    )
    environment.globals.clear()
    environment.filters["tojson"] = to_json
    return environment


_ENVIRONMENT = _environment()
