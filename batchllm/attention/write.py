"""Keys and values into the cache, for the backends that are written in torch."""

import torch

from batchllm.models.rope import Rotation


def rotate_and_write(
    rotation: Rotation,
    slots: torch.Tensor,
    qkv: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split `qkv`, rotate, and store keys and values at `slots` int64 [num_tokens].

    See `LayerPlan.run` for shapes; within a block of the cache, tokens follow one another. Returns
    the rotated queries [num_tokens, num_heads, head_dim] and keys, and the values [num_tokens,
    num_kv_heads, head_dim].
    """
    num_kv_heads = keys.shape[2]
    num_heads = qkv.shape[1] - 2 * num_kv_heads
    rotated = rotation.apply(qkv[:, : num_heads + num_kv_heads])
    key, value = rotated[:, num_heads:], qkv[:, num_heads + num_kv_heads :]
    keys.flatten(0, 1).index_copy_(0, slots, key)
    values.flatten(0, 1).index_copy_(0, slots, value)
    return rotated[:, :num_heads], key, value
