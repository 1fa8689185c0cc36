"""The compiled simulator makes the steps that the scheduler makes, and says the same of them."""

from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulating import MACHINE, SHAPE, SIDE_BY_SIDE

from batchllm.cache.block_counts import BlockCounts
from batchllm.prefix.plan import plan_tokens
from batchllm.prefix.policies.in_time import in_time
from batchllm.request import RaggedTokens, SamplingParams
from batchllm.scheduler.factory import SchedulerLimits, make_scheduler
from batchllm.simulate.choose import choose_policy
from batchllm.simulate.compiled import compiled_simulator
from batchllm.simulate.cost import CostModel
from batchllm.simulate.simulator import END_TOKEN, simulate

compiled = compiled_simulator()
pytestmark = pytest.mark.skipif(compiled is None, reason="no compiler, so no compiled simulator")
HIDING = replace(SIDE_BY_SIDE, attention_rate=1e12)  # reading, not arithmetic
MACHINES = [
    MACHINE,
    replace(MACHINE, kv_bandwidth=1e5, segment_seconds=1e-3, token_seconds=1e-4),
    replace(MACHINE, one_attention_launch=True, sample_seconds=1e-4),
    SIDE_BY_SIDE,
    HIDING,
    replace(HIDING, gemm_rates=((1, 1e5), (20, 1e6)), kv_bandwidth=3e5),
]


def random_plan(rng):
    """Up to 120 prompts with much in common.

    Most answers are short and few lengths known; the short ones may come first, so that what is
    learned from them does not hold for the others.
    """
    longest, vocabulary = int(rng.integers(2, 40)), int(rng.integers(1, 4))
    prompts = [rng.integers(0, vocabulary, rng.integers(1, longest + 1)) for _ in range(80)]
    prompts = prompts[: rng.integers(1, 81)]
    heads = [prompt[: len(prompt) // 2] for prompt in prompts]
    prompts += [np.append(heads[rng.integers(len(heads))], [3, i]) for i in range(len(heads) // 2)]
    limits = sorted({int(n) for n in rng.integers(1, 70, 3)})
    known = rng.random() < 0.2
    params = [SamplingParams(max_tokens=n, ignore_eos=known or rng.random() < 0.1) for n in limits]
    index = rng.integers(0, len(params), len(prompts))
    plan = plan_tokens(RaggedTokens.from_sequences(prompts), params, index, policy="dfs")
    most = plan.max_tokens[plan.tree.leaf_row]
    sure = np.array([p.ignore_eos for p in params])[plan.params_index[plan.tree.leaf_row]]
    order = plan.leaf_order if rng.random() < 0.5 else rng.permutation(plan.leaf_order)
    lengths = np.where(rng.random(len(most)) < 0.3, rng.integers(1, 70, len(most)), 2)
    if rng.random() < 0.6:
        lengths[order] = np.sort(lengths)
    outputs = np.where(sure, most, np.minimum(lengths, most + 1))
    if rng.random() < 0.3:
        order = in_time(order, outputs, float(rng.uniform(0.1, 9)))
    step_tokens = int(rng.integers(1, 60)) if rng.random() < 0.5 else None
    return replace(plan, leaf_order=order, step_tokens=step_tokens), outputs


def random_limits(rng, plan):
    """Mostly so little memory that there is hardly room for the longest."""
    block_size = int(rng.choice([1, 3, 4, 16]))
    max_model_len = int(rng.choice([85, 1000]))
    longest = plan.tree.leaf_length + plan.max_tokens[plan.tree.leaf_row]
    tokens = min(int(longest.max()), max_model_len) * rng.choice([0.9, 1.2, 1.5, 2.5, 4, 30])
    return SchedulerLimits(
        num_blocks=-(-int(tokens) // block_size),
        block_size=block_size,
        max_model_len=max_model_len,
        max_num_batched_tokens=int(rng.integers(1, rng.choice([9, 100]))),
        max_num_seqs=int(rng.choice([1, 6, 200, 200])),
    )


def both(plan, outputs, limits, costs):
    scheduler = make_scheduler("dfs", limits, frozenset({END_TOKEN}), holder=BlockCounts)
    return simulate(plan, outputs, scheduler, costs), compiled(plan, outputs, limits, costs)


@given(seed=st.integers(0, 2**32 - 1), machine=st.sampled_from(MACHINES))
@settings(max_examples=150)
def test_it_makes_the_same_steps(seed, machine):
    rng = np.random.default_rng(seed)
    plan, outputs = random_plan(rng)
    run, twin = both(plan, outputs, random_limits(rng, plan), CostModel(machine, SHAPE))
    assert asdict(twin) == pytest.approx(asdict(run), rel=1e-9)


def test_such_runs_have_all_that_can_happen():
    """Preempted sequences, nodes dropped and computed again, rows that do not fit, thin steps."""
    costs, runs = CostModel(HIDING, SHAPE), []
    for seed in range(150):
        rng = np.random.default_rng(seed)
        plan, outputs = random_plan(rng)
        runs.append(compiled(plan, outputs, random_limits(rng, plan), costs))
    for name in ("preemptions", "failed", "recomputed_tokens", "hidden_seconds"):
        assert sum(getattr(run, name) > 0 for run in runs) > 5, name


def test_a_window_without_rows_takes_no_time():
    plan = plan_tokens(RaggedTokens.from_sequences([]), [], np.zeros(0, np.int64))
    limits = SchedulerLimits(
        num_blocks=4, block_size=4, max_model_len=9, max_num_batched_tokens=8, max_num_seqs=2
    )
    run, twin = both(plan, np.zeros(0, np.int64), limits, CostModel(SIDE_BY_SIDE, SHAPE))
    assert twin == run and twin.seconds == 0
    assert choose_policy(plan, np.zeros(0, np.int64), limits, CostModel(SIDE_BY_SIDE, SHAPE))
