"""Two backends over one cache: each step is attended to by the one that is faster for it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from batchllm.attention.backend import (
    AttentionBackend,
    GraphBackend,
    GraphPlan,
    Heads,
    LayerPlan,
    Reserve,
    SharingBackend,
)
from batchllm.attention.cuda import make_cuda
from batchllm.attention.flashinfer import make_flashinfer
from batchllm.attention.step_costs import StepCosts, measure_step_costs, sample_decodes
from batchllm.attention.timing import Sizes, gpu_seconds, time_step
from batchllm.models.rope import Rotation
from batchllm.runner.model_input import AttentionItems, ModelInput
from batchllm.runner.staging import Put


@dataclass(frozen=True, slots=True)
class Part:
    """A backend, and what steps cost it."""

    backend: GraphBackend
    costs: StepCosts


class MixedBackend:
    """Plans each step by the part that is expected to take least, on a draw by the first.

    All parts lay the cache out alike. Recorded decodes are the affair of the one that is faster for
    decodes on the whole, and what runs on a share of the device the first one's.
    """

    granularity = 1

    def __init__(self, first: SharingBackend, costs: StepCosts, others: Sequence[Part]) -> None:
        assert all(part.backend.granularity == 1 for part in others)
        self._first = first
        self._parts = [Part(first, costs), *others]
        self.name = " or ".join(part.backend.name for part in self._parts)

    def plan(self, step: ModelInput, rotation: Rotation, put: Put = torch.from_numpy) -> LayerPlan:
        """See `AttentionBackend`."""
        num_tokens = len(step.token_ids)
        best = min(self._parts, key=lambda part: part.costs.seconds(step.items, num_tokens))
        return best.backend.plan(step, rotation, put)

    def graph_plan(self, max_num_tokens: int, rotation: Rotation, reserve: Reserve) -> GraphPlan:
        """See `GraphBackend`."""
        decodes = sample_decodes(block_size=1)
        best = min(self._parts, key=lambda part: sum(part.costs.seconds(*s) for s in decodes))
        return best.backend.graph_plan(max_num_tokens, rotation, reserve)

    def on_share(self, share: float) -> SharingBackend:
        """See `SharingBackend`."""
        return self._first.on_share(share)


def make_mixed(
    block_size: int, heads: Heads | None, kv_dtype: torch.dtype | None
) -> MixedBackend | SharingBackend:
    """The `cuda` and the `flashinfer` backend, after both were timed on the GPU.

    FlashInfer compiles its kernels at first use, which takes minutes once. Where there is no memory
    to time them with, all is left to the first.

    Raises:
        UsageError: one of them cannot do these sizes, or is not there.
    """
    assert heads is not None
    first = make_cuda(block_size, heads, kv_dtype)
    second = make_flashinfer(block_size, heads, kv_dtype)
    sizes = Sizes(heads, block_size, kv_dtype or torch.bfloat16)

    def measure(backend: AttentionBackend) -> StepCosts:
        def time_items(items: AttentionItems, num_queries: int) -> float:
            return time_step(backend, sizes, items, num_queries, torch.device("cuda"), gpu_seconds)

        return measure_step_costs(time_items, block_size)

    try:
        return MixedBackend(first, measure(first), [Part(second, measure(second))])
    except torch.OutOfMemoryError:
        return first
