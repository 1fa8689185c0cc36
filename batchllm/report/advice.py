"""What would make a table share more."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from batchllm.prefix.fields import best_order, saved_characters, saved_characters_by_row
from batchllm.prefix.group_recursion import learn_rules
from batchllm.text.field_values import as_field, as_json_field, printed_values
from batchllm.text.prompt_spec import PromptSpec
from batchllm.text.template import RowTemplate

_ROWS = 20_000
_WORTH_SAYING = 0.05  # of all the fields' characters


def advise(table: pa.Table, spec: PromptSpec) -> list[str]:
    """Advice on the order of a template's fields.

    Judged by whole values of the first rows, so text around the fields and prefixes within a value
    are left out.
    """
    if spec.template is None or spec.reorder_fields:
        return []
    template = RowTemplate(spec.template)
    if template.prints_object:
        return advise_reordering(table, template)
    return advise_field_order(table, template.columns)


def advise_field_order(table: pa.Table, columns: Sequence[str]) -> list[str]:
    """Advice on the order of a template's columns, given in the order in which it has them."""
    if len(columns) < 2 or table.num_rows == 0:
        return []
    sample = table.slice(0, _ROWS)
    fields = [as_field(name, printed_values(sample[name])) for name in columns]
    total = sum(int(field.lengths.sum()) for field in fields)
    better = best_order(fields)
    now, then = saved_characters(fields), saved_characters(better)
    if total == 0 or then - now < _WORTH_SAYING * total:
        return []
    names = ", ".join(field.name for field in better)
    return [
        f"{columns[0]} comes first and the columns behind it share only what it shares: in the "
        f"order {names}, {then / total:.0%} of their text would be shared instead of "
        f"{now / total:.0%} (answers can change with the order)"
    ]


def advise_reordering(table: pa.Table, template: RowTemplate) -> list[str]:
    """Advice on --reorder-fields, for a template that prints objects."""
    sample = table.slice(0, _ROWS)
    if sample.num_rows == 0:
        return []
    before = [as_field(n, printed_values(sample[n])) for n in template.columns_before_object]
    fields = [
        as_json_field(name, printed_values(sample[name]), sample[name].type)
        for name in template.object_columns(sample.column_names)
    ]
    orders = learn_rules(fields).order_rows(np.array([field.codes for field in fields]))
    leading = np.broadcast_to(np.arange(len(before)), (len(orders), len(before)))
    printed = [*before, *fields]
    total = sum(int(field.lengths.sum()) for field in printed)
    now = saved_characters(printed)
    then = saved_characters_by_row(printed, np.hstack([leading, orders + len(before)]))
    if then - now < _WORTH_SAYING * total:
        return []
    return [
        "the fields of the object come in one order: with --reorder-fields each row has them in "
        f"an order of its own, and {then / total:.0%} of their text would be shared instead of "
        f"{now / total:.0%} (answers can change with the order)"
    ]
