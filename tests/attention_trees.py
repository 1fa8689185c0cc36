"""Attention items without a scheduler: random prefix trees as a step would meet them."""

import numpy as np
from hypothesis import strategies as st

from batchllm.runner.model_input import AttentionItems, ModelInput


def items_of(ranges, block_size):
    """Items from (query_begin, query_end, kv_len, own, kv_start), each with blocks of its own."""
    begin, end, length, own, start = (np.array(column) for column in zip(*ranges, strict=True))
    num_blocks = -(-length // block_size)
    offsets = np.concatenate([[0], np.cumsum(num_blocks)])
    blocks = np.random.default_rng(0).permutation(offsets[-1])
    return AttentionItems(begin, end, start, length, own.astype(bool), offsets, blocks)


def step_of(items, block_size):
    """The step whose attention that is; what it samples is left out."""
    own = np.flatnonzero(items.own)
    own = own[np.argsort(items.query_begin[own])]
    count = items.query_end[own] - items.query_begin[own]
    places = [
        np.arange(length - n, length) for length, n in zip(items.kv_len[own], count, strict=True)
    ]
    positions = np.concatenate([p + items.kv_start[i] for p, i in zip(places, own, strict=True)])
    slots = [
        items.blocks(i)[p // block_size] * block_size + p % block_size
        for p, i in zip(places, own, strict=True)
    ]
    none = np.zeros(0, dtype=np.int64)
    token_ids = np.zeros(len(positions), dtype=np.int32)
    return ModelInput(token_ids, positions, np.concatenate(slots), items, none, None)


@st.composite
def decode_trees(draw, block_size, num_decodes):
    """So many decodes below a random tree of segments that are only read."""
    ranges = []

    def grow(first, last, start, depth):
        while first < last:
            end = draw(st.integers(first + 1, last)) if depth else first + 1
            length = draw(st.integers(1, 24))
            if end - first == 1 or depth == 0 or draw(st.integers(0, 4)) == 0:
                end = first + 1
                ranges.append((first, end, length, True, start))
            else:
                ranges.append((first, end, length, False, start))
                grow(first, end, start + length, depth - 1)
            first = end

    grow(0, num_decodes, 0, 4)
    ranges.sort(key=lambda r: (not r[3], r[0]))
    return items_of(ranges, block_size)


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
