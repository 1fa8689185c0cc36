"""The order of fields in a row's JSON object: learned once from a table, then a matter of the row.

What is learned must not depend on where a job was interrupted, so it is learned before the first
window, from rows evenly spread over the whole table.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchllm.prefix.field_rules import OTHER, FieldRules
from batchllm.prefix.fields import Field, Ints
from batchllm.prefix.group_recursion import learn_rules
from batchllm.text.field_values import as_json_field, printed_values
from batchllm.text.prompt_spec import PromptSpec
from batchllm.text.template import RowTemplate

LEARNING_ROWS = 65_536  # at most; memory for as many rows is what a window takes too


@dataclass(frozen=True, slots=True)
class ColumnRules:
    """`FieldRules` for a table's columns; `values[i][code]` is what a code of column i stands for.

    A value that only one row has had has no code, so that long texts of their own are not kept.
    """

    columns: tuple[str, ...]
    values: tuple[pa.Array, ...]
    rules: FieldRules

    def orders(self, table: pa.Table) -> list[tuple[str, ...]]:
        """Each row's columns in its order."""
        found, which = np.unique(
            self.rules.order_rows(self._codes(table)), axis=0, return_inverse=True
        )
        names = [tuple(self.columns[number] for number in order) for order in found.tolist()]
        return [names[number] for number in which.ravel().tolist()]

    def _codes(self, table: pa.Table) -> Ints:
        codes = np.empty((len(self.columns), table.num_rows), dtype=np.int64)
        for row_of, name, values in zip(codes, self.columns, self.values, strict=True):
            known = pc.index_in(printed_values(table[name]), value_set=values)
            row_of[:] = pc.fill_null(known, OTHER).to_numpy(zero_copy_only=False)
        return codes


def learn_column_rules(
    table: pa.Table, columns: Sequence[str], num_rows: int | None = None
) -> ColumnRules:
    """Learn from these rows, taken evenly from a table of `num_rows`; None is just these."""
    fields, values = [], []
    for name in columns:
        printed = printed_values(table[name])
        field = as_json_field(name, printed, table[name].type)
        codes, repeated = _repeated_first(field.codes)
        fields.append(Field(name, codes, field.lengths))
        values.append(printed.take(pa.array(repeated)))
    return ColumnRules(tuple(columns), tuple(values), learn_rules(fields, num_rows))


def learn_field_order(
    spec: PromptSpec,
    tables: Iterable[pa.Table],
    num_rows: int,
    *,
    learning_rows: int = LEARNING_ROWS,
) -> ColumnRules | None:
    """Learn what `spec.reorder_fields` needs; None where it is off, and nothing is read.

    Args:
        spec: whose template prints the objects.
        tables: consecutive pieces of the table, from its first row on.
        num_rows: of all pieces.
        learning_rows: how many rows to learn from, at most.
    """
    if not spec.reorder_fields:
        return None
    assert spec.template is not None
    template = RowTemplate(spec.template)
    wanted = spread(num_rows, learning_rows)
    pieces: list[pa.Table] = []
    start = 0
    for table in tables:
        columns = template.object_columns(table.column_names)
        begin, end = np.searchsorted(wanted, [start, start + table.num_rows])
        here = wanted[begin:end] - start
        piece = table.select(columns)
        pieces.append(piece if len(here) == table.num_rows else piece.take(pa.array(here)))
        start += table.num_rows
    if not pieces:
        return None
    sample = pa.concat_tables(pieces)
    return learn_column_rules(sample, sample.column_names, num_rows)


def spread(num_rows: int, most: int) -> Ints:
    """Row numbers evenly spread over a table: all of them, or `most`."""
    count = min(num_rows, most)
    return np.arange(count, dtype=np.int64) * num_rows // max(count, 1)


def _repeated_first(codes: Ints) -> tuple[Ints, Ints]:
    """Codes renumbered, with what occurs more than once first, and a row with each of those."""
    _, firsts, value, counts = np.unique(
        codes, return_index=True, return_inverse=True, return_counts=True
    )
    order = np.argsort(-counts, kind="stable")
    renumbered = np.empty_like(order)
    renumbered[order] = np.arange(len(order))
    return renumbered[value], firsts[order[: np.count_nonzero(counts > 1)]]
