"""What the cost model, and who chooses by it, make of attention beside products."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulating import MACHINE, ROWS, SHAPE, SIDE_BY_SIDE, leaf_outputs, plan_of, scheduler_for

from batchllm.request import SamplingParams
from batchllm.scheduler.batch import StepOutput
from batchllm.scheduler.factory import SchedulerLimits
from batchllm.scheduler.split import split_batch
from batchllm.simulate import choose
from batchllm.simulate.choose import CANDIDATES, Choice, choose_policy, simulate_choice
from batchllm.simulate.cost import CostModel, halved_work, work_of
from batchllm.simulate.machine import get_machine
from batchllm.simulate.shape import get_shape
from batchllm.simulate.simulator import END_TOKEN, simulate


@pytest.mark.parametrize(
    ("products", "arithmetic", "reading", "seconds"),
    [
        (10.0, 0.0, 4.0, 12.0),  # reads for 5 s, while products do 3 of their 10
        (10.0, 3.0, 4.0, 13.0),  # arithmetic is as long as it would be alone
        (3.0, 0.0, 8.0, 9.0),  # products take 5 s, in which half is read
        (0.0, 0.0, 8.0, 8.0),
        (8.0, 0.0, 0.0, 8.0),
        (3.0, 4.0, 0.0, 7.0),
    ],
)
def test_what_runs_side_by_side_shares_the_machine(products, arithmetic, reading, seconds):
    costs = CostModel(SIDE_BY_SIDE, SHAPE)
    assert costs._beside(products, (arithmetic, reading)) == pytest.approx(seconds)


@given(rows=ROWS, budget=st.integers(3, 60))
@settings(max_examples=50)
def test_the_work_of_halves_is_that_of_their_batches(rows, budget):
    plan = plan_of(rows)
    scheduler = scheduler_for(400, budget)
    scheduler.add(plan)
    ends = leaf_outputs(plan, rows)
    while scheduler.has_unfinished:
        batch = scheduler.schedule(ends)
        if batch.num_tokens > 1:
            for half, counted in zip(split_batch(batch), halved_work(batch), strict=True):
                work = work_of(half.batch)
                grown = len(half.batch.chunks) * (batch.num_steps - 1) / 2
                pairs = work.pairs + work.decode_reads + grown
                assert counted == (work.num_tokens, pairs, work.reads + grown)
        last = batch.samples.output_position + batch.num_steps >= ends[batch.samples.leaf]
        scheduler.update(batch, StepOutput(last.astype(np.int32) * np.int32(END_TOKEN)))


@given(
    rows=ROWS,
    budget=st.integers(3, 60),
    rates=st.tuples(*[st.sampled_from([1e3, 1e4, 1e5, 1e6, 1e7])] * 3),
)
@settings(max_examples=100)
def test_no_step_is_left_whole_that_would_gain(rows, budget, rates):
    bandwidth, kv_bandwidth, attention_rate = rates
    machine = replace(
        SIDE_BY_SIDE,
        bandwidth=bandwidth,
        kv_bandwidth=kv_bandwidth,
        attention_rate=attention_rate,
    )
    costs, scheduler = CostModel(machine, SHAPE), scheduler_for(400, budget)
    scheduler.add(plan_of(rows))
    while scheduler.has_unfinished:
        batch = scheduler.schedule()
        if batch.num_tokens > 1:
            cost = costs.cost(batch)
            gain = cost.gemm + cost.attention - costs._overlapped(batch)
            least = 0.02 * (cost.gemm + cost.attention)
            assert cost.hidden == pytest.approx(gain if gain >= least else 0.0)
        scheduler.update(batch, StepOutput(np.zeros(len(batch.samples), np.int32)))


@given(rows=ROWS, budget=st.integers(3, 60))
@settings(max_examples=50)
def test_side_by_side_is_faster_or_not_done(rows, budget):
    plan = plan_of(rows)
    outputs = leaf_outputs(plan, rows)
    apart, beside = (
        simulate(plan, outputs, scheduler_for(400, budget), CostModel(machine, SHAPE))
        for machine in (SIDE_BY_SIDE.with_overlap(None), SIDE_BY_SIDE)
    )
    assert beside.seconds == pytest.approx(apart.seconds - beside.hidden_seconds)
    assert 0 <= beside.hidden_seconds <= min(apart.attention_seconds, apart.gemm_seconds)
    assert apart.hidden_seconds == 0


def test_half_of_what_decodes_read_is_hidden_by_longer_products():
    """But for one layer of the two, beside whose attention there is nothing."""
    machine = replace(SIDE_BY_SIDE, kv_bandwidth=1e7, attention_rate=1e12)
    scheduler = scheduler_for(400, 300)
    scheduler.add(plan_of([([i, *[9] * 29], 2) for i in range(8)]))
    scheduler.update(scheduler.schedule(), StepOutput(np.zeros(8, np.int32)))
    cost = CostModel(machine, SHAPE).cost(scheduler.schedule())
    reading = 8 * 31 * SHAPE.kv_bytes_per_token / 1e7
    assert cost.gemm == pytest.approx(2 * SHAPE.body_parameters * 8 / 4e6)
    assert cost.attention == pytest.approx(reading)
    assert cost.hidden == pytest.approx(reading / 2 / 2)


def test_thinner_steps_are_taken_where_they_hide_more():
    """Prompts that come in bursts, and decodes that have nothing to be read beside meanwhile."""
    machine = get_machine("h100")
    limits = SchedulerLimits(
        num_blocks=12_000,
        block_size=16,
        max_model_len=10_000,
        max_num_batched_tokens=8192,
        max_num_seqs=1024,
    )
    rows = [([i, *[7] * 1900], 300) for i in range(280)]
    plan = plan_of(rows)
    outputs = leaf_outputs(plan, rows)
    shape = get_shape("llama-3.1-8b")
    costs = CostModel(machine, shape)
    choice = choose_policy(plan, outputs, limits, costs)
    assert choice.step_tokens is not None and choice.step_tokens % 128 == 0
    assert str(choice) == f"{choice.policy}, {choice.step_tokens:,} tokens a step"
    seconds = {
        tokens: simulate_choice(
            plan, outputs, replace(choice, step_tokens=tokens), limits, costs
        ).seconds
        for tokens in (choice.step_tokens, None, 256)
    }
    assert min(seconds, key=seconds.get) == choice.step_tokens
    apart = CostModel(machine.with_overlap(None), shape)
    assert choose_policy(plan, outputs, limits, apart).step_tokens is None
    # Where answers may be as long, but nobody knows: even steps of that length would be too thin.
    assert choose_policy(plan, outputs, limits, costs, knows=False).step_tokens is None
    # It is the answers' own lengths that steps have to suit.
    plan = replace(plan, params=[SamplingParams(max_tokens=300)])
    short = choose_policy(plan, outputs, limits, costs, outputs=np.full(len(outputs), 20))
    assert short.step_tokens is None or short.step_tokens > choice.step_tokens


@pytest.mark.parametrize("machine", [SIDE_BY_SIDE, SIDE_BY_SIDE.with_overlap(None)])
def test_a_long_answer_is_not_begun_last(machine):
    """It is in the group that every policy leaves for the end: the one that mostly prefills."""
    rows = [([g, *[7] * 20, i], 10) for g in range(5) for i in range(8)]
    rows += [([5, *[7] * 190, i], 100 if i == 7 else 10) for i in range(8)]
    plan, costs = plan_of(rows), CostModel(machine, SHAPE)
    outputs = leaf_outputs(plan, rows)
    limits = SchedulerLimits(
        num_blocks=200, block_size=4, max_model_len=400, max_num_batched_tokens=64, max_num_seqs=8
    )
    choice = choose_policy(plan, outputs, limits, costs)
    run = simulate_choice(plan, outputs, choice, limits, costs)
    assert str(choice).endswith("long answers early")
    plain = [simulate_choice(plan, outputs, Choice(p), limits, costs) for p in CANDIDATES]
    assert run.steps < 110 < 140 < plain[0].steps
    assert run.seconds < min(other.seconds for other in plain)


@given(rows=ROWS, machine=st.sampled_from([SIDE_BY_SIDE, MACHINE]))
@settings(max_examples=15)
def test_the_choice_is_the_same_where_nothing_was_compiled(rows, machine):
    plan, costs = plan_of(rows), CostModel(machine, SHAPE)
    outputs = leaf_outputs(plan, rows)
    limits = SchedulerLimits(
        num_blocks=60, block_size=4, max_model_len=100, max_num_batched_tokens=24, max_num_seqs=9
    )
    chosen = choose_policy(plan, outputs, limits, costs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choose, "compiled_simulator", lambda: None)
        assert choose_policy(plan, outputs, limits, costs) == chosen


@given(rows=ROWS, step_tokens=st.integers(1, 30))
@settings(max_examples=40)
def test_a_plan_may_ask_for_thinner_steps(rows, step_tokens):
    plan = Choice("dfs", step_tokens).order(plan_of(rows), leaf_outputs(plan_of(rows), rows))
    scheduler = scheduler_for(400, 24)
    scheduler.add(plan)
    while scheduler.has_unfinished:
        batch = scheduler.schedule()
        assert batch.num_tokens <= max(min(step_tokens, 24), batch.num_decodes)
        scheduler.update(batch, StepOutput(np.zeros(len(batch.samples), np.int32)))
        scheduler.check()
    assert scheduler.stats.preemptions == 0
    scheduler.add(plan_of(rows))  # which asks for nothing
    fresh = scheduler_for(400, 24)
    fresh.add(plan_of(rows))
    assert scheduler.schedule().num_tokens == fresh.schedule().num_tokens
