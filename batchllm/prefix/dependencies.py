"""Functional dependencies, found from the data: which fields a field's value determines."""

from collections.abc import Sequence

import numpy as np

from batchllm.prefix.fields import Field, Ints

_TOLERATED = 0.01  # of the repeats: real tables have typing errors


def determined_fields(fields: Sequence[Field]) -> list[tuple[int, ...]]:
    """For each field, the numbers of the others that have one value for every one of its own.

    Only rows whose value has been there before tell anything, so a field without such repeats
    determines nothing; of the others, nearly all repeats must have what their value's first row
    has.
    """
    return [
        tuple(_determined_by(field, number, fields)) if len(field.codes) else ()
        for number, field in enumerate(fields)
    ]


def _determined_by(field: Field, number: int, fields: Sequence[Field]) -> list[int]:
    firsts = first_rows(field.codes)
    repeats = len(field.codes) - len(np.unique(field.codes))
    return [
        other
        for other, candidate in enumerate(fields)
        if other != number
        and repeats
        and np.count_nonzero(candidate.codes[firsts] != candidate.codes) <= _TOLERATED * repeats
    ]


def first_rows(codes: Ints) -> Ints:
    """For each row, the first that has the same code, [n]."""
    firsts = np.zeros(int(codes.max(initial=0)) + 1, dtype=np.int64)
    firsts[codes[::-1]] = np.arange(len(codes))[::-1]  # of assignments to one place, the last stays
    return firsts[codes]
