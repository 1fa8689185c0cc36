"""Rows whose attention is checked, and a runner that holds a backend against the reference."""

from dataclasses import replace

import numpy as np
import torch
from attention_trees import items_of, step_of
from hypothesis import strategies as st

from batchllm.attention.backend import CompiledPlan, make_backend
from batchllm.attention.rounded import RoundedBackend
from batchllm.cache.block_pool import BlockPool
from batchllm.engine import Engine
from batchllm.models.rope import Rotation
from batchllm.prefix.plan import plan_requests
from batchllm.request import Request, SamplingParams
from batchllm.runner.fake_runner import FakeRunner
from batchllm.runner.kv_cache import kv_row_values
from batchllm.runner.model_input import build_model_input
from batchllm.runner.staging import put_now
from batchllm.scheduler.scheduler import Scheduler

NUM_BLOCKS = 400
POISON = 99
NAN_BITS = 0x7FC03F7F  # of a float32; of its bytes two are NaNs of float8, none is 0

TREES = st.lists(
    st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=30), st.integers(1, 6)),
    min_size=1,
    max_size=12,
)


def tolerance_of(dtype, kv_dtype=None):
    """How far from the reference: values reach 8, where bfloat16 goes by 1/32.

    In int8 a number may be rounded to its neighbour, and with scales even a weight of 1 is rounded.
    """
    if kv_dtype == torch.int8:
        return 6e-2
    return 5e-5 if dtype == torch.float32 else 3e-2


class AttentionCheck:
    """A runner with one layer of noise that holds a backend against the reference every step.

    Each has a cache of its own, since each lays it out as it likes. Blocks hold NaNs until a step
    writes to them, as after a sequence that went astray; the tokens `POISON` are NaNs, or their
    values are, and then what is sampled is one exactly where it sees such a token.
    """

    def __init__(
        self, backend, *, block_size, kv_heads, group, head_dim, dtype, tolerance, device, kv_dtype
    ):
        self.kv_heads = kv_heads
        self.fake = FakeRunner(NUM_BLOCKS, block_size)
        self.block_size, self.tolerance, self.dtype = block_size, tolerance, dtype
        self.shape = ((group + 2) * kv_heads, head_dim)
        reference = make_backend("reference", block_size, head_dim)
        shape = (2, NUM_BLOCKS, block_size, kv_heads)
        plain = torch.full((*shape, head_dim), torch.nan, dtype=dtype)
        cache = plain.to(device, copy=True)
        if kv_dtype is not None:
            reference, plain = RoundedBackend(reference, kv_dtype), plain.float()
            words = (*shape, kv_row_values(head_dim, kv_dtype) // 4)
            cache = torch.full(words, NAN_BITS, dtype=torch.int32).view(kv_dtype).to(device)
        self.backends, self.caches = [reference, backend], [plain, cache]
        self.noise = torch.Generator().manual_seed(0)
        self.steps = self.poisoned = 0

    def execute(self, batch):
        self.hold(build_model_input(batch, self.block_size))
        return self.fake.execute(batch)

    def hold(self, step):
        """One step with both backends."""
        num_tokens = len(step.token_ids)
        qkv = torch.randn(num_tokens, *self.shape, generator=self.noise) * 2
        poison = torch.from_numpy(step.token_ids == POISON)
        qkv[poison, -self.kv_heads :] = torch.nan
        qkv[poison & torch.from_numpy(step.positions % 2 == 0)] = torch.nan
        angles = torch.randn(num_tokens, self.shape[1] // 2, generator=self.noise)
        expected, got = (
            _run(backend, cache, step, qkv.to(self.dtype), angles)
            for backend, cache in zip(self.backends, self.caches, strict=True)
        )
        expected = expected.to(self.dtype)
        assert got.shape == expected.shape and got.dtype == self.dtype
        # Within its chunk a NaN may reach back to tokens before it: all their readers see it too.
        rows = torch.from_numpy(step.sample_rows) if expected.isnan().any() else slice(None)
        close = {"atol": self.tolerance, "rtol": self.tolerance, "equal_nan": True}
        torch.testing.assert_close(got[rows], expected[rows], **close)
        self.poisoned += int(expected[rows].isnan().any(1).sum())
        self.steps += 1


def _run(backend, cache, step, qkv, angles):
    rotation = Rotation(angles.cos().to(cache.device), angles.sin().to(cache.device))
    plan = backend.plan(step, rotation, put_now(cache.device))
    out = plan.run(qkv.to(cache.device, copy=True), *cache)
    if isinstance(plan, CompiledPlan):
        last, rows = plan.run_last(qkv.clone(), *cache), step.sample_rows
        torch.testing.assert_close(last[rows], out[rows], atol=0, rtol=0, equal_nan=True)
    return out.cpu()


def check(
    rows,
    backend,
    *,
    block_size=4,
    budget=24,
    group=3,
    kv_heads=2,
    head_dim=8,
    dtype=torch.float32,
    tolerance=5e-5,
    device="cpu",
    kv_dtype=None,
):
    """Answer rows with two runners side by side; returns the one that did."""
    requests = [
        Request(i, np.array(p, np.int32), SamplingParams(max_tokens=m))
        for i, (p, m) in enumerate(rows)
    ]
    scheduler = Scheduler(
        BlockPool(NUM_BLOCKS, block_size),
        max_model_len=1000,
        max_num_batched_tokens=budget,
        max_num_seqs=64,
    )
    if isinstance(backend, str):
        backend = make_backend(backend, block_size, head_dim)
    runner = AttentionCheck(
        backend,
        block_size=block_size,
        kv_heads=kv_heads,
        group=group,
        head_dim=head_dim,
        dtype=dtype,
        tolerance=tolerance,
        device=device,
        kv_dtype=kv_dtype,
    )
    list(Engine(scheduler, runner).run(plan_requests(requests)))
    return runner


def check_tree(items, backend, **sizes):
    """Fill the cache with a tree's segments, then attend as `items` say; of `AttentionCheck`."""
    runner = AttentionCheck(backend, **sizes)
    ends = np.cumsum(items.kv_len)
    everything = replace(
        items,
        query_begin=ends - items.kv_len,
        query_end=ends,
        own=np.ones(len(items), dtype=np.bool_),
    )
    for step in (everything, items):
        runner.hold(step_of(step, runner.block_size))
    return runner


def deep_tree():
    """Long shared prefixes (read as segments) above short ones (folded into the decodes)."""
    head = [1] * 60
    return [(head + [2] * (i % 3 * 20) + [i % 5] + [9, i], 3 + i % 7) for i in range(3, 40)]


def long_rows():
    """Contexts of several passes of keys, with decodes and chunks that end anywhere in one."""
    head = [i % 7 for i in range(530)]
    return [(head[: 130 * i] + [9 + i] * (1 + 37 * i), 2 + i) for i in range(5)] * 2


def poisoned_rows():
    """Rows of which some hold the poison, alone or with all that share a prefix, anywhere in it."""
    rows = [(p[:i] + [POISON] * (i % 3 == 0) + p[i:], m) for i, (p, m) in enumerate(deep_tree())]
    rows += [([3] * 40 + [POISON] + [3] * 30 + [i], 4) for i in range(8)]
    return rows + [([4, i] * 9 + [POISON] * (i % 2), 3 + i) for i in range(12)]


def check_values_of_all_sizes(backend, dtype):
    """A prompt whose values grow, after some that are zero, in a cache of int8."""
    num_tokens, num_zeros, head_dim, block_size = 300, 140, 64, 16
    step = step_of(items_of([(0, num_tokens, num_tokens, True, 0)], block_size), block_size)
    noise = torch.Generator().manual_seed(0)
    qkv = torch.randn(num_tokens, 5, head_dim, generator=noise) * 0.2  # all see all, about equally
    qkv[:, 4] *= 2.0 ** torch.arange(num_tokens).sub(220)[:, None]
    qkv[:num_zeros, 4] = 0  # more than a pass
    shape = (2, num_tokens // block_size + 1, block_size, 1)
    angles = torch.randn(num_tokens, head_dim // 2, generator=noise)
    reference = RoundedBackend(make_backend("reference", block_size, head_dim), torch.int8)
    expected = _run(reference, torch.zeros(*shape, head_dim), step, qkv.to(dtype), angles)
    cache = torch.zeros(*shape, kv_row_values(head_dim, torch.int8), dtype=torch.int8)
    got = _run(backend, cache, step, qkv.to(dtype), angles)
    assert not got[:num_zeros].any() and expected[num_zeros:].abs().amax(1).all()
    sizes = expected.float().abs().amax(1, keepdim=True).clamp(min=1e-37)
    torch.testing.assert_close(got / sizes, expected / sizes, atol=2e-2, rtol=0)
