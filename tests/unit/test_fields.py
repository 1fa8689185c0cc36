"""The order of fields: savings by brute force, and advice that is right."""

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from batchllm.prefix.fields import Field, best_order, saved_characters
from batchllm.report.advice import advise_field_order

COLUMNS = st.integers(1, 12).flatmap(
    lambda rows: st.lists(
        st.lists(st.integers(0, 2), min_size=rows, max_size=rows), min_size=1, max_size=4
    )
)


def fields_of(columns):
    return [
        Field(f"c{i}", np.array(values), np.array([3 + i * v for v in values]))
        for i, values in enumerate(columns)
    ]


@given(COLUMNS)
def test_savings_equal_brute_force(columns):
    fields, seen, saved = fields_of(columns), set(), 0
    for row in range(len(columns[0])):
        for count in range(1, len(columns) + 1):
            prefix = (count, *(values[row] for values in columns[:count]))
            if prefix in seen:
                saved += int(fields[count - 1].lengths[row])
            seen.add(prefix)
    assert saved_characters(fields) == saved


@given(COLUMNS)
def test_at_every_place_no_other_field_saves_more(columns):
    fields = fields_of(columns)
    order = best_order(fields)
    assert sorted(f.name for f in order) == [f.name for f in fields]
    for place, field in enumerate(order):
        before = order[:place]
        saved = {f.name: saved_characters([*before, f]) for f in order[place:]}
        assert saved[field.name] == max(saved.values())


def movies():
    movie = [i % 10 for i in range(400)]
    return pa.table(
        {
            "review": [f"review number {i}" for i in range(400)],
            "info": [f"a long text about movie {m} " * 10 for m in movie],
            "year": [1990 + m % 3 for m in movie],
            "score": [1.5] * 400,
        }
    )


def test_advice_puts_the_shared_text_before_what_varies():
    (advice,) = advise_field_order(movies(), ["review", "info", "year", "score"])
    assert advice.startswith("review comes first")
    assert "info" in advice.split("in the order ")[1].split(",")[0]
    assert advice.split("in the order ")[1].split(", ")[3].startswith("review")


def test_no_advice_where_the_order_is_good_or_there_is_none():
    assert advise_field_order(movies(), ["info", "year", "score", "review"]) == []
    assert advise_field_order(movies(), ["review"]) == []
    assert advise_field_order(movies().slice(0, 0), ["review", "info"]) == []
