"""In which order each row has its fields, as rules on its own values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from batchllm.prefix.fields import Ints

OTHER = -1  # as a value of a rule: any that no rule beside it names; as a code: one not seen before


@dataclass(frozen=True, slots=True)
class FieldRules:
    """A decision list: the first rule that fits a row says in which order the row has its fields.

    Rule i fits rows that have `values[i]` in field `fields[i]`, or if that is `OTHER`, a value that
    no rule of this list names. Those take `orders[i]`, or where there is an entry `inner[i]`, the
    order that its rules say. Rows that no rule fits take the last of `orders`. So a row's order
    depends on the row and the rules only, whatever is beside it.

    Shapes: `fields` and `values` [num_rules], `orders` [num_rules + 1, num_fields], field numbers.
    """

    fields: Ints
    values: Ints
    orders: Ints
    inner: Mapping[int, "FieldRules"]

    @classmethod
    def fixed(cls, order: Sequence[int]) -> "FieldRules":
        """One order for all rows."""
        none = np.zeros(0, dtype=np.int64)
        return cls(none, none, np.array([order], dtype=np.int64), {})

    def order_rows(self, codes: Ints) -> Ints:
        """Each row's order of fields, [num_rows, num_fields].

        Args:
            codes: values as the rules know them, [num_fields, num_rows]; `OTHER` where they do not.
        """
        fitting = self._first_fitting(codes)
        orders: Ints = self.orders[fitting]
        if self.inner:
            by_rule = np.argsort(fitting, kind="stable")
            rules = np.array(list(self.inner))
            begins, ends = (np.searchsorted(fitting[by_rule], rules + i) for i in (0, 1))
            for rule, begin, end in zip(self.inner, begins.tolist(), ends.tolist(), strict=True):
                rows = by_rule[begin:end]
                if len(rows):
                    orders[rows] = self.inner[rule].order_rows(codes[:, rows])
        return orders

    def _first_fitting(self, codes: Ints) -> Ints:
        """Each row's first fitting rule, [num_rows]; `num_rules` where none fits."""
        fitting = np.full(codes.shape[1], len(self.fields), dtype=np.int64)
        for field in np.unique(self.fields).tolist():
            rules = np.flatnonzero(self.fields == field)
            rules = rules[np.argsort(self.values[rules], kind="stable")]
            named = self.values[rules]
            near = np.minimum(np.searchsorted(named, codes[field]), len(rules) - 1)
            fits = named[near] == codes[field]
            if named[0] == OTHER:  # it sorts first
                near, fits = np.where(fits, near, 0), np.ones_like(fits)
            fitting = np.where(fits, np.minimum(fitting, rules[near]), fitting)
        return fitting
