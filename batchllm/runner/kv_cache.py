"""The KV cache's tensors. Who owns which block is the block pool's business."""

import contextlib
import math
import mmap

import torch


class KVCache:
    """Keys and values of all layers.

    `keys[layer]` and `values[layer]` are [num_blocks, block_size, num_kv_heads, head_dim]; where
    in its block a value lies is up to the attention backend, which alone writes and reads. The
    memory is zero pages of the operating system until it is written, so a generous pool costs
    nothing before it is used; and never-written slots, which masked reads may touch, are no NaNs.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> None:
        shape = (2, num_layers, num_blocks, block_size, num_kv_heads, head_dim)
        count = math.prod(shape)
        memory = mmap.mmap(-1, count * dtype.itemsize)
        if hasattr(mmap, "MADV_HUGEPAGE"):  # first use of a small page costs as much as filling it
            with contextlib.suppress(OSError):  # a kernel built without
                memory.madvise(mmap.MADV_HUGEPAGE)
        self.keys, self.values = torch.frombuffer(memory, dtype=dtype, count=count).view(shape)


def kv_bytes_per_token(
    num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> int:
    """Bytes of KV that one token takes in all layers."""
    return 2 * num_layers * num_kv_heads * head_dim * dtype.itemsize
