"""In which order fields share most, if it is one order for all rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Field:
    """A column's values in a sample: equal codes are equal values; lengths in characters; [n].

    Codes count from 0, and lengths are of what is printed: in a JSON object, of the name too.
    """

    name: str
    codes: Ints
    lengths: Ints

    def take(self, rows: Ints) -> "Field":
        """The same of these rows only."""
        return Field(self.name, self.codes[rows], self.lengths[rows])


def saved_characters(fields: Sequence[Field]) -> int:
    """Characters of later rows that agree with an earlier one in this field and all before it."""
    saved = 0
    prefix = _no_prefix(fields)
    for field in fields:
        prefix = joint_codes(prefix, field.codes)
        saved += _repeated(prefix, field.lengths)
    return saved


def saved_characters_by_row(fields: Sequence[Field], orders: Ints) -> int:
    """The same where each row has its own order: `orders` are field numbers, [n, num_fields]."""
    codes = np.array([field.codes for field in fields])
    lengths = np.array([field.lengths for field in fields])
    rows = np.arange(len(orders))
    saved = 0
    prefix = _no_prefix(fields)
    for numbers in orders.T:
        prefix = joint_codes(joint_codes(prefix, numbers), codes[numbers, rows])
        saved += _repeated(prefix, lengths[numbers, rows])
    return saved


def best_order(fields: Sequence[Field], prefix: Ints | None = None) -> list[Field]:
    """The order found by taking, at every place, the field that saves most there.

    Fields that determine each other cost nothing behind one another, so a long text comes right
    behind (or before) its key. It is one order for all rows; `FieldRules` order by row.

    What a field saves only falls as the prefix grows, so one whose last known gain is behind
    another's fresh one need not be counted again.

    Args:
        fields: to be ordered.
        prefix: codes of what all of them stand behind, [n]; None where they come first.
    """
    prefix = _no_prefix(fields) if prefix is None else prefix
    gains = {number: _gain(prefix, field)[0] for number, field in enumerate(fields)}
    order: list[Field] = []
    while gains:
        fresh: dict[int, Ints] = {}
        while (best := max(gains, key=gains.__getitem__)) not in fresh:
            gains[best], fresh[best] = _gain(prefix, fields[best])
        prefix = fresh[best]
        del gains[best]
        order.append(fields[best])
    return order


def joint_codes(a: Ints, b: Ints) -> Ints:
    """Codes of pairs, from 0."""
    pairs = a * (int(b.max(initial=0)) + 1) + b
    codes: Ints = np.unique(pairs, return_inverse=True)[1]
    return codes


def _gain(prefix: Ints, field: Field) -> tuple[tuple[int, int], Ints]:
    """What a field behind a prefix saves, and their joint codes.

    A field that splits less leaves more for those behind it: fewest values on a draw.
    """
    joint = joint_codes(prefix, field.codes)
    return (_repeated(joint, field.lengths), -int(joint.max(initial=0))), joint


def _no_prefix(fields: Sequence[Field]) -> Ints:
    return np.zeros(len(fields[0].codes) if fields else 0, dtype=np.int64)


def _repeated(codes: Ints, lengths: Ints) -> int:
    """Sum of the lengths of all but the first row of each code."""
    _, first = np.unique(codes, return_index=True)
    return int(lengths.sum() - lengths[first].sum())
