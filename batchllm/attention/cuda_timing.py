"""Times of the `cuda` kernel's steps, by which `cuda_costs` finds what its units cost."""

import statistics
from collections.abc import Callable

import numpy as np
import torch

from batchllm.attention.backend import Heads
from batchllm.attention.cuda import CudaBackend
from batchllm.attention.cuda_costs import measure_costs
from batchllm.attention.cuda_plan import UnitCosts
from batchllm.models.rope import Rotation
from batchllm.runner.kv_cache import kv_row_values
from batchllm.runner.model_input import AttentionItems, ModelInput
from batchllm.scheduler.batch import Samples

_RUNS = 5
Clock = Callable[[Callable[[], object]], float]
"""The seconds that a call takes on the device."""


def gpu_seconds(call: Callable[[], object]) -> float:
    """By events on the current stream."""
    make_event: Callable[..., torch.Event] = torch.cuda.Event  # torch leaves it without types
    begin, end = make_event(enable_timing=True), make_event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def with_measured_costs(backend: CudaBackend, device: torch.device, clock: Clock) -> UnitCosts:
    """What units cost here; takes up to a few GB of the device for a moment.

    Where that is not to be had, they are what the backend was made with.
    """
    heads = backend.heads

    def time_step(items: AttentionItems, num_queries: int, costs: UnitCosts) -> float:
        backend.costs = costs
        step = _step_of(items, num_queries)
        half = torch.zeros(num_queries, heads.head_dim // 2, device=device)
        plan = backend.plan(
            step, Rotation(half + 1, half), lambda a: torch.from_numpy(a).to(device)
        )
        width = heads.num_heads + 2 * heads.num_kv_heads
        shape = (num_queries, width, heads.head_dim)
        qkv = torch.ones(shape, dtype=torch.bfloat16, device=device)
        keys, values = _cache(backend, len(items.block_ids), device)
        plan.run(qkv, keys, values)
        return statistics.median(clock(lambda: plan.run(qkv, keys, values)) for _ in range(_RUNS))

    before = backend.costs
    try:
        return measure_costs(
            time_step,
            group=heads.group,
            num_kv_heads=heads.num_kv_heads,
            num_blocks=backend.num_blocks,
            block_size=backend.block_size,
        )
    except torch.OutOfMemoryError:
        return before
    finally:
        backend.costs = before


def _cache(backend: CudaBackend, num_blocks: int, device: torch.device) -> torch.Tensor:
    heads: Heads = backend.heads
    row = kv_row_values(heads.head_dim, backend.kv_dtype)
    shape = (2, num_blocks, backend.block_size, heads.num_kv_heads, row)
    return torch.zeros(shape, dtype=backend.kv_dtype, device=device)


def _step_of(items: AttentionItems, num_queries: int) -> ModelInput:
    """A step of these items; its tokens' KV goes to the first place of the first block."""
    none = np.zeros(0, dtype=np.int64)
    nobody = Samples(none, none, none, none, none, none, params=[])
    zeros = np.zeros(num_queries, dtype=np.int64)
    return ModelInput(zeros.astype(np.int32), zeros, zeros, items, zeros, nobody)
