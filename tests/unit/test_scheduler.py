"""Scheduler, pool and model input, run with the fake model under memory that barely suffices."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling import (
    EOS,
    MAX_MODEL_LEN,
    POISONED_ROWS,
    ROWS,
    CheckingEngine,
    driver,
    expected_answer,
    expected_ending,
    is_poisoned,
    requests,
)

from batchllm.cache.block_pool import BlockPool
from batchllm.engine import Engine
from batchllm.prefix.plan import plan_requests
from batchllm.runner.fake_runner import FakeRunner
from batchllm.scheduler.admission import Admission
from batchllm.scheduler.batch import StepOutput
from batchllm.scheduler.scheduler import Scheduler


def run(
    reqs,
    *,
    num_blocks,
    block_size=4,
    budget=16,
    max_num_seqs=64,
    policy="ratio",
    share=True,
    observed=(),
    fails=lambda context: False,
    ahead=False,
):
    plan = plan_requests(reqs, policy=policy, sharing=share)
    pool = BlockPool(num_blocks, block_size)
    scheduler = Scheduler(
        pool,
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=budget,
        max_num_seqs=max_num_seqs,
        eos_token_ids=EOS,
    )
    if observed:
        scheduler.lengths.observe(*map(np.array, observed))
    runner = FakeRunner(num_blocks, block_size, fails=fails)
    answers = {}
    tree = plan.tree
    for sequence in CheckingEngine(scheduler, driver(runner, ahead=ahead)).run(plan):
        for row in tree.rows[tree.row_offsets[sequence.leaf] : tree.row_offsets[sequence.leaf + 1]]:
            assert row not in answers, f"row {row} left twice"
            answers[int(row)] = sequence
    assert pool.num_used == 0, "blocks left behind"
    return plan, answers, scheduler, runner


def least_blocks(plan, block_size):
    """The least that fits every row."""
    probe = Scheduler(
        BlockPool(10_000, block_size),
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=1,
        max_num_seqs=1,
    )
    assert probe.add(plan) == []
    return max(probe.blocks_alone(leaf) for leaf in range(plan.tree.num_leaves))


@given(
    rows=ROWS,
    block_size=st.integers(1, 5),
    spare=st.integers(0, 30),
    budget=st.integers(1, 40),
    max_num_seqs=st.integers(1, 20),
    policy=st.sampled_from(["ratio", "dfs", "table-order"]),
    share=st.booleans(),
    ignore_eos=st.booleans(),
    too_short=st.booleans(),
    ahead=st.booleans(),
)
@settings(max_examples=300)
def test_every_row_is_answered_right_whatever_the_memory(
    rows, block_size, spare, budget, max_num_seqs, policy, share, ignore_eos, too_short, ahead
):
    reqs = requests(rows, ignore_eos=ignore_eos)
    plan = plan_requests(reqs, policy=policy, sharing=share)
    _, answers, scheduler, runner = run(
        reqs,
        num_blocks=least_blocks(plan, block_size) + spare,
        block_size=block_size,
        budget=budget,
        max_num_seqs=max_num_seqs,
        policy=policy,
        share=share,
        observed=([1] * 30, [16] * 30) if too_short else (),
        ahead=ahead,
    )
    assert len(answers) == len(rows)
    for i, (prompt, max_tokens) in enumerate(rows):
        expected = expected_answer(prompt, max_tokens, ignore_eos=ignore_eos)
        assert answers[i].output_token_ids.tolist() == expected
        assert answers[i].finish_reason == (
            "stop" if expected[-1] in EOS and not ignore_eos else "length"
        )
    sequences = {s.leaf: s for s in answers.values()}.values()
    sampled = sum(len(s.output_token_ids) for s in sequences)
    fresh = sum(s.num_fresh_prompt_tokens for s in sequences)
    assert fresh == plan.tree.num_tokens
    # Books: everything the runner computed is a first time or a repeat, each last token excepted.
    assert runner.num_computed_tokens == (
        fresh
        + sampled
        - len(sequences)
        + scheduler.stats.recomputed_tokens
        + scheduler.stats.vain_tokens
    )
    # In vain: a token at most for each that might have gone on and stopped, and only if ahead.
    limits = plan.max_tokens[plan.tree.leaf_row]
    early = sum(len(s.output_token_ids) < limits[s.leaf] for s in sequences)
    assert scheduler.stats.vain_tokens <= early * ahead
    if ignore_eos and policy != "table-order":
        # Lengths are known and prefixes in one piece: the projection never has to be repaired.
        assert scheduler.stats.preemptions == 0
        assert scheduler.stats.recomputed_tokens == 0
        assert scheduler.stats.computed_prompt_tokens == plan.tree.num_tokens


@given(
    rows=POISONED_ROWS,
    copies=st.integers(1, 2),
    block_size=st.integers(1, 5),
    spare=st.integers(0, 10),
    budget=st.integers(1, 40),
    policy=st.sampled_from(["ratio", "dfs", "table-order"]),
    share=st.booleans(),
    ahead=st.booleans(),
)
@settings(max_examples=300)
def test_rows_without_usable_logits_fail_and_no_others(
    rows, copies, block_size, spare, budget, policy, share, ahead
):
    """Whatever is shared, chunked, preempted (lengths learned are too short) or there twice."""
    rows = rows * copies
    reqs = requests(rows)
    plan = plan_requests(reqs, policy=policy, sharing=share)
    _, answers, _, _ = run(
        reqs,
        num_blocks=least_blocks(plan, block_size) + spare,
        block_size=block_size,
        budget=budget,
        policy=policy,
        share=share,
        observed=([1] * 30, [16] * 30),
        fails=is_poisoned,
        ahead=ahead,
    )
    for i, (prompt, max_tokens) in enumerate(rows):
        got = answers[i]
        assert (got.ending, got.output_token_ids.tolist()) == expected_ending(prompt, max_tokens)


def test_a_failed_rows_length_is_not_learned_from():
    rows = [([2, i], 9) for i in range(3, 40)]
    _, answers, scheduler, _ = run(requests(rows), num_blocks=50, fails=is_poisoned)
    assert {a.finish_reason for a in answers.values()} == {"error"}
    assert not scheduler.lengths.knows


@given(
    rows=ROWS,
    block_size=st.integers(1, 4),
    spare=st.integers(0, 12),
    budget=st.integers(2, 30),
    known=st.booleans(),
)
@settings(max_examples=150)
def test_a_look_at_the_head_alone_refuses_nobody_that_fits(rows, block_size, spare, budget, known):
    """With it and without it the batches are the same, where memory is short."""
    longest = max(min(len(p) + m - 1, MAX_MODEL_LEN) for p, m in rows)
    num_blocks = 6 + -(-longest // block_size) + spare

    def batches():
        scheduler = Scheduler(
            BlockPool(num_blocks, block_size),
            max_model_len=MAX_MODEL_LEN,
            max_num_batched_tokens=budget,
            max_num_seqs=64,
            eos_token_ids=EOS,
        )
        scheduler.lengths.observe(np.arange(1, 31), np.full(30, 30))
        seen = []
        runner = FakeRunner(num_blocks, block_size)
        engine = Engine(scheduler, runner, on_step=lambda b: seen.append(b.chunks))
        list(engine.run(plan_requests(requests(rows, ignore_eos=known))))
        return [(c.count.tolist(), c.start.tolist(), c.offset.tolist()) for c in seen]

    quick = batches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Admission, "_head_cannot_fit", lambda self, room: False)
        assert quick == batches()


def test_wrong_estimates_are_repaired_by_preemption():
    # Short answers first teach the estimator, then every answer is long.
    rows = [([i % 2, i // 2 % 2, i // 4 % 2, i // 8 % 2, i % 5, i], 40) for i in range(60)]
    reqs = requests(rows)
    plan = plan_requests(reqs, policy="table-order")
    pool = BlockPool(40, 4)
    scheduler = Scheduler(
        pool,
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=64,
        max_num_seqs=64,
        eos_token_ids=EOS,
    )
    scheduler.lengths.observe(np.ones(100), np.full(100, 40))
    answers = {
        int(plan.tree.leaf_row[s.leaf]): s
        for s in CheckingEngine(scheduler, FakeRunner(40, 4)).run(plan)
    }
    assert scheduler.stats.preemptions > 0
    for i, (prompt, max_tokens) in enumerate(rows):
        assert answers[i].output_token_ids.tolist() == expected_answer(prompt, max_tokens)


def test_a_row_that_cannot_fit_is_an_error_and_costs_no_other():
    rows = [([1] * 30, 30), ([2, 3], 4)]
    _, answers, _, _ = run(requests(rows), num_blocks=5)
    assert answers[0].finish_reason == "error"
    assert answers[1].output_token_ids.tolist() == expected_answer([2, 3], 4)


def test_one_step_holds_a_whole_tree_when_the_budget_allows():
    rows = [([1, 2, 3, 4, i], 1) for i in range(5, 15)]
    _, answers, scheduler, _ = run(requests(rows), num_blocks=50, budget=100)
    assert scheduler.stats.steps == 1
    assert len(answers) == 10


def test_prefill_chunks_share_steps_with_decodes():
    rows = [([0, 1], 12), ([1] * 20, 2)]
    reqs = requests(rows, ignore_eos=True)
    plan = plan_requests(reqs, policy="table-order")
    scheduler = Scheduler(
        BlockPool(50, 4), max_model_len=64, max_num_batched_tokens=5, max_num_seqs=8
    )
    mixed = []
    engine = Engine(
        scheduler,
        FakeRunner(50, 4),
        on_step=lambda b: mixed.append((b.num_decodes, b.num_tokens)),
    )
    list(engine.run(plan))
    assert any(decodes and tokens > decodes for decodes, tokens in mixed)
    assert all(tokens <= 5 for _, tokens in mixed)


def test_context_limit_ends_a_row():
    rows = [([1] * (MAX_MODEL_LEN - 2), 10)]
    _, answers, _, _ = run(requests(rows, ignore_eos=True), num_blocks=40)
    assert len(answers[0].output_token_ids) == 2


def test_repeated_decodes_stand_for_single_ones():
    """A batch that stands for several steps leaves the scheduler as those steps would."""
    rows = [([1, 2, 3, i], 9 + 3 * i) for i in range(5)]

    def steps(ends):
        plan = plan_requests(requests(rows, ignore_eos=True))
        scheduler = Scheduler(
            BlockPool(60, 2), max_model_len=64, max_num_batched_tokens=16, max_num_seqs=8
        )
        scheduler.add(plan)
        done, seen = [], []
        while scheduler.has_unfinished:
            batch = scheduler.schedule(ends)
            seen.append(batch.num_steps)
            tokens = np.zeros(len(batch.samples), dtype=np.int32)
            finished = scheduler.update(batch, StepOutput(tokens))
            done += [(s.leaf, len(s.output_token_ids)) for s in finished]
            scheduler.check()
        return done, sum(seen), len(seen), scheduler.stats, scheduler.pool.peak_used

    one, many = steps(None), steps(np.array([max_tokens for _, max_tokens in rows]))
    assert many[2] < one[2] == one[1]
    assert (one[0], one[1], one[3]) == (many[0], many[1], many[3])
    assert many[4] >= one[4]
