"""The scheduler's parts, each against its definition: timeline, fit, counts, blocks, lengths."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling import MAX_MODEL_LEN, ROWS, requests

from batchllm.cache.block_counts import BlockCounts
from batchllm.cache.block_pool import BlockPool
from batchllm.cache.block_table import BlockTables
from batchllm.prefix.plan import plan_requests, plan_tokens
from batchllm.request import RaggedTokens, SamplingParams
from batchllm.scheduler.fitting import Demand, how_many_fit
from batchllm.scheduler.lengths import LengthEstimator
from batchllm.scheduler.projection import Projection
from batchllm.scheduler.state import ChildCount, Segments
from batchllm.scheduler.timeline import Timeline, first_sample_step, sequence_events


@given(
    st.lists(
        st.tuples(st.integers(1, 12), st.integers(0, 6), st.integers(1, 12)), min_size=1, max_size=8
    ),
    st.integers(1, 5),
    st.integers(0, 20),
)
def test_timeline_equals_a_step_by_step_count(sequences, block_size, passed):
    """Sequences added and taken back, with some steps in between."""
    timeline = Timeline()
    private, start, left = np.array(sequences, dtype=np.int64).T
    finish = start + left - 1
    events = sequence_events(private, start, finish, block_size)
    first = int((-(-private // block_size)).sum())

    def held(step):
        grown = np.clip(step - start, 0, left - 1)
        return int(np.where(step <= finish, -(-(private + grown) // block_size), 0).sum())

    timeline.add(np.array([0]), np.array([first]))
    timeline.add(events.steps, events.amounts)
    for step in range(passed):
        timeline.advance(1)
        assert timeline.held_in(step + 1) == held(step + 1)
        if step % 3 == 0:  # what is kept from the last time must be right too
            check_ahead(timeline, held)
    check_ahead(timeline, held)
    timeline.add(events.steps, -events.amounts)
    timeline.add(np.array([0]), np.array([-first]))
    assert timeline.fullest() == (passed, 0) and timeline.held_in(passed + 50) == 0


def check_ahead(timeline, held):
    ahead = timeline.ahead().tolist()
    assert ahead == [held(timeline.now + i) for i in range(len(ahead))]
    assert held(timeline.now + len(ahead)) == ahead[-1]
    fullest, most = timeline.fullest()
    assert most == max(ahead) == ahead[fullest - timeline.now]
    assert most not in ahead[: fullest - timeline.now]


@given(
    held=st.lists(st.integers(0, 20), min_size=1, max_size=15),
    rows=st.lists(
        st.tuples(*(st.integers(1, 12), st.integers(0, 6), st.integers(1, 12), st.integers(0, 3))),
        min_size=1,
        max_size=8,
    ),
    block_size=st.integers(1, 5),
    num_blocks=st.integers(1, 60),
    margin=st.sampled_from([0.0, 0.3, 1.7]),
)
@settings(max_examples=500)
def test_as_many_fit_as_a_step_by_step_count_says(held, rows, block_size, num_blocks, margin):
    now = 7
    private, start, left, lasting = np.array(rows, dtype=np.int64).T
    start, finish = start + now, start + now + left - 1
    demand = Demand(private, start, finish, lasting, block_size)
    spare = margin * np.sqrt(np.arange(1, len(rows) + 1))

    def peak(count):
        most = 0
        for step in range(now, now + 40):
            blocks = held[min(step - now, len(held) - 1)]
            for p, s, f, more in zip(private, start, finish, lasting, strict=True):
                if count > 0:
                    grown = max(0, step - s)
                    blocks += more + (-(-(p + grown) // block_size) if step <= f else 0)
                count -= 1
            count += len(rows)
            most = max(most, int(blocks))
        return most

    expected = 0
    while expected < len(rows) and peak(expected + 1) + spare[expected] <= num_blocks:
        expected += 1
    assert how_many_fit(np.array(held), now, demand, spare, num_blocks) == expected
    assert demand.at_most() + max(held) >= peak(len(rows))


@given(
    st.integers(1, 60),
    st.lists(st.integers(3, 14), max_size=10),
    st.integers(1, 9),
)
def test_first_sample_step_equals_a_step_by_step_simulation(tokens, finishes, budget):
    now, left, step = 3, tokens, 3
    while left > 0:
        step += 1
        left -= max(0, budget - sum(finish >= step for finish in finishes))
    assert first_sample_step(tokens, np.array(finishes, dtype=np.int64), budget, now) == step


@given(rows=ROWS, data=st.data())
@settings(max_examples=100)
def test_projection_adds_up_when_many_are_expected_later_at_once(rows, data):
    state = Segments(plan_requests(requests(rows)), MAX_MODEL_LEN)
    projection = Projection(state, 3)
    leaves, nodes = np.flatnonzero(state.leaf >= 0), np.flatnonzero(state.leaf < 0)
    nobody = leaves[:0]  # waits

    def expected(of):
        steps = st.lists(st.integers(0, 9), min_size=len(of), max_size=len(of))
        start = np.array(data.draw(steps), dtype=np.int64) + projection.now
        return start, start + data.draw(steps)

    projection.admit(leaves, *expected(leaves), nodes)
    projection.check(leaves, nodes, nobody)
    for _ in range(3):
        some = leaves[: data.draw(st.integers(1, len(leaves)))]
        projection.revise(some, *expected(some))
        projection.check(leaves, nodes, nobody)
        assert projection.latest_start >= projection.start[leaves].max()
        projection.advance(data.draw(st.integers(0, 12)))


@given(st.data())
@settings(max_examples=200)
def test_child_counts_tell_which_nodes_have_a_member(data):
    parents = data.draw(st.lists(st.integers(-1, 12), min_size=1, max_size=14))
    parent = np.array([min(p, i - 1) for i, p in enumerate(parents)], dtype=np.int64)
    leaves = np.setdiff1d(np.arange(len(parent)), parent)
    count, members = ChildCount(parent), set()

    def ancestors(segment):
        found = []
        while (segment := int(parent[segment])) >= 0:
            found.append(segment)
        return found

    for _ in range(4):
        some = np.array(sorted(data.draw(st.sets(st.sampled_from(leaves.tolist())))), np.int64)
        before = {a for m in members for a in ancestors(m)}
        adding = data.draw(st.booleans())
        some = some[np.isin(some, list(members), invert=adding)]
        changed = count.add(some) if adding else count.remove(some)
        members = members | set(some.tolist()) if adding else members - set(some.tolist())
        after = {a for m in members for a in ancestors(m)}
        assert len(changed) == len(set(changed.tolist()))
        assert set(changed.tolist()) == before ^ after
        assert set(np.flatnonzero(count.children).tolist()) == after
        if not adding:  # descendants first
            place = {node: i for i, node in enumerate(changed.tolist())}
            assert all(place[n] < place[a] for n in place for a in ancestors(n) if a in place)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=60))
def test_block_tables_keep_everyones_blocks(moves):
    pool = BlockPool(40, 4)
    tables, held = BlockTables(pool, 10), {owner: [] for owner in range(10)}
    for owner, blocks in moves:
        who = np.array([owner, (owner + 1) % 10])
        if blocks == 0:
            tables.release(who)
            held |= {int(w): [] for w in who}
            continue
        wanted = np.maximum([blocks, blocks // 2], [len(held[int(w)]) for w in who])
        if (wanted - tables.num_held[who]).sum() > pool.num_free:
            continue
        tables.grow(who, wanted)
        for w, count, row in zip(who.tolist(), wanted, tables.gather(who), strict=True):
            assert row[: len(held[w])].tolist() == held[w], "blocks moved"
            held[w] = row[:count].tolist()
        pool.check(tables.held())
    assert sorted(tables.held().tolist()) == sorted(b for blocks in held.values() for b in blocks)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=60))
def test_block_counts_count_what_block_tables_hold(moves):
    pools = BlockPool(40, 4), BlockPool(40, 4)
    holders = BlockTables(pools[0], 10), BlockCounts(pools[1], 10)
    for owner, blocks in moves:
        who = np.array([owner, (owner + 1) % 10])
        wanted = np.maximum(holders[0].num_held[who], [blocks, blocks // 2])
        for holder, pool in zip(holders, pools, strict=True):
            if blocks == 0:
                holder.release(who)
            elif (wanted - holder.num_held[who]).sum() <= pool.num_free:
                holder.grow(who, wanted)
                having = who[holder.num_held[who] > 0]
                if len(having) <= pool.num_free:
                    holder.append(having)
            holder.check()
        assert np.array_equal(holders[0].num_held, holders[1].num_held)
        assert pools[0].num_free == pools[1].num_free
        assert pools[0].peak_used == pools[1].peak_used


def test_freed_blocks_come_again_at_once_and_in_order_once_all_are_free():
    pool = BlockPool(8, 4)
    first, second = pool.allocate(3), pool.allocate(2)
    pool.free(second[::-1])
    assert pool.allocate(2).tolist() == second[::-1].tolist()
    pool.free(first[[2, 0, 1]])
    pool.free(second)
    assert pool.allocate(8).tolist() == list(range(8))


def test_block_tables_take_more_owners_than_they_had_rows_for():
    pool = BlockPool(1000, 4)
    tables = BlockTables(pool, 500)
    tables.grow(np.arange(500), np.full(500, 2))
    assert np.unique(tables.gather(np.arange(500))).size == 1000
    tables.release(np.arange(0, 500, 2))
    tables.grow(np.arange(0, 40, 2), np.full(20, 20))
    pool.check(tables.held())


@given(st.lists(st.integers(0, 7), max_size=200))
def test_pool_keeps_its_books(moves):
    pool, held = BlockPool(17, 4), []
    for move in moves:
        if move < 5 and pool.num_free >= move:
            held.append(pool.allocate(move))
        elif held:
            pool.free(held.pop(move % len(held)))
        flat = np.concatenate([np.zeros(0, np.int32), *held])
        pool.check(flat)
        assert pool.num_used == len(flat) <= pool.peak_used


def test_pool_notices_a_double_free():
    pool = BlockPool(2, 4)
    blocks = pool.allocate(2)
    pool.free(blocks)
    with pytest.raises(AssertionError, match="twice"):
        pool.free(blocks)


def remaining(lengths, num_outputs, *, known=False):
    each = np.array([num_outputs])
    return int(lengths.remaining(each, np.array([100]), np.array([known])).tokens[0])


def test_lengths_are_learned_and_bounded():
    lengths = LengthEstimator()
    assert remaining(lengths, 0) == 100
    for _ in range(30):
        lengths.observe(np.full(100, 20), np.full(100, 100))
    assert remaining(lengths, 0) == 20
    assert remaining(lengths, 15) == 5
    assert remaining(lengths, 40) == 40  # outlived all: as long again
    assert remaining(lengths, 70) == 30
    assert remaining(lengths, 50, known=True) == 50


def test_lengths_are_expected_of_those_that_got_as_far():
    lengths = LengthEstimator()
    lengths.observe(np.array([10, 90] * 500), np.full(1000, 100))
    mean, deviation = 50, 40
    assert remaining(lengths, 0) == mean + deviation / 4
    assert remaining(lengths, 10) == 80
    lengths.observe(np.full(5000, 30), np.full(5000, 100))  # only the recent count
    assert remaining(lengths, 0) == 30


def test_lengths_are_drawn_as_recent_ones_were():
    prompts = [np.array([i, j], np.int32) for i in range(100) for j in range(20)]
    params = [SamplingParams(max_tokens=100), SamplingParams(max_tokens=7, ignore_eos=True)]
    index = np.arange(2000) % 10 // 9
    plan = plan_tokens(RaggedTokens.from_sequences(prompts), params, index, policy="dfs")
    known = index[plan.tree.leaf_row] == 1
    lengths = LengthEstimator()
    assert lengths.drawn(plan)[~known].tolist() == [100] * 1800
    assert not lengths.knows_of(plan)
    lengths.observe(np.array([10, 10, 10, 90] * 50), np.full(200, 100))
    drawn = lengths.drawn(plan)
    assert lengths.knows_of(plan)
    assert drawn[known].tolist() == [7] * 200
    assert set(drawn[~known].tolist()) == {10, 90}
    assert 0.2 < (drawn[~known] == 90).mean() < 0.3
    assert np.array_equal(lengths.drawn(plan), drawn)


def test_one_token_is_known_to_be_one():
    plan = plan_tokens(RaggedTokens.from_sequences([[1], [2]]), [SamplingParams(max_tokens=1)])
    assert LengthEstimator().knows_of(plan)
