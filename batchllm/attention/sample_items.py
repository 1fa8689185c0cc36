"""Steps to be timed: queries and what they attend to, made up."""

import numpy as np
from numpy.typing import NDArray

from batchllm.runner.model_input import AttentionItems

Ints = NDArray[np.int64]


def lone(count: int, size: int, keys: int, block_size: int) -> AttentionItems:
    """Chunks of `size` tokens that share nothing and are the last of `keys` tokens each."""
    first = np.arange(count) * size
    return _items(first, first + size, np.full(count, keys), np.ones(count, bool), block_size)


def grouped(count: int, members: int, size: int, keys: int, block_size: int) -> AttentionItems:
    """Groups of chunks of `size` tokens that have nothing but `keys` before them, in common."""
    num_chunks = count * members
    first = np.arange(num_chunks) * size
    group = np.arange(count) * members * size
    return _items(
        np.concatenate([first, group]),
        np.concatenate([first + size, group + members * size]),
        np.repeat([size, keys], [num_chunks, count]),
        np.arange(num_chunks + count) < num_chunks,
        block_size,
    )


def _items(
    begin: Ints, end: Ints, kv_len: Ints, own: NDArray[np.bool_], block_size: int
) -> AttentionItems:
    """Each segment in blocks of its own."""
    num_blocks = -(-kv_len // block_size)
    offsets = np.concatenate([[0], np.cumsum(num_blocks)])
    is_shared = ~own
    return AttentionItems(
        query_begin=begin,
        query_end=end,
        kv_start=np.where(own, int(kv_len[is_shared].max(initial=0)), 0),
        kv_len=kv_len,
        own=own,
        block_offsets=offsets,
        block_ids=np.arange(offsets[-1]),
    )
