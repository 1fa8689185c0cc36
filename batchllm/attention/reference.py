"""Attention as the textbook has it: the yardstick for every faster backend."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from batchllm.attention.write import rotate_and_write
from batchllm.models.rope import Rotation
from batchllm.runner.model_input import ModelInput
from batchllm.runner.staging import Put

Ints = NDArray[np.int64]


class ReferenceBackend:
    """One query at a time, its whole context gathered, one softmax in float64.

    No partial results and no log-sum-exp: it shares no idea with what it checks.
    """

    name = "reference"
    granularity = 1

    def __init__(self, block_size: int, head_dim: int) -> None:
        self._block_size = block_size

    def plan(
        self, step: ModelInput, rotation: Rotation, put: Put = torch.from_numpy
    ) -> "ReferencePlan":
        """Collect the slots that every query sees."""
        items, num_tokens = step.items, len(step.token_ids)
        slots: list[list[Ints]] = [[] for _ in range(num_tokens)]
        for item in range(len(items)):
            blocks = items.blocks(item)
            every = (blocks[:, None] * self._block_size + np.arange(self._block_size)).ravel()
            for query in range(int(items.query_begin[item]), int(items.query_end[item])):
                hidden = int(items.query_end[item]) - 1 - query if items.own[item] else 0
                slots[query].append(every[: int(items.kv_len[item]) - hidden])
        seen = [np.concatenate(parts) for parts in slots]
        all_seen = torch.split(put(np.concatenate(seen)), list(map(len, seen)))
        return ReferencePlan(rotation, put(step.slots), all_seen)


@dataclass(frozen=True, slots=True)
class ReferencePlan:
    """`slots` are where the step's KV goes, `seen` those seen by each query, in any order."""

    rotation: Rotation
    slots: torch.Tensor
    seen: Sequence[torch.Tensor]

    def run(self, qkv: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """See `LayerPlan.run`."""
        query, _, _ = rotate_and_write(self.rotation, self.slots, qkv, keys, values)
        num_kv_heads, head_dim = keys.shape[2:]
        keys, values = keys.flatten(0, 1), values.flatten(0, 1)
        out = torch.empty_like(query)
        for token, seen in enumerate(self.seen):
            q = query[token].double().view(num_kv_heads, -1, head_dim)
            k, v = keys[seen].double(), values[seen].double()
            weights = torch.softmax(torch.einsum("hgd,lhd->hgl", q, k) / head_dim**0.5, dim=-1)
            out[token] = torch.einsum("hgl,lhd->hgd", weights, v).flatten(0, 1)
        return out.flatten(1)
