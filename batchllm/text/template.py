"""A prompt template over a row's columns: sandboxed Jinja2, in which every name is a column."""

import datetime
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jinja2
from jinja2 import nodes

from batchllm.errors import UsageError
from batchllm.text.chat import to_json
from batchllm.text.sandbox import LimitedEnvironment, render

_SINGLE_BRACES = re.compile(r"\{\s*([A-Za-z_]\w*)\s*\}")
_ROW = "row"


class RowTemplate:
    """A compiled template such as `Title: {{ title }}`.

    A column whose name is no Python identifier is reached as `{{ row["Full Name"] }}`. Jinja's
    global functions are absent, so that a column may have any name. A null value is an error where
    it would be printed (`{{ subtitle or "" }}` prints nothing for it), and so is an undefined name.

    `{{ row | tojson }}` prints all columns as a JSON object, `{{ row["a", "b"] | tojson }}` some in
    that order. There a null is null, and what JSON lacks (dates, decimals, bytes) is text.

    `columns` are the columns that the template names, in the order in which it does first;
    `prints_object` says whether it prints JSON objects, whose fields can be reordered;
    `columns_before_object` are the columns that stand before the first of them.

    Raises:
        UsageError: not valid Jinja, or single braces meant as variables.
    """

    def __init__(self, source: str) -> None:
        _refuse_single_braces(source)
        try:
            self._template = _ENVIRONMENT.compiled(source)
            undeclared = _ENVIRONMENT.undeclared(source)
        except ValueError as error:
            raise UsageError(f"the template is not valid Jinja: {error}") from None
        tree = _ENVIRONMENT.parse(source)
        self._objects = _objects(tree)
        self.prints_object = bool(self._objects)
        before = _names_before_object(tree)
        keys = _row_keys(tree, len(self._objects))
        places = {name: place for place, name in enumerate(_names_in_order(tree))}
        names = (undeclared - {_ROW}) | keys
        self.columns = tuple(sorted(names, key=lambda name: (places.get(name, len(places)), name)))
        self.columns_before_object = tuple(name for name in before if name in names)

    def columns_of(self, names: Sequence[str]) -> tuple[str, ...]:
        """The columns that rows must bring, of an input that has these."""
        every = names if None in self._objects else ()
        return tuple(dict.fromkeys((*every, *self.columns)))

    def object_columns(self, names: Sequence[str]) -> tuple[str, ...]:
        """The fields of the objects, each once, as the template orders them."""
        printed = (names if fields is None else fields for fields in self._objects)
        return tuple(dict.fromkeys(name for fields in printed for name in fields))

    def render(self, row: Mapping[str, Any], *, own_order: bool = False) -> str:
        """Render one row, given as column name → value.

        With `own_order` the objects have their fields in the order of `row`, not the template's.

        Raises:
            ValueError: the template fails on this row; the message says why.
        """
        return render(self._template, {**row, _ROW: _Row(row, own_order)})


class _Row(dict[Any, Any]):
    """What templates call `row`: a dict that also gives several of its fields, as a dict."""

    def __init__(self, row: Mapping[str, Any], own_order: bool) -> None:
        super().__init__(row)
        self._own_order = own_order

    def __getitem__(self, key: str | tuple[str, ...]) -> Any:  # noqa: ANN401
        if not isinstance(key, tuple):
            return super().__getitem__(key)
        names = [name for name in self if name in key] if self._own_order else key
        return {name: super(_Row, self).__getitem__(name) for name in names}


def _refuse_single_braces(source: str) -> None:
    if "{{" in source or "{%" in source:
        return
    if match := _SINGLE_BRACES.search(source):
        raise UsageError(
            f"the template has {match[0]} but no Jinja expression; "
            f"a column is written {{{{ {match[1]} }}}}"
        )


def _objects(tree: nodes.Template) -> list[tuple[str, ...] | None]:
    """The fields of each object that the template prints as JSON; None for all of the row's."""
    return [
        None if _is_row(printed.node) else _read_names(printed.node)
        for printed in tree.find_all(nodes.Filter)
        if printed.node is not None and _prints_object(printed)
    ]


def _prints_object(node: nodes.Node) -> bool:
    """Whether it is `row | tojson`, or `row["a", "b"] | tojson`."""
    if not isinstance(node, nodes.Filter) or node.name != "tojson" or node.node is None:
        return False
    return _is_row(node.node) or (not _reads_one(node.node) and bool(_read_names(node.node)))


def _row_keys(tree: nodes.Template, num_objects: int) -> set[str]:
    """The columns read through `row`; each must be spelled out, so that only they are loaded."""
    reads = list(tree.find_all(nodes.Getitem))
    # `row.name` is refused too: Jinja would find a mapping's own `items` before a column's.
    if sum(map(_is_row, tree.find_all(nodes.Name))) > sum(map(_reads_one, reads)) + num_objects:
        raise UsageError(
            "the template uses `row` in a way that does not say which columns it needs: write "
            '{{ row["name"] }} for a column, {{ row["a", "b"] | tojson }} for some as a JSON '
            "object, or {{ row | tojson }} for all"
        )
    return {name for node in reads for name in _read_names(node)}


def _reads_one(node: nodes.Node) -> bool:
    """Whether it is `row["name"]`."""
    return (
        isinstance(node, nodes.Getitem) and _is_row(node.node) and isinstance(node.arg, nodes.Const)
    )


def _read_names(node: nodes.Node) -> tuple[str, ...]:
    """The names in `row["name"]` or `row["a", "b"]`; none where it is something else."""
    if not isinstance(node, nodes.Getitem) or not _is_row(node.node):
        return ()
    spelled = node.arg.items if isinstance(node.arg, nodes.Tuple) else [node.arg]
    names = [str(name.value) for name in spelled if isinstance(name, nodes.Const)]
    return tuple(names) if len(names) == len(spelled) else ()


def _names_in_order(tree: nodes.Template) -> list[str]:
    """The names that the template reads, directly or through `row`, each once."""
    seen: dict[str, None] = {}
    for node in tree.find_all((nodes.Name, nodes.Getitem)):
        names = (node.name,) if isinstance(node, nodes.Name) else _read_names(node)
        seen.update(dict.fromkeys(names))
    return list(seen)


def _names_before_object(tree: nodes.Template) -> list[str]:
    """The names that the template reads before it first prints an object, each once."""
    seen: dict[str, None] = {}
    for node in tree.find_all((nodes.Name, nodes.Getitem, nodes.Filter)):
        if _prints_object(node):
            break
        if isinstance(node, nodes.Name) and not _is_row(node):
            seen[node.name] = None
        seen.update(dict.fromkeys(_read_names(node)))
    return list(seen)


def _is_row(node: nodes.Node) -> bool:
    return isinstance(node, nodes.Name) and node.name == _ROW


def _refuse_null(value: object) -> object:
    if value is None:
        raise ValueError('a value is null; write {{ column or "" }} where that may be')
    return value


def json_text(value: object) -> str:
    """As text, a value that JSON lacks: ISO 8601 for dates, UTF-8 or else hex for bytes."""
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value.hex()
    return str(value)


def _environment() -> LimitedEnvironment:
    environment = LimitedEnvironment(undefined=jinja2.StrictUndefined, finalize=_refuse_null)
    environment.globals.clear()
    environment.limit_filter("tojson", partial(to_json, default=json_text))
    return environment


_ENVIRONMENT = _environment()
