"""Times of steps of attention on a GPU, by which it is found what they cost."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from batchllm.attention.backend import AttentionBackend, Heads, SharingBackend
from batchllm.attention.cuda import CudaBackend
from batchllm.attention.cuda_costs import measure_costs
from batchllm.attention.cuda_plan import UnitCosts
from batchllm.attention.sample_items import lone
from batchllm.models.rope import Rotation
from batchllm.runner.kv_cache import kv_row_values
from batchllm.runner.model_input import AttentionItems, ModelInput
from batchllm.scheduler.batch import Samples

_RUNS = 5
_SHARES = (0.2, 0.3, 0.4, 0.5, 0.6)
_DECODES, _KEYS = 64, 2048
Clock = Callable[[Callable[[], object]], float]
"""The seconds that a call takes on the device."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a layer's attention is of, beside the step."""

    heads: Heads
    block_size: int
    kv_dtype: torch.dtype


def gpu_seconds(call: Callable[[], object]) -> float:
    """By events on the current stream."""
    make_event: Callable[..., torch.Event] = torch.cuda.Event  # torch leaves it without types
    begin, end = make_event(enable_timing=True), make_event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def time_step(
    backend: AttentionBackend,
    sizes: Sizes,
    items: AttentionItems,
    num_queries: int,
    device: torch.device,
    clock: Clock,
) -> float:
    """Seconds that one layer of a step takes a backend, once it was run before."""
    heads = sizes.heads
    step = _step_of(items, num_queries)
    half = torch.zeros(num_queries, heads.head_dim // 2, device=device)
    plan = backend.plan(step, Rotation(half + 1, half), lambda a: torch.from_numpy(a).to(device))
    width = heads.num_heads + 2 * heads.num_kv_heads
    shape = (num_queries, width, heads.head_dim)
    qkv = torch.ones(shape, dtype=torch.bfloat16, device=device)
    row = kv_row_values(heads.head_dim, sizes.kv_dtype)
    blocks = (2, len(items.block_ids), sizes.block_size, heads.num_kv_heads, row)
    keys, values = torch.zeros(blocks, dtype=sizes.kv_dtype, device=device)
    plan.run(qkv, keys, values)
    return statistics.median(clock(lambda: plan.run(qkv, keys, values)) for _ in range(_RUNS))


def measure_share(
    backend: SharingBackend, sizes: Sizes, device: torch.device, clock: Clock
) -> tuple[float, float] | None:
    """What share of the device attention had best, beside something else, and its speed with it.

    Speed is of long decodes, which are bound by reading, beside that on the whole device. Best is
    what reads most for what it takes away. None where there is no memory to try.
    """
    items = lone(_DECODES, 1, _KEYS, sizes.block_size)

    def seconds(of: AttentionBackend) -> float:
        return time_step(of, sizes, items, _DECODES, device, clock)

    try:
        whole = seconds(backend)
        speeds = {s: min(whole / seconds(backend.on_share(s)), 1.0) for s in _SHARES}
    except torch.OutOfMemoryError:
        return None
    best = max(_SHARES, key=lambda share: speeds[share] / share)
    return best, speeds[best]


def with_measured_costs(backend: CudaBackend, device: torch.device, clock: Clock) -> UnitCosts:
    """What units cost here; takes up to a few GB of the device for a moment.

    Where that is not to be had, they are what the backend was made with.
    """
    heads = backend.heads
    sizes = Sizes(heads, backend.block_size, backend.kv_dtype)

    def time_units(items: AttentionItems, num_queries: int, costs: UnitCosts) -> float:
        backend.costs = costs
        return time_step(backend, sizes, items, num_queries, device, clock)

    before = backend.costs
    try:
        return measure_costs(
            time_units,
            group=heads.group,
            num_kv_heads=heads.num_kv_heads,
            num_blocks=backend.num_blocks,
            block_size=backend.block_size,
        )
    except torch.OutOfMemoryError:
        return before
    finally:
        backend.costs = before


def _step_of(items: AttentionItems, num_queries: int) -> ModelInput:
    """A step of these items; its tokens' KV goes to the first place of the first block."""
    none = np.zeros(0, dtype=np.int64)
    nobody = Samples(none, none, none, none, none, none, params=[])
    zeros = np.zeros(num_queries, dtype=np.int64)
    return ModelInput(zeros.astype(np.int32), zeros, zeros, items, zeros, nobody)
