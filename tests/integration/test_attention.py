"""The CPU backend against the reference, on batches that a real scheduler made."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.attention.backend import backend_names, make_backend
from batchllm.attention.cpu import merge_state
from batchllm.cache.block_pool import BlockPool
from batchllm.engine import Engine
from batchllm.errors import UsageError
from batchllm.prefix.plan import plan_requests
from batchllm.request import Request, SamplingParams
from batchllm.runner.fake_runner import FakeRunner
from batchllm.runner.kv_cache import KVCache
from batchllm.runner.model_input import build_model_input
from batchllm.scheduler.scheduler import Scheduler

BLOCK_SIZE, NUM_BLOCKS = 4, 400


class AttentionCheck:
    """A runner that fills a one-layer cache with noise and compares backends every step."""

    def __init__(self, kv_heads, group, head_dim, dtype, tolerance):
        self.fake = FakeRunner(NUM_BLOCKS, BLOCK_SIZE)
        self.shape, self.group, self.dtype = (kv_heads, head_dim), group, dtype
        self.tolerance = tolerance
        self.cache = KVCache(
            num_layers=1,
            num_blocks=NUM_BLOCKS,
            block_size=BLOCK_SIZE,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            dtype=dtype,
        )
        self.backends = [make_backend(n, BLOCK_SIZE) for n in ("reference", "cpu")]
        self.noise = torch.Generator().manual_seed(0)
        self.steps = 0

    def execute(self, batch):
        step = build_model_input(batch, BLOCK_SIZE)
        count, (kv_heads, head_dim) = batch.num_tokens, self.shape
        query = self.random(count, kv_heads * self.group, head_dim) * 3
        key, value = self.random(count, kv_heads, head_dim), self.random(count, kv_heads, head_dim)
        self.cache.write(0, torch.from_numpy(step.slots), key, value)
        expected, got = (
            b.plan(step.items, count).run(
                query, key, value, self.cache.keys[0], self.cache.values[0]
            )
            for b in self.backends
        )
        assert got.shape == query.shape and got.dtype == self.dtype
        torch.testing.assert_close(got, expected, atol=self.tolerance, rtol=self.tolerance)
        self.steps += 1
        return self.fake.execute(batch)

    def random(self, *shape):
        return torch.randn(*shape, generator=self.noise).to(self.dtype)


def check(rows, *, budget=24, group=3, kv_heads=2, head_dim=8, dtype=torch.float32, tolerance=1e-5):
    requests = [
        Request(i, np.array(p, np.int32), SamplingParams(max_tokens=m))
        for i, (p, m) in enumerate(rows)
    ]
    scheduler = Scheduler(
        BlockPool(NUM_BLOCKS, BLOCK_SIZE),
        max_model_len=200,
        max_num_batched_tokens=budget,
        max_num_seqs=64,
    )
    runner = AttentionCheck(kv_heads, group, head_dim, dtype, tolerance)
    list(Engine(scheduler, runner).run(plan_requests(requests)))
    return runner.steps


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=30), st.integers(1, 6)),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 50),
    st.sampled_from([(1, 1, 16), (2, 3, 8), (3, 2, 4), (5, 1, 2)]),
)
@settings(max_examples=60, deadline=None)
def test_cpu_backend_equals_reference_on_random_trees(rows, budget, shape):
    kv_heads, group, head_dim = shape
    assert check(rows, budget=budget, kv_heads=kv_heads, group=group, head_dim=head_dim) > 0


def deep_tree():
    """Long shared prefixes (read as segments) above short ones (folded into the decodes)."""
    head = [1] * 60
    return [(head + [2] * (i % 3 * 20) + [i % 5] + [9, i], 3 + i % 7) for i in range(3, 40)]


def test_long_shared_prefixes_are_read_once_for_all():
    assert check(deep_tree(), budget=64) > 5


def test_bfloat16_stays_within_its_rounding():
    assert check(deep_tree(), budget=64, dtype=torch.bfloat16, tolerance=3e-2) > 5


def test_merge_state_equals_one_softmax():
    torch.manual_seed(0)
    query, keys = torch.randn(5, 2, 3, 4), torch.randn(9, 2, 4)
    values = torch.randn(9, 2, 4)

    def attend(begin, end):
        scores = torch.einsum("nhgd,lhd->nhgl", query, keys[begin:end])
        weights = scores.softmax(-1)
        return torch.einsum("nhgl,lhd->nhgd", weights, values[begin:end]), scores.logsumexp(-1)

    (out, lse), second, whole = attend(0, 4), attend(4, 9), attend(0, 9)
    merge_state(out, lse, *second)
    torch.testing.assert_close(out, whole[0])
    torch.testing.assert_close(lse, whole[1])


def test_unknown_backend_names_the_known():
    with pytest.raises(UsageError, match="reference"):
        make_backend("turbo", BLOCK_SIZE)
    assert "cpu" in backend_names()
