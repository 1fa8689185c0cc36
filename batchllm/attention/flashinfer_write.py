"""Rotation and the write to the KV cache by FlashInfer's kernels: two launches a layer."""

from typing import Any

import torch


class Write:
    """How queries and keys are rotated, and where keys and values go.

    FlashInfer looks rotations up by position, in one array of cosines and sines; ours are by token,
    so a token's position there is its number in the step. And it writes into pages of a sequence:
    here all tokens are one, whose page i, of one token, is where token i goes, `slots[i]`, int32
    [num_tokens].
    """

    def __init__(self, library: Any, slots: torch.Tensor) -> None:  # noqa: ANN401
        self._library = library
        self._slots = slots
        count, device = len(slots), slots.device
        self._number = torch.arange(count, dtype=torch.int32, device=device)
        self._zeros = torch.zeros_like(self._number)
        self._indptr = torch.arange(2, dtype=torch.int32, device=device) * count
        self._one = torch.ones(1, dtype=torch.int32, device=device)

    def run(
        self, cos_sin: torch.Tensor, qkv: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """Rotate in `qkv` itself, then write; see `LayerPlan.run`.

        Args:
            cos_sin: float32 [num_tokens, head_dim], each token's cosines, then its sines.
            qkv: as in `LayerPlan.run`.
            keys: the cache, tokens in a block in order.
            values: the same.

        Returns:
            The queries, [num_tokens, num_heads, head_dim], a view of `qkv`.
        """
        num_kv_heads, head_dim = keys.shape[2:]
        num_heads = qkv.shape[1] - 2 * num_kv_heads
        flat = qkv.view(len(qkv), -1)
        self._library.apply_rope_with_cos_sin_cache_inplace(
            self._number,
            flat[:, : num_heads * head_dim],
            flat[:, num_heads * head_dim : -num_kv_heads * head_dim],
            head_dim,
            cos_sin,
            is_neox=True,
        )
        self._library.append_paged_kv_cache(
            qkv[:, num_heads:-num_kv_heads],
            qkv[:, -num_kv_heads:],
            self._zeros,
            self._number,
            (keys.view(-1, 1, num_kv_heads, head_dim), values.view(-1, 1, num_kv_heads, head_dim)),
            self._slots,
            self._indptr,
            self._one,
            "NHD",
        )
        return qkv[:, :num_heads]
