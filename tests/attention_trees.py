"""Attention items without a scheduler: random prefix trees as a step would meet them."""

import numpy as np
from hypothesis import strategies as st

from batchllm.runner.model_input import AttentionItems


def items_of(ranges, block_size):
    """Items from (query_begin, query_end, kv_len, own, kv_start), each with blocks of its own."""
    begin, end, length, own, start = (np.array(column) for column in zip(*ranges, strict=True))
    num_blocks = -(-length // block_size)
    offsets = np.concatenate([[0], np.cumsum(num_blocks)])
    blocks = np.random.default_rng(0).permutation(offsets[-1])
    return AttentionItems(begin, end, start, length, own.astype(bool), offsets, blocks)


@st.composite
def trees(draw, block_size, most_tokens=24):
    """A random tree in depth-first order: nodes that are computed or only read, at any depth."""
    ranges = []

    def grow(query, start, depth):
        """A node that begins at position `start`; returns the query behind its subtree."""
        first = query
        length = draw(st.integers(1, most_tokens))
        chunk = draw(st.integers(1, min(length, 9))) if depth == 0 or draw(st.booleans()) else 0
        query += chunk
        inner = query
        if depth:
            for _ in range(draw(st.integers(0 if chunk else 1, 3))):
                query = grow(query, start + length, depth - 1)
        if chunk:
            ranges.append((first, inner, length, True, start))
        if query > inner:
            ranges.append((inner, query, length, False, start))
        return query

    query = 0
    for _ in range(draw(st.integers(1, 4))):
        query = grow(query, 0, draw(st.integers(0, 3)))
    ranges.sort(key=lambda r: (not r[3], r[0]))
    return items_of(ranges, block_size)
