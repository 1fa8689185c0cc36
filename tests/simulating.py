"""A toy machine and model, and plans for them, for tests that simulate."""

from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from batchllm.cache.block_pool import BlockPool
from batchllm.prefix.plan import plan_tokens
from batchllm.request import RaggedTokens, SamplingParams
from batchllm.scheduler.scheduler import Scheduler
from batchllm.simulate.machine import Machine
from batchllm.simulate.shape import ModelShape
from batchllm.simulate.simulator import END_TOKEN

SHAPE = ModelShape(
    num_layers=2,
    hidden_size=8,
    intermediate_size=16,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    vocab_size=32,
)
MACHINE = Machine(
    name="toy",
    gemm_rates=((1, 1e6), (100, 4e6)),
    attention_rate=1e5,
    bandwidth=1e6,
    memory=1 << 20,
    step_seconds=0.01,
)
SIDE_BY_SIDE = replace(
    MACHINE,
    gemm_rates=((1, 4e6),),
    bandwidth=1e9,  # so that weights cost nothing
    kv_bandwidth=1e6,
    one_attention_launch=True,
    overlap_share=0.4,
    overlap_speed=0.8,
)
ROWS = st.lists(
    st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=20), st.integers(1, 12)),
    min_size=1,
    max_size=15,
)


def plan_of(rows, *, known=True, **options):
    tokens = RaggedTokens.from_sequences([p for p, _ in rows])
    lengths = sorted({m for _, m in rows})
    params = [SamplingParams(max_tokens=m if known else 40, ignore_eos=known) for m in lengths]
    index = np.array([lengths.index(m) for _, m in rows])
    return plan_tokens(tokens, params, index, **options)


def leaf_outputs(plan, rows):
    return np.array([rows[row][1] for row in plan.tree.leaf_row])


def scheduler_for(num_blocks=400, budget=24):
    return Scheduler(
        BlockPool(num_blocks, 4),
        max_model_len=100,
        max_num_batched_tokens=budget,
        max_num_seqs=64,
        eos_token_ids=frozenset({END_TOKEN}),
    )
