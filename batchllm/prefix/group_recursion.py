"""Learns rules for the order of fields from a sample of rows: Greedy Group Recursion (GGR).

After "Optimizing LLM Queries in Relational Data Analytics Workloads" (MLSys'25, arXiv 2403.05821),
algorithm 1. That orders a table's rows once and for all; here the choices it makes are kept as
rules, so that a row's order is the same in whichever window, or after whichever restart, it is met.
"""

from collections.abc import Sequence

import numpy as np

from batchllm.prefix.dependencies import determined_fields
from batchllm.prefix.field_groups import Group, greedy_groups
from batchllm.prefix.field_rules import OTHER, FieldRules
from batchllm.prefix.fields import Field, Ints, best_order, saved_characters_by_row

_MIN_ROWS = 32  # of a group that gets rules of its own for what stands behind its value


def learn_rules(fields: Sequence[Field], num_rows: int | None = None) -> FieldRules:
    """Rules that on these rows save at least as much as the given order and the best fixed one.

    `num_rows` is how many rows the table has that these are evenly taken from; None is just these.
    """
    as_given = FieldRules.fixed(range(len(fields)))
    if not fields or len(fields[0].codes) == 0:
        return as_given
    recursion = _GroupRecursion(fields, num_rows or len(fields[0].codes))
    rules = recursion.rules(recursion.all_rows, range(len(fields)), ())
    return recursion.better(rules, as_given, recursion.all_rows)


class _GroupRecursion:
    """Takes the group of rows that saves most if it begins with what it shares; and so on.

    A group is a value with its rows; they share it and the fields that it determines. Its rows get
    rules of their own for the other fields, and the groups of all other rows are weighed again.

    The paper weighs a group by the squares of its lengths times its rows but one. That lets a short
    value of very many rows tear apart the few that share a long text. So we weigh by what one of
    its rows saves on average, its length times 1 - 1/rows.

    Other than in the paper also, a group's fields stand with those of the fewest values first, so
    that groups share among them what they determine alike; and small groups, whose recursion cannot
    save much, have their other fields in one order, the best for all groups of a field.
    """

    def __init__(self, fields: Sequence[Field], num_rows: int) -> None:
        self._fields = fields
        self._codes: Ints = np.array([field.codes for field in fields])
        self._lengths = np.array([field.lengths for field in fields], dtype=np.float64)
        self._num_values = [len(np.unique(field.codes)) for field in fields]
        self._determined = determined_fields(fields)
        self._scale = num_rows / self._codes.shape[1]
        self.all_rows: Ints = np.arange(self._codes.shape[1])

    def rules(self, rows: Ints, left: Sequence[int], before: tuple[int, ...]) -> FieldRules:
        """Rules for the fields `left` in these rows, which all begin with the fields `before`."""
        fixed = FieldRules.fixed((*before, *self._best(rows, left)))
        blocks = {field: self._block(field, left) for field in left}
        shared = np.array([self._lengths[blocks[f]][:, rows].sum(axis=0) for f in left])
        groups = [
            Group(left[group.place], group.value, rows[group.rows])
            for group in greedy_groups(self._codes[list(left)][:, rows], shared, self._scale)
        ]
        if not groups:
            return fixed
        behind = self._orders_behind(groups, blocks, left)
        begin = {field: (*before, *blocks[field]) for field in behind}
        found = FieldRules(
            fields=np.array([group.place for group in groups]),
            values=np.array([group.value for group in groups]),
            orders=np.array(
                [[*begin[g.place], *behind[g.place]] for g in groups] + [fixed.orders[0]]
            ),
            inner={
                rule: self.rules(group.rows, behind[group.place], begin[group.place])
                for rule, group in enumerate(groups)
                if group.value != OTHER
                and len(group.rows) >= _MIN_ROWS
                and len(behind[group.place]) > 1
            },
        )
        return self.better(found, fixed, rows)

    def better(self, rules: FieldRules, other: FieldRules, rows: Ints) -> FieldRules:
        """What saves more in these rows; `other` on a draw."""
        fields = [field.take(rows) for field in self._fields]
        codes = self._codes[:, rows]
        saved, by_other = (
            saved_characters_by_row(fields, each.order_rows(codes)) for each in (rules, other)
        )
        return rules if saved > by_other else other

    def _block(self, field: int, left: Sequence[int]) -> list[int]:
        """A field and what it determines of those left, those of the fewest values first."""
        block = [field, *(other for other in self._determined[field] if other in left)]
        return sorted(block, key=lambda number: (self._num_values[number], number))

    def _orders_behind(
        self,
        groups: Sequence[Group],
        blocks: dict[int, list[int]],
        left: Sequence[int],
    ) -> dict[int, list[int]]:
        """For each field that groups are of, the best order of the fields behind its block."""
        orders = {}
        for field in dict.fromkeys(group.place for group in groups):
            rows = np.concatenate([group.rows for group in groups if group.place == field])
            others = [other for other in left if other not in blocks[field]]
            orders[field] = self._best(rows, others, self._codes[field, rows])
        return orders

    def _best(self, rows: Ints, numbers: Sequence[int], prefix: Ints | None = None) -> list[int]:
        places = {self._fields[number].name: number for number in numbers}
        order = best_order([self._fields[number].take(rows) for number in numbers], prefix)
        return [places[field.name] for field in order]
