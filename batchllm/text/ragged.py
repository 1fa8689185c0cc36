"""Choosing rows of ragged tokens, without a loop over rows or tokens."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from batchllm.request import RaggedTokens

# Rows are copied so many tokens at a time, as each needs two int64 while it is.
_BLOCK_TOKENS = 1 << 20


def take_rows(tokens: RaggedTokens, rows: NDArray[np.int64]) -> RaggedTokens:
    """The given rows in the given order, repeats allowed."""
    lengths = tokens.lengths[rows]
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    values = np.empty(offsets[-1], dtype=np.int32)
    # Each output position is its row's start in the input plus its place within the row.
    shifts = tokens.offsets[:-1][rows] - offsets[:-1]
    first = 0
    while first < len(rows):
        begin = offsets[first]
        last = max(first + 1, int(offsets.searchsorted(begin + _BLOCK_TOKENS, "right")) - 1)
        end = offsets[last]
        shift = np.repeat(shifts[first:last], lengths[first:last])
        values[begin:end] = tokens.values[shift + np.arange(begin, end)]
        first = last
    return RaggedTokens(values, offsets)


def without_rows(tokens: RaggedTokens, rows: Sequence[int]) -> RaggedTokens:
    """The same rows, the given ones emptied."""
    if not rows:
        return tokens
    keep = np.ones(len(tokens), dtype=np.bool_)
    keep[list(rows)] = False
    lengths = tokens.lengths
    offsets = np.zeros_like(tokens.offsets)
    np.cumsum(np.where(keep, lengths, 0), out=offsets[1:])
    return RaggedTokens(tokens.values[np.repeat(keep, lengths)], offsets)


def rows_with(marked: NDArray[np.bool_], offsets: NDArray[np.int64]) -> list[int]:
    """The rows, ascending, in which a token is marked (bool [num_tokens])."""
    rows: list[int] = np.unique(
        np.searchsorted(offsets, np.flatnonzero(marked), side="right") - 1
    ).tolist()
    return rows
