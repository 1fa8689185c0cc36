"""The prefix tree against brute force, over a vocabulary so small that everything collides."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.errors import UsageError
from batchllm.prefix.plan import biggest_groups, plan_requests
from batchllm.prefix.policies.in_time import in_time
from batchllm.prefix.policies.registry import POLICIES, check_policy
from batchllm.prefix.policies.sample import sample_first
from batchllm.prefix.sorting import common_prefix_lengths, sort_sequences
from batchllm.prefix.tree import NO_NODE, build_tree, flat_tree
from batchllm.request import RaggedTokens, Request, SamplingParams

PROMPTS = st.lists(
    st.lists(st.sampled_from([0, 1, 256]), min_size=1, max_size=12), min_size=1, max_size=25
)


def distinct_prefixes(prompts):
    return len({tuple(p[:i]) for p in prompts for i in range(1, len(p) + 1)})


@given(PROMPTS)
def test_sorting_equals_python(prompts):
    order = sort_sequences(RaggedTokens.from_sequences(prompts))
    assert [prompts[i] for i in order] == sorted(prompts)


@given(PROMPTS, st.integers(1, 3))
def test_common_prefix_lengths_equal_brute_force(prompts, stretch):
    prompts = [[t for t in p for _ in range(stretch * 20)] for p in prompts]  # beyond one slab
    tokens = RaggedTokens.from_sequences(prompts)
    order = sort_sequences(tokens)
    expected = []
    for i, j in pairwise(order):
        same = [a == b for a, b in zip(prompts[i], prompts[j], strict=False)]
        expected.append(same.index(False) if False in same else len(same))
    assert common_prefix_lengths(tokens, order).tolist() == expected


@given(PROMPTS)
def test_tree_shares_exactly(prompts):
    tokens = RaggedTokens.from_sequences(prompts)
    tree = build_tree(tokens)
    assert tree.num_leaves == len({tuple(p) for p in prompts})
    assert sorted(tree.rows.tolist()) == list(range(len(prompts)))
    assert tree.num_distinct_prefixes == distinct_prefixes(prompts)
    # Every leaf's path of segments spells its prompt, and leaves at least one token to it.
    segments = []
    for leaf, row in enumerate(tree.leaf_row):
        assert tree.leaf_start[leaf] < tree.leaf_length[leaf] == len(prompts[row])
        node, end = tree.leaf_parent[leaf], tree.leaf_start[leaf]
        while node != NO_NODE:
            assert tree.node_end[node] == end
            assert tree.node_leaf_begin[node] <= leaf < tree.node_leaf_end[node]
            segments.append((node, tuple(prompts[row][:end])))
            node, end = tree.node_parent[node], tree.node_start[node]
        assert end == 0
    # A node is one prefix, and no two nodes are the same one: nothing is computed twice,
    assert len(dict(segments)) == len(set(segments)) == tree.num_nodes
    # but for last tokens, once for each leaf whose whole prompt begins another leaf's.
    unique = {tuple(p) for p in prompts}
    inner = sum(any(q[: len(p)] == p and q != p for q in unique) for p in unique)
    assert tree.num_repeated_tokens == inner


@given(PROMPTS, st.data())
def test_only_rows_with_equal_keys_merge(prompts, data):
    keys = data.draw(
        st.lists(st.sampled_from([-1, 0, 1]), min_size=len(prompts), max_size=len(prompts))
    )
    tree = build_tree(RaggedTokens.from_sequences(prompts), np.array(keys))
    pairs = [(tuple(p), k) for p, k in zip(prompts, keys, strict=True)]
    assert tree.num_leaves == len({p for p in pairs if p[1] >= 0}) + keys.count(-1)
    for leaf in range(tree.num_leaves):
        rows = tree.rows[tree.row_offsets[leaf] : tree.row_offsets[leaf + 1]]
        assert len({pairs[r] for r in rows}) == 1
        assert rows.tolist() == sorted(rows)


@given(PROMPTS)
def test_nodes_are_in_depth_first_order(prompts):
    tree = build_tree(RaggedTokens.from_sequences(prompts))
    for node in range(tree.num_nodes):
        below = [
            n
            for n in range(tree.num_nodes)
            if n != node
            and tree.node_leaf_begin[node] <= tree.node_leaf_begin[n]
            and tree.node_leaf_end[n] <= tree.node_leaf_end[node]
            and tree.node_start[n] >= tree.node_end[node]
        ]
        assert below == list(range(node + 1, tree.node_subtree_end[node]))


def test_flat_tree_shares_nothing():
    tree = flat_tree(RaggedTokens.from_sequences([[1, 2], [1, 2], [3]]))
    assert (tree.num_nodes, tree.num_leaves, tree.num_tokens) == (0, 3, 5)


def test_empty_window():
    tree = build_tree(RaggedTokens.from_sequences([]))
    assert (tree.num_nodes, tree.num_leaves, tree.num_tokens) == (0, 0, 0)


def requests(prompts, max_tokens=None, **params):
    max_tokens = max_tokens or [8] * len(prompts)
    return [
        Request(i, np.array(p, np.int32), SamplingParams(max_tokens=m, **params))
        for i, (p, m) in enumerate(zip(prompts, max_tokens, strict=True))
    ]


@pytest.mark.parametrize("policy", POLICIES)
@given(prompts=PROMPTS)
@settings(max_examples=40)
def test_every_policy_admits_every_leaf_once(policy, prompts):
    plan = plan_requests(requests(prompts), policy=policy)
    assert sorted(plan.leaf_order.tolist()) == list(range(plan.tree.num_leaves))


@pytest.mark.parametrize("policy", ["ratio", "dfs"])
@given(prompts=PROMPTS)
def test_planned_orders_keep_every_prefix_in_one_piece(policy, prompts):
    plan = plan_requests(requests(prompts), policy=policy)
    place = np.argsort(plan.leaf_order)
    for begin, end in zip(plan.tree.node_leaf_begin, plan.tree.node_leaf_end, strict=True):
        members = np.sort(place[begin:end])
        assert members[-1] - members[0] == end - begin - 1


def test_ratio_puts_decode_heavy_siblings_first_at_every_level():
    prompts = [
        [9, 1, 1, 1, 1, 5],  # group 1 below a common head: long prompt, short answers
        [9, 1, 1, 1, 1, 6],
        [9, 2, 7],  # group 2: short prompt, long answers
        [9, 2, 8],
    ]
    plan = plan_requests(requests(prompts, [1, 2, 50, 60]))
    assert plan.tree.leaf_row[plan.leaf_order].tolist() == [3, 2, 1, 0]


def test_dual_scan_mixes_rows_that_compute_with_rows_that_read():
    """Half of the groups prefill much, half decode much; wherever one cuts, both have been seen."""
    prompts, max_tokens = [], []
    for group in range(20):
        for member in range(4):
            heavy = group % 2 == 0
            prompts.append([group] * (200 if heavy else 5) + [member] * 3)
            max_tokens.append(2 if heavy else 400)
    plan = plan_requests(requests(prompts, max_tokens), policy="dual-scan")
    assert sorted(plan.leaf_order.tolist()) == list(range(80))
    heavy = np.array([max_tokens[row] == 2 for row in plan.tree.leaf_row[plan.leaf_order]])
    for begin in range(0, 80, 16):
        assert 0 < heavy[begin : begin + 16].sum() < 16
    # Each side is in one piece: the members of a group are admitted one behind the other.
    groups = np.array([prompts[row][0] for row in plan.tree.leaf_row[plan.leaf_order]])
    for side in (groups[heavy], groups[~heavy]):
        assert len(np.flatnonzero(np.diff(side))) == 9


@given(PROMPTS)
def test_a_sample_first_keeps_every_leaf_once(prompts):
    tree = build_tree(RaggedTokens.from_sequences(prompts))
    assert sample_first(tree, np.arange(tree.num_leaves)).tolist() == list(range(tree.num_leaves))


def test_a_sample_is_from_all_over_and_costs_little():
    short = [[i // 250, i % 250, 7] for i in range(1000)]  # four groups with a head of one token
    tree = build_tree(RaggedTokens.from_sequences(short))
    order = sample_first(tree, np.arange(1000))
    assert sorted(order.tolist()) == list(range(1000))
    assert set(order[:10] // 250) == {0, 1, 2, 3}
    assert (np.diff(order[10:]) > 0).all()
    heads = [[i // 250] * 900 + [i % 250, 7] for i in range(1000)]  # with heads of 900
    tree = build_tree(RaggedTokens.from_sequences(heads))
    order = sample_first(tree, np.arange(1000))
    assert order.tolist() == list(range(1000))  # one of them would be more than 1 % of the work


def test_table_order_follows_the_first_row():
    plan = plan_requests(requests([[5], [1], [5], [3]]), policy="table-order")
    assert plan.tree.leaf_row[plan.leaf_order].tolist() == [0, 1, 3]


def test_sampled_duplicates_stay_apart():
    prompts = [[1, 2, 3]] * 3
    assert plan_requests(requests(prompts)).tree.num_leaves == 1
    sampled = plan_requests(requests(prompts, temperature=1.0)).tree
    assert (sampled.num_leaves, sampled.num_tokens, sampled.num_repeated_tokens) == (3, 5, 2)


def test_biggest_groups_count_rows_and_savings():
    plan = plan_requests(requests([[1, 2, 3, 4], [1, 2, 3, 5], [1, 9], [1, 9]]))
    first, second = biggest_groups(plan.tree, 5)
    assert (first.num_rows, first.num_tokens, first.saved_tokens) == (4, 1, 3)
    assert (second.num_rows, second.num_tokens, second.depth) == (2, 2, 3)


def test_unknown_policy_names_the_known():
    with pytest.raises(UsageError, match="ratio, dfs, dual-scan"):
        check_policy("fastest")


@given(
    outputs=st.lists(st.integers(1, 30), min_size=1, max_size=30),
    pace=st.floats(0.1, 50),
    data=st.data(),
)
def test_long_answers_early_keep_the_others_in_order(outputs, pace, data):
    order = np.array(data.draw(st.permutations(range(len(outputs)))))
    lengths = np.array(outputs)
    moved = in_time(order, lengths, pace)
    assert sorted(moved.tolist()) == sorted(order.tolist())
    latest = len(order) * (1 - lengths * pace / lengths.sum())
    early = [leaf for place, leaf in enumerate(order.tolist()) if place <= latest[leaf]]
    assert [leaf for leaf in moved.tolist() if leaf in early] == early
    late = [leaf for leaf in moved.tolist() if leaf not in early]
    assert sorted(late, key=lambda leaf: -lengths[leaf]) == late  # the longest first


def test_an_answer_begins_when_it_will_be_through_with_the_others():
    order, lengths = np.arange(10)[::-1], np.array([10] * 9 + [30])
    assert in_time(order, lengths, 4.0).tolist() == [9, *range(8, -1, -1)]  # needs 30 steps of 30
    order = np.arange(10)  # of 60 steps, half have gone by at place 5
    assert in_time(order, lengths, 2.0).tolist() == [0, 1, 2, 3, 4, 5, 9, 6, 7, 8]
    assert in_time(order, np.full(10, 7), 3.0).tolist() == order.tolist()  # all are alike
