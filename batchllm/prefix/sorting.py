"""Sort token sequences and measure what neighbours share.

Sorted token sequences need no radix tree: neighbours share the longest prefixes, and the lengths
they share describe the whole tree (ALGORITHMS: "a tree without a tree"). Big-endian bytes compare
like the integers they encode, so Arrow's binary sort orders the sequences without one Python
object a row.
"""

from typing import AnyStr

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from batchllm.request import RaggedTokens

_TOKEN_BYTES = 4
_COMPARE_BLOCK = 1 << 20  # tokens compared at once: bounds the scratch memory to tens of MB
_MIN_WIDTH, _MAX_WIDTH = 32, 1024


def sort_sequences(tokens: RaggedTokens) -> NDArray[np.int64]:
    """Return the permutation that sorts the sequences lexicographically (stable), [n]."""
    big_endian = tokens.values.astype(">i4", copy=True)
    array = pa.Array.from_buffers(
        pa.large_binary(),
        len(tokens),
        [None, pa.py_buffer(tokens.offsets * _TOKEN_BYTES), pa.py_buffer(big_endian)],
    )
    order: NDArray[np.int64] = pc.sort_indices(array).to_numpy().astype(np.int64)
    return order


def common_prefix_lengths(tokens: RaggedTokens, order: NDArray[np.int64]) -> NDArray[np.int64]:
    """Length of the common prefix of each neighbour pair of `order`, in tokens, [n - 1].

    Pairs are compared in slabs that widen while they still agree, so the work is within a factor
    of two of the tokens that are really shared.
    """
    left, right = tokens.offsets[order[:-1]], tokens.offsets[order[1:]]
    lengths = tokens.lengths
    limit = np.minimum(lengths[order[:-1]], lengths[order[1:]])
    shared = np.zeros(len(limit), dtype=np.int64)
    active = np.flatnonzero(limit > 0)
    width = _MIN_WIDTH
    while active.size:
        still_equal = []
        rows = max(1, _COMPARE_BLOCK // width)
        for begin in range(0, active.size, rows):
            pairs = active[begin : begin + rows]
            agreed = _agreed(tokens.values, left[pairs], right[pairs], shared[pairs], width)
            agreed = np.minimum(agreed, limit[pairs] - shared[pairs])
            shared[pairs] += agreed
            still_equal.append(pairs[(agreed == width) & (shared[pairs] < limit[pairs])])
        active = np.concatenate(still_equal)
        width = min(2 * width, _MAX_WIDTH)
    return shared


def _agreed(
    values: NDArray[np.int32],
    left: NDArray[np.int64],
    right: NDArray[np.int64],
    done: NDArray[np.int64],
    width: int,
) -> NDArray[np.int64]:
    """How many of the next `width` tokens agree; may run past a sequence's end (caller clips)."""
    steps = np.arange(width)
    last = len(values) - 1
    a = values[np.minimum((left + done)[:, None] + steps, last)]
    b = values[np.minimum((right + done)[:, None] + steps, last)]
    differs = a != b
    first = differs.argmax(axis=1)
    return np.where(differs[np.arange(len(first)), first], first, width)


def common_prefix(left: AnyStr, right: AnyStr) -> int:
    """How long a prefix two texts, or two runs of bytes, have in common."""
    begin, end = 0, min(len(left), len(right))
    while begin < end:  # the first `begin` agree; do the first `middle`?
        middle = (begin + end + 1) // 2
        if left[begin:middle] == right[begin:middle]:
            begin = middle
        else:
            end = middle - 1
    return begin
