"""Rules for the order of fields, against brute force and against their own definition."""

from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.prefix.dependencies import determined_fields
from batchllm.prefix.field_groups import greedy_groups, repeats_of_new_values
from batchllm.prefix.field_rules import OTHER, FieldRules
from batchllm.prefix.fields import (
    Field,
    best_order,
    joint_codes,
    saved_characters,
    saved_characters_by_row,
)
from batchllm.prefix.group_recursion import learn_rules


def tables(max_rows, max_fields, max_value=2, min_rows=1):
    """Columns of small numbers."""
    return st.integers(min_rows, max_rows).flatmap(
        lambda rows: st.lists(
            st.lists(st.integers(0, max_value), min_size=rows, max_size=rows),
            min_size=1,
            max_size=max_fields,
        )
    )


def fields_of(columns):
    """Fields in which a value's length is the value's own."""
    return [
        Field(f"c{i}", joint_codes(np.zeros(len(v), int), np.array(v)), 3 + 5 * i + np.array(v) * 7)
        for i, v in enumerate(columns)
    ]


def codes_of(fields):
    return np.array([field.codes for field in fields])


def brute_force_saved(fields, orders):
    seen, saved = set(), 0
    for row, order in enumerate(orders):
        for count in range(1, len(order) + 1):
            prefix = tuple((number, fields[number].codes[row]) for number in order[:count])
            if prefix in seen:
                saved += int(fields[order[count - 1]].lengths[row])
            seen.add(prefix)
    return saved


def ordered_by_definition(rules, row):
    """The first rule that fits, one row at a time."""
    for number, (field, value) in enumerate(
        zip(rules.fields.tolist(), rules.values.tolist(), strict=True)
    ):
        named = set(rules.values[rules.fields == field].tolist()) - {OTHER}
        if row[field] not in named if value == OTHER else row[field] == value:
            if number in rules.inner:
                return ordered_by_definition(rules.inner[number], row)
            return rules.orders[number].tolist()
    return rules.orders[-1].tolist()


@given(tables(8, 3), st.randoms(use_true_random=False))
def test_savings_by_row_equal_brute_force(columns, random):
    fields = fields_of(columns)
    orders = [random.sample(range(len(fields)), len(fields)) for _ in columns[0]]
    assert saved_characters_by_row(fields, np.array(orders)) == brute_force_saved(fields, orders)


def saved_by_learned_rules(fields):
    return saved_characters_by_row(fields, learn_rules(fields).order_rows(codes_of(fields)))


@settings(max_examples=60)
@given(tables(4, 3))
def test_learned_orders_lie_between_the_best_fixed_one_and_the_best_of_all(columns):
    fields = fields_of(columns)
    saved = saved_by_learned_rules(fields)
    assert saved >= max(saved_characters(fields), saved_characters(best_order(fields)))
    every = permutations(range(len(fields)))
    assert saved <= max(
        brute_force_saved(fields, orders) for orders in product(list(every), repeat=len(columns[0]))
    )


@pytest.mark.parametrize("seed", range(30))
def test_learned_orders_are_never_worse_than_fixed_ones(seed):
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(4, 80))
    fields = [
        Field(name, rng.integers(rng.integers(2, rows), size=rows), np.full(rows, length))
        for name, length in zip("abc", rng.integers(3, 200, size=3).tolist(), strict=True)
    ]
    saved = saved_by_learned_rules(fields)
    assert saved >= max(saved_characters(fields), saved_characters(best_order(fields)))


@settings(max_examples=40)
@given(tables(90, 5, max_value=6, min_rows=40), st.sampled_from([1, 3]))
def test_every_row_gets_all_fields_in_the_order_that_the_first_fitting_rule_says(columns, scale):
    fields = fields_of(columns)
    rules = learn_rules(fields, scale * len(columns[0]))
    # Values that no row had too.
    codes = np.where(np.arange(len(columns[0])) % 5 == 0, OTHER, codes_of(fields))
    orders = rules.order_rows(codes)
    assert (np.sort(orders, axis=1) == np.arange(len(fields))).all()
    assert orders.tolist() == [ordered_by_definition(rules, row) for row in codes.T]


def test_rules_with_others_and_inner_rules_are_read_as_defined():
    inner = FieldRules(np.array([2]), np.array([1]), np.array([[0, 2, 1], [0, 1, 2]]), {})
    rules = FieldRules(
        np.array([0, 1, 1]),
        np.array([4, OTHER, 7]),
        np.array([[0, 1, 2], [1, 0, 2], [1, 2, 0], [2, 1, 0]]),
        {0: inner},
    )
    rows = [[4, 7, 1], [4, 7, 2], [5, 8, 1], [5, OTHER, 1], [5, 7, 1], [OTHER, 7, 1]]
    expected = [[0, 2, 1], [0, 1, 2], [1, 0, 2], [1, 0, 2], [1, 2, 0], [1, 2, 0]]
    assert rules.order_rows(np.array(rows).T).tolist() == expected
    assert [ordered_by_definition(rules, row) for row in rows] == expected


def groups_by_definition(codes, lengths):
    """All groups weighed again at every step."""
    free, found = list(range(codes.shape[1])), []
    while True:
        gains = {}
        for place, field in enumerate(codes):
            for value in sorted(set(field.tolist())):
                rows = [r for r in free if field[r] == value]
                if len(rows) > 1:
                    gain = np.mean(lengths[place][field == value]) * (1 - 1 / len(rows))
                    gains[place, value] = gain, rows
        if not gains:
            return found
        most = max(gain for gain, _ in gains.values())
        place, value = next(key for key, (gain, _) in gains.items() if gain > most - 1e-9)
        rows = gains[place, value][1]
        found.append((place, value, rows))
        free = [r for r in free if r not in rows]


@settings(max_examples=100)
@given(tables(25, 4, max_value=5))
def test_greedy_groups_are_those_of_the_definition(columns):
    codes = np.array(columns)
    lengths = 1.0 + np.arange(len(codes))[:, None] * 3 + codes * 1.37
    groups = [(g.place, g.value, g.rows.tolist()) for g in greedy_groups(codes, lengths)]
    assert groups == groups_by_definition(codes, lengths)


@given(tables(12, 4))
def test_dependencies_equal_brute_force(columns):
    fields = fields_of(columns)
    for number, determined in enumerate(determined_fields(fields)):
        own = columns[number]
        for other in range(len(columns)):
            pairs = set(zip(own, columns[other], strict=True))
            holds = len(pairs) == len(set(own)) < len(own) and other != number
            assert (other in determined) == holds


def test_a_dependency_survives_few_errors_and_needs_repeats():
    movie = np.arange(3000) % 100
    title, unique = movie * 2, np.arange(3000)
    for errors, holds in ((10, True), (100, False)):
        wrong = title.copy()
        wrong[1000 : 1000 + errors] = 201 + np.arange(errors)
        fields = [Field(str(i), v, v) for i, v in enumerate((movie, wrong, unique))]
        assert (1 in determined_fields(fields)[0]) == holds
        assert determined_fields(fields)[2] == ()


def test_rows_that_share_different_fields_are_ordered_differently():
    """One half repeats a text in one field, the other half in the other."""
    half = np.arange(400) < 200
    unique = 1000 + np.arange(400)
    fields = [
        Field("a", np.where(half, np.arange(400) % 5, unique), np.full(400, 90)),
        Field("b", np.where(half, unique, np.arange(400) % 4), np.full(400, 80)),
    ]
    orders = learn_rules(fields).order_rows(codes_of(fields))
    assert orders[:, 0].tolist() == [0] * 200 + [1] * 200
    saved = saved_characters_by_row(fields, orders)
    assert saved == (200 - 5) * 90 + (200 - 4) * 80
    assert saved > 1.8 * saved_characters(best_order(fields))


def test_a_frequent_short_value_does_not_tear_apart_a_long_text_that_few_share():
    """By the paper's weight, 10² for 2,000 rows would come before 400² for two."""
    count = 4000
    fields = [
        Field("stars", np.arange(count) % 2, np.full(count, 10)),
        Field("text", np.arange(count) // 2, np.full(count, 400)),
    ]
    orders = learn_rules(fields).order_rows(codes_of(fields))
    assert (orders[:, 0] == 1).all()


def test_what_groups_share_comes_first_among_what_they_determine():
    movie = np.arange(600) % 60
    fields = [
        Field("movie", movie, np.full(600, 20)),
        Field("text", movie, np.full(600, 300)),
        Field("genre", movie % 3, np.full(600, 30)),
        Field("review", np.arange(600), np.full(600, 100)),
    ]
    orders = learn_rules(fields).order_rows(codes_of(fields))
    assert (orders[:, 0] == 2).all() and (orders[:, 3] == 3).all()


def popular(count, rows, rng):
    weights = 1 / np.arange(1, count + 1)
    return rng.permutation(count)[rng.choice(count, rows, p=weights / weights.sum())]


def test_rules_from_a_small_sample_are_good_for_the_whole_table():
    """Most movies are not in the sample, or once; critics are. The movie must come first."""
    rng = np.random.default_rng(0)
    rows = 40_000
    movie, critic = popular(2000, rows, rng), popular(200, rows, rng)
    columns = [np.arange(rows), critic, movie, movie]
    sizes = [200, 50, 20, 600]
    fields = [
        Field(str(i), c, np.full(rows, s))
        for i, (c, s) in enumerate(zip(columns, sizes, strict=True))
    ]
    sample = np.arange(1000) * rows // 1000
    rules = learn_rules([field.take(sample) for field in fields], rows)
    codes = [np.where(np.isin(c, c[sample]), c, OTHER) for c in columns]
    saved = saved_characters_by_row(fields, rules.order_rows(np.array(codes)))
    assert saved >= 0.99 * saved_characters(best_order(fields))
    alone = learn_rules([field.take(sample) for field in fields])  # as if this were all
    assert saved > 1.1 * saved_characters_by_row(fields, alone.order_rows(np.array(codes)))


def test_repeats_of_new_values_are_as_good_and_turing_say():
    assert repeats_of_new_values(np.array([OTHER, OTHER, OTHER, OTHER, 1, 1, 2, 2, 3, 3, 3])) == 1.0
    assert repeats_of_new_values(np.array([OTHER, OTHER])) == 0.0
    assert repeats_of_new_values(np.array([1, 1])) == 0.0


@pytest.mark.parametrize("rows", [0, 1])
def test_tables_without_repeats_keep_their_order(rows):
    fields = [Field(n, np.arange(rows), np.full(rows, 5)) for n in "ab"]
    assert learn_rules(fields).order_rows(codes_of(fields)).tolist() == [[0, 1]] * rows
    assert learn_rules([]).order_rows(np.zeros((0, 2), dtype=np.int64)).shape == (2, 0)
