"""Batches in halves: nothing is lost, and the first needs nothing of the second's."""

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling import (
    EOS,
    MAX_MODEL_LEN,
    ROWS,
    CheckingEngine,
    driver,
    expected_answer,
    fill_carried,
    requests,
)

from batchllm.cache.block_pool import BlockPool
from batchllm.prefix.plan import plan_requests
from batchllm.runner.fake_runner import FakeRunner
from batchllm.runner.model_input import build_model_input
from batchllm.scheduler.batch import Batch, Carried, Chunks, Samples, SharedReads, StepOutput
from batchllm.scheduler.scheduler import Scheduler
from batchllm.scheduler.split import split_batch, split_rows

BLOCK_SIZE = 4


class InHalves:
    """Runs a step's halves one after the other, each by the fake model."""

    def __init__(self, runner):
        self.runner = runner
        self.num_split = 0

    def execute(self, batch):
        if batch.num_tokens < 2:
            return self.runner.execute(batch)
        self.num_split += 1
        halves = split_batch(batch)
        check(batch, halves)
        tokens = np.full(len(batch.samples), -7, np.int32)
        for half in halves:
            tokens[half.sample] = self.runner.execute(half.batch).token_ids
        return StepOutput(tokens)


def check(batch, halves):
    first, second = (build_model_input(half.batch, BLOCK_SIZE) for half in halves)
    whole = build_model_input(batch, BLOCK_SIZE)
    assert len(first.slots) and len(second.slots)
    both = np.concatenate([first.slots, second.slots])
    assert sorted(both.tolist()) == sorted(whole.slots.tolist())
    assert not set(read_slots(first)) & set(second.slots.tolist())
    assert sum(half.batch.num_decodes for half in halves) <= len(batch.chunks)
    for half in halves:
        samples, of_all = half.batch.samples, batch.samples.take(half.sample)
        for name in ("sequence", "leaf", "row_index", "output_position", "params_index"):
            np.testing.assert_array_equal(getattr(samples, name), getattr(of_all, name))


def read_slots(step):
    for item in range(len(step.items)):
        blocks = step.items.blocks(item)[:, None] * BLOCK_SIZE + np.arange(BLOCK_SIZE)
        yield from blocks.ravel()[: step.items.kv_len[item]].tolist()


@given(ROWS, st.integers(1, 40), st.integers(0, 60), st.booleans())
@settings(max_examples=150)
def test_halves_answer_as_the_whole(rows, budget, spare, ahead):
    reqs = requests(rows)
    plan = plan_requests(reqs, policy="dfs")
    longest = max(len(prompt) + most for prompt, most in rows)
    num_blocks = 2 * -(-min(longest, MAX_MODEL_LEN) // BLOCK_SIZE) + 20 + spare
    scheduler = Scheduler(
        BlockPool(num_blocks, BLOCK_SIZE),
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=budget,
        max_num_seqs=64,
        eos_token_ids=EOS,
    )
    runner = InHalves(FakeRunner(num_blocks, BLOCK_SIZE))
    tree = plan.tree
    for sequence in CheckingEngine(scheduler, driver(runner, ahead=ahead)).run(plan):
        for row in tree.rows[tree.row_offsets[sequence.leaf] : tree.row_offsets[sequence.leaf + 1]]:
            assert sequence.output_token_ids.tolist() == expected_answer(*rows[row])


def batch_of(count, offset, samples, *, carried=(), shared=()):
    """Chunks with tokens 100, 101, …, a table each of its own blocks."""
    count, offset = np.array(count), np.array(offset)
    chunk = np.array(samples)
    params = np.zeros(len(chunk), np.int64)
    token, sample = np.array(carried, np.int64).reshape(-1, 2).T
    begin, end, start, length = np.array(shared, np.int64).reshape(-1, 4).T
    tables = np.arange((len(count) + len(begin)) * 8, dtype=np.int32).reshape(-1, 8)
    return Batch(
        token_ids=np.arange(100, 100 + count.sum(), dtype=np.int32),
        chunks=Chunks(count, offset, offset),
        shared=SharedReads(begin, end, start, length),
        tables=tables,
        samples=Samples(chunk, chunk + 10, chunk, chunk, params, params, params=[]),
        num_decodes=0,
        carried=Carried(token, sample),
    )


def test_decodes_and_prompts_are_both_halved():
    batch = batch_of([1, 1, 1, 1, 8, 4], [9, 9, 9, 9, 0, 0], [0, 1, 2, 3, 5])
    first, second = split_batch(batch)
    assert first.batch.chunks.count.tolist() == [1, 1, 6]
    assert second.batch.chunks.count.tolist() == [1, 1, 2, 4]
    assert second.batch.chunks.offset.tolist() == [9, 9, 6, 0]
    assert second.batch.chunks.start.tolist() == [9, 9, 6, 0]
    assert first.batch.token_ids.tolist() == [100, 101, *range(104, 110)]
    assert (first.sample.tolist(), second.sample.tolist()) == ([0, 1], [2, 3, 4])
    assert second.batch.samples.chunk.tolist() == [0, 1, 3]


def test_what_needs_or_is_needed_keeps_its_place():
    """A chunk of one token that nothing was before, and one that samples nothing."""
    for count, offset, samples in (
        ([4, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 2, 3, 4]),
        ([1, 1, 1, 1, 4], [5, 5, 5, 5, 0], [4]),
    ):
        first, second = split_batch(batch_of(count, offset, samples))
        assert first.batch.token_ids.tolist() == [100, 101, 102, 103]
        assert second.batch.token_ids.tolist() == [104, 105, 106, 107]


def test_the_half_with_fewer_tokens_reads_more():
    """All of the prompt is in one chunk's second half; the decodes are with the first."""
    batch = batch_of([1] * 10 + [30], [29] * 10 + [0], range(10))
    first, second = (half.batch for half in split_batch(batch))
    reads = [int((part.chunks.offset + part.chunks.count).sum()) for part in (first, second)]
    tokens = [part.num_tokens for part in (first, second)]
    assert sum(tokens) == 40
    assert abs(tokens[0] / 40 + reads[0] / 330 - 1) < 0.15


def test_segments_are_read_by_who_is_left_of_their_readers():
    batch = batch_of([1] * 6, [5] * 6, range(6), shared=[(0, 2, 0, 7), (1, 5, 0, 8), (4, 6, 0, 9)])
    first, second = (half.batch for half in split_rows(batch, 3))
    columns = ("chunk_begin", "chunk_end", "length")
    read = [[getattr(part.shared, name).tolist() for name in columns] for part in (first, second)]
    assert read == [[[0, 1], [2, 3], [7, 8]], [[0, 1], [2, 3], [8, 9]]]
    assert first.tables[3:, 0].tolist() == [48, 56] and second.tables[3:, 0].tolist() == [56, 64]


def test_carried_tokens_go_with_their_places():
    batch = batch_of([1, 1, 5, 1], [5, 5, 0, 5], [0, 1, 2, 3], carried=[(7, 2), (0, 1), (1, 0)])
    sampled = np.array([901, 902, 903], np.int32)
    whole = split_batch(
        replace(fill_carried(batch, sampled), carried=Carried(*[np.zeros(0, int)] * 2))
    )
    for half, filled in zip(split_batch(batch), whole, strict=True):
        got = fill_carried(half.batch, sampled).token_ids
        np.testing.assert_array_equal(got, filled.batch.token_ids)
