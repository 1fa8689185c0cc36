"""The arrays FlashInfer is called with, read as it documents them: who sees which slots."""

import math

import numpy as np
import pytest
from attention_trees import decode_trees, trees
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.attention.flashinfer_arrays import plan_calls
from batchllm.runner.model_input import AttentionItems


def seen_by_items(items, num_tokens, block_size):
    """The slots of each query's context, by the definition of items, sorted."""
    seen = [[] for _ in range(num_tokens)]
    for item in range(len(items)):
        slots = (items.blocks(item)[:, None] * block_size + np.arange(block_size)).ravel()
        end = int(items.query_end[item])
        for query in range(int(items.query_begin[item]), end):
            hidden = end - 1 - query if items.own[item] else 0
            seen[query].extend(slots[: int(items.kv_len[item]) - hidden].tolist())
    return [sorted(slots) for slots in seen]


def add_seen(seen, call, rows=None, covered=None):
    """What a call's entries see, added to their queries'."""
    for array in (call.qo_indptr, call.kv_indptr, call.kv_indices, call.last_page_len):
        assert array.dtype == np.int32
    assert call.qo_indptr[0] == call.kv_indptr[0] == 0
    assert call.kv_indptr[-1] == len(call.kv_indices)
    for i in range(len(call)):
        begin, end = call.qo_indptr[i : i + 2]
        assert begin < end
        pages = call.kv_indices[call.kv_indptr[i] : call.kv_indptr[i + 1]]
        last = call.last_page_len[i]
        assert 1 <= last <= call.page_size if len(pages) else last == 0
        slots = (pages[:, None] * call.page_size + np.arange(call.page_size)).ravel()
        slots = slots[: len(slots) - call.page_size + last]
        for query in range(begin, end):
            hidden = end - 1 - query if call.causal else 0
            assert covered is None or covered[query] == (len(pages) > 0)
            if len(pages):
                seen[query if rows is None else rows[query]].extend(
                    slots[: len(slots) - hidden].tolist()
                )


def seen_by_calls(calls, num_tokens):
    seen = [[] for _ in range(num_tokens)]
    if calls.decodes is not None:
        assert not calls.decodes.causal and (np.diff(calls.decodes.qo_indptr) == 1).all()
        count = num_tokens if calls.decode_rows is None else len(calls.decode_rows)
        assert len(calls.decodes) == count
        add_seen(seen, calls.decodes, calls.decode_rows)
    if calls.chunks is not None:
        assert calls.chunks.causal and calls.chunks.qo_indptr[-1] == num_tokens
        add_seen(seen, calls.chunks)
    for level in calls.levels:
        assert not level.call.causal and level.call.qo_indptr[-1] == num_tokens
        add_seen(seen, level.call, covered=level.covered)
    return [sorted(slots) for slots in seen]


@given(st.data(), st.sampled_from([1, 4, 16]))
@settings(max_examples=200)
def test_every_query_sees_its_context_once_however_much_is_folded(data, block_size):
    items = data.draw(trees(block_size))
    num_tokens = int(items.query_end.max())
    expected = seen_by_items(items, num_tokens, block_size)
    for fold_below in (0, 25, math.inf):
        calls = plan_calls(items, num_tokens, block_size, fold_below)
        assert seen_by_calls(calls, num_tokens) == expected
        assert fold_below < math.inf or not calls.levels


@given(st.data(), st.sampled_from([1, 4, 16]), st.integers(1, 9), st.integers(0, 2))
def test_a_step_of_decodes_can_have_as_few_levels_as_wanted(data, block_size, count, most_levels):
    items = data.draw(decode_trees(block_size, count))
    calls = plan_calls(items, count, block_size, 0, most_levels=most_levels, most_page_size=1)
    assert calls.chunks is None and calls.decode_rows is None and calls.decodes.page_size == 1
    assert len(calls.levels) <= most_levels
    assert seen_by_calls(calls, count) == seen_by_items(items, count, block_size)


def tree_step(block_size=8, shared=(24, 8)):
    """Two groups of three decodes below one root, a chunk of five in the first group.

    Own segments hold 5 tokens, the root `shared[0]`, the groups' nodes `shared[1]` each.
    """
    queries = np.array([1, 1, 5, 1, 1, 1])
    ends = np.cumsum(queries)
    root, node = shared
    kv_len = np.concatenate([np.full(6, 5), [root, node, node]])
    blocks = -(-kv_len // block_size)
    return AttentionItems(
        query_begin=np.concatenate([ends - queries, [0, 0, ends[2]]]),
        query_end=np.concatenate([ends, [ends[5], ends[2], ends[5]]]),
        kv_start=np.concatenate([np.full(6, root + node), [0, root, root]]),
        kv_len=kv_len,
        own=np.arange(9) < 6,
        block_offsets=np.concatenate([[0], np.cumsum(blocks)]),
        block_ids=np.arange(blocks.sum())[::-1].copy(),
    )


def test_decodes_and_chunks_are_called_apart_and_levels_go_by_depth():
    calls = plan_calls(tree_step(), 10, 8, fold_below=0)
    assert calls.decode_rows.tolist() == [0, 1, 7, 8, 9]
    assert calls.chunks.qo_indptr.tolist() == [0, 2, 7, 10]
    assert calls.chunks.last_page_len.tolist() == [0, 5, 0]
    assert [level.call.qo_indptr.tolist() for level in calls.levels] == [[0, 10], [0, 7, 10]]
    assert all(level.covered is None for level in calls.levels)
    assert [level.call.mean_queries for level in calls.levels] == [10, 5]


@pytest.mark.parametrize(
    ("fold_below", "levels", "page_size"), [(32, 2, 8), (33, 1, 8), (121, 0, 8), (0, 2, 8)]
)
def test_a_level_is_folded_where_little_is_read_again(fold_below, levels, page_size):
    # Three chunks in each of two groups read 8 tokens: 2 x 2 x 8 again; six read the root's 24.
    calls = plan_calls(tree_step(), 10, 8, fold_below)
    assert (len(calls.levels), calls.decodes.page_size) == (levels, page_size)


@pytest.mark.parametrize(("shared", "ends"), [((24, 8), [0, 10]), ((24, 80), [0, 7, 10])])
def test_of_too_many_levels_that_is_kept_where_most_would_be_read_again(shared, ends):
    (level,) = plan_calls(tree_step(shared=shared), 10, 8, fold_below=0, most_levels=1).levels
    assert level.call.qo_indptr.tolist() == ends


@pytest.mark.parametrize(
    ("shared", "page_size"), [((24, 8), 8), ((24, 12), 4), ((24, 7), 1), ((22, 8), 2)]
)
def test_pages_are_as_large_as_segments_allow(shared, page_size):
    items = tree_step(shared=shared)
    calls = plan_calls(items, 10, 8, math.inf)
    assert calls.decodes.page_size == calls.chunks.page_size == page_size
    assert seen_by_calls(calls, 10) == seen_by_items(items, 10, 8)


def test_queries_that_share_nothing_at_a_level_are_gaps():
    items = tree_step()
    keep = np.arange(9) != 7  # the first group's node
    items = AttentionItems(
        *[getattr(items, name)[keep] for name in ("query_begin", "query_end", "kv_start")],
        *[getattr(items, name)[keep] for name in ("kv_len", "own")],
        block_offsets=np.concatenate([[0], np.cumsum([1] * 6 + [3, 1])]),
        block_ids=np.arange(10),
    )
    level = plan_calls(items, 10, 8, fold_below=0).levels[1]
    assert level.call.qo_indptr.tolist() == [0, 7, 10]
    assert level.call.last_page_len.tolist() == [0, 8]
    assert level.covered.tolist() == [False] * 7 + [True] * 3
    assert level.call.mean_queries == 3
