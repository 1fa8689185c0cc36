"""Cost model, bound and simulator, against definitions and each other."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulating import MACHINE, ROWS, SHAPE, leaf_outputs, plan_of, scheduler_for
from yardstick import load_bound

from batchllm.cpus import available_cpus
from batchllm.errors import UsageError
from batchllm.native.kernels import usable_targets
from batchllm.scheduler.batch import StepOutput
from batchllm.scheduler.streaming import StreamingScheduler
from batchllm.simulate import choose
from batchllm.simulate.bound import bound
from batchllm.simulate.calibrate import MeasuredStep, calibrate
from batchllm.simulate.cost import CostModel, work_of
from batchllm.simulate.machine import MACHINES, cpu_machine, get_machine
from batchllm.simulate.saved import save_machine, this_machine
from batchllm.simulate.shape import get_shape
from batchllm.simulate.simulator import simulate

yardstick = load_bound()


def without_repeating(scheduler):
    schedule = scheduler.schedule
    scheduler.schedule = lambda ends=None: schedule()
    return scheduler


@given(rows=ROWS, known=st.booleans(), blocks=st.integers(20, 80), budget=st.integers(3, 60))
@settings(max_examples=100)
def test_batches_that_stand_for_several_steps_cost_what_these_cost(rows, known, blocks, budget):
    plan = plan_of(rows, known=known)
    outputs, costs = leaf_outputs(plan, rows), CostModel(MACHINE, SHAPE)
    fast = simulate(plan, outputs, scheduler_for(blocks, budget), costs)
    slow = simulate(plan, outputs, without_repeating(scheduler_for(blocks, budget)), costs)
    assert fast.seconds == pytest.approx(slow.seconds, rel=1e-9)
    assert (fast.steps, fast.output_tokens) == (slow.steps, slow.output_tokens)
    assert fast.output_tokens == outputs.sum()
    if known:
        assert fast.preemptions == 0
        assert fast.computed_prompt_tokens == plan.tree.num_tokens


@given(rows=ROWS)
@settings(max_examples=50)
def test_streaming_batches_cost_what_their_steps_cost(rows):
    plan = plan_of(rows, policy="table-order", sharing=False)
    costs, outputs = CostModel(MACHINE, SHAPE), leaf_outputs(plan, rows)

    def scheduler():
        return StreamingScheduler(
            30, 4, max_model_len=100, max_num_batched_tokens=24, max_num_seqs=6
        )

    fast = simulate(plan, outputs, scheduler(), costs)
    slow = simulate(plan, outputs, without_repeating(scheduler()), costs)
    assert fast.seconds == pytest.approx(slow.seconds, rel=1e-9)
    assert (fast.steps, fast.output_tokens) == (slow.steps, slow.output_tokens)


@given(rows=ROWS)
def test_bound_equals_the_benchmarks_yardstick(rows):
    rows = list({(*p, -1 - m): (p, m) for p, m in rows}.values())  # no exact duplicates
    plan = plan_of(rows)
    prompts = [np.array(p, np.int32) for p, _ in rows]
    work = yardstick.measure(prompts, [m for _, m in rows])
    model = yardstick.ModelShape(
        layers=2, hidden=8, intermediate=16, q_heads=4, kv_heads=2, head_dim=4, vocab=32
    )
    rates = yardstick.Rates(flops=MACHINE.best_gemm_rate, bandwidth=MACHINE.bandwidth)
    expected = yardstick.bound(model, work, rates, 64)
    got = bound(plan.tree, leaf_outputs(plan, rows), MACHINE, SHAPE, 64)
    assert got.gemm == pytest.approx(expected.gemm)
    assert got.weight_read <= expected.weight_read * (1 + 1e-9)
    if plan.tree.num_repeated_tokens == 0:
        assert got.attention == pytest.approx(expected.attention)
        assert got.kv_read == pytest.approx(expected.kv_read)
        assert got.overlap == pytest.approx(expected.overlap)
    else:
        assert got.attention <= expected.attention
        assert got.kv_read <= expected.kv_read


@given(rows=ROWS, budget=st.integers(3, 60))
@settings(max_examples=50)
def test_nothing_simulated_beats_the_bound(rows, budget):
    plan = plan_of(rows)
    outputs = leaf_outputs(plan, rows)
    run = simulate(plan, outputs, scheduler_for(400, budget), CostModel(MACHINE, SHAPE))
    least = bound(plan.tree, outputs, MACHINE, SHAPE, 1600)
    assert run.seconds >= least.overlap


def test_a_step_costs_what_its_parts_cost():
    """One prompt of 10 tokens, answered with two: a prefill and a decode."""
    plan = plan_of([(list(range(10)), 2)])
    run = simulate(plan, np.array([2]), scheduler_for(), CostModel(MACHINE, SHAPE))
    body, head = SHAPE.body_parameters, SHAPE.head_parameters
    prefill = max(2 * body * 10 / MACHINE.gemm_rate(10), 2 * body / 1e6)
    decode = 2 * body / 1e6  # reading the weights takes longer
    assert run.gemm_seconds == pytest.approx(prefill + decode)
    assert run.head_seconds == pytest.approx(2 * max(2 * head / 1e6, 2 * head / 1e6))
    flops, kv = SHAPE.attention_flops, SHAPE.kv_bytes_per_token
    reads = [max(55 * flops / 1e5, 10 * kv / 1e6), 11 * kv / 1e6]
    assert run.attention_seconds == pytest.approx(sum(reads))
    assert run.overhead_seconds == pytest.approx(2 * 0.01)


@given(rows=ROWS, budget=st.integers(3, 60))
@settings(max_examples=50)
def test_a_batchs_work_is_what_its_chunks_and_segments_add_up_to(rows, budget):
    launches = [CostModel(replace(MACHINE, one_attention_launch=one), SHAPE) for one in (1, 0)]
    pair, read = SHAPE.attention_flops / 1e5, SHAPE.kv_bytes_per_token / 1e6
    scheduler = scheduler_for(400, budget)
    scheduler.add(plan_of(rows))
    while scheduler.has_unfinished:
        batch = scheduler.schedule()
        pairs = decode_reads = reads = segments = 0
        apart = 0.0
        for count, offset in zip(batch.chunks.count, batch.chunks.offset, strict=True):
            own = sum(offset + 1 + i for i in range(count))  # each token sees those before, itself
            decode_reads += own if count == 1 else 0
            pairs += own if count > 1 else 0
            segments += count > 1
            reads += offset + count
            apart += max(pair * own if count > 1 else 0, read * (offset + count))
        shared = batch.shared
        columns = (shared.chunk_begin, shared.chunk_end, shared.length)
        for begin, end, length in zip(*columns, strict=True):
            queries = sum(batch.chunks.count[begin:end])
            pairs += queries * length
            segments += 1
            reads += length
            apart += max(pair * queries * length, read * length)
        work = work_of(batch)
        assert (work.num_tokens, work.num_samples) == (sum(batch.chunks.count), len(batch.samples))
        assert (work.pairs, work.decode_reads) == (pairs, decode_reads)
        assert (work.reads, work.num_segments) == (reads, segments)
        at_once = max(pair * (pairs + decode_reads), read * reads)
        for model, expected in zip(launches, (at_once, apart), strict=True):
            assert model.cost(batch).attention == pytest.approx(expected)
        scheduler.update(batch, StepOutput(np.zeros(len(batch.samples), np.int32)))


def test_rates_are_interpolated():
    assert MACHINE.gemm_rate(1) == 1e6
    assert MACHINE.gemm_rate(10) == pytest.approx(2.5e6)
    assert MACHINE.gemm_rate(1e9) == MACHINE.best_gemm_rate == 4e6


def test_unknown_names_say_what_there_is():
    with pytest.raises(UsageError, match="h100"):
        get_machine("tpu")
    with pytest.raises(UsageError, match=r"llama-3\.1-8b"):
        get_shape("gpt-2")


def test_shapes_have_the_published_sizes():
    """Within 2 % of the models' published parameter counts (with one embedding matrix)."""
    for name, millions in (("smollm2-135m", 134.5), ("llama-3.2-1b", 1236), ("llama-3.1-8b", 7505)):
        shape = get_shape(name)
        assert shape.body_parameters + shape.head_parameters == pytest.approx(
            millions * 1e6, rel=0.02
        )


def test_a_model_that_does_not_fit_is_refused():
    with pytest.raises(UsageError, match="do not fit"):
        MACHINE.kv_tokens(get_shape("llama-3.1-8b"))


def test_calibration_finds_the_figures_that_made_the_steps():
    truth = replace(
        MACHINE,
        step_seconds=0.02,
        token_seconds=3e-4,
        sample_seconds=2e-3,
        attention_rate=2e5,
        kv_bandwidth=3e4,
        segment_seconds=5e-3,
    )
    costs, rng = CostModel(truth, SHAPE), np.random.default_rng(0)
    steps = []
    shapes = ((3, 4, 40, 6, 9), (20, 1, 0, 30, 3), (1, 9, 9, 4, 30))
    for groups, members, prefix, own, output in shapes:
        prompts = [[g, *[1] * prefix, m, *[2] * own] for g in range(groups) for m in range(members)]
        scheduler = scheduler_for(900, 64)
        scheduler.add(plan_of([(p, output) for p in prompts]))
        while scheduler.has_unfinished:
            batch = scheduler.schedule()
            seconds = costs.cost(batch).seconds * rng.uniform(0.98, 1.02)
            steps.append(MeasuredStep(batch, seconds))
            scheduler.update(batch, StepOutput(np.zeros(len(batch.samples), np.int32)))
    found = calibrate(MACHINE, SHAPE, steps)
    fitted = CostModel(found, SHAPE)
    errors = [fitted.cost(s.batch).seconds / costs.cost(s.batch).seconds - 1 for s in steps]
    assert np.abs(errors).max() < 0.05
    assert found.step_seconds == pytest.approx(truth.step_seconds, rel=0.2)
    assert found.kv_bandwidth == pytest.approx(truth.kv_bandwidth, rel=0.2)


def test_a_calibrated_machine_is_kept(tmp_path):
    built_in = cpu_machine(next(iter(usable_targets()), None), available_cpus().best)
    assert this_machine(tmp_path) == built_in
    machine = replace(MACHINE, name="cpu", kv_bandwidth=7.0)
    path = save_machine(machine, tmp_path)
    assert this_machine(tmp_path) == machine
    path.write_text('{"name": "cpu", "of another version": 1}')
    assert this_machine(tmp_path) == built_in
    assert this_machine(tmp_path, gpu="NVIDIA H200") == MACHINES["h200"]
    save_machine(replace(MACHINES["h200"], kv_bandwidth=7.0), tmp_path)
    assert this_machine(tmp_path, gpu="NVIDIA H200").kv_bandwidth == 7.0
    assert this_machine(tmp_path, gpu="NVIDIA H100 80GB HBM3") == MACHINES["h100"]
    assert this_machine(tmp_path) == built_in


def test_a_large_window_is_judged_by_runs_of_neighbours(monkeypatch):
    monkeypatch.setattr(choose, "_LARGE", 4096)
    monkeypatch.setattr(choose, "_SMALL", 4096)
    prompts = [[g, 1, 1, m // 90, m % 90, 5] for g in range(3) for m in range(3000)]
    plan = plan_of([(p, 1 + p[0]) for p in prompts])
    outputs = leaf_outputs(plan, [(p, 1 + p[0]) for p in prompts])
    some, leaves = choose.sample_leaves(plan)
    assert 3000 < some.tree.num_leaves <= 4096
    group = np.array([some.tokens[row][0] for row in some.tree.leaf_row])
    assert np.array_equal(outputs[leaves], 1 + group)  # outputs stay with their prompts
    assert np.bincount(group).min() > 1000  # from all over
    saved = [t.num_distinct_prefixes / t.leaf_length.sum() for t in (some.tree, plan.tree)]
    assert saved[0] == pytest.approx(saved[1], rel=0.1)
    again, leaves = choose.sample_leaves(some)
    assert again is some and np.array_equal(leaves, np.arange(some.tree.num_leaves))


def test_a_cpu_is_as_fast_as_its_kind_and_its_cores():
    assert cpu_machine("avx512_bf16", 2) == MACHINES["cpu"]
    kinds = ("amx", "avx512_bf16", "avx512_vnni", "avx2")
    best = [cpu_machine(kind, 2).best_gemm_rate for kind in kinds]
    assert best == sorted(best, reverse=True) and len(set(best)) == 4
    assert cpu_machine(None, 2) == cpu_machine("avx2", 2)
    small, large, huge = (cpu_machine("amx", cores) for cores in (2, 8, 64))
    assert large.gemm_rate(100) == 4 * small.gemm_rate(100)
    assert large.attention_rate == 4 * small.attention_rate
    assert large.sample_seconds == small.sample_seconds / 4
    assert large.kv_bandwidth == 4 * small.kv_bandwidth
    assert huge.bandwidth == 8 * small.bandwidth  # of one socket
    assert huge.step_seconds == small.step_seconds
