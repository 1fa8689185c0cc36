"""The `cuda` kernel's work, read plainly: what each query sees, and how often."""

from collections import Counter

import numpy as np
import pytest
from attention_trees import items_of, trees
from hypothesis import given
from hypothesis import strategies as st

from batchllm.attention.cuda_plan import (
    LARGE_ROWS,
    NO_PARTIAL,
    SMALL_ROWS,
    UnitCosts,
    WorkPlan,
    plan_units,
)

COSTS = st.builds(
    UnitCosts,
    large_key=st.sampled_from([0.5, 1.5, 4.0]),
    unit=st.sampled_from([0.0, 64.0]),
    partial_row=st.sampled_from([0.0, 1.0, 50.0]),
    least_keys=st.sampled_from([1, 3, 256]),
)
BLOCK_SIZE = 4


def seen_by_items(items):
    """(query, slot) pairs, by the definition of `AttentionItems`."""
    seen = Counter()
    for item in range(len(items)):
        blocks = items.blocks(item)
        for query in range(items.query_begin[item], items.query_end[item]):
            hidden = items.query_end[item] - 1 - query if items.own[item] else 0
            for place in range(items.kv_len[item] - hidden):
                slot = blocks[place // BLOCK_SIZE] * BLOCK_SIZE + place % BLOCK_SIZE
                seen[int(query), int(slot)] += 1
    return seen


def slots_of(work: WorkPlan, first, last, length):
    """Slots of the first `length` keys of the context that is the reads [first, last)."""
    for key in range(length):
        reads = [r for r in range(first, last) if work.read_key[r] <= key]
        place = key - work.read_key[reads[-1]]
        block = work.block_ids[work.read_block[reads[-1]] + place // BLOCK_SIZE]
        yield int(block) * BLOCK_SIZE + int(place) % BLOCK_SIZE


def seen_by_units(work, num_queries, group):
    """(query, slot) pairs, and the partial row at which each query's first head begins."""
    seen, partials = Counter(), {query: [] for query in range(num_queries)}
    rows_taken = Counter()
    for unit in work.units.tolist():
        query, count, first, last, begin, end, visible, causal, partial, is_small = unit
        assert count * group <= (SMALL_ROWS if is_small else max(LARGE_ROWS, group))
        assert begin < end <= visible + (count - 1) * causal
        slots = list(slots_of(work, first, last, end))
        for i in range(count):
            seen.update((query + i, slot) for slot in slots[begin : min(end, visible + i * causal)])
            partials[query + i].append(partial if partial == NO_PARTIAL else partial + i * group)
        if partial != NO_PARTIAL:
            rows_taken.update(range(partial, partial + count * group))
    assert max(rows_taken.values(), default=0) <= 1
    assert max(rows_taken, default=-1) < work.num_partial_rows
    return seen, partials


@given(trees(BLOCK_SIZE), st.sampled_from([1, 3, 4, 8, 20]), st.sampled_from([1, 40]), COSTS)
def test_units_read_what_the_items_say_once(items, group, num_blocks, costs):
    num_queries = int(items.query_end[items.own].max())
    work = plan_units(
        items, num_queries, group=group, num_kv_heads=2, num_blocks=num_blocks, costs=costs
    )
    seen, partials = seen_by_units(work, num_queries, group)
    assert seen == seen_by_items(items)
    merged = {}
    for index, query in enumerate(work.merge_query.tolist()):
        origins = work.merge_origins[slice(*work.merge_offsets[index : index + 2])]
        merged[query] = sorted((origins + query * group).tolist())
    for query, rows in partials.items():
        if len(rows) == 1:
            assert rows == [NO_PARTIAL] and query not in merged
        else:
            assert sorted(rows) == merged[query]


def plan(items, **costs):
    num_queries = int(items.query_end.max())
    return plan_units(
        items,
        num_queries,
        group=4,
        num_kv_heads=8,
        num_blocks=1,
        costs=UnitCosts(**costs),
    )


def group_of_decodes(members, shared, private):
    own = [(i, i + 1, private, True, shared) for i in range(members)]
    return items_of([*own, (0, members, shared, False, 0)], BLOCK_SIZE)


@pytest.mark.parametrize(
    "members, shared, apart", [(16, 2000, True), (16, 16, False), (1, 2000, False)]
)
def test_a_segment_is_read_apart_where_that_is_cheaper(members, shared, apart):
    work = plan(group_of_decodes(members, shared, 100))
    assert len(work.units) == members + bool(apart)
    assert len(work.merge_query) == (members if apart else 0)


def test_the_dearest_unit_comes_first_and_long_ones_are_cut():
    items = items_of([(0, 1, 40, True, 0), (1, 2, 5000, True, 0)], BLOCK_SIZE)
    work = plan_units(
        items, 2, group=4, num_kv_heads=1, num_blocks=8, costs=UnitCosts(least_keys=256)
    )
    lengths = (work.units[:, 5] - work.units[:, 4]).tolist()
    assert lengths == sorted(lengths, reverse=True)
    assert len(lengths) > 8 and min(lengths[:-1]) >= 256
    assert work.merge_query.tolist() == [1]
    assert isinstance(work.units, np.ndarray) and work.units.flags.c_contiguous
