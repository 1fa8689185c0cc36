"""Scheduler, pool and model input, run with the fake model under memory that barely suffices."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.cache.block_pool import BlockPool
from batchllm.engine import Engine
from batchllm.prefix.plan import plan_requests
from batchllm.request import Request, SamplingParams
from batchllm.runner.fake_runner import FakeRunner, fake_token
from batchllm.scheduler.lengths import LengthEstimator
from batchllm.scheduler.projection import Projection, first_sample_steps
from batchllm.scheduler.scheduler import Scheduler

MAX_MODEL_LEN = 64
EOS = frozenset({7})


def requests(rows, **params):
    return [
        Request(i, np.array(p, np.int32), SamplingParams(max_tokens=m, **params))
        for i, (p, m) in enumerate(rows)
    ]


def expected_answer(prompt, max_tokens, *, ignore_eos=False, vocab=50):
    context, answer = list(prompt), []
    while len(answer) < min(max_tokens, MAX_MODEL_LEN - len(prompt)):
        token = fake_token(context, vocab)
        answer.append(token)
        context.append(token)
        if token in EOS and not ignore_eos:
            break
    return answer


class CheckingEngine(Engine):
    """Checks the pool's and the tree's books after every step."""

    def step(self):
        finished = super().step()
        held, nodes = [], {}
        scheduler = self.scheduler
        for sequence in [*scheduler._running.values(), *scheduler._waiting]:
            held += sequence.segment.block_ids
            nodes |= {node.order: node for node in sequence.path}
        for node in nodes.values():
            held += node.segment.block_ids
            users = [s for s in scheduler._running.values() if node in s.path]
            assert node.num_running == len(users)
        scheduler.pool.check(held)
        return finished


def run(reqs, *, num_blocks, block_size=4, budget=16, max_num_seqs=64, policy="ratio", share=True):
    plan = plan_requests(reqs, policy=policy, sharing=share)
    pool = BlockPool(num_blocks, block_size)
    scheduler = Scheduler(
        pool,
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=budget,
        max_num_seqs=max_num_seqs,
        eos_token_ids=EOS,
    )
    runner = FakeRunner(num_blocks, block_size)
    answers = {}
    for sequence in CheckingEngine(scheduler, runner).run(plan):
        tree = plan.tree
        for row in tree.rows[tree.row_offsets[sequence.leaf] : tree.row_offsets[sequence.leaf + 1]]:
            assert row not in answers, f"row {row} left twice"
            answers[int(row)] = sequence
    assert pool.num_used == 0, "blocks left behind"
    return plan, answers, scheduler, runner


ROWS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 1), min_size=1, max_size=20),
        st.integers(1, 16),
    ),
    min_size=1,
    max_size=20,
)


@given(
    rows=ROWS,
    block_size=st.integers(1, 5),
    spare=st.integers(0, 30),
    budget=st.integers(1, 40),
    max_num_seqs=st.integers(1, 20),
    policy=st.sampled_from(["ratio", "dfs", "table-order"]),
    share=st.booleans(),
    ignore_eos=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_every_row_is_answered_right_whatever_the_memory(
    rows, block_size, spare, budget, max_num_seqs, policy, share, ignore_eos
):
    reqs = requests(rows, ignore_eos=ignore_eos)
    probe = Scheduler(
        BlockPool(10_000, block_size),
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=1,
        max_num_seqs=1,
    )
    plan = plan_requests(reqs, policy=policy, sharing=share)
    need = max(probe.blocks_alone(s) for s in probe.add(plan))  # the least that fits every row
    _, answers, scheduler, runner = run(
        reqs,
        num_blocks=need + spare,
        block_size=block_size,
        budget=budget,
        max_num_seqs=max_num_seqs,
        policy=policy,
        share=share,
    )
    assert len(answers) == len(rows)
    for i, (prompt, max_tokens) in enumerate(rows):
        expected = expected_answer(prompt, max_tokens, ignore_eos=ignore_eos)
        assert answers[i].output_token_ids == expected
        assert answers[i].finish_reason == (
            "stop" if expected[-1] in EOS and not ignore_eos else "length"
        )
    sequences = {s.leaf: s for s in answers.values()}.values()
    sampled = sum(len(s.output_token_ids) for s in sequences)
    fresh = sum(s.num_fresh_prompt_tokens for s in sequences)
    assert fresh == plan.tree.num_tokens
    # Books: everything the runner computed is a first time or a repeat, each last token excepted.
    assert runner.num_computed_tokens == (
        fresh + sampled - len(sequences) + scheduler.stats.recomputed_tokens
    )
    if ignore_eos and policy != "table-order":
        # Lengths are known and prefixes in one piece: the projection never has to be repaired.
        assert scheduler.stats.preemptions == 0
        assert scheduler.stats.recomputed_tokens == 0
        assert scheduler.stats.computed_prompt_tokens == plan.tree.num_tokens


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
    for _ in range(100):
        scheduler._lengths.observe(1, 40)
    answers = {s.row_index: s for s in CheckingEngine(scheduler, FakeRunner(40, 4)).run(plan)}
    assert scheduler.stats.preemptions > 0
    for i, (prompt, max_tokens) in enumerate(rows):
        assert answers[i].output_token_ids == expected_answer(prompt, max_tokens)


def test_a_row_that_cannot_fit_is_an_error_and_costs_no_other():
    rows = [([1] * 30, 30), ([2, 3], 4)]
    _, answers, _, _ = run(requests(rows), num_blocks=5)
    assert answers[0].finish_reason == "error"
    assert answers[1].output_token_ids == expected_answer([2, 3], 4)


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


@given(
    st.lists(
        st.tuples(st.integers(1, 12), st.integers(0, 6), st.integers(1, 12)), min_size=1, max_size=8
    ),
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 7)), max_size=3),
    st.integers(1, 5),
)
def test_projection_equals_a_step_by_step_simulation(sequences, nodes, block_size):
    last = max(start + left for _, start, left in sequences)
    finishes = [start + left for _, start, left in sequences]
    nodes = [(b, finishes[i] if i < len(finishes) else last + 5) for b, i in nodes]
    peak = 0
    for step in range(1, last + 1):
        used = sum(blocks for blocks, until in nodes if until >= step)
        for private, start, left in sequences:
            if step <= start + left:
                used += -(-(private + max(0, step - start - 1)) // block_size)
        peak = max(peak, used)
    columns = np.array(sequences, dtype=np.int64).T
    shared = np.array(nodes, dtype=np.int64).reshape(-1, 2).T
    projection = Projection(columns[0], columns[1], columns[2], shared[0], shared[1])
    assert projection.peak_blocks(block_size) == peak


@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(1, 9)), min_size=1, max_size=10),
    st.integers(1, 9),
)
def test_first_samples_equal_a_step_by_step_simulation(sequences, budget):
    pending = [p for p, _ in sequences]
    left = [r for _, r in sequences]
    start = [0 if p == 0 else None for p in pending]
    step = 0
    while None in start:
        step += 1
        decodes = [i for i, p in enumerate(pending) if p == 0 and left[i] > 0]
        room = max(0, budget - len(decodes))
        for i, tokens in enumerate(pending):
            taken = min(room, tokens)
            pending[i] -= taken
            room -= taken
            if tokens and not pending[i]:
                start[i] = step - 1
                left[i] -= 1
        for i in decodes:
            left[i] -= 1
    prefill, remaining = np.array(sequences).T
    assert first_sample_steps(prefill, remaining, budget).tolist() == start


@given(st.lists(st.integers(0, 7), max_size=200))
def test_pool_keeps_its_books(moves):
    pool, held = BlockPool(17, 4), []
    for move in moves:
        if move < 5 and pool.num_free >= move:
            held.append(pool.allocate(move))
        elif held:
            pool.free(held.pop(move % len(held)))
        flat = [b for blocks in held for b in blocks]
        pool.check(flat)
        assert pool.num_used == len(flat) <= pool.peak_used


def test_pool_notices_a_double_free():
    pool = BlockPool(2, 4)
    blocks = pool.allocate(1)
    pool.free(blocks)
    with pytest.raises(AssertionError, match="twice"):
        pool.free(blocks)


def test_lengths_are_learned_and_bounded():
    lengths = LengthEstimator()
    assert lengths.remaining(0, 100, ignore_eos=False) == 100
    for _ in range(3000):
        lengths.observe(20, 100)
    assert lengths.remaining(0, 100, ignore_eos=False) == 20
    assert lengths.remaining(15, 100, ignore_eos=False) == 5
    assert lengths.remaining(50, 100, ignore_eos=False) == 1
    assert lengths.remaining(50, 100, ignore_eos=True) == 50
