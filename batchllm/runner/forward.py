"""Planned steps through a model's layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from batchllm.attention.backend import CompiledPlan, LayerPlan
from batchllm.models.operations import AttentionCalls
from batchllm.models.registry import Model
from batchllm.runner.device import SideStream, Started
from batchllm.runner.kv_cache import KVCache


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """A step's tokens, or half of them, with their attention planned; see `Model.forward`."""

    plan: LayerPlan
    token_ids: torch.Tensor
    sample_rows: torch.Tensor


@dataclass(frozen=True, slots=True)
class PlannedAttention:
    """A step's attention over a cache, an `Attend` (models/llama.py), compiled where it can be."""

    plan: LayerPlan
    cache: KVCache

    def __call__(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """See `Attend`."""
        plan, keys, values = self.plan, self.cache.keys, self.cache.values
        is_last = layer == len(keys) - 1
        run = plan.run_last if is_last and isinstance(plan, CompiledPlan) else plan.run
        return run(qkv, keys[layer], values[layer])

    def calls(self, qkv: Sequence[torch.Tensor]) -> AttentionCalls | None:
        """See `CompiledAttend`."""
        if not isinstance(self.plan, CompiledPlan):
            return None
        return self.plan.calls(qkv, self.cache.keys, self.cache.values)


def run_layers(model: Model, cache: KVCache, step: PlannedStep) -> torch.Tensor:
    """Hidden states [num_samples, hidden_size] of the tokens to sample."""
    attend = PlannedAttention(step.plan, cache)
    return model.forward(step.token_ids, attend, step.sample_rows)


def run_nano_batches(
    model: Model, cache: KVCache, halves: Sequence[PlannedStep], stream: SideStream
) -> torch.Tensor:
    """Hidden states of the tokens to sample, one half's behind the other's.

    Attention goes to a stream of its own, in the order of the halves, so that each half's runs
    beside the next products of the other (NanoFlow, arXiv 2408.12757). A half may read what those
    before it write.
    """
    passes = [model.layers(half.token_ids, half.sample_rows) for half in halves]
    # Kept until the next of the same half was started, whose products have read it.
    started: list[Started | None] = [None] * len(halves)
    hidden: list[torch.Tensor] = []
    while len(hidden) < len(halves):
        for which, (half, layers) in enumerate(zip(halves, passes, strict=True)):
            last = started[which]
            try:
                index, qkv = next(layers) if last is None else layers.send(last.join())
            except StopIteration as end:
                hidden.append(end.value)
                continue
            attend = partial(half.plan.run, qkv, cache.keys[index], cache.values[index])
            started[which] = stream.start(attend)
    return torch.cat(hidden)
