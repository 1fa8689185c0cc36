"""Choosing rows of ragged tokens, without a loop over rows or tokens."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from batchllm.request import RaggedTokens


def take_rows(tokens: RaggedTokens, rows: NDArray[np.int64]) -> RaggedTokens:
    """The given rows in the given order, repeats allowed."""
    lengths = tokens.lengths[rows]
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    # Each output position is its row's start in the input plus its place within the row.
    shift = np.repeat(tokens.offsets[:-1][rows] - offsets[:-1], lengths)
    return RaggedTokens(tokens.values[shift + np.arange(offsets[-1])], offsets)


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
