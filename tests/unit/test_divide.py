"""Divisions: every leaf once, no range costlier than it must be, nothing repeated for nothing."""

from itertools import combinations_with_replacement

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchllm.prefix.divide import (
    _SLACK,
    Costs,
    Rates,
    _Line,
    divide,
    divide_tree,
    leaf_costs,
    range_seconds,
    shared_with_previous,
)
from batchllm.prefix.tree import build_tree
from batchllm.request import RaggedTokens

RATES = Rates(prompt_token=1.0, pair=0.01, output_token=3.0, read=0.001)
PROMPTS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=6), min_size=1, max_size=12)


@st.composite
def some_costs(draw):
    count = draw(st.integers(1, 9))
    own = draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))
    repeated = draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))
    return Costs(np.array(own, float), np.array([0, *repeated[1:]], float))


def every_division(num_items, count):
    for cuts in combinations_with_replacement(range(num_items + 1), count - 1):
        yield np.array([0, *cuts, num_items])


def repeated_seconds(costs, bounds):
    begun = bounds[:-1][bounds[:-1] < bounds[1:]]
    return costs.repeated[begun].sum()


@given(some_costs(), st.integers(1, 4))
def test_no_ranges_are_better_than_those_chosen(costs, count):
    bounds = divide(costs, np.ones(count))
    assert len(bounds) == count + 1 and bounds[0] == 0 and bounds[-1] == len(costs.own)
    assert (np.diff(bounds) >= 0).all()
    best = min(range_seconds(costs, other).max() for other in every_division(len(costs.own), count))
    assert _Line.of(costs).least_limit(np.ones(count)) == pytest.approx(best)
    assert range_seconds(costs, bounds).max() <= best * (1 + _SLACK + 1e-9)


@given(some_costs(), st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_unequal_ranges_are_as_close_to_their_shares_as_can_be(costs, shares):
    shares = np.array(sorted(shares, reverse=True), float)
    bounds = divide(costs, shares)
    assert bounds[0] == 0 and bounds[-1] == len(costs.own) and (np.diff(bounds) >= 0).all()
    best = min(
        (range_seconds(costs, other) / shares).max()
        for other in every_division(len(costs.own), len(shares))
    )
    assert (range_seconds(costs, bounds) / shares).max() <= best * (1 + _SLACK + 1e-9)


@given(some_costs())
def test_of_two_ranges_as_good_those_that_repeat_least(costs):
    # Own costs this small are no reason to repeat anything.
    costs = Costs(costs.own / 100, costs.repeated)
    bounds = divide(costs, np.ones(2))
    limit = _Line.of(costs).least_limit(np.ones(2)) * (1 + _SLACK)
    least = min(
        repeated_seconds(costs, other)
        for other in every_division(len(costs.own), 2)
        if range_seconds(costs, other).max() <= limit
    )
    assert repeated_seconds(costs, bounds) == least


@given(some_costs(), st.integers(1, 12))
def test_ranges_are_balanced_but_for_an_item_and_a_prefix(costs, count):
    seconds = range_seconds(costs, divide(costs, np.ones(count)))
    fair = costs.own.sum() / count
    assert seconds.max() <= (fair + costs.own.max() + costs.repeated.max()) * (1 + _SLACK)


@given(PROMPTS, st.integers(1, 5), st.integers(1, 4))
def test_repeated_is_what_the_ranges_trees_have_more_of(prompts, count, granularity):
    tokens = RaggedTokens.from_sequences(prompts)
    tree = build_tree(tokens, granularity=granularity)
    division = divide_tree(tree, np.ones(tree.num_leaves, int), RATES, count)
    rows, total = [], 0
    for begin, end in zip(division.bounds[:-1], division.bounds[1:], strict=True):
        mine = tree.rows[tree.row_offsets[begin] : tree.row_offsets[end]]
        rows += mine.tolist()
        part = RaggedTokens.from_sequences([prompts[row] for row in mine])
        total += build_tree(part, granularity=granularity).num_tokens
    assert sorted(rows) == list(range(len(prompts)))
    assert division.repeated_tokens == total - tree.num_tokens


@given(PROMPTS)
def test_what_a_leaf_shares_with_the_one_before_it(prompts):
    tree = build_tree(RaggedTokens.from_sequences(prompts))
    leaves = [prompts[row] for row in tree.leaf_row]
    found = shared_with_previous(tree).tolist()
    assert found[0] == 0
    for left, right, shared in zip(leaves[:-1], leaves[1:], found[1:], strict=True):
        longest = min(len(left), len(right)) - 1  # a last token is its leaf's own
        assert shared == next((i for i in range(longest) if left[i] != right[i]), longest)


@given(PROMPTS)
def test_costs_add_up_to_those_of_the_tree(prompts):
    tree = build_tree(RaggedTokens.from_sequences(prompts))
    outputs = np.arange(1, tree.num_leaves + 1)
    prefill = Rates(prompt_token=1.0, pair=0.0, output_token=0.0, read=0.0)
    shared = shared_with_previous(tree)
    costs = leaf_costs(tree.leaf_length, shared, outputs, prefill)
    assert costs.own.sum() == tree.num_tokens and (costs.repeated == shared).all()
    pairs = Rates(prompt_token=0.0, pair=1.0, output_token=0.0, read=0.0)
    costs = leaf_costs(tree.leaf_length, shared, outputs, pairs)
    assert costs.own[0] == sum(range(1, len(prompts[tree.leaf_row[0]]) + 1))
    answers = Rates(prompt_token=0.0, pair=0.0, output_token=1.0, read=0.0)
    assert leaf_costs(tree.leaf_length, shared, outputs, answers).own.sum() == outputs.sum()


def test_groups_stay_whole_where_that_is_balanced():
    prompts = [[group] * 100 + [i] for group in range(6) for i in range(10)]
    tree = build_tree(RaggedTokens.from_sequences(prompts))
    outputs = np.ones(60, int)
    for count in (2, 3, 6):
        division = divide_tree(tree, outputs, RATES, count)
        assert division.repeated_tokens == 0
        assert np.diff(division.bounds).tolist() == [60 // count] * count


def test_a_group_larger_than_a_share_is_cut_where_least_is_repeated():
    # One document, in sections; what is asked about a section shares that, too.
    prompts = [[7] * 50 + [section] * 30 + [i] for section in range(4) for i in range(20)]
    tree = build_tree(RaggedTokens.from_sequences(prompts))
    division = divide_tree(tree, np.full(tree.num_leaves, 9), RATES, 2)
    assert division.bounds.tolist() == [0, 40, 80]
    assert division.repeated_tokens == 50
    assert division.seconds.max() < 1.1 * division.seconds.min()


def test_much_is_divided_with_little_loss():
    rng = np.random.default_rng(0)
    prompts = []
    for _ in range(40):
        document = rng.integers(0, 99, rng.integers(50, 400)).tolist()
        prompts += [document + rng.integers(0, 99, 20).tolist() for _ in range(rng.integers(5, 90))]
    tree = build_tree(RaggedTokens.from_sequences(prompts))
    division = divide_tree(tree, rng.integers(1, 60, tree.num_leaves), RATES, 4)
    assert division.repeated_tokens < 0.02 * tree.num_tokens
    assert division.seconds.max() < 1.02 * division.seconds.mean()


def test_more_engines_than_leaves_and_none_at_all():
    costs = Costs(np.array([3.0, 4.0]), np.array([0.0, 1.0]))
    assert np.diff(divide(costs, np.ones(5))).tolist() == [1, 1, 0, 0, 0]
    assert divide(Costs(np.zeros(0), np.zeros(0)), np.ones(3)).tolist() == [0, 0, 0, 0]
