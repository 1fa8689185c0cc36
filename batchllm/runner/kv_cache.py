"""The KV cache's tensors. Who owns which block is the block pool's business."""

import math
from collections.abc import Callable

import torch

from batchllm.cache.memory import ran_out_of_memory
from batchllm.errors import UsageError
from batchllm.native.pages import zero_pages

_SCALE_BYTES = 4

Allocate = Callable[[tuple[int, ...], torch.dtype], torch.Tensor]


def memory_of(device: torch.device) -> Allocate:
    """What takes memory of a device."""
    if device.type == "cpu":
        return zero_pages
    return lambda shape, dtype: torch.empty(shape, dtype=dtype, device=device)


def cache_dtype(kv_cache_dtype: str) -> torch.dtype | None:
    """What an engine's `kv_cache_dtype` keeps keys and values in; None is the model's dtype."""
    return {"auto": None, "fp8": torch.float8_e4m3fn, "int8": torch.int8}[kv_cache_dtype]


def kv_row_values(head_dim: int, dtype: torch.dtype) -> int:
    """What the cache has for a token's head: its values, and for int8 the float32 they scale by."""
    return head_dim + _SCALE_BYTES if dtype == torch.int8 else head_dim


class KVCache:
    """Keys and values of all layers.

    `keys[layer]` and `values[layer]` are [num_blocks, block_size, num_kv_heads, kv_row_values];
    where in its layer a value lies is up to the attention backend, which alone writes and reads, as
    long as no two blocks share a place. Where `allocate` does not get as much, because a limit is
    set for the process or memory is never overcommitted, there are half as many blocks, or a
    quarter, and so on: `num_blocks` is what it came to.

    Raises:
        UsageError: not even one block is to be had.
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
        allocate: Allocate = zero_pages,
    ) -> None:
        self._allocate = allocate
        self._num_layers = num_layers
        self._block_shape = (block_size, num_kv_heads, kv_row_values(head_dim, dtype))
        self._dtype = dtype
        self.keys, self.values = self._take(num_blocks)

    @property
    def num_blocks(self) -> int:
        return int(self.keys.shape[1])

    def shrink(self, num_blocks: int) -> None:
        """Give all memory back, then take that of `num_blocks`, or fewer; what was held is lost."""
        del self.keys, self.values
        self.keys, self.values = self._take(num_blocks)

    def _take(self, num_blocks: int) -> torch.Tensor:
        shape = (2, self._num_layers, num_blocks, *self._block_shape)
        try:
            return self._allocate(shape, self._dtype)
        except (OSError, RuntimeError) as error:
            if not ran_out_of_memory(error):
                raise
            if num_blocks == 1:
                num_bytes = math.prod(shape) * self._dtype.itemsize
                raise UsageError(
                    f"the system gives no {num_bytes:,} bytes for one block of the KV cache; free "
                    "memory, or raise the limit set for the process (ulimit -v)"
                ) from error
        return self._take(num_blocks // 2)


def kv_bytes_per_token(
    num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> int:
    """Bytes of KV that one token takes in all layers."""
    return 2 * num_layers * num_kv_heads * kv_row_values(head_dim, dtype) * dtype.itemsize
