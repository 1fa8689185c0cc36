"""Attention as the textbook has it: the yardstick for every faster backend."""

from dataclasses import dataclass

import torch

from batchllm.runner.model_input import AttentionItems


class ReferenceBackend:
    """One query at a time, its whole context gathered, one softmax in float64.

    No partial results and no log-sum-exp: it shares no idea with what it checks.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size

    def plan(self, items: AttentionItems, num_tokens: int) -> "ReferencePlan":
        """Collect the slots that every query sees."""
        slots: list[list[torch.Tensor]] = [[] for _ in range(num_tokens)]
        for item in range(len(items)):
            blocks = torch.from_numpy(items.blocks(item))
            every = (blocks[:, None] * self._block_size + torch.arange(self._block_size)).ravel()
            for query in range(int(items.query_begin[item]), int(items.query_end[item])):
                hidden = int(items.query_end[item]) - 1 - query if items.own[item] else 0
                slots[query].append(every[: int(items.kv_len[item]) - hidden])
        return ReferencePlan([torch.cat(parts) for parts in slots])


@dataclass(frozen=True, slots=True)
class ReferencePlan:
    """Slots seen by each query, in any order."""

    slots: list[torch.Tensor]

    def run(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
    ) -> torch.Tensor:
        """See `LayerPlan.run`."""
        num_tokens, num_heads, head_dim = query.shape
        num_kv_heads = key_cache.shape[2]
        keys = key_cache.view(-1, num_kv_heads, head_dim)
        values = value_cache.view(-1, num_kv_heads, head_dim)
        out = torch.empty_like(query)
        for token in range(num_tokens):
            q = query[token].double().view(num_kv_heads, -1, head_dim)
            k = keys[self.slots[token]].double()
            v = values[self.slots[token]].double()
            weights = torch.softmax(torch.einsum("hgd,lhd->hgl", q, k) / head_dim**0.5, dim=-1)
            out[token] = torch.einsum("hgl,lhd->hgd", weights, v).reshape(num_heads, head_dim)
        return out
